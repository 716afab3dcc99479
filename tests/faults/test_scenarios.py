"""Runs under fire: the seeded subset always, the whole with ``-m faults``."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from dataclasses import replace

import pytest

import ooc_ntk
from tests.faults import observation
from tests.faults.injection import FileLayer, Injection
from tests.faults.scenarios import KINDS, SUBSET, WHOLE, Laboratory, play, scenario
from tests.faults.server import ForkServer
from tests.faults.subjects import SUBJECTS


@pytest.fixture(scope="session")
def laboratory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    with ForkServer() as server:
        yield Laboratory(server, tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("number", range(SUBSET))
def test_subset(laboratory, number):
    play(scenario(number), laboratory)


@pytest.mark.faults
@pytest.mark.parametrize("number", range(WHOLE))
def test_the_whole(laboratory, number):
    play(scenario(number), laboratory)


def test_the_subset_has_every_kind_of_fault_and_every_job():
    chosen = [scenario(number) for number in range(SUBSET)]
    assert {kind for one in chosen for kind in one.kinds} == set(KINDS)
    assert {one.subject for one in chosen} == set(SUBJECTS)
    assert all(1 <= len(scenario(number).kinds) <= 3 for number in range(WHOLE))
    assert [scenario(number) for number in range(SUBSET)] == chosen


# --- the checks see what they are there for --------------------------------------------------------------------------


@pytest.fixture
def copy(laboratory, tmp_path):
    """A copy of an undisturbed run, and its reference."""
    reference = laboratory.reference("projected")
    shutil.copytree(reference.out, tmp_path / "run")
    observation.check_finished(tmp_path / "run", reference)
    return tmp_path / "run", reference


def test_a_wrong_bit_is_seen(copy):
    out, reference = copy
    seen = observation.snapshot(out)
    for path in ("kernel.zarr/c/3/2", "features.zarr/c/4/0", "diagonal/c/1"):
        data = bytearray((out / path).read_bytes())
        data[5] ^= 1
        (out / path).write_bytes(data)
        with pytest.raises(AssertionError, match="is not what was committed"):
            observation.check_files(out, seen, reference, ())
        observation.check_files(out, seen, reference, {path})
        with pytest.raises(AssertionError, match="differ"):
            observation.check_opened(out, seen, reference, ())
        (out / path).write_bytes(reference.contents[path])
    observation.check_files(out, seen, reference, ())


def test_a_wrong_kernel_with_right_checksums_is_seen(copy):
    out, reference = copy
    path = "kernel.zarr/c/3/2"
    seen = observation.snapshot(out)
    (out / path).write_bytes(b"x" * seen.files[path].size)
    other = replace(seen.files[path], crc32c=observation.google_crc32c.value(b"x" * seen.files[path].size))
    with pytest.raises(AssertionError, match="differs from the undisturbed run"):
        observation.check_files(out, replace(seen, files={**seen.files, path: other}), reference, ())


def test_lost_and_repeated_tasks_are_seen(copy):
    out, reference = copy
    seen, wanted = observation.snapshot(out), reference.tasks

    def check(key: str, committed: float | None, damaged=()) -> None:
        tasks = {name: time for name, time in seen.tasks.items() if name != key}
        if committed is not None:
            tasks[key] = committed
        observation.check_kept(seen, replace(seen, tasks=tasks), damaged, bool(damaged), wanted)

    for key in ("kernel-0-4-2", "rows-0-4-0", "release-0-0-0"):
        with pytest.raises(AssertionError, match="is lost"):
            check(key, None)
        with pytest.raises(AssertionError, match="done again"):
            check(key, 1.0)
    check("rows-0-4-0", 1.0, {"features.zarr/c/4/0"})
    with pytest.raises(AssertionError, match="done again"):
        check("rows-0-3-0", 1.0, {"features.zarr/c/4/0"})


def test_leftovers_and_a_kernel_that_opens_too_early_are_seen(copy):
    out, reference = copy
    seen = observation.snapshot(out)
    (out / "kernel.zarr" / "c" / "0" / "0.tmp-12345678").touch()
    with pytest.raises(AssertionError, match="half-written"):
        observation.check_swept(out)
    with pytest.raises(AssertionError, match="tmp-12345678"):
        observation.check_finished(out, reference)
    fewer = {key: time for key, time in seen.tasks.items() if key != "kernel-0-4-2"}
    with pytest.raises(AssertionError, match="opened although"):
        observation.check_opened(out, replace(seen, tasks=fewer), reference, ())


@pytest.mark.parametrize(
    ("said", "code", "right"),
    [
        ("", 0, True),
        ("error: the disk is full\n", 2, True),
        ("kernel.zarr/c/0/0 is missing; it will be computed again\nerror: the disk is full\n", 2, True),
        ("stopped\n", 130, True),
        ("", 2, False),
        ("no error\n", 2, False),
        ("error: one\nerror: two\n", 2, False),
        ("Traceback (most recent call last):\n", 2, False),
        ("Exception ignored in: <file>\n", 0, False),
    ],
)
def test_what_a_run_may_print(said, code, right):
    if right:
        observation.check_output(said, code)
    else:
        with pytest.raises(AssertionError):
            observation.check_output(said, code)


def test_calls_of_other_files_are_not_counted(tmp_path):
    layer = FileLayer(tmp_path / "run", Injection("write", "error", 1, errno.EIO), tmp_path / "fired")
    assert layer._ours(tmp_path / "run" / "kernel.zarr")
    assert not layer._ours(tmp_path / "running" / "kernel.zarr")
    assert not layer._ours(3)


@pytest.mark.parametrize("lasting", [False, True])
def test_a_fault_strikes_at_its_call_and_only_lasts_if_it_should(tmp_path, lasting):
    layer = FileLayer(tmp_path, Injection("write", "error", 2, errno.ENOSPC, lasting), tmp_path / "fired")
    assert layer.around(("write",), lambda: "done") == "done"
    assert layer.around(("sync",), lambda: "done") == "done"
    assert not (tmp_path / "fired").exists()
    with pytest.raises(OSError, match="No space left") as caught:
        layer.around(("write",), lambda: "done")
    assert caught.value.errno == errno.ENOSPC
    assert (tmp_path / "fired").exists()
    assert layer.around(("sync",), lambda: "done") == "done"
    if lasting:
        with pytest.raises(OSError, match="No space left"):
            layer.around(("create",), lambda: "done")
    else:
        assert layer.around(("write",), lambda: "done") == "done"


def test_the_jobs_are_what_their_names_say(laboratory):
    plans = {name: ooc_ntk.Plan.load(laboratory.plan(name)) for name in SUBJECTS if laboratory.reference(name)}
    for name in ("spill", "resident", "recompute"):
        assert plans[name].dataflow == name
    assert len(plans["recompute"].passes) == 3
    assert any(block.factors is not None for block in plans["factored"].blocks)
    assert plans["factored"].dataflow == "spill"
    assert plans["projected"].projection is not None
    assert plans["features"].features_only
    assert plans["layers"].layers
    assert plans["full"].entries_per_sample == 10
    assert all(16 <= plan.task_count <= 60 for plan in plans.values())
