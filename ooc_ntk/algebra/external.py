"""Features that other programs wrote: TRAK's and projection_ntk's memory maps, NumPy files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ooc_ntk.errors import InputError

from .errors import SketchShape
from .features import Features

#: First bytes of a NumPy file, whatever it is called: TRAK writes its ``.mmap`` files with this header.
_NUMPY_MAGIC: Final = b"\x93NUMPY"


def external_features(
    path: Path,
    parameters: int | None,
    *,
    dim: int | None = None,
    outputs: int = 1,
    dtype: str = "float32",
    train: int | None = None,
    samples: int | None = None,
    label: str = "",
) -> Features:
    """Map features that another program wrote, and bring them to the exact kernel's scale.

    TRAK multiplies with signs that are not divided by ``√k``, and divides by ``√P``: its store gives ``(k/P)·K``, so
    that the features are multiplied by ``√(P/k)``.

    Args:
        path: a NumPy file of any name, or a raw file.
        parameters: number of parameters (P) of the model; None if the store is on the exact scale already.
        dim: columns of the features; needed for a raw file.
        outputs: Jacobian rows per sample; of a three-dimensional NumPy file its second axis.
        dtype: of a raw file.
        train: train samples, the first ones; None for all.
        samples: expected number of samples, checked.
        label: what sets of features of the same projection have in common, so that they may be multiplied.

    Returns:
        The features; nothing is read yet.

    Raises:
        InputError: if the file is not there, or its size does not match.
    """
    if not path.is_file():
        raise InputError(f"there is no file of features {path}")
    for name, value in (("dim", dim), ("outputs", outputs)):
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    found = _mapped(path, dim, outputs, dtype)
    if found.ndim == 3:
        outputs = found.shape[1]
        found = found.reshape(-1, found.shape[2])
    if found.ndim != 2 or not found.size:
        raise InputError(f"{path} holds an array of shape {found.shape}; features are (samples, [outputs,] dim)")
    if found.dtype.kind != "f":
        raise InputError(f"{path} holds {found.dtype}; features are float16, float32 or float64")
    rows, width = found.shape
    if dim is not None and width != dim:
        raise InputError(f"{path} has {width:,} columns, expected are dim={dim:,}")
    if rows % outputs:
        raise InputError(f"{path} has {rows:,} rows, which is no multiple of outputs={outputs}")
    count = rows // outputs
    if samples is not None and count != samples:
        raise InputError(f"{path} holds {count:,} samples of {outputs} × {width:,}, expected are {samples:,}")
    if parameters is not None and parameters < 1:
        raise InputError(f"parameters must be the number of the model's parameters, got {parameters}")
    if train is not None and not 1 <= train <= count:
        raise InputError(f"train must be from 1 to the {count:,} samples of {path}, got {train}")
    return Features(
        array=found,
        outputs=outputs,
        train_samples=count if train is None else train,
        test_samples=0 if train is None else count - train,
        shape=SketchShape(width),
        factor=1.0 if parameters is None else (parameters / width) ** 0.5,
        sketch=f"label {label}" if label else "",
        name=str(path),
    )


def _mapped(path: Path, dim: int | None, outputs: int, dtype: str) -> NDArray[Any]:
    """A memory map of a NumPy file or a raw one."""
    with path.open("rb") as file:
        numpy_file = file.read(len(_NUMPY_MAGIC)) == _NUMPY_MAGIC
    size = path.stat().st_size
    if numpy_file:
        try:
            return np.asanyarray(np.load(path, mmap_mode="r", allow_pickle=False))
        except (ValueError, OSError) as error:
            raise InputError(f"{path} is a damaged NumPy file of {size:,} bytes: {error}") from error
    if dim is None:
        raise InputError(f"{path} is a raw file of {size:,} bytes; say how many columns it has: dim=...")
    try:
        kind = np.dtype(dtype)
    except TypeError as error:
        raise InputError(f"dtype {dtype!r} is not known; raw features are float16, float32 or float64") from error
    row = dim * outputs * kind.itemsize
    if size == 0 or size % row:
        raise InputError(
            f"{path} has {size:,} bytes, which is no multiple of a sample's {row:,} bytes ({outputs} × {dim:,} "
            f"{kind}); check dim, outputs and dtype"
        )
    return np.memmap(path, dtype=kind, mode="r", shape=(size // (dim * kind.itemsize), dim))
