"""The peer Opacus (Yousefpour et al. 2021): per-sample gradients by hooks, written by hand for common layers.

Its hooks give one gradient per sample and backward pass, and each backward pass uses up what the forward pass left: a
kernel takes a forward and a backward pass per output, then a product. Layers that it has no rule for go through
``torch.func``. It refuses models with buffers, such as batch norm's.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator

from torch import Tensor, nn

from bench.inputs import Inputs, call

from .by_output import kernel_by_output
from .result import MEMORY_BYTES, Refused, Result, require


def opacus_kernel(model: nn.Module, inputs: Inputs, memory_bytes: int = MEMORY_BYTES) -> Result:
    """The trace kernel from ``GradSampleModule``.

    Args:
        model: in eval mode; left as it is.
        inputs: (samples, ...).
        memory_bytes: what it may take.

    Returns:
        The kernel and its times.

    Raises:
        Refused: if it does not take the model, or the gradients of one output do not fit.
    """
    require("opacus", "opacus")
    from opacus.grad_sample import GradSampleModule

    copied = copy.deepcopy(model)
    try:
        wrapped = GradSampleModule(copied, loss_reduction="sum")
    except NotImplementedError as error:
        raise Refused("refuses layers with buffers, such as batch norm") from error
    for module in copied.modules():
        # Its hooks work in training mode alone; modules without parameters, dropout among them, stay in eval mode.
        module.training = any(True for _ in module.parameters(recurse=False))

    def gradients(batch: Inputs, output: int) -> Iterator[Tensor]:
        wrapped.zero_grad(set_to_none=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Full backward hook is firing when gradients are computed")
            call(wrapped, batch)[:, output].sum().backward()
        for parameter in copied.parameters():
            found = parameter.grad_sample
            parameter.grad_sample = parameter.grad = None
            if found is None:
                raise NotImplementedError("a parameter gets no gradient per sample")
            yield found

    return kernel_by_output(model, inputs, gradients, "a forward and a backward pass per output", memory_bytes)
