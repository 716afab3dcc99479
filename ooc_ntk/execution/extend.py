"""Growing a finished run by train samples: a new generation beside it, filled with what is there, then swapped in."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from ooc_ntk.algebra.kernel import Kernel
from ooc_ntk.compute.machine import peak_resident_bytes
from ooc_ntk.errors import BudgetError, InputError, RunConflictError, StorageError
from ooc_ntk.inputs.job import Job
from ooc_ntk.inputs.joined import JoinedSource
from ooc_ntk.inputs.samples import SampleSource
from ooc_ntk.planning.budget import Budget
from ooc_ntk.planning.growth import Grown, kept_rows, kept_share, kept_tiles, tile_sizes_beside
from ooc_ntk.planning.plan import Plan
from ooc_ntk.planning.planner import Preferences, make_plan
from ooc_ntk.planning.rates import MachineRates
from ooc_ntk.stopping import stoppable
from ooc_ntk.storage.arrays import open_tile_array
from ooc_ntk.storage.directory import RunDirectory
from ooc_ntk.storage.local import free_disk_bytes
from ooc_ntk.storage.manifest import Manifest
from ooc_ntk.storage.swap import HISTORY, Generations, complete_swap, read_history, swap_in
from ooc_ntk.units import format_bytes, format_seconds

from .context import KERNEL, PeakMeter, RunContext
from .driver import Observer, check_budget, check_same_job, create_arrays, execute
from .executors import Executor
from .prepare import PreparedJob, prepare
from .progress import TerminalProgress
from .proving import prove_run
from .seed import FinishedRun, seed
from .session import measured, write_new_run
from .stores import FEATURES, store_of

logger = logging.getLogger(__name__)

#: Name of the manifest's note on the samples that a run was extended by last: their digest.
APPENDED: Final = "appended"


def recover(path: str | Path) -> None:
    """Complete an extension that was cut off while it was swapped in; where there was none, nothing is touched.

    Args:
        path: the run directory.

    Raises:
        RunLockedError: if another process is at work there.
        StorageError: if a step fails.
    """
    places = Generations.of(path)
    if places.next.exists() or places.previous.exists():
        with _locked(places):
            complete_swap(places)


@contextmanager
def _locked(places: Generations) -> Iterator[None]:
    """Hold every generation that is there."""
    with ExitStack() as locks:
        for folder in (places.run, places.next, places.previous):
            if RunDirectory(folder).holds_run:
                locks.enter_context(RunDirectory(folder).locked())
        yield


def extend_run(
    path: str | Path,
    train: object,
    job: Job,
    budget: Budget | None,
    executor: Executor,
    progress: bool | Observer = True,
    *,
    watch_disk: int = 0,
    proof: bool = True,
) -> None:
    """Append train samples to a finished run, or go on where that was stopped.

    Args:
        path: the run directory.
        train: the samples to append.
        job: the job of the run as it is.
        budget: limits for the plan of the new generation.
        executor: runs the tasks.
        progress: whether to show progress on the terminal, or an observer.
        watch_disk: free bytes below which it stops; 0 lets it fill the disk.
        proof: whether samples of the grown kernel are proven before it takes the place of the old one.

    Raises:
        OocNtkError: as :func:`ooc_ntk.extend`.
    """
    before = peak_resident_bytes()
    places = Generations.of(path)
    Kernel(places.run)  # a run that is not there, or not finished, is refused
    check_no_store(RunDirectory(places.run))
    _check_place(places)
    run, coming = RunDirectory(places.run), RunDirectory(places.next)
    with run.locked(), ExitStack() as opened:
        old = prepare(job).digests  # nothing else of it is kept: the model may be large
        opened.callback(job.train_source().close)
        grown = job.extend(train)
        opened.callback(grown.train_source().close)
        more = _appended(job.train_source(), grown.train_source())
        repeated = _digests(run) == old and _note(run, APPENDED) == more  # typed again after it was done
        new = None if repeated else prepare(grown)
        if new is not None:
            opened.callback(new.reader.close)
        if new is None or _digests(run) == new.digests:
            with TerminalProgress.of(progress) as observer:
                (observer or Observer()).say("nothing to do: these samples were appended last")
            return
        check_same_job(run, old, "only the same model, weights and data can be gone on from")
        if new.digests["kernel"] != old["kernel"]:
            raise InputError(
                f"outputs={job.outputs!r} are made of the train samples, so more of them change every entry: nothing "
                "can be kept; run the job with all samples in another --out"
            )
        _check_next(places)
        if not coming.holds_run:
            executor.reach()
        plan = _plan_of(places, new, budget, before, executor.processes)
        with coming.locked():
            if not coming.holds_run:
                write_new_run(coming, plan, new, places.run, _notes(run, old, more))
            finished = FinishedRun.open(places.run)
            with TerminalProgress.of(progress) as observer:
                say = (observer or Observer()).say
                say(
                    f"{plan.notes[-1]}; {format_seconds(plan.promised.seconds)} promised, "
                    f"{format_bytes(plan.promised.host_bytes)} host, "
                    f"{format_bytes(plan.promised.disk_bytes)} disk beside the run as it is"
                )
                _fill(plan, coming, new, finished, observer or Observer())
                seconds = execute(plan, coming, new, executor, observer, watch_disk=watch_disk)
                if proof:
                    prove_run(coming, plan, new, seconds, say)
            swap_in(places)


def check_no_store(run: RunDirectory) -> None:
    """Refuse a run whose tiles are in a store: the next generation takes its place by a rename.

    Raises:
        InputError: then.
    """
    if run.store is not None:
        raise InputError(
            f"the tiles of {run.root} are in {run.store}, where nothing can be renamed, so it cannot be extended; run "
            "the job with all samples in another --out and --store"
        )


def _check_place(places: Generations) -> None:
    """Refuse a run directory whose neighbour would be on another file system."""
    if os.stat(places.run).st_dev != os.stat(places.run.parent).st_dev:
        raise StorageError(
            f"{places.run} is a file system of its own, and its next generation is written beside it; move the run "
            "into a folder on that file system and extend it there"
        )


def _digests(directory: RunDirectory) -> dict[str, str]:
    """Digests of the job that a run was made of."""
    return dict(json.loads(_note(directory, "job") or "{}"))


def _note(directory: RunDirectory, name: str) -> str | None:
    manifest = Manifest(directory.root, read_only=True)
    try:
        return manifest.meta(name)
    finally:
        manifest.close()


def _appended(before: SampleSource, after: SampleSource) -> str:
    """Digest of the samples that come after those there were."""
    count = len(before.parts) if isinstance(before, JoinedSource) else 1
    assert isinstance(after, JoinedSource)
    more = after.parts[count:]
    return more[0].digest() if len(more) == 1 else JoinedSource(more).digest()


def _check_next(places: Generations) -> None:
    """Refuse a folder of someone else where the next generation goes."""
    try:
        RunDirectory(places.next).check_usable()
    except RunConflictError as error:
        raise RunConflictError(
            f"the next generation of {places.run} is written in {places.next}, which holds other files; move them away"
        ) from error


def _plan_of(places: Generations, new: PreparedJob, budget: Budget | None, before: int, processes: int) -> Plan:
    """The plan of an extension that was begun, or a new one."""
    run, coming = RunDirectory(places.run), RunDirectory(places.next)
    stored = Plan.load(run.plan_path)
    if coming.holds_run:
        plan, history = Plan.load(coming.plan_path), read_history(coming.root)
        if _digests(coming) != new.digests or not history or history[-1]["plan"] != stored.digest:
            raise RunConflictError(
                f"another extension of {places.run}, to {plan.train_samples:,} train samples, was begun in "
                f"{places.next}; type its command again to finish it, or delete that folder to drop it"
            )
        if plan.device != new.device:
            raise RunConflictError(
                f"the extension of {places.run} was begun on {plan.device}, the job is for {new.device} now; give the "
                f"job device={plan.device!r}, or delete {places.next} to begin anew"
            )
        check_budget(plan, budget, processes)
        return plan
    return _grown_plan(places, stored, new, budget, before, processes)


def _notes(run: RunDirectory, old: dict[str, str], more: str) -> dict[str, str]:
    """What the next generation's manifest says of the ones before it."""
    stored = Plan.load(run.plan_path)
    entry = {
        "plan": stored.digest,
        "job": old,
        "train_samples": stored.train_samples,
        "test_samples": stored.test_samples,
        "versions": json.loads(_note(run, "versions") or "{}"),
    }
    attributes = open_tile_array(run.files, FEATURES if stored.features_only else KERNEL).attrs
    for name in ("batch_size", "micro_batches"):  # rows for which the device had no room in batches as planned
        if name in attributes:
            entry[name] = attributes[name]
    return {HISTORY: json.dumps([*read_history(run.root), entry]), APPENDED: more}


