"""Figures of ``python -m bench``, drawn from records by matplotlib (extra ``plots``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from .contenders import OURS
from .playing import Played
from .records import Record
from .residual_figures import drawing

MIB: Final = 2**20

#: Colours that can be told apart without red and green (Okabe and Ito 2008).
COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31", "#7F7F7F")


def draw_all(played: Mapping[str, Played], folder: Path) -> dict[str, list[Path]]:
    """Draw every figure that there are records for.

    Args:
        played: by name.
        folder: for the files, made if it is not there.

    Returns:
        By part the files.

    Raises:
        RuntimeError: if matplotlib is not installed.
    """
    if not drawing():
        raise RuntimeError("figures need matplotlib; pip install 'ooc-ntk[plots]'")
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[Path]] = {}
    records = [record for one in played.values() for record in one.records]
    for part, name, draw, wanted in FIGURES:
        chosen = [record for record in records if wanted(record)]
        path = folder / f"{name}.svg"
        if chosen:
            _save(draw(chosen), path)
            found.setdefault(part, []).append(path)
        else:
            path.unlink(missing_ok=True)
    return found


def _axes(columns: int, width: float, height: float) -> tuple[Any, Any]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(width, height), squeeze=False, layout="constrained")
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(visible=True, which="major", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes[0]


def _save(figure: Any, path: Path) -> None:
    import matplotlib
    from matplotlib import pyplot

    # Neither the date nor random names: the same records give the same file.
    with matplotlib.rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "path"}):
        figure.savefig(path, metadata={"Date": None}, facecolor="white")
    pyplot.close(figure)


def draw_peers(records: Sequence[Record]) -> Any:
    """Seconds of every peer over ours, a line per workload and peer, on a logarithmic axis."""
    workloads = list(dict.fromkeys(record.workload for record in records))
    lines: list[Record | str] = []
    for workload in workloads:
        peers = [record for record in records if record.workload == workload and not record.contender.startswith(OURS)]
        lines += [workload, *sorted(peers, key=lambda record: (record.ratio is None, record.ratio or 0.0))]
    figure, (axis,) = _axes(1, 8, 1.0 + 0.24 * len(lines))
    for place, line in enumerate(lines):
        if isinstance(line, str):
            continue
        if line.ratio is None:
            why = "no figures" if line.seconds is None else f"error {line.error:.0e}"
            axis.annotate(why, (1.05, place), va="center", fontsize=7, color="#777777")
            continue
        colour = COLOURS[0] if line.ratio >= 1 else COLOURS[1]
        axis.plot([1, line.ratio], [place, place], color=colour, linewidth=1.5)
        axis.plot(line.ratio, place, ">" if line.at_least else "o", color=colour, markersize=6)
        text = f" {'stopped at ' if line.at_least else ''}{line.ratio:.3g}×"
        axis.annotate(
            text, (max(line.ratio, 1.0), place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=7
        )
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xscale("log")
    ratios = [record.ratio for record in records if record.ratio]
    axis.set_xlim(min(0.5, *ratios) * 0.9, max(10.0, *ratios) * 2.5)
    axis.set_yticks(
        range(len(lines)), [line if isinstance(line, str) else line.contender for line in lines], fontsize=8
    )
    for label, line in zip(axis.get_yticklabels(), lines, strict=True):
        label.set_fontweight("bold" if isinstance(line, str) else "normal")
    axis.set_ylim(len(lines) - 0.4, -0.6)
    axis.grid(visible=False, axis="y")
    axis.set_xlabel("seconds over those of ooc-ntk (right of 1: slower than ooc-ntk)")
    return figure


def draw_growth(records: Sequence[Record]) -> Any:
    """Seconds and memory against samples, and against parameters."""
    figure, axes = _axes(4, 15, 3.6)
    for number, (series, label) in enumerate((("growth with N", "samples N"), ("growth with P", "parameters P"))):
        mine = [record for record in records if record.series == series]
        if not mine:
            continue
        x = [record.samples if number == 0 else record.figures["parameters"] for record in mine]
        seconds, memory = axes[2 * number : 2 * number + 2]
        seconds.loglog(x, [record.seconds for record in mine], "o-", color=COLOURS[0], label="run")
        power = 2 if number == 0 else 1
        last = mine[-1].seconds or 0.0
        guide = [last * (each / x[-1]) ** power for each in x]
        seconds.loglog(x, guide, ":", color="gray", label=f"slope {power}")
        memory.loglog(x, [(record.peak_bytes or 0) / MIB for record in mine], "o-", color=COLOURS[0], label="peak")
        promised = [(record.promised_bytes or 0) / MIB for record in mine]
        memory.loglog(x, promised, "--", color=COLOURS[5], label="promised")
        for name, text, colour in (("jacobian_bytes", "dense Jacobian", 1), ("kernel_bytes", "kernel", 2)):
            sizes = [record.figures[name] / MIB for record in mine]
            memory.loglog(x, sizes, "-", color=COLOURS[colour], label=text)
        for axis, what in ((seconds, "seconds"), (memory, "MiB")):
            axis.set_xticks(x, [_short(each) for each in x], fontsize=8)
            axis.set_xticks([], minor=True)
            axis.set_xlabel(label)
            axis.set_ylabel(what)
            axis.legend(fontsize=7)
    return figure


def _short(number: float) -> str:
    """A number for a tick.

    >>> _short(2_683), _short(11_169_345)
    ('2.7k', '11M')
    """
    for size, suffix in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2g}{suffix}" if number < 1000 * size else f"{number / size:.0f}{suffix}"
    return f"{number:.0f}"


def draw_promises(records: Sequence[Record]) -> Any:
    """Measured beside promised seconds and memory, a point per run."""
    figure, axes = _axes(2, 9.5, 4.4)
    pairs = (
        ("seconds of tasks", [(record.promised_seconds, record.task_seconds) for record in records]),
        (
            "peak memory, MiB",
            [((record.promised_bytes or 0) / MIB, (record.peak_bytes or 0) / MIB) for record in records],
        ),
    )
    for number, (label, points) in enumerate(pairs):
        known = np.array([point for point in points if point[0] and point[1]], dtype=float).reshape(-1, 2)
        axis = axes[number]
        if not len(known):
            continue
        ends = np.array([known.min() / 1.4, known.max() * 1.4])
        axis.loglog(ends, ends, color="black", linewidth=0.9, label="as promised")
        axis.loglog(ends, 1.5 * ends, "--", color="gray", linewidth=0.9, label="a factor of 1.5")
        axis.loglog(ends, ends / 1.5, "--", color="gray", linewidth=0.9)
        axis.loglog(
            known[:, 0], known[:, 1], "o", color=COLOURS[0], alpha=0.7, markersize=5, label=f"{len(known)} runs"
        )
        axis.set_xlabel(f"{label}: promised")
        axis.set_ylabel(f"{label}: measured")
        axis.set_xlim(*ends)
        axis.set_ylim(*ends)
        axis.set_aspect("equal")
        axis.legend(fontsize=7)
    return figure


def draw_outofcore(records: Sequence[Record]) -> Any:
    """Seconds, and memory beside what is held, of the same job in memory and on disk."""
    first = [record for record in records if record.workload == records[0].workload]
    figure, (seconds, memory) = _axes(2, 9, 3.2)
    names = [record.contender.removeprefix(f"{OURS}, ") for record in first]
    places = np.arange(len(first))
    seconds.bar(places, [record.seconds for record in first], 0.5, color=[COLOURS[2], COLOURS[0]][: len(first)])
    seconds.set_ylabel("seconds")
    for offset, (label, sizes) in enumerate(
        (
            ("tiles", [record.figures["held_bytes"] / MIB for record in first]),
            ("peak memory", [(record.peak_bytes or 0) / MIB for record in first]),
            ("promised", [(record.promised_bytes or 0) / MIB for record in first]),
        )
    ):
        memory.bar(places + 0.25 * (offset - 1), sizes, 0.23, label=label, color=COLOURS[(1, 0, 5)[offset]])
    memory.set_ylabel("MiB")
    memory.set_ylim(0, 1.35 * memory.dataLim.y1)
    memory.legend(fontsize=7, ncols=3, loc="upper center")
    for axis in (seconds, memory):
        axis.set_xticks(places, names)
    figure.suptitle(first[0].workload, fontsize=9)
    return figure


def draw_projection(records: Sequence[Record]) -> Any:
    """Residual against dim, observed and predicted, and the share of entries within their bars."""
    workloads = list(dict.fromkeys(record.workload for record in records))
    figure, (residual, coverage) = _axes(2, 11, 4.2)
    lines = [(workload, kind) for workload in workloads for kind in dict.fromkeys(_kind(record) for record in records)]
    for number, (workload, kind) in enumerate(lines):
        mine = [record for record in records if (record.workload, _kind(record)) == (workload, kind)]
        if not mine:
            continue
        dims, colour = [record.figures["dim"] for record in mine], COLOURS[number % len(COLOURS)]
        label = f"{workload.split(', ', 2)[-1]}, {kind}"
        residual.loglog(dims, [record.figures["observed"] for record in mine], "o", color=colour, label=label)
        residual.loglog(dims, [record.figures["predicted"] for record in mine], "-", color=colour, linewidth=0.9)
        coverage.semilogx(dims, [record.figures["inside"] for record in mine], "o-", color=colour, linewidth=0.9)
    coverage.axhline(0.95, color="black", linewidth=0.8)
    coverage.set_ylim(0.8, 1.0)
    coverage.set_ylabel("share of entries within their 95% bars")
    residual.set_ylabel("residual: observed (o), predicted (–)")
    every = sorted({record.figures["dim"] for record in records})
    for axis in (residual, coverage):
        axis.set_xticks(every, [f"{dim:.0f}" for dim in every])
        axis.set_xticks([], minor=True)
        axis.set_xlabel("dim")
    figure.legend(*residual.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=7)
    return figure


def _kind(record: Record) -> str:
    return record.contender.removeprefix(f"{OURS}, ").partition(":")[0]


def draw_interrupted(records: Sequence[Record]) -> Any:
    """The undisturbed run, and of every killed one the seconds before the kill and after it."""
    figure, (axis,) = _axes(1, 8, 0.9 + 0.45 * len(records))
    for place, record in enumerate(records):
        killed = record.figures.get("killed", record.seconds)
        axis.barh(place, killed, 0.55, color=COLOURS[5] if "killed" in record.figures else COLOURS[2])
        if "resumed" in record.figures:
            axis.barh(place, record.figures["resumed"], 0.55, left=killed, color=COLOURS[0])
            axis.plot(killed, place, "X", color=COLOURS[1], markersize=9)
        axis.annotate(f" {record.ratio or 1:.2f}×", (record.seconds or 0.0, place), va="center", fontsize=8)
    axis.set_yticks(range(len(records)), [record.contender.removeprefix(f"{OURS}, ") for record in records], fontsize=8)
    axis.set_xlim(0, 1.12 * max(record.seconds or 0.0 for record in records))
    axis.invert_yaxis()
    axis.set_xlabel("seconds, starting Python included (cross: killed; after it: the same command again)")
    axis.set_title(records[0].workload, fontsize=9)
    return figure


def draw_algebra(records: Sequence[Record]) -> Any:
    """Seconds of every contender over ours, by task."""
    return draw_peers([record for record in records if record.ratio is None or not record.contender.startswith(OURS)])


def _series(*names: str) -> Callable[[Record], bool]:
    return lambda record: record.series in names


def _promised(record: Record) -> bool:
    return bool(record.promised_seconds or record.promised_bytes)


#: Part under which a figure stands, its file, what draws it, and the records that go into it.
FIGURES: Final[Iterable[tuple[str, str, Callable[[Sequence[Record]], Any], Callable[[Record], bool]]]] = (
    ("exact", "peers", draw_peers, _series("peers")),
    ("growth", "growth", draw_growth, _series("growth with N", "growth with P")),
    ("memory", "promises", draw_promises, _promised),
    ("outofcore", "outofcore", draw_outofcore, _series("out of core")),
    ("projection", "projection", draw_projection, _series("projection")),
    ("algebra", "algebra", draw_algebra, _series("algebra")),
    ("interrupted", "interrupted", draw_interrupted, _series("interrupted")),
)
