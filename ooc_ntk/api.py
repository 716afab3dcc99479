"""The public verbs: plan a job, run it, open what it left, verify it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from numpy.typing import ArrayLike
from torch import nn

from .algebra.checkpoints import Checkpoints, Drift, read_index
from .algebra.external import external_features
from .algebra.features import Features
from .algebra.fed import STATE, fed_features
from .algebra.kernel import Kernel
from .algebra.ridge import Advance, Solution
from .algebra.spectrum import Spectrum
from .algebra.summary import SpectrumSummary
from .algebra.surrogate import KINDS, RIDGE_RATIO, Surrogate, SurrogateReport
from .compute.functions import ClipOutput
from .compute.machine import peak_resident_bytes
from .compute.rules.table import forget_layer_rule, layer_rule
from .errors import BudgetError, InputError, OocNtkError, RunConflictError, VerificationError
from .execution import calibration
from .execution import checkpoints as execution_checkpoints
from .execution.audit import AUDITED_SAMPLES, Audit, audit
from .execution.checkpoints import Weights
from .execution.driver import Observer, check_same_job, run_directory
from .execution.executors import executor_named
from .execution.extend import extend_run, recover
from .execution.featurizer import Featurizer
from .execution.fitting import Fit, FitSettings, fit_run
from .execution.labels import Labels, run_labels
from .execution.nearest import NearestResult, NearestSettings, find_nearest
from .execution.prepare import prepare, resolved_device
from .execution.session import Asked, existing_folder, planned, run_job
from .execution.spectra import Look, spectrum_summary
from .execution.status import RunInfo, keep_audit, run_info
from .execution.surrogates import check_surrogates, fit_surrogates
from .inputs.callables import absolute_callable, is_callable_spec
from .inputs.images.seeds import parse_seed_name
from .inputs.job import LIVE, Job, checked_device
from .inputs.jobfile import read_job_file
from .inputs.models import absolute_model
from .inputs.named_files import named_files
from .inputs.specs import FILE_KINDS, absolute_spec, train_and_test
from .planning.budget import Budget
from .planning.plan import Plan
from .planning.planner import Preferences
from .planning.projection import Projection, parsed_fields
from .planning.rates import MachineRates
from .storage import again
from .storage.directory import RunDirectory
from .storage.results import write_result
from .units import parse_bytes

__all__ = [
    "Audit",
    "Budget",
    "BudgetError",
    "Checkpoints",
    "ClipOutput",
    "Drift",
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
    "RunConflictError",
    "RunInfo",
    "Solution",
    "Spectrum",
    "SpectrumSummary",
    "Surrogate",
    "SurrogateReport",
    "VerificationError",
    "calibrate",
    "describe_job",
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
    "run",
    "run_checkpoints",
    "run_labels",
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
    return planned(prepare(job), before, budget, preferences, Path(out or "."), rates)


def run(
    job: Job,
    out: str | Path,
    *,
    plan: Plan | None = None,
    budget: Budget | None = None,
    preferences: Preferences | None = None,
    scheduler: str | None = None,
    progress: bool | Observer = True,
    watch_disk: str | int | None = None,
    proof: bool = True,
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
        watch_disk: disk to be left free, as ``"2GiB"``: the run stops, to go on later, before less is; None lets it
            fill the disk, and stops there.
        proof: whether the last step proves as many samples of the kernel, against ``J(Jᵀv)`` in float64, as a tenth of
            the run's time and the promised memory allow.

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
    asked = Asked(plan=plan, budget=budget, preferences=preferences, watch_disk=_disk_margin(watch_disk), proof=proof)
    run_job(job, run_directory(out), asked, executor_named(scheduler), progress)
    return Kernel(out)


def extend(
    path: str | Path,
    train: object,
    *,
    job: Job | None = None,
    budget: Budget | None = None,
    progress: bool | Observer = True,
    scheduler: str | None = None,
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
        scheduler: ``threads`` (default) or ``serial``.
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
    extend_run(path, train, job, budget, executor_named(scheduler), progress, watch_disk=margin, proof=proof)
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
    scheduler: str | None = None,
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
        scheduler: ``threads`` (default) or ``serial``.
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
    return execution_checkpoints.run_checkpoints(
        job, Path(out), weights, asked, executor_named(scheduler), progress, announce
    )


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
        path: a run directory of a projected kernel, or the folder of a :class:`Featurizer`; or a file of TRAK or
            projection_ntk: a NumPy file (TRAK's ``grads.mmap`` is one) or a raw memory map.
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
    if (path / STATE).exists():
        return Kernel.of_features(path, fed_features(path))
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
        check_same_job(RunDirectory(path), prepared.digests)
    assert kernel.plan is not None  # it was opened from a run directory
    try:
        found = audit(kernel.path, kernel.plan, prepared, samples, seed, advance, full=full)
    finally:
        if prepared is not None:
            prepared.reader.close()
    keep_audit(RunDirectory(path), kernel.plan, found)
    return found


def surrogate(
    path: str | Path,
    job: Job | None = None,
    *,
    kinds: Sequence[str] = KINDS,
    baselines: Sequence[str] = ("embedding:*", "conjugate"),
    targets: str = "labels",
    ridge_ratio: float = RIDGE_RATIO,
    seed: int = 0,
    budget: Budget | None = None,
    progress: bool | Observer = True,
    advance: Callable[[str], None] = lambda what: None,  # noqa: ARG005
) -> SurrogateReport:
    """Fit kernel surrogates of a run's network, and compare them with it on the test samples (Engel et al. 2023).

    By the run's own kernel and by the baselines, which are runs of the same job, in folders of ``surrogate`` in the run
    directory, that resume as any run does. Figures and arrays are written there as ``surrogate.json`` and ``.npz``.
    Nothing larger than (samples, classes) is held of a logistic surrogate; a ridge one is :meth:`Kernel.solve`.

    Args:
        path: the run directory of a finished kernel with test samples.
        job: the job; None makes it again from the stored job file.
        kinds: ``ridge``, ``logistic``, or both.
        baselines: any of ``embedding:*`` (features of all layers), ``conjugate`` (of the last one) and ``embedding``,
            whose surrogates are those of ``conjugate``: the kernels differ by a factor.
        targets: ``labels``, as in the paper, or ``outputs`` of the network for the train samples: its scores for a
            ridge surrogate, its probabilities for a logistic one.
        ridge_ratio: ridge over the mean diagonal of each kernel's train square.
        seed: of the bootstrap for standard errors.
        budget: limits for the baselines' runs.
        progress: whether to show the progress of these runs on the terminal, or an observer.
        advance: told what is being done.

    Returns:
        The surrogates.

    Raises:
        InputError: if there are no test samples or class labels, the kernel is a ``full`` one or of outputs that look
            at the labels, a name or the ridge ratio is wrong, or the job was made from live objects and is not given.
        RunConflictError: if it is another job.
        StorageError: if there is no run, it is not finished, or files cannot be read or written.
        OocNtkError: as :func:`run`, of the baselines.
    """
    kernel = Kernel(path)
    check_surrogates(kernel, kinds, baselines, targets, ridge_ratio)
    prepared = prepare(job or describe_job(None, {}, run=path)[0])
    asked = Asked(budget=budget)
    report = fit_surrogates(kernel, prepared, kinds, baselines, targets, ridge_ratio, seed, asked, progress, advance)
    write_result(kernel.path, "surrogate", {**report.figures(), "seed": seed}, report.arrays())
    return report


def fit(
    path: str | Path,
    targets: str | Path | ArrayLike | None = None,
    *,
    ridge: float | None = None,
    ridge_ratio: float | None = None,
    ridges: ArrayLike | None = None,
    centered: bool = False,
    cosine: bool = False,
    method: str = "auto",
    probes: int = 16,
    job: Job | None = None,
    budget: Budget | None = None,
    device: str = "cpu",
    seed: int = 0,
    advance: Advance | None = None,
) -> Fit:
    """Kernel ridge regression of a finished run, as ``ooc-ntk fit`` prints it: the ridge by GCV, errors, accuracies.

    Args:
        path: the run directory.
        targets: (train rows,) or (train rows, targets), or of all rows, or a NumPy file of them; None takes the class
            labels of the run's data, one target per class, less 1/classes.
        ridge: one absolute ridge; with none of the three GCV chooses, from 1e-6 to 10 of the mean diagonal.
        ridge_ratio: one ridge over the mean diagonal.
        ridges: absolute ridges that GCV chooses from.
        centered: whether kernel and targets are centred, which fits an intercept.
        cosine: whether the kernel is divided by the roots of its diagonal first.
        method: as for :meth:`Kernel.solve`, with a grid as for :meth:`Kernel.gcv`.
        probes: as for :meth:`Kernel.gcv`.
        job: the run's job, for its labels; needed only where it was made from live objects.
        budget: as for :meth:`Kernel.solve`.
        device: torch device that multiplies.
        seed: of everything random.
        advance: told what is being done.

    Returns:
        Coefficients, the curve over the ridges, predictions and errors.

    Raises:
        InputError: for wrong targets or ridges, data without labels, or a matrix that is not positive definite.
        BudgetError: if no method fits.
        StorageError: if there is no run, it is not finished, or files cannot be read.
    """
    asked = FitSettings(targets, ridge, ridge_ratio, ridges, centered, cosine, method, probes, budget, seed, device)
    return fit_run(Kernel(path), asked, lambda: job, advance)


def nearest(
    path: str | Path,
    k: int = 5,
    *,
    by: str = "kernel",
    rows: str = "test",
    backend: str = "exact",
    show: int = 8,
    seed: int = 0,
    job: Job | None = None,
    given: Mapping[str, object] | None = None,
) -> NearestResult:
    """Find the nearest train samples of a run, describe some by the run's data, and write all into its directory.

    Args:
        path: the run directory; ``nearest/nearest.json`` and ``nearest.npz`` are written there.
        k: neighbours of each sample.
        by: ``kernel`` or ``cosine``.
        rows: whose neighbours: ``test`` or ``train``.
        backend: ``exact`` or ``faiss``.
        show: samples to be described.
        seed: of their choice.
        job: the job, for its data; None opens the data again that the stored job file names.
        given: arguments of a job (train, test, data_dir) that override the stored ones.

    Returns:
        Neighbours of every sample, and those that are described.

    Raises:
        InputError: for settings that the kernel does not allow, or data that are given and cannot be used.
        RunConflictError: if data are given that are not those of the run.
        BudgetError: if something does not fit in memory.
        StorageError: if there is no finished run, or the result cannot be written.
    """
    asked = NearestSettings(k=k, by=by, rows=rows, backend=backend, show=show, seed=seed)
    kernel = Kernel(path)
    return find_nearest(
        kernel, asked, lambda: job or _job_of_data(path, given or {}), required=bool(job is not None or given)
    )


def _job_of_data(path: str | Path, given: Mapping[str, object]) -> Job:
    """The job of a run as far as its data go: what else it was made of need not be there."""
    stored = read_job_file(RunDirectory(path).job_path)
    stand_ins: dict[str, object] = {"device": "cpu"}
    if stored.model == LIVE:
        stand_ins |= {"model": nn.Identity(), "weights": None}
    if stored.outputs == LIVE:
        stand_ins["outputs"] = "logits"
    return describe_job(None, {**stand_ins, **given}, run=path)[0]


def spectrum(
    path: str | Path,
    k: int | None = None,
    *,
    every: bool = False,
    targets: str | Path | ArrayLike | None = None,
    job: Job | None = None,
    centered: bool = False,
    cosine: bool = False,
    method: str = "auto",
    layers: bool = False,
    compare: Sequence[str | Path] = (),
    check_data: bool = True,
    memory: str | int | None = None,
    seed: int = 0,
) -> SpectrumSummary:
    """The spectrum of a finished kernel and what follows from it, as ``ooc-ntk spectrum`` prints it.

    Args:
        path: the run directory.
        k: leading eigenpairs; None for all of up to 4,000 rows, if they fit, and 50 of more.
        every: whether the whole spectrum is wanted in memory, of whatever size.
        targets: (train rows,) or (train rows, targets), or a NumPy file of them; None takes the labels of the run's
            data, where it has any.
        job: the run's job, for its labels; needed only where it was made from live objects.
        centered: whether the kernel is centred first.
        cosine: whether it is divided by the roots of its diagonal first.
        method: as for :meth:`Kernel.eigh`.
        layers: whether the layers are aligned, of a run made with ``by="layer"``.
        compare: run directories of other kernels of the same samples, to be aligned with.
        check_data: whether those of other data are refused.
        memory: bytes that may be taken.
        seed: of the random start.

    Returns:
        All figures.

    Raises:
        InputError: for a wrong k, method or targets, or kernels that cannot be aligned.
        BudgetError: if it does not fit the memory.
        RunConflictError: for a run of other data.
        StorageError: if there is no run, or it is not finished.
    """
    if every and k is not None:
        raise InputError(f"all eigenpairs were asked for and k={k} of them; leave one of both out")
    return spectrum_summary(
        Kernel(path),
        Look(centered=centered, cosine=cosine),
        k=k,
        every=every,
        targets=targets,
        job=job,
        method=method,
        layers=layers,
        compare=[Kernel(each) for each in compare],
        check_data=check_data,
        memory=memory,
        seed=seed,
    )


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


def describe_job(
    job_file: str | Path | None,
    given: Mapping[str, object],
    *,
    run: str | Path | None = None,
    named_model: str | None = None,
    host: str | int | None = None,
    device_memory: str | int | None = None,
    disk: str | int | None = None,
) -> tuple[Job, Budget]:
    """Make a job and a budget from a job file or a run directory, with some arguments given by hand.

    Args:
        job_file: TOML file, or the name of a data set (``CIFAR-10_0_2500_0_1000``, ``cifar10``), or None.
        given: arguments of a job that override what the file says.
        run: a run directory; its stored job is used where neither a file nor a model is given.
        named_model: a model beside the name of a data set.
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
    if job_file is not None and not _is_job_file(job_file):
        given, job_file = {**given, **_named_job(str(job_file), named_model, given)}, None
    elif named_model is not None:
        raise InputError(f"a job file names its own model; give another one as --model {named_model}")
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


