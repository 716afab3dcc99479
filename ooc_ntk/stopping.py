"""Being asked to stop: Ctrl-C and SIGTERM become a wish that tasks look at, and for SIGTERM a deadline.

A cluster that takes a machine back sends SIGTERM and kills a while later. While tasks run, the first signal sets an
event, so that the task at hand stops at its next step and nothing of it is left; at any other time it raises at once,
as Ctrl-C does. A task that does not come to its next step in time (one forward pass may take minutes) cannot be stopped
from within: the command line then ends the process. That is as safe as a crash: what is not committed is done again.
A second signal acts as it would have without all this.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Final

from .errors import RunInterrupted

#: Seconds after SIGTERM at which the command line ends the process (chosen: 10 are promised, from signal to exit).
GRACE_SECONDS: Final = 8.0

#: Exit code of a command that was stopped by SIGTERM, as shells count it.
EXIT_TERMINATED: Final = 128 + int(signal.SIGTERM)

_SIGNALS: Final = (int(signal.SIGINT), int(signal.SIGTERM))

_KEPT: Final = "finished tiles are kept, the same command goes on from there"


class Terminated(KeyboardInterrupt):
    """SIGTERM where there is nothing to be finished; no error, so that nothing takes it for a failure of the model."""


class Stop:
    """The wish to stop.

    Attributes:
        event: set when a signal asked for it.
        signal: number of that signal, or None.
    """

    def __init__(self) -> None:
        """Nobody has asked yet."""
        self.event = threading.Event()
        self.signal: int | None = None
        self.watched = 0  # tasks are at work and look at the event
        self._before: dict[int, Any] = {}

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal, in the main thread."""
        again, self.signal = self.signal is not None, number
        self.event.set()
        if again:
            self._as_usual(number, frame)
        elif not self.watched:
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    def _as_usual(self, number: int, frame: FrameType | None) -> None:
        before = self._before[number]
        if callable(before):
            before(number, frame)
        elif before == signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    @contextmanager
    def handling(self) -> Iterator[None]:
        """Take the signals for the time of the body; the handlers of before are set back."""
        try:
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self.handle)
            yield
        finally:
            for number, previous in self._before.items():
                signal.signal(number, previous)


#: The wish that is being listened for, one per process: the command line's, or that of the run at hand.
_current: list[Stop] = []


def _in_child() -> None:
    """A forked process takes signals as usual, and tells its parent nothing of them."""
    if _current:
        _current.clear()
        for pipe in _pipes:
            with suppress(OSError):
                os.close(pipe)
        _pipes.clear()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


#: Both ends of the pipe through which the watching thread hears of signals; a forked child closes its copies.
_pipes: list[int] = []

os.register_at_fork(after_in_child=_in_child)


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Let tasks be stopped: for the time of the body the first signal only sets the event.

    Yields:
        The wish, the command line's if there is one. In other threads than the main one signals are not taken.

    Raises:
        RunInterrupted: in place of a ``KeyboardInterrupt``.
    """
    stop = _current[-1] if _current else Stop()
    own = not _current and threading.current_thread() is threading.main_thread()
    stop.watched += 1
    try:
        if own:
            _current.append(stop)
            with stop.handling():
                yield stop
        else:
            yield stop
    except KeyboardInterrupt as error:
        raise RunInterrupted(f"stopped; {_KEPT}", stop.signal) from error
    finally:
        stop.watched -= 1
        if own:
            _current.remove(stop)


@contextmanager
def deadline_after_sigterm() -> Iterator[None]:
    """Take the signals for a whole command, and end the process if it does not end by itself after SIGTERM.

    The signal is seen by a thread of its own, through the wakeup file: the main thread may be in a long product, and
    would only come to its handler after it.
    """
    if threading.current_thread() is not threading.main_thread() or _current:
        yield
        return
    stop, over = Stop(), threading.Event()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    _pipes.extend((reader, writer))
    thread = threading.Thread(target=_watch, args=(reader, over), name="ooc-ntk-sigterm", daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    _current.append(stop)
    try:
        with stop.handling():
            yield
    finally:
        _current.remove(stop)
        signal.set_wakeup_fd(before)
        over.set()
        os.write(writer, b"\0")  # ends the thread, whoever else holds the pipe
        thread.join()
        _pipes.clear()
        os.close(writer)
        os.close(reader)


def _watch(reader: int, over: threading.Event) -> None:
    """Wait for SIGTERM, and then for the command to end."""
    while (number := os.read(reader, 1)) and number != b"\0":
        if number[0] == signal.SIGTERM:
            break
    else:
        return
    if over.wait(GRACE_SECONDS):
        return
    with suppress(OSError):
        os.write(2, f"stopped by SIGTERM in the middle of a task, which is done again; {_KEPT}\n".encode())
    for child in multiprocessing.active_children():  # those that decode would wait for work forever
        child.terminate()
    os._exit(EXIT_TERMINATED)
