"""Figures of longer runs, read from the pages of ``bench/results``: their tables of figures beside bars."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Earlier:
    """A line of such a table.

    Attributes:
        page: file name.
        command: of the run.
        date: of the run.
        figure: what is judged.
        bar: as it was written.
        measured: likewise.
        verdict: likewise.
    """

    page: str
    command: str
    date: str
    figure: str
    bar: str
    measured: str
    verdict: str


def earlier(folder: Path) -> list[Earlier]:
    """Every judged figure of all pages.

    Args:
        folder: with one Markdown page per part.

    Returns:
        Their lines, pages in the order of their names.
    """
    return [line for page in sorted(folder.glob("*.md")) for line in _lines(page.name, page.read_text())]


def _lines(page: str, text: str) -> Iterator[Earlier]:
    """Lines of tables whose header ends with ``bar | measured | |``; an empty first cell repeats the one above."""
    command = date = first = ""
    columns = 0
    for line in text.splitlines():
        if heading := re.fullmatch(r"## `(.+)`(?:, (.+))?", line):
            command, date, columns = heading[1], heading[2] or "", 0
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            columns = 0
        elif cells[-3:] == ["bar", "measured", ""]:
            columns = len(cells)
        elif columns == len(cells) and set(cells[0]) != {"-"}:
            first = cells[0] or first
            figure = ": ".join([first, *cells[1:-3]])
            yield Earlier(page, command, date, figure, *cells[-3:])
