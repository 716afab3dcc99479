"""``Featurizer``: projected features of batches that the caller's own loader hands out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import msgspec
import numpy as np
import torch
from torch import nn

from ooc_ntk.algebra.fed import STATE_FORMAT, FedState, FedTile, fed_features, read_state, write_state
from ooc_ntk.algebra.kernel import Kernel
from ooc_ntk.compute.capture import Capture
from ooc_ntk.compute.finite import all_finite
from ooc_ntk.compute.jacobian import ModelBatch
from ooc_ntk.compute.machine import peak_resident_bytes
from ooc_ntk.errors import DataChangedError, InputError, RunConflictError
from ooc_ntk.inputs.arrays import ArraySource, as_column
from ooc_ntk.inputs.job import Job
from ooc_ntk.inputs.joined import joined
from ooc_ntk.inputs.samples import Samples, digest_samples
from ooc_ntk.inputs.tensors import item_samples
from ooc_ntk.planning.budget import Budget
from ooc_ntk.planning.plan import Plan
from ooc_ntk.planning.planner import Preferences
from ooc_ntk.planning.projection import Projection
from ooc_ntk.storage.arrays import TileArray
from ooc_ntk.storage.local import LocalFiles
from ooc_ntk.storage.reading import checksum_file
from ooc_ntk.units import HELD_DTYPE, STORED_DTYPE

from .context import reproducible, taken
from .driver import planned_structure
from .features import Projector, projector_of
from .prepare import PreparedJob, prepare
from .session import planned

#: Samples per tile: computed, stored and compared together (a choice: a few seconds of work).
TILE_SAMPLES: Final = 256

#: Bytes of samples that are gathered for a tile; larger samples make smaller tiles (a choice).
GATHERED_BYTES: Final = 128 * 2**20

#: File of the plan by which the first batch is computed, and all others.
PLAN: Final = "featurizer-plan.json"


class Featurizer:
    """Computes projected Jacobian features batch by batch, for data that only come from a loader.

    Batches are gathered into tiles, whatever their size, so that features do not depend on how the loader cuts them.
    Stopped and begun anew on the same folder, it skips samples that are there, after comparing them.

    Attributes:
        path: folder of the features.
    """

    def __init__(
        self,
        model: nn.Module | str,
        out: str | Path,
        *,
        projection: str | Projection = "sjlt:4096",
        budget: Budget | None = None,
        **settings: Any,
    ) -> None:
        """Begin, or go on where an earlier one stopped.

        Args:
            model: a module, or the spec of one.
            out: folder of the features; made if it is not there.
            projection: with its number of columns.
            budget: limits of memory; None takes 80% of what is free.
            settings: of the kernel, named as for :class:`Job`: ``kernel``, ``outputs``, ``parameters``, ``scale``,
                ``normalize``, ``precision``, ``device``, ``weights``, ``seed``.

        Raises:
            InputError: for settings that are wrong, or that only data by name have.
            RunConflictError: if the folder holds something else.
        """
        if settings.get("outputs") == "clip":
            raise InputError("outputs='clip' draws its bank from all train samples; give a ClipOutput with a bank here")
        for name in ("train", "test", "collate", "by"):
            if settings.get(name) is not None:
                raise InputError(f"a Featurizer is fed with batches and keeps features alone; leave {name} out")
        self.path = Path(out)
        self._state = read_state(self.path)
        if self._state is None and self.path.is_dir() and any(self.path.iterdir()):
            raise RunConflictError(f"{self.path} holds other files and no features; choose an empty folder")
        self._settings = {"model": model, "projection": projection, **settings}
        # Names and values are checked now, the model when the first tile is there.
        checked = Job(**self._settings, train=[0.0])
        if checked.sketch is None or checked.sketch.dim is None:
            raise InputError(f"a Featurizer needs a projection with its columns, as 'sjlt:4096', got {projection!r}")
        self._budget = budget
        self._pending: list[Samples] = []
        self._train = self._test = self._tiles = 0
        self._tile = TILE_SAMPLES if self._state is None else self._state.tile_samples
        self._work: _Work | None = None
        self._left = False
        self._prepared: PreparedJob | None = None

    @property
    def samples(self) -> int:
        """Samples that were fed so far, those that are skipped included."""
        return self._train + self._test

    def featurize(self, batch: object, *, test: bool = False) -> None:
        """Take one batch.

        Args:
            batch: ``x``, ``(x, y)`` or a dict of tensors, samples first.
            test: whether these are test samples, which have kernel rows and no columns; after all train samples.

        Raises:
            InputError: for a batch that cannot be used, or train samples after test samples.
            DataChangedError: if samples that are on disk already were others then.
            NonFiniteError: if inputs or gradients are not finite.
            StorageError: if features cannot be written.
        """
        found = _batch(batch, self.samples)
        if not test and self._test:
            raise InputError("train samples come before test samples; feed all train batches first")
        if self._state is not None and self._state.finished and self.samples + found.size > self._state.samples:
            raise InputError(f"the features in {self.path} are finished; open them with open_features, or take another")
        if self._state is None and not self._pending and not self._tiles:
            each = sum(value[0].numel() * value.element_size() for _, value in found.named())
            self._tile = max(1, min(TILE_SAMPLES, GATHERED_BYTES // max(1, each)))
        pending = [joined([*self._pending, found])] if self._pending else [found]
        self._train, self._test = self._train + (0 if test else found.size), self._test + (found.size if test else 0)
        self._pending = pending
        while self._pending and self._pending[0].size >= self._tile:
            (whole,) = self._pending
            self._take_tile(taken(whole, slice(0, self._tile)))
            # Only now, so that what fails is tried again with the next batch, and nothing is stored in its place.
            self._pending = [taken(whole, slice(self._tile, whole.size))] if whole.size > self._tile else []

    def finish(self) -> Kernel:
        """Compute what is left and close the features.

        Returns:
            The kernel of all samples that were fed; entries are computed from the features when they are asked for.

        Raises:
            InputError: if no train sample was fed, or fewer samples than are on disk.
            OocNtkError: as :meth:`featurize`.
        """
        if self._left:
            raise InputError(
                "the block of this Featurizer was left with samples that are not computed yet; call finish() inside it"
            )
        if self._state is not None and self._state.finished and self._pending:
            self._take_tile(self._pending[0])
            self._pending = []
        if self._state is None or not self._state.finished:
            if not self._train:
                raise InputError("no train sample was fed; call featurize(batch) for every batch before finish()")
            if self._state is not None and self._state.samples > self.samples:
                raise InputError(
                    f"{self.path} holds {self._state.samples:,} samples, fed were {self.samples:,}; feed all batches "
                    "again"
                )
            if self._pending:
                self._take_tile(self._pending[0])
                self._pending = []
            state = self._state
            assert state is not None
            self._create_arrays(state)
            self._state = msgspec.structs.replace(state, train=self._train, finished=True)
            write_state(self.path, self._state)
        return Kernel.of_features(self.path, fed_features(self.path))

    def __enter__(self) -> Featurizer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._work, self._left = None, bool(self._pending)

    def _take_tile(self, samples: Samples) -> None:
        """Compute and store a tile, or compare it with the one that is there."""
        index, first = self._tiles, self._tiles * self._tile
        digest = digest_samples(samples)
        if self._prepared is None:
            self._prepared = _prepared(self._settings, samples)
            job = {name: self._prepared.digests[name] for name in ("model", "kernel")}
            if self._state is not None and self._state.job != job:
                other = " and ".join(name for name in job if self._state.job.get(name) != job[name])
                raise RunConflictError(f"{self.path} holds features of another {other}; take another folder")
        if self._state is not None and index < len(self._state.tiles):
            there = self._state.tiles[index]
            # A tile that ended the feeding once may be followed by more samples now.
            if there.samples == samples.size:
                if there.digest != digest:
                    raise DataChangedError(
                        f"samples {first} to {first + samples.size} are not those whose features are in {self.path}; a "
                        "loader must hand out the same samples in the same order: switch off shuffling"
                    )
                if self._is_whole(index, there):
                    self._tiles += 1
                    return
            elif index < len(self._state.tiles) - 1:
                raise InputError(f"{self.path} was fed with other batches; take another folder")
        if self._work is None:
            self._work = _Work.begin(self._prepared, self.path, self._budget, self._state, self._tile)
            self._state = self._state or self._work.state
        checksums = self._work.store(self.path, index, samples, first)
        assert self._state is not None
        tiles = list(self._state.tiles)
        tiles[index : index + 1] = [FedTile(samples.size, digest, checksums)]
        self._state = msgspec.structs.replace(self._state, tiles=tuple(tiles))
        write_state(self.path, self._state)
        self._tiles += 1

    def _is_whole(self, index: int, there: FedTile) -> bool:
        """Whether the files of a tile are what was stored."""
        files = (self.path / name / "c" / str(index) / "0" for name in ("features.zarr", "heavy.zarr"))
        try:
            return all(checksum_file(path) == crc for path, crc in zip(files, there.checksums, strict=False))
        except OSError:
            return False

    def _create_arrays(self, state: FedState) -> None:
        """Write the metadata of the arrays, whose length is known now."""
        plan = Plan.load(self.path / PLAN)
        attributes = {"sketch": state.sketch, "train_samples": self._train, "job_digests": state.job}
        for array in _arrays(self.path, plan, state.samples, state.tile_samples):
            array.create(attributes)


class _Work:
    """Model, plan and projector, made once the first tile is there."""

    def __init__(self, plan: Plan, prepared: PreparedJob, projector: Projector, state: FedState) -> None:
        self.plan, self.prepared, self.projector, self.state = plan, prepared, projector, state

    @classmethod
    def begin(
        cls,
        prepared: PreparedJob,
        root: Path,
        budget: Budget | None,
        state: FedState | None,
        tile: int,
    ) -> _Work:
        """Plan on the first tile, or take the plan that is there."""
        before = peak_resident_bytes()
        root.mkdir(parents=True, exist_ok=True)
        if state is None:
            plan = planned(prepared, before, budget, Preferences(features_only=True), root, None)
            plan.save(root / PLAN)
            assert plan.projection is not None
            state = FedState(
                format=STATE_FORMAT,
                tile_samples=tile,
                rows=plan.rows_per_sample,
                full=plan.entries_per_sample > 1,
                divisor=float(plan.outputs) if plan.scale == "mean" else 1.0,
                cosine=plan.normalize == "cosine",
                projection=asdict(plan.projection),
                heavy=plan.heavy,
                heavy_share=plan.heavy_share,
                sketch=prepared.sketch_digest(plan),
                job={name: prepared.digests[name] for name in ("model", "kernel")},
            )
            write_state(root, state)
        else:
            plan = Plan.load(root / PLAN)
        structure = planned_structure(plan, prepared)
        prepared.function.structure = structure

        def capture(names: Sequence[str]) -> Capture:
            return Capture(prepared.function, structure, names, plan.rows_per_sample)

        return cls(plan, prepared, projector_of(plan, prepared.function, capture), state)

    def store(self, root: Path, index: int, samples: Samples, first: int) -> tuple[int, ...]:
        """Compute and write one tile; returns the checksums of its files."""
        plan, state = self.plan, self.state
        features, heavy = [], []
        with reproducible(plan):
            for start in range(0, samples.size, plan.batch_size):
                part = taken(samples, slice(start, min(start + plan.batch_size, samples.size)))
                batch = ModelBatch(part.args, part.kwargs, part.targets).to(plan.device, plan.precision)
                where = f"samples {first + start} to {first + start + part.size}"
                found = self.projector.project(batch, plan.rows_per_sample, samples=where)
                features.append(found.flatten(0, 1).cpu())
                if plan.heavy:
                    heavy.append(self.projector.sketch.heavy.flatten(0, 1).cpu())
        whole = torch.cat(features)
        if not all_finite(whole):
            bad = int((~torch.isfinite(whole).all(1)).nonzero()[0]) // plan.rows_per_sample
            raise InputError(f"the gradients of sample {first + bad} are not finite; check it and the weights")
        arrays = _arrays(root, plan, (index + 1) * state.tile_samples, state.tile_samples)
        return tuple(
            _publish(array, index, torch.cat(rows)) for array, rows in zip(arrays, (features, heavy), strict=False)
        )


def _prepared(settings: dict[str, Any], samples: Samples) -> PreparedJob:
    """The job with a tile's samples as its data."""
    source = ArraySource(
        tuple(as_column(value, "batch") for value in samples.args),
        {name: as_column(value, "batch") for name, value in samples.kwargs.items()},
        None if samples.targets is None else as_column(samples.targets, "batch"),
        "batch",
    )
    return prepare(Job(**settings, train=source))


