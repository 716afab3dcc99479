"""What a part of ``python -m bench`` gives back: records, checks against bars, and lines of text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

from .bars import Check
from .contenders import OURS

#: Samples from which on a workload counts for :func:`never_slower`.
FEWEST_SAMPLES: Final = 64

#: Seconds of tasks from which on :func:`promises` judges their promise: what is shorter is mostly noise (guessed).
JUDGED_SECONDS: Final = 1.0

#: What measured and promised seconds of tasks may differ by, as a factor.
SECONDS_BAR: Final = 1.5

#: The claims that :func:`promises` computes.
TIME_KEPT = "factor by which tasks' seconds are off their promise, most of all runs ≥ 1 s"
MEMORY_KEPT = "peak / promised memory, most of all runs"

#: The claim that :func:`never_slower` computes, and the series of records for which it does.
NEVER_SLOWER: Final = ", N ≥ 64, plans not counted: least of any peer / ooc-ntk"

#: Relative error from which on a peer's figures are wrong, so that it did not do the job (guessed).
WRONG: Final = 1e-2

#: Our own time with planning, a record beside that of the run alone.
WITH_PLAN: Final = f"{OURS}, plan + run"
SERIES: Final = {"peers": "exact kernels", "throughput": "projecting", "algebra": "algebra"}


@dataclass(frozen=True)
class Record:
    """One contender on one workload.

    Attributes:
        workload: what was computed, with its sizes.
        contender: who.
        seconds: wall clock; None of one that gave no figures.
        samples: train samples; 0 where they say nothing.
        series: what it belongs to: a figure, one of :data:`SERIES`; "" for none.
        ratio: its seconds over those of ooc-ntk on the same workload in the same run.
        at_least: whether it was stopped, so that seconds and ratio are the least that it takes.
        peak_bytes: highest resident memory of its process.
        moved_bytes: read and written on disk.
        error: relative Frobenius error against float64.
        promised_seconds: what the plan promised for its tasks.
        task_seconds: what these took.
        promised_bytes: what the plan promised for host memory.
        figures: whatever else its figure needs, by name.
        remark: how it went about it, or why there are no figures.
    """

    workload: str
    contender: str
    seconds: float | None = None
    samples: int = 0
    series: str = ""
    ratio: float | None = None
    at_least: bool = False
    peak_bytes: int | None = None
    moved_bytes: int | None = None
    error: float | None = None
    promised_seconds: float | None = None
    task_seconds: float | None = None
    promised_bytes: int | None = None
    figures: dict[str, float] = field(default_factory=dict)
    remark: str = ""


#: What a part gives back, one after another.
Finding = Record | Check | str


def to_line(finding: Finding) -> str:
    """A finding as one line of JSON."""
    if isinstance(finding, str):
        return json.dumps(finding)
    return json.dumps({"is": type(finding).__name__, **asdict(finding)})


def from_line(text: str) -> Finding:
    """Read what :func:`to_line` wrote.

    >>> from_line(to_line(Record("w", "c", 1.5))) == Record("w", "c", 1.5)
    True
    """
    given: Any = json.loads(text)
    if isinstance(given, str):
        return given
    kind = {"Record": Record, "Check": Check}[given.pop("is")]
    found: Finding = kind(**given)
    return found


def texts(findings: Iterable[Finding]) -> list[str]:
    """What a command of its own prints: all but records."""
    return [str(finding) for finding in findings if not isinstance(finding, Record)]


def named(prefix: str, findings: Iterable[Finding]) -> list[Finding]:
    """The same findings, the figures of checks with a prefix that says of what they are."""
    return [replace(each, figure=f"{prefix}: {each.figure}") if isinstance(each, Check) else each for each in findings]


def never_slower(records: Sequence[Record], smoke: bool) -> list[Check]:
    """The claim that no peer is faster on any workload of at least :data:`FEWEST_SAMPLES`, plans not counted.

    A peer that was stopped took at least as long; one that gave no figures, or wrong ones, cannot do the job.

    Args:
        records: of all parts.
        smoke: in smoke size every workload counts and nothing is judged.

    Returns:
        For each of :data:`SERIES` the least ratio of a peer beside 1, and the least with our planning counted; none
        where no peer gave figures.

    >>> records = [
    ...     Record("mlp", OURS, 2.0, 64, "peers", 1.0),
    ...     Record("mlp", "loop", 3.0, 64, "peers", 1.5),
    ...     Record("mlp", "fast on few", 0.1, 8, "peers", 0.05),
    ... ]
    >>> print(*never_slower(records, smoke=False))
    exact kernels, N ≥ 64, plans not counted: least of any peer / ooc-ntk (loop, mlp) = 1.5; bar at least 1: met
    """
    found = []
    planned = {record.workload: record.ratio for record in records if record.contender == WITH_PLAN and record.ratio}
    for series, what in SERIES.items():
        peers = [
            (record.ratio, record)
            for record in records
            if record.ratio is not None
            and record.series == series
            and not record.contender.startswith(OURS)
            and (series != "peers" or record.error is None or record.error <= WRONG)
            and (smoke or record.samples >= FEWEST_SAMPLES)
        ]
        if peers:
            ratio, worst = min(peers, key=lambda pair: pair[0])
            figure = f"{what}{NEVER_SLOWER} ({worst.contender}, {worst.workload})"
            over = [each / planned[record.workload] for each, record in peers if record.workload in planned]
            found.append(Check(figure, ratio, min(over, default=None), 1.0, True, None if smoke else ratio >= 1.0))
    return found


def promises(records: Sequence[Record], smoke: bool) -> list[Check]:
    r"""The two claims of the planner over all runs: seconds within a factor, and memory below what was promised.

    Args:
        records: of all parts.
        smoke: nothing is judged.

    Returns:
        A check for each of which there are runs.

    >>> records = [Record("a", OURS, promised_seconds=2.0, task_seconds=1.0, promised_bytes=10, peak_bytes=9)]
    >>> print(*promises(records, smoke=False), sep="\n")
    factor by which tasks' seconds are off their promise, most of all runs ≥ 1 s (a) = 2; bar at most 1.5: MISSED
    peak / promised memory, most of all runs (a) = 0.9; bar at most 1: met
    """
    factors: list[tuple[float, str]] = []
    shares: list[tuple[float, str]] = []
    for record in records:
        if record.promised_seconds and record.task_seconds and record.task_seconds >= (0 if smoke else JUDGED_SECONDS):
            share = record.task_seconds / record.promised_seconds
            factors.append((max(share, 1 / share), record.workload))
        if record.promised_bytes and record.peak_bytes:
            shares.append((record.peak_bytes / record.promised_bytes, record.workload))
    found = []
    for figure, values, bar in ((TIME_KEPT, factors, SECONDS_BAR), (MEMORY_KEPT, shares, 1.0)):
        if values:
            worst, workload = max(values)
            found.append(Check(f"{figure} ({workload})", worst, None, bar, False, None if smoke else worst <= bar))
    return found
