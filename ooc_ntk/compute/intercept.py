"""Seeing every call of a layer's function in a forward pass, whichever module or code makes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .rules.base import Call, Rule
from .rules.recurrent import STEPS, recurrent_weights, write_out
from .rules.table import RULES, module_rule

#: Told of every call: its number within the forward pass, its rule, its arguments and its output; what it returns
#: takes the output's place.
OnCall = Callable[[int, Rule, Call, Tensor], Tensor]

#: Told of every call of a module with a user's rule: its name, its inputs and its output.
OnModule = Callable[[str, tuple[Tensor, ...], Tensor], Tensor]

#: What asks for a value of a tensor, so that the way through the model may depend on data.
_BRANCHING: Final = frozenset(
    {
        Tensor.__bool__,
        Tensor.__int__,
        Tensor.__float__,
        Tensor.__index__,
        Tensor.item,
        Tensor.tolist,
        Tensor.nonzero,
        torch.nonzero,
        torch.equal,
        torch.allclose,
        Tensor.unique,
        torch.unique,
    }
)


#: Functions of a tensor through which no gradient flows back to it.
_HARMLESS: Final = frozenset(
    {"size", "dim", "numel", "nelement", "ndimension", "stride", "storage_offset", "is_contiguous", "is_floating_point"}
    | {"is_complex", "element_size", "get_device", "data_ptr", "type", "detach", "untyped_storage", "requires_grad_"}
)


#: Attributes of a tensor through which no gradient flows back to it.
_WITHOUT_GRADIENT: Final = frozenset(getattr(attribute, "__get__") for attribute in (Tensor.data, Tensor.grad))  # noqa: B009


def _in_words(function: Any) -> str:
    """A function, or the attribute that a getter reads."""
    called = getattr(function, "__name__", str(function))
    if called == "__get__":
        return f".{getattr(function.__self__, '__name__', 'an attribute')}"
    return "[...]" if called == "__getitem__" else f"{called}()"


def _tensors(values: Iterable[Any]) -> Iterator[Any]:
    """Arguments, those inside lists and tuples one by one."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from value
        else:
            yield value


