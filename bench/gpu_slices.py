"""The whole kernel in slices: each starts or resumes the run, stops by itself in time, and says how to go on."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import ooc_ntk
from ooc_ntk.api import Observer
from ooc_ntk.errors import RunInterrupted
from ooc_ntk.execution.progress import TerminalProgress
from ooc_ntk.stopping import EXIT_TERMINATED, Terminated, deadline_after_sigterm
from ooc_ntk.storage.directory import RunDirectory
from ooc_ntk.units import format_bytes, format_count, format_seconds

from .gpu_networks import Subject
from .table import aligned

#: Seconds after the limit in which a first task may still be finished; then the run is stopped in any case (chosen:
#: with those in which a task looks up, all stays below 8 minutes with slices of 450 s).
PATIENCE_SECONDS: Final = 15.0

#: Seconds that must be left of a slice for checking what is finished (guessed).
VERIFYING_SECONDS: Final = 120.0

#: Samples that are computed again when all is done.
VERIFIED_SAMPLES: Final = 6


@dataclass(frozen=True)
class Slice:
    """How a slice runs.

    Attributes:
        subject: network and data.
        precision: of the job.
        device: torch device string.
        out: run directory.
        seconds: after which it stops, once it has finished something.
        begun: when it began, by ``time.time``.
        command: what to type to go on.
        preferences: what is fixed of a new plan.
        verified: samples that are computed again in the end.
    """

    subject: Subject
    precision: str
    device: str
    out: Path
    seconds: float
    begun: float
    command: str
    preferences: ooc_ntk.Preferences | None = None
    verified: int = VERIFIED_SAMPLES

    @property
    def left(self) -> float:
        """Seconds that are left of it."""
        return self.begun + self.seconds - time.time()

    def job(self) -> ooc_ntk.Job:
        """The job, the same in every slice."""
        return self.subject.job(*self.subject.size, self.precision, self.device)


class Limit:
    """Stops a run as SIGTERM does: at the limit if something was finished by then, a little later in any case."""

    def __init__(self, wanted: Slice) -> None:
        """Begin to watch; see :meth:`watching`."""
        self._slice = wanted
        self._receipts = RunDirectory(wanted.out).receipts_path
        self._before = self._size()
        self._sent = threading.Lock()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Stop in any case, for the time of the body."""
        timer = threading.Timer(max(0.0, self._slice.left) + PATIENCE_SECONDS, self._stop)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            self._sent.acquire(blocking=False)

    def look(self) -> None:
        """Called as work gets done: stop if it is time, and something was finished that need not be done again."""
        if self._slice.left <= 0 and self._kept():
            self._stop()

    def _stop(self) -> None:
        if self._sent.acquire(blocking=False):  # once: a second signal would end the process where it is
            os.kill(os.getpid(), signal.SIGTERM)

    def _size(self) -> int:
        return self._receipts.stat().st_size if self._receipts.exists() else 0

    def _kept(self) -> bool:
        if self._size() <= self._before:
            return False
        with self._receipts.open() as file:
            file.seek(self._before)
            keys = [json.loads(line)["key"] for line in file if line.endswith("\n")]
        # Rows that are held in memory go with the process.
        stored = not ooc_ntk.info(self._slice.out).plan.layout.in_memory
        return any(stored or key.startswith("kernel") for key in keys)


def run_slice(wanted: Slice) -> tuple[int, list[str]]:
    """Start the run or go on with it until the slice is over or all is done; then compare some of it with float64.

    Args:
        wanted: the slice.

    Returns:
        Exit status, 0 once all is done and right, and what is to be said.

    Raises:
        OocNtkError: as :func:`ooc_ntk.run` and :func:`ooc_ntk.verify`.
    """
    limit = Limit(wanted)
    try:
        with deadline_after_sigterm(), limit.watching(), TerminalProgress.of(True) as shown:

            def advance(phase: str, amount: float) -> None:
                shown.advance(phase, amount)
                limit.look()

            observer = Observer(begin=shown.begin, advance=advance, say=shown.say)
            # An existing run keeps its plan.
            asked = None if RunDirectory(wanted.out).holds_run else wanted.preferences
            ooc_ntk.run(wanted.job(), wanted.out, preferences=asked, progress=observer, proof=False)
    except (RunInterrupted, Terminated) as stopped:
        return EXIT_TERMINATED, [
            f"this slice is over ({stopped or 'before the first task'})",
            *(state_of(wanted.out) if RunDirectory(wanted.out).holds_run else ["nothing is finished yet"]),
            f"go on: {wanted.command}",
        ]
    lines = state_of(wanted.out)
    if wanted.left < VERIFYING_SECONDS <= wanted.seconds:
        return EXIT_TERMINATED, [*lines, f"all tiles are finished; the same command compares some: {wanted.command}"]
    found = ooc_ntk.verify(wanted.out, wanted.job(), samples=wanted.verified)
    lines.append(
        f"{wanted.verified} samples computed again in float64: {found.relative_error:.1e} relative error, "
        f"{'passed' if found.passed else 'FAILED'}"
    )
    return (0 if found.passed else 1), lines


def state_of(out: Path) -> list[str]:
    """What is finished of a run, and what it took so far, over all slices."""
    info = ooc_ntk.info(out)
    flops = sum(block.flops for block in info.plan.blocks)
    share = info.kernel_tiles_done / info.kernel_tiles
    lines = [
        f"{out}: {info.kernel_tiles_done:,} of {info.kernel_tiles:,} kernel tiles ({share:.0%}); "
        f"{info.plan.layout.describe()}",
        f"  {format_seconds(info.rows_seconds)} for rows, {format_seconds(info.kernel_seconds)} for kernel tiles; "
        f"promised {format_seconds(info.plan.promised.rows_seconds)} and "
        f"{format_seconds(info.plan.promised.kernel_seconds)} in all",
        f"  peak of device memory {format_bytes(info.device_bytes)}, of host memory {format_bytes(info.host_bytes)}, "
        f"on disk {format_bytes(info.disk_bytes)}",
    ]
    if info.finished:
        rate = flops / max(1e-9, info.kernel_seconds)
        lines.append(f"  contraction: {format_count(flops)}FLOP, {rate / 1e12:.2f} TFLOP/s over all kernel tasks")
    cells = [("phase", "seconds", "share")]
    cells += [(name, f"{seconds:.2f}", f"{seconds / info.seconds:.0%}") for name, seconds in info.phases.items()]
    return [*lines, *aligned(cells)]
