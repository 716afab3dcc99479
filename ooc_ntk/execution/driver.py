"""The driver: opens or resumes a run, hands tasks to an executor, and alone commits what they return."""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import zarr

from ooc_ntk.compute.structure import Structure
from ooc_ntk.errors import BudgetError, DamagedFileError, RunConflictError, RunInterrupted, StorageError
from ooc_ntk.planning.budget import Budget
from ooc_ntk.planning.plan import Plan
from ooc_ntk.planning.planner import FLAGS, format_up
from ooc_ntk.stopping import Stop, stoppable
from ooc_ntk.storage.arrays import add_attributes
from ooc_ntk.storage.directory import RunDirectory
from ooc_ntk.storage.manifest import Manifest, Receipt
from ooc_ntk.storage.mirror import claim_store, write_mirror
from ooc_ntk.storage.swap import HISTORY, cut_off
from ooc_ntk.units import format_bytes

from .calibration import reads_directly
from .context import KERNEL, PeakMeter, RunContext, reproducible
from .executors import Executor, Work
from .layers import layers_array
from .ledger import Advance, Ledger, amount_of
from .measure import known_structure, structure_of
from .prepare import PreparedJob, with_head
from .resume import Remaining, remaining_tasks
from .stores import FACTORS, FEATURES, JACOBIAN, DiskStore, store_of

logger = logging.getLogger(__name__)

#: Called once before work starts, with the amount of each phase that was done before and in all.
Begin = Callable[[Mapping[str, tuple[float, float]], Remaining], None]

#: How often one session computes damaged files again before it gives up (chosen: a disk that damages more is broken).
REPAIRS: Final = 3

#: Names of the parts of a job's digest, as errors call them.
DIGEST_PARTS: Final = {"model": "model", "data": "data", "kernel": "kernel settings"}


@dataclass(frozen=True)
class Observer:
    """Who wants to know how a run gets on.

    Attributes:
        begin: called once, before the first task.
        advance: called as work gets done, from the task's thread.
        say: told what goes on beside the tasks, for people, such as the proof at the end.
    """

    begin: Begin = lambda totals, remaining: None  # noqa: ARG005
    advance: Advance = lambda phase, amount: None  # noqa: ARG005
    say: Callable[[str], None] = lambda text: None  # noqa: ARG005


def check_same_job(
    directory: RunDirectory,
    digests: Mapping[str, str],
    advice: str = "choose another --out, nothing was changed",
) -> None:
    """Refuse a run directory that was made for another job.

    Args:
        directory: an existing run.
        digests: this job's digests by part.
        advice: what to do then.

    Raises:
        RunConflictError: saying which part differs; nothing is overwritten.
    """
    manifest = Manifest(directory.root, read_only=True)
    try:
        stored: dict[str, str] = json.loads(manifest.meta("job") or "{}")
        grown = manifest.meta(HISTORY)
    finally:
        manifest.close()
    differing = [name for name in digests if stored.get(name) != digests[name]]
    if differing:
        details = ", ".join(
            f"{DIGEST_PARTS.get(name, name)} (there {stored.get(name, 'unknown')[:8]}, here {digests[name][:8]})"
            for name in differing
        )
        if grown and differing == ["data"]:
            advice = f"it was grown, and ooc-ntk run --out {directory.root} goes on with all samples; or {advice}"
        raise RunConflictError(f"{directory.root} holds a run of another job: {details} differ; {advice}")


def check_budget(plan: Plan, budget: Budget | None, processes: int = 0) -> None:
    """Refuse to resume under an explicit budget that the stored plan cannot keep.

    Args:
        plan: the plan.
        budget: limits, if any are asked for.
        processes: worker processes that share the host memory; 0 where this one does all.

    Raises:
        BudgetError: naming promise and budget.
    """
    promises = {
        "host": plan.host_bytes(processes),
        "device": plan.promised.device_bytes,
        "disk": plan.promised.disk_bytes,
    }
    for name, promised in promises.items():
        limit = getattr(budget, name) if budget is not None else None
        if limit is not None and promised > int(limit):
            raise BudgetError(
                f"the stored plan of this run promises a peak of {format_bytes(promised)} of {name} memory"
                f"{f' with {processes} worker processes' if processes > 1 and name == 'host' else ''}, the budget is "
                f"{format_bytes(int(limit))}; raise {FLAGS[name]} to {format_up(promised)} or more, or start anew in "
                "another --out"
            )


