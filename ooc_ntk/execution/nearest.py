"""Nearest samples of a run: found in its kernel, described by its data."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ooc_ntk.algebra.kernel import Kernel
from ooc_ntk.algebra.neighbours import Neighbours
from ooc_ntk.errors import InputError, OocNtkError
from ooc_ntk.inputs.job import Job
from ooc_ntk.inputs.samples import SampleSource
from ooc_ntk.storage.directory import RunDirectory

from .driver import check_same_job
from .labels import class_labels
from .prepare import data_digest
from .shown import ShownSample, shown_samples

#: Neighbours of a sample that are shown, however many are found (a choice: what fits a page).
SHOWN_NEIGHBOURS: Final = 10

#: Train samples that are named as those that are near to most (a choice).
NAMED_HUBS: Final = 3


@dataclass(frozen=True)
class NearestSettings:
    """What is wanted.

    Attributes:
        k: neighbours of each sample.
        by: ``kernel`` or ``cosine``.
        rows: ``test`` or ``train``.
        backend: ``exact`` or ``faiss``.
        show: samples to be shown.
        seed: of their choice.
    """

    k: int = 5
    by: str = "kernel"
    rows: str = "test"
    backend: str = "exact"
    show: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.show < 0:
            raise InputError(f"the number of samples to be shown must be at least 0, got {self.show}")


@dataclass(frozen=True)
class ShownRow:
    """A sample and its nearest ones.

    Attributes:
        sample: the sample.
        neighbours: the nearest train samples, the nearest first.
        values: their kernel entries or cosines.
    """

    sample: ShownSample
    neighbours: tuple[ShownSample, ...]
    values: tuple[float, ...]

    def same(self, place: int) -> bool | None:
        """Whether a neighbour is of the sample's class; None where classes are not known."""
        mine, theirs = self.sample.label, self.neighbours[place].label
        return mine == theirs if isinstance(mine, int) and isinstance(theirs, int) else None


