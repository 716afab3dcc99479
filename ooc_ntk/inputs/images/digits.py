"""SVHN from its ``.mat`` files, and MNIST and FashionMNIST from their idx files, gzipped or not."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from .catalog import ImageSet
from .layout import check_labels, damaged, find_folder, require

#: First four bytes of an idx file of bytes: 0, 0, 8 for unsigned bytes, and the number of dimensions.
_IDX_MAGIC: Final = 0x0800


def read_svhn(
    entry: ImageSet, split: str, data_dir: Path | None, what: str
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Read one split of SVHN.

    Args:
        entry: SVHN.
        split: ``train``, ``test`` or ``extra``.
        data_dir: the data set's folder or one above it.
        what: name of the data, for messages.

    Returns:
        Pixels ``(samples, 3, 32, 32)`` and labels ``(samples,)``, the digit 0 having label 0 (10 in the file).

    Raises:
        InputError: if the file is missing or damaged.
    """
    from scipy.io import loadmat  # slow to import, and only needed for such files

    name = f"{split}_32x32.mat"
    path = find_folder(entry, data_dir, [name], what) / name
    try:
        held = loadmat(path, variable_names=("X", "y"))
    except Exception as error:
        raise damaged(path, entry, f"it is no MATLAB file ({type(error).__name__}: {error})", what) from error
    if "X" not in held or "y" not in held:
        raise damaged(path, entry, "it does not hold both X (pixels) and y (labels)", what)
    pixels, labels = np.asarray(held["X"]), np.asarray(held["y"])
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[:3] != (32, 32, 3):
        raise damaged(path, entry, f"X is {pixels.dtype} {pixels.shape}, expected uint8 (32, 32, 3, samples)", what)
    if labels.size != pixels.shape[3] or labels.dtype.kind not in "iuf":
        problem = f"y is {labels.dtype} {labels.shape} for {pixels.shape[3]} images, expected one number for each"
        raise damaged(path, entry, problem, what)
    numbers = labels.reshape(-1).astype(np.int64)
    check_labels(numbers, 11, path, entry, what)
    return np.ascontiguousarray(pixels.transpose(3, 2, 0, 1)), np.where(numbers == 10, 0, numbers)


def read_idx_pair(
    entry: ImageSet, split: str, data_dir: Path | None, what: str
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Read one split of MNIST or FashionMNIST.

    Args:
        entry: the data set.
        split: ``train`` or ``test``.
        data_dir: the data set's folder or one above it.
        what: name of the data, for messages.

    Returns:
        Pixels ``(samples, 1, 28, 28)`` and labels ``(samples,)``.

    Raises:
        InputError: if a file is missing or damaged, or the two do not have the same number of samples.
    """
    prefix = "train" if split == "train" else "t10k"
    images, numbers = f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"
    folder = find_folder(entry, data_dir, [images, f"{images}.gz"], what)
    images_path, labels_path = (_either(folder / name, entry, what) for name in (images, numbers))
    pixels = _read_idx(images_path, 3, entry, what)
    labels = _read_idx(labels_path, 1, entry, what).astype(np.int64)
    side = entry.side or 0
    if pixels.shape[1:] != (side, side):
        raise damaged(images_path, entry, f"its images are {pixels.shape[1:]}, expected {(side, side)}", what)
    if len(pixels) != len(labels):
        problem = f"it has {len(labels)} labels, and {images_path.name} has {len(pixels)} images; expected the same"
        raise damaged(labels_path, entry, problem, what)
    check_labels(labels, entry.classes or 0, labels_path, entry, what)
    return pixels[:, None], labels


def _either(path: Path, entry: ImageSet, what: str) -> Path:
    """The file, or the same one gzipped."""
    packed = path.with_name(f"{path.name}.gz")
    return packed if not path.is_file() and packed.is_file() else require(path, entry, what)


def _read_idx(path: Path, dimensions: int, entry: ImageSet, what: str) -> npt.NDArray[np.uint8]:
    """Read an idx file of bytes: a magic number, the sizes (big-endian), the values."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise damaged(path, entry, f"it cannot be unpacked ({type(error).__name__}: {error})", what) from error
    header_bytes = 4 * (1 + dimensions)
    if len(content) < header_bytes:
        problem = f"it has {len(content)} bytes, expected a header of {header_bytes} bytes and the values"
        raise damaged(path, entry, problem, what)
    magic, *shape = struct.unpack(f">{1 + dimensions}I", content[:header_bytes])
    if magic != _IDX_MAGIC + dimensions:
        problem = f"its magic number is 0x{magic:08x}, expected 0x{_IDX_MAGIC + dimensions:08x}"
        raise damaged(path, entry, problem, what)
    needed = header_bytes + math.prod(shape)
    if len(content) != needed:
        problem = (
            f"it has {len(content)} bytes (unpacked), expected {needed} for the shape {tuple(shape)} in its header"
        )
        raise damaged(path, entry, problem, what)
    return np.frombuffer(content, np.uint8, offset=header_bytes).reshape(shape).copy()
