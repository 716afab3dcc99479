"""Errors of kernel regression over the ridge: GCV, leave-one-out, test, train; and the share classified right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from .theme import FONT, LIGHT, hover, legend_above, new_figure

if TYPE_CHECKING:
    from bokeh.plotting import figure as Plot  # noqa: N812

#: Errors above this multiple of the least are not drawn.
TALLEST: Final = 30.0


@dataclass(frozen=True, eq=False)
class Curve:
    """Errors over a grid of ridges, ascending.

    Attributes:
        name: of the kernel it is of.
        ridges: (ridges,) over the mean diagonal, or absolute.
        relative: whether they are over the mean diagonal.
        errors: by name, (ridges,) mean squared errors, GCV first.
        bars: by name, (ridges,) half of the 95% interval where it is an estimate.
        accuracies: (ridges,) share of the test samples that are classified right; empty where it is not known.
        chosen: the ridge that was kept.
    """

    name: str
    ridges: NDArray[np.float64]
    relative: bool
    errors: dict[str, NDArray[np.float64]]
    bars: dict[str, NDArray[np.float64]]
    accuracies: NDArray[np.float64]
    chosen: float

    @property
    def label(self) -> str:
        """What is along the ridges."""
        return "ridge / mean diagonal" if self.relative else "ridge"


STYLES: Final = {
    "GCV": ("accent", "solid", 2.5),
    "leave-one-out": ("ink", "dashed", 1.5),
    "test": ("second", "solid", 2.0),
    "train": ("third", "dotted", 1.5),
}


def read_curve(figures: dict[str, Any], name: str = "") -> Curve | None:
    """The curve of ``fit.json``; None where one ridge was asked for.

    Args:
        figures: as the file has them.
        name: of the kernel.
    """
    curve = figures.get("curve")
    if not curve or not curve.get("ridges"):
        return None
    ridges = np.asarray(curve["ridges"], dtype=np.float64)
    order = np.argsort(ridges, kind="stable")
    ratio, ridge = curve.get("best_ridge_ratio"), curve.get("best_ridge")
    relative = bool(ratio and ridge)
    scale = ratio / ridge if relative else 1.0
    errors = {"GCV": curve["gcv"], "leave-one-out": curve["loo"], "test": figures.get("test_errors") or []}
    errors["train"] = curve["train"]
    bars = {"GCV": curve.get("gcv_error") or [], "leave-one-out": curve.get("loo_error") or []}

    accuracies = figures.get("accuracies") or []

    def sorted_(values: list[float | None]) -> NDArray[np.float64]:
        return np.asarray(values, dtype=np.float64)[order]

    return Curve(
        name=name,
        ridges=ridges[order] * scale,
        relative=relative,
        errors={key: sorted_(each) for key, each in errors.items() if len(each) == len(ridges)},
        bars={key: sorted_(each) for key, each in bars.items() if len(each) == len(ridges) and any(each)},
        accuracies=sorted_(accuracies) if len(accuracies) == len(ridges) else np.empty(0),
        chosen=float(figures["ridge"]) * scale,
    )


def draw_curve(found: Curve) -> Plot:
    """Errors over the ridge, and the ridge that was kept.

    Args:
        found: the curve.
    """
    usable = found.ridges > 0
    x = found.ridges[usable]
    lowest = [each[usable] for name, each in found.errors.items() if name != "train"]
    least = min(float(np.nanmin(each)) for each in lowest)
    most = max(float(np.nanmax(each)) for each in lowest)
    plot = new_figure(
        found.label,
        "mean squared error",
        height=340,
        x_axis_type="log",
        y_axis_type="log",
        y_range=(0.8 * least, min(1.25 * most, TALLEST * least)),
    )
    items = []
    for name, (role, dash, width) in STYLES.items():
        if name not in found.errors:
            continue
        source = {"ridge": x.tolist(), "error": found.errors[name][usable].tolist()}
        line = plot.line("ridge", "error", source=source, color=LIGHT[role], line_dash=dash, line_width=width)
        hover(plot, [("ridge", "@ridge"), (name, "@error")], [line], line_policy="nearest")
        items.append((name, [line]))
        if name in found.bars:
            centre, half = found.errors[name][usable], found.bars[name][usable]
            plot.varea(
                x=x, y1=np.maximum(centre - half, 1e-3 * centre), y2=centre + half, color=LIGHT[role], alpha=0.15
            )
    _mark(plot, found)
    legend_above(plot, items)
    return plot


def _mark(plot: Plot, found: Curve) -> None:
    """Where the ridge is that was kept."""
    from bokeh.models import Span

    if found.chosen > 0:
        span = Span(location=found.chosen, dimension="height", line_color=LIGHT["third"], line_dash="dashed")
        plot.add_layout(span)


def draw_accuracy(found: Curve, levels: Sequence[tuple[str, float]] = ()) -> Plot:
    """Share of the test samples that kernel regression classifies right, over the ridge.

    Args:
        found: the curve.
        levels: other accuracies to compare with, by name.
    """
    usable = found.ridges > 0
    values = found.accuracies[usable]
    everything = [*values.tolist(), *(value for _, value in levels)]
    low, high = min(everything), max(everything)
    room = max(0.15 * (high - low), 0.005)
    plot = new_figure(
        found.label,
        "test samples classified right",
        height=340,
        x_axis_type="log",
        y_range=(low - room, min(1.0 + room, high + 2 * room)),
    )
    source = {"ridge": found.ridges[usable].tolist(), "right": values.tolist()}
    line = plot.line("ridge", "right", source=source, color=LIGHT["accent"], line_width=2.5)
    plot.scatter("ridge", "right", source=source, color=LIGHT["accent"], size=5)
    hover(plot, [("ridge", "@ridge"), ("right", "@right{0.0%}")], [line], line_policy="nearest")
    for name, value in levels:
        _level(plot, name, value, float(found.ridges[usable].min()))
    _mark(plot, found)
    _percent(plot)
    return plot


def _level(plot: Plot, name: str, value: float, left: float) -> None:
    from bokeh.models import Span

    plot.add_layout(Span(location=value, dimension="width", line_color=LIGHT["second"], line_dash="dashed"))
    plot.text(
        x=[left],
        y=[value],
        text=[f"{name} {value:.1%}"],
        y_offset=-4,
        text_font={"value": FONT},
        text_font_size="12px",
        text_color=LIGHT["second"],
    )


def _percent(plot: Plot) -> None:
    from bokeh.models import NumeralTickFormatter

    plot.yaxis.formatter = NumeralTickFormatter(format="0.0%")
