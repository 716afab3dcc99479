"""Faults of disks and devices: what passes is done again to the same bits, what stays stops a run that can go on."""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from torch import nn

import ooc_ntk
from ooc_ntk.cli import EXIT_INPUT, app
from ooc_ntk.compute.capture import Capture
from ooc_ntk.compute.contract import KernelAccumulator
from ooc_ntk.errors import StorageError, TransientStorageError
from ooc_ntk.execution import calibration, context, devicestore, executors
from ooc_ntk.report.tables import info_table
from ooc_ntk.storage import retries
from ooc_ntk.storage.directory import RunDirectory
from ooc_ntk.storage.diskrate import DiskRates
from ooc_ntk.storage.manifest import Manifest, Receipt
from ooc_ntk.storage.reading import O_DIRECT
from tests.rates import RATES

BUDGET = ooc_ntk.Budget("16GiB", disk="1GiB")
TILE = 8

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tmp_path(memory_path):
    return memory_path


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(retries, "CALL_DELAYS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(retries, "TASK_DELAYS", (0.0, 0.0, 0.0))


def make_job() -> ooc_ntk.Job:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3))
    data = torch.randn(29, 8, generator=torch.Generator().manual_seed(1))
    return ooc_ntk.Job(model=model, train=data[:24], test=data[24:], device="cpu")


_plans: dict[str, ooc_ntk.Plan] = {}


def make_plan(dataflow: str = "spill") -> ooc_ntk.Plan:
    if dataflow not in _plans:
        passes = {"passes": 2, "span_columns": 80, "layer_rules": False} if dataflow == "recompute" else {}
        preferences = ooc_ntk.Preferences(dataflow=dataflow, tile_samples=TILE, superblock_tiles=1, **passes)
        made = ooc_ntk.plan(make_job(), BUDGET, preferences=preferences, rates=RATES)
        _plans[dataflow] = replace(made, batch_size=TILE)
    return _plans[dataflow]


def run(out: Path, dataflow: str = "spill", **more):
    stored = (out / "plan.json").exists()
    plan = None if stored else make_plan(dataflow)
    return ooc_ntk.run(make_job(), out, plan=plan, scheduler="serial", progress=False, **more)


_expected: dict[str, bytes] = {}


@pytest.fixture
def expected(tmp_path) -> Callable[[str], bytes]:
    def of(dataflow: str = "spill") -> bytes:
        if dataflow not in _expected:
            _expected[dataflow] = bits(run(tmp_path / "reference", dataflow))
        return _expected[dataflow]

    return of


def bits(kernel) -> bytes:
    return np.asarray(kernel).tobytes() + kernel.diagonal().tobytes()


def temporary(out: Path) -> list[str]:
    return [path.name for path in out.rglob("*.tmp-*")]


class Faulty:
    """Has a function of ``os`` fail, for files of a run whose path holds a word, from a call on, a number of times."""

    def __init__(self, monkeypatch, name: str, number: int, word: str, times: int, start: int = 0) -> None:
        self.failed, self.seen = 0, 0
        call, paths, open_ = getattr(os, name), {}, os.open

        def opened(path, *more, **named):
            descriptor = open_(path, *more, **named)
            paths[descriptor] = str(path)
            return descriptor

        def failing(target, *more, **named):
            path = str(paths.get(target, "")) if isinstance(target, int) else str(target)
            if word in path:
                self.seen += 1
                if self.seen > start and self.failed < times:
                    self.failed += 1
                    raise OSError(number, os.strerror(number))
            return (opened if name == "open" else call)(target, *more, **named)

        if name != "open":
            monkeypatch.setattr(os, "open", opened)
        monkeypatch.setattr(os, name, failing)


#: Calls that a run makes on tiles, kernel tiles, receipts.
CALLS = [
    ("open", "tiles/factors"),
    ("write", "tiles/factors"),
    ("fsync", "tiles/factors"),
    ("rename", "tiles/factors"),
    ("preadv", "tiles/factors"),
    ("write", "kernel.zarr/c"),
    ("fsync", "kernel.zarr/c"),
    ("replace", "kernel.zarr/c"),
    ("write", "pending/"),
    ("fsync", "pending/"),
]
CALLS = [call for call in CALLS if call[0] != "rename"]  # pathlib renames by os.replace


