"""``cholesky``: the matrix in memory in float64, factorised in place by LAPACK."""

from __future__ import annotations

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from scipy.linalg import lapack

from ooc_ntk.algebra.dense import dense_square
from ooc_ntk.algebra.entries import Entries
from ooc_ntk.algebra.ridge import Solution, SolveOptions, Solver, register_solver
from ooc_ntk.algebra.solvers import relative_residual, singular
from ooc_ntk.compute.machine import return_free_memory
from ooc_ntk.planning.solving import SolvePlan, price_cholesky


def _solve(
    entries: Entries, targets: NDArray[np.float64], ridge: float, options: SolveOptions, plan: SolvePlan
) -> Solution:
    del plan
    options.tell("factorise", 0.0, 1.0)
    matrix = dense_square(entries, memory=2**62)  # the plan has looked at the memory
    mean = float(matrix.diagonal().mean())
    matrix[np.diag_indices(len(matrix))] += ridge
    norm = float(max(abs(matrix[start : start + 512]).sum(1).max() for start in range(0, len(matrix), 512)))
    # The transpose is in Fortran order: LAPACK factorises it in place.
    factor, failed = lapack.dpotrf(matrix.T, lower=0, clean=0, overwrite_a=1)
    reciprocal = 0.0 if failed else lapack.dpocon(factor, norm, uplo="U")[0]
    if failed or reciprocal < np.finfo(np.float64).eps:
        del matrix, factor
        raise singular(entries, ridge, "" if failed else _condition(reciprocal))
    options.tell("factorise", 1.0, 1.0)
    coefficients = np.asarray(scipy.linalg.cho_solve((factor, False), targets, check_finite=False))
    del matrix, factor
    return_free_memory()
    left = relative_residual(entries, targets, coefficients, ridge, options.device)
    ratio = float(ridge / mean) if mean else (float("inf") if ridge else 0.0)
    return Solution(coefficients, ridge, ratio, left, "cholesky", passes=2)


def _condition(reciprocal: float) -> str:
    size = f"{1 / reciprocal:.1e}" if reciprocal > 0 else "infinite"
    return f" to working precision (condition number {size})"


register_solver("cholesky", Solver(price_cholesky, _solve))
