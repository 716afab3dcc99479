"""Figures of two kernels side by side, and of the kernels of several checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .distributions import MOST_BARS, TWO_SIDED
from .heatmap import colour_range
from .theme import FONT, LIGHT, colour_bar, hover, legend_above, new_figure, palette, plain_numbers

if TYPE_CHECKING:
    from bokeh.plotting import figure as Plot  # noqa: N812

    from .curve import Curve


def draw_entries(
    first: NDArray[np.float64],
    second: NDArray[np.float64],
    errors: NDArray[np.float64] | None,
    names: tuple[str, str],
) -> Plot:
    """Entries of one kernel over the same entries of another, and the line where they are equal.

    Args:
        first: (entries,).
        second: (entries,).
        errors: (entries,) standard errors of ``second``; None where it is exact.
        names: of both kernels.
    """
    shown = np.arange(len(first))
    if len(shown) > MOST_BARS:
        shown = np.sort(np.random.default_rng(0).choice(len(first), MOST_BARS, replace=False))
    x, y = first[shown], second[shown]
    plot = new_figure(f"entry of {names[0]}", f"entry of {names[1]}", height=340)
    ends = [float(min(x.min(), y.min())), float(max(x.max(), y.max()))]
    equal = plot.line(ends, ends, color=LIGHT["third"], line_width=1.5)
    source: dict[str, Any] = {"x": x, "y": y}
    told = [(names[0], "@x"), (names[1], "@y")]
    if errors is not None:
        half = TWO_SIDED * errors[shown]
        source["half"] = half
        plot.segment(x0=x, x1=x, y0=y - half, y1=y + half, color=LIGHT["accent"], line_alpha=0.35)
        told.append(("95% error bar", "± @half"))
    points = plot.scatter("x", "y", source=source, size=5, color=LIGHT["accent"], alpha=0.8)
    hover(plot, told, [points])
    for axis in plot.axis:
        plain_numbers(axis, max(map(abs, ends)))
    legend_above(plot, [("entries", [points]), ("equal", [equal])])
    return plot


def draw_curves(curves: Sequence[Curve], what: str) -> Plot:
    """GCV, or the accuracy, of several kernels over the ridge.

    Args:
        curves: of the kernels.
        what: ``GCV``, ``test`` or ``accuracy``.
    """
    accuracy = what == "accuracy"
    plot = new_figure(
        curves[0].label,
        "test samples classified right" if accuracy else f"mean squared error ({what})",
        height=330,
        x_axis_type="log",
        y_axis_type="linear" if accuracy else "log",
    )
    items = []
    for curve, (role, dash) in zip(curves, (("accent", "solid"), ("second", "dashed")), strict=False):
        values = curve.accuracies if accuracy else curve.errors[what]
        usable = curve.ridges > 0
        source = {"ridge": curve.ridges[usable], "value": values[usable]}
        line = plot.line("ridge", "value", source=source, color=LIGHT[role], line_dash=dash, line_width=2)
        told = "@value{0.0%}" if accuracy else "@value"
        hover(plot, [("ridge", "@ridge"), (curve.name, told)], [line], line_policy="nearest")
        items.append((curve.name, [line]))
    if accuracy:
        from bokeh.models import NumeralTickFormatter

        plot.yaxis.formatter = NumeralTickFormatter(format="0.0%")
    legend_above(plot, items)
    return plot


def draw_shared(counts: NDArray[np.int64]) -> Plot:
    """How many samples keep how many of their neighbours.

    Args:
        counts: (k + 1,) samples by the number of neighbours that both kernels give them.
    """
    k = len(counts) - 1
    plot = new_figure(f"neighbours in common, of {k}", "samples", height=280, x_range=(-0.6, k + 0.6))
    source = {"x": np.arange(k + 1), "top": counts, "share": counts / max(1, counts.sum())}
    bars = plot.vbar(x="x", top="top", width=0.7, source=source, fill_color=LIGHT["accent"], line_color=None)
    hover(plot, [("in common", "@x"), ("samples", "@top (@share{0%})")], [bars])
    plot.text(
        x=list(range(k + 1)),
        y=counts.tolist(),
        text=[f"{each:,}" for each in counts],
        text_align="center",
        y_offset=-3,
        text_font={"value": FONT},
        text_font_size="12px",
        text_color=LIGHT["ink"],
    )
    plot.y_range.start, plot.y_range.end = 0, 1.12 * max(1, int(counts.max()))
    plot.xaxis.ticker = list(range(k + 1))
    return plot


def draw_drift(names: Sequence[str], changes: NDArray[np.float64]) -> Plot:
    """How far the kernel of each checkpoint is from that of the first.

    Args:
        names: of the checkpoints, in the order of training.
        changes: (checkpoints,) relative to the first one's norm.
    """
    from bokeh.models import NumeralTickFormatter

    count = len(names)
    plot = new_figure("checkpoint", "change ‖K − K₀‖ / ‖K₀‖", height=330)
    source = {"x": np.arange(count), "y": changes, "name": list(names)}
    plot.line("x", "y", source=source, color=LIGHT["accent"], line_width=2)
    points = plot.scatter("x", "y", source=source, color=LIGHT["accent"], size=7)
    hover(plot, [("checkpoint", "@name"), ("change", "@y{0.00%}")], [points])
    _name_all(plot.xaxis[0], names)
    plot.y_range.start = 0
    plot.yaxis.formatter = NumeralTickFormatter(format="0.[0]%")
    return plot


def draw_matrix(names: Sequence[str], values: NDArray[np.float64], what: str) -> Plot:
    """Numbers of all pairs as a map of colours.

    Args:
        names: of rows and columns.
        values: (names, names).
        what: they are.
    """
    from bokeh.models import LinearColorMapper, Range1d

    count = len(names)
    low, high = colour_range(values)
    mapper = LinearColorMapper(palette=palette(), low=low, high=high, nan_color=LIGHT["panel"])
    plot = new_figure(
        "", "", height=430, width=460, max_width=460, sizing_mode="scale_width",
        x_range=Range1d(-0.5, count - 0.5), y_range=Range1d(count - 0.5, -0.5),
    )  # fmt: skip
    rows, columns = (each.reshape(-1) for each in np.indices(values.shape))
    cells = plot.rect(
        x="x",
        y="y",
        width=1,
        height=1,
        source={
            "x": columns,
            "y": rows,
            "value": values.reshape(-1),
            "pair": [
                f"{names[row]} and {names[column]}" for row, column in zip(rows.tolist(), columns.tolist(), strict=True)
            ],
        },
        fill_color={"field": "value", "transform": mapper},
        line_color=LIGHT["ground"],
    )
    hover(plot, [("", "@pair"), (what, "@value{0.0000}")], [cells])
    for axis in plot.axis:
        _name_all(axis, names)
    plot.grid.visible = False
    colour_bar(plot, mapper, what)
    return plot


def _name_all(axis: Any, names: Sequence[str], most: int = 20) -> None:
    """Names along an axis, some of many."""
    shown = range(0, len(names), -(-len(names) // most))
    axis.ticker = list(shown)
    axis.major_label_overrides = {place: names[place][-16:] for place in shown}
    axis.major_tick_line_color = None
    if max(len(name) for name in names) > 4:
        axis.major_label_orientation = 0.8
