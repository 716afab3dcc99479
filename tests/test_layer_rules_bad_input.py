"""Layers that a rule must not cover, rules that are wrong, and models that have no per-sample gradient."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn

import ooc_ntk
from ooc_ntk.api import InputError
from tests import oracle
from tests.cases import FLOAT64, SMOOTH

BUDGET = ooc_ntk.Budget(host="16GiB", disk="1GiB")

#: A measured number, such as 0.25 or 3e-05.
NUMBER = re.compile(r"\d+\.\d+|\d+e[-+]?\d+")


def inputs(count: int = 12) -> Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(1))


def job(model: nn.Module, **given: object) -> ooc_ntk.Job:
    return ooc_ntk.Job(**{"model": model.eval(), "train": inputs(), "device": "cpu", **given})


def sources(plan: ooc_ntk.Plan) -> dict[str, str]:
    """What derives each layer; ``torch.func`` if that derives any of its parameters."""
    found: dict[str, str] = {}
    for block in plan.blocks:
        layer = block.name.partition(".")[0]
        found[layer] = block.source if found.get(layer) != "torch.func" else "torch.func"
    return found


@pytest.fixture
def make_plan(rates):
    """``make_plan(job, **preferences)``, without a run."""

    def make(wanted: ooc_ntk.Job, **preferences: object) -> ooc_ntk.Plan:
        return ooc_ntk.plan(wanted, BUDGET, preferences=ooc_ntk.Preferences(**preferences), rates=rates)

    return make


# --- rules of the user -----------------------------------------------------------------------------------------------


class Squared(nn.Module):
    """A linear layer with the squares of its weights, which no built-in rule covers."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.root = nn.Parameter(torch.randn(outside, inside) / inside**0.5)
        self.offset = nn.Parameter(torch.randn(outside))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.root.square().T + self.offset


