"""Kernels of features, and heads with more outputs than inputs, against the oracle."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ooc_ntk
from ooc_ntk.errors import InputError
from tests import oracle
from tests.cases import KINKED, SMOOTH, TRAIN, case

pytestmark = pytest.mark.usefixtures("one_thread")


def features(module: nn.Module, images: Tensor, take: dict[str, str]) -> dict[str, np.ndarray]:
    """What layers are given or give, (samples, width) float64, by plain hooks on a copy in float64."""
    import copy

    module, found = copy.deepcopy(module).double(), {}

    def hook(name, side):
        def keep(part, inputs, output):
            value = inputs[0] if side == "input" else output
            found[name] = value.detach().flatten(1).clone().numpy()

        return keep

    named = dict(module.named_modules())
    for name, side in take.items():
        named[name].register_forward_hook(hook(name, side))
    with torch.no_grad():
        found["(outputs)"] = module(images.double()).flatten(1).numpy()
    return found


def last_linear(module: nn.Module) -> str:
    return [name for name, part in module.named_modules() if isinstance(part, nn.Linear)][-1]


@pytest.mark.parametrize("dataflow", ["resident", "spill"])
@pytest.mark.parametrize("name", ["smooth-mlp", "attention"])
def test_embedding_and_conjugate_are_of_the_input_of_the_last_layer(name, dataflow, compute):
    chosen = case(name)
    last = last_linear(chosen.module)
    h = features(chosen.module, chosen.images, {last: "input"})[last]
    for kernel, wanted in (("embedding", h @ h.T), ("conjugate", h @ h.T / h.shape[1])):
        job = chosen.job(kernel=kernel)
        found = compute(job, dataflow=dataflow)
        assert oracle.error(found, wanted[:, :TRAIN]) <= SMOOTH
        assert found.plan.rows_per_sample == 1
        assert ooc_ntk.verify(found.path, job).passed
    trace = compute(chosen.job(parameters=f"{last}.weight"))
    outputs = trace.plan.outputs
    assert oracle.error(trace, outputs * (h @ h.T)[:, :TRAIN]) <= SMOOTH  # the embedding kernel is the last layer's NTK


class Shared(nn.Module):
    """A convolution, an in-place ReLU that is called twice, and no linear layer at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.act = nn.ReLU(inplace=True)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.body(self.act(self.conv(x)))).mean((2, 3))


def gram(parts: list[np.ndarray]) -> np.ndarray:
    return sum(part @ part.T for part in parts)[:, :TRAIN]


def test_layers_by_pattern(compute):
    torch.manual_seed(1)
    module, data = Shared().eval(), case("smooth-mlp").images.reshape(-1, 1, 8, 8)
    train, test = data[:TRAIN], data[TRAIN:]
    found = features(module, data, {"conv": "output", "body.0": "output", "body.1": "output"})
    for pattern, names in (
        ("conv", ["conv"]),
        ("body.*", ["body.0", "body.1"]),
        ("*", ["conv", "body.0", "body.1"]),
        ("body", ["body.1"]),
    ):
        kernel = compute(ooc_ntk.Job(module, train, test, kernel=f"embedding:{pattern}"))
        assert oracle.error(kernel, gram([found[name] for name in names])) <= KINKED, pattern
    # A module that is called twice counts twice, each call by itself.
    first, second = found["conv"].clip(min=0), found["body.1"].clip(min=0)
    assert (
        oracle.error(compute(ooc_ntk.Job(module, train, test, kernel="embedding:act")), gram([first, second])) <= KINKED
    )
    # Nothing linear gives the outputs: they are the last features themselves.
    kernel = compute(ooc_ntk.Job(module, train, test, kernel="embedding"))
    assert oracle.error(kernel, gram([found["(outputs)"]])) <= KINKED


