"""Tasks over time, a bar each: who did what, when, and what was tried again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ooc_ntk.storage.manifest import Receipt
from ooc_ntk.units import format_bytes, format_seconds

from .theme import LIGHT, hover, new_figure

if TYPE_CHECKING:
    from bokeh.plotting import figure as Plot  # noqa: N812

#: Bars that are drawn; of more tasks, neighbours are drawn as one (a choice: more are thinner than a pixel).
MOST_BARS: Final = 2500

#: A pause is cut out where nobody works for so many seconds, and for longer than this share of the time of work.
PAUSE_SECONDS: Final = 5.0
PAUSE_SHARE: Final = 0.15

#: What is left of a pause, of the time of work.
LEFT_OF_PAUSE: Final = 0.02

#: Kinds of tasks in the order of lanes, and their colours.
KINDS: Final = {"rows": "accent", "kernel": "second"}


@dataclass(frozen=True)
class Bar:
    """One task, or several in a row.

    Attributes:
        start: seconds since the epoch.
        seconds: how long it took.
        kind: ``rows`` or ``kernel``.
        worker: who did it; empty for the driver.
        what: names it.
        moved: bytes read and written.
        again: how often something was tried again, and what else went otherwise than planned.
    """

    start: float
    seconds: float
    kind: str
    worker: str
    what: str
    moved: int
    again: str = ""

    @property
    def stop(self) -> float:
        """When it ended."""
        return self.start + self.seconds


@dataclass(frozen=True)
class Timeline:
    """Tasks with their times.

    Attributes:
        bars: in order of time.
        tasks: how many tasks they stand for.
        pauses: start and stop of what was cut out.
        workers: names, the driver's first.
    """

    bars: tuple[Bar, ...]
    tasks: int
    pauses: tuple[tuple[float, float], ...]
    workers: tuple[str, ...]

    @property
    def busy_seconds(self) -> float:
        """Seconds of all tasks together."""
        return sum(bar.seconds for bar in self.bars)


def make_timeline(receipts: Sequence[Receipt]) -> Timeline | None:
    """Tasks in order of time; None where no receipt says when its task began."""
    bars = sorted(
        (_bar(receipt) for receipt in receipts if receipt.started and receipt.key.split("-")[0] in KINDS),
        key=lambda bar: bar.start,
    )
    if not bars:
        return None
    merged = bars if len(bars) <= MOST_BARS else _merged(bars)
    workers = tuple(sorted({bar.worker for bar in bars}))
    return Timeline(tuple(merged), len(bars), tuple(_pauses(bars)), workers)


def _bar(receipt: Receipt) -> Bar:
    kind, generation, row, column = receipt.key.split("-")
    what = f"rows of tile {row}" if kind == "rows" else f"kernel tiles from ({row}, {column})"
    if generation != "0":
        what += f", pass {int(generation) + 1}"
    again = []
    if receipt.retries:
        again.append(f"tried again {receipt.retries} times" if receipt.retries > 1 else "tried again once")
    if receipt.batch_size:
        again.append(f"in batches of {receipt.batch_size}, as memory was short")
    moved = receipt.bytes_read + receipt.bytes_written
    return Bar(receipt.started, receipt.seconds, kind, receipt.worker, what, moved, ", ".join(again))


def _merged(bars: list[Bar]) -> list[Bar]:
    """Neighbours of the same worker and kind as one bar, until few are left; what was tried again stays by itself."""
    gap = (max(bar.stop for bar in bars) - bars[0].start) / MOST_BARS
    found: list[Bar] = []
    last: dict[tuple[str, str], tuple[int, int]] = {}
    for bar in bars:
        place, count = last.get((bar.worker, bar.kind), (-1, 0))
        before = found[place] if place >= 0 else None
        if before is None or before.again or bar.again or bar.stop - before.start > gap:
            last[bar.worker, bar.kind] = len(found), 1
            found.append(bar)
            continue
        seconds = max(before.stop, bar.stop) - before.start
        what = f"{count + 1} tasks: {bar.kind}"
        found[place] = Bar(before.start, seconds, bar.kind, bar.worker, what, before.moved + bar.moved)
        last[bar.worker, bar.kind] = place, count + 1
    return found


def _pauses(bars: Sequence[Bar]) -> list[tuple[float, float]]:
    """Times when nobody worked, that are cut out."""
    gaps, until = [], bars[0].start
    for bar in bars:
        if bar.start > until:
            gaps.append((until, bar.start))
        until = max(until, bar.stop)
    work = until - bars[0].start - sum(stop - start for start, stop in gaps)
    longest = max(PAUSE_SECONDS, PAUSE_SHARE * work)
    return [(start, stop) for start, stop in gaps if stop - start > longest]


def draw_timeline(found: Timeline) -> Plot:
    """Bars of tasks: a lane for each worker and kind of task, and more where several ran at once.

    Args:
        found: the tasks.
    """
    lanes, places = _lanes(found)
    begin = found.bars[0].start
    work = max(bar.stop for bar in found.bars) - begin - sum(stop - start for start, stop in found.pauses)
    left = LEFT_OF_PAUSE * max(work, 1e-3)

    def at(moment: float) -> float:
        """Seconds since the run began, without pauses."""
        cut = sum(max(0.0, min(moment, stop) - start - left) for start, stop in found.pauses if moment > start)
        return moment - begin - cut

    plot = new_figure("time of work (s)", "", height=max(150, 76 + 26 * len(lanes)), y_range=(len(lanes) - 0.4, -0.6))
    for kind, role in KINDS.items():
        mine = [(bar, place) for bar, place in zip(found.bars, places, strict=True) if bar.kind == kind]
        if mine:
            bars = plot.hbar(
                y="y",
                left="left",
                right="right",
                height=0.7,
                source=_columns(mine, at, begin),
                fill_color=LIGHT[role],
                line_color=LIGHT["ground"],
                line_width=1 if len(mine) <= 60 else 0,
            )
            told = [("task", "@what"), ("began after", "@began"), ("took", "@took"), ("moved", "@moved")]
            hover(plot, [*told, ("by", "@worker"), ("", "@again")], [bars])
    again = [(bar, place) for bar, place in zip(found.bars, places, strict=True) if bar.again]
    if again:
        marks = plot.scatter(
            x="right",
            y="y",
            source=_columns(again, at, begin),
            marker="inverted_triangle",
            size=9,
            fill_color=LIGHT["bad"],
            line_color=LIGHT["ground"],
        )
        hover(plot, [("task", "@what"), ("faults", "@again")], [marks])
    for start, _ in found.pauses:
        middle = at(start) + left / 2
        plot.segment(
            x0=[middle], y0=[-0.6], x1=[middle], y1=[len(lanes) - 0.4], color=LIGHT["third"], line_dash="dashed"
        )
    plot.yaxis.ticker = list(range(len(lanes)))
    plot.yaxis.major_label_overrides = dict(enumerate(lanes))
    plot.yaxis.major_tick_line_color = None
    plot.ygrid.visible, plot.xgrid.visible = False, True
    plot.x_range.start = 0
    return plot


def _lanes(found: Timeline) -> tuple[list[str], list[int]]:
    """Names of the lanes, and the lane of every bar: as many for a worker and kind as ran at once."""
    until: dict[tuple[str, str], list[float]] = {}
    within = []
    for bar in found.bars:
        ends = until.setdefault((bar.worker, bar.kind), [])
        free = next((place for place, end in enumerate(ends) if end <= bar.start + 1e-6), len(ends))
        ends[free : free + 1] = [bar.stop]
        within.append(free)
    names: list[str] = []
    starts: dict[tuple[str, str], int] = {}
    for number, worker in enumerate(found.workers):
        for kind in KINDS:
            count = len(until.get((worker, kind), ()))
            starts[worker, kind] = len(names)
            where = "" if len(found.workers) == 1 else f"{worker_name(worker, number, found)} "
            names += [f"{where}{kind}"] + [""] * (count - 1) if count else []
    return names, [starts[bar.worker, bar.kind] + place for bar, place in zip(found.bars, within, strict=True)]


def worker_name(worker: str, number: int, found: Timeline) -> str:
    """A worker in a word: its number, unless it is the driver."""
    return "driver" if not worker else f"w{number + ('' not in found.workers)}"


def _columns(mine: Sequence[tuple[Bar, int]], at: Any, begin: float) -> dict[str, list[Any]]:
    """What is drawn and said of some bars."""
    return {
        "y": [place for _, place in mine],
        "left": [at(bar.start) for bar, _ in mine],
        "right": [max(at(bar.stop), at(bar.start) + 1e-6) for bar, _ in mine],
        "what": [bar.what for bar, _ in mine],
        "began": [format_seconds(bar.start - begin) for bar, _ in mine],
        "took": [format_seconds(bar.seconds) for bar, _ in mine],
        "moved": [format_bytes(bar.moved) for bar, _ in mine],
        "worker": [bar.worker or "the driver's process" for bar, _ in mine],
        "again": [bar.again for bar, _ in mine],
    }
