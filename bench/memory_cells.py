"""The grid of jobs whose memory promises are checked: families, dataflows, budgets, shapes and precisions."""

from __future__ import annotations

import itertools
import random
from dataclasses import astuple, dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

import ooc_ntk

FAMILIES: Final = ("mlp", "cnn", "transformer", "custom")
DATAFLOWS: Final = ("resident", "recompute", "spill", "projected")
BUDGETS: Final = ("smallest", "middle", "ample")
SHAPES: Final = ("train", "train and test", "few outputs", "many outputs", "full")
PRECISIONS: Final = ("float32", "float64", "bf16")

#: Cells that are run of the 720 of the whole grid, and those of them that every test run takes.
CELLS, ALWAYS = 60, 6

#: Seed of the choice.
SEED = 6

#: Outputs by shape. A full kernel has their square of entries per pair of samples.
OUTPUTS: Final = {"train": 6, "train and test": 6, "few outputs": 1, "many outputs": 24, "full": 4}

#: Samples by family at six outputs, so that what is held takes hundreds of MiB and the run some seconds.
SAMPLES: Final = {"mlp": 900, "cnn": 150, "transformer": 80, "custom": 64}

#: Tokens of a text, and words of the vocabulary.
TOKENS, WORDS = 24, 400


@dataclass(frozen=True)
class Cell:
    """One job of the grid, under one kind of budget.

    Attributes:
        family: of the network.
        dataflow: how it is run; ``projected`` keeps features on disk.
        budget: ``smallest`` (what the planner says would do), ``middle`` (40% more), or ``ample``.
        shape: of the data and the kernel.
        precision: of the job.
    """

    family: str
    dataflow: str
    budget: str
    shape: str
    precision: str

    def __str__(self) -> str:
        return "/".join(str(value).replace(" ", "-") for value in astuple(self))

    @classmethod
    def parse(cls, text: str) -> Cell:
        """Read what ``str`` wrote."""
        family, dataflow, budget, shape, precision = text.split("/")
        return cls(family, dataflow, budget, shape.replace("-", " "), precision)


def chosen_cells(count: int = CELLS, seed: int = SEED) -> list[Cell]:
    """A choice from the grid that covers pairs of values first, then triples.

    Args:
        count: cells.
        seed: of the choice.

    Returns:
        Cells, in the order in which they cover the most that those before left out.
    """
    grid = [Cell(*values) for values in itertools.product(FAMILIES, DATAFLOWS, BUDGETS, SHAPES, PRECISIONS)]
    random.Random(seed).shuffle(grid)
    pairs: set[tuple[Any, ...]] = set()
    triples: set[tuple[Any, ...]] = set()
    chosen: list[Cell] = []
    while grid and len(chosen) < count:
        best = max(grid, key=lambda cell: (len(_groups(cell, 2) - pairs), len(_groups(cell, 3) - triples)))
        pairs |= _groups(best, 2)
        triples |= _groups(best, 3)
        chosen.append(best)
        grid.remove(best)
    return chosen


def _groups(cell: Cell, size: int) -> set[tuple[Any, ...]]:
    return set(itertools.combinations(enumerate(astuple(cell)), size))


def make_job(cell: Cell) -> ooc_ntk.Job:
    """The job of a cell: seeded network and data."""
    torch.manual_seed(0)
    outputs = OUTPUTS[cell.shape]
    model = {"mlp": _mlp, "cnn": _cnn, "transformer": Transformer, "custom": Custom}[cell.family](outputs).eval()
    # The fewer rows a sample has, the more samples, but not in proportion: contracting goes with their square.
    count = int(SAMPLES[cell.family] * (6 / outputs) ** 0.5)
    train = _data(cell.family, count, 0)
    test = _data(cell.family, count // 3, 1) if cell.shape == "train and test" else None
    sketch = None
    if cell.dataflow == "projected":
        # A dense one is made anew for every batch, which takes minutes in the small batches of small budgets.
        dense = outputs == 1 and cell.budget == "ample"
        sketch = ooc_ntk.Projection("gaussian" if dense else "sjlt", dim=1024)
    return ooc_ntk.Job(
        model=model,
        train=train,
        test=test,
        kernel="full" if cell.shape == "full" else "trace",
        precision=cell.precision,
        device="cpu",
        projection=sketch,
    )


def preferences(cell: Cell) -> ooc_ntk.Preferences:
    """What is fixed by hand: the dataflow, and rows for all outputs."""
    return ooc_ntk.Preferences(dataflow=None if cell.dataflow == "projected" else cell.dataflow, every_output=True)


def _data(family: str, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if family == "transformer":
        return torch.randint(WORDS, (count, TOKENS), generator=generator)
    shape = (3, 16, 16) if family == "cnn" else (128,)
    return torch.rand(count, *shape, generator=generator)


def _mlp(outputs: int) -> nn.Module:
    """Many narrow layers: factors that are large beside the cost of contracting them."""
    layers: list[nn.Module] = [nn.Linear(128, 320)]
    for _ in range(24):
        layers += [nn.Tanh(), nn.Linear(320, 320)]
    return nn.Sequential(*layers, nn.Tanh(), nn.Linear(320, outputs))


def _cnn(outputs: int) -> nn.Module:
    """Convolutions with batch norm in eval mode."""
    layers: list[nn.Module] = []
    for before, after, stride in ((3, 24, 1), (24, 48, 2), (48, 64, 2)):
        layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, outputs))


class Transformer(nn.Module):
    """Token and position embeddings, two blocks of attention and MLP with layer norm, mean of the last states."""

    def __init__(self, outputs: int, width: int = 128, heads: int = 4) -> None:
        """Make one with so many outputs."""
        super().__init__()
        self.words = nn.Embedding(WORDS, width)
        self.places = nn.Parameter(0.1 * torch.randn(TOKENS, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (samples, outputs) of texts (samples, tokens)."""
        states = self.words(tokens) + self.places
        for block in self.blocks:
            states = block(states)
        return self.head(self.norm(states).mean(1))


class _Squared(torch.autograd.Function):
    """x·|x| with a derivative of its own, which neither layer rules nor ``vmap`` see through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.abs()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x.abs() * gradient


class Custom(nn.Module):
    """Weights that are made from parameters by a custom function: every sample by autograd, row by row."""

    def __init__(self, outputs: int, width: int = 640) -> None:
        """Make one with so many outputs."""
        super().__init__()
        self.first = nn.Parameter(torch.randn(width, 128) / 4)
        self.second = nn.Parameter(torch.randn(width, width) / 6)
        self.last = nn.Parameter(torch.randn(outputs, width) / 6)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (samples, outputs) of (samples, 128)."""
        for weight in (self.first, self.second):
            x = torch.tanh(x @ _Squared.apply(weight).T)
        return x @ self.last.T
