"""The lock of a run directory where the file system has no flock: held by the living, taken over from the dead."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from ooc_ntk.errors import RunLockedError, StorageError
from ooc_ntk.storage import lock
from ooc_ntk.storage.directory import RunDirectory
from ooc_ntk.storage.lock import HELD, Holder, hold

HOLDER = """
import fcntl, sys, time
def flock(*_):
    raise OSError(%d, "no locks")
fcntl.flock = flock
from ooc_ntk.storage.lock import hold
from pathlib import Path
with hold(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=[errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def _no_flock(request, monkeypatch):
    def flock(*_):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)


def write_holder(folder, **changes):
    fields = {**vars(Holder.this_process()), **changes}
    folder.mkdir(exist_ok=True)
    (folder / HELD).write_text(json.dumps(fields))


@pytest.mark.usefixtures("_no_flock")
def test_one_at_a_time_and_free_after_an_error(tmp_path):
    def work():
        holder = Holder(**json.loads((tmp_path / HELD).read_text()))
        assert holder.pid == os.getpid()
        assert holder.is_here
        assert holder.is_alive
        with pytest.raises(RunLockedError, match=rf"process {os.getpid()}, since .* is using .*choose another --out"):
            with hold(tmp_path):
                pytest.fail("two at once")
        assert (tmp_path / HELD).exists(), "who is refused must not remove the lock"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), hold(tmp_path):
        work()
    assert not (tmp_path / HELD).exists()
    RunDirectory(tmp_path).check_usable()


def test_a_killed_process_holds_nothing(tmp_path, monkeypatch, caplog):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER % errno.ENOLCK, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        try:
            assert holder.stdout.readline() == "locked\n"
            # One that can flock sees it as well: two mounts of one folder may differ.
            with pytest.raises(RunLockedError, match=rf"process {holder.pid}\b"), hold(tmp_path):
                pytest.fail("two at once")
        finally:
            holder.send_signal(signal.SIGKILL)
            holder.wait()
    with hold(tmp_path):
        assert Holder(**json.loads((tmp_path / HELD).read_text())).pid == os.getpid()
    assert any(f"process {holder.pid}, which is gone; taking it over" in line for line in caplog.messages)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.usefixtures("_no_flock")
def test_another_process_with_the_number_of_the_dead_is_told_apart(tmp_path):
    write_holder(tmp_path, pid=os.getppid(), started=psutil.Process(os.getppid()).create_time() - 100)
    with hold(tmp_path):
        pass
    write_holder(tmp_path, pid=os.getppid(), started=psutil.Process(os.getppid()).create_time())
    with pytest.raises(RunLockedError), hold(tmp_path):
        pytest.fail("its parent lives")


@pytest.mark.usefixtures("_no_flock")
def test_a_lock_of_another_machine_is_never_taken_over(tmp_path):
    write_holder(tmp_path, host="elsewhere", pid=12345, since="2020-01-02 03:04:05")
    with pytest.raises(
        RunLockedError, match=rf"process 12345 on elsewhere .*since 2020-01-02 03:04:05.*delete {tmp_path / HELD}"
    ):
        with hold(tmp_path):
            pytest.fail("two at once")
    (tmp_path / HELD).unlink()
    with hold(tmp_path):
        pass


@pytest.mark.usefixtures("_no_flock")
def test_a_lock_that_was_left_unfinished(tmp_path):
    (tmp_path / HELD).write_text('{"host": ')
    with pytest.raises(RunLockedError, match="just starting"), hold(tmp_path):
        pytest.fail("it may be being written")
    old = time.time() - 60
    os.utime(tmp_path / HELD, (old, old))
    with hold(tmp_path):
        pass


@pytest.mark.usefixtures("_no_flock")
def test_a_lock_replaced_while_it_was_judged_goes_back(tmp_path, monkeypatch):
    write_holder(tmp_path, pid=os.getppid(), started=0.0)
    fresh = json.dumps({**vars(Holder.this_process()), "pid": os.getppid()})

    def is_alive(self):
        (tmp_path / HELD).write_text(fresh)  # another process was faster
        return False

    monkeypatch.setattr(lock.Holder, "is_alive", property(is_alive))
    with pytest.raises(RunLockedError, match="just starting"), hold(tmp_path):
        pytest.fail("two at once")
    assert (tmp_path / HELD).read_text() == fresh
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", HELD]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_is_said_so(number, tmp_path, monkeypatch):
    opened = os.open

    def open_(path, flags, *mode):
        if flags & os.O_CREAT and str(path).endswith(HELD):
            raise OSError(number, os.strerror(number))
        return opened(path, flags, *mode)

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(os, "open", open_)
    with (
        pytest.raises(StorageError, match=r"creating .*make it writable and run the same command again"),
        hold(tmp_path),
    ):
        pytest.fail("no lock")
