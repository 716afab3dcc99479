"""Zarr arrays whose chunk is one tile."""

import errno
import json

import numpy as np
import pytest
import zarr

from ooc_ntk.errors import StorageError
from ooc_ntk.storage.arrays import TileArray, TileRows, open_tile_array
from ooc_ntk.storage.atomic import write_whole


@pytest.fixture(params=["<f4", "<f8"])
def array(request, tmp_path):
    array = TileArray(tmp_path, "kernel.zarr", (5, 7), (3, 4), request.param)
    array.create({"kernel": "trace", "job_digests": {"model": "abc"}})
    return array


def fill(array):
    """Write every tile by hand, padded with NaN; return what Zarr should read."""
    whole = np.arange(35, dtype=array.dtype).reshape(5, 7)
    for i in range(2):
        for j in range(2):
            tile = np.full(array.chunks, np.nan, array.dtype)
            part = whole[3 * i : 3 * i + 3, 4 * j : 4 * j + 4]
            tile[: part.shape[0], : part.shape[1]] = part
            assert tile.nbytes == array.chunk_bytes
            write_whole(array.files.root, array.chunk_path((i, j)), tile.tobytes())
    return whole


def test_tiles_are_raw_chunks_that_zarr_reads(array):
    whole = fill(array)
    for found in (
        array.open(),
        open_tile_array(array.files.root, "kernel.zarr"),
        zarr.open_array(array.files.root / "kernel.zarr", mode="r"),
    ):
        assert found.shape == (5, 7)
        assert found.chunks == (3, 4)
        assert found.dtype == np.dtype(array.dtype)
        assert np.array_equal(found[:], whole)
        assert np.array_equal(found[2:5, 3:5], whole[2:5, 3:5])
        assert found.attrs["job_digests"] == {"model": "abc"}


def test_missing_tiles_read_as_nan(array):
    assert np.isnan(array.open()[:]).all()
    fill(array)
    (array.files.root / "kernel.zarr/c/0/1").unlink()
    entries = array.open()[:]
    assert np.isnan(entries[:3, 4:]).all()
    assert np.isfinite(entries).sum() == 35 - 9


def test_zarr_writes_the_same_bytes(array, tmp_path):
    fill(array)
    other = TileArray(tmp_path, "other.zarr", array.shape, array.chunks, array.dtype)
    other.create()
    zarr.open_array(tmp_path / "other.zarr", mode="r+")[:] = array.open()[:]
    ours, theirs = (np.fromfile(tmp_path / name / "c/0/0", array.dtype) for name in ("kernel.zarr", "other.zarr"))
    assert np.array_equal(ours, theirs)


def test_tiles_of_zeros_are_written(array):
    zarr.open_array(array.files.root / "kernel.zarr", mode="r+")[:3, :4] = 0
    written = zarr.open_array(array.files.root / "kernel.zarr", mode="r")[:3, :4]
    assert (written == 0).all()


def test_the_metadata_is_version_3_without_codec(array):
    there = json.loads((array.files.root / "kernel.zarr/zarr.json").read_text())
    assert there["zarr_format"] == 3
    assert there["fill_value"] == "NaN"
    assert [codec["name"] for codec in there["codecs"]] == ["bytes"]
    assert there["codecs"][0]["configuration"]["endian"] == "little"


def test_creating_again_keeps_what_is_there(array):
    whole = fill(array)
    array.create()
    assert np.array_equal(array.open()[:], whole)
    assert array.open().attrs["kernel"] == "trace"


@pytest.mark.parametrize("changes", [{"shape": (5, 8)}, {"chunks": (3, 3)}, {"dtype": "<i4"}])
def test_another_array_in_its_place_is_refused(changes, array):
    fields = {"shape": array.shape, "chunks": array.chunks, "dtype": array.dtype, **changes}
    with pytest.raises(StorageError, match=r"holds an array of \(5, 7\).*expected .*another run directory"):
        TileArray(array.files.root, array.name, **fields).create()


def test_an_array_that_is_not_there(tmp_path):
    with pytest.raises(StorageError, match="there is no array diagonal"):
        open_tile_array(tmp_path, "diagonal")


def test_metadata_that_cannot_be_read_are_a_storage_error(array, monkeypatch):
    def fail(*arguments, **more):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(zarr, "open_array", fail)
    with pytest.raises(StorageError, match=r"reading .*kernel\.zarr failed: Input/output error"):
        open_tile_array(array.files, "kernel.zarr")


def test_opened_arrays_cannot_be_written(array):
    with pytest.raises(ValueError, match=r"read-only|read only"):
        array.open()[0, 0] = 1


@pytest.mark.parametrize(
    "index",
    [
        np.s_[:],
        np.s_[2:4],
        np.s_[4:1:-1],
        np.array([4, 0, 0, 3]),
        np.array([], dtype=int),
        [-1, 2],
        -2,
        np.arange(5) % 2 == 1,
    ],
)
def test_rows_are_read_without_their_chunks(array, index):
    whole = fill(array)
    rows = TileRows(array.files.root, "kernel.zarr")
    assert (rows.shape, rows.dtype, len(rows)) == (whole.shape, whole.dtype, 5)
    np.testing.assert_array_equal(rows[index], whole[index])
    assert rows.attributes["kernel"] == "trace"


@pytest.mark.parametrize("index", [[5], [-6], np.array([0, 99]), [True, False], [0.5], ..., None])
def test_rows_that_are_not_there_are_refused(array, index):
    fill(array)
    with pytest.raises(IndexError):
        TileRows(array.files.root, "kernel.zarr")[index]


def test_rows_of_a_missing_tile_are_an_error(array):
    fill(array)
    (array.files.root / array.chunk_path((1, 0))).unlink()
    rows = TileRows(array.files.root, "kernel.zarr")
    assert np.isfinite(rows[:3]).all()
    with pytest.raises(StorageError, match="cannot read the tile"):
        rows[2:4]