class Interceptor(TorchFunctionMode):
    """A mode that finds calls with chosen parameters by the identity of their tensors.

    Module hooks would miss what modules do not do themselves: ``nn.MultiheadAttention`` hands its projections'
    weights to a function, and so does much code of users'. Recurrent layers are written out in linear ones.

    Attributes:
        calls: calls seen so far.
        branches: what the model asked tensors for while it ran, in order.
        elsewhere: names of parameters that went to functions without a rule, with what was done with them, in words.
    """

    def __init__(self, names: Mapping[int, str], on_call: OnCall, *, detached: bool = False) -> None:
        """Watch the tensors whose ``id`` is in ``names``.

        Args:
            names: chosen parameters by the identity of their tensor.
            on_call: told of every call.
            detached: whether calls that rules stand for take weight and bias without their gradient, so that whatever
                still leads to a parameter is another use of it.
        """
        super().__init__()
        self.calls = 0
        self.branches: list[object] = []
        self.elsewhere: dict[str, str] = {}
        self._names = names
        self._on_call = on_call
        self._detached = detached

    def name(self, value: object) -> str | None:
        """Name of a chosen parameter, None for anything else."""
        return self._names.get(id(value))

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        rule = RULES.get(function)
        if rule is not None:
            return self._ruled(rule, function, args, kwargs)
        if function in STEPS and not kwargs:
            weights = recurrent_weights(args)
            if weights is not None and any(self.name(weight) for weight in weights):
                with self:
                    return write_out(function, args)
        if function is F.multi_head_attention_forward:
            with self, _inside_functional():
                return function(*args, **kwargs)
        result = function(*args, **kwargs)
        if function in _BRANCHING:
            self.branches.append(result if isinstance(result, bool | int | float) else str(type(result)))
        called = getattr(function, "__name__", str(function))
        if called.startswith("__"):
            # Getters and operators: ``.T`` and ``[...]`` hand the weight on, ``.shape`` and ``.data`` do not.
            harmless = function in _WITHOUT_GRADIENT or not any(
                isinstance(found, Tensor) and found.is_floating_point() for found in _tensors((result,))
            )
        else:
            harmless = called in _HARMLESS
        if not harmless:
            for value in _tensors((*args, *kwargs.values())):
                name = self.name(value)
                if name is not None:
                    self.elsewhere.setdefault(name, _in_words(function))
        return result

    def _ruled(self, rule: Rule, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        arguments = rule.bind(args, kwargs)
        weight, bias = arguments.get("weight"), arguments.get("bias")
        known_weight, known_bias = self.name(weight) is not None, self.name(bias) is not None
        for role, value in arguments.items():
            name = None if role in ("weight", "bias") else self.name(value)
            if name is not None:
                self.elsewhere.setdefault(name, f"{function.__name__}() with it as the {role}")
        if self._detached:
            own = {id(value) for value, known in ((weight, known_weight), (bias, known_bias)) if known}
            args = tuple(value.detach() if id(value) in own else value for value in args)
            kwargs = {name: value.detach() if id(value) in own else value for name, value in kwargs.items()}
        output = function(*args, **kwargs)
        if not (known_weight or known_bias):
            return output
        if torch._C._functorch.is_functorch_wrapped_tensor(output):
            for value in (weight, bias):
                if self.name(value) is not None:
                    self.elsewhere.setdefault(str(self.name(value)), f"{function.__name__}() under torch.func")
            return output
        # Detached: a call that held on to the graph, which holds on to what is told of it, would outlive its batch.
        arguments = {
            name: value.detach() if isinstance(value, Tensor) and name not in ("weight", "bias") else value
            for name, value in arguments.items()
        }
        call = Call(arguments["input"], weight if known_weight else None, bias if known_bias else None, arguments)
        number, self.calls = self.calls, self.calls + 1
        return self._on_call(number, rule, call, output)


@contextmanager
def _inside_functional() -> Iterator[None]:
    """Let a Python function of ``torch.nn.functional`` run its own body under a mode.

    It would hand itself over to the mode again, for ever; what it calls is still seen. Where attention's queries and
    keys are different tensors it would cut the packed weight of its projections; see :func:`_projected_whole`.
    """
    functional: Any = F
    before, projection = functional.has_torch_function, functional._in_projection_packed
    functional.has_torch_function = lambda *_: False
    functional._in_projection_packed = _projected_whole
    try:
        yield
    finally:
        functional.has_torch_function, functional._in_projection_packed = before, projection


def _projected_whole(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The packed projections of attention as linear layers of the whole weight, of whose outputs a part is used.

    So the weight is used as it is, once per different input: gradients of the unused outputs are zero.

    Args:
        query: (..., width), as key and value are, each with leading axes of its own.
        key: likewise.
        value: likewise.
        weight: (3 · width, width), the projections of query, key and value one after the other.
        bias: (3 · width,) or None.

    Returns:
        The projections of query, key and value, each of the shape of its input.
    """
    width = query.shape[-1]
    known: dict[int, Tensor] = {}
    for each in (query, key, value):
        if id(each) not in known:
            known[id(each)] = F.linear(each, weight, bias)
    every = (known[id(each)] for each in (query, key, value))
    return tuple(part[..., place * width : (place + 1) * width].contiguous() for place, part in enumerate(every))


@contextmanager
def module_hooks(module: nn.Module, on_module: OnModule) -> Iterator[None]:
    """Call ``on_module`` after every module that has a user's rule."""

    def hook_of(name: str) -> Callable[..., Tensor]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return on_module(name, inputs, output)

        return hook

    handles = [part.register_forward_hook(hook_of(name)) for name, part in module.named_modules() if module_rule(part)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
