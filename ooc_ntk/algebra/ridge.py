"""Kernel ridge regression: ``(K + λI) a = y`` by Cholesky in memory or on disk, or by conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ooc_ntk.compute.machine import free_host_bytes, resident_bytes
from ooc_ntk.compute.rates import cached_rates
from ooc_ntk.errors import InputError
from ooc_ntk.planning.budget import Budget, Resources
from ooc_ntk.planning.memory import LIBRARY_GROWTH_BYTES
from ooc_ntk.planning.solving import Pricing, SolvePlan, plan_solve
from ooc_ntk.registry import Registry
from ooc_ntk.storage.local import free_disk_bytes
from ooc_ntk.units import format_bytes

from .entries import Entries, FeatureEntries, ViewEntries

#: Relative residual that conjugate gradients go on to, by the precision of the entries. (A choice: below what float32
#: entries are known to; of float64 ones, two digits above what the recurrence reaches.)
TOLERANCE: Final = {"float32": 1e-8, "float64": 1e-10}

#: Steps after which conjugate gradients give up (a choice: beyond, factorising is cheaper).
ITERATIONS: Final = 1000

#: Told what is being done, how much of it is done, and of how much.
Advance = Callable[[str, float, float], None]


@dataclass(frozen=True, repr=False)
class Solution:
    """Coefficients of a kernel ridge regression.

    Attributes:
        coefficients: (train,) or (train, targets) float64.
        ridge: the absolute ridge.
        ridge_ratio: the ridge over the mean diagonal of the train square.
        residual: relative residual ``‖(K + ridge·I) a − y‖ / ‖y‖``, the largest of all targets, computed from
            the kernel.
        method: ``cholesky``, ``cg``, ``tiles`` or ``spectrum``.
        iterations: steps of conjugate gradients, 0 of a direct method.
        passes: passes over the train square.
        rank: columns of the preconditioner.
        seconds: wall-clock.
        bytes_read: bytes read from disk, where that is known.
        bytes_written: bytes written to disk.
        io_ratio: what a Cholesky factorisation on disk moved over the bound ``n³/(3√2·√S)`` for its memory S (Beaumont
            et al. 2022); None of other methods.
        kernel: which kernel, seen how, it is of; only that one predicts with it. Empty where that is not known.
    """

    coefficients: NDArray[np.float64]
    ridge: float
    ridge_ratio: float
    residual: float
    method: str = "cholesky"
    iterations: int = 0
    passes: int = 0
    rank: int = 0
    seconds: float = 0.0
    bytes_read: int = 0
    bytes_written: int = 0
    io_ratio: float | None = None
    kernel: str = ""

    def __repr__(self) -> str:
        return f"<Solution {self.coefficients.shape} by {describe(self)}>"


@dataclass(frozen=True)
class SolveOptions:
    """How a ridge regression is solved.

    Attributes:
        method: ``auto`` for the fastest that fits, ``cholesky`` (in memory), ``cg`` (preconditioned block conjugate
            gradients) or ``tiles`` (Cholesky on disk).
        tolerance: relative residual that conjugate gradients go on to; None by the precision of the entries.
        iterations: steps after which they give up.
        rank: columns of their preconditioner; None for as many as pay, 0 for none.
        seed: of everything random.
        budget: host memory of the whole process, and disk; None, or a limit that is None, takes 80% of what is free.
        workspace: folder for a factor on disk, deleted after; None is the run directory.
        device: torch device that multiplies in passes.
        advance: told what is being done, how much of it is done, and of how much.
    """

    method: str = "auto"
    tolerance: float | None = None
    iterations: int = ITERATIONS
    rank: int | None = None
    seed: int = 0
    budget: Budget | None = None
    workspace: Path | None = None
    device: str = "cpu"
    advance: Advance | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be meant; a budget may be a size."""
        if isinstance(self.budget, str | int):
            object.__setattr__(self, "budget", Budget(host=self.budget))
        if self.budget is not None and not isinstance(self.budget, Budget):
            raise InputError(f"budget must be a Budget or a size such as '2GiB', got {self.budget!r}")
        if self.tolerance is not None and not 0 < self.tolerance < 1:
            raise InputError(f"tolerance is a relative residual between 0 and 1, got {self.tolerance}")
        if self.iterations < 1:
            raise InputError(f"iterations must be at least 1, got {self.iterations}")
        if self.rank is not None and self.rank < 0:
            raise InputError(f"rank is a number of columns, at least 0, got {self.rank}")

    def tell(self, what: str, done: float, total: float) -> None:
        """Tell how far something is."""
        if self.advance is not None:
            self.advance(what, done, total)

    def with_method(self, method: str) -> SolveOptions:
        """The same with another method."""
        return replace(self, method=method)

    def without_steps(self, plan: SolvePlan) -> SolvePlan:
        """The plan of what factorises, after conjugate gradients turned out to be slower."""
        direct = [price for price in plan.fitting if price.factorises]
        return replace(plan, chosen=min(direct, key=lambda price: price.seconds))

    def tolerance_for(self, entries: Entries) -> float:
        """Relative residual wanted for some entries."""
        if self.tolerance is not None:
            return self.tolerance
        base = entries.base if isinstance(entries, ViewEntries) else entries
        return TOLERANCE["float32" if base.dtype == np.float32 else "float64"]

    def plan(self, entries: Entries, targets: int, ridge: float) -> SolvePlan:
        """Price every way for a kernel and take one."""
        taken = resident_bytes()
        disk = 0 if self.workspace is None else free_disk_bytes(self.workspace)
        resources = Resources(free_host_bytes(), taken, 0, 0, disk)
        limits = (self.budget or Budget()).limits(resources)
        return plan_solve(
            entries.size,
            targets,
            triangle_bytes(entries),
            limits.host - taken - LIBRARY_GROWTH_BYTES,
            limits.disk,
            cached_rates(self.device),
            self.method,
            self.rank,
            disk=self.workspace is not None,
            ridge=ridge,
            held=taken + LIBRARY_GROWTH_BYTES,
            pricings=[SOLVERS.get(name).price for name in SOLVERS],
        )


