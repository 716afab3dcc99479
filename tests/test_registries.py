"""What one file adds, from outside the package or in its folder: a layer rule, a projection, a store and a solver."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ooc_ntk
from ooc_ntk import registry
from ooc_ntk.algebra.ridge import SOLVERS
from ooc_ntk.compute.projection.entries import dense_columns
from ooc_ntk.errors import InputError
from ooc_ntk.planning.projectionkind import PROJECTIONS
from ooc_ntk.registry import Registry
from ooc_ntk.storage.storeurl import STORES
from tests import oracle

BUDGET = ooc_ntk.Budget(host="16GiB", disk="1GiB")

#: A solver of one file: eigenvalues and eigenvectors, in memory.
SOLVER = """
import numpy as np
import ooc_ntk
from ooc_ntk.algebra.dense import dense_square
from ooc_ntk.algebra.ridge import Solution, Solver, ratio_to_diagonal
from ooc_ntk.algebra.solvers import relative_residual
from ooc_ntk.planning.solving import SolvePrice


def price(system):
    return SolvePrice("eigen", 24 * system.size**2, 0, 2 * system.triangle_bytes, 0, seconds=1e9)


def solve(entries, targets, ridge, options, plan):
    values, vectors = np.linalg.eigh(dense_square(entries, memory=plan.host_free))
    found = vectors @ (vectors.T @ targets / (values + ridge)[:, None])
    left = relative_residual(entries, targets, found, ridge, options.device)
    return Solution(found, ridge, ratio_to_diagonal(ridge, entries), left, "eigen", passes=2)


ooc_ntk.register_solver("eigen", Solver(price, solve))
"""

#: A projection of one file: every third column of a dense R of signs and zeros.
PROJECTION = '''
import ooc_ntk


def entries(projection, p, columns, draw):
    """-1, 0 or 1 by thirds of a byte: mean square 2/3 of 255/256."""
    byte = draw(p, columns, 0)[0] & 255
    return (byte % 3 - 1) * (byte < 255)


ooc_ntk.register_projection("thirds", ooc_ntk.ProjectionKind("signs and zeros", entries, signs=False, unit=170 / 256))
'''


#: A store of one file: folders of a mounted volume, by its name.
STORE = """
import ooc_ntk
from ooc_ntk.storage.local import LocalFiles


def files(url, scratch):
    return LocalFiles("VOLUMES/" + url.removeprefix("volume://"))


