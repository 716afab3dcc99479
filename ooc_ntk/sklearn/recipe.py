"""How the estimators' kernels are computed: runs of the engine, streamed into products, rows or features."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ooc_ntk import api
from ooc_ntk.algebra.products import PASSES
from ooc_ntk.compute.machine import free_host_bytes
from ooc_ntk.errors import BudgetError, InputError, TransientStorageError
from ooc_ntk.units import format_bytes

#: New samples that are taken together at least, where there are as many (a choice: Jacobian rows of the fit samples are
#: derived again for every batch; above that a batch is as large as the fit data, so that its kernel takes at most about
#: twice the disk of theirs).
LEAST_BATCH: Final = 4096

#: Share of the free memory that an array for scikit-learn may take.
MEMORY_SHARE: Final = 0.8

#: Rows of new samples, columns of fit samples, and the entries between them.
Part = tuple[slice, slice, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Recipe:
    """Everything of an estimator's kernel but the data, fixed when it is fitted.

    Attributes:
        module: the network, a copy of its own.
        kernel: as for :class:`ooc_ntk.Job`; has one row per sample.
        projection: None for the exact kernel.
        normalize: None or ``cosine``.
        parameters: patterns, or None for all.
        precision: of the kernel.
        device: or None.
        host_memory: limit, or None for 80% of what is free.
        scratch: folder in which temporary runs are made, made if it is not there; None is that of ``tempfile``.
        structured: weights whose part of the projection is a tensor sketch; None before the first plan.
    """

    module: nn.Module
    kernel: str
    projection: api.Projection | None
    normalize: str | None
    parameters: Any
    precision: str
    device: str | None
    host_memory: str | int | None
    scratch: Path | None
    structured: tuple[str, ...] | None = None

    def plan(self, samples: NDArray[Any]) -> api.Plan:
        """Plan the kernel of some samples, which finds what is wrong with model, data or budget."""
        place = self.scratch or Path(tempfile.gettempdir())
        return api.plan(self._job(samples, None), self.budget, preferences=self._preferences, out=place)

    def planned(self, plan: api.Plan) -> Recipe:
        """The same with what a plan has decided of the projection, so that later runs make the same features."""
        return replace(self, projection=plan.projection, structured=plan.structured)

    @contextmanager
    def run(
        self, train: NDArray[Any], test: NDArray[Any] | None = None, out: str | Path | None = None
    ) -> Iterator[api.Kernel]:
        """Compute a kernel, of which only the features are made where there is a projection.

        Args:
            train: samples, which have columns.
            test: further samples.
            out: run directory, which is kept and resumed; None is a temporary one.

        Yields:
            The kernel; without ``out`` it is gone afterwards.

        Raises:
            OocNtkError: as :func:`ooc_ntk.run`.
        """
        job = self._job(train, test)
        if self.scratch is not None:
            self.scratch.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="ooc-ntk-", dir=self.scratch) as folder:
            place = Path(folder, "run") if out is None else out
            kernel = api.run(job, place, budget=self.budget, preferences=self._preferences, progress=False)
            assert kernel.plan is not None
            if self.structured is not None and kernel.plan.structured != self.structured:
                now, then = (", ".join(names) or "no weights" for names in (kernel.plan.structured, self.structured))
                raise InputError(
                    f"projection {self.projection!r} sketches {now} from their factors for these samples, and {then} "
                    "for those of fit, so that their features do not belong together; use projection='sjlt:1024'"
                )
            yield kernel

    def products(self, new: NDArray[Any], fit: NDArray[Any], vectors: NDArray[np.float64]) -> NDArray[np.float64]:
        """``K(new, fit)`` times vectors, streamed.

        Args:
            new: samples.
            fit: samples.
            vectors: (fit samples, vectors).

        Returns:
            (new samples, vectors) float64.
        """
        found = np.empty((len(new), vectors.shape[1]))

        def add(total: NDArray[np.float64], part: Part) -> None:
            rows, columns, entries = part
            total[rows] += entries @ vectors[columns]

        for some in batches(len(new), len(fit)):
            self._cross(new[some], fit, found[some], add)
        return found

    def rows(self, new: NDArray[Any], fit: NDArray[Any]) -> NDArray[np.float64]:
        """``K(new, fit)`` in memory.

        Args:
            new: samples.
            fit: samples.

        Returns:
            (new samples, fit samples) float64.

        Raises:
            BudgetError: if it does not fit in memory.
        """
        found = in_memory(len(new), len(fit))
        for some in batches(len(new), len(fit)):
            self._cross(new[some], fit, found[some], _put)
        return found

    def square(self, samples: NDArray[Any], out: str | Path | None) -> NDArray[np.float64]:
        """``K(samples, samples)`` in memory, (samples, samples) float64; its run is kept in ``out``.

        Raises:
            BudgetError: if it does not fit in memory.
        """
        found = in_memory(len(samples), len(samples))
        with self.run(samples, out=out) as kernel:
            _stream(kernel, range(len(samples)), found, _put)
        return found

    def features(
        self, samples: NDArray[Any], fit: int, out: str | Path | None = None
    ) -> Iterator[tuple[slice, NDArray[np.float64]]]:
        """Features Φ with ``Φ Φᵀ`` the projected kernel.

        Args:
            samples: samples.
            fit: number of fit samples, which bounds a batch.
            out: run directory of all of them; None makes temporary ones.

        Yields:
            Some samples, and their features, (samples, outputs · dim) float64.
        """
        for some in batches(len(samples), fit) if out is None else (slice(0, len(samples)),):
            with self.run(samples[some], out=out) as kernel:
                for rows, values in feature_panels(kernel):
                    yield slice(some.start + rows.start, some.start + rows.stop), values

    def _cross(
        self,
        new: NDArray[Any],
        fit: NDArray[Any],
        total: NDArray[np.float64],
        add: Callable[[NDArray[np.float64], Part], None],
    ) -> None:
        """Bring what is between new and fit samples to ``add``; the smaller set is that with columns.

        A run computes the square of the samples with columns as well.
        """
        swapped = len(new) < len(fit)
        with self.run(*((new, fit) if swapped else (fit, new))) as kernel:
            _stream(kernel, kernel.row_range("test"), total, add, swapped=swapped)

    def _job(self, train: NDArray[Any], test: NDArray[Any] | None) -> api.Job:
        return api.Job(
            self.module,
            train,
            test,
            kernel=self.kernel,
            projection=self.projection,
            normalize=self.normalize,
            parameters=self.parameters,
            precision=self.precision,
            device=self.device,
        )

    @property
    def budget(self) -> api.Budget | None:
        """Limits for the run and for the solution."""
        return None if self.host_memory is None else api.Budget(host=self.host_memory)

    @property
    def _preferences(self) -> api.Preferences | None:
        return None if self.projection is None else api.Preferences(features_only=True)


def feature_panels(kernel: api.Kernel) -> Iterator[tuple[slice, NDArray[np.float64]]]:
    """Features of a run's samples, some at a time, (samples, outputs · dim) float64, of cosines with norm 1."""
    features = kernel.features
    for panel in features.panels():
        values = features.read(panel).reshape(len(panel), -1).astype(np.float64)
        if features.cosine:
            norms = np.linalg.norm(values, axis=1, keepdims=True)
            values = np.divide(values, norms, out=np.zeros_like(values), where=norms > 0)
        yield slice(panel.start, panel.stop), values


