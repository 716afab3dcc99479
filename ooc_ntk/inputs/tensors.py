"""Values that users hold (arrays, numbers, tensors) as CPU tensors, and batches as :class:`Samples`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from ooc_ntk.errors import InputError

from .source import Samples

#: Keys of a dict that hold the targets; every other key goes to the model by that name.
LABEL_KEYS: Final = ("labels", "label", "target", "targets")

#: Unsigned types that torch can hold but hardly compute with, and the signed type that holds all their values.
_WIDENED: Final = {torch.uint16: torch.int32, torch.uint32: torch.int64}
_WIDENED_NUMPY: Final[dict[np.dtype[np.generic], np.dtype[np.generic]]] = {
    np.dtype(np.uint16): np.dtype(np.int32),
    np.dtype(np.uint32): np.dtype(np.int64),
}


def check_dtype(dtype: np.dtype[np.generic], where: str) -> None:
    """Refuse array dtypes that no tensor can hold.

    Args:
        dtype: dtype of the array.
        where: what it is, for the message.

    Raises:
        InputError: for objects, text, dates, records and numbers wider than torch has.
    """
    if dtype.kind == "O":
        raise InputError(
            f"{where} holds Python objects (dtype object), not numbers; usually its rows have different lengths: "
            "pad them to one shape, or pass a Dataset with collate"
        )
    plain = dtype.newbyteorder("=")
    if dtype.kind not in "biufc" or plain in (np.dtype(np.uint64), np.dtype(np.longdouble), np.dtype(np.clongdouble)):
        raise InputError(
            f"{where} has dtype {dtype}, which torch cannot use; convert it to a floating or signed integer dtype first"
        )


def array_tensor(array: npt.NDArray[np.generic], where: str) -> torch.Tensor:
    """Turn an array into a tensor of the same values.

    Args:
        array: any shape; big-endian is swapped, uint16 and uint32 are widened to int32 and int64, and an array
            that is not writeable, is a memory map or has negative strides is copied.
        where: what it is, for messages.

    Returns:
        The tensor; it shares memory with the array where nothing had to be changed.

    Raises:
        InputError: for a dtype that torch cannot use.
    """
    check_dtype(array.dtype, where)
    native = array.dtype.newbyteorder("=")
    plain = _WIDENED_NUMPY.get(native, native)
    if plain != array.dtype:
        array = array.astype(plain)
    mapped = isinstance(array, np.memmap) or isinstance(array.base, np.memmap)
    if mapped or not array.flags.writeable or any(stride < 0 or stride % array.itemsize for stride in array.strides):
        array = np.array(array, copy=True, subok=False)
    return torch.from_numpy(np.asarray(array))


def check_tensor(tensor: torch.Tensor, where: str) -> None:
    """Refuse tensors without plain numbers.

    Args:
        tensor: any shape, dtype and device.
        where: what it is, for the message.

    Raises:
        InputError: for sparse, quantised, nested or meta tensors and for uint64.
    """
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested or tensor.device.type == "meta":
        raise InputError(
            f"{where} is a {tensor.layout} tensor on {tensor.device}, got dtype {tensor.dtype}; "
            "only dense tensors with values can be samples: call .to_dense() or .dequantize() first"
        )
    if tensor.dtype == torch.uint64:
        raise InputError(f"{where} has dtype torch.uint64, which torch cannot compute with; convert it to int64 first")


def plain_tensor(tensor: torch.Tensor, where: str) -> torch.Tensor:
    """Detach a tensor and bring it to the CPU.

    Args:
        tensor: any shape, dtype and device.
        where: what it is, for messages.

    Returns:
        The tensor on the CPU; uint16 and uint32 widened as for arrays.

    Raises:
        InputError: as :func:`check_tensor`.
    """
    check_tensor(tensor, where)
    return tensor.detach().cpu().to(_WIDENED.get(tensor.dtype, tensor.dtype))


def is_number(value: object) -> bool:
    """Whether a value is one Python or NumPy number."""
    return isinstance(value, bool | int | float | complex | np.generic)


def is_array(value: object) -> bool:
    """Whether a value is a tensor or an array (NumPy, zarr, or anything with ``shape``, ``dtype`` and rows)."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return True
    return all(hasattr(value, name) for name in ("shape", "dtype", "__getitem__")) and not is_number(value)