@pytest.mark.parametrize(("name", "word"), CALLS, ids=lambda value: value.replace("/", " "))
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE], ids=["EIO", "ESTALE"])
def test_what_passes_gives_the_same_bits_and_is_counted(name, word, number, tmp_path, monkeypatch, expected, caplog):
    out, wanted = tmp_path / "run", expected()
    with monkeypatch.context() as patch:
        fault = Faulty(patch, name, number, word, times=2, start=3)
        kernel = run(out)
    assert fault.failed == 2
    assert bits(kernel) == wanted
    assert temporary(out) == []
    assert ooc_ntk.verify(out, make_job()).passed
    info = ooc_ntk.info(out)
    assert info.retries >= 2
    assert sum("trying again" in line for line in caplog.messages) == info.retries
    assert f'"retries": {info.retries}' in info.to_json()
    assert any(label == "retries" for label in labels(info))


def labels(info) -> list[str]:
    head = info_table(info).renderables[0]
    return [str(cell) for cell in head.columns[0].cells]


@pytest.mark.parametrize(("name", "word"), CALLS, ids=lambda value: value.replace("/", " "))
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS, errno.EACCES], ids=errno.errorcode.get)
def test_what_stays_stops_the_run_and_it_goes_on(name, word, number, tmp_path, monkeypatch, expected):
    out, wanted = tmp_path / "run", expected()
    with monkeypatch.context() as patch:
        fault = Faulty(patch, name, number, word, times=10**6, start=10)
        with pytest.raises(StorageError, match=r"failed|full") as found:
            run(out)
        if number == errno.EIO:
            assert isinstance(found.value, TransientStorageError)
            assert fault.failed >= 4
        else:
            assert fault.failed == 1, "tried again, although it does not pass"
    assert temporary(out) == []
    before = set(committed(out))
    assert before
    assert bits(run(out)) == wanted
    assert before <= set(committed(out))


def committed(out: Path) -> list[str]:
    database = sqlite3.connect(out / "manifest")
    try:
        return [key for (key,) in database.execute("SELECT key FROM tasks")]
    finally:
        database.close()


def test_a_sync_that_fails_is_never_just_repeated(tmp_path, monkeypatch, expected):
    """The system may have dropped what it could not write: all of the file has to be written again."""
    out, wanted, written = tmp_path / "run", expected(), {}
    word = "kernel.zarr/c/1/0"
    write, open_ = os.write, os.open
    with monkeypatch.context() as patch:
        fault = Faulty(patch, "fsync", errno.EIO, word, times=1)
        faulty_open = os.open

        def opened(path, *more, **named):
            descriptor = faulty_open(path, *more, **named)
            written[descriptor] = str(path)
            return descriptor

        sizes: dict[str, int] = {}

        def writing(descriptor, view):
            sizes[written.get(descriptor, "")] = sizes.get(written.get(descriptor, ""), 0) + len(view)
            return write(descriptor, view)

        patch.setattr(os, "open", opened)
        patch.setattr(os, "write", writing)
        kernel = run(out)
    assert os.open is open_
    assert fault.failed == 1
    whole = [size for path, size in sizes.items() if word in path]
    assert len(whole) == 2, "a new file"
    assert whole[0] == whole[1] == TILE * TILE * 4
    assert bits(kernel) == wanted


# --- the manifest ----------------------------------------------------------------------------------------------------


class FaultyDatabase:
    """A connection whose statements fail."""

    def __init__(self, database, code: int, times: int, word: str) -> None:
        self._database, self._code, self._word = database, code, word
        self.left = times

    def execute(self, statement, *more):
        if self.left and self._word in statement:
            self.left -= 1
            error = sqlite3.OperationalError("made up")
            error.sqlite_errorcode = self._code
            raise error
        return self._database.execute(statement, *more)

    def __getattr__(self, name):
        return getattr(self._database, name)


@pytest.mark.parametrize("word", ["BEGIN", "INSERT OR REPLACE INTO tasks", "COMMIT"])
def test_a_manifest_that_cannot_be_written_for_a_moment(word, tmp_path):
    manifest, before = Manifest(tmp_path), retries.retries()
    manifest._database = FaultyDatabase(manifest._database, sqlite3.SQLITE_IOERR_FSYNC, 3, word)
    manifest.commit(Receipt("rows-0-0-0", 1.0, retries=2, batch_size=4))
    assert retries.retries() - before == 3
    manifest.close()
    again = Manifest(tmp_path)
    assert again.receipts() == {"rows-0-0-0": Receipt("rows-0-0-0", 1.0, retries=2, batch_size=4)}
    again._database = FaultyDatabase(again._database, sqlite3.SQLITE_IOERR_WRITE, 4, word)
    with pytest.raises(StorageError, match=r"cannot write the manifest.*run again"):
        again.commit(Receipt("rows-0-1-0", 1.0))
    assert set(again.receipts()) == {"rows-0-0-0"}
    again._database = FaultyDatabase(again._database, sqlite3.SQLITE_READONLY_DIRECTORY, 1, word)
    with pytest.raises(StorageError, match=r"manifest.*make the folder writable, finished tiles are kept"):
        again.commit(Receipt("rows-0-1-0", 1.0))
    again.close()


