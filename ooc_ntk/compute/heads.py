"""Wide linear heads: the trace kernel of more outputs than the head has inputs, by as many rows as inputs."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from .jacobian import ModelBatch, ModelFunction, plain_layers
from .lastlayer import VIEWS, LastLayer, last_layers
from .structure import SAME_OUTPUT

logger = logging.getLogger(__name__)


class NarrowHead(nn.Module):
    """Stands in for a linear layer with more outputs (C) than inputs (h) in a trace kernel of its raw outputs.

    With ``W = U Σ Vᵀ``, ``Σ_c`` over the C outputs of ``W ∂h`` equals the sum over the h outputs of ``Σ Vᵀ ∂h``. The
    layer's own weight and bias add ``C (⟨h_i, h_j⟩ + 1)``, here from one row of pseudo-parameters that every output
    adds ``√(C/h)`` times.
    """

    def __init__(self, layer: nn.Linear, weight: bool, bias: bool) -> None:
        """Take the layer's weight apart; ``weight`` and ``bias`` say which of its parameters are differentiated."""
        super().__init__()
        _, values, right = torch.linalg.svd(layer.weight.detach().double().cpu(), full_matrices=False)
        like = layer.weight
        self.turned: Tensor
        # In float64, whatever the layer's dtype: the function of the model casts it to what it computes in.
        self.register_buffer("turned", (values[:, None] * right).to(like.device))
        outputs, inputs = like.shape
        self.scale = math.sqrt(outputs / inputs)
        self.weight = nn.Parameter(like.new_zeros(1, inputs)) if weight else None
        self.bias = nn.Parameter(like.new_zeros(1)) if bias else None

    def forward(self, inputs: Tensor) -> Tensor:
        """(samples, h) → (samples, h)."""
        found = F.linear(inputs, self.turned)
        if self.weight is None:
            return found
        return found + F.linear(inputs, self.weight, self.bias) * self.scale


@dataclass(frozen=True)
class Narrowed:
    """A model with a narrow head in place of its own.

    Attributes:
        name: the head's name.
        module: the model; it shares everything but the head.
        outputs: outputs of the head (C).
        width: inputs of the head (h), the outputs now.
    """

    name: str
    module: nn.Module
    outputs: int
    width: int


def narrowed(
    function: ModelFunction, batches: Sequence[ModelBatch], precision: str, device: str
) -> tuple[Narrowed, ModelFunction] | None:
    """Put a narrow head into a model for the trace kernel of its logits, if that is exact.

    Args:
        function: the model and its chosen parameters.
        batches: single samples, on the function's device; on each of them gradients are compared.
        precision: of the function.
        device: where it is.

    Returns:
        The model and its function, which shares all parameters but the head's; or None if the outputs are not those of
        a linear layer as they are, with more outputs than inputs and one position, whose weight is used once and chosen
        with its bias or not at all, or if the gradients disagree.
    """
    try:
        place = next(function.module.parameters())
        found, other = last_layers(function.module, batches[0].placed_as(place), VIEWS)
        if len(found) != 1 or other or not _fits(function, found[0]):
            return None
        (head,) = found
        made = _narrow(function, head)
        narrow = ModelFunction(
            made.module, function.names, function.rows, precision, device, shared=function.parameters
        )
        same = all(_agrees(function, narrow, made, batch) for batch in batches)
    except Exception as error:  # noqa: BLE001 - models are made in many ways; then every output has its row
        logger.info("the head is not made narrow: %s: %s", type(error).__name__, error)
        return None
    return (made, narrow) if same else None


def _narrow(function: ModelFunction, head: LastLayer) -> Narrowed:
    """The model with a narrow head."""
    layer, prefix = head.layer, f"{head.name}." if head.name else ""
    assert isinstance(layer, nn.Linear)
    new = NarrowHead(layer, f"{prefix}weight" in function.names, f"{prefix}bias" in function.names).eval()
    return Narrowed(head.name, _with_module(function.module, head.name, new), layer.out_features, layer.in_features)


def _fits(function: ModelFunction, head: LastLayer) -> bool:
    """Whether a head may be made narrow: plain, called once, at one position, and its parameters its own."""
    layer, prefix = head.layer, f"{head.name}." if head.name else ""
    if type(layer) is not nn.Linear or head.call or head.inputs.ndim != 2 or layer.out_features <= layer.in_features:
        return False
    if layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__ or list(layer.buffers()):
        return False
    names = {"weight"} if layer.bias is None else {"weight", "bias"}
    if set(dict(layer.named_parameters())) != names:
        return False
    every = list(function.module.named_parameters(remove_duplicate=False))
    own = [getattr(layer, name) for name in sorted(names)]
    if any(sum(other is mine for _, other in every) != 1 for mine in own):
        return False
    chosen = [f"{prefix}{name}" in function.names for name in sorted(names)]
    return all(chosen) or not any(chosen)


def _agrees(function: ModelFunction, narrow: ModelFunction, made: Narrowed, batch: ModelBatch) -> bool:
    """Compare gradients of a model with those of its narrow stand-in, along one random combination of outputs.

    Args:
        function: the model and its chosen parameters.
        narrow: the same of the stand-in.
        made: the stand-in.
        batch: one sample.

    Returns:
        Whether every parameter before the head has the same gradient, and the head's own is ``u ⊗ h``.
    """
    prefix = f"{made.name}." if made.name else ""
    layer = function.module.get_submodule(made.name)
    assert isinstance(layer, nn.Linear)
    left, _, _ = torch.linalg.svd(layer.weight.detach().double().cpu(), full_matrices=False)
    generator = torch.Generator().manual_seed(0)
    turned = torch.randn(made.width, generator=generator, dtype=torch.float64)
    pairs = []
    for each, cotangent in ((function, left @ turned), (narrow, turned)):
        leaves = {name: each.parameters[name].detach().requires_grad_() for name in each.names}
        with torch.enable_grad(), plain_layers():
            logits = each.logits(leaves, batch)[0]
            if logits.shape != cotangent.shape:
                return False
            total = (logits * cotangent.to(logits)).sum()
        gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
        pairs.append(dict(zip(each.names, gradients, strict=True)))
    theirs, mine = pairs
    for name in function.names:
        wanted, found = theirs[name], mine[name]
        if name == f"{prefix}weight":
            # The pseudo-parameter's gradient is √(C/h)·Σ(turned)·h.
            factor = float(turned.sum()) * math.sqrt(made.outputs / made.width)
            found = torch.outer((left @ turned).to(wanted), found[0] / factor)
        elif name == f"{prefix}bias":
            found = (left @ turned).to(wanted)
        scale = float(wanted.abs().max())
        if not torch.allclose(found, wanted, rtol=SAME_OUTPUT, atol=SAME_OUTPUT * scale + 1e-12):
            return False
    return True


def _with_module(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """A model that shares everything with another but one part."""
    if not name:
        return new
    first, _, rest = name.partition(".")
    copied = copy.copy(model)
    copied.__dict__ = model.__dict__.copy()
    for kind in ("_modules", "_parameters", "_buffers"):
        copied.__dict__[kind] = model.__dict__[kind].copy()
    copied._modules[first] = _with_module(model.get_submodule(first), rest, new)
    return copied