@dataclass(frozen=True)
class NearestResult:
    """The nearest samples of a run.

    Attributes:
        neighbours: of every sample.
        shown: some samples with theirs, for people.
        figures: settings and summary, as they are in ``nearest.json``.
    """

    neighbours: Neighbours
    shown: tuple[ShownRow, ...]
    figures: dict[str, Any]

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Numbers and values of all neighbours."""
        return {"indices": self.neighbours.indices, "values": self.neighbours.values}


def find_nearest(
    kernel: Kernel, asked: NearestSettings, data: Callable[[], Job], *, required: bool = False
) -> NearestResult:
    """Find the nearest samples.

    Without the data, numbers and values are found all the same, and the result says why nothing is shown.

    Args:
        kernel: of a run.
        asked: what is wanted.
        data: makes the job whose data the run is of.
        required: whether data that cannot be had are an error.

    Returns:
        What was found.

    Raises:
        InputError: for settings that the kernel does not allow.
        BudgetError: if something does not fit in memory.
        StorageError: if the kernel cannot be read.
    """
    sources, note = None, ""
    try:
        sources = _sources(kernel, data(), asked.rows)
    except (OocNtkError, OSError) as error:
        if required:
            raise
        note = f"labels, texts and pictures need the data of the run: {error}"
    started = time.perf_counter()
    found = kernel.nearest(asked.k, by=asked.by, rows=asked.rows, backend=asked.backend)
    seconds = time.perf_counter() - started
    shown = _shown(found, asked, sources)
    assert kernel.plan is not None  # it is of a run
    figures: dict[str, Any] = {
        "k": found.k,
        "by": found.by,
        "rows": found.rows,
        "backend": asked.backend,
        "samples": len(found),
        "train_samples": kernel.train_samples,
        "seconds": seconds,
        "same_class": None if sources is None else _same_class(found, *sources),
        "near_to_most": _hubs(found),
        "plan": kernel.plan.digest,
        "note": note,
        "seed": asked.seed,
        "shown": [_described(row) for row in shown],
    }
    return NearestResult(found, shown, figures)


def described(
    kernel: Kernel, job: Job, rows: str, mine: Sequence[int], train: Sequence[int]
) -> tuple[dict[int, ShownSample], dict[int, ShownSample]]:
    """Some samples as people look at them.

    Args:
        kernel: of a run.
        job: the job whose data the run is of.
        rows: ``test`` or ``train``, whose numbers ``mine`` are.
        mine: numbers of samples.
        train: numbers of train samples.

    Returns:
        Both, by number.

    Raises:
        RunConflictError: if they are not the data of the run.
        InputError: if a sample cannot be read.
    """
    sources = _sources(kernel, job, rows)
    return shown_samples(sources[1], mine), shown_samples(sources[0], train)


def _sources(kernel: Kernel, job: Job, rows: str) -> tuple[SampleSource, SampleSource]:
    """Train samples, and those whose neighbours are found.

    Raises:
        RunConflictError: if they are not the data of the run.
    """
    advice = "give the data that the run was made of (--train, --test, --data-dir)"
    check_same_job(RunDirectory(kernel.path), {"data": data_digest(job)}, advice)
    train, test = job.train_source(), job.test_source()
    return train, train if rows == "train" or test is None else test


def _shown(
    found: Neighbours, asked: NearestSettings, sources: tuple[SampleSource, SampleSource] | None
) -> tuple[ShownRow, ...]:
    """Some samples chosen by the seed, each with its nearest ones."""
    count = min(asked.show, len(found))
    chosen = np.sort(np.random.default_rng(asked.seed).choice(len(found), count, replace=False)).tolist()
    numbers = [[number for number in found.indices[row, :SHOWN_NEIGHBOURS].tolist() if number >= 0] for row in chosen]
    if sources is None:
        train, mine = {}, {}
    else:
        train = shown_samples(sources[0], [number for each in numbers for number in each])
        mine = shown_samples(sources[1], chosen)
    return tuple(
        ShownRow(
            mine.get(row, ShownSample(row)),
            tuple(train.get(number, ShownSample(number)) for number in each),
            tuple(found.values[row, : len(each)].tolist()),
        )
        for row, each in zip(chosen, numbers, strict=True)
    )


def _same_class(found: Neighbours, train: SampleSource, mine: SampleSource) -> dict[str, float] | None:
    """Share of neighbours of the sample's own class, beside that of train samples drawn at random."""
    classes = class_labels(train)
    own = classes if mine is train else class_labels(mine)
    if classes is None or own is None:
        return None
    there = found.indices >= 0
    alike = (classes[found.indices] == own[:, None]) & there
    names, counts = np.unique(classes, return_counts=True)
    of_class = dict(zip(names.tolist(), counts.tolist(), strict=True))
    itself = 1 if mine is train else 0
    chances = [(of_class.get(each, 0) - itself) / (len(classes) - itself) for each in own.tolist()]
    return {
        "nearest": float(alike[:, 0].mean()),
        "all_k": float(alike.sum() / max(1, there.sum())),
        "by_chance": float(np.mean(chances)),
    }


def _hubs(found: Neighbours) -> list[dict[str, int]]:
    """The train samples that are among the nearest of most samples."""
    numbers, counts = np.unique(found.indices[found.indices >= 0], return_counts=True)
    order = np.lexsort((numbers, -counts))[:NAMED_HUBS]
    return [{"train_sample": int(numbers[place]), "of_samples": int(counts[place])} for place in order]


def _described(row: ShownRow) -> dict[str, Any]:
    """A sample and its neighbours as JSON has them."""
    neighbours = [
        {**_sample(sample), "value": value, "same_class": row.same(place)}
        for place, (sample, value) in enumerate(zip(row.neighbours, row.values, strict=True))
    ]
    return {**_sample(row.sample), "neighbours": neighbours}


def _sample(sample: ShownSample) -> dict[str, Any]:
    return {"index": sample.index, "label": sample.label, "text": sample.text}
