"""A kernel as a picture: means of blocks of entries, rows and columns ordered by class, by one pass over its tiles.

Only the means, a stripe of entries and one number per row are held, so that kernels larger than memory have a picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ooc_ntk.api import Kernel, Labels

#: Pixels of a picture along its longer side at most (a choice: 1 MB of means, and no screen of a report is wider).
MOST_PIXELS: Final = 500

#: Classes up to which each has pixels of its own, and statistics with each other class.
MOST_CLASSES: Final = 100

#: Bytes of tiles, and multiplications of features, up to which every entry is looked at; of more, some rows are.
#: (Chosen for a minute on two cores.)
WHOLE_BYTES: Final = 2**33
WHOLE_PRODUCTS: Final = 10**12

#: Rows that are looked at of a larger kernel, of the train and of the test samples each.
SAMPLED_ROWS: Final = 1024

#: Bytes of whole rows that are read at a time.
ROWS_BYTES: Final = 2**25


@dataclass(frozen=True)
class Group:
    """Pixels along one side that belong together.

    Attributes:
        name: of the class.
        start: first pixel.
        stop: the pixel after the last.
    """

    name: str
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Axis:
    """Rows, or columns, of a kernel along one side of its picture.

    Attributes:
        pixels: (rows,) the pixel of every row.
        counts: (pixels,) rows in each.
        groups: by class, empty where rows stand in the order of the data.
        classes: (rows,) number of the class of every row in the order of ``groups``; -1 where there is none.
        train_pixels: pixels of train samples; those of test samples follow.
    """

    pixels: NDArray[np.int64]
    counts: NDArray[np.int64]
    groups: tuple[Group, ...]
    classes: NDArray[np.int64]
    train_pixels: int


@dataclass(frozen=True, eq=False)
class ClassBlocks:
    """Entries of the train square by the classes of row and column, the diagonal left out.

    Attributes:
        names: of the classes.
        samples: (classes,) train samples of each.
        means: (classes, classes) float64; NaN where there is no entry.
        spreads: (classes, classes) float64, standard deviations.
        within: mean and standard deviation of all entries within a class.
        between: of all entries between two classes.
    """

    names: tuple[str, ...]
    samples: NDArray[np.int64]
    means: NDArray[np.float64]
    spreads: NDArray[np.float64]
    within: tuple[float, float]
    between: tuple[float, float]


@dataclass(frozen=True, eq=False)
class KernelMap:
    """The picture of a kernel and what was counted on the way.

    Attributes:
        means: (row pixels, column pixels) float64, mean of the entries of each block.
        rows: along the first side: train samples, then test samples.
        columns: along the second side.
        blocks: statistics by class; None without classes, or with a single one or too many.
        looked_at: kernel rows that were looked at; all of them, or some of a very large kernel.
    """

    means: NDArray[np.float64]
    rows: Axis
    columns: Axis
    blocks: ClassBlocks | None
    looked_at: int


def make_axes(kernel: Kernel, labels: Labels | None, numbers: NDArray[np.int64] | None = None) -> tuple[Axis, Axis]:
    """Both sides of a kernel's picture.

    Args:
        kernel: the kernel.
        labels: of its samples; None leaves them in the order of the data.
        numbers: kernel rows that are looked at, ascending; None for all.

    Returns:
        Rows and columns.
    """
    height, width = kernel.shape
    rows = np.arange(height) if numbers is None else numbers
    train = int((rows < width).sum())
    most = max(1, round(MOST_PIXELS * width / max(height, width)))
    names = _class_names(labels)
    of_row = _row_classes(kernel, labels, names)
    output = np.arange(height) % kernel.entries_per_sample
    columns = _axis(of_row[:width], names, most, output[:width])
    first = columns if train == width else _axis(of_row[rows[:train]], names, most, output[rows[:train]])
    if train == len(rows):
        return first, columns
    pixels = max(1, min(round(MOST_PIXELS * (len(rows) - train) / max(1, len(rows))), MOST_PIXELS - 1))
    second = _axis(of_row[rows[train:]], names, pixels, output[rows[train:]])
    return _joined(first, second), columns


def _class_names(labels: Labels | None) -> NDArray[np.int64]:
    """Classes that have pixels of their own, in order."""
    if labels is None:
        return np.empty(0, dtype=np.int64)
    return np.unique(np.concatenate([labels.train, labels.test]))


def _row_classes(kernel: Kernel, labels: Labels | None, names: NDArray[np.int64]) -> NDArray[np.int64]:
    """(rows,) place of every row's class among the names."""
    if labels is None:
        return np.full(kernel.shape[0], -1, dtype=np.int64)
    places = np.searchsorted(names, np.concatenate([labels.train, labels.test]))
    return np.repeat(places, kernel.entries_per_sample).astype(np.int64)


