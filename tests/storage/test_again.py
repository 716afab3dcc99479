"""The same command typed again on a finished run: seen without loading anything, and only where nothing changed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import ooc_ntk
from ooc_ntk.cli import app
from ooc_ntk.inputs import opened
from ooc_ntk.inputs.named_files import named_files
from ooc_ntk.storage.again import AGAIN, is_done

NET = """
import torch
from sizes import HIDDEN


def net():
    torch.manual_seed(0)
    nn = torch.nn
    return nn.Sequential(nn.Flatten(), nn.Linear(64, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 2))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "sizes.py").write_text("HIDDEN = 4\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "sizes", raising=False)
    return tmp_path


WORDS = ["run", "--model", "net.py:net", "--train", "digits[0:12]", "--tile-samples", "5", "--out", "run"]


def run(*more):
    words = [sys.executable, "-m", "ooc_ntk", *WORDS, *more]  # by itself: what other tests have read does not count
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_the_same_command_has_nothing_to_do(folder):
    assert "nothing to do" not in run()
    kept = json.loads((folder / "run" / AGAIN).read_text())
    assert {Path(path).name for path in kept["stamps"]} >= {"net.py", "sizes.py", "job.toml"}
    assert "nothing to do: the kernel is complete" in run()
    assert run("--quiet") == ""


@pytest.mark.parametrize(
    "file", ["net.py", *(pytest.param(file, marks=pytest.mark.grid) for file in ("sizes.py", "run/job.toml"))]
)
def test_whatever_was_touched_is_looked_at(folder, file):
    run()
    path = folder / file
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert "see it: ooc-ntk info" not in run()


def test_a_deleted_tile_is_computed_again(folder):
    run()
    tile = folder / "run" / "kernel.zarr" / "c" / "2" / "1"
    before = tile.read_bytes()
    tile.unlink()
    assert "computing it again" in run()
    assert tile.read_bytes() == before


def test_another_command_is_looked_at(folder):
    run()
    command = json.loads((folder / "run" / AGAIN).read_text())["command"]
    assert is_done(folder / "run", command)
    assert not is_done(folder / "run", {**command, "kernel": "pseudo"})
    done = CliRunner().invoke(app, [*WORDS, "--kernel", "pseudo"])
    assert done.exit_code == 2
    assert "another job" in done.output


def test_a_kernel_that_failed_its_audit_is_not_done(folder):
    run()
    command = json.loads((folder / "run" / AGAIN).read_text())["command"]
    (folder / "run" / "audit.json").write_text('{"passed": false}')
    assert not is_done(folder / "run", command)


DATA = """
import numpy as np
import torch


def rows():
    return torch.from_numpy(np.load("elsewhere/rows.npy"))


class Lazy(torch.utils.data.Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, index):
        with open("elsewhere/offset.txt") as file:
            return torch.full((64,), float(file.read())) + index
"""


@pytest.mark.parametrize(
    ("factory", "file"), [("Lazy", "offset.txt"), pytest.param("rows", "rows.npy", marks=pytest.mark.grid)]
)
def test_files_that_a_factory_opens_count(folder, factory, file):
    import numpy as np

    (folder / "data.py").write_text(DATA)
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "offset.txt").write_text("1.5")
    np.save(folder / "elsewhere" / "rows.npy", np.ones((6, 64), dtype=np.float32))
    words = [sys.executable, "-m", "ooc_ntk", "run", "--model", "net.py:net", "--train", f"data.py:{factory}"]
    words += ["--out", "run"]
    first = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "nothing to do" not in first.stdout
    assert "see it: ooc-ntk info" in subprocess.run(words, capture_output=True, text=True, check=True).stdout
    (folder / "elsewhere" / "offset.txt").write_text("2.5")
    np.save(folder / "elsewhere" / "rows.npy", np.zeros((6, 64), dtype=np.float32))
    again = subprocess.run(words, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "data (there" in again.stderr


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        *(
            (f"import {name}", False)
            for name in ("safetensors", "subprocess", "urllib.request", "http.client", "socket")
        ),
        *((f"import os; os.{call}('WIDTH')", False) for call in ("environ.get", "getenv")),
        ("from huggingface_hub import hf_hub_download", False),
        ("import json, zlib, numpy", True),
    ],
)
def test_code_that_may_read_unseen_is_told_by_its_words(tmp_path, monkeypatch, line, seen):
    (tmp_path / "net.py").write_text(f"{line}\n{NET}")
    modules = {"net": SimpleNamespace(__file__=str(tmp_path / "net.py")), "json": json}
    monkeypatch.setattr(opened, "sys", SimpleNamespace(**{**vars(sys), "modules": modules}))
    for name in ("_opened", "_listed"):
        monkeypatch.setattr(opened, name, set())
    assert opened.files_read(tmp_path / "run") == ([tmp_path / "net.py"] if seen else None)


@pytest.mark.parametrize("name", ["requests", "urllib3", "aiohttp", "distributed", "boto3", "h5py"])
def test_packages_that_may_read_unseen_are_not_known(name):
    """Those that load from elsewhere, or open files in native code."""
    assert not opened._known(f"{name}.part")
    assert opened._known("torch.nn")


def test_code_that_may_read_unseen_is_run(folder):
    (folder / "net.py").write_text(f"import safetensors\n{NET}")
    words = [sys.executable, "-m", "ooc_ntk", *WORDS]
    for _ in range(2):
        said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        assert "see it: ooc-ntk info" not in said


def test_nothing_heavy_is_imported(folder):
    run()
    code = "import sys; from ooc_ntk.cli import main; sys.argv[0] = 'ooc-ntk'\ntry:\n    main()\nfinally:\n    "
    code += "print([m for m in ('torch', 'zarr', 'numpy', 'psutil', 'scipy') if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code, *WORDS], capture_output=True, text=True, check=True).stdout
    assert "nothing to do" in said
    assert "[]" in said


@pytest.mark.parametrize(
    ("changes", "known"),
    [
        ({"model": "mlp"}, True),
        ({"model": "mlp", "train": "digits[0:5] + digits[5:9]"}, True),
        ({"model": "ooc_ntk.demo:network"}, False),
        ({"loader_workers": 1}, False),
        ({"train": "cifar10:train"}, False),
        ({"weights": "missing.pt"}, False),
    ],
)
def test_what_a_job_comes_from(folder, changes, known):
    job = ooc_ntk.Job(**{"model": "net.py:net", "train": "digits[0:12]", "device": "cpu", **changes})
    assert (named_files(job, Path("run")) is not None) == known


def test_live_objects_are_not_known(folder):
    import torch

    job = ooc_ntk.Job(torch.nn.Linear(3, 2), torch.randn(4, 3), device="cpu")
    assert named_files(job, Path("run")) is None
