"""Correctness of exact kernels on a device: every representation, precision and kind of kernel against float64."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

import ooc_ntk
from ooc_ntk.compute.contract import check_precision
from ooc_ntk.compute.fused import can_fuse, gram_window, sum_windows
from ooc_ntk.compute.pairwise import contract_pairwise
from ooc_ntk.errors import InputError
from ooc_ntk.planning.factors import LayerFactors, Window
from ooc_ntk.planning.spans import DENSE, FACTORED, PAIRWISE, TOKENS
from ooc_ntk.units import ITEM_BYTES

from .models import SEED
from .table import aligned, relative_error

#: Samples of every network, and of a tile: kernels of three tiles and more, the last one narrower.
TRAIN, TEST, TILE = 20, 7, 9

#: Relative Frobenius error of the fused kernel's sums in float32 (as the tests allow).
FUSED_TOLERANCE: Final = 5e-7


class Tokens(nn.Module):
    """An embedding, an encoder layer and a head, on integer tokens."""

    def __init__(self, words: int = 11, width: int = 8, outputs: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.layer = nn.TransformerEncoderLayer(width, 2, 16, dropout=0.0, activation="gelu", batch_first=True)
        self.head = nn.Linear(width, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (samples, positions) to (samples, outputs)."""
        return self.head(self.layer(self.embedding(tokens)).mean(1))


