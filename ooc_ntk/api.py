"""The public verbs: plan a job, run it, open what it left, verify it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from .algebra.checkpoints import Checkpoints, Drift, read_index
from .algebra.external import external_features
from .algebra.features import Features
from .algebra.fed import STATE, fed_features
from .algebra.kernel import Kernel
from .algebra.ridge import Solution, Solver, register_solver
from .algebra.spectrum import Spectrum
from .algebra.summary import SpectrumSummary
from .algebra.surrogate import Surrogate, SurrogateReport
from .compute.functions import ClipOutput
from .compute.machine import peak_resident_bytes
from .compute.rules.table import forget_layer_rule, layer_rule
from .errors import BudgetError, InputError, OocNtkError, RunConflictError, VerificationError
from .execution import calibration
from .execution import checkpoints as execution_checkpoints
from .execution.audit import AUDITED_SAMPLES, Audit, audit
from .execution.checkpoints import Weights
from .execution.cluster.options import Cluster
from .execution.driver import Observer, check_same_job, run_directory
from .execution.executors import executor_of
from .execution.explaining import explained
from .execution.extend import extend_run, recover
from .execution.featurizer import Featurizer
from .execution.fitting import Fit
from .execution.labels import Labels, run_labels
from .execution.nearest import NearestResult
from .execution.prepare import prepare, resolved_device
from .execution.session import Asked, existing_folder, planned, run_job
from .execution.status import RunInfo, keep_audit, run_info, run_receipts
from .inputs.images.seeds import parse_seed_name
from .inputs.job import LIVE, Job, checked_device
from .inputs.jobfile import read_job_file
from .inputs.named_files import named_files
from .inputs.specs import absolute_spec
from .jobs import describe_job
from .planning.budget import Budget
from .planning.explain import Explanation
from .planning.plan import Plan
from .planning.planner import Preferences
from .planning.projection import Projection
from .planning.projectionkind import ProjectionKind, register_projection
from .planning.rates import MachineRates
from .results import describe_samples, fit, nearest, spectrum, surrogate
from .storage import again
from .storage.directory import RunDirectory
from .storage.mirror import mirror_paper
from .storage.storeurl import StoreScheme, checked_store, files_at, is_store, register_store
from .units import parse_bytes

__all__ = [
    "Audit",
    "Budget",
    "BudgetError",
    "Checkpoints",
    "ClipOutput",
    "Cluster",
    "Drift",
    "Explanation",
    "Features",
    "Featurizer",
    "Fit",
    "InputError",
    "Job",
    "Kernel",
    "Labels",
    "MachineRates",
    "NearestResult",
    "Observer",
    "OocNtkError",
    "Plan",
    "Preferences",
    "Projection",
    "ProjectionKind",
    "RunConflictError",
    "RunInfo",
    "Solution",
    "Solver",
    "Spectrum",
    "SpectrumSummary",
    "StoreScheme",
    "Surrogate",
    "SurrogateReport",
    "VerificationError",
    "calibrate",
    "describe_job",
    "describe_samples",
    "explain",
    "extend",
    "fit",
    "forget_layer_rule",
    "info",
    "info_checkpoints",
    "layer_rule",
    "missing_checkpoints",
    "nearest",
    "open",
    "open_checkpoints",
    "open_features",
    "plan",
    "register_projection",
    "register_solver",
    "register_store",
    "run",
    "run_checkpoints",
    "run_labels",
    "run_receipts",
    "spectrum",
    "surrogate",
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
    store: str | None = None,
) -> Plan:
    """Plan a job: load it, probe it on its device, and choose how to run it. Computes no kernel.

    The machine is calibrated first, once, if it never was (a few seconds).

    Args:
        job: what is wanted.
        budget: limits; None, or a limit that is None, takes 80% of what is free.
        preferences: what to fix by hand: dataflow, tile size, passes, representation, or no layer rules.
        out: where the run will be, for the free disk space; None is the current folder.
        rates: machine rates; None uses the calibrated ones.
        store: where tiles and kernel will go, as for :func:`run`; the disk that is planned is then the store's.

    Returns:
        The plan. ``print(plan)`` shows it.

    Raises:
        InputError: if the job is wrong.
        BudgetError: if no plan fits; says the smallest budget that would do.
        StorageError: if the store cannot be reached.
    """
    before = peak_resident_bytes()
    store = _usable_store(store)
    return planned(prepare(job), before, budget, preferences, Path(out or "."), rates, store)


def explain(
    job: Job,
    budget: Budget | None = None,
    *,
    preferences: Preferences | None = None,
    out: str | Path | None = None,
    rates: MachineRates | None = None,
    store: str | None = None,
) -> Explanation:
    """Plan a job and say why the plan is as it is: other ways, what limits it, what other budgets or errors would cost.

    The job is planned several times over with other budgets, a second or so each; beside an exact kernel a pilot of its
    projection is run as well.

    Args:
        job: what is wanted.
        budget: limits, as for :func:`plan`.
        preferences: what to fix by hand.
        out: where the run will be, for the free disk space.
        rates: machine rates; None uses the calibrated ones.
        store: where tiles and kernel will go, as for :func:`run`.

    Returns:
        The explanation; its ``plan`` is the one that :func:`plan` makes.

    Raises:
        InputError: if the job is wrong.
        BudgetError: if no plan fits; says the smallest budget that would do.
        StorageError: if the store cannot be reached.
    """
    before = peak_resident_bytes()
    store = _usable_store(store)
    return explained(prepare(job), before, budget, preferences, Path(out or "."), rates, store)


def _usable_store(store: str | None) -> str | None:
    """A store's URL; one that cannot be used is refused before the model is measured."""
    if store is not None:
        store = checked_store(store)
        files_at(store).names()
    return store


