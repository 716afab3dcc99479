"""``tiles``: Cholesky by blocks, its factor on disk."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ooc_ntk.algebra.blockcg import NotPositiveDefiniteError
from ooc_ntk.algebra.entries import Entries
from ooc_ntk.algebra.ridge import Solution, SolveOptions, Solver, ratio_to_diagonal, register_solver
from ooc_ntk.algebra.solvers import relative_residual, singular
from ooc_ntk.algebra.tilecholesky import TileCholesky
from ooc_ntk.planning.solving import SolvePlan, price_tiles


def _solve(
    entries: Entries, targets: NDArray[np.float64], ridge: float, options: SolveOptions, plan: SolvePlan
) -> Solution:
    assert options.workspace is not None  # the plan refuses it otherwise
    with TileCholesky(options.workspace, entries, plan.chosen.edge) as factor:
        try:
            factor.factorise(ridge, lambda done, of: options.tell("factorise", done, of))
        except NotPositiveDefiniteError as error:
            raise singular(entries, ridge, str(error)) from error
        coefficients = factor.solve(targets)
        read, written, ratio = factor.bytes_read, factor.bytes_written, factor.io_ratio
    left = relative_residual(entries, targets, coefficients, ridge, options.device)
    return Solution(
        coefficients,
        ridge,
        ratio_to_diagonal(ridge, entries),
        left,
        "tiles",
        passes=2,
        bytes_read=read,
        bytes_written=written,
        io_ratio=ratio,
    )


register_solver("tiles", Solver(price_tiles, _solve))
