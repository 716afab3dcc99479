"""Features on disk: ``Φ = J·R`` of all samples, entries of the kernel on demand, and what two sets must share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ooc_ntk.compute.machine import free_host_bytes
from ooc_ntk.errors import BudgetError, InputError, RunConflictError
from ooc_ntk.planning.projection import PilotMoments
from ooc_ntk.storage.arrays import index_numbers
from ooc_ntk.units import format_bytes

from .errors import Panel, SketchShape, moments, standard_errors

#: Columns multiplied in float32 before the sum moves on to float64 (as in the engine's own products).
SUMMED_COLUMNS: Final = 32_768

#: Bytes of features that are read at a time.
PANEL_BYTES: Final = 2**27

#: Samples from which the error of the whole kernel is estimated: their blocks take C² times as many numbers.
SUMMARY_ROWS: Final = 1024

#: Share of the free memory that one request may take.
MEMORY_SHARE: Final = 0.5


@dataclass(frozen=True)
class Features:
    """Projected Jacobian rows on the exact kernel's scale, read when they are asked for.

    Attributes:
        array: (samples · outputs, dim) on disk, indexed by a slice or by numbers of rows: tiles or a memory map.
        outputs: Jacobian rows per sample.
        train_samples: samples with kernel columns.
        test_samples: further samples.
        shape: what error bars need to know of the projection.
        factor: what brings the stored values to the exact scale.
        full: whether every output has kernel rows of its own.
        divisor: what the kernel is divided by (``scale="mean"``).
        cosine: whether the kernel is divided by the roots of its diagonal.
        heavy: gradients of the heaviest parameters beside them, (samples · outputs, parameters); None if not known.
        sketch: digest of what two sets of features must share to be multiplied; empty if it is not known.
        name: for messages.
    """

    array: Any
    outputs: int
    train_samples: int
    test_samples: int
    shape: SketchShape
    factor: float = 1.0
    full: bool = False
    divisor: float = 1.0
    cosine: bool = False
    heavy: Any = None
    sketch: str = ""
    name: str = "features"

    @property
    def samples(self) -> int:
        """Train and test samples together."""
        return self.train_samples + self.test_samples

    @property
    def dim(self) -> int:
        """Columns of the features."""
        return int(self.array.shape[1])

    @property
    def entries(self) -> int:
        """Kernel rows per sample."""
        return self.outputs if self.full else 1

    @property
    def kernel_shape(self) -> tuple[int, int]:
        """Shape of the kernel that these features stand for."""
        return self.samples * self.entries, self.train_samples * self.entries

    def __len__(self) -> int:
        return self.samples

    def read(self, samples: NDArray[np.int64] | range) -> NDArray[np.float32 | np.float64]:
        """Features of some samples on the exact scale.

        Args:
            samples: their numbers, train before test.

        Returns:
            (samples, outputs, dim), float32 or, of a float64 run, float64.

        Raises:
            BudgetError: if they do not fit in free memory.
        """
        needed = 3 * len(samples) * self.outputs * self.dim * 8
        free = int(MEMORY_SHARE * free_host_bytes())
        if needed > free:
            raise BudgetError(
                f"features of {len(samples):,} samples need {format_bytes(needed)} of memory, {format_bytes(free)} are "
                "free to use; ask for fewer rows or columns at a time"
            )
        found = _widened(self._rows_of(self.array, samples))
        return found if self.factor == 1.0 else found * found.dtype.type(self.factor)

    def _rows_of(self, array: Any, samples: NDArray[np.int64] | range) -> NDArray[Any]:
        """Rows of some samples, (samples, outputs, columns)."""
        if isinstance(samples, range) and samples.step == 1:
            found = np.asarray(array[samples.start * self.outputs : samples.stop * self.outputs])
        else:
            index = np.asarray(samples, dtype=np.int64)
            places = (index[:, None] * self.outputs + np.arange(self.outputs)).reshape(-1)
            found = np.asarray(array[places])
        return found.reshape(-1, self.outputs, array.shape[1])

    def panel(self, samples: NDArray[np.int64]) -> Panel:
        """What error bars take of some samples."""
        features = self.read(samples).astype(np.float64)
        return Panel(features, None if self.heavy is None else self._rows_of(self.heavy, samples).astype(np.float64))

    def panels(self, stop: int | None = None) -> Iterator[range]:
        """Ranges of samples small enough to be read at once, up to ``stop``."""
        last = self.samples if stop is None else stop
        step = max(1, PANEL_BYTES // (8 * self.outputs * self.dim))
        for start in range(0, last, step):
            yield range(start, min(start + step, last))

    def diagonal(self) -> NDArray[np.float64]:
        """Diagonal of all samples before normalisation, (samples · entries,) float64."""
        parts = []
        for panel in self.panels():
            norms = np.square(self.read(panel).astype(np.float64)).sum(2)
            parts.append(norms.reshape(-1) if self.full else norms.sum(1))
        return np.concatenate(parts) / self.divisor

    def kernel(self, *, precise: bool = False) -> FeatureProduct:
        """The kernel, its entries computed when they are asked for.

        Args:
            precise: whether entries are formed and kept in float64, as products with vectors are.
        """
        return FeatureProduct(self, self, self.train_samples, precise=precise)

    def cross(self, other: Features) -> FeatureProduct:
        """The kernel between these samples (rows) and the train samples of other features (columns).

        Args:
            other: features of the same model, parameters and projection.

        Returns:
            Entries on demand.

        Raises:
            RunConflictError: if seeds, dims, kinds, models or kernels differ, or are not known.
        """
        if not self.sketch or self.sketch != other.sketch or self.dim != other.dim:
            mine, theirs = (f"{each.sketch[:8] or 'unknown'}, {each.dim:,} columns" for each in (self, other))
            raise RunConflictError(
                f"{self.name} and {other.name} are not features of one projection (digest {mine}; {theirs}): model, "
                "parameters, outputs, kind, dim and seed must be the same. Make both with the same settings"
            )
        for what in ("outputs", "full", "divisor", "cosine"):
            if getattr(self, what) != getattr(other, what):
                raise RunConflictError(
                    f"{self.name} and {other.name} are kernels of different kinds ({what} {getattr(self, what)} and "
                    f"{getattr(other, what)}): kernel, scale and normalize must be the same"
                )
        return FeatureProduct(self, other, other.train_samples)

    def errors(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.float64]:
        """Standard errors of kernel entries, see :func:`~ooc_ntk.algebra.errors.standard_errors`.

        Args:
            rows: (m,) kernel rows.
            columns: (n,) kernel columns.

        Returns:
            (m, n) float64, in the units of the kernel's entries.
        """
        found = np.empty((len(rows), len(columns)))
        per_row = 8 * (self.dim * self.outputs + (len(columns) + 1) * (1 if self.full else self.outputs) ** 2 * 3)
        step = max(1, PANEL_BYTES // max(1, per_row * max(1, self.shape.blocks // 4)))
        right = self._kernel_rows(columns)
        for start in range(0, len(rows), step):
            left = self._kernel_rows(rows[start : start + step])
            found[start : start + step] = standard_errors(left, right, self.shape, cosine=self.cosine)
        return found if self.cosine else found / self.divisor

    def _kernel_rows(self, index: NDArray[np.int64]) -> Panel:
        """Features of kernel rows: all outputs of a sample, or of a full kernel one at a time."""
        if not self.full:
            return self.panel(index)
        samples, place = np.unique(index // self.outputs, return_inverse=True)
        found, output = self.panel(samples), index % self.outputs
        heavy = None if found.heavy is None else found.heavy[place, output][:, None]
        return Panel(found.features[place, output][:, None], heavy)

    def moments(self, seed: int = 0) -> PilotMoments:
        """What the error of the whole kernel depends on, from some train samples chosen at random."""
        count = min(self.train_samples, max(2, SUMMARY_ROWS // self.outputs), 256)
        chosen = np.sort(np.random.default_rng(seed).choice(self.train_samples, count, replace=False))
        every = (chosen[:, None] * self.entries + np.arange(self.entries)).reshape(-1)
        return moments(self._kernel_rows(every), self.shape, outputs=self.entries, cosine=self.cosine)

    def expected_error(self) -> float:
        """Relative Frobenius error to be expected of the train square."""
        return self.moments().error(self.dim, self.kernel_shape[1])


class FeatureProduct:
    """A kernel that is computed from features when it is asked for; reads like an array.

    Attributes:
        shape: (rows, columns).
        dtype: of the entries.
        chunks: pieces that are best computed at once.
    """

    def __init__(self, left: Features, right: Features, columns: int, *, precise: bool = False) -> None:
        """All samples of ``left`` against the first ``columns`` of ``right``; ``precise``: all in float64."""
        self._left, self._right, self._entries = left, right, left.entries
        self.shape = (left.samples * left.entries, columns * right.entries)
        self.dtype = np.dtype(np.float64 if precise or np.dtype(left.array.dtype) == np.float64 else np.float32)
        self._norms: dict[int, NDArray[np.float64]] = {}
        step = len(next(left.panels())) * left.entries
        self.chunks = (min(step, self.shape[0]), min(step, max(1, self.shape[1])))
        self.ndim = 2

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def oindex(self) -> FeatureProduct:
        """Orthogonal indexing, which is the only kind here."""
        return self

    def __getitem__(self, index: Any) -> NDArray[Any]:
        """Entries: integers, slices, index lists or masks along both axes (orthogonal).

        Raises:
            IndexError: for numbers out of range or more than two axes.
        """
        parts = index if isinstance(index, tuple) else (index,)
        if any(part is Ellipsis for part in parts):
            place = next(number for number, part in enumerate(parts) if part is Ellipsis)
            fill = (slice(None),) * (3 - len(parts))
            parts = (*parts[:place], *fill, *parts[place + 1 :])
        if len(parts) > 2:
            raise IndexError(f"a kernel has two axes, got {len(parts)} indices")
        parts = (*parts, *(slice(None),) * (2 - len(parts)))
        rows, columns = (index_numbers(part, size) for part, size in zip(parts, self.shape, strict=True))
        found = self._compute(rows, columns)
        single = tuple(0 if isinstance(part, int | np.integer) else slice(None) for part in parts)
        return np.asarray(found[single])

    def _compute(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[Any]:
        """Entries of some rows and columns, (rows, columns)."""
        found = np.empty((len(rows), len(columns)), dtype=self.dtype)
        steps = [len(next(each.panels())) * each.entries for each in (self._left, self._right)]
        for top in range(0, len(rows), steps[0]):
            some = rows[top : top + steps[0]]
            left = _matrix(self._left, some).astype(self.dtype, copy=False)
            for start in range(0, len(columns), steps[1]):
                part = columns[start : start + steps[1]]
                right = _matrix(self._right, part).astype(self.dtype, copy=False)
                found[top : top + len(some), start : start + len(part)] = self._scaled(
                    _product(left, right), some, part
                )
        return found

    def _scaled(
        self, entries: NDArray[np.float64], rows: NDArray[np.int64], columns: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Divide by the number of outputs, or by the roots of the diagonal."""
        if not self._left.cosine:
            return entries / self._left.divisor
        for features, index, axis in ((self._left, rows, 0), (self._right, columns, 1)):
            if id(features) not in self._norms:
                self._norms[id(features)] = np.sqrt(features.diagonal() * features.divisor)
            roots = self._norms[id(features)][index]
            inverse = np.divide(1.0, roots, out=np.zeros_like(roots), where=roots > 0)
            entries = entries * (inverse[:, None] if axis == 0 else inverse[None])
        return entries


