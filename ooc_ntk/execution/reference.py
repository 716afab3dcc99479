"""The reference of an audit: a model in float64 on the CPU, differentiated by plain autograd."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from ooc_ntk.compute.functions import ClipOutput
from ooc_ntk.compute.jacobian import ModelBatch, plain_layers
from ooc_ntk.inputs.joined import joined
from ooc_ntk.inputs.samples import Samples
from ooc_ntk.planning.layers import layer_of
from ooc_ntk.planning.outputs import OutputSpec
from ooc_ntk.planning.plan import Plan
from ooc_ntk.planning.tiles import Range

from .context import SampleReader
from .prepare import PreparedJob

#: What reverse and forward sweeps hold over the tensors that one forward pass saves: the backward pass of a double
#: backward saves about as many again, and both passes hold temporaries (a choice).
SWEEP_TIMES: Final = 4


@contextmanager
def plain_float64() -> Iterator[None]:
    """Switch off what is not differentiable both ways, or not in float64: fused attention and autocast."""
    with plain_layers(), sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", enabled=False):
        yield


class Reference:
    """A copy of a job's model in float64 on the CPU.

    Attributes:
        names: chosen parameters, in the model's order.
        variables: the same as tensors.
    """

    def __init__(self, prepared: PreparedJob, plan: Plan) -> None:
        """Copy the model of a job; its memory goes with this object."""
        self._module = copy.deepcopy(prepared.module).to("cpu").double().eval()
        self._outputs = prepared.outputs
        self._kernel = plan.kernel
        self._reader: SampleReader = prepared.reader
        self._alone = prepared.job.allow_batch_dependence
        chosen = set(prepared.function.names)
        named = {name: p for name, p in self._module.named_parameters() if name in chosen}
        self.names, self.variables = tuple(named), list(named.values())
        self._columns: dict[str, list[int]] = {}
        for name, parameter in self._module.named_parameters():
            if name in chosen:
                self._columns.setdefault(layer_of(name), []).append(parameter.numel())

    def layers(self) -> dict[str, slice]:
        """The columns of every layer; a layer's parameters stand side by side."""
        found, start = {}, 0
        for name, sizes in self._columns.items():
            found[name] = slice(start, start + sum(sizes))
            start += sum(sizes)
        return found

    def batches(self, numbers: NDArray[np.int64], size: int) -> Iterator[tuple[slice, ModelBatch]]:
        """Read samples in batches in float64; train and test do not mix.

        Args:
            numbers: of the samples, ascending.
            size: samples per batch, 1 for a model whose outputs depend on batch mates.

        Yields:
            The places of a batch among ``numbers`` and its samples.
        """
        size = 1 if self._alone else size
        first, last, train = int(numbers[0]), int(numbers[-1]), len(self._reader.train)
        if last - first + 1 == len(numbers):
            for found, samples in self._reader.pieces(Range(first, last + 1), size, ahead=True):
                yield slice(found.start - first, found.stop - first), _doubled(samples)
            return
        border = int(np.searchsorted(numbers, train))
        for begin, end in ((0, border), (border, len(numbers))):
            for start in range(begin, end, size):
                chosen = numbers[start : min(start + size, end)].tolist()
                pieces = [next(self._reader.pieces(Range(n, n + 1), 1))[1] for n in chosen]
                yield slice(start, start + len(chosen)), _doubled(joined(pieces))

    def values(self, batch: ModelBatch, state: Mapping[str, Tensor] | None = None, *, graph: bool = True) -> Tensor:
        """The scalars whose gradients are Jacobian rows, with their graph.

        Args:
            batch: samples in float64.
            state: parameters by name in the place of the model's own.
            graph: whether the graph is kept.

        Returns:
            (samples, rows): every output, their sum for ``pseudo``, one for ``output:c``.
        """
        with torch.set_grad_enabled(graph):
            if state is None:
                returned = self._module(*batch.args, **batch.kwargs)
            else:
                returned = functional_call(self._module, dict(state), batch.args, dict(batch.kwargs))
            values = self._functions(self._outputs_of(returned, len(batch)), batch.targets)
            if self._kernel == "pseudo":
                return values.sum(1, keepdim=True)
            if self._kernel.startswith("output:"):
                index = int(self._kernel[7:])
                return values[:, index : index + 1]
            return values

    def scalars(self, sample: int) -> list[Tensor]:
        """The scalars whose gradients are the Jacobian rows of one sample, with their graph."""
        (_, batch) = next(self.batches(np.array([sample]), 1))
        return list(self.values(batch)[0])

    def sweep_bytes(self, sample: int) -> int:
        """Bytes that sweeps hold for a sample beside parameters and directions, from one forward pass."""
        (_, batch) = next(self.batches(np.array([sample]), 1))
        own = {value.untyped_storage().data_ptr() for value in self._module.state_dict().values()}
        sizes: dict[int, int] = {}

        def noted(value: Tensor) -> Tensor:
            storage = value.untyped_storage()
            sizes[storage.data_ptr()] = max(sizes.get(storage.data_ptr(), 0), storage.nbytes())
            return value.detach()  # what an operation saves of its own result must not own the graph

        with saved_tensors_hooks(noted, lambda value: value):
            self.values(batch)
        return SWEEP_TIMES * sum(size for place, size in sizes.items() if place not in own)

    def _outputs_of(self, output: Any, samples: int) -> Tensor:
        """What a model returned, one row per sample: its logits, or the embeddings of a pair."""
        if isinstance(self._outputs, ClipOutput):
            if isinstance(output, dict):
                output = (output["image_embeds"], output["text_embeds"])
            pair = output[:2] if isinstance(output, tuple | list) else (output.image_embeds, output.text_embeds)
            return torch.cat([part.reshape(samples, -1) for part in pair], 1)
        found: Tensor = output["logits"] if isinstance(output, dict) else getattr(output, "logits", output)
        return found.reshape(samples, -1)

    def _functions(self, logits: Tensor, targets: Tensor | None) -> Tensor:
        """The output function of every sample: (samples, outputs)."""
        if self._outputs == "logits":
            return logits
        return torch.stack(
            [self._values(row, None if targets is None else targets[place]) for place, row in enumerate(logits)]
        )

    def _values(self, logits: Tensor, target: Tensor | None) -> Tensor:
        """The output function by its definition, in other words than the engine's."""
        if callable(self._outputs):
            return self._outputs(logits, target).reshape(-1)
        spec = OutputSpec.parse(self._outputs)
        if spec.name == "logits" or (target is None and spec.name != "logprob"):
            return logits[spec.part(logits.numel())]
        if spec.name == "logprob":
            return (logits - torch.logsumexp(logits, 0))[spec.part(logits.numel())]
        assert target is not None
        if spec.name == "loss" and target.is_floating_point():
            return 0.5 * (logits - target.double().reshape(-1)).pow(2).sum().reshape(1)
        if target.numel() > 1:
            steps = logits.reshape(target.numel(), -1)
            if spec.name == "loss":
                return F.cross_entropy(steps, target.reshape(-1)).reshape(1)
            last = int((target.reshape(-1) >= 0).nonzero()[-1])
            return steps[last, int(target.reshape(-1)[last])].reshape(1)
        label = int(target)
        if spec.name == "next-token":
            return logits[label].reshape(1)
        if spec.name == "loss":
            return F.cross_entropy(logits[None], torch.tensor([label])).reshape(1)
        rest = torch.cat([logits[:label], logits[label + 1 :]])
        return (logits[label] - torch.logsumexp(rest, 0)).reshape(1)

    def gradient(self, scalar: Tensor) -> Tensor:
        """One Jacobian row (parameters,) float64."""
        parts = torch.autograd.grad(
            scalar, self.variables, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return torch.cat([part.reshape(-1) for part in parts])


def _doubled(samples: Samples) -> ModelBatch:
    """Samples in float64 on the CPU."""
    return ModelBatch(samples.args, samples.kwargs, samples.targets).to("cpu", "float64")
