"""What a rule is: one class per kind of layer, found by the torch function that the layer calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

from torch import Tensor

from ooc_ntk.planning.factors import LayerFactors

#: Torch functions that a rule stands for.
Functions: TypeAlias = tuple[Callable[..., Any], ...]

#: Names of their arguments, in order, with defaults.
Signature: TypeAlias = tuple[tuple[str, Any], ...]


@dataclass
class Call:
    """One call of a function that a rule stands for, with its arguments by name.

    Attributes:
        inputs: the layer's input, any layout.
        weight: the weight, if it is one of the chosen parameters; otherwise None.
        bias: the bias, likewise.
        arguments: every argument by name.
    """

    inputs: Tensor
    weight: Tensor | None
    bias: Tensor | None
    arguments: Mapping[str, Any] = field(default_factory=dict)


class Rule(ABC):
    """A layer rule.

    Attributes:
        functions: the torch functions it stands for.
        signature: names of their arguments, in order, with defaults where they have any.
    """

    functions: ClassVar[Functions]
    signature: ClassVar[Signature]

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of a call by name."""
        found = dict(self.signature)
        found.update(zip((name for name, _ in self.signature), args, strict=False))
        found.update(kwargs)
        return found

    def covers(self, call: Call) -> str:
        """Why the rule does not hold for a call; empty if it does."""
        del call
        return ""


class OuterRule(Rule):
    """A layer that is linear in its weight: ``∂f/∂W = Σ_s G[s] ⊗ A[s]`` (DESIGN: parameter block).

    Attributes:
        transposed: whether the rows of the weight belong to the inputs (``x @ W``), not to the outputs.
        shares_bias: whether the bias gradient is the sum of G over positions.
    """

    transposed: ClassVar[bool] = False
    shares_bias: ClassVar[bool] = True

    @abstractmethod
    def factors(self, call: Call, inputs: Tensor, output: Tensor) -> LayerFactors:
        """Shapes of the factors.

        Args:
            call: the call.
            inputs: (samples, ...) as brought to samples.
            output: (samples, ...) likewise.
        """

    @abstractmethod
    def hold(self, call: Call, inputs: Tensor, factors: LayerFactors) -> Tensor:
        """What is held of the inputs: (samples, input items), the items in any shape, or (samples, positions) tokens.

        A view where possible, as it is copied to where it is held.
        """

    def gradient(self, call: Call, inputs: Tensor, gradient: Tensor) -> Tensor:
        """Output gradients as (samples, positions, outputs), both in any shape; a view where possible."""
        del call, inputs
        return gradient

    def bias_gradient(self, call: Call, inputs: Tensor, gradient: Tensor) -> Tensor:
        """Gradient of the bias, (samples, outputs), where it is derived apart from the weight."""
        found = self.gradient(call, inputs, gradient)
        return found.sum(tuple(range(1, found.ndim - 1))) if found.ndim > 2 else found

    def unfolded(self, call: Call, inputs: Tensor, factors: LayerFactors) -> Tensor:
        """Inputs as (samples, positions, inputs), for a weight that is used several times."""
        return self.hold(call, inputs, factors).reshape(inputs.shape[0], -1, factors.inputs)

    def groups(self, call: Call) -> int:
        """Groups of inputs and outputs that do not see each other; more than one is only ever held dense."""
        del call
        return 1

    def weight_order(self, call: Call, gradients: Tensor) -> Tensor:
        """Bring (samples, rows, outputs, inputs) to the order of the weight: (samples, rows, numel)."""
        del call
        return (gradients.transpose(2, 3) if self.transposed else gradients).flatten(2)

    def weight_columns(
        self, call: Call, factors: LayerFactors, outputs: Tensor, inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Places in the weight of elements of expanded gradients, as :meth:`weight_order` brings them there.

        Args:
            call: the call.
            factors: shapes of the layer.
            outputs: (m,) int64 numbers of outputs.
            inputs: (k,) int64 numbers of inputs, in the order in which they are expanded.

        Returns:
            (m,) and (k,) int64: element (i, j) is at the sum of the i-th of the one and the j-th of the other.
        """
        del call
        if self.transposed:
            return outputs, inputs * factors.outputs
        return outputs * factors.inputs, inputs

    def grouped(self, call: Call, inputs: Tensor, gradients: Tensor) -> Tensor:
        """Weight gradients of a layer with groups, in the order of the weight.

        Args:
            call: the call.
            inputs: (samples, positions, inputs of all groups).
            gradients: (samples, positions, rows, outputs of all groups).

        Returns:
            (samples, rows, numel).
        """
        raise NotImplementedError(f"{type(self).__name__} has no groups")


class ElementRule(Rule):
    """A layer whose parameters scale or shift elements: ``∂f/∂w[k] = Σ G·z`` over the elements that w[k] touches."""

    @abstractmethod
    def scaled(self, call: Call, inputs: Tensor) -> Tensor:
        """What the weight multiplies, in the layout of the output (samples, ...)."""

    @abstractmethod
    def reduce(self, call: Call, elements: Tensor, parameter: Tensor) -> Tensor:
        """Sum (samples, ...) elements over what a parameter touches: (samples, numel)."""


def sum_leading(elements: Tensor, numel: int) -> Tensor:
    """Sum all axes between the samples and the last ``numel`` elements.

    Args:
        elements: (samples, ..., *shape) with shape of ``numel`` elements.
        numel: elements of the parameter.

    Returns:
        (samples, numel).
    """
    return elements.reshape(elements.shape[0], -1, numel).sum(1)
