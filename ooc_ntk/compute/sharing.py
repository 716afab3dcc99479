"""Bare parameters that a model takes with a sample axis, so that every sample has a gradient of its own."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from .jacobian import ModelBatch, ModelFunction, plain_layers
from .structure import alike, repeated, to_samples

logger = logging.getLogger(__name__)

#: Bare parameters that are tried one by one whether they can be given a sample axis (each costs a few small forward
#: passes).
TRIED_PARAMETERS: Final = 64

#: Noise on the inputs, in standard deviations of their own (a choice: it turns the sign of most of what is not far from
#: zero, so that branches which are dead on a few samples come alive).
NOISE: Final = 3.0


def shareable(function: ModelFunction, batch: ModelBatch, names: Sequence[str]) -> Iterator[str]:
    """Parameters that the model takes with a sample axis in front, so that each sample has a gradient of its own.

    Values of a few samples do not show a use that is dead on them, behind a ReLU, and alive on others. So the autograd
    graph must hold the sample axis wherever the parameter goes, and the values must agree on noisy inputs as well.

    Args:
        function: model and chosen parameters.
        batch: samples from all over the data.
        names: bare parameters.

    Yields:
        Those names that can be given a sample axis.
    """
    names = [name for name in names if "parametrizations." not in name][:TRIED_PARAMETERS]
    if not names:
        return
    noisy = _noisy(batch)
    with plain_layers():
        for name in names:
            try:
                fits = _same_apart(function, batch, name) and _holds_samples(function, batch, name)
            except Exception as error:  # noqa: BLE001 - any failure means that it cannot be done
                logger.debug("%s takes no sample axis: %s", name, error)
                continue
            try:
                fits = fits and _same_apart(function, noisy, name)
            except Exception as error:  # noqa: BLE001 - the model need not take inputs that are no data
                logger.debug("%s is not tried on noise: %s", name, error)
            if fits:
                yield name


def _values(parameter: Tensor, samples: int) -> Tensor:
    """A parameter with a sample axis; every sample has a value of its own, so that one in another's place is seen."""
    values = to_samples(parameter, None, samples).clone()
    shift = torch.arange(samples).to(values).view(-1, *(1,) * (values.ndim - 1))
    return values * (1 + 0.1 * shift) + 0.01 * shift


def _same_apart(function: ModelFunction, batch: ModelBatch, name: str) -> bool:
    """Whether samples with a value each give the same together as one by one, as the parameter is."""
    parameter = function.parameters[name]
    values = _values(parameter, len(batch))
    with torch.no_grad():
        together = function.logits({name: values}, batch)
        apart = [
            function.logits({name: values[index].view(parameter.shape)}, batch.sample(index))
            for index in range(len(batch))
        ]
    return alike(together, torch.cat(apart))


def _holds_samples(function: ModelFunction, batch: ModelBatch, name: str) -> bool:
    """Whether all that outputs take from a parameter has one axis that grows with the samples, whatever its values."""
    two, three = (_shapes_led_to(function, repeated(batch, samples), name) for samples in (2, 3))
    return len(two) == len(three) and all(map(_grows, two, three))


def _grows(two: Sequence[int], three: Sequence[int]) -> bool:
    """Whether one axis of a shape, and no other, holds the samples of a batch of two and of one of three."""
    if len(two) != len(three):
        return False
    grown = [(a, b) for a, b in zip(two, three, strict=True) if a != b]
    return len(grown) == 1 and grown[0][0] * 3 == grown[0][1] * 2


def _shapes_led_to(function: ModelFunction, batch: ModelBatch, name: str) -> list[tuple[int, ...]]:
    """Shapes of all tensors between a parameter with a sample axis and the outputs, in the order of the graph."""
    leaf = _values(function.parameters[name], len(batch)).requires_grad_()
    with torch.enable_grad():
        # Cloned, as a model may change it in place. Nothing else needs gradients: the whole graph leads to the leaf.
        outputs = function.logits({name: leaf.clone()}, batch)
    shapes: list[tuple[int, ...]] = []
    edges, seen = [(outputs.grad_fn, outputs.output_nr)], set()
    while edges:
        node, number = edges.pop()
        if node is None or (node, number) in seen:
            continue
        seen.add((node, number))
        shapes.append(tuple(node._input_metadata[number].shape))
        edges.extend(node.next_functions)
    return shapes


def _noisy(batch: ModelBatch) -> ModelBatch:
    """The batch with noise on its inputs.

    Whole numbers stay as they are: they may be numbers of rows, and one out of range is no exception on a GPU but the
    end of its use.
    """
    generator = torch.Generator().manual_seed(0)

    def shaken(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        free = value != value.round()
        if not bool(free.any()):
            return value
        noise = torch.randn(value.shape, generator=generator).to(value)
        return torch.where(free, value + NOISE * value[free].std(correction=0) * noise, value)

    return replace(
        batch,
        args=tuple(shaken(value) for value in batch.args),
        kwargs={name: shaken(value) for name, value in batch.kwargs.items()},
    )
