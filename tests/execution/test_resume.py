"""Resume: whatever stopped a run, the same call goes on to the same bits; whatever is wrong, nothing is lost."""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import ooc_ntk
from ooc_ntk.errors import DamagedFileError, DataChangedError, IncompleteRunError, OocNtkError, RunLockedError
from ooc_ntk.execution import calibration, driver, executors, prepare, session
from ooc_ntk.execution.driver import Observer
from ooc_ntk.storage import atomic
from ooc_ntk.storage.directory import RunDirectory
from ooc_ntk.storage.manifest import Manifest
from tests.rates import RATES

TRAIN, TEST, TILE = 40, 9, 8
BUDGET = ooc_ntk.Budget("16GiB", disk="1GiB")
DATAFLOWS = {
    "resident": ooc_ntk.Preferences(dataflow="resident", tile_samples=TILE, span_columns=60, layer_rules=False),
    "spill": ooc_ntk.Preferences(
        dataflow="spill", tile_samples=TILE, span_columns=60, layer_rules=False, superblock_tiles=1
    ),
    "recompute": ooc_ntk.Preferences(
        dataflow="recompute", tile_samples=TILE, span_columns=30, passes=3, layer_rules=False
    ),
    "factored": ooc_ntk.Preferences(dataflow="spill", tile_samples=TILE, superblock_tiles=1),
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tmp_path(memory_path):
    return memory_path


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3))


def samples(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


def make_job(**changes) -> ooc_ntk.Job:
    given = {"model": make_model(), "train": samples(TRAIN), "test": samples(TEST, 2), "device": "cpu"}
    return ooc_ntk.Job(**{**given, **changes})


@functools.cache
def make_plan(dataflow: str) -> ooc_ntk.Plan:
    made = ooc_ntk.plan(make_job(), BUDGET, preferences=DATAFLOWS[dataflow], rates=RATES)
    return replace(made, kept_bytes=0)  # what stays in memory would never be read again


def run(out: Path, plan: ooc_ntk.Plan | None = None, job: ooc_ntk.Job | None = None, progress=False, **more):
    return ooc_ntk.run(job or make_job(), out, plan=plan, scheduler="serial", progress=progress, **more)


_expected: dict[str, tuple[bytes, bytes]] = {}


@pytest.fixture
def expected(tmp_path) -> Callable[[str], tuple[bytes, bytes]]:
    """Bits of kernel and diagonal of an undisturbed run of a dataflow, by the other executor."""

    def of(dataflow: str) -> tuple[bytes, bytes]:
        if dataflow not in _expected:
            out = tmp_path / "reference"
            _expected[dataflow] = bits(ooc_ntk.run(make_job(), out, plan=make_plan(dataflow), progress=False))
        return _expected[dataflow]

    return of


def bits(kernel) -> tuple[bytes, bytes]:
    matrix = np.asarray(kernel)
    assert np.isfinite(matrix).all()
    return matrix.tobytes(), kernel.diagonal().tobytes()


class Crash(BaseException):
    """Stands for the process dying: no handler of the engine may swallow it."""


@contextmanager
def crash_at_commit(key: str, *, before: bool):
    """Die just before, or just after, a task is committed."""
    original = Manifest.commit

    def commit(self, receipt):
        if receipt.key == key and before:
            raise Crash
        original(self, receipt)
        if receipt.key == key:
            raise Crash

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Manifest, "commit", commit)
        with pytest.raises(Crash):
            yield


@dataclass
class Watch:
    """What a run found when it began, and the tasks it performed."""

    remaining: object = None
    performed: tuple[str, ...] = ()


@contextmanager
def watching():
    """Pass the observer of the yielded pair as ``progress``."""
    watch, performed = Watch(), []
    original = executors.perform

    def perform(context, task, *upstream):
        performed.append(task.key)
        return original(context, task, *upstream)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executors, "perform", perform)
        yield watch, Observer(begin=lambda totals, remaining: setattr(watch, "remaining", remaining))
        watch.performed = tuple(performed)


