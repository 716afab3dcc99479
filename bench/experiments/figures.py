"""One look of all figures: colours that the colour-blind tell apart, labels beside the lines they are of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from PIL import Image

#: Colours of things without an order: those of Okabe and Ito (2008) that are dark enough on white.
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#5f6b7a"
COLOURS: Final = (BLUE, ORANGE, GREEN, PINK)

#: Colours of things in an order, dark to light: matplotlib's viridis without its lightest fifth.
ORDERED: Final = ("#440154", "#443983", "#31688e", "#21918c", "#35b779", "#6ece58")

#: Letters of labels beside lines.
SMALL: Final = 8.5


def plain(axis: Any, title: str, x: str, y: str) -> None:
    """Title, labels, a light grid, and no frame where there is no axis."""
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(visible=True, which="major", linewidth=0.4, alpha=0.5)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def beside(
    axis: Any, x: float, y: float, text: str, colour: str, *, shift: tuple[float, float] = (4, 0), ha: str = "left"
) -> None:
    """A label at a point of a line, in its colour, so many points from it."""
    where = {"xytext": shift, "textcoords": "offset points", "ha": ha, "va": "center"}
    axis.annotate(text, (x, y), color=colour, fontsize=SMALL, **where)


def shrink(path: Path) -> None:
    """Save a picture again with a palette of 128 colours, a third of the bytes."""
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(128, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


def spread(values: Sequence[float], least: float) -> list[float]:
    """Places of labels as near to their values as may be, each so far from the next.

    >>> spread([1.0, 1.1, 3.0], 0.5)
    [0.8, 1.3, 3.0]
    """
    order = sorted(range(len(values)), key=lambda number: values[number])
    groups = [[values[number], 1] for number in order]
    merged = True
    while merged:
        merged = False
        for left, right in zip(range(len(groups) - 1), range(1, len(groups)), strict=True):
            (a, m), (b, n) = groups[left], groups[right]
            if b - a < least * (m + n) / 2 - 1e-12:
                groups[left : right + 1] = [[(a * m + b * n) / (m + n), m + n]]
                merged = True
                break
    places = [centre + least * (step - (count - 1) / 2) for centre, count in groups for step in range(int(count))]
    found = [0.0] * len(values)
    for number, place in zip(order, places, strict=True):
        found[number] = round(place, 12)
    return found
