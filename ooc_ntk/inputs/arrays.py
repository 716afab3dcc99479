"""Sources over arrays: tensors, NumPy and zarr arrays, files; every one a column with samples along its first axis."""

from __future__ import annotations

import math
import mmap
from typing import Protocol, SupportsInt, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from ooc_ntk.errors import InputError

from .source import Samples, SampleSource
from .tensors import array_tensor, check_dtype, check_tensor, is_array, is_number, plain_tensor


@runtime_checkable
class Column(Protocol):
    """One array of a data set, read by rows."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape, samples first."""

    @property
    def item_bytes(self) -> int:
        """Bytes of one element."""

    @property
    def chunk_rows(self) -> int:
        """Rows that are read at once, whatever is asked for."""

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Read rows ``start`` to ``stop``, ``(stop - start, ...)``, on the CPU."""


class TensorColumn:
    """A tensor in memory.

    Args:
        tensor: ``(samples, ...)``, any dtype and device; rows are brought to the CPU as they are read.
        where: what it is, for messages.

    Raises:
        InputError: for sparse, quantised, nested or meta tensors and for uint64.
    """

    chunk_rows = 1

    def __init__(self, tensor: torch.Tensor, where: str) -> None:
        check_tensor(tensor, where)
        self._tensor = tensor.detach()
        self._where = where
        self.shape = tuple(tensor.shape)
        self.item_bytes = tensor.element_size()

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Read rows; a view of the tensor where it is on the CPU."""
        return plain_tensor(self._tensor[start:stop], self._where)


class ArrayColumn:
    """A NumPy, zarr or similar array, sliced only when rows are asked for.

    Args:
        array: anything with ``shape``, ``dtype`` and slicing by rows.
        where: what it is, for messages.

    Raises:
        InputError: for a dtype that torch cannot use.
    """

    def __init__(self, array: object, where: str) -> None:
        self._array = array
        self._where = where
        self.shape = tuple(int(size) for size in getattr(array, "shape", ()))
        dtype = np.dtype(getattr(array, "dtype", object))
        check_dtype(dtype, where)
        self.item_bytes = dtype.itemsize
        chunks = getattr(array, "chunks", None)
        first = chunks[0] if isinstance(chunks, tuple) and chunks else 1
        self.chunk_rows = max(1, int(first)) if isinstance(first, SupportsInt) else 1

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Read rows; a view where the array is in writeable memory, a copy otherwise."""
        block: npt.NDArray[np.generic] = np.asarray(self._array[start:stop])  # type: ignore[index]
        if isinstance(self._array, np.memmap):
            block = np.array(block)
            _release_pages(self._array)
        return array_tensor(block, self._where)


def _release_pages(array: np.memmap[tuple[int, ...], np.dtype[np.generic]]) -> None:
    """Give back the pages of a mapped file that were read; they count as resident memory of this process.

    A copy-on-write map (mode ``c``) is left alone: its changes live in those pages only.
    """
    pages = getattr(array, "_mmap", None)
    if isinstance(pages, mmap.mmap) and array.mode in ("r", "r+") and hasattr(mmap, "MADV_DONTNEED"):
        pages.madvise(mmap.MADV_DONTNEED)


class ArraySource(SampleSource):
    """Samples held column by column.

    Args:
        args: positional model inputs.
        kwargs: keyword model inputs.
        targets: targets or None.
        what: name of the data set, for messages.

    Raises:
        InputError: if there are no inputs or no samples, if a column has no sample axis or the lengths differ.
    """

    def __init__(
        self, args: tuple[Column, ...], kwargs: dict[str, Column], targets: Column | None, what: str = "train"
    ) -> None:
        self._args = args
        self._kwargs = kwargs
        self._targets = targets
        named = [(f"input {position}" if len(args) > 1 else "inputs", column) for position, column in enumerate(args)]
        named += [(f"input {key!r}", column) for key, column in kwargs.items()]
        named += [] if targets is None else [("targets", targets)]
        if not args and not kwargs:
            raise InputError(f"{what} data has no model inputs; give an array, (inputs, targets) or a dict of arrays")
        for name, column in named:
            if not column.shape:
                raise InputError(
                    f"{what} {name} is a single number (0-d array); the first axis must count samples: "
                    "use an array of shape (samples, ...)"
                )
        (first_name, first), *others = named
        for name, column in others:
            if column.shape[0] != first.shape[0]:
                raise InputError(
                    f"{what} data does not match: {first_name} has {first.shape[0]} samples, "
                    f"{name} has {column.shape[0]}; both must have the same number"
                )
        if first.shape[0] == 0:
            raise InputError(f"{what} data is empty: {first_name} has shape {first.shape}; at least 1 sample is needed")
        self._count = first.shape[0]
        self.sample_bytes = sum(math.prod(column.shape[1:]) * column.item_bytes for _, column in named)
        self.chunk_rows = max(column.chunk_rows for _, column in named)

    def __len__(self) -> int:
        return self._count

    def _read(self, start: int, stop: int) -> Samples:
        return Samples(
            tuple(column.rows(start, stop) for column in self._args),
            {key: column.rows(start, stop) for key, column in self._kwargs.items()},
            None if self._targets is None else self._targets.rows(start, stop),
        )

    def targets(self, start: int, stop: int) -> torch.Tensor | None:
        """See :meth:`SampleSource.targets`."""
        return None if self._targets is None else self._targets.rows(start, stop)


def as_column(value: object, where: str) -> Column:
    """Wrap one array of a data set.

    Args:
        value: a tensor, a NumPy or zarr array, a flat list of numbers, or a column already.
        where: what it is, for messages.

    Returns:
        The column; nothing is read yet.

    Raises:
        InputError: for anything else.
    """
    if isinstance(value, torch.Tensor):
        return TensorColumn(value, where)
    if isinstance(value, Column):
        return value
    if is_array(value):
        return ArrayColumn(value, where)
    if isinstance(value, list | tuple) and value and all(is_number(number) for number in value):
        array = np.asarray(value)
        only_python_floats = all(isinstance(number, bool | int | float) for number in value) and array.dtype.kind == "f"
        return ArrayColumn(array.astype(np.float32) if only_python_floats else array, where)
    raise InputError(
        f"{where} is of type {type(value).__name__}, not an array; pass a tensor, a NumPy or zarr array, or a Dataset"
    )
