"""The structure of a model as layer rules see it: which parameters they cover, in which calls, with which factors."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import torch
from torch import Tensor

from ooc_ntk.errors import InputError
from ooc_ntk.planning.factors import LayerFactors

from .held import MOST_ROWS
from .intercept import Interceptor
from .jacobian import ModelBatch, ModelFunction, plain_layers
from .rules.base import Call, OuterRule, Rule
from .rules.embedding import Embedding
from .rules.linear import Linear
from .rules.table import module_rule

logger = logging.getLogger(__name__)

#: Relative difference of a sample's outputs alone and among others that rounding may explain (guessed; measured on
#: float32 networks: below 1e-5).
SAME_OUTPUT: Final = 1e-3

#: Samples, spread over the data, of which every layer must see its own at its place (a choice: that a model which sorts
#: its samples leaves so many where they are has a chance of 1 in 720).
COMPARED_SAMPLES: Final = 6

#: Bare parameters that are tried one by one whether they can be given a sample axis (each costs a small forward pass).
TRIED_PARAMETERS: Final = 64


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


@dataclass
class _Seen:
    """One intercepted call, as the discovery noted it."""

    rule: Rule
    call: Call
    inputs: Tensor
    output: Tensor
    version: int
    weight: str | None
    bias: str | None

    @property
    def signature(self) -> tuple[object, ...]:
        return type(self.rule), self.weight, self.bias, self.call.inputs.ndim, self.output.ndim


@dataclass
class _Forward:
    """One forward pass: its intercepted calls, its outputs, what it asked of tensors, parameters without a rule."""

    seen: list[_Seen]
    outputs: Tensor
    branches: tuple[object, ...]
    elsewhere: Mapping[str, str]

    @property
    def signature(self) -> list[tuple[object, ...]]:
        return [seen.signature for seen in self.seen]


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


def repeated(batch: ModelBatch, samples: int) -> ModelBatch:
    """A batch of exactly ``samples`` samples, the given ones over and over."""
    index = torch.arange(samples) % len(batch)

    def take(value: Tensor) -> Tensor:
        return value[index.to(value.device)]

    return ModelBatch(
        tuple(take(value) for value in batch.args),
        {name: take(value) for name, value in batch.kwargs.items()},
        None if batch.targets is None else take(batch.targets),
    )


def evenly(batch: ModelBatch, samples: int) -> ModelBatch:
    """At most so many samples of a batch, from its first to its last."""
    last, count = len(batch) - 1, min(samples, len(batch))
    index = torch.tensor(sorted({round(part * last / max(1, count - 1)) for part in range(count)}))

    def take(value: Tensor) -> Tensor:
        return value[index.to(value.device)]

    return ModelBatch(
        tuple(take(value) for value in batch.args),
        {name: take(value) for name, value in batch.kwargs.items()},
        None if batch.targets is None else take(batch.targets),
    )


def find_structure(
    function: ModelFunction, batch: ModelBatch, spread: ModelBatch | None = None, *, single: bool = False
) -> Structure:
    """Find what layer rules cover by running one, two and three samples forward.

    Args:
        function: model and chosen parameters.
        batch: a few samples, on the device.
        spread: more samples, all over the data, compared alone and together: a few always, all if it branches on data.
        single: whether batches will only ever hold one sample, so that it does not matter what batch mates change.

    Returns:
        The structure, not yet compared with autograd.

    Raises:
        InputError: if a sample's outputs change with its batch mates although the model does not branch on data.
    """
    three = repeated(batch, 3)
    alone = _run(function, three.sample(0))
    branches = alone.branches
    try:
        pairs, triples = _run(function, repeated(batch, 2)), _run(function, three)
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 - a model that takes only single samples may fail in any way
        reason = f"the model does not take batches ({type(error).__name__})"
        return Structure(reasons=dict.fromkeys(function.names, reason))
    if not single:
        found = _batch_dependence(function, three, triples, [alone])
        if found is None and branches and spread is not None:
            found = _batch_dependence(function, spread, _run(function, spread))
        if found is not None:
            return Structure(reasons=dict.fromkeys(function.names, found), branches=branches)
    if not alone.signature == pairs.signature == triples.signature:
        return Structure(reasons=dict.fromkeys(function.names, "its layers are not called alike for every batch"))
    uses, reasons = _uses(alone.seen, pairs.seen, triples.seen)
    # A weight that another function uses as well has a gradient that its layer does not show.
    for name, used in {**alone.elsewhere, **triples.elsewhere}.items():
        reasons.setdefault(name, f"no layer rule covers {used}()")
    others = three if spread is None else evenly(spread, COMPARED_SAMPLES)
    if not single:
        together = _run(function, others)
        apart = [_run(function, others.sample(index)) for index in range(len(others))]
        dependent = _batch_dependence(function, others, together, apart)
        if dependent is not None:
            return Structure(reasons=dict.fromkeys(function.names, dependent), branches=branches)
        for number, reason in _out_of_order(together, apart, triples, uses).items():
            call = triples.seen[number]
            reasons.update({name: reason for name in (call.weight, call.bias) if name is not None})
            del uses[number]
    layers = _layers(function, triples.seen, uses, reasons)
    for name, part in function.module.named_modules():
        if module_rule(part) is not None:
            prefix = f"{name}." if name else ""
            own = tuple(n for n, _ in part.named_parameters(recurse=False) if f"{prefix}{n}" in function.sizes)
            if own:
                names = tuple(f"{prefix}{n}" for n in own)
                layers.update(dict.fromkeys(names, Layer(names, (), None, "module", name)))
    for name in _shareable(function, others, [n for n in function.names if n not in layers]):
        layers[name] = Layer((name,), (), None, "shared")
    for name in function.names:
        if name not in layers:
            reasons.setdefault(name, "no layer rule knows the function that uses it")
    return Structure(
        {name: layers[name] for name in function.names if name in layers},
        {name: reason for name, reason in reasons.items() if name not in layers},
        branches,
        len(alone.seen),
    )


def identities(function: ModelFunction) -> dict[int, str]:
    """Chosen parameters by the identity of their tensor, those of modules with a user's rule left out."""
    ruled = [name for name, part in function.module.named_modules() if module_rule(part) is not None]
    return {id(function.parameters[name]): name for name in function.names if name.rpartition(".")[0] not in ruled}


