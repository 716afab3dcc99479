"""Features that were fed batch by batch: their folder, and how they are opened."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from ooc_ntk.errors import IncompleteRunError, StorageError, newer
from ooc_ntk.planning.projection import Projection
from ooc_ntk.storage.arrays import TileRows
from ooc_ntk.storage.atomic import write_whole

from .errors import sketch_shape
from .features import Features

#: File that says how far a featurizer got.
STATE: Final = "featurizer.json"

#: Version of its form.
STATE_FORMAT: Final = 1


class FedTile(msgspec.Struct, frozen=True):
    """One tile of features that is on disk.

    Attributes:
        samples: how many it holds.
        digest: digest of the samples.
        checksums: CRC-32C of its file of features and, if there is one, of that of the heaviest gradients.
    """

    samples: int
    digest: str
    checksums: tuple[int, ...]


class FedState(msgspec.Struct, frozen=True, kw_only=True):
    """What a featurizer has done.

    Attributes:
        format: version of this form.
        tile_samples: samples per tile.
        rows: Jacobian rows per sample.
        full: whether every output has kernel rows of its own.
        divisor: what the kernel is divided by.
        cosine: whether it is divided by the roots of its diagonal.
        projection: fields of the projection.
        heavy: global indices of the heaviest parameters, whose gradients are kept as well.
        heavy_share: their share of the sum of squared mean squares.
        sketch: digest of what features must share to be multiplied.
        job: digests of model and kernel settings.
        tiles: tiles on disk, in order.
        train: train samples, once all are there.
        finished: whether nothing more comes.
    """

    format: int
    tile_samples: int
    rows: int
    full: bool
    divisor: float
    cosine: bool
    projection: dict[str, str | int | float | None]
    heavy: tuple[int, ...]
    heavy_share: float
    sketch: str
    job: dict[str, str]
    tiles: tuple[FedTile, ...] = ()
    train: int = 0
    finished: bool = False

    @property
    def samples(self) -> int:
        """Samples on disk."""
        return sum(tile.samples for tile in self.tiles)


def read_state(root: Path) -> FedState | None:
    """What a folder says of its featurizer, None if it has none.

    Raises:
        StorageError: if that cannot be read.
    """
    try:
        text = (root / STATE).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"cannot read {root / STATE}: {error}") from error
    try:
        found = msgspec.json.decode(text, type=FedState)
    except msgspec.DecodeError as error:
        raise StorageError(f"{root / STATE} is damaged ({error}); feed the batches into another folder") from error
    if found.format > STATE_FORMAT:
        raise newer(str(root / STATE), found.format, STATE_FORMAT)
    return found


def write_state(root: Path, state: FedState) -> None:
    """Write how far a featurizer got: whole or not at all.

    Raises:
        StorageError: if it cannot be written.
    """
    write_whole(root, STATE, msgspec.json.format(msgspec.json.encode(state)) + b"\n")


def fed_features(root: Path) -> Features:
    """Open features that were fed batch by batch.

    Args:
        root: their folder.

    Returns:
        The features.

    Raises:
        StorageError: if there are none.
        IncompleteRunError: if the featurizer was not finished.
    """
    state = read_state(root)
    if state is None:
        raise StorageError(f"{root} holds no features: there is no {STATE} in it")
    if not state.finished:
        raise IncompleteRunError(
            f"the features in {root} are not finished: {state.samples:,} samples are there; feed the same batches "
            "again, those that are there are skipped, and call finish()"
        )
    projection = Projection(**state.projection)  # type: ignore[arg-type]
    return Features(
        array=TileRows(root, "features.zarr"),
        outputs=state.rows,
        train_samples=state.train,
        test_samples=state.samples - state.train,
        shape=sketch_shape(projection, state.heavy_share),
        full=state.full,
        divisor=state.divisor,
        cosine=state.cosine,
        heavy=TileRows(root, "heavy.zarr") if state.heavy else None,
        sketch=state.sketch,
        name=str(root),
    )
