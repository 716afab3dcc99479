"""Kernels of several checkpoints of one model: their mean, and how far they drift from each other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ooc_ntk.errors import InputError, StorageError
from ooc_ntk.storage.arrays import TileArray, open_tile_array
from ooc_ntk.storage.atomic import write_whole
from ooc_ntk.storage.local import LocalFiles

from .kernel import Kernel

#: File that names the checkpoints of a directory, in order.
INDEX: Final = "checkpoints.json"

#: Folder of the mean kernel, and the mark that it is whole.
MEAN, WHOLE = "mean", "mean/whole.json"

#: Bytes of the stripes of all checkpoints that are held at once (a choice).
STRIPE_BYTES: Final = 64 * 2**20


@dataclass(frozen=True)
class Drift:
    """How far kernels of one model move apart.

    Attributes:
        names: of the checkpoints, in order.
        distances: (checkpoints, checkpoints) float64, ``1 − ⟨K_a, K_b⟩ / (‖K_a‖ ‖K_b‖)`` over the train square: 0 for
            kernels that differ by a factor alone (kernel distance, Fort et al. 2020, arXiv 2010.15110).
        norms: (checkpoints,) float64, Frobenius norms of the train squares.
        changes: (checkpoints,) float64, ``‖K_t − K_0‖ / ‖K_0‖`` against the first one.
    """

    names: tuple[str, ...]
    distances: NDArray[np.float64]
    norms: NDArray[np.float64]
    changes: NDArray[np.float64]

    @property
    def steps(self) -> NDArray[np.float64]:
        """(checkpoints − 1,) distances from each checkpoint to the next."""
        return np.diagonal(self.distances, 1).copy()

    def to_json(self) -> str:
        """All figures as JSON."""
        return json.dumps(
            {
                "names": list(self.names),
                "distances": self.distances.tolist(),
                "norms": self.norms.tolist(),
                "changes": self.changes.tolist(),
            },
            indent=2,
        )


class Checkpoints:
    """Finished kernels of several checkpoints, in the order of training; index it for one of them.

    Attributes:
        path: the directory that holds a run for each.
        names: names of the runs.
        weights: files of the weights, as they were given.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a directory of checkpoints.

        Args:
            path: the directory.

        Raises:
            StorageError: if it holds no checkpoints, or a run is not finished.
        """
        self.path = Path(path)
        entries = read_index(self.path)
        if entries is None:
            raise StorageError(f"{self.path} holds no checkpoints: there is no {INDEX} in it")
        self.names = tuple(entry["name"] for entry in entries)
        self.weights = tuple(entry["weights"] for entry in entries)
        self._kernels = [Kernel(self.path / name) for name in self.names]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int | str) -> Kernel:
        """One kernel, by its number or the name of its run."""
        if isinstance(index, str):
            if index not in self.names:
                raise InputError(f"{self.path} holds no checkpoint {index!r}; it holds {', '.join(self.names)}")
            index = self.names.index(index)
        return self._kernels[index]

    def __iter__(self) -> Iterator[Kernel]:
        return iter(self._kernels)

    def __repr__(self) -> str:
        rows, columns = self._kernels[0].shape
        return f"<Checkpoints {len(self)} kernels {rows} × {columns} in {self.path}>"

    def mean(self) -> Kernel:
        """The mean of all kernels, TRAK's ensemble (Park et al. 2023), made once and kept in ``mean/``.

        Computed stripe by stripe in float64; a few stripes are held.

        Returns:
            The mean, which reads and solves like any kernel.

        Raises:
            StorageError: if it cannot be written.
        """
        first, folder = self._kernels[0], self.path / MEAN
        sources = [_source(kernel) for kernel in self._kernels]
        made_of = json.dumps({"names": self.names, "sources": sources})
        if not (self.path / WHOLE).exists() or (self.path / WHOLE).read_text() != made_of:
            (self.path / WHOLE).unlink(missing_ok=True)
            self._write_mean(folder, {"kernel": "mean", "checkpoints": list(self.names), "sources": sources})
            write_whole(self.path, WHOLE, made_of.encode())
        array = open_tile_array(folder, "kernel.zarr")
        diagonal = np.asarray(open_tile_array(folder, "diagonal")[:], dtype=np.float64)
        return Kernel.of_array(folder, array, diagonal, first.train_samples, first.test_samples)

    def _write_mean(self, folder: Path, attributes: dict[str, Any]) -> None:
        first = self._kernels[0]
        edge = first.chunk_rows
        array = TileArray(LocalFiles(folder), "kernel.zarr", first.shape, (edge, edge), first.dtype.str)
        diagonal = TileArray(LocalFiles(folder), "diagonal", (first.shape[0],), (edge,), "<f8")
        folder.mkdir(parents=True, exist_ok=True)
        array.create(attributes)
        diagonal.create()
        rows, columns = first.shape
        mean = np.mean([kernel.diagonal() for kernel in self._kernels], axis=0)
        for i in range(-(-rows // edge)):
            _publish(diagonal, (i,), mean[i * edge : (i + 1) * edge, None])
            for j in range(-(-columns // edge)):
                tile = np.zeros((min(edge, rows - i * edge), min(edge, columns - j * edge)))
                for kernel in self._kernels:
                    tile += kernel[i * edge : (i + 1) * edge, j * edge : (j + 1) * edge]
                _publish(array, (i, j), tile / len(self))

    def check_mean(self) -> str:
        """Compare the mean that is kept with the kernels, tile by tile.

        Returns:
            What is wrong, empty if nothing is or no mean was made.
        """
        if not (self.path / WHOLE).exists():
            return ""
        try:
            array = open_tile_array(self.path / MEAN, "kernel.zarr")
        except StorageError as error:
            return str(error)
        rows, columns = self._kernels[0].shape
        edge = self._kernels[0].chunk_rows
        for i in range(0, rows, edge):
            for j in range(0, columns, edge):
                place = (slice(i, min(i + edge, rows)), slice(j, min(j + edge, columns)))
                wanted = np.mean([kernel[place].astype(np.float64) for kernel in self._kernels], axis=0)
                found = np.asarray(array[place], dtype=np.float64)
                if not np.allclose(found, wanted, rtol=1e-6, atol=1e-6 * float(np.abs(wanted).max(initial=0.0))):
                    tile = f"tile {i // edge}, {j // edge}"
                    return f"FAILED, {tile} is not the mean of the kernels; delete {self.path / MEAN}"
        return ""

    def drift(self) -> Drift:
        """Distances between all kernels over the train square, in one pass over them; kept in ``drift.json``.

        Returns:
            The distances.

        Raises:
            StorageError: if they cannot be written.
        """
        count, (_, columns) = len(self), self._kernels[0].shape
        products, moved = np.zeros((count, count)), np.zeros(count)
        step = max(1, STRIPE_BYTES // (count * columns * 8))
        for start in range(0, columns, step):
            stop = min(start + step, columns)
            stripes = np.stack([kernel[start:stop].reshape(-1) for kernel in self._kernels]).astype(np.float64)
            products += stripes @ stripes.T
            stripes -= stripes[0].copy()
            moved += np.einsum("ki,ki->k", stripes, stripes)
        norms = np.sqrt(products.diagonal())
        scale = np.where(norms > 0, norms, 1.0)
        distances = 1.0 - products / scale[:, None] / scale[None, :]
        np.fill_diagonal(distances, 0.0)
        found = Drift(self.names, distances, norms, np.sqrt(moved) / scale[0])
        write_whole(self.path, "drift.json", (found.to_json() + "\n").encode())
        return found


def _source(kernel: Kernel) -> str:
    """What identifies a finished run: its plan and, through it, its job."""
    assert kernel.plan is not None
    return f"{kernel.plan.job_digest}-{kernel.plan.digest}"


def _publish(array: TileArray, place: Sequence[int], values: NDArray[np.float64]) -> None:
    """Write one tile, padded to a whole chunk."""
    chunk = np.full(array.chunks, np.nan, dtype=array.dtype)
    chunk[tuple(slice(0, size) for size in values.shape[: chunk.ndim])] = values.reshape(values.shape[: chunk.ndim])
    file = array.files.stage(array.chunk_path(place))
    try:
        file.append(chunk)
        file.seal()
        file.publish()
    except BaseException:
        file.discard()
        raise


def read_index(path: Path) -> list[dict[str, str]] | None:
    """The checkpoints that a directory names, None if it names none.

    Raises:
        StorageError: if the file cannot be read.
    """
    try:
        entries: list[dict[str, str]] = json.loads((path / INDEX).read_text())["checkpoints"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"cannot read {path / INDEX} ({error}); choose another --out") from error
    return entries


def write_index(path: Path, entries: Sequence[dict[str, str]]) -> None:
    """Write which checkpoints a directory holds.

    Raises:
        StorageError: if it cannot be written.
    """
    write_whole(path, INDEX, (json.dumps({"checkpoints": list(entries)}, indent=2) + "\n").encode())
