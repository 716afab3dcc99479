"""The peer dattri (Deng et al. 2024): per-sample gradients of a target function, ``vmap`` of ``grad``; its projector.

Its gradients are of one scalar per sample, so a kernel takes one sweep per output, then a product.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bench.inputs import Inputs, map_tensors

from .by_output import kernel_by_output
from .result import MEMORY_BYTES, Result, require


def dattri_kernel(model: nn.Module, inputs: Inputs, memory_bytes: int = MEMORY_BYTES) -> Result:
    """The trace kernel from ``AttributionTask.get_grad_target_func``.

    Args:
        model: in eval mode.
        inputs: (samples, ...).
        memory_bytes: what it may take.

    Returns:
        The kernel and its times.

    Raises:
        Refused: if ``vmap`` cannot take the model, or the gradients of one output do not fit.
    """
    require("dattri", "dattri")
    from dattri.task import AttributionTask

    state = model.state_dict()

    def target(output: int) -> Callable[[dict[str, Tensor], Inputs], Tensor]:
        def function(parameters: dict[str, Tensor], sample: Inputs) -> Tensor:
            batch = map_tensors(sample, lambda tensor: tensor.unsqueeze(0))
            by_position, by_name = ((), batch) if isinstance(batch, dict) else ((batch,), {})
            logits: Tensor = functional_call(model, parameters, by_position, by_name)
            return logits[0, output]

        return function

    tasks: dict[int, Any] = {}

    def gradients(batch: Inputs, output: int) -> list[Tensor]:
        if output not in tasks:
            tasks[output] = AttributionTask(target(output), model, state)
        derive = tasks[output].get_grad_target_func(in_dims=(None, 0))
        parameters, _ = tasks[output].get_param(0)
        with torch.no_grad():
            return [derive(parameters, batch)]

    return kernel_by_output(model, inputs, gradients, "vmap(grad) per output", memory_bytes)


def projector(parameters: int, dim: int, seed: int, block_columns: int = 100) -> Any:
    """The projector with signs, as dattri makes it for a CPU.

    Args:
        parameters: columns of the gradients.
        dim: columns of the features.
        seed: of the signs.
        block_columns: columns that are made at one time; its own default unless given.

    Returns:
        An object with ``project(gradients, ensemble_id)``.
    """
    found = importlib.import_module("dattri.func.projection")
    kind = found.ProjectionType.rademacher
    return found.BasicProjector(parameters, dim, seed, kind, torch.device("cpu"), block_columns)
