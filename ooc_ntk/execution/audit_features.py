"""The audit of features: R anew by its definition, in NumPy, and the error bars beside what is observed."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from ooc_ntk.compute.jacobian import ModelFunction
from ooc_ntk.compute.projection.entries import dense_columns, rows_and_signs
from ooc_ntk.planning.plan import Plan

from .features import outer_of, parameter_starts

#: Parameters whose part of R is made at a time.
CHUNK: Final = 2**16

#: Columns of a dense projection that are recomputed: all of them would take as long as the run.
DENSE_COLUMNS: Final = 32


class FeatureReference:
    """Features of some Jacobian rows in float64, by the definition of R.

    Attributes:
        columns: the columns that are recomputed.
    """

    def __init__(self, plan: Plan, function: ModelFunction, rows: int, seed: int) -> None:
        """Recompute features of so many samples.

        Args:
            plan: a plan with a projection.
            function: model and chosen parameters.
            rows: samples.
            seed: of the choice of columns.
        """
        assert plan.projection is not None
        assert plan.projection.dim is not None
        self._projection, dim = plan.projection, plan.projection.dim
        self._sparse = self._projection.about.sparse
        count = dim if self._sparse else min(DENSE_COLUMNS, dim)
        self.columns = np.sort(np.random.default_rng(seed).permutation(dim)[:count])
        starts = parameter_starts(function)
        self._outers = [outer_of(function, starts, name) for name in plan.structured]
        self._parts = [(starts[name], function.sizes[name]) for name in function.names]
        self.found = np.zeros((rows, plan.rows_per_sample, count))

    def add(self, output: int, gradients: NDArray[np.float64]) -> None:
        """Project the gradients of one output of every sample.

        Args:
            output: its number.
            gradients: (samples, parameters).
        """
        position = 0
        for start, size in self._parts:
            for first in range(0, size, CHUNK):
                count = min(CHUNK, size - first)
                p = np.arange(start + first, start + first + count, dtype=np.int64)
                self._project(output, gradients[:, position + first : position + first + count], p)
            position += size

    def _project(self, output: int, values: NDArray[np.float64], p: NDArray[np.int64]) -> None:
        if not self._sparse:
            self.found[:, output] += values @ dense_columns(self._projection, p, self.columns, self._outers)
            return
        block = self._projection.block
        rows, signs = rows_and_signs(self._projection, p, self._outers)
        for number in range(self._projection.nonzeros):
            signed = values * (1 - 2 * signs[number])
            for index, row in enumerate(signed):
                sums = np.bincount(rows[number], weights=row, minlength=block)
                self.found[index, output, number * block : (number + 1) * block] += (
                    sums / self._projection.nonzeros**0.5
                )