def value_tensor(value: object, where: str) -> torch.Tensor:
    """Turn one value of a sample into a tensor.

    Args:
        value: a tensor, an array or a number; Python floats become float32 and ints int64, NumPy scalars keep theirs.
        where: what it is, for messages.

    Returns:
        The tensor on the CPU, any shape.

    Raises:
        InputError: for anything else (images, text, objects).
    """
    if isinstance(value, torch.Tensor):
        return plain_tensor(value, where)
    if isinstance(value, np.ndarray | np.generic):
        return array_tensor(np.asarray(value), where)
    if isinstance(value, bool):
        return torch.tensor(value, dtype=torch.bool)
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise InputError(f"{where} is {value}, beyond the range of int64")
        return torch.tensor(value, dtype=torch.int64)
    if isinstance(value, float):
        return torch.tensor(value, dtype=torch.float32)
    if is_array(value):
        return array_tensor(np.asarray(value), where)
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if kind.startswith("PIL."):
        raise InputError(
            f"{where} is an image ({kind}), not a tensor; add a transform that makes one, "
            "for example transform=torchvision.transforms.ToTensor()"
        )
    raise InputError(
        f"{where} is of type {kind.removeprefix('builtins.')}, not a tensor, array or number; add a transform to the "
        "data set that turns it into a tensor, or give collate"
    )


def split_labels(mapping: Mapping[str, object], where: str) -> tuple[dict[str, object], object | None]:
    """Split a dict of data into model inputs by keyword and targets.

    Args:
        mapping: values by name.
        where: what it is, for messages.

    Returns:
        The inputs by name, and the targets or None.

    Raises:
        InputError: for names that are no text, two names for the targets, or no input at all.
    """
    if not all(isinstance(key, str) for key in mapping):
        raise InputError(f"{where}: the keys of a dict are keyword names of the model, got {list(mapping)!r}")
    labels = [key for key in LABEL_KEYS if key in mapping]
    if len(labels) > 1:
        raise InputError(f"{where} has {' and '.join(map(repr, labels))}, all names for the targets; keep one of them")
    inputs = {key: value for key, value in mapping.items() if key not in labels}
    if not inputs:
        raise InputError(f"{where} has no model inputs, only {list(mapping)!r}; a dict holds inputs by keyword")
    return inputs, mapping[labels[0]] if labels else None


def split_item(item: object, where: str) -> tuple[tuple[object, ...], dict[str, object], object | None]:
    """Split a sample or a batch into positional inputs, keyword inputs and targets.

    Args:
        item: ``x``, ``(x, y)`` or a dict with label keys; ``x`` may be a tuple of inputs or a dict.
        where: what it is, for messages.

    Returns:
        Positional inputs, keyword inputs, targets or None.

    Raises:
        InputError: for tuples of other lengths, or an empty sample.
    """
    if isinstance(item, Mapping):
        inputs, target = split_labels(item, where)
        return (), inputs, target
    if not isinstance(item, tuple | list):
        return (item,), {}, None
    if len(item) not in (1, 2):
        raise InputError(
            f"{where} is a {type(item).__name__} of {len(item)} values; only x or (x, y) is understood: give "
            "collate=..., a function from a list of samples to (inputs, targets), inputs being a tuple or a dict"
        )
    x, y = item[0], item[1] if len(item) == 2 else None
    if isinstance(x, Mapping):
        if not x or not all(isinstance(key, str) for key in x):
            raise InputError(f"{where}: the keys of a dict are keyword names of the model, got {list(x)!r}")
        return (), dict(x), y
    if isinstance(x, tuple | list):
        if not x:
            raise InputError(f"{where} has no model inputs: its first value is an empty {type(x).__name__}")
        return tuple(x), {}, y
    return (x,), {}, y


def item_samples(item: object, where: str) -> Samples:
    """Turn a sample or a batch, in any form of :func:`split_item`, into tensors.

    Args:
        item: the sample or batch.
        where: what it is, for messages.

    Returns:
        Its tensors; for one sample they have no leading sample dimension yet.

    Raises:
        InputError: for forms or values that are not understood.
    """
    args, kwargs, target = split_item(item, where)
    return Samples(
        tuple(value_tensor(value, f"{where}, input {position}") for position, value in enumerate(args)),
        {key: value_tensor(value, f"{where}, input {key!r}") for key, value in kwargs.items()},
        None if target is None else value_tensor(target, f"{where}, target"),
    )