def batches(new: int, fit: int) -> Iterator[slice]:
    """Slices of the new samples, each the data of one run.

    >>> list(batches(9000, 5000))
    [slice(0, 5000, None), slice(5000, 9000, None)]
    """
    step = max(LEAST_BATCH, fit)
    for start in range(0, new, step):
        yield slice(start, min(start + step, new))


def in_memory(rows: int, columns: int) -> NDArray[np.float64]:
    """An array for scikit-learn, (rows, columns) float64.

    Raises:
        BudgetError: if it does not fit in free memory.
    """
    needed, free = 8 * rows * columns, int(MEMORY_SHARE * free_host_bytes())
    if needed > free:
        raise BudgetError(
            f"an array of {rows:,} × {columns:,} for scikit-learn needs {format_bytes(needed)} of memory, "
            f"{format_bytes(free)} are free to use; transform fewer samples at a time, or use NTKRegressor or "
            "NTKClassifier, which leave the kernel on disk"
        )
    return np.empty((rows, columns))


def _put(total: NDArray[np.float64], part: Part) -> None:
    rows, columns, entries = part
    total[rows, columns] = entries


def _stream(
    kernel: api.Kernel,
    rows: range,
    total: NDArray[np.float64],
    add: Callable[[NDArray[np.float64], Part], None],
    *,
    swapped: bool = False,
) -> None:
    """One pass over some rows of a kernel, made again where a tile was misread and is whole the next time.

    Args:
        kernel: the kernel.
        rows: which rows.
        total: where they are brought, set to zero before each pass.
        add: takes ``total`` and a part.
        swapped: whether new samples are those with columns.
    """
    for left in reversed(range(PASSES)):
        total[:] = 0
        try:
            for block in kernel.entries.blocks(rows):
                down = slice(block.rows.start - rows.start, block.rows.stop - rows.start)
                across = slice(block.columns.start, block.columns.stop)
                add(total, (across, down, block.values.T) if swapped else (down, across, block.values))
            return
        except TransientStorageError:
            if not left:
                raise
