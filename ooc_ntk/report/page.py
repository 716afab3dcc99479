"""The report of a run: one HTML file that needs nothing else, with what was computed and every result that is there."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import jinja2

from ooc_ntk.errors import InputError
from ooc_ntk.storage.atomic import write_whole
from ooc_ntk.storage.results import read_result

from .neighbours import MARKS, summary_lines
from .tables import promised_and_measured, provenance, state

if TYPE_CHECKING:
    from ooc_ntk.api import RunInfo

#: Name of the report in the run directory.
REPORT: Final = "report.html"

#: Results by the name of their folder: title, what the picture shows, and the command that makes them.
RESULTS: Final = {
    "fit": ("Kernel regression", "errors over the ridge", "ooc-ntk fit {run}"),
    "spectrum": ("Spectrum", "eigenvalues of the kernel", "ooc-ntk spectrum {run}"),
    "nearest": ("Nearest samples", "samples beside their nearest train samples", "ooc-ntk nearest {run}"),
    "surrogate": ("Surrogate", "predictions of the kernel beside those of the network", "ooc-ntk surrogate {run}"),
}

#: Figures of a list that are shown; longer ones are counted (a choice).
SHOWN_NUMBERS: Final = 8

#: Figures that are said in words, or in a table of their own.
_SAID: Final = ("shown", "same_class", "near_to_most", "note", "plan")


@dataclass(frozen=True)
class Measured:
    """A line of promised and measured figures."""

    quantity: str
    cells: tuple[str, ...]
    indented: bool


@dataclass(frozen=True)
class Example:
    """A line of samples: one, or below it one of its neighbours."""

    sample: str
    value: str
    label: str
    text: str
    head: bool


@dataclass(frozen=True)
class Section:
    """One result, or the command that makes it.

    Attributes:
        name: of the result.
        title: heading.
        command: what makes it.
        missing: whether it is not there.
        picture: as an address that holds the picture itself, or empty.
        alt: what the picture shows.
        lines: the result in words.
        figures: main figures, label and value.
        examples: samples with their neighbours.
        examples_title: of their table.
        with_texts: whether samples have texts.
    """

    name: str
    title: str
    command: str
    missing: bool
    picture: str = ""
    alt: str = ""
    lines: tuple[str, ...] = ()
    figures: tuple[tuple[str, str], ...] = ()
    examples: tuple[Example, ...] = ()
    examples_title: str = ""
    with_texts: bool = False


@dataclass(frozen=True)
class Page:
    """All that the page shows, as text.

    Attributes:
        title: name of the run.
        state: how far it is.
        computed: the plan's summary.
        notes: notes of the plan.
        promised: promises beside measurements.
        sections: results.
        provenance: digests and versions.
    """

    title: str
    state: str
    computed: list[tuple[str, str]]
    notes: tuple[str, ...]
    promised: list[Measured]
    sections: list[Section]
    provenance: list[tuple[str, str]]


def write_page(info: RunInfo, out: Path | None = None) -> Path:
    """Write the report of a run; made again from the same results, it is the same to the byte.

    Args:
        info: the run as it stands.
        out: file to write; None is ``report.html`` in the run directory.

    Returns:
        The file.

    Raises:
        InputError: if ``out`` is a folder.
        StorageError: if the file cannot be written.
    """
    target = info.path / REPORT if out is None else out
    if target.is_dir():
        raise InputError(f"{target} is a folder; name a file for the report, for example {target / REPORT}")
    write_whole(target.parent, target.name, render_page(info).encode())
    return target


def render_page(info: RunInfo) -> str:
    """The report of a run as HTML, everything that it shows inside.

    Args:
        info: the run as it stands.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(page=_page(info))


def _page(info: RunInfo) -> Page:
    own = info.path / REPORT
    if own.is_file():  # the size of an earlier report is none of the run's figures
        info = replace(info, disk_bytes=info.disk_bytes - own.stat().st_size)
    rows = promised_and_measured(info)
    return Page(
        title=info.path.absolute().name,
        state=state(info),
        computed=info.plan.summary(),
        notes=info.plan.notes,
        promised=[Measured(row[0].strip(), row[1:], row[0].startswith(" ")) for row in rows],
        sections=[_section(info.path, name) for name in RESULTS],
        provenance=provenance(info),
    )


def _section(run: Path, name: str) -> Section:
    """A result with its picture and figures, or how to make it."""
    title, alt, command = RESULTS[name]
    command = command.format(run=shlex.quote(str(run)))
    found = read_result(run, name)
    if not isinstance(found, dict):
        return Section(name, title, command, missing=True)
    section = Section(
        name=name,
        title=title,
        command=command,
        missing=False,
        picture=_embedded(run / name / f"{name}.png"),
        alt=f"{title}: {alt}",
        figures=tuple(_figures({key: value for key, value in found.items() if key not in _SAID})),
        lines=(f"note: {found['note']}",) if found.get("note") else (),
    )
    if name != "nearest":
        return section
    examples = tuple(_examples(found))
    return replace(
        section,
        lines=(*summary_lines(found), *section.lines),
        examples=examples,
        examples_title=f"{sum(each.head for each in examples)} samples and their neighbours as a table",
        with_texts=any(each.text for each in examples),
    )


def _embedded(path: Path) -> str:
    """A picture as an address that holds it; empty if there is none."""
    if not path.is_file():
        return ""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _figures(found: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Figures with their names, those inside others after the name of the whole."""
    for key, value in found.items():
        label = f"{before}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            yield from _figures(value, f"{label}, ")
        elif isinstance(value, list):
            plain = len(value) <= SHOWN_NUMBERS and not any(isinstance(each, list | Mapping) for each in value)
            yield label, ", ".join(map(_figure, value)) if plain else f"{len(value):,} entries, in the JSON file"
        else:
            yield label, _figure(value)


def _figure(value: object) -> str:
    """A figure as text."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.5g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _examples(found: Mapping[str, Any]) -> Iterator[Example]:
    """Samples of ``nearest.json``, each followed by its neighbours."""
    for row in found.get("shown") or []:
        yield Example(f"{found['rows']} {row['index']}", "", _figure_or_empty(row["label"]), row["text"] or "", True)
        for each in row["neighbours"]:
            label = f"{_figure_or_empty(each['label'])} {MARKS[each['same_class']]}".strip()
            yield Example(f"train {each['index']}", f"{each['value']:.4g}", label, each["text"] or "", False)


def _figure_or_empty(value: object) -> str:
    return "" if value is None else _figure(value)
