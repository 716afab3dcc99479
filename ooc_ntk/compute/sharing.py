"""Bare parameters that a model takes with a sample axis, so that every sample has a gradient of its own."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Final

import torch

from .jacobian import ModelBatch, ModelFunction, plain_layers
from .structure import alike, to_samples

logger = logging.getLogger(__name__)

#: Bare parameters that are tried one by one whether they can be given a sample axis (each costs a small forward pass).
TRIED_PARAMETERS: Final = 64


def shareable(function: ModelFunction, batch: ModelBatch, names: Sequence[str]) -> Iterator[str]:
    """Parameters that the model takes with a sample axis in front, so that each sample has a gradient of its own."""
    names = [name for name in names if "parametrizations." not in name][:TRIED_PARAMETERS]
    if not names:
        return
    # Every sample has a value of its own, so that one in another's place is seen.
    steps = torch.arange(len(batch), dtype=torch.get_default_dtype())
    with torch.no_grad(), plain_layers():
        for name in names:
            parameter = function.parameters[name]
            values = to_samples(parameter, None, len(batch)).clone()
            shift = steps.to(values).view(-1, *(1,) * (values.ndim - 1))
            values = values * (1 + 0.1 * shift) + 0.01 * shift
            try:
                found = function.logits({name: values}, batch)
                wanted = torch.cat(
                    [
                        function.logits({name: values[index].view(parameter.shape)}, batch.sample(index))
                        for index in range(len(batch))
                    ]
                )
            except Exception as error:  # noqa: BLE001 - any failure means that it cannot be done
                logger.debug("%s takes no sample axis: %s", name, error)
                continue
            if alike(found, wanted):
                yield name
