"""How the work went: promises of the plan beside measurements, and the tasks over time."""

from __future__ import annotations

from dataclasses import replace

from ooc_ntk import api
from ooc_ntk.report.figures.promises import TIME_FACTOR, Kept, draw_promises
from ooc_ntk.report.figures.timeline import draw_timeline, make_timeline
from ooc_ntk.report.parts import Figure, Figures, Part, Section, Table, Text
from ooc_ntk.report.tables import promised_and_measured
from ooc_ntk.units import format_bytes, format_seconds

from .origin import how
from .run import Run


def promised(run: Run) -> Section:
    """The plan and its promises beside the measurements."""
    info = run.info
    rows = promised_and_measured(info)
    table = Table(
        ("quantity", "promised", "measured", "ratio"),
        tuple((row[0].strip(), *row[1:]) for row in rows),
        indented=frozenset(place for place, row in enumerate(rows) if row[0].startswith(" ")),
    )
    kept = promises(info)
    parts: list[Part] = []
    if kept:
        broken = [each.what for each in kept if not each.held]
        said = f"not kept: {', '.join(broken)}" if broken else "all kept"
        if not info.finished:
            said += ", as far as the run has come"
        parts.append(
            Figures(
                (
                    Figure(
                        "promises",
                        draw_promises(kept),
                        f"What was measured, as a share of what the plan promised before the run ({said}). Memory and "
                        f"disk are promised as peaks that end at the line; time is promised within a factor of "
                        f"{TIME_FACTOR:g}.",
                        f"Bars of measured over promised: {'; '.join(f'{x.what} {x.ratio:.2f}' for x in kept)}.",
                    ),
                )
            )
        )
    parts += [table, *(Text(f"Note of the plan: {note}", soft=True) for note in info.plan.notes), how(run)]
    return Section("promised", "The plan and what was measured", tuple(parts))


def promises(info: api.RunInfo) -> list[Kept]:
    """What the plan promised, as far as it was measured."""
    plan, promise = info.plan, info.plan.promised
    found = []
    if promise.seconds and info.seconds:
        time = _kept("time", format_seconds, promise.seconds, info.seconds, TIME_FACTOR)
        found.append(replace(time, least=1 / TIME_FACTOR))
    sizes = (
        ("host memory", promise.host_bytes, info.host_bytes, 1.0),
        ("device memory", promise.device_bytes, info.device_bytes, 1.0),
        ("disk", promise.disk_bytes, info.disk_bytes, 1.0),
        ("bytes read", plan.bytes_read, info.bytes_read, None),
        ("bytes written", plan.bytes_written, info.bytes_written, None),
    )
    found += [_kept(name, format_bytes, *rest) for name, *rest in sizes if rest[0] and rest[1]]
    return found


def _kept(what: str, words: object, before: float, after: float, limit: float | None) -> Kept:
    assert callable(words)
    return Kept(what, words(before), words(after), after / before, limit)


def timeline(run: Run) -> Section:
    """Tasks over time, from their receipts."""
    found = make_timeline(api.run_receipts(run.path))
    if found is None:
        missing = Text("No task of this run has left a receipt with its time yet.", soft=True)
        return Section("timeline", "Tasks over time", (missing,))
    first, last = found.bars[0].start, max(bar.stop for bar in found.bars)
    pauses = sum(stop - start for start, stop in found.pauses)
    said = f"{found.tasks:,} tasks, {format_seconds(found.busy_seconds)} of work"
    if len(found.workers) > 1:
        helpers = [worker for worker in found.workers if worker]
        said += f", by {len(helpers)} worker processes{' and the driver' if '' in found.workers else ''}"
    if found.pauses:
        count = len(found.pauses)
        said += (
            f"; {count} pause{'s' if count > 1 else ''} of {format_seconds(pauses)} in all, when nothing ran, "
            "cut out at the dashed line" + ("s" if count > 1 else "")
        )
    again = sum(bool(bar.again) for bar in found.bars)
    said += f"; {again} tasks with faults, marked ▼" if again else "; no task was tried again"
    drawn = "" if len(found.bars) == found.tasks else " Neighbours are drawn as one where they are too many."
    figure = Figure(
        "timeline",
        draw_timeline(found),
        f"A bar for each task: ‘rows’ derive gradients of a range of samples, ‘kernel’ contracts them into tiles. "
        f"{said}.{drawn}",
        f"Timeline over {format_seconds(last - first - pauses)}: {said}.",
    )
    parts: list[Part] = [Figures((figure,))]
    if run.info.phases:
        whole = run.info.seconds or 1.0
        phases = [(name, format_seconds(took), f"{took / whole:.0%}") for name, took in run.info.phases.items()]
        parts.append(
            Table(("phase", "time", "share"), tuple(phases), "Where the time went, phase by phase", folded=True)
        )
    if not run.info.finished:
        parts.append(Text("The run is not finished: type the command that began it again, and it goes on.", soft=True))
    return Section("timeline", "Tasks over time", tuple(parts))
