"""Models that stand in for the user's own, so that other kernels run on the path of the NTK.

A kernel of features is the NTK of a model that is linear in pseudo-parameters: the gradient of ``⟨w, h(x)⟩`` for w is
the feature h(x). And the trace NTK of a model with a wide linear head is that of a model with a narrow one.
"""

from __future__ import annotations

import copy
import fnmatch
import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from ooc_ntk.errors import InputError, OocNtkError, unknown_name
from ooc_ntk.planning.layers import FEATURES

from .jacobian import ModelBatch, ModelFunction, plain_layers
from .outputs import model_logits
from .structure import SAME_OUTPUT

#: Keyword of the mask of texts, (samples, tokens), 0 at padding.
MASK: Final = "attention_mask"

#: Stands for the model's own outputs among the names of layers.
OUTPUTS: Final = "(outputs)"


@dataclass(frozen=True)
class _Place:
    """Where a feature is taken: a call of a module.

    Attributes:
        module: the module's name.
        call: its number among the calls of this module in one forward pass.
        side: ``input`` or ``output``.
        name: name of the pseudo-parameter's module.
        width: numbers per sample.
    """

    module: str
    call: int
    side: str
    name: str
    width: int


class FeatureModel(nn.Module):
    """The model ``x ↦ Σ_l ⟨w_l, a_l(x)⟩ · scale_l``: its gradients for the w_l are features a_l of another model.

    Its trace kernel is ``Σ_l scale_l² ⟨a_l(x), a_l(x')⟩``.
    """

    def __init__(self, model: nn.Module, places: Sequence[_Place], normalised: bool) -> None:
        """Take features of ``model`` at ``places``; ``normalised`` divides each kernel by its width."""
        super().__init__()
        self.model = model
        self.places = tuple(places)
        self.scales = [place.width**-0.5 if normalised else 1.0 for place in places]
        like = next(iter([*model.parameters(), *model.buffers()]), torch.zeros(()))
        dtype = like.dtype if like.is_floating_point() else torch.float32
        for place in places:
            part: nn.Module = self
            for step in (FEATURES, *place.name.split(".")):
                if step not in part._modules:
                    part.add_module(step, nn.Module())
                part = part._modules[step]  # type: ignore[assignment]
            part.register_parameter(
                "weight", nn.Parameter(torch.zeros(1, place.width, dtype=dtype, device=like.device))
            )

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the model and add up what its features give: (samples, 1)."""
        total: list[Tensor] = []
        mask = kwargs.get(MASK)

        def take(index: int, value: Tensor) -> None:
            if isinstance(mask, Tensor) and value.ndim > 2 and value.shape[:2] == mask.shape:
                value = value * mask.unsqueeze(-1).to(value)  # what layers say of padding is no feature of the text
            weight: Any = self.get_submodule(f"{FEATURES}.{self.places[index].name}").weight
            # A copy: the model may change its activations in place later.
            part = F.linear(value.flatten(1).clone(), weight) * self.scales[index]
            total[:] = [total[0] + part] if total else [part]

        by_call = {(place.module, place.call): index for index, place in enumerate(self.places)}
        with ExitStack() as hooks:
            _watch(self.model, {place.module for place in self.places}, hooks, _Taker(by_call, self.places, take))
            output = self.model(*args, **kwargs)
            if ("", 0) in by_call and self.places[by_call["", 0]].side == OUTPUTS:
                take(by_call["", 0], model_logits(output))
        if not total:
            raise InputError("the layers whose features are wanted were not called for these samples")
        return total[0]


class _Taker:
    """Takes the features of those calls that are wanted."""

    def __init__(
        self, by_call: dict[tuple[str, int], int], places: Sequence[_Place], take: Callable[[int, Tensor], None]
    ) -> None:
        self._by_call, self._places, self._take = by_call, places, take

    def __call__(self, name: str, call: int, inputs: Tensor | None, output: Tensor | None) -> None:
        index = self._by_call.get((name, call))
        if index is None or self._places[index].side == OUTPUTS:
            return
        value = inputs if self._places[index].side == "input" else output
        if value is None:
            raise InputError(f"layer {name!r} has no tensor for these samples, which it had for the first one")
        self._take(index, value)


#: Told of every call of a watched module: its name, the number of the call, its first input and output if tensors.
_Told = Callable[[str, int, Tensor | None, Tensor | None], None]


def _watch(model: nn.Module, names: set[str] | None, stack: ExitStack, told: _Told) -> None:
    """Hook modules by name (None for all) until the stack is closed."""
    calls: Counter[str] = Counter()

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            del module
            number, calls[name] = calls[name], calls[name] + 1
            told(name, number, _tensor([*args, *kwargs.values()]), _tensor(output))

        return called

    for name, part in model.named_modules():
        if names is None or name in names:
            stack.callback(part.register_forward_hook(hook(name), with_kwargs=True).remove)


def _tensor(value: Any) -> Tensor | None:
    """The first floating-point tensor of what a module was given or returned."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return next((found for item in value if (found := _tensor(item)) is not None), None)
    return None


