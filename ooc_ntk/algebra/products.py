"""Products of a kernel with vectors: one half-pass over the stored triangle for all of them, in float64."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from ooc_ntk.errors import InputError, TransientStorageError

from .entries import Block, Entries, FeatureEntries, ViewEntries

#: Bytes of the float64 copy of entries that are multiplied at once: a stripe of float32. (Measured: from 2 to 8 MiB the
#: same, with 1 MiB a tenth slower.)
SCRATCH_BYTES: Final = 2**23

#: How often a pass is made when a tile was misread and is whole when it is read again.
PASSES: Final = 3


def square_product(entries: Entries, vectors: NDArray[np.float64], device: str = "cpu") -> NDArray[np.float64]:
    """The train square times some vectors, by one pass over its lower triangle.

    Args:
        entries: of the kernel.
        vectors: (train rows, vectors).
        device: torch device that multiplies.

    Returns:
        (train rows, vectors) float64; sums are formed in float64, also of float32 entries.

    Raises:
        StorageError: if a tile cannot be read, or is not what was committed.
    """
    if isinstance(entries, ViewEntries):
        return _viewed(entries, range(entries.size), vectors, device)
    if isinstance(entries, FeatureEntries):
        return entries.product(range(entries.size), vectors, device)
    return _passes(entries, range(entries.size), vectors, device, lower=True)


def rows_product(
    entries: Entries, rows: range, vectors: NDArray[np.float64], device: str = "cpu"
) -> NDArray[np.float64]:
    """Some rows of the kernel, such as those of test samples, times some vectors.

    Args:
        entries: of the kernel.
        rows: the rows.
        vectors: (train rows, vectors).
        device: torch device that multiplies.

    Returns:
        (rows, vectors) float64.

    Raises:
        StorageError: if a tile cannot be read, or is not what was committed.
    """
    if isinstance(entries, ViewEntries):
        return _viewed(entries, rows, vectors, device)
    if isinstance(entries, FeatureEntries):
        return entries.product(rows, vectors, device)
    return _passes(entries, rows, vectors, device, lower=False)


def adjoint_product(entries: Entries, rows: range, vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """The transpose of some rows times vectors.

    Args:
        entries: of the kernel.
        rows: the rows.
        vectors: (rows, vectors).

    Returns:
        (train rows, vectors) float64.
    """
    for attempt in range(PASSES):
        found = np.zeros((vectors.shape[1], entries.size))
        flat = np.ascontiguousarray(vectors.T, dtype=np.float64)
        try:
            for block in entries.blocks(rows):
                part = flat[:, block.rows.start - rows.start : block.rows.stop - rows.start]
                found[:, block.columns.start : block.columns.stop] += part @ block.values
            break
        except TransientStorageError:
            if attempt == PASSES - 1:
                raise
    return np.ascontiguousarray(found.T)


def _checked_device(device: str) -> str:
    """A torch device that multiplies.

    Raises:
        InputError: if there is no such device.
    """
    if device != "cpu":
        try:
            torch.zeros(1, dtype=torch.float64, device=device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"cannot multiply on device {device!r}: {reason}; use cpu, cuda or cuda:0") from error
    return device


def scratch_bytes(entries: Entries) -> int:
    """Memory of a product beside its vectors."""
    return entries.buffer_bytes + 2 * SCRATCH_BYTES


def _viewed(entries: ViewEntries, rows: range, vectors: NDArray[np.float64], device: str) -> NDArray[np.float64]:
    """A view's product: what it does to entries is done to the vectors instead.

    ``(S K S − m 1ᵀ − 1 cᵀ + g) X`` is ``S K (S X') − 1 (cᵀ X')`` with ``X' = H X``, whose columns sum up to zero.
    """
    scale, means = entries.scale, entries.means
    given = np.asarray(vectors, dtype=np.float64)
    if means is not None:
        given = given - given.mean(0)
    inner = given if scale is None else given * scale[: entries.size, None]
    square = rows == range(entries.size)
    found = square_product(entries.base, inner, device) if square else rows_product(entries.base, rows, inner, device)
    if scale is not None:
        found = found * scale[rows.start : rows.stop, None]
    return found if means is None else found - means[: entries.size] @ given


def _passes(
    entries: Entries, rows: range, vectors: NDArray[np.float64], device: str, *, lower: bool
) -> NDArray[np.float64]:
    _checked_device(device)
    for _ in range(PASSES - 1):
        try:
            return _pass(entries, rows, vectors, device, lower=lower)
        except TransientStorageError:
            continue
    return _pass(entries, rows, vectors, device, lower=lower)


def _pass(
    entries: Entries, rows: range, vectors: NDArray[np.float64], device: str, *, lower: bool
) -> NDArray[np.float64]:
    # Vectors are rows here: with few of them BLAS multiplies so twice as fast (measured with 10, float64, two cores).
    given = torch.from_numpy(np.ascontiguousarray(vectors.T, dtype=np.float64)).to(device)
    found = torch.zeros((given.shape[0], len(rows)), dtype=torch.float64, device=device)
    scratch = torch.empty(SCRATCH_BYTES // 8, dtype=torch.float64, device=device)
    for block in entries.blocks(rows, lower=lower):
        for part in _parts(block, scratch.numel()):
            top, left = part.rows.start - rows.start, part.columns.start
            height, width = part.values.shape
            if part.values.dtype == np.float64 and device == "cpu":
                values = torch.from_numpy(part.values)
            else:
                if scratch.numel() < height * width:
                    scratch = torch.empty(height * width, dtype=torch.float64, device=device)
                values = scratch[: height * width].view(height, width)
                values.copy_(torch.from_numpy(part.values))
            found[:, top : top + height].addmm_(given[:, left : left + width], values.T)
            if lower and not block.on_diagonal:
                found[:, left : left + width].addmm_(given[:, top : top + height], values)
    return np.ascontiguousarray(found.cpu().numpy().T)


def _parts(block: Block, elements: int) -> list[Block]:
    """A block in pieces of whole rows that fit the scratch memory."""
    step = max(1, elements // max(1, len(block.columns)))
    if step >= len(block.rows):
        return [block]
    parts: list[Block] = []
    values: NDArray[Any] = block.values
    for start in range(0, len(block.rows), step):
        part = values[start : start + step]
        parts.append(Block(block.rows[start : start + step], block.columns, part))
    return parts
