"""The peer nngeometry (George, 2021): Gram matrices and Jacobians by hooks, for a fixed list of layers.

It offers two ways to a trace kernel, and each is taken where it does less work. ``GramMatrix`` contracts inputs and
gradients of linear layers without their Jacobian; asked for one output at a time it makes 2 forward and 2 backward
passes per output, where asking for all outputs at once makes C + 1 and C² + C and computes blocks that the trace drops.
For any other layer ``GramMatrix`` derives the same Jacobian twice, so ``Jacobian`` and a product of its own are less.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bench.inputs import Inputs, call, count_outputs, count_parameters, count_samples

from .result import MEMORY_BYTES, Refused, Result, require

if TYPE_CHECKING:
    from nngeometry.layercollection import LayerCollection

#: Share of the memory that the Jacobian gets: one layer's gradients of a batch are made beside it (guessed).
JACOBIAN_SHARE = 0.75

#: Samples per batch of the Jacobian, which bounds what one layer's gradients take (guessed).
BATCH_SAMPLES = 64


def nngeometry_kernel(model: nn.Module, inputs: Inputs, memory_bytes: int = MEMORY_BYTES) -> Result:
    """The trace kernel by nngeometry's faster way.

    Args:
        model: in eval mode.
        inputs: (samples, ...).
        memory_bytes: what it may take.

    Returns:
        The kernel and its times; a Gram matrix does not tell derivation and products apart.

    Raises:
        Refused: if it does not know a layer, or one layer's Jacobian does not fit.
    """
    require("nngeometry", "nngeometry")
    from nngeometry.layercollection import LayerCollection

    try:
        layers = LayerCollection.from_model(model)
    except Exception as error:  # nngeometry raises nothing narrower
        raise Refused(f"refuses: {error}") from error
    if layers.numel() != count_parameters(model):
        raise Refused(f"covers {layers.numel():,} of {count_parameters(model):,} parameters")
    if all(isinstance(model.get_submodule(name), nn.Linear) for name in layers.layers):
        return _by_gram_matrices(model, inputs, layers)
    return _by_jacobian(model, inputs, layers, memory_bytes)


def _by_gram_matrices(model: nn.Module, inputs: Inputs, layers: LayerCollection) -> Result:
    """One Gram matrix per output."""
    from nngeometry.gram import GramMatrix

    start = time.perf_counter()
    samples = count_samples(inputs)
    kernel = torch.zeros(samples, samples)
    for output in range(count_outputs(model, inputs)):
        function = _outputs(model, inputs, range(output, output + 1))
        found = GramMatrix(model, _loader(inputs, samples), function=function, layer_collection=layers).to_torch()
        kernel += found[0, :, 0, :].detach()
    return Result(
        kernel.numpy(), derive_seconds=time.perf_counter() - start, remark="a Gram matrix per output, timed as a whole"
    )


def _by_jacobian(model: nn.Module, inputs: Inputs, layers: LayerCollection, memory_bytes: int) -> Result:
    """The Jacobian of as many outputs at once as fit, or of groups of layers of one output, and its product."""
    from nngeometry.jacobian import Jacobian

    samples, outputs, parameters = count_samples(inputs), count_outputs(model, inputs), count_parameters(model)
    most_columns = int(JACOBIAN_SHARE * memory_bytes) // (4 * samples)
    together = max(1, min(outputs, most_columns // parameters))
    groups = list(_layer_groups(model, layers, most_columns)) if parameters > most_columns else [layers]
    derive_seconds, contract_seconds, chunks = 0.0, 0.0, 0
    kernel = torch.zeros(samples, samples)
    for first in range(0, outputs, together):
        for group in groups:
            start = time.perf_counter()
            function = _outputs(model, inputs, range(first, min(first + together, outputs)))
            loader = _loader(inputs, BATCH_SAMPLES)
            jacobian = Jacobian(model, loader, function=function, layer_collection=group).to_torch().detach()
            derived = time.perf_counter()
            for rows in jacobian:
                kernel += rows @ rows.T
            del jacobian, rows
            done = time.perf_counter()
            derive_seconds, contract_seconds = derive_seconds + derived - start, contract_seconds + done - derived
            chunks += 1
    return Result(
        kernel.numpy(),
        derive_seconds=derive_seconds,
        contract_seconds=contract_seconds,
        remark=f"Jacobian in {chunks} chunk{'s' if chunks > 1 else ''}",
    )


def _layer_groups(model: nn.Module, layers: LayerCollection, most_columns: int) -> Iterator[LayerCollection]:
    """Layer collections of at most so many parameters each, layers in order."""
    from nngeometry.layercollection import LayerCollection

    group = LayerCollection()
    for name, layer in layers.layers.items():
        if layer.numel() > most_columns:
            raise Refused(f"holds a layer's Jacobian whole; that of {name}, {layer.numel():,} columns, does not fit")
        if group.numel() and group.numel() + layer.numel() > most_columns:
            yield group
            group = LayerCollection()
        group.add_layer_from_model(model, model.get_submodule(name))
    yield group


def _loader(inputs: Inputs, batch: int) -> DataLoader[tuple[Tensor, ...]]:
    tensors = inputs.values() if isinstance(inputs, dict) else [inputs]
    return DataLoader(TensorDataset(*tensors), batch_size=batch)


def _outputs(model: nn.Module, inputs: Inputs, chosen: range) -> Callable[..., Tensor]:
    """The model as nngeometry calls it, on the tensors of a batch, with some of its outputs."""

    def function(*tensors: Tensor) -> Tensor:
        batch = dict(zip(inputs, tensors, strict=True)) if isinstance(inputs, dict) else tensors[0]
        return call(model, batch)[:, chosen.start : chosen.stop]

    return function
