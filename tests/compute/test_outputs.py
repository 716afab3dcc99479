"""Output functions and their cotangents against formulas in float64."""

import pytest
import torch

from ooc_ntk.compute.outputs import OutputRows, model_logits
from ooc_ntk.errors import InputError

#: From undecided to so sure that ``1 − p`` is below what float32 can tell from zero.
LOGITS = [[0.3, -0.2, 0.1], [9.0, -1.0, 0.0], [25.0, -3.0, 2.0], [-4.0, 30.0, 1.0]]


@pytest.mark.parametrize("target", [0, 1, 2])
@pytest.mark.parametrize("logits", LOGITS)
class TestProbabilities:
    def test_loss(self, logits, target):
        found = OutputRows.of("loss", "trace").cotangents(torch.tensor(logits), torch.tensor(target))
        z = torch.tensor(logits).double()
        wanted = z.softmax(0)
        wanted[target] = -torch.cat([z[:target], z[target + 1 :]]).exp().sum() / z.exp().sum()
        assert found.dtype == torch.float32
        torch.testing.assert_close(found[0].double(), wanted, rtol=2e-7, atol=0)

    def test_margin(self, logits, target):
        found = OutputRows.of("margin", "trace").cotangents(torch.tensor(logits), torch.tensor(target))
        z = torch.tensor(logits).double()
        z[target] = -torch.inf
        wanted = -z.softmax(0)
        wanted[target] = 1
        torch.testing.assert_close(found[0].double(), wanted, rtol=2e-7, atol=0)


def test_loss_of_real_targets_is_half_the_squared_error():
    rows = OutputRows.of("loss", "trace")
    output, target = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 2.0, 5.0])
    torch.testing.assert_close(rows.cotangents(output, target), torch.tensor([[0.5, 0.0, -2.0]]))
    assert rows.count(output, target) == 1


def test_under_vmap_the_cotangents_are_the_same():
    outputs, targets = torch.tensor(LOGITS), torch.tensor([0, 1, 2, 1])
    for name in ("loss", "margin"):
        rows = OutputRows.of(name, "trace")
        together = torch.vmap(rows.cotangents)(outputs, targets)
        alone = torch.stack([rows.cotangents(output, target) for output, target in zip(outputs, targets, strict=True)])
        torch.testing.assert_close(together, alone, rtol=2e-7, atol=0)


@pytest.mark.parametrize(
    ("kernel", "wanted"),
    [
        ("trace", [[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]),
        ("full", [[1.0, 0, 0], [0, 1, 0], [0, 0, 1]]),
        ("pseudo", [[1.0, 1, 1]]),
        ("output:1", [[0.0, 1, 0]]),
    ],
)
def test_rows_of_every_kernel(kernel, wanted):
    assert OutputRows.of("logits", kernel).cotangents(torch.randn(3), None).tolist() == wanted


def test_rows_of_a_users_function():
    def function(output, target):
        return torch.stack([output.sum(), (output * target).sum()])

    target, output = torch.tensor([1.0, 2.0, 4.0]), torch.randn(3)
    assert OutputRows.of(function, "trace").count(output, target) == 2
    assert OutputRows.of(function, "pseudo").cotangents(output, target).tolist() == [[2.0, 3.0, 5.0]]
    assert OutputRows.of(function, "output:1").cotangents(output, target).tolist() == [[1.0, 2.0, 4.0]]


@pytest.mark.parametrize(
    ("outputs", "output", "target", "message"),
    [
        ("loss", torch.randn(3), None, r"outputs='loss' needs a label with every sample.*\(inputs, labels\)"),
        ("margin", torch.randn(3), None, "outputs='margin' needs a label"),
        ("margin", torch.randn(3), torch.randn(3), "margin needs integer class labels"),
        ("margin", torch.randn(1), torch.tensor(0), "at least two logits, the model has 1"),
        ("loss", torch.randn(1), torch.tensor(0), "at least two logits, the model has 1"),
        ("loss", torch.randn(3), torch.randn(2), "compares 3 outputs with 2 target values"),
        (lambda output, target: output[None], torch.randn(3), None, r"scalar or a 1-D tensor per sample, got \(1, 3\)"),
        (lambda output, target: 3.0, torch.randn(3), None, "scalar or a 1-D tensor per sample, got float"),
    ],
)
def test_bad_output_functions_and_targets(outputs, output, target, message):
    with pytest.raises(InputError, match=message):
        OutputRows.of(outputs, "trace").count(output, target)


def test_an_output_out_of_range():
    OutputRows.of("logits", "output:2").check(3)
    with pytest.raises(InputError, match=r"'output:3' is out of range: .* has 3 outputs, so c runs from 0 to 2"):
        OutputRows.of("logits", "output:3").check(3)


class WithLogits:
    logits = torch.ones(2, 3)


@pytest.mark.parametrize("output", [torch.ones(2, 3), {"logits": torch.ones(2, 3), "loss": None}, WithLogits()])
def test_where_the_logits_are(output):
    assert torch.equal(model_logits(output), torch.ones(2, 3))


def test_logits_are_flattened_to_a_row_per_sample():
    assert model_logits(torch.ones(5)).shape == (5, 1)
    assert model_logits(torch.ones(5, 2, 3)).shape == (5, 6)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ((torch.ones(2),), "returned a tuple"),
        ({"scores": 1}, "returned a dict"),
        (torch.ones(2, 3).long(), "torch.int64"),
    ],
)
def test_what_is_no_output(output, message):
    with pytest.raises(InputError, match=message):
        model_logits(output)
