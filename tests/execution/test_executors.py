"""Two executors of one task list: order, commits, failures, and the same bits."""

import functools
import threading

import numpy as np
import pytest
import torch

import ooc_ntk
from ooc_ntk.errors import InputError, RunConflictError, StorageError
from ooc_ntk.execution.executors import InProcess, build_graph, executor_of, run_serially, run_threaded
from ooc_ntk.planning.superblocks import superblocks
from ooc_ntk.planning.tasks import TaskGraph
from ooc_ntk.planning.tiles import SampleGrid
from ooc_ntk.storage.manifest import Receipt
from tests.cases import case

GRID, PASSES = SampleGrid(6, 2, 2), 2
GRAPH = TaskGraph(GRID, superblocks(GRID), PASSES, in_memory=True)
TASKS = list(GRAPH.tasks())

executors = pytest.mark.parametrize("executor", [run_serially, run_threaded])


def waits(task):
    return GRAPH.dependencies(task)


class Recorder:
    """A task body and a commit that write down what happened."""

    def __init__(self, fail_at=None, commit_fails_at=None):
        self.events, self.threads, self.running = [], set(), 0
        self.fail_at, self.commit_fails_at = fail_at, commit_fails_at

    def perform(self, task, *receipts):
        assert [receipt.key for receipt in receipts] == [earlier.key for earlier in waits(task)]
        self.running += 1
        assert self.running == 1, "two tasks at once: the plan counts the memory of one"
        self.threads.add(threading.get_ident())
        self.events.append(("run", task.key))
        self.running -= 1
        if task.key == self.fail_at:
            raise StorageError(f"{task.key} failed")
        return Receipt(task.key, 0.0)

    def commit(self, receipt):
        assert threading.get_ident() == threading.main_thread().ident, "the manifest has one writer"
        if receipt.key == self.commit_fails_at:
            raise StorageError("the disk is full")
        self.events.append(("commit", receipt.key))


@executors
def test_every_task_runs_once_after_what_it_waits_for_is_committed(executor):
    recorder = Recorder()
    executor(TASKS, waits, recorder.perform, recorder.commit)
    assert sorted(recorder.events) == sorted((what, task.key) for task in TASKS for what in ("run", "commit"))
    place = {event: index for index, event in enumerate(recorder.events)}
    for task in TASKS:
        assert place["run", task.key] < place["commit", task.key]
        for earlier in waits(task):
            assert place["commit", earlier.key] < place["run", task.key]
    assert len(recorder.threads) == 1


@executors
def test_a_task_that_fails_ends_the_run_and_what_was_finished_stays_committed(executor):
    recorder = Recorder(fail_at="kernel-0-1-0")
    with pytest.raises(StorageError, match="kernel-0-1-0 failed"):
        executor(TASKS, waits, recorder.perform, recorder.commit)
    committed = {key for what, key in recorder.events if what == "commit"}
    assert {"rows-0-0-0", "rows-0-1-0"} <= committed
    assert not {"kernel-0-1-0", "release-0-0-0", "rows-1-0-0"} & committed


@executors
def test_a_commit_that_fails_ends_the_run(executor):
    recorder = Recorder(commit_fails_at="rows-0-1-0")
    with pytest.raises(StorageError, match="disk is full"):
        executor(TASKS, waits, recorder.perform, recorder.commit)
    ran = {key for what, key in recorder.events if what == "run"}
    assert "kernel-0-1-0" not in ran, "it waits for what was not committed"


@executors
def test_nothing_to_do(executor):
    executor([], waits, Recorder().perform, Recorder().commit)


def test_the_graph_holds_coordinates_and_references_only():
    graph = build_graph(TASKS, waits, Recorder().perform)
    assert graph.keys() == {task.key for task in TASKS}
    for task in TASKS:
        assert graph[task.key].dependencies == {earlier.key for earlier in waits(task)}


def test_names():
    assert executor_of(None) is executor_of("threads")
    assert executor_of(None) == InProcess(run_threaded)
    assert executor_of("serial") == InProcess(run_serially)
    with pytest.raises(InputError, match="unknown scheduler 'serail'; did you mean 'serial'"):
        executor_of("serail")
    with pytest.raises(InputError, match="a Cluster or a Client, got int"):
        executor_of(3)


PREFERENCES = {
    "resident": {"dataflow": "resident", "tile_samples": 8},
    "spill": {"dataflow": "spill", "tile_samples": 10, "span_columns": 400},
    "recompute": {"dataflow": "recompute", "tile_samples": 9, "span_columns": 300, "passes": 3},
}


@pytest.mark.parametrize("dataflow", PREFERENCES)
def test_both_executors_write_the_same_bits(dataflow, compute):
    job = case("smooth-mlp").job(kernel="full", normalize="cosine")
    runs = [
        compute(job, "vmap", 5, scheduler, **PREFERENCES[dataflow]) for scheduler in ("serial", "threads", "threads")
    ]
    assert len({run.plan.digest for run in runs}) == 1
    for array in ("kernel.zarr/c", "diagonal/c"):
        files = [
            {
                path.relative_to(run.path).as_posix(): path.read_bytes()
                for path in (run.path / array).rglob("*")
                if path.is_file()
            }
            for run in runs
        ]
        assert files[0], array
        assert files[0] == files[1] == files[2]
    assert np.isfinite(np.asarray(runs[0])).all()


def test_tiles_without_their_plan_are_not_taken_for_another_jobs(tmp_path):
    first, second = (torch.nn.Linear(3, 2).eval() for _ in range(2))
    inputs = torch.randn(12, 3)
    ooc_ntk.run(ooc_ntk.Job(first, inputs, device="cpu"), tmp_path / "run", progress=False)
    (tmp_path / "run" / "plan.json").unlink()
    with pytest.raises(RunConflictError, match=r"no plan\.json"):
        ooc_ntk.run(ooc_ntk.Job(second, inputs, device="cpu"), tmp_path / "run", progress=False)


def scaled(factor):
    return lambda output, target: factor * output


def times(output, target, factor):
    return factor * output


class Buffered(torch.nn.Module):
    """A model whose buffer is not saved with its weights."""

    def __init__(self, factor):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 2)
        self.register_buffer("factor", torch.tensor(factor), persistent=False)

    def forward(self, x):
        return self.factor * self.layer(x)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"outputs": scaled(1.0)}, {"outputs": scaled(10.0)}),
        ({"outputs": functools.partial(times, factor=1.0)}, {"outputs": functools.partial(times, factor=2.0)}),
        ({"model": Buffered(1.0)}, {"model": Buffered(10.0)}),
    ],
)
def test_what_changes_the_function_changes_the_job(tmp_path, first, second):
    common = {"model": Buffered(1.0), "train": torch.ones(5, 3), "device": "cpu"}
    ooc_ntk.run(ooc_ntk.Job(**{**common, **first}), tmp_path / "run", progress=False)
    with pytest.raises(RunConflictError, match="another job"):
        ooc_ntk.run(ooc_ntk.Job(**{**common, **second}), tmp_path / "run", progress=False)


def test_preferences_that_the_stored_plan_does_not_follow_are_refused(tmp_path):
    job = ooc_ntk.Job(Buffered(1.0), torch.ones(5, 3), device="cpu")
    ooc_ntk.run(job, tmp_path / "run", preferences=ooc_ntk.Preferences(tile_samples=2), progress=False)
    with pytest.raises(RunConflictError, match="tile_samples 2, asked for is 3"):
        ooc_ntk.run(job, tmp_path / "run", preferences=ooc_ntk.Preferences(tile_samples=3), progress=False)
