"""Files are whole or not there."""

import errno
import os

import google_crc32c
import numpy as np
import pytest

from ooc_ntk.errors import StorageError, TransientStorageError
from ooc_ntk.storage import atomic, retries
from ooc_ntk.storage.atomic import FileRecord, StagedFile, write_whole
from ooc_ntk.storage.checked import read_checked, read_stripes
from ooc_ntk.storage.reading import checksum_file

DATA = np.arange(1000, dtype="<f4")
CRC = google_crc32c.value(DATA.tobytes())


def names(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_nothing_is_there_before_it_is_published(tmp_path):
    file = StagedFile(tmp_path, "a/b/tile")
    file.append(DATA[:300])
    file.append(DATA[300:].reshape(70, 10))
    final = tmp_path / "a/b/tile"
    assert not final.exists()
    record = file.seal()
    assert not final.exists()
    assert record == FileRecord("a/b/tile", 4000, CRC)
    file.publish()
    assert final.read_bytes() == DATA.tobytes()
    assert names(tmp_path) == ["tile"]
    file.discard()
    assert names(tmp_path) == ["tile"], "discarding what was published deletes nothing"


@pytest.mark.parametrize("sealed", [False, True])
def test_discarding_leaves_nothing_and_keeps_what_was_there(sealed, tmp_path):
    (tmp_path / "tile").write_text("before")
    file = StagedFile(tmp_path, "tile")
    file.append(DATA)
    if sealed:
        file.seal()
    file.discard()
    file.discard()
    assert names(tmp_path) == ["tile"]
    assert (tmp_path / "tile").read_text() == "before"


def test_publishing_replaces(tmp_path):
    (tmp_path / "tile").write_text("before")
    write_whole(tmp_path, "tile", b"after")
    assert (tmp_path / "tile").read_text() == "after"


def test_two_writers_of_one_tile_do_not_mix(tmp_path):
    first, second = StagedFile(tmp_path, "tile"), StagedFile(tmp_path, "tile")
    first.append(DATA)
    second.append(DATA[::-1].copy())
    for file in (first, second):
        file.seal()
        file.publish()
    assert (tmp_path / "tile").read_bytes() == DATA[::-1].tobytes()
    assert names(tmp_path) == ["tile"]


def test_short_writes_go_on(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(atomic.os, "write", lambda descriptor, view: write(descriptor, view[:7]))
    file = StagedFile(tmp_path, "tile")
    file.append(DATA)
    assert file.seal().size == 4000
    file.publish()
    assert (tmp_path / "tile").read_bytes() == DATA.tobytes()


@pytest.mark.parametrize("operation", ["write", "fsync"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_so_and_nothing_is_left(operation, number, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(atomic.os, operation, fail)
    with pytest.raises(StorageError, match=r"the disk is full.*run the same command"):
        write_whole(tmp_path, "tile", b"some bytes")
    assert names(tmp_path) == []


@pytest.mark.parametrize(("number", "tries"), [(errno.EAGAIN, 3), (errno.EIO, 1), (errno.ETIMEDOUT, 1)])
def test_a_write_goes_on_only_where_nothing_written_before_can_be_lost(number, tries, tmp_path, monkeypatch):
    write, failed = os.write, []

    def failing(descriptor, view):
        if len(failed) < 3:
            failed.append(1)
            raise OSError(number, os.strerror(number))
        return write(descriptor, view[:7])

    monkeypatch.setattr(retries, "CALL_DELAYS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(os, "write", failing)
    file = StagedFile(tmp_path, "tile")
    if tries == 1:
        with pytest.raises(TransientStorageError, match=r"writing .*tile failed"):
            file.append(DATA)
        file.discard()
        assert names(tmp_path) == []
    else:
        file.append(DATA)
        assert file.seal() == FileRecord("tile", 4000, CRC)
        file.publish()
        assert (tmp_path / "tile").read_bytes() == DATA.tobytes()
    assert len(failed) == tries


def test_another_failure_keeps_its_reason(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"creating .*tile failed: Not a directory|File exists"):
        StagedFile(tmp_path, "file/tile")


def test_reading_back(tmp_path):
    record = write_whole(tmp_path, "tile", DATA.tobytes())
    buffer = np.empty((10, 100), "<f4")
    read_checked(tmp_path, record, buffer)
    assert np.array_equal(buffer.reshape(-1), DATA)
    assert checksum_file(tmp_path / "tile") == record.crc32c == CRC


@pytest.mark.parametrize("rows", [1, 3, 10, 64])
def test_reading_in_stripes(rows, tmp_path):
    record = write_whole(tmp_path, "tile", DATA.tobytes())
    stripe = np.empty((rows, 100), "<f4")
    found = [part.copy() for part in read_stripes(tmp_path, record, stripe)]
    assert np.array_equal(np.concatenate(found), DATA.reshape(10, 100))
    assert [len(part) for part in found[:-1]] == [rows] * (len(found) - 1)


def altered(path):
    data = bytearray(path.read_bytes())
    data[1234] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: os.truncate(path, 3999), r"tile is not what was committed; run again"),
        (lambda path: os.truncate(path, 0), "is not what was committed"),
        (altered, "is not what was committed"),
        (lambda path: path.unlink(), "tile is missing; run again"),
    ],
)
def test_a_damaged_tile_is_never_taken(harm, message, tmp_path):
    record = write_whole(tmp_path, "tile", DATA.tobytes())
    harm(tmp_path / "tile")
    with pytest.raises(StorageError, match=message):
        read_checked(tmp_path, record, np.empty(1000, "<f4"))
    with pytest.raises(StorageError, match=message):
        list(read_stripes(tmp_path, record, np.empty((3, 100), "<f4")))


def test_the_checksum_covers_every_byte(tmp_path):
    large = np.random.default_rng(0).integers(0, 256, 2**22 + 5, np.uint8)
    large.tofile(tmp_path / "tile")
    before = checksum_file(tmp_path / "tile")
    assert before == google_crc32c.value(large.tobytes())
    large[-1] ^= 1
    large.tofile(tmp_path / "tile")
    assert checksum_file(tmp_path / "tile") != before
