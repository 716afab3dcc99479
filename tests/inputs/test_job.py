from pathlib import Path

import pytest
import torch
from torch import nn

from ooc_ntk.errors import InputError
from ooc_ntk.inputs.job import Job
from ooc_ntk.inputs.samples import as_source
from ooc_ntk.inputs.specs import resolve_spec

NET = nn.Linear(4, 2)
X, Y = torch.ones(6, 4), torch.zeros(6, dtype=torch.int64)
FILE = """
from torch import nn
def build():
    return nn.Linear(64, 10)
def total(output, target):
    return output.sum()
number = 3
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "my.py").write_text(FILE)
    return tmp_path


def test_a_live_job():
    job = Job(model=NET, train=(X, Y), kernel="trace")
    assert job.module() is NET
    assert len(job.train_source()) == 6
    assert job.train_source() is job.train_source()
    assert job.test_source() is None
    assert job.output_function() == "logits"
    assert job.is_live
    assert job.spec()["model"] == job.spec()["train"] == "<live>"


def test_a_job_of_specs_is_made_again_from_its_description(folder):
    job = Job(
        model="my.py:build", train="digits[0:100]", test="digits[100:150]", outputs="my.py:total", base=folder,
        kernel="output:3", normalize="cosine", scale="mean", parameters="weight", precision="float64", device="cpu",
        batch_size=8, seed=5,
    )  # fmt: skip
    assert not job.is_live
    spec = job.spec()
    assert spec["model"] == f"{folder}/my.py:build"
    assert "base" not in spec
    again = Job.from_spec(spec)
    assert again.spec() == spec
    assert again.parameters == ("weight",)
    assert again.module() is again.module()
    assert not again.module().training
    assert len(again.test_source()) == 50
    assert again.output_function()(torch.ones(3), None) == 3


def test_import_paths_keep_their_base(folder):
    spec = Job(model="my:build", train="digits[0:9]", base=folder).spec()
    assert spec["base"] == str(folder)
    assert Job.from_spec(spec).base == folder


def test_weights_belong_to_a_spec(folder):
    torch.save(nn.Linear(64, 10).state_dict(), folder / "w.pt")
    job = Job(model="my.py:build", train="digits", weights="w.pt", base=folder)
    assert torch.equal(job.module().weight, torch.load(folder / "w.pt", weights_only=True)["weight"])
    assert job.spec()["weights"] == f"{folder}/w.pt"
    with pytest.raises(InputError, match=r"live Linear; call model\.load_state_dict"):
        Job(model=NET, train=X, weights="w.pt")


def test_what_makes_a_job_live(folder):
    specs = {"model": "my.py:build", "train": "digits", "base": folder}
    assert not Job(**specs).is_live
    assert not Job(**{**specs, "train": resolve_spec("digits[0:3]")}).is_live
    assert not Job(**{**specs, "train": folder / "x.npy"}).is_live
    for live in (
        {"model": NET},
        {"train": X},
        {"test": X},
        {"train": as_source(X)},
        {"outputs": lambda a, b: a},
        {"collate": list},
    ):
        assert Job(**{**specs, **live}).is_live


def test_test_data_and_collate_reach_the_source():
    data = [torch.ones(2)] * 3
    job = Job(model=NET, train=data, test=data, collate=lambda items: torch.zeros(len(items), 4))
    assert job.train_source().fetch(0, 2).args[0].shape == (2, 4)
    assert job.test_source().fetch(0, 3).args[0].shape == (3, 4)
    with pytest.raises(InputError, match="test data is empty"):
        Job(model=NET, train=X, test=[]).test_source()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kernel": "trase"}, r"unknown kernel 'trase'; did you mean 'trace'"),
        ({"kernel": "output:-1"}, "by a number from 0 upwards"),
        ({"kernel": "output:x"}, "by a number"),
        ({"kernel": "output"}, "by a number"),
        ({"kernel": "output:<c>"}, "by a number"),
        ({"kernel": None}, "kernel must be one of"),
        ({"outputs": "logit"}, "unknown outputs 'logit'; did you mean 'logits'"),
        ({"outputs": "file.py:function2 "}, "unknown outputs"),
        ({"outputs": 3}, "outputs must be"),
        ({"scale": "average"}, "unknown scale"),
        ({"scale": None}, "scale must be one of sum, mean"),
        ({"normalize": "cosin"}, "did you mean 'cosine'"),
        ({"normalize": True}, "None or 'cosine'"),
        ({"precision": "float16"}, "loses gradients to underflow; use bf16 or float32"),
        ({"precision": "fp16"}, "loses gradients to underflow; use bf16 or float32"),
        ({"precision": "float23"}, "unknown precision 'float23'; did you mean 'float32'"),
        ({"precision": 32}, "precision must be one of"),
        ({"projection": "sjlt"}, "needs a size: write sjlt:4096"),
        ({"projection": 4096}, "must be text such as 'sjlt:4096' or an ooc_ntk.Projection"),
        ({"parameters": []}, "hold no pattern"),
        ({"parameters": ""}, "hold no pattern"),
        ({"parameters": [3]}, "must be a name pattern"),
        ({"parameters": 3}, "must be a name pattern"),
        ({"device": "gpu"}, "device must be 'cpu', 'cuda'"),
        ({"device": "meta"}, "device must be"),
        ({"device": 0}, "device must be"),
        ({"batch_size": 0}, "batch_size must be from 1"),
        ({"batch_size": 2.5}, "whole number"),
        ({"batch_size": True}, "whole number"),
        ({"seed": -1}, "seed must be from 0"),
        ({"seed": "1"}, "whole number"),
        ({"collate": 3}, "collate must be a function"),
        ({"train": None}, "train data is missing"),
        ({"train": "mnist5"}, "did you mean 'mnist5k'"),
        ({"test": "x.npy[-1:]"}, "counts from the end"),
        ({"model": nn.Linear}, "the class Linear; pass an instance"),
        ({"model": None}, "model must be a torch.nn.Module, a name such as"),
        ({"model": "net"}, "unknown model 'net'; did you mean 'lenet'"),
        ({"model": "net.py:f", "weights": 3}, "weights must be a path"),
    ],
)
def test_wrong_values_are_refused_with_a_reason(wrong, message):
    with pytest.raises(InputError, match=message):
        Job(**{"model": NET, "train": X, **wrong})


def test_good_values_pass():
    for kernel in ("trace", "pseudo", "full", "output:0", "output:12"):
        assert Job(NET, X, kernel=kernel).kernel == kernel
    assert Job(NET, X, parameters=["a*", "!b"]).parameters == ("a*", "!b")
    assert Job(NET, X, device=torch.device("cpu")).device == "cpu"
    assert Job(NET, X, precision="tf32").precision == "tf32"
    assert Job(NET, X, base="data").base == Path.cwd() / "data"
    assert "_made" not in repr(Job(NET, X))


def test_a_missing_cuda_device_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="no CUDA device here; use device='cpu'"):
        Job(NET, X, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Job(NET, X, device="cuda:1").device == "cuda:1"
    with pytest.raises(InputError, match="there are 2 CUDA devices, 0 to 1"):
        Job(NET, X, device="cuda:2")


def test_output_specs_must_be_functions(folder):
    with pytest.raises(InputError, match="is a int, not a function"):
        Job(NET, X, outputs="my.py:number", base=folder).output_function()

    def square(output, target):
        return output**2

    assert Job(NET, X, outputs=square).output_function() is square


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"model": "<live>", "train": "digits"}, "live Python objects, and its model.*--model file.py:factory"),
        ({"model": "a:b", "train": "<live>"}, "its train cannot be made again"),
        (
            {"model": "a:b", "train": "digits", "kernl": "trace"},
            "unknown name in the job 'kernl'; did you mean 'kernel'",
        ),
        ({"model": "a:b", "train": "digits", "_made": {}}, "unknown name in the job '_made'"),
        ({"train": "digits"}, "names no model"),
        ({"model": "a:b", "train": None}, "names no train"),
    ],
)
def test_descriptions_that_make_no_job(spec, message):
    with pytest.raises(InputError, match=message):
        Job.from_spec(spec)
