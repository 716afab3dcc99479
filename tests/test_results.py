"""Results from Python: every verb keeps its figures and arrays in the run directory, or says why it cannot."""

import json
import os

import numpy as np
import pytest
import torch
from torch import nn

import ooc_ntk
from ooc_ntk import api
from ooc_ntk.errors import StorageError
from tests.cases import digits

TRAIN, TEST = 40, 12

VERBS = {
    "fit": lambda run, job: api.fit(run, ridge_ratio=1e-2, job=job),
    "spectrum": lambda run, job: api.spectrum(run, 5, job=job),
    "nearest": lambda run, job: api.nearest(run, 2, show=1, job=job),
    "surrogate": lambda run, job: api.surrogate(run, job, kinds=["ridge"], baselines=(), progress=False),
}

ARRAYS = {
    "fit": {"coefficients": (TRAIN, 4), "targets": (TRAIN, 4), "predicted": (TEST, 4), "test_targets": (TEST, 4)},
    "spectrum": {"values": (5,), "residuals": (5,), "vectors": (TRAIN, 5), "target_shares": (5,)},
    "nearest": {"indices": (TEST, 2), "values": (TEST, 2)},
    "surrogate": {"network.test_scores": (TEST, 4), "trace.ridge.coefficients": (TRAIN, 4)},
}


@pytest.fixture(scope="module")
def job():
    torch.manual_seed(0)
    images, labels = digits(4)
    stop = TRAIN + TEST
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 4)).eval()
    return ooc_ntk.Job(
        network, (images[:TRAIN], labels[:TRAIN]), (images[TRAIN:stop], labels[TRAIN:stop]), device="cpu"
    )


@pytest.fixture(scope="module")
def run(job, memory_folder):
    return ooc_ntk.run(job, memory_folder / "results", progress=False).path


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_writes_json_and_npz_and_deletes_an_old_picture(verb, run, job):
    folder = run / verb
    folder.mkdir(exist_ok=True)
    (folder / f"{verb}.png").write_bytes(b"of an earlier result")
    found = VERBS[verb](run, job)
    figures = json.loads((folder / f"{verb}.json").read_text())
    wanted = found.figures if verb == "nearest" else found.figures()
    assert set(figures) - {"seed"} == set(wanted) - {"seed"}
    with np.load(folder / f"{verb}.npz") as arrays:
        for name, shape in ARRAYS[verb].items():
            assert arrays[name].shape == shape
            np.testing.assert_array_equal(arrays[name], found.arrays()[name])
    assert not (folder / f"{verb}.png").exists()


@pytest.mark.parametrize("verb", VERBS)
def test_a_directory_that_cannot_be_written_is_said_before_anything_is_computed(verb, run, job, monkeypatch):
    (run / verb).mkdir(exist_ok=True)
    before = sorted((run / verb).iterdir())
    monkeypatch.setattr(os, "access", lambda path, mode: path != run / verb)
    monkeypatch.setattr(type(ooc_ntk.open(run).entries), "blocks", None)
    with pytest.raises(StorageError, match=f"writing into .*{verb} failed: Permission denied; make it writable"):
        VERBS[verb](run, job)
    assert sorted((run / verb).iterdir()) == before


def test_a_file_in_the_place_of_the_folder(job, memory_path):
    path = ooc_ntk.run(job, memory_path / "taken", progress=False).path
    for verb, compute in VERBS.items():
        (path / verb).write_text("mine")
        with pytest.raises(
            StorageError, match=f"results are written into the folder .*{verb}, and a file has its name"
        ):
            compute(path, job)
        assert (path / verb).read_text() == "mine"
