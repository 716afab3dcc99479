"""Solving a kernel ridge regression by the way that was chosen, and what its ways share: see ``methods/``."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from ooc_ntk.compute.machine import free_host_bytes, return_free_memory
from ooc_ntk.errors import InputError
from ooc_ntk.units import format_seconds

from .blockcg import BlockSystem, TooSlowError, solve_systems
from .dense import dense_square
from .entries import Entries
from .precondition import Preconditioner, pivoted_cholesky
from .products import square_product
from .ridge import SOLVERS, Solution, SolveOptions

logger = logging.getLogger(__name__)

#: Steps after which it is judged how many are left. (A choice: early residuals fall unevenly.)
FIRST_STEPS: Final = 12

#: Rows up to which the eigenvalues that an error names are exact, and steps of Lanczos above (choices: a few seconds,
#: and a hundred passes; on trace kernels their bound of the smallest one is within some percent of the largest noise).
DENSE_ROWS: Final = 4096
LANCZOS_STEPS: Final = 100


def solve_ridge(
    entries: Entries, y: NDArray[np.float64], ridge: float, options: SolveOptions | None = None
) -> Solution:
    """Solve ``(K + ridge·I) a = y``.

    Args:
        entries: of the kernel.
        y: (train,) or (train, targets), checked.
        ridge: at least 0, checked.
        options: how.

    Returns:
        The solution.

    Raises:
        InputError: for a matrix that is not positive definite, or where conjugate gradients do not converge; says the
            smallest ridge that would do, or what else helps.
        BudgetError: if no method fits.
        StorageError: if a tile cannot be read, or is not what was committed.
    """
    options = options or SolveOptions()
    began, before = time.perf_counter(), entries.bytes_read
    targets = y.reshape(len(y), -1)
    plan = options.plan(entries, targets.shape[1], ridge)
    try:
        found = SOLVERS.get(plan.chosen.method).solve(entries, targets, ridge, options, plan)
    except TooSlowError as slow:
        logger.info("%s", slow)
        plan = options.without_steps(plan)
        return_free_memory()
        found = SOLVERS.get(plan.chosen.method).solve(entries, targets, ridge, options, plan)
    return replace(
        found,
        coefficients=found.coefficients.reshape(y.shape),
        seconds=time.perf_counter() - began,
        bytes_read=found.bytes_read + entries.bytes_read - before,
    )


def relative_residual(
    entries: Entries, targets: NDArray[np.float64], coefficients: NDArray[np.float64], ridge: float, device: str
) -> float:
    """``‖(K + ridge·I) a − y‖ / ‖y‖`` of the worst target, by one pass; of targets that are all zero ``‖…‖``."""
    left = np.linalg.norm(targets - ridge * coefficients - square_product(entries, coefficients, device), axis=0)
    norms = np.linalg.norm(targets, axis=0)
    return float((left / np.where(norms > 0, norms, 1.0)).max(initial=0.0))


def singular(entries: Entries, ridge: float, why: str = "") -> InputError:
    """The error of a matrix that cannot be solved with, naming the smallest ridge that would do."""
    smallest, largest = _extremes(entries)
    floor = len(entries.diagonal()) * float(np.finfo(np.float64).eps) * max(largest, 0.0)
    enough = max(0.0, -smallest) * 1.01 + 100 * floor
    if not largest > 0:
        return InputError(f"K + {ridge:g}·I is not positive definite: the kernel is zero; any ridge above 0 would do")
    return InputError(
        f"K + {ridge:g}·I is not positive definite{why}: the smallest eigenvalue of K is {smallest:.3g}, the largest "
        f"{largest:.3g}. The smallest ridge that would do is {enough:.2g}; take that or more"
    )


def _extremes(entries: Entries) -> tuple[float, float]:
    """Smallest and largest eigenvalue of the train square: exact where it is small, otherwise bounds by Lanczos.

    The smallest Ritz value less its residual is below the smallest eigenvalue that the random start sees.
    """
    size = entries.size
    if size <= DENSE_ROWS and 16 * size * size < 0.5 * free_host_bytes():
        matrix = dense_square(entries, memory=2**62)
        values = scipy.linalg.eigvalsh(matrix.T, overwrite_a=True, check_finite=False)
        return float(values[0]), float(values[-1])
    steps = min(LANCZOS_STEPS, size)
    basis = np.zeros((size, steps + 1))
    start = np.random.default_rng(0).standard_normal(size)
    basis[:, 0] = start / np.linalg.norm(start)
    square, last = np.zeros((steps, steps)), 0.0
    for step in range(steps):
        image = square_product(entries, basis[:, step : step + 1])[:, 0]
        known = basis[:, : step + 1]
        square[step, step] = basis[:, step] @ image
        for _ in range(2):  # once is not enough
            image -= known @ (known.T @ image)
        last = float(np.linalg.norm(image))
        if step + 1 < steps:
            square[step, step + 1] = square[step + 1, step] = last
        if last <= np.finfo(np.float64).eps * abs(square).max():
            steps = step + 1
            break
        basis[:, step + 1] = image / last
    values, vectors = scipy.linalg.eigh(square[:steps, :steps])
    return float(values[0] - abs(last * vectors[-1, 0])), float(values[-1] + abs(last * vectors[-1, -1]))


def build_preconditioner(entries: Entries, rank: int, ridge: float, options: SolveOptions) -> Preconditioner | None:
    """The preconditioner for one ridge or more, the smallest of which is given; None for no columns or no ridge."""
    if not rank or not ridge:
        return None
    return pivoted_cholesky(
        entries,
        rank,
        ridge=ridge,
        seed=options.seed,
        advance=lambda done, of: options.tell("precondition", done, of),
    )


def run_systems(
    entries: Entries,
    systems: Sequence[BlockSystem],
    targets: NDArray[np.float64],
    options: SolveOptions,
    patience: float = np.inf,
) -> int:
    """Solve systems that share their passes, and refuse what does not converge; returns the passes.

    Args:
        entries: of the kernel.
        systems: that are begun.
        targets: (n, targets).
        options: how.
        patience: seconds that may be left, judging by the steps so far.

    Raises:
        TooSlowError: if more are left.
        NotPositiveDefiniteError: if the matrix of a system is not.
        InputError: if the steps do not suffice.
    """
    tolerance, watch = options.tolerance_for(entries), _Watch(patience)

    def advance(residual: float) -> None:
        # Residuals fall geometrically: progress is told on their logarithm.
        done = float(np.log(max(min(residual, 1.0), tolerance)) / np.log(tolerance))
        options.tell("iterate", done, 1.0)
        watch.step(done)

    passes = solve_systems(
        lambda x: square_product(entries, x, options.device),
        systems,
        targets,
        iterations=options.iterations,
        advance=advance,
    )
    scale = float(entries.diagonal().sum())
    for system in systems:
        worst = float(system.residuals.max(initial=0.0))
        if worst > tolerance and not system.is_rounding(targets, scale):
            raise InputError(
                f"conjugate gradients reached a relative residual of {worst:.1e} after {system.iterations} steps, "
                f"{tolerance:.1e} was wanted, with ridge {system.ridge:g}; raise the ridge, the rank of the "
                f"preconditioner (rank=, {system.rank} now), the tolerance or the iterations, or use method='tiles'"
            )
    return passes


class _Watch:
    """Gives up on steps that would take longer than what is waited for."""

    def __init__(self, patience: float) -> None:
        """Wait for so many seconds."""
        self._patience, self._began, self._steps = patience, time.perf_counter(), 0
        self._first: tuple[float, float] | None = None

    def step(self, done: float) -> None:
        """One step more.

        Args:
            done: share of the way, on the logarithm of the residual.

        Raises:
            TooSlowError: if the rest would take longer.
        """
        self._steps += 1
        now = time.perf_counter() - self._began
        if self._first is None:  # the first pass checks every tile, and is no measure
            self._first = (now, max(done, 0.0))
            return
        if self._steps < FIRST_STEPS:
            return
        began, start = self._first
        left = (1 - done) * (now - began) / max(done - start, 1e-9)
        if left > self._patience:
            raise TooSlowError(
                f"conjugate gradients would take {format_seconds(left)} more after {self._steps} steps, factorising "
                f"{format_seconds(self._patience)}"
            )
