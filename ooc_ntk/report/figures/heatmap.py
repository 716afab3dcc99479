"""The kernel as a map of colours, and classes against classes as another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from ooc_ntk.report.blocks import Axis, ClassBlocks, Group, KernelMap
from ooc_ntk.report.words import number, with_spread

from .theme import LIGHT, colour_bar, hover, new_figure, palette

if TYPE_CHECKING:
    from bokeh.plotting import figure as Plot  # noqa: N812

#: Share of the pixels at either end that are shown in the last colour, so that a few large ones do not grey the rest.
CLIPPED: Final = 0.005

#: Classes up to which each is named on the axes, and divided from the next by a line.
NAMED: Final = 30

#: Lines between classes, on any colour of the map.
BETWEEN: Final = "#ffffff"


def draw_map(
    found: KernelMap, what: str = "mean entry", ends: tuple[float, float] | None = None, *, signed: bool = False
) -> Plot:
    """The kernel, rows down and columns to the right, with lines between classes, and below them the test samples.

    Args:
        found: the picture.
        what: the colours are.
        ends: first and last of the colours; None takes them from the picture.
        signed: whether the values are differences: colours go either way from 0.
    """
    from bokeh.models import LinearColorMapper

    rows, columns = found.means.shape
    by_class = bool(found.columns.groups)
    plot = _square(
        "train samples, by class" if by_class else "train samples",
        _down(found.rows, by_class=by_class),
        columns,
        rows,
    )
    low, high = ends or colour_range(found.means)
    if signed:
        high = max(abs(low), abs(high))
        low = -high
    mapper = LinearColorMapper(palette=palette(signed=signed), low=low, high=high)
    # Bokeh draws the first row at the bottom, and the axis runs down.
    picture = plot.image(
        image=[np.ascontiguousarray(found.means, dtype=np.float32)],
        x=0,
        y=0,
        dw=columns,
        dh=rows,
        color_mapper=mapper,
    )
    hover(plot, [(what, "@image{0.0000a}")], [picture])
    _between(plot, found.rows, found.columns)
    _name(plot.xaxis[0], found.columns.groups)
    _name(plot.yaxis[0], found.rows.groups)
    _hover_classes(plot, found)
    colour_bar(plot, mapper, what)
    return plot


def _down(rows: Axis, *, by_class: bool) -> str:
    """What is along the rows."""
    test = "test samples below, " if rows.train_pixels < len(rows.counts) else ""
    return f"train samples, {test}by class" if by_class else f"train samples{', test samples below' if test else ''}"


def colour_range(values: NDArray[np.float64]) -> tuple[float, float]:
    """First and last of the colours: all but the outermost values, and never the same."""
    low, high = np.quantile(values[np.isfinite(values)], (CLIPPED, 1 - CLIPPED))
    if low == high:
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    return float(low), float(high)


def _square(x_label: str, y_label: str, columns: int, rows: int, side: int = 560) -> Plot:
    """A figure whose pixels are about squares, as wide as there is room."""
    from bokeh.models import Range1d

    plot = new_figure(
        x_label,
        y_label,
        height=round(110 + (side - 170) * rows / columns) if rows <= 2 * columns else side,
        width=side,
        max_width=side,
        sizing_mode="scale_width",
        x_range=Range1d(0, columns),
        y_range=Range1d(rows, 0),
    )
    plot.grid.visible = False
    return plot


def _between(plot: Plot, rows: Axis, columns: Axis) -> None:
    """Lines between classes, and a stronger one between train and test samples."""
    height, width = len(rows.counts), len(columns.counts)
    if len(columns.groups) <= NAMED:
        downs = [group.start for group in columns.groups[1:]]
        acrosses = [group.start for group in rows.groups[1:] if group.start != rows.train_pixels]
        thin: dict[str, Any] = {"color": BETWEEN, "line_width": 1, "line_alpha": 0.55}
        plot.segment(x0=downs, y0=[0] * len(downs), x1=downs, y1=[height] * len(downs), **thin)
        plot.segment(x0=[0] * len(acrosses), y0=acrosses, x1=[width] * len(acrosses), y1=acrosses, **thin)
    if rows.train_pixels < height:
        plot.segment(x0=[0], y0=[rows.train_pixels], x1=[width], y1=[rows.train_pixels], color=BETWEEN, line_width=3)


def _name(axis: Any, groups: tuple[Group, ...]) -> None:
    """Classes at the middle of their rows; none where they are too many, or there are none."""
    named = groups if len(groups) <= 2 * NAMED else ()
    middles = {(group.start + group.stop) / 2: group.name for group in named}
    axis.ticker = list(middles)
    axis.major_label_overrides = middles
    axis.major_tick_line_color = None
    if max((len(group.name) for group in named), default=0) > 2 and axis.axis_label:
        axis.major_label_orientation = 0.8


def _hover_classes(plot: Plot, found: KernelMap) -> None:
    """Say which classes are below the pointer, and what their entries are."""
    blocks = found.blocks
    pairs = [(row, column) for row in found.rows.groups for column in found.columns.groups]
    if not pairs or len(pairs) > 2 * NAMED**2:
        return
    names = {} if blocks is None else {name: place for place, name in enumerate(blocks.names)}
    data: dict[str, list[Any]] = {"left": [], "right": [], "top": [], "bottom": [], "row": [], "column": [], "mean": []}
    for row, column in pairs:
        test = row.start >= found.rows.train_pixels
        data["left"].append(column.start)
        data["right"].append(column.stop)
        data["top"].append(row.start)
        data["bottom"].append(row.stop)
        data["row"].append(f"class {row.name}{', test' if test else ''}")
        data["column"].append(f"class {column.name}")
        if test or blocks is None:
            part = found.means[row.start : row.stop, column.start : column.stop]
            weights = found.rows.counts[row.start : row.stop, None] * found.columns.counts[column.start : column.stop]
            data["mean"].append(number(float(np.average(part, weights=weights))))
        else:
            place = names[row.name], names[column.name]
            data["mean"].append(with_spread(blocks.means[place], blocks.spreads[place]))
    areas = plot.quad(
        **{name: name for name in ("left", "right", "top", "bottom")}, source=data, fill_alpha=0, line_alpha=0
    )
    hover(plot, [("row", "@row"), ("column", "@column"), ("entries of these classes", "@mean")], [areas])


def draw_classes(blocks: ClassBlocks) -> Plot:
    """Mean entries of classes against classes; each sample with itself is left out."""
    from bokeh.models import FixedTicker, LinearColorMapper

    count = len(blocks.names)
    low, high = colour_range(blocks.means)
    mapper = LinearColorMapper(palette=palette(), low=low, high=high, nan_color=LIGHT["panel"])
    plot = _square("class of the column", "class of the row", count, count, side=460)
    rows, columns = (each.reshape(-1) for each in np.indices((count, count)))
    means, spreads = blocks.means.reshape(-1), blocks.spreads.reshape(-1)
    cells = plot.rect(
        x="x",
        y="y",
        width=1,
        height=1,
        source={
            "x": (columns + 0.5).tolist(),
            "y": (rows + 0.5).tolist(),
            "mean": [number(float(each)) for each in means],
            "value": means,
            "spread": [number(float(each)) for each in spreads],
            "row": [blocks.names[each] for each in rows],
            "column": [blocks.names[each] for each in columns],
        },
        fill_color={"field": "value", "transform": mapper},
        line_color=BETWEEN,
        line_width=1,
    )
    hover(plot, [("classes", "@row and @column"), ("mean", "@mean"), ("standard deviation", "@spread")], [cells])
    for axis in plot.axis:
        shown = range(0, count, -(-count // NAMED))
        axis.ticker = FixedTicker(ticks=[each + 0.5 for each in shown])
        axis.major_label_overrides = {each + 0.5: blocks.names[each] for each in shown}
        axis.major_tick_line_color = None
    colour_bar(plot, mapper, "mean entry")
    return plot