def _grown_plan(
    places: Generations, stored: Plan, new: PreparedJob, budget: Budget | None, before: int, processes: int
) -> Plan:
    """Plan the new generation: the same kernel, and tiles of which almost all that are there are whole ones."""
    taken = RunDirectory(places.run).size_bytes()
    train, test = len(new.reader.train), len(new.reader) - len(new.reader.train)
    old_entries = (stored.train_samples + stored.test_samples) * stored.train_samples
    least = (stored.kernel_bytes if not stored.features_only else 0) * (train + test) * train // old_entries
    _check_disk(places, taken, least, budget)
    if budget is not None and budget.disk is not None:
        budget = replace(budget, disk=int(budget.disk) - taken)
    measuring = new
    if stored.projection is not None:
        # A dim that was chosen for an error is kept: features of other dims cannot be multiplied.
        measuring = replace(new, job=new.job.with_model(projection=stored.projection))
    preferences = Preferences(
        layer_rules=any(block.source == "rule" for block in stored.blocks),
        features_only=stored.features_only,
        every_output=stored.head is None,
        workers=processes or None,
    )
    workload, limits, rates = measured(measuring, before, budget, preferences, places.next, None)
    if stored.projection is not None:
        assert workload.sketch is not None
        pinned = replace(
            workload.sketch,
            projection=stored.projection,
            structured=stored.structured,
            from_factors=stored.from_factors,
            heavy=stored.heavy,
            heavy_share=stored.heavy_share,
        )
        workload = replace(workload, sketch=pinned)
    first: BudgetError | None = None
    for tile in tile_sizes_beside(stored.train_samples, stored.tile_samples):
        try:
            plan = make_plan(workload, limits, rates, replace(preferences, tile_samples=tile), new.digest)
            break
        except BudgetError as error:
            first = first or error
        except InputError:  # so many samples that tiles of this size are too many
            plan = make_plan(workload, limits, rates, preferences, new.digest)
            break
    else:
        assert first is not None
        raise first
    plan = _counting_copies(replace(plan, grown=Grown(stored.train_samples, stored.test_samples)), stored, rates)
    _check_same_kernel(stored, plan, new, places)
    _check_disk(places, taken, plan.promised.disk_bytes, None if budget is None else replace(budget, disk=None))
    return plan


