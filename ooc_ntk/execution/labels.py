"""Labels of a run's samples: read from its data in pieces, without the inputs where these are kept apart."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ooc_ntk.errors import InputError, RunConflictError
from ooc_ntk.inputs.job import LIVE, Job
from ooc_ntk.inputs.jobfile import data_stand_ins, read_job_file
from ooc_ntk.inputs.samples import SampleSource
from ooc_ntk.planning.plan import Plan
from ooc_ntk.storage.directory import RunDirectory

#: Samples whose targets are read at once. (A choice: of a Dataset their inputs are read with them.)
PIECE: Final = 256


class Labels(NamedTuple):
    """Integer labels of the samples of a run.

    Attributes:
        train: (train samples,) int64.
        test: (test samples,) int64; empty without test data.
    """

    train: NDArray[np.int64]
    test: NDArray[np.int64]

    @property
    def classes(self) -> int:
        """Classes, counted up to the largest label."""
        return 1 + int(max(self.train.max(initial=0), self.test.max(initial=0)))


def run_labels(path: str | Path, job: Job | None = None) -> Labels | None:
    """Labels of the train and test samples of a run.

    Args:
        path: the run directory.
        job: its job; needed only where it was made from live objects.

    Returns:
        The labels; None where the data have no targets, or others than :func:`class_labels` takes.

    Raises:
        InputError: if the data cannot be read, or were live objects and no job is given.
        RunConflictError: if the data have another number of samples than the run.
        StorageError: if there is no plan in the directory.
    """
    directory = RunDirectory(path)
    plan = Plan.load(directory.plan_path)
    chosen = job or _stored_job(directory)
    sources = [chosen.train_source(), chosen.test_source()]
    found = []
    for what, source, count in zip(("train", "test"), sources, (plan.train_samples, plan.test_samples), strict=True):
        there = 0 if source is None else len(source)
        if there != count:
            raise RunConflictError(
                f"the run in {path} is of {count:,} {what} samples, its data have {there:,} now; give its job as it was"
            )
        labels: NDArray[np.int64] | None = np.empty(0, dtype=np.int64)
        if source is not None:
            try:
                labels = class_labels(source)
            finally:
                source.close()
        if labels is None:
            return None
        found.append(labels)
    return Labels(*found)


def _stored_job(directory: RunDirectory) -> Job:
    """The job of a run, made from its description.

    Raises:
        InputError: if its data were live objects.
    """
    stored = read_job_file(directory.job_path)
    if LIVE in (stored.train, stored.test):
        raise InputError(
            f"the run in {directory.root} was made from live Python data, so that its labels are not known here; give "
            "targets, or its job"
        )
    return Job.from_spec({**stored.arguments(), **data_stand_ins(stored)})


def class_labels(source: SampleSource) -> NDArray[np.int64] | None:
    """Classes of all samples: one whole number from 0 each, or True and False as 1 and 0.

    Args:
        source: the data; sources that know their targets read nothing else.

    Returns:
        (samples,); None where targets are none, other numbers, or several a sample.

    Raises:
        InputError: if a sample cannot be read.
    """
    parts = []
    for start in range(0, len(source), PIECE):
        targets = source.targets(start, min(start + PIECE, len(source)))
        if targets is None or not _are_labels(targets):
            return None
        parts.append(targets.reshape(-1).to(torch.int64).cpu().numpy())
    return np.concatenate(parts)


def _are_labels(targets: torch.Tensor) -> bool:
    """Whether targets are one whole number from 0 per sample."""
    if targets.is_floating_point() or targets.is_complex() or targets[0].numel() != 1:
        return False
    return targets.dtype == torch.bool or bool((targets >= 0).all())
