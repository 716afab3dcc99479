"""Every way of reading a tile gives the bytes that were committed, or says that it cannot."""

import errno
import os
import sys
import types

import numpy as np
import pytest

from ooc_ntk.errors import DamagedFileError, InputError, StorageError, TransientStorageError
from ooc_ntk.storage import gds, reading, retries
from ooc_ntk.storage.atomic import write_whole
from ooc_ntk.storage.checked import read_checked, read_stripes
from ooc_ntk.storage.reading import (
    ALIGNMENT,
    FileReader,
    aligned_buffer,
    checksum_file,
    padded,
)

SIZES = [1, 511, ALIGNMENT - 1, ALIGNMENT, ALIGNMENT + 1, 3 * ALIGNMENT + 1000]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(retries, "CALL_DELAYS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(reading, "PIECE_BYTES", 2 * ALIGNMENT)


def content(size, seed=0):
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def test_buffers_begin_on_a_page_and_fill_whole_pages():
    for size in (0, *SIZES):
        buffer = aligned_buffer(size)
        assert buffer.ctypes.data % ALIGNMENT == 0
        assert buffer.size == max(ALIGNMENT, padded(size))
        buffer[:] = 1  # it can be written


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_reads_of_any_size(size, direct, tmp_path):
    data = content(size)
    record = write_whole(tmp_path, "tile", data.tobytes())
    buffer = aligned_buffer(size + 2 * ALIGNMENT)
    buffer[:] = 77
    FileReader(tmp_path, direct=direct).read(record, buffer)
    assert np.array_equal(buffer[:size], data)
    assert (buffer[padded(size) :] == 77).all(), "written past the last page of the file"


def test_direct_reads_open_the_file_directly_and_buffered_ones_do_not(tmp_path, monkeypatch):
    record = write_whole(tmp_path, "tile", content(5000).tobytes())
    flags, opened = [], os.open
    monkeypatch.setattr(os, "open", lambda path, how, *mode: flags.append(how) or opened(path, how, *mode))
    for direct in (False, True):
        FileReader(tmp_path, direct=direct).read(record, aligned_buffer(5000))
    assert [bool(how & reading.O_DIRECT) for how in flags] == [False, bool(reading.O_DIRECT)]
    flags.clear()
    FileReader(tmp_path, direct=True).read(record, np.empty(5000, np.uint8))  # no room for the last page
    assert not any(how & reading.O_DIRECT for how in flags)


@pytest.mark.parametrize("where", ["open", "preadv"])
def test_a_file_system_without_direct_reads_is_read_all_the_same(where, tmp_path, monkeypatch):
    data = content(5000)
    record = write_whole(tmp_path, "tile", data.tobytes())
    opened, read, direct = os.open, os.preadv, set()

    def refuse(*_):
        raise OSError(errno.EINVAL, "Invalid argument")

    def open_(path, flags, *mode):
        if flags & reading.O_DIRECT and where == "open":
            refuse()
        descriptor = opened(path, flags, *mode)
        (direct.add if flags & reading.O_DIRECT else direct.discard)(descriptor)
        return descriptor

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "preadv", lambda file, *more: refuse() if file in direct else read(file, *more))
    buffer, before = aligned_buffer(5000), retries.retries()
    FileReader(tmp_path, direct=True).read(record, buffer)
    assert np.array_equal(buffer[:5000], data)
    assert retries.retries() == before


def test_short_reads_go_on(tmp_path, monkeypatch):
    data = content(3 * ALIGNMENT + 10)
    record, read = write_whole(tmp_path, "tile", data.tobytes()), os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, views, at: read(file, [views[0][:1000]], at))
    for direct in (False, True):
        buffer = aligned_buffer(data.size)
        FileReader(tmp_path, direct=direct).read(record, buffer)
        assert np.array_equal(buffer[: data.size], data)
    stripe = np.empty((3, 1), np.uint8)
    assert np.concatenate([part.copy() for part in read_stripes(tmp_path, record, stripe)]).tobytes() == data.tobytes()


def altered(path):
    data = bytearray(path.read_bytes())
    data[4321] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: os.truncate(path, 4999), "is not what was committed"),
        (lambda path: os.truncate(path, 0), "is not what was committed"),
        (altered, "is not what was committed"),
        (lambda path: path.unlink(), "tile is missing; run again"),
    ],
)
def test_a_damaged_file_is_never_taken(harm, message, direct, tmp_path):
    record = write_whole(tmp_path, "tile", content(5000).tobytes())
    harm(tmp_path / "tile")
    with pytest.raises(DamagedFileError, match=message) as found:
        FileReader(tmp_path, direct=direct).read(record, aligned_buffer(5000))
    assert found.value.path == "tile"


def failing(monkeypatch, number, times):
    """Have the first reads fail."""
    read, failed = os.preadv, []

    def preadv(*arguments):
        if len(failed) < times:
            failed.append(1)
            raise OSError(number, os.strerror(number))
        return read(*arguments)

    monkeypatch.setattr(os, "preadv", preadv)
    return failed


