"""Kernel logistic regression out of core: conjugate gradients in the kernel's inner product, one pass an iteration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import scipy.linalg
from numpy.typing import ArrayLike, NDArray

from ooc_ntk.errors import InputError
from ooc_ntk.planning.budget import Budget

from .classes import MOST_CLASSES, one_hot
from .dense import budget_bytes, too_little_memory, usable_bytes

if TYPE_CHECKING:
    from .multiplying import MultipliedKernel

Array = NDArray[np.float64]

#: A solution is found when its loss is within this share of the least one. A choice: at ridges from 1e-1 to 1e-5 of the
#: mean diagonal, no figure of a surrogate of 1,000 digits was then more than 5e-4 off that of a fit to 1e-8 (measured).
TOLERANCE: Final = 1e-4

#: Passes over the kernel after which a solution is returned as it is, and says so (a choice; 10 to 60 were needed of
#: several kernels of 600 digits, at ridges from 1e-1 to 1e-5 of the mean diagonal and with labels from true to random).
MAX_ITERATIONS: Final = 500

#: Arrays of (train rows, classes) float64 that are held at most: counted in the code below.
HELD_ARRAYS: Final = 16

#: Newton steps of a line search (a bound; three to five are usual), and halvings of one of them.
NEWTON_STEPS, HALVINGS = 50, 40


@dataclass(frozen=True)
class LogisticSolution:
    """A kernel logistic regression: class scores ``f = K W + 1 bᵀ``, of which the softmax is taken.

    Attributes:
        coefficients: W, (train rows, classes) float64.
        bias: b, (classes,) float64, adding up to 0.
        train_scores: f of the train rows, (train rows, classes) float64.
        ridge: the absolute ridge.
        ridge_ratio: the ridge over the mean diagonal of the train square.
        loss: ``Σ_i CE(softmax f_i, target_i) + (ridge/2)·tr(Wᵀ K W)``.
        gap: the loss is above the least one by at most this (the duality gap).
        gradient: norm of the gradient in the kernel's inner product, over that of the constant fit.
        iterations: steps that were made.
        passes: passes over the train square.
        converged: whether the gap is within the tolerance.
    """

    coefficients: Array
    bias: Array
    train_scores: Array
    ridge: float
    ridge_ratio: float
    loss: float
    gap: float
    gradient: float
    iterations: int
    passes: int
    converged: bool


@dataclass
class _Fit:
    """Where the descent is.

    Attributes:
        targets: (rows, classes), every row adding up to 1.
        ridge: the ridge.
        coefficients: W, (rows, classes).
        scores: K W, without the bias.
        bias: (classes,).
        penalty: tr(Wᵀ K W).
    """

    targets: Array
    ridge: float
    coefficients: Array
    scores: Array
    bias: Array
    penalty: float = 0.0

    def gradient(self) -> tuple[float, Array]:
        """The loss, and its gradient for the coefficients in the kernel's inner product, (rows, classes)."""
        value, chances = cross_entropy(self.scores + self.bias, self.targets)
        chances -= self.targets
        chances += self.ridge * self.coefficients
        return value + 0.5 * self.ridge * self.penalty, chances

    def step(self, direction: Array, product: Array) -> None:
        """Go to the least loss along a direction, over the bias as well.

        Args:
            direction: (rows, classes).
            product: the kernel times it.
        """
        linear = float(np.vdot(self.coefficients, product))
        square = max(0.0, float(np.vdot(direction, product)))
        length, self.bias = _line_search(self, product, linear, square)
        self.coefficients += length * direction
        self.scores += length * product
        self.penalty = max(0.0, self.penalty + 2 * length * linear + length**2 * square)


