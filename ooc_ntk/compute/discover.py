"""Discovery: forward passes of a few samples show which parameters layer rules cover, and where calls have samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from .sharing import shareable
from .structure import (
    SAME_OUTPUT,
    Layer,
    SampleAxis,
    Structure,
    Use,
    alike,
    evenly,
    identities,
    repeated,
    stirred,
    to_samples,
)

#: Samples, spread over the data, of which every layer must see its own at its place (a choice: that a model which sorts
#: its samples leaves so many where they are has a chance of 1 in 720).
COMPARED_SAMPLES: Final = 6

#: Outputs of a sample that are smaller than this share of the largest ones of all samples count as that large: rounding
#: may follow what is added up on the way to them (guessed).
SMALL_OUTPUT: Final = 1e-2


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
            found = _batch_dependence(function, spread, _run(function, spread, kept=False))
        if found is not None:
            return Structure(reasons=dict.fromkeys(function.names, found), branches=branches)
    if not alone.signature == pairs.signature == triples.signature:
        return Structure(reasons=dict.fromkeys(function.names, "its layers are not called alike for every batch"))
    uses, reasons = _uses(alone.seen, pairs.seen, triples.seen, single=single)
    calls = len(alone.seen)
    alone.seen.clear()  # copies of all that layers saw, which are not needed again
    pairs.seen.clear()
    # A weight that another function uses as well has a gradient that its layer does not show.
    for name, used in {**alone.elsewhere, **triples.elsewhere}.items():
        reasons.setdefault(name, f"no layer rule covers {used}")
    others = stirred(three if spread is None else evenly(spread, COMPARED_SAMPLES))
    for name in _led_to(function, three.sample(0)) | (set() if single else _led_to(function, others)):
        reasons.setdefault(name, "something else uses it as well")
    if not single:
        together = _run(function, others)
        wrong, apart = _out_of_order(function, others, together, triples, uses)
        dependent = _batch_dependence(function, others, together, apart)
        if dependent is not None:
            return Structure(reasons=dict.fromkeys(function.names, dependent), branches=branches)
        for number, reason in wrong.items():
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
    for name in shareable(function, others, [n for n in function.names if n not in layers]):
        layers[name] = Layer((name,), (), None, "shared")
    for name in function.names:
        if name not in layers:
            reasons.setdefault(name, "no layer rule knows the function that uses it")
    return Structure(
        {name: layers[name] for name in function.names if name in layers},
        {name: reason for name, reason in reasons.items() if name not in layers},
        branches,
        calls,
    )


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


def _led_to(function: ModelFunction, batch: ModelBatch) -> set[str]:
    """Parameters that gradients reach by another way than the calls that rules stand for.

    The graph is looked at, not its values: another use may have no gradient on these samples and one on others. It
    shows what no mode sees, such as the inside of scripted functions and of custom autograd functions.
    """
    leaves = {name: function.parameters[name].detach().requires_grad_() for name in identities(function).values()}
    known = {id(leaf): name for name, leaf in leaves.items()}

    def keep(number: int, rule: Rule, call: Call, output: Tensor) -> Tensor:
        del number, rule, call
        return output

    with torch.enable_grad(), plain_layers(), Interceptor(known, keep, detached=True):
        outputs = function.logits(leaves, batch)
    found: set[str] = set()
    nodes, seen = [outputs.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = known.get(id(getattr(node, "variable", None)))
        if name is not None:
            found.add(name)
        nodes.extend(following for following, _ in node.next_functions)
    return found


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
    # Each sample by its own outputs, those of tiny ones with the rounding of the others.
    own = apart.abs().flatten(1).amax(1)
    scale = torch.maximum(own, SMALL_OUTPUT * own.max()).clamp(min=torch.finfo(own.dtype).tiny)
    difference = float(((together.outputs - apart).abs().flatten(1).amax(1) / scale).max())
    if difference <= SAME_OUTPUT or difference != difference:
        return None
    if asked:
        return "the model branches on its data, and samples of a batch go different ways"
    raise InputError(
        f"the model's outputs for one sample change with its batch mates (by {difference:.2g} of its largest output, "
        f"allowed {SAME_OUTPUT:g}); check for operations across the batch, or allow it with "
        "allow_batch_dependence=True (--allow-batch-dependence), which computes every sample alone"
    )


def _uses(
    alone: Sequence[_Seen], pairs: Sequence[_Seen], triples: Sequence[_Seen], *, single: bool
) -> tuple[dict[int, Use], dict[str, str]]:
    """Where every call has its samples; reasons for those of which that is not clear."""
    uses: dict[int, Use] = {}
    reasons: dict[str, str] = {}
    for number, (one, two, three) in enumerate(zip(alone, pairs, triples, strict=True)):
        names = [name for name in (three.weight, three.bias) if name is not None]
        reason = three.rule.covers(three.call)
        inputs = _sample_axis(one.inputs, two.inputs, three.inputs, single=single)
        output = _sample_axis(one.output, two.output, three.output, single=single)
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
    function: ModelFunction, batch: ModelBatch, together: _Forward, known: _Forward, uses: Mapping[int, Use]
) -> tuple[dict[int, str], list[_Forward]]:
    """Calls that do not see the samples of a batch in their order, by number, with the reason.

    Args:
        function: model and chosen parameters.
        batch: samples from all over the data.
        together: a forward pass of them.
        known: one of other samples, whose calls these must repeat.
        uses: where every call has its samples.

    Returns:
        The calls, and the forward pass of every sample alone, without its calls: one at a time is held.
    """
    singles: list[_Forward] = []
    every = together.signature == known.signature
    wrong: set[int] = set()
    for index in range(len(batch)):
        single = _run(function, batch.sample(index))
        every = every and single.signature == known.signature
        if every:
            wrong.update(
                number
                for number, use in uses.items()
                if not _same_place(use, together.seen[number], single.seen[number], index, len(batch))
            )
        singles.append(replace(single, seen=[]))
    if not every:
        return dict.fromkeys(uses, "its layers are not called alike for all samples"), singles
    return dict.fromkeys(sorted(wrong), "it does not see the samples of a batch in their order"), singles


def _same_place(use: Use, together: _Seen, single: _Seen, index: int, samples: int) -> bool:
    """Whether a call sees a sample of a batch at its place, as it sees it alone."""
    for whole, alone, axis in (
        (together.inputs, single.inputs, use.input_axis),
        (together.output, single.output, use.output_axis),
    ):
        try:
            if axis and not alike(to_samples(whole, axis, samples)[index], to_samples(alone, axis, 1)[0]):
                return False
        except RuntimeError:  # no whole number of positions per sample
            return False
    return True


def _sample_axis(one: Tensor, two: Tensor, three: Tensor, *, single: bool) -> SampleAxis | str | None:
    """The axis that grows with the samples and holds them in order, None if none grows, or what is wrong.

    Of a single sample there is no order, and its values may be others than among batch mates.
    """
    grown = [axis for axis, (a, b) in enumerate(zip(two.shape, three.shape, strict=True)) if a != b]
    if not grown:
        return None
    if len(grown) > 1 or two.shape[grown[0]] * 3 != three.shape[grown[0]] * 2:
        return "it is not clear which axis of its input holds the samples"
    if single:
        return SampleAxis(grown[0])
    for axis in (SampleAxis(grown[0]), SampleAxis(grown[0], fastest=True)):
        first, wanted = to_samples(three, axis, 3)[0], to_samples(one, axis, 1)[0]
        if alike(first, wanted):
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
