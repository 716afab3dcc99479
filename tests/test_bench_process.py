"""Measuring in processes of their own: what they are told, when they are stopped, and what that says."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np
import pytest

from bench import process, side_by_side
from bench.contenders import LOOP, OURS
from bench.peers import Result
from bench.process import Case


def test_a_peer_is_stopped_after_its_time_and_says_how_long_it_computed() -> None:
    """Starting and warming up do not count; what it is told is what it had computed when it was stopped."""
    cases = (Case("mlp", 2_048), Case("mlp", 4_096))
    found = process.measure_apart(process.Task(LOOP, cases, False, 1, limit_seconds=0.3))
    seconds = process.run_seconds(found[cases[0]])
    assert seconds is not None
    assert seconds >= 0.3
    assert found[cases[1]] == process.NOT_BEGUN
    assert process.run_seconds(process.NOT_BEGUN) is None


def test_a_process_that_fails_says_why() -> None:
    case = Case("no such workload", 4)
    (said,) = process.measure_apart(process.Task(LOOP, (case,), True, 1)).values()
    assert said == "its process ended with status 1: KeyError: 'no such workload'"
    with pytest.raises(RuntimeError, match=f"{OURS} on no such workload-4: .*KeyError"):
        process.measure_apart(process.Task(OURS, (case,), True, 1))


@pytest.mark.parametrize("value", ["first", "second"])
def test_a_process_has_the_environment_of_its_own_time(tmp_path: Path, value: str) -> None:
    """Whatever the one that it is forked off was begun with; and counts the code that both have in memory."""
    child = process.FORKS.Process(target=_tell, args=(str(tmp_path), {**os.environ, "TOLD": value}))
    child.start()
    child.join()
    told, peak, files = (tmp_path / "told").read_text().split()
    assert told == value
    assert int(peak) >= int(files) > 2**26, "torch alone is more"


def _tell(folder: str, environment: dict[str, str]) -> None:
    """Write what a forked process finds; its task fails."""
    with contextlib.suppress(KeyError):
        process._child(process.Task(LOOP, (Case("none", 1),), True, 1), folder, environment)
    files = process._status_bytes(str(os.getppid()), "RssFile")
    Path(folder, "told").write_text(f"{os.environ.get('TOLD')} {process.peak_resident_bytes()} {files}")


@pytest.mark.parametrize(
    ("ended", "stopped", "known"),
    [([2.0], [3.0], True), ([3.0], [2.0], False), ([2.0], [], True), ([], [3.0], False), ([], [], False)],
)
def test_the_best_peer_is_known_if_the_fastest_came_to_its_end(
    ended: list[float], stopped: list[float], known: bool
) -> None:
    def measured(seconds: float) -> process.Measurement:
        return process.Measurement(Result(np.zeros((1, 1)), 0.0, seconds), 0.0, 0, 0.0)

    outcomes: dict[str, process.Measurement | str] = {OURS: measured(9.0), "refuses": "a reason"}
    outcomes.update({f"ended {number}": measured(seconds) for number, seconds in enumerate(ended)})
    outcomes.update(
        {f"late {number}": f"{process.STOPPED} after {each:.1f} s of computing" for number, each in enumerate(stopped)}
    )
    assert side_by_side.least_is_known(outcomes) is known


def test_patience_is_as_long_as_ours_and_longer_where_a_bar_asks_for_more() -> None:
    ours = process.Measurement(Result(np.zeros((1, 1)), 1.0, 4.0), 0.0, 0, 0.0)
    short = next(case for case in side_by_side.CASES if case.workload == "mlp")
    assert side_by_side.patience(short, ours) == pytest.approx(5.0 * side_by_side.PATIENCE)
    whole = side_by_side.patience(Case("minilm", 64), ours)
    assert whole == pytest.approx(max(5.0 * side_by_side.PATIENCE, 4.0 * 3 * side_by_side.SURELY))
    assert side_by_side.patience(short, "its process ended") == 0.0
