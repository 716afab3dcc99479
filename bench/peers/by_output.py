"""A trace kernel from per-sample gradients of one output at a time, as libraries for such gradients give them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.inputs import Inputs, count_outputs, count_parameters, count_samples, take

from .result import MEMORY_BYTES, Refused, Result

#: Share of the memory that the rows of one output may take; a batch's gradients are made beside them (guessed).
ROWS_SHARE = 0.75

#: Samples whose gradients are derived together, fewer where they would take more than the bytes below (guessed).
BATCH_SAMPLES = 64

#: Bytes of the gradients of such a batch.
BATCH_BYTES = 2**30

#: Gradients of one output by batch: from (inputs, output) to one tensor (samples, ...) per parameter, in any order that
#: is always the same.
Gradients = Callable[[Inputs, int], Iterable[Tensor]]


def kernel_by_output(
    model: nn.Module, inputs: Inputs, gradients: Gradients, remark: str = "", memory_bytes: int = MEMORY_BYTES
) -> Result:
    """For each output the rows of its Jacobian, batch by batch, then their product, added up over outputs.

    Attention takes the math backend, as ``vmap`` needs it to.

    Args:
        model: in eval mode.
        inputs: (samples, ...).
        gradients: the peer's.
        remark: how it goes about it.
        memory_bytes: what it may take.

    Returns:
        The kernel and its times.

    Raises:
        Refused: if the rows of one output do not fit, or the peer cannot take the model.
    """
    start = time.perf_counter()
    samples, outputs, parameters = count_samples(inputs), count_outputs(model, inputs), count_parameters(model)
    rows_bytes = 4 * samples * parameters
    if rows_bytes > ROWS_SHARE * memory_bytes:
        raise Refused(
            f"holds the gradients of one output, {rows_bytes / 2**30:.1f} GiB, and a batch's beside them; "
            f"allowed are {memory_bytes / 2**30:.1f} GiB"
        )
    rows = torch.empty(samples, parameters)
    batch = max(1, min(BATCH_SAMPLES, BATCH_BYTES // (4 * parameters)))
    kernel = torch.zeros(samples, samples)
    derive_seconds, contract_seconds = 0.0, 0.0
    for output in range(outputs):
        for first in range(0, samples, batch):
            part = rows[first : first + batch]
            try:
                with sdpa_kernel(SDPBackend.MATH):
                    derived_batch = gradients(take(inputs, slice(first, first + batch)), output)
                    found = [gradient.flatten(1) for gradient in derived_batch]
            except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
                raise Refused(f"cannot take the model: {str(error).splitlines()[0]}") from error
            if any(len(gradient) != len(part) for gradient in found):
                raise Refused("gives one gradient for all samples of a parameter that does not depend on them")
            if sum(tensor.shape[1] for tensor in found) != parameters:
                raise Refused(f"gives gradients of {sum(t.shape[1] for t in found):,} of {parameters:,} parameters")
            torch.cat(found, 1, out=part)
            del derived_batch, found
        derived = time.perf_counter()
        kernel += rows @ rows.T
        done = time.perf_counter()
        derive_seconds, contract_seconds = derive_seconds + derived - start, contract_seconds + done - derived
        start = done
    return Result(kernel.numpy(), derive_seconds=derive_seconds, contract_seconds=contract_seconds, remark=remark)