def _is_job_file(text: str | Path) -> bool:
    """Whether a word is a job file and no data set."""
    return isinstance(text, Path) or text.endswith(".toml") or (Path(text).is_file() and not text.endswith(FILE_KINDS))


def _named_job(data: str, model: str | None, given: Mapping[str, object]) -> dict[str, object]:
    """Train data, test data and model of the words before all flags."""
    for flag, value in (("train", data), ("model", model)):
        if value is not None and given.get(flag) is not None:
            raise InputError(
                f"{flag} is given twice, as {value!r} and as --{flag} {given[flag]}; leave one of them out"
            )
    train, test = train_and_test(data)
    found: dict[str, object] = {"train": train}
    if test is not None and given.get("test") is not None:
        raise InputError(
            f"{data!r} names test data as well, {test}, beside --test {given['test']}; leave --test out, or name the "
            f"train data alone: --train {train}"
        )
    if test is not None:
        found["test"] = test
    return found if model is None else {**found, "model": model}


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
            found[name] = value if "_" in value and parse_seed_name(value) else absolute_spec(value, None, name)
        elif name == "model" and isinstance(value, str):
            found[name] = absolute_model(value)
        elif name == "outputs" and isinstance(value, str):
            found[name] = absolute_callable(value, None, name) if is_callable_spec(value) else value
        elif name in ("weights", "data_dir", "image_cache") and isinstance(value, str | Path):
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
    return calibration.calibrate(resolved_device(checked_device(device)), existing_folder(Path(disk)))
