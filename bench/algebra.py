"""The algebra of a kernel on disk, beside NumPy, SciPy and Dask, beside the floors of the machine, and on real digits.

``python -m bench.algebra`` prints five parts:

- ``equal``: coefficients and GCV beside SciPy's in float64; the share of stochastic estimates inside their 95% bars.
- ``iterations``: preconditioned conjugate gradients beside plain ones, the same solver's and SciPy's.
- ``large``: a kernel of 30,000 digits solved within 1.5 GiB, beside what reading its bytes and multiplying takes.
- ``tiles``: Cholesky on disk in several blocks, beside its products and the least bytes that must move.
- ``regression``: kernel regression with the ridge that GCV chooses, beside the network, and GCV beside test errors.

Kernels are computed once by the engine, into ``--folder``, and kept there; the CNN is that of ``ooc_ntk.demo``.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import cg

import ooc_ntk
from ooc_ntk.algebra.ridge import SOLVERS
from ooc_ntk.compute.machine import limited_threads

from .algebra_children import tiles_budget
from .algebra_kernels import Problem, cnn_problem
from .algebra_large import large, tiles
from .bars import checked
from .exact import machine
from .process import calibrate_once
from .records import Finding
from .table import aligned

#: Bars, as the project set them: relative errors, iterations over plain ones, what regression may lose to the network,
#: and the test error at GCV's ridge over the least one.
COEFFICIENTS_BAR, GCV_BAR, ITERATIONS_BAR, ACCURACY_BAR, GCV_CHOICE_BAR = 1e-8, 1e-6, 1 / 5, 0.01, 1.10

#: Figures that ``python -m bench`` judges, too.
COEFFICIENTS, ESTIMATES = "largest error of coefficients", "largest error of GCV and leave-one-out"
ACCURACY, GCV_CHOICE = "network − regression, accuracy", "test error at GCV's ridge / least"

#: Largest eigenvalues that are compared, in full and in smoke size, and their bar.
EIGENVALUES, SMOKE_EIGENVALUES, EIGENVALUES_BAR = 50, 10, 1e-6

#: Share of stochastic estimates inside their 95% bars that passes: of 20 seeds, 17 (fewer happen by chance in one of 60
#: cases).
COVERAGE_BAR: Final = 0.85

#: The condition number that the kernel of part ``iterations`` must have at least, without a ridge.
CONDITION_BAR: Final = 1e6

#: Train and test digits, in full and in smoke size, and those of the estimates that are repeated with many seeds.
DIGITS, SMOKE_DIGITS, REPEATED_DIGITS = (4_000, 1_000), (120, 40), (1_000, 40)

#: Ridges, as shares of the mean diagonal.
RATIOS: Final = (1e-3, 1e-4, 1e-5, 1e-6)

#: Epochs that the CNN is trained for: the demonstration's, and those of part ``iterations`` (measured: the condition
#: number is 1.0e6 after one and 6.3e5 after four, when the smallest eigenvalues have grown more than the largest).
EPOCHS, ITERATIONS_EPOCHS = 4, 1

#: Relative residual of part ``iterations``, and the steps after which plain conjugate gradients are stopped.
TOLERANCE, PLAIN_STEPS = 1e-8, 4_000


def eigenvalues_figure(count: int) -> str:
    """The figure of so many eigenvalues."""
    return f"largest error of the top {count} eigenvalues"


def digits_problem(folder: Path, smoke: bool, sizes: tuple[int, int] = DIGITS, epochs: int = EPOCHS) -> Problem:
    """The kernel of the demonstration's CNN on so many digits; in smoke size of few, and not trained."""
    train, test = SMOKE_DIGITS if smoke else sizes
    return cnn_problem(folder, train, test, epochs=0 if smoke else epochs)


