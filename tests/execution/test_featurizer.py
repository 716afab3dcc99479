"""Features fed batch by batch: the same as those of a run, whatever the loader's batches, and after a stop."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ooc_ntk
from ooc_ntk.errors import DataChangedError, IncompleteRunError, InputError, RunConflictError, StorageError
from ooc_ntk.execution import featurizer
from tests import oracle
from tests.cases import TRAIN, case

pytestmark = pytest.mark.usefixtures("one_thread")

DIM = 96


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr(featurizer, "TILE_SAMPLES", 8)


def feed(
    path, batch: int = 5, module: nn.Module | None = None, upto: int | None = None, **settings
) -> ooc_ntk.Featurizer:
    chosen = case("attention", trained=True)
    images, targets = chosen.images[:upto], chosen.targets[:upto]
    settings = {"projection": f"sjlt:{DIM}", **settings}
    found = ooc_ntk.Featurizer(module or chosen.module, path, **settings)
    for part in DataLoader(TensorDataset(images[:TRAIN], targets[:TRAIN]), batch_size=batch):
        found.featurize(part)
    for part in DataLoader(TensorDataset(images[TRAIN:], targets[TRAIN:]), batch_size=batch) if upto is None else ():
        found.featurize(part, test=True)
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kernel": "pseudo"},
        {"kernel": "full"},
        {"kernel": "output:2", "normalize": "cosine"},
        {"outputs": "margin"},
        {"outputs": "logits[1:3]", "scale": "mean"},
        {"projection": f"rademacher:{DIM}", "precision": "float64"},
        {"precision": "bf16"},
        {"precision": "bf16x3"},
        {"parameters": ["encoder.*", "head.*"]},
        {"kernel": "embedding:*"},
    ],
    ids=str,
)
def test_features_are_those_of_a_run(settings, tmp_path, compute):
    fed = feed(tmp_path / "fed", **settings).finish()
    chosen = case("attention", trained=True)
    run = compute(chosen.job(**{"projection": f"sjlt:{DIM}", **settings}), features_only=True)
    assert fed.shape == run.shape
    every = np.arange(fed.features.samples)
    mine, theirs = fed.features.read(every).astype(np.float64), run.features.read(every).astype(np.float64)
    bound = 5e-3 if settings.get("precision") == "bf16" else 1e-6
    assert np.linalg.norm(mine - theirs) <= bound * np.linalg.norm(theirs)
    entries = 1e-5 if settings.get("precision") == "bf16x3" else 2 * bound
    assert oracle.error(fed, np.asarray(run, np.float64)) <= entries
    # Errors need the heaviest parameters, which a pilot chooses on the first tile alone.
    np.testing.assert_allclose(fed.errors(0, 1), run.errors(0, 1), rtol=0.3)
    np.testing.assert_allclose(fed.diagonal(), run.diagonal(), rtol=10 * bound)


def test_any_batches_give_the_same_bits(tmp_path):
    kernels = [np.asarray(feed(tmp_path / str(size), size).finish()) for size in (1, 5, 26)]
    assert (kernels[0] == kernels[1]).all()
    assert (kernels[0] == kernels[2]).all()


def test_it_can_be_used_as_kernels_are(tmp_path):
    with feed(tmp_path / "fed") as fed:
        kernel = fed.finish()
    again = ooc_ntk.open_features(tmp_path / "fed")
    assert (np.asarray(again) == np.asarray(kernel)).all()
    assert (fed.finish()[:3] == kernel[:3]).all()
    scores = again.attribution(1e-2, out=tmp_path / "scores")
    assert scores.shape == (again.features.samples, TRAIN)
    assert again.predict(again.solve(np.eye(TRAIN), ridge=1.0)).shape[1] == TRAIN
    assert again.expected_error() > 0


def test_other_models_and_seeds_are_not_mixed(tmp_path, compute):
    fed = feed(tmp_path / "fed").finish().features
    run = compute(case("attention", trained=True).job(projection=f"sjlt:{DIM}"), features_only=True).features
    cross = np.asarray(fed.cross(run)[:5, :5], np.float64)
    assert np.linalg.norm(cross - np.asarray(run.kernel()[:5, :5])) <= 1e-5 * np.linalg.norm(cross)
    other = feed(tmp_path / "other", module=case("attention").module).finish().features
    with pytest.raises(RunConflictError):
        fed.cross(other)


def test_stopped_half_way_and_fed_again(tmp_path, monkeypatch):
    whole = np.asarray(feed(tmp_path / "whole").finish())
    feed(tmp_path / "fed", upto=20)  # two tiles of eight, and four samples that are lost
    with pytest.raises(IncompleteRunError, match=r"16 samples are there; feed the same batches again"):
        ooc_ntk.open_features(tmp_path / "fed")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "fed" / "features.zarr" / "c").rglob("0")}
    computed = []
    store = featurizer._Work.store
    monkeypatch.setattr(
        featurizer._Work,
        "store",
        lambda self, root, index, *rest: computed.append(index) or store(self, root, index, *rest),
    )
    assert (np.asarray(feed(tmp_path / "fed", batch=3).finish()) == whole).all()
    assert computed == [2, 3, 4]
    assert len([path for path, stamp in stamps.items() if path.is_file() and path.stat().st_mtime_ns == stamp]) == 2


def test_a_loader_that_shuffles_is_found_out(tmp_path):
    feed(tmp_path / "fed", upto=20)
    chosen = case("attention", trained=True)
    again = ooc_ntk.Featurizer(chosen.module, tmp_path / "fed", projection=f"sjlt:{DIM}")
    with pytest.raises(DataChangedError, match=r"samples 0 to 8 are not those .* switch off shuffling"):
        again.featurize((chosen.images[:8].flip(0), chosen.targets[:8]))


def test_another_model_is_refused_in_the_same_folder(tmp_path):
    feed(tmp_path / "fed", upto=20)
    with pytest.raises(RunConflictError, match="holds features of another model; take another folder"):
        feed(tmp_path / "fed", module=case("attention").module)
    with pytest.raises(RunConflictError, match="holds features of another kernel"):
        feed(tmp_path / "fed", kernel="pseudo")


def test_misuse(tmp_path):
    module = case("smooth-mlp").module
    images, targets = case("smooth-mlp").images, case("smooth-mlp").targets
    with pytest.raises(InputError, match="leave train out"):
        ooc_ntk.Featurizer(module, tmp_path / "a", train=images)
    with pytest.raises(InputError, match="needs a size"):
        ooc_ntk.Featurizer(module, tmp_path / "a", projection="sjlt")
    with pytest.raises(InputError, match="needs a projection with its columns"):
        ooc_ntk.Featurizer(module, tmp_path / "a", projection=ooc_ntk.Projection("sjlt", target_error=0.1))
    with pytest.raises(InputError, match="did you mean 'pseudo'"):
        ooc_ntk.Featurizer(module, tmp_path / "a", kernel="pseduo")
    fed = ooc_ntk.Featurizer(module, tmp_path / "a", projection="sjlt:64")
    with pytest.raises(InputError, match="no train sample was fed"):
        fed.finish()
    with pytest.raises(InputError, match="the first axis of each must count the samples"):
        fed.featurize((images[:4], targets[:3]))
    fed.featurize((images[:4], targets[:4]))
    fed.featurize((images[4:6], targets[4:6]), test=True)
    with pytest.raises(InputError, match="train samples come before test samples"):
        fed.featurize((images[:4], targets[:4]))
    with pytest.raises(InputError, match="batches differ in their inputs or their shapes"):
        fed.featurize((images[:4].flatten(1), targets[:4]), test=True)
    assert not (tmp_path / "a").exists()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("x")
    with pytest.raises(RunConflictError, match="holds other files"):
        ooc_ntk.Featurizer(module, tmp_path / "b")


def test_fewer_batches_than_before_and_a_damaged_state(tmp_path):
    feed(tmp_path / "fed", upto=20)
    with pytest.raises(InputError, match="holds 16 samples, fed were 4; feed all batches again"):
        feed(tmp_path / "fed", upto=4).finish()
    done = feed(tmp_path / "done", upto=10)
    done.finish()
    with pytest.raises(InputError, match="are finished; open them"):
        done.featurize(case("attention").images[:2])
    state = json.loads((tmp_path / "fed" / "featurizer.json").read_text())
    (tmp_path / "fed" / "featurizer.json").write_text(json.dumps({**state, "format": 99}))
    with pytest.raises(StorageError, match=r"made by a newer ooc-ntk \(format 99, this one reads up to 1\)"):
        feed(tmp_path / "fed")
    (tmp_path / "fed" / "featurizer.json").write_text("{")
    with pytest.raises(StorageError, match="is damaged"):
        feed(tmp_path / "fed")


def test_batches_as_dicts_and_without_targets(tmp_path, compute):
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.layer(x) + shift)

    data = {"x": torch.randn(10, 5), "shift": torch.randn(10, 3)}
    torch.manual_seed(0)
    fed = ooc_ntk.Featurizer(ByName(), tmp_path / "fed", projection="sjlt:16")
    for start in range(0, 10, 4):
        fed.featurize({name: value[start : start + 4] for name, value in data.items()})
    torch.manual_seed(0)
    run = compute(ooc_ntk.Job(ByName(), data, projection="sjlt:16"))
    assert oracle.error(fed.finish(), np.asarray(run, np.float64)) <= 1e-6


def test_damaged_and_missing_tiles_are_computed_again(tmp_path):
    whole = np.asarray(feed(tmp_path / "whole").finish())
    feed(tmp_path / "fed", upto=26)
    chunks = tmp_path / "fed" / "features.zarr" / "c"
    content = bytearray((chunks / "0" / "0").read_bytes())
    content[8] ^= 255
    (chunks / "0" / "0").write_bytes(bytes(content))
    (chunks / "1" / "0").unlink()
    assert (np.asarray(feed(tmp_path / "fed").finish()) == whole).all()


def test_a_tile_that_fails_is_tried_again_in_its_place(tmp_path, monkeypatch):
    whole = np.asarray(feed(tmp_path / "whole").finish())
    store, fails = featurizer._Work.store, [1]

    def once(self, root, index, *rest):
        if index in fails:
            fails.clear()
            raise KeyboardInterrupt
        return store(self, root, index, *rest)

    monkeypatch.setattr(featurizer._Work, "store", once)
    chosen = case("attention", trained=True)
    fed = ooc_ntk.Featurizer(chosen.module, tmp_path / "fed", projection=f"sjlt:{DIM}")
    interrupted = 0
    for start in range(0, len(chosen.images), 4):
        part = slice(start, min(start + 4, TRAIN) if start < TRAIN else start + 4)
        try:
            fed.featurize((chosen.images[part], chosen.targets[part]), test=start >= TRAIN)
        except KeyboardInterrupt:
            interrupted += 1
        if part.stop == TRAIN:
            rest = slice(TRAIN, start + 4)
            fed.featurize((chosen.images[rest], chosen.targets[rest]), test=True)
    assert interrupted == 1
    assert (np.asarray(fed.finish()) == whole).all()


def test_a_finished_script_run_again_computes_nothing_and_checks_the_model(tmp_path, monkeypatch):
    whole = np.asarray(feed(tmp_path / "fed").finish())
    monkeypatch.setattr(featurizer._Work, "store", None)
    assert (np.asarray(feed(tmp_path / "fed").finish()) == whole).all()
    with pytest.raises(RunConflictError, match="features of another model"):
        feed(tmp_path / "fed", module=case("attention").module)


def test_a_bank_has_to_be_given(tmp_path):
    with pytest.raises(InputError, match="give a ClipOutput with a bank"):
        ooc_ntk.Featurizer(case("attention").module, tmp_path / "fed", outputs="clip")


def test_finish_belongs_inside_the_block(tmp_path):
    with feed(tmp_path / "fed") as fed:
        pass
    with pytest.raises(InputError, match=r"call finish\(\) inside it"):
        fed.finish()
    assert feed(tmp_path / "fed").finish().shape == (len(case("attention").images), TRAIN)