def test_features_normalised_and_projected(compute):
    chosen = case("smooth-mlp")
    last = last_linear(chosen.module)
    h = features(chosen.module, chosen.images, {last: "input"})[last]
    unit = h / np.linalg.norm(h, axis=1, keepdims=True)
    assert (
        oracle.error(compute(chosen.job(kernel="embedding", normalize="cosine")), (unit @ unit.T)[:, :TRAIN]) <= SMOOTH
    )
    job = chosen.job(kernel="embedding:*", projection="sjlt:16")
    assert ooc_ntk.verify(compute(job).path, job).passed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel": "embedding", "outputs": "loss"}, "nothing is differentiated; leave outputs out"),
        ({"kernel": "conjugate", "parameters": "*"}, "nothing is differentiated; leave parameters out"),
        ({"kernel": "embedding:"}, "must name layers"),
        ({"kernel": "embedding:<layers>"}, "must name layers"),
        ({"kernel": "embeding"}, "did you mean 'embedding'"),
    ],
)
def test_feature_kernels_that_make_no_sense(settings, message):
    with pytest.raises(InputError, match=message):
        case("smooth-mlp").job(**settings)


def test_a_layer_that_is_not_there():
    with pytest.raises(InputError, match="unknown layer or pattern of an embedding kernel 'layer9'"):
        ooc_ntk.plan(case("smooth-mlp").job(kernel="embedding:layer9"))


def test_hooks_and_parameters_of_the_model_are_left_alone(compute):
    chosen = case("smooth-mlp")
    before = [name for name, _ in chosen.module.named_parameters()]
    compute(chosen.job(kernel="embedding:*"))
    assert [name for name, _ in chosen.module.named_parameters()] == before
    assert not any(part._forward_hooks for part in chosen.module.modules())


CLASSES, HIDDEN = 23, 6


class Wide(nn.Module):
    """A head with more outputs than inputs, and what may stand in the way of making it narrow."""

    def __init__(self, how: str = "plain") -> None:
        super().__init__()
        self.how = how
        self.first, self.second = nn.Linear(64, 9), nn.Linear(9, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, CLASSES, bias=how != "no bias")
        if how == "tied":
            self.table = nn.Embedding(CLASSES, HIDDEN)
            self.table.weight = self.head.weight
        self.bound = 1e3
        self.register_buffer("mask", torch.ones(CLASSES))
        self.register_buffer("same", torch.arange(CLASSES))
        if how == "listed":
            self.apart = [self.head]  # called, but not as a part of the model
        if how == "branch":
            self.beside = nn.Linear(HIDDEN, CLASSES)
            nn.init.zeros_(self.beside.weight)
            nn.init.zeros_(self.beside.bias)
        if how == "normed":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.nn.utils.weight_norm(self.head)
        if how == "parametrised":
            torch.nn.utils.parametrizations.weight_norm(self.head)
        if how == "more":
            self.head.register_parameter("extra", nn.Parameter(torch.ones(2)))
        if how == "hooked":
            self.head.register_forward_hook(lambda module, inputs, output: 2 * output)
        if how == "dead":
            with torch.no_grad():
                self.head.weight[:, 0] = 0

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(torch.tanh(self.second(torch.tanh(self.first(x.flatten(1))))))
        if self.how == "tied":
            h = h + self.table(torch.zeros(len(x), dtype=torch.long, device=x.device))
        if self.how == "penalised":
            h = h * (1 + self.head.weight.square().mean())
        if self.how == "listed":
            return self.apart[0](h)
        if self.how == "positions":
            return self.head(torch.stack([h, 2 * h], 1)).flatten(1)
        z = self.head(h)
        if self.how == "clamp":
            return z.clamp(-self.bound, self.bound)
        if self.how == "mask":
            return z * self.mask
        if self.how == "order":
            return z[:, self.same]
        if self.how == "branch":
            return z + self.beside(h)
        if self.how == "temperature":
            return z / 3.0
        if self.how == "view":
            return z.view(len(z), 1, -1).flatten(1)
        return z.softmax(1) if self.how == "softmax" else z


@pytest.fixture(scope="module")
def digits():
    return case("smooth-mlp").images


def wide(how: str) -> nn.Module:
    torch.manual_seed(2)
    return Wide(how).eval()


