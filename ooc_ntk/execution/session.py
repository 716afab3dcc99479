"""A session in a run directory: take the plan that is there or make one, check that it fits, run what is left."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch

from ooc_ntk.compute.machine import limited_threads, peak_resident_bytes
from ooc_ntk.compute.rates import cached_rates
from ooc_ntk.errors import RunConflictError
from ooc_ntk.inputs.job import LIVE, Job
from ooc_ntk.inputs.jobfile import format_toml
from ooc_ntk.inputs.weights import save_weights
from ooc_ntk.planning.budget import Budget, Limits
from ooc_ntk.planning.plan import Plan
from ooc_ntk.planning.planner import Preferences, make_plan
from ooc_ntk.planning.rates import MachineRates
from ooc_ntk.planning.representation import allowed_choices
from ooc_ntk.planning.scratch import STORE_BYTES
from ooc_ntk.planning.workload import Workload
from ooc_ntk.storage.again import AUDIT
from ooc_ntk.storage.directory import RunDirectory
from ooc_ntk.storage.diskrate import measure_store
from ooc_ntk.storage.local import free_disk_bytes
from ooc_ntk.storage.mirror import check_recorded, check_store, mirror_paper
from ooc_ntk.storage.storeurl import files_at

from . import calibration
from .driver import Observer, check_budget, check_same_job, create_run, execute, planned_structure
from .executors import Executor
from .measure import measure
from .prepare import PreparedJob, available_resources, prepare, with_head
from .progress import TerminalProgress
from .proving import prove_run

logger = logging.getLogger(__name__)


#: Bytes that count as free where nothing says how many are, in a bucket.
UNLIMITED: Final = 2**60


@dataclass(frozen=True)
class Asked:
    """What a caller asks of a session beside the job.

    Attributes:
        plan: a plan made before; None makes one.
        budget: limits for a new plan; an explicit one that a stored plan cannot keep is refused.
        preferences: what to fix by hand in a new plan; refused where a plan that is there does otherwise.
        template: the plan of the same job with other weights, which a new plan takes over; None measures the model.
        watch_disk: free bytes of the run's file system below which it stops; 0 lets it fill the disk.
        proof: whether samples of the finished kernel are proven as the last step.
        store: URL of the store that tiles and kernel go to; None is the one of a run that is there, or the directory.
    """

    plan: Plan | None = None
    budget: Budget | None = None
    preferences: Preferences | None = None
    template: Plan | None = None
    watch_disk: int = 0
    proof: bool = True
    store: str | None = None


def planned(
    prepared: PreparedJob,
    before: int,
    budget: Budget | None,
    preferences: Preferences | None,
    out: Path,
    rates: MachineRates | None,
    store: str | None = None,
) -> Plan:
    """Measure a prepared job and choose how to run it.

    Args:
        prepared: the job.
        before: peak resident bytes before it was prepared.
        budget: limits; None takes 80% of what is free.
        preferences: what is fixed by hand.
        out: where the run will be, for the free disk space.
        rates: machine rates; None uses the calibrated ones, measured first where there are none.
        store: URL of the store that tiles and kernel will go to; None is ``out``.

    Returns:
        The plan.

    Raises:
        InputError: if the model cannot be run or differentiated on its data.
        BudgetError: if no plan fits.
    """
    workload, limits, rates = measured(prepared, before, budget, preferences, out, rates, store)
    return make_plan(workload, limits, rates, preferences, prepared.digest)


def measured(
    prepared: PreparedJob,
    before: int,
    budget: Budget | None,
    preferences: Preferences | None,
    out: Path,
    rates: MachineRates | None,
    store: str | None = None,
) -> tuple[Workload, Limits, MachineRates]:
    """Measure a prepared job and the machine; arguments as for :func:`planned`.

    Returns:
        The workload, the limits in bytes and the machine's rates: all that a plan is made of.
    """
    given = rates is not None
    workers = preferences.workers if preferences is not None else None
    free = free_disk_bytes(out) if store is None else files_at(store).free_bytes()
    # Workers of one processor share its cores; each of several devices is fed by a process with its share of them.
    with limited_threads(max(1, torch.get_num_threads() // (workers or 1))):
        rates = rates or cached_rates(prepared.device)
        if not rates.measured:
            logger.info("first plan on this machine: calibrating for a few seconds")
            rates = calibration.calibrate(prepared.device, existing_folder(out))
        limits = (budget or Budget()).limits(available_resources(prepared.device, UNLIMITED if free is None else free))
        layer_rules = preferences is None or preferences.layer_rules
        every_output = preferences is not None and preferences.every_output
        workload = measure(prepared, limits, layer_rules=layer_rules, every_output=every_output)
    if store is not None and free is None:  # an object store, and no folder
        if not given:
            seen = measure_store(files_at(store))
            rates = replace(
                rates,
                disk_write=seen.write,
                disk_read=seen.read,
                commit_seconds=seen.commit_seconds,
                direct_wins=False,
            )
        workload = replace(workload, baseline_bytes=workload.baseline_bytes + STORE_BYTES)
    after = peak_resident_bytes()
    return replace(workload, planning_bytes=after if after > before else 0), limits, rates


def run_job(
    job: Job,
    directory: RunDirectory,
    asked: Asked,
    executor: Executor,
    progress: bool | Observer = True,
) -> Plan:
    """Run a job in a directory, or what is left of it.

    Args:
        job: what is wanted.
        directory: the run directory, checked to be usable.
        asked: plan, budget and preferences.
        executor: runs the tasks.
        progress: whether to show progress on the terminal, or an observer.

    Returns:
        The plan that was followed.

    Raises:
        OocNtkError: as :func:`ooc_ntk.run`.
    """
    before = peak_resident_bytes()
    if asked.store is not None:
        if directory.holds_run:
            check_recorded(directory, asked.store)
        directory = RunDirectory(directory.root, asked.store)
    check_store(directory)  # before anything is loaded
    prepared = prepare(job)
    if asked.plan is not None:
        executor.check(asked.plan)
    elif executor.processes:
        asked = replace(asked, preferences=replace(asked.preferences or Preferences(), workers=executor.processes))
    if not directory.holds_run:
        executor.reach()
    with directory.locked():
        chosen = _plan_of(directory, prepared, asked, before, executor.processes)
        if chosen.device != prepared.device:
            raise RunConflictError(
                f"the plan of this run is for {chosen.device}, the job is for {prepared.device}; "
                f"give the job device={chosen.device!r}"
            )
        try:
            with TerminalProgress.of(progress) as observer:
                seconds = execute(chosen, directory, prepared, executor, observer, watch_disk=asked.watch_disk)
                if asked.proof:
                    say = (observer or Observer()).say
                    try:
                        prove_run(directory, chosen, prepared, seconds, say)
                    finally:
                        mirror_paper(directory, AUDIT)
        finally:
            prepared.reader.close()
    return chosen


def _plan_of(directory: RunDirectory, prepared: PreparedJob, asked: Asked, before: int, processes: int) -> Plan:
    """The plan that a locked directory holds, or a new one written into it."""
    job, plan, budget, preferences = prepared.job, asked.plan, asked.budget, asked.preferences
    if directory.holds_run:
        stored = Plan.load(directory.plan_path)
        check_same_job(directory, prepared.digests)
        check_budget(stored, budget, processes)
        if plan is not None and plan.digest != stored.digest:
            raise RunConflictError(
                f"{directory.root} holds a run of another plan (there {stored.digest[:8]}, "
                f"given {plan.digest[:8]}); leave the plan out to go on with the stored one, "
                "or choose another --out"
            )
        _check_preferences(stored, preferences)
        _check_batches(stored, job)
        _check_backend(stored, job)
        return stored
    if plan is None and asked.template is not None and _serves(asked.template, prepared):
        plan, preferences = replace(asked.template, job_digest=prepared.digest), None
    chosen = plan or planned(prepared, before, budget, preferences, directory.root, None, directory.store)
    if chosen.job_digest != prepared.digest:
        raise RunConflictError(
            f"the plan was made for another job (plan {chosen.job_digest[:8]}, "
            f"this job {prepared.digest[:8]}); make a new plan"
        )
    check_budget(chosen, budget, processes)
    _check_preferences(chosen, preferences if plan is not None else None)
    _check_batches(chosen, job)
    _check_backend(chosen, job)
    write_new_run(directory, chosen, prepared)
    return chosen


def _serves(template: Plan, prepared: PreparedJob) -> bool:
    """Whether the plan of other weights serves these: the same layers by the same rules, and the same head."""
    try:
        if template.head is not None:
            prepared = with_head(prepared, template.head.name)
        prepared.function.structure = planned_structure(template, prepared)
    except RunConflictError as error:
        logger.info("planned anew: %s", error)
        return False
    return True


def _check_preferences(chosen: Plan, preferences: Preferences | None) -> None:
    """Refuse preferences that a plan that is there already does not follow."""
    if preferences is None:
        return
    dense = sum(block.columns for block in chosen.blocks if block.representation == "dense")
    if chosen.projection is not None:
        dense = chosen.projection.dim or 0
    follows = {
        "dataflow": (chosen.dataflow, None),
        "tile_samples": (chosen.tile_samples, chosen.samples),
        "span_columns": (chosen.span_columns, max(1, dense)),
        "passes": (len(chosen.passes), None),
    }
    if not chosen.layout.in_memory:
        follows["superblock_tiles"] = (chosen.superblock_tiles, chosen.sample_grid.kernel_tile_count)
    for name, (value, largest) in follows.items():
        wanted = getattr(preferences, name)
        # The planner cuts what is asked for at what there is.
        if wanted is not None and value != (wanted if largest is None else min(wanted, largest)):
            raise RunConflictError(
                f"the plan that is there has {name} {value}, asked for is {wanted}; leave it out to go on with that "
                "plan, or choose another --out"
            )
    if preferences.order is not None and chosen.superblock_tiles > 1 and chosen.order != preferences.order:
        raise RunConflictError(
            f"the plan that is there groups kernel tiles in {chosen.order}s, asked for is {preferences.order}; leave "
            "--order out to go on with that plan, or choose another --out"
        )
    if preferences.representation is not None:
        other = [b.name for b in chosen.blocks if b.choice not in allowed_choices(b, preferences.representation)]
        if other:
            raise RunConflictError(
                f"the plan that is there does not hold every block {preferences.representation} (not {other[0]!r}); "
                "leave --representation out to go on with that plan, or choose another --out"
            )
    if preferences.features_only and not chosen.features_only:
        raise RunConflictError(
            "the plan that is there assembles the kernel, asked for are features only; leave --features-only out to go "
            "on with that plan, or choose another --out"
        )
    if preferences.every_output and chosen.head is not None:
        raise RunConflictError(
            f"the plan that is there derives {chosen.rows_per_sample} rows for {chosen.outputs} outputs; leave "
            "--every-output out to go on with that plan, or choose another --out"
        )
    if not preferences.layer_rules and any(block.source == "rule" for block in chosen.blocks):
        raise RunConflictError(
            "the plan that is there uses layer rules; leave --no-layer-rules out to go on with that plan, or choose "
            "another --out"
        )


def _check_backend(chosen: Plan, job: Job) -> None:
    """Refuse a plan whose features another backend computes than the job asks for."""
    wanted = "auto" if job.sketch is None else job.sketch.backend
    if chosen.projection is not None and wanted not in ("auto", chosen.projection.backend):
        raise RunConflictError(
            f"the plan that is there projects by {chosen.projection.backend}, asked for is {wanted}; leave --backend "
            "out to go on with that plan, or choose another --out"
        )


def _check_batches(chosen: Plan, job: Job) -> None:
    """Refuse a plan that derives samples together where the job asks for each alone."""
    if job.allow_batch_dependence and chosen.batch_size > 1:
        raise RunConflictError(
            f"the plan that is there derives batches of {chosen.batch_size} samples, and --allow-batch-dependence asks "
            "for every sample alone; leave it out to go on with that plan, or choose another --out"
        )


def write_new_run(
    directory: RunDirectory,
    chosen: Plan,
    prepared: PreparedJob,
    home: Path | None = None,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write job, plan and, for a live model, its weights.

    Args:
        directory: the locked run directory.
        chosen: the plan.
        prepared: the job.
        home: where the run will be in the end; None is where it is.
        notes: further texts for the manifest, by name.
    """
    spec = dict(prepared.job.spec())
    weights = RunDirectory(home or directory.root).weights_path.absolute()
    if spec["model"] == LIVE:
        save_weights(prepared.job.module(), directory.weights_path)
        spec["weights"] = str(weights)
    elif home is not None and spec["weights"] and Path(str(spec["weights"])).resolve() == weights.resolve():
        shutil.copyfile(weights, directory.weights_path)  # those that the generation before has saved
    create_run(directory, chosen, format_toml(spec), prepared.digests, prepared.sketch_digest(chosen), notes)


def existing_folder(path: Path) -> Path:
    """The nearest folder above ``path`` that exists."""
    folder = path.absolute()
    with suppress(OSError):
        while not folder.is_dir():
            folder = folder.parent
    return folder
