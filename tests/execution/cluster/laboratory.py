"""What the tests of clusters share: one small job, its plan, its bits, and processes of a cluster to be killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
from sklearn.datasets import load_digits

import ooc_ntk
from ooc_ntk.planning.rates import MachineRates
from tests.execution.kill_child import make_job

TRAIN, TEST = 130, 22


def write_data(folder: Path) -> Path:
    """Real digits, as the job reads them."""
    images = (load_digits().images[: TRAIN + TEST, None] / 16).astype(np.float32)
    np.save(folder / "train.npy", images[:TRAIN])
    np.save(folder / "test.npy", images[TRAIN:])
    return folder


def plan_of(job: ooc_ntk.Job, rates: MachineRates, **more: object) -> ooc_ntk.Plan:
    """A spilled plan of many small tasks, for one thread."""
    preferences = {"dataflow": "spill", "tile_samples": 10, "superblock_tiles": 1, "workers": 1, **more}
    if job.projection is not None:
        del preferences["dataflow"]
    return ooc_ntk.plan(
        job,
        ooc_ntk.Budget(host="16GiB", disk="1GiB"),
        preferences=ooc_ntk.Preferences(**preferences),
        rates=rates,
    )


def bits(out: Path) -> dict[str, bytes]:
    """Every stored tile of what a run leaves."""
    found = {
        path.relative_to(out).as_posix(): path.read_bytes()
        for name in ("kernel.zarr/c", "diagonal/c", "features.zarr/c", "layers.zarr/c")
        for path in (out / name).rglob("*")
        if path.is_file()
    }
    assert found
    return found


def worker_processes(parent: int | None = None) -> list[psutil.Process]:
    """Worker processes that nannies of a process have begun, those that are there by now."""
    found = []
    for child in psutil.Process(parent).children(recursive=True):
        with suppress(psutil.Error):
            words = " ".join(child.cmdline())
            if "spawn_main" in words and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
    return found


@contextmanager
def outside_cluster(folder: Path, workers: int = 2, port: int = 0) -> Iterator[OutsideCluster]:
    """A scheduler and workers that this process has not begun, without nannies."""
    cluster = OutsideCluster(folder, port)
    try:
        for _ in range(workers):
            cluster.add_worker()
        yield cluster
    finally:
        cluster.close()


class OutsideCluster:
    """Processes of a cluster, each by its command line."""

    def __init__(self, folder: Path, port: int = 0) -> None:
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self._file = folder / "scheduler.json"
        self._file.unlink(missing_ok=True)
        self.workers: list[subprocess.Popen[bytes]] = []
        options = ["--host", "127.0.0.1", "--port", str(port), "--dashboard-address", "127.0.0.1:0"]
        self.scheduler = self._start("scheduler", *options, "--scheduler-file", str(self._file))
        deadline = time.monotonic() + 60
        while not self._file.exists():
            assert time.monotonic() < deadline, "the scheduler did not start"
            assert self.scheduler.poll() is None, (folder / "log").read_text()
            time.sleep(0.05)
        import json

        time.sleep(0.1)
        self.address = json.loads(self._file.read_text())["address"]

    def _start(self, what: str, *words: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path[:1]])}
        with (self._folder / "log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", f"distributed.cli.dask_{what}", *words],
                stdout=log,
                stderr=log,
                env=environment,
                cwd=Path.cwd(),
            )

    def add_worker(self, threads: int = 1) -> None:
        """Begin a worker process."""
        options = ["--nthreads", str(threads), "--no-nanny", "--memory-limit", "0", "--no-dashboard"]
        self.workers.append(self._start("worker", self.address, *options, "--local-directory", str(self._folder)))

    def close(self) -> None:
        """End everything."""
        for process in (*self.workers, self.scheduler):
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()


__all__ = ["OutsideCluster", "bits", "make_job", "outside_cluster", "plan_of", "worker_processes", "write_data"]
