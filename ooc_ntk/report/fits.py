"""Kernel regression on the terminal and as a picture: the ridge that was chosen, and what came of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ooc_ntk.units import format_bytes, format_seconds

from .pictures import picture

if TYPE_CHECKING:
    from ooc_ntk.api import Fit

#: Ridges listed before others are left out between them.
LISTED: Final = 12


def fit_table(fit: Fit) -> RenderableType:
    """A fit: how it was solved, the curve over the ridges, what it reaches."""
    solution = fit.solution
    head = Table(box=None, pad_edge=False, show_header=False)
    head.add_column(style="cyan", no_wrap=True)
    head.add_column()
    targets = f"labels of {fit.targets.labels.classes} classes" if fit.targets.labels is not None else "given"
    steps = f", {solution.iterations} steps, preconditioner of rank {solution.rank}" if solution.iterations else ""
    lines = [
        ("run", str(fit.path)),
        ("kernel", {"kernel": "as it is"}.get(fit.view, fit.view)),
        ("targets", targets),
        ("ridge", f"{solution.ridge:.4g}, {solution.ridge_ratio:.2g} of the mean diagonal, {_chosen_by(fit)}"),
        ("solved by", f"{solution.method}{steps}, {solution.passes} passes, {format_seconds(solution.seconds)}"),
        ("residual", f"{solution.residual:.1e}"),
    ]
    if fit.curve is not None and fit.curve.dropped:
        largest = max(fit.curve.dropped)
        lines.append(
            (
                "left out",
                f"{len(fit.curve.dropped)} ridges up to {largest:.2g}: with them the kernel is not positive definite, "
                "as its entries are rounded",
            )
        )
    if solution.io_ratio is not None:
        moved = format_bytes(solution.bytes_read + solution.bytes_written)
        lines.append(("moved", f"{moved}, {solution.io_ratio:.2f} times the lower bound of a Cholesky factorisation"))
    if fit.train_accuracy is not None:
        lines.append(("train", f"{fit.train_accuracy:.2%} right"))
    if fit.test_error is not None:
        right = "" if fit.accuracy is None else f"{fit.accuracy:.2%} right, "
        lines.append(("test", f"{right}mean squared error {fit.test_error:.4g}"))
    for label, value in lines:
        head.add_row(label, Text(value))
    return head if fit.curve is None else Group(head, Text(), _curve_table(fit))


def _chosen_by(fit: Fit) -> str:
    if fit.curve is None:
        return "as asked for"
    edge = ""
    if len(fit.curve.ridges) > 1 and fit.curve.best_ridge in (fit.curve.ridges.min(), fit.curve.ridges.max()):
        edge = ", at the end of the grid: a wider one may do better"
    return f"least GCV of {len(fit.curve.ridges)}{edge}"


def _curve_table(fit: Fit) -> Table:
    """Errors over the ridges, those near the chosen one and some of the others."""
    curve = fit.curve
    assert curve is not None
    table = Table(title="errors over the ridge", title_justify="left", box=None, pad_edge=False)
    columns = ["of the diagonal", "GCV", "leave-one-out", "train", "effective dimension"]
    if len(fit.test_errors):
        columns.append("test")
    if len(fit.accuracies):
        columns.append("right")
    for name in columns:
        table.add_column(name, justify="right")
    order = np.argsort(curve.ridges, kind="stable")
    step = -(-len(order) // LISTED)
    for place, index in enumerate(order):
        if place % step and index != curve.best:
            continue
        ratio = curve.path[int(index)].ridge_ratio
        cells = [
            f"{ratio:.2g}",
            _with_error(curve.gcv[index], curve.gcv_error[index]),
            _with_error(curve.loo[index], curve.loo_error[index]),
            f"{curve.train[index]:.3g}",
            _with_error(curve.effective_dimension[index], curve.effective_dimension_error[index]),
        ]
        if len(fit.test_errors):
            cells.append(f"{fit.test_errors[index]:.4g}")
        if len(fit.accuracies):
            cells.append(f"{fit.accuracies[index]:.2%}")
        table.add_row(*cells, style="bold" if index == curve.best else None)
    return table


def _with_error(value: float, error: float) -> str:
    if not error:
        return f"{value:.4g}"
    digits = 1 if error >= abs(value) else min(4, 1 + math.ceil(math.log10(abs(value) / error)))
    return f"{value:.{digits}g} ± {error:.1g}"


def draw_fit(path: Path, fit: Fit) -> None:
    """Draw errors over the ridge, and what the chosen one makes of the test samples (or of the train samples).

    Args:
        path: file to write.
        fit: the fit.

    Raises:
        InputError: if matplotlib is not installed.
    """
    panels = 1 if fit.curve is None else 2
    with picture(path, width=5.5 * panels, height=4.4) as figure:
        axes = figure.subplots(1, panels, squeeze=False)[0]
        if fit.curve is not None:
            _draw_curve(axes[0], fit)
        if fit.targets.labels is not None:
            _draw_confusion(axes[-1], fit)
        else:
            _draw_scatter(axes[-1], fit)


def _draw_curve(axis: Any, fit: Fit) -> None:
    curve = fit.curve
    assert curve is not None
    order = np.argsort(curve.ridges, kind="stable")
    x = np.array([curve.path[int(each)].ridge_ratio for each in order])
    if (x <= 0).any():
        axis.set_xscale("symlog", linthresh=max(1e-12, float(x[x > 0].min(initial=1.0))))
    else:
        axis.set_xscale("log")
    axis.set_yscale("log")
    lines = [("GCV", curve.gcv, curve.gcv_error, "-"), ("leave-one-out", curve.loo, curve.loo_error, "--")]
    if len(fit.test_errors):
        lines.append(("test", fit.test_errors, np.zeros(len(order)), "-"))
    lines.append(("train", curve.train, np.zeros(len(order)), ":"))
    for name, values, errors, style in lines:
        axis.plot(x, values[order], style, label=name)
        if errors.any():
            low = np.maximum(values[order] - errors[order], 1e-3 * values[order])
            axis.fill_between(x, low, values[order] + errors[order], alpha=0.2)
    axis.axvline(fit.solution.ridge_ratio, color="0.4", linewidth=0.8, label="chosen")
    shown = np.concatenate([values for _, values, _, _ in lines[:-1]])
    axis.set_ylim(0.7 * shown.min(), min(1.4 * shown.max(), 30 * shown.min()))
    axis.set_xlabel("ridge / mean diagonal")
    axis.set_ylabel("mean squared error")
    axis.set_title("errors over the ridge")
    axis.legend(fontsize=8)


def _draw_confusion(axis: Any, fit: Fit) -> None:
    labels = fit.targets.labels
    assert labels is not None
    if fit.predicted is None:
        fitted = fit.targets.train - fit.solution.ridge * fit.solution.coefficients
        truth, scores, what = labels.train, fitted, "train"
    else:
        truth, scores, what = labels.test, fit.predicted, "test"
    guessed = scores.reshape(len(truth), -1).argmax(1)
    counts = np.zeros((labels.classes, labels.classes))
    np.add.at(counts, (truth, guessed), 1)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if labels.classes <= 20:
        for i, j in np.argwhere(counts > 0):
            colour = "white" if shares[i, j] > 0.5 else "black"
            axis.text(j, i, f"{int(counts[i, j])}", ha="center", va="center", fontsize=7, color=colour)
        axis.set_xticks(range(labels.classes))
        axis.set_yticks(range(labels.classes))
    axis.set_xlabel("class by the kernel")
    axis.set_ylabel("class")
    axis.set_title(f"{len(truth):,} {what} samples, {(truth == guessed).mean():.1%} right")


def _draw_scatter(axis: Any, fit: Fit) -> None:
    if fit.predicted is None or fit.targets.test is None:
        truth = fit.targets.train
        guessed, what = truth - fit.solution.ridge * fit.solution.coefficients, "train"
    else:
        truth, guessed, what = fit.targets.test, fit.predicted, "test"
    x, y = truth.reshape(-1), guessed.reshape(-1)
    if len(x) > 5000:  # enough to see, and a small file
        some = np.random.default_rng(0).choice(len(x), 5000, replace=False)
        x, y = x[some], y[some]
    axis.plot(x, y, ".", markersize=3, alpha=0.6)
    ends = [float(x.min()), float(x.max())]
    axis.plot(ends, ends, color="0.4", linewidth=0.8)
    axis.set_xlabel("target")
    axis.set_ylabel("by the kernel")
    axis.set_title(f"{what} samples")
