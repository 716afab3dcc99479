"""Cholesky on disk: left-looking by square blocks, the finished factor streamed past each in strips.

A block of ``b × b`` numbers stays in memory while everything to its left passes by, so that ``n³/(3b)`` numbers are
read, √2 times what any schedule of that memory must move (``n³/(3√2·√S)``, Beaumont, Eyraud-Dubois, Vérité and
Langou 2022, arXiv 2202.10217), and a little for the strips.
"""

from __future__ import annotations

import glob
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

import google_crc32c
import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from scipy.linalg import lapack

from ooc_ntk.errors import TransientStorageError
from ooc_ntk.planning.solving import BLOCK_TILES, cholesky_bound_bytes, tile_cholesky_bytes
from ooc_ntk.storage.ahead import ReadAhead
from ooc_ntk.storage.arrays import TileArray
from ooc_ntk.storage.atomic import FileRecord, raw_bytes
from ooc_ntk.storage.local import LocalFiles
from ooc_ntk.storage.reading import aligned_buffer
from ooc_ntk.storage.retries import retried, storage_error

from .blockcg import NotPositiveDefiniteError
from .entries import Entries
from .products import PASSES

#: Beginning of the name of the folder that holds a factor, before host and process; it is deleted with the factor.
PREFIX: Final = ".ooc-ntk-cholesky-"

#: Strips that are held while they are read: two in use, two ahead.
STRIPS_READ: Final = 4

#: Name of the Zarr array in it.
FACTOR: Final = "factor.zarr"


