"""Targets that a person gives for the rows of a kernel: an array, or a NumPy file of one."""

from __future__ import annotations

from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ooc_ntk.errors import InputError, StorageError


def given_targets(given: str | Path | ArrayLike, shape: tuple[int, int]) -> NDArray[np.float64]:
    """Targets of the train rows, or of all rows, as float64.

    Args:
        given: an array, or a NumPy file (``.npy``) of one.
        shape: (rows, train rows) of the kernel.

    Returns:
        (train rows,) or (rows,), or with targets as a second axis; those of the test rows follow those of the train
        rows.

    Raises:
        InputError: if there is no such file or it is no NumPy file, or targets are no real numbers, of another length,
            or not finite.
        StorageError: if the file cannot be read.
    """
    values = _numbers(_read(given) if isinstance(given, str | Path) else given)
    rows, train = shape
    if values.ndim not in (1, 2) or len(values) not in (rows, train):
        both = "" if rows == train else f", or {rows:,} with those of the test rows"
        raise InputError(
            f"targets must have {train:,} rows, one per train row of the kernel{both}; got shape {values.shape}"
        )
    if not values.size:
        raise InputError(f"targets must have at least one column, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise InputError("the targets hold NaN or infinity")
    return values


def _read(path: str | Path) -> object:
    """What a file holds."""
    try:
        with Path(path).open("rb") as file:  # NumPy would leave it open where it is no archive
            found: object = np.load(file, allow_pickle=False)
    except FileNotFoundError as error:
        raise InputError(f"there is no file of targets {path}") from error
    except OSError as error:
        raise StorageError(f"cannot read the targets {path}: {error}") from error
    except (ValueError, EOFError, BadZipFile) as error:
        raise InputError(f"{path} is no NumPy file of numbers: {error}") from error
    if isinstance(found, np.lib.npyio.NpzFile):
        names = ", ".join(found.files)
        raise InputError(f"{path} is an archive of arrays ({names}); save the targets alone, as np.save('y.npy', y)")
    return found


def _numbers(given: object) -> NDArray[np.float64]:
    """Anything like an array as real numbers."""
    try:
        values = np.asarray(given)
        if np.iscomplexobj(values):
            raise TypeError("they are complex")
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"targets must be an array of numbers: {error}") from error
