"""Progress of a run: bars on a terminal, plain lines where there is none."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, TextIO

from ooc_ntk.units import format_seconds

#: Seconds between lines where there is no terminal.
LINE_SECONDS: Final = 10.0

_LABELS: Final = {"rows": ("Jacobian rows", "samples"), "kernel": ("kernel", "tiles")}


class TerminalProgress:
    """Shows the phases of a run with rate and time left. Safe to call from task threads."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """Write to ``stream`` (standard error by default)."""
        self._stream = stream or sys.stderr
        self._lock = threading.Lock()
        self._done: dict[str, float] = {}
        self._before: dict[str, float] = {}
        self._total: dict[str, float] = {}
        self._busy: dict[str, float] = {}
        self._turned = time.monotonic()
        self._bars: Any = None
        self._ids: dict[str, Any] = {}
        self._last_line = time.monotonic()

    @staticmethod
    @contextmanager
    def of(progress: Any) -> Iterator[Any]:
        """An observer of what a caller asked for: True, False, or an observer of their own.

        Yields:
            An object with ``begin``, ``advance`` and ``say``, or None.
        """
        if progress is True:
            shown = TerminalProgress()
            try:
                yield shown
            finally:
                shown.close()
        else:
            yield progress or None

    def begin(self, totals: Mapping[str, tuple[float, float]], remaining: Any) -> None:
        """Start showing: amounts done before and in all per phase, and what resuming found."""
        for path, reason in list(remaining.damaged.items())[:5]:
            self._line(f"{path} {reason}; computing it again")
        done, total = totals["kernel"]
        if not remaining.tasks:
            self._line("nothing to do: the kernel is complete")
            return
        if done >= 1:
            self._line(f"going on: {done:.0f} of {total:.0f} kernel tiles are there")
        self._total = {phase: every for phase, (_, every) in totals.items()}
        self._done = {phase: before for phase, (before, _) in totals.items()}
        self._before = dict(self._done)
        self._turned = time.monotonic()
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            self._bars = Progress(
                TextColumn("{task.description:<14}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                console=Console(file=self._stream),
            )
            for phase, (label, _) in _LABELS.items():
                self._ids[phase] = self._bars.add_task(
                    label, total=self._total[phase], completed=self._done[phase], rate="", start=False
                )
            self._bars.start()

    def advance(self, phase: str, amount: float) -> None:
        """Note that work was done."""
        with self._lock:
            now = time.monotonic()
            if self._bars is not None and phase not in self._busy:
                self._bars.start_task(self._ids[phase])
            # Phases take turns; each has a clock of its own that runs only while it does.
            self._busy[phase] = self._busy.get(phase, 0.0) + now - self._turned
            self._turned = now
            self._done[phase] = min(self._total.get(phase, amount), self._done.get(phase, 0.0) + amount)
            if self._bars is not None:
                self._bars.update(self._ids[phase], completed=self._done[phase], rate=self._rate(phase))
            elif now - self._last_line >= LINE_SECONDS:
                self._last_line = now
                self._line(self._status(phase))

    def say(self, text: str) -> None:
        """Print a line, above the bars while they are drawn."""
        if self._bars is not None:
            self._bars.console.print(text, highlight=False)
        else:
            self._line(text)

    def _rate(self, phase: str) -> str:
        spent = self._busy[phase]
        rate = (self._done[phase] - self._before[phase]) / spent if spent > 0 else 0.0
        return f"{rate:.3g} {_LABELS[phase][1]}/s"

    def _status(self, phase: str) -> str:
        label, unit = _LABELS[phase]
        done, total = self._done[phase], self._total[phase]
        made, spent = done - self._before[phase], self._busy[phase]
        left = format_seconds(spent * (total - done) / made) if made > 0 else "unknown time"
        return f"{label}: {done:.0f} of {total:.0f} {unit}, {self._rate(phase)}, {left} left in this phase"

    def _line(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Stop drawing."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
