"""Capture: one forward pass and a backward pass per Jacobian row give the factors of every layer, for a whole batch.

Rows are taken one after the other. All at once (``is_grads_batched``) the passes of 10 rows took, measured on a CPU at
16 samples, 1.2 times as long on ResNet-18 and 1.6 on a vision transformer; on an MLP a third at 16 samples, as long at
128, and 1.3 times as long at 512, which is the size of its batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from ooc_ntk.errors import InputError
from ooc_ntk.planning.factors import LayerFactors

from .expand import Piece, expand
from .held import Tile, as_tile, some_samples, split_digits
from .intercept import Interceptor, module_hooks
from .jacobian import ModelBatch, ModelFunction, plain_layers
from .rules.base import Call, ElementRule, OuterRule, Rule
from .structure import Layer, SampleAxis, Structure, Use, alike, identities, to_samples
from .user_rules import user_gradients, whose_rule

#: Takes the gradient of a tapped tensor.
Receive = Callable[[Tensor], None]


class _Tap(torch.autograd.Function):
    """Hands the gradient of a layer's output on, and makes outputs that need no gradient need one.

    What it returns has the memory of the output but is no view of it, so that what the model does to it in place comes
    after the tap. No layer with a rule saves its own output for its backward pass. (Marking the output as changed in
    place does the same, but costs a copy of the whole gradient wherever the output is a view, as that of a linear layer
    with several leading dimensions is.)
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, receive: Receive) -> Tensor:
        del anchor
        ctx.receive = receive
        return output.new_empty(0).set_(
            output.untyped_storage(), output.storage_offset(), output.shape, output.stride()
        )

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.receive(gradient)
        return gradient, None, None