def feature_model(model: nn.Module, batch: ModelBatch, kernel: str) -> FeatureModel:
    """The model whose trace kernel is a kernel of features of another one.

    Args:
        model: the other one, in eval mode.
        batch: one sample, on the model's device.
        kernel: ``embedding``: inner products of the last layer's features, the input of the linear layer that gives
            the outputs (the outputs themselves where none does); ``conjugate``: the same over their width, which is
            the covariance of the outputs under a random last layer (Lee et al. 2018; Fan and Wang 2020);
            ``embedding:<pattern>``: summed over the outputs of all layers whose name matches, of those with
            parameters where the pattern has wildcards (``embedding:*`` is Engel et al. 2023's).

    Returns:
        The feature model.

    Raises:
        InputError: if the pattern matches no layer that is called, or the model fails on the sample.
    """
    places = _last_features(model, batch) if ":" not in kernel else _matching(model, batch, kernel.partition(":")[2])
    return FeatureModel(model, places, normalised=kernel == "conjugate")


def _run(model: nn.Module, batch: ModelBatch, names: set[str] | None, told: _Told) -> Any:
    """One forward pass, watched."""
    try:
        with torch.no_grad(), plain_layers(), ExitStack() as stack:
            _watch(model, names, stack, told)
            return model(*batch.args, **batch.kwargs)
    except OocNtkError:
        raise
    except Exception as error:
        raise InputError(
            f"the model failed on the first sample ({type(error).__name__}: {error}); check that the data has the "
            "shape and dtype that the model takes"
        ) from error


def _last_features(model: nn.Module, batch: ModelBatch) -> list[_Place]:
    """The input of the linear layer whose output is the model's, or that output."""
    head = _head_of(model, batch)
    if head is not None:
        return [_Place(head.name, head.call, "input", head.name or "head", head.inputs.flatten(1).shape[1])]
    output = model_logits(_run(model, batch, set(), lambda *_: None))
    return [_Place("", 0, OUTPUTS, "outputs", output.shape[1])]


def _matching(model: nn.Module, batch: ModelBatch, pattern: str) -> list[_Place]:
    """The outputs of every call of the layers whose name matches."""
    wild = any(sign in pattern for sign in "*?[")
    named = dict(model.named_modules())
    names = {
        name
        for name, part in named.items()
        if name == pattern
        or (wild and fnmatch.fnmatchcase(name, pattern) and next(part.parameters(False), None) is not None)
    } - {""}
    if not names:
        raise unknown_name("layer or pattern of an embedding kernel", pattern, [name for name in named if name])
    found: list[_Place] = []

    def told(name: str, call: int, inputs: Tensor | None, output: Tensor | None) -> None:
        del inputs
        if output is not None and output.ndim and output.shape[0] == 1:
            found.append(_Place(name, call, "output", f"{name}.call{call}" if call else name, output[0].numel()))

    _run(model, batch, names, told)
    if not found:
        raise InputError(f"no layer that matches {pattern!r} is called with a tensor whose first axis counts samples")
    return found


@dataclass(frozen=True)
class _Head:
    """The linear layer whose output is the model's.

    Attributes:
        name: its name.
        call: the number of its call.
        layer: the layer.
        inputs: what it was given.
    """

    name: str
    call: int
    layer: nn.Linear
    inputs: Tensor


def _head_of(model: nn.Module, batch: ModelBatch) -> _Head | None:
    """Find the linear layer whose output is the model's."""
    linear = {name: part for name, part in model.named_modules() if type(part) is nn.Linear}
    calls: list[tuple[str, int, Tensor, Tensor]] = []

    def told(name: str, call: int, inputs: Tensor | None, output: Tensor | None) -> None:
        if inputs is not None and output is not None:
            calls.append((name, call, inputs, output))

    output = model_logits(_run(model, batch, set(linear), told))
    for name, call, inputs, given in reversed(calls):
        if given.shape[0] == output.shape[0] and torch.equal(given.reshape(output.shape[0], -1), output):
            return _Head(name, call, linear[name], inputs)
    return None


class NarrowHead(nn.Module):
    """Stands in for a linear layer with more outputs (C) than inputs (h) in a trace kernel of its raw outputs.

    With ``W = U Σ Vᵀ``, ``Σ_c`` over the C outputs of ``W ∂h`` equals the sum over the h outputs of ``Σ Vᵀ ∂h``. The
    layer's own weight and bias add ``C (⟨h_i, h_j⟩ + 1)``, here from one row of pseudo-parameters that every output
    adds ``√(C/h)`` times.
    """

    def __init__(self, layer: nn.Linear, weight: bool, bias: bool) -> None:
        """Take the layer's weight apart; ``weight`` and ``bias`` say which of its parameters are differentiated."""
        super().__init__()
        _, values, right = torch.linalg.svd(layer.weight.detach().double().cpu(), full_matrices=False)
        like = layer.weight
        self.turned: Tensor
        # In float64, whatever the layer's dtype: the function of the model casts it to what it computes in.
        self.register_buffer("turned", (values[:, None] * right).to(like.device))
        outputs, inputs = like.shape
        self.scale = math.sqrt(outputs / inputs)
        self.weight = nn.Parameter(like.new_zeros(1, inputs)) if weight else None
        self.bias = nn.Parameter(like.new_zeros(1)) if bias else None

    def forward(self, inputs: Tensor) -> Tensor:
        """(samples, h) → (samples, h)."""
        found = F.linear(inputs, self.turned)
        if self.weight is None:
            return found
        return found + F.linear(inputs, self.weight, self.bias) * self.scale


