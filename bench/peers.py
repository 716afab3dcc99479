"""What users of the trace kernel would otherwise write, written well; and a float64 oracle.

Both peers hold the whole Jacobian, (samples, outputs · parameters) float32, and do their work in the order that their
authors published.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

#: Bytes that a contender may take; what bounds the chunks of the Jacobian contraction and the budget of ooc-ntk.
MEMORY_BYTES = 18 * 2**30

#: Bytes that deriving a chunk takes beside the whole Jacobian, as a multiple of the chunk's own Jacobian (measured:
#: 1.0 to 1.3, see the peaks that the benchmark prints). Larger chunks took less processor time on
#: ResNet-18 and the ViT and made no clear difference on the MLP (measured, on a busy machine).
CHUNK_SHARE = 1.5


@dataclass(frozen=True)
class Result:
    """What a contender computed and how long each phase took.

    Attributes:
        kernel: (samples, samples), float32 or float64.
        plan_seconds: deciding how (0 for those that decide nothing).
        derive_seconds: the Jacobian.
        contract_seconds: its products.
        other_seconds: whatever else it does before the kernel is there.
        remark: how it went about it, for the table's foot.
    """

    kernel: np.ndarray
    plan_seconds: float = 0.0
    derive_seconds: float = 0.0
    contract_seconds: float = 0.0
    other_seconds: float = 0.0
    remark: str = ""

    @property
    def run_seconds(self) -> float:
        """All of it but the plan."""
        return self.derive_seconds + self.contract_seconds + self.other_seconds


def per_sample_jacobian(model: nn.Module, inputs: Tensor) -> Tensor:
    """Every row of the Jacobian by a forward pass of one sample and a backward pass per output.

    Args:
        model: in eval mode.
        inputs: (samples, ...), in the dtype of the model.

    Returns:
        (samples, outputs · parameters), in that dtype.
    """
    parameters = list(model.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    with torch.no_grad():
        outputs = model(inputs[:1]).shape[1]
    jacobian = torch.empty(len(inputs), outputs * count, dtype=inputs.dtype)
    for sample, row in zip(inputs.split(1), jacobian, strict=True):
        logits = model(sample)[0]
        for output, target in enumerate(row.split(count)):
            gradients = torch.autograd.grad(logits[output], parameters, retain_graph=output < outputs - 1)
            torch.cat([gradient.reshape(-1) for gradient in gradients], out=target)
    return jacobian


def per_sample_loop(model: nn.Module, inputs: Tensor) -> Result:
    """The scheme of empirical-ntks (Wei, Hu, Steinhardt 2022): per-sample rows X, then X Xᵀ.

    Args:
        model: in eval mode.
        inputs: (samples, ...).

    Returns:
        The kernel and its times.
    """
    start = time.perf_counter()
    jacobian = per_sample_jacobian(model, inputs)
    derived = time.perf_counter()
    kernel = jacobian @ jacobian.T
    done = time.perf_counter()
    return Result(kernel.numpy(), derive_seconds=derived - start, contract_seconds=done - derived)


def jacobian_contraction(model: nn.Module, inputs: Tensor) -> Result:
    """The Jacobian contraction of the PyTorch tutorial 'Neural Tangent Kernels', trace of the output axes.

    ``vmap(jacrev(f))`` over samples, then ``einsum("Naf,Maf->NM")`` per parameter and their sum. Departures from the
    tutorial, all in its favour: the Jacobian is derived once, since both its arguments are the same data; it is derived
    in chunks of samples, so that the whole stays below :data:`MEMORY_BYTES`, into tensors allocated beforehand; the
    trace is contracted directly (the tutorial's ``compute="trace"``), not cut out of ``NMab``. Attention takes the math
    backend, as vmap needs it to.

    Args:
        model: in eval mode.
        inputs: (samples, ...).

    Returns:
        The kernel and its times.
    """
    start = time.perf_counter()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def single(chosen: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, {**chosen, **buffers}, (sample.unsqueeze(0),)).squeeze(0)

    with torch.no_grad():
        outputs = model(inputs[:1]).shape[1]
    jacobians = {name: torch.empty(len(inputs), outputs, parameter.numel()) for name, parameter in parameters.items()}
    chunk = _chunk_samples(len(inputs), sum(jacobian[0].nbytes for jacobian in jacobians.values()))
    derive = vmap(jacrev(single), (None, 0))
    with sdpa_kernel(SDPBackend.MATH):
        for first in range(0, len(inputs), chunk):
            for name, found in derive(parameters, inputs[first : first + chunk]).items():
                jacobians[name][first : first + chunk] = found.flatten(2)
                del found
    derived = time.perf_counter()
    kernel = torch.zeros(len(inputs), len(inputs))
    for jacobian in jacobians.values():
        kernel += torch.einsum("Naf,Maf->NM", jacobian, jacobian)
    done = time.perf_counter()
    return Result(
        kernel.numpy(),
        derive_seconds=derived - start,
        contract_seconds=done - derived,
        remark=f"chunks of {chunk} samples",
    )


def _chunk_samples(samples: int, sample_bytes: int) -> int:
    """Samples per chunk: as many as :data:`MEMORY_BYTES` allows, the chunks as equal as can be."""
    left = MEMORY_BYTES - samples * sample_bytes
    largest = max(1, int(left / (CHUNK_SHARE * sample_bytes)))
    chunks = -(-samples // min(samples, largest))
    return -(-samples // chunks)


def exact_kernel(model: nn.Module, inputs: Tensor, samples: Sequence[int]) -> np.ndarray:
    """The oracle: per-sample autograd in float64.

    Args:
        model: in eval mode; converted to float64 in place.
        inputs: (samples, ...).
        samples: which ones.

    Returns:
        (samples, samples) float64.
    """
    jacobian = per_sample_jacobian(model.double(), inputs[list(samples)].double())
    return (jacobian @ jacobian.T).numpy()
