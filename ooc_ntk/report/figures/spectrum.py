"""Eigenvalues by rank with the law of their decay, and how much of trace and targets they hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from .theme import LIGHT, hover, legend_above, new_figure

if TYPE_CHECKING:
    from bokeh.plotting import figure as Plot  # noqa: N812

#: Eigenvalues that are drawn, as many for each factor of the rank where there are more (a choice).
MOST_POINTS: Final = 700

#: Colours and lines of several spectra.
SERIES: Final = (("accent", "solid"), ("second", "dashed"))


@dataclass(frozen=True, eq=False)
class Eigenvalues:
    """A spectrum as it is drawn.

    Attributes:
        name: of the kernel it is of.
        values: (k,) float64, descending.
        trace: of the whole train square.
        rows: of the whole train square.
        decay: exponent, its error, first and last rank and scale of the fitted law; None if it was not fitted.
        shares: (k,) of the targets' energy along each eigenvector; None without targets.
    """

    name: str
    values: NDArray[np.float64]
    trace: float
    rows: int
    decay: dict[str, Any] | None = None
    shares: NDArray[np.float64] | None = None


def draw_eigenvalues(spectra: Sequence[Eigenvalues]) -> Plot:
    """Eigenvalues over their rank, both in powers of ten, and the fitted laws.

    Args:
        spectra: one, or several to be compared.
    """
    plot = new_figure("rank", "eigenvalue", height=330, x_axis_type="log", y_axis_type="log")
    items: list[tuple[str, list[Any]]] = []
    for each, (role, dash) in zip(spectra, SERIES, strict=False):
        ranks = some_ranks(len(each.values))
        ranks = ranks[each.values[ranks - 1] > 0]
        source = {"rank": ranks.tolist(), "value": each.values[ranks - 1].tolist()}
        if role == "accent":
            points = plot.scatter("rank", "value", source=source, size=4, color=LIGHT[role])
        else:  # over the points of the first
            points = plot.line("rank", "value", source=source, line_width=1.5, color=LIGHT[role])
        hover(plot, [("rank", "@rank"), (f"eigenvalue{_of(each, spectra)}", "@value")], [points])
        items.append((each.name if len(spectra) > 1 else "eigenvalues", [points]))
        if each.decay is not None:
            law = each.decay
            ends = np.array([law["first"], law["last"]], dtype=np.float64)
            colour = LIGHT["ink"] if len(spectra) == 1 else LIGHT[role]
            line = plot.line(ends, law["scale"] * ends ** -law["value"], color=colour, line_width=1.5, line_dash=dash)
            items.append((f"decay, α = {law['value']:.2f}", [line]))
    legend_above(plot, items)
    return plot


def _of(each: Eigenvalues, spectra: Sequence[Eigenvalues]) -> str:
    return f" of {each.name}" if len(spectra) > 1 else ""


def draw_shares(found: Eigenvalues) -> Plot:
    """How much of the trace, and of the targets, is in the eigenvectors up to a rank.

    Args:
        found: the spectrum.
    """
    plot = new_figure("rank", "share up to this rank", height=330, x_axis_type="log", y_range=(0, 1.03))
    ranks = some_ranks(len(found.values))
    lines = [("trace of the kernel", np.cumsum(found.values) / (found.trace or 1.0), "accent", "solid")]
    if found.shares is not None:
        lines.append(("targets", np.cumsum(found.shares), "second", "dashed"))
    items = []
    for name, values, role, dash in lines:
        source = {"rank": ranks.tolist(), "share": values[ranks - 1].tolist()}
        line = plot.line("rank", "share", source=source, color=LIGHT[role], line_width=2, line_dash=dash)
        hover(plot, [("rank", "@rank"), (name, "@share{0.0%}")], [line], line_policy="nearest")
        items.append((name, [line]))
    legend_above(plot, items)
    return plot


def some_ranks(count: int) -> NDArray[np.int64]:
    """Ranks from 1 that are drawn: all, or of many the first ones and some of each factor.

    >>> some_ranks(4).tolist()
    [1, 2, 3, 4]
    >>> len(some_ranks(100_000)) <= 700
    True
    """
    if count <= MOST_POINTS:
        return np.arange(1, count + 1)
    return np.unique(np.geomspace(1, count, MOST_POINTS).round().astype(np.int64))
