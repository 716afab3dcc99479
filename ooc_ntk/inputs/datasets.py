"""Sources over map-style torch Datasets: samples are read one by one and stacked, or handed to ``collate``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from ooc_ntk.errors import InputError

from .source import Samples, SampleSource
from .tensors import item_samples

#: From a list of samples to a batch: x, (x, y) or a dict, the leading dimension counting the samples.
Collate = Callable[[list[object]], object]


class MapDataset(Protocol):
    """What a map-style Dataset has."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> object: ...


class DatasetSource(SampleSource):
    """Samples of a Dataset.

    Args:
        dataset: anything with ``len()`` and ``dataset[number]``; a sample is ``x``, ``(x, y)`` or a dict.
        collate: makes a batch of a list of samples; None stacks them.
        what: name of the data set, for messages.

    Raises:
        InputError: if the data set is empty or its first sample cannot be used.
    """

    def __init__(self, dataset: MapDataset, collate: Collate | None = None, what: str = "train") -> None:
        self._dataset = dataset
        self._collate = collate
        self._what = what
        self._count = len(dataset)
        if self._count == 0:
            raise InputError(
                f"{what} data is empty: {type(dataset).__name__} has length 0; at least 1 sample is needed"
            )
        # Sample 0 sets the layout that every other sample is held to, in whatever range it is read.
        self._first = None if collate else _layout(item_samples(self._item(0), f"{what} sample 0"))

    def __len__(self) -> int:
        return self._count

    def _item(self, number: int) -> object:
        """Read one sample, naming it if the user's code fails."""
        try:
            return self._dataset[number]
        except Exception as error:
            raise InputError(
                f"{self._what} sample {number} cannot be read: {type(self._dataset).__name__}[{number}] raised "
                f"{type(error).__name__}: {error}"
            ) from error

    def _read(self, start: int, stop: int) -> Samples:
        if self._collate is not None:
            return self._collated(start, stop)
        singles = []
        for number in range(start, stop):
            where = f"{self._what} sample {number}"
            single = item_samples(self._item(number), where)
            self._check(single, where)
            singles.append(single)
        return stack_samples(singles)

    def _check(self, single: Samples, where: str) -> None:
        """Hold one sample to the layout of sample 0."""
        layout = _layout(single)
        if layout == self._first or self._first is None:
            return
        if layout.keys() != self._first.keys():
            raise InputError(f"{where} has {', '.join(layout)}, but sample 0 has {', '.join(self._first)}")
        for name, (shape, dtype) in layout.items():
            first_shape, first_dtype = self._first[name]
            if shape != first_shape:
                raise InputError(
                    f"{where}: {name} has shape {shape}, but that of sample 0 has shape {first_shape}; "
                    "all samples need one shape: resize or pad them, or give collate"
                )
            if dtype != first_dtype:
                raise InputError(
                    f"{where}: {name} has dtype {dtype}, but that of sample 0 has {first_dtype}; make them the same"
                )

    def _collated(self, start: int, stop: int) -> Samples:
        """Read a range through the user's collate function."""
        assert self._collate is not None
        items = [self._item(number) for number in range(start, stop)]
        where = f"{self._what} samples {start} to {stop - 1}, collated"
        try:
            batch = self._collate(items)
        except Exception as error:
            raise InputError(
                f"{where}: collate raised {type(error).__name__} on a list of {len(items)} samples: {error}"
            ) from error
        samples = item_samples(batch, where)
        for name, tensor in samples.named():
            if tensor.ndim == 0 or tensor.shape[0] != len(items):
                raise InputError(
                    f"{where}: {name} has shape {tuple(tensor.shape)} for {len(items)} samples; collate must return "
                    "tensors whose first dimension counts the samples"
                )
        return samples


def _layout(single: Samples) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor of one sample, by name."""
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in single.named()}


def stack_samples(singles: Sequence[Samples]) -> Samples:
    """Stack single samples of one layout.

    Args:
        singles: at least one sample; tensors without a sample dimension.

    Returns:
        All of them, with the sample dimension first.
    """
    first = singles[0]
    targets = [single.targets for single in singles if single.targets is not None]
    return Samples(
        tuple(torch.stack([single.args[position] for single in singles]) for position in range(len(first.args))),
        {key: torch.stack([single.kwargs[key] for single in singles]) for key in first.kwargs},
        torch.stack(targets) if targets else None,
    )
