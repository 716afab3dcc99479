"""Layer-wise kernels on disk: the summands of a kernel, one per layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ooc_ntk.errors import InputError, unknown_name
from ooc_ntk.storage.arrays import open_tile_array
from ooc_ntk.storage.atomic import FileRecord
from ooc_ntk.storage.files import Files
from ooc_ntk.storage.local import files_of

from .entries import TileEntries
from .operator import KernelOperator

if TYPE_CHECKING:
    import dask.array

#: Name of the Zarr array of layer-wise kernels: (layers, samples · entries, train samples · entries).
LAYERS: Final = "layers.zarr"


class LayerKernel(KernelOperator):
    """One layer's summand of a kernel, shaped and scaled as the kernel is; it reads and answers like one.

    Attributes:
        name: the layer's name.
    """

    def __init__(
        self,
        where: Files | Path,
        name: str,
        samples: tuple[int, int],
        records: Mapping[str, FileRecord] | None = None,
        data_digest: str = "",
        workspace: Path | None = None,
    ) -> None:
        """Open the summand of a layer.

        Args:
            where: the files of the run.
            name: the layer's name.
            samples: train and test samples.
            records: committed files by path; None where no checksums are kept.
            data_digest: of the samples.
            workspace: folder for what is computed on disk and deleted after.

        Raises:
            InputError: if there is no such layer.
            StorageError: if the run keeps no layer-wise kernels.
        """
        files = files_of(where)
        self._array = open_tile_array(files, LAYERS)
        names = [str(each) for each in self._array.attrs["layers"]]  # type: ignore[union-attr]
        if name not in names:
            raise unknown_name("layer", name, names)
        self._workspace, self.name, self._index = workspace, name, names.index(name)
        self._samples, self._data_digest = samples, data_digest
        self._entries = TileEntries(files, LAYERS, self._array, records, layer=(self._index,))

    @property
    def entries(self) -> TileEntries:
        """See :class:`KernelOperator`."""
        return self._entries

    @property
    def samples(self) -> tuple[int, int]:
        """See :class:`KernelOperator`."""
        return self._samples

    @property
    def workspace(self) -> Path | None:
        """See :class:`KernelOperator`: the run directory."""
        return self._workspace

    @property
    def data_digest(self) -> str:
        """See :class:`KernelOperator`."""
        return self._data_digest

    def sample_diagonal(self) -> NDArray[np.float64]:
        """See :class:`KernelOperator`.

        Raises:
            InputError: if there are test rows, whose entries with themselves are kept of the whole kernel alone.
        """
        if self.shape[0] > self.shape[1]:
            raise InputError(
                f"what layer {self.name!r} adds to the diagonal of test samples is not kept: no cosines of a layer of "
                "a run with test rows; make a run without them"
            )
        return self._entries.diagonal()

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy dtype of the entries."""
        return np.dtype(self._array.dtype)

    def __getitem__(self, index: Any) -> NDArray[Any]:
        """Entries, read from disk: slices and integers as in NumPy, index lists along both axes (orthogonal)."""
        parts = index if isinstance(index, tuple) else (index,)
        fancy = any(isinstance(part, list | np.ndarray) for part in parts)
        return np.asarray((self._array.oindex if fancy else self._array)[(self._index, *parts)])

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        """The whole summand in memory."""
        if copy is False:
            raise ValueError("a kernel on disk cannot become an array without a copy")
        return np.asarray(self._array[self._index], dtype=dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<LayerKernel {self.name} {self.shape[0]} × {self.shape[1]} {self.dtype}>"

    def dask(self) -> dask.array.Array:
        """The summand as a Dask array, one chunk per tile, nothing read yet."""
        import dask.array  # heavy, and only here

        return dask.array.from_array(self._array, chunks=self._array.chunks)[self._index]  # type: ignore

    def trace(self) -> float:
        """Sum of its diagonal over the train samples: what the layer adds to the trace of the train square."""
        return float(self._entries.diagonal().sum())
