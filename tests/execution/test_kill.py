"""A run that is killed or interrupted at random moments ends in the same bits, and nothing finished is done twice."""

from __future__ import annotations

import importlib.util
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import ooc_ntk
from ooc_ntk.errors import RunLockedError
from tests.rates import RATES

CHILD = Path(__file__).with_name("kill_child.py")
_spec = importlib.util.spec_from_file_location("ooc_ntk_kill_child", CHILD)
assert _spec is not None
assert _spec.loader is not None
kill_child = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(kill_child)

#: Seconds after which a child that does not get on fails the test.
PATIENCE = 90.0

PREFERENCES = {
    "resident": ooc_ntk.Preferences(dataflow="resident", tile_samples=10, span_columns=400, layer_rules=False),
    "spill": ooc_ntk.Preferences(
        dataflow="spill", tile_samples=10, span_columns=400, layer_rules=False, superblock_tiles=4
    ),
    "recompute": ooc_ntk.Preferences(
        dataflow="recompute", tile_samples=14, span_columns=200, passes=3, layer_rules=False
    ),
    "factored": ooc_ntk.Preferences(dataflow="spill", tile_samples=10, superblock_tiles=1),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Digits as files, and a cache of its own."""
    folder = tmp_path_factory.mktemp("kill")
    digits = (load_digits().images[:, None] / 16).astype(np.float32)
    np.save(folder / "train.npy", digits[:60])
    np.save(folder / "test.npy", digits[60:78])
    patch = pytest.MonkeyPatch()
    patch.setenv("OOC_NTK_CACHE", str(folder / "cache"))
    yield folder
    patch.undo()


_references: dict[str, tuple[Path, dict[str, np.ndarray]]] = {}


def reference(folder: Path, dataflow: str, scheduler: str) -> tuple[Path, dict[str, np.ndarray]]:
    """Plan of a dataflow, and kernel and diagonal of an undisturbed run of it."""
    if dataflow not in _references:
        job = kill_child.make_job(folder)
        threads = torch.get_num_threads()
        torch.set_num_threads(threads if dataflow == "resident" else 1)  # the plan's threads are what counts
        plan = ooc_ntk.plan(
            job, ooc_ntk.Budget("16GiB", disk="1GiB"), preferences=PREFERENCES[dataflow], out=folder, rates=RATES
        )
        assert plan.dataflow == PREFERENCES[dataflow].dataflow
        assert len(plan.passes) == (3 if dataflow == "recompute" else 1)
        torch.set_num_threads(threads)
        path = folder / f"{dataflow}.json"
        plan.save(path)
        kernel = ooc_ntk.run(job, folder / f"reference-{dataflow}", plan=plan, scheduler=scheduler, progress=False)
        _references[dataflow] = path, arrays(kernel)
    return _references[dataflow]


def arrays(kernel) -> dict[str, np.ndarray]:
    return {"kernel": np.asarray(kernel), "diagonal": kernel.diagonal()}


def start(out: Path, plan: Path, scheduler: str) -> subprocess.Popen:
    # Its own output goes to a file: a pipe that nobody reads would block it.
    with out.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-W", "error", str(CHILD), str(out), str(plan), scheduler], stdout=log, stderr=log
        )


def committed(out: Path) -> dict[str, float]:
    """Key and commit time of every finished task."""
    if not (out / "plan.json").exists():
        return {}
    # A copy, with its journal: reading the manifest itself would repair what the kill left, which is the engine's task.
    with tempfile.TemporaryDirectory() as copy:
        for path in out.glob("manifest*"):
            shutil.copy(path, copy)
        database = sqlite3.connect(Path(copy) / "manifest")
        try:
            return dict(database.execute("SELECT key, committed FROM tasks"))
        finally:
            database.close()


def wait_for(child: subprocess.Popen, out: Path, tasks: int, prefix: str = "") -> None:
    """Wait until ``tasks`` different tasks were committed since the run was begun, one of them a ``prefix``."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        logged = tasks_logged(out)
        if len(logged) >= tasks and any(key.startswith(prefix) for key in logged):
            return
        assert child.poll() is None, f"the child ended early:\n{out.with_suffix('.log').read_text()}"
        time.sleep(0.002)
    raise AssertionError(f"no {tasks} tasks after {PATIENCE} s")


def finish(out: Path, plan: Path, scheduler: str) -> None:
    child = start(out, plan, scheduler)
    assert child.wait(PATIENCE) == 0, out.with_suffix(".log").read_text()


def tasks_logged(out: Path) -> set[str]:
    """Different tasks in the log of receipts, which is cheaper to poll than the manifest; rows may be derived again."""
    log = out / "receipts.jsonl"
    return set(re.findall(r'"key": "([^"]*)"', log.read_text())) if log.exists() else set()


def leftovers(out: Path) -> list[str]:
    """What must not be there when a run is finished."""
    names = [path.relative_to(out).as_posix() for path in out.rglob("*")]
    return [name for name in names if ".tmp" in name or name.split("/")[0] in ("tiles", "pending")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dataflow", "scheduler", "other", "kills"),
    [
        ("spill", "serial", "threads", 2),
        pytest.param("recompute", "threads", "serial", 2, marks=pytest.mark.grid),
        ("factored", "serial", "threads", 1),
        ("resident", "threads", "serial", 1),
    ],
)
def test_sigkill_at_random_moments_gives_the_same_bits(folder, tmp_path, dataflow, scheduler, other, kills):
    plan_path, expected = reference(folder, dataflow, other)
    plan = ooc_ntk.Plan.load(plan_path)
    chance = random.Random(f"{dataflow} {scheduler}")
    out = tmp_path / "run"
    finished: dict[str, float] = {}
    stamps: dict[str, int] = {}
    for kill in range(kills):
        # Spread over what is left; the pause after it puts the kill anywhere within the tasks that follow.
        left = plan.task_count - len(finished)
        step = chance.randint(1, max(1, left // (kills - kill + 1)))
        child = start(out, plan_path, scheduler)
        try:
            wait_for(child, out, len(tasks_logged(out)) + step, prefix="kernel" if kill == kills - 1 else "")
            time.sleep(chance.uniform(0, 0.05))
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
        now = committed(out)
        check_nothing_done_twice(dataflow, finished, now, out, stamps)
        assert len(set(now) - set(finished)) >= 1
        finished = now
        last = f"kernel-{len(plan.passes) - 1}-"
        assert sum(key.startswith(last) for key in now) < plan.sample_grid.kernel_tile_count, "killed too late"
        stamps.update(
            {
                path.as_posix(): path.stat().st_mtime_ns
                for path in (out / "kernel.zarr").rglob("c/*/*")
                if f"{last}{path.parent.name}-{path.name}" in now
            }
        )
    assert any(key.startswith("kernel") for key in finished), "no kill came after a kernel tile"
    finish(out, plan_path, scheduler)

    check_nothing_done_twice(dataflow, finished, committed(out), out, stamps)
    found = arrays(ooc_ntk.open(out))
    for name in expected:
        assert found[name].tobytes() == expected[name].tobytes(), name
    assert ooc_ntk.info(out).plan.digest == plan.digest
    assert leftovers(out) == []
    audit = ooc_ntk.verify(out)
    assert audit.passed, audit.checks
    assert audit.entries > 0


def check_nothing_done_twice(dataflow, before: dict[str, float], after: dict[str, float], out: Path, stamps) -> None:
    """Kernel tiles, and spilled rows, that were committed before a kill keep their commit and their file."""
    kept = ("kernel", "rows") if PREFERENCES[dataflow].dataflow == "spill" else ("kernel",)
    again = [key for key in before if key.startswith(kept) and after.get(key) != before[key]]
    assert again == []
    changed = [path for path, stamp in stamps.items() if Path(path).stat().st_mtime_ns != stamp]
    assert changed == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dataflow", "scheduler", "number"), [("recompute", "threads", signal.SIGINT), ("spill", "serial", signal.SIGTERM)]
)
def test_interrupt_stops_within_a_tile_and_says_how_to_go_on(folder, tmp_path, dataflow, scheduler, number):
    plan_path, expected = reference(folder, dataflow, "serial")
    out = tmp_path / "run"
    child = start(out, plan_path, scheduler)
    try:
        wait_for(child, out, 15)
        child.send_signal(number)
        at_signal = len(tasks_logged(out))
        code = child.wait(PATIENCE)
    finally:
        child.kill()
        child.wait()
    said = out.with_suffix(".log").read_text()
    assert code == kill_child.INTERRUPTED, said
    # The task at work stops at its next span; one more may have been in the middle of its commit.
    assert len(tasks_logged(out)) <= at_signal + 2
    assert "stopped" in said
    assert str(out) in said
    assert "the same command goes on" in said
    assert "Traceback" not in said
    assert [path for path in out.rglob("*") if ".tmp" in path.name] == []
    before = committed(out)
    assert before
    finish(out, plan_path, scheduler)
    check_nothing_done_twice(dataflow, before, committed(out), out, {})
    assert arrays(ooc_ntk.open(out))["kernel"].tobytes() == expected["kernel"].tobytes()
    assert leftovers(out) == []


@pytest.mark.slow
def test_two_processes_cannot_run_in_one_directory(folder, tmp_path):
    plan_path, expected = reference(folder, "recompute", "serial")
    out = tmp_path / "run"
    child = start(out, plan_path, "threads")
    try:
        wait_for(child, out, 2)
        os.kill(child.pid, signal.SIGSTOP)  # hold it in the middle, whatever the machine's speed
        with pytest.raises(RunLockedError, match=rf"process {child.pid}\b.*using {out}.*--out"):
            ooc_ntk.run(kill_child.make_job(folder), out, progress=False)
        os.kill(child.pid, signal.SIGCONT)
        assert child.wait(PATIENCE) == 0, out.with_suffix(".log").read_text()
    finally:
        child.kill()
        child.wait()
    assert arrays(ooc_ntk.open(out))["kernel"].tobytes() == expected["kernel"].tobytes()
