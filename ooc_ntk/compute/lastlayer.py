"""The last layer of a model: the one that its outputs come from, found in the autograd graph."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ooc_ntk.errors import InputError, OocNtkError

from .jacobian import ModelBatch, plain_layers
from .outputs import model_logits

#: Operations (autograd nodes) that leave every number where it is.
VIEWS: Final = frozenset({"View", "UnsafeView", "ReshapeAlias", "Alias", "Clone", "ToCopy"})

#: Operations that work on every number by itself, or over classes alone.
POINTWISE: Final = VIEWS | frozenset(
    {
        *("Mul", "Div", "Add", "Sub", "Rsub", "Neg", "Clamp", "ClampMin", "ClampMax", "Minimum", "Maximum"),
        *("Tanh", "Sigmoid", "Softmax", "LogSoftmax", "SafeSoftmax", "Softplus", "Relu", "MaskedFill", "Where"),
        *("Squeeze", "Unsqueeze", "Transpose", "T", "Permute", "Expand", "Slice", "Select", "Index", "Cat"),
    }
)

#: Told of every call of a watched module: its name, the number of the call, its first input and output if tensors.
Told = Callable[[str, int, Tensor | None, Tensor | None], None]


@dataclass(frozen=True)
class LastLayer:
    """A layer that the outputs come from.

    Attributes:
        name: its name.
        call: the number of its call in one forward pass.
        layer: the layer.
        inputs: what it was given, of one sample.
    """

    name: str
    call: int
    layer: nn.Module
    inputs: Tensor


def watch(model: nn.Module, names: Collection[str] | None, stack: ExitStack, told: Told) -> None:
    """Hook modules by name (None for all) until the stack is closed."""
    calls: Counter[str] = Counter()

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            del module
            number, calls[name] = calls[name], calls[name] + 1
            told(name, number, first_tensor([*args, *kwargs.values()]), first_tensor(output))

        return called

    for name, part in model.named_modules():
        if names is None or name in names:
            stack.callback(part.register_forward_hook(hook(name), with_kwargs=True).remove)


def first_tensor(value: Any) -> Tensor | None:
    """The first floating-point tensor of what a module was given or returned."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return next((found for item in value if (found := first_tensor(item)) is not None), None)
    return None


def last_layers(model: nn.Module, batch: ModelBatch, through: Collection[str]) -> tuple[list[LastLayer], bool]:
    """Layers that the outputs come from through some operations only.

    Args:
        model: the model, in eval mode.
        batch: one sample, on the model's device in its dtype.
        through: the operations, :data:`VIEWS` or :data:`POINTWISE`.

    Returns:
        The layers, and whether something else has a part in the outputs, too.

    Raises:
        InputError: if the model fails on the sample.
    """
    linear = {
        name: part
        for name, part in model.named_modules()
        if isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    }
    nodes: dict[Any, LastLayer] = {}

    def told(name: str, call: int, inputs: Tensor | None, output: Tensor | None) -> None:
        if inputs is not None and output is not None and output.grad_fn is not None:
            nodes[output.grad_fn] = LastLayer(name, call, linear[name], inputs.detach())

    leaves = {
        name: value.detach().requires_grad_() if value.is_floating_point() else value
        for name, value in model.named_parameters()
    }
    try:
        with torch.enable_grad(), plain_layers(), ExitStack() as stack:
            watch(model, linear, stack, told)
            output = model_logits(functional_call(model, leaves, batch.args, dict(batch.kwargs)))
    except OocNtkError:
        raise
    except Exception as error:
        raise failed(error) from error
    found: list[LastLayer] = []
    other, seen, left = False, set(), [output.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        kind = re.sub(r"Backward\d*$", "", type(node).__name__)
        if node in nodes:
            found.append(nodes[node])
        elif kind in through:
            left.extend(parent for parent, _ in node.next_functions)
        elif kind != "AccumulateGrad":
            other = True
    return found, other


def failed(error: Exception) -> InputError:
    """The error when a model fails on its first sample."""
    return InputError(
        f"the model failed on the first sample ({type(error).__name__}: {error}); check that the data has the shape "
        "and dtype that the model takes"
    )
