"""What a run shows of itself: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import io
import re

import pytest

from ooc_ntk.execution import progress
from ooc_ntk.execution.progress import TerminalProgress
from ooc_ntk.execution.resume import Remaining
from ooc_ntk.planning.tasks import Task

TOTALS = {"rows": (10.0, 40.0), "kernel": (3.0, 9.0)}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass by hand."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def left(**given: object) -> Remaining:
    return Remaining(**{"tasks": [Task("kernel", 0, 0, 0)], "finished": set(), **given})


def test_without_a_terminal_a_line_now_and_then_says_rate_and_time_left(clock):
    stream = io.StringIO()
    shown = TerminalProgress(stream)
    shown.begin(TOTALS, left(damaged={"kernel.zarr/c/0/0": "differs from its checksum"}))
    assert stream.getvalue().splitlines() == [
        "kernel.zarr/c/0/0 differs from its checksum; computing it again",
        "going on: 3 of 9 kernel tiles are there",
    ]
    clock(4)
    shown.advance("rows", 10)
    assert len(stream.getvalue().splitlines()) == 2, "too early for a line"
    clock(6)
    shown.advance("rows", 10)
    (line,) = stream.getvalue().splitlines()[2:]
    # What was there before counts as done, and not for the rate: 20 samples in 10 s, 10 samples are left.
    assert line == "Jacobian rows: 30 of 40 samples, 2 samples/s, 5.00 s left in this phase"
    clock(10)
    shown.advance("kernel", 2)
    assert stream.getvalue().splitlines()[3].startswith("kernel: 5 of 9 tiles, 0.2 tiles/s, 20.0 s left")
    shown.say("proof passed")
    assert stream.getvalue().endswith("proof passed\n")


def test_more_than_what_was_to_do_is_not_shown(clock):
    stream = io.StringIO()
    shown = TerminalProgress(stream)
    shown.begin(TOTALS, left())
    clock(20)
    shown.advance("rows", 100)  # a task that ran twice
    assert "Jacobian rows: 40 of 40 samples" in stream.getvalue()


def test_a_finished_run_says_so():
    stream = io.StringIO()
    TerminalProgress(stream).begin(TOTALS, left(tasks=[]))
    assert stream.getvalue() == "nothing to do: the kernel is complete\n"


def test_a_terminal_has_bars_until_the_end(clock):
    stream = Terminal()
    shown = TerminalProgress(stream)
    shown.begin(TOTALS, left())
    clock(5)
    shown.advance("rows", 15)
    clock(5)
    shown.advance("rows", 15)
    shown.say("a worker was lost")
    shown.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "a worker was lost" in text
    assert re.search(r"Jacobian rows.*100%.*3 samples/s", text)
    assert re.search(r"kernel .*33%", text)
    before = stream.getvalue()
    shown.say("later")
    assert stream.getvalue() == f"{before}later\n", "no bars are drawn any more"