ooc_ntk.register_store("volume", ooc_ntk.StoreScheme("volume://name", lambda url: url.rstrip("/"), files))
"""


class Bilinear(nn.Module):
    """A model with a layer that no rule of this project covers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.join = nn.Linear(5, 4), nn.Bilinear(4, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(torch.tanh(self.first(x)), x)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Bilinear().double().eval()


@pytest.fixture
def job(model):
    data = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def make(**given: object) -> ooc_ntk.Job:
        return ooc_ntk.Job(model, data, device="cpu", precision="float64", **given)

    return make


@pytest.fixture
def run(tmp_path, rates):
    def go(wanted: ooc_ntk.Job, **given: object) -> ooc_ntk.Kernel:
        chosen = ooc_ntk.plan(wanted, BUDGET, rates=rates, store=given.get("store"))
        return ooc_ntk.run(wanted, tmp_path / "run", plan=chosen, **given)

    return go


@contextmanager
def added(
    entries: Registry, name: str, source: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *, inside: bool
) -> Iterator[None]:
    """A file that registers ``name``, in the registry's own folder or as the plugin of another package."""
    module = f"{entries.folder}.{name}" if inside else f"plugin_of_{name}"
    (folder / f"{module.rpartition('.')[2]}.py").write_text(source)
    with monkeypatch.context() as patch:
        if inside:
            importlib.import_module(entries.folder).__path__.append(str(folder))
        else:
            patch.syspath_prepend(folder)
            point = EntryPoint("mine", module, registry.PLUGINS)
            patch.setattr(registry, "entry_points", lambda group: [point] if group == registry.PLUGINS else [])
            patch.setattr(registry, "_loaded", set())
        try:
            yield
        finally:
            if inside:
                importlib.import_module(entries.folder).__path__.remove(str(folder))
            entries.forget(name)
            sys.modules.pop(module, None)


def test_a_layer_rule(model, job, run):
    @ooc_ntk.layer_rule(nn.Bilinear)
    def bilinear(module, inputs, gradient):
        left, right = inputs
        return {"weight": torch.einsum("no,ni,nj->noij", gradient, left, right), "bias": gradient}

    try:
        kernel = run(job())
    finally:
        ooc_ntk.forget_layer_rule(nn.Bilinear)
    assert {block.name.partition(".")[0]: block.source for block in kernel.plan.blocks} == {
        "first": "rule",
        "join": "rule",
    }
    expected = oracle.kernel(oracle.jacobian(model, job().train), 12)
    np.testing.assert_allclose(np.asarray(kernel), expected, rtol=1e-12)


@pytest.mark.parametrize("inside", [True, False], ids=["a file of the folder", "another package"])
@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_a_projection(model, job, run, tmp_path, monkeypatch, inside, backend):
    with added(PROJECTIONS, "thirds", PROJECTION, tmp_path, monkeypatch, inside=inside):
        assert "thirds" in PROJECTIONS.names()
        kernel = run(job(projection=ooc_ntk.Projection.parse("thirds:64", seed=3, backend=backend)))
        assert kernel.plan.projection.kind == "thirds"
        p = np.arange(sum(each.numel() for each in model.parameters()))
        matrix = dense_columns(kernel.plan.projection, p, np.arange(64))
        np.testing.assert_allclose(np.unique(matrix), np.array([-1, 0, 1]) * (256 / 170 / 64) ** 0.5)
        features = oracle.jacobian(model, job().train) @ matrix
        np.testing.assert_allclose(np.asarray(kernel), oracle.kernel(features, 12), rtol=1e-6)
        assert ooc_ntk.open(kernel.path).errors()[0, 1] > 0
    with pytest.raises(InputError, match="unknown projection 'thirds'"):
        ooc_ntk.Projection("thirds", 64)


@pytest.mark.parametrize("inside", [True, False], ids=["a file of the folder", "another package"])
def test_a_solver(job, run, tmp_path, monkeypatch, inside):
    kernel = run(job())
    y = np.random.default_rng(0).standard_normal((12, 2))
    with added(SOLVERS, "eigen", SOLVER, tmp_path, monkeypatch, inside=inside):
        found = kernel.solve(y, 1e-3, method="eigen")
        assert found.method == "eigen"
        assert found.residual < 1e-10
        np.testing.assert_allclose(found.coefficients, kernel.solve(y, 1e-3).coefficients, rtol=1e-8)
        assert "eigen" in str(kernel.plan_solve(2))
    with pytest.raises(InputError, match="unknown method 'eigen'"):
        kernel.solve(y, 1e-3, method="eigen")


@pytest.mark.parametrize("inside", [True, False], ids=["a file of the folder", "another package"])
def test_a_store(model, job, run, tmp_path, monkeypatch, inside):
    source = STORE.replace("VOLUMES", str(tmp_path))
    with added(STORES, "volume", source, tmp_path, monkeypatch, inside=inside):
        kernel = run(job(), store="volume://kernels/")
        assert (tmp_path / "kernels" / "kernel.zarr").exists()
        assert not (tmp_path / "run" / "kernel.zarr").exists()
        expected = oracle.kernel(oracle.jacobian(model, job().train), 12)
        np.testing.assert_allclose(np.asarray(kernel), expected, rtol=1e-12)
        assert np.array_equal(np.asarray(ooc_ntk.open("volume://kernels")), np.asarray(kernel))
    with pytest.raises(InputError, match=r"stores are file:///folder or s3://bucket/prefix, got one of volume://"):
        ooc_ntk.open("volume://kernels")


def test_names_of_this_project_are_taken():
    about = PROJECTIONS.get("sjlt")
    ooc_ntk.register_projection("sjlt", about)  # the same once more, as when a module is imported again
    with pytest.raises(InputError, match="there is a projection 'gaussian' already; register yours under another name"):
        ooc_ntk.register_projection("gaussian", about)
    with pytest.raises(InputError, match="named by lower-case letters"):
        ooc_ntk.register_projection("Four4", about)


def test_a_plugin_that_fails_is_named_once_it_is_needed(monkeypatch):
    point = EntryPoint("broken", "no_such_module_of_a_plugin", registry.PLUGINS)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    monkeypatch.setattr(registry, "_loaded", set())
    assert ooc_ntk.Projection("sjlt", 64).block == 16
    with pytest.raises(InputError, match="plugin 'broken' of an installed package cannot be loaded .*no_such_module"):
        ooc_ntk.Projection("sjtl", 64)
