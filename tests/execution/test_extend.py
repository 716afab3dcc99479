"""Growing a finished run: the kernel of a run from scratch, old tiles bit by bit, whole after a kill at any moment."""

from __future__ import annotations

import functools
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from torch import nn

import ooc_ntk
from ooc_ntk.errors import (
    BudgetError,
    IncompleteRunError,
    InputError,
    RunConflictError,
    RunInterrupted,
    RunLockedError,
    StorageError,
)
from ooc_ntk.execution import calibration, executors, extend
from ooc_ntk.execution.driver import Observer
from ooc_ntk.planning.growth import Grown, kept_rows, kept_tiles
from ooc_ntk.report.tables import provenance
from ooc_ntk.storage import swap
from ooc_ntk.storage.directory import RunDirectory
from ooc_ntk.storage.manifest import Manifest

TRAIN, MORE, TEST, TILE = 40, 13, 9, 8
BUDGET = ooc_ntk.Budget("16GiB", disk="1GiB")
TOLERANCE = 2e-6
SPILL = {"dataflow": "spill", "span_columns": 60, "layer_rules": False}
RECOMPUTE = {"dataflow": "recompute", "span_columns": 30, "passes": 3, "layer_rules": False}

#: Kind of a kernel and how it is computed: settings of the job, preferences, test samples, tile.
CASES: dict[str, tuple[dict, dict, int, int]] = {
    "trace": ({}, {"dataflow": "resident"}, TEST, TILE),
    "trace without test rows": ({}, {"dataflow": "resident"}, 0, TILE),
    "spill": ({}, SPILL, TEST, TILE),
    "factored": ({}, {"dataflow": "spill"}, TEST, 7),
    "recompute": ({}, RECOMPUTE, TEST, 7),
    "pseudo": ({"kernel": "pseudo"}, RECOMPUTE, 0, TILE),
    "full": ({"kernel": "full"}, SPILL, TEST, 11),
    "cosine": ({"normalize": "cosine"}, RECOMPUTE, TEST, TILE),
    "mean": ({"scale": "mean"}, {"dataflow": "resident"}, TEST, 100),
    "float64": ({"precision": "float64"}, {"dataflow": "resident"}, TEST, TILE),
    "layer": ({"by": "layer"}, {"dataflow": "resident"}, TEST, 7),
    "projected": ({"projection": "sjlt:64"}, {}, TEST, TILE),
    "projected full": ({"projection": "gaussian:32", "kernel": "full"}, {"span_columns": 20}, 0, 7),
    "projected cosine": ({"projection": "rademacher:64", "normalize": "cosine"}, {}, TEST, 7),
    "bf16x3": ({"precision": "bf16x3"}, {"representation": "factored"}, TEST, TILE),
    "projected bf16": ({"projection": "sjlt:64", "precision": "bf16"}, {"span_columns": 24}, TEST, TILE),
    "features only": ({"projection": "sjlt:64"}, {"features_only": True}, TEST, TILE),
}

#: Cases whose ways are all taken by others.
OFTEN_ENOUGH = ("trace without test rows", "factored", "mean", "float64", "projected cosine")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tmp_path(memory_path):
    return memory_path


def make_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3))


@functools.cache
def samples(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


EVERY = TRAIN + 2 * MORE


def make_job(train: int = TRAIN, test: int = TEST, **settings) -> ooc_ntk.Job:
    given = {"model": make_model(), "device": "cpu", "test": samples(test, 2) if test else None, **settings}
    return ooc_ntk.Job(train=samples(EVERY)[:train], **given)


def more(first: int = TRAIN, count: int = MORE) -> torch.Tensor:
    return samples(EVERY)[first : first + count]


@contextmanager
def preferring(**preferences) -> Iterator[None]:
    """Plan extensions with preferences beside the tile size that they choose."""
    original = extend.make_plan

    def make(workload, limits, rates, chosen, digest):
        return original(workload, limits, rates, replace(chosen, **preferences), digest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extend, "make_plan", make)
        yield


def begin(out: Path, job: ooc_ntk.Job, tile: int = TILE, **preferences) -> ooc_ntk.Kernel:
    """A finished run."""
    chosen = ooc_ntk.Preferences(tile_samples=tile, **preferences)
    return ooc_ntk.run(job, out, budget=BUDGET, preferences=chosen, progress=False)


def grow(out: Path, job: ooc_ntk.Job, data: object = None, progress=False, **given) -> ooc_ntk.Kernel:
    data = more() if data is None else data
    return ooc_ntk.extend(out, data, job=job, budget=BUDGET, progress=progress, scheduler="serial", **given)


@contextmanager
def performed() -> Iterator[list[str]]:
    """Keys of the tasks that are computed in the block."""
    keys, original = [], executors.perform

    def perform(context, task, *upstream):
        keys.append(task.key)
        return original(context, task, *upstream)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executors, "perform", perform)
        yield keys