def _run(function: ModelFunction, batch: ModelBatch, *, kept: bool = True) -> _Forward:
    """Run forward and note every call, with copies of its input and output unless only the outputs matter."""
    seen: list[_Seen] = []
    known = identities(function)

    def note(number: int, rule: Rule, call: Call, output: Tensor) -> Tensor:
        del number
        if kept:
            weight, bias = known.get(id(call.weight)), known.get(id(call.bias))
            seen.append(_Seen(rule, call, call.inputs.clone(), output.clone(), call.inputs._version, weight, bias))
        return output

    mode = Interceptor(known, note)
    with torch.no_grad(), plain_layers(), mode:
        outputs = function.logits({}, batch)
    return _Forward(seen, outputs, tuple(mode.branches), mode.elsewhere)


def _batch_dependence(
    function: ModelFunction, batch: ModelBatch, together: _Forward, alone: Sequence[_Forward] = ()
) -> str | None:
    """Why a model cannot run in batches, if it branches on data; None if batch mates change nothing.

    Args:
        function: model and chosen parameters.
        batch: the samples.
        together: what they gave in one batch.
        alone: what the first ones gave alone, as far as they were run.

    Raises:
        InputError: if batch mates change outputs and nothing in the model explains it.
    """
    others = [_run(function, batch.sample(index), kept=False) for index in range(len(alone), len(batch))]
    singles = [*alone, *others]
    asked = any(found.branches for found in (together, *singles))
    apart = torch.cat([found.outputs for found in singles])
    if together.outputs.shape != apart.shape:
        return None
    scale = float(apart.abs().max()) or 1.0
    difference = float((together.outputs - apart).abs().max()) / scale
    if difference <= SAME_OUTPUT or difference != difference:
        return None
    if asked:
        return "the model branches on its data, and samples of a batch go different ways"
    raise InputError(
        f"the model's outputs for one sample change with its batch mates (by {difference:.2g} of the largest output, "
        f"allowed {SAME_OUTPUT:g}); check for operations across the batch, or allow it with "
        "allow_batch_dependence=True (--allow-batch-dependence), which computes every sample alone"
    )


