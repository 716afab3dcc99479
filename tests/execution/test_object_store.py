"""Runs whose tiles and kernel are in a store: the same bits as beside them, under stops, damage and wrong input."""

from __future__ import annotations

import functools
import gc
import io
import json
import logging
import os
import pickle
import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from rich.console import Console
from torch import nn

import ooc_ntk
from ooc_ntk.errors import InputError, OocNtkError, RunConflictError, StorageError, TransientStorageError
from ooc_ntk.execution import driver, session, sums, work
from ooc_ntk.execution.driver import Observer
from ooc_ntk.planning.scratch import STORE_BYTES, scratch_bytes
from ooc_ntk.report.tables import info_table
from ooc_ntk.storage import retries
from ooc_ntk.storage.directory import RunDirectory
from ooc_ntk.storage.diskrate import DiskRates
from ooc_ntk.storage.manifest import Manifest
from tests.rates import RATES
from tests.s3 import BUCKET, KEY, SECRET, TOKEN, answering, environment, set_environment

obstore = pytest.importorskip("obstore")
objects = pytest.importorskip("ooc_ntk.storage.objects")

pytestmark = pytest.mark.usefixtures("one_thread", "frozen")

TRAIN, TEST, TILE = 24, 5, 6
BUDGET = ooc_ntk.Budget("16GiB", disk="1GiB")


@pytest.fixture
def tmp_path(memory_path):
    return memory_path


@pytest.fixture
def prefix(request):
    return f"runs/{request.node.name.translate(str.maketrans('[]', '--'))}"


@pytest.fixture
def url(s3, prefix):
    return f"s3://{BUCKET}/{prefix}"


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3))


