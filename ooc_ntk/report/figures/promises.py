"""Promises of a plan beside what was measured, as shares of the promise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from .theme import FONT, LIGHT, hover, new_figure

if TYPE_CHECKING:
    from bokeh.plotting import figure as Plot  # noqa: N812

#: A promise of time holds within this factor, one of memory and disk below 1 (DESIGN: plan).
TIME_FACTOR: Final = 1.5


@dataclass(frozen=True)
class Kept:
    """One promise.

    Attributes:
        what: was promised.
        promised: in words.
        measured: in words.
        ratio: measured over promised.
        limit: what the ratio may be at most; None where nothing was promised but a guess told.
        least: what it may be at least.
    """

    what: str
    promised: str
    measured: str
    ratio: float
    limit: float | None
    least: float = 0.0

    @property
    def held(self) -> bool:
        """Whether it was kept."""
        return self.limit is None or self.least <= self.ratio <= self.limit


def draw_promises(promises: Sequence[Kept]) -> Plot:
    """A bar for each promise, from 0 to the measured share of it, and a mark where it ends.

    Args:
        promises: in order.
    """
    count = len(promises)
    end = max(1.12, 1.15 * max(each.ratio for each in promises))
    plot = new_figure(
        "measured / promised",
        "",
        height=76 + 30 * count,
        x_range=(0, end),
        y_range=(count - 0.4, -0.6),
    )
    places = list(range(count))
    bars = plot.hbar(
        y="y",
        left=0,
        right="ratio",
        height=0.56,
        fill_color="colour",
        line_color=None,
        source={
            "y": places,
            "ratio": [each.ratio for each in promises],
            "colour": [LIGHT["accent"] if each.held else LIGHT["second"] for each in promises],
            "what": [each.what for each in promises],
            "promised": [each.promised for each in promises],
            "measured": [each.measured for each in promises],
        },
    )
    hover(plot, [("", "@what"), ("promised", "@promised"), ("measured", "@measured")], [bars])
    plot.segment(x0=[1], y0=[-0.6], x1=[1], y1=[count - 0.4], color=LIGHT["ink"], line_width=1.5)
    inside = [each.ratio > 0.12 * end for each in promises]
    plot.text(
        x=[each.ratio for each in promises],
        y=places,
        text=[f"{each.ratio:.2f}" for each in promises],
        x_offset=[-6 if each else 6 for each in inside],
        text_align=["right" if each else "left" for each in inside],
        text_baseline="middle",
        text_font={"value": FONT},
        text_font_size="12px",
        text_color=[LIGHT["ground"] if each else LIGHT["ink"] for each in inside],
    )
    plot.yaxis.ticker = places
    plot.yaxis.major_label_overrides = {place: each.what for place, each in enumerate(promises)}
    plot.yaxis.major_tick_line_color = None
    plot.grid.visible = False
    return plot
