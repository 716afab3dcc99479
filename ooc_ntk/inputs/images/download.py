"""Getting a data set's files, by torchvision where it can be imported: nothing is fetched by this package itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from ooc_ntk.errors import InputError
from ooc_ntk.extras import require

from .catalog import ImageSet, find_set

#: Class of torchvision.datasets for each data set that can be downloaded.
_CLASSES: Final = {
    "cifar10": "CIFAR10",
    "cifar100": "CIFAR100",
    "svhn": "SVHN",
    "mnist": "MNIST",
    "fashionmnist": "FashionMNIST",
    "fgvcaircraft": "FGVCAircraft",
    "food101": "Food101",
    "flowers102": "Flowers102",
}
#: Those that take train=True or False; the others take split="train".
_TRAIN_FLAG: Final = ("cifar10", "cifar100", "mnist", "fashionmnist")


def download(name: str, data_dir: Path, split: str = "train", what: str = "train") -> None:
    """Download a data set's official files and unpack them.

    Args:
        name: the data set, in any spelling.
        data_dir: where to put its folder; made where it does not exist.
        split: the split that is wanted; most data sets come whole.
        what: name of the data, for messages.

    Raises:
        InputError: for a data set that has no download, if torchvision cannot be imported, or if it fails.
    """
    entry = find_set(name, what)
    if entry.name not in _CLASSES:
        raise InputError(f"{what} data {entry.name} cannot be downloaded: it has no files of its own")
    datasets = _torchvision(entry, what)
    # SVHN's files have no folder of their own.
    root = data_dir / entry.title if entry.name == "svhn" else data_dir
    root.mkdir(parents=True, exist_ok=True)
    try:
        getattr(datasets, _CLASSES[entry.name])(str(root), download=True, **_arguments(entry, split))
    except Exception as error:
        raise InputError(
            f"{what} data {entry.name} could not be downloaded to {root}: {type(error).__name__}: {error}; get the "
            f"files from {entry.url} by hand"
        ) from error


def _arguments(entry: ImageSet, split: str) -> Mapping[str, object]:
    """How torchvision's class is told the split; it has no trainval of Flowers-102, whose files come whole."""
    if entry.name in _TRAIN_FLAG:
        return {"train": split == "train"}
    return {"split": "train" if (entry.name, split) == ("flowers102", "trainval") else split}


def _torchvision(entry: ImageSet, what: str) -> object:
    """torchvision.datasets, or the reason why not."""
    return require(
        "torchvision.datasets", f"downloading {what} data {entry.name}", f"get the files from {entry.url} by hand"
    )
