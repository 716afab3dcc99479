"""Embeddings and bags of them: only the rows that a sample touches have a gradient."""

from __future__ import annotations

from typing import Any, ClassVar, Final

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor

from ooc_ntk.planning.factors import LayerFactors

from .base import Call, Functions, OuterRule, Signature

#: Row number of a position that has no gradient (padding).
NO_ROW = -1


def _tokens(call: Call, inputs: Tensor) -> Tensor:
    """Row numbers (samples, positions) int32, :data:`NO_ROW` at the padding row."""
    padding = call.arguments["padding_idx"]
    rows = inputs.reshape(inputs.shape[0], -1).to(torch.int32)
    if padding is None:
        return rows
    count = call.arguments["weight"].shape[0]
    return rows.masked_fill(rows == (padding if padding >= 0 else count + padding), NO_ROW)


def _plain(arguments: dict[str, Any] | Any) -> str:
    """Why an embedding's gradient is not that of its rows; empty if it is."""
    if arguments["max_norm"] is not None:
        return "max_norm changes the weight in the forward pass"
    return "scale_grad_by_freq scales its gradient" if arguments["scale_grad_by_freq"] else ""


class Embedding(OuterRule):
    """Rows of a table: A are row numbers, G the gradients of the rows that were taken."""

    functions: ClassVar[Functions] = (F.embedding,)
    signature: ClassVar[Signature] = (
        ("input", None),
        ("weight", None),
        ("padding_idx", None),
        ("max_norm", None),
        ("norm_type", 2.0),
        ("scale_grad_by_freq", False),
        ("sparse", False),
    )
    shares_bias = False

    def covers(self, call: Call) -> str:
        """See :class:`Rule`."""
        return _plain(call.arguments)

    def factors(self, call: Call, inputs: Tensor, output: Tensor) -> LayerFactors:
        """See :class:`OuterRule`."""
        return LayerFactors("tokens", inputs[0].numel(), call.arguments["weight"].shape[0], output.shape[-1])

    def hold(self, call: Call, inputs: Tensor, factors: LayerFactors) -> Tensor:
        """See :class:`OuterRule`."""
        del factors
        return _tokens(call, inputs)

    def weight_order(self, call: Call, gradients: Tensor) -> Tensor:
        """Expanded embeddings are in the order of the weight already."""
        del call
        return gradients.flatten(2)


class EmbeddingBag(Embedding):
    """Sums or means of rows, one bag per sample: every row of a bag has the bag's gradient, scaled."""

    functions: ClassVar[Functions] = (F.embedding_bag,)
    signature: ClassVar[Signature] = (
        ("input", None),
        ("weight", None),
        ("offsets", None),
        ("max_norm", None),
        ("norm_type", 2),
        ("scale_grad_by_freq", False),
        ("mode", "mean"),
        ("sparse", False),
        ("per_sample_weights", None),
        ("include_last_offset", False),
        ("padding_idx", None),
    )

    def covers(self, call: Call) -> str:
        """See :class:`Rule`."""
        arguments = call.arguments
        if arguments["mode"] == "max":
            return "the mode 'max' takes one element of each row"
        if arguments["offsets"] is not None or call.inputs.ndim != 2:
            return "its bags are given by offsets"
        return _plain(arguments)

    def gradient(self, call: Call, inputs: Tensor, gradient: Tensor) -> Tensor:
        """The bag's gradient at every one of its positions."""
        spread = gradient.unsqueeze(1).expand(-1, inputs.shape[1], -1)
        weights = call.arguments["per_sample_weights"]
        if weights is not None:
            return spread.mul(weights.unsqueeze(-1))
        if call.arguments["mode"] != "mean":
            return spread
        counted = (_tokens(call, inputs) != NO_ROW).sum(1).clamp(min=1)  # padding is left out of the mean
        return spread.div(counted.view(-1, 1, 1))


#: The rules of this module.
RULES: Final = (Embedding(), EmbeddingBag())
