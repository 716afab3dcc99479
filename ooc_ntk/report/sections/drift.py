"""The page of several checkpoints: what became of each run, and how far the kernels move."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ooc_ntk import api
from ooc_ntk.report.figures.comparing import draw_drift, draw_matrix
from ooc_ntk.report.parts import Figure, Figures, Page, Part, Section, Table, Text
from ooc_ntk.report.words import number
from ooc_ntk.units import format_bytes, format_seconds


def page(path: Path, several: Sequence[api.RunInfo]) -> Page:
    """The report of a directory of checkpoints.

    Args:
        path: the directory.
        several: its runs, in order.
    """
    missing = api.missing_checkpoints(path)
    finished = not missing and all(each.finished for each in several)
    first = several[0]
    sections = [_runs(several, missing)]
    if finished:
        sections.append(_drift(path, several))
    sections.append(_origin(first))
    name = path.absolute().name
    lead = f"{len(several)} checkpoints of one model, a run each. {first.plan.summary()[0][1]}."
    return Page(name, lead, tuple(sections))


def _runs(several: Sequence[api.RunInfo], missing: Sequence[str]) -> Section:
    rows = [
        (
            each.path.name,
            "complete" if each.finished else f"{each.kernel_tiles_done:,} of {each.kernel_tiles:,} tiles",
            format_seconds(each.seconds),
            format_bytes(each.host_bytes),
        )
        for each in several
    ]
    rows += [(name, "not begun", "-", "-") for name in missing]
    parts: list[Part] = [Table(("checkpoint", "state", "time", "peak host memory"), tuple(rows), words=(1,))]
    example = several[-1].path
    parts.append(Text(f"Each is a run with a report of its own, for example: ooc-ntk report {example}", soft=True))
    if len(several) > 1:
        line = f"Two of them side by side: ooc-ntk report {several[0].path} {example}"
        parts.append(Text(line, soft=True))
    return Section("checkpoints", "Checkpoints", tuple(parts))


def _drift(path: Path, several: Sequence[api.RunInfo]) -> Section:
    found = api.open_checkpoints(path).drift()
    names = [each.path.name for each in several]
    last, distance = float(found.changes[-1]), float(found.distances[0, -1])
    said = (
        f"the last kernel has changed by {last:.1%} of the first one’s norm, its kernel distance is {number(distance)}"
    )
    figures = [
        Figure(
            "drift",
            draw_drift(names, found.changes),
            f"How far kernels move from the first: {said}. The distance, 1 − ⟨K, K₀⟩ / (‖K‖ ‖K₀‖), sees no factor.",
            f"Change over checkpoints: {said}.",
        )
    ]
    if len(names) > 1:
        figures.append(
            Figure(
                "distances",
                draw_matrix(names, found.distances, "distance"),
                "Kernel distance of every checkpoint to every other.",
                f"Map of kernel distances of {len(names)} checkpoints.",
            )
        )
    rows = [
        (
            name,
            number(float(found.norms[place])),
            f"{found.changes[place]:.2%}",
            number(float(found.distances[0, place])),
        )
        for place, name in enumerate(names)
    ]
    head = ("checkpoint", "norm", "change from the first", "distance from the first")
    return Section("drift", "How the kernel moves", (Figures(tuple(figures)), Table(head, tuple(rows))))


def _origin(first: api.RunInfo) -> Section:
    rows = [(label, value) for label, value in first.plan.summary()]
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in first.versions.items())))
    return Section("provenance", "Plan that they share", (Table((), tuple(rows)),))
