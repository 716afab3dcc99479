"""Surrogates of a run's network by the run's kernel, and by kernels of features that are run for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from ooc_ntk.algebra.kernel import Kernel
from ooc_ntk.algebra.surrogate import SurrogateReport, check_kernel, check_settings, fit_surrogate
from ooc_ntk.errors import RunConflictError, unknown_name
from ooc_ntk.storage.directory import RunDirectory

from .driver import Observer, check_same_job, run_directory
from .executors import executor_of
from .predictions import class_outputs
from .prepare import PreparedJob
from .session import Asked, run_job

#: Kernels of features that surrogates by a run's own kernel are set against, with the folder each is run in. The first
#: two are Engel et al.'s; ``embedding`` is ``conjugate`` times the layer's width, which a relative ridge cancels.
BASELINES: Final = {"embedding:*": "embedding-all", "conjugate": "conjugate", "embedding": "embedding"}


def check_surrogates(
    kernel: Kernel, kinds: Sequence[str], baselines: Sequence[str], targets: str, ridge_ratio: float
) -> None:
    """Refuse what no surrogates can be made of, before anything is computed.

    Raises:
        InputError: for a name that is not known, a ridge ratio that is not above 0, or a kernel without test rows or
            with several rows a sample.
    """
    check_settings(kinds, targets, ridge_ratio)
    for name in baselines:
        if name not in BASELINES:
            raise unknown_name("baseline", name, BASELINES)
    check_kernel(kernel)


def fit_surrogates(
    kernel: Kernel,
    prepared: PreparedJob,
    kinds: Sequence[str],
    baselines: Sequence[str],
    targets: str,
    ridge_ratio: float,
    seed: int,
    asked: Asked,
    progress: bool | Observer,
    advance: Callable[[str], None],
) -> SurrogateReport:
    """Run the network on all samples, then the baselines, and fit every kind of surrogate by every kernel.

    Args:
        kernel: of a run directory, checked by :func:`check_surrogates`.
        prepared: its job; its samples are given back.
        kinds: of surrogates.
        baselines: names of :data:`BASELINES`; that of the kernel itself is passed over.
        targets: what surrogates are fitted to.
        ridge_ratio: ridge over the mean diagonal of each kernel.
        seed: of the bootstrap.
        asked: budget of the baselines' runs and of the fits.
        progress: whether these show their progress, or an observer.
        advance: told what is being done.

    Returns:
        The surrogates.

    Raises:
        OocNtkError: as :func:`ooc_ntk.surrogate`.
    """
    assert kernel.plan is not None  # it was opened from a run directory
    try:
        check_same_job(RunDirectory(kernel.path), prepared.digests)
        advance("running the network on all samples")
        network = class_outputs(prepared, kernel.plan.batch_size)
    finally:
        prepared.reader.close()
    sketch = kernel.plan.projection
    kernels = {kernel.plan.kernel if sketch is None else f"{kernel.plan.kernel} {sketch.kind}:{sketch.dim}": kernel}
    for name in dict.fromkeys(baselines):
        if name == kernel.plan.kernel:
            continue
        folder = kernel.path / "surrogate" / BASELINES[name]
        _drop_outgrown(RunDirectory(folder), prepared.digests, advance)
        advance(f"running the baseline {name}")
        same = prepared.job.with_model(kernel=name, outputs="logits", parameters=None, projection=None, by=None)
        run_job(same, run_directory(folder), asked, executor_of(None), progress)
        kernels[name] = Kernel(folder)
    found = []
    for name, each in kernels.items():
        for kind in dict.fromkeys(kinds):
            advance(f"fitting a {kind} surrogate by the kernel {name}")
            found.append(
                fit_surrogate(
                    each,
                    network,
                    kind,
                    name=name,
                    targets=targets,
                    ridge_ratio=ridge_ratio,
                    budget=asked.budget,
                    seed=seed,
                )
            )
    return SurrogateReport(tuple(found), network)


def _drop_outgrown(baseline: RunDirectory, digests: Mapping[str, str], advance: Callable[[str], None]) -> None:
    """Delete the run of a baseline that was made before the run it belongs to grew, and say so."""
    if not baseline.holds_run:
        return
    try:
        check_same_job(baseline, {part: digests[part] for part in ("model", "data")})
    except RunConflictError:
        advance(f"deleting {baseline.root}, a baseline of the samples that the run had before")
        baseline.delete_folder(".")