def _axis(classes: NDArray[np.int64], names: NDArray[np.int64], most: int, output: NDArray[np.int64]) -> Axis:
    """Rows of some classes in at most so many pixels: by class, within it by output, within that as they come."""
    size = len(classes)
    pixels = min(most, size)
    order = np.lexsort((output, classes))
    found = np.empty(size, dtype=np.int64)
    present = [int(each) for each in np.unique(classes) if each >= 0]
    if not present or len(present) > min(MOST_CLASSES, pixels):
        if not present:
            order = np.arange(size)
        found[order] = np.arange(size) * pixels // size
        return Axis(found, np.bincount(found, minlength=pixels), (), classes, pixels)
    groups, start, done = [], 0, 0
    for each in present:
        count = int((classes == each).sum())
        own = min(count, max(1, round(pixels * count / size)))
        found[order[done : done + count]] = start + np.arange(count) * own // count
        groups.append(Group(str(names[each]), start, start + own))
        start, done = start + own, done + count
    return Axis(found, np.bincount(found, minlength=start), tuple(groups), classes, start)


def _joined(train: Axis, test: Axis) -> Axis:
    """Test samples below train samples."""
    shift = train.train_pixels
    groups = [Group(each.name, each.start + shift, each.stop + shift) for each in test.groups]
    return Axis(
        np.concatenate([train.pixels, test.pixels + shift]),
        np.concatenate([train.counts, test.counts]),
        (*train.groups, *groups),
        np.concatenate([train.classes, test.classes]),
        shift,
    )


class BlockSums:
    """Sums of entries, and of their squares, over the pixels of a picture."""

    def __init__(self, rows: Axis, columns: Axis) -> None:
        """Begin with nothing."""
        self.rows, self.columns = rows, columns
        shape = (len(rows.counts), len(columns.counts))
        self.sums, self.squares = np.zeros(shape), np.zeros(shape)

    def add(self, rows: Any, columns: range, values: NDArray[Any], *, mirrored: bool) -> None:
        """Add a block of entries.

        Args:
            rows: places of its rows along the picture's side, a slice or a list.
            columns: its columns.
            values: (rows, columns) entries.
            mirrored: whether the same entries also stand on the other side of the diagonal.
        """
        above, below = self.rows.pixels[rows], self.columns.pixels[columns.start : columns.stop]
        top, left = np.unique(above, return_inverse=True), np.unique(below, return_inverse=True)
        wide = values.astype(np.float64)
        place = np.ix_(top[0], left[0])
        for sums in (self.sums, self.squares):
            part = _summed(wide, top[1], left[1])
            sums[place] += part
            if mirrored:
                sums[np.ix_(left[0], top[0])] += part.T
            np.square(wide, out=wide)

    def means(self) -> NDArray[np.float64]:
        """(row pixels, column pixels) mean of the entries of each block."""
        return np.asarray(self.sums / np.outer(self.rows.counts, self.columns.counts))


def _summed(values: NDArray[np.float64], rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.float64]:
    """Sums of a block over runs of rows and columns with the same number."""
    return np.asarray((_indicator(columns) @ (_indicator(rows) @ values).T).T)


def _indicator(numbers: NDArray[np.int64]) -> Any:
    """(numbers, entries) sparse, 1 where an entry has the number."""
    count = len(numbers)
    ones = np.ones(count)
    return scipy.sparse.csr_array((ones, (numbers, np.arange(count))), shape=(int(numbers.max()) + 1, count))


def kernel_map(kernel: Kernel, labels: Labels | None) -> KernelMap:
    """Look at a kernel once.

    Args:
        kernel: of a finished run.
        labels: of its samples, or None.

    Returns:
        Its picture.

    Raises:
        StorageError: if a tile cannot be read, or is not what was committed.
    """
    numbers = None if _is_small(kernel) else _some_rows(kernel)
    rows, columns = make_axes(kernel, labels, numbers)
    sums = BlockSums(rows, columns)
    for places, across, values, mirrored in _stream(kernel, numbers):
        sums.add(places, across, values, mirrored=mirrored)
    return KernelMap(
        means=sums.means(),
        rows=rows,
        columns=columns,
        blocks=_class_blocks(kernel, sums, numbers),
        looked_at=len(rows.pixels),
    )