def _widened(values: NDArray[Any]) -> NDArray[np.float32 | np.float64]:
    """float32 or float64; bf16 comes as its bits."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.asarray(values, dtype=np.float64 if values.dtype == np.float64 else np.float32)


def _matrix(features: Features, index: NDArray[np.int64]) -> NDArray[Any]:
    """Kernel rows as they are multiplied: (rows, dim), all outputs of a sample next to each other."""
    if not features.full:
        return features.read(index).reshape(len(index), -1)
    samples, place = np.unique(index // features.outputs, return_inverse=True)
    return np.asarray(features.read(samples)[place, index % features.outputs])


def _product(left: NDArray[Any], right: NDArray[Any]) -> NDArray[np.float64]:
    """``left @ right.T``, summed in float64 over blocks of columns."""
    total = np.zeros((len(left), len(right)))
    for start in range(0, left.shape[1], SUMMED_COLUMNS):
        total += left[:, start : start + SUMMED_COLUMNS] @ right[:, start : start + SUMMED_COLUMNS].T
    return total


def no_features(kernel: object) -> InputError:
    """The error where features are needed and there are none."""
    return InputError(
        f"{kernel} is an exact kernel: it has no projection, so no features and no error; "
        "make one with projection='sjlt:4096' (--projection sjlt:4096)"
    )
