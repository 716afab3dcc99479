"""Zarr arrays whose chunk is one tile: raw little-endian files that any Zarr reads and the engine writes itself."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import zarr
from numpy.typing import NDArray

from ooc_ntk.errors import StorageError

from .atomic import storage_error

#: What a missing tile reads as where the dtype has no NaN: bf16's NaN as bits, and no token.
_MISSING: Final = {"<u2": 0x7FC0, "<i4": -1}


@dataclass(frozen=True)
class TileArray:
    """A Zarr v3 array without codec: chunk == tile, C order, missing tiles read as NaN.

    Attributes:
        root: run directory.
        name: name of the array in it.
        shape: shape of the array.
        chunks: shape of one tile; edge tiles are padded to it.
        dtype: little-endian NumPy dtype string.
    """

    root: Path
    name: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str

    def create(self, attributes: Mapping[str, Any] | None = None) -> None:
        """Write the array's metadata; tiles that are there already stay.

        Raises:
            StorageError: if an array of another shape, tile or dtype is there.
        """
        folder = self.root / self.name
        there = None
        with suppress(StorageError):  # metadata that cannot be read are written anew
            there = self.open()
        if there is not None:
            if (there.shape, there.chunks, there.dtype.str) != (self.shape, self.chunks, self.dtype):
                raise StorageError(
                    f"{folder} holds an array of {there.shape} in tiles of {there.chunks} ({there.dtype}), "
                    f"expected {self.shape} in {self.chunks} ({self.dtype}); use another run directory"
                )
            return
        try:
            (folder / "zarr.json").unlink(missing_ok=True)
            self._write_metadata(attributes or {})
        except OSError as error:
            raise storage_error("creating", folder, error) from error

    def _write_metadata(self, attributes: Mapping[str, Any]) -> None:
        zarr.create_array(
            store=zarr.storage.LocalStore(self.root),
            name=self.name,
            shape=self.shape,
            chunks=self.chunks,
            dtype=self.dtype,
            fill_value=_MISSING.get(self.dtype, float("nan")),
            compressors=None,
            filters=None,
            attributes=dict(attributes),
            config={"write_empty_chunks": True},
        )

    def open(self) -> zarr.Array[Any]:
        """Open the array read-only with Zarr.

        Raises:
            StorageError: if it is not there.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", category=UserWarning)
                return zarr.open_array(zarr.storage.LocalStore(self.root, read_only=True), path=self.name, mode="r")
        except (FileNotFoundError, KeyError, ValueError) as error:
            raise StorageError(f"there is no array {self.name} in {self.root}: {error}") from error

    def chunk_path(self, coordinates: Sequence[int]) -> str:
        """Path of one tile relative to the run directory."""
        return "/".join((self.name, "c", *(str(index) for index in coordinates)))

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one tile file."""
        return int(np.prod(self.chunks, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    def empty_chunk(self) -> NDArray[np.generic]:
        """A buffer of one tile, uninitialised."""
        return np.empty(self.chunks, dtype=self.dtype)


def open_tile_array(root: Path, name: str) -> zarr.Array[Any]:
    """Open any array of a run directory read-only.

    Raises:
        StorageError: if it is not there.
    """
    return TileArray(root, name, (), (), "<f4").open()
