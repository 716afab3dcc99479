"""Linear layers with any leading dimensions, and products with a weight that is stored the other way round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor

from ooc_ntk.planning.factors import LayerFactors

from .base import Call, Functions, OuterRule, Signature


class Linear(OuterRule):
    """``x Wᵀ + b``: A = x, G = output gradient, one position per row of x."""

    functions: ClassVar[Functions] = (F.linear,)
    signature: ClassVar[Signature] = (("input", None), ("weight", None), ("bias", None))

    def covers(self, call: Call) -> str:
        """See :class:`Rule`."""
        bias, weight = call.arguments["bias"], call.arguments["weight"]
        broadcast = bias is not None and bias.numel() != weight.shape[1 if self.transposed else 0]
        return "its bias is broadcast over outputs" if broadcast else ""

    def factors(self, call: Call, inputs: Tensor, output: Tensor) -> LayerFactors:
        """See :class:`OuterRule`."""
        positions = inputs[0].numel() // inputs.shape[-1]
        return LayerFactors("linear", positions, inputs.shape[-1], output.shape[-1], call.bias is not None)

    def hold(self, call: Call, inputs: Tensor, factors: LayerFactors) -> Tensor:
        """See :class:`OuterRule`."""
        del call, factors
        return inputs


class AddMatrixProduct(Linear):
    """``b + x W`` (``torch.addmm``, as the Conv1D of GPT-2): the weight's rows belong to the inputs."""

    functions: ClassVar[Functions] = (torch.addmm,)
    signature: ClassVar[Signature] = (("bias", None), ("input", None), ("weight", None), ("beta", 1), ("alpha", 1))
    transposed = True

    def covers(self, call: Call) -> str:
        """See :class:`Rule`."""
        if not call.arguments["beta"] == call.arguments["alpha"] == 1:
            return "it is scaled by alpha or beta"
        return super().covers(call)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """See :class:`Rule`; torch calls the bias ``input``, and what is multiplied ``mat1`` and ``mat2``."""
        names = {"input": "bias", "mat1": "input", "mat2": "weight"}
        return super().bind(args, {names.get(name, name): value for name, value in kwargs.items()})


#: The rules of this module.
RULES: Final = (Linear(), AddMatrixProduct())