def receipts(out: Path) -> dict:
    manifest = Manifest(out, read_only=True)
    try:
        return manifest.receipts()
    finally:
        manifest.close()


def error(found: np.ndarray, expected: np.ndarray) -> float:
    expected = np.asarray(expected, dtype=np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def bits(kernel: ooc_ntk.Kernel) -> tuple[bytes, bytes]:
    matrix = np.asarray(kernel)
    assert np.isfinite(matrix).all()
    return matrix.tobytes(), kernel.diagonal().tobytes()


def alone(out: Path) -> bool:
    """Whether nothing but the run is left in its folder."""
    return [path.name for path in out.parent.iterdir() if out.name in path.name] == [out.name]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in OFTEN_ENOUGH else name for name in CASES]
)
def test_a_grown_kernel_is_that_of_all_samples(tmp_path, name):
    settings, preferences, test, tile = CASES[name]
    out, job = tmp_path / "run", make_job(test=test, **settings)
    old = begin(out, job, tile, **preferences)
    before, diagonal = np.asarray(old), old.diagonal()
    layers = {layer: np.asarray(old.layer(layer)) for layer in old.layers}
    old_features = None if old.plan.projection is None else old.features.array[:]
    old_heavy = old.features.heavy[:] if old.plan.heavy else None
    span = {key: value for key, value in preferences.items() if key in ("dataflow", "span_columns", "passes")}
    with performed() as keys, preferring(**span):
        kernel = grow(out, job)
    plan = kernel.plan
    assert plan.grown == Grown(TRAIN, test)
    assert (plan.train_samples, plan.test_samples) == (TRAIN + MORE, test)
    assert (plan.dataflow, len(plan.passes)) == (old.plan.dataflow, len(old.plan.passes))
    assert alone(out)

    whole = begin(tmp_path / "whole", make_job(TRAIN + MORE, test, **settings), 10, **preferences)
    tolerance = {"float64": 1e-12, "bf16": 1e-2, "bf16x3": 1e-5}.get(plan.precision, TOLERANCE)
    assert error(np.asarray(kernel), np.asarray(whole)) < tolerance
    assert error(kernel.diagonal(), whole.diagonal()) < tolerance
    for layer in layers:
        assert error(np.asarray(kernel.layer(layer)), np.asarray(whole.layer(layer))) < tolerance

    grid, entries, done = plan.sample_grid, plan.entries_per_sample, receipts(out)
    kept, rows = kept_tiles(grid, plan.grown), kept_rows(grid, plan.grown)
    assert (0, 0) in kept
    assert {row for row in range(grid.row_tiles) if grid.rows(row).start >= grid.train} <= rows
    assert plan.features_only or rows == {i for i, _ in kept}
    shift = {True: MORE, False: 0}
    matrix = np.asarray(kernel)
    for i, j in () if plan.features_only else kept:
        here, columns = grid.rows(i), grid.columns(j)
        moved = shift[here.start >= grid.train]
        new = matrix[here.start * entries : here.stop * entries, columns.start * entries : columns.stop * entries]
        there = slice((here.start - moved) * entries, (here.stop - moved) * entries)
        was = before[there, columns.start * entries : columns.stop * entries]
        assert new.tobytes() == was.tobytes()
        if grid.is_train(i):
            mirrored = matrix[
                columns.start * entries : columns.stop * entries, here.start * entries : here.stop * entries
            ]
            assert mirrored.tobytes() == new.T.copy().tobytes()
        if i == j:
            assert (kernel.diagonal()[there] == diagonal[there]).all()
        for layer, values in layers.items():
            part = np.asarray(kernel.layer(layer))[here.start : here.stop, columns.start : columns.stop]
            assert (part == values[here.start - moved : here.stop - moved, columns.start : columns.stop]).all()
    copied = {key for key, receipt in done.items() if "copy" in receipt.phases}
    last = len(plan.passes) - 1
    wanted = set() if plan.features_only else {f"kernel-{last}-{i}-{j}" for i, j in kept}
    computed = {f"kernel-{g}-{i}-{j}" for g in range(last + 1) for i, j in kept} & set(keys)
    assert computed == set()
    assert {f"kernel-{g}-{i}-{j}" for g in range(last + 1) for i, j in kept} <= set(done) or plan.features_only
    if plan.projection is not None:
        derived = {int(key.split("-")[2]) for key in keys if key.startswith("rows")}
        assert derived == set(range(grid.row_tiles)) - rows
        wanted |= {f"rows-0-{row}-0" for row in rows}
        new_features = kernel.features.array[:]
        first = TRAIN // plan.tile_samples * plan.tile_samples * plan.rows_per_sample
        assert new_features[:first].tobytes() == old_features[:first].tobytes()
        assert plan.heavy == old.plan.heavy
        if plan.heavy:
            assert (kernel.features.heavy[:first] == old_heavy[:first]).all()
            assert error(kernel.errors(), whole.errors()) < 1e3 * tolerance
    assert copied == wanted
    assert ooc_ntk.verify(out, job.extend(more())).passed


