"""A batch of samples: one tensor, or a dict of tensors that a model takes by keyword."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

#: (samples, ...), or several such by the model's argument names.
Inputs = Tensor | dict[str, Tensor]


def map_tensors(inputs: Inputs, function: Callable[[Tensor], Tensor]) -> Inputs:
    """Apply a function to every tensor of a batch.

    Args:
        inputs: the batch.
        function: from tensor to tensor.

    Returns:
        A batch of the same form.
    """
    if isinstance(inputs, dict):
        return {name: function(tensor) for name, tensor in inputs.items()}
    return function(inputs)


def count_samples(inputs: Inputs) -> int:
    """Samples of a batch."""
    return len(next(iter(inputs.values())) if isinstance(inputs, dict) else inputs)


def take(inputs: Inputs, samples: slice | Sequence[int]) -> Inputs:
    """Some samples of a batch, in the order asked for."""
    chosen = samples if isinstance(samples, slice) else list(samples)
    return map_tensors(inputs, lambda tensor: tensor[chosen])


def as_double(inputs: Inputs) -> Inputs:
    """The batch in float64; integers, such as tokens and masks, stay what they are."""
    return map_tensors(inputs, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


def call(model: nn.Module, inputs: Inputs) -> Tensor:
    """The model's logits, (samples, outputs)."""
    logits: Tensor = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return logits


def count_outputs(model: nn.Module, inputs: Inputs) -> int:
    """Outputs per sample."""
    with torch.no_grad():
        return call(model, take(inputs, slice(0, 1))).shape[1]


def count_parameters(model: nn.Module) -> int:
    """Scalars in all parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