@dataclass(frozen=True)
class Narrowed:
    """A model with a narrow head in place of its own.

    Attributes:
        name: the head's name.
        module: the model; it shares everything but the head.
        outputs: outputs of the head (C).
        width: inputs of the head (h), the outputs now.
    """

    name: str
    module: nn.Module
    outputs: int
    width: int


def narrowed(function: ModelFunction, batch: ModelBatch, name: str | None = None) -> Narrowed | None:
    """Put a narrow head into a model for the trace kernel of its logits, if that is exact.

    Args:
        function: the model and its chosen parameters.
        batch: one sample, on the function's device.
        name: the head's name where it is known, as a stored plan has it; then nothing is looked for or compared.

    Returns:
        The model, or None if its outputs are not those of a linear layer with more outputs than inputs, one position,
        whose weight is used once and chosen with its bias or not at all, or if the gradients disagree.
    """
    if name is None:
        place = next(function.module.parameters())
        found = _head_of(function.module, batch.placed_as(place))
        if found is None or not _fits(function, found):
            return None
        name = found.name
    layer = function.module.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    prefix = f"{name}." if name else ""
    head = NarrowHead(layer, f"{prefix}weight" in function.names, f"{prefix}bias" in function.names).eval()
    return Narrowed(name, _with_module(function.module, name, head), layer.out_features, layer.in_features)


def _fits(function: ModelFunction, head: _Head) -> bool:
    """Whether a head may be made narrow."""
    layer, prefix = head.layer, f"{head.name}." if head.name else ""
    if head.call or head.inputs.ndim != 2 or layer.out_features <= layer.in_features:
        return False
    every = list(function.module.named_parameters(remove_duplicate=False))
    own = [f"{prefix}weight"] + ([f"{prefix}bias"] if layer.bias is not None else [])
    for mine in own:
        tensor = dict(every)[mine]
        if sum(other is tensor for _, other in every) > 1:
            return False
    chosen = [mine in function.names for mine in own]
    return all(chosen) or not any(chosen)


def agrees(function: ModelFunction, narrow: ModelFunction, made: Narrowed, batch: ModelBatch) -> bool:
    """Compare gradients of a model with those of its narrow stand-in, along one random combination of outputs.

    Args:
        function: the model and its chosen parameters.
        narrow: the same of the stand-in.
        made: the stand-in.
        batch: one sample.

    Returns:
        Whether every parameter before the head has the same gradient, and the head's own is ``u ⊗ h``.
    """
    prefix = f"{made.name}." if made.name else ""
    layer = function.module.get_submodule(made.name)
    assert isinstance(layer, nn.Linear)
    left, _, _ = torch.linalg.svd(layer.weight.detach().double().cpu(), full_matrices=False)
    generator = torch.Generator().manual_seed(0)
    turned = torch.randn(made.width, generator=generator, dtype=torch.float64)
    pairs = []
    for each, cotangent in ((function, left @ turned), (narrow, turned)):
        leaves = {name: each.parameters[name].detach().requires_grad_() for name in each.names}
        with torch.enable_grad(), plain_layers():
            logits = each.logits(leaves, batch)[0]
            total = (logits * cotangent.to(logits)).sum()
        gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
        pairs.append(dict(zip(each.names, gradients, strict=True)))
    theirs, mine = pairs
    for name in function.names:
        wanted, found = theirs[name], mine[name]
        if name == f"{prefix}weight":
            # The pseudo-parameter's gradient is √(C/h)·Σ(turned)·h.
            factor = float(turned.sum()) * math.sqrt(made.outputs / made.width)
            found = torch.outer((left @ turned).to(wanted), found[0] / factor)
        elif name == f"{prefix}bias":
            found = (left @ turned).to(wanted)
        scale = float(wanted.abs().max())
        if not torch.allclose(found, wanted, rtol=SAME_OUTPUT, atol=SAME_OUTPUT * scale + 1e-12):
            return False
    return True


def _with_module(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """A model that shares everything with another but one part."""
    if not name:
        return new
    first, _, rest = name.partition(".")
    copied = copy.copy(model)
    copied.__dict__ = model.__dict__.copy()
    for kind in ("_modules", "_parameters", "_buffers"):
        copied.__dict__[kind] = model.__dict__[kind].copy()
    copied._modules[first] = _with_module(model.get_submodule(first), rest, new)
    return copied
