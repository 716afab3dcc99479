"""Results of a kernel's algebra in its run directory: figures as JSON, arrays as ``.npz``, pictures beside them."""

from __future__ import annotations

import errno
import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ooc_ntk.errors import StorageError

from .atomic import write_whole
from .retries import storage_error


def write_result(
    root: Path, name: str, figures: Mapping[str, Any], arrays: Mapping[str, ArrayLike] | None = None
) -> Path:
    """Write a result, whole or not at all; what was there under its name is replaced, and pictures of it are deleted.

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
    for picture in (root / name).glob("*.png"):
        try:
            picture.unlink()
        except OSError as error:
            raise storage_error("deleting", picture, error) from error
    text = json.dumps(_plain(figures), indent=2) + "\n"
    write_whole(root, f"{name}/{name}.json", text.encode())
    return root / name


def check_writable(root: Path, name: str) -> None:
    """Refuse a folder that a result cannot be written to, before anything is computed.

    Args:
        root: run directory; one that is not there is not looked at.
        name: of the result.

    Raises:
        StorageError: if it cannot be written.
    """
    folder = root / name
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"results are written into the folder {folder}, and a file has its name; move it away")
    there = folder if folder.exists() else root
    if there.exists() and not os.access(there, os.W_OK | os.X_OK):
        raise storage_error("writing into", there, PermissionError(errno.EACCES, os.strerror(errno.EACCES)))


def results_bytes(root: Path) -> int:
    """Bytes of what was made of a finished run: its results' folders and its pages, none of which a run promises.

    Args:
        root: run directory.
    """
    pages = root.glob("*.html")
    folders = {found.parent for found in root.glob("*/*.json") if found.stem == found.parent.name}
    files = [*pages, *(path for folder in folders for path in folder.rglob("*"))]
    return sum(path.stat().st_size for path in files if path.is_file())


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
