"""Output functions: which scalars of a model are differentiated, and the cotangents that stand for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ooc_ntk.errors import InputError
from ooc_ntk.planning.outputs import OutputSpec

from .functions import NAMED, NOTHING, ClipOutput, SampleFunction


def model_logits(output: object) -> Tensor:
    """Find the tensor of outputs in what a model returned and flatten it to one row per sample.

    Args:
        output: a tensor (samples, ...), or an object or dict that has ``logits``.

    Returns:
        (samples, outputs).

    Raises:
        InputError: if there is no such tensor.
    """
    output = logits_of(output)
    if not isinstance(output, Tensor):
        raise InputError(
            f"the model returned a {type(output).__name__}, not a tensor or something with .logits; "
            "wrap it in a module that returns one tensor"
        )
    if not output.is_floating_point():
        raise InputError(f"the model's output is {output.dtype}; an NTK needs a real floating-point output")
    return output.reshape(output.shape[0], -1) if output.ndim > 1 else output.reshape(-1, 1)


def logits_of(output: object) -> object:
    """The logits in what a model returned, in the shape that they have; anything else as it is."""
    if isinstance(output, dict) and "logits" in output:
        return output["logits"]
    return output if isinstance(output, Tensor) else getattr(output, "logits", output)


def pair_embeddings(output: object) -> Tensor:
    """Bring the image and the text embeddings that a model returned side by side.

    Args:
        output: a tuple that begins with both, or an object or dict that has ``image_embeds`` and ``text_embeds``.

    Returns:
        (samples, 2 · width).

    Raises:
        InputError: if they are not there.
    """
    if isinstance(output, dict):
        pair = (output.get("image_embeds"), output.get("text_embeds"))
    elif isinstance(output, tuple | list) and len(output) >= 2:
        pair = (output[0], output[1])
    else:
        pair = (getattr(output, "image_embeds", None), getattr(output, "text_embeds", None))
    image, text = pair
    if not isinstance(image, Tensor) or not isinstance(text, Tensor) or image.shape != text.shape or image.ndim != 2:
        raise InputError(
            f"outputs='clip' needs image and text embeddings of one shape (samples, width) from the model, it returned "
            f"{type(output).__name__}; return a tuple of both, or something with .image_embeds and .text_embeds"
        )
    return torch.cat([image, text], 1)


@dataclass(frozen=True)
class OutputRows:
    """Which Jacobian rows a kernel kind needs of an output function, as cotangents of the model's output.

    The function and its derivative are evaluated in float64 on the model's output and then cast: ``1 − p`` cancels.

    Attributes:
        function: None for the logits themselves, otherwise a :data:`SampleFunction`.
        kernel: ``trace``, ``pseudo``, ``output:c`` or ``full``.
        spec: which of its outputs are wanted, None for all.
    """

    function: SampleFunction | None
    kernel: str
    spec: OutputSpec | None = None

    @classmethod
    def of(cls, outputs: str | SampleFunction, kernel: str) -> OutputRows:
        """Make one from a job's ``outputs`` and ``kernel``; ``clip`` needs its bank and is given as a function."""
        if not isinstance(outputs, str):
            return cls(outputs, kernel)
        spec = OutputSpec.parse(outputs)
        return cls(NAMED.get(spec.name), kernel, spec if spec.sliced else None)

    def model_output(self, output: object) -> Tensor:
        """What of a model's output the function is of: (samples, outputs)."""
        return pair_embeddings(output) if isinstance(self.function, ClipOutput) else model_logits(output)

    def _part(self, outputs: int) -> slice:
        return slice(0, outputs) if self.spec is None else self.spec.part(outputs)

    def count(self, output: Tensor, target: Tensor | None) -> int:
        """Number of output scalars C for one sample's model output (outputs,)."""
        part = self._part(self._every(output, target))
        return int(part.stop - part.start)

    def _every(self, output: Tensor, target: Tensor | None) -> int:
        """The same of all outputs."""
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
            (rows, outputs) in the model's dtype: all wanted outputs for ``trace`` and ``full``, their sum for
            ``pseudo``, one of them for ``output:c``.
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
        every = every[self._part(every.shape[0])]
        if self.kernel == "pseudo":
            return every.sum(0, keepdim=True)
        if self.kernel.startswith("output:"):
            index = int(self.kernel.partition(":")[2])
            return every[index : index + 1]
        return every

    def check_shape(self, returned: object, targets: Tensor | None) -> None:
        """Refuse outputs that a named function would pair with the wrong targets once they are flattened.

        Args:
            returned: what the model returned for a batch, as it is.
            targets: labels of the batch, or None.

        Raises:
            InputError: if the output is neither one row of logits per sample nor one per token of a sequence target.
        """
        found = logits_of(returned)
        if self.function not in NAMED.values() or not isinstance(found, Tensor):
            return
        shape = tuple(found.shape)
        real = targets is not None and targets.is_floating_point()
        sequence = self.function in (NAMED["loss"], NAMED["next-token"]) and not real
        if sequence and targets is not None and targets.ndim > 1 and targets[0].numel() > 1:
            if len(shape) == 3 and tuple(targets.shape) == shape[:2]:
                return
            raise InputError(
                f"the model returned {shape} for targets of shape {tuple(targets.shape)}; a row of logits for each "
                "target token is needed, (samples, tokens, vocabulary) for (samples, tokens): transpose the output, or "
                "pass a function as outputs"
            )
        rows = len(shape) > 2 and any(size > 1 for size in shape[2:])
        if rows and not (real and self.function in (NAMED["loss"], NAMED["next-token"])):
            raise InputError(
                f"this output function needs one row of logits a sample, the model returned {shape}; pass a function "
                "as outputs"
            )

    def check_labels(self, targets: Tensor | None, outputs: int) -> None:
        """Refuse class labels that the model has no output for; they would silently count as no class.

        Args:
            targets: labels of a batch, or None.
            outputs: outputs of the model.

        Raises:
            InputError: naming the first such label.
        """
        if self.function not in NAMED.values() or targets is None or targets.is_floating_point():
            return
        if self.function is NAMED["logprob"]:  # of all classes, whatever the label
            return
        sequence = targets.ndim > 1 and targets[0].numel() > 1
        classes = outputs // targets[0].numel() if sequence else outputs
        if sequence and self.function is NAMED["next-token"] and bool((targets.flatten(1) == NOTHING).all(1).any()):
            raise InputError(
                "a text has no token to predict; outputs='next-token' needs texts of at least two tokens, and a target "
                "that is not -100"
            )
        wrong = targets[((targets < 0) & ~(sequence & (targets == NOTHING))) | (targets >= classes)]
        if wrong.numel():
            what = "token" if sequence else "label"
            raise InputError(
                f"{what} {int(wrong.reshape(-1)[0])} is out of range: the model has {classes} outputs"
                f"{' a position' if sequence else ''}, so {what}s run from 0 to {classes - 1}"
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
