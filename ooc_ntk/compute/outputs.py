"""Output functions: which scalars of a model are differentiated, and the cotangents that stand for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ooc_ntk.errors import InputError

#: A function of one sample's model output (outputs,) float64 and its target, returning a scalar or a 1-D tensor.
SampleFunction = Callable[[Tensor, Tensor | None], Tensor]


def model_logits(output: object) -> Tensor:
    """Find the tensor of outputs in what a model returned and flatten it to one row per sample.

    Args:
        output: a tensor (samples, ...), or an object or dict that has ``logits``.

    Returns:
        (samples, outputs).

    Raises:
        InputError: if there is no such tensor.
    """
    if isinstance(output, dict) and "logits" in output:
        output = output["logits"]
    elif not isinstance(output, Tensor) and hasattr(output, "logits"):
        output = output.logits
    if not isinstance(output, Tensor):
        raise InputError(
            f"the model returned a {type(output).__name__}, not a tensor or something with .logits; "
            "wrap it in a module that returns one tensor"
        )
    if not output.is_floating_point():
        raise InputError(f"the model's output is {output.dtype}; an NTK needs a real floating-point output")
    return output.reshape(output.shape[0], -1) if output.ndim > 1 else output.reshape(-1, 1)


def loss(output: Tensor, target: Tensor | None) -> Tensor:
    """Loss of one sample: cross-entropy for an integer target, half the squared error for a real one.

    Args:
        output: (outputs,), float64.
        target: () integer class, or (outputs,) real values.

    Returns:
        (1,).
    """
    target = _needed(target, "loss")
    if target.is_floating_point():
        if target.numel() != output.numel():
            raise InputError(f"loss compares {output.numel()} outputs with {target.numel()} target values")
        return 0.5 * (output - target.reshape(-1).to(output)).square().sum().reshape(1)
    _need_classes(output, "loss")
    # −log p = log(1 + e^{−margin}): its derivative p − 1 does not cancel, however sure the network is.
    negative = -margin(output, target)
    return torch.logaddexp(torch.zeros_like(negative), negative)


def margin(output: Tensor, target: Tensor | None) -> Tensor:
    """Margin of one sample, ``z_y − log Σ_{c≠y} exp z_c = log(p_y / (1 − p_y))`` (Park et al. 2023, TRAK).

    Args:
        output: (outputs,), float64.
        target: () integer class.

    Returns:
        (1,).
    """
    target = _needed(target, "margin")
    if target.is_floating_point():
        raise InputError("margin needs integer class labels, got real-valued targets; use outputs='loss' or a function")
    _need_classes(output, "margin")
    correct = _one_hot(output, target)
    others = output.masked_fill(correct.bool(), -torch.inf)
    return (output * correct).sum().reshape(1) - torch.logsumexp(others, 0).reshape(1)


def _one_hot(output: Tensor, target: Tensor) -> Tensor:
    """1 at the target's class, without indexing, so that vmap takes it."""
    return (torch.arange(output.shape[0], device=output.device) == target.reshape(())).to(output)


def _needed(target: Tensor | None, name: str) -> Tensor:
    if target is None:
        raise InputError(f"outputs={name!r} needs a label with every sample; pass train=(inputs, labels)")
    return target


def _need_classes(output: Tensor, name: str) -> None:
    if output.shape[0] < 2:
        raise InputError(
            f"outputs={name!r} with class labels needs at least two logits, the model has {output.shape[0]}; "
            "pass a function as outputs"
        )


_NAMED: dict[str, SampleFunction] = {"loss": loss, "margin": margin}


@dataclass(frozen=True)
class OutputRows:
    """Which Jacobian rows a kernel kind needs of an output function, as cotangents of the model's output.

    The function and its derivative are evaluated in float64 on the model's output and then cast: ``1 − p`` cancels.

    Attributes:
        function: None for the logits themselves, otherwise a :data:`SampleFunction`.
        kernel: ``trace``, ``pseudo``, ``output:c`` or ``full``.
    """

    function: SampleFunction | None
    kernel: str

    @classmethod
    def of(cls, outputs: str | SampleFunction, kernel: str) -> OutputRows:
        """Make one from a job's ``outputs`` and ``kernel``."""
        if isinstance(outputs, str):
            return cls(_NAMED.get(outputs), kernel)
        return cls(outputs, kernel)

    def count(self, output: Tensor, target: Tensor | None) -> int:
        """Number of output scalars C for one sample's model output (outputs,)."""
        if self.function is None:
            return output.shape[0]
        value = self.function(output.detach().double(), target)
        if not isinstance(value, Tensor) or value.ndim > 1:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"the output function must return a scalar or a 1-D tensor per sample, got {shape}")
        return int(value.numel())

    def cotangents(self, output: Tensor, target: Tensor | None) -> Tensor:
        """Cotangents of the model's output, one row per Jacobian row.

        Args:
            output: (outputs,) of one sample, in the model's dtype.
            target: that sample's target, or None.

        Returns:
            (rows, outputs) in the model's dtype: all outputs for ``trace`` and ``full``, their sum for ``pseudo``,
            one of them for ``output:c``.
        """
        if self.function is None:
            every = torch.eye(output.shape[0], dtype=output.dtype, device=output.device)
            return self._chosen(every)
        function = self.function
        every = torch.func.jacrev(lambda z: function(z, target).reshape(-1))(output.detach().double())
        return self._chosen(every).to(output.dtype)

    def batch_cotangents(self, outputs: Tensor, targets: Tensor | None) -> Tensor:
        """Cotangents of a batch.

        Args:
            outputs: (samples, outputs), in the model's dtype.
            targets: targets of the samples, or None.

        Returns:
            (samples, rows, outputs) in the model's dtype.
        """
        if self.function is None:
            every = self._chosen(torch.eye(outputs.shape[1], dtype=outputs.dtype, device=outputs.device))
            return every.expand(outputs.shape[0], -1, -1)
        return torch.stack(
            [
                self.cotangents(output, None if targets is None else targets[index])
                for index, output in enumerate(outputs)
            ]
        )

    def _chosen(self, every: Tensor) -> Tensor:
        if self.kernel == "pseudo":
            return every.sum(0, keepdim=True)
        if self.kernel.startswith("output:"):
            index = int(self.kernel.partition(":")[2])
            return every[index : index + 1]
        return every

    def check_labels(self, targets: Tensor | None, outputs: int) -> None:
        """Refuse class labels that the model has no output for; they would silently count as no class.

        Args:
            targets: labels of a batch, or None.
            outputs: outputs of the model.

        Raises:
            InputError: naming the first such label.
        """
        if self.function not in _NAMED.values() or targets is None or targets.is_floating_point():
            return
        wrong = targets[(targets < 0) | (targets >= outputs)]
        if wrong.numel():
            raise InputError(
                f"label {int(wrong.reshape(-1)[0])} is out of range: the model has {outputs} outputs, so labels run "
                f"from 0 to {outputs - 1}"
            )

    def check(self, outputs: int) -> None:
        """Refuse ``output:c`` with c out of range.

        Raises:
            InputError: if c is not below ``outputs``.
        """
        if self.kernel.startswith("output:") and int(self.kernel.partition(":")[2]) >= outputs:
            raise InputError(
                f"kernel {self.kernel!r} is out of range: the output function has {outputs} "
                f"output{'s' if outputs != 1 else ''}, so c runs from 0 to {outputs - 1}"
            )
