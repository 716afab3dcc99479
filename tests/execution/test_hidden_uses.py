"""What a few samples do not show: other uses of a weight, and branches that only some samples take."""

import warnings

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import nn

from ooc_ntk.api import InputError, Job
from tests import oracle
from tests.cases import FLOAT64


class Product(torch.autograd.Function):
    """A product that no mode sees."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight):
        return F.linear(x, weight)

    @staticmethod
    def setup_context(ctx, inputs, output):
        del output
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.T @ x


def turned_product(x: torch.Tensor, weight: torch.Tensor):
    return torch.tanh(torch.matmul(x, weight.t()))


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # scripting is deprecated, and still in use
    scripted = torch.jit.script(turned_product)


class DeadUse(nn.Module):
    """The weight is used again where the first samples' gradient of that is zero."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.head, self.how = nn.Linear(4, 4), nn.Linear(4, 2), how

    def forward(self, x):
        again = {
            "@": lambda: x @ self.fc.weight,
            "matmul": lambda: torch.matmul(x, self.fc.weight),
            "by name": lambda: torch.mul(input=x, other=self.fc.weight.sum()),
            "turned": lambda: x @ self.fc.weight.T,
            "rows of it": lambda: x @ self.fc.weight[:, :],
            "as an input": lambda: x @ F.linear(self.fc.weight, torch.eye(4, dtype=x.dtype)),
            "custom function": lambda: Product.apply(x, self.fc.weight),
            "scripted function": lambda: scripted(x, self.fc.weight) * 3,
            "in a list": lambda: x @ torch.cat([self.fc.weight, self.fc.weight], 1)[:, :4],
        }[self.how]()
        return self.head(torch.tanh(self.fc(x) + torch.relu(again - 1)))


def data():
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
    x[:2] *= 1e-3
    x[-1] *= 1e-3  # the check sees the first and the last one
    return x


@pytest.mark.parametrize(
    "how",
    [
        "@",
        "matmul",
        "by name",
        "in a list",
        "turned",
        "rows of it",
        "as an input",
        "custom function",
        "scripted function",
    ],
)
def test_a_weight_that_another_function_uses_as_well_is_left_to_torch_func(how, compute):
    job = Job(DeadUse(how).eval(), data(), precision="float64", device="cpu")
    found = compute(job)
    assert next(block for block in found.plan.blocks if "fc.weight" in block.parameters).source == "torch.func"
    assert oracle.error(found, oracle.kernel(oracle.jacobian(job.model, data()), 12)) <= FLOAT64


class SomeBranch(nn.Module):
    """Squares what is large on average: a few samples, which no probe need see."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        hidden = torch.tanh(self.fc(x))
        if x.mean() > 2:
            hidden = hidden * hidden
        return self.head(hidden)


def test_samples_that_branch_differently_in_a_batch_are_refused(compute):
    x = torch.randn(100, 4, generator=torch.Generator().manual_seed(1))
    x[[37, 58]] += 5
    with pytest.raises(InputError, match="branches on its data.*--no-layer-rules"):
        compute(Job(SomeBranch().eval(), x, device="cpu"), tile_samples=100)


class Split(nn.Module):
    """A layer whose weight and bias belong to two modules."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 3, bias=False), nn.Module()
        self.b.bias = nn.Parameter(torch.randn(3))

    def forward(self, x):
        return F.linear(x, self.a.weight, self.b.bias)


def test_weight_and_bias_of_two_modules(compute):
    job = Job(Split().eval(), data(), precision="float64", device="cpu")
    assert oracle.error(compute(job), oracle.kernel(oracle.jacobian(job.model, data()), 12)) <= FLOAT64


class LateMixing(nn.Module):
    """Only samples that are marked, the last ones, see their batch mates."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        out = self.fc(x)
        return out + torch.where(x[:, :1] > 5, 1.0, 0.0) * out.mean(0)


def test_batch_mates_that_change_only_the_last_samples_are_seen(compute):
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(1))
    x[50:, 0] = 9
    with pytest.raises(InputError, match="batch mates"):
        compute(Job(LateMixing().eval(), x, device="cpu"))


class Positions(nn.Module):
    """Positions cut to the length of a sequence; cut so, the copies of a few samples stay whole, too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.head = nn.Embedding(13, 8), nn.Linear(8, 3)
        self.positions = nn.Parameter(torch.randn(7, 8))

    def forward(self, tokens):
        return self.head(torch.tanh(self.words(tokens) + self.positions[: tokens.shape[1]])).mean(1)


class Chunks(nn.Module):
    """Eight samples at a time."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.middle, self.head = nn.Embedding(13, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, tokens):
        parts = [torch.tanh(self.middle(part)) for part in self.words(tokens).split(8)]
        return self.head(torch.cat(parts)).mean(1)


@pytest.mark.parametrize(("kind", "left"), [(Positions, {"positions"}), (Chunks, None)])
def test_what_holds_for_a_few_samples_only_falls_back(kind, left, compute):
    tokens = torch.randint(0, 13, (20, 7), generator=torch.Generator().manual_seed(1))
    job = Job(kind().eval(), tokens, precision="float64", device="cpu")
    found = compute(job)
    names = {name for block in found.plan.blocks if block.source != "rule" for name in block.parameters}
    assert names == (left or {name for name, _ in job.model.named_parameters()})
    assert any("not for a whole batch" in note for note in found.plan.notes)
    assert oracle.error(found, oracle.kernel(oracle.jacobian(job.model, tokens), 20)) <= FLOAT64


class DeadSum(nn.Module):
    """A bare parameter that every sample has for itself, but for a use that is dead on all samples but one."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.how, self.head, self.bare = how, nn.Linear(4, 2), nn.Parameter(torch.randn(4))

    def forward(self, x):
        gate = x[:, :1]
        again = {
            "sum": lambda: torch.relu(gate) * self.bare.sum(),
            "sum, out of reach": lambda: torch.relu(gate - 500) * self.bare.sum(),
            "where": lambda: torch.where(gate > 500, self.bare[1], gate),
            "order": lambda: torch.relu(gate) * self.bare.softmax(0),
        }[self.how]()
        return self.head(torch.tanh(x + self.bare + again))


@pytest.mark.parametrize("how", ["sum", "sum, out of reach", "where", "order"])
def test_a_bare_parameter_with_a_use_that_is_dead_on_the_probes_samples(how, compute):
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
    x[:, 0] = -x[:, 0].abs()
    x[5, 0] = 2.5 if how in ("sum", "order") else 502.5  # neither compared with the first ones nor by the check
    job = Job(DeadSum(how).eval(), x, precision="float64", device="cpu")
    found = compute(job)
    assert oracle.error(found, oracle.kernel(oracle.jacobian(job.model, x), 12)) <= FLOAT64
    assert next(block for block in found.plan.blocks if "bare" in block.parameters).source == "torch.func"


def test_a_bare_parameter_that_every_sample_has_for_itself_has_a_rule(compute):
    class Harmless(DeadSum):
        def forward(self, x):
            return self.head(torch.tanh(x + self.bare + torch.relu(x[:, :1] - 500) * self.bare))

    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
    job = Job(Harmless("").eval(), x, precision="float64", device="cpu")
    found = compute(job)
    assert all(block.source == "rule" for block in found.plan.blocks)
    assert oracle.error(found, oracle.kernel(oracle.jacobian(job.model, x), 12)) <= FLOAT64