def equal(folder: Path, smoke: bool, sizes: tuple[int, int] = DIGITS, *, covered: bool = True) -> list[Finding]:
    """Coefficients, GCV and leave-one-out beside SciPy's; stochastic estimates beside exact ones."""
    problem = digits_problem(folder, smoke, sizes)
    kernel, targets, size = problem.kernel, problem.targets, problem.kernel.train_samples
    matrix = np.asarray(kernel[:size], dtype=np.float64)
    rows: list[tuple[str, ...]] = [("ridge / mean diagonal", *SOLVERS, "GCV", "leave-one-out")]
    worst, estimates = 0.0, 0.0
    for ratio in RATIOS:
        ridge = ratio * problem.mean_diagonal
        wanted, gcv, loo = _by_scipy(matrix, targets, ridge)
        errors = []
        for method in SOLVERS:
            budget = tiles_budget(kernel, targets.shape[1], blocks=3) if method == "tiles" else None
            found = kernel.solve(targets, ridge, method=method, budget=budget).coefficients
            errors.append(float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted)))
        curve = kernel.gcv(targets, [ridge])
        beside = [abs(float(curve.gcv[0]) / gcv - 1), abs(float(curve.loo[0]) / loo - 1)]
        rows.append((f"{ratio:.0e}", *(f"{each:.1e}" for each in (*errors, *beside))))
        worst, estimates = max(worst, *errors), max(estimates, *beside)
    return [
        f"  {size:,} digits, float64, relative errors against scipy.linalg in float64:",
        *aligned(rows),
        checked(COEFFICIENTS, worst, COEFFICIENTS_BAR, smoke),
        checked(ESTIMATES, estimates, GCV_BAR, smoke),
        *_eigenvalues(kernel, matrix, smoke),
        *(_covered(folder, smoke) if covered else []),
    ]


def _by_scipy(
    matrix: NDArray[np.float64], targets: NDArray[np.float64], ridge: float
) -> tuple[NDArray[np.float64], float, float]:
    """Coefficients, GCV and leave-one-out by their definitions, from SciPy's Cholesky factor of the whole matrix."""
    factor = scipy.linalg.cho_factor(matrix + ridge * np.eye(len(matrix)))
    coefficients = scipy.linalg.cho_solve(factor, targets)
    diagonal = scipy.linalg.cho_solve(factor, np.eye(len(matrix))).diagonal()
    gcv = ((ridge * coefficients) ** 2).mean() / (ridge * diagonal.mean()) ** 2
    return coefficients, float(gcv), float(((coefficients / diagonal[:, None]) ** 2).mean())


def _eigenvalues(kernel: ooc_ntk.Kernel, matrix: NDArray[np.float64], smoke: bool) -> list[Finding]:
    """The largest eigenvalues by every method of ``kernel.eigh``, beside LAPACK's."""
    count = SMOKE_EIGENVALUES if smoke else EIGENVALUES
    wanted = scipy.linalg.eigvalsh(matrix)[::-1][:count]
    errors = {}
    for method in ("full", "krylov", "lobpcg"):
        errors[method] = float(np.abs(kernel.eigh(count, method=method).values / wanted - 1).max())
    by_method = ", ".join(f"{method} {error:.1e}" for method, error in errors.items())
    return [
        f"  top {count} eigenvalues, largest relative errors: {by_method}",
        checked(eigenvalues_figure(count), max(errors.values()), EIGENVALUES_BAR, smoke),
    ]