@pytest.mark.parametrize("settings", [{}, {"dataflow": "spill"}, {"representation": "dense"}, {"layer_rules": False}])
@pytest.mark.parametrize("how", ["plain", "no bias", "dead", "view"])
def test_a_wide_head_needs_as_many_rows_as_it_has_inputs(how, settings, digits, compute):
    module = wide(how)
    job = ooc_ntk.Job(module, digits[:TRAIN], digits[TRAIN:])
    found = compute(job, **settings)
    rows = oracle.jacobian(module, digits)
    assert rows.shape[1] == CLASSES
    assert oracle.error(found, oracle.kernel(rows, TRAIN)) <= SMOOTH
    assert found.plan.rows_per_sample == HIDDEN
    assert (found.plan.head.name, found.plan.outputs) == ("head", CLASSES)
    assert "6 backward passes in place of 23" in str(found.plan)
    assert ooc_ntk.verify(found.path, job).passed
    np.testing.assert_allclose(found.diagonal(), np.einsum("icp,icp->i", rows, rows), rtol=1e-5)


def test_in_float64_it_is_exact(digits, compute):
    module = wide("plain")
    job = ooc_ntk.Job(module, digits[:TRAIN], precision="float64")
    assert oracle.error(compute(job), oracle.kernel(oracle.jacobian(module, digits[:TRAIN]), TRAIN)) <= 1e-12


@pytest.mark.parametrize(
    ("settings", "kind"),
    [({"scale": "mean"}, {"scale": "mean"}), ({"normalize": "cosine"}, {"normalize": "cosine"})],
)
def test_scaled_and_normalised(settings, kind, digits, compute):
    module = wide("plain")
    found = compute(ooc_ntk.Job(module, digits[:TRAIN], digits[TRAIN:], **settings))
    assert found.plan.head is not None
    assert oracle.error(found, oracle.kernel(oracle.jacobian(module, digits), TRAIN, **kind)) <= SMOOTH


@pytest.mark.parametrize("patterns", [["first.*"], ["!head.*"], ["head.*"], ["first.*", "head.*"]])
def test_some_parameters(patterns, digits, compute):
    module = wide("plain")
    found = compute(ooc_ntk.Job(module, digits[:TRAIN], parameters=patterns))
    assert found.plan.head is not None
    names = [name for name, _ in module.named_parameters()]
    kept = [n for n in names if n.startswith("first") or (n.startswith("head") and "head.*" in patterns)]
    if patterns == ["!head.*"]:
        kept = [n for n in names if not n.startswith("head")]
    if patterns == ["head.*"]:
        kept = [n for n in names if n.startswith("head")]
    rows = oracle.jacobian(module, digits[:TRAIN], names=kept)
    assert oracle.error(found, oracle.kernel(rows, TRAIN)) <= SMOOTH


@pytest.mark.parametrize(
    "how",
    [
        *("tied", "penalised", "positions", "softmax", "clamp", "mask", "order", "branch", "temperature"),
        *("parametrised", "more", "hooked", "listed"),
    ],
)
def test_what_stands_in_the_way(how, digits, compute):
    module = wide(how)
    found = compute(ooc_ntk.Job(module, digits[:TRAIN]))
    assert found.plan.head is None
    assert oracle.error(found, oracle.kernel(oracle.jacobian(module, digits[:TRAIN]), TRAIN)) <= SMOOTH


def test_a_head_whose_weight_is_made_before_every_call(digits):
    assert ooc_ntk.plan(ooc_ntk.Job(wide("normed"), digits)).head is None


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel": "pseudo"},
        {"kernel": "full"},
        {"kernel": "output:3"},
        {"outputs": "logits[0:20]"},
        {"outputs": "logprob"},
    ],
)
def test_only_the_trace_of_raw_logits(settings, digits):
    assert ooc_ntk.plan(ooc_ntk.Job(wide("plain"), digits, **settings)).head is None


def test_one_parameter_of_the_head_and_projected_and_by_hand(digits, rates):
    for settings in ({"parameters": ["!head.bias"]}, {"parameters": ["!head.weight"]}, {"projection": "sjlt:64"}):
        assert ooc_ntk.plan(ooc_ntk.Job(wide("plain"), digits, **settings)).head is None
    by_hand = ooc_ntk.Preferences(every_output=True)
    plan = ooc_ntk.plan(ooc_ntk.Job(wide("plain"), digits), preferences=by_hand, rates=rates)
    assert plan.head is None
    assert plan.rows_per_sample == CLASSES


