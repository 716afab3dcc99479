"""Nearest samples for people: a table for the terminal, a picture of images, texts or bars."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .pictures import picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ooc_ntk.api import NearestResult
    from ooc_ntk.execution.nearest import ShownRow
    from ooc_ntk.execution.shown import ShownSample

#: Colours of the same and of another class, told apart by their lightness as well, and of what has none.
SAME, OTHER, UNKNOWN = "#1b7837", "#b2382e", "#5f6b7a"

#: Marks that go with them, so that nothing is said by colour alone.
MARKS: Final = {True: "✓", False: "✗", None: ""}

#: Letters of a text in a picture, and in a table.
PICTURE_LETTERS, TABLE_LETTERS = 110, 90


def neighbours_table(found: NearestResult) -> RenderableType:
    """Some samples with their nearest ones, and what holds of all of them.

    Args:
        found: the nearest samples.

    Returns:
        Something to print.
    """
    with_texts = any(row.sample.text is not None for row in found.shown)
    parts: list[RenderableType] = []
    if found.shown:
        parts += [
            Text(_title(found), style="italic"),
            _texts_table(found) if with_texts else _numbers_table(found),
            Text(),
        ]
    parts += [Text(line) for line in summary_lines(found.figures)]
    if found.figures["note"]:
        parts.append(Text(f"note: {found.figures['note']}", style="yellow"))
    return Group(*parts)


def summary_lines(figures: Mapping[str, Any]) -> list[str]:
    """What holds of all samples, in words.

    Args:
        figures: as ``nearest.json`` has them.
    """
    lines = []
    same, hubs = figures.get("same_class"), figures.get("near_to_most")
    if isinstance(same, dict):
        lines.append(
            f"of the same class: {same['nearest']:.1%} of the nearest, {same['all_k']:.1%} of all {figures['k']}, "
            f"{same['by_chance']:.1%} by chance"
        )
    if isinstance(hubs, list) and hubs:
        names = ", ".join(f"train {hub['train_sample']} (of {hub['of_samples']:,})" for hub in hubs)
        lines.append(f"among the {figures['k']} nearest of most of {figures['samples']:,} samples: {names}")
    return lines


def _numbers_table(found: NearestResult) -> Table:
    """One line a sample: numbers, classes and values of its neighbours."""
    table = Table(box=None, pad_edge=False)
    table.add_column(found.figures["rows"])
    if any(row.sample.label is not None for row in found.shown):
        table.add_column("label", justify="right")
    for place in range(max(len(row.neighbours) for row in found.shown)):
        table.add_column(f"{place + 1}.", justify="left")
    for row in found.shown:
        cells = [Text(str(row.sample.index))]
        if row.sample.label is not None:
            cells.append(Text(label_text(row.sample)))
        cells += [
            Text(f"{sample.index}: {_value(row.values[place])}{_in_brackets(row, place)}", style=_style(row, place))
            for place, sample in enumerate(row.neighbours)
        ]
        table.add_row(*cells)
    return table


def _texts_table(found: NearestResult) -> Table:
    """A sample and each of its neighbours on lines of their own, with their texts."""
    rows = found.figures["rows"]
    table = Table(box=None, pad_edge=False)
    for name in ("sample", "value", "label"):
        table.add_column(name, justify="left" if name == "sample" else "right", no_wrap=True)
    table.add_column("text", overflow="fold")
    for row in found.shown:
        text = _short(row.sample.text, TABLE_LETTERS)
        table.add_row(f"{rows} {row.sample.index}", "", label_text(row.sample), Text(text), style="bold")
        for place, sample in enumerate(row.neighbours):
            label = Text(f"{label_text(sample)} {MARKS[row.same(place)]}".strip(), style=_style(row, place))
            text = _short(sample.text, TABLE_LETTERS)
            table.add_row(f"  train {sample.index}", _value(row.values[place]), label, Text(text))
    return table


def draw_neighbours(found: NearestResult, path: Path) -> bool:
    """Draw some samples with their nearest ones: images side by side, otherwise bars with their texts.

    Args:
        found: the nearest samples.
        path: file to write, ``.png``.

    Returns:
        Whether there was anything to draw.

    Raises:
        InputError: if matplotlib is not installed.
    """
    if not found.shown:
        return False
    if all(row.sample.pixels is not None for row in found.shown):
        _draw_images(found, path)
    else:
        _draw_bars(found, path)
    return True


def _draw_images(found: NearestResult, path: Path) -> None:
    """Rows of images: the sample, a gap, its neighbours; framed and marked by whether the class is the same."""
    rows, columns = len(found.shown), max(len(row.neighbours) for row in found.shown)
    with picture(path, 1.15 * (columns + 1) + 0.5, 1.42 * rows + 0.8) as figure:
        grid = figure.add_gridspec(rows, columns + 2, width_ratios=[1, 0.12] + [1] * columns)
        for line, row in enumerate(found.shown):
            axes = figure.add_subplot(grid[line, 0])
            name = f"{found.figures['rows']} {row.sample.index}"
            _image(axes, row.sample, _lines(name, _class(row.sample)), UNKNOWN)
            for place, sample in enumerate(row.neighbours):
                axes = figure.add_subplot(grid[line, 2 + place])
                text = _lines(f"train {sample.index}", f"{_value(row.values[place])}{_in_brackets(row, place)}")
                _image(axes, sample, text, _colour(row, place))
        figure.suptitle(_title(found), fontsize="medium")
        figure.supxlabel(_legend(found), fontsize="small", color=UNKNOWN)


def _image(axes: Axes, sample: ShownSample, text: str, colour: str) -> None:
    """One image in a frame, with a text below it."""
    if sample.pixels is not None:
        axes.imshow(sample.pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(text, fontsize="small", color=colour, labelpad=2)
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=2.2)


def _draw_bars(found: NearestResult, path: Path) -> None:
    """A panel a sample: a bar for each neighbour, and after it its value, class and text."""
    k = max(len(row.neighbours) for row in found.shown)
    values = [value for row in found.shown for value in row.values]
    low, high = min(0.0, *values), max(0.0, *values)
    after = [[_after_bar(row, place) for place in range(len(row.neighbours))] for row in found.shown]
    with_texts = any(row.sample.text is not None for row in found.shown)
    width = 11.0 if with_texts else 6.5
    # A letter is about 0.075 inches wide; the texts stand right of the bars, in the same axes.
    room = min(0.75, (0.075 * max(len(text) for texts in after for text in texts) + 0.2) / width)
    height = (0.24 * k + 0.5) * len(found.shown) + 0.7
    with _letters_without_a_font(), picture(path, width, height) as figure:
        panels = figure.subplots(len(found.shown), 1, sharex=True, squeeze=False)[:, 0]
        for axes, row, texts in zip(panels, found.shown, after, strict=True):
            name = f"{found.figures['rows']} {row.sample.index}{_in_brackets(row)}"
            title = f"{name}  {_short(row.sample.text, PICTURE_LETTERS)}".strip()
            axes.set_title(_plain(title), loc="left", fontsize="medium")
            places = range(len(row.neighbours))
            axes.barh(places, row.values, color=[_colour(row, place) for place in places], height=0.7)
            axes.set_yticks(places, [f"train {sample.index}" for sample in row.neighbours], fontsize="small")
            axes.invert_yaxis()
            axes.spines[["top", "right", "bottom"]].set_visible(False)
            for place, text in enumerate(texts):
                axes.text(max(0.0, row.values[place]), place, f" {_plain(text)}", va="center", fontsize="small")
        panels[0].set_xlim(low, low + (high - low or 1.0) / (1 - room))
        panels[0].set_xticks([tick for tick in panels[0].get_xticks() if low <= tick <= high])
        figure.suptitle(_title(found), fontsize="medium")
        figure.supxlabel(_legend(found), fontsize="small", color=UNKNOWN)


def _after_bar(row: ShownRow, place: int) -> str:
    """Value, class and text of a neighbour."""
    text = _short(row.neighbours[place].text, PICTURE_LETTERS - 20)
    return f"{_value(row.values[place])}{_in_brackets(row, place)}  {text}".strip()


@contextmanager
def _letters_without_a_font() -> Iterator[None]:
    """Letters of which no font is installed become boxes, and no warning each: table and page have the text whole."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def _title(found: NearestResult) -> str:
    what = "cosine" if found.figures["by"] == "cosine" else "kernel entry"
    return f"{found.figures['rows']} samples and their nearest train samples, by {what}"