class Scaled(nn.Module):
    """Takes two inputs, the second a factor per sample and token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(1 + 0.3 * torch.randn(width))

    def forward(self, x: Tensor, factor: Tensor) -> Tensor:
        return torch.sinh(self.gain) * x * factor[..., None]


class Net(nn.Module):
    """A layer of the user's between two of torch's; called twice if asked to, on tokens if asked to."""

    def __init__(self, twice: bool = False, tokens: int = 0) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.twice, self.tokens = twice, tokens
        self.first = nn.Linear(5, 6)
        self.own = Squared(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        if self.tokens:
            x = torch.stack([x.roll(step, 1) for step in range(self.tokens)], 1)
        x = torch.tanh(self.own(x))
        if self.twice:
            x = torch.tanh(self.own(0.5 * x))
        return self.head(x.mean(1) if self.tokens else x)


class TwoInputNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(5, 6)
        self.own = Scaled(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.tanh(self.first(x))[:, None] * torch.tensor([1.0, -0.5]).to(x)[:, None]
        return self.head(self.own(tokens, tokens.square().sum(2)).mean(1))


def squared_rule(module: Squared, inputs: tuple[Tensor, ...], output_gradient: Tensor) -> dict[str, Tensor]:
    x, gradient = (value.reshape(len(value), -1, value.shape[-1]) for value in (inputs[0], output_gradient))
    return {
        "root": 2 * module.root * torch.einsum("nso,nsi->noi", gradient, x),
        "offset": gradient.sum(1),
    }


def scaled_rule(module: Scaled, inputs: tuple[Tensor, ...], output_gradient: Tensor) -> dict[str, Tensor]:
    x, factor = inputs
    return {"gain": torch.cosh(module.gain) * (output_gradient * x * factor[..., None]).sum(1)}


def _without_factor(module, inputs, output_gradient):
    right = squared_rule(module, inputs, output_gradient)
    return {**right, "root": right["root"] / 2}


def _without_offset(module, inputs, output_gradient):
    return {"root": squared_rule(module, inputs, output_gradient)["root"]}


def _other_name(module, inputs, output_gradient):
    right = squared_rule(module, inputs, output_gradient)
    return {"weight": right["root"], "offset": right["offset"]}


def _summed_over_samples(module, inputs, output_gradient):
    return {name: value.sum(0) for name, value in squared_rule(module, inputs, output_gradient).items()}


def _transposed(module, inputs, output_gradient):
    right = squared_rule(module, inputs, output_gradient)
    return {**right, "root": right["root"].transpose(1, 2)}


def _no_dict(module, inputs, output_gradient):
    return squared_rule(module, inputs, output_gradient)["root"]


def _of_the_first_sample(module, inputs, output_gradient):
    right = squared_rule(module, inputs, output_gradient)
    return {name: value[:1].expand_as(value) for name, value in right.items()}


def _slightly_off(module, inputs, output_gradient):
    right = squared_rule(module, inputs, output_gradient)
    return {**right, "offset": 1.002 * right["offset"]}


@pytest.fixture
def registered():
    """``registered(layer, rule)``: register a rule until the test ends."""
    layers = []

    def register(layer: type[nn.Module], rule: object) -> None:
        assert ooc_ntk.layer_rule(layer)(rule) is rule, "the decorator must return the function"
        layers.append(layer)

    yield register
    for layer in layers:
        ooc_ntk.forget_layer_rule(layer)


@pytest.mark.parametrize("kernel", ["trace", "full"])
@pytest.mark.parametrize(
    ("layer", "rule", "model"),
    [
        (Squared, squared_rule, Net),
        (Squared, squared_rule, lambda: Net(twice=True)),
        (Squared, squared_rule, lambda: Net(twice=True, tokens=4)),
        (Scaled, scaled_rule, TwoInputNet),
    ],
    ids=["once", "twice", "tokens", "two inputs"],
)
def test_a_users_rule_is_used(layer, rule, model, kernel, registered, make_plan, compute):
    calls = []

    def counted(module, inputs, output_gradient):
        calls.append((type(module), len(inputs[0]), len(output_gradient)))
        return rule(module, inputs, output_gradient)

    wanted = job(model(), kernel=kernel, test=inputs(15)[12:], precision="float64")
    assert sources(make_plan(wanted)) == {"first": "rule", "own": "torch.func", "head": "rule"}
    registered(layer, counted)
    found = compute(wanted, tile_samples=7)
    assert sources(found.plan) == {"first": "rule", "own": "rule", "head": "rule"}
    assert calls
    assert all(kind is layer and samples == outputs for kind, samples, outputs in calls)
    rows = oracle.jacobian(wanted.model, torch.cat([wanted.train, wanted.test]))
    assert oracle.error(found, oracle.kernel(rows, 12, kernel)) <= FLOAT64


def test_a_rule_is_forgotten(make_plan):
    ooc_ntk.layer_rule(Squared)(squared_rule)
    ooc_ntk.forget_layer_rule(Squared)
    plan = make_plan(job(Net()))
    assert sources(plan)["own"] == "torch.func"
    assert any("own" in note for note in plan.notes)


def test_a_users_rule_may_be_switched_off(registered, compute):
    registered(Squared, squared_rule)
    found = compute(job(Net()), layer_rules=False)
    assert set(sources(found.plan).values()) == {"torch.func"}
    assert oracle.error(found, oracle.kernel(oracle.jacobian(Net(), inputs()), 12)) <= SMOOTH


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("rule", [_without_factor, _of_the_first_sample, _slightly_off])
def test_a_rule_that_disagrees_with_autograd_is_refused(rule, precision, registered, make_plan, tmp_path):
    registered(Squared, rule)
    with pytest.raises(InputError, match="rule") as error:
        make_plan(job(Net(), precision=precision))
    said = str(error.value)
    assert "Squared" in said, said
    assert len(NUMBER.findall(said)) >= 2, said  # the rule's number and autograd's


@pytest.mark.parametrize("rule", [_without_offset, _other_name, _summed_over_samples, _transposed, _no_dict])
def test_a_rule_that_returns_something_else_is_refused(rule, registered, make_plan):
    registered(Squared, rule)
    with pytest.raises(InputError, match="rule") as error:
        make_plan(job(Net()))
    assert "Squared" in str(error.value)


class Bypassed(Net):
    """Uses the parameters of the user's layer without calling it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(torch.tanh(self.first(x)) @ self.own.root.square().T + self.own.offset))


def test_a_module_with_a_rule_that_is_bypassed_falls_back(registered, compute):
    registered(Squared, squared_rule)
    found = compute(job(Bypassed(), precision="float64"))
    assert sources(found.plan)["own"] == "torch.func"
    assert any("own" in note and "bypassed" in note for note in found.plan.notes), found.plan.notes
    assert oracle.error(found, oracle.kernel(oracle.jacobian(Bypassed(), inputs()), 12)) <= FLOAT64


def test_a_wrong_rule_leaves_no_run(registered, tmp_path):
    registered(Squared, _without_factor)
    with pytest.raises(InputError, match="rule"):
        ooc_ntk.run(job(Net()), tmp_path / "run", budget=BUDGET, progress=False)
    assert not (tmp_path / "run" / "plan.json").exists()


