"""The peer curvlinops (Dangel et al. 2025): linear operators of a network, the transposed Jacobian among them.

Its operators multiply whole data sets: the columns of ``J Jᵀ``, by ``J (Jᵀ v)``, would take a forward and a backward
pass over all samples for each of N·C vectors. An operator per sample, multiplied with the identity of its outputs,
gives the rows of the Jacobian in N passes; that is what is measured, then ``X Xᵀ``.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from bench.inputs import Inputs, call, count_outputs, count_parameters, count_samples, take

from .plain import ROWS_SHARE, chunks_within
from .result import MEMORY_BYTES, Refused, Result, require


class _Called(nn.Module):
    """A model that takes its whole batch as one argument, as the operators call it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Inputs) -> Tensor:
        """The logits."""
        return call(self.model, inputs)


def curvlinops_kernel(model: nn.Module, inputs: Inputs, memory_bytes: int = MEMORY_BYTES) -> Result:
    """The trace kernel from ``TransposedJacobianLinearOperator``, one sample at a time, in groups of outputs that fit.

    Args:
        model: in eval mode.
        inputs: (samples, ...).
        memory_bytes: what it may take.

    Returns:
        The kernel and its times.

    Raises:
        Refused: if the gradients of one output do not fit, or its ``vmap`` cannot take the model.
    """
    require("curvlinops", "curvlinops-for-pytorch")
    from curvlinops.jacobian import TransposedJacobianLinearOperator

    start = time.perf_counter()
    samples, outputs, parameters = count_samples(inputs), count_outputs(model, inputs), count_parameters(model)
    chunks = chunks_within(samples, outputs, parameters, int(ROWS_SHARE * memory_bytes))
    if len(chunks[0].columns) < parameters:
        raise Refused(
            f"holds the gradients of one output, {4 * samples * parameters / 2**30:.1f} GiB; "
            f"allowed are {memory_bytes / 2**30:.1f} GiB"
        )
    called, chosen = _Called(model), list(model.parameters())
    identity, target = torch.eye(outputs), torch.zeros(1)
    memory = torch.empty(samples * max(len(chunk.outputs) for chunk in chunks) * parameters)
    kernel = torch.zeros(samples, samples)
    derive_seconds, contract_seconds = 0.0, 0.0
    for chunk in chunks:
        width = len(chunk.outputs)
        rows = memory[: samples * width * parameters].view(samples, width, parameters)
        for sample, row in enumerate(rows):
            data = [(take(inputs, slice(sample, sample + 1)), target)]
            operator = TransposedJacobianLinearOperator(
                called, chosen, data, check_deterministic=False, num_data=1, batch_size_fn=lambda _: 1
            )
            try:
                row.copy_((operator @ identity[:, chunk.outputs.start : chunk.outputs.stop]).T)
            except RuntimeError as error:
                raise Refused(f"its vmap refuses the model: {str(error).splitlines()[0]}") from error
        derived = time.perf_counter()
        flat = rows.view(samples, width * parameters)
        kernel += flat @ flat.T
        done = time.perf_counter()
        derive_seconds, contract_seconds = derive_seconds + derived - start, contract_seconds + done - derived
        start = done
    return Result(
        kernel.numpy(),
        derive_seconds=derive_seconds,
        contract_seconds=contract_seconds,
        remark=f"an operator per sample{f', {len(chunks)} chunks of outputs' if len(chunks) > 1 else ''}",
    )