@pytest.mark.parametrize("number", [errno.EIO, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT])
def test_errors_that_pass_are_tried_again_and_counted(number, tmp_path, monkeypatch, caplog):
    data = content(5000)
    record = write_whole(tmp_path, "tile", data.tobytes())
    failing(monkeypatch, number, 3)
    buffer, before = aligned_buffer(5000), retries.retries()
    FileReader(tmp_path).read(record, buffer)
    assert np.array_equal(buffer[:5000], data)
    assert retries.retries() - before == 3
    assert sum("trying again" in line and "tile" in line for line in caplog.messages) == 3


def test_errors_that_stay_end_as_ones_after_which_the_task_is_done_again(tmp_path, monkeypatch):
    record = write_whole(tmp_path, "tile", content(5000).tobytes())
    failed = failing(monkeypatch, errno.EIO, 1000)
    for read in (
        lambda: FileReader(tmp_path).read(record, aligned_buffer(5000)),
        lambda: list(read_stripes(tmp_path, record, np.empty((1, 5000), np.uint8))),
    ):
        failed.clear()
        with pytest.raises(TransientStorageError, match=r"reading .*tile failed: Input/output error"):
            read()
        assert len(failed) == 4


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC, errno.EISDIR])
def test_errors_that_stay_are_not_tried_again(number, tmp_path, monkeypatch):
    record = write_whole(tmp_path, "tile", content(5000).tobytes())
    failed = failing(monkeypatch, number, 1000)
    with pytest.raises(StorageError) as found:
        FileReader(tmp_path).read(record, aligned_buffer(5000))
    assert not isinstance(found.value, TransientStorageError)
    assert len(failed) == 1


def misreading(monkeypatch, times):
    """Have the first reads bring a wrong byte, as a bad cable does."""
    read, left = os.preadv, [times]

    def preadv(file, views, offset):
        count = read(file, views, offset)
        if left[0] and count:
            left[0] -= 1
            views[0][0] ^= 1
        return count

    monkeypatch.setattr(os, "preadv", preadv)


def test_what_differs_once_is_read_again_before_it_is_called_damaged(tmp_path, monkeypatch):
    data = content(2 * ALIGNMENT)
    record, buffer = write_whole(tmp_path, "tile", data.tobytes()), aligned_buffer(2 * ALIGNMENT)
    forgotten = []
    monkeypatch.setattr(reading, "forget_pages", forgotten.append)
    misreading(monkeypatch, 1)
    read_checked(tmp_path, record, buffer)
    assert np.array_equal(buffer[: data.size], data)
    assert forgotten == [tmp_path / "tile"], "the second read must not come from the page cache"
    misreading(monkeypatch, 2)
    with pytest.raises(DamagedFileError):
        read_checked(tmp_path, record, buffer)


def test_stripes_that_were_misread_are_no_damage_but_must_be_dropped(tmp_path, monkeypatch):
    record = write_whole(tmp_path, "tile", content(5000).tobytes())
    misreading(monkeypatch, 1)
    with pytest.raises(TransientStorageError, match=r"misread once"):
        list(read_stripes(tmp_path, record, np.empty((1, 5000), np.uint8)))


def test_systems_without_preadv(tmp_path, monkeypatch):
    data = content(3 * ALIGNMENT)
    record, buffer = write_whole(tmp_path, "tile", data.tobytes()), aligned_buffer(data.size)
    monkeypatch.delattr(os, "preadv")
    read_checked(tmp_path, record, buffer)
    assert np.array_equal(buffer[: data.size], data)
    assert checksum_file(tmp_path / "tile") == record.crc32c


class CuFile:
    """Stands in for KvikIO's, in host memory."""

    def __init__(self, path, flags):
        assert flags == "r"
        self.file = open(path, "rb", buffering=0)  # noqa: SIM115

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def read(self, target):
        return self.file.readinto(target.data)


@pytest.fixture
def kvikio(monkeypatch):
    module = types.ModuleType("kvikio")
    module.CuFile = CuFile
    monkeypatch.setitem(sys.modules, "kvikio", module)


def test_device_reads_are_asked_for_and_need_kvikio(kvikio, monkeypatch):
    monkeypatch.delenv(gds.ASKED, raising=False)
    assert not gds.wanted()
    monkeypatch.setenv(gds.ASKED, "1")
    assert gds.wanted()
    monkeypatch.setitem(sys.modules, "kvikio", None)
    with pytest.raises(InputError, match=r"OOC_NTK_GDS=1 needs KvikIO, .*'ooc-ntk\[gds\]'; or unset OOC_NTK_GDS"):
        gds.wanted()


@pytest.mark.usefixtures("kvikio")
def test_device_reads_wait_for_the_device_and_are_checked(tmp_path):
    data, waits = content(20_000), []
    record = write_whole(tmp_path, "tile", data.tobytes())
    reader = gds.DeviceReader(tmp_path, lambda part: part, lambda: waits.append(1))
    buffer = aligned_buffer(data.size)
    reader.read(record, buffer)
    assert np.array_equal(buffer[: data.size], data)
    assert waits == [1]
    for harm, message in (
        (altered, "not what was"),
        (lambda path: os.truncate(path, 5), "not what"),
        (os.unlink, "missing"),
    ):
        harm(tmp_path / "tile")
        with pytest.raises(DamagedFileError, match=message):
            reader.read(record, buffer)