@pytest.mark.parametrize("name", [pytest.param("factored", marks=pytest.mark.slow), "cosine", "projected"])
def test_extending_twice_keeps_what_the_first_computed(tmp_path, name):
    settings, preferences, test, tile = CASES[name]
    out, job = tmp_path / "run", make_job(test=test, **settings)
    begin(out, job, tile, **preferences)
    once = grow(out, job)
    digests = [ooc_ntk.info(out).history[0]["plan"], once.plan.digest]
    first = np.asarray(once)
    longer = job.extend(more())
    kernel = grow(out, longer, more(TRAIN + MORE))
    whole = begin(tmp_path / "whole", make_job(EVERY, test, **settings), tile, **preferences)
    assert kernel.shape == (EVERY + test, EVERY)
    assert error(np.asarray(kernel), np.asarray(whole)) < TOLERANCE
    whole_tiles = (TRAIN + MORE) // kernel.plan.tile_samples * kernel.plan.tile_samples
    assert (np.asarray(kernel)[:whole_tiles, :whole_tiles] == first[:whole_tiles, :whole_tiles]).all()
    assert [entry["plan"] for entry in ooc_ntk.info(out).history] == digests
    assert ooc_ntk.verify(out, longer.extend(more(TRAIN + MORE))).passed


def test_provenance_is_kept_and_shown(tmp_path):
    out, job = tmp_path / "run", make_job()
    old = begin(out, job)
    ooc_ntk.verify(out, job)
    digests = ooc_ntk.info(out).job_digests
    kernel = grow(out, job)
    info = ooc_ntk.info(out)
    (entry,) = info.history
    assert entry["plan"] == old.plan.digest
    assert entry["job"] == digests != info.job_digests
    assert (entry["train_samples"], entry["test_samples"]) == (TRAIN, TEST)
    assert entry["versions"]["torch"] == torch.__version__
    assert zarr.open_array(out / "kernel.zarr", mode="r").attrs["history"] == info.history
    assert json.loads(info.to_json())["history"] == info.history
    assert info.audited is None
    assert kernel.plan.digest != replace(kernel.plan, grown=None).digest
    assert ooc_ntk.Plan.from_json(kernel.plan.to_json()) == kernel.plan
    assert any("kernel tiles are copied" in note for note in kernel.plan.notes)


