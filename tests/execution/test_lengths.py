"""Texts of different lengths: batches cut at their longest text give the kernel of padded ones, in the order given."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn

import ooc_ntk
from ooc_ntk.errors import NonFiniteError
from ooc_ntk.execution.prepare import prepare
from ooc_ntk.inputs.arrays import ArraySource, as_column
from ooc_ntk.inputs.source import SampleSource
from tests import oracle
from tests.cases import FLOAT64, SMOOTH

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH, VOCABULARY, WIDTH, TRAIN, TEST = 12, 17, 8, 15, 6


class Texts(ArraySource):
    """Padded texts with their lengths, as a source of texts has them."""

    def __init__(self, ids: Tensor, lengths: Tensor, targets: Tensor | None = None) -> None:
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        columns = {"input_ids": as_column(ids * mask, "ids"), "attention_mask": as_column(mask, "mask")}
        super().__init__((), columns, None if targets is None else as_column(targets, "targets"))
        self.length, self.lengths = ids.shape[1], lengths


@pytest.fixture(scope="module")
def texts():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCABULARY, (TRAIN + TEST, LENGTH), generator=generator)
    lengths = torch.randint(2, 7, (TRAIN + TEST,), generator=generator)
    lengths[4] = LENGTH
    following = torch.full_like(ids, -100)
    following[:, :-1] = ids[:, 1:]
    following[torch.arange(LENGTH) >= lengths[:, None] - 1] = -100
    return ids, lengths, following


class Encoder(nn.Module):
    """One attention layer over tokens and learned positions, with a mask, and a mean over real tokens."""

    def __init__(self, how: str = "mean") -> None:
        super().__init__()
        self.how = how
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(0.3 * torch.randn(LENGTH, WIDTH))
        self.query, self.key, self.value, self.mix = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        kept = attention_mask.to(self.norm.weight.dtype)
        x = self.words(input_ids) + self.positions[: input_ids.shape[1]]
        scores = self.query(x) @ self.key(x).transpose(1, 2) / WIDTH**0.5
        if self.how != "unmasked":
            scores = scores + (1 - kept[:, None]) * torch.finfo(kept.dtype).min
        if self.how in ("causal", "tied"):
            scores = scores + torch.full(scores.shape[1:], -1e9, dtype=kept.dtype).triu(1)
        x = self.norm(x + torch.tanh(self.mix(scores.softmax(2) @ self.value(x))))
        if self.how == "tied":
            return F.linear(x, self.words.weight) * kept[:, :, None]
        if self.how == "causal":
            return self.head(x) * kept[:, :, None]
        if self.how == "last":
            return self.head(x[:, -1])
        return self.head((x * kept[:, :, None]).sum(1) / kept.sum(1, keepdim=True))


def encoder(how: str = "mean") -> nn.Module:
    torch.manual_seed(1)
    return Encoder(how).eval()


def padded(texts, part: slice) -> dict[str, Tensor]:
    ids, lengths, _ = texts
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    return {"input_ids": (ids * mask)[part], "attention_mask": mask[part]}


def job(module: nn.Module, texts, targets: Tensor | None = None, **settings) -> ooc_ntk.Job:
    ids, lengths, _ = texts
    train, test = (
        Texts(ids[part], lengths[part], None if targets is None else targets[part])
        for part in (slice(0, TRAIN), slice(TRAIN, None))
    )
    return ooc_ntk.Job(module, train, test, **settings)


@pytest.fixture(scope="module")
def rows(texts):
    return oracle.jacobian(encoder(), padded(texts, slice(None)))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"batch_size": 1},
        {"batch_size": 4, "tile_samples": 8},
        {"dataflow": "spill", "tile_samples": 6, "batch_size": 3},
        {"dataflow": "recompute", "tile_samples": 9, "passes": 3, "span_columns": 60},
        {"representation": "dense", "tile_samples": 8, "batch_size": 5},
        {"representation": "factored", "dataflow": "spill", "tile_samples": 8},
        {"representation": "pairwise", "tile_samples": 10, "batch_size": 2},
        {"layer_rules": False, "tile_samples": 8},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["trace", "full", "output:1"])
def test_any_plan_gives_the_kernel_of_padded_texts(kind, settings, texts, rows, compute):
    found = compute(job(encoder(), texts, kernel=kind), **settings)
    assert found.plan.by_length
    wanted = oracle.kernel(rows, TRAIN, kind)
    assert oracle.error(found, wanted) <= SMOOTH
    whole = oracle.kernel(rows, TRAIN + TEST, kind)
    np.testing.assert_allclose(found.diagonal(), whole.diagonal(), rtol=1e-5)
    assert ooc_ntk.verify(found.path, job(encoder(), texts, kernel=kind), samples=4).passed


def test_in_float64_nothing_is_lost_by_cutting(texts, rows, compute):
    found = compute(job(encoder(), texts, precision="float64"), tile_samples=8)
    assert found.plan.by_length
    assert oracle.error(found, oracle.kernel(rows, TRAIN)) <= FLOAT64


@pytest.mark.parametrize("settings", [{"normalize": "cosine"}, {"scale": "mean"}, {"kernel": "pseudo"}])
def test_scaled_and_normalised(settings, texts, rows, compute):
    found = compute(job(encoder(), texts, **settings), tile_samples=8)
    kind = settings.pop("kernel", "trace")
    assert oracle.error(found, oracle.kernel(rows, TRAIN, kind, **settings)) <= SMOOTH


def test_layers_by_themselves(texts, rows, compute):
    found = compute(job(encoder(), texts, by="layer"), tile_samples=8, dataflow="spill")
    assert found.plan.by_length
    total = sum(np.asarray(found.layer(name), np.float64) for name in found.layers)
    assert oracle.error(total, oracle.kernel(rows, TRAIN)) <= SMOOTH
    assert ooc_ntk.verify(found.path, job(encoder(), texts, by="layer"), samples=4).passed


@pytest.mark.parametrize("how", ["causal", "tied"])
@pytest.mark.parametrize("outputs", ["loss", "next-token"])
def test_language_models(how, outputs, texts, compute):
    _, _, following = texts
    module = encoder(how)
    following = following if how == "tied" else following.clamp(max=2)
    found = compute(job(module, texts, following, outputs=outputs), tile_samples=8, batch_size=4)
    assert found.plan.by_length

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.reshape(LENGTH, -1), target)

    def token(output: Tensor, target: Tensor) -> Tensor:
        last = max(index for index in range(LENGTH) if target[index] >= 0)
        return output.reshape(LENGTH, -1)[last, target[last]]

    wanted = oracle.jacobian(
        module, padded(texts, slice(None)), following, {"loss": loss, "next-token": token}[outputs]
    )
    assert oracle.error(found, oracle.kernel(wanted, TRAIN)) <= 1e-5


@pytest.mark.parametrize("how", ["unmasked", "last"])
def test_what_depends_on_padding_stays_padded(how, texts, compute):
    module = encoder(how)
    found = compute(job(module, texts))
    assert not found.plan.by_length
    assert oracle.error(found, oracle.kernel(oracle.jacobian(module, padded(texts, slice(None))), TRAIN)) <= SMOOTH


def test_texts_of_about_one_length_stay_padded(texts, rates):
    ids, lengths, _ = texts
    source = Texts(ids, torch.full_like(lengths, LENGTH))
    assert not ooc_ntk.plan(ooc_ntk.Job(encoder(), source), rates=rates).by_length


def test_projected_kernels_stay_padded(texts, compute):
    wanted = job(encoder(), texts, projection="sjlt:64")
    found = compute(wanted)
    assert not found.plan.by_length
    assert ooc_ntk.verify(found.path, wanted).passed


def test_the_order_of_samples_only_orders_the_kernel(texts, compute):
    ids, lengths, _ = texts
    order = torch.randperm(TRAIN, generator=torch.Generator().manual_seed(2))
    one = np.asarray(compute(ooc_ntk.Job(encoder(), Texts(ids[:TRAIN], lengths[:TRAIN])), tile_samples=6))
    other = np.asarray(compute(ooc_ntk.Job(encoder(), Texts(ids[order], lengths[order])), tile_samples=6))
    assert oracle.error(other, one[np.ix_(order, order)].astype(np.float64)) <= 1e-6


def test_batches_are_cut_at_their_longest_text(texts, tmp_path, monkeypatch):
    seen = []
    forward = Encoder.forward

    def watched(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        seen.append(tuple(input_ids.shape))
        return forward(self, input_ids, attention_mask)

    chosen = job(encoder(), texts)
    plan = dataclasses.replace(ooc_ntk.plan(chosen), batch_size=5)
    monkeypatch.setattr(Encoder, "forward", watched)
    chosen = job(encoder(), texts)
    plan = dataclasses.replace(plan, job_digest=prepare(chosen).digest)
    seen.clear()
    ooc_ntk.run(chosen, tmp_path / "run", plan=plan, progress=False)
    lengths = [shape[1] for shape in seen if shape[0] == 5][-4:]  # before them the structure is found
    assert lengths[:3] == sorted(lengths[:3])  # train texts, then test texts, each from short to long
    assert lengths[0] < LENGTH == lengths[2]
    assert lengths[3] < LENGTH


def test_stopped_and_resumed_with_the_same_bits(texts, tmp_path, rates):
    chosen = job(encoder(), texts)
    preferences = ooc_ntk.Preferences(dataflow="spill", tile_samples=6)
    plan = ooc_ntk.plan(chosen, ooc_ntk.Budget(host="4GiB", disk="1GiB"), preferences=preferences, rates=rates)
    assert plan.by_length
    whole = np.asarray(ooc_ntk.run(chosen, tmp_path / "whole", plan=plan, progress=False))

    class StopHereError(Exception):
        pass

    def advance(phase: str, amount: float) -> None:
        if phase == "kernel":
            raise StopHereError

    with pytest.raises(StopHereError):
        ooc_ntk.run(chosen, tmp_path / "run", plan=plan, progress=ooc_ntk.api.Observer(advance=advance))
    assert (np.asarray(ooc_ntk.run(chosen, tmp_path / "run", progress=False)) == whole).all()


def test_a_bad_text_is_named_by_its_own_number(texts, compute):
    ids, lengths, _ = texts

    class Breaks(Encoder):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            found = super().forward(input_ids, attention_mask)
            bad = (input_ids == VOCABULARY - 1).any(1, keepdim=True)
            return found * torch.where(bad, torch.full_like(found, torch.inf), torch.ones_like(found))

    ids = ids.clamp(max=VOCABULARY - 2)
    ids[7, 1] = VOCABULARY - 1
    torch.manual_seed(1)
    with pytest.raises(NonFiniteError, match="in train sample 7;"):
        compute(ooc_ntk.Job(Breaks().eval(), Texts(ids[:TRAIN], lengths[:TRAIN])), batch_size=4)


def test_embeddings_of_all_layers_do_not_see_padding(texts, compute):
    ids, lengths, _ = texts
    kernels = []
    for extra in (0, 3):
        longer = F.pad(ids, (0, extra))
        torch.manual_seed(1)
        module = Encoder().eval()
        with torch.no_grad():
            table = torch.zeros(LENGTH + extra, WIDTH)
            table[:LENGTH] = module.positions
            module.positions = nn.Parameter(table)
        kernels.append(
            np.asarray(compute(ooc_ntk.Job(module, Texts(longer, lengths), kernel="embedding:*")), np.float64)
        )
    assert oracle.error(kernels[1], kernels[0]) <= 1e-6


@pytest.mark.parametrize("kernel", ["embedding", "conjugate"])
def test_features_of_language_models_depend_on_no_order_and_no_padding(kernel, texts, compute):
    ids, lengths, _ = texts
    module = encoder("causal")
    order = torch.argsort(lengths[:TRAIN], descending=True)
    one = np.asarray(compute(ooc_ntk.Job(module, Texts(ids[:TRAIN], lengths[:TRAIN]), kernel=kernel)), np.float64)
    other = np.asarray(compute(ooc_ntk.Job(module, Texts(ids[order], lengths[order]), kernel=kernel)), np.float64)
    assert oracle.error(other, one[np.ix_(order, order)]) <= 1e-6
    cut = int(lengths[:TRAIN].sort().values[-2])
    kept = (lengths[:TRAIN] <= cut).nonzero()[:, 0]
    short = np.asarray(compute(ooc_ntk.Job(module, Texts(ids[kept, :cut], lengths[kept]), kernel=kernel)), np.float64)
    assert oracle.error(short, one[np.ix_(kept, kept)]) <= 1e-6

    seen = []
    module.head.register_forward_hook(lambda part, inputs, output: seen.append(inputs[0].detach()))
    module(**padded(texts, slice(0, TRAIN)))
    h = (seen[-1] * padded(texts, slice(0, TRAIN))["attention_mask"][:, :, None]).flatten(1).double().numpy()
    assert oracle.error(one, h @ h.T / (WIDTH if kernel == "conjugate" else 1)) <= SMOOTH


def test_a_source_of_texts_is_a_source(texts):
    assert isinstance(Texts(texts[0], texts[1]), SampleSource)
