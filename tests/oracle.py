"""The oracle: the Jacobian by plain autograd, sample by sample in float64, and kernels by their definition.

Nothing of ooc_ntk is used here.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn

Function = Callable[[Tensor, Tensor | None], Tensor]


def _logits(output: Tensor, target: Tensor | None) -> Tensor:
    return output


def _loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output[None], target[None])


def _margin(output: Tensor, target: Tensor) -> Tensor:
    others = torch.cat([output[: int(target)], output[int(target) + 1 :]])
    return output[int(target)] - torch.logsumexp(others, 0)


FUNCTIONS: dict[str, Function] = {"logits": _logits, "loss": _loss, "margin": _margin}


def jacobian(
    module: nn.Module,
    inputs: Tensor | tuple[Tensor, ...] | dict[str, Tensor],
    targets: Tensor | None = None,
    outputs: str | Function = "logits",
    names: Sequence[str] | None = None,
) -> np.ndarray:
    """Dense Jacobian, (samples, outputs, parameters) float64, columns in ``named_parameters()`` order."""
    module = copy.deepcopy(module).double()
    chosen = [value for name, value in module.named_parameters() if names is None or name in names]
    function = FUNCTIONS[outputs] if isinstance(outputs, str) else outputs
    args = (inputs,) if isinstance(inputs, Tensor) else inputs
    count = len(next(iter(args.values())) if isinstance(args, dict) else args[0])

    def one(value: Tensor, index: int) -> Tensor:
        value = value[index : index + 1]
        return value.double() if value.is_floating_point() else value

    rows = []
    for index in range(count):
        if isinstance(args, dict):
            result = module(**{name: one(value, index) for name, value in args.items()})
        else:
            result = module(*(one(value, index) for value in args))
        values = function(result[0], None if targets is None else targets[index]).reshape(-1)
        gradients = [
            torch.autograd.grad(value, chosen, retain_graph=True, allow_unused=True, materialize_grads=True)
            for value in values
        ]
        rows.append(torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in gradients]))
    return torch.stack(rows).numpy()


def kernel(
    rows: np.ndarray, train: int, kind: str = "trace", scale: str = "sum", normalize: str | None = None
) -> np.ndarray:
    """The kernel of all samples against the first ``train``, as DESIGN §2 defines it.

    Args:
        rows: (samples, outputs, parameters).
        train: samples that have columns.
        kind: ``trace``, ``pseudo``, ``output:c`` or ``full``.
        scale: ``mean`` divides by the number of outputs.
        normalize: ``cosine`` or None.
    """
    samples, outputs, parameters = rows.shape
    if kind == "full":
        flat = rows.reshape(samples * outputs, parameters)
        square, columns = flat @ flat.T, train * outputs
    else:
        if kind == "pseudo":
            rows = rows.sum(1, keepdims=True)
        elif kind.startswith("output:"):
            rows = rows[:, [int(kind[7:])]]
        square, columns = np.einsum("icp,jcp->ij", rows, rows, optimize=True), train
    if scale == "mean":
        square = square / outputs
    if normalize == "cosine":
        diagonal = np.sqrt(square.diagonal())
        inverse = np.divide(1.0, diagonal, out=np.zeros_like(diagonal), where=diagonal > 0)
        square = square * inverse[:, None] * inverse[None, :]
    return square[:, :columns]


def error(found: object, wanted: np.ndarray) -> float:
    """Relative Frobenius error."""
    found = np.asarray(found, dtype=np.float64)
    assert found.shape == wanted.shape, f"shape {found.shape}, expected {wanted.shape}"
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@functools.cache
def case_jacobian(name: str, trained: bool = False, outputs: str | Function = "logits") -> np.ndarray:
    """Jacobian of a case of :mod:`tests.cases`, train and test samples, computed once per session."""
    from tests.cases import case

    chosen = case(name, trained=trained)
    return jacobian(chosen.module, chosen.images, chosen.targets, outputs)
