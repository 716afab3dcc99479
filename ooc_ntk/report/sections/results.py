"""What the kernel is used for: spectrum, regression and accuracy, surrogates."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from ooc_ntk.errors import OocNtkError
from ooc_ntk.report.figures.curve import Curve, draw_accuracy, draw_curve, read_curve
from ooc_ntk.report.figures.spectrum import Eigenvalues, draw_eigenvalues, draw_shares
from ooc_ntk.report.parts import Figure, Figures, Missing, Part, Section, Table, Text
from ooc_ntk.report.words import number

from .run import Run

#: Rows up to which the spectrum is found for the report where the run has none. (Measured: 0.2 s for 1,500.)
QUICK_ROWS: Final = 1500

#: Memory that it may take.
QUICK_BYTES: Final = 2**28


def eigenvalues(run: Run) -> Eigenvalues | None:
    """The spectrum that the run keeps, or of a small kernel a new one; None where that would take long."""
    kept = run.result("spectrum")
    if kept is not None and kept.get("values"):
        shares = kept.get("target_shares")
        return Eigenvalues(
            name=run.name,
            values=np.array(kept["values"], dtype=np.float64),
            trace=float(kept.get("trace") or 0.0),
            rows=int(kept.get("rows") or 0),
            decay=kept.get("decay"),
            shares=None if shares is None else np.array(shares, dtype=np.float64),
        )
    if run.kernel is None or run.kernel.shape[1] > QUICK_ROWS:
        return None
    found = run.kernel.eigh(memory=QUICK_BYTES)
    decay: dict[str, Any] | None = None
    try:
        decay = found.decay().figures()
    except OocNtkError:  # too few eigenvalues for a law
        decay = None
    return Eigenvalues(run.name, found.values, found.trace, found.size, decay)


def spectrum(run: Run) -> Section:
    """Eigenvalues, their decay, and what of the targets is along them."""
    found = eigenvalues(run)
    command = run.command("spectrum")
    if found is None:
        return Section("spectrum", "Spectrum", (Missing("Eigenvalues and their decay", command),))
    said = f"{len(found.values):,} of {found.rows:,} eigenvalues"
    if found.decay is not None:
        law = found.decay
        said += (
            f", which fall as rank to the power −α, α = {law['value']:.3f} ± {law['error']:.3f}, over ranks "
            f"{law['first']:,} to {law['last']:,} (r² {law['r2']:.3f})"
        )
    figures = [
        Figure(
            "spectrum",
            draw_eigenvalues([found]),
            f"Eigenvalues of the train square: {said}.",
            f"Eigenvalues by rank: {said}.",
        )
    ]
    if len(found.values) > 1:
        sums = np.cumsum(found.values)
        half = int(np.searchsorted(sums, 0.5 * found.trace)) + 1
        share = f"half of the trace is in the first {half:,} eigenvectors" if half > 1 else "half of it is in the first"
        if sums[-1] < 0.5 * found.trace:  # fewer are kept
            share = f"the first {len(sums):,} eigenvectors hold {sums[-1] / found.trace:.0%} of the trace"
        if found.shares is not None and found.shares.sum() >= 0.5:
            share += (
                f", half of the targets' energy in the first {int(np.searchsorted(np.cumsum(found.shares), 0.5)) + 1:,}"
            )
        and_targets = "" if found.shares is None else ", and of the targets,"
        figures.append(
            Figure(
                "shares",
                draw_shares(found),
                f"How much of the kernel's trace{and_targets} the leading eigenvectors hold: {share}.",
                f"Cumulative shares by rank: {share}.",
            )
        )
    parts: list[Part] = [Figures(tuple(figures))]
    kept = run.result("spectrum") or {}
    dimensions = kept.get("effective_dimension") or []
    if dimensions:
        rows = tuple(
            (number(each["ratio"], 1), number(each["ridge"]), *_between(each, found.rows)) for each in dimensions
        )
        head = ("ridge / mean diagonal", "ridge", "effective dimension", "of the rows")
        parts.append(Table(head, rows, "Effective dimension: how many directions a ridge leaves free"))
    if found.shares is None:
        parts.append(Missing("Targets along the eigenvectors", command))
    return Section("spectrum", "Spectrum", tuple(parts))


def _between(each: dict[str, Any], rows: int) -> tuple[str, str]:
    """A dimension and its share, as one number where both bounds print the same."""
    low, high = f"{each['lower']:,.1f}", f"{each['upper']:,.1f}"
    if low == high or not rows:
        return low, f"{each['lower'] / rows:.1%}" if rows else "-"
    return f"{low} to {high}", f"{each['lower'] / rows:.1%} to {each['upper'] / rows:.1%}"


def network_accuracy(run: Run) -> tuple[float, int] | None:
    """Accuracy of the network itself on the test samples, and how many they are, as ``surrogate`` measured it."""
    network = (run.result("surrogate") or {}).get("network")
    if not isinstance(network, dict) or network.get("accuracy") is None:
        return None
    return float(network["accuracy"]), int(network.get("test_samples") or 0)


def curve_of(run: Run) -> Curve | None:
    """Errors over the ridge, if they are kept."""
    kept = run.result("fit")
    return None if kept is None else read_curve(kept, run.name)


def regression(run: Run) -> Section:
    """Kernel regression beside the network: errors over the ridge, accuracies."""
    kept, network = run.result("fit"), network_accuracy(run)
    parts: list[Part] = []
    rows = accuracies(run)
    if rows:
        parts.append(Table(("classified right", "train samples", "test samples"), tuple(rows)))
    if kept is None:
        parts.append(Missing("Errors over the ridge and the accuracy of kernel regression", run.command("fit")))
    else:
        parts += _fitted(kept, run, network)
    if network is None and run.labels is not None and run.info.plan.test_samples:
        parts.append(Missing("Accuracy of the network itself", run.command("surrogate")))
    return Section("regression", "Kernel regression and accuracy", tuple(parts))


def accuracies(run: Run) -> list[tuple[str, str, str]]:
    """Accuracies of the network and of what was fitted to the kernel: what, train, test."""
    found = []
    network = (run.result("surrogate") or {}).get("network")
    if isinstance(network, dict):
        found.append(("the network", _percent(network.get("train_accuracy")), _percent(network.get("accuracy"))))
    kept = run.result("fit")
    if kept is not None and (kept.get("accuracy") is not None or kept.get("train_accuracy") is not None):
        ridge = f", ridge {kept['ridge_ratio']:.2g} of the mean diagonal" if kept.get("ridge_ratio") else ""
        found.append(
            (f"kernel regression{ridge}", _percent(kept.get("train_accuracy")), _percent(kept.get("accuracy")))
        )
    return found


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _fitted(kept: dict[str, Any], run: Run, network: tuple[float, int] | None) -> list[Part]:
    """What ``fit`` has found."""
    curve = curve_of(run)
    if curve is None:
        error = (
            ""
            if kept.get("test_error") is None
            else f"; mean squared error of the test samples {number(kept['test_error'])}"
        )
        return [
            Text(f"One ridge was fitted, {number(kept.get('ridge'))}{error}."),
            Missing("Errors over a grid of ridges", run.command("fit")),
        ]
    best = int(np.nanargmin(curve.errors["GCV"]))
    said = f"GCV is least, {number(curve.errors['GCV'][best])}, with a ridge of {number(curve.ridges[best], 2)}"
    said += " of the mean diagonal" if curve.relative else ""
    if "test" in curve.errors:
        least = int(np.nanargmin(curve.errors["test"]))
        said += (
            f", where the test error is {number(curve.errors['test'][best])}; that is least, "
            f"{number(curve.errors['test'][least])}, with {number(curve.ridges[least], 2)}"
        )
    estimated = " Bands are 95% intervals of what is estimated." if curve.bars else ""
    figures = [
        Figure(
            "gcv",
            draw_curve(curve),
            f"Errors of kernel regression over the ridge, as GCV and leave-one-out tell them from the train samples, "
            f"and as they are. {said}.{estimated} The dashed line is the ridge that was kept.",
            f"Mean squared errors over the ridge: {said}.",
        )
    ]
    if len(curve.accuracies):
        right = float(np.max(curve.accuracies))
        told = f"up to {right:.1%} of the test samples are classified right"
        levels = [] if network is None else [("network", network[0])]
        told += "" if network is None else f", by the network {network[0]:.1%}"
        figures.append(
            Figure(
                "accuracy",
                draw_accuracy(curve, levels),
                f"By kernel regression {told}.",
                f"Accuracy over the ridge: {told}.",
            )
        )
    return [Figures(tuple(figures))]


def surrogates(run: Run) -> Section | None:
    """How well kernel surrogates follow the network; None where they were not fitted."""
    found = (run.result("surrogate") or {}).get("surrogates") or []
    if not found:
        return None
    rows = tuple(
        (
            str(each["kernel"]),
            str(each["kind"]),
            _estimate(each["accuracy"], percent=True),
            _estimate(each["kendall_tau"]),
            _estimate(each["r_squared"]),
        )
        for each in found
    )
    head = ("kernel", "surrogate", "accuracy", "Kendall’s τ-b with the network", "R² of log-odds")
    caption = "Kernel surrogates beside the network, on the test samples; ± one standard error"
    return Section("surrogates", "Surrogates of the network", (Table(head, rows, caption, words=(1,)),))


def _estimate(found: Any, *, percent: bool = False) -> str:
    """A figure with its standard error."""
    value, error = (found.get("value"), found.get("error")) if isinstance(found, dict) else (found, None)
    if value is None:
        return "-"
    shown = f"{100 * value:.1f}" if percent else f"{value:.3f}"
    if error is not None:
        shown += f" ± {100 * error:.1f}" if percent else f" ± {error:.3f}"
    return f"{shown}%" if percent else shown