def _covered(folder: Path, smoke: bool) -> list[Finding]:
    """How many stochastic estimates hold the exact value within their own 95% bars."""
    problem = digits_problem(folder, smoke, REPEATED_DIGITS)
    ridges = np.asarray(RATIOS) * problem.mean_diagonal
    exact = problem.kernel.gcv(problem.targets, ridges, method="spectrum")
    names, seeds = {"gcv": "GCV", "effective_dimension": "effective dimension", "loo": "leave-one-out"}, 2
    if not smoke:
        seeds = 20
    inside: dict[str, list[NDArray[np.bool_]]] = {name: [] for name in names}
    widths: dict[str, list[NDArray[np.float64]]] = {name: [] for name in names}
    for seed in range(seeds):
        found = problem.kernel.gcv(problem.targets, ridges, method="cg", seed=seed)
        for name in names:
            true, bar = getattr(exact, name), getattr(found, f"{name}_error")
            # What is exact but for rounding has a bar of nothing.
            inside[name].append(abs(getattr(found, name) - true) <= bar + 1e-6 * abs(true))
            widths[name].append(bar / true)
    lines: list[Finding] = []
    for name, title in names.items():
        share = float(np.mean(inside[name]))
        what = f"{title}: share inside its 95% bars, {seeds} seeds × {len(ridges)} ridges"
        lines.append(checked(what, share, COVERAGE_BAR, smoke, at_least=True))
        shares = ", ".join(f"{each:.0%}" for each in np.mean(inside[name], axis=0))
        spread = ", ".join(f"{each:.1%}" for each in np.mean(widths[name], axis=0))
        lines.append(f"  by ridge, largest first: {shares}; mean half width {spread} of the exact value")
    return [f"  stochastic estimates, {problem.kernel.train_samples:,} digits:", *lines]


def iterations(folder: Path, smoke: bool) -> list[Finding]:
    """Steps of preconditioned and of plain conjugate gradients, by ridge."""
    problem = digits_problem(folder, smoke, epochs=ITERATIONS_EPOCHS)
    kernel, targets, size = problem.kernel, problem.targets, problem.kernel.train_samples
    matrix = np.asarray(kernel[:size], dtype=np.float64)
    values = scipy.linalg.eigvalsh(matrix)
    rows: list[tuple[str, ...]] = [
        ("ridge / mean diagonal", "condition", "rank", "10 targets", "plain", "ratio", "1 target", "SciPy", "ratio")
    ]
    beside_plain, beside_scipy = [], []
    for ratio in RATIOS:
        ridge = ratio * problem.mean_diagonal
        ours = kernel.solve(targets, ridge, method="cg", tolerance=TOLERANCE)
        single = kernel.solve(targets[:, 0], ridge, method="cg", tolerance=TOLERANCE)
        plain, theirs = _plain_steps(kernel, targets, ridge), _scipy_steps(matrix, targets[:, 0], ridge)
        beside_plain.append(ours.iterations / plain)
        beside_scipy.append(single.iterations / theirs)
        condition = f"{(values[-1] + ridge) / (values[0] + ridge):.1e}"
        block = (f"{ours.iterations}", _steps(plain), f"{beside_plain[-1]:.3f}")
        alone = (f"{single.iterations}", _steps(theirs), f"{beside_scipy[-1]:.3f}")
        rows.append((f"{ratio:.0e}", condition, f"{ours.rank}", *block, *alone))
    before = float(values[-1] / values[0]) if values[0] > 0 else float("inf")
    return [
        f"  {size:,} digits, CNN after {ITERATIONS_EPOCHS} epoch, steps to a relative residual of {TOLERANCE:g}; "
        f"eigenvalues from {values[0]:.3g} to {values[-1]:.3g}, mean diagonal {problem.mean_diagonal:.3g}",
        *aligned(rows),
        checked("condition number before the ridge", before, CONDITION_BAR, smoke, at_least=True),
        checked("steps / our plain steps, 10 targets, largest", max(beside_plain), ITERATIONS_BAR, smoke),
        checked("steps / SciPy's plain steps, 1 target, largest", max(beside_scipy), ITERATIONS_BAR, smoke),
    ]


def _steps(count: int) -> str:
    """Steps of plain conjugate gradients; those that were stopped would have taken more."""
    return f"{'> ' if count == PLAIN_STEPS else ''}{count:,}"


def _plain_steps(kernel: ooc_ntk.Kernel, targets: NDArray[np.float64], ridge: float) -> int:
    """Steps without a preconditioner, of the same solver and targets; :data:`PLAIN_STEPS` where they are not enough."""
    try:
        found = kernel.solve(targets, ridge, method="cg", tolerance=TOLERANCE, rank=0, iterations=PLAIN_STEPS)
    except ooc_ntk.InputError:
        return PLAIN_STEPS
    return found.iterations


