"""Several checkpoints of one model: a run for each, with one plan and one reading of the data."""

from __future__ import annotations

import copy
import gc
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from ooc_ntk.algebra.checkpoints import INDEX, Checkpoints, read_index, write_index
from ooc_ntk.compute.finite import all_finite
from ooc_ntk.compute.machine import return_free_memory
from ooc_ntk.errors import InputError, NonFiniteError, RunConflictError
from ooc_ntk.inputs.job import LIVE, Job
from ooc_ntk.inputs.weights import apply_weights, check_alike, load_weights
from ooc_ntk.storage.local import free_disk_bytes

from .driver import Observer, run_directory
from .executors import Executor
from .session import Asked, run_job

logger = logging.getLogger(__name__)

#: Share of the free disk that decoded images may take while checkpoints are run (a choice).
DECODED_SHARE: Final = 0.5

#: Weights of one checkpoint: a file, or a state dict.
Weights = Path | str | Mapping[str, torch.Tensor]


def run_checkpoints(
    job: Job,
    out: Path,
    weights: Sequence[Weights],
    asked: Asked,
    executor: Executor,
    progress: bool | Observer = True,
    announce: Callable[[int, str], None] = lambda number, name: None,  # noqa: ARG005
) -> Checkpoints:
    """Run a job once for each of several weights, or what is left of that.

    Only one set of weights is in memory at a time, as a model; files are mapped while they are copied into it.

    Args:
        job: what is wanted, without weights.
        out: directory of the checkpoints; each gets a run directory in it.
        weights: files of weights, in the order of training; state dicts where the job's model is live.
        asked: plan, budget and preferences; the first checkpoint's plan serves all of an exact kernel.
        executor: runs the tasks.
        progress: whether to show progress on the terminal, or an observer.
        announce: told of every checkpoint before it is run: its number and name.

    Returns:
        The finished kernels.

    Raises:
        InputError: if there are no weights, or some are of another model; before anything is computed.
        RunConflictError: if the directory holds other checkpoints.
        OocNtkError: as :func:`ooc_ntk.run`.
    """
    if job.weights is not None:
        raise InputError("the job names weights of its own; leave them out and give those of every checkpoint")
    if not weights:
        raise InputError("no weights are given; name at least one checkpoint, as --weights epoch1.pt epoch2.pt")
    weights = [given if isinstance(given, Mapping) else _absolute(given, job) for given in weights]
    _check_all(weights)
    entries = _entries(weights, job)
    _check_directory(out, entries)
    template = asked.template
    base = job.with_model(model=copy.deepcopy(job.module())) if job.model_is_live else job
    base, decoded = _decoded_once(base, out, len(weights))
    try:
        _with_weights(base, weights[0]).module()  # weights of another model are refused before anything is computed
    except InputError:
        if decoded is not None:
            shutil.rmtree(decoded, ignore_errors=True)
        with suppress(OSError):
            out.rmdir()
        raise
    write_index(out, entries)
    for number, (entry, given) in enumerate(zip(entries, weights, strict=True)):
        announce(number, entry["name"])
        chosen = _with_weights(base, given)
        followed = run_job(
            chosen,
            run_directory(out / entry["name"]),
            replace(asked, template=template),
            executor,
            progress,
        )
        base._made.update({name: value for name, value in chosen._made.items() if name != "model"})
        if followed.projection is None:  # a pilot measures how large the errors of a projected kernel are
            template = followed
        del chosen
        gc.collect()  # the model goes before the next one comes
        return_free_memory()
    if decoded is not None:
        shutil.rmtree(decoded, ignore_errors=True)
    return Checkpoints(out)


def _decoded_once(job: Job, out: Path, count: int) -> tuple[Job, Path | None]:
    """The job with decoded images kept from checkpoint to checkpoint, where there are some and the disk has room.

    Returns:
        The job, and the folder of the images if it is not the user's own.
    """
    if count < 2 or job.image_cache is not None:
        return job, None
    sources = [source for source in (job.train_source(), job.test_source()) if source is not None]
    needed = sum(len(source) * source.decoded_bytes for source in sources if source.decoded_bytes is not None)
    if not needed or needed > DECODED_SHARE * free_disk_bytes(out):
        return job, None
    for source in sources:
        source.close()
    folder = out / "decoded"
    found = job.with_model(image_cache=folder.absolute())
    for what in ("train", "test"):  # opened again, with the cache
        found._made.pop(what, None)
    return found, folder


def _with_weights(job: Job, given: Weights) -> Job:
    """The job with the weights of one checkpoint."""
    if not job.model_is_live:
        assert isinstance(given, Path | str)
        return job.with_model(weights=given)
    apply_weights(job.module(), given if isinstance(given, Mapping) else load_weights(given))
    return job.with_model(model=job.module())


def _absolute(given: Path | str, job: Job) -> Path:
    """A file of weights, relative to the job's folder."""
    if not isinstance(given, Path | str):
        raise InputError(f"weights must be files or state dicts, got {type(given).__name__}")
    return (Path.cwd() / (job.base or ".") / Path(given).expanduser()).absolute()


def _check_all(weights: Sequence[Weights]) -> None:
    """Refuse weights that cannot be read or are not all of one model."""
    first: dict[str, Any] = {}
    for number, given in enumerate(weights):
        state = dict(given) if isinstance(given, Mapping) else load_weights(given)
        for name, value in state.items():
            if not all_finite(value):
                which = f"number {number}" if isinstance(given, Mapping) else str(given)
                raise NonFiniteError(
                    f"weight {name!r} of checkpoint {which} holds NaN or infinity; leave that checkpoint out"
                )
        shapes = {name: torch.empty(value.shape, device="meta") for name, value in state.items()}
        if number:
            check_alike(first, shapes, f"number {number}" if isinstance(given, Mapping) else given)
        else:
            first = shapes


def _entries(weights: Sequence[Weights], job: Job) -> list[dict[str, str]]:
    """Name and origin of every checkpoint."""
    found = []
    for number, given in enumerate(weights):
        if isinstance(given, Mapping):
            if not job.model_is_live:
                raise InputError(
                    f"weights number {number} are a state dict, and the model is {job.model!r}; give files, or a module"
                )
            found.append({"name": f"{number:03d}", "weights": LIVE})
        else:
            found.append({"name": f"{number:03d}-{Path(given).stem}", "weights": str(given)})
    return found


def _check_directory(out: Path, entries: Sequence[dict[str, str]]) -> None:
    """Refuse a directory that holds anything but the first of these checkpoints."""
    there = read_index(out)
    if there is None:
        names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
        if names:
            raise RunConflictError(
                f"{out} holds other files ({', '.join(names[:3])}) and no {INDEX}; choose an empty folder as --out"
            )
        return
    if there != list(entries[: len(there)]):
        listed = ", ".join(entry["name"] for entry in there)
        raise RunConflictError(
            f"{out} holds other checkpoints ({listed}); give the same ones in the same order, perhaps with more after "
            "them, or choose another --out"
        )
