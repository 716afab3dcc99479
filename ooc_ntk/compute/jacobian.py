"""Jacobian rows by torch.func: the general path, right for every model, one method per strategy."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from .contract import TORCH_DTYPE
from .outputs import OutputRows

if TYPE_CHECKING:
    from .structure import Structure


@dataclass(frozen=True)
class ModelBatch:
    """One batch of samples on the plan's device, floating-point inputs in the plan's dtype.

    Attributes:
        args: positional model inputs, each (samples, ...).
        kwargs: keyword model inputs, each (samples, ...).
        targets: (samples, ...) or None.
    """

    args: tuple[Tensor, ...]
    kwargs: Mapping[str, Tensor]
    targets: Tensor | None

    def __len__(self) -> int:
        return next(iter((*self.args, *self.kwargs.values()))).shape[0]

    def sample(self, index: int) -> ModelBatch:
        """The batch of sample ``index`` alone."""
        chosen = slice(index, index + 1)
        return ModelBatch(
            tuple(value[chosen] for value in self.args),
            {name: value[chosen] for name, value in self.kwargs.items()},
            None if self.targets is None else self.targets[chosen],
        )

    def to(self, device: str, precision: str) -> ModelBatch:
        """Move to a device and cast floating-point inputs; targets keep their dtype."""
        return self._placed(device, TORCH_DTYPE[precision])

    def placed_as(self, like: Tensor) -> ModelBatch:
        """Move to where a tensor is and cast floating-point inputs to its dtype, if it has a floating-point one."""
        return self._placed(like.device, like.dtype if like.is_floating_point() else torch.get_default_dtype())

    def _placed(self, device: str | torch.device, dtype: torch.dtype) -> ModelBatch:

        def move(value: Tensor) -> Tensor:
            return value.to(device, dtype if value.is_floating_point() else value.dtype)

        return ModelBatch(
            tuple(move(value) for value in self.args),
            {name: move(value) for name, value in self.kwargs.items()},
            None if self.targets is None else self.targets.to(device),
        )


class ModelFunction:
    """A module as a function of chosen parameters, without changing the module itself.

    Attributes:
        names: chosen parameter names, in column order.
        sizes: number of scalars of each.
        rows: which Jacobian rows are wanted.
        structure: what layer rules cover, once it has been found and checked.
    """

    def __init__(
        self,
        module: nn.Module,
        names: Sequence[str],
        rows: OutputRows,
        precision: str,
        device: str,
        shared: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Take the module's state as it is now, on ``device`` in ``precision`` (shared where nothing has to change).

        ``shared`` holds parameters that are there already, on the device in that precision, by name.
        """
        known = shared or {}
        dtype = TORCH_DTYPE[precision]
        self.module = module
        self.names = tuple(names)
        self.rows = rows
        self.structure: Structure | None = None

        def move(value: Tensor) -> Tensor:
            return value.detach().to(device, dtype if value.is_floating_point() else value.dtype)

        self.parameters = {
            name: known[name] if name in known and known[name].shape == value.shape else move(value)
            for name, value in module.named_parameters()
        }
        # Copies: some layers change theirs in the forward pass (instance norm with running statistics).
        self.buffers = {name: move(value).clone() for name, value in module.named_buffers()}
        self.sizes = {name: self.parameters[name].numel() for name in self.names}

    @property
    def state_bytes(self) -> int:
        """Bytes of parameters and buffers."""
        values = (*self.parameters.values(), *self.buffers.values())
        return sum(value.numel() * value.element_size() for value in values)

    def logits(self, parameters: Mapping[str, Tensor], batch: ModelBatch) -> Tensor:
        """Model outputs (samples, outputs) of a batch with some parameters replaced."""
        return self.rows.model_output(self.returned(parameters, batch))

    def returned(self, parameters: Mapping[str, Tensor], batch: ModelBatch) -> object:
        """What the model returns for a batch, as it is, with some parameters replaced."""
        state = {**self.parameters, **self.buffers, **parameters}
        found: object = functional_call(self.module, state, batch.args, dict(batch.kwargs))
        return found