def solve_logistic(
    kernel: MultipliedKernel,
    targets: ArrayLike,
    ridge: float,
    *,
    classes: int | None = None,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
    budget: Budget | None = None,
    device: str = "cpu",
    advance: Callable[[int, float], None] = lambda iteration, share: None,  # noqa: ARG005
) -> LogisticSolution:
    """Minimise ``Σ_i CE(softmax f_i, target_i) + (ridge/2)·tr(Wᵀ K W)`` over W and b, for ``f = K W + 1 bᵀ``.

    Nonlinear conjugate gradients (Polak–Ribière) in the kernel's inner product ``⟨U, V⟩ = tr(Uᵀ K V)``, in which the
    gradient for W is ``G = P − Y + ridge·W`` and takes no product. One pass gives ``K G``; K times the direction
    follows by the direction's own recurrence, so that all inner products and the line search (Newton's method over the
    step and the bias together) take no further pass. Only arrays of (train rows, classes) and a few stripes are held.

    In this inner product the Hessian is ``H K + ridge``, H at most ``(I − 1 1ᵀ/C)/2`` (Böhning 1992) and next to
    nothing at every sample that is fitted. That is why no preconditioner is taken: ``(K/2 + ridge·I)⁻¹``, formed
    exactly, took more passes of every kernel that was tried (arc-cosine NTK of 600 digits, ridges from 1e-1 to 1e-5 of
    the mean diagonal: 4 to 6 times as many with true labels, 1.2 to 1.4 times with random ones), and so did H's mean
    in the place of 1/2 wherever labels were not random.

    At the best bias P is feasible in the dual problem, and the duality gap is ``tr(Gᵀ K G)/(2·ridge)`` exactly: a bound
    of what the loss is above the least one, known after every pass.

    Args:
        kernel: its train square is multiplied.
        targets: class labels (train rows,), or probabilities (train rows, classes).
        ridge: absolute, above 0.
        classes: how many there are; None takes one more than the largest label.
        tolerance: the loss may be above the least one by this share of it (where targets are probabilities, by this
            share of what it is above their own entropy).
        max_iterations: steps after which the solution is returned as it is.
        budget: host memory of the whole process; a limit that is None takes 80% of what is free.
        device: torch device that multiplies.
        advance: told after every pass its number, from 0, and the gap's share of the loss.

    Returns:
        The solution; ``converged`` says whether the tolerance was reached.

    Raises:
        InputError: for wrong targets, a ridge or a tolerance that is not above 0, or a class without targets, whose
            bias would be infinite.
        BudgetError: if the arrays do not fit in memory.
        StorageError: if a tile cannot be read, or is not what was committed.
    """
    wanted, ridge = class_targets(targets, kernel.shape[1], classes), float(ridge)
    _check(wanted, ridge, tolerance, max_iterations)
    _check_memory(wanted, kernel.entries.buffer_bytes, budget_bytes(budget))
    mean = float(kernel.sample_diagonal()[: len(wanted)].mean())
    entropy = -float(np.sum(wanted * np.log(wanted, out=np.zeros_like(wanted), where=wanted > 0)))
    priors = np.log(wanted.mean(0))
    fit = _Fit(wanted, ridge, np.zeros_like(wanted), np.zeros_like(wanted), priors - priors.mean())
    direction = product = before = np.zeros_like(wanted)
    square_before = first = 0.0
    iteration = 0
    while True:
        loss, gradient = fit.gradient()
        gradient_product = kernel.matmat(gradient, device=device)
        square = float(np.vdot(gradient, gradient_product))
        gap, first = abs(square) / (2 * ridge), first or square
        share = gap / max(loss - entropy, np.finfo(float).tiny)
        advance(iteration, share)
        # A square below 0 is one of rounding errors: the kernel's entries allow no more digits than these.
        if share <= tolerance or iteration >= max_iterations or square <= 0:
            break
        # Polak–Ribière's number, never below 0: then the descent begins anew, along the gradient.
        turn = max(0.0, square - float(np.vdot(before, gradient_product))) / (square_before or np.inf)
        direction, product = turn * direction - gradient, turn * product - gradient_product
        if float(np.vdot(direction, gradient_product)) >= 0:
            direction, product = -gradient, -gradient_product
        before, square_before = gradient, square
        fit.step(direction, product)
        iteration += 1
    return LogisticSolution(
        coefficients=fit.coefficients,
        bias=fit.bias,
        train_scores=fit.scores + fit.bias,
        ridge=ridge,
        ridge_ratio=ridge / mean if mean else float("inf"),
        loss=loss,
        gap=gap,
        gradient=float(np.sqrt(abs(square) / first)) if first > 0 else 0.0,
        iterations=iteration,
        passes=iteration + 1,
        converged=share <= tolerance,
    )


def class_targets(targets: ArrayLike, rows: int, classes: int | None = None) -> Array:
    """Labels or probabilities as probabilities, (rows, classes) float64.

    Args:
        targets: class labels (rows,), or probabilities (rows, classes).
        rows: how many there must be.
        classes: how many there are; None takes one more than the largest label.

    Raises:
        InputError: for another length, labels that are no whole numbers from 0 or of too many classes, or rows that
            are no probabilities.
    """
    given: NDArray[Any] = np.asarray(targets)
    if given.ndim not in (1, 2) or len(given) != rows:
        raise InputError(
            f"targets must be {rows:,} class labels, or probabilities of shape ({rows:,}, classes), got shape "
            f"{given.shape}"
        )
    if given.ndim == 1:
        if not np.issubdtype(given.dtype, np.integer):
            raise InputError(f"class labels must be whole numbers, got {given.dtype}; or give probabilities")
        count = int(given.max()) + 1 if classes is None else classes
        wrong = given[(given < 0) | (given >= count)]
        if wrong.size:
            raise InputError(f"label {wrong[0]} is out of range: labels run from 0 to {count - 1}")
        return one_hot(given, count, MOST_CLASSES if classes is None else None)
    found = given.astype(np.float64)
    if classes is not None and found.shape[1] != classes:
        raise InputError(f"targets have {found.shape[1]} columns for {classes} classes")
    if not np.isfinite(found).all() or (found < 0).any() or np.abs(found.sum(1) - 1).max(initial=0.0) > 1e-6:
        raise InputError("targets of two axes must be probabilities: not negative, every row adding up to 1")
    return np.asarray(found / found.sum(1, keepdims=True))


