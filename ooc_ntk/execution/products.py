"""``J(Jᵀv)`` without a Jacobian: reverse sweeps over some samples, forward sweeps over others."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import forward_ad

from ooc_ntk.algebra.features import Features
from ooc_ntk.compute.jacobian import ModelBatch
from ooc_ntk.planning.plan import Plan

from .reference import Reference

logger = logging.getLogger(__name__)

#: What ``⟨g, w⟩`` by another form may differ by from the plain gradient's, over both norms, on the sample on which the
#: form is tried (a choice, far above the rounding of float64).
SAME_PRODUCT: Final = 1e-9

#: Bytes of the directions that share one reading of the data (a choice: a network of a million parameters takes 33 of
#: them at once).
DIRECTION_BYTES: Final = 2**28

#: Bytes of features that are read at a time.
PANEL_BYTES: Final = 2**25

#: A direction in the space of parameters, one tensor each.
Direction = Sequence[Tensor]

#: ``J w`` of a batch for some directions w: (samples, rows) each.
Form = Callable[[Reference, ModelBatch, Sequence[Direction]], list[Tensor]]


class _Sweep(NamedTuple):
    """What one direction stands for: one output (None is all of them), and one probe vector."""

    output: int | None
    vector: int


class JacobianProducts:
    """Products of the exact kernel with vectors, by reverse and forward sweeps of a float64 model.

    A trace is a sum over outputs, each with a direction of its own; a few directions are held at a time, so that
    memory does not grow with the outputs.
    """

    def __init__(self, reference: Reference, plan: Plan, batch: int, held: int, *, quick: bool = False) -> None:
        """Prepare sweeps.

        Args:
            reference: the model.
            plan: the plan, for the kind of kernel.
            batch: samples per batch.
            held: directions held at a time.
            quick: whether only a few samples come, for which forward mode is not worth being loaded.
        """
        self._reference, self._plan, self._batch, self._held = reference, plan, batch, max(1, held)
        self._forms: list[Form] = [by_double_backward, by_forward_mode] if quick else [by_forward_mode]
        self._forms += [] if quick else [by_double_backward]
        self._form: Form | None = None

    def sweeps(self, vectors: int) -> int:
        """Reverse sweeps over the columns, and forward sweeps over the rows, that so many vectors take."""
        return vectors * (self._plan.outputs if self._by_output else 1)

    @property
    def _by_output(self) -> bool:
        return self._plan.kernel == "trace"

    def __call__(
        self, rows: NDArray[np.int64], columns: NDArray[np.int64], vectors: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Multiply, scaled as the kernel is, before normalisation.

        Args:
            rows: samples, ascending.
            columns: train samples, ascending.
            vectors: (columns, entries per sample, vectors).

        Returns:
            (rows, entries per sample, vectors).
        """
        found = np.zeros((len(rows), *vectors.shape[1:]))
        outputs = list(range(self._plan.outputs)) if self._by_output else [None]
        every = [_Sweep(output, vector) for output in outputs for vector in range(vectors.shape[2])]
        for start in range(0, len(every), self._held):
            group = every[start : start + self._held]
            directions = self.pulled(columns, vectors, group)
            self._push(rows, directions, group, found)
            del directions
        return found / self._plan.outputs if self._plan.scale == "mean" else found

    def pulled(
        self, columns: NDArray[np.int64], vectors: NDArray[np.float64], group: Sequence[tuple[int | None, int]]
    ) -> list[list[Tensor]]:
        """``Jᵀv`` by one backward pass per batch and direction.

        Args:
            columns: samples, ascending.
            vectors: (columns, rows per sample, vectors); one row per sample where a direction is of one output.
            group: output, or None for all, and vector of every direction.

        Returns:
            A direction each.
        """
        variables = self._reference.variables
        sums = [[torch.zeros_like(variable, requires_grad=False) for variable in variables] for _ in group]
        for where, batch in self._reference.batches(columns, self._batch):
            values = self._reference.values(batch)
            some = torch.from_numpy(vectors[where])
            if not values.requires_grad:
                continue
            for number, (output, vector) in enumerate(group):
                weighted = values * some[:, :, vector] if output is None else values[:, output] * some[:, 0, vector]
                more = number + 1 < len(group)
                parts = torch.autograd.grad(weighted.sum(), variables, retain_graph=more, allow_unused=True)
                for total, part in zip(sums[number], parts, strict=True):
                    if part is not None:
                        total.add_(part)
        return sums

    def _push(
        self,
        rows: NDArray[np.int64],
        directions: Sequence[Direction],
        group: Sequence[_Sweep],
        found: NDArray[np.float64],
    ) -> None:
        """Add ``J w`` of the samples' rows."""
        for where, batch in self._reference.batches(rows, self._batch):
            if self._form is None:
                self._form = self._chosen(batch.sample(0), directions[0])
            for (output, vector), image in zip(group, self._form(self._reference, batch, directions), strict=True):
                wanted = image if output is None else image[:, output : output + 1]
                found[where, :, vector] += wanted.numpy()

    def _chosen(self, sample: ModelBatch, direction: Direction) -> Form:
        """The first form that agrees with the plain gradient of one sample, which needs no trust."""
        reference = self._reference
        weights = torch.linspace(1.0, 2.0, 7, dtype=torch.float64)
        values = reference.values(sample)
        weights = weights[torch.arange(values.numel()) % len(weights)].reshape(values.shape)
        if not values.requires_grad:
            return by_gradients
        parts = torch.autograd.grad((values * weights).sum(), reference.variables, allow_unused=True)
        pairs = [(part, there) for part, there in zip(parts, direction, strict=True) if part is not None]
        expected = sum(float((part * there).sum()) for part, there in pairs)
        scale = sum(float(part.square().sum()) for part, _ in pairs) ** 0.5
        scale *= sum(float(there.square().sum()) for there in direction) ** 0.5
        del values, parts, pairs
        for form in self._forms:
            try:
                found = float((form(reference, sample, [direction])[0] * weights).sum())
            except Exception as error:  # noqa: BLE001 - whatever operation is not differentiable that way, another form is
                logger.debug("%s: %s", form.__name__, error)
                continue
            if abs(found - expected) <= SAME_PRODUCT * scale:
                return form
            logger.debug("%s gives %g, the plain gradient %g", form.__name__, found, expected)
        return by_gradients


