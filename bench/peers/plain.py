"""What users of the trace kernel would otherwise write, written well; and a float64 oracle.

Each peer does its work in the order that its authors published, and keeps below :data:`MEMORY_BYTES`: by chunks of the
Jacobian's columns where the published scheme has chunks, by refusing where it holds the Jacobian whole.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.inputs import Inputs, as_double, call, count_outputs, count_parameters, count_samples, map_tensors, take

from .result import MEMORY_BYTES, Refused, Result

#: Share of the memory that the per-sample loop gives to its rows of the Jacobian; the rest is for the process, the
#: model, one sample's activations and its gradients (guessed; the peaks that the benchmark prints show the slack).
ROWS_SHARE = 0.85

#: Bytes that deriving a chunk takes beside the whole Jacobian, as a multiple of the chunk's own Jacobian (measured:
#: 1.0 to 1.3, see the peaks that the benchmark prints). Larger chunks took less processor time on
#: ResNet-18 and the ViT and made no clear difference on the MLP (measured, on a busy machine).
CHUNK_SHARE = 1.5


@dataclass(frozen=True)
class Chunk:
    """Columns of the Jacobian X, (samples, outputs · parameters), that are held at one time.

    Attributes:
        outputs: range of outputs.
        columns: range of parameters of each of them.
    """

    outputs: range
    columns: range


def chunks_within(samples: int, outputs: int, parameters: int, most_bytes: int, item_bytes: int = 4) -> list[Chunk]:
    """Cut the columns of X so that each chunk fits: into groups of outputs, and into spans of one output's parameters.

    Groups of outputs come first, as they repeat the forward passes only; spans of parameters, the chunks of Wei et al.
    (2022), repeat backward passes as well.

    Args:
        samples: rows of X.
        outputs: outputs per sample.
        parameters: parameters of the model.
        most_bytes: bytes that a chunk may take.
        item_bytes: bytes per number.

    Returns:
        The chunks, as equal as can be.

    >>> [(len(chunk.outputs), len(chunk.columns)) for chunk in chunks_within(2, 10, 100, 3200)]
    [(4, 100), (3, 100), (3, 100)]
    >>> [(len(chunk.outputs), len(chunk.columns)) for chunk in chunks_within(2, 1, 100, 480)]
    [(1, 50), (1, 50)]
    """
    output_bytes = samples * parameters * item_bytes
    together = most_bytes // output_bytes
    groups = _equal_parts(outputs, outputs if together == 0 else -(-outputs // min(outputs, together)))
    spans = _equal_parts(parameters, 1 if together else -(-output_bytes // most_bytes))
    return [Chunk(group, span) for group in groups for span in spans]


def _equal_parts(total: int, count: int) -> list[range]:
    shorter, longer = divmod(total, count)
    edges = [index * shorter + min(index, longer) for index in range(count + 1)]
    return [range(first, last) for first, last in itertools.pairwise(edges)]


def per_sample_rows(model: nn.Module, inputs: Inputs, chunk: Chunk, rows: Tensor) -> None:
    """Rows of the Jacobian by a forward pass of one sample and a backward pass per output.

    Args:
        model: in eval mode.
        inputs: (samples, ...).
        chunk: which columns.
        rows: (samples, outputs · parameters of the chunk), in the dtype of the model; filled.
    """
    chosen, slices, first = [], [], 0
    for parameter in model.parameters():
        last = first + parameter.numel()
        kept = range(max(first, chunk.columns.start) - first, min(last, chunk.columns.stop) - first)
        if kept:
            chosen.append(parameter)
            slices.append(slice(kept.start, kept.stop))
        first = last
    for sample, row in enumerate(rows):
        logits = call(model, take(inputs, slice(sample, sample + 1)))[0]
        for output, target in zip(chunk.outputs, row.split(len(chunk.columns)), strict=True):
            gradients = torch.autograd.grad(logits[output], chosen, retain_graph=output < chunk.outputs[-1])
            parts = [gradient.reshape(-1)[kept] for gradient, kept in zip(gradients, slices, strict=True)]
            torch.cat(parts, out=target)


def per_sample_loop(model: nn.Module, inputs: Inputs, memory_bytes: int = MEMORY_BYTES) -> Result:
    """The scheme of empirical-ntks (Wei, Hu, Steinhardt 2022): per-sample rows X, then X Xᵀ, chunk by chunk.

    Args:
        model: in eval mode.
        inputs: (samples, ...).
        memory_bytes: what it may take.

    Returns:
        The kernel and its times.
    """
    samples, outputs, parameters = count_samples(inputs), count_outputs(model, inputs), count_parameters(model)
    dtype = next(model.parameters()).dtype
    chunks = chunks_within(samples, outputs, parameters, int(ROWS_SHARE * memory_bytes), dtype.itemsize)
    widest = max(len(chunk.outputs) * len(chunk.columns) for chunk in chunks)
    derive_seconds, contract_seconds = 0.0, 0.0
    start = time.perf_counter()
    memory = torch.empty(samples * widest, dtype=dtype)
    kernel = torch.zeros(samples, samples, dtype=dtype)
    for chunk in chunks:
        width = len(chunk.outputs) * len(chunk.columns)
        rows = memory[: samples * width].view(samples, width)
        per_sample_rows(model, inputs, chunk, rows)
        derived = time.perf_counter()
        kernel += rows @ rows.T
        done = time.perf_counter()
        derive_seconds, contract_seconds = derive_seconds + derived - start, contract_seconds + done - derived
        start = done
    what = "outputs" if len(chunks[0].columns) == parameters else "parameters"
    return Result(
        kernel.numpy(),
        derive_seconds=derive_seconds,
        contract_seconds=contract_seconds,
        remark=f"{len(chunks)} chunks of {what}" if len(chunks) > 1 else "",
    )


def jacobian_contraction(model: nn.Module, inputs: Inputs, memory_bytes: int = MEMORY_BYTES) -> Result:
    """The Jacobian contraction of the PyTorch tutorial 'Neural Tangent Kernels', trace of the output axes.

    ``vmap(jacrev(f))`` over samples, then ``einsum("Naf,Maf->NM")`` per parameter and their sum. Departures from the
    tutorial, all in its favour: the Jacobian is derived once, since both its arguments are the same data; it is derived
    in chunks of samples, so that the whole stays below the limit, into tensors allocated beforehand; the
    trace is contracted directly (the tutorial's ``compute="trace"``), not cut out of ``NMab``. Attention takes the math
    backend, as vmap needs it to.

    Args:
        model: in eval mode.
        inputs: (samples, ...).
        memory_bytes: what it may take.

    Returns:
        The kernel and its times.

    Raises:
        Refused: if the whole Jacobian does not fit, or ``vmap`` cannot take the model.
    """
    start = time.perf_counter()
    samples, outputs = count_samples(inputs), count_outputs(model, inputs)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def single(chosen: dict[str, Tensor], sample: Inputs) -> Tensor:
        batch = map_tensors(sample, lambda tensor: tensor.unsqueeze(0))
        by_position, by_name = ((), batch) if isinstance(batch, dict) else ((batch,), {})
        logits: Tensor = functional_call(model, {**chosen, **buffers}, by_position, by_name)
        return logits.squeeze(0)

    sample_bytes = outputs * sum(parameter.nbytes for parameter in parameters.values())
    chunk = _chunk_samples(samples, sample_bytes, memory_bytes)
    jacobians = {name: torch.empty(samples, outputs, parameter.numel()) for name, parameter in parameters.items()}
    derive = vmap(jacrev(single), (None, 0))
    with sdpa_kernel(SDPBackend.MATH):
        for first in range(0, samples, chunk):
            try:
                derived_chunk = derive(parameters, take(inputs, slice(first, first + chunk)))
            except RuntimeError as error:
                raise Refused(f"vmap refuses the model: {str(error).splitlines()[0]}") from error
            for name, found in derived_chunk.items():
                jacobians[name][first : first + chunk] = found.flatten(2)
            del derived_chunk, found
    derived = time.perf_counter()
    kernel = torch.zeros(samples, samples)
    for jacobian in jacobians.values():
        kernel += torch.einsum("Naf,Maf->NM", jacobian, jacobian)
    done = time.perf_counter()
    return Result(
        kernel.numpy(),
        derive_seconds=derived - start,
        contract_seconds=done - derived,
        remark=f"chunks of {chunk} samples",
    )


def _chunk_samples(samples: int, sample_bytes: int, memory_bytes: int) -> int:
    """Samples per chunk: as many as the memory allows, the chunks as equal as can be."""
    whole_bytes = samples * sample_bytes
    largest = int((memory_bytes - whole_bytes) / (CHUNK_SHARE * sample_bytes))
    if largest < 1:
        raise Refused(
            f"holds the whole Jacobian, {whole_bytes / 2**30:.1f} GiB, and a chunk beside it; "
            f"allowed are {memory_bytes / 2**30:.1f} GiB"
        )
    chunks = -(-samples // min(samples, largest))
    return -(-samples // chunks)


def exact_kernel(model: nn.Module, inputs: Inputs, samples: Sequence[int]) -> np.ndarray:
    """The oracle: per-sample autograd in float64.

    Args:
        model: in eval mode; converted to float64 in place.
        inputs: (samples, ...).
        samples: which ones.

    Returns:
        (samples, samples) float64.
    """
    return per_sample_loop(model.double(), as_double(take(inputs, samples))).kernel