def _check_disk(places: Generations, taken: int, needed: int, budget: Budget | None) -> None:
    """Refuse an extension for which both generations do not fit.

    Raises:
        BudgetError: naming what both take.
    """
    both = (
        f"extending {places.run} needs room for the run as it is ({format_bytes(taken)}) and for the next one "
        f"({format_bytes(needed)}) at once"
    )
    if budget is not None and budget.disk is not None and taken + needed >= int(budget.disk):
        raise BudgetError(
            f"{both}, {format_bytes(taken + needed)} or more, the disk budget is {format_bytes(int(budget.disk))}; "
            "raise --disk"
        )
    free = free_disk_bytes(places.next)
    if needed > free:
        raise BudgetError(f"{both}, and {format_bytes(free)} are free there; make room and type the command again")


def _check_same_kernel(stored: Plan, plan: Plan, new: PreparedJob, places: Generations) -> None:
    """Refuse a plan whose entries are not those of the run, whatever the reason."""
    for name in ("kernel", "scale", "normalize", "precision", "outputs", "entries_per_sample", "layers"):
        was, would_be = getattr(stored, name), getattr(plan, name)
        if was != would_be:
            raise InputError(
                f"with these samples the kernel has {name} {would_be!r}, that of {places.run} has {was!r}; run the job "
                "with all samples in another --out"
            )
    if (_note(RunDirectory(places.run), "sketch") or "") != new.sketch_digest(plan):
        raise InputError(
            f"the features of {places.run} cannot be multiplied with those of these samples; run the job with all "
            "samples in another --out"
        )


def _counting_copies(plan: Plan, stored: Plan, rates: MachineRates) -> Plan:
    """The plan with what copying saves taken off its promises, and said."""
    grid, grown = plan.sample_grid, plan.grown
    rows, entries = kept_share(grid, grown)
    rows = rows if plan.projection is not None else 0.0
    copied = int(entries * plan.kernel_bytes * (not plan.features_only) + rows * plan.feature_bytes)
    seconds = copied / rates.disk_read + 2 * copied / rates.disk_write
    promised = plan.promised
    promised = replace(
        promised,
        rows_seconds=promised.rows_seconds * (1 - rows),
        kernel_seconds=promised.kernel_seconds * (1 - entries) + seconds,
        seconds=promised.seconds - promised.rows_seconds * rows - promised.kernel_seconds * entries + seconds,
    )
    kept = len(kept_tiles(grid, grown)) if not plan.features_only else len(kept_rows(grid, grown))
    every = grid.kernel_tile_count if not plan.features_only else grid.row_tiles
    note = (
        f"goes on from a run of {stored.train_samples:,} train samples: {kept:,} of {every:,} "
        f"{'feature' if plan.features_only else 'kernel'} tiles are copied"
    )
    if plan.projection is None:
        note += "; rows of the samples that are there are derived again, to be multiplied with the new ones"
    return replace(
        plan,
        promised=promised,
        flops=int(plan.flops * (1 - entries)),
        bytes_read=int(plan.bytes_read * (1 - entries)) + copied,
        io_ratio=None,
        moved_bytes=0,
        bound_bytes=0.0,
        notes=(*plan.notes, note),
    )


def _fill(plan: Plan, directory: RunDirectory, prepared: PreparedJob, finished: FinishedRun, observer: Any) -> None:
    """Copy what the finished run has into the next generation."""
    manifest = Manifest(directory.root)
    try:
        records = manifest.files()
        with stoppable() as stop:
            context = RunContext(
                plan,
                directory,
                prepared.function,
                prepared.reader,
                store_of(plan, directory.files, records),
                stop,
                PeakMeter(),
                lambda phase, amount: None,  # noqa: ARG005 - the driver counts what was done before it
                {},
                records,
            )
            create_arrays(context, manifest)
            copied = seed(context, manifest, finished, observer.say)
        logger.info("%d tiles copied from %s", copied, finished.root)
    finally:
        manifest.close()