def test_specs_grow_without_a_job_and_resume_as_one(tmp_path):
    out = tmp_path / "run"
    job = ooc_ntk.Job("mlp,width=12", "digits[0:40]", test="digits[90:99]", device="cpu")
    begin(out, job)
    kernel = ooc_ntk.extend(out, "digits[40:53] + digits[0:2]", budget=BUDGET, progress=False)
    assert kernel.shape == (64, 55)
    assert (kernel[53:55, :] == kernel[0:2, :]).mean() > 0  # the same samples again
    assert error(kernel[53:55, :], kernel[0:2, :]) < TOLERANCE
    assert ooc_ntk.verify(out).passed
    with performed() as keys:
        again = ooc_ntk.run(job.extend("digits[40:53]").extend("digits[0:2]"), out, progress=False)
    assert keys == []
    assert bits(again) == bits(kernel)


def test_typing_it_again_does_nothing(tmp_path):
    out, job = tmp_path / "run", make_job()
    begin(out, job)
    expected, said = bits(grow(out, job)), []
    with performed() as keys:
        for given in (job, job.extend(more())):  # the job as it was, and as it is
            assert bits(grow(out, given, progress=Observer(say=said.append))) == expected
    assert keys == []
    assert said == ["nothing to do: these samples were appended last"] * 2


def test_the_weights_of_a_live_model_move_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n\n\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Tanh(), "
        "nn.Linear(5, 3))\n"
    )
    out = tmp_path / "run"
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 3))
    begin(out, ooc_ntk.Job(model, "digits[0:40]", device="cpu"))
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="give the model"):
        ooc_ntk.extend(out, "digits[40:50]", progress=False)
    named = ooc_ntk.api.describe_job(None, {"model": "nets.py:net"}, run=out)[0]
    for first, job in ((40, named), (50, None)):  # the second time its weights are those that the first has kept
        ooc_ntk.extend(out, f"digits[{first}:{first + 10}]", job=job, budget=BUDGET, progress=False)
        assert f'weights = "{out / "weights.safetensors"}"' in (out / "job.toml").read_text()
        assert ooc_ntk.verify(out).passed
    assert (out / "notes.txt").read_text() == "mine"


def test_a_damaged_tile_of_the_old_run_is_computed_anew(tmp_path):
    out, job = tmp_path / "run", make_job()
    begin(out, job, dataflow="resident")
    path = out / "kernel.zarr" / "c" / "1" / "0"
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    with performed() as keys:
        kernel = grow(out, job)
    assert "kernel-0-1-0" in keys
    assert "kernel-0-2-0" not in keys
    assert error(np.asarray(kernel), np.asarray(begin(tmp_path / "whole", make_job(TRAIN + MORE)))) < TOLERANCE


@pytest.mark.parametrize("name", ["recompute", "projected"])
def test_a_damaged_kept_tile_is_computed_by_an_ordinary_resume(tmp_path, name):
    settings, preferences, test, tile = CASES[name]
    out, job = tmp_path / "run", make_job(test=test, **settings)
    begin(out, job, tile, **preferences)
    with preferring(**preferences):
        kernel = grow(out, job)
    before = np.asarray(kernel)
    (out / "kernel.zarr" / "c" / "1" / "0").unlink()
    if name == "projected":
        (out / "features.zarr" / "c" / "0" / "0").unlink()
    with performed() as keys:
        again = ooc_ntk.run(job.extend(more()), out, progress=False)
    assert f"kernel-{len(kernel.plan.passes) - 1}-1-0" in keys
    assert "kernel-0-2-0" not in keys
    assert error(np.asarray(again), before) < TOLERANCE


class Crash(BaseException):
    """Stands for the process dying: no handler of the engine may swallow it."""


@pytest.fixture(scope="module")
def begun(memory_folder) -> Callable[[str], tuple[Path, ooc_ntk.Job, ooc_ntk.Plan, tuple[bytes, bytes]]]:
    """``begun(case)``: a finished run, its job, the plan of its extension, and the bits that this gives undisturbed."""
    made: dict[str, tuple] = {}

    def of(name: str):
        if name not in made:
            settings, preferences, test, tile = CASES[name]
            job = make_job(test=test, **settings)
            out = memory_folder / f"begun {name}" / "run"
            begin(out, job, tile, **preferences)
            other = memory_folder / f"grown {name}" / "run"
            shutil.copytree(out, other)
            span = {key: value for key, value in preferences.items() if key != "layer_rules"}
            with preferring(**span):
                kernel = grow(other, job)
            made[name] = out, job, kernel.plan, bits(kernel)
        return made[name]

    return of


