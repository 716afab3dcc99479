"""A model is checked, not trusted: what layer rules say of it is compared with autograd on a few samples."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from ooc_ntk.errors import InputError
from ooc_ntk.planning.workload import ParameterBlock

from .capture import Capture, Captured
from .finite import all_finite
from .held import join_digits
from .jacobian import LoopJacobian, ModelBatch, ModelFunction
from .structure import Structure, count_matches, repeated

logger = logging.getLogger(__name__)

#: Relative difference to autograd that rounding may explain: a wrong rule is off by percents (measured: a missing cross
#: term of a tied embedding by 2.6%), a right one by 1e-6, or 1e-4 where a ReLU flips.
ALLOWED: Final = {torch.float32: 1e-3, torch.float64: 1e-8}

#: Roundings of the whole gradient that the gradient of one parameter may be off by (guessed: sums of many terms).
ROUNDING: Final = 100

#: Squared norms that float32 holds with room for what each of 1e9 entries adds; others are summed in float64.
QUICK_RANGE: Final = (1e-20, 1e30)

#: Samples and Jacobian rows that are compared (a choice: each pair costs a backward pass).
CHECKED_SAMPLES: Final = 2
CHECKED_ROWS: Final = 3


def checked_structure(function: ModelFunction, structure: Structure, batch: ModelBatch, rows: int) -> Structure:
    """Compare every layer with autograd and leave those that disagree to ``torch.func``.

    Args:
        function: model and chosen parameters.
        structure: what rules are thought to cover.
        batch: a few samples, on the device.
        rows: Jacobian rows per sample.

    Returns:
        The structure without the layers that disagree, each with the reason.

    Raises:
        InputError: if a user's rule disagrees, with both numbers.
    """
    batch = repeated(batch, min(CHECKED_SAMPLES, len(batch)))
    chosen = sorted({0, rows - 1, rows // 2})[:CHECKED_ROWS]
    structure, capture, captured = _captured(function, structure, batch, rows, chosen)
    if captured is None:
        return structure
    differing = _disagreements(capture, captured, batch, list(structure.layers), chosen)
    dtype = next(iter(function.parameters.values())).dtype
    if differing and dtype == torch.float32:
        again = _double_disagreements(function, structure, batch, rows, chosen)
        if again is not None:
            dtype, differing = torch.float64, {name: again[name] for name in differing if name in again}
    reasons: dict[str, str] = {}
    for name, (differs, wanted, got) in differing.items():
        layer = structure.layers[name]
        relative = math.sqrt(differs / wanted) if wanted else math.sqrt(differs)
        mine, autograds = math.sqrt(got), math.sqrt(wanted)
        if layer.kind == "module" and layer.module in captured.modules:
            kind = type(function.module.get_submodule(layer.module)).__name__
            raise InputError(
                f"the layer rule of {layer.module or 'the model'!r} ({kind}) disagrees with autograd: its gradients of "
                f"{name!r} have norm {mine:.6g}, autograd's {autograds:.6g}, relative difference {relative:.2g} "
                f"(allowed {ALLOWED[dtype]:g}); mend the rule or take it back with forget_layer_rule({kind})"
            )
        bypassed = "; something else uses it as well" if mine else "; its layer is bypassed"
        reasons[name] = (
            f"its layer rule disagrees with autograd (gradient norm {mine:.3g} instead of {autograds:.3g}){bypassed}"
        )
        logger.info("%s: %s", name, reasons[name])
    return structure.without(reasons)


def _disagreements(
    capture: Capture, captured: Captured, batch: ModelBatch, names: Sequence[str], chosen: Sequence[int]
) -> dict[str, tuple[float, float, float]]:
    """Parameters whose gradients by rules are not autograd's.

    Returns:
        The squared difference, and the squared norms of autograd's gradient and of the rule's.
    """
    function = capture.function
    differs, wanted, got = (dict.fromkeys(names, 0.0) for _ in range(3))
    for index, gradients in enumerate(LoopJacobian(function).some_rows(batch, names, chosen)):
        sample, row = divmod(index, len(chosen))
        for name, gradient in zip(names, gradients, strict=True):
            # One row at a time: a gradient of a large layer may take much of the memory.
            one = capture.dense(captured, name, slice(sample, sample + 1), slice(row, row + 1))
            found = one.reshape(gradient.shape)
            differs[name] += _difference(found, gradient)
            wanted[name] += _square(gradient)
            got[name] += _square(found)
    dtype = next(iter(function.parameters.values())).dtype
    # What is zero but for rounding (the bias of attention's keys) agrees as far as the whole gradient has digits.
    noise = (ROUNDING * torch.finfo(dtype).eps) ** 2 * sum(wanted.values())
    allowed = ALLOWED[dtype] ** 2
    return {
        name: (differs[name], wanted[name], got[name])
        for name in names
        if not differs[name] <= allowed * wanted[name] + noise
    }


def _double_disagreements(
    function: ModelFunction, structure: Structure, batch: ModelBatch, rows: int, chosen: Sequence[int]
) -> dict[str, tuple[float, float, float]] | None:
    """The same in float64, where no rounding turns a ReLU over.

    One sample and a batch of them are rounded differently by convolutions (measured: on a processor without AVX-512 a
    ResNet-18 with random weights differs by more than :data:`ALLOWED` in ten of its layers).

    Returns:
        None if the model does not run in float64.
    """
    device = str(next(iter(function.parameters.values())).device)
    names = list(structure.layers)
    try:
        double = ModelFunction(function.module, function.names, function.rows, "float64", device)
        there = batch.to(device, "float64")
        capture = Capture(double, structure, names, rows, chosen)
        return _disagreements(capture, capture.run(there), there, names, chosen)
    except Exception as error:  # noqa: BLE001 - models fail in any way
        logger.info("layer rules are not compared in float64: %s", error)
        return None


def _square(value: Tensor) -> float:
    quick = _quick_square(value)
    if quick is not None:
        return quick
    found = float(value.double().square().sum())
    return found if math.isfinite(found) else 0.0


def _quick_square(value: Tensor) -> float | None:
    """Squared norm by one product in the value's own precision; None where that has not the range for it."""
    flat = value.reshape(-1)
    found = float(torch.dot(flat, flat))
    return found if QUICK_RANGE[0] < found < QUICK_RANGE[1] else None