def by_forward_mode(reference: Reference, batch: ModelBatch, directions: Sequence[Direction]) -> list[Tensor]:
    """``J w`` of a batch by forward-mode differentiation: nothing is saved."""
    found = []
    for direction in directions:
        with torch.no_grad(), forward_ad.dual_level():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # torch loads scripts of its own the first time
                pairs = zip(reference.names, reference.variables, direction, strict=True)
                state = {name: _dual(variable.detach(), there) for name, variable, there in pairs}
            values, image = forward_ad.unpack_dual(reference.values(batch, state, graph=False))  # type: ignore[no-untyped-call]
            found.append(torch.zeros_like(values) if image is None else image.clone())
    return found


def _dual(value: Tensor, tangent: Tensor) -> Tensor:
    made: Tensor = forward_ad.make_dual(value, tangent)  # type: ignore[no-untyped-call]
    return made


def by_double_backward(reference: Reference, batch: ModelBatch, directions: Sequence[Direction]) -> list[Tensor]:
    """``J w`` of a batch as the derivative of ``⟨Jᵀu, w⟩`` by u."""
    values = reference.values(batch)
    free = torch.zeros_like(values, requires_grad=True)
    parts = torch.autograd.grad(values, reference.variables, free, create_graph=True, allow_unused=True)
    found = []
    for number, direction in enumerate(directions):
        pairs = [(p, there) for p, there in zip(parts, direction, strict=True) if p is not None and p.requires_grad]
        images = torch.autograd.grad(
            [part for part, _ in pairs],
            free,
            [there for _, there in pairs],
            retain_graph=number + 1 < len(directions),
            materialize_grads=True,
        )
        found.append(images[0].detach())
    return found


def by_gradients(reference: Reference, batch: ModelBatch, directions: Sequence[Direction]) -> list[Tensor]:
    """``J w`` of a batch row by row, for operations that are differentiable only once."""
    found = [torch.zeros(0) for _ in directions]
    for place in range(len(batch)):
        values = reference.values(batch.sample(place))
        for row in range(values.shape[1]):
            if place == row == 0:
                found = [torch.zeros((len(batch), values.shape[1]), dtype=values.dtype) for _ in directions]
            if not values.requires_grad:
                continue
            parts = torch.autograd.grad(values[0, row], reference.variables, retain_graph=True, allow_unused=True)
            for image, direction in zip(found, directions, strict=True):
                pairs = zip(parts, direction, strict=True)
                image[place, row] = sum(float((part * there).sum()) for part, there in pairs if part is not None)
    return found


class FeatureProducts:
    """Products of the kernel that features stand for with vectors: ``Φ(Φᵀv)``, read panel by panel."""

    def __init__(self, features: Features) -> None:
        """Take the features of a projected run."""
        self._features = features

    def __call__(
        self, rows: NDArray[np.int64], columns: NDArray[np.int64], vectors: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """See :meth:`JacobianProducts.__call__`."""
        features, full = self._features, self._features.full
        inner = np.zeros((1 if full else features.outputs, features.dim, vectors.shape[2]))
        for where in self._panels(len(columns)):
            panel = features.read(columns[where]).astype(np.float64)
            if full:
                inner[0] += np.einsum("ncd,nck->dk", panel, vectors[where], optimize=True)
            else:
                inner += np.einsum("ncd,nk->cdk", panel, vectors[where][:, 0], optimize=True)
        found = np.zeros((len(rows), *vectors.shape[1:]))
        for where in self._panels(len(rows)):
            panel = features.read(rows[where]).astype(np.float64)
            if full:
                found[where] = np.einsum("ncd,dk->nck", panel, inner[0], optimize=True)
            else:
                found[where, 0] = np.einsum("ncd,cdk->nk", panel, inner, optimize=True)
        return found / features.divisor

    def combined(self, samples: NDArray[np.int64], weights: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
        """A weighted sum of features, and the root of the sum of the squares that went into it.

        Args:
            samples: ascending.
            weights: (samples, outputs).

        Returns:
            Both (dim,).
        """
        features = self._features
        total, squares = np.zeros(features.dim), np.zeros(features.dim)
        for where in self._panels(len(samples)):
            panel = features.read(samples[where]).astype(np.float64) * weights[where][:, :, None]
            total += panel.sum((0, 1))
            squares += np.square(panel).sum((0, 1))
        return total, np.sqrt(squares)

    def _panels(self, samples: int) -> list[slice]:
        step = max(1, PANEL_BYTES // (8 * self._features.outputs * self._features.dim))
        return [slice(start, min(start + step, samples)) for start in range(0, samples, step)]


def directions_held(plan: Plan, room: int = DIRECTION_BYTES) -> int:
    """Directions that fit in some bytes, at least one."""
    return max(1, min(room, DIRECTION_BYTES) // (8 * max(1, plan.columns)))
