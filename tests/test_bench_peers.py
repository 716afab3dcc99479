"""Every peer agrees with the float64 oracle, leaves the model as it was, and refuses in words what it cannot do."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from bench.contenders import (
    CONTENDERS,
    CURVLINOPS,
    DATTRI,
    DENSE,
    MODULES,
    NEURAL_TANGENTS,
    NNGEOMETRY,
    OPACUS,
    OURS,
    PEERS,
    TRAK,
    absent,
)
from bench.inputs import Inputs, count_samples
from bench.models import build
from bench.peers import Refused, Result, exact_kernel
from bench.peers.by_output import kernel_by_output
from bench.peers.curvlinops_peer import curvlinops_kernel
from bench.peers.neural_tangents_peer import VARIABLE, interpreter, neural_tangents_kernel
from bench.table import relative_error
from tests.cases import KINKED

APART = [NNGEOMETRY, OPACUS, DATTRI, TRAK, CURVLINOPS, NEURAL_TANGENTS]

#: By peer the workloads that it must refuse, with a word of its reason; every other one it must compute.
REFUSED = {
    NNGEOMETRY: {"vit": "NonDynamicallyQuantizableLinear", "minilm": "LayerNorm|Embedding|refuses"},
    OPACUS: {"resnet18": "batch norm", "minilm": "one gradient for all samples"},
    NEURAL_TANGENTS: {"resnet18": "ResNet18", "vit": "ViT", "minilm": "single tensors"},
}

# Of libraries that the peers import, and of passes that start at the samples.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]


def test_every_peer_is_a_contender() -> None:
    assert set(PEERS.values()) | {OURS, DENSE} == set(CONTENDERS)
    assert set(MODULES) <= set(PEERS.values())


@pytest.mark.parametrize("name", ["small-mlp", "small-cnn", "resnet18", "vit", "minilm"])
@pytest.mark.parametrize("peer", APART)
def test_peers_agree_with_the_oracle_or_refuse(peer: str, name: str) -> None:
    reason = absent(peer)
    if reason:
        pytest.skip(f"{peer}: {reason}")
    if name == "minilm":
        pytest.importorskip("transformers")
    model, inputs = build(name, 5, True)
    before = copy.deepcopy(model.state_dict())
    if name in REFUSED.get(peer, {}):
        with pytest.raises(Refused, match=REFUSED[peer][name]) as refused:
            CONTENDERS[peer](model, inputs)
        assert len(str(refused.value).splitlines()) == 1
        assert len(str(refused.value)) < 200
        return
    found = CONTENDERS[peer](model, inputs)
    assert not any(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert found.kernel.shape == (5, 5)
    assert found.run_seconds > 0
    assert relative_error(found.kernel, exact_kernel(model, inputs, range(5))) < KINKED


@pytest.mark.parametrize("peer", APART[:-1])
def test_absent_packages_are_named(peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "pip install 'ooc-ntk[bench]'" in (absent(peer) or "")
    with pytest.raises(Refused, match="is not installed; pip install"):
        CONTENDERS[peer](*build("small-mlp", 2, True))


def test_neural_tangents_without_its_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert interpreter() is None
    assert "make_environment.sh" in (absent(NEURAL_TANGENTS) or "")
    with pytest.raises(Refused, match=r"make_environment\.sh"):
        neural_tangents_kernel(*build("small-mlp", 2, True))


def test_a_failed_process_of_neural_tangents_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\necho 'ImportError: no jax' >&2; exit 1\n")
    python.chmod(0o755)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(RuntimeError, match="ImportError: no jax"):
        neural_tangents_kernel(*build("small-mlp", 2, True))


def per_sample(model: nn.Module) -> Callable[[Inputs, int], list[torch.Tensor]]:
    def gradients(batch: Inputs, output: int) -> list[torch.Tensor]:
        rows = [
            torch.autograd.grad(model(batch[sample : sample + 1])[0, output], list(model.parameters()))
            for sample in range(count_samples(batch))
        ]
        return [torch.stack(tensors) for tensors in zip(*rows, strict=True)]

    return gradients


def test_gradients_of_one_output_at_a_time_add_up_in_any_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = build("small-cnn", 5, True)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr("bench.peers.by_output.BATCH_BYTES", 2 * 4 * parameters)  # batches of 2, 2 and 1
    sizes: list[int] = []
    gradients = per_sample(model)

    def counted(batch: Inputs, output: int) -> list[torch.Tensor]:
        sizes.append(count_samples(batch))
        return gradients(batch, output)

    found: Result = kernel_by_output(model, inputs, counted)
    assert sizes == [2, 2, 1] * 10
    assert relative_error(found.kernel, exact_kernel(model, inputs, range(5))) < KINKED


def test_what_does_not_fit_or_is_not_complete_is_refused() -> None:
    model, inputs = build("small-mlp", 4, True)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    with pytest.raises(Refused, match="holds the gradients of one output"):
        kernel_by_output(model, inputs, per_sample(model), memory_bytes=4 * 4 * parameters)
    with pytest.raises(Refused, match="of 267 parameters"):
        kernel_by_output(model, inputs, lambda batch, output: per_sample(model)(batch, output)[1:])

    def failing(batch: Inputs, output: int) -> list[torch.Tensor]:
        raise RuntimeError("vmap: no\nsecond line")

    with pytest.raises(Refused, match="cannot take the model: vmap: no$"):
        kernel_by_output(model, inputs, failing)


@pytest.mark.skipif(bool(absent(CURVLINOPS)), reason="curvlinops is not installed: see bench/README.md")
def test_curvlinops_in_groups_of_outputs() -> None:
    model, inputs = build("small-mlp", 4, True)
    output_bytes = 4 * 4 * sum(parameter.numel() for parameter in model.parameters())
    found = curvlinops_kernel(model, inputs, memory_bytes=int(2.5 * output_bytes))
    assert "2 chunks of outputs" in found.remark
    with pytest.raises(Refused, match="holds the gradients of one output"):
        curvlinops_kernel(model, inputs, memory_bytes=output_bytes // 2)
    assert relative_error(found.kernel, exact_kernel(model, inputs, range(4))) < KINKED