class _SharedTap(torch.autograd.Function):
    """The same for a tensor that all samples share, of which it makes one copy per sample without copying."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor, samples: int, receive: Receive) -> Tensor:
        del anchor
        ctx.receive, ctx.leads = receive, value.ndim > 1 and value.shape[0] == 1
        return to_samples(value, None, samples).clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.receive(gradient)
        return gradient.sum(0, keepdim=True) if ctx.leads else gradient.sum(0), None, None, None


def _tapped(kind: type[torch.autograd.Function], *args: Any) -> Tensor:
    """Apply one of the taps, for which torch has no types."""
    return cast("Tensor", kind.apply(*args))  # type: ignore[no-untyped-call]


@dataclass
class Captured:
    """What one batch gave.

    Attributes:
        samples: samples of the batch.
        factors: by the name of the weight, the factors of all its uses together, or of each one apart; those without a
            destination only until the next batch.
        rows: gradients of parameters that are only ever dense, (samples, rows, numel) by name.
        calls: the arguments of the calls, by number.
        modules: modules with a user's rule that were called.
    """

    samples: int
    factors: dict[str, list[Tile]] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    calls: dict[int, Call] = field(default_factory=dict)
    modules: set[str] = field(default_factory=set)


#: Where merged factors of a layer go, by the name of its weight: views of where they are held, of any dtype, or None to
#: have them allocated.
Destination = Callable[[str], Tile | None]


class Capture:
    """Derives the blocks that layer rules cover."""

    def __init__(
        self,
        function: ModelFunction,
        structure: Structure,
        names: Sequence[str],
        rows: int,
        chosen: Sequence[int] | None = None,
        *,
        shorter: bool = False,
    ) -> None:
        """Capture the layers of some parameters; the backward passes go no further than they need.

        Args:
            function: model and chosen parameters.
            structure: the model's structure.
            names: parameters to derive, all covered by the structure.
            rows: Jacobian rows per sample.
            chosen: the rows to derive; None for all.
            shorter: whether batches may have fewer positions than the samples of the structure, as texts that are cut
                at their longest do; what is missing is held as zeros.
        """
        self.shorter = shorter
        self.function = function
        self.every_row = rows
        self.chosen = range(rows) if chosen is None else chosen
        self.rows = len(self.chosen)
        self.layers = list(dict.fromkeys(structure.layers[name] for name in names))
        self.by_call: dict[int, list[tuple[Layer, Use]]] = {}
        for layer in self.layers:
            for use in layer.uses:
                self.by_call.setdefault(use.number, []).append((layer, use))
        self.modules = {layer.module: layer for layer in self.layers if layer.kind == "module"}
        self.shared = [layer.parameters[0] for layer in self.layers if layer.kind == "shared"]
        self.identities = identities(function)
        self.calls = structure.calls
        self.branches = bool(structure.branches)
        self._rooms: dict[str, Tile] = {}
        #: Pieces in which a weight is expanded and their places in it, by parameter and use: the same for every batch.
        self.places: dict[tuple[str, int], tuple[list[Piece], list[tuple[Tensor, Tensor]]]] = {}

    def run(self, batch: ModelBatch, destination: Destination = lambda name: None) -> Captured:  # noqa: ARG005
        """Derive one batch.

        Args:
            batch: samples on the plan's device.
            destination: where merged factors go.

        Returns:
            Factors and gradients.

        Raises:
            InputError: if the model takes another way than it did when its structure was found.
        """
        return _Run(self, batch, destination).go()

    def room(self, name: str, factors: LayerFactors, samples: int) -> Tile:
        """Memory for factors that are wanted only until the next batch, which uses it again."""
        known = self._rooms.get(name)
        if known is None or len(known[0]) < samples:
            parameter = self.function.parameters[name]
            kind = torch.int32 if factors.kind == "tokens" else parameter.dtype
            inputs = parameter.new_empty(samples, factors.input_items, dtype=kind)
            gradients = parameter.new_empty(samples, self.rows * factors.gradient_items)
            known = self._rooms[name] = as_tile(factors, inputs, gradients, self.rows, "gemm")
        return some_samples(known, slice(samples))

    def dense(self, captured: Captured, name: str, samples: slice, rows: slice = slice(None)) -> Tensor:
        """Gradients of one parameter for some samples and rows of a batch: (samples, rows, numel), in its own order."""
        if name in captured.rows:
            return captured.rows[name][samples, rows]
        if any(name in layer.parameters for layer in self.modules.values()):  # never called: no gradient by its rule
            return self.function.parameters[name].new_zeros(captured.samples, self.rows, self.function.sizes[name])[
                samples, rows
            ]
        layer = next(layer for layer in self.layers if name in layer.parameters)
        factors = captured.factors[layer.parameters[0]]
        if name != layer.parameters[0]:
            return sum_of([tile[1][samples, :, rows].sum(1) for tile in factors])
        found = []
        for use, each in zip(layer.uses, factors, strict=False):
            shapes = layer.factors or use.factors
            assert shapes is not None
            assert isinstance(use.rule, OuterRule)
            call = captured.calls[use.number]
            tile = some_samples(each, samples, rows)
            if use.rule.groups(call) > 1:
                inputs, gradients = tile
                shape = to_samples(call.inputs, use.input_axis, captured.samples).shape[1:]
                windows = use.rule.unfolded(call, inputs.view(-1, *shape), shapes)
                found.append(use.rule.grouped(call, windows, gradients))
            else:
                found.append(use.rule.weight_order(call, expand(shapes, tile)))
        return sum_of(found)


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape; the only one itself if there is just one."""
    total = tensors[0]
    for other in tensors[1:]:
        total = total + other
    return total