def _legend(found: NearestResult) -> str:
    """What marks and colours mean, and what was done to the pixels."""
    parts = []
    rows = found.shown
    if any(row.same(place) is not None for row in rows for place in range(len(row.neighbours))):
        parts.append("in brackets the class: ✓ green as the sample's own, ✗ red another")
    if any(sample.stretched for row in rows for sample in (row.sample, *row.neighbours)):
        parts.append("images of unknown scale are stretched, each to its own range of values")
    return "; ".join(parts)


def _style(row: ShownRow, place: int) -> str:
    return {True: "green", False: "red", None: ""}[row.same(place)]


def _colour(row: ShownRow, place: int) -> str:
    return {True: SAME, False: OTHER, None: UNKNOWN}[row.same(place)]


def _in_brackets(row: ShownRow, place: int | None = None) -> str:
    """The class of a sample or of one of its neighbours, with its mark, as it follows a value."""
    if place is None:
        return f" ({label_text(row.sample)})" if row.sample.label is not None else ""
    sample = row.neighbours[place]
    mark = MARKS[row.same(place)]
    return f" ({label_text(sample)}{f' {mark}' if mark else ''})" if sample.label is not None else ""


def _class(sample: ShownSample) -> str:
    return "" if sample.label is None else f"({label_text(sample)})"


def label_text(sample: ShownSample) -> str:
    """A label as it is printed; empty where there is none."""
    return (
        "" if sample.label is None else f"{sample.label:.4g}" if isinstance(sample.label, float) else str(sample.label)
    )


def _value(value: float) -> str:
    """A kernel entry or cosine in four digits, zeros at the end included, so that columns align."""
    return f"{value:#.4g}".removesuffix(".")


def _lines(*parts: str) -> str:
    return "\n".join(part for part in parts if part)


def _short(text: str | None, letters: int) -> str:
    """A text on one line of so many letters."""
    return "" if text is None else textwrap.shorten(text, letters, placeholder=" …")


def _plain(text: str) -> str:
    """A text that matplotlib is not to read as mathematics."""
    return text.replace("$", r"\$")
