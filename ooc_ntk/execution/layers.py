"""Kernel tiles of single layers: each layer's part of a tile is summed up, staged as soon as it is complete."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ooc_ntk.algebra.layers import LAYERS
from ooc_ntk.planning.layers import LayerRun, last_uses, layer_runs
from ooc_ntk.planning.plan import Plan
from ooc_ntk.storage.arrays import TileArray


class LayerSums:
    """Sums of one kernel tile layer by layer, and of all layers.

    Attributes:
        total: the whole tile, (rows, columns) float64.
        runs: of every span, the runs of columns of each layer.
    """

    def __init__(self, plan: Plan, shape: tuple[int, int], complete: Callable[[int, np.ndarray], None]) -> None:
        """Begin a tile.

        Args:
            plan: the plan.
            shape: rows and columns of the tile.
            complete: given a layer's number and its part of the tile, (rows, columns) float64, once that is complete.
        """
        self.total = np.zeros(shape)
        self.runs = runs_of(plan)
        self._last = last_uses(self.runs)
        self._open: dict[int, np.ndarray] = {}
        self._complete = complete

    def add(self, span: int, run: LayerRun, part: np.ndarray) -> None:
        """Add what a run of columns gives; ``part`` is (rows, columns) float64 and is not kept."""
        self.total += part
        if run.layer in self._open:
            self._open[run.layer] += part
        else:
            self._open[run.layer] = part.copy()
        if self._last[run.layer] == span and run is next(r for r in reversed(self.runs[span]) if r.layer == run.layer):
            self._complete(run.layer, self._open.pop(run.layer))


def runs_of(plan: Plan) -> tuple[tuple[LayerRun, ...], ...]:
    """Of every span of a plan the runs of columns of each layer."""
    return layer_runs(plan.blocks, plan.layout.block_choices(plan), plan.layout.spans(plan))


def layers_array(kernel: TileArray, layers: int) -> TileArray:
    """The array of layer-wise kernels beside a kernel, tiled alike."""
    return TileArray(kernel.files, LAYERS, (layers, *kernel.shape), (1, *kernel.chunks), kernel.dtype)
