"""Distributions: entries of the diagonal, entries within and between classes, residuals beside their error bars."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from ooc_ntk.report.blocks import ClassBlocks

from .theme import FONT, LIGHT, hover, legend_above, new_figure, plain_numbers

if TYPE_CHECKING:
    from bokeh.plotting import figure as Plot  # noqa: N812

#: Bins of a histogram at most.
MOST_BINS: Final = 60

#: Entries of the diagonal whose largest is so many times the smallest are told by powers of ten.
WIDE: Final = 50.0

#: Entries that are drawn with error bars at most.
MOST_BARS: Final = 400

#: Standard errors on either side of an entry that hold the exact one with 95%.
TWO_SIDED: Final = 1.959964


def within_bars(off: NDArray[np.float64], errors: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which residuals are inside their 95% bars; one without an error only if it is 0.

    Args:
        off: residuals, of any shape.
        errors: their standard errors, of the same shape.

    Returns:
        Booleans of the same shape.
    """
    inside: NDArray[np.bool_] = np.abs(off) <= TWO_SIDED * errors
    return inside


def draw_diagonal(train: NDArray[np.float64], test: NDArray[np.float64]) -> Plot:
    """How entries of the diagonal are spread, of train and of test samples.

    Args:
        train: (train rows,).
        test: (test rows,); empty without any.
    """
    every = np.concatenate([train, test])
    wide = bool(every.min() > 0 and every.max() > WIDE * every.min())
    edges = _edges(np.log10(every) if wide else every)
    edges = 10**edges if wide else edges
    plot = new_figure(
        "diagonal entry K(i, i)",
        "share of the samples",
        height=300,
        x_axis_type="log" if wide else "linear",
    )
    plot.y_range.start = 0
    items: list[tuple[str, list[Any]]] = []
    for name, values, role in (("train samples", train, "accent"), ("test samples", test, "second")):
        if not len(values):
            continue
        counts = np.histogram(values, edges)[0]
        source = {
            "left": edges[:-1].tolist(),
            "right": edges[1:].tolist(),
            "share": (counts / len(values)).tolist(),
            "count": counts.tolist(),
        }
        filled = role == "accent"
        bars = plot.quad(
            left="left",
            right="right",
            bottom=0,
            top="share",
            source=source,
            fill_color=LIGHT[role],
            fill_alpha=0.75 if filled else 0.0,
            line_color=LIGHT["ground"] if filled else None,
        )
        shown = bars
        if not filled:
            x, y = np.repeat(edges, 2), np.concatenate([[0], np.repeat(counts / len(values), 2), [0]])
            shown = plot.line(x, y, color=LIGHT[role], line_width=2)
        told = [(name, "@count"), ("share", "@share{0.0%}"), ("entries", "@left to @right")]
        hover(plot, told, [bars])
        items.append((name, [shown]))
    if len(items) > 1:
        legend_above(plot, items)
    _percent(plot.yaxis[0])
    plain_numbers(plot.xaxis[0], 0.0 if wide else float(every.max()))
    return plot


