"""What worker processes cost and bring: scheduling overhead, memory of driver and scheduler, two workers over one.

``python -m bench.cluster`` runs, one after another:

* ``overhead``: tasks that only sleep 2 s each, on two workers: wall seconds over those that the sleeping takes (bar: 3%
  more);
* ``memory``: tasks that only sleep, 100,000 of them: what driver and scheduler, which are one process, take more than
  when they were idle (bar: 300 MB);
* ``scaling``: the exact kernel of a small convolutional network by one single-thread worker and by two, in turns: the
  ratio of their seconds from the start of the first task to the end of the last (bar: 1.7).
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import psutil
import torch
from distributed import get_worker

import ooc_ntk
from ooc_ntk.execution.cluster.dispatch import Dispatcher
from ooc_ntk.execution.cluster.options import Cluster
from ooc_ntk.execution.cluster.start import client_of
from ooc_ntk.planning.tasks import Task
from ooc_ntk.storage.manifest import Manifest, Receipt

from .bars import Bar, checked
from .contenders import OURS
from .exact import machine
from .process import ROOT
from .records import Finding, Record, texts
from .registry import part
from .table import aligned

#: Share of the wall that handing out may cost, bytes that 100,000 tasks may take, and what a second worker brings.
OVERHEAD, MEMORY, SCALING = 0.03, 300e6, 1.7

#: What a part of ``python -m bench`` judges, and its tasks of ``overhead``.
FIGURES, PART_TASKS = ("wall / sleeping − 1", "one worker / two workers, seconds"), 20


def sleep_there(session: str, key: str, seconds: float) -> None:
    """A task that only sleeps, and sends the receipt that a real one would."""
    started = time.time()
    time.sleep(seconds)
    worker = get_worker()
    receipt = Receipt(key, time.time() - started, started=started, worker=str(worker.name))
    worker.log_event(session, {"task": key, "receipt": receipt.to_json()})


class Sleeping:
    """Work of a dispatcher: tasks that only sleep. See :class:`ooc_ntk.execution.cluster.dispatch.Job`."""

    function = staticmethod(sleep_there)

    def __init__(
        self,
        seconds: float,
        watch: Callable[[int], None] = lambda done: None,  # noqa: ARG005
        manifest: Manifest | None = None,
    ) -> None:
        """Sleep so long in each; ``watch`` is told how many are done, and receipts are committed to a manifest."""
        self.session = f"bench-{uuid.uuid4().hex[:8]}"
        self.seconds, self.done, self._watch, self._manifest = seconds, 0, watch, manifest

    def weight(self, task: Task) -> float:
        """All are alike."""
        del task
        return 1.0

    def arguments(self, task: Task) -> tuple[Any, ...]:
        """What the function is called with."""
        return self.session, task.key, self.seconds

    def commit(self, task: Task, receipt: Receipt) -> None:
        """Count a task and commit its receipt."""
        del task
        if self._manifest is not None:
            self._manifest.commit(receipt)
        self.done += 1
        self._watch(self.done)

    def reached(self, task: Task, done: float) -> None:
        """Nothing is told."""

    def check_stop(self) -> None:
        """Nothing stops it."""

    def say(self, text: str) -> None:
        """Print it."""
        print(f"  {text}")

    def stop(self, workers: list[str] | None, key: str | None) -> None:
        """Nothing has to."""


def nothing(task: Task) -> tuple[Task, ...]:
    """What a task waits for."""
    del task
    return ()


def sleeping_tasks(count: int) -> list[Task]:
    """So many tasks that wait for nothing."""
    return [Task("kernel", 0, index, 0) for index in range(count)]


def overhead(smoke: bool, workers: int = 2, count: int = 60) -> list[Finding]:
    """Wall seconds of sleeping tasks beside what the sleeping takes."""
    count, seconds = (6, 0.2) if smoke else (count, 2.0)
    with tempfile.TemporaryDirectory() as folder, client_of(Cluster(workers=workers), 1) as client:
        job = Sleeping(seconds, manifest=Manifest(Path(folder)))
        Dispatcher(client, Sleeping(0.0), 60).run(sleeping_tasks(workers), nothing)  # everything is imported
        dispatcher = Dispatcher(client, job, 60)
        start = time.perf_counter()
        dispatcher.run(sleeping_tasks(count), nothing)
        wall = time.perf_counter() - start
    least = count * seconds / workers
    share = wall / least - 1
    return [
        f"overhead: {count} tasks of {seconds} s on {workers} workers: {wall:.2f} s, the sleeping alone {least:.2f} s",
        checked(FIGURES[0], share, OVERHEAD, smoke),
    ]


def memory(smoke: bool, workers: int = 4) -> list[Finding]:
    """What so many tasks take of the process that is driver and scheduler."""
    count, seconds = (200, 0.0) if smoke else (100_000, 0.001)
    process, peaks = psutil.Process(), [0]

    def watch(done: int) -> None:
        if done % 500 == 1:
            peaks.append(process.memory_info().rss)

    with client_of(Cluster(workers=workers), 1) as client:
        Dispatcher(client, Sleeping(0.0), 60).run(sleeping_tasks(2 * workers), nothing)
        time.sleep(1.0)
        idle = process.memory_info().rss
        job, tasks = Sleeping(seconds, watch), sleeping_tasks(count)
        start = time.perf_counter()
        Dispatcher(client, job, 60).run(tasks, nothing)
        wall = time.perf_counter() - start
    more = max(peaks) - idle
    return [
        f"memory: {count:,} tasks of {seconds} s on {workers} workers: idle {idle / 1e6:.0f} MB, peak "
        f"{max(peaks) / 1e6:.0f} MB, {count / wall:.0f} tasks/s",
        checked("peak − idle, MB", more / 1e6, MEMORY / 1e6, smoke),
    ]


def product_rate(seconds: float, gate: Any, rates: Any) -> None:
    """Products of one thread per second, into a queue; begun when everyone is ready."""
    torch.set_num_threads(1)
    rows = torch.randn(512, 4096)
    rows @ rows.T
    gate.wait()
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        rows @ rows.T
        count += 1
    rates.put(count / (time.perf_counter() - start))


def ceiling(seconds: float) -> float:
    """Rate of products of two single-thread processes at once over that of one: what the machine's cores give."""
    found, context = {}, multiprocessing.get_context("spawn")
    for count in (1, 2):
        gate, rates = context.Barrier(count), context.Queue()
        children = [context.Process(target=product_rate, args=(seconds, gate, rates)) for _ in range(count)]
        for child in children:
            child.start()
        found[count] = sum(rates.get() for _ in children)
        for child in children:
            child.join()
    return found[2] / found[1]


