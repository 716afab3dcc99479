"""Layers whose parameters scale and shift elements: norms in eval mode, PReLU, and any bias alone."""

from __future__ import annotations

from typing import ClassVar, Final

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor

from .base import Call, ElementRule, Functions, Signature, sum_leading


def _channels_first(elements: Tensor, leading: int) -> Tensor:
    """Bring (samples, ..., channels, *size), channels after ``leading`` axes, to (samples, ..., *size, channels)."""
    return elements.movedim(leading, -1) if elements.ndim > leading + 1 else elements


class _ChannelRule(ElementRule):
    """A norm with one weight and one bias per channel; channels follow the samples."""

    def reduce(self, call: Call, elements: Tensor, parameter: Tensor) -> Tensor:
        """See :class:`ElementRule`."""
        # Images merged into samples stand between samples and channels.
        leading = 1 + elements.ndim - call.inputs.ndim
        if leading == 1:
            return elements.flatten(2).sum(2) if elements.ndim > 2 else elements
        return sum_leading(_channels_first(elements, leading), parameter.numel())


class BatchNorm(_ChannelRule):
    """Batch norm in eval mode: the running statistics are constants."""

    functions: ClassVar[Functions] = (F.batch_norm,)
    signature: ClassVar[Signature] = (
        ("input", None),
        ("running_mean", None),
        ("running_var", None),
        ("weight", None),
        ("bias", None),
        ("training", False),
        ("momentum", 0.1),
        ("eps", 1e-5),
    )

    def covers(self, call: Call) -> str:
        """See :class:`Rule`."""
        batch = call.arguments["training"] or call.arguments["running_mean"] is None
        return "it normalises by the batch" if batch else ""

    def scaled(self, call: Call, inputs: Tensor) -> Tensor:
        """See :class:`ElementRule`."""
        leading = 1 + inputs.ndim - call.inputs.ndim
        shape = [1] * inputs.ndim
        shape[leading] = -1
        mean: Tensor = call.arguments["running_mean"]
        inverse = torch.rsqrt(call.arguments["running_var"] + call.arguments["eps"])
        return (inputs - mean.view(shape)).mul_(inverse.view(shape))


class GroupNorm(_ChannelRule):
    """Group norm: statistics of groups of channels of one sample."""

    functions: ClassVar[Functions] = (F.group_norm,)
    signature: ClassVar[Signature] = (
        ("input", None),
        ("num_groups", 1),
        ("weight", None),
        ("bias", None),
        ("eps", 1e-5),
    )

    def scaled(self, call: Call, inputs: Tensor) -> Tensor:
        """See :class:`ElementRule`."""
        flat = inputs.reshape(-1, *call.inputs.shape[1:])
        return F.group_norm(flat, call.arguments["num_groups"], eps=call.arguments["eps"]).view(inputs.shape)


class InstanceNorm(_ChannelRule):
    """Instance norm: statistics of each channel of one sample, or running ones."""

    functions: ClassVar[Functions] = (F.instance_norm,)
    signature: ClassVar[Signature] = (
        ("input", None),
        ("running_mean", None),
        ("running_var", None),
        ("weight", None),
        ("bias", None),
        ("use_input_stats", True),
        ("momentum", 0.1),
        ("eps", 1e-5),
    )

    def scaled(self, call: Call, inputs: Tensor) -> Tensor:
        """See :class:`ElementRule`."""
        flat, given = inputs.reshape(-1, *call.inputs.shape[1:]), call.arguments
        found = F.instance_norm(
            flat,
            # Statistics of the input are taken as they are; the running ones would be changed by the call.
            None if given["use_input_stats"] else given["running_mean"],
            None if given["use_input_stats"] else given["running_var"],
            use_input_stats=given["use_input_stats"],
            eps=given["eps"],
        )
        return found.view(inputs.shape)


class LayerNorm(ElementRule):
    """Layer norm over the last axes."""

    functions: ClassVar[Functions] = (F.layer_norm,)
    signature: ClassVar[Signature] = (
        ("input", None),
        ("normalized_shape", None),
        ("weight", None),
        ("bias", None),
        ("eps", 1e-5),
    )

    def scaled(self, call: Call, inputs: Tensor) -> Tensor:
        """See :class:`ElementRule`."""
        return F.layer_norm(inputs, call.arguments["normalized_shape"], eps=call.arguments["eps"])

    def reduce(self, call: Call, elements: Tensor, parameter: Tensor) -> Tensor:
        """See :class:`ElementRule`."""
        del call
        return sum_leading(elements, parameter.numel())


class RMSNorm(LayerNorm):
    """Root-mean-square norm over the last axes."""

    functions: ClassVar[Functions] = (F.rms_norm,)
    signature: ClassVar[Signature] = (("input", None), ("normalized_shape", None), ("weight", None), ("eps", None))

    def scaled(self, call: Call, inputs: Tensor) -> Tensor:
        """See :class:`ElementRule`."""
        return F.rms_norm(inputs, call.arguments["normalized_shape"], eps=call.arguments["eps"])


class PReLU(_ChannelRule):
    """``max(x, 0) + w·min(x, 0)`` with one weight, or one per channel."""

    functions: ClassVar[Functions] = (F.prelu,)
    signature: ClassVar[Signature] = (("input", None), ("weight", None))

    def scaled(self, call: Call, inputs: Tensor) -> Tensor:
        """See :class:`ElementRule`."""
        del call
        return inputs.clamp(max=0)

    def reduce(self, call: Call, elements: Tensor, parameter: Tensor) -> Tensor:
        """See :class:`ElementRule`."""
        if parameter.numel() == 1:
            return elements.flatten(1).sum(1, keepdim=True)
        return super().reduce(call, elements, parameter)


#: The rules of this module.
RULES: Final = (BatchNorm(), LayerNorm(), GroupNorm(), InstanceNorm(), RMSNorm(), PReLU())