class TileCholesky:
    """The Cholesky factor L of ``K + λI`` in a folder of its own, a Zarr array in strips as high as a block.

    A context manager: the folder is deleted on leaving.

    Attributes:
        bytes_read: bytes of the factor read so far.
        bytes_written: bytes of the factor written so far.
    """

    def __init__(self, workspace: Path, entries: Entries, edge: int) -> None:
        """Make the folder.

        Args:
            workspace: where.
            entries: of the kernel.
            edge: rows of a block.

        Raises:
            StorageError: if it cannot be made.
        """
        self._entries, self._size = entries, entries.size
        self._edge = min(edge, -(-self._size // BLOCK_TILES) * BLOCK_TILES)
        self._width = max(1, self._edge // BLOCK_TILES)
        _sweep(workspace)
        try:
            self.path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{platform.node()}-{os.getpid()}-", dir=workspace))
        except OSError as error:
            raise storage_error("creating a folder in", workspace, error) from error
        self._tiles = TileArray(
            LocalFiles(self.path), FACTOR, (self._size, self._size), (self._edge, self._width), "<f8"
        )
        self._tiles.create({"what": "lower Cholesky factor of K + ridge I"})
        self._reader = self._tiles.files.reader()
        self._records: dict[tuple[int, int], FileRecord] = {}
        self.bytes_read = self.bytes_written = self._kernel_bytes = 0

    def __enter__(self) -> TileCholesky:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    @property
    def io_ratio(self) -> float:
        """Bytes that the factorisation moved, kernel included, over the lower bound for its memory."""
        return self._moved / cholesky_bound_bytes(self._size, tile_cholesky_bytes(self._edge))

    @property
    def _blocks(self) -> list[range]:
        return [range(at, min(at + self._edge, self._size)) for at in range(0, self._size, self._edge)]

    def factorise(self, ridge: float, advance: Callable[[float, float], None]) -> None:
        """Factorise ``K + ridge·I``.

        Args:
            ridge: at least 0.
            advance: told the operations done, of how many.

        Raises:
            NotPositiveDefiniteError: if the matrix is not positive definite.
            StorageError: if a file cannot be read or written.
        """
        done, total, read = 0.0, self._size**3 / 3, self._entries.bytes_read
        memory = torch.empty(self._edge * self._edge, dtype=torch.float64)
        largest = float(self._entries.diagonal().max(initial=0.0)) + ridge
        for column, columns in enumerate(self._blocks):
            for row, rows in enumerate(self._blocks[column:], column):
                block = memory[: len(rows) * len(columns)].view(len(rows), len(columns))
                self._load(block, rows, columns, ridge)
                self._subtract(block, row, column)
                if row == column:
                    self._factorise_block(block, rows, largest)
                    self._write(block, row, column)
                else:
                    self._solve_block(block, row, column)
                done += len(rows) * len(columns) * (columns.start + len(columns) / 2) * (1 if row == column else 2)
                advance(min(done, total), total)
        self._moved = self.bytes_read + self.bytes_written + self._entries.bytes_read - read

    def _load(self, block: torch.Tensor, rows: range, columns: range, ridge: float) -> None:
        """Entries of the kernel, of a block on the diagonal its lower triangle."""
        values = block.numpy()
        for attempt in range(PASSES):
            try:
                for part in self._entries.blocks(rows, lower=rows == columns, columns=columns):
                    top, left = part.rows.start - rows.start, part.columns.start - columns.start
                    values[top : top + len(part.rows), left : left + len(part.columns)] = part.values
                break
            except TransientStorageError:
                if attempt == PASSES - 1:
                    raise
        if rows == columns:
            values[np.diag_indices(len(rows))] += ridge

    def _subtract(self, block: torch.Tensor, row: int, column: int) -> None:
        """``A_IJ − Σ L_Is L_Jsᵀ`` over all strips s left of the block."""
        strips = range(column * self._edge // self._width)
        keys = [(each, strip) for strip in strips for each in ((row,) if row == column else (row, column))]
        for taken in _grouped(self._read(keys), 1 if row == column else 2):
            block.addmm_(taken[0], taken[-1].T, alpha=-1)

    def _factorise_block(self, block: torch.Tensor, rows: range, largest: float) -> None:
        """Cholesky of a block on the diagonal, in place.

        A pivot that is rounding beside the largest diagonal entry passes for none: the solution would be noise.
        """
        values = block.numpy()
        # Of the transpose, in Fortran order, the upper triangle: the lower one of the block.
        _, failed = lapack.dpotrf(values.T, lower=0, clean=1, overwrite_a=1)
        if failed:
            raise NotPositiveDefiniteError(f" (found in row {rows.start + failed - 1:,})")
        if float(values.diagonal().min()) ** 2 < np.finfo(np.float64).eps * largest:
            raise NotPositiveDefiniteError(" to working precision")

    def _solve_block(self, block: torch.Tensor, row: int, column: int) -> None:
        """``X L_JJᵀ = A`` in place, strip by strip of the diagonal block; each strip of X is written as it is done."""
        first = column * self._edge // self._width
        width = block.shape[1]
        keys = [(column, first + strip) for strip in range(-(-width // self._width))]
        for (_, strip), diagonal in zip(keys, self._read(keys), strict=True):
            start = (strip - first) * self._width
            stop = min(start + self._width, width)
            solved = torch.linalg.solve_triangular(diagonal[start:stop].T, block[:, start:stop], upper=True, left=False)
            block[:, start:stop] = solved
            block[:, stop:].addmm_(solved, diagonal[stop:].T, alpha=-1)
            self._write_strip(row, strip, block[:, start:stop])

    def _write(self, block: torch.Tensor, row: int, column: int) -> None:
        first = column * self._edge // self._width
        for number, start in enumerate(range(0, block.shape[1], self._width)):
            self._write_strip(row, first + number, block[:, start : start + self._width])

    def _write_strip(self, row: int, strip: int, values: torch.Tensor) -> None:
        """Write a strip; not synced, as the factor goes when the process ends."""
        chunk = np.zeros(self._tiles.chunks)
        chunk[: values.shape[0], : values.shape[1]] = values.numpy()
        path = self._tiles.chunk_path((row, strip))
        where = self.path / path
        try:
            where.parent.mkdir(parents=True, exist_ok=True)
            file = retried(
                lambda: os.open(where, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC), "writing", where
            )
            try:
                view = raw_bytes(chunk).data
                while view:
                    rest = view
                    view = view[retried(lambda: os.write(file, rest), "writing", where) :]  # noqa: B023
            finally:
                os.close(file)
        except OSError as error:
            raise storage_error("writing", where, error) from error
        self._records[row, strip] = FileRecord(path, chunk.nbytes, int(google_crc32c.value(raw_bytes(chunk))))
        self.bytes_written += values.numel() * 8

    def _read(self, keys: Sequence[tuple[int, int]]) -> Iterator[torch.Tensor]:
        """Strips in order, read ahead; valid until the next but one is asked for."""
        size = self._edge * self._width * 8
        buffers = [aligned_buffer(size) for _ in range(min(STRIPS_READ, len(keys)))]

        def load(key: tuple[int, int], buffer: NDArray[np.uint8] | None) -> torch.Tensor:
            assert buffer is not None
            self._reader.read(self._records[key], buffer)
            height = len(self._blocks[key[0]])
            whole = torch.from_numpy(buffer[:size].view(np.float64)).view(self._edge, self._width)
            return whole[:height]

        with ReadAhead(keys, load, buffers) as ahead:
            before: list[tuple[int, int]] = []
            for key in keys:
                strip = ahead.take()
                self.bytes_read += strip.numel() * 8
                before.append(key)
                yield strip
                if len(before) == 2:
                    ahead.give_back(before.pop(0))

    def solve(self, targets: NDArray[np.float64]) -> NDArray[np.float64]:
        """``L Lᵀ x = y``: two sweeps over the factor.

        Args:
            targets: (n, targets).

        Returns:
            (n, targets) float64.
        """
        found = torch.from_numpy(targets.copy())
        for row, rows in enumerate(self._blocks):
            part = found[rows.start : rows.stop]
            keys = [(row, strip) for strip in range(-(-rows.stop // self._width))]
            for (_, strip), values in zip(keys, self._read(keys), strict=True):
                left = strip * self._width
                right = min(left + self._width, rows.stop)
                if left < rows.start:
                    part.addmm_(values[:, : right - left], found[left:right], alpha=-1)
                    continue
                start, stop = left - rows.start, right - rows.start
                square = values[start:stop, : stop - start]
                part[start:stop] = torch.linalg.solve_triangular(square, part[start:stop], upper=False)
                part[stop:].addmm_(values[stop:, : stop - start], part[start:stop], alpha=-1)
        for row, rows in reversed(list(enumerate(self._blocks))):
            part = found[rows.start : rows.stop]
            keys = [(row, strip) for strip in reversed(range(-(-rows.stop // self._width)))]
            for (_, strip), values in zip(keys, self._read(keys), strict=True):
                left = strip * self._width
                right = min(left + self._width, rows.stop)
                if left >= rows.start:
                    start, stop = left - rows.start, right - rows.start
                    part[start:stop].addmm_(values[stop:, : stop - start].T, part[stop:], alpha=-1)
                    square = values[start:stop, : stop - start]
                    part[start:stop] = torch.linalg.solve_triangular(square.T, part[start:stop], upper=True)
                else:
                    found[left:right].addmm_(values[:, : right - left].T, part, alpha=-1)
        return np.asarray(found.numpy())


def _sweep(workspace: Path) -> None:
    """Delete factors of processes of this machine that were killed."""
    mark = f"{PREFIX}{platform.node()}-"
    for folder in workspace.glob(f"{glob.escape(mark)}*-*"):
        process = folder.name.removeprefix(mark).partition("-")[0]
        if process.isdigit() and not psutil.pid_exists(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def _grouped(strips: Iterator[torch.Tensor], count: int) -> Iterator[list[torch.Tensor]]:
    """Strips in groups of one or two."""
    group: list[torch.Tensor] = []
    for strip in strips:
        group.append(strip)
        if len(group) == count:
            yield group
            group = []