def create_run(
    directory: RunDirectory,
    plan: Plan,
    job: str,
    digests: Mapping[str, str],
    sketch: str = "",
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write plan, job and manifest of a new run; the plan last, as the mark that the run exists.

    Args:
        directory: the locked run directory.
        plan: the plan.
        job: text of the job file.
        digests: the job's digests by part.
        sketch: digest of what features must share to be multiplied, empty for an exact kernel.
        notes: further texts for the manifest, by name.

    Raises:
        BudgetError: if the disk has less room than the plan needs.
        RunConflictError: if tiles of an unknown plan are there.
    """
    free = directory.files.free_bytes()
    if free is not None and plan.promised.disk_bytes > free:
        raise BudgetError(
            f"the run needs up to {format_bytes(plan.promised.disk_bytes)} of disk, {format_bytes(free)} are free at "
            f"{directory.files.place('')}; make room or choose another --out"
        )
    manifest = Manifest(directory.root)
    try:
        if manifest.receipts() or directory.pending_receipts():
            raise RunConflictError(
                f"{directory.root} holds finished tiles but no plan.json, so it is unknown whose they are; restore the "
                "plan or choose another --out"
            )
        claim_store(directory, manifest)
        texts = {"job": json.dumps(dict(digests)), "plan": plan.digest, "sketch": sketch}
        made = {"versions": json.dumps(versions()), "machine": machine()}
        manifest.set_metas({**texts, **made, **(notes or {})})
    finally:
        manifest.close()
    directory.write_text(directory.job_path, job)
    directory.write_text(directory.plan_path, plan.to_json() + "\n")


def versions() -> dict[str, str]:
    """Versions of what computes and stores."""
    return {"torch": torch.__version__, "numpy": np.__version__, "zarr": zarr.__version__}


def machine() -> str:
    """The machine of the driver, and the Python that runs there, for people."""
    processors = os.cpu_count() or 1
    return f"{platform.node()}, {platform.machine()} with {processors} processors, Python {platform.python_version()}"


def execute(
    plan: Plan,
    directory: RunDirectory,
    prepared: PreparedJob,
    executor: Executor,
    observer: Observer | None = None,
    *,
    watch_disk: int = 0,
) -> float:
    """Run what is left of a run that exists; the caller holds its lock.

    A file that turns out to be damaged in the middle is computed again, as in a new session.

    Args:
        plan: the stored plan.
        directory: the run directory.
        prepared: the job, loaded.
        executor: runs the tasks.
        observer: told about progress.
        watch_disk: free bytes below which the run stops; 0 lets it fill the disk.

    Returns:
        Seconds that the tasks of this session took, 0 if nothing was left to do.

    Raises:
        OocNtkError: whatever a task raises; finished tiles stay committed.
    """
    observer = observer or Observer()
    executor.check(plan)
    if plan.head is not None:
        prepared = with_head(prepared, plan.head.name)
    manifest = Manifest(directory.root, directory.files)
    try:
        claim_store(directory, manifest)
        seconds = 0.0
        with stoppable() as stop:
            for repairs in range(REPAIRS, -1, -1):
                session = _Session(plan, directory, prepared, executor, observer, manifest, stop, watch_disk)
                damaged = session.run(last=not repairs)
                seconds += session.seconds
                if damaged is None:
                    break
                logger.warning("%s; computing it again now", damaged)
                # Nobody is told twice how much there is to do.
                observer = Observer(advance=observer.advance)
            if stop.event.is_set():  # after the last task had looked
                raise RunInterrupted("stopped; all tiles are finished, the same command ends the run", stop.signal)
        _keep_batches(plan, directory, manifest)
        write_mirror(directory, manifest)
        _sweep_away(directory)
        if executor.processes:
            directory.sweep()  # what workers that died were writing
        return seconds
    except BaseException:
        with suppress(OSError):
            directory.sweep()
        raise
    finally:
        manifest.close()


@dataclass
class _Session:
    """What is left of a run, from finding it to the last commit. Fields are as in :func:`execute`."""

    plan: Plan
    directory: RunDirectory
    prepared: PreparedJob
    executor: Executor
    observer: Observer
    manifest: Manifest
    stop: Stop
    watch_disk: int
    seconds: float = 0.0  # that its tasks took

    def run(self, *, last: bool) -> str | None:
        """Run what is left.

        Args:
            last: whether a damaged file is raised.

        Returns:
            What is wrong with a damaged file, which the next session computes again; None when all is done.

        Raises:
            OocNtkError: whatever a task raises.
        """
        plan, directory, manifest, observer = self.plan, self.directory, self.manifest, self.observer
        records = manifest.files()
        direct = reads_directly(plan.device, plan.promised.disk_bytes)
        store = store_of(plan, directory.files, records, direct=direct)
        remaining = remaining_tasks(plan, directory, manifest, store, records)
        receipts = manifest.receipts()  # with those that were adopted
        if not remaining.tasks:
            observer.begin(_totals(plan, remaining), remaining)
            return None
        meter = PeakMeter(children=not self.executor.processes)
        context = RunContext(
            plan,
            directory,
            self.prepared.function,
            self.prepared.reader,
            store,
            self.stop,
            meter,
            observer.advance,
            _known_digests(receipts.values()),
            records,
            remaining.again,
            planned_structure(plan, self.prepared),
            self.watch_disk,
            min((receipt.batch_size for receipt in receipts.values() if receipt.batch_size), default=0),
        )
        create_arrays(context, manifest)
        waits = remaining.waits(plan)
        observer.begin(_totals(plan, remaining), remaining)
        ledger, tasks = Ledger(plan, observer.advance), {task.key: task for task in remaining.tasks}
        last_commit = began = 0.0

        def commit(receipt: Receipt) -> None:
            nonlocal last_commit
            now = time.perf_counter()
            if not self.executor.processes:
                # One after the other: what passed since the last commit is this task, syncing and committing too.
                receipt = replace(receipt, seconds=now - last_commit)
            last_commit = now
            if receipt.key.startswith("release"):
                # Forgotten before the release counts: a crash in between leaves the release to be done again.
                for folder in (JACOBIAN, FACTORS):
                    manifest.forget_files(folder)
            manifest.commit(receipt)
            records.update({record.path: record for record in receipt.files})
            directory.log_receipt(receipt)
            directory.drop_receipt(receipt.key)
            directory.delete(*receipt.replaces)
            if receipt.key.startswith("release"):
                _delete_spilled(directory, records)
                with _optional("copying the run's papers into its store"):
                    write_mirror(directory, manifest)
            ledger.finished(tasks[receipt.key])
            logger.debug("%s: %.2f s", receipt.key, receipt.seconds)

        work = Work(context, self.prepared, remaining.tasks, waits.__getitem__, commit, ledger, observer.say)
        with reproducible(plan), meter.watching():
            began = last_commit = time.perf_counter()
            try:
                self.executor.run(work)
            except DamagedFileError as error:
                manifest.distrust([error.path])
                if last:
                    raise
                return _brief(error)
            finally:
                self.seconds = last_commit - began
        for path, reason in manifest.damage(thorough=False).reasons.items():  # something else changed it meanwhile
            changed = DamagedFileError(
                path, f"{directory.files.place(path)} {reason}; run again: it will be computed anew"
            )
            if last:
                raise changed
            return _brief(changed)
        return None


@contextmanager
def _optional(what: str) -> Iterator[None]:
    """Do what a run can go on without."""
    try:
        yield
    except StorageError as error:
        logger.warning("%s is left out this time: %s", what, error)


def _brief(error: DamagedFileError) -> str:
    """What is wrong with a file, without what to do about it."""
    return str(error).partition(";")[0]


def planned_structure(plan: Plan, prepared: PreparedJob) -> Structure:
    """What layer rules derive under a plan.

    Args:
        plan: the plan.
        prepared: the job, loaded.

    Returns:
        The structure that planning found, or, where a stored plan is run, one found and compared with autograd now.

    Raises:
        RunConflictError: if the model's layers are not those of the plan.
    """
    ruled = [block for block in plan.blocks if block.source == "rule"]
    if not ruled:
        return Structure()
    structure = prepared.function.structure or known_structure(prepared) or _structure_now(plan, prepared)
    for block in ruled:
        layers = [structure.layers.get(name) for name in block.parameters]
        same = all(layer is not None for layer in layers)
        if block.factors is not None:
            shapes = layers[0].factors if layers[0] is not None else None
            same = same and shapes is not None and replace(shapes, matches=block.factors.matches) == block.factors
        if not same:
            raise RunConflictError(
                f"the plan derives block {block.name or '(model)'!r} by a layer rule that does not fit the model here; "
                "make a new plan in another --out"
            )
    return structure


def _structure_now(plan: Plan, prepared: PreparedJob) -> Structure:
    with reproducible(plan):
        return structure_of(prepared, plan.rows_per_sample)


def _known_digests(receipts: Any) -> dict[int, str]:
    """Digests of sample ranges by row tile, as far as any committed task read them."""
    return {
        int(receipt.key.split("-")[2]): receipt.samples_digest
        for receipt in receipts
        if receipt.samples_digest is not None
    }


def _totals(plan: Plan, remaining: Remaining) -> dict[str, tuple[float, float]]:
    """Amounts done before and in all, per phase: samples × passes, and kernel tiles."""
    passes = len(plan.passes)
    left = {"rows": 0.0, "kernel": 0.0}
    for task in remaining.tasks:
        if task.kind in left:
            left[task.kind] += amount_of(plan, task)
    tiles = 0 if plan.features_only else plan.sample_grid.kernel_tile_count
    totals = {"rows": float(plan.samples * passes), "kernel": float(tiles)}
    return {phase: (totals[phase] - left[phase], totals[phase]) for phase in totals}


def create_arrays(context: RunContext, manifest: Manifest) -> None:
    """Write the metadata of every array; the kernel carries its provenance."""
    plan = context.plan
    attributes = {
        "kernel": plan.kernel,
        "scale": plan.scale,
        "normalize": plan.normalize,
        "precision": plan.precision,
        "train_samples": plan.train_samples,
        "test_samples": plan.test_samples,
        "outputs": plan.outputs,
        "entries_per_sample": plan.entries_per_sample,
        "seed": plan.seed,
        "plan_digest": plan.digest,
        "job_digests": json.loads(manifest.meta("job") or "{}"),
        "versions": versions(),
    }
    history = json.loads(manifest.meta(HISTORY) or "[]")
    if history:
        attributes[HISTORY] = history
    if plan.projection is not None:
        attributes["projection"] = plan.projection.identity
        attributes["parameters"] = plan.columns
        attributes["sketch"] = manifest.meta("sketch")
    if not plan.features_only:
        context.kernel_array.create(attributes)
    context.diagonal_array.create()
    if plan.layers:
        layers_array(context.kernel_array, len(plan.layers)).create({**attributes, "layers": list(plan.layers)})
    if isinstance(context.store, DiskStore):
        context.store.create(attributes)


def _keep_batches(plan: Plan, directory: RunDirectory, manifest: Manifest) -> None:
    """Note in the finished kernel which rows were derived in smaller batches than planned, if any were."""
    smaller = [
        [*(int(part) for part in receipt.key.split("-")[1:3]), receipt.batch_size]
        for receipt in manifest.receipts().values()
        if receipt.batch_size
    ]
    if smaller:
        name = FEATURES if plan.features_only else KERNEL
        add_attributes(directory.files, name, {"batch_size": plan.batch_size, "micro_batches": sorted(smaller)})


def _sweep_away(directory: RunDirectory) -> None:
    """Delete what only an unfinished run needs."""
    for folder in ("tiles", "pending"):
        directory.delete_folder(folder)


def _delete_spilled(directory: RunDirectory, records: dict[str, Any]) -> None:
    """Delete the spilled tiles of a finished pass."""
    for path in [path for path in records if path.startswith((JACOBIAN, FACTORS))]:
        del records[path]
    for folder in (JACOBIAN, FACTORS):
        directory.delete_folder(folder)


def run_directory(path: str | Path, store: str | None = None) -> RunDirectory:
    """The run directory at a path, checked to be a run or usable for one.

    Args:
        path: its folder.
        store: URL of the store that its tiles go to; None is the one of a run that is there, or the folder itself.

    Raises:
        InputError: if the URL is none.
        RunConflictError: if other files are there.
        StorageError: if a kernel is missing there because a swap was cut off.
    """
    missing = cut_off(path)
    if missing is not None:
        raise missing
    directory = RunDirectory(path, store)
    directory.check_usable()
    return directory
