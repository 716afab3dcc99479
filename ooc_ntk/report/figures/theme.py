"""How figures look: colours by role in light and dark, letters, axes, hover."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from bokeh.models import HoverTool
    from bokeh.plotting import figure as Plot  # noqa: N812

#: Colours by what they are for. In the dark the page puts those of DARK in the place of those of LIGHT, so that every
#: one must be there once, and none may be a default of Bokeh's, which pages do not hold. Letters have a contrast of 4.5
#: at least to the ground (checked by the tests); accent and second, blue and orange, are told apart by the
#: colour-blind.
LIGHT: Final = {
    "ground": "#fdfdfd",
    "panel": "#f3f5f7",
    "ink": "#1b2430",
    "soft": "#55616f",
    "line": "#d5dbe1",
    "grid": "#e9edf0",
    "accent": "#1f5f8b",
    "second": "#b8520a",
    "third": "#6b7786",
    "good": "#1b7837",
    "bad": "#b2382e",
}
DARK: Final = {
    "ground": "#14181d",
    "panel": "#1d2329",
    "ink": "#e4e8ec",
    "soft": "#a3adb8",
    "line": "#3a434d",
    "grid": "#262d35",
    "accent": "#7fb8e0",
    "second": "#f0a35e",
    "third": "#8d98a5",
    "good": "#6cc08b",
    "bad": "#f08a80",
}

FONT: Final = 'system-ui, -apple-system, "Segoe UI", Roboto, sans-serif'
LETTERS: Final = "12px"


def new_figure(x_label: str, y_label: str, *, height: int = 300, **settings: Any) -> Plot:
    """An empty figure as wide as its place on the page, in the page's letters.

    Args:
        x_label: what is along x, with its unit.
        y_label: what is along y, with its unit.
        height: pixels.
        settings: of ``bokeh.plotting.figure``.
    """
    from bokeh.plotting import figure

    given: dict[str, Any] = {"tools": "", "toolbar_location": None, "sizing_mode": "stretch_width", **settings}
    plot = figure(height=height, min_width=200, x_axis_label=x_label, y_axis_label=y_label, **given)
    plot.background_fill_color = plot.border_fill_color = LIGHT["ground"]
    plot.outline_line_color = None
    for axis in plot.axis:
        style_axis(axis)
    plot.grid.grid_line_color = LIGHT["grid"]
    plot.xgrid.visible = False
    return plot


def style_axis(axis: Any) -> None:
    """An axis, or the bar of colours, in the page's letters."""
    axis.axis_label_text_font = axis.major_label_text_font = FONT
    axis.axis_label_text_font_size = axis.major_label_text_font_size = LETTERS
    axis.axis_label_text_font_style = "normal"
    axis.axis_label_text_color = LIGHT["soft"]
    axis.major_label_text_color = LIGHT["ink"]
    axis.axis_line_color = LIGHT["third"]
    axis.major_tick_line_color = LIGHT["third"]
    axis.minor_tick_line_color = None


def plain_numbers(axis: Any, largest: float) -> None:
    """Large numbers along an axis in thousands and millions."""
    from bokeh.models import NumeralTickFormatter

    if largest >= 1e4:
        axis.formatter = NumeralTickFormatter(format="0.[00]a")


def colour_bar(plot: Plot, mapper: Any, title: str) -> None:
    """A bar of colours on the right, with what they mean."""
    from bokeh.models import ColorBar

    bar = ColorBar(
        color_mapper=mapper,
        width=12,
        title=title,
        bar_line_color=None,
        major_tick_line_color=None,
        background_fill_color=LIGHT["ground"],
        title_text_font=FONT,
        title_text_font_size=LETTERS,
        title_text_font_style="normal",
        title_text_color=LIGHT["soft"],
        major_label_text_font=FONT,
        major_label_text_font_size="11px",
        major_label_text_color=LIGHT["ink"],
        title_standoff=6,
        padding=4,
    )
    plain_numbers(bar, max(abs(mapper.low), abs(mapper.high)))
    plot.add_layout(bar, "right")


def hover(plot: Plot, tooltips: Sequence[tuple[str, str]], renderers: Sequence[Any], **settings: Any) -> HoverTool:
    """Say what is below the pointer."""
    from bokeh.models import HoverTool

    tool = HoverTool(tooltips=list(tooltips), renderers=list(renderers), **settings)
    plot.add_tools(tool)
    return tool


def legend_above(plot: Plot, items: Sequence[tuple[str, Sequence[Any]]]) -> None:
    """Names of lines above a figure, in one row that breaks where it is narrow."""
    from bokeh.models import Legend

    legend = Legend(
        items=[(name, list(renderers)) for name, renderers in items],
        orientation="horizontal",
        border_line_color=None,
        background_fill_alpha=0.0,
        label_text_font=FONT,
        label_text_font_size=LETTERS,
        label_text_color=LIGHT["ink"],
        margin=0,
        padding=2,
        spacing=8,
        label_standoff=4,
        glyph_width=18,
    )
    legend.ncols = min(len(items), 4)
    plot.add_layout(legend, "above")


def palette(*, signed: bool = False) -> tuple[str, ...]:
    """Colours of maps, from little to much: even in lightness, and the same to the colour-blind.

    Args:
        signed: colours from blue over white to red, for values on either side of 0.
    """
    from bokeh.palettes import RdBu11, Viridis256, interp_palette

    return tuple(interp_palette(RdBu11, 255)) if signed else tuple(Viridis256)
