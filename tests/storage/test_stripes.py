"""Tiles streamed in stripes: every entry once, checked once, damage found."""

import numpy as np
import pytest

from ooc_ntk.errors import DamagedFileError, TransientStorageError
from ooc_ntk.storage import local, stripes
from ooc_ntk.storage.arrays import TileArray
from ooc_ntk.storage.stripes import TileStripes


@pytest.fixture
def stored(tmp_path):
    """25 × 13 in tiles of 10 × 4, in two layers, and its records."""
    values = np.random.default_rng(0).standard_normal((2, 25, 13)).astype("<f4")
    array = TileArray(tmp_path, "a.zarr", values.shape, (1, 10, 4), "<f4")
    array.create()
    records = {}
    for layer in range(2):
        for i in range(3):
            for j in range(4):
                staged = array.stage(
                    array.chunk_path((layer, i, j)), values[layer, i * 10 : i * 10 + 10, j * 4 : j * 4 + 4]
                )
                record = staged.seal()
                staged.publish()
                records[record.path] = record
    return array, values, records


TILES = [(i, j) for i in range(3) for j in range(4)]


def read(reader, shape, wanted=TILES):
    """What a reader yields, put in its place; and how often each entry came."""
    found, times = np.full(shape, np.nan, "<f4"), np.zeros(shape, int)
    for stripe, values in reader.read(wanted):
        top, left = stripe.tile[0] * 10 + stripe.start, stripe.tile[1] * 4
        place = np.s_[top : top + values.shape[0], left : left + values.shape[1]]
        found[place] = values
        times[place] += 1
    return found, times


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("bytes_at_once", [1, 50, 10**6])
def test_every_entry_once_in_stripes_of_any_size(bytes_at_once, checked, stored, monkeypatch):
    monkeypatch.setattr(stripes, "STRIPE_BYTES", bytes_at_once)
    array, values, records = stored
    for layer in range(2):
        reader = TileStripes(array, records if checked else None, (layer,))
        for _ in range(2):  # the second time without checksums and padding
            found, times = read(reader, values.shape[1:])
            assert np.array_equal(found, values[layer])
            assert (times == 1).all()
    assert reader.buffer_bytes <= stripes.STRIPES_AHEAD * max(bytes_at_once, 16)


def test_tiles_come_in_the_order_that_is_asked_for(stored):
    array, _, records = stored
    wanted = [(2, 1), (0, 3), (1, 0)]
    assert [stripe.tile for stripe, _ in TileStripes(array, records, (0,)).read(wanted)] == wanted
    assert not list(TileStripes(array, records, (0,)).read([]))


def test_padding_is_read_only_to_check_it(stored):
    array, _, records = stored
    reader = TileStripes(array, records, (1,))
    read(reader, (25, 13))
    assert reader.bytes_read == 12 * 160
    read(reader, (25, 13))
    assert reader.bytes_read == 12 * 160 + 4 * (2 * 160 + 80)


@pytest.mark.parametrize("damage", ["flip", "short", "long", "gone"])
def test_damage_is_found(damage, stored, tmp_path):
    array, _, records = stored
    path = tmp_path / array.chunk_path((0, 1, 2))
    whole = path.read_bytes()
    if damage == "flip":
        path.write_bytes(whole[:77] + bytes([whole[77] ^ 1]) + whole[78:])
    elif damage == "short":
        path.write_bytes(whole[:-4])
    elif damage == "long":
        path.write_bytes(whole + b"1234")
    else:
        path.unlink()
    with pytest.raises(DamagedFileError) as found:
        read(TileStripes(array, records, (0,)), (25, 13))
    assert found.value.path == array.chunk_path((0, 1, 2))


def test_a_tile_that_was_never_committed_is_missing(stored):
    array, _, records = stored
    left = {path: record for path, record in records.items() if not path.endswith("/0/2/0")}
    with pytest.raises(DamagedFileError, match="missing"):
        read(TileStripes(array, left, (0,)), (25, 13))


def test_a_misread_tile_passes(stored, monkeypatch):
    """One wrong read of a whole file: the reader says so, and the next pass is right."""
    array, values, records = stored
    real, left = local.read_at, [1]

    def misread(file, path, target, offset):
        count = real(file, path, target, offset)
        if left:
            left.pop()
            target[3] ^= 255
        return count

    monkeypatch.setattr(local, "read_at", misread)
    reader = TileStripes(array, records, (0,))
    with pytest.raises(TransientStorageError, match="misread once"):
        read(reader, (25, 13))
    assert np.array_equal(read(reader, (25, 13))[0], values[0])


def test_leaving_early_closes_everything(stored):
    array, _, records = stored
    reader = TileStripes(array, records, (0,))
    for _ in range(50):
        next(iter(reader.read(TILES)))