def _edges(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Edges of a histogram."""
    low, high = float(values.min()), float(values.max())
    if low == high:
        half = 0.5 * (abs(low) or 1.0)
        return np.array([low - half, high + half])
    bins = min(MOST_BINS, max(5, int(np.sqrt(len(values)))))
    return np.linspace(low, high, bins + 1)


def _percent(axis: Any) -> None:
    from bokeh.models import NumeralTickFormatter

    axis.formatter = NumeralTickFormatter(format="0%")


def draw_within(blocks: ClassBlocks) -> Plot:
    """Of each class the mean entry within it and with the other classes, with bars of one standard deviation.

    Args:
        blocks: statistics by class.
    """
    count = len(blocks.names)
    plot = new_figure("entry of the kernel: mean ± standard deviation", "class", height=max(160, 110 + 26 * count))
    items = []
    for name, role, shift, values, spreads in (
        ("within the class", "accent", -0.13, *within(blocks)),
        ("with other classes", "second", 0.13, *between(blocks)),
    ):
        there = np.isfinite(values)
        y = np.arange(count)[there] + shift
        low, high = (values - spreads)[there], (values + spreads)[there]
        whiskers = plot.segment(x0=low, x1=high, y0=y, y1=y, color=LIGHT[role], line_width=1.5, line_alpha=0.6)
        source = {"x": values[there], "y": y, "spread": spreads[there], "class": np.array(blocks.names)[there].tolist()}
        marker = "circle" if role == "accent" else "diamond"
        points = plot.scatter("x", "y", source=source, color=LIGHT[role], marker=marker, size=8)
        hover(plot, [("class", "@class"), (name, "@x ± @spread")], [points])
        items.append((name, [points, whiskers]))
    plot.yaxis.ticker = list(range(count))
    plot.yaxis.major_label_overrides = dict(enumerate(blocks.names))
    plot.yaxis.major_tick_line_color = None
    plot.y_range.start, plot.y_range.end = count - 0.4, -0.6
    plain_numbers(plot.xaxis[0], float(np.nanmax(np.abs(blocks.means))))
    plot.ygrid.visible, plot.xgrid.visible = False, True
    legend_above(plot, items)
    return plot


def within(blocks: ClassBlocks) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of each class mean and standard deviation of the entries within it."""
    return blocks.means.diagonal(), blocks.spreads.diagonal()


def between(blocks: ClassBlocks) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of each class mean and standard deviation of its entries with other classes."""
    count = len(blocks.names)
    weights = np.tile(blocks.samples.astype(np.float64), (count, 1))
    weights[np.diag_indices(count)] = 0.0
    weights /= np.maximum(weights.sum(1, keepdims=True), 1.0)
    means = (weights * np.nan_to_num(blocks.means)).sum(1)
    squares = (weights * np.nan_to_num(blocks.spreads**2 + blocks.means**2)).sum(1)
    return means, np.sqrt(np.maximum(0.0, squares - means**2))


def draw_residuals(
    exact: NDArray[np.float64], residuals: NDArray[np.float64], errors: NDArray[np.float64], x_label: str
) -> Plot:
    """Residuals of a projected kernel over the exact entries, with the error bars that were predicted.

    Args:
        exact: (entries,).
        residuals: (entries,) projected less exact.
        errors: (entries,) predicted standard errors.
        x_label: what ``exact`` is.
    """
    shown = np.arange(len(exact))
    if len(shown) > MOST_BARS:
        shown = np.sort(np.random.default_rng(0).choice(len(exact), MOST_BARS, replace=False))
    x, y, half = exact[shown], residuals[shown], TWO_SIDED * errors[shown]
    held = within_bars(y, errors[shown])
    plot = new_figure(x_label, "projected − exact", height=330)
    colours = np.where(held, LIGHT["accent"], LIGHT["second"]).tolist()
    plot.segment(x0=x, x1=x, y0=y - half, y1=y + half, color=colours, line_alpha=0.35, line_width=1)
    source = {"x": x, "y": y, "half": half, "colour": colours}
    points = plot.scatter("x", "y", source=source, color="colour", size=5)
    hover(plot, [("exact", "@x"), ("projected − exact", "@y"), ("95% error bar", "± @half")], [points])
    _zero(plot)
    plain_numbers(plot.xaxis[0], float(np.abs(x).max()))
    plain_numbers(plot.yaxis[0], float((np.abs(y) + half).max()))
    return plot


def _zero(plot: Plot) -> None:
    from bokeh.models import Span

    plot.add_layout(Span(location=0, dimension="width", line_color=LIGHT["third"]))


def draw_scores(scores: NDArray[np.float64]) -> Plot:
    """Residuals over their predicted standard errors, beside the normal density that they would have.

    Args:
        scores: (entries,) residuals over standard errors.
    """
    end = max(3.5, float(np.ceil(np.abs(scores).max())))
    bins = min(40, max(8, int(2 * np.sqrt(len(scores)))))
    counts, edges = np.histogram(scores, bins, range=(-end, end))
    density = counts / (len(scores) * (edges[1] - edges[0]))
    plot = new_figure("residual / predicted standard error", "density", height=330)
    source = {"left": edges[:-1], "right": edges[1:], "top": density, "count": counts}
    bars = plot.quad(
        left="left",
        right="right",
        bottom=0,
        top="top",
        source=source,
        fill_color=LIGHT["accent"],
        fill_alpha=0.75,
        line_color=LIGHT["ground"],
    )
    hover(plot, [("entries", "@count"), ("from", "@left{0.0} to @right{0.0}")], [bars])
    x = np.linspace(-end, end, 201)
    line = plot.line(x, np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi), color=LIGHT["ink"], line_width=1.5)
    plot.y_range.start = 0
    legend_above(plot, [("recomputed entries", [bars]), ("normal distribution", [line])])
    return plot


def draw_shares(names: list[str], traces: NDArray[np.float64], parameters: NDArray[np.float64]) -> Plot:
    """What each layer adds to the trace of the kernel, and its share of the parameters.

    Args:
        names: of the layers, from input to output.
        traces: (layers,) shares of the trace.
        parameters: (layers,) shares of the parameters.
    """
    count = len(names)
    plot = new_figure("share", "", height=max(160, 104 + 24 * count), y_range=(count - 0.4, -0.6))
    y = np.arange(count)
    source = {"y": y, "trace": traces, "share": parameters, "name": names}
    bars = plot.hbar(
        y="y", right="trace", left=0, height=0.6, source=source, fill_color=LIGHT["accent"], line_color=None
    )
    marks = plot.scatter("share", "y", source=source, marker="dash", angle=np.pi / 2, size=16, color=LIGHT["second"])
    marks.glyph.line_width = 3
    hover(plot, [("", "@name"), ("of the trace", "@trace{0.0%}"), ("of the parameters", "@share{0.0%}")], [bars, marks])
    plot.yaxis.ticker = y.tolist()
    plot.yaxis.major_label_overrides = {place: _end(name) for place, name in enumerate(names)}
    plot.yaxis.major_tick_line_color = None
    plot.yaxis.major_label_text_font = FONT
    plot.ygrid.visible, plot.xgrid.visible = False, True
    plot.x_range.start = 0
    _percent(plot.xaxis[0])
    legend_above(plot, [("of the kernel's trace", [bars]), ("of the parameters", [marks])])
    return plot


def _end(name: str, letters: int = 22) -> str:
    """A name that fits beside its bar: its end, which tells layers apart."""
    return name if len(name) <= letters else f"…{name[1 - letters :]}"
