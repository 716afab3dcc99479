"""Results of a kernel's algebra in its run directory: figures as JSON, arrays as ``.npz``, pictures beside them."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .atomic import write_whole


def write_result(
    root: Path, name: str, figures: Mapping[str, Any], arrays: Mapping[str, ArrayLike] | None = None
) -> Path:
    """Write a result, whole or not at all; what was there under its name is replaced.

    Args:
        root: run directory.
        name: of the result, its folder there.
        figures: numbers and text, in values that JSON has (NaN and infinity become null); NumPy scalars and small
            arrays are taken as well.
        arrays: larger arrays, for the ``.npz`` file.

    Returns:
        The folder.

    Raises:
        StorageError: if it cannot be written.
    """
    if arrays is not None:
        file = io.BytesIO()
        named: dict[str, Any] = {key: np.asarray(value) for key, value in arrays.items()}
        np.savez(file, **named)
        write_whole(root, f"{name}/{name}.npz", file.getvalue())
    text = json.dumps(_plain(figures), indent=2) + "\n"
    write_whole(root, f"{name}/{name}.json", text.encode())
    return root / name


def read_result(root: Path, name: str) -> dict[str, Any] | None:
    """Figures of a result, or None if there is none.

    Args:
        root: run directory.
        name: of the result.
    """
    try:
        found: dict[str, Any] = json.loads((root / name / f"{name}.json").read_text())
    except (OSError, ValueError):
        return None
    return found


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, np.bool_ | np.integer):
        return value.item()
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value