def convolutions() -> nn.Module:
    """A stride, padding, groups and a bias; its third convolution has 4 × 4 positions."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.GELU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.GELU(),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 3),
    )


def mlp() -> nn.Module:
    """One position a sample."""
    return nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 3))


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(SEED + 1))


def _words(samples: int) -> Tensor:
    return torch.randint(0, 11, (samples, 6), generator=torch.Generator().manual_seed(SEED + 1))


#: Networks and their inputs.
NETWORKS: Final[dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]]] = {
    "convolutions": (convolutions, lambda samples: _normal(samples, 3, 8, 8)),
    "mlp": (mlp, lambda samples: _normal(samples, 10)),
    "tokens": (Tokens, _words),
}

#: Kinds of kernel: options of a job, and whether there are test rows.
KINDS: Final[dict[str, tuple[dict[str, Any], bool]]] = {
    "trace": ({}, False),
    "trace, test rows": ({}, True),
    "pseudo": ({"kernel": "pseudo"}, True),
    "output:1": ({"kernel": "output:1"}, True),
    "full": ({"kernel": "full"}, True),
    "loss": ({"outputs": "loss"}, True),
    "cosine": ({"normalize": "cosine"}, True),
}

#: Kinds that are computed in every representation that can be asked for; the others as planned.
REPRESENTED: Final = ("trace, test rows", "full")
REPRESENTATIONS: Final = ("dense", "factored", "pairwise")

_CHOICES: Final = {DENSE: "dense", FACTORED: "factored", PAIRWISE: "pairwise", TOKENS: "tokens"}


@dataclass(frozen=True)
class Check:
    """One kernel beside float64.

    Attributes:
        network: its name.
        precision: of the job.
        kind: of kernel.
        representation: that was asked for, or "planned".
        error: relative Frobenius error.
        largest: the largest error of an entry over the largest entry.
        allowed: relative Frobenius error that the plan allows.
        choices: how blocks were held and contracted.
    """

    network: str
    precision: str
    kind: str
    representation: str
    error: float
    largest: float
    allowed: float
    choices: frozenset[str]

    @property
    def passed(self) -> bool:
        """Whether it is within the tolerance; NaN is not."""
        return self.error <= self.allowed


def precisions_of(device: str) -> tuple[str, ...]:
    """Every precision that this package knows and the device has."""
    found = []
    for precision in ITEM_BYTES:
        try:
            check_precision(precision, device)
        except InputError:
            continue
        found.append(precision)
    return tuple(found)


def exact_rows(model: nn.Module, inputs: Tensor, targets: Tensor, outputs: str) -> np.ndarray:
    """The Jacobian by plain autograd in float64 on the CPU: (samples, outputs, parameters)."""
    double = inputs.double() if inputs.is_floating_point() else inputs
    parameters = list(model.double().parameters())
    rows = []
    for sample, target in zip(double, targets, strict=True):
        logits = model(sample[None])[0]
        values = [F.cross_entropy(logits[None], target[None])] if outputs == "loss" else list(logits)
        rows.append(
            torch.stack(
                [
                    torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, parameters, retain_graph=True)])
                    for value in values
                ]
            )
        )
    return torch.stack(rows).numpy()


def exact_kernel(rows: np.ndarray, train: int, kernel: str = "trace", normalize: str | None = None) -> np.ndarray:
    """The kernel of all samples against the first ``train`` by its definition."""
    samples, outputs, parameters = rows.shape
    if kernel == "full":
        flat = rows.reshape(samples * outputs, parameters)
        return (flat @ flat.T)[:, : train * outputs]
    if kernel == "pseudo":
        rows = rows.sum(1, keepdims=True)
    elif kernel.startswith("output:"):
        rows = rows[:, [int(kernel.partition(":")[2])]]
    square = np.einsum("icp,jcp->ij", rows, rows, optimize=True)
    if normalize == "cosine":
        roots = np.sqrt(square.diagonal())
        square = square / roots[:, None] / roots[None, :]
    return square[:, :train]


def check_kernels(
    device: str, precisions: Sequence[str], networks: Sequence[str], kinds: Sequence[str]
) -> Iterator[Check]:
    """Compute small kernels in every way and compare them.

    Args:
        device: torch device string.
        precisions: names.
        networks: names, of :data:`NETWORKS`.
        kinds: names, of :data:`KINDS`.

    Yields:
        A check per kernel.
    """
    targets = torch.arange(TRAIN + TEST) % 3
    for network in networks:
        make, data = NETWORKS[network]
        torch.manual_seed(SEED)
        inputs, model = data(TRAIN + TEST), make().eval()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        rows = {outputs: exact_rows(model, inputs, targets, outputs) for outputs in ("logits", "loss")}
        for precision in precisions:
            for kind in kinds:
                options, tested = KINDS[kind]
                for representation in (None, *(REPRESENTATIONS if kind in REPRESENTED else ())):
                    model = make().eval()
                    model.load_state_dict(state)
                    job = ooc_ntk.Job(
                        model=model,
                        train=(inputs[:TRAIN], targets[:TRAIN]),
                        test=(inputs[TRAIN:], targets[TRAIN:]) if tested else None,
                        precision=precision,
                        device=device,
                        **options,
                    )
                    asked = ooc_ntk.Preferences(representation=representation, tile_samples=TILE)
                    found, plan = _computed(job, asked)
                    exact = exact_kernel(
                        rows[options.get("outputs", "logits")],
                        TRAIN,
                        options.get("kernel", "trace"),
                        options.get("normalize"),
                    )[: len(found)]
                    yield Check(
                        network,
                        precision,
                        kind,
                        representation or "planned",
                        relative_error(found, exact),
                        float(np.abs(found - exact).max() / np.abs(exact).max()),
                        plan.tolerance,
                        frozenset(_CHOICES[block.choice] for block in plan.blocks),
                    )


def _computed(job: ooc_ntk.Job, asked: ooc_ntk.Preferences) -> tuple[np.ndarray, ooc_ntk.Plan]:
    with tempfile.TemporaryDirectory(prefix="ooc-ntk-bench-") as folder:
        plan = ooc_ntk.plan(job, preferences=asked, out=folder)
        kernel = ooc_ntk.run(job, Path(folder) / "run", plan=plan, progress=False, proof=False)
        return np.asarray(kernel, dtype=np.float64), plan


def check_fused(device: str) -> tuple[float, float] | None:
    """The fused kernel of a late convolution beside float64, and beside the unfused way in float32.

    Args:
        device: torch device string.

    Returns:
        The relative error of the fused sums, and of a whole contraction with them; None where there is no such kernel.
    """
    window = Window((4, 4), (3, 3), (1, 1), (1, 1), (1, 1), (1, 1))
    factors = LayerFactors("convolution", 16, 9 * 8, 6, bias=True, window=window)
    if not can_fuse(factors, device):
        return None
    rows, columns = 37, 70
    generator = torch.Generator(device).manual_seed(SEED)
    options: dict[str, Any] = {"generator": generator, "device": device}
    inputs = torch.randn(gram_window(factors).pixels * rows, gram_window(factors).pixels * columns, **options)
    gradients = torch.randn(16 * rows, 16 * columns, **options)
    tiles = [
        (torch.randn(count, factors.input_items, **options), torch.randn(count, 16, 3, 6, **options))
        for count in (rows, columns)
    ]
    found = sum_windows(inputs, gradients, factors, rows, columns, 1).double()

    def whole(fused: bool) -> Tensor:
        total = torch.zeros(rows, columns, dtype=torch.float64, device=device)
        sides = tiles if fused else [tuple(part.double() for part in side) for side in tiles]

        def add(block: Tensor, row: int, column: int) -> None:
            total[row : row + block.shape[0], column : column + block.shape[1]] += block

        contract_pairwise(factors, sides[0], sides[1], 1, add, fused=fused)
        return total

    exact = _shifted(inputs.double(), rows, columns)
    exact = (exact.view(16, rows, 16, columns) * gradients.double().view(16, rows, 16, columns)).sum((0, 2))
    return (
        relative_error(found.cpu().numpy(), exact.cpu().numpy()),
        relative_error(whole(True).cpu().numpy(), whole(False).cpu().numpy()),
    )


def _shifted(products: Tensor, rows: int, columns: int) -> Tensor:
    """Inner products of 3 × 3 windows of 4 × 4 pixels from those of pixels, and the bias's one, by padding."""
    pixels = products.view(4, 4, rows, 4, 4, columns).permute(2, 5, 0, 1, 3, 4)
    padded = F.pad(pixels, (1, 1, 1, 1, 1, 1, 1, 1))
    total = torch.ones_like(pixels)
    for dy in range(3):
        for dx in range(3):
            total += padded[:, :, dy : dy + 4, dx : dx + 4, dy : dy + 4, dx : dx + 4]
    return total.permute(2, 3, 0, 4, 5, 1).reshape(16 * rows, 16 * columns)


def table_of(checks: Sequence[Check]) -> list[str]:
    """The worst errors by network and precision, and every check that failed."""
    lines: list[tuple[str, ...]] = [("network", "precision", "kernels", "error", "largest", "allowed", "")]
    for network, precision in dict.fromkeys((check.network, check.precision) for check in checks):
        mine = [check for check in checks if (check.network, check.precision) == (network, precision)]
        worst = max(mine, key=lambda check: check.error / check.allowed)
        lines.append(
            (
                network,
                precision,
                str(len(mine)),
                f"{worst.error:.1e}",
                f"{max(check.largest for check in mine):.1e}",
                f"{worst.allowed:.0e}",
                "passed" if all(check.passed for check in mine) else "FAILED",
            )
        )
    failed = [
        f"FAILED: {check.kind} of {check.network} in {check.precision}, {check.representation}: relative error "
        f"{check.error:.1e}, allowed {check.allowed:.0e}"
        for check in checks
        if not check.passed
    ]
    return [*aligned(lines), *failed]
