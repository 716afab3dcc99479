"""The probe: what it measures, what it refuses, and in which words."""

import pytest
import torch
from torch import nn

from ooc_ntk.compute.discover import find_structure
from ooc_ntk.compute.jacobian import ModelBatch, ModelFunction
from ooc_ntk.compute.model import choose_parameters
from ooc_ntk.compute.outputs import OutputRows
from ooc_ntk.compute.probe import probe
from ooc_ntk.errors import BudgetError, InputError, OocNtkError
from tests.cases import Branching, case

AMPLE = 2**32


def probed(module, inputs, targets=None, kernel="trace", outputs="logits", free=AMPLE, batch_size=None, machine=AMPLE):
    function = ModelFunction(module, choose_parameters(module, None), OutputRows.of(outputs, kernel), "float32", "cpu")

    def fetch(count):
        return ModelBatch((inputs[:count],), {}, None if targets is None else targets[:count])

    return probe(function, fetch, len(inputs), free, machine, batch_size)


@pytest.mark.parametrize(
    ("kernel", "outputs", "count", "rows"),
    [
        ("trace", "logits", 4, 4),
        ("full", "logits", 4, 4),
        ("pseudo", "logits", 4, 1),
        ("output:3", "logits", 4, 1),
        ("trace", "loss", 1, 1),
    ],
)
def test_outputs_and_rows(kernel, outputs, count, rows):
    chosen = case("attention")
    found = probed(chosen.module, chosen.train, chosen.labels, kernel, outputs)
    assert (found.outputs, found.rows_per_sample) == (count, rows)
    assert found.smooth
    assert found.derivation.refused is None


def test_what_is_measured():
    chosen = case("cnn")
    derivation = probed(chosen.module, chosen.train).derivation
    assert derivation.method in ("loop", "vmap")
    assert 0 < derivation.chain_seconds_per_sample <= derivation.seconds_per_sample < 10
    # The first convolution alone saves its output for the batch norm: 8 × 8 × 8 float32 per sample.
    assert derivation.activation_bytes >= 8 * 8 * 8 * 4
    assert derivation.working_bytes >= derivation.activation_bytes
    assert not probed(chosen.module, chosen.train).smooth


def test_saved_activations_grow_with_the_sample():
    module = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 1, 3), nn.Flatten(), nn.LazyLinear(1))
    module(torch.ones(1, 1, 64, 64))
    found = probed(module, torch.randn(2, 1, 64, 64), batch_size=1).derivation
    # Saved: the output of tanh and that of the second convolution.
    wanted = 4 * (4 * 64 * 64 + 62 * 62)
    assert wanted <= found.activation_bytes <= 2 * wanted


@pytest.mark.parametrize("faster", ["loop", "vmap"])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_a_batch_size_that_was_asked_for_is_kept(batch_size, faster, monkeypatch):
    """Also above the 64 that are tried without being asked for; never above the samples there are."""
    share = float("inf") if faster == "vmap" else 0.0
    monkeypatch.setattr("ooc_ntk.compute.probe.CLEARLY_FASTER", share)
    monkeypatch.setattr("ooc_ntk.compute.probe.HOPELESS", share)
    found = probed(case("smooth-mlp").module, torch.rand(120, 64), batch_size=batch_size)
    assert found.derivation.method == faster
    assert found.derivation.batch_size == batch_size


def test_a_batch_never_exceeds_the_samples():
    assert probed(case("smooth-mlp").module, torch.rand(5, 64), batch_size=50).derivation.batch_size <= 5


def test_refusal_names_the_operation():
    derivation = probed(Branching().eval(), torch.rand(6, 64)).derivation
    assert derivation.method == "loop"
    assert "data-dependent control flow" in derivation.refused
    assert "\n" not in derivation.refused


def test_a_users_error_under_vmap_is_a_refusal_too():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            if torch._C._functorch.is_batchedtensor(x):
                raise NotImplementedError("my_operator has no batching rule\nand a second line")
            return self.layer(x)

    derivation = probed(Picky(), torch.randn(4, 3)).derivation
    assert (derivation.method, derivation.refused) == ("loop", "NotImplementedError: my_operator has no batching rule")


def test_too_little_memory_for_one_sample():
    chosen = case("cnn")
    # Too small a budget is the planner's to refuse: it knows how much would do.
    assert probed(chosen.module, chosen.train, free=1000).derivation.method == "loop"
    with pytest.raises(BudgetError, match=r"deriving one sample needs about .* KiB.*the machine has 1000 B free"):
        probed(chosen.module, chosen.train, machine=1000)


def test_memory_bounds_the_batch_of_vmap():
    module = case("smooth-mlp").module
    row_bytes = 4 * sum(value.numel() for value in module.parameters())
    free = 3 * 4 * 2 * 10 * row_bytes  # a quarter of it holds three samples of ten rows, twice
    found = probed(module, torch.rand(50, 64), free=free).derivation
    assert found.method == "loop" or found.batch_size <= 3


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x * self.weight.detach()


@pytest.mark.parametrize(
    ("module", "inputs", "message"),
    [
        (
            nn.Linear(5, 2),
            torch.ones(4, 3),
            r"failed on the first (train )?sample \(RuntimeError.*torch.float32 \(1, 3\)",
        ),
        (nn.Linear(3, 2), torch.ones(4, 3).long(), r"failed on the first (train )?sample.*torch.int64"),
        (Constant(), torch.ones(4, 3), r"does not depend on the chosen parameters.*detach"),
        (nn.Sequential(nn.Linear(4, 2), nn.Flatten(0)), torch.ones(6, 4), "into 2 outputs along its first dimension"),
    ],
)
def test_models_that_cannot_be_used(module, inputs, message):
    with pytest.raises(InputError, match=message):
        probed(module, inputs)


def test_an_output_out_of_range_and_missing_labels_are_found_by_the_first_look():
    with pytest.raises(InputError, match="'output:7' is out of range"):
        probed(nn.Linear(3, 2), torch.ones(4, 3), kernel="output:7")
    with pytest.raises(OocNtkError, match="needs a label"):
        probed(nn.Linear(3, 2), torch.ones(4, 3), outputs="margin")


@pytest.mark.parametrize(("seconds", "samples", "repeats"), [(1e-4, 64, 0), (0.02, 64, 1), (0.02, 640, 3)])
def test_a_run_that_is_over_at_once_is_not_timed_again_and_again(seconds, samples, repeats, monkeypatch):
    """After a few samples, twice, one trial as large as it may be; of half of all samples it is done twice at most."""
    module, inputs = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), torch.randn(samples, 5)
    function = ModelFunction(
        module, choose_parameters(module, None), OutputRows.of("logits", "trace"), "float32", "cpu"
    )
    ran = []

    def timed(work, times):
        work()
        ran.append(times)
        return seconds, 1000

    monkeypatch.setattr("ooc_ntk.compute.probe._timed", timed)
    structure = find_structure(function, ModelBatch((inputs[:4],), {}, None))
    found = probe(
        function, lambda count: ModelBatch((inputs[:count],), {}, None), samples, AMPLE, AMPLE, structure=structure
    )
    assert found.derivation.method == "rules"
    assert ran == [1, repeats]
