"""Kernels of features on the path of the NTK.

They are the NTK of a model that is linear in pseudo-parameters: the gradient of ``⟨w, h(x)⟩`` for w is the feature
h(x).
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from ooc_ntk.errors import InputError, OocNtkError, unknown_name
from ooc_ntk.planning.layers import FEATURES

from .jacobian import ModelBatch, plain_layers
from .lastlayer import POINTWISE, Told, failed, last_layers, watch
from .outputs import model_logits

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
        normaliser: what a conjugate kernel is divided by; 0 for the width.
    """

    module: str
    call: int
    side: str
    name: str
    width: int
    normaliser: int = 0


class FeatureModel(nn.Module):
    """The model ``x ↦ Σ_l ⟨w_l, a_l(x)⟩ · scale_l``: its gradients for the w_l are features a_l of another model.

    Its trace kernel is ``Σ_l scale_l² ⟨a_l(x), a_l(x')⟩``.
    """

    def __init__(self, model: nn.Module, places: Sequence[_Place], normalised: bool) -> None:
        """Take features of ``model`` at ``places``; ``normalised`` divides each kernel by its width."""
        super().__init__()
        self.model = model
        self.places = tuple(places)
        self.scales = [(place.normaliser or place.width) ** -0.5 if normalised else 1.0 for place in places]
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

    def describe(self) -> str:
        """Whose features they are, in words."""
        shown = [
            f"the {place.side} of {place.module or 'the model'!r}" if place.side != OUTPUTS else "the model's outputs"
            for place in self.places
        ]
        more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
        return f"{', '.join(shown[:3])}{more}, {sum(place.width for place in self.places):,} numbers a sample"

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
            watch(self.model, {place.module for place in self.places}, hooks, _Taker(by_call, self.places, take))
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


def feature_model(model: nn.Module, batch: ModelBatch, kernel: str) -> FeatureModel:
    """The model whose trace kernel is a kernel of features of another one.

    Args:
        model: the other one, in eval mode.
        batch: one sample, on the model's device.
        kernel: ``embedding``: inner products of the last layer's features, the input of the linear layer or convolution
            that the outputs come from number by number (the outputs themselves where there is none, as of a pooled
            encoder; of texts, summed over real tokens); ``conjugate``: the same over their width, which is
            the covariance of the outputs under a random last layer (Lee et al. 2018; Fan and Wang 2020);
            ``embedding:<pattern>``: summed over the outputs of all layers whose name matches, of those with
            parameters where the pattern has wildcards (``embedding:*`` is Engel et al. 2023's).

    Returns:
        The feature model.

    Raises:
        InputError: if the pattern matches no layer that is called, there is no one last layer, or the model fails on
            the sample.
    """
    places = _last_features(model, batch) if ":" not in kernel else _matching(model, batch, kernel.partition(":")[2])
    return FeatureModel(model, places, normalised=kernel == "conjugate")


def _last_features(model: nn.Module, batch: ModelBatch) -> list[_Place]:
    """The input of the layer that the outputs come from, or the outputs where none does."""
    found, other = last_layers(model, batch, POINTWISE)
    parents = {head.name.rpartition(".")[0] for head in found}
    if not found:
        return [_Place("", 0, OUTPUTS, "outputs", model_logits(_run(model, batch)).shape[1])]
    if other or (len(found) > 1 and len(parents) > 1):
        names = ", ".join(sorted(repr(head.name) for head in found))
        raise InputError(
            f"the outputs come from more than one layer ({names}{' and others' if other else ''}), so that there is no "
            "last one; name the layers whose outputs are wanted, as kernel='embedding:<layer>'"
        )
    # Of several side by side, as an adapter beside its layer, the one that reads most.
    head = max(found, key=lambda each: each.inputs.numel())
    width = head.inputs.shape[-1 if isinstance(head.layer, nn.Linear) else 1]
    return [_Place(head.name, head.call, "input", head.name or "head", head.inputs.numel(), width)]


def _run(model: nn.Module, batch: ModelBatch, names: set[str] = frozenset(), told: Told = lambda *_: None) -> Any:  # type: ignore[assignment]
    """One forward pass, watched."""
    try:
        with torch.no_grad(), plain_layers(), ExitStack() as stack:
            watch(model, names, stack, told)
            return model(*batch.args, **batch.kwargs)
    except OocNtkError:
        raise
    except Exception as error:
        raise failed(error) from error


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
