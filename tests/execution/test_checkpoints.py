"""Several checkpoints in one job: every kernel, their mean and their drift against the oracle."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import ooc_ntk
from ooc_ntk.errors import IncompleteRunError, InputError, RunConflictError, StorageError
from ooc_ntk.execution import session
from tests import oracle
from tests.cases import SMOOTH, TRAIN, case

pytestmark = pytest.mark.usefixtures("one_thread")

NETS = """
import torch

def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
"""


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3)).eval()


@pytest.fixture(scope="module")
def images():
    return case("smooth-mlp").images


@pytest.fixture(scope="module")
def training(images):
    """A network as it is trained: its state before, on the way and at the end."""
    module, target = net(), torch.randint(0, 3, (len(images),), generator=torch.Generator().manual_seed(0))
    optimizer, states = torch.optim.SGD(module.parameters(), lr=0.5), []
    for step in range(41):
        if step % 20 == 0:
            states.append(copy.deepcopy(module.state_dict()))
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(images), target).backward()
        optimizer.step()
    return states


@pytest.fixture
def files(training, tmp_path):
    (tmp_path / "nets.py").write_text(NETS)
    paths = [tmp_path / f"epoch{index}.pt" for index in range(len(training))]
    for path, state in zip(paths, training, strict=True):
        torch.save(state, path)
    return paths


@pytest.fixture(scope="module")
def kernels(training, images):
    found = []
    for state in training:
        module = net()
        module.load_state_dict(state)
        found.append(oracle.kernel(oracle.jacobian(module, images), TRAIN))
    return found


def job(files, images, **settings):
    model = f"{files[0].parent / 'nets.py'}:net"
    return ooc_ntk.Job(model, images[:TRAIN], images[TRAIN:], **settings)


def test_kernels_mean_and_drift(files, images, kernels, tmp_path):
    said = []
    found = ooc_ntk.run_checkpoints(
        job(files, images), tmp_path / "out", files, progress=False, announce=lambda *what: said.append(what)
    )
    assert said == [(0, "000-epoch0"), (1, "001-epoch1"), (2, "002-epoch2")]
    assert found.names == ("000-epoch0", "001-epoch1", "002-epoch2")
    for kernel, wanted in zip(found, kernels, strict=True):
        assert oracle.error(kernel, wanted) <= SMOOTH
    mean = found.mean()
    assert oracle.error(mean, np.mean(kernels, axis=0)) <= SMOOTH
    assert mean.shape == found[0].shape
    np.testing.assert_allclose(mean.diagonal()[:TRAIN], np.mean(kernels, axis=0)[:TRAIN].diagonal(), rtol=1e-5)
    solution = mean.solve(np.eye(TRAIN), ridge=1.0)
    assert mean.predict(solution).shape == (len(images) - TRAIN, TRAIN)

    squares = [kernel[:TRAIN] for kernel in kernels]
    drift = found.drift()
    for a, one in enumerate(squares):
        for b, other in enumerate(squares):
            wanted = 1 - (one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other)
            assert drift.distances[a, b] == pytest.approx(wanted, abs=1e-6)
    wanted = [np.linalg.norm(square - squares[0]) / np.linalg.norm(squares[0]) for square in squares]
    assert drift.changes == pytest.approx(wanted, rel=1e-4, abs=1e-12)
    assert drift.changes[1] > 0.01  # it really moved
    assert drift.steps == pytest.approx([drift.distances[0, 1], drift.distances[1, 2]])
    assert json.loads((tmp_path / "out" / "drift.json").read_text())["names"] == list(found.names)

    again = ooc_ntk.open_checkpoints(tmp_path / "out")
    assert (again["001-epoch1"][:] == found[1][:]).all()
    with pytest.raises(InputError, match="holds no checkpoint 'epoch1'"):
        again["epoch1"]


def test_every_run_stands_alone(files, images, kernels, tmp_path):
    np.save(tmp_path / "x.npy", images.numpy())
    wanted = ooc_ntk.Job("nets.py:net", f"x.npy[0:{TRAIN}]", f"x.npy[{TRAIN}:]", base=tmp_path)
    ooc_ntk.run_checkpoints(wanted, tmp_path / "out", [path.name for path in files], progress=False)
    for path, kernel in zip(sorted((tmp_path / "out").glob("0*")), kernels, strict=True):
        assert oracle.error(ooc_ntk.open(path), kernel) <= SMOOTH
        assert ooc_ntk.verify(path).passed  # its own job file knows its weights


def test_one_plan_one_reading_and_one_model(files, images, tmp_path, monkeypatch):
    planned, alive, most = [], weakref.WeakSet(), []
    plan = session.planned
    monkeypatch.setattr(session, "planned", lambda *args: planned.append(1) or plan(*args))
    load = ooc_ntk.Job.module

    def counted(self):
        found = load(self)
        alive.add(found)
        most.append(len(alive))
        return found

    read = []

    class Counted(torch.utils.data.Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, index):
            read.append(index)
            return images[index]

    monkeypatch.setattr(ooc_ntk.Job, "module", counted)
    model = f"{files[0].parent / 'nets.py'}:net"
    ooc_ntk.run_checkpoints(ooc_ntk.Job(model, Counted()), tmp_path / "out", files[:1], progress=False)
    once = len(read)
    read.clear()
    found = ooc_ntk.run_checkpoints(ooc_ntk.Job(model, Counted()), tmp_path / "more", files, progress=False)
    assert len(planned) == 2  # one for either directory
    assert max(most) == 1
    assert len(read) < 3 * once
    assert len({dataclasses.replace(kernel.plan, job_digest="").digest for kernel in found}) == 1


@pytest.mark.parametrize("given", ["files", "states", "safetensors"])
def test_a_live_model_is_left_as_it_is(given, files, training, images, kernels, tmp_path):
    from safetensors.torch import save_file

    module = net()
    before = copy.deepcopy(module.state_dict())
    weights = {"files": files, "states": training, "safetensors": []}[given]
    if given == "safetensors":
        for index, state in enumerate(training):
            weights.append(tmp_path / f"w{index}.safetensors")
            save_file(state, weights[-1])
    live = ooc_ntk.Job(module, images[:TRAIN], images[TRAIN:])
    found = ooc_ntk.run_checkpoints(live, tmp_path / "out", weights, progress=False)
    for kernel, wanted in zip(found, kernels, strict=True):
        assert oracle.error(kernel, wanted) <= SMOOTH
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_more_checkpoints_later_and_only_those(files, images, kernels, tmp_path):
    out = tmp_path / "out"
    ooc_ntk.run_checkpoints(job(files, images), out, files[:2], progress=False)
    two = ooc_ntk.open_checkpoints(out).mean()
    assert oracle.error(two, np.mean(kernels[:2], axis=0)) <= SMOOTH
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("00[01]*/kernel.zarr/c/*/*")}
    assert stamps
    found = ooc_ntk.run_checkpoints(job(files, images), out, files, progress=False)
    assert len(found) == 3
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    assert (
        oracle.error(found.mean(), np.mean(kernels, axis=0)) <= SMOOTH
    )  # the mean of two is not taken for that of three
    with pytest.raises(RunConflictError, match=r"holds other checkpoints .*give the same ones in the same order"):
        ooc_ntk.run_checkpoints(job(files, images), out, files[::-1], progress=False)


def test_stopped_in_the_second_and_resumed(files, images, kernels, tmp_path):
    class StopHereError(Exception):
        pass

    numbers = []

    def announce(number, name):
        numbers.append(number)
        if len(numbers) == 2:
            raise StopHereError

    with pytest.raises(StopHereError):
        ooc_ntk.run_checkpoints(job(files, images), tmp_path / "out", files, progress=False, announce=announce)
    with pytest.raises((IncompleteRunError, StorageError)):
        ooc_ntk.open_checkpoints(tmp_path / "out")
    found = ooc_ntk.run_checkpoints(job(files, images), tmp_path / "out", files, progress=False)
    assert oracle.error(found[2], kernels[2]) <= SMOOTH


def test_projected_checkpoints(files, images, tmp_path):
    wanted = job(files, images, projection="sjlt:128")
    found = ooc_ntk.run_checkpoints(wanted, tmp_path / "out", files[:2], progress=False)
    mean = found.mean()
    assert oracle.error(mean, np.mean([np.asarray(kernel, np.float64) for kernel in found], axis=0)) <= 1e-6
    for path, file in zip(sorted((tmp_path / "out").glob("0*")), files[:2], strict=True):
        assert ooc_ntk.verify(path, wanted.with_model(weights=file)).passed


def test_wide_heads_and_features(files, images, tmp_path):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Tanh(), nn.Linear(4, 9)).eval()
    states = [copy.deepcopy(module.state_dict())]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.3)
    states.append(copy.deepcopy(module.state_dict()))
    for kind in ("trace", "embedding"):
        live = ooc_ntk.Job(module, images[:TRAIN], kernel=kind)
        found = ooc_ntk.run_checkpoints(live, tmp_path / kind, states, progress=False)
        for kernel, state in zip(found, states, strict=True):
            module.load_state_dict(state)
            if kind == "trace":
                assert kernel.plan.head is not None
                wanted = oracle.kernel(oracle.jacobian(module, images[:TRAIN]), TRAIN)
            else:
                h = torch.tanh(module[1].double()(images[:TRAIN].double().flatten(1))).detach().numpy()
                module.float()
                wanted = h @ h.T
            assert oracle.error(kernel, wanted) <= SMOOTH


def test_weights_that_do_not_belong_are_refused_before_anything_is_computed(files, images, tmp_path):
    torch.save(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.Tanh(), nn.Linear(9, 3)).state_dict(), tmp_path / "b.pt"
    )
    out = tmp_path / "out"
    with pytest.raises(
        InputError, match=r"b.pt are not of the same model as the first ones .*1.weight \(9, 64\), model"
    ):
        ooc_ntk.run_checkpoints(job(files, images), out, [*files, tmp_path / "b.pt"], progress=False)
    with pytest.raises(InputError, match=r"weights not found: there is no file .*missing.pt"):
        ooc_ntk.run_checkpoints(job(files, images), out, [*files, tmp_path / "missing.pt"], progress=False)
    with pytest.raises(InputError, match="no weights are given"):
        ooc_ntk.run_checkpoints(job(files, images), out, [], progress=False)
    with pytest.raises(InputError, match="names weights of its own"):
        ooc_ntk.run_checkpoints(job(files, images, weights=files[0]), out, files, progress=False)
    with pytest.raises(InputError, match="are a state dict, and the model is"):
        ooc_ntk.run_checkpoints(job(files, images), out, [torch.load(files[0])], progress=False)
    with pytest.raises(InputError, match="weights must be files or state dicts, got int"):
        ooc_ntk.run_checkpoints(job(files, images), out, [3], progress=False)
    assert not out.exists()


def test_other_files_in_the_way(files, images, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(RunConflictError, match=r"holds other files \(thesis.tex\)"):
        ooc_ntk.run_checkpoints(job(files, images), tmp_path / "out", files, progress=False)
    with pytest.raises(StorageError, match="holds no checkpoints"):
        ooc_ntk.open_checkpoints(tmp_path)
    (tmp_path / "out" / "checkpoints.json").write_text("{")
    with pytest.raises(StorageError, match="cannot read"):
        ooc_ntk.open_checkpoints(tmp_path / "out")


def test_a_damaged_mean_is_made_again(files, images, kernels, tmp_path):
    found = ooc_ntk.run_checkpoints(job(files, images), tmp_path / "out", files, progress=False)
    found.mean()
    shutil.rmtree(tmp_path / "out" / "mean")
    assert oracle.error(found.mean(), np.mean(kernels, axis=0)) <= SMOOTH


def test_images_are_decoded_once_for_all_checkpoints(tmp_path, monkeypatch):
    from ooc_ntk.inputs.images.pixels import FileImages
    from ooc_ntk.inputs.zoo.build import build_model
    from tests.inputs.images.real_files import write_imagefolder

    write_imagefolder(tmp_path / "photos")
    data = f"imagefolder:{tmp_path / 'photos'},resize=8,crop=8"
    files = []
    for index in range(3):
        files.append(tmp_path / f"{index}.pt")
        torch.save(build_model(f"mlp,width=3,inputs=192,classes=2,seed={index}").state_dict(), files[-1])
    decoded = []
    read = FileImages.read
    monkeypatch.setattr(FileImages, "read", lambda self, number: decoded.append(number) or read(self, number))
    wanted = ooc_ntk.Job("mlp,width=3,classes=2", data)
    found = ooc_ntk.run_checkpoints(wanted, tmp_path / "out", files, progress=False)
    assert sorted(decoded) == list(range(found[0].train_samples))
    assert not (tmp_path / "out" / "decoded").exists()
    decoded.clear()
    alone = ooc_ntk.run(wanted.with_model(weights=files[2]), tmp_path / "alone", progress=False)
    assert decoded
    assert (alone[:] == found[2][:]).all()


def test_a_missing_run_and_a_damaged_mean_are_seen(files, images, tmp_path):
    found = ooc_ntk.run_checkpoints(job(files, images), tmp_path / "out", files, progress=False)
    assert found.check_mean() == ""
    found.mean()
    assert found.check_mean() == ""
    chunk = tmp_path / "out" / "mean" / "kernel.zarr" / "c" / "0" / "0"
    content = bytearray(chunk.read_bytes())
    content[3] ^= 64
    chunk.write_bytes(bytes(content))
    assert "FAILED, tile 0, 0" in found.check_mean()
    shutil.rmtree(tmp_path / "out" / "001-epoch1")
    assert ooc_ntk.api.missing_checkpoints(tmp_path / "out") == ["001-epoch1"]
    assert [info.path.name for info in ooc_ntk.api.info_checkpoints(tmp_path / "out")] == ["000-epoch0", "002-epoch2"]


@pytest.mark.parametrize("key", ["model", "model_state_dict", "state_dict"])
def test_whole_training_checkpoints(key, training, images, kernels, tmp_path):
    compiled = {f"_orig_mod.{name}": value for name, value in training[1].items()}
    torch.save({"epoch": 3, key: compiled, "optimizer": {"state": {}, "param_groups": []}}, tmp_path / "c.pt")
    (tmp_path / "nets.py").write_text(NETS)
    wanted = job([tmp_path / "c.pt"], images, weights=tmp_path / "c.pt")
    assert oracle.error(ooc_ntk.run(wanted, tmp_path / "out", progress=False), kernels[1]) <= SMOOTH