@contextmanager
def planned(plan: ooc_ntk.Plan) -> Iterator[None]:
    """Have an extension follow a plan, as its measurements differ from one to the next."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extend, "_grown_plan", lambda *given: plan)
        yield


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("recompute", 0.5),
        ("projected", 0.5),
        *(
            pytest.param(name, share, marks=pytest.mark.slow)
            for name in ("trace", "factored", "layer", "recompute", "projected")
            for share in (0.1, 0.9)
        ),
    ],
)
def test_a_kill_while_it_computes_leaves_the_old_kernel(begun, tmp_path, name, share):
    source, job, plan, expected = begun(name)
    out = tmp_path / "run"
    shutil.copytree(source, out)
    before = bits(ooc_ntk.open(out))
    amounts = []
    calls = itertools.count()
    with planned(plan):
        shutil.copytree(source, tmp_path / "counted")
        grow(tmp_path / "counted", job, progress=Observer(advance=lambda phase, amount: amounts.append(amount)))
        stop = int(share * len(amounts))

        def advance(phase, amount):
            if next(calls) == stop:
                raise Crash

        with pytest.raises(Crash):
            grow(out, job, progress=Observer(advance=advance))
        assert bits(ooc_ntk.open(out)) == before
        assert ooc_ntk.run(job, out, progress=False).shape[1] == TRAIN * ooc_ntk.open(out).plan.entries_per_sample
        finished = set(receipts(out.with_name(".run.next")))
        with performed() as keys:
            kernel = grow(out, job)
    kernels = {key for key in finished if key.startswith("kernel")}
    assert kernels
    assert kernels.isdisjoint(keys)
    assert bits(kernel) == expected
    assert alone(out)


@pytest.mark.parametrize("name", ["recompute", "projected"])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    "number", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(5, marks=pytest.mark.slow)]
)
def test_a_kill_while_it_copies_copies_nothing_twice(begun, tmp_path, name, before, number):
    source, job, plan, expected = begun(name)
    out = tmp_path / "run"
    shutil.copytree(source, out)
    original, calls, committed = Manifest.commit, itertools.count(), []

    def commit(self, receipt):
        dying = next(calls) == number
        if dying and before:
            raise Crash
        original(self, receipt)
        committed.append(receipt.key)
        if dying:
            raise Crash

    with planned(plan), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Manifest, "commit", commit)
        with pytest.raises(Crash):
            grow(out, job)
        kernel = grow(out, job)
    last = {key for key in committed if key.startswith(f"kernel-{len(plan.passes) - 1}")}
    assert len(last) == sum(key in last for key in committed)
    assert bits(kernel) == expected
    assert ooc_ntk.verify(out, job.extend(more())).passed


@contextmanager
def dying_in_swap(number: int, *, after: bool, atomic: bool) -> Iterator[list[str]]:
    """Die before or after a step of the swap; yields the names of its steps."""
    steps: list[str] = []
    active: list[bool] = []

    def watched(name: str, original):
        def step(*given, **more_given):
            if not active:
                return original(*given, **more_given)
            steps.append(name)
            dying = len(steps) == number + 1
            if dying and not after:
                raise Crash
            found = original(*given, **more_given)
            if dying:
                raise Crash
            return found

        return step

    def swap_in(places):
        active.append(True)
        try:
            swap.swap_in(places)
        finally:
            active.clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extend, "swap_in", swap_in)
        patch.setattr(swap, "exchange", watched("exchange", swap.exchange if atomic else lambda one, other: False))
        patch.setattr(os, "rename", watched("rename", os.rename))
        patch.setattr(shutil, "rmtree", watched("rmtree", shutil.rmtree))
        patch.setattr(Path, "unlink", watched("unlink", Path.unlink))
        patch.setattr(Path, "rmdir", watched("rmdir", Path.rmdir))
        yield steps


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("atomic", [True, False])
def test_a_kill_at_every_step_of_the_swap(begun, tmp_path, atomic, after):
    source, job, plan, expected = begun("trace")
    before = bits(ooc_ntk.open(source))
    template = tmp_path / "template" / "run"
    shutil.copytree(source, template)
    with planned(plan), dying_in_swap(0, after=False, atomic=atomic), pytest.raises(Crash):
        grow(template, job)
    seen, number = set(), 0
    while True:
        out = tmp_path / str(number) / "run"
        shutil.copytree(template.parent, out.parent)
        with dying_in_swap(number, after=after, atomic=atomic) as steps:
            try:
                grow(out, job)
            except Crash:
                pass
            else:
                break
        try:
            now = bits(ooc_ntk.open(out))
        except StorageError:
            now = None
            for act in (ooc_ntk.open, ooc_ntk.info, lambda folder: ooc_ntk.run(job, folder, progress=False)):
                with pytest.raises(StorageError, match="cut off while it was swapped in; type the same"):
                    act(out)
            assert not out.exists()
        assert now in (before, expected, None)
        seen.add(now)
        with performed() as keys:
            assert bits(grow(out, job)) == expected
        assert keys == []
        assert alone(out)
        number += 1
    assert number == len(steps) > 8
    assert seen == (({expected} if after else {before, expected}) if atomic else {before, expected, None})


def test_a_cut_off_swap_is_completed_by_text_as_well(tmp_path):
    out = tmp_path / "run"
    begin(out, ooc_ntk.Job("mlp,width=12", "digits[0:40]", device="cpu"))
    with dying_in_swap(1, after=True, atomic=False), pytest.raises(Crash):
        ooc_ntk.extend(out, "digits[40:50]", budget=BUDGET, progress=False)
    assert not out.exists()
    assert ooc_ntk.extend(out, "digits[40:50]", budget=BUDGET, progress=False).shape == (50, 50)
    assert alone(out)


def test_a_stop_is_a_stop(tmp_path):
    out, job = tmp_path / "run", make_job()
    begin(out, job)

    def stop(phase, amount):
        raise KeyboardInterrupt

    with pytest.raises(RunInterrupted, match="the same command goes on"):
        grow(out, job, progress=Observer(advance=stop))
    assert grow(out, job).shape == (TRAIN + MORE + TEST, TRAIN + MORE)


def test_another_extension_that_is_unfinished_is_in_the_way(tmp_path):
    out, job = tmp_path / "run", make_job()
    begin(out, job)

    def crash(phase, amount):
        raise Crash

    with pytest.raises(Crash):
        grow(out, job, progress=Observer(advance=crash))
    with pytest.raises(
        RunConflictError, match=r"to 53 train samples, was begun in .*\.run\.next; type its command again"
    ):
        grow(out, job, more(TRAIN, 3))
    info = ooc_ntk.info(out)
    assert info.finished
    assert info.extension is not None
    samples, done, tiles = info.extension
    assert (samples, json.loads(info.to_json())["extension"]["kernel_tiles"]) == (53, [done, tiles])
    assert 0 <= done < tiles
    assert ("extension", f"to 53 train samples, {done} of {tiles} kernel tiles, not finished") in [
        (name, value.partition(":")[0]) for name, value in provenance(info)
    ]
    shutil.rmtree(out.with_name(".run.next"))
    assert grow(out, job, more(TRAIN, 3)).shape == (TRAIN + 3 + TEST, TRAIN + 3)
    assert ooc_ntk.info(out).extension is None


def test_both_generations_are_locked(tmp_path):
    out, job = tmp_path / "run", make_job()
    begin(out, job)
    tried = []

    def try_others(phase, amount):
        if not tried:
            for folder in (out, out.with_name(".run.next")):
                with pytest.raises(RunLockedError), RunDirectory(folder).locked():
                    pass
            with pytest.raises(RunLockedError):
                grow(out, job)
            tried.append(True)

    grow(out, job, progress=Observer(advance=try_others))
    assert tried


def test_folders_of_others_are_left_alone(tmp_path):
    out, job = tmp_path / "run", make_job()
    begin(out, job)
    for name in (".run.next", ".run.previous"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
        with pytest.raises(RunConflictError, match="move"):
            grow(out, job)
        assert (tmp_path / name / "mine.txt").read_text() == "mine"
        shutil.rmtree(tmp_path / name)
    assert grow(out, job).shape[1] == TRAIN + MORE


def test_bad_input_is_refused_before_anything_is_written(tmp_path):
    out, job = tmp_path / "run", make_job()
    begin(out, job)
    before = bits(ooc_ntk.open(out))
    for data, problem in (
        (None, "no samples to append"),
        (torch.zeros(0, 8), "empty"),
        (torch.zeros(3, 7), "do not join: input 0 of a sample has shape"),
        ((torch.zeros(3, 8), torch.zeros(3)), "has targets"),
        ("CIFAR-10_0_2500_0_1000", "names test data as well"),
        ("digits[0:3]", "do not join"),
    ):
        with pytest.raises(InputError, match=problem):
            ooc_ntk.extend(out, data, job=job, budget=BUDGET, progress=False)
    with pytest.raises(RunConflictError, match="another job: model .* differ; only the same model"):
        grow(out, make_job(model=make_model(5)))
    with pytest.raises(RunConflictError, match="another job: data"):
        grow(out, make_job(test=TEST - 1))
    with pytest.raises(RunConflictError, match="another job: kernel settings"):
        grow(out, make_job(scale="mean"))
    with pytest.raises(InputError, match="made from live Python data"):
        ooc_ntk.extend(out, more(), progress=False)
    with pytest.raises(BudgetError, match=r"for the run as it is .* and for the next one .* at once.* raise --disk"):
        ooc_ntk.extend(out, more(), job=job, budget=ooc_ntk.Budget(disk="20KiB"), progress=False)
    with pytest.raises(BudgetError, match="host memory"):
        ooc_ntk.extend(out, more(), job=job, budget=ooc_ntk.Budget(host="1MiB"), progress=False)
    with pytest.raises(StorageError, match="holds no run"):
        grow(tmp_path / "nothing", job)
    assert not (tmp_path / "nothing").exists()
    assert bits(ooc_ntk.open(out)) == before
    assert alone(out)


def test_an_unfinished_run_and_checkpoints_are_refused(tmp_path):
    job = make_job()

    def crash(phase, amount):
        raise Crash

    with pytest.raises(Crash):
        ooc_ntk.run(job, tmp_path / "run", budget=BUDGET, progress=Observer(advance=crash))
    with pytest.raises(IncompleteRunError, match="not finished"):
        grow(tmp_path / "run", job)
    several = tmp_path / "several"
    states = [make_model(seed).state_dict() for seed in (1, 2)]
    ooc_ntk.run_checkpoints(job, several, states, budget=BUDGET, progress=False)
    with pytest.raises(InputError, match=r"several checkpoints, .*extend each"):
        grow(several, job)


def test_outputs_made_of_the_train_samples_cannot_be_kept(tmp_path):
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.text = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x):
            return self.image(x), self.text(x)

    out, job = tmp_path / "run", make_job(model=Pair(), outputs="clip")
    begin(out, job)
    with pytest.raises(InputError, match="made of the train samples"):
        grow(out, job)


def test_a_dim_chosen_for_an_error_is_kept(tmp_path):
    projection = ooc_ntk.Projection("gaussian", target_error=0.5)
    out, job = tmp_path / "run", make_job(projection=projection)
    old = begin(out, job)
    kernel = grow(out, job)
    assert kernel.plan.projection == old.plan.projection
    assert ooc_ntk.run(job.extend(more()), out, progress=False).plan.digest == kernel.plan.digest


def test_tiles_too_large_for_the_budget_are_cut_into_equal_parts(tmp_path):
    out, job = tmp_path / "run", make_job()
    begin(out, job, 20)
    refused = []
    original = extend.make_plan

    def make(workload, limits, rates, chosen, digest):
        if chosen.tile_samples > 7:
            refused.append(chosen.tile_samples)
            raise BudgetError("too large")
        return original(workload, limits, rates, chosen, digest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extend, "make_plan", make)
        kernel = grow(out, job)
    assert refused == [20, 10]
    assert kernel.plan.tile_samples == 6
    assert calibration.cached_rates("cpu").measured
