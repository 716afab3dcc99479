"""Data sets of image files: Food-101, Flowers-102, FGVC-Aircraft, and any folder with a subfolder per class.

Only lists are read here; the images themselves are opened when samples are fetched.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from ooc_ntk.errors import InputError

from .catalog import ImageSet
from .layout import check_labels, damaged, find_folder, require

#: Endings that count as images in a folder of classes, as in torchvision's ImageFolder.
ENDINGS: Final = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

#: A folder, the names of image files relative to it (with /), and their labels (samples,).
PhotoList = tuple[Path, list[str], npt.NDArray[np.int64]]


def list_food101(entry: ImageSet, split: str, data_dir: Path | None, what: str) -> PhotoList:
    """List one split of Food-101, in the order of its ``meta/<split>.json``.

    Args:
        entry: Food-101.
        split: ``train`` or ``test``.
        data_dir: the data set's folder or one above it.
        what: name of the data, for messages.

    Returns:
        The folder, files and labels; classes are numbered in the order of their names.

    Raises:
        InputError: if the list is missing or damaged.
    """
    name = f"meta/{split}.json"
    folder = find_folder(entry, data_dir, [name], what)
    path = folder / name
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(path, entry, f"it is no JSON ({error})", what) from error
    if not isinstance(held, Mapping) or not all(
        isinstance(images, list) and all(isinstance(image, str) for image in images) for images in held.values()
    ):
        raise damaged(path, entry, "expected a list of image names for each class", what)
    numbers = {name: number for number, name in enumerate(sorted(held))}
    names = [f"images/{image}.jpg" for images in held.values() for image in images]
    labels = np.array([numbers[name] for name, images in held.items() for _ in images], np.int64)
    check_labels(labels, entry.classes or 0, path, entry, what)
    return folder, names, labels


def list_flowers102(entry: ImageSet, split: str, data_dir: Path | None, what: str) -> PhotoList:
    """List one split of Flowers-102, in the order of ``setid.mat``.

    Args:
        entry: Flowers-102.
        split: ``train``, ``val``, ``trainval`` (train, then val) or ``test``.
        data_dir: the data set's folder or one above it.
        what: name of the data, for messages.

    Returns:
        The folder, files and labels (from 0; the file counts from 1).

    Raises:
        InputError: if a list is missing or damaged.
    """
    folder = find_folder(entry, data_dir, ["setid.mat", "imagelabels.mat"], what)
    ids_path = require(folder / "setid.mat", entry, what)
    labels_path = require(folder / "imagelabels.mat", entry, what)
    parts = {"train": ("trnid",), "val": ("valid",), "trainval": ("trnid", "valid"), "test": ("tstid",)}[split]
    ids = np.concatenate([_whole_numbers(ids_path, part, entry, what) for part in parts])
    labels = _whole_numbers(labels_path, "labels", entry, what) - 1
    wrong = ids[(ids < 1) | (ids > len(labels))]
    if len(wrong):
        problem = f"it names image {wrong[0]}, and {labels_path.name} has labels of images 1 to {len(labels)}"
        raise damaged(ids_path, entry, problem, what)
    chosen = labels[ids - 1]
    check_labels(chosen, entry.classes or 0, labels_path, entry, what)
    return folder, [f"jpg/image_{number:05d}.jpg" for number in ids], chosen


def _whole_numbers(path: Path, key: str, entry: ImageSet, what: str) -> npt.NDArray[np.int64]:
    """A row of whole numbers in a ``.mat`` file."""
    from scipy.io import loadmat  # slow to import, and only needed for such files

    try:
        held = loadmat(path, variable_names=(key,))
    except Exception as error:
        raise damaged(path, entry, f"it is no MATLAB file ({type(error).__name__}: {error})", what) from error
    values = np.asarray(held.get(key, ()))
    if key not in held or values.dtype.kind not in "iuf":
        raise damaged(path, entry, f"it holds no numbers named {key}", what)
    return values.reshape(-1).astype(np.int64)


def list_aircraft(entry: ImageSet, split: str, data_dir: Path | None, what: str) -> PhotoList:
    """List one split of FGVC-Aircraft by variant, in the order of ``images_variant_<split>.txt``.

    Args:
        entry: FGVC-Aircraft.
        split: ``train``, ``val``, ``trainval`` or ``test``.
        data_dir: the data set's folder or one above it.
        what: name of the data, for messages.

    Returns:
        The folder, files and labels; classes are numbered as in ``variants.txt``.

    Raises:
        InputError: if a list is missing or damaged.
    """
    name = f"images_variant_{split}.txt"
    folder = find_folder(entry, data_dir, [name], what)
    path = folder / name
    variants = _lines(require(folder / "variants.txt", entry, what), entry, what)
    numbers = {variant: number for number, variant in enumerate(variants)}
    names, labels = [], []
    for number, line in enumerate(_lines(path, entry, what), start=1):
        image, _, variant = line.partition(" ")
        if variant not in numbers:
            problem = (
                f"line {number} is {line!r}, expected an image and one of the {len(variants)} names in variants.txt"
            )
            raise damaged(path, entry, problem, what)
        names.append(f"images/{image}.jpg")
        labels.append(numbers[variant])
    chosen = np.array(labels, np.int64)
    check_labels(chosen, entry.classes or 0, path, entry, what)
    return folder, names, chosen


def _lines(path: Path, entry: ImageSet, what: str) -> list[str]:
    """Lines of a text file that hold something."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise damaged(path, entry, f"it is no text ({error})", what) from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def list_imagefolder(path: Path, what: str) -> PhotoList:
    """List a folder that has a subfolder of images for each class.

    Args:
        path: the folder.
        what: name of the data, for messages.

    Returns:
        The folder, files and labels: classes in the order of their names, the images of each in the order of theirs;
        hidden folders are left out.

    Raises:
        InputError: if there is no such folder, it has no subfolders, or one of them holds no image.
    """
    if not path.is_dir():
        raise InputError(f"{what} data: there is no folder {path}; give one that has a subfolder of images per class")
    classes = sorted(child.name for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))
    if not classes:
        raise InputError(
            f"{what} data: {path} has no subfolders, expected one for each class with its images; move the images "
            "into such folders"
        )
    names: list[str] = []
    labels: list[int] = []
    for number, name in enumerate(classes):
        found = _images(path / name)
        if not found:
            raise InputError(
                f"{what} data: the class folder {path / name} holds no image ({', '.join(ENDINGS)}); remove it or add "
                "images"
            )
        names += [f"{name}/{image}" for image in found]
        labels += [number] * len(found)
    return path, names, np.array(labels, np.int64)


def _images(folder: Path) -> list[str]:
    """Image files in a folder and below, relative to it, in torchvision's order: folder by folder."""
    found = []
    for place, _, files in sorted(os.walk(folder, followlinks=True)):
        inner = Path(place).relative_to(folder)
        found += [(inner / name).as_posix() for name in sorted(files) if name.lower().endswith(ENDINGS)]
    return found