def test_receipts_of_before_are_read():
    text = Receipt("rows-0-0-0", 1.0).to_json().replace(', "retries": 0, "batch_size": 0', "")
    assert "retries" not in text
    assert Receipt.from_json(text) == Receipt("rows-0-0-0", 1.0)


def test_a_log_of_receipts_that_cannot_be_written(tmp_path, monkeypatch, expected):
    out = tmp_path / "run"
    open_ = Path.open

    def failing(self, mode="r", *more, **named):
        if self.name == "receipts.jsonl":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return open_(self, mode, *more, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", failing)
        with pytest.raises(StorageError, match=r"writing .*receipts.jsonl failed: Read-only.*finished tiles are kept"):
            run(out)
    assert bits(run(out)) == expected()


# --- a full device ---------------------------------------------------------------------------------------------------


def limited(monkeypatch, samples: int) -> list[int]:
    """A device that has room for so many samples at once; returns the sizes of all batches that were tried."""
    original, perform, tried, working = Capture.run, executors.perform, [], []

    def run(self, batch, *more):
        if working:  # not the comparison with autograd before the first task
            tried.append(len(batch))
            if len(batch) > samples:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(self, batch, *more)

    def performing(*arguments):
        working.append(1)
        try:
            return perform(*arguments)
        finally:
            working.pop()

    monkeypatch.setattr(Capture, "run", run)
    monkeypatch.setattr(executors, "perform", performing)
    return tried


@pytest.mark.parametrize("dataflow", ["spill", "resident"])
def test_a_full_device_halves_the_batch_says_so_and_records_it(dataflow, tmp_path, monkeypatch, expected, caplog):
    out, wanted = tmp_path / "run", expected(dataflow)
    with monkeypatch.context() as patch:
        tried = limited(patch, 3)
        kernel = run(out, dataflow)
    assert tried[:4] == [8, 4, 2, 2]
    assert max(tried[2:]) == 2, "what did not fit once is not tried again"
    assert np.allclose(
        np.asarray(kernel),
        np.frombuffer(wanted, "<f4")[: kernel.shape[0] * kernel.shape[1]].reshape(kernel.shape),
        rtol=1e-5,
        atol=1e-5,
    )
    said = [record for record in caplog.records if "ran out of memory" in record.message]
    assert [record.levelno for record in said] == [logging.WARNING] * 2
    assert "with 8 samples" in said[0].message
    assert "with 2 " in said[1].message
    info = ooc_ntk.info(out)
    assert info.micro_batches == {2: 4}
    assert "batches" in labels(info)
    attributes = zarr.open_array(out / "kernel.zarr", mode="r").attrs
    assert attributes["micro_batches"] == [[0, row, 2] for row in range(4)]
    assert attributes["batch_size"] == TILE
    assert attributes["kernel"] == "trace", "the rest of the provenance stays"
    assert temporary(out) == []
    assert ooc_ntk.verify(out, make_job()).passed


def test_an_undisturbed_kernel_says_nothing_of_batches(tmp_path):
    run(tmp_path / "run")
    assert "micro_batches" not in zarr.open_array(tmp_path / "run/kernel.zarr", mode="r").attrs
    info = ooc_ntk.info(tmp_path / "run")
    assert (info.retries, info.micro_batches) == (0, {})
    assert not {"retries", "batches"} & set(labels(info))


def test_a_later_session_knows_what_did_not_fit(tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        limited(patch, 4)
        original = executors.perform

        def perform(shared, task, *upstream):
            if task.key == "rows-0-2-0":
                raise ZeroDivisionError
            return original(shared, task, *upstream)

        patch.setattr(executors, "perform", perform)
        with pytest.raises(ZeroDivisionError):
            run(out)
    with monkeypatch.context() as patch:
        tried = limited(patch, 4)
        run(out)
    assert tried
    assert max(tried) == 4
    rows = {
        key: receipt.batch_size for key, receipt in Manifest(out, read_only=True).receipts().items() if "rows" in key
    }
    assert rows == {f"rows-0-{row}-0": 4 for row in range(4)}


def test_a_device_without_room_for_one_sample(tmp_path, monkeypatch, expected):
    out, wanted = tmp_path / "run", expected()
    with monkeypatch.context() as patch:
        tried = limited(patch, 0)
        with pytest.raises(ooc_ntk.api.BudgetError, match=r"ran out of memory with a single sample.*--device-memory"):
            run(out)
    assert tried == [8, 4, 2, 1]
    assert temporary(out) == []
    assert bits(run(out)) == wanted


@pytest.mark.parametrize(
    ("error", "flag"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "--device-memory"),
        (MemoryError("Unable to allocate 2 GiB"), "--host-memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "--host-memory"),
    ],
)
def test_no_memory_for_a_kernel_tile(error, flag, tmp_path, monkeypatch, expected):
    out, wanted = tmp_path / "run", expected()

    def begin(self, rows, columns):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(KernelAccumulator, "begin", begin)
        with pytest.raises(ooc_ntk.api.BudgetError, match=rf"ran out of memory in task kernel-0-.*kept.*{flag}"):
            run(out)
    assert temporary(out) == []
    assert bits(run(out)) == wanted


# --- a disk that fills -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calls", [1, 4, 20])
def test_a_watched_disk_stops_the_run_before_it_is_full(calls, tmp_path, monkeypatch, expected):
    out, wanted, seen = tmp_path / "run", expected(), []

    def free(path):
        seen.append(path)
        return 2**31 if len(seen) < calls else 2**30

    with monkeypatch.context() as patch:
        patch.setattr(context, "free_disk_bytes", free)
        with pytest.raises(StorageError, match=r"1\.0 GiB of disk are free.*--watch-disk keeps 1\.5 GiB.*make room"):
            run(out, watch_disk="1.5GiB")
        assert len(seen) == calls
    assert temporary(out) == []
    assert bits(run(out, watch_disk=1)) == wanted


def test_a_disk_is_not_watched_unless_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(context, "free_disk_bytes", lambda path: 0)
    run(tmp_path / "run")


def test_a_margin_that_is_no_size(tmp_path):
    with pytest.raises(ooc_ntk.api.InputError, match="size"):
        run(tmp_path / "run", watch_disk="much")


# --- calibration -----------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """Calibration without measuring."""
    rates = {name: dict.fromkeys((32, 512), 1000000000.0) for name in ("float32", "bf16", "bf16x3", "float64")}
    monkeypatch.setattr(calibration, "measure_products", lambda *_: (rates, rates))
    monkeypatch.setattr(calibration, "measure_factored", lambda *_: ({"float32": 1e9}, 1e9))
    monkeypatch.setattr(calibration, "memory_rates", lambda: (1e9, 1e9))
    monkeypatch.setattr(calibration, "measure_disk", lambda folder: DiskRates(1e9, 2e9, 0.01, direct_wins=True))


@pytest.mark.usefixtures("quick")
def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OOC_NTK_CACHE", str(tmp_path / "file/cache"))
    kernel = ooc_ntk.run(make_job(), tmp_path / "run", budget=BUDGET, progress=False)
    assert np.isfinite(np.asarray(kernel)).all()
    assert any("cannot keep the measured rates" in line and "OOC_NTK_CACHE" in line for line in caplog.messages)


@pytest.mark.skipif(not O_DIRECT, reason="this system has no O_DIRECT")
@pytest.mark.usefixtures("quick")
def test_tiles_are_read_directly_where_that_was_faster_and_they_do_not_fit_the_cache(tmp_path, monkeypatch, expected):
    wanted, out = expected(), tmp_path / "run"
    monkeypatch.setenv("OOC_NTK_CACHE", str(tmp_path / "cache"))
    assert not calibration.reads_directly("cpu", 2**40), "nothing was measured"
    assert calibration.calibrate("cpu", tmp_path).direct_wins
    assert calibration.cached_rates("cpu").direct_wins
    text = calibration.rates_path("cpu").read_text()
    calibration.rates_path("cpu").write_text(text.replace(',\n  "direct_wins": true', ""))
    assert calibration.cached_rates("cpu").measured
    assert not calibration.reads_directly("cpu", 2**40), "rates of before say nothing of it"
    calibration.rates_path("cpu").write_text(text)
    assert calibration.reads_directly("cpu", 2**40)
    assert not calibration.reads_directly("cpu", 1)
    monkeypatch.setattr(calibration, "free_host_bytes", lambda: 0)
    flags, opened = [], os.open
    monkeypatch.setattr(os, "open", lambda path, how, *mode: flags.append((str(path), how)) or opened(path, how, *mode))
    assert bits(run(out)) == wanted
    direct = {"tiles/factors" in path for path, how in flags if how & O_DIRECT}
    assert direct == {True}


# --- device memory ---------------------------------------------------------------------------------------------------


class CuFile:
    """Stands in for KvikIO's, in host memory."""

    def __init__(self, path, flags):
        self._path = Path(path)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def read(self, target):
        target.copy_(torch.frombuffer(bytearray(self._path.read_bytes()), dtype=torch.uint8)[: len(target)])
        return len(target)


def test_tiles_that_are_read_into_device_memory_give_the_same_bits(tmp_path, monkeypatch, expected):
    wanted, made = expected(), []
    monkeypatch.setitem(sys.modules, "kvikio", types.SimpleNamespace(CuFile=CuFile))
    monkeypatch.setattr(devicestore, "on_device", lambda plan: True)
    original = devicestore.DeviceStore.buffer
    monkeypatch.setattr(devicestore.DeviceStore, "buffer", lambda *given: made.append(original(*given)) or made[-1])
    assert bits(run(tmp_path / "run")) == wanted
    assert made
    assert all(isinstance(buffer, torch.Tensor) for buffer in made)


def test_only_cuda_plans_are_read_into_device_memory(monkeypatch):
    monkeypatch.setattr(devicestore.gds, "wanted", lambda: True)
    assert not devicestore.on_device(make_plan())
    assert devicestore.on_device(replace(make_plan(), device="cuda:0"))


# --- the command line ------------------------------------------------------------------------------------------------

NETS = """
import torch


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))
"""


@pytest.mark.parametrize(
    "number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EIO], ids=["EROFS", "EACCES", "ENOSPC", "EIO"]
)
@pytest.mark.parametrize("word", ["lock", "plan.json", "kernel.zarr/c", "pending/", "receipts.jsonl"])
def test_one_line_and_exit_code_2_for_every_file_that_cannot_be_written(word, number, cli, tmp_path, monkeypatch):
    arguments = ("run", "--model", "nets.py:net", "--train", "digits[0:20]", "--out", tmp_path / "out", "-q")
    open_, path_open = os.open, Path.open

    def failing_os(path, flags, *more, **named):
        if word in str(path) and flags & os.O_CREAT:
            raise OSError(number, os.strerror(number))
        return open_(path, flags, *more, **named)

    def failing_path(self, mode="r", *more, **named):
        if word in str(self) and mode.startswith("a"):
            raise OSError(number, os.strerror(number))
        return path_open(self, mode, *more, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", failing_os)
        patch.setattr(Path, "open", failing_path)
        found = cli(*arguments)
    assert found.exit_code == EXIT_INPUT, found.output
    assert found.stderr.startswith("error: ")
    assert found.stderr.count("\n") == 1, found.stderr
    assert "Traceback" not in found.output
    assert cli(*arguments).exit_code == 0


def test_an_unfinished_run_names_its_margin_on_the_command_line(cli, tmp_path, monkeypatch):
    arguments = ("run", "--model", "nets.py:net", "--train", "digits[0:20]", "--out", tmp_path / "out", "-q")
    with monkeypatch.context() as patch:
        patch.setattr(context, "free_disk_bytes", lambda path: 2**30)
        found = cli(*arguments, "--watch-disk", "2GiB")
    assert found.exit_code == EXIT_INPUT
    assert "--watch-disk keeps 2.0 GiB free" in found.stderr
    assert cli(*arguments, "--watch-disk", "1MiB").exit_code == 0
    assert app is not None


def test_everything_stays_readable_without_this_package(tmp_path):
    kernel = run(tmp_path / "run")
    whole = np.asarray(kernel)
    assert np.array_equal(zarr.open_array(tmp_path / "run/kernel.zarr", mode="r")[:], whole)
    assert np.array_equal(kernel.dask().compute(scheduler="synchronous"), whole)
    assert RunDirectory(tmp_path / "run").holds_run
