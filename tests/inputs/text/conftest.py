"""Tiny transformers with random weights and tokenizers of a few words, written to folders as users have them."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers are imported

WORDS = ("the", "a", "cat", "dog", "mat", "sat", "ran", "on", "##s", "that", ".", '"', "*", "and", "old")
SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture(scope="session")
def transformers():
    """The module, quiet."""
    module = pytest.importorskip("transformers")
    module.logging.set_verbosity_error()
    module.utils.logging.disable_progress_bar()
    return module


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def save_wordpiece(transformers, folder: Path, words=WORDS) -> None:
    """A WordPiece tokenizer as BERT has it: [CLS] text [SEP], with token types."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = folder.parent / f"{folder.name}-vocab.txt"
    vocabulary.write_text("\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words)) + "\n")
    transformers.BertTokenizerFast(vocab=str(vocabulary), model_max_length=24).save_pretrained(folder)


def save_words(transformers, folder: Path, words=WORDS) -> None:
    """A tokenizer as GPT-2 has it: no special tokens around a text, no pad token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    numbers = {word: number for number, word in enumerate(("<|unk|>", "<|endoftext|>", *words))}
    made = Tokenizer(models.WordLevel(numbers, unk_token="<|unk|>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<|endoftext|>", unk_token="<|unk|>"
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def folders(transformers, tmp_path_factory) -> SimpleNamespace:
    """Folders with config.json, weights and (bert, gpt2) a tokenizer."""
    root = tmp_path_factory.mktemp("models")
    vocabulary = len(WORDS) + 5
    # Weights of a trained network's size: with those drawn by default attention hardly matters.
    wide = {"initializer_range": 0.4, "vocab_size": vocabulary}
    bert = transformers.BertConfig(max_position_embeddings=32, **SIZES, **wide)
    roberta = transformers.RobertaConfig(
        max_position_embeddings=34, type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2, **SIZES, **wide
    )
    distilbert = transformers.DistilBertConfig(
        dim=8, n_layers=2, n_heads=2, hidden_dim=16, max_position_embeddings=32, **wide
    )
    gpt2 = transformers.GPT2Config(
        n_embd=8, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=1, **wide
    )
    made = {
        "bert": (transformers.BertModel, bert),
        "masked": (transformers.BertForMaskedLM, bert),
        "headed": (
            transformers.BertForSequenceClassification,
            transformers.BertConfig(**{**bert.to_dict(), "num_labels": 3}),
        ),
        "roberta": (transformers.RobertaModel, roberta),
        "distilbert": (transformers.DistilBertModel, distilbert),
        "gpt2": (transformers.GPT2LMHeadModel, gpt2),
        "scored": (
            transformers.GPT2ForSequenceClassification,
            transformers.GPT2Config(**{**gpt2.to_dict(), "num_labels": 3}),
        ),
    }
    for name, (kind, config) in made.items():
        torch.manual_seed(5)
        kind(config).save_pretrained(root / name)
    save_wordpiece(transformers, root / "bert")
    save_words(transformers, root / "gpt2")
    return SimpleNamespace(root=root, **{name: root / name for name in made})


@pytest.fixture(scope="session")
def batch() -> dict[str, torch.Tensor]:
    """Tokens of four texts of different lengths, padded on the right to nine."""
    generator = torch.Generator().manual_seed(8)
    lengths = torch.tensor([4, 7, 2, 5])
    mask = (torch.arange(9) < lengths[:, None]).long()
    ids = torch.randint(5, len(WORDS) + 5, mask.shape, generator=generator)
    return {"input_ids": torch.where(mask.bool(), ids, 1), "attention_mask": mask}