def samples(count: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


def make_job(**changes) -> ooc_ntk.Job:
    given = {"model": make_model(), "train": samples(TRAIN), "test": samples(TEST, 2), "device": "cpu"}
    return ooc_ntk.Job(**{**given, **changes})


CASES = {
    "spill": ({}, {"dataflow": "spill", "superblock_tiles": 1, "span_columns": 60, "layer_rules": False}),
    "superblocks": ({}, {"dataflow": "spill"}),
    "passes": ({}, {"dataflow": "recompute", "span_columns": 30, "passes": 3, "layer_rules": False}),
    "cosine": ({"normalize": "cosine", "test": None}, {"dataflow": "spill", "superblock_tiles": 1}),
    "full": ({"kernel": "full", "precision": "float64"}, {"dataflow": "resident"}),
    "by layer": ({"by": "layer"}, {"dataflow": "spill"}),
    "projected": ({"projection": ooc_ntk.Projection("sjlt", dim=32, seed=1)}, {"span_columns": 8}),
    "features": ({"projection": ooc_ntk.Projection("rademacher", dim=32)}, {"features_only": True}),
}


@functools.cache
def make_plan(name: str) -> ooc_ntk.Plan:
    job, preferences = CASES[name]
    made = ooc_ntk.plan(
        make_job(**job),
        BUDGET,
        preferences=ooc_ntk.Preferences(tile_samples=TILE, **preferences),
        rates=RATES,
    )
    return replace(made, kept_bytes=0)  # what stays in memory would never be read again


def run(name: str, out: Path, store: str | None = None, progress=False, **more) -> ooc_ntk.Kernel:
    plan = None if (out / "plan.json").exists() else make_plan(name)
    return ooc_ntk.run(make_job(**CASES[name][0]), out, plan=plan, store=store, progress=progress, **more)


def bits(kernel: ooc_ntk.Kernel) -> dict[str, bytes]:
    """Everything that a kernel answers from what is stored."""
    found = {"kernel": np.asarray(kernel).tobytes(), "diagonal": kernel.diagonal().tobytes()}
    for name in kernel.layers:
        found[name] = np.asarray(kernel.layer(name)).tobytes()
    if kernel.plan.projection is not None:
        found["features"] = np.asarray(kernel.features.read(range(len(kernel.features)))).tobytes()
        found["errors"] = kernel.errors([0, 7, 3], [2, 5]).tobytes()
    return found


@functools.cache
def expected(name: str) -> dict[str, bytes]:
    """Bits of a local run."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        found = bits(run(name, Path(folder) / "run", scheduler="serial"))
    assert np.isfinite(np.frombuffer(found["kernel"], make_plan(name).precision.replace("bf16", "float32"))).all()
    return found


# --- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_run_through_a_store_equals_the_local_run(tmp_path, s3, prefix, url, name):
    out = tmp_path / "run"
    kernel = run(name, out, url)
    assert bits(kernel) == expected(name)
    stays = {path.name for path in out.iterdir() if path.name != "tiles"}
    assert stays == {"plan.json", "job.toml", "manifest", "lock", "receipts.jsonl", "weights.safetensors"}
    assert not any((out / "tiles").rglob("*"))
    kept = s3.objects(prefix)
    assert {"manifest", "plan.json", "job.toml", "receipts.jsonl", "weights.safetensors", "run.json"} <= set(kept)
    assert not [path for path in kept if path.startswith(("tiles/", "pending/"))]
    assert s3.unfinished() == 0

    assert bits(ooc_ntk.open(out)) == expected(name)  # from what the run has noted
    aside = tmp_path / "gone"
    out.rename(aside)
    mirrored = ooc_ntk.open(url)
    assert bits(mirrored) == expected(name)
    assert url in repr(mirrored)
    fetched = mirrored.path
    del mirrored
    gc.collect()
    assert not fetched.exists()


@pytest.mark.slow
def test_worker_processes_without_the_run_folder_share_a_store(tmp_path, s3, prefix, url, monkeypatch):
    from ooc_ntk.execution.cluster import executor

    original = executor.Sent.of

    def elsewhere(*given, **more):
        return replace(original(*given, **more), root="/nowhere/run")  # another machine

    monkeypatch.setattr(executor.Sent, "of", elsewhere)
    out = tmp_path / "run"
    kernel = run("cosine", out, url, scheduler=ooc_ntk.Cluster(workers=2), proof=False)
    assert bits(kernel) == expected("cosine")
    assert {"0", "1"} == {
        json.loads(line)["worker"]
        for line in (out / "receipts.jsonl").read_text().splitlines()
        if "release" not in line
    }


def test_a_shared_folder_is_a_store(tmp_path):
    out, shared = tmp_path / "run", tmp_path / "shared folder"
    assert bits(run("passes", out, f"file://{shared}")) == expected("passes")
    assert not (out / "kernel.zarr").exists()
    assert (shared / "kernel.zarr" / "c" / "0" / "0").exists()
    assert {"manifest", "plan.json", "run.json"} <= {path.name for path in shared.iterdir()}
    shutil.rmtree(out)
    assert bits(ooc_ntk.open(f"file://{shared}")) == expected("passes")
    with pytest.raises(RunConflictError, match="both run directory and store"):
        run("passes", tmp_path / "same", f"file://{tmp_path / 'same'}")


def test_the_kernel_answers_from_its_store(tmp_path, url):
    local, out = run("spill", tmp_path / "local"), tmp_path / "run"
    run("spill", out, url)
    targets = np.random.default_rng(0).normal(size=(TRAIN, 2))
    for kernel in (ooc_ntk.open(out), ooc_ntk.open(url)):
        assert np.array_equal(kernel.matmat(targets), local.matmat(targets))
        assert np.array_equal(
            kernel.solve(targets, ridge=1.0).coefficients, local.solve(targets, ridge=1.0).coefficients
        )
        assert np.array_equal(kernel.nearest(k=3).indices, local.nearest(k=3).indices)
        assert np.array_equal(kernel[[3, 1, 20], :][:, [2, 2, 7]], np.asarray(local)[[3, 1, 20]][:, [2, 2, 7]])
        assert np.array_equal(kernel.dask().compute(scheduler="sync"), np.asarray(local))
        assert np.array_equal(kernel.entries.rows(np.array([28, 0, 28])), local.entries.rows(np.array([28, 0, 28])))
        assert np.array_equal(pickle.loads(pickle.dumps(kernel.zarr))[:], np.asarray(local))
    assert ooc_ntk.verify(out, make_job()).passed
    assert ooc_ntk.verify(url, make_job(), samples=2).passed
    with pytest.raises(InputError, match="written into a run directory, and s3://.* is a store"):
        ooc_ntk.fit(url, targets, ridge=1.0)
    found = ooc_ntk.info(out)
    assert found.finished
    assert found.store == url
    shown = Console(file=io.StringIO(), width=200)
    shown.print(info_table(found))
    assert f"{url}, which has tiles and kernel" in shown.file.getvalue()
    assert json.loads(found.to_json())["store"] == url
    fitted = ooc_ntk.fit(out, targets, ridge=1.0)
    assert np.array_equal(
        fitted.arrays()["coefficients"], ooc_ntk.fit(tmp_path / "local", targets, ridge=1.0).arrays()["coefficients"]
    )


def test_scores_go_where_they_are_told(tmp_path, url):
    kernel = run("projected", tmp_path / "run", url)
    assert ooc_ntk.open_features(url).features.dim == 32
    scores = np.asarray(kernel.attribution(1.0))
    assert (tmp_path / "run" / "attribution.zarr").is_dir()
    mirrored = ooc_ntk.open(url)
    with pytest.raises(InputError, match="say where they go: out="):
        mirrored.attribution(1.0)
    assert np.array_equal(mirrored.attribution(1.0, out=tmp_path / "scores")[:], scores)


def test_others_read_the_kernel(tmp_path, url, prefix):
    wanted = np.asarray(run("superblocks", tmp_path / "run", url))
    http = {"allow_http": True}
    plain = zarr.storage.ObjectStore(obstore.store.S3Store.from_url(url, client_options=http), read_only=True)
    assert np.array_equal(zarr.open_array(plain, path="kernel.zarr", mode="r")[:], wanted)
    assert zarr.open_array(plain, path="kernel.zarr", mode="r").attrs["plan_digest"] == make_plan("superblocks").digest
    fsspec_store = pytest.importorskip("obstore.fsspec").FsspecStore("s3", client_options=http, asynchronous=True)
    plain = zarr.storage.FsspecStore(fsspec_store, path=f"{BUCKET}/{prefix}", read_only=True)
    assert np.array_equal(zarr.open_array(plain, path="kernel.zarr", mode="r")[:], wanted)


@pytest.mark.parametrize("name", ["spill", "passes", "projected"])
def test_scratch_files_stay_below_what_is_said(tmp_path, url, monkeypatch, name):
    held, peak = {}, [0]
    append, discard = objects.StagedObject.append, objects.StagedObject.discard

    def appending(self, data):
        append(self, data)
        held[self] = self.size
        peak[0] = max(peak[0], sum(held.values()))

    monkeypatch.setattr(objects.StagedObject, "append", appending)
    monkeypatch.setattr(objects.StagedObject, "discard", lambda self: (held.pop(self, None), discard(self))[1])
    run(name, tmp_path / "run", url)
    papers = max(path.stat().st_size for path in (tmp_path / "run").iterdir() if path.is_file())
    assert not held
    assert 0 < peak[0] <= max(scratch_bytes(make_plan(name)), papers)


def test_the_plan_counts_what_a_store_takes(tmp_path, url):
    rates = RATES
    given = {"preferences": ooc_ntk.Preferences(dataflow="spill", tile_samples=TILE), "rates": rates, "out": tmp_path}
    local, stored, shared = (
        ooc_ntk.plan(make_job(), **given, store=store) for store in (None, url, f"file://{tmp_path / 'shared'}")
    )
    assert stored.promised.host_bytes - local.promised.host_bytes > STORE_BYTES / 2
    assert shared.promised.host_bytes - local.promised.host_bytes < STORE_BYTES / 2
    assert stored.limits.disk > 2**50 > local.limits.disk  # no bucket says how full it is
    assert stored.digest == local.digest


@pytest.mark.parametrize("name", ["superblocks", "passes", "projected"])
def test_task_bodies_need_no_run_directory(tmp_path, url, monkeypatch, name):
    """Tasks as a worker on another machine performs them, sums on its disk included: by plan, path and URL alone."""
    monkeypatch.setattr(sums, "FOLDED_SPANS", 1)
    monkeypatch.setattr(sums, "SAVED_SECONDS", 0.0)
    monkeypatch.setattr(sums, "SAVED_SHARE", 0.0)
    job, made, there = make_job(**CASES[name][0]), driver.RunContext, []
    given = {"plan": replace(make_plan(name), saves_sums=True), "progress": False}
    wanted = bits(ooc_ntk.run(job, tmp_path / "local", **given))

    def elsewhere(plan, directory, *more):
        there.append(RunDirectory(tmp_path / "not here", directory.store))
        return made(plan, there[-1], *more)

    monkeypatch.setattr(driver, "RunContext", elsewhere)
    assert bits(ooc_ntk.run(job, tmp_path / "run", store=url, **given)) == wanted
    (away,) = there
    assert not away.root.exists()
    assert away.local != away.root
    assert not list(away.local.rglob("*.tmp-*"))


def test_a_plan_counts_with_what_the_store_was_seen_to_do(tmp_path, url, s3, prefix, monkeypatch):
    slow = DiskRates(write=1e3, read=1e3, commit_seconds=1.0, direct_wins=False)
    given = {"preferences": ooc_ntk.Preferences(dataflow="spill", tile_samples=TILE), "out": tmp_path}
    local = ooc_ntk.plan(make_job(), **given)
    found = ooc_ntk.plan(make_job(), **given, store=url)
    assert s3.objects(prefix) == {}
    monkeypatch.setattr(session, "measure_store", lambda files: slow)
    stored = ooc_ntk.plan(make_job(), **given, store=url)
    assert found.digest == local.digest == stored.digest
    assert stored.promised.seconds > 5 > found.promised.seconds


# --- stops -----------------------------------------------------------------------------------------------------------


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


@contextmanager
def watching(monkeypatch):
    performed, begun, original = [], [], work.publish

    def publish(context, task, *more):
        performed.append(task.key)
        return original(context, task, *more)

    with monkeypatch.context() as patch:
        patch.setattr(work, "publish", publish)
        yield performed, begun, Observer(begin=lambda totals, remaining: begun.append(remaining))


@pytest.mark.parametrize(
    ("name", "key", "before"),
    [
        ("spill", "rows-0-2-0", True),
        ("spill", "kernel-0-3-1", False),
        ("passes", "kernel-1-2-2", True),
        ("passes", "release-1-0-0", True),
        ("passes", "release-1-0-0", False),
        ("projected", "kernel-0-0-0", True),
    ],
)
def test_a_run_that_died_goes_on(tmp_path, url, monkeypatch, name, key, before):
    out, wanted = tmp_path / "run", expected(name)
    with crash_at_commit(key, before=before):
        run(name, out, url)
    with watching(monkeypatch) as (performed, begun, observer):
        assert bits(run(name, out, progress=observer)) == wanted  # the run knows its store
    written = not key.startswith("release")
    assert begun[0].adopted == ([key] if before and written else [])
    assert key not in performed or (before and not written)


def test_what_was_not_committed_and_is_not_whole_is_done_again(tmp_path, s3, prefix, url, monkeypatch):
    out, wanted = tmp_path / "run", expected("spill")
    with crash_at_commit("kernel-0-2-1", before=True):
        run("spill", out, url)
    (receipt,) = (path for path in s3.objects(prefix) if path.startswith("pending/"))
    path = json.loads(s3.objects(prefix)[receipt])["files"][0]["path"]
    s3.put(f"{prefix}/{path}", s3.objects(prefix)[path][::-1])
    with watching(monkeypatch) as (performed, begun, observer):
        assert bits(run("spill", out, progress=observer)) == wanted
    assert begun[0].adopted == []
    assert "kernel-0-2-1" in performed


DAMAGE = {
    "deleted": lambda s3, key, data: s3.delete(key),
    "altered": lambda s3, key, data: s3.put(key, data[:-1] + bytes([data[-1] ^ 1])),
    "truncated": lambda s3, key, data: s3.put(key, data[:-1]),
}


@pytest.mark.parametrize(
    ("damage", "file"),
    [("deleted", "kernel.zarr/c/2/1"), ("altered", "diagonal/c/1"), ("truncated", "diagonal/c/4")],
)
def test_a_damaged_object_of_a_finished_run_is_computed_again(tmp_path, s3, prefix, url, caplog, file, damage):
    out = tmp_path / "run"
    run("spill", out, url)
    whole = s3.objects(prefix)[file]
    DAMAGE[damage](s3, f"{prefix}/{file}", whole)
    checks = ooc_ntk.verify(out, samples=0).checks
    assert not checks[0].passed
    assert file in checks[0].detail
    caplog.set_level(logging.WARNING)
    assert bits(run("spill", out)) == expected("spill")
    assert f"{url}/{file}" in caplog.text
    assert s3.objects(prefix)[file] == whole
    assert ooc_ntk.verify(out, samples=0).passed


def test_an_object_that_is_damaged_in_the_middle_is_computed_again(tmp_path, s3, prefix, url, monkeypatch):
    original, done = Manifest.commit, []

    def commit(self, receipt):
        original(self, receipt)
        if receipt.key == "rows-0-3-0" and not done:
            path = receipt.files[0].path
            done.append(path)
            s3.put(f"{prefix}/{path}", b"x" * receipt.files[0].size)

    monkeypatch.setattr(Manifest, "commit", commit)
    assert bits(run("spill", tmp_path / "run", url)) == expected("spill")
    assert done


def test_the_store_has_the_papers_after_every_pass(tmp_path, s3, prefix, url):
    """What is copied at the end of a pass is a whole database that knows the pass."""
    with crash_at_commit("rows-1-0-0", before=False):
        run("passes", tmp_path / "run", url)
    copy = tmp_path / "copy"
    copy.write_bytes(s3.objects(prefix)["manifest"])
    database = sqlite3.connect(copy)
    keys = {key for (key,) in database.execute("SELECT key FROM tasks")}
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()
    assert {"release-0-0-0", "rows-0-0-0", "kernel-0-3-3"} <= keys
    assert not any(key.startswith("rows-1") for key in keys)
    with pytest.raises(StorageError, match=rf"the run in {url} is not finished"):
        ooc_ntk.open(url)


def test_a_store_that_goes_away_stops_the_run_and_it_goes_on(tmp_path, url, s3, monkeypatch):
    monkeypatch.setattr(retries, "CALL_DELAYS", (0.0,))
    monkeypatch.setattr(retries, "TASK_DELAYS", (0.0, 0.0))
    out, original, wanted = tmp_path / "run", Manifest.commit, expected("spill")
    get, put, down = objects.obstore.get_range, objects.obstore.put, []

    def failing(work):
        def call(*arguments, **more):
            if down:
                raise objects.BaseError("Generic S3 error: error sending request")
            return work(*arguments, **more)

        return call

    def commit(self, receipt):
        original(self, receipt)
        if receipt.key == "kernel-0-1-1":
            down.append(True)

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "commit", commit)
        patch.setattr(objects.obstore, "get_range", failing(get))
        patch.setattr(objects.obstore, "put", failing(put))
        with pytest.raises(TransientStorageError, match=r"127\.0\.0\.1:\d+ cannot be reached"):
            run("spill", out, url)
    with watching(monkeypatch) as (performed, _, observer):
        assert bits(run("spill", out, progress=observer)) == wanted
    assert "kernel-0-1-1" not in performed


# --- whose store it is -----------------------------------------------------------------------------------------------


def test_a_run_has_one_store(tmp_path, url, s3, prefix):
    out, local = tmp_path / "run", tmp_path / "local"
    run("superblocks", out, url)
    run("superblocks", local)
    before = s3.objects(prefix)
    with pytest.raises(RunConflictError, match=rf"are in {url}, and --store asks for {url}-other; leave --store out"):
        run("superblocks", out, url + "-other")
    with pytest.raises(RunConflictError, match="whose tiles are in it, and --store asks for"):
        run("superblocks", local, url + "-other")
    with pytest.raises(RunConflictError, match=r"holds the tiles of another run \(.*/run on .*\); go on with that one"):
        run("superblocks", tmp_path / "third", url)
    assert s3.objects(prefix) == before
    assert s3.objects(prefix + "-other") == {}
    assert bits(run("superblocks", out, url + "/")) == expected("superblocks")


def test_a_prefix_with_other_files_is_refused(tmp_path, url, s3, prefix):
    s3.put(f"{prefix}/thesis.tex", b"text")
    with pytest.raises(RunConflictError, match=r"holds other files \(thesis.tex\) and no run; choose an empty prefix"):
        run("superblocks", tmp_path / "run", url)
    assert s3.objects(prefix) == {"thesis.tex": b"text"}
    with pytest.raises(StorageError, match="holds no finished run: there is no plan.json in it"):
        ooc_ntk.open(url)


def test_a_run_whose_planning_was_cut_off_keeps_its_store(tmp_path, url, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(driver, "versions", lambda: (_ for _ in ()).throw(Crash))
        with pytest.raises(Crash):
            run("superblocks", tmp_path / "run", url)
    assert not (tmp_path / "run" / "plan.json").exists()
    assert bits(run("superblocks", tmp_path / "run", url)) == expected("superblocks")


def test_a_run_that_was_cut_off_before_it_had_a_plan_may_have_another_store(tmp_path, url, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(driver, "versions", lambda: (_ for _ in ()).throw(Crash))
        with pytest.raises(Crash):
            run("superblocks", tmp_path / "run", url)
    assert bits(run("superblocks", tmp_path / "run", url + "-other")) == expected("superblocks")
    assert ooc_ntk.info(tmp_path / "run").store == url + "-other"


def test_what_needs_renames_is_refused(tmp_path, url):
    run("superblocks", tmp_path / "run", url)
    with pytest.raises(InputError, match=r"nothing can be renamed, so it cannot be extended"):
        ooc_ntk.extend(tmp_path / "run", samples(3, 9), job=make_job(), progress=False)


# --- wrong input, and secrets ----------------------------------------------------------------------------------------

NETS = """
import torch


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
"""

ARGUMENTS = ("--model", "nets.py:net", "--train", "digits[0:12]", "--tile-samples", "5")


def check_no_secret(text: str | bytes) -> None:
    for secret in (KEY, SECRET, TOKEN):
        assert (secret.encode() if isinstance(text, bytes) else secret) not in text


@pytest.mark.parametrize(
    ("store", "said"),
    [
        (f"s3://{KEY}:{SECRET}@bucket/a", "carries credentials or options"),
        ("s3://no-such-bucket/a", "there is no bucket 'no-such-bucket'"),
        ("bucket/a", "a store is a URL"),
        ("gs://bucket/a", "got one of gs://"),
    ],
)
def test_a_wrong_store_is_one_line(cli, s3, tmp_path, store, said):
    for more in (("--out", "run"), ("--out", "run", "--plan", "plan.json")):
        if "--plan" in more:
            make_plan("superblocks").save("plan.json")
        found = cli("run", *ARGUMENTS, *more, "--store", store)
        assert found.exit_code == 2
        assert said in " ".join(found.output.split())
        check_no_secret(found.output)
    assert not (tmp_path / "run" / "plan.json").exists()


def test_the_same_command_has_nothing_to_do(cli, s3, prefix, url):
    words = ("run", "digits[0:12]", "mlp,width=4", "--tile-samples", "5", "--out", "run", "--store", url)
    shown = " ".join(cli(*words).output.split())
    assert f"kernel: {url}/kernel.zarr" in shown
    assert f"store {url}: 'disk' above is there; here up to" in shown
    assert "PiB" not in shown
    assert "nothing to do" in cli(*words).output
    s3.delete(f"{prefix}/kernel.zarr/c/0/0")
    assert "nothing to do" not in cli(*words).output
    assert "kernel.zarr/c/0/0" in s3.objects(prefix)


def test_checkpoints_have_no_store(cli, url):
    found = cli("run", *ARGUMENTS, "--weights", "a.pt", "--weights", "b.pt", "--out", "run", "--store", url)
    assert found.exit_code == 2
    assert "leave --store out" in " ".join(found.output.split())


def test_an_endpoint_that_is_down_is_said_before_anything_is_loaded(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(retries, "CALL_DELAYS", (0.0, 0.0))
    set_environment(monkeypatch, environment("http://127.0.0.1:9"))
    began = time.perf_counter()
    found = cli("run", *ARGUMENTS, "--out", "run", "--store", "s3://bucket/a")
    assert found.exit_code == 2
    assert "127.0.0.1:9 cannot be reached" in " ".join(found.output.split())
    assert time.perf_counter() - began < 10
    assert not (tmp_path / "run").exists()


def test_a_key_that_is_refused_is_not_repeated(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    body = f"<Error><Code>InvalidAccessKeyId</Code><AWSAccessKeyId>{KEY}</AWSAccessKeyId></Error>".encode()
    with answering(403, body) as asked:
        set_environment(monkeypatch, environment(asked[0]))
        with pytest.raises(OocNtkError, match=r"access denied \(InvalidAccessKeyId\)") as error:
            run("superblocks", tmp_path / "run", "s3://bucket/a")
    check_no_secret(f"{error.value} {error.value!r} {caplog.text}")
    assert error.value.__cause__ is None
    assert error.value.__context__ is None


def test_secrets_are_nowhere(tmp_path, s3, prefix, url):
    """A whole run by the command line, logging everything, and every file and object that it leaves."""
    (tmp_path / "nets.py").write_text(NETS)
    code = "import logging, sys; logging.basicConfig(level=logging.DEBUG); from ooc_ntk.cli import main; main()"
    settings = {**os.environ, **environment(s3.endpoint), "RUST_LOG": "trace"}

    def command(*words):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], cwd=tmp_path, env=settings, capture_output=True, check=False
        )
        check_no_secret(done.stdout)
        check_no_secret(done.stderr)
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        return done.stdout.decode()

    said = command("run", *ARGUMENTS, "--out", "run", "--store", url)
    assert f"{url}/kernel.zarr" in said
    assert "nothing to do" not in said
    assert "passed" in command("verify", "run")
    for path in tmp_path.rglob("*"):
        if path.is_file():
            check_no_secret(path.read_bytes())
    for data in s3.objects(prefix).values():
        check_no_secret(data)
    assert len(s3.objects(prefix)) > 10
