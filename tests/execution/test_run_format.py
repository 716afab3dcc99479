"""Runs that earlier versions left behind are opened, verified, finished and extended; those of later ones refused."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
import zarr
from typer.testing import CliRunner

import ooc_ntk
from ooc_ntk.cli import app
from ooc_ntk.errors import StorageError
from ooc_ntk.storage.manifest import RUN_FORMAT, Manifest
from tests.data import make

FORMATS = range(1, RUN_FORMAT + 1)

pytestmark = pytest.mark.parametrize("version", FORMATS, ids=lambda version: f"format {version}")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """The same runs, made by today's code."""
    folder = tmp_path_factory.mktemp("fresh")
    make.make(folder)
    return folder


@pytest.fixture
def stored(version, tmp_path):
    """``stored(name)``: a copy of a stored run."""

    def copied(name: str) -> Path:
        return Path(shutil.copytree(make.DATA / f"run-format-{version}" / name, tmp_path / name))

    return copied


def test_a_finished_run(stored, fresh):
    path = stored("finished")
    kernel = ooc_ntk.open(path)
    assert kernel.shape == (30, 24)
    np.testing.assert_allclose(np.asarray(kernel), np.asarray(ooc_ntk.open(fresh / "finished")), rtol=1e-4)
    assert ooc_ntk.info(path).finished
    audit = ooc_ntk.verify(path)
    assert audit.passed
    assert audit.entries > 0
    before = (path / "receipts.jsonl").read_bytes()
    ooc_ntk.run(make.job(), path, progress=False)
    assert (path / "receipts.jsonl").read_bytes() == before, "nothing was left to do"


def test_half_a_run_is_finished(stored, fresh):
    path = stored("half")
    assert not ooc_ntk.info(path).finished
    before = (path / "receipts.jsonl").read_text()
    assert before
    kernel = ooc_ntk.run(make.job(), path, scheduler="serial", progress=False)
    after = (path / "receipts.jsonl").read_text()
    assert after.startswith(before)
    keys = [json.loads(line)["key"] for line in after.splitlines()]
    assert len(keys) == len(set(keys)), "what was finished was not done again"
    np.testing.assert_allclose(np.asarray(kernel), np.asarray(ooc_ntk.open(fresh / "finished")), rtol=1e-4)


def test_a_finished_run_is_extended(stored):
    path = stored("finished")
    before = np.asarray(ooc_ntk.open(path))
    kernel = ooc_ntk.extend(path, "digits[30:36]", scheduler="serial", progress=False)
    assert kernel.shape == (36, 30)
    after = np.asarray(kernel)
    assert np.array_equal(after[:24, :24], before[:24])
    assert np.array_equal(after[30:, :24], before[24:])
    assert ooc_ntk.verify(path).passed


def test_projected_features(stored, fresh):
    path = stored("projected")
    kernel, today = ooc_ntk.open_features(path), ooc_ntk.open(fresh / "projected")
    np.testing.assert_allclose(np.asarray(kernel), np.asarray(today), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(ooc_ntk.open(path).errors(), today.errors(), rtol=1e-3)
    assert ooc_ntk.verify(path).passed


def test_a_run_that_does_not_say_its_format_is_of_the_first(version, stored):
    path = stored("half")
    with manifest_of(path) as database:
        database.execute("DELETE FROM meta WHERE name = 'format'")
    manifest = Manifest(path, read_only=True)
    assert manifest.format == 1
    manifest.close()
    if version == 1:
        assert ooc_ntk.run(make.job(), path, scheduler="serial", progress=False).shape == (30, 24)


@pytest.mark.parametrize(
    "command", [("info",), ("verify",), ("run", "--quiet"), ("extend", "--train", "digits[30:36]", "--quiet")]
)
def test_a_newer_run_is_refused_in_one_line(stored, command):
    path = stored("finished")
    with manifest_of(path) as database:
        database.execute("INSERT OR REPLACE INTO meta VALUES ('format', ?)", (str(RUN_FORMAT + 1),))
    said = rf"made by a newer ooc-ntk \(format {RUN_FORMAT + 1}, this one reads up to {RUN_FORMAT}\); upgrade ooc-ntk"
    with pytest.raises(StorageError, match=said):
        ooc_ntk.open(path)
    name, *rest = command
    place = ["--out", str(path)] if name == "run" else [str(path)]
    if name == "run":
        place += ["--model", "mlp,width=4,classes=2", "--train", "digits[0:24]", "--test", "digits[24:30]"]
    result = CliRunner().invoke(app, [name, *place, *rest])
    assert result.exit_code == 2
    assert "made by a newer ooc-ntk" in " ".join(result.output.split())
    assert "Traceback" not in result.output


@pytest.mark.parametrize("name", ["finished", "half", "projected"])
def test_what_the_format_has_is_still_written_alike(version, fresh, name):
    """Whoever renames, drops or retypes something must raise RUN_FORMAT and store runs of the new format."""
    if version < RUN_FORMAT:
        pytest.skip("of an older format, which is read and no longer written")
    old, new = layout(make.DATA / f"run-format-{version}" / name), layout(fresh / name)
    assert {what: kind for what, kind in old.items() if new.get(what) != kind} == {}


def layout(path: Path) -> dict[str, str]:
    """What a run directory consists of: files, tables, and fields with the types of their values."""
    found = {
        f"file {file.relative_to(path)}": f"{file.stat().st_size} bytes" if "/c/" in file.as_posix() else ""
        for file in path.rglob("*")
        if file.is_file() and file.name != "lock"
    }
    with manifest_of(path) as database:
        found |= {f"table {name}": sql for name, sql in database.execute("SELECT name, sql FROM sqlite_master")}
        found |= {f"note {name}": "" for (name,) in database.execute("SELECT name FROM meta")}
        for (text,) in database.execute("SELECT receipt FROM tasks"):
            found |= fields("receipt", json.loads(text))
    found |= fields("plan", json.loads((path / "plan.json").read_text()))
    for line in (path / "receipts.jsonl").read_text().splitlines():
        found |= fields("receipts.jsonl", json.loads(line))
    found |= {f"job {line.partition(' = ')[0]}": line for line in (path / "job.toml").read_text().splitlines()}
    for array in path.glob("*/zarr.json"):
        found |= fields(f"attributes of {array.parent.name}", zarr.open(array.parent, mode="r").attrs.asdict())
    return found


def fields(what: str, value: object) -> dict[str, str]:
    """Names of fields with their types, numbers alike; of lists the first."""
    if isinstance(value, dict):
        found = {what: "dict"}
        for name, each in value.items():
            found |= fields(f"{what}.{name}", each)
        return found
    if isinstance(value, list):
        return {what: "list"} | (fields(f"{what}[]", value[0]) if value else {})
    return {what: "number" if isinstance(value, int | float) else type(value).__name__}


@contextmanager
def manifest_of(path: Path) -> Iterator[sqlite3.Connection]:
    """The database of a run's manifest, for changes."""
    database = sqlite3.connect(path / "manifest")
    with closing(database), database:
        yield database
