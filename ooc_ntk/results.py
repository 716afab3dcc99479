"""What the papers compute of a finished kernel: regression, spectrum, nearest samples, surrogates; kept in its run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from numpy.typing import ArrayLike

from .algebra.kernel import Kernel
from .algebra.ridge import Advance
from .algebra.summary import SpectrumSummary
from .algebra.surrogate import KINDS, RIDGE_RATIO, SurrogateReport
from .errors import InputError
from .execution.driver import Observer
from .execution.fitting import Fit, FitSettings, fit_run
from .execution.nearest import NearestResult, NearestSettings, described, find_nearest
from .execution.prepare import prepare
from .execution.session import Asked
from .execution.shown import ShownSample
from .execution.spectra import Look, spectrum_summary
from .execution.surrogates import check_surrogates, fit_surrogates
from .inputs.job import Job
from .inputs.jobfile import data_stand_ins, read_job_file
from .jobs import describe_job
from .planning.budget import Budget
from .storage.directory import RunDirectory
from .storage.results import check_writable, write_result
from .storage.storeurl import checked_store, is_store


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
        budget: limits for the baselines' runs and for the fits.
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
    kernel = _opened(path, "surrogate")
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
        path: the run directory; ``fit/fit.json`` (figures) and ``fit.npz`` (coefficients, targets, predictions) are
            written there.
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
        StorageError: if there is no run, it is not finished, files cannot be read, or the result cannot be written.
    """
    asked = FitSettings(targets, ridge, ridge_ratio, ridges, centered, cosine, method, probes, budget, seed, device)
    found = fit_run(_opened(path, "fit"), asked, lambda: job, advance)
    write_result(found.path, "fit", found.figures(), found.arrays())
    return found


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
    keep: bool = True,
) -> NearestResult:
    """Find the nearest train samples of a run, describe some by the run's data, and write all into its directory.

    Args:
        path: the run directory; ``nearest/nearest.json`` (settings, summary, samples that are shown) and
            ``nearest.npz`` (numbers and values of all) are written there.
        k: neighbours of each sample.
        by: ``kernel`` or ``cosine``.
        rows: whose neighbours: ``test`` or ``train``.
        backend: ``exact`` or ``faiss``.
        show: samples to be described.
        seed: of their choice.
        job: the job, for its data; None opens the data again that the stored job file names.
        given: arguments of a job (train, test, data_dir) that override the stored ones.
        keep: whether the result is written.

    Returns:
        Neighbours of every sample, and those that are described.

    Raises:
        InputError: for settings that the kernel does not allow, or data that are given and cannot be used.
        RunConflictError: if data are given that are not those of the run.
        BudgetError: if something does not fit in memory.
        StorageError: if there is no finished run, or the result cannot be written.
    """
    asked = NearestSettings(k=k, by=by, rows=rows, backend=backend, show=show, seed=seed)
    kernel = _opened(path, "nearest") if keep else Kernel(path)
    found = find_nearest(
        kernel, asked, lambda: job or _job_of_data(path, given or {}), required=bool(job is not None or given)
    )
    if keep:
        write_result(kernel.path, "nearest", found.figures, found.arrays())
    return found


def describe_samples(
    path: str | Path, rows: str, mine: Sequence[int], train: Sequence[int], *, job: Job | None = None
) -> tuple[dict[int, ShownSample], dict[int, ShownSample]]:
    """Some samples of a run as people look at them: pixels, text, label.

    Args:
        path: the run directory of a finished run.
        rows: ``test`` or ``train``, whose numbers ``mine`` are.
        mine: numbers of samples.
        train: numbers of train samples.
        job: the job, for its data; None opens the data again that the stored job file names.

    Returns:
        Both, by number.

    Raises:
        InputError: if the data cannot be had.
        RunConflictError: if they are not those of the run.
        StorageError: if there is no finished run.
    """
    return described(Kernel(path), job or _job_of_data(path, {}), rows, mine, train)


def _opened(path: str | Path, name: str) -> Kernel:
    """The kernel of a run, into whose directory a result can be written.

    Raises:
        InputError: if it is a store, where no results are written.
        StorageError: if there is none, or it cannot.
    """
    if is_store(path):
        raise InputError(
            f"the result of {name!r} is written into a run directory, and {checked_store(str(path))} is a store; give "
            "the run directory, or compute with ooc_ntk.open(url)"
        )
    kernel = Kernel(path)
    check_writable(kernel.path, name)
    return kernel


def _job_of_data(path: str | Path, given: Mapping[str, object]) -> Job:
    """The job of a run as far as its data go: what else it was made of need not be there."""
    stored = read_job_file(RunDirectory(path).job_path)
    return describe_job(None, {**data_stand_ins(stored), **given}, run=path)[0]


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
    budget: Budget | None = None,
    seed: int = 0,
) -> SpectrumSummary:
    """The spectrum of a finished kernel and what follows from it, as ``ooc-ntk spectrum`` prints it.

    Args:
        path: the run directory; ``spectrum/spectrum.json`` (figures) and ``spectrum.npz`` (eigenvalues, eigenvectors,
            residuals, shares of the targets, alignments) are written there.
        k: leading eigenpairs; None for all of up to 4,000 rows, if they fit, and 50 of more.
        every: whether the whole spectrum is wanted in memory, of whatever size.
        targets: (train rows,) or (train rows, targets), or of all rows, of which those of the test rows are left out,
            or a NumPy file of them; None takes the labels of the run's data, where it has any.
        job: the run's job, for its labels; needed only where it was made from live objects.
        centered: whether the kernel is centred first.
        cosine: whether it is divided by the roots of its diagonal first.
        method: as for :meth:`Kernel.eigh`.
        layers: whether the layers are aligned, of a run made with ``by="layer"``.
        compare: run directories of other kernels of the same samples, to be aligned with.
        check_data: whether those of other data are refused.
        budget: host memory of the whole process; a limit that is None takes 80% of what is free.
        seed: of the random start.

    Returns:
        All figures.

    Raises:
        InputError: for a wrong k, method or targets, or kernels that cannot be aligned.
        BudgetError: if it does not fit the memory.
        RunConflictError: for a run of other data.
        StorageError: if there is no run, it is not finished, files cannot be read, or the result cannot be written.
    """
    if every and k is not None:
        raise InputError(f"all eigenpairs were asked for and k={k} of them; leave one of both out")
    kernel = _opened(path, "spectrum")
    found = spectrum_summary(
        kernel,
        Look(centered=centered, cosine=cosine),
        k=k,
        every=every,
        targets=targets,
        job=job,
        method=method,
        layers=layers,
        compare=[Kernel(each) for each in compare],
        check_data=check_data,
        budget=budget,
        seed=seed,
    )
    write_result(kernel.path, "spectrum", found.figures(), found.arrays())
    return found