def _difference(found: Tensor, wanted: Tensor) -> float:
    """Squared difference; what is not finite where autograd's is differs without bound."""
    difference = found - wanted
    quick = _quick_square(difference)
    if quick is not None:
        return quick  # it would not be finite if anything in it were not
    if not all_finite(difference) and all_finite(wanted):
        return math.inf
    return _square(difference)


def _captured(
    function: ModelFunction, structure: Structure, batch: ModelBatch, rows: int, chosen: Sequence[int]
) -> tuple[Structure, Capture, Captured | None]:
    """Capture some rows, leaving out what cannot be captured at all: first the guesses, then layer by layer.

    Returns:
        The structure that is left, what captures it, and what it captured; None if nothing is left.

    Raises:
        InputError: if a user's rule fails.
    """

    def attempt(names: Sequence[str]) -> Captured | str:
        if not names:
            return Captured(len(batch))
        return _attempt(Capture(function, structure, names, rows, chosen), structure, names, batch)

    def finish(reasons: Mapping[str, str]) -> tuple[Structure, Captured | str]:
        reduced = structure.without(reasons)
        return reduced, attempt(list(reduced.layers))

    found = attempt(list(structure.layers))
    if isinstance(found, str):
        failure, whole = found, structure
        guessed = {name: failure for name, layer in whole.layers.items() if layer.kind == "shared"}
        structure, found = finish(guessed)
        if isinstance(found, str):
            structure = whole
            reasons: dict[str, str] = {}
            for layer in dict.fromkeys(whole.layers.values()):
                alone = attempt(layer.parameters)
                if isinstance(alone, str):
                    reasons.update(dict.fromkeys(layer.parameters, alone))
            structure, found = finish(reasons)
        if isinstance(found, str):
            structure = structure.without(dict.fromkeys(structure.layers, found))
    capture = Capture(function, structure, list(structure.layers), rows, chosen)
    return structure, capture, found if structure.layers and isinstance(found, Captured) else None


def _attempt(capture: Capture, structure: Structure, names: Sequence[str], batch: ModelBatch) -> Captured | str:
    """What was captured of some layers, or why it could not be.

    Raises:
        InputError: if a user's rule fails.
    """
    try:
        return capture.run(batch)
    except InputError as error:
        if any(structure.layers[name].kind == "module" for name in names):
            raise
        return f"its inputs and gradients cannot be captured ({error})"
    except Exception as error:  # noqa: BLE001 - models fail in any way
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        return f"its inputs and gradients cannot be captured ({type(error).__name__}: {first[:120]})"


def with_matches(
    blocks: Sequence[ParameterBlock],
    function: ModelFunction,
    structure: Structure,
    batches: Iterable[ModelBatch],
    rows: int,
) -> tuple[ParameterBlock, ...]:
    """Count how often the tokens of two samples match, which prices the contraction of embeddings.

    Args:
        blocks: the blocks.
        function: model and chosen parameters.
        structure: the checked structure.
        batches: some samples, on the device, in batches that fit it; only run if there are embeddings.
        rows: Jacobian rows per sample.

    Returns:
        The blocks, those of embeddings with their matches.
    """
    tables = {
        block.parameters[0]: block.factors for block in blocks if block.factors is not None and block.factors.embedding
    }
    if not tables:
        return tuple(blocks)
    tokens: dict[str, list[Tensor]] = {name: [] for name in tables}
    capture = Capture(function, structure, list(tables), rows, [0])
    for batch in batches:
        captured = capture.run(batch)
        for name, factors in tables.items():
            (tile,) = captured.factors[name]
            if factors.lookups:
                nowhere = ~tile[3].flatten(2).any(2)  # padding, which is held as row 0 without a gradient
                tokens[name].append(join_digits(tile[2]).masked_fill(nowhere, -1))
            else:
                tokens[name].append(tile[0].clone())
    matches = {name: count_matches(torch.cat(found)) for name, found in tokens.items()}
    return tuple(
        replace(block, factors=replace(block.factors, matches=matches[block.parameters[0]]))
        if block.factors is not None and block.parameters[0] in tables
        else block
        for block in blocks
    )
