"""Output functions end to end: parts of the outputs, log-probabilities, sequences and pairs, against the oracle."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn

import ooc_ntk
from ooc_ntk.compute.functions import ClipOutput
from ooc_ntk.errors import InputError
from ooc_ntk.execution import prepare
from tests import oracle
from tests.cases import PROBABILITY, SMOOTH, TRAIN, case

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS, VOCABULARY, WIDTH = 6, 11, 8


def part(start: int, stop: int):
    return lambda output, target: output[start:stop]


def log_softmax(output: Tensor, target: Tensor | None) -> Tensor:
    return output - output.exp().sum().log()


@pytest.mark.parametrize("kernel", ["trace", "pseudo", "output:1", "full"])
@pytest.mark.parametrize(("outputs", "function"), [("logits[2:5]", part(2, 5)), ("logits[1:3]", part(1, 3))])
def test_a_part_of_the_logits(kernel, outputs, function, compute):
    chosen = case("smooth-mlp")
    found = compute(chosen.job(outputs=outputs, kernel=kernel))
    rows = oracle.jacobian(chosen.module, chosen.images, chosen.targets, function)
    assert oracle.error(found, oracle.kernel(rows, TRAIN, kernel)) <= SMOOTH
    assert found.plan.outputs == rows.shape[1]
    assert ooc_ntk.verify(found.path, chosen.job(outputs=outputs, kernel=kernel)).passed


def test_one_logit_is_the_kernel_of_that_output(compute):
    chosen = case("smooth-mlp")
    one = compute(chosen.job(outputs="logits[3]"))
    assert oracle.error(one, oracle.kernel(oracle.case_jacobian("smooth-mlp"), TRAIN, "output:3")) <= SMOOTH


@pytest.mark.parametrize("method", [None, "vmap", "loop"])
@pytest.mark.parametrize(("outputs", "kept"), [("logprob", slice(None)), ("logprob[1:3]", slice(1, 3))])
def test_log_probabilities(method, outputs, kept, compute):
    chosen = case("attention", trained=True)
    job = chosen.job(outputs=outputs)
    found = compute(job, method)
    rows = oracle.jacobian(chosen.module, chosen.images, chosen.targets, log_softmax)[:, kept]
    assert oracle.error(found, oracle.kernel(rows, TRAIN)) <= PROBABILITY
    assert ooc_ntk.verify(found.path, job).passed


class Causal(nn.Module):
    """A causal language model of one attention layer: logits for every position."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids)
        scores = self.query(x) @ self.key(x).transpose(1, 2) / WIDTH**0.5
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        return self.head(x + scores.masked_fill(later, -torch.inf).softmax(2) @ self.value(x))


@pytest.fixture(scope="module")
def sentences():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCABULARY, (9, TOKENS), generator=generator)
    following = torch.full_like(ids, -100)
    following[:, :-1] = ids[:, 1:]
    for index, length in enumerate((6, 4, 2, 5, 6, 3, 2, 4, 6)):  # shorter ones end early
        ids[index, length:] = 0
        following[index, length - 1 :] = -100
    torch.manual_seed(3)
    return Causal().eval(), ids, following


def mean_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.reshape(TOKENS, VOCABULARY), target)


def last_logit(output: Tensor, target: Tensor) -> Tensor:
    last = max(index for index in range(TOKENS) if target[index] >= 0)
    return output.reshape(TOKENS, VOCABULARY)[last, target[last]]


@pytest.mark.parametrize("method", [None, "vmap", "loop"])
@pytest.mark.parametrize(("outputs", "function"), [("loss", mean_loss), ("next-token", last_logit)])
def test_sequences_of_tokens(method, outputs, function, sentences, compute):
    model, ids, following = sentences
    job = ooc_ntk.Job(model, ({"input_ids": ids[:6]}, following[:6]), ({"input_ids": ids[6:]}, following[6:]))
    job = ooc_ntk.Job(model, job.train, job.test, outputs=outputs)
    found = compute(job, method)
    rows = oracle.jacobian(model, {"input_ids": ids}, following, function)
    assert rows.shape[1] == 1
    assert oracle.error(found, oracle.kernel(rows, 6)) <= PROBABILITY
    assert ooc_ntk.verify(found.path, job, samples=6).passed


def test_the_next_token_of_a_single_label_is_the_logit_of_that_class(compute):
    chosen = case("smooth-mlp")
    found = compute(chosen.job(outputs="next-token"))
    rows = oracle.jacobian(chosen.module, chosen.images, chosen.targets, lambda z, y: z[y])
    assert oracle.error(found, oracle.kernel(rows, TRAIN)) <= SMOOTH