# --- samples that depend on each other -------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Its outputs for one sample change with the other samples of the batch."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.how = how
        self.first = nn.Linear(5, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        if self.how == "mean":
            x = x - 0.5 * x.mean(0)
        elif self.how == "attention":
            x = x + (x @ x.T).softmax(1) @ x
        elif self.how == "neighbour":
            x = x + 0.1 * x.roll(1, 0)
        elif self.how == "norm":
            x = x / (1 + x.norm())
        return self.head(x)


MIXED = ("mean", "attention", "neighbour", "norm")


@pytest.mark.parametrize("how", MIXED)
def test_samples_that_depend_on_their_batch_are_refused(how, make_plan):
    with pytest.raises(InputError, match="batch") as error:
        make_plan(job(Mixed(how)))
    said = str(error.value)
    assert NUMBER.search(said), said  # the measured difference
    assert "allow_batch_dependence" in said, said


@pytest.mark.parametrize("representation", [None, "pairwise"])
@pytest.mark.parametrize("how", MIXED)
def test_samples_that_depend_on_their_batch_are_taken_one_by_one_if_asked_for(how, representation, compute):
    wanted = job(Mixed(how), kernel="full", test=inputs(15)[12:], allow_batch_dependence=True, precision="float64")
    preferences = {} if representation is None else {"representation": representation}
    found = compute(wanted, tile_samples=7, **preferences)
    assert found.plan.batch_size == 1
    assert {block.source for block in found.plan.blocks} == {"rule"}, "alone, layer rules hold"
    rows = oracle.jacobian(wanted.model, torch.cat([wanted.train, wanted.test]))
    assert oracle.error(found, oracle.kernel(rows, 12, "full")) <= FLOAT64


def test_samples_are_taken_one_by_one_whenever_that_is_asked_for(make_plan):
    """What a few samples do not show may still be there in others: the flag is taken at its word."""
    plan, other = (make_plan(job(Net(), allow_batch_dependence=allowed)) for allowed in (True, False))
    assert plan.batch_size == 1 < other.batch_size
    assert any("computed alone" in note for note in plan.notes)


# --- weights that a layer is given in another form -------------------------------------------------------------------


class Derived(nn.Module):
    """Uses the weight of a layer, but not as that layer would."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.how = how
        self.first = nn.Linear(5, 6)
        self.layer = nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.between(torch.tanh(self.first(x)), self.layer.weight)))

    def between(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.how == "a scaled copy":
            return F.linear(x, weight * 2)
        if self.how == "a normalised copy":
            return F.linear(x, F.normalize(weight, dim=1))
        if self.how == "the layer and a scaled copy":
            return self.layer(x) + F.linear(x, 0.5 * weight)
        if self.how == "the layer and a penalty":
            return self.layer(x) * weight.square().mean()
        if self.how == "a part":
            return F.linear(x, weight[:4]).repeat(1, 2)[:, :6]
        return F.linear(x, weight.clone().requires_grad_() * torch.eye(6).to(x))  # only the diagonal


DERIVED = (
    "a scaled copy",
    "a normalised copy",
    "the layer and a scaled copy",
    "the layer and a penalty",
    "a part",
    "the diagonal of a copy",
)


@pytest.mark.parametrize("how", DERIVED)
def test_a_weight_in_another_form_falls_back_to_torch_func_with_a_reason(how, compute):
    wanted = job(Derived(how), kernel="full", test=inputs(15)[12:], precision="float64")
    found = compute(wanted, tile_samples=7)
    assert sources(found.plan) == {"first": "rule", "layer": "torch.func", "head": "rule"}
    assert [block.reason != "" for block in found.plan.blocks] == [False, True, False]
    assert any("layer" in note and "torch.func" in note for note in found.plan.notes), found.plan.notes
    rows = oracle.jacobian(wanted.model, torch.cat([wanted.train, wanted.test]))
    assert oracle.error(found, oracle.kernel(rows, 12, "full")) <= FLOAT64


@pytest.mark.parametrize("how", DERIVED[:3])
def test_a_forced_representation_leaves_what_no_rule_covers_dense(how, compute):
    found = compute(job(Derived(how)), representation="pairwise")
    (block,) = (entry for entry in found.plan.blocks if entry.name == "layer")
    assert (block.representation, block.contraction) == ("dense", "gemm")
    assert oracle.error(found, oracle.kernel(oracle.jacobian(Derived(how), inputs()), 12)) <= SMOOTH


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"representation": "factord"}, ["representation 'factord'", "did you mean 'factored'"]),
        ({"representation": "tokens"}, ["'tokens'", "pairwise"]),  # what an embedding has, not what can be asked for
        ({"representation": 3}, ["representation", "3"]),
    ],
)
def test_an_unknown_representation_is_refused(given, named):
    with pytest.raises(InputError) as error:
        ooc_ntk.Preferences(**given)
    assert [text for text in named if text not in str(error.value)] == []


@pytest.mark.parametrize("layer", [torch.tanh, "Squared", Tensor])
def test_a_rule_is_for_a_class_of_modules(layer):
    with pytest.raises(InputError, match="rule"):
        ooc_ntk.layer_rule(layer)(squared_rule)


def test_the_samples_of_this_file_do_depend_on_their_batch():
    for how in MIXED:
        model, images = Mixed(how).double().eval(), inputs().double()
        with torch.no_grad():
            difference = model(images) - torch.cat([model(row[None]) for row in images])
        assert difference.abs().max() > 1e-2, how
