"""What a page is made of: sections of text, figures, tables, pictures of samples, and commands for what is missing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bokeh.models import UIElement


@dataclass(frozen=True)
class Text:
    """A paragraph.

    Attributes:
        text: what it says.
        soft: whether it is set back.
    """

    text: str
    soft: bool = False
    kind: str = "text"


@dataclass(frozen=True)
class Missing:
    """A result that is not there.

    Attributes:
        what: it would show.
        command: that makes it.
    """

    what: str
    command: str
    kind: str = "missing"


@dataclass(frozen=True, eq=False)
class Figure:
    """A figure that the browser draws.

    Attributes:
        name: of the figure, unique on the page.
        plot: what Bokeh draws.
        caption: what it shows, and how to read it.
        alt: what a reader who cannot see it is told: the finding in words.
    """

    name: str
    plot: UIElement
    caption: str
    alt: str


@dataclass(frozen=True)
class Figures:
    """Figures side by side, as far as the page is wide.

    Attributes:
        figures: in order.
    """

    figures: tuple[Figure, ...]
    kind: str = "figures"


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        head: names of the columns; empty where rows are a label and a value.
        rows: cells as text.
        caption: what it is of.
        folded: whether it is shown only when asked for; the caption then asks.
        words: columns, beside the first, that hold words and no numbers.
        indented: rows that belong to the one before.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    folded: bool = False
    words: tuple[int, ...] = ()
    indented: frozenset[int] = frozenset()
    kind: str = "table"


@dataclass(frozen=True)
class Thumbnail:
    """One sample as it is shown.

    Attributes:
        lines: below it: number, value, class.
        picture: address that holds it; empty where it has none.
        text: of a sample that is one.
        mark: ``same``, ``other``, or empty where classes are not known.
    """

    lines: tuple[str, ...]
    picture: str = ""
    text: str = ""
    mark: str = ""


@dataclass(frozen=True)
class Gallery:
    """Samples, each with its neighbours.

    Attributes:
        rows: the sample first, then its neighbours.
        caption: what is shown.
    """

    rows: tuple[tuple[Thumbnail, ...], ...]
    caption: str
    kind: str = "gallery"


Part = Text | Missing | Figures | Table | Gallery


@dataclass(frozen=True)
class Section:
    """A section of a page.

    Attributes:
        name: its address on the page.
        title: its heading.
        parts: what it shows, in order.
    """

    name: str
    title: str
    parts: tuple[Part, ...]

    @property
    def figures(self) -> list[Figure]:
        """Every figure in it."""
        return [figure for part in self.parts if isinstance(part, Figures) for figure in part.figures]


@dataclass(frozen=True)
class Page:
    """All that a page shows.

    Attributes:
        title: what it is of.
        lead: below the title.
        facts: main figures: value and what it is.
        sections: in order.
    """

    title: str
    lead: str
    sections: tuple[Section, ...]
    facts: tuple[tuple[str, str], ...] = ()
