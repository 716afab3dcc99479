"""A transformer as a network from tokens to one tensor, whose outputs do not depend on padding.

Given a mask (samples, tokens), transformers branch on its values, which ``torch.func.vmap`` refuses. A mask of shape
(samples, 1, tokens or 1, tokens), ready to be added to the attention scores, is passed on as it is by most
architectures. Which ones take it, and whether theirs is causal, is found out by running the model on two short texts.
"""

from __future__ import annotations

import inspect
from typing import Any, Final

import torch
from torch import Tensor, nn

from ooc_ntk.errors import InputError

#: What a network does with the token states.
TASKS: Final = ("encoder", "classification", "causal")
POOLS: Final = ("mean", "cls", "none")

#: Forms in which the mask can reach the model; ``given`` is (samples, tokens) as it came.
MASKS: Final = ("full", "causal", "given")

#: Largest difference, relative to the largest output, at which two forms of one mask count as equal. Measured: equal
#: forms agree to the bit or to 1e-7 in float32, a full mask in place of a causal one differs by 1e-3 or more.
_EQUAL: Final = 1e-5
#: The same for a text alone and padded. Measured: 4e-7 for models that mask, 1 for FNet, which does not.
_PADDING: Final = 1e-4


class TextNetwork(nn.Module):
    """A transformers model that returns one tensor.

    Texts must be padded on the right: positions count from the first token, which then is a real one.

    Args:
        model: an encoder or decoder (task ``encoder``), or one with the head of its task; kept as ``model``, so that
            every parameter has the name that transformers give it, after ``model.``.
        task: one of :data:`TASKS`.
        pool: one of :data:`POOLS`, for the task ``encoder``.
        normalize: whether pooled states are divided by their length.

    Attributes:
        mask: one of :data:`MASKS`: the form in which the model gets its mask.
    """

    def __init__(self, model: nn.Module, task: str, pool: str = "mean", normalize: bool = False) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.pool = pool
        self.normalize = normalize
        self.mask = "given"
        self._takes_types = "token_type_ids" in inspect.signature(model.forward).parameters
        # Decoders read their classes off the last real token, and find it by the pad token, which GPT-2 has not.
        self._scored = task == "classification" and isinstance(getattr(model, "score", None), nn.Linear)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Map tokens to outputs.

        Args:
            input_ids: (samples, tokens), int64.
            attention_mask: (samples, tokens), 1 for real tokens, which come first, and 0 for padding.
            token_type_ids: (samples, tokens), int64, or None.

        Returns:
            In the model's dtype: (samples, hidden) for ``mean`` and ``cls``; (samples, tokens, hidden) for ``none``;
            (samples, labels) for classification; (samples, tokens, vocabulary) for causal. Whatever has tokens is zero
            at padding.

        Raises:
            InputError: if there are token types and the model takes none.
        """
        kept = attention_mask != 0
        inputs = {"input_ids": input_ids, "attention_mask": self._model_mask(attention_mask, kept)}
        if token_type_ids is not None:
            if not self._takes_types:
                raise InputError(
                    f"the tokenizer gives token_type_ids, but {type(self.model).__name__} takes none; use the "
                    "tokenizer that belongs to the model"
                )
            inputs["token_type_ids"] = token_type_ids
        if self.task == "classification":
            return self._classes(inputs, kept)
        if self.task == "causal":
            logits: Tensor = self.model(**inputs).logits
            return logits * kept.unsqueeze(-1).to(logits.dtype)
        return self._pooled(self.model(**inputs).last_hidden_state, kept)

    def _model_mask(self, given: Tensor, kept: Tensor) -> Tensor:
        """The mask in the form that the model takes."""
        if self.mask == "given":
            return given
        visible = kept[:, None, None, :]
        if self.mask == "causal":
            tokens = kept.shape[1]
            visible = visible & torch.ones(tokens, tokens, dtype=torch.bool, device=kept.device).tril()
        dtype = next(self.model.parameters()).dtype
        return (~visible).to(dtype) * torch.finfo(dtype).min

    def _classes(self, inputs: dict[str, Tensor], kept: Tensor) -> Tensor:
        """Logits of the classes, (samples, labels)."""
        model: Any = self.model
        if not self._scored:
            logits: Tensor = model(**inputs).logits
            return logits
        states = model.base_model(**inputs).last_hidden_state
        last = kept & ~nn.functional.pad(kept[:, 1:], (0, 1))
        scores: Tensor = model.score((states * last.unsqueeze(-1).to(states.dtype)).sum(1))
        return scores

    def _pooled(self, states: Tensor, kept: Tensor) -> Tensor:
        """Pool token states (samples, tokens, hidden)."""
        weights = kept.unsqueeze(-1).to(states.dtype)
        if self.pool == "none":
            return states * weights
        pooled = states[:, 0] if self.pool == "cls" else (states * weights).sum(1) / weights.sum(1)
        return nn.functional.normalize(pooled) if self.normalize else pooled


def settle_mask(network: TextNetwork, where: str) -> None:
    """Find the form in which a model takes its mask, and check that padding and later tokens do not matter.

    Args:
        network: in eval mode, with its final weights; its ``mask`` is set.
        where: what it is, for messages.

    Raises:
        InputError: if the model does not run on tokens and a mask alone, if padding changes its outputs, or if a
            causal model sees later tokens.
    """
    config: Any = network.model.config
    ids, mask = _two_texts(getattr(config, "vocab_size", None) or 3, getattr(config, "pad_token_id", None))
    network.mask = "given"
    with torch.no_grad():
        try:
            wanted = network(ids, mask)
            alone = network(ids[1:, :2], mask[1:, :2])
            changed = network(torch.cat([ids[:, :3], ids[:, :1]], 1), mask)
        except Exception as error:
            raise InputError(
                f"{where} does not run on input_ids and attention_mask alone: {type(error).__name__}: {error}; use a "
                "model of plain text, or wrap it in a function: --model file.py:function"
            ) from error
        if network.task == "causal" and _difference(changed[:1, :3], wanted[:1, :3]) > _EQUAL:
            raise InputError(
                f"{where} is not causal: its logits depend on later tokens; use task=encoder, or a decoder (GPT-2, "
                "Llama)"
            )
        short = wanted[1:, :2] if network.task == "causal" or _has_tokens(network) else wanted[1:]
        if _difference(alone, short) > _PADDING:
            raise InputError(
                f"{where} does not mask padding: a text alone and the same text padded give different outputs, so its "
                "kernel would depend on the length of other texts; use an architecture with attention masks"
            )
        forms = [] if _is_local(config) else [form for form in MASKS[:2] if _agrees(network, form, ids, mask, wanted)]
    # If both agree, attention does nothing on these texts, and which form is right cannot be told.
    network.mask = forms[0] if len(forms) == 1 else "given"


def _two_texts(vocabulary: int, pad: int | None) -> tuple[Tensor, Tensor]:
    """Tokens and mask, (2, 4) each: a text of four tokens and one of two."""
    real = [token for token in range(min(vocabulary, 16)) if token != pad] or [0]
    chosen = [real[-1 - position % len(real)] for position in range(6)]
    filling = 0 if pad is None or not 0 <= pad < vocabulary else pad
    ids = torch.tensor([chosen[:4], [*chosen[4:], filling, filling]])
    return ids, torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


def _has_tokens(network: TextNetwork) -> bool:
    """Whether an encoder's output keeps its tokens."""
    return network.task == "encoder" and network.pool == "none"


def _is_local(config: object) -> bool:
    """Whether some layers see a window of tokens only: one mask for all layers would widen it."""
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    windows = [getattr(config, name, None) for name in ("sliding_window", "local_attention", "attention_window")]
    return bool(kinds) or any(window is not None for window in windows)


def _agrees(network: TextNetwork, form: str, ids: Tensor, mask: Tensor, wanted: Tensor) -> bool:
    """Whether the model gives the wanted outputs with another form of the mask."""
    network.mask = form
    try:
        return _difference(network(ids, mask), wanted) <= _EQUAL
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError):
        return False  # architectures refuse a mask of this shape in ways of their own


def _difference(found: Tensor, wanted: Tensor) -> float:
    """Largest difference relative to the largest value; infinite if there is a NaN."""
    largest = float((found - wanted).abs().max() / wanted.abs().max().clamp(min=torch.finfo(wanted.dtype).tiny))
    return largest if largest == largest else float("inf")
