"""The public verbs: plan a job, run it, open what it left, verify it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from .algebra.external import external_features
from .algebra.features import Features
from .algebra.kernel import Kernel
from .algebra.ridge import Solution
from .compute.functions import ClipOutput
from .compute.machine import peak_resident_bytes
from .compute.rules.table import forget_layer_rule, layer_rule
from .errors import BudgetError, InputError, OocNtkError, RunConflictError
from .execution import calibration
from .execution.audit import AUDITED_SAMPLES, Audit, audit
from .execution.driver import Observer, check_budget, check_same_job, create_run, execute, run_directory
from .execution.executors import executor_named
from .execution.prepare import PreparedJob, available_resources, measure, prepare, resolved_device
from .execution.progress import TerminalProgress
from .execution.status import RunInfo, keep_audit, run_info
from .inputs.callables import absolute_callable, is_callable_spec
from .inputs.job import LIVE, Job, checked_device
from .inputs.jobfile import format_toml, read_job_file
from .inputs.specs import absolute_spec
from .inputs.weights import save_weights
from .planning.budget import Budget
from .planning.plan import Plan
from .planning.planner import Preferences, make_plan
from .planning.projection import Projection, parsed_fields
from .planning.rates import MachineRates
from .planning.representation import allowed_choices
from .storage.directory import RunDirectory, free_disk_bytes

__all__ = [
    "Audit",
    "Budget",
    "BudgetError",
    "ClipOutput",
    "Features",
    "InputError",
    "Job",
    "Kernel",
    "MachineRates",
    "Observer",
    "OocNtkError",
    "Plan",
    "Preferences",
    "Projection",
    "RunInfo",
    "Solution",
    "calibrate",
    "describe_job",
    "forget_layer_rule",
    "info",
    "layer_rule",
    "open",
    "open_features",
    "plan",
    "run",
    "verify",
]

logger = logging.getLogger(__name__)


def plan(
    job: Job,
    budget: Budget | None = None,
    *,
    preferences: Preferences | None = None,
    out: str | Path | None = None,
    rates: MachineRates | None = None,
) -> Plan:
    """Plan a job: load it, probe it on its device, and choose how to run it. Computes no kernel.

    The machine is calibrated first, once, if it never was (a few seconds).

    Args:
        job: what is wanted.
        budget: limits; None, or a limit that is None, takes 80% of what is free.
        preferences: what to fix by hand: dataflow, tile size, passes, representation, or no layer rules.
        out: where the run will be, for the free disk space; None is the current folder.
        rates: machine rates; None uses the calibrated ones.

    Returns:
        The plan. ``print(plan)`` shows it.

    Raises:
        InputError: if the job is wrong.
        BudgetError: if no plan fits; says the smallest budget that would do.
    """
    before = peak_resident_bytes()
    return _plan(prepare(job), before, budget, preferences, Path(out or "."), rates)


def _plan(
    prepared: PreparedJob,
    before: int,
    budget: Budget | None,
    preferences: Preferences | None,
    out: Path,
    rates: MachineRates | None,
) -> Plan:
    rates = rates or calibration.cached_rates(prepared.device)
    if not rates.measured:
        logger.info("first plan on this machine: calibrating for a few seconds")
        rates = calibration.calibrate(prepared.device, _existing(out))
    limits = (budget or Budget()).limits(available_resources(prepared.device, free_disk_bytes(out)))
    layer_rules = preferences is None or preferences.layer_rules
    every_output = preferences is not None and preferences.every_output
    workload = measure(prepared, limits, layer_rules=layer_rules, every_output=every_output)
    after = peak_resident_bytes()
    workload = replace(workload, planning_bytes=after if after > before else 0)
    return make_plan(workload, limits, rates, preferences, prepared.digest)


def run(
    job: Job,
    out: str | Path,
    *,
    plan: Plan | None = None,
    budget: Budget | None = None,
    preferences: Preferences | None = None,
    scheduler: str | None = None,
    progress: bool | Observer = True,
) -> Kernel:
    """Compute a job's kernel into a run directory, or go on where an earlier run of the same job stopped.

    A directory that holds a plan is resumed with that plan, whatever today's free memory or rates are.

    Args:
        job: what is wanted.
        out: run directory; made if it is not there.
        plan: a plan made by :func:`plan`; None makes one.
        budget: limits for a new plan; an explicit one that a stored plan cannot keep is refused.
        preferences: what to fix by hand in a new plan: dataflow, tile size, passes, representation, or no layer rules;
            refused where a plan that is there does otherwise.
        scheduler: ``threads`` (default, Dask's threaded scheduler) or ``serial``.
        progress: whether to show progress on the terminal, or an observer.

    Returns:
        The finished kernel.

    Raises:
        InputError: if the job is wrong, or data change while they are read.
        BudgetError: if no plan fits.
        RunConflictError: if the directory holds another job or plan.
        RunLockedError: if another process is running there.
        RunInterrupted: if it was stopped; the same call goes on.
        StorageError: if the disk is full or files cannot be written; the same call goes on.
    """
    if plan is not None and not isinstance(plan, Plan):
        raise InputError(f"plan must be a Plan, got {type(plan).__name__}; read a saved one with Plan.load(path)")
    directory = run_directory(out)
    executor = executor_named(scheduler)
    before = peak_resident_bytes()
    prepared = prepare(job)
    with directory.locked():
        if directory.holds_run:
            stored = Plan.load(directory.plan_path)
            check_same_job(directory, prepared.digests)
            check_budget(stored, budget)
            if plan is not None and plan.digest != stored.digest:
                raise RunConflictError(
                    f"{directory.root} holds a run of another plan (there {stored.digest[:8]}, "
                    f"given {plan.digest[:8]}); leave the plan out to go on with the stored one, "
                    "or choose another --out"
                )
            _check_preferences(stored, preferences)
            _check_batches(stored, job)
            _check_backend(stored, job)
            chosen = stored
        else:
            chosen = plan or _plan(prepared, before, budget, preferences, directory.root, None)
            if chosen.job_digest != prepared.digest:
                raise RunConflictError(
                    f"the plan was made for another job (plan {chosen.job_digest[:8]}, "
                    f"this job {prepared.digest[:8]}); make a new plan"
                )
            check_budget(chosen, budget)
            _check_preferences(chosen, preferences if plan is not None else None)
            _check_batches(chosen, job)
            _check_backend(chosen, job)
            _write_new_run(directory, chosen, prepared)
        if chosen.device != prepared.device:
            raise RunConflictError(
                f"the plan of this run is for {chosen.device}, the job is for {prepared.device}; "
                f"give the job device={chosen.device!r}"
            )
        with TerminalProgress.of(progress) as observer:
            execute(chosen, directory, prepared, executor, observer)
    return Kernel(out)


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
    for name, (value, largest) in follows.items():
        wanted = getattr(preferences, name)
        # The planner cuts what is asked for at what there is.
        if wanted is not None and value != (wanted if largest is None else min(wanted, largest)):
            raise RunConflictError(
                f"the plan that is there has {name} {value}, asked for is {wanted}; leave it out to go on with that "
                "plan, or choose another --out"
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


def _write_new_run(directory: RunDirectory, chosen: Plan, prepared: PreparedJob) -> None:
    """Write job, plan and, for a live model, its weights."""
    spec = dict(prepared.job.spec())
    if spec["model"] == LIVE:
        save_weights(prepared.job.module(), directory.weights_path)
        spec["weights"] = str(directory.weights_path.absolute())
    create_run(directory, chosen, format_toml(spec), prepared.digests, prepared.sketch_digest(chosen))


def open(path: str | Path) -> Kernel:  # noqa: A001 - `ooc_ntk.open`, as `zarr.open`
    """Open the finished kernel of a run directory.

    Args:
        path: the run directory.

    Returns:
        The kernel.

    Raises:
        StorageError: if there is no run.
        IncompleteRunError: if it is not finished.
    """
    return Kernel(path)


def open_features(
    path: str | Path,
    parameters: int | None = None,
    *,
    dim: int | None = None,
    outputs: int = 1,
    dtype: str = "float32",
    train: int | None = None,
    samples: int | None = None,
    label: str = "",
) -> Kernel:
    """Open projected features as a kernel whose entries are computed when they are asked for.

    Args:
        path: a run directory of a projected kernel; or a file of TRAK or projection_ntk: a NumPy file (TRAK's
            ``grads.mmap`` is one) or a raw memory map.
        parameters: number of parameters (P) of the model, which brings the features of TRAK and projection_ntk to the
            exact kernel's scale; None if they are on it.
        dim: columns; needed for a raw file, checked otherwise.
        outputs: Jacobian rows per sample.
        dtype: of a raw file.
        train: train samples, the first ones; None for all.
        samples: expected number of samples, checked.
        label: what files of one projection have in common; only such features may be multiplied with each other.

    Returns:
        The kernel: entries, diagonal, errors, attribution, ridge regression.

    Raises:
        InputError: if there is no such file, or its size does not match.
        StorageError: if the run directory holds no finished run.
    """
    path = Path(path)
    if path.is_dir():
        kernel = Kernel(path)
        _ = kernel.features  # refuses an exact kernel
        return kernel
    return Kernel.of_features(
        path,
        external_features(
            path, parameters, dim=dim, outputs=outputs, dtype=dtype, train=train, samples=samples, label=label
        ),
    )


def info(path: str | Path) -> RunInfo:
    """What became of a run: promises beside measurements.

    Args:
        path: the run directory, finished or not.

    Returns:
        Its state.

    Raises:
        StorageError: if there is no run.
    """
    return run_info(path)


def verify(
    path: str | Path,
    job: Job | None = None,
    *,
    samples: int = AUDITED_SAMPLES,
    seed: int = 0,
    advance: Callable[[str], None] = lambda what: None,  # noqa: ARG005
) -> Audit:
    """Prove a finished kernel: checksums, symmetry, finite entries, and entries recomputed in float64.

    Args:
        path: the run directory.
        job: the job; None makes it again from the stored job file.
        samples: samples whose rows and columns are recomputed; 0 recomputes nothing and needs no job.
        seed: of the choice of samples.
        advance: told what is being checked.

    Returns:
        The audit; ``.passed`` says whether everything held.

    Raises:
        StorageError: if there is no run, or it is not finished.
        InputError: if the job was made from live objects and is not given.
        RunConflictError: if it is another job.
    """
    kernel = Kernel(path)
    prepared = None
    if samples:
        prepared = prepare(job or describe_job(None, {}, run=path)[0])
        check_same_job(RunDirectory(path), prepared.digests)
    assert kernel.plan is not None  # it was opened from a run directory
    found = audit(kernel.path, kernel.plan, prepared, samples, seed, advance)
    keep_audit(RunDirectory(path), found)
    return found


def describe_job(
    job_file: str | Path | None,
    given: Mapping[str, object],
    *,
    run: str | Path | None = None,
    host: str | int | None = None,
    device_memory: str | int | None = None,
    disk: str | int | None = None,
) -> tuple[Job, Budget]:
    """Make a job and a budget from a job file or a run directory, with some arguments given by hand.

    Args:
        job_file: TOML file, or None.
        given: arguments of a job that override what the file says.
        run: a run directory; its stored job is used where neither a file nor a model is given.
        host: host budget that overrides the file's.
        device_memory: device budget that overrides the file's.
        disk: disk budget that overrides the file's.

    Returns:
        The job and the budget.

    Raises:
        InputError: for unknown keys, missing model or data, or wrong values.
    """
    stored: dict[str, object] = {}
    sizes: dict[str, str | int | None] = {}
    if job_file is not None:
        read = read_job_file(job_file)
        stored = read.arguments()
        if read.budget is not None:
            sizes = {"host": read.budget.host, "device": read.budget.device, "disk": read.budget.disk}
    elif run is not None and RunDirectory(run).job_path.exists():
        stored = read_job_file(RunDirectory(run).job_path).arguments()
        if "model" in given and "weights" not in given and stored.get("model") != LIVE:
            stored.pop("weights", None)
    given = _projected(_absolute(given), stored.get("projection"))
    wanted = {"host": host, "device": device_memory, "disk": disk}
    sizes.update({name: size for name, size in wanted.items() if size is not None})
    return Job.from_spec({**stored, **given}), Budget(**sizes)


def _projected(given: Mapping[str, object], stored: object) -> dict[str, object]:
    """Arguments with the parts of a projection that were given by hand brought together, over what a file says.

    Raises:
        InputError: for a wrong projection, or parts of one where there is none.
    """
    found = dict(given)
    names = {"target_error": "target_error", "projection_seed": "seed", "backend": "backend"}
    parts = {field: found.pop(name) for name, field in names.items() if name in found}
    text = found.get("projection", stored)
    if not parts:
        return found
    if text is None and "target_error" not in parts:
        flag = next(name for name, field in names.items() if field in parts).replace("_", "-")
        raise InputError(f"--{flag} belongs to a projection; give one, for example --projection sjlt:4096")
    fields: dict[str, object] = {}
    if isinstance(text, Mapping):
        fields = dict(text)
    elif isinstance(text, str):
        fields = parsed_fields(text)
    if "target_error" in parts and "projection" not in found:
        fields.pop("dim", None)
    found["projection"] = {**fields, **parts}
    return found


def _absolute(given: Mapping[str, object]) -> dict[str, object]:
    """Arguments given by hand, with paths relative to the current folder and not to a job file's."""
    found = dict(given)
    for name, value in given.items():
        if name in ("train", "test") and isinstance(value, str):
            found[name] = absolute_spec(value, None, name)
        elif (name == "model" or name == "outputs") and isinstance(value, str):
            found[name] = absolute_callable(value, None, name) if is_callable_spec(value) else value
        elif name == "weights" and isinstance(value, str | Path):
            found[name] = Path(value).expanduser().absolute()
    return found


def calibrate(device: str | None = None, disk: str | Path = ".") -> MachineRates:
    """Measure the machine's rates and keep them for later plans.

    Args:
        device: torch device; None is CUDA if there is one, otherwise the CPU.
        disk: folder on the file system where runs will be.

    Returns:
        The rates.

    Raises:
        InputError: for a device that is not there.
    """
    return calibration.calibrate(resolved_device(checked_device(device)), _existing(Path(disk)))


def _existing(path: Path) -> Path:
    """The nearest folder above ``path`` that exists."""
    folder = path.absolute()
    with suppress(OSError):
        while not folder.is_dir():
            folder = folder.parent
    return folder
