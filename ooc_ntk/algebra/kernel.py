"""The kernel on disk: reads like an array, knows where it came from, and solves."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from numpy.typing import DTypeLike, NDArray

from ooc_ntk.errors import IncompleteRunError, InputError, StorageError
from ooc_ntk.planning.plan import Plan
from ooc_ntk.storage.arrays import TileRows, index_numbers, open_tile_array
from ooc_ntk.storage.atomic import FileRecord
from ooc_ntk.storage.directory import RunDirectory
from ooc_ntk.storage.files import Files
from ooc_ntk.storage.local import LocalFiles
from ooc_ntk.storage.manifest import Manifest
from ooc_ntk.storage.mirror import open_mirror
from ooc_ntk.storage.storeurl import is_store
from ooc_ntk.storage.swap import cut_off

from .alignment import LayerAlignment, layer_alignment
from .attribution import attribution_scores
from .entries import ArrayEntries, Entries, FeatureEntries, TileEntries
from .errors import sketch_shape
from .features import FeatureProduct, Features, no_features
from .layers import LayerKernel
from .operator import KernelOperator

if TYPE_CHECKING:
    import dask.array

    ZarrArray = zarr.Array[Any]


class Kernel(KernelOperator):
    """A finished kernel: (samples · entries) × (train samples · entries), train rows first, on disk.

    Where only features were kept, entries are computed from them when they are asked for.

    Attributes:
        path: the run directory, or the file of the features; of a run opened from its store, where its papers are.
        plan: the plan that made it; None for features that another program wrote.
    """

    def __init__(self, path: str | Path) -> None:
        """Open the kernel of a run directory, or of a run's store.

        Args:
            path: the run directory; or the URL of a store, whose copy of the run's papers is fetched.

        Raises:
            StorageError: if there is no run.
            IncompleteRunError: if the run is not finished.
        """
        directory = open_mirror(str(path)) if is_store(path) else RunDirectory(path)
        self._fetched: RunDirectory | None = (
            directory if is_store(path) else None
        )  # its folder is deleted with this kernel
        self.path, self._place = directory.root, str(path)
        if not directory.holds_run:
            raise no_run(self.path)
        plan = Plan.load(directory.plan_path)
        self.plan: Plan | None = plan
        manifest = Manifest(self.path, read_only=True)
        try:
            finished = manifest.keys()
            self._records: Mapping[str, FileRecord] | None = manifest.files()
            self._data_digest = str(json.loads(manifest.meta("job") or "{}").get("data", ""))
        finally:
            manifest.close()
        wanted = (
            {}
            if plan.features_only
            else {"kernel": (plan.finished_tiles(finished), plan.sample_grid.kernel_tile_count)}
        )
        if plan.projection is not None:  # their features stay, and may be damaged when the kernel is whole
            rows = sum(key.startswith("rows-0-") for key in finished)
            wanted = {"feature": (rows, plan.sample_grid.row_tiles), **wanted}
        for what, (done, count) in wanted.items():
            if done < count:
                raise IncompleteRunError(
                    f"the run in {path} is not finished: {done} of {count} {what} tiles are there; "
                    "run the same command again to go on"
                )
        self._files: Files = directory.files
        self._features = None if plan.projection is None else run_features(self._files, plan, self._place)
        self._shape, self._train, self._test = plan.kernel_shape, plan.train_samples, plan.test_samples
        self._diagonal: NDArray[np.float64] | None = None
        self._entries: Entries | None = None
        self._array: Any = None
        if plan.features_only:
            assert self._features is not None
            self._array = self._features.kernel()
        else:
            self._array = open_tile_array(self._files, "kernel.zarr")

    @classmethod
    def of_features(cls, path: str | Path, features: Features) -> Kernel:
        """The kernel that features stand for, its entries computed when they are asked for.

        Args:
            path: where they are, for messages.
            features: the features.
        """
        kernel = cls.__new__(cls)
        kernel.path, kernel.plan, kernel._features, kernel._diagonal = Path(path), None, features, None
        kernel._files, kernel._place, kernel._fetched = LocalFiles(path), str(path), None
        kernel._records, kernel._entries, kernel._data_digest = None, None, ""
        kernel._shape, kernel._train, kernel._test = (
            features.kernel_shape,
            features.train_samples,
            features.test_samples,
        )
        kernel._array = features.kernel()
        return kernel

    @classmethod
    def of_array(cls, path: str | Path, array: Any, diagonal: NDArray[np.float64], train: int, test: int) -> Kernel:
        """A kernel whose entries are there already, such as a mean of kernels.

        Args:
            path: where they are, for messages.
            array: Zarr array of the entries.
            diagonal: the diagonal of all samples.
            train: train samples.
            test: test samples.
        """
        kernel = cls.__new__(cls)
        kernel.path, kernel.plan, kernel._features, kernel._diagonal = Path(path), None, None, diagonal
        kernel._files, kernel._place, kernel._fetched = LocalFiles(path), str(path), None
        kernel._records, kernel._entries, kernel._data_digest = None, None, ""
        kernel._shape, kernel._train, kernel._test = (int(array.shape[0]), int(array.shape[1])), train, test
        kernel._array = array
        return kernel

    @property
    def entries(self) -> Entries:
        """Where products take the entries from: tiles on disk, or features where less is read of them."""
        if self._entries is None:
            featured = None if self._features is None else FeatureEntries(self._features)
            if isinstance(self._array, FeatureProduct):
                assert featured is not None
                self._entries = featured
            elif isinstance(self._array, zarr.Array) and (
                self.plan is not None or (self.path / "kernel.zarr").is_dir()
            ):
                stored = TileEntries(self._files, "kernel.zarr", self._array, self._records)
                triangle = self.shape[1] ** 2 // 2 * self.dtype.itemsize
                self._entries = featured if featured is not None and featured.product_bytes < triangle else stored
            else:
                self._entries = ArrayEntries(self._array)
        return self._entries

    @property
    def identity(self) -> str:
        """The run's plan and, through it, its job; empty for a kernel of no run."""
        return "" if self.plan is None else f"{self.plan.job_digest[:16]}-{self.plan.digest[:16]}"

    @property
    def samples(self) -> tuple[int, int]:
        """Train and test samples."""
        return self._train, self._test

    @property
    def data_digest(self) -> str:
        """Digest of the train and test samples; empty for features of another program, or a mean of kernels."""
        return self._data_digest

    def sample_diagonal(self) -> NDArray[np.float64]:
        """Entry of every row with itself as it is in the kernel, (rows,) float64."""
        found = self.diagonal()
        return np.where(found > 0, 1.0, 0.0) if self._is_cosine else found

    @property
    def _is_cosine(self) -> bool:
        """Whether the entries are cosines already."""
        if self.plan is not None:
            return self.plan.normalize == "cosine"
        return self._features is not None and self._features.cosine

    @property
    def chunk_rows(self) -> int:
        """Rows of one tile."""
        return int(self._array.chunks[0])

    @property
    def zarr(self) -> zarr.Array[Any]:
        """The kernel as a read-only Zarr array; attributes hold its provenance.

        Raises:
            InputError: if only features were kept.
        """
        if isinstance(self._array, FeatureProduct):
            raise InputError(
                f"only features were kept in {self._place}; read entries with kernel[...] or kernel.dask()"
            )
        found: zarr.Array[Any] = self._array
        return found

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers whose summands of the kernel were kept (``by="layer"``); empty if none were."""
        return () if self.plan is None else self.plan.layers

    def layer(self, name: str) -> LayerKernel:
        """One layer's summand of the kernel; all of them add up to it.

        Args:
            name: the layer's name, one of :attr:`layers`.

        Returns:
            Its summand, which reads like an array, and multiplies and decomposes as the kernel does.

        Raises:
            InputError: if there is no such layer, or no summands were kept.
        """
        self._check_layers()
        return LayerKernel(self._files, name, self.samples, self._records, self._data_digest, self.workspace)

    def layer_cka(self, *, centered: bool = True) -> LayerAlignment:
        """Alignments (CKA) of the layers' summands of the kernel, each with each, by one pass over all of them.

        Args:
            centered: whether the summands are centred first, as :meth:`cka` does.

        Returns:
            Names of the layers, and (layers, layers) alignments; NaN for a layer that adds nothing.

        Raises:
            InputError: if no summands were kept.
            StorageError: if a tile cannot be read, or is not what was committed.
        """
        self._check_layers()
        return layer_alignment([self.layer(name) for name in self.layers], self.layers, centered=centered)

    def _check_layers(self) -> None:
        """Refuse a run without layer-wise kernels.

        Raises:
            InputError: if it keeps none.
        """
        if not self.layers:
            raise InputError(
                f"the run in {self._place} keeps no kernels of single layers; run the job with by='layer', --by layer"
            )

    @property
    def features(self) -> Features:
        """The features of a projected kernel.

        Raises:
            InputError: for an exact kernel.
        """
        if self._features is None:
            raise no_features(self)
        return self._features

    @property
    def shape(self) -> tuple[int, int]:
        """Rows (train then test samples, times entries) and columns (train samples, times entries)."""
        return self._shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy dtype of the entries."""
        found: np.dtype[Any] = np.dtype(self._array.dtype)
        return found

    @property
    def train_samples(self) -> int:
        """Number of train samples (N)."""
        return self._train

    @property
    def test_samples(self) -> int:
        """Number of test samples (M)."""
        return self._test

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> NDArray[Any]:
        """Entries, read from disk: slices and integers as in NumPy, index lists along both axes (orthogonal)."""
        return np.asarray(self._array.oindex[index] if _is_fancy(index) else self._array[index])

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        """The whole kernel in memory."""
        if copy is False:
            raise ValueError("a kernel on disk cannot become an array without a copy")
        return np.asarray(self._array[:], dtype=dtype)

    def __repr__(self) -> str:
        rows, columns = self.shape
        kind = self.plan.kernel if self.plan is not None else "of features" if self._features is not None else "mean"
        return f"<Kernel {kind} {rows} × {columns} {self.dtype} in {self._place}>"

    def dask(self) -> dask.array.Array:
        """The kernel as a Dask array, one chunk per tile, nothing read yet."""
        import dask.array  # heavy, and only here

        return dask.array.from_array(self._array, chunks=self._array.chunks)  # type: ignore

    def diagonal(self) -> NDArray[np.float64]:
        """The diagonal of all samples, train then test, before normalisation.

        Returns:
            (samples · entries,) float64: squared Jacobian norms, scaled as the kernel is.
        """
        if self._diagonal is not None:
            return self._diagonal
        if self.plan is None:
            return self.features.diagonal()
        return np.asarray(open_tile_array(self._files, "diagonal")[:], dtype=np.float64)

    def errors(self, rows: Any = slice(None), columns: Any = slice(None)) -> NDArray[np.float64]:
        """Standard errors of entries of a projected kernel, in the units of the entries.

        Two of them on either side of an entry hold the exact one with 95%. By ``SE_ij² = (⟨F_ii, F_jj⟩ + tr F_ij²)/K``
        from the C × C blocks F of the features; of a tensor sketch from the spread between its independent blocks of
        rows; of a cosine by the delta method.

        Args:
            rows: kernel rows: numbers, a slice or a list.
            columns: kernel columns, likewise.

        Returns:
            (rows, columns) float64.

        Raises:
            InputError: for an exact kernel, which has no such errors.
            BudgetError: if the features of so many rows do not fit in memory.
        """
        chosen = [index_numbers(part, size) for part, size in zip((rows, columns), self.shape, strict=True)]
        return self.features.errors(chosen[0], chosen[1])

    def expected_error(self) -> float:
        """Relative Frobenius error to be expected of a projected kernel's train square.

        From the features of up to 256 train samples, extrapolated to all of them.

        Raises:
            InputError: for an exact kernel.
        """
        return self.features.expected_error()

    def attribution(self, ridge: float, out: str | Path | None = None) -> ZarrArray:
        """TRAK's scores ``φ(ΦᵀΦ + λ·I)⁻¹Φᵀ`` of every sample against every train sample (Park et al. 2023).

        Computed tile by tile; only dim × dim numbers and a few tiles are held.

        Args:
            ridge: λ, absolute, at least 0.
            out: folder for the scores; None is ``attribution.zarr`` in the run directory. Replaced if it is there.

        Returns:
            (samples, train samples) float32 on disk, train rows first.

        Raises:
            InputError: for an exact or full kernel, a negative ridge, or a matrix that is not positive definite.
            BudgetError: if dim × dim numbers do not fit in memory.
        """
        if out is None and self.plan is None:
            raise InputError("features of another program have no run directory; say where the scores go: out=...")
        if out is None and self._fetched is not None:
            raise InputError(f"scores are not written into {self._place}; say where they go: out=...")
        target = Path(out) if out is not None else self.path / "attribution.zarr"
        return attribution_scores(self.features, ridge, target.absolute().parent, target.name)

    @property
    def workspace(self) -> Path | None:
        """Folder for what is computed on disk and deleted after: the run directory."""
        return self.path if self.path.is_dir() else None


