"""``as_source``: whatever a user holds as data becomes a :class:`SampleSource`.

Live objects come here directly, texts go on to :mod:`ooc_ntk.inputs.specs`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Final, cast

import numpy as np
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from ooc_ntk.errors import InputError

from .arrays import ArraySource, Column, as_column
from .datasets import Collate, DatasetSource, MapDataset
from .source import Samples, SampleSource, SlicedSource, digest_samples
from .tensors import is_array, is_number, split_labels

__all__ = ["Collate", "SampleSource", "Samples", "SlicedSource", "as_source", "digest_samples"]

_ACCEPTED: Final = (
    "a map-style Dataset, a tensor, a NumPy or zarr array, (inputs, targets), a dict of arrays, or a data spec "
    "such as 'mnist5k[0:4000]'"
)


def as_source(data: object, *, collate: Collate | None = None, what: str = "train") -> SampleSource:
    """Make a source of samples from what the user gave.

    Args:
        data: a map-style Dataset (or a list of samples), a tensor, a NumPy or zarr array (read lazily), a tuple or
            list ``(inputs, targets)`` of arrays, where inputs may again be a tuple (positional) or a dict (keyword),
            a dict of arrays (passed to the model by keyword; ``labels``, ``label``, ``target`` or ``targets`` become
            the targets), a source, or a data spec.
        collate: from a list of samples to a batch; only for Datasets.
        what: name of the data set, for messages.

    Returns:
        The source; arrays are not copied and lazy ones are not read.

    Raises:
        InputError: for data that is empty, of unequal lengths or not understood.
    """
    if collate is not None and not callable(collate):
        raise InputError(f"collate must be a function from a list of samples to a batch, got {collate!r}")
    if isinstance(data, str | os.PathLike):
        from .specs import resolve_spec  # specs builds on this module

        return resolve_spec(os.fspath(data), what=what, collate=collate)
    if isinstance(data, SampleSource):
        _no_collate(collate, what, data)
        return data
    if isinstance(data, DataLoader):
        raise InputError(f"{what} is a DataLoader; pass the Dataset, not the DataLoader (its batches may be shuffled)")
    if isinstance(data, IterableDataset):
        raise InputError(f"{what} is an IterableDataset; samples are read by number: pass a map-style Dataset")
    if isinstance(data, Dataset) or _is_sample_list(data):
        return _dataset_source(cast("MapDataset", data), collate, what)
    source = _array_source(data, what)
    if source is not None:
        _no_collate(collate, what, data)
        return source
    if hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, tuple | Mapping | bytes):
        return _dataset_source(cast("MapDataset", data), collate, what)
    raise InputError(f"{what} is of type {type(data).__name__}, which cannot be read as data; pass {_ACCEPTED}")


def _no_collate(collate: Collate | None, what: str, data: object) -> None:
    """Refuse a collate function where there are no single samples to collate."""
    if collate is not None:
        raise InputError(
            f"collate works on the samples of a Dataset, but {what} is of type {type(data).__name__}; "
            "leave collate out or pass a Dataset"
        )


def _is_sample_list(data: object) -> bool:
    """Whether a list holds samples, and is not ``[inputs, targets]``."""
    if not isinstance(data, list) or not data:
        return False
    if all(is_number(value) for value in data):
        return False
    return not (len(data) == 2 and (is_array(data[0]) or is_array(data[1])))


def _dataset_source(dataset: MapDataset, collate: Collate | None, what: str) -> SampleSource:
    """Source of a Dataset; a TensorDataset is unwrapped to its tensors."""
    if not hasattr(dataset, "__len__"):
        raise InputError(f"{what}: {type(dataset).__name__} has no length; a Dataset needs __len__ and __getitem__")
    if type(dataset) is TensorDataset and collate is None:
        tensors = dataset.tensors
        if len(tensors) > 2:
            raise InputError(
                f"{what}: a sample of this TensorDataset is a tuple of {len(tensors)} values; only x or (x, y) is "
                "understood: give collate=..., or pass ((input, input), targets)"
            )
        return _pair_source(tensors[0], tensors[1] if len(tensors) == 2 else None, what)
    return DatasetSource(dataset, collate, what)


def _array_source(data: object, what: str) -> SampleSource | None:
    """Source of arrays in any arrangement; None if there are none."""
    if isinstance(data, Mapping):
        inputs, targets = split_labels(data, f"{what} data")
        return _pair_source(inputs, targets, what)
    if isinstance(data, tuple | list) and not (data and all(is_number(value) for value in data)):
        if len(data) == 0:
            raise InputError(f"{what} data is empty: got an empty {type(data).__name__}; at least 1 sample is needed")
        if len(data) > 2:
            raise InputError(
                f"{what} is a {type(data).__name__} of {len(data)} values; only (inputs, targets) is understood: for "
                "several model inputs pass ((input, input), targets) or a dict"
            )
        return _pair_source(data[0], data[1] if len(data) == 2 else None, what)
    if is_array(data) or isinstance(data, Column | tuple | list):
        return _pair_source(data, None, what)
    return None


def _pair_source(inputs: object, targets: object | None, what: str) -> ArraySource:
    """Source of inputs (one, a tuple of them, or by keyword) and targets."""
    for part in (inputs, targets):
        if isinstance(part, Dataset | DataLoader):
            raise InputError(
                f"{what} is a pair with a {type(part).__name__}; pass the Dataset alone, its samples being (x, y)"
            )
    args: tuple[Column, ...] = ()
    kwargs: dict[str, Column] = {}
    if isinstance(inputs, Mapping):
        kwargs = {str(key): as_column(value, f"{what} input {key!r}") for key, value in inputs.items()}
    elif isinstance(inputs, Sequence) and not isinstance(inputs, str) and any(is_array(value) for value in inputs):
        args = tuple(as_column(value, f"{what} input {position}") for position, value in enumerate(inputs))
    elif isinstance(inputs, list | tuple) and inputs and isinstance(inputs[0], list | tuple):
        args = (_nested_column(inputs, what),)
    else:
        args = (as_column(inputs, f"{what} inputs"),)
    return ArraySource(args, kwargs, None if targets is None else as_column(targets, f"{what} targets"), what)


def _nested_column(rows: Sequence[object], what: str) -> Column:
    """Column of nested Python lists."""
    try:
        array = np.asarray(rows)
    except ValueError as error:
        raise InputError(
            f"{what} inputs are nested lists of differing lengths ({error}); pad them to one shape, or use collate"
        ) from error
    return as_column(array.astype(np.float32) if array.dtype == np.float64 else array, f"{what} inputs")
