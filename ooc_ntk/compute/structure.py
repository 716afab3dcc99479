"""The structure of a model as layer rules see it: which parameters they cover, in which calls, with which factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from ooc_ntk.planning.factors import LayerFactors

from .jacobian import ModelBatch, ModelFunction
from .rules.base import Rule
from .rules.table import module_rule

#: Relative difference of a sample's outputs alone and among others that rounding may explain (guessed; measured on
#: float32 networks: below 1e-5).
SAME_OUTPUT: Final = 1e-3


@dataclass(frozen=True)
class SampleAxis:
    """Where a tensor has its samples.

    Attributes:
        index: the axis. It may hold several positions of each sample.
        fastest: whether then the samples run faster than the positions (``(positions, samples)`` flattened).
    """

    index: int
    fastest: bool = False


@dataclass(frozen=True)
class Use:
    """One call of a layer's function in the forward pass.

    Attributes:
        number: its number among the intercepted calls.
        rule: its rule.
        input_axis: where its input has the samples, None if the input is the same for all of them.
        output_axis: likewise of its output.
        factors: shapes of its factors (outer-product rules).
        changed: whether the model changes the input in place later.
    """

    number: int
    rule: Rule
    input_axis: SampleAxis | None
    output_axis: SampleAxis | None
    factors: LayerFactors | None
    changed: bool


@dataclass(frozen=True)
class Layer:
    """Parameters that are derived together.

    Attributes:
        parameters: their names: a weight and its bias, or one alone.
        uses: calls that they take part in.
        factors: shapes of the factors of all uses together; None if it is only ever dense.
        kind: ``outer`` (weight, with or without bias, from factors), ``weight`` or ``bias`` (elementwise),
            ``shared`` (a bare parameter given a sample axis) or ``module`` (a user's rule).
        module: name of the module with a user's rule.
    """

    parameters: tuple[str, ...]
    uses: tuple[Use, ...]
    factors: LayerFactors | None
    kind: str
    module: str = ""


@dataclass(frozen=True)
class Structure:
    """What layer rules cover.

    Attributes:
        layers: layers, by each of their parameters.
        reasons: why a parameter is not covered, by name.
        branches: values that the model asked its tensors for on one sample; it may take other ways on other data.
        calls: intercepted calls of one forward pass.
    """

    layers: Mapping[str, Layer] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    branches: tuple[object, ...] = ()
    calls: int = 0

    def without(self, reasons: Mapping[str, str]) -> Structure:
        """The structure with some parameters (and those derived together with them) left to ``torch.func``."""
        dropped = {name for given in reasons if given in self.layers for name in self.layers[given].parameters}
        known = {name: reasons[name] for name in reasons}
        for name in dropped - set(known):
            known[name] = next(reasons[other] for other in self.layers[name].parameters if other in reasons)
        layers = {name: layer for name, layer in self.layers.items() if name not in dropped}
        return Structure(layers, {**self.reasons, **known}, self.branches, self.calls)


def to_samples(value: Tensor, axis: SampleAxis | None, samples: int) -> Tensor:
    """Bring a tensor to (samples, ...).

    Args:
        value: the tensor.
        axis: where it has its samples; None if all samples share it.
        samples: number of samples.

    Returns:
        A view where possible.

    >>> [to_samples(torch.arange(6), SampleAxis(0, fastest), 2).tolist() for fastest in (False, True)]
    [[[0, 1, 2], [3, 4, 5]], [[0, 2, 4], [1, 3, 5]]]
    """
    if axis is None:
        return value.expand(samples, *value.shape[1:]) if leads(value) else value.expand(samples, *value.shape)
    moved = value.movedim(axis.index, 0) if axis.index else value
    if moved.shape[0] == samples:
        return moved
    if axis.fastest:
        return moved.reshape(-1, samples, *moved.shape[1:]).transpose(0, 1)
    return moved.reshape(samples, -1, *moved.shape[1:])


def leads(value: Tensor) -> bool:
    """Whether the first axis of a shared tensor is one of length 1, which stands for the samples."""
    return value.ndim > 1 and value.shape[0] == 1


def _taken(batch: ModelBatch, index: Tensor) -> ModelBatch:
    """Samples of a batch by their numbers."""

    def take(value: Tensor) -> Tensor:
        return value[index.to(value.device)]

    return ModelBatch(
        tuple(take(value) for value in batch.args),
        {name: take(value) for name, value in batch.kwargs.items()},
        None if batch.targets is None else take(batch.targets),
    )


def repeated(batch: ModelBatch, samples: int) -> ModelBatch:
    """A batch of exactly ``samples`` samples, the given ones over and over."""
    return _taken(batch, torch.arange(samples) % len(batch))


def stirred(batch: ModelBatch) -> ModelBatch:
    """The samples of a batch in an order that is neither up nor down, as data may be sorted.

    >>> stirred(ModelBatch((torch.arange(6),), {}, None)).args[0].tolist()
    [5, 3, 1, 0, 2, 4]
    """
    every = list(range(len(batch)))
    return _taken(batch, torch.tensor(every[1::2][::-1] + every[::2]))


def evenly(batch: ModelBatch, samples: int) -> ModelBatch:
    """At most so many samples of a batch, from its first to its last."""
    last, count = len(batch) - 1, min(samples, len(batch))
    return _taken(batch, torch.tensor(sorted({round(part * last / max(1, count - 1)) for part in range(count)})))


def identities(function: ModelFunction) -> dict[int, str]:
    """Chosen parameters by the identity of their tensor, those of modules with a user's rule left out."""
    ruled = [name for name, part in function.module.named_modules() if module_rule(part) is not None]
    return {id(function.parameters[name]): name for name in function.names if name.rpartition(".")[0] not in ruled}


def alike(found: Tensor, wanted: Tensor) -> bool:
    """Whether rounding explains the difference of two tensors."""
    if found.shape != wanted.shape:
        return False
    if not found.is_floating_point():
        return bool(torch.equal(found, wanted))
    scale = float(wanted.abs().max()) if wanted.numel() else 0.0
    return bool(torch.allclose(found, wanted, rtol=SAME_OUTPUT, atol=SAME_OUTPUT * scale + 1e-12, equal_nan=True))


def count_matches(tokens: Tensor) -> float:
    """Tokens that a pair of different samples has in common, as many times as each has them counts once.

    Args:
        tokens: (samples, positions) row numbers, negative where there is none.

    Returns:
        The mean, the different tokens of a single sample.

    >>> count_matches(torch.tensor([[0, 0, 1], [0, 2, -1]]))
    1.0
    """
    samples = tokens.shape[0]
    different, number = torch.unique(tokens, return_inverse=True)
    there = torch.zeros(samples, len(different), device=tokens.device)
    there.scatter_(1, number.view(samples, -1), 1.0)
    there = there[:, different >= 0]
    if samples < 2:
        return float(there.sum())
    every = there @ there.T
    return float(every.sum() - every.diagonal().sum()) / (samples * (samples - 1))
