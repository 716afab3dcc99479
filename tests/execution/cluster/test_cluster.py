"""Worker processes write the same bits as one process, whatever becomes of them."""

import itertools
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

import ooc_ntk
from ooc_ntk.errors import ClusterError, InputError, RunConflictError
from ooc_ntk.execution.driver import Observer
from tests.execution.cluster.laboratory import (
    TEST,
    TRAIN,
    bits,
    make_job,
    outside_cluster,
    plan_of,
    worker_processes,
    write_data,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def job(folder):
    return make_job(folder)


@pytest.fixture(scope="module")
def plan(job, rates):
    return plan_of(job, rates)


@pytest.fixture(scope="module")
def reference(job, plan, tmp_path_factory):
    """The bits of one process."""
    out = tmp_path_factory.mktemp("reference") / "run"
    ooc_ntk.run(job, out, plan=plan, scheduler="serial", progress=False, proof=False)
    return bits(out)


class Watch:
    """An observer that adds up what it is told, and calls a function as kernel tiles get done."""

    def __init__(self, on_tile=lambda done: None):
        self.amounts, self.totals, self.said, self._on_tile = Counter(), {}, [], on_tile

    def begin(self, totals, remaining):
        self.totals = dict(totals)

    def advance(self, phase, amount):
        assert amount > 0
        self.amounts[phase] += amount
        if phase == "kernel":
            self._on_tile(self.amounts["kernel"])

    @property
    def observer(self):
        return Observer(self.begin, self.advance, self.said.append)


@pytest.mark.parametrize(
    "workers", [pytest.param(1, marks=pytest.mark.grid), 2, pytest.param(4, marks=pytest.mark.grid)]
)
def test_worker_processes_write_the_same_bits(job, plan, reference, tmp_path, workers):
    assert plan.task_count > 100
    watch, report = Watch(), tmp_path / "report.html"
    cluster = ooc_ntk.Cluster(workers=workers, performance_report=report if workers == 2 else None)
    ooc_ntk.run(job, tmp_path / "run", plan=plan, scheduler=cluster, progress=watch.observer, proof=False)
    assert bits(tmp_path / "run") == reference
    assert watch.amounts["rows"] == TRAIN + TEST
    assert watch.amounts["kernel"] == pytest.approx(plan.sample_grid.kernel_tile_count)
    assert re.search(r"dashboard: http://127\.0\.0\.1:\d+/status", "\n".join(watch.said))
    names = {receipt["worker"] for receipt in receipts(tmp_path / "run") if not receipt["key"].startswith("release")}
    assert names == {str(number) for number in range(workers)}, "everyone had some of it"
    if workers == 2:
        assert "bokeh" in report.read_text().lower()
        assert "Dask Performance Report" in report.read_text()
    assert not worker_processes(), "they are ended with the run"
    found = ooc_ntk.info(tmp_path / "run")
    assert found.finished
    assert found.host_bytes > workers * 2**27, "every process is counted"


def receipts(out):
    import json

    return [json.loads(line) for line in (out / "receipts.jsonl").read_text().splitlines()]


@pytest.mark.grid
def test_progress_is_the_same_in_every_executor(job, plan, tmp_path):
    seen = {}
    for name, scheduler in (("serial", "serial"), ("threads", "threads"), ("workers", ooc_ntk.Cluster(workers=1))):
        watch = Watch()
        ooc_ntk.run(job, tmp_path / name, plan=plan, scheduler=scheduler, progress=watch.observer, proof=False)
        seen[name] = (watch.totals, {phase: round(amount, 9) for phase, amount in watch.amounts.items()})
    assert seen["serial"] == seen["threads"] == seen["workers"]


@pytest.mark.parametrize(("kills", "tile_samples"), [(4, 7), pytest.param(20, 5, marks=pytest.mark.faults)])
def test_killed_workers_leave_the_same_bits(job, rates, tmp_path, kills, tile_samples):
    chance, killed = random.Random(kills), []
    plan = plan_of(job, rates, tile_samples=tile_samples)
    assert plan.task_count > 20 * kills, "enough tasks for so many"
    ooc_ntk.run(job, tmp_path / "reference", plan=plan, scheduler="serial", progress=False, proof=False)

    def kill():
        # Of those that have come far enough to be at work; the others would only take the test longer.
        processes = [process for process in worker_processes() if time.time() - process.create_time() > 3]
        if processes:
            victim = chance.choice(processes)
            with suppress(psutil.Error):
                victim.kill()
                killed.append(victim.pid)

    watch, done, begun = Watch(), threading.Event(), threading.Event()

    def often():
        begun.wait()
        while len(killed) < kills and not done.wait(chance.uniform(0.05, 0.5)):
            before = watch.amounts.total()
            kill()
            until = time.monotonic() + 20
            # The next one once there has been some progress, so that all of them fall into the run.
            while watch.amounts.total() == before and time.monotonic() < until and not done.wait(0.02):
                pass

    def advance(phase, amount):
        watch.advance(phase, amount)
        begun.set()

    thread = threading.Thread(target=often)
    thread.start()
    try:
        ooc_ntk.run(
            job,
            tmp_path / "run",
            plan=plan,
            scheduler=ooc_ntk.Cluster(workers=2),
            progress=Observer(watch.begin, advance, watch.said.append),
            proof=False,
        )
    finally:
        done.set()
        begun.set()
        thread.join()
    assert len(killed) == kills
    assert bits(tmp_path / "run") == bits(tmp_path / "reference")
    assert watch.amounts["rows"] == TRAIN + TEST
    assert watch.amounts["kernel"] == pytest.approx(plan.sample_grid.kernel_tile_count)


@pytest.mark.grid
def test_a_hung_worker_does_not_hold_the_run_up(job, plan, reference, tmp_path):
    stopped = []

    def hang(done):
        if done > 20 and not stopped:
            process = worker_processes()[0]
            process.suspend()
            stopped.append(process)

    watch = Watch(hang)
    ooc_ntk.run(
        job,
        tmp_path / "run",
        plan=plan,
        scheduler=ooc_ntk.Cluster(workers=2),
        progress=watch.observer,
        proof=False,
    )
    assert stopped
    assert bits(tmp_path / "run") == reference
    assert not worker_processes()


def test_a_worker_lost_for_good(job, plan, reference, tmp_path):
    with outside_cluster(tmp_path / "cluster", workers=2) as cluster:

        def lose(done):
            if done > 20 and cluster.workers[0].poll() is None:
                cluster.workers[0].kill()

        watch = Watch(lose)
        ooc_ntk.run(job, tmp_path / "run", plan=plan, scheduler=cluster.address, progress=watch.observer, proof=False)
        assert cluster.workers[0].poll() is not None
        assert cluster.workers[1].poll() is None
    assert bits(tmp_path / "run") == reference


@pytest.mark.grid
def test_a_worker_of_several_threads_does_one_task_at_a_time(job, plan, reference, tmp_path):
    with outside_cluster(tmp_path / "cluster", workers=0) as cluster:
        cluster.add_worker(threads=4)  # as 'dask worker' does where nothing is said
        ooc_ntk.run(job, tmp_path / "run", plan=plan, scheduler=cluster.address, progress=False, proof=False)
    assert bits(tmp_path / "run") == reference
    spans = sorted((entry["started"], entry["started"] + entry["seconds"]) for entry in receipts(tmp_path / "run"))
    assert all(first[1] <= second[0] + 1e-3 for first, second in itertools.pairwise(spans))


def test_all_workers_lost_and_the_scheduler_lost(job, plan, reference, tmp_path):
    out = tmp_path / "run"
    with outside_cluster(tmp_path / "first", workers=1) as cluster:
        watch = Watch(lambda done: done > 20 and cluster.workers[0].kill())
        with pytest.raises(ClusterError, match=r"no worker.*run the same command again"):
            ooc_ntk.run(
                job,
                out,
                plan=plan,
                scheduler=ooc_ntk.Cluster(cluster.address, patience=3.0),
                progress=watch.observer,
                proof=False,
            )
    done = {receipt["key"] for receipt in receipts(out)}
    assert any(key.startswith("kernel") for key in done)

    with outside_cluster(tmp_path / "second", workers=1) as cluster:
        watch = Watch(lambda more: more > 20 and cluster.scheduler.kill())
        with pytest.raises(ClusterError, match=r"connection to the scheduler was lost; finished tiles are kept"):
            ooc_ntk.run(job, out, scheduler=cluster.address, progress=watch.observer, proof=False)
    first = watch.totals["kernel"][0]
    assert first >= sum(key.startswith("kernel") for key in done), "nothing that was finished is done again"

    with outside_cluster(tmp_path / "third", workers=1) as cluster:
        watch = Watch()
        ooc_ntk.run(job, out, scheduler=cluster.address, progress=watch.observer, proof=False)
        assert watch.totals["kernel"][0] > first
    assert bits(out) == reference


COMMAND = """
import sys
import ooc_ntk
from tests.execution.cluster.laboratory import make_job
from pathlib import Path

if __name__ == "__main__":
    plan = ooc_ntk.Plan.load(sys.argv[2])
    job = make_job(Path(sys.argv[3]))
    ooc_ntk.run(job, sys.argv[1], plan=plan, scheduler=ooc_ntk.Cluster(workers=2), proof=False)
"""


def test_a_killed_driver_takes_its_workers_with_it_and_is_gone_on_from(job, plan, reference, folder, tmp_path):
    out, script = tmp_path / "run", tmp_path / "script.py"
    script.write_text(COMMAND)
    plan.save(tmp_path / "plan.json")
    words = [sys.executable, str(script), str(out), str(tmp_path / "plan.json"), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    with (tmp_path / "log").open("wb") as log:
        driver = subprocess.Popen(words, stdout=log, stderr=log, env=environment)
    try:
        until = time.monotonic() + 120
        while not (out / "receipts.jsonl").exists() or len(receipts(out)) < 30:
            assert driver.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < until
            time.sleep(0.02)
        workers = worker_processes(driver.pid)
        assert len(workers) == 2
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive, "workers whose driver is gone end by themselves"
    before = len(receipts(out))
    watch = Watch()
    ooc_ntk.run(job, out, scheduler="threads", progress=watch.observer, proof=False)
    assert bits(out) == reference
    assert watch.totals["rows"][0] + watch.totals["kernel"][0] > 0
    assert len(receipts(out)) >= before


BROKEN = """
import torch
from torch import nn


class Breaks(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(64, 10)
        self.calls = 0

    def forward(self, x):
        from distributed import get_worker

        try:
            name = get_worker().name
        except ValueError:  # the driver
            name = None
        if str(name) == "0":
            self.calls += 1
            if self.calls > 12:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return self.layer(x.flatten(1))


def model():
    return Breaks().eval()
"""


def test_a_worker_with_a_broken_device_is_retired(folder, rates, tmp_path, caplog):
    (tmp_path / "breaks.py").write_text(BROKEN)
    job = ooc_ntk.Job(model=f"{tmp_path}/breaks.py:model", train=str(folder / "train.npy"), device="cpu", batch_size=2)
    plan = plan_of(job, rates)
    ooc_ntk.run(job, tmp_path / "here", plan=plan, scheduler="serial", progress=False, proof=False)
    ooc_ntk.run(job, tmp_path / "there", plan=plan, scheduler=ooc_ntk.Cluster(workers=2), progress=False, proof=False)
    assert bits(tmp_path / "there") == bits(tmp_path / "here")
    assert "cannot use its device any more" in caplog.text
    assert "it is retired" in caplog.text
    last = [receipt["worker"] for receipt in receipts(tmp_path / "there") if receipt["key"].startswith("kernel")]
    assert set(last) == {"1"}


def test_an_error_of_a_task_ends_the_run_with_its_own_words(folder, rates, tmp_path):
    data = np.load(folder / "train.npy")[:60]
    job = ooc_ntk.Job(model=make_job(folder).model, train=data, device="cpu")
    plan = plan_of(job, rates)
    data[31, 0, 2, 2] = np.nan
    wrong = ooc_ntk.Job(model=make_job(folder).model, train=data, device="cpu")
    with pytest.raises(InputError, match="train sample 31"):
        ooc_ntk.run(
            wrong,
            tmp_path / "run",
            preferences=ooc_ntk.Preferences(dataflow="spill", tile_samples=10),
            scheduler=ooc_ntk.Cluster(workers=2),
            progress=False,
        )
    assert plan.task_count
    assert not worker_processes()


@pytest.mark.parametrize(
    "kind",
    [
        "projected",
        *(pytest.param(kind, marks=pytest.mark.grid) for kind in ("live and by layer", "two threads", "extended")),
    ],
)
def test_other_jobs_have_the_same_bits_too(folder, rates, tmp_path, kind):
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 24), torch.nn.Tanh(), torch.nn.Linear(24, 5))
    data = np.load(folder / "train.npy")
    job = ooc_ntk.Job(module.eval(), data[:100], data[100:117], device="cpu")
    threads = 2 if kind == "two threads" else 1
    more = {}
    if kind == "projected":
        job = ooc_ntk.Job(module.eval(), data[:100], data[100:117], device="cpu", projection="gaussian:64")
    if kind == "live and by layer":
        job = ooc_ntk.Job(module.eval(), data[:100], data[100:117], device="cpu", by="layer")
    if kind == "two threads":
        module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 700), torch.nn.Tanh()).eval()
        job = ooc_ntk.Job(module, data, device="cpu", kernel="pseudo")
        more = {"tile_samples": 65}
    import dataclasses

    plan = dataclasses.replace(plan_of(job, rates, **more), threads=threads)
    one, other = tmp_path / "one", tmp_path / "other"
    cluster = ooc_ntk.Cluster(workers=2)
    for out, scheduler in ((one, "serial"), (other, cluster)):
        ooc_ntk.run(job, out, plan=plan, scheduler=scheduler, progress=False, proof=False)
        if kind == "extended":
            ooc_ntk.extend(out, data[117:], job=job, scheduler=scheduler, progress=False, proof=False)
    if kind != "extended":
        assert bits(one) == bits(other)
    else:
        ours, theirs = np.asarray(ooc_ntk.open(other)), np.asarray(ooc_ntk.open(one))
        assert ours.shape == (130, 113)
        assert np.linalg.norm(ours - theirs) <= 1e-6 * np.linalg.norm(theirs)