@dataclass(frozen=True)
class Solver:
    """A way to solve ``(K + ridge·I) a = y``.

    Attributes:
        price: what it would take, as :func:`~ooc_ntk.planning.solving.plan_solve` asks. The price is named as the
            solver is.
        solve: ``solve(entries, targets, ridge, options, plan)`` of (n, targets) float64, with what the plan chose. The
            entries are read by :func:`~ooc_ntk.algebra.products.square_product`, ``K @ x`` in one pass over the tiles,
            or by :func:`~ooc_ntk.algebra.dense.dense_square`, all of it; the residual that a solution states is
            computed from them (:func:`~ooc_ntk.algebra.solvers.relative_residual`).
    """

    price: Pricing
    solve: Callable[[Entries, NDArray[np.float64], float, SolveOptions, SolvePlan], Solution]


#: Every way to solve, by the name that users give.
SOLVERS: Final[Registry[Solver]] = Registry("method", "ooc_ntk.algebra.methods")


def register_solver(name: str, solver: Solver) -> None:
    """Add a way to solve ridge regressions: ``kernel.solve(y, ridge, method=name)``, or the fastest that fits.

    Args:
        name: of the method.
        solver: what it is.

    Raises:
        InputError: if it is one of this project's own.
    """
    SOLVERS.register(name, solver)


def triangle_bytes(entries: Entries) -> int:
    """Bytes that a pass over the train square reads."""
    if isinstance(entries, ViewEntries):
        return triangle_bytes(entries.base)
    if isinstance(entries, FeatureEntries):
        return entries.product_bytes
    return entries.size * (entries.size + 1) // 2 * entries.dtype.itemsize


def checked_targets(y: ArrayLike, size: int, entries_per_sample: int = 1) -> NDArray[np.float64]:
    """Targets as float64.

    Raises:
        InputError: for another length, NaN or infinity, or what is no array of numbers.
    """
    if np.iscomplexobj(y):
        raise InputError("y must be real; solve for the real and the imaginary part")
    try:
        targets = np.asarray(y, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"y must be an array of numbers: {error}") from error
    if targets.ndim not in (1, 2) or targets.shape[0] != size:
        hint = ""
        if entries_per_sample > 1:
            hint = (
                f"; a full kernel has {entries_per_sample} rows per sample (row i·C + c), so one-hot labels are given "
                "as labels.reshape(-1)"
            )
        raise InputError(f"y must have {size} rows, one per train row of the kernel, got shape {targets.shape}{hint}")
    if targets.ndim == 2 and not targets.shape[1]:
        raise InputError("y holds no targets: it has no columns")
    if not np.isfinite(targets).all():
        wrong = int(np.flatnonzero(~np.isfinite(targets.reshape(size, -1)).all(1))[0])
        raise InputError(f"y holds NaN or infinity, first in row {wrong}")
    return targets


def checked_ridge(ridge: float) -> float:
    """A ridge.

    Raises:
        InputError: if it is negative or no finite number.
    """
    if isinstance(ridge, bool) or not isinstance(ridge, int | float | np.number):
        raise InputError(f"ridge must be a number, added to the diagonal, got {ridge!r}")
    if not ridge >= 0 or not np.isfinite(ridge):
        raise InputError(f"ridge must be at least 0, got {ridge}")
    return float(ridge)


def ratio_to_diagonal(ridge: float, entries: Entries) -> float:
    """The ridge over the mean diagonal, also of a kernel of zeros."""
    mean = float(entries.diagonal().mean())
    if mean:
        return float(ridge / mean)
    return float("inf") if ridge else 0.0


def describe(solution: Solution) -> str:
    """One line about a solution."""
    how = f"{solution.method}, {solution.iterations} steps, rank {solution.rank}" if solution.iterations else ""
    return (
        f"{how or solution.method}: residual {solution.residual:.1e}, {solution.passes} passes, "
        f"{format_bytes(solution.bytes_read)} read, ridge {solution.ridge_ratio:.1e} of the mean diagonal"
    )