def cross_entropy(scores: Array, targets: Array) -> tuple[float, Array]:
    """Cross-entropy of softmaxes, summed over rows, and the softmaxes.

    Args:
        scores: (rows, classes).
        targets: probabilities, (rows, classes).
    """
    shifted = scores - scores.max(1, keepdims=True)
    chances = np.exp(shifted)
    total = chances.sum(1, keepdims=True)
    chances /= total
    return float(np.log(total).sum() - np.vdot(targets, shifted)), chances


def _check(targets: Array, ridge: float, tolerance: float, max_iterations: int) -> None:
    """Refuse what has no finite solution."""
    if not 0 < ridge < np.inf:
        raise InputError(f"ridge of a logistic regression must be above 0 and finite, got {ridge}")
    if not 0 < tolerance < 1:
        raise InputError(f"tolerance must be between 0 and 1, got {tolerance}")
    if max_iterations < 1:
        raise InputError(f"max_iterations must be at least 1, got {max_iterations}")
    classes = targets.shape[1]
    if classes < 2:
        raise InputError(f"a logistic regression needs at least 2 classes, got {classes}")
    absent = np.flatnonzero(targets.sum(0) == 0)
    if absent.size:
        raise InputError(
            f"class {absent[0]} is no train sample's, so that its bias has no finite value; give train samples of all "
            f"{classes} classes, or probabilities as targets (--targets outputs)"
        )


def _check_memory(targets: Array, buffer_bytes: int, memory: int | None) -> None:
    """Refuse arrays that do not fit the memory.

    Raises:
        BudgetError: says what would do.
    """
    needed, (rows, classes) = HELD_ARRAYS * targets.nbytes + buffer_bytes, targets.shape
    if needed > usable_bytes(memory):
        what = f"a logistic regression of {rows:,} rows × {classes:,} classes"
        raise too_little_memory(what, needed, memory, "use fewer train samples or a machine with more memory")


def _line_search(fit: _Fit, product: Array, linear: float, square: float) -> tuple[float, Array]:
    """Minimise the loss over the step's length and the bias by Newton's method; convex, C + 1 unknowns.

    Args:
        fit: where the descent is.
        product: the kernel times the direction, (rows, classes).
        linear: tr(Wᵀ K D) of the direction D.
        square: tr(Dᵀ K D).

    Returns:
        The length, and the bias there.
    """
    ridge, classes = fit.ridge, len(fit.bias)

    def loss_at(point: Array) -> tuple[float, Array]:
        value, chances = cross_entropy(fit.scores + point[0] * product + point[1:], fit.targets)
        return value + ridge * (point[0] * linear + 0.5 * point[0] ** 2 * square), chances

    point = np.concatenate([[0.0], fit.bias])
    value, chances = loss_at(point)
    for _ in range(NEWTON_STEPS):
        rest = chances - fit.targets
        slope = np.concatenate([[np.vdot(rest, product) + ridge * (linear + point[0] * square)], rest.sum(0)])
        weighted = chances * product
        means = weighted.sum(1, keepdims=True)
        hessian = np.empty((classes + 1, classes + 1))
        hessian[0, 0] = np.vdot(weighted, product) - np.vdot(means, means) + ridge * square
        hessian[0, 1:] = hessian[1:, 0] = (weighted - means * chances).sum(0)
        # The bias is one up to a constant: the term of ones fixes that its numbers add up to 0.
        hessian[1:, 1:] = np.diag(chances.sum(0)) - chances.T @ chances + len(rest) / classes**2
        newton = -_solved(hessian, slope)
        decrement = -float(slope @ newton)
        if decrement <= 1e-15 * (abs(value) + 1e-300):
            break
        for halving in range(HALVINGS):
            trial = point + 0.5**halving * newton
            trial_value, trial_chances = loss_at(trial)
            if trial_value <= value - 1e-4 * 0.5**halving * decrement:
                break
        else:
            break  # within rounding of the least loss
        point, value, chances = trial, trial_value, trial_chances
    return float(point[0]), point[1:] - point[1:].mean()


def _solved(hessian: Array, slope: Array) -> Array:
    """Solve with a matrix that is positive definite up to rounding, brought to a diagonal of ones."""
    scale = 1.0 / np.sqrt(np.maximum(hessian.diagonal(), np.finfo(float).tiny))
    matrix = hessian * scale * scale[:, None]
    # The smallest shift that keeps Cholesky from failing where chances are 0 or 1 to the last digit (a guess).
    matrix[np.diag_indices(len(slope))] += 1e-13
    try:
        factor = scipy.linalg.cho_factor(matrix, check_finite=False)
        return np.asarray(scale * scipy.linalg.cho_solve(factor, scale * slope, check_finite=False))
    except np.linalg.LinAlgError:
        return np.asarray(scale * np.linalg.lstsq(matrix, scale * slope, rcond=1e-12)[0])