def run(
    job: Job,
    out: str | Path,
    *,
    plan: Plan | None = None,
    budget: Budget | None = None,
    preferences: Preferences | None = None,
    scheduler: str | Cluster | None = None,
    progress: bool | Observer = True,
    watch_disk: str | int | None = None,
    proof: bool = True,
    store: str | None = None,
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
        scheduler: ``threads`` (default, Dask's threaded scheduler) or ``serial`` in this process; a :class:`Cluster` of
            worker processes; or the address of a Dask scheduler, ``tcp://host:8786``, or a ``distributed.Client``.
        progress: whether to show progress on the terminal, or an observer.
        watch_disk: disk to be left free, as ``"2GiB"``: the run stops, to go on later, before less is; None lets it
            fill the disk, and stops there.
        proof: whether the last step proves as many samples of the kernel, against ``J(Jᵀv)`` in float64, as a tenth of
            the run's time and the promised memory allow.
        store: URL of a store that tiles and kernel go to, ``s3://bucket/prefix``, or ``file:///folder`` of a shared
            file system; the rest stays in ``out``, which remembers it. Credentials come from the environment alone.

    Returns:
        The finished kernel.

    Raises:
        InputError: if the job is wrong, or data change while they are read.
        BudgetError: if no plan fits.
        RunConflictError: if the directory holds another job or plan.
        RunLockedError: if another process is running there.
        RunInterrupted: if it was stopped; the same call goes on.
        VerificationError: if the proof fails; the kernel is kept.
        StorageError: if the disk is full or files cannot be written; the same call goes on.
    """
    if plan is not None and not isinstance(plan, Plan):
        raise InputError(f"plan must be a Plan, got {type(plan).__name__}; read a saved one with Plan.load(path)")
    asked = Asked(
        plan=plan, budget=budget, preferences=preferences, watch_disk=_disk_margin(watch_disk), proof=proof, store=store
    )
    with closing(executor_of(scheduler)) as executor:
        run_job(job, run_directory(out), asked, executor, progress)
    return Kernel(out)


def extend(
    path: str | Path,
    train: object,
    *,
    job: Job | None = None,
    budget: Budget | None = None,
    progress: bool | Observer = True,
    scheduler: str | Cluster | None = None,
    watch_disk: str | int | None = None,
    proof: bool = True,
) -> Kernel:
    """Append train samples to a finished run: only their rows and columns are computed, the others are copied.

    A new generation is written beside the run and then swapped in, so that the run is the old kernel or the new one at
    any time, and both are on disk for a while. Called again after a stop, it goes on; called again with the samples
    that were appended last, it does nothing. Kernels that were opened before must be opened again.

    Args:
        path: the run directory.
        train: what to append, as ``train`` of a job, or a data spec; samples that are there already may come again.
        job: the job of the run as it is, needed only where it was made from live objects.
        budget: limits for the new generation.
        progress: whether to show progress on the terminal, or an observer.
        scheduler: as for :func:`run`.
        watch_disk: disk to be left free, as for :func:`run`.
        proof: whether samples of the grown kernel are proven before it takes the place of the old one, as for
            :func:`run`.

    Returns:
        The grown kernel; its rows are the train samples as they were, the new ones, then the test samples.

    Raises:
        InputError: if there are no new samples, or they do not join the old ones, or the directory holds checkpoints.
        RunConflictError: if the job is not that of the run, or another extension of it is unfinished.
        BudgetError: if no plan fits, or both generations do not fit on the disk.
        IncompleteRunError: if the run is not finished.
        StorageError: if there is no run.
        OocNtkError: as :func:`run`.
    """
    check_extendable(path, described=job is None)
    if isinstance(train, str) and not ("_" in train and parse_seed_name(train)):
        train = absolute_spec(train, None, "train")
    job = job or describe_job(None, {}, run=path)[0]
    margin = _disk_margin(watch_disk)
    with closing(executor_of(scheduler)) as executor:
        extend_run(path, train, job, budget, executor, progress, watch_disk=margin, proof=proof)
    return Kernel(path)


def check_extendable(path: str | Path, *, described: bool = True) -> None:
    """Refuse a directory that cannot be extended; complete an extension that was cut off in its last step.

    Args:
        path: the run directory.
        described: whether its job is made again from the stored job file.

    Raises:
        InputError: if the directory holds checkpoints, or a job file that live data cannot be made from again.
        IncompleteRunError: if the run is not finished.
        StorageError: if there is no run.
    """
    recover(path)
    names = [entry["name"] for entry in read_index(Path(path)) or []]
    if names:
        raise InputError(
            f"{path} holds several checkpoints, a run in each folder; extend each, for example {Path(path) / names[0]}"
        )
    Kernel(path)
    if described:
        stored = read_job_file(RunDirectory(path).job_path)
        if LIVE in (stored.train, stored.test):
            raise InputError(
                f"the run in {path} was made from live Python data; extend it from Python with its job as it was, "
                "ooc_ntk.extend(path, train, job=job)"
            )


def remember(job: Job, path: str | Path, command: Mapping[str, object], more: Sequence[Path] = ()) -> None:
    """Keep the command that a finished run was made by, so that the same one typed again sees it at once.

    Nothing is kept where the files that the job comes from are not known.

    Args:
        job: the job, as it was run.
        path: the run directory.
        command: what was asked for, in values that JSON has.
        more: files that the command names beside those of the job.
    """
    files = named_files(job, Path(path))
    if files is not None:
        again.remember(Path(path), command, [*files, *more])


def run_checkpoints(
    job: Job,
    out: str | Path,
    weights: Sequence[Weights],
    *,
    budget: Budget | None = None,
    preferences: Preferences | None = None,
    scheduler: str | Cluster | None = None,
    progress: bool | Observer = True,
    watch_disk: str | int | None = None,
    proof: bool = True,
    announce: Callable[[int, str], None] = lambda number, name: None,  # noqa: ARG005
) -> Checkpoints:
    """Compute a job's kernel for several checkpoints of its model, or go on where that stopped.

    Every checkpoint is a run of its own in ``out``, which resumes and is verified by itself. They share one plan (of an
    exact kernel), open data and decoded images, and only one model is in memory at a time. Called again with more
    weights after the same ones, only those are run.

    Args:
        job: what is wanted, without weights.
        out: directory; made if it is not there.
        weights: files of weights in the order of training, or state dicts where the job's model is a module, which is
            left as it is.
        budget: limits for a new plan.
        preferences: what to fix by hand in a new plan.
        scheduler: as for :func:`run`.
        progress: whether to show progress on the terminal, or an observer.
        watch_disk: disk to be left free, as for :func:`run`.
        proof: whether samples of every kernel are proven, as :func:`run` does.
        announce: told of every checkpoint before it is run: its number and its name.

    Returns:
        The kernels, with their :meth:`~Checkpoints.mean` and their :meth:`~Checkpoints.drift`.

    Raises:
        InputError: if the job is wrong, or weights cannot be read or are of another model; before anything is computed.
        RunConflictError: if the directory holds something else.
        OocNtkError: as :func:`run`.
    """
    asked = Asked(budget=budget, preferences=preferences, watch_disk=_disk_margin(watch_disk), proof=proof)
    with closing(executor_of(scheduler)) as executor:
        return execution_checkpoints.run_checkpoints(job, Path(out), weights, asked, executor, progress, announce)


def _disk_margin(given: str | int | None) -> int:
    """Bytes to be left free, 0 where nobody asks for any."""
    return 0 if given is None else parse_bytes(given)


def open_checkpoints(path: str | Path) -> Checkpoints:
    """Open the finished kernels of a directory of checkpoints.

    Args:
        path: the directory.

    Returns:
        The kernels.

    Raises:
        StorageError: if it holds no checkpoints.
        IncompleteRunError: if one of them is not finished.
    """
    return Checkpoints(path)


def open(path: str | Path) -> Kernel:  # noqa: A001 - `ooc_ntk.open`, as `zarr.open`
    """Open the finished kernel of a run directory, or of a run's store.

    Args:
        path: the run directory; or the URL of the store that its tiles went to, which is enough to read the kernel.

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
        path: a run directory of a projected kernel, or its store's URL, or the folder of a :class:`Featurizer`; or a
            file of TRAK or projection_ntk: a NumPy file (TRAK's ``grads.mmap`` is one) or a raw memory map.
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
    store, path = str(path) if is_store(path) else None, Path(path)
    if store is None and (path / STATE).exists():
        return Kernel.of_features(path, fed_features(path))
    if store is not None or path.is_dir():
        kernel = Kernel(store or path)
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
    full: bool = False,
    advance: Callable[[str], None] = lambda what: None,  # noqa: ARG005
) -> Audit:
    """Prove a finished kernel: checksums, symmetry, finite entries, entries recomputed in float64, and ``J(Jᵀv)``.

    The last compares products of the stored kernel with vectors with the same products by reverse and forward sweeps
    of the model in float64, which need no Jacobian: on up to 64 × 64 samples within a few seconds, or on all.

    Args:
        path: the run directory.
        job: the job; None makes it again from the stored job file.
        samples: samples whose rows and columns are recomputed; 0 recomputes nothing and needs no job.
        seed: of the choice of samples.
        full: whether every entry takes part in the products; takes about as long as deriving all gradients once or
            twice, and memory for a few copies of the parameters.
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
    if full and not samples:
        raise InputError("samples=0 recomputes nothing, and full=True everything; leave one of them out")
    if samples:
        prepared = prepare(job or describe_job(None, {}, run=path)[0])
        check_same_job(RunDirectory(kernel.path), prepared.digests)
    assert kernel.plan is not None  # it was opened from a run directory
    try:
        found = audit(kernel.path, kernel.plan, prepared, samples, seed, advance, full=full)
    finally:
        if prepared is not None:
            prepared.reader.close()
    directory = RunDirectory(kernel.path)
    keep_audit(directory, kernel.plan, found)
    mirror_paper(directory, again.AUDIT)
    return found


def info_checkpoints(path: str | Path) -> list[RunInfo]:
    """What became of the runs of a directory of checkpoints.

    Args:
        path: the directory.

    Returns:
        The state of every run that was begun, in order; empty if the directory holds no checkpoints.
    """
    entries = read_index(Path(path)) or []
    folders = [Path(path) / entry["name"] for entry in entries]
    return [run_info(folder) for folder in folders if RunDirectory(folder).holds_run]


def missing_checkpoints(path: str | Path) -> list[str]:
    """Names of the checkpoints of a directory whose runs were never begun, or are gone.

    Args:
        path: the directory.
    """
    entries = read_index(Path(path)) or []
    return [entry["name"] for entry in entries if not RunDirectory(Path(path) / entry["name"]).holds_run]


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
    return calibration.calibrate(resolved_device(checked_device(device)), existing_folder(Path(disk)))