def _is_small(kernel: Kernel) -> bool:
    """Whether every entry is looked at."""
    height, width = kernel.shape
    if kernel.plan is not None and not kernel.plan.features_only:
        return height * width * kernel.dtype.itemsize <= WHOLE_BYTES
    features = kernel.features
    return height * width * features.dim * (1 if features.full else features.outputs) <= WHOLE_PRODUCTS


def _some_rows(kernel: Kernel) -> NDArray[np.int64]:
    """Rows all over the kernel, ascending."""
    height, width = kernel.shape
    parts = [np.linspace(0, width - 1, min(width, SAMPLED_ROWS))]
    if height > width:
        parts.append(np.linspace(width, height - 1, min(height - width, SAMPLED_ROWS)))
    return np.unique(np.concatenate(parts).astype(np.int64))


def _stream(kernel: Kernel, numbers: NDArray[np.int64] | None) -> Iterator[tuple[Any, range, NDArray[Any], bool]]:
    """Entries piece by piece: places of rows, columns, entries, and whether they are mirrored as well."""
    height, width = kernel.shape
    entries = kernel.entries
    if numbers is not None:
        step = max(1, ROWS_BYTES // (8 * width))
        for start in range(0, len(numbers), step):
            part = slice(start, start + step)
            yield part, range(width), entries.rows(numbers[part]), False
        return
    for block in entries.blocks(range(width), lower=True):
        yield slice(block.rows.start, block.rows.stop), block.columns, block.values, not block.on_diagonal
    if height > width:
        for block in entries.blocks(range(width, height)):
            yield slice(block.rows.start, block.rows.stop), block.columns, block.values, False


def _class_blocks(kernel: Kernel, sums: BlockSums, numbers: NDArray[np.int64] | None) -> ClassBlocks | None:
    """Statistics of the train square by class, from the sums over pixels, of which each has one class."""
    train, columns = sums.rows.train_pixels, sums.columns
    row_groups = [group for group in sums.rows.groups if group.stop <= train]
    if len(columns.groups) < 2 or not row_groups:
        return None
    names = [group.name for group in columns.groups]
    pixel_class = np.concatenate([np.full(g.stop - g.start, names.index(g.name)) for g in row_groups])
    column_class = np.concatenate([np.full(g.stop - g.start, names.index(g.name)) for g in columns.groups])
    totals, squares = (
        _grouped(each[:train], pixel_class, column_class, len(names)) for each in (sums.sums, sums.squares)
    )
    of_rows = np.bincount(pixel_class, sums.rows.counts[:train], len(names))
    of_columns = np.bincount(column_class, columns.counts, len(names))
    counts = np.outer(of_rows, of_columns).astype(np.float64)
    own = np.arange(kernel.shape[1]) if numbers is None else numbers[numbers < kernel.shape[1]]
    diagonal = kernel.entries.diagonal()[own]
    own_class = pixel_class[sums.rows.pixels[: len(own)]]
    each = np.arange(len(names))
    for power, total in enumerate((totals, squares), start=1):
        total[each, each] -= np.bincount(own_class, diagonal**power, len(names))
    counts[each, each] -= of_rows
    same = np.eye(len(names), dtype=bool)
    means, spreads = _moments(totals, squares, counts)
    return ClassBlocks(
        names=tuple(names),
        samples=(of_columns / kernel.entries_per_sample).astype(np.int64),
        means=means,
        spreads=spreads,
        within=_pooled(totals, squares, counts, same),
        between=_pooled(totals, squares, counts, ~same),
    )


def _grouped(
    values: NDArray[np.float64], rows: NDArray[np.int64], columns: NDArray[np.int64], count: int
) -> NDArray[np.float64]:
    found = np.zeros((count, count))
    np.add.at(found, (rows[:, None], columns[None, :]), values)
    return found


def _moments(
    sums: NDArray[np.float64], squares: NDArray[np.float64], counts: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means and standard deviations; NaN where nothing was counted."""
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.where(counts > 0, sums / counts, np.nan)
        return means, np.sqrt(np.maximum(0.0, np.where(counts > 0, squares / counts, np.nan) - means**2))


def _pooled(
    sums: NDArray[np.float64], squares: NDArray[np.float64], counts: NDArray[np.float64], chosen: NDArray[np.bool_]
) -> tuple[float, float]:
    """Mean and standard deviation of the entries of some blocks together."""
    sum_, square, count = (np.array([[each[chosen].sum()]]) for each in (sums, squares, counts))
    mean, spread = _moments(sum_, square, count)
    return float(mean[0, 0]), float(spread[0, 0])