def _uses(
    alone: Sequence[_Seen], pairs: Sequence[_Seen], triples: Sequence[_Seen]
) -> tuple[dict[int, Use], dict[str, str]]:
    """Where every call has its samples; reasons for those of which that is not clear."""
    uses: dict[int, Use] = {}
    reasons: dict[str, str] = {}
    for number, (one, two, three) in enumerate(zip(alone, pairs, triples, strict=True)):
        names = [name for name in (three.weight, three.bias) if name is not None]
        reason = three.rule.covers(three.call)
        inputs = _sample_axis(one.inputs, two.inputs, three.inputs)
        output = _sample_axis(one.output, two.output, three.output)
        if not reason and (isinstance(inputs, str) or isinstance(output, str)):
            reason = next(found for found in (inputs, output) if isinstance(found, str))
        if not reason and (inputs is None) != (output is None):
            reason = "its output has a sample axis and its input has none"
        if reason:
            reasons.update(dict.fromkeys(names, reason))
            continue
        assert not isinstance(inputs, str)
        assert not isinstance(output, str)
        factors = None
        if isinstance(three.rule, OuterRule):
            held = to_samples(three.inputs, inputs, 3)
            factors = three.rule.factors(three.call, held, to_samples(three.output, output, 3))
        changed = three.call.inputs._version != three.version
        uses[number] = Use(number, three.rule, inputs, output, factors, changed)
    return uses, reasons


def _out_of_order(
    together: _Forward, singles: Sequence[_Forward], known: _Forward, uses: Mapping[int, Use]
) -> dict[int, str]:
    """Calls that do not see the samples of a batch in their order, by number, with the reason.

    Args:
        together: a forward pass of samples from all over the data.
        singles: of each of them alone.
        known: of other samples, whose calls these must repeat.
        uses: where every call has its samples.
    """
    count = len(singles)
    if any(found.signature != known.signature for found in (together, *singles)):
        return dict.fromkeys(uses, "its layers are not called alike for all samples")
    reasons: dict[int, str] = {}
    for number, use in uses.items():
        for kind, axis in (("inputs", use.input_axis), ("output", use.output_axis)):
            if axis is None:
                continue
            try:
                whole = to_samples(getattr(together.seen[number], kind), axis, count)
                apart = [to_samples(getattr(single.seen[number], kind), axis, 1)[0] for single in singles]
                same = all(alike(mine, own) for mine, own in zip(whole, apart, strict=True))
            except RuntimeError:  # no whole number of positions per sample
                same = False
            if not same:
                reasons[number] = "it does not see the samples of a batch in their order"
    return reasons


def alike(found: Tensor, wanted: Tensor) -> bool:
    """Whether rounding explains the difference of two tensors."""
    if found.shape != wanted.shape:
        return False
    if not found.is_floating_point():
        return bool(torch.equal(found, wanted))
    scale = float(wanted.abs().max()) if wanted.numel() else 0.0
    return bool(torch.allclose(found, wanted, rtol=SAME_OUTPUT, atol=SAME_OUTPUT * scale + 1e-12, equal_nan=True))


def _sample_axis(one: Tensor, two: Tensor, three: Tensor) -> SampleAxis | str | None:
    """The axis that grows with the samples and holds them in order, None if none grows, or what is wrong."""
    grown = [axis for axis, (a, b) in enumerate(zip(two.shape, three.shape, strict=True)) if a != b]
    if not grown:
        return None
    if len(grown) > 1 or two.shape[grown[0]] * 3 != three.shape[grown[0]] * 2:
        return "it is not clear which axis of its input holds the samples"
    for axis in (SampleAxis(grown[0]), SampleAxis(grown[0], fastest=True)):
        first, wanted = to_samples(three, axis, 3)[0], to_samples(one, axis, 1)[0]
        if first.shape == wanted.shape and torch.allclose(first, wanted, rtol=SAME_OUTPUT, atol=1e-5):
            return axis
    return "it does not see the samples of a batch in their order"


