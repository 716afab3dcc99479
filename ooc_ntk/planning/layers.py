"""Layer-wise kernels: which columns of which span belong to which layer, and how many layers are open at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from .spans import Choice, Span

#: Where the pseudo-parameters of kernels of features lie, under the names of the layers whose features they take.
FEATURES: Final = "(features)"

#: Name of the layer of parameters that belong to the model itself.
MODEL: Final = "(model)"


class LayerBlock(Protocol):
    """What is needed of a parameter block."""

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of its parameters, all of one layer."""

    @property
    def columns(self) -> int:
        """Number of scalars."""


@dataclass(frozen=True)
class LayerRun:
    """A run of columns of one span that belong to one layer.

    Attributes:
        layer: index of the layer.
        columns: the run within a dense span; None for a span that is held as factors, which is of one layer.
    """

    layer: int
    columns: slice | None


def layer_of(parameter: str) -> str:
    """The layer of a parameter: its name without the last part; of a pseudo-parameter, whose features it takes.

    >>> layer_of("block.fc.weight"), layer_of("(features).block.fc.weight"), layer_of("scale")
    ('block.fc', 'block.fc', '(model)')
    """
    return parameter.rpartition(".")[0].removeprefix(f"{FEATURES}.") or MODEL


def layer_name(block: LayerBlock) -> str:
    """The layer of a block.

    >>> from .workload import ParameterBlock
    >>> layer_name(ParameterBlock("fc", ("block.fc.weight", "block.fc.bias"), 0, 6)), MODEL
    ('block.fc', '(model)')
    """
    return layer_of(block.parameters[0])


def layer_names(blocks: Sequence[LayerBlock]) -> tuple[str, ...]:
    """Every layer, in the model's order."""
    return tuple(dict.fromkeys(layer_name(block) for block in blocks))


def layer_runs(
    blocks: Sequence[LayerBlock], choices: Sequence[Choice], spans: Sequence[Span]
) -> tuple[tuple[LayerRun, ...], ...]:
    """Cut every span at the borders of layers.

    Args:
        blocks: the parameter blocks, in column order.
        choices: how each is held.
        spans: the spans that they are cut into.

    Returns:
        The runs of every span; together they hold every column once.

    >>> from .spans import DENSE, FACTORED, BlockShape, lay_spans
    >>> from .workload import ParameterBlock
    >>> blocks = [ParameterBlock(n, (f"{n}.weight",), 0, s) for n, s in (("a", 6), ("b", 50), ("c", 4))]
    >>> choices = (DENSE, FACTORED, DENSE)
    >>> spans = lay_spans([BlockShape(b.columns) for b in blocks], choices, 8)
    >>> [[(run.layer, run.columns) for run in runs] for runs in layer_runs(blocks, choices, spans)]
    [[(1, None)], [(0, slice(0, 6, None)), (2, slice(6, 8, None))], [(2, slice(0, 2, None))]]
    """
    number = {name: index for index, name in enumerate(layer_names(blocks))}
    edges: list[tuple[int, int, int]] = []
    position = 0
    for block, choice in zip(blocks, choices, strict=True):
        if choice.representation == "dense":
            edges.append((position, position + block.columns, number[layer_name(block)]))
            position += block.columns
    found: list[tuple[LayerRun, ...]] = []
    for span in spans:
        if span.block is not None:
            found.append((LayerRun(number[layer_name(blocks[span.block])], None),))
            continue
        runs: list[LayerRun] = []
        for start, stop, layer in edges:
            first, last = max(start, span.start) - span.start, min(stop, span.stop) - span.start
            if first >= last:
                continue
            if runs and runs[-1].layer == layer and runs[-1].columns is not None:
                first = runs.pop().columns.start  # type: ignore[union-attr]
            runs.append(LayerRun(layer, slice(first, last)))
        found.append(tuple(runs))
    return tuple(found)


def last_uses(runs: Sequence[Sequence[LayerRun]]) -> dict[int, int]:
    """The last span of every layer, after which its kernel is complete."""
    return {run.layer: span for span, found in enumerate(runs) for run in found}


def open_layers(runs: Sequence[Sequence[LayerRun]]) -> int:
    """Most layers that are begun and not complete at once.

    >>> one, two = LayerRun(0, None), LayerRun(1, None)
    >>> open_layers([[one], [two]]), open_layers([[one], [two], [one]])
    (1, 2)
    """
    last, begun, most = last_uses(runs), set[int](), 0
    for span, found in enumerate(runs):
        for run in found:
            begun.add(run.layer)
            most = max(most, len(begun))
        begun -= {layer for layer in begun if last[layer] == span}
    return most