def scaling(smoke: bool, repeats: int = 3, *, plain: bool = True) -> list[Finding]:
    """Two single-thread workers over one, on the same plan."""
    found: list[Finding] = []
    samples, tile = (40, 10) if smoke else (1600, 200)
    job = ooc_ntk.Job("bench.models:convolutional", f"mnist5k[0:{samples}]", device="cpu", base=ROOT)
    preferences = ooc_ntk.Preferences(dataflow="spill", tile_samples=tile, superblock_tiles=1, workers=2)
    table, ratios, ceilings = [("workers", "tasks s", "with start s", "tasks", "busy")], [], []
    with tempfile.TemporaryDirectory() as folder:
        plan = ooc_ntk.plan(job, preferences=preferences)
        assert plan.threads == 1 or smoke
        for repeat in range(1 if smoke else repeats):
            took = {}
            if plain:
                ceilings.append(ceiling(0.1 if smoke else 3.0))
            for workers in (1, 2):
                out = Path(folder) / f"{repeat}-{workers}"
                start = time.perf_counter()
                ooc_ntk.run(job, out, plan=plan, scheduler=Cluster(workers=workers), progress=False, proof=False)
                whole = time.perf_counter() - start
                receipts = [receipt for receipt in receipts_of(out) if receipt.worker]
                last = max(receipt.started + receipt.seconds for receipt in receipts)
                took[workers] = last - min(receipt.started for receipt in receipts)
                busy = sum(receipt.seconds for receipt in receipts) / workers / took[workers]
                row = (str(workers), f"{took[workers]:.2f}", f"{whole:.2f}", str(len(receipts)), f"{busy:.0%}")
                table.append(row)
                found.append(
                    Record(
                        f"CNN, N = {samples:,}, C = 10, {plan.task_count} tasks",
                        f"{OURS}, {workers} single-thread worker{'s' if workers > 1 else ''}",
                        took[workers],
                        samples,
                        "cluster",
                        ratio=took[workers] / took[1],
                        moved_bytes=sum(receipt.bytes_read + receipt.bytes_written for receipt in receipts),
                        figures={"workers": workers, "busy": busy},
                        remark=f"with start {whole:.1f} s",
                    )
                )
            ratios.append(took[1] / took[2])
    ratio = statistics.median(ratios)
    return [
        *found,
        f"scaling: trace kernel of a convolutional network, N = {samples:,}, C = 10, P = {plan.columns:,}, "
        f"{plan.task_count} tasks, one thread each, in turns",
        *aligned(table),
        f"  {', '.join(f'{each:.2f}' for each in ratios)}; two processes of plain products at once over one, before "
        f"each: {', '.join(f'{each:.2f}' for each in ceilings) or 'not measured'}",
        checked(FIGURES[1], ratio, SCALING, smoke, at_least=True),
    ]


def receipts_of(out: Path) -> list[Receipt]:
    """Receipts of all tasks that a run has committed."""
    manifest = Manifest(out, read_only=True)
    try:
        return list(manifest.receipts().values())
    finally:
        manifest.close()


PARTS: Final = {"overhead": overhead, "memory": memory, "scaling": scaling}


@part(
    "cluster",
    "Worker processes",
    seconds=75,
    limit_seconds=300,
    bars=(Bar(FIGURES[0], OVERHEAD), Bar(FIGURES[1], SCALING, at_least=True)),
    results="cluster",
)
def measure(smoke: bool) -> Iterator[Finding]:
    """Parts ``overhead`` and ``scaling``, fewer times."""
    yield from scaling(smoke, repeats=1, plain=not smoke)
    if not smoke:
        yield from overhead(smoke, count=PART_TASKS)


def main(arguments: list[str] | None = None) -> int:
    """Run the parts that are asked for and print their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, for the tests")
    given = parser.parse_args(arguments)
    print(", ".join(f"{name} {value}" for name, value in machine(1).items()))
    for name in given.parts:
        print()
        for line in texts(PARTS[name](given.smoke)):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