@contextmanager
def plain_layers() -> Iterator[None]:
    """Switch off what autograd and vmap cannot see through: the fused path of transformer layers."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class JacobianMethod(ABC):
    """A way to derive Jacobian rows. Both methods give the same numbers, up to rounding.

    Attributes:
        name: as plans call it.
    """

    name: str

    def __init__(self, function: ModelFunction) -> None:
        """Derive rows of ``function``."""
        self.function = function

    @abstractmethod
    def derive(
        self, batch: ModelBatch, names: Sequence[str], wanted: Sequence[slice] | None = None, gather: int = 1
    ) -> Iterator[list[Tensor]]:
        """Derive every Jacobian row of a batch, for the named parameters.

        Args:
            batch: samples on the plan's device.
            names: parameter names in column order, a subset of the function's.
            wanted: the columns wanted of each parameter; None for all.
            gather: rows wanted per group, where the method derives them one by one.

        Yields:
            Consecutive groups of rows, sample by sample and output by output within a sample. A group is a list with
            one (rows, wanted columns) tensor per name, on the plan's device, valid until the next group is asked for.
        """


class LoopJacobian(JacobianMethod):
    """One sample at a time, one reverse pass per row: no per-sample copies of weights, small memory, any model."""

    name = "loop"

    def derive(
        self, batch: ModelBatch, names: Sequence[str], wanted: Sequence[slice] | None = None, gather: int = 1
    ) -> Iterator[list[Tensor]]:
        """See :meth:`JacobianMethod.derive`."""
        wanted = wanted or [slice(0, self.function.sizes[name]) for name in names]
        if gather == 1:
            for row in self._rows(batch, names):
                yield [gradient.reshape(1, -1)[:, part] for gradient, part in zip(row, wanted, strict=True)]
            return
        like = next(iter(self.function.parameters.values()))
        buffers = [like.new_empty(gather, part.stop - part.start) for part in wanted]
        count = 0
        for row in self._rows(batch, names):
            for buffer, gradient, part in zip(buffers, row, wanted, strict=True):
                buffer[count].copy_(gradient.reshape(-1)[part])
            count += 1
            if count == gather:
                yield buffers
                count = 0
        if count:
            yield [buffer[:count] for buffer in buffers]

    def some_rows(self, batch: ModelBatch, names: Sequence[str], chosen: Sequence[int]) -> Iterator[Sequence[Tensor]]:
        """Yield the gradients of chosen rows of every sample, in the shapes of the parameters."""
        return self._rows(batch, names, chosen)

    def _rows(
        self, batch: ModelBatch, names: Sequence[str], chosen: Sequence[int] | None = None
    ) -> Iterator[Sequence[Tensor]]:
        """Yield the gradients of every row, or of chosen ones, in the shapes of the parameters."""
        function = self.function
        leaves = {name: function.parameters[name].detach().requires_grad_() for name in names}
        variables = list(leaves.values())
        for index in range(len(batch)):
            one = batch.sample(index)
            with torch.enable_grad(), plain_layers():
                logits = function.logits(leaves, one)
            function.rows.check_labels(one.targets, logits.shape[1])
            target = None if one.targets is None else one.targets[0]
            cotangents = function.rows.cotangents(logits[0].detach(), target)
            wanted = range(cotangents.shape[0]) if chosen is None else chosen
            for row in wanted:
                if not logits.requires_grad:
                    yield [torch.zeros_like(leaf) for leaf in variables]
                    continue
                # A scalar: torch imports a computer algebra system to check the shape of a given gradient (0.4 s).
                with torch.enable_grad():
                    weighted = (logits[0] * cotangents[row]).sum()
                yield torch.autograd.grad(
                    weighted,
                    variables,
                    retain_graph=row != wanted[-1],
                    allow_unused=True,
                    materialize_grads=True,
                )


class VmapJacobian(JacobianMethod):
    """All samples of a batch at once: ``vmap`` over samples of the reverse pass, ``vmap`` over its cotangents."""

    name = "vmap"

    def derive(
        self,
        batch: ModelBatch,
        names: Sequence[str],
        wanted: Sequence[slice] | None = None,
        gather: int = 1,  # noqa: ARG002
    ) -> Iterator[list[Tensor]]:
        """See :meth:`JacobianMethod.derive`; one group holds the whole batch."""
        wanted = wanted or [slice(None)] * len(names)
        function = self.function
        chosen = {name: function.parameters[name] for name in names}
        widths: list[int] = []

        def one_sample(
            args: tuple[Tensor, ...], kwargs: dict[str, Tensor], target: Tensor | None
        ) -> tuple[Tensor, ...]:
            single = ModelBatch(
                tuple(value.unsqueeze(0) for value in args),
                {name: value.unsqueeze(0) for name, value in kwargs.items()},
                None,
            )
            logits, pull, *_ = vjp(lambda parameters: function.logits(parameters, single)[0], chosen)
            widths.append(logits.shape[0])
            cotangents = function.rows.cotangents(logits, target)
            (gradients,) = vmap(pull)(cotangents)
            return tuple(gradients[name].flatten(1) for name in names)

        axes = (0, 0, None if batch.targets is None else 0)
        with plain_layers(), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            # That an operation is looped over instead of batched: the probe has timed it.
            warnings.filterwarnings("ignore", message="There is a performance drop")
            stacked = vmap(one_sample, in_dims=axes)(batch.args, dict(batch.kwargs), batch.targets)
        function.rows.check_labels(batch.targets, widths[0])
        yield [gradient.flatten(0, 1)[:, part] for gradient, part in zip(stacked, wanted, strict=True)]


METHODS: dict[str, type[JacobianMethod]] = {"loop": LoopJacobian, "vmap": VmapJacobian}