class _Run:
    """One forward pass and its backward passes."""

    def __init__(self, capture: Capture, batch: ModelBatch, destination: Destination) -> None:
        self._capture = capture
        self._function = capture.function
        self._batch = batch
        self._samples = len(batch)
        self._destination = destination
        self._row = 0
        self._anchor = torch.zeros((), requires_grad=True)
        self._calls = 0
        #: Gradient buffers (samples, positions, rows, outputs) and the rows of them that were filled.
        self._buffers: list[tuple[Tensor, set[int]]] = []
        #: The next free position of every weight, and the next row that it is looked up for beside its positions.
        self._next_position: dict[tuple[str, bool], int] = {}
        self._found = Captured(self._samples)

    def go(self) -> Captured:
        capture, function, batch = self._capture, self._function, self._batch
        replaced = {
            name: _tapped(
                _SharedTap, function.parameters[name], self._anchor, self._samples, self._receive_shared(name)
            )
            for name in capture.shared
        }
        mode = Interceptor(capture.identities, self._tap)
        with torch.enable_grad(), plain_layers(), module_hooks(function.module, self._tap_module), mode:
            logits = function.logits(replaced, batch)
        if self._calls != len(capture.by_call):
            raise other_way(f"{self._calls} of {len(capture.by_call)} layers were called")
        if mode.calls != capture.calls:
            raise other_way(f"layers are called {mode.calls} times instead of {capture.calls}")
        if capture.branches and self._samples > 1:
            self._compare_alone(logits.detach())
        function.rows.check_labels(batch.targets, logits.shape[1])
        cotangents = function.rows.batch_cotangents(logits.detach(), batch.targets)
        if cotangents.shape[1] != capture.every_row:
            raise other_way(f"it has {cotangents.shape[1]} Jacobian rows a sample instead of {capture.every_row}")
        for self._row, row in enumerate(capture.chosen):
            if logits.requires_grad:
                # A scalar, as torch imports a computer algebra system to check the shape of a given gradient (0.4 s).
                weighted = (logits * cotangents[:, row]).sum()
                last = self._row == capture.rows - 1
                torch.autograd.grad(weighted, self._anchor, retain_graph=not last, allow_unused=True)
        for buffer, filled in self._buffers:
            for row in set(range(capture.rows)) - filled:
                buffer[:, :, row] = 0
        return self._found

    def _compare_alone(self, together: Tensor) -> None:
        """Refuse a batch of a model that branches on data if its samples go another way together than alone."""
        with torch.no_grad(), plain_layers():
            alone = torch.cat([self._function.logits({}, self._batch.sample(index)) for index in range(self._samples)])
        if not alike(together, alone):
            raise other_way("it branches on its data, and these samples have other outputs together than alone")

    def _tap(self, number: int, rule: Rule, call: Call, output: Tensor) -> Tensor:
        entries = self._capture.by_call.get(number)
        if entries is None:
            return output
        used = {self._capture.identities.get(id(value)) for value in (call.weight, call.bias)}
        for layer, _ in entries:
            if not used.issuperset(layer.parameters):
                raise other_way(f"another layer is called where {layer.parameters[0]} was")
        self._calls += 1
        self._found.calls[number] = call
        receivers = [self._receiver(layer, use, rule, call, output) for layer, use in entries]

        def receive(gradient: Tensor) -> None:
            for each in receivers:
                each(gradient)

        if entries[0][1].output_axis is None:
            return _tapped(_SharedTap, output, self._anchor, self._samples, receive)
        return _tapped(_Tap, output, self._anchor, receive)

    def _receiver(self, layer: Layer, use: Use, rule: Rule, call: Call, output: Tensor) -> Receive:
        """Hold what a layer needs of its inputs; returns what takes the gradients of its output."""
        if type(rule) is not type(use.rule):
            raise other_way(f"{layer.parameters[0]} is used by another function")
        inputs = to_samples(call.inputs, use.input_axis, self._samples)
        axis = SampleAxis(0) if use.output_axis is None else use.output_axis
        positions = 0
        if isinstance(rule, OuterRule):
            found = rule.factors(call, inputs, to_samples(output.detach(), use.output_axis, self._samples))
            positions = 0 if found is None else found.positions
            if found != use.factors and not (self._capture.shorter and _is_shorter(found, use.factors, layer)):
                raise other_way(f"{layer.parameters[0]} sees {_seen(found)} instead of {_seen(use.factors)} per sample")
        if layer.kind == "outer":
            return self._outer(layer, use, call, inputs, axis, positions)
        name = layer.parameters[0]
        parameter = self._function.parameters[name]
        rows = self._rows(name)
        if layer.kind == "bias":

            def receive_bias(gradient: Tensor) -> None:
                gradient = to_samples(gradient, axis, self._samples)
                if isinstance(rule, OuterRule):
                    rows[:, self._row] += rule.bias_gradient(call, inputs, gradient)
                elif isinstance(rule, ElementRule):
                    rows[:, self._row] += rule.reduce(call, gradient, parameter)

            return receive_bias
        assert isinstance(rule, ElementRule)
        # Kept from the first row on, or taken at once where the model changes its input later.
        scaled: list[Tensor] = [rule.scaled(call, inputs)] if use.changed else []
        version = call.inputs._version

        def receive_weight(gradient: Tensor) -> None:
            if not scaled and call.inputs._version != version:
                raise other_way(f"it changes the input of {name} in place, which it did not do before")
            factor = scaled[0] if scaled else rule.scaled(call, inputs)
            if not scaled and self._capture.rows > 1:
                scaled.append(factor)
            elements = to_samples(gradient, axis, self._samples) * factor
            rows[:, self._row] += rule.reduce(call, elements, parameter)
            if self._row == self._capture.rows - 1:
                scaled.clear()

        return receive_weight

    def _outer(self, layer: Layer, use: Use, call: Call, inputs: Tensor, axis: SampleAxis, positions: int) -> Receive:
        """Copy the inputs to where they are held, and make room for the gradients; ``positions`` may be fewer."""
        name, rule, shapes = layer.parameters[0], use.rule, use.factors
        assert isinstance(rule, OuterRule)
        assert shapes is not None
        looked_up = layer.factors is not None and layer.factors.lookups > 0 and shapes.kind == "tokens"
        first = self._next_position.get((name, looked_up), 0)
        last = self._next_position[name, looked_up] = first + shapes.positions
        nowhere: Tensor | None = None
        if layer.factors is None:
            if rule.groups(call) > 1:  # unfolded some samples at a time, when gradients are expanded
                held = inputs.flatten(1).clone()
            else:
                held = rule.hold(call, inputs, shapes).clone(memory_format=torch.contiguous_format).flatten(1)
            buffer = inputs.new_empty(
                self._samples, shapes.positions, self._capture.rows, shapes.outputs, dtype=self._dtype
            )
            self._found.factors.setdefault(name, []).append((held, buffer))
        else:
            merged = self._merged(name, layer.factors)
            held_inputs, gradients = merged[2:] if looked_up else merged[:2]
            if gradients.shape[1] < last or gradients.shape[3] != shapes.outputs:
                raise other_way(f"{name} has more positions than before")
            buffer, filling = gradients[:, first : first + positions], positions < shapes.positions
            if filling:
                gradients[:, first + positions : last] = 0
            if looked_up:
                tokens = rule.hold(call, inputs, shapes)
                held_inputs[:, first:last] = 0
                held_inputs[:, first : first + positions] = split_digits(tokens.clamp(min=0))
                nowhere = (tokens < 0).unsqueeze(-1)
            elif filling:
                tokens_held = layer.factors.kind == "tokens"
                every = held_inputs if tokens_held else held_inputs.view(self._samples, -1, layer.factors.inputs)
                every[:, first + positions : last] = -1 if tokens_held else 0
                held = rule.hold(call, inputs, shapes)
                every[:, first : first + positions] = held if tokens_held else held.reshape(len(held), positions, -1)
            elif len(layer.uses) == 1:
                held = rule.hold(call, inputs, shapes)
                held_inputs.view(held.shape).copy_(held)
            elif layer.factors.kind == "tokens":
                held_inputs[:, first:last] = rule.hold(call, inputs, shapes)
            else:
                every = held_inputs.view(self._samples, layer.factors.positions, layer.factors.inputs)
                every[:, first:last] = rule.unfolded(call, inputs, shapes)
        filled: set[int] = set()
        self._buffers.append((buffer, filled))

        def receive(gradient: Tensor) -> None:
            filled.add(self._row)
            found = rule.gradient(call, inputs, to_samples(gradient, axis, self._samples))
            if nowhere is not None:  # a padding row has no gradient
                found = found.reshape(buffer[:, :, 0].shape).masked_fill(nowhere, 0)
            place = buffer[:, :, self._row]
            if len(place[0]) == shapes.positions:
                place.view(found.shape).copy_(found)
            else:
                place.copy_(found.reshape(place.shape))

        return receive

    @property
    def _dtype(self) -> torch.dtype:
        return next(iter(self._function.parameters.values())).dtype

    def _merged(self, name: str, factors: LayerFactors) -> Tile:
        """Room for the factors of all uses of a weight."""
        if name not in self._found.factors:
            given = self._destination(name)
            if given is None:
                self._found.factors[name] = [self._capture.room(name, factors, self._samples)]
            else:
                self._found.factors[name] = [given]
        return self._found.factors[name][0]

    def _rows(self, name: str) -> Tensor:
        """Room for the gradients of a parameter that is only ever dense."""
        if name not in self._found.rows:
            parameter = self._function.parameters[name]
            self._found.rows[name] = parameter.new_zeros(self._samples, self._capture.rows, parameter.numel())
        return self._found.rows[name]

    def _receive_shared(self, name: str) -> Receive:
        rows = self._rows(name)

        def receive(gradient: Tensor) -> None:
            rows[:, self._row] += gradient.reshape(self._samples, -1)

        return receive

    def _tap_module(self, name: str, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Tap a module with a user's rule."""
        layer = self._capture.modules.get(name)
        if layer is None:
            return output
        self._found.modules.add(name)
        rows = {parameter: self._rows(parameter) for parameter in layer.parameters}
        given = tuple(value.detach().clone() if isinstance(value, Tensor) else value for value in inputs)

        def receive(gradient: Tensor) -> None:
            found = user_gradients(self._function, name, given, gradient)
            for parameter, buffer in rows.items():
                short = parameter.rpartition(".")[2]
                wanted = (self._samples, *self._function.parameters[parameter].shape)
                if short not in found or tuple(found[short].shape) != wanted:
                    got = tuple(found[short].shape) if short in found else "nothing"
                    raise InputError(
                        f"{whose_rule(self._function, name)} must return the gradient of {short!r} as a tensor of "
                        f"shape {wanted}, one per sample; got {got}"
                    )
                buffer[:, self._row] += found[short].reshape(self._samples, -1).to(buffer)

        return _tapped(_Tap, output, self._anchor, receive)


def _is_shorter(found: LayerFactors | None, planned: LayerFactors | None, layer: Layer) -> bool:
    """Whether a layer sees what was planned, but for fewer positions."""
    if found is None or planned is None or layer.factors is None or planned.window is not None:
        return False
    return found.positions < planned.positions and replace(found, positions=planned.positions) == planned


def _seen(factors: LayerFactors | None) -> str:
    """What a layer sees of one sample, in words."""
    if factors is None:
        return "nothing"
    size = "" if factors.window is None else f" out of an input of {' × '.join(map(str, factors.window.size))}"
    positions = "1 position" if factors.positions == 1 else f"{factors.positions} positions"
    return f"{positions} of {factors.inputs} inputs and {factors.outputs} outputs{size}"


def other_way(what: str) -> InputError:
    """The error when a batch runs through other layers than the probe's samples did."""
    return InputError(
        f"the model runs through other layers for these samples than for the first ones ({what}), so layer rules do "
        "not hold for it; derive everything by torch.func instead: Preferences(layer_rules=False), --no-layer-rules"
    )