def test_a_plan_for_one_process_is_refused(job, rates, tmp_path):
    plan = plan_of(job, rates, dataflow="resident", workers=None, superblock_tiles=None)
    with pytest.raises(RunConflictError, match=r"in the memory of one process .*start anew in another --out"):
        ooc_ntk.run(job, tmp_path / "run", plan=plan, scheduler=ooc_ntk.Cluster(workers=2), progress=False)
    assert not (tmp_path / "run" / "plan.json").exists()


def test_live_objects_that_cannot_travel(folder, rates, tmp_path):
    class Locked(torch.nn.Linear):
        def __init__(self):
            super().__init__(64, 3)
            self.lock = threading.Lock()

        def forward(self, x):
            return super().forward(x.flatten(1))

    job = ooc_ntk.Job(Locked().eval(), str(folder / "train.npy"), device="cpu")
    plan = plan_of(job, rates)
    with pytest.raises(InputError, match=r"cannot be sent to worker processes.*file\.py:factory"):
        ooc_ntk.run(job, tmp_path / "run", plan=plan, scheduler=ooc_ntk.Cluster(workers=1), progress=False)


def test_no_scheduler_there(job, plan, tmp_path):
    with pytest.raises(InputError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:9 "):
        ooc_ntk.run(job, tmp_path / "run", plan=plan, scheduler="tcp://127.0.0.1:9", progress=False)


@pytest.mark.grid
def test_tasks_at_work_are_not_called_slow_before_any_is_done(tmp_path):
    from bench.cluster import Sleeping, nothing, sleeping_tasks
    from ooc_ntk.execution.cluster.dispatch import SLOW_SECONDS, Dispatcher
    from ooc_ntk.execution.cluster.start import client_of

    class Counted(Sleeping):
        def arguments(self, task):
            begun.append(task)
            return super().arguments(task)

    begun: list = []
    with client_of(ooc_ntk.Cluster(workers=3), 1) as client:
        job = Counted(SLOW_SECONDS + 2)
        Dispatcher(client, job, 60).run(sleeping_tasks(2), nothing)
    assert job.done == 2
    assert len(begun) == 2, "each was handed out once"


@pytest.mark.grid
def test_the_session_of_a_killed_driver_is_forgotten(job, plan, reference, folder, tmp_path):
    """On a cluster that goes on: its workers would keep the model and the buffers of a run that nobody waits for."""
    from distributed import Client

    def sessions(dask_scheduler):
        return [name for name in dask_scheduler.worker_plugins if name.startswith("ooc-ntk")]

    script, out = tmp_path / "script.py", tmp_path / "run"
    plan.save(tmp_path / "plan.json")
    with outside_cluster(tmp_path / "cluster", workers=1) as cluster:
        script.write_text(COMMAND.replace("ooc_ntk.Cluster(workers=2)", repr(cluster.address)))
        words = [sys.executable, str(script), str(out), str(tmp_path / "plan.json"), str(folder)]
        with (tmp_path / "log").open("wb") as log:
            environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
            driver = subprocess.Popen(words, stdout=log, stderr=log, env=environment)
        until = time.monotonic() + 120
        while not (out / "receipts.jsonl").exists() or len(receipts(out)) < 20:
            assert driver.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < until
            time.sleep(0.02)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        with Client(cluster.address, set_as_default=False) as client:
            (left,) = client.run_on_scheduler(sessions)
            ooc_ntk.run(job, out, scheduler=cluster.address, progress=False, proof=False)
            assert left not in client.run_on_scheduler(sessions)
            assert not client.run_on_scheduler(sessions), "nor is that of the run that has ended kept"
    assert bits(out) == reference