def _arrays(root: Path, plan: Plan, samples: int, tile: int) -> list[TileArray]:
    """Where features go, and the gradients of the heaviest parameters if they are kept."""
    assert plan.projection is not None
    assert plan.projection.dim is not None
    rows, dim = plan.rows_per_sample, plan.projection.dim
    found = [
        TileArray(
            LocalFiles(root), "features.zarr", (samples * rows, dim), (tile * rows, dim), HELD_DTYPE[plan.precision]
        )
    ]
    if plan.heavy:
        width = len(plan.heavy)
        kind = STORED_DTYPE[plan.precision]
        found.append(TileArray(LocalFiles(root), "heavy.zarr", (samples * rows, width), (tile * rows, width), kind))
    return found


def _publish(array: TileArray, index: int, rows: torch.Tensor) -> int:
    """Write rows as one tile, padded to a whole one; returns the file's checksum."""
    chunk: np.ndarray[Any, Any] = array.empty_chunk()
    if array.dtype == "<u2":  # bf16, as its bits
        chunk[:] = 0x7FC0
        chunk[: len(rows)] = rows.to(torch.bfloat16).view(torch.uint16).numpy()
    else:
        chunk[:] = np.nan
        chunk[: len(rows)] = rows.numpy()
    file = array.files.stage(array.chunk_path((index, 0)))
    try:
        file.append(chunk)
        record = file.seal()
        file.publish()
    except BaseException:
        file.discard()
        raise
    return record.crc32c


def _batch(batch: object, first: int) -> Samples:
    """The tensors of a batch, checked to count its samples along their first axis."""
    found = item_samples(batch, f"the batch from sample {first} on")
    sizes = {name: tuple(value.shape) for name, value in found.named()}
    if not sizes or any(not shape for shape in sizes.values()) or len({shape[0] for shape in sizes.values()}) != 1:
        raise InputError(
            f"the batch from sample {first} on has tensors of shapes {sizes}; the first axis of each must count the "
            "samples: hand out x, (x, y) or a dict"
        )
    if found.size == 0:
        raise InputError(f"the batch from sample {first} on is empty")
    return found
