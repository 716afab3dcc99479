"""A model before anything is derived: is it usable, which parameters are meant, what identifies it."""

from __future__ import annotations

import fnmatch
import hashlib
import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from typing import Final

import torch
from torch import Tensor, nn

from ooc_ntk.errors import InputError, NonFiniteError, unknown_name
from ooc_ntk.planning.workload import ParameterBlock

from .finite import all_finite
from .structure import Layer, Structure

#: Autograd nodes whose derivative jumps, so that rounding can flip them (by class name, lower case).
_KINKS: Final = ("relu", "threshold", "hardtanh", "hardswish", "hardsigmoid", "hardshrink", "softshrink")
_KINK_NODES: Final = (
    *("maxpool", "adaptivemax", "fractionalmax", "abs", "clamp", "max", "min", "amax", "amin", "aminmax", "cummax"),
    *("cummin", "sort", "topk", "median", "nanmedian", "kthvalue", "mode", "round"),
)

_BATCH_NORMS = nn.modules.batchnorm._NormBase


def check_mode(module: nn.Module) -> None:
    """Refuse a model whose outputs for one sample depend on the others or on chance.

    Args:
        module: the model.

    Raises:
        InputError: if a batch norm or dropout is in training mode, or a batch norm keeps no running statistics.
    """
    for name, part in module.named_modules():
        label = f"{name or 'the model'} ({type(part).__name__})"
        if (
            isinstance(part, _BATCH_NORMS)
            and part.training
            and not isinstance(part, nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d)
        ):
            raise InputError(
                f"{label} is in training mode, so samples of a batch would depend on each other; "
                "call model.eval() before making the job"
            )
        if isinstance(part, _BATCH_NORMS) and part.running_mean is None and "Batch" in type(part).__name__:
            raise InputError(
                f"{label} keeps no running statistics, so samples of a batch depend on each other even in eval mode; "
                "use track_running_stats=True or another norm"
            )
        rate = (
            getattr(part, "p", None)
            if isinstance(part, nn.modules.dropout._DropoutNd)
            else getattr(part, "dropout", None)
        )
        if part.training and isinstance(rate, int | float) and rate > 0:
            raise InputError(
                f"{label} drops at random in training mode (p = {rate}), so no two runs would agree; "
                "call model.eval() before making the job"
            )


def choose_parameters(module: nn.Module, patterns: Sequence[str] | None) -> tuple[str, ...]:
    """Names of the parameters to differentiate, in the model's ``named_parameters()`` order.

    Args:
        module: the model.
        patterns: shell patterns on full names; ``!pattern`` takes away. None means every parameter. Frozen ones
            (``requires_grad=False``) never count.

    Returns:
        At least one name.

    Raises:
        InputError: if nothing is left, a pattern matches nothing, or a chosen parameter is no real floating-point one.
    """
    every = dict(module.named_parameters())
    wanted, unwanted = [p for p in patterns or () if not p.startswith("!")], []
    unwanted = [p[1:] for p in patterns or () if p.startswith("!")]
    for pattern in (*wanted, *unwanted):
        if not any(fnmatch.fnmatchcase(name, pattern) for name in every):
            raise unknown_name("parameter or pattern", pattern, every)
    named = [
        name
        for name in every
        if (not wanted or any(fnmatch.fnmatchcase(name, p) for p in wanted))
        and not any(fnmatch.fnmatchcase(name, p) for p in unwanted)
    ]
    for name in named:
        if not every[name].is_floating_point():
            raise InputError(
                f"parameter {name!r} is {every[name].dtype}; an NTK needs real floating-point parameters; "
                f"leave it out with parameters='!{name}'"
            )
    chosen = tuple(name for name in named if every[name].requires_grad and every[name].numel())
    if not chosen:
        what = f"the patterns {', '.join(patterns)}" if patterns else "the model"
        frozen = sum(not every[name].requires_grad for name in named)
        reason = f"all {frozen} of them are frozen (requires_grad=False)" if frozen else "there are none"
        raise InputError(f"no parameters are left to differentiate in {what}: {reason}")
    return chosen


def parameter_blocks(
    module: nn.Module, names: Sequence[str], structure: Structure | None = None
) -> tuple[ParameterBlock, ...]:
    """Group neighbouring parameters of one layer into blocks that can be held and contracted alike.

    A weight (with its bias) that has factors is a block of its own, and so are parameters that no rule covers.

    Args:
        module: the model.
        names: chosen parameter names, in order.
        structure: what layer rules cover; None for nothing.

    Returns:
        Blocks with their column ranges, in order; named after the layer, or after their first parameter where a layer
        has several.
    """
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
    layers: Mapping[str, Layer] = {} if structure is None else structure.layers
    reasons: Mapping[str, str] = {} if structure is None else structure.reasons

    def kind(name: str) -> tuple[str, str]:
        layer = layers.get(name)
        if layer is None:
            return name.rpartition(".")[0], f"torch.func {reasons.get(name, '')}"
        return name.rpartition(".")[0], f"factors {layer.parameters[0]}" if layer.factors is not None else "rule"

    groups = [(layer, tuple(group)) for (layer, _), group in groupby(names, key=kind)]
    counts = Counter(layer for layer, _ in groups)
    blocks: list[ParameterBlock] = []
    start = 0
    for layer, members in groups:
        stop = start + sum(sizes[name] for name in members)
        found = layers.get(members[0])
        blocks.append(
            ParameterBlock(
                name=layer if counts[layer] == 1 else members[0],
                parameters=members,
                start=start,
                stop=stop,
                source="torch.func" if found is None else "rule",
                reason=reasons.get(members[0], "") if found is None else "",
                factors=None if found is None else found.factors,
            )
        )
        start = stop
    return tuple(blocks)


def check_finite_state(module: nn.Module) -> None:
    """Refuse weights or buffers that hold NaN or infinity.

    Raises:
        NonFiniteError: naming the first such tensor.
    """
    for name, tensor in _state(module):
        if not all_finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            raise NonFiniteError(
                f"weight {name!r} holds {bad} NaN or infinite value{'s' if bad != 1 else ''} of {tensor.numel()}; "
                "load weights from a checkpoint that did not diverge"
            )


def model_digest(module: nn.Module) -> str:
    """Digest of what a model computes: structure, the source of classes that are not torch's, parameters and buffers.

    Args:
        module: the model.

    Returns:
        32 hex digits, the same on every device.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr(module).encode())
    for kind in sorted({type(part) for part in module.modules()}, key=lambda kind: kind.__qualname__):
        if not kind.__module__.startswith("torch."):
            with suppress(OSError, TypeError):
                digest.update(inspect.getsource(kind).encode())
    for name, tensor in _state(module):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        for start in range(0, flat.numel(), 2**24):
            digest.update(flat[start : start + 2**24].view(torch.uint8).numpy().data)
    trainable = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    digest.update("\n".join(trainable).encode())
    return digest.hexdigest()


def _state(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Every parameter and buffer, those that are not saved included, sorted by name."""
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return sorted(named, key=lambda entry: entry[0])


def is_smooth(output: Tensor) -> bool:
    """Whether no recorded operation behind ``output`` has a derivative that jumps.

    Args:
        output: a tensor with an autograd graph.

    Returns:
        False if a ReLU, a maximum, an absolute value or the like is found.
    """
    seen, stack = set(), [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        kind = type(node).__name__.lower().removesuffix("0").removesuffix("backward")
        if any(kink in kind for kink in _KINKS) or any(kind.startswith(kink) for kink in _KINK_NODES):
            return False
        stack.extend(parent for parent, _ in node.next_functions)
    return True
