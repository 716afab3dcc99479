"""Finished runs that pages are made of, once for a module."""

import shutil
from pathlib import Path

import pytest

import ooc_ntk
from tests.cases import case

DIGITS = """
import torch
from torch import nn


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
"""


@pytest.fixture(scope="module")
def make_run(memory_folder, rates):
    """``make_run(name, job, **preferences)``: a finished run of that name."""

    def made(name, job, **preferences):
        folder = memory_folder / name
        budget = ooc_ntk.Budget(host="16GiB", disk="1GiB")
        plan = ooc_ntk.plan(job, budget, rates=rates, preferences=ooc_ntk.Preferences(**preferences))
        ooc_ntk.run(job, folder, plan=plan, progress=False)
        return folder

    return made


@pytest.fixture(scope="module")
def finished(make_run) -> Path:
    """A run of live objects, without results."""
    return make_run("run", case("smooth-mlp").job())


@pytest.fixture(scope="module")
def digits_job(memory_folder):
    """``digits_job(**options)``: a job of 60 train and 20 test digits that can be made again from its description."""
    place = memory_folder / "digits_nets.py"
    place.write_text(DIGITS)

    def job(train="digits[0:60]", test="digits[60:80]", **options):
        return ooc_ntk.Job(f"{place}:mlp", train, test, **options)

    return job


@pytest.fixture(scope="module")
def exact(make_run, digits_job) -> Path:
    """Digits, exact, in tiles of 16, with every result."""
    folder = make_run("exact", digits_job(), tile_samples=16)
    ooc_ntk.fit(folder)
    ooc_ntk.spectrum(folder)
    ooc_ntk.nearest(folder, 3)
    ooc_ntk.surrogate(folder, kinds=("ridge",), baselines=(), progress=False)
    ooc_ntk.verify(folder)
    return folder


@pytest.fixture(scope="module")
def projected(make_run, digits_job) -> Path:
    """The same, projected, without results but an audit."""
    folder = make_run("projected", digits_job(projection="sjlt:256"))
    ooc_ntk.verify(folder, samples=12)
    return folder


@pytest.fixture
def copied(memory_path):
    """``copied(folder)``: a run of the test's own."""
    return lambda folder, name="copy": Path(shutil.copytree(folder, memory_path / name))
