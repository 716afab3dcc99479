"""CIFAR-10 and CIFAR-100 from their original files: Python pickles, or the binary version."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from .catalog import ImageSet
from .layout import check_labels, damaged, find_folder, require
from .pickles import read_pickle

_SHAPE: Final = (3, 32, 32)
_PIXELS: Final = 3 * 32 * 32
#: Files of a split; the binary version has the same names with .bin.
_FILES: Final = {
    ("cifar10", "train"): tuple(f"data_batch_{number}" for number in range(1, 6)),
    ("cifar10", "test"): ("test_batch",),
    ("cifar100", "train"): ("train",),
    ("cifar100", "test"): ("test",),
}
#: Labels before the pixels of a row of the binary version; the last one is the class.
_LABEL_BYTES: Final = {"cifar10": 1, "cifar100": 2}
_LABEL_KEY: Final = {"cifar10": "labels", "cifar100": "fine_labels"}


def read_cifar(
    entry: ImageSet, split: str, data_dir: Path | None, what: str
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Read one split.

    Args:
        entry: CIFAR-10 or CIFAR-100.
        split: ``train`` or ``test``.
        data_dir: the data set's folder or one above it.
        what: name of the data, for messages.

    Returns:
        Pixels ``(samples, 3, 32, 32)`` and (fine) labels ``(samples,)``, in the order of the files.

    Raises:
        InputError: if a file is missing or damaged.
    """
    names = _FILES[entry.name, split]
    binary_names = tuple(f"{name}.bin" for name in names)
    folder = find_folder(entry, data_dir, (names[0], binary_names[0], *names[1:], *binary_names[1:]), what)
    pickled = any((folder / name).is_file() for name in names)
    parts = []
    for name in names if pickled else binary_names:
        path = require(folder / name, entry, what)
        pixels, labels = (_read_pickled if pickled else _read_binary)(path, entry, what)
        check_labels(labels, entry.classes or 0, path, entry, what)
        parts.append((pixels, labels))
    return np.concatenate([pixels for pixels, _ in parts]), np.concatenate([labels for _, labels in parts])


def _read_pickled(path: Path, entry: ImageSet, what: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Read one pickle: a dict with ``data`` (samples, 3072) and a list of labels."""
    key = _LABEL_KEY[entry.name]
    try:
        held = read_pickle(path.read_bytes())
    except Exception as error:
        problem = f"it is no pickle of numbers and texts ({type(error).__name__}: {error})"
        raise damaged(path, entry, problem, what) from error
    if not isinstance(held, Mapping):
        raise damaged(path, entry, f"it holds a {type(held).__name__}, expected a dict with data and {key}", what)
    # Python 3 reads the keys as bytes where the file was written from a file read with encoding="bytes".
    named = {name.decode("latin1") if isinstance(name, bytes) else str(name): value for name, value in held.items()}
    if "data" not in named or key not in named:
        raise damaged(path, entry, f"it holds {', '.join(sorted(named)) or 'nothing'}, expected data and {key}", what)
    pixels = named["data"]
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (_PIXELS,):
        found = f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise damaged(path, entry, f"its pixels are {found}, expected uint8 (samples, {_PIXELS})", what)
    labels = np.asarray(named[key])
    if labels.ndim != 1 or (labels.size and labels.dtype.kind not in "iu"):
        raise damaged(path, entry, f"its {key} are {labels.dtype} {labels.shape}, expected whole numbers", what)
    if len(labels) != len(pixels):
        raise damaged(path, entry, f"it has {len(pixels)} images and {len(labels)} labels, expected the same", what)
    return np.asarray(pixels).reshape(-1, *_SHAPE), np.asarray(labels).astype(np.int64)


def _read_binary(path: Path, entry: ImageSet, what: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Read one binary file: rows of labels and 3072 pixels, a byte each."""
    before = _LABEL_BYTES[entry.name]
    row_bytes = before + _PIXELS
    try:
        content = np.fromfile(path, np.uint8)
    except OSError as error:
        raise damaged(path, entry, f"it cannot be read: {error}", what) from error
    if len(content) % row_bytes:
        problem = f"it has {len(content)} bytes, expected a multiple of {row_bytes}: it may be cut short"
        raise damaged(path, entry, problem, what)
    rows = content.reshape(-1, row_bytes)
    return rows[:, before:].reshape(-1, *_SHAPE), rows[:, before - 1].astype(np.int64)