def _scipy_steps(matrix: NDArray[np.float64], target: NDArray[np.float64], ridge: float) -> int:
    """Steps of SciPy's conjugate gradients for one target; :data:`PLAIN_STEPS` where they are not enough."""
    steps = 0

    def count(solution: NDArray[np.float64]) -> None:  # noqa: ARG001 - SciPy's callback
        nonlocal steps
        steps += 1

    cg(matrix + ridge * np.eye(len(matrix)), target, rtol=TOLERANCE, maxiter=PLAIN_STEPS, callback=count)
    return steps


def regression(folder: Path, smoke: bool, sizes: tuple[int, int] = DIGITS) -> list[Finding]:
    """Kernel regression beside the network, and GCV and leave-one-out beside the test errors."""
    problem = digits_problem(folder, smoke, sizes)
    kernel, size, count = problem.kernel, problem.kernel.train_samples, problem.targets.shape[1]
    ratios = np.logspace(-6, 0, 5 if smoke else 13)
    curve = kernel.gcv(problem.targets, ratios * problem.mean_diagonal)
    predicted = kernel.matmat(np.concatenate(list(curve.path.coefficients), axis=1), rows="test")
    predicted = predicted.reshape(len(predicted), len(ratios), count).transpose(1, 0, 2)
    wanted = problem.labels[size:]
    errors = ((predicted - (np.eye(count)[wanted] - 0.1)) ** 2).mean((1, 2))
    accuracies = (predicted.argmax(2) == wanted).mean(1)
    rows: list[tuple[str, ...]] = [
        ("ridge / mean diagonal", "GCV", "leave-one-out", "test error", "accuracy", "effective dimension")
    ]
    for number, ratio in enumerate(ratios):
        errors_here = (curve.gcv[number], curve.loo[number], errors[number])
        text = [
            f"{value:.5f}{'*' if value == all_.min() else ' '}"
            for value, all_ in zip(errors_here, (curve.gcv, curve.loo, errors), strict=True)
        ]
        dimension = f"{curve.effective_dimension[number]:,.0f}"
        rows.append((f"{ratio:.1e}", *text, f"{accuracies[number]:.3f}", dimension))
    best, left_out = curve.best, int(np.argmin(curve.loo))
    return [
        f"  {size:,} train and {len(wanted):,} test digits; errors are mean squares, * is the least",
        *aligned(rows),
        f"  accuracy: network {problem.accuracy:.3f}, regression at GCV's ridge {accuracies[best]:.3f}, at "
        f"leave-one-out's {accuracies[left_out]:.3f}",
        checked(ACCURACY, problem.accuracy - float(accuracies[best]), ACCURACY_BAR, smoke),
        checked(GCV_CHOICE, float(errors[best] / errors.min()), GCV_CHOICE_BAR, smoke),
        f"test error at leave-one-out's ridge / least = {errors[left_out] / errors.min():.3g}",
    ]


PARTS: Final = {"equal": equal, "iterations": iterations, "large": large, "tiles": tiles, "regression": regression}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m bench.algebra", description="What a kernel on disk answers.")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--folder", type=Path, help="where kernels are kept (default: a folder that is deleted)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: torch's)")
    parser.add_argument("--smoke", action="store_true", help="tiny kernels, to see that it works")
    chosen = parser.parse_args(arguments)
    unknown = set(chosen.parts.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"--parts: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
    if chosen.threads < 1:
        parser.error(f"--threads must be at least 1, got {chosen.threads}")
    with limited_threads(chosen.threads), tempfile.TemporaryDirectory(prefix="ooc-ntk-bench-") as temporary:
        calibrate_once()
        print("; ".join(f"{name} {value}" for name, value in machine(chosen.threads).items()), flush=True)
        for part in chosen.parts.split(","):
            print(f"\n{part}", flush=True)
            for line in PARTS[part](chosen.folder or Path(temporary), chosen.smoke):
                print(line, flush=True)


if __name__ == "__main__":
    main()
