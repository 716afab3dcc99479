"""The run directory: its lock, what is swept, what is refused."""

import errno
import io
import os
import signal
import subprocess
import sys

import pytest

from ooc_ntk.errors import RunConflictError, RunLockedError, StorageError
from ooc_ntk.storage.atomic import StagedFile, write_whole
from ooc_ntk.storage.directory import RunDirectory
from ooc_ntk.storage.local import free_disk_bytes
from ooc_ntk.storage.manifest import Receipt

HOLDER = """
import sys, time
from ooc_ntk.storage.directory import RunDirectory
with RunDirectory(sys.argv[1]).locked():
    print("locked", flush=True)
    time.sleep(60)
"""


def test_one_run_at_a_time_and_none_after_a_kill(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(directory.root)], stdout=subprocess.PIPE, text=True
    ) as holder:
        try:
            assert holder.stdout.readline() == "locked\n"
            with (
                pytest.raises(RunLockedError, match=rf"process {holder.pid}\) is using .*run; wait for it or choose"),
                directory.locked(),
            ):
                pytest.fail("two runs at once")
        finally:
            holder.send_signal(signal.SIGKILL)
            holder.wait()
        with directory.locked():
            assert (directory.root / "lock").read_text() == f"{os.getpid()}\n"


def test_a_lock_is_free_after_an_error(tmp_path):
    directory = RunDirectory(tmp_path)
    with pytest.raises(ZeroDivisionError), directory.locked():
        raise ZeroDivisionError
    with directory.locked(), pytest.raises(RunLockedError), RunDirectory(tmp_path).locked():
        pytest.fail("two runs at once")


def test_what_was_being_written_is_swept_and_nothing_else(tmp_path):
    directory = RunDirectory(tmp_path)
    write_whole(tmp_path, "kernel.zarr/c/0/0", b"whole")
    write_whole(tmp_path, "plan.json", b"{}")
    staged = StagedFile(tmp_path, "kernel.zarr/c/0/1"), StagedFile(tmp_path, "top")
    (tmp_path / "kernel.zarr" / "zarr.0123456789abcdef0123456789abcdef.partial").touch()  # as Zarr names it
    (tmp_path / "zarr.0123456789abcdef0123456789abcdef.partial").touch()
    assert directory.sweep() == 4
    assert directory.sweep() == 0
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    assert files == ["kernel.zarr/c/0/0", "plan.json"]
    for file in staged:
        file.discard()


def test_a_lock_that_cannot_be_written_is_a_storage_error_and_let_go(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    directory, original = RunDirectory(tmp_path), io.open

    def opened(file, *given, **more):
        return (
            type("Full", (io.FileIO,), {"write": full})(file, "ab+") if str(file).endswith("lock") else original(file)
        )

    with monkeypatch.context() as patch:
        patch.setattr(io, "open", opened)
        with pytest.raises(StorageError, match=r"disk is full.*lock"), directory.locked():
            raise AssertionError("locked")
    with directory.locked():
        pass


def test_pending_receipts_there_and_back(tmp_path):
    directory = RunDirectory(tmp_path)
    receipts = [Receipt("kernel-0-0-0", 1.0, files=(write_whole(tmp_path, "a", b"a"),)), Receipt("rows-0-1-0", 2.0)]
    for receipt in receipts:
        directory.leave_receipt(receipt)
    (tmp_path / "pending/torn.json").write_text('{"key": ')
    assert directory.pending_receipts() == receipts
    directory.drop_receipt("kernel-0-0-0")
    directory.drop_receipt("never there")
    (tmp_path / "pending/unreadable.json").mkdir()
    with pytest.raises(StorageError, match=r"reading .*unreadable\.json"):
        directory.pending_receipts()
    (tmp_path / "pending/unreadable.json").rmdir()
    assert directory.pending_receipts() == receipts[1:]


def test_a_folder_with_other_files_is_refused(tmp_path):
    RunDirectory(tmp_path / "new").check_usable()
    RunDirectory(tmp_path).check_usable()
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(RunConflictError, match=r"holds other files \(thesis.tex\) and no run; choose an empty folder"):
        RunDirectory(tmp_path).check_usable()
    (tmp_path / "plan.json").write_text("")
    RunDirectory(tmp_path).check_usable()


def test_a_file_is_no_run_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        RunDirectory(tmp_path / "file").check_usable()


def test_free_disk_of_a_folder_that_is_not_there_yet(tmp_path):
    assert free_disk_bytes(tmp_path / "a/b/c") > 0