class Pair(nn.Module):
    """Two small encoders, of an image and of a text, with embeddings of unit length."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.image, self.text = nn.Linear(5, 4), nn.Linear(3, 4)

    def forward(self, image: Tensor, text: Tensor) -> object:
        pair = (F.normalize(self.image(image).tanh(), dim=1), F.normalize(self.text(text), dim=1))
        if self.form == "tuple":
            return (*pair, torch.tensor(14.3))
        named = dict(zip(("image_embeds", "text_embeds"), pair, strict=True))
        return named if self.form == "dict" else SimpleNamespace(**named)


@pytest.fixture(scope="module")
def pairs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, 5, generator=generator), torch.randn(12, 3, generator=generator)


def contrast(images: Tensor, texts: Tensor):
    """The formula of the TRAK paper's section 5.1 with its sums written out."""

    def function(output: Tensor, target: Tensor | None) -> Tensor:
        u, v = output[:4], output[4:]
        first = sum(torch.exp(-(u @ v) + u @ other) for other in texts)
        second = sum(torch.exp(-(u @ v) + other @ v) for other in images)
        return -torch.log(first) - torch.log(second)

    return function


class Joined(nn.Module):
    """The same pair as one row, for the oracle."""

    def __init__(self, pair: nn.Module) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        u, v, _ = self.pair(image, text)
        return torch.cat([u, v], 1)


def test_pairs_against_a_bank(pairs, compute):
    torch.manual_seed(0)
    model = Pair("tuple").eval()
    job = ooc_ntk.Job(model, {"image": pairs[0], "text": pairs[1]}, outputs="clip")
    found = compute(job)
    u, v, _ = model.double()(pairs[0].double(), pairs[1].double())  # fewer samples than a bank holds: all of them
    rows = oracle.jacobian(Joined(model), pairs, None, contrast(u.detach(), v.detach()))
    model.float()
    assert oracle.error(found, oracle.kernel(rows, 12)) <= PROBABILITY
    assert ooc_ntk.verify(found.path, job).passed

    own = ooc_ntk.ClipOutput(u[:5].detach(), v[:5].detach())
    found = compute(ooc_ntk.Job(model, {"image": pairs[0], "text": pairs[1]}, outputs=own))
    rows = oracle.jacobian(Joined(model), pairs, None, contrast(u[:5].detach(), v[:5].detach()))
    assert oracle.error(found, oracle.kernel(rows, 12)) <= PROBABILITY


@pytest.mark.parametrize("form", ["dict", "object"])
def test_pairs_by_name(form, pairs, compute):
    kernels = []
    for each in ("tuple", form):
        torch.manual_seed(0)
        kernels.append(compute(ooc_ntk.Job(Pair(each).eval(), {"image": pairs[0], "text": pairs[1]}, outputs="clip")))
    assert (kernels[0][:] == kernels[1][:]).all()


def test_another_bank_is_another_job(pairs, tmp_path):
    torch.manual_seed(0)
    model, data = Pair("tuple").eval(), {"image": pairs[0], "text": pairs[1]}
    generator = torch.Generator().manual_seed(5)
    # Long enough that their text form is cut short.
    banks = [torch.randn(600, 4, generator=generator) for _ in range(2)]
    changed = banks[0].clone()
    changed[300, 2] += 1
    ooc_ntk.run(ooc_ntk.Job(model, data, outputs=ClipOutput(banks[0], banks[1])), tmp_path / "run", progress=False)
    with pytest.raises(ooc_ntk.OocNtkError, match="kernel settings"):
        ooc_ntk.run(ooc_ntk.Job(model, data, outputs=ClipOutput(changed, banks[1])), tmp_path / "run", progress=False)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ("logits[0:11]", r"outputs 'logits\[0:11\]' are out of range: the model has 10 outputs, numbered from 0 to 9"),
        ("logits[10]", "out of range: the model has 10 outputs"),
        ("clip", "needs image and text embeddings of one shape .* it returned Tensor"),
    ],
)
def test_outputs_that_the_model_does_not_have(outputs, message):
    with pytest.raises(InputError, match=message):
        ooc_ntk.plan(case("smooth-mlp").job(outputs=outputs))


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ("logits[3:3]", "hold no output"),
        ("logits[a]", "cannot read outputs"),
        ("logits[]", "cannot read outputs"),
        ("loss[0:1]", "has no parts"),
        ("logit", "unknown outputs 'logit'; did you mean 'logits'"),
        ("logits[-1]", "cannot read outputs"),
    ],
)
def test_outputs_that_cannot_be_read(outputs, message):
    with pytest.raises(InputError, match=message):
        case("smooth-mlp").job(outputs=outputs)


