"""The peer TRAK (Park et al. 2023, package traker): its gradient computer, ``vmap`` of ``grad`` of a model's output.

TRAK keeps projected gradients; here its unprojected ones, one sweep per output, give the exact kernel by a product.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bench.inputs import Inputs, count_parameters

from .by_output import kernel_by_output
from .result import MEMORY_BYTES, Result, require


def traker_kernel(model: nn.Module, inputs: Inputs, memory_bytes: int = MEMORY_BYTES) -> Result:
    """The trace kernel from ``FunctionalGradientComputer``.

    Args:
        model: in eval mode.
        inputs: (samples, ...).
        memory_bytes: what it may take.

    Returns:
        The kernel and its times.

    Raises:
        Refused: if ``vmap`` cannot take the model, or the gradients of one output do not fit.
    """
    require("trak", "traker")
    from trak.gradient_computers import FunctionalGradientComputer
    from trak.modelout_functions import AbstractModelOutput

    names = tuple(inputs) if isinstance(inputs, dict) else ()

    class Output(AbstractModelOutput):
        """One output of the model."""

        def __init__(self, index: int) -> None:
            super().__init__()
            self.index = index

        def get_output(
            self, net: nn.Module, weights: dict[str, Tensor], buffers: dict[str, Tensor], *sample: Tensor
        ) -> Tensor:
            """The output of one sample."""
            tensors = [tensor.unsqueeze(0) for tensor in sample]
            by_name = dict(zip(names, tensors, strict=True)) if names else {}
            logits: Tensor = functional_call(net, (weights, buffers), () if names else tuple(tensors), by_name)
            return logits[0, self.index]

        def get_out_to_loss_grad(self, *_: object) -> Tensor:
            """Plays no part in a kernel."""
            raise NotImplementedError

    parameters = count_parameters(model)

    def gradients(batch: Inputs, output: int) -> Iterable[Tensor]:
        computer = FunctionalGradientComputer(model, Output(output), parameters, torch.float32, torch.device("cpu"))
        tensors = tuple(batch.values()) if isinstance(batch, dict) else (batch,)
        with torch.no_grad():
            return list(computer.compute_per_sample_grad(tensors).values())

    return kernel_by_output(model, inputs, gradients, "vmap(grad) per output", memory_bytes)