def no_run(path: Path) -> StorageError:
    """The error where there is no run, saying what is there in its place."""
    missing = cut_off(path)
    if missing is not None:
        return missing
    if (path / "featurizer.json").exists():
        return StorageError(f"{path} holds features that a Featurizer was fed with, and no run; use open_features")
    if (path / "checkpoints.json").exists():
        return StorageError(f"{path} holds several checkpoints, a run in each folder; use open_checkpoints")
    if re.match(r"^[a-z0-9]{2,}:/", str(path)):  # what a path makes of a URL
        return StorageError(
            f"{path} is a URL, and this takes the run directory; from Python ooc_ntk.open('s3://bucket/prefix') opens "
            "a kernel from its store"
        )
    return StorageError(f"{path} holds no run: there is no plan.json in it")


def _is_fancy(index: Any) -> bool:
    """Whether an index holds lists or arrays, for which Zarr has its own indexer."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, list | np.ndarray) for part in parts)


def run_features(files: Files, plan: Plan, name: str) -> Features:
    """The features of a projected run.

    Args:
        files: the files of the run.
        plan: its plan.
        name: for messages.
    """
    array = TileRows(files, "features.zarr")
    heavy = TileRows(files, "heavy.zarr") if plan.heavy else None
    assert plan.projection is not None
    return Features(
        array=array,
        outputs=plan.rows_per_sample,
        train_samples=plan.train_samples,
        test_samples=plan.test_samples,
        shape=sketch_shape(plan.projection, plan.heavy_share),
        full=plan.entries_per_sample > 1,
        divisor=float(plan.outputs) if plan.scale == "mean" else 1.0,
        cosine=plan.normalize == "cosine",
        heavy=heavy,
        sketch=str(array.attributes.get("sketch") or ""),
        name=name,
    )