def test_targets_that_do_not_fit(sentences):
    model, ids, following = sentences
    wrong = following.clone()
    wrong[0, 0] = VOCABULARY
    with pytest.raises(InputError, match=f"token {VOCABULARY} is out of range: the model has {VOCABULARY} outputs a"):
        ooc_ntk.plan(ooc_ntk.Job(model, ({"input_ids": ids}, wrong), outputs="loss"))
    with pytest.raises(InputError, match=r"the model returned \(1, 6, 11\) for targets of shape \(1, 5\); a row of"):
        ooc_ntk.plan(ooc_ntk.Job(model, ({"input_ids": ids}, following[:, :5]), outputs="loss"))
    with pytest.raises(InputError, match=r"needs one row of logits a sample, the model returned \(1, 6, 11\)"):
        ooc_ntk.plan(ooc_ntk.Job(model, ({"input_ids": ids}, following), outputs="margin"))
    with pytest.raises(InputError, match="next-token needs token numbers"):
        ooc_ntk.plan(ooc_ntk.Job(model, ({"input_ids": ids}, following.float()), outputs="next-token"))
    with pytest.raises(InputError, match="images and texts of one shape"):
        ClipOutput(torch.ones(3, 2), torch.ones(3, 4))
    with pytest.raises(InputError, match="the bank holds embeddings of width 3, the model gives 10 numbers"):
        ooc_ntk.plan(case("smooth-mlp").job(outputs=lambda z, y: ClipOutput(torch.ones(4, 3), torch.ones(4, 3))(z, y)))


class Maps(nn.Module):
    """A row of logits for each of four pixels, classes first as convolutions give them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("outputs", ["loss", "next-token"])
def test_classes_first_are_not_taken_for_positions_first(outputs):
    images, labels = torch.randn(5, 1, 2, 2), torch.randint(0, 3, (5, 2, 2))
    with pytest.raises(InputError, match=r"the model returned \(1, 3, 2, 2\) for targets of shape \(1, 2, 2\)"):
        ooc_ntk.plan(ooc_ntk.Job(Maps(), (images, labels), outputs=outputs))
    with pytest.raises(InputError, match=r"the model returned \(1, 6\) for targets of shape \(1, 2\)"):
        ooc_ntk.plan(ooc_ntk.Job(nn.Linear(4, 6), (torch.randn(5, 4), labels[:, 0]), outputs=outputs))


@pytest.mark.parametrize("outputs", ["margin", "logprob"])
def test_one_softmax_over_several_rows_of_logits_is_refused(outputs):
    images, labels = torch.randn(5, 1, 2, 2), torch.randint(0, 3, (5,))
    with pytest.raises(InputError, match=r"needs one row of logits a sample, the model returned \(1, 3, 2, 2\)"):
        ooc_ntk.plan(ooc_ntk.Job(Maps(), (images, labels), outputs=outputs))


def test_log_probabilities_do_not_mind_the_labels(compute):
    chosen = case("smooth-mlp")
    labels = torch.full_like(chosen.targets, -1)
    one = compute(chosen.job(outputs="logprob"))
    other = compute(ooc_ntk.Job(chosen.module, (chosen.images[:TRAIN], labels[:TRAIN]), outputs="logprob"))
    assert (one[:TRAIN] == other[:]).all()


def test_a_text_without_a_next_token_is_refused(sentences):
    model, ids, following = sentences
    with pytest.raises(InputError, match="a text has no token to predict"):
        ooc_ntk.plan(ooc_ntk.Job(model, ({"input_ids": ids}, torch.full_like(following, -100)), outputs="next-token"))


def test_a_pair_by_name_is_verified(pairs, compute):
    torch.manual_seed(0)
    job = ooc_ntk.Job(Pair("dict").eval(), {"image": pairs[0], "text": pairs[1]}, outputs="clip")
    assert ooc_ntk.verify(compute(job).path, job).passed


def test_functions_over_other_tensors_are_other_jobs():
    def scaled(by: Tensor):
        return lambda z, y: (z * by[: len(z)]).sum()

    one, other = torch.ones(5000), torch.ones(5000)
    other[2500] = 2
    found = {prepare.callable_identity(scaled(tensor)) for tensor in (one, one.clone(), other)}
    assert len(found) == 2