def snapshot(out: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file but the lock, with its time and content."""
    return {
        path.relative_to(out).as_posix(): (path.stat().st_size, path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


@contextmanager
def unchanged(out: Path):
    before = snapshot(out)
    assert before
    yield
    assert snapshot(out) == before


def flip(path: Path) -> None:
    """Change one byte and set the times back, as a failing disk would."""
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0x10
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def delete(path: Path) -> None:
    path.unlink()


DAMAGE = pytest.mark.parametrize(
    ("damage", "reason"),
    [(flip, "differs from its checksum"), (truncate, "bytes instead of"), (delete, "is missing")],
    ids=["flipped", "truncated", "deleted"],
)


# --- the stored plan -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataflow", ["spill", "recompute"])
def test_resume_uses_the_stored_plan_although_memory_and_rates_changed(tmp_path, monkeypatch, expected, dataflow):
    plan, out = make_plan(dataflow), tmp_path / "run"
    with crash_at_commit("kernel-0-3-1", before=False):
        run(out, plan)
    monkeypatch.setattr(prepare, "free_host_bytes", lambda: 1)
    monkeypatch.setenv("OOC_NTK_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    other = replace(RATES, fill=1.0, disk_write=1.0, disk_read=1e15)
    calibration.rates_path("cpu").write_text(other.to_json())
    with pytest.raises(ooc_ntk.api.BudgetError):
        ooc_ntk.plan(make_job())  # a new plan could not be made now
    with watching() as (watch, observer):
        kernel = run(out, progress=observer)
    assert kernel.plan.digest == plan.digest
    assert kernel.plan == plan
    assert "kernel-0-3-1" not in watch.performed
    assert bits(kernel) == expected(dataflow)


def test_explicit_smaller_budget_is_refused_and_a_larger_one_is_taken(tmp_path, expected):
    plan, out = make_plan("recompute"), tmp_path / "run"
    with crash_at_commit("kernel-0-3-1", before=False):
        run(out, plan)
    for name in ("host", "disk"):
        promised = getattr(plan.promised, f"{name}_bytes")
        with unchanged(out), pytest.raises(ooc_ntk.api.BudgetError, match=rf"peak of .* of {name}.*budget is .*raise"):
            run(out, budget=ooc_ntk.Budget(**{name: promised - 1}))
    assert bits(run(out, budget=ooc_ntk.Budget(plan.promised.host_bytes, disk="100GiB"))) == expected("recompute")


@pytest.mark.parametrize("dataflow", list(DATAFLOWS))
def test_a_finished_run_again_does_nothing(tmp_path, expected, dataflow):
    out = tmp_path / "run"
    run(out, make_plan(dataflow))
    wanted = expected(dataflow)
    with unchanged(out), watching() as (watch, observer):
        assert bits(run(out, progress=observer)) == wanted
    assert watch.performed == ()
    assert watch.remaining.tasks == []


def test_a_stored_plan_that_was_edited_is_refused(tmp_path):
    out = tmp_path / "run"
    with crash_at_commit("kernel-0-1-0", before=False):
        run(out, make_plan("spill"))
    fields = json.loads((out / "plan.json").read_text())
    fields["tile_samples"] = 16
    (out / "plan.json").write_text(json.dumps(fields))
    with unchanged(out), pytest.raises(ooc_ntk.api.OocNtkError, match=r"plan was changed after it was written.*digest"):
        run(out)


# --- kills at given moments ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [True, False], ids=["before-commit", "after-commit"])
@pytest.mark.parametrize(
    ("dataflow", "key"),
    [
        ("spill", "rows-0-2-0"),
        ("spill", "kernel-0-4-2"),
        ("spill", "release-0-0-0"),
        ("recompute", "rows-1-2-0"),
        ("recompute", "kernel-1-4-2"),
        ("recompute", "kernel-2-6-4"),
        ("recompute", "release-2-0-0"),
    ],
)
def test_a_crash_around_any_commit_leaves_nothing_behind(tmp_path, expected, dataflow, key, before):
    out = tmp_path / "run"
    with crash_at_commit(key, before=before):
        run(out, make_plan(dataflow))
    assert bits(run(out)) == expected(dataflow)
    assert [path.name for path in out.iterdir() if path.name in ("tiles", "pending")] == []
    assert list(out.rglob("*.tmp*")) == []
    assert ooc_ntk.verify(out, make_job()).passed
    with unchanged(out):
        run(out)


def test_a_kill_while_a_new_run_is_written_does_not_block_the_directory(tmp_path, monkeypatch, expected):
    out = tmp_path / "run"

    def crash(*arguments, **options):
        raise Crash

    for name in ("create_run", "execute"):
        with monkeypatch.context() as patch:
            patch.setattr(session, name, crash)
            with pytest.raises(Crash):
                run(out, make_plan("spill"))
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "write_text", crash)
        shutil.rmtree(out)
        with pytest.raises(Crash):
            run(out, make_plan("spill"))
    assert bits(run(out, make_plan("spill"))) == expected("spill")


def test_a_kill_in_the_middle_of_a_manifest_commit_is_rolled_back(tmp_path, expected):
    out = tmp_path / "run"
    with crash_at_commit("kernel-0-3-1", before=False):
        run(out, make_plan("spill"))
    before = committed(out)
    # A process that dies while SQLite writes a transaction leaves a hot journal, here made sure of by a tiny cache.
    code = (
        "import os, sqlite3, sys\n"
        "d = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "d.execute('PRAGMA cache_size = 1'); d.execute('BEGIN IMMEDIATE')\n"
        "d.execute('DELETE FROM tasks')\n"
        "d.executemany('INSERT OR REPLACE INTO meta VALUES (?, ?)', [(str(i), 'x' * 3000) for i in range(200)])\n"
        "os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(out / "manifest")], check=False).returncode == 9
    assert (out / "manifest-journal").stat().st_size > 512
    # Whoever opens the manifest first has to roll back: each verb gets a copy of its own.
    for name, verb in {"info": ooc_ntk.info, "open": ooc_ntk.open}.items():
        shutil.copytree(out, tmp_path / name)
        if name == "info":
            assert verb(tmp_path / name).kernel_tiles_done == sum(key.startswith("kernel") for key in before)
        else:
            with pytest.raises(IncompleteRunError):
                verb(tmp_path / name)
    with watching() as (watch, observer):
        kernel = run(out, progress=observer)
    assert not set(before) & set(watch.performed)
    assert bits(kernel) == expected("spill")


def committed(out: Path) -> dict[str, float]:
    database = sqlite3.connect(out / "manifest")
    try:
        return dict(database.execute("SELECT key, committed FROM tasks"))
    finally:
        database.close()


# --- adoption --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataflow", "key", "file"),
    [
        ("spill", "rows-0-2-0", "tiles/jacobian.zarr/c/2/0/1"),
        ("spill", "kernel-0-3-1", "kernel.zarr/c/1/3"),
        ("recompute", "kernel-1-3-1", "tiles/partial-1/3.1"),
        ("recompute", "kernel-2-3-1", "kernel.zarr/c/3/1"),
    ],
)
@pytest.mark.parametrize("altered", [False, True])
def test_published_files_that_were_not_committed_are_adopted_unless_altered(
    tmp_path, expected, dataflow, key, file, altered
):
    out = tmp_path / "run"
    with crash_at_commit(key, before=True):
        run(out, make_plan(dataflow))
    assert key not in committed(out)
    if altered:
        flip(out / file)
    inode = (out / file).stat().st_ino
    with watching() as (watch, observer):
        kernel = run(out, progress=observer)
    assert watch.remaining.adopted == ([] if altered else [key])
    assert (key in watch.performed) == altered
    if file.startswith("kernel"):
        assert ((out / file).stat().st_ino == inode) != altered
    assert bits(kernel) == expected(dataflow)


def test_a_generation_is_deleted_only_after_the_next_one_is_committed(tmp_path, monkeypatch):
    out, original, seen = tmp_path / "run", Manifest.commit, []

    def commit(self, receipt):
        if receipt.key.startswith("kernel-1"):
            (old,) = receipt.replaces
            assert old.startswith("tiles/partial-0/")
            assert (out / old).exists()
            assert all((out / record.path).exists() for record in receipt.files)
            original(self, receipt)
            assert (out / old).exists()
            seen.append(old)
        else:
            original(self, receipt)
            assert not [old for old in seen if (out / old).exists()]

    monkeypatch.setattr(Manifest, "commit", commit)
    run(out, make_plan("recompute"))
    assert len(seen) == make_plan("recompute").sample_grid.kernel_tile_count


# --- damage ----------------------------------------------------------------------------------------------------------

#: Files of a finished run, and what else the task that made each of them writes: the mirror image of a kernel tile, or
#: the diagonal that a tile on the diagonal brings. Test samples' diagonal comes with their rows.
FINISHED = {
    "kernel.zarr/c/3/1": {"kernel.zarr/c/1/3"},
    "kernel.zarr/c/1/3": {"kernel.zarr/c/3/1"},
    "kernel.zarr/c/6/4": set(),
    "diagonal/c/2": {"kernel.zarr/c/2/2"},
    "diagonal/c/6": set(),
}


@DAMAGE
@pytest.mark.parametrize("file", FINISHED)
@pytest.mark.parametrize("dataflow", ["spill", "recompute"])
def test_a_damaged_file_of_a_finished_run_is_named_and_computed_again(
    tmp_path, expected, caplog, dataflow, file, damage, reason
):
    out = tmp_path / "run"
    run(out, make_plan(dataflow))
    whole = (out / file).read_bytes()
    damage(out / file)
    audit = ooc_ntk.verify(out, samples=0)
    assert not audit.passed
    (failed,) = [check for check in audit.checks if not check.passed]
    assert failed.name == "checksums"
    assert f"{file} " in failed.detail
    assert reason in failed.detail
    others = {name: found for name, found in snapshot(out).items() if name.startswith(("kernel.zarr/c", "diagonal/c"))}
    with watching() as (watch, observer):
        kernel = run(out, progress=observer)
    assert list(watch.remaining.damaged) == [file]
    assert reason in watch.remaining.damaged[file]
    assert any(file in record.getMessage() and record.levelname == "WARNING" for record in caplog.records)
    assert (out / file).read_bytes() == whole
    assert bits(kernel) == expected(dataflow)
    touched = {name for name, found in snapshot(out).items() if name in others and found != others[name]}
    assert touched <= {file, *FINISHED[file]}
    assert ooc_ntk.verify(out, make_job()).passed


@DAMAGE
@pytest.mark.parametrize(
    ("dataflow", "key", "file"),
    [
        ("spill", "kernel-0-2-1", "tiles/jacobian.zarr/c/4/0/1"),
        ("spill", "rows-0-5-0", "tiles/jacobian.zarr/c/2/0/0"),
        ("spill", "kernel-0-2-1", "diagonal/c/3"),
        ("recompute", "kernel-1-3-1", "tiles/partial-1/2.1"),
        ("recompute", "kernel-1-3-1", "tiles/partial-0/5.0"),
        ("recompute", "kernel-1-3-1", "tiles/diagonal-1/5"),
        ("recompute", "kernel-2-3-1", "kernel.zarr/c/1/2"),
    ],
)
def test_a_file_damaged_between_kill_and_resume_is_computed_again(
    tmp_path, expected, dataflow, key, file, damage, reason
):
    out = tmp_path / "run"
    with crash_at_commit(key, before=False):
        run(out, make_plan(dataflow))
    damage(out / file)
    with watching() as (watch, observer):
        kernel = run(out, progress=observer)
    assert list(watch.remaining.damaged) == [file]
    assert reason in watch.remaining.damaged[file]
    assert bits(kernel) == expected(dataflow)
    assert ooc_ntk.verify(out, make_job()).passed


@DAMAGE
@pytest.mark.parametrize("repairs", [0, driver.REPAIRS], ids=["stops", "goes-on"])
@pytest.mark.parametrize(
    ("dataflow", "file"),
    [
        ("spill", "tiles/jacobian.zarr/c/4/0/1"),
        ("spill", "kernel.zarr/c/1/0"),  # which nothing reads again
        ("recompute", "tiles/partial-0/5.0"),
        ("recompute", "tiles/diagonal-0/5"),
    ],
)
def test_a_file_damaged_under_a_running_run_never_gives_a_wrong_kernel(
    tmp_path, monkeypatch, expected, dataflow, file, damage, reason, repairs
):
    out, original, done = tmp_path / "run", Manifest.commit, []

    def commit(self, receipt):
        original(self, receipt)
        if ((out / file).exists() and receipt.key == "kernel-0-6-4") or (
            dataflow == "spill" and receipt.key == "kernel-0-1-0"
        ):
            if not done:
                damage(out / file)
                done.append(receipt.key)

    monkeypatch.setattr(Manifest, "commit", commit)
    monkeypatch.setattr(driver, "REPAIRS", repairs)
    if repairs:
        assert bits(run(out, make_plan(dataflow))) == expected(dataflow)
    else:
        with pytest.raises(OocNtkError, match=Path(file).name):
            run(out, make_plan(dataflow))
    assert done
    assert list(out.rglob("*.tmp-*")) == []
    assert bits(run(out)) == expected(dataflow)
    assert leftovers(out) == []


def test_a_file_that_is_damaged_again_and_again_stops_the_run(tmp_path, monkeypatch, expected):
    out, file, original, done = tmp_path / "run", "tiles/jacobian.zarr/c/4/0/1", Manifest.commit, []

    def commit(self, receipt):
        original(self, receipt)
        if receipt.key in ("kernel-0-1-0", "rows-0-4-0") and (out / file).exists():
            flip(out / file)
            done.append(receipt.key)

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "commit", commit)
        with pytest.raises(DamagedFileError, match=r"c/4/0/1 is not what was committed; run again"):
            run(out, make_plan("spill"))
    assert done.count("rows-0-4-0") == driver.REPAIRS + 1
    assert bits(run(out)) == expected("spill")


def leftovers(out: Path) -> list[str]:
    return [path.name for path in out.iterdir() if path.name in ("tiles", "pending")]


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("finished", [True, False])
def test_another_job_or_plan_is_refused_by_name_and_nothing_changes(tmp_path, finished):
    out, plan = tmp_path / "run", make_plan("spill")
    if finished:
        run(out, plan)
    else:
        with crash_at_commit("kernel-0-3-1", before=False):
            run(out, plan)
    parts = {
        "model": {"model": make_model(7)},
        "data": {"train": samples(TRAIN, 5)},
        "kernel settings": {"kernel": "pseudo"},
    }
    parts_more = [
        *parts.items(),
        ("data", {"test": None}),
        ("kernel settings", {"scale": "mean"}),
        ("kernel settings", {"parameters": "0.*"}),
        ("kernel settings", {"normalize": "cosine"}),
    ]
    for name, change in parts_more:
        with unchanged(out), pytest.raises(ooc_ntk.api.RunConflictError) as error:
            run(out, job=make_job(**change))
        said = str(error.value)
        assert f"{name} (there" in said
        assert not [other for other in parts if other != name and f"{other} (there" in said]
        assert "--out" in said
    other = make_plan("recompute")
    with unchanged(out), pytest.raises(ooc_ntk.api.RunConflictError) as error:
        run(out, plan=other)
    assert other.digest[:8] in str(error.value)
    assert plan.digest[:8] in str(error.value)


def test_a_plan_of_another_job_is_refused_before_anything_is_written(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(ooc_ntk.api.RunConflictError, match="plan was made for another job"):
        run(out, plan=make_plan("spill"), job=make_job(kernel="pseudo"))
    assert not out.exists() or [path.name for path in out.iterdir()] == ["lock"]


def test_a_directory_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("the only copy")
    with unchanged(tmp_path), pytest.raises(ooc_ntk.api.RunConflictError, match=r"other files \(thesis.tex\).*--out"):
        run(tmp_path, make_plan("spill"))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(OocNtkError, match="thesis.tex"):
        run(tmp_path / "thesis.tex", make_plan("spill"))


def test_a_manifest_of_a_newer_version_is_refused(tmp_path):
    out = tmp_path / "run"
    run(out, make_plan("spill"))
    database = sqlite3.connect(out / "manifest")
    database.execute("PRAGMA user_version = 99")
    database.close()
    for verb in (run, ooc_ntk.info, ooc_ntk.open, lambda path: ooc_ntk.verify(path, samples=0)):
        with unchanged(out), pytest.raises(ooc_ntk.api.OocNtkError, match=r"format 99.*up to 1.*upgrade"):
            verb(out)


def test_a_run_under_way_locks_the_directory(tmp_path, expected):
    out = tmp_path / "run"
    with crash_at_commit("kernel-0-3-1", before=False):
        run(out, make_plan("spill"))
    with RunDirectory(out).locked(), unchanged(out):
        with pytest.raises(RunLockedError, match=rf"process {os.getpid()}\b.*--out"):
            run(out)
    assert bits(run(out)) == expected("spill")


# --- data that changes -----------------------------------------------------------------------------------------------


class Drifting(Dataset):
    """Samples that are the same on every reading, except those from ``first`` to ``stop``."""

    def __init__(self, count: int, first: int, stop: int = 10**9) -> None:
        self.base, self.changing = samples(count), range(first, stop)
        self.random = torch.Generator().manual_seed(3)

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> torch.Tensor:
        noise = torch.randn(8, generator=self.random)
        return self.base[index] + (0.1 * noise if index in self.changing else 0)


class Replaceable(Dataset):
    """Samples of which one can be replaced."""

    def __init__(self, count: int) -> None:
        self.base = samples(count)

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.base[index]


def test_random_augmentation_is_caught_before_anything_is_written(tmp_path):
    job = make_job(train=Drifting(130, 0), test=None)
    with pytest.raises(DataChangedError, match=r"train sample 0 twice.*augmentation"):
        ooc_ntk.plan(job, BUDGET, rates=RATES)
    with pytest.raises(DataChangedError, match=r"train sample 0 twice.*augmentation"):
        run(tmp_path / "run", job=job, budget=BUDGET)
    assert not (tmp_path / "run" / "plan.json").exists()


def test_random_augmentation_of_later_samples_is_caught_by_the_next_pass(tmp_path):
    job, out = make_job(train=Drifting(130, 100, 120), test=None), tmp_path / "run"
    preferences = replace(DATAFLOWS["recompute"], tile_samples=26)
    with pytest.raises(DataChangedError, match=r"\[78:104\].*augmentation"):
        run(out, job=job, budget=BUDGET, preferences=preferences)
    assert "rows-0-3-0" in committed(out)
    assert "rows-1-3-0" not in committed(out)


@pytest.mark.parametrize("dataflow", ["resident", "recompute"])
def test_data_that_changed_between_kill_and_resume_are_caught(tmp_path, dataflow):
    # More samples than the digest of a Dataset reads, and the one that changes is not among those read.
    from ooc_ntk.inputs.source import spaced_samples

    data, out = Replaceable(700), tmp_path / "run"
    job = make_job(train=data, test=None)
    preferences = replace(DATAFLOWS[dataflow], tile_samples=350)
    plan = ooc_ntk.plan(job, BUDGET, preferences=preferences, rates=RATES)
    with crash_at_commit("kernel-0-0-0", before=False):
        run(out, plan, job)
    unread = next(index for index in range(360, 700) if index not in spaced_samples(700, 512))
    before, data.base = data.base, data.base.clone()
    data.base[unread, 3] += 1e-3
    tiles = {name: found for name, found in snapshot(out).items() if name.startswith("kernel.zarr/c/")}
    with pytest.raises(DataChangedError, match=r"\[350:700\]"):
        run(out, job=make_job(train=data, test=None))
    assert {name: found for name, found in snapshot(out).items() if name in tiles} == tiles
    data.base = before
    assert run(out, job=make_job(train=data, test=None)).shape == (700, 700)


# --- a full disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataflow", "writes"),
    [("spill", 0), ("spill", 3), ("spill", 23), ("spill", 97), ("recompute", 61), ("recompute", 140)],
)
def test_a_write_that_fails_for_lack_of_space_stops_a_run_that_can_go_on(
    tmp_path, monkeypatch, expected, dataflow, writes
):
    out, plan, original = tmp_path / "run", make_plan(dataflow), os.write
    left = [writes]

    def write(descriptor, data):
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= 1
        return original(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "write", write)
        with pytest.raises(ooc_ntk.api.OocNtkError, match=r"disk is full.*make room and run the same command again"):
            run(out, plan)
    before = committed(out) if (out / "plan.json").exists() else {}
    assert list(out.rglob("*.tmp*")) == []
    wanted = expected(dataflow)
    with watching() as (watch, observer):
        assert bits(run(out, plan, progress=observer)) == wanted
    assert not [key for key in watch.performed if key.startswith("kernel") and key in before]
    assert ooc_ntk.verify(out, make_job()).passed


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"no mount command: {error}")
    if done.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, left: int) -> None:
    """Leave ``left`` bytes of a file system."""
    with (folder / "ballast").open("wb", buffering=0) as file:
        with suppress(OSError):
            while True:
                file.write(bytes(2**16))
        with suppress(OSError):
            while True:
                file.write(bytes(4096))
        file.truncate(max(0, file.tell() - left))


@pytest.mark.parametrize("left", [0, 8192, 40_960])
@pytest.mark.parametrize("moment", ["before-the-arrays", "before-the-tasks"])
@pytest.mark.parametrize("dataflow", ["spill", "recompute"])
def test_a_disk_that_is_really_full_stops_a_run_that_can_go_on(
    small_disk, monkeypatch, expected, dataflow, moment, left
):
    out, plan = small_disk / "run", make_plan(dataflow)
    with monkeypatch.context() as patch:
        observer = Observer(begin=lambda totals, remaining: fill(small_disk, left))
        if moment == "before-the-arrays":
            original = driver.create_arrays
            patch.setattr(driver, "create_arrays", lambda *given: (fill(small_disk, left), original(*given)))
            observer = Observer()
        with pytest.raises(OocNtkError, match="disk is full"):
            run(out, plan, progress=observer)
    (small_disk / "ballast").unlink()
    assert bits(run(out)) == expected(dataflow)
    assert ooc_ntk.verify(out, make_job()).passed


@pytest.mark.parametrize("same_plan", [True, False])
def test_what_a_late_worker_left_of_another_job_is_not_adopted(tmp_path, rates, same_plan):
    """A driver was killed, its run deleted, and another one begun there; then a worker ended a task of the first."""
    inputs = torch.randn(24, 6, generator=torch.Generator().manual_seed(3))
    plans, outs = [], [tmp_path / "first", tmp_path / "second"]
    for seed, out in enumerate(outs):
        torch.manual_seed(seed)
        job = ooc_ntk.Job(torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh()).eval(), inputs, device="cpu")
        preferences = ooc_ntk.Preferences(dataflow="spill", tile_samples=8, superblock_tiles=1)
        plans.append(ooc_ntk.plan(job, ooc_ntk.Budget(host="8GiB", disk="1GiB"), preferences=preferences, rates=rates))
        ooc_ntk.run(job, out, plan=plans[-1], progress=False, proof=False)
    expected = (outs[1] / "kernel.zarr/c/1/0").read_bytes()
    manifests = [Manifest(out) for out in outs]
    late = manifests[0].receipts()["kernel-0-1-0"]
    manifests[1].withdraw(["kernel-0-1-0", "release-0-0-0"])
    for manifest in manifests:
        manifest.close()
    for record in late.files:
        (outs[1] / record.path).write_bytes((outs[0] / record.path).read_bytes())
    late = replace(late, plan=plans[1].digest if same_plan else plans[0].digest)
    (outs[1] / "pending").mkdir()
    (outs[1] / "pending/kernel-0-1-0.json").write_text(late.to_json())
    ooc_ntk.run(job, outs[1], progress=False, proof=False)
    found = (outs[1] / "kernel.zarr/c/1/0").read_bytes()
    assert (found != expected) if same_plan else (found == expected), "only what says that it is of this plan"
