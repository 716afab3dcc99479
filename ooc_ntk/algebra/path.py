"""Ridge regression over many ridges at once: one spectrum, or one preconditioner and shared passes, serves all."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike, NDArray

from ooc_ntk.compute.machine import free_host_bytes, resident_bytes
from ooc_ntk.errors import InputError, unknown_name
from ooc_ntk.planning.budget import Budget, Resources
from ooc_ntk.planning.memory import LIBRARY_GROWTH_BYTES
from ooc_ntk.planning.solving import CG_ARRAYS, PASS_BYTES, preconditioner_bytes

from .blockcg import BlockSystem
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


@dataclass(frozen=True)
class DenseSpectrum:
    """All eigenpairs of a train square.

    Attributes:
        values: (n,) float64.
        vectors: (n, n) float64, a column each.
    """

    values: NDArray[np.float64]
    vectors: NDArray[np.float64]


@dataclass(frozen=True)
class RidgePath:
    """Ridge regressions of the same targets with several ridges.

    Attributes:
        ridges: (ridges,) float64, as given.
        solutions: one for each.
        spectrum: what they were computed from, or None.
        preconditioner: what their conjugate gradients shared, or None.
        probe_solutions: (ridges, n, probes) solutions of the probes, where there were any.
        passes: over the train square.
        seconds: wall-clock.
    """

    ridges: NDArray[np.float64]
    solutions: tuple[Solution, ...]
    spectrum: DenseSpectrum | None = None
    preconditioner: Preconditioner | None = None
    probe_solutions: NDArray[np.float64] | None = field(default=None, repr=False)
    passes: int = 0
    seconds: float = 0.0

    def __len__(self) -> int:
        return len(self.solutions)

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
    probes: NDArray[np.float64] | None = None,
) -> RidgePath:
    """Solve ``(K + λI) a = y`` for several λ.

    Args:
        entries: of the kernel.
        y: (train,) or (train, targets), checked.
        ridges: checked.
        options: how; the method is ``auto``, ``spectrum`` or ``cg``.
        probes: (n, probes) further right-hand sides, where conjugate gradients are used.

    Returns:
        The solutions.

    Raises:
        InputError: for a matrix that is not positive definite, or where conjugate gradients do not converge.
        BudgetError: if the spectrum is asked for and does not fit.
        StorageError: if a tile cannot be read, or is not what was committed.
    """
    if options.method not in PATH_METHODS:
        raise unknown_name("method", options.method, PATH_METHODS)
    began = time.perf_counter()
    free = _free_bytes(options)
    fits = SPECTRUM_COPIES * 8 * entries.size**2 <= free and entries.size <= SPECTRUM_ROWS
    if options.method == "spectrum" or (options.method == "auto" and (fits or (ridges == 0).any())):
        spectrum = dense_spectrum(entries, free)
        return _by_spectrum(entries, y, ridges, spectrum, began, options)
    return _by_conjugate_gradients(entries, y, ridges, options, probes, free, began)


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


def _free_bytes(options: SolveOptions) -> int:
    """Host memory that may be taken beyond what the process holds."""
    taken = resident_bytes()
    resources = Resources(free_host_bytes(), taken, 0, 0, 0)
    return (options.budget or Budget()).limits(resources).host - taken - LIBRARY_GROWTH_BYTES


def _by_spectrum(
    entries: Entries,
    y: NDArray[np.float64],
    ridges: NDArray[np.float64],
    spectrum: DenseSpectrum,
    began: float,
    options: SolveOptions,
) -> RidgePath:
    targets = y.reshape(len(y), -1)
    inner = spectrum.vectors.T @ targets
    floor = np.finfo(np.float64).eps * abs(spectrum.values).max(initial=0.0)
    coefficients = []
    for ridge in ridges:
        shifted = spectrum.values + ridge
        if shifted.min() <= floor:
            raise singular(entries, float(ridge))
        coefficients.append(spectrum.vectors @ (inner / shifted[:, None]))
    images = square_product(entries, np.concatenate(coefficients, axis=1), options.device)
    norms = np.linalg.norm(targets, axis=0)
    found = []
    for number, (ridge, part) in enumerate(zip(ridges, coefficients, strict=True)):
        image = images[:, number * targets.shape[1] : (number + 1) * targets.shape[1]]
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
    return RidgePath(ridges, tuple(found), spectrum, passes=2, seconds=time.perf_counter() - began)


def _by_conjugate_gradients(
    entries: Entries,
    y: NDArray[np.float64],
    ridges: NDArray[np.float64],
    options: SolveOptions,
    probes: NDArray[np.float64] | None,
    free: int,
    began: float,
) -> RidgePath:
    targets = y.reshape(len(y), -1)
    given = targets if probes is None else np.concatenate([targets, probes], axis=1)
    price = options.with_method("cg").plan(entries, given.shape[1], float(ridges.min()))
    preconditioner = build_preconditioner(entries, price.chosen.rank, float(ridges.min()), options)
    rank = 0 if preconditioner is None else preconditioner.rank
    left = free - PASS_BYTES - preconditioner_bytes(entries.size, rank)
    together = max(1, int(left // (8 * given.size * CG_ARRAYS)))
    solutions: dict[int, Solution] = {}
    probed = None if probes is None else np.empty((len(ridges), *probes.shape))
    passes = 0
    order = np.argsort(ridges, kind="stable")
    for group in _groups(order, together):
        systems = [
            BlockSystem(given, float(ridges[each]), preconditioner, options.tolerance_for(entries)) for each in group
        ]
        passes += run_systems(entries, systems, given, options)
        for each, system in zip(group, systems, strict=True):
            solutions[int(each)] = Solution(
                np.ascontiguousarray(system.solution[:, : targets.shape[1]]).reshape(y.shape),
                float(ridges[each]),
                ratio_to_diagonal(float(ridges[each]), entries),
                float(system.residuals[: targets.shape[1]].max(initial=0.0)),
                "cg",
                iterations=system.iterations,
                passes=system.iterations + 1,
                rank=rank,
                seconds=time.perf_counter() - began,
            )
            if probed is not None:
                probed[each] = system.solution[:, targets.shape[1] :]
    ordered = tuple(solutions[number] for number in range(len(ridges)))
    return RidgePath(ridges, ordered, None, preconditioner, probed, passes, time.perf_counter() - began)


def _groups(order: NDArray[np.int64], together: int) -> Sequence[NDArray[np.int64]]:
    """Ridges in groups of similar size, so that those of one group need about as many steps."""
    return [order[start : start + together] for start in range(0, len(order), together)]


def require_positive(ridges: NDArray[np.float64], what: str) -> None:
    """Refuse a ridge of 0 where something needs one.

    Raises:
        InputError: if one is 0.
    """
    if (ridges <= 0).any():
        raise InputError(f"{what} needs ridges above 0, got {ridges.min():g}; or use method='spectrum'")