def test_a_plan_with_a_head_is_saved_and_run_by_another_process_of_thought(digits, tmp_path):
    job = ooc_ntk.Job(wide("plain"), digits[:TRAIN])
    plan = ooc_ntk.plan(job)
    plan.save(tmp_path / "plan.json")
    again = ooc_ntk.Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert dataclasses.replace(plan, head=None).digest != plan.digest
    kernel = ooc_ntk.run(ooc_ntk.Job(wide("plain"), digits[:TRAIN]), tmp_path / "run", plan=again, progress=False)
    assert oracle.error(kernel, oracle.kernel(oracle.jacobian(wide("plain"), digits[:TRAIN]), TRAIN)) <= SMOOTH
    with pytest.raises(ooc_ntk.OocNtkError, match="derives 6 rows for 23 outputs; leave --every-output out"):
        ooc_ntk.run(job, tmp_path / "run", preferences=ooc_ntk.Preferences(every_output=True), progress=False)


def test_a_head_that_is_the_whole_model(compute):
    torch.manual_seed(0)
    module, data = nn.Linear(4, 9), torch.randn(7, 4)
    found = compute(ooc_ntk.Job(module, data))
    assert found.plan.head is not None
    assert oracle.error(found, 9 * ((data @ data.T).double().numpy() + 1)) <= SMOOTH


def test_checkpoints_share_a_narrow_head_only_where_each_allows_it(digits, tmp_path):
    module = wide("clamp")
    states = [{name: value.clone() for name, value in module.state_dict().items()}]
    module.how = "plain"
    job = ooc_ntk.Job(module, digits[:TRAIN])

    class Switched(Wide):
        """Plain as long as its norm is what it was drawn with, clamped after that."""

        def forward(self, x: Tensor) -> Tensor:
            self.how = "clamp" if float(self.norm.bias.detach()[0]) else "plain"
            self.bound = 0.05
            return super().forward(x)

    torch.manual_seed(2)
    module = Switched().eval()
    states = [{name: value.clone() for name, value in module.state_dict().items()} for _ in range(2)]
    states[1]["norm.bias"] += 0.1
    job = ooc_ntk.Job(module, digits[:TRAIN])
    found = ooc_ntk.run_checkpoints(job, tmp_path / "out", states, progress=False)
    assert found[0].plan.head is not None
    assert found[1].plan.head is None
    for kernel, state in zip(found, states, strict=True):
        module.load_state_dict(state)
        wanted = oracle.kernel(oracle.jacobian(module, digits[:TRAIN]), TRAIN)
        assert oracle.error(kernel, wanted) <= KINKED


class Odd(nn.Module):
    """Two layers and a head of some kind, all of whose kinds read the same features."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.body = nn.Linear(64, 6)

        class Other(nn.Linear):
            pass

        self.head = Other(6, 3) if how == "subclass" else nn.Linear(6, 3)
        if how == "parametrised":
            torch.nn.utils.parametrizations.weight_norm(self.head)
        if how == "adapter":
            self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.body(x.flatten(1)))
        z = self.head(h)
        if self.how == "adapter":
            z = z + self.up(self.down(h))
        return z.log_softmax(1) / 2.0 if self.how == "softened" else z


@pytest.mark.parametrize("how", ["plain", "subclass", "parametrised", "adapter", "softened"])
def test_the_last_features_of_heads_of_all_kinds(how, digits, compute):
    torch.manual_seed(3)
    module = Odd(how).eval()
    h = torch.tanh(module.body.double()(digits.double().flatten(1))).detach().numpy()
    module.float()
    found = compute(ooc_ntk.Job(module, digits[:TRAIN], digits[TRAIN:], kernel="embedding"))
    assert oracle.error(found, (h @ h.T)[:, :TRAIN]) <= SMOOTH
    assert "features are the input of 'head', 6 numbers a sample" in str(found.plan)


def test_no_single_last_layer_is_said(digits):
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, 4), nn.Sequential(nn.Linear(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x.flatten(1))
            return h + self.second(h)

    with pytest.raises(InputError, match="come from more than one layer .* name the layers"):
        ooc_ntk.plan(ooc_ntk.Job(Residual(), digits, kernel="embedding"))
