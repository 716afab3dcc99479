"""Surrogates: the table of their figures, and the picture of their probabilities beside the network's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .pictures import picture

if TYPE_CHECKING:
    from ooc_ntk.api import Surrogate, SurrogateReport

#: Most panels of a picture in one row (a choice).
COLUMNS: Final = 3

#: Ticks of an axis of log-odds at most (a choice).
TICKS: Final = 5


def surrogate_table(report: SurrogateReport) -> RenderableType:
    """Kernel by kind: accuracy, its difference to the network's, Kendall's τ-b and R², with standard errors."""
    network = report.network
    table = Table(title="surrogates", title_justify="left", box=None, pad_edge=False)
    table.add_column("kernel")
    table.add_column("surrogate")
    for name in ("accuracy", "network − surrogate", "Kendall τ-b", "R²", "fit"):
        table.add_column(name, justify="right", no_wrap=True)
    best = best_of(report)
    for each in report.surrogates:
        table.add_row(
            each.kernel,
            each.kind,
            _percent(each.accuracy.value, each.accuracy.error),
            _percent(each.accuracy_difference.value, each.accuracy_difference.error, signed=True),
            _number(each.kendall_tau.value, each.kendall_tau.error),
            _number(each.r_squared.value, each.r_squared.error),
            _fit(each),
            style="bold" if each is best else None,
        )
    first = report.surrogates[0]
    lines = [
        f"network: {network.accuracy:.1%} of {len(network.test_labels):,} test samples right, "
        f"{network.train_accuracy:.1%} of {len(network.train_labels):,} train samples",
        f"fitted to the {'labels' if first.targets == 'labels' else 'outputs of the network'} of the train samples, "
        f"ridge {first.ridge_ratio:.0e} of the mean diagonal; ± one standard error over test samples",
        "τ-b between the network's and the surrogate's probability of each test sample's own class, R² of a line "
        "between their log-odds",
    ]
    parts: list[RenderableType] = [Text(line) for line in lines]
    parts += [Text(), table]
    parts += [Text(f"note: {each.name}: {note}", style="yellow") for each in report.surrogates for note in each.notes]
    return Group(*parts)


def best_of(report: SurrogateReport, kernel: str | None = None) -> Surrogate:
    """The surrogate with the largest τ, of one kernel or of all; the first where none is defined."""
    chosen = [each for each in report.surrogates if kernel in (None, each.kernel)]
    return max(chosen, key=lambda each: -math.inf if math.isnan(each.kendall_tau.value) else each.kendall_tau.value)


def draw_surrogates(report: SurrogateReport, path: Path) -> None:
    """For each kernel its best surrogate: the network's probability of every test sample's own class against its own.

    Axes are of log-odds, where probabilities near 0 and 1 do not fall on each other.

    Args:
        report: the surrogates.
        path: file to write.

    Raises:
        InputError: if matplotlib is not installed.
    """
    chosen = [best_of(report, kernel) for kernel in dict.fromkeys(each.kernel for each in report.surrogates)]
    columns = min(COLUMNS, len(chosen))
    rows = -(-len(chosen) // columns)
    right = report.network.test_scores.argmax(1) == report.network.test_labels
    with picture(path, width=max(4.6, 3.6 * columns), height=0.5 + 3.7 * rows) as figure:
        panels = np.atleast_1d(figure.subplots(rows, columns, sharey=True)).reshape(-1)
        for panel in panels[len(chosen) :]:
            panel.set_axis_off()
        for panel, each in zip(panels, chosen, strict=False):
            _draw(panel, each, right)
        figure.suptitle(f"Probability of the own class, {len(right):,} test samples")
        panels[0].set_ylabel("network")
        # Outside of the panels, which points fill to the corners.
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)


def _draw(panel: Any, each: Surrogate, right: Any) -> None:
    """One surrogate: a point per test sample, and the line whose R² is told."""
    mine, own = each.log_odds, each.network_log_odds
    for which, colour, label in ((right, "tab:blue", "network right"), (~right, "tab:red", "network wrong")):
        panel.scatter(mine[which], own[which], s=9, alpha=0.5, linewidths=0, color=colour, label=label)
    if math.isfinite(each.r_squared.value):
        slope, offset = np.polyfit(mine, own, 1)
        ends = np.array([mine.min(), mine.max()])
        panel.plot(ends, slope * ends + offset, color="0.3", linewidth=1, label="line of R²")
    panel.set_title(
        f"{each.kernel}, {each.kind}\nτ = {_number(each.kendall_tau.value, each.kendall_tau.error)}, "
        f"R² = {_plain(each.r_squared.value)}",
        fontsize=10,
    )
    panel.set_xlabel("surrogate")
    _ticks(panel.xaxis, mine)
    _ticks(panel.yaxis, own)
    panel.grid(visible=True, linewidth=0.4, alpha=0.5)


def _ticks(axis: Any, values: Any) -> None:
    """Ticks of an axis of log-odds, told as probabilities."""
    ticks = log_odds_ticks(float(values.min()), float(values.max()))
    axis.set_ticks(list(ticks), labels=list(ticks.values()))


def log_odds_ticks(low: float, high: float) -> dict[float, str]:
    """A few log-odds in a range, with their probabilities in words.

    >>> list(log_odds_ticks(-5.0, 12.0).values())
    ['0.01', '0.5', '0.99', '1−10⁻⁴']
    >>> list(log_odds_ticks(0.1, 0.9).values())
    ['0.55', '0.6', '0.65', '0.7']
    """
    largest = max(abs(low), abs(high)) / math.log(10)
    if largest < 1:
        probabilities = [round(step / 20, 2) for step in range(1, 20)]
        found = {math.log(p / (1 - p)): f"{p:g}" for p in probabilities}
    else:
        step = max(1, math.ceil((high - low) / math.log(10) / (TICKS - 1)))
        found = {0.0: "0.5"}
        for power in range(step, math.ceil(largest) + 1, step):
            value = math.log((1 - 10.0**-power) / 10.0**-power)
            found[value] = _near_one(power)
            found[-value] = f"{10.0**-power:g}" if power < 4 else f"10{_raised(power)}"
    inside = {value: found[value] for value in sorted(found) if low <= value <= high}
    if len(inside) > TICKS:
        keys = list(inside)
        inside = {key: inside[key] for key in keys[:: -(-len(keys) // TICKS)]}
    return inside


def _near_one(power: int) -> str:
    return f"{1 - 10.0**-power:g}" if power < 4 else f"1−10{_raised(power)}"


def _raised(power: int) -> str:
    """A negative power in raised digits."""
    return f"⁻{power}".translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _percent(value: float, error: float, *, signed: bool = False) -> str:
    """A share with its standard error, in percent."""
    shown = f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}"
    return f"{shown} ± {100 * error:.1f}%"


def _number(value: float, error: float) -> str:
    """A figure with its standard error."""
    return "undefined" if math.isnan(value) else f"{value:.3f} ± {error:.3f}"


def _plain(value: float) -> str:
    return "undefined" if math.isnan(value) else f"{value:.3f}"


def _fit(each: Surrogate) -> str:
    """How the fit went."""
    if each.kind == "ridge":
        return f"residual {each.solver['residual']:.0e}"
    return f"{each.solver['passes']} passes, loss within {each.solver['gap']:.0e}"