def _layers(
    function: ModelFunction, seen: Sequence[_Seen], uses: Mapping[int, Use], reasons: Mapping[str, str]
) -> dict[str, Layer]:
    """Group parameters by the calls they take part in."""
    order = {name: index for index, name in enumerate(function.names)}
    as_weight: dict[str, list[int]] = {}
    as_bias: dict[str, list[int]] = {}
    for number, call in enumerate(seen):
        if call.weight is not None:
            as_weight.setdefault(call.weight, []).append(number)
        if call.bias is not None:
            as_bias.setdefault(call.bias, []).append(number)
    layers: dict[str, Layer] = {}
    for name, numbers in as_weight.items():
        if name in reasons or name in as_bias:
            continue
        own = tuple(uses[number] for number in numbers)
        if not isinstance(own[0].rule, OuterRule):
            layers[name] = Layer((name,), own, None, "weight")
            continue
        biases = {seen[number].bias for number in numbers}
        bias = biases.pop() if len(biases) == 1 else None
        together = (
            bias is not None
            and bias not in reasons
            and as_bias[bias] == numbers
            and order[bias] == order[name] + 1
            and bias.rpartition(".")[0] == name.rpartition(".")[0]
            and all(isinstance(use.rule, OuterRule) and use.rule.shares_bias for use in own)
        )
        names = (name, bias) if together and bias is not None else (name,)
        layer = Layer(names, own, _merged(seen, own, biased=together), "outer")
        layers.update(dict.fromkeys(names, layer))
    for name, numbers in as_bias.items():
        if name not in layers and name not in reasons and name not in as_weight:
            layers[name] = Layer((name,), tuple(uses[number] for number in numbers), None, "bias")
    return layers


def _merged(seen: Sequence[_Seen], uses: Sequence[Use], *, biased: bool) -> LayerFactors | None:
    """Factors of all uses of a weight together: positions one after the other, rows that are looked up beside them.

    None where that is not possible: groups, or uses of which one takes the weight the other way round.
    """
    if any(use.rule.groups(seen[use.number].call) > 1 for use in uses if isinstance(use.rule, OuterRule)):
        return None
    first = uses[0].factors
    assert first is not None
    if len(uses) == 1:
        return replace(first, bias=biased)
    every = [use.factors for use in uses if use.factors is not None]
    tables = [factors for factors in every if factors.kind == "tokens"]
    others = [factors for factors in every if factors.kind != "tokens"]
    positions, lookups = (sum(factors.positions for factors in kind) for kind in (others, tables))
    if not others:
        return LayerFactors("tokens", lookups, first.inputs, first.outputs, biased)
    rules = {type(use.rule) for use in uses if not isinstance(use.rule, Embedding)}
    head = others[0]
    if len(rules) > 1 or (tables and (rules != {Linear} or head.outputs > MOST_ROWS)):
        return None
    return LayerFactors("linear", positions, head.inputs, head.outputs, biased, lookups=lookups)


def _shareable(function: ModelFunction, batch: ModelBatch, names: Sequence[str]) -> Iterator[str]:
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


def count_matches(tokens: Tensor) -> float:
    """Pairs of equal tokens per pair of different samples.

    Args:
        tokens: (samples, positions) row numbers, negative where there is none.

    Returns:
        The mean, 0 for a single sample.
    """
    samples = tokens.shape[0]
    if samples < 2:
        return float(tokens.shape[1])
    equal = (tokens[:, None, :, None] == tokens[None, :, None, :]) & (tokens[:, None, :, None] >= 0)
    every = equal.sum((2, 3))
    return float(every.sum() - every.diagonal().sum()) / (samples * (samples - 1))
