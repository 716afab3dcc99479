"""Jacobian rows: both methods against the oracle, and nothing of the user's is changed."""

import copy

import pytest
import torch
from torch import nn

from ooc_ntk.compute.jacobian import METHODS, ModelBatch, ModelFunction, plain_layers
from ooc_ntk.compute.model import choose_parameters
from ooc_ntk.compute.outputs import OutputRows
from tests import oracle
from tests.cases import NAMES, TwoInputs, case

methods = pytest.mark.parametrize("method", METHODS)


def function_of(module, kernel="trace", outputs="logits", patterns=None, precision="float64"):
    names = choose_parameters(module, patterns)
    return ModelFunction(module, names, OutputRows.of(outputs, kernel), precision, "cpu")


def rows_of(method, function, batch, names=None, **options):
    """All rows, (samples · rows, parameters); groups are copied, as they are only valid until the next one."""
    groups = METHODS[method](function).derive(batch, function.names if names is None else names, **options)
    return torch.cat([torch.cat([part.clone() for part in group], 1) for group in groups])


@methods
@pytest.mark.parametrize("name", NAMES)
def test_rows_in_float64(name, method):
    chosen = case(name)
    function = function_of(chosen.module)
    found = rows_of(method, function, ModelBatch((chosen.train[:5].double(),), {}, None))
    wanted = torch.from_numpy(oracle.case_jacobian(name)[:5]).flatten(0, 1)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@methods
@pytest.mark.parametrize("kernel", ["pseudo", "output:3"])
def test_one_row_per_sample(kernel, method):
    chosen = case("smooth-mlp")
    found = rows_of(method, function_of(chosen.module, kernel), ModelBatch((chosen.train[:4].double(),), {}, None))
    every = torch.from_numpy(oracle.case_jacobian("smooth-mlp")[:4])
    torch.testing.assert_close(found, every.sum(1) if kernel == "pseudo" else every[:, 3], rtol=1e-9, atol=1e-12)


@methods
@pytest.mark.parametrize("gather", [1, 3, 100])
def test_rows_may_come_in_groups(gather, method):
    chosen = case("smooth-mlp")
    function = function_of(chosen.module)
    found = rows_of(method, function, ModelBatch((chosen.train[:2].double(),), {}, None), gather=gather)
    wanted = torch.from_numpy(oracle.case_jacobian("smooth-mlp")[:2]).flatten(0, 1)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@methods
def test_named_parameters_only_in_the_order_asked_for(method):
    chosen = case("attention")
    function = function_of(chosen.module)
    batch = ModelBatch((chosen.train[:3].double(),), {}, None)
    names = ("embed.bias", "head.weight")
    (first, *_) = METHODS[method](function).derive(batch, names)
    assert [part.shape[1] for part in first] == [16, 64]
    wanted = oracle.jacobian(chosen.module, chosen.train[:3], names=names)
    torch.testing.assert_close(
        rows_of(method, function, batch, names), torch.from_numpy(wanted).flatten(0, 1), rtol=1e-9, atol=1e-12
    )


@methods
def test_parameters_that_are_not_used_have_zero_columns(method):
    module = nn.Linear(3, 2)
    module.unused = nn.Parameter(torch.ones(4))
    found = rows_of(method, function_of(module.eval()), ModelBatch((torch.randn(5, 3, dtype=torch.float64),), {}, None))
    assert found.shape == (10, 6 + 2 + 4)
    assert (found[:, -4:] == 0).all()
    assert (found[:, :-4].abs().sum(1) > 0).all()


@methods
def test_a_model_that_does_not_depend_on_the_parameters_for_some_sample(method):
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return (x * self.weight).sum(1, keepdim=True) * (x[:, :1] > 0)

    x = torch.tensor([[1.0, 2, 3], [-1, 2, 3]], dtype=torch.float64)
    found = rows_of(method, function_of(Gate()), ModelBatch((x,), {}, None))
    assert found.tolist() == [[1, 2, 3], [0, 0, 0]]


@methods
def test_inputs_by_name(method):
    module = TwoInputs().eval()
    inputs = {"image": torch.randn(4, 64), "extra": torch.randn(4, 5)}
    batch = ModelBatch((), inputs, None).to("cpu", "float64")
    assert len(batch) == 4
    wanted = torch.from_numpy(oracle.jacobian(module, inputs)).flatten(0, 1)
    torch.testing.assert_close(rows_of(method, function_of(module), batch), wanted, rtol=1e-9, atol=1e-12)


@methods
@pytest.mark.parametrize("surrounding", [torch.no_grad, torch.enable_grad])
def test_the_users_model_and_settings_stay_as_they_are(surrounding, method):
    chosen = case("attention", trained=True)
    module = copy.deepcopy(chosen.module)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    fast = torch.backends.mha.get_fastpath_enabled()
    function = function_of(module, outputs="loss", precision="float32")
    with surrounding():
        found = rows_of(method, function, ModelBatch((chosen.train[:3],), {}, chosen.labels[:3]))
    assert not found.requires_grad
    assert found.abs().sum() > 0
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(value.requires_grad and value.grad is None for value in module.parameters())
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_the_fused_path_is_switched_back_on():
    with plain_layers():
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(ZeroDivisionError), plain_layers():
        raise ZeroDivisionError
    assert torch.backends.mha.get_fastpath_enabled()


def test_batches_are_cast_where_they_are_floating_point():
    batch = ModelBatch((torch.ones(2, 3), torch.ones(2, dtype=torch.int64)), {}, torch.ones(2)).to("cpu", "float64")
    assert [value.dtype for value in batch.args] == [torch.float64, torch.int64]
    assert batch.targets.dtype == torch.float32, "targets keep their dtype"
    assert len(batch.sample(1)) == 1
