"""``cg``: block conjugate gradients, preconditioned by a randomly pivoted Cholesky factor."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ooc_ntk.algebra.blockcg import BlockSystem, NotPositiveDefiniteError
from ooc_ntk.algebra.entries import Entries
from ooc_ntk.algebra.ridge import Solution, SolveOptions, Solver, ratio_to_diagonal, register_solver
from ooc_ntk.algebra.solvers import build_preconditioner, run_systems, singular
from ooc_ntk.compute.machine import return_free_memory
from ooc_ntk.planning.solving import SolvePlan, price_conjugate_gradients


def _solve(
    entries: Entries, targets: NDArray[np.float64], ridge: float, options: SolveOptions, plan: SolvePlan
) -> Solution:
    preconditioner = build_preconditioner(entries, plan.chosen.rank, ridge, options)
    system = BlockSystem(targets, ridge, preconditioner, options.tolerance_for(entries))
    patience = plan.direct_seconds if options.method == "auto" else np.inf
    try:
        passes = run_systems(entries, [system], targets, options, patience)
    except NotPositiveDefiniteError as error:
        raise singular(entries, ridge) from error
    return_free_memory()
    return Solution(
        system.solution,
        ridge,
        ratio_to_diagonal(ridge, entries),
        float(system.residuals.max(initial=0.0)),
        "cg",
        iterations=system.iterations,
        passes=passes,
        rank=system.rank,
    )


register_solver("cg", Solver(price_conjugate_gradients, _solve))
