"""Ridge regression over many ridges at once: one spectrum, or one preconditioner and shared passes, serves all."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Final, Protocol

import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike, NDArray

from ooc_ntk.compute.machine import free_host_bytes, resident_bytes
from ooc_ntk.errors import BudgetError, InputError, unknown_name
from ooc_ntk.planning.budget import Budget, Resources
from ooc_ntk.planning.memory import LIBRARY_GROWTH_BYTES
from ooc_ntk.planning.solving import CG_ARRAYS, PASS_BYTES, preconditioner_bytes
from ooc_ntk.units import format_bytes

from .blockcg import BlockSystem, NotPositiveDefiniteError
from .dense import dense_square
from .entries import Entries
from .precondition import Preconditioner
from .products import square_product
from .ridge import Solution, SolveOptions, checked_ridge, ratio_to_diagonal
from .solvers import build_preconditioner, run_systems, singular

#: How a path is computed, by the names that users give.
PATH_METHODS: Final = ("auto", "spectrum", "cg")

#: Matrices of the size of the train square that its eigenvectors take while they are computed (measured: 3.0 with
#: LAPACK's divide and conquer, its input among them).
SPECTRUM_COPIES: Final = 3.1

#: Rows from which eigenvectors are not computed by default: they take ~9 n³ operations. (A choice: two minutes at 100
#: GFLOP/s.)
SPECTRUM_ROWS: Final = 11_000


#: Columns of solutions whose residuals are computed by one pass (a choice).
RESIDUAL_COLUMNS: Final = 256


@dataclass(frozen=True)
class DenseSpectrum:
    """All eigenpairs of a train square.

    Attributes:
        values: (n,) float64.
        vectors: (n, n) float64, a column each.
    """

    values: NDArray[np.float64]
    vectors: NDArray[np.float64]


class Probes(Protocol):
    """Further right-hand sides, whose solutions are looked at ridge by ridge and not kept."""

    def columns(self) -> NDArray[np.float64]:
        """(n, probes) float64."""

    def observe(self, ridge: float, solved: NDArray[np.float64], preconditioner: Preconditioner | None) -> None:
        """Take what is needed of the (n, probes) solutions of a ridge."""


@dataclass(frozen=True, repr=False)
class RidgePath:
    """Ridge regressions of the same targets with several ridges.

    Attributes:
        ridges: (ridges,) float64, as given.
        solutions: one for each.
        spectrum: what they were computed from, or None.
        passes: over the train square.
        seconds: wall-clock.
        dropped: ridges that were left out, as they do not make the kernel positive definite.
    """

    ridges: NDArray[np.float64]
    solutions: tuple[Solution, ...]
    spectrum: DenseSpectrum | None = None
    passes: int = 0
    seconds: float = 0.0
    dropped: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.solutions)

    def __repr__(self) -> str:
        return f"<RidgePath {len(self)} ridges from {self.ridges.min():.3g} to {self.ridges.max():.3g}>"

    def __getitem__(self, index: int) -> Solution:
        return self.solutions[index]

    @property
    def coefficients(self) -> NDArray[np.float64]:
        """(ridges, train) or (ridges, train, targets) float64."""
        return np.stack([each.coefficients for each in self.solutions])


def checked_ridges(ridges: ArrayLike) -> NDArray[np.float64]:
    """A grid of ridges.

    Raises:
        InputError: if it is empty, or one is negative or not finite.
    """
    try:
        found = np.atleast_1d(np.asarray(ridges, dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise InputError(f"ridges must be numbers, got {ridges!r}") from error
    if found.ndim != 1 or not found.size:
        raise InputError(f"ridges must be a list of numbers, got an array of shape {found.shape}")
    for each in found:
        checked_ridge(float(each))
    return found


def solve_path(
    entries: Entries,
    y: NDArray[np.float64],
    ridges: NDArray[np.float64],
    options: SolveOptions,
    probes: Probes | None = None,
    spectrum: DenseSpectrum | None = None,
    *,
    drop: bool = False,
) -> RidgePath:
    """Solve ``(K + λI) a = y`` for several λ.

    Args:
        entries: of the kernel.
        y: (train,) or (train, targets), checked.
        ridges: checked.
        options: how; the method is ``auto``, ``spectrum`` or ``cg``.
        probes: further right-hand sides, where conjugate gradients are used.
        spectrum: all eigenpairs, where they are known.
        drop: whether ridges that do not make the kernel positive definite are left out; otherwise they are an error.

    Returns:
        The solutions.

    Raises:
        InputError: for a matrix that is not positive definite (with ``drop``, if all are), or where conjugate gradients
            do not converge.
        BudgetError: if the spectrum is asked for and does not fit, or the solutions do not.
        StorageError: if a tile cannot be read, or is not what was committed.
    """
    if options.method not in PATH_METHODS:
        raise unknown_name("method", options.method, PATH_METHODS)
    began, free = time.perf_counter(), free_bytes(options)
    kept = 8 * y.size * (len(ridges) + 2)
    if kept > free:
        raise BudgetError(
            f"the solutions of {len(ridges):,} ridges for {y.size // len(y):,} targets take {format_bytes(kept)}, "
            f"{format_bytes(max(0, free))} are free to use; take fewer ridges at a time, or raise the host budget"
        )
    fits = spectrum_fits(entries, free - kept)
    wanted = options.method == "spectrum" or (options.method == "auto" and (fits or (ridges == 0).any()))
    if spectrum is None and wanted:
        spectrum = dense_spectrum(entries, free - kept)
    if spectrum is not None:
        found = _by_spectrum(entries, y, ridges, spectrum, options, drop=drop)
    else:
        found = _by_conjugate_gradients(entries, y, ridges, options, probes, free - kept, drop=drop)
    return replace(found, seconds=time.perf_counter() - began)


def spectrum_fits(entries: Entries, free: int) -> bool:
    """Whether all eigenpairs are computed where nobody asks for another way.

    Args:
        entries: of the kernel.
        free: bytes that may be taken.
    """
    return SPECTRUM_COPIES * 8 * entries.size**2 <= free and entries.size <= SPECTRUM_ROWS


def dense_spectrum(entries: Entries, free: int | None = None) -> DenseSpectrum:
    """All eigenpairs in memory, by divide and conquer.

    Raises:
        BudgetError: if they do not fit.
    """
    matrix = dense_square(
        entries, copies=SPECTRUM_COPIES, memory=free, what="the full spectrum", remedy="use method='cg', or more memory"
    )
    values, vectors = scipy.linalg.eigh(matrix.T, overwrite_a=True, check_finite=False, driver="evd")
    return DenseSpectrum(values, vectors)


def free_bytes(options: SolveOptions) -> int:
    """Host memory that may be taken beyond what the process holds."""
    taken = resident_bytes()
    resources = Resources(free_host_bytes(), taken, 0, 0, 0)
    return (options.budget or Budget()).limits(resources).host - taken - LIBRARY_GROWTH_BYTES


def _by_spectrum(
    entries: Entries,
    y: NDArray[np.float64],
    ridges: NDArray[np.float64],
    spectrum: DenseSpectrum,
    options: SolveOptions,
    *,
    drop: bool,
) -> RidgePath:
    floor = np.finfo(np.float64).eps * abs(spectrum.values).max(initial=0.0)
    good = spectrum.values.min() + ridges > floor
    if not good.any() or (not drop and not good.all()):
        raise singular(entries, float(ridges[~good].max()))
    targets, began = y.reshape(len(y), -1), time.perf_counter()
    inner, norms = spectrum.vectors.T @ targets, np.linalg.norm(targets, axis=0)
    found: list[Solution] = []
    chosen, width = ridges[good], targets.shape[1]
    together = max(1, RESIDUAL_COLUMNS // width)
    for start in range(0, len(chosen), together):
        some = chosen[start : start + together]
        parts = [spectrum.vectors @ (inner / (spectrum.values + ridge)[:, None]) for ridge in some]
        images = square_product(entries, np.concatenate(parts, axis=1), options.device)
        for number, (ridge, part) in enumerate(zip(some, parts, strict=True)):
            image = images[:, number * width : (number + 1) * width]
            left = np.linalg.norm(targets - image - ridge * part, axis=0) / np.where(norms > 0, norms, 1.0)
            found.append(
                Solution(
                    part.reshape(y.shape),
                    float(ridge),
                    ratio_to_diagonal(float(ridge), entries),
                    float(left.max(initial=0.0)),
                    "spectrum",
                    passes=2,
                    seconds=time.perf_counter() - began,
                )
            )
    passes = 1 + -(-len(chosen) // together)
    return RidgePath(chosen, tuple(found), spectrum, passes, dropped=tuple(ridges[~good].tolist()))


def _by_conjugate_gradients(
    entries: Entries,
    y: NDArray[np.float64],
    ridges: NDArray[np.float64],
    options: SolveOptions,
    probes: Probes | None,
    free: int,
    *,
    drop: bool,
) -> RidgePath:
    targets, smallest = y.reshape(len(y), -1), float(ridges.min())
    given = targets if probes is None else np.concatenate([targets, probes.columns()], axis=1)
    plan = options.with_method("cg").plan(entries, given.shape[1], smallest)
    preconditioner = build_preconditioner(entries, plan.chosen.rank, smallest, options)
    left = free - PASS_BYTES - preconditioner_bytes(entries.size, 0 if preconditioner is None else preconditioner.rank)
    together = max(1, int(left // (8 * given.size * CG_ARRAYS)))
    solutions: dict[int, Solution] = {}
    dropped: list[float] = []
    passes, waiting = 0, [int(each) for each in np.argsort(ridges, kind="stable")]
    while waiting:
        # Ridges of similar size are solved together, as they need about as many steps.
        group = waiting[:together]
        tolerance = options.tolerance_for(entries)
        systems = [BlockSystem(given, float(ridges[each]), preconditioner, tolerance) for each in group]
        try:
            passes += run_systems(entries, systems, given, options)
        except NotPositiveDefiniteError as error:
            low = [each for each in waiting if ridges[each] <= error.ridge]
            dropped += [float(ridges[each]) for each in low]
            waiting = [each for each in waiting if each not in low]
            if not drop or not (waiting or solutions):
                raise singular(entries, error.ridge) from error
            continue
        waiting = waiting[len(group) :]
        for each, system in zip(group, systems, strict=True):
            solutions[each] = _path_solution(entries, system, y, passes)
            if probes is not None:
                probes.observe(system.ridge, system.solution[:, targets.shape[1] :], preconditioner)
    numbers = sorted(solutions)
    return RidgePath(
        ridges[numbers], tuple(solutions[each] for each in numbers), None, passes, dropped=tuple(sorted(dropped))
    )


def _path_solution(entries: Entries, system: BlockSystem, y: NDArray[np.float64], passes: int) -> Solution:
    width = y.size // len(y)
    return Solution(
        np.ascontiguousarray(system.solution[:, :width]).reshape(y.shape),
        system.ridge,
        ratio_to_diagonal(system.ridge, entries),
        float(system.residuals[:width].max(initial=0.0)),
        "cg",
        iterations=system.iterations,
        passes=passes,
        rank=system.rank,
    )


def require_positive(ridges: NDArray[np.float64], what: str) -> None:
    """Refuse a ridge of 0 where something needs one.

    Raises:
        InputError: if one is 0.
    """
    if (ridges <= 0).any():
        raise InputError(f"{what} needs ridges above 0, got {ridges.min():g}; or use method='spectrum'")
