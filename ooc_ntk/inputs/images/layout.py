"""Where the files of a data set lie, and what is said when one is missing or damaged."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from ooc_ntk.errors import InputError
from ooc_ntk.extras import how_to_install
from ooc_ntk.inputs.options import plain_name

from .catalog import CATALOG, ImageSet

#: Bytes read at a time for a sum; guessed: large against the cost of a call.
_BLOCK_BYTES: Final = 2**20
#: Data sets whose files have the same names, so that only the folder tells one from another.
_SAME_FILES: Final = ("mnist", "fashionmnist")
#: Names of folders that belong to a data set, other than those that read as its name.
_OTHER_NAMES: Final = {"fgvcaircraft2013b": "fgvcaircraft"}


class MissingFilesError(InputError):
    """The files of a data set are nowhere; they may be downloaded."""


def find_folder(entry: ImageSet, data_dir: Path | None, wanted: Sequence[str], what: str) -> Path:
    """Find the folder that holds a data set's files.

    Args:
        entry: the data set.
        data_dir: the data set's own folder, or one or two above it.
        wanted: files, relative to the folder, any of which shows that it is the one; the usual one first.
        what: name of the data, for messages.

    Returns:
        The first folder that holds one of them.

    Raises:
        MissingFilesError: if none does, naming every folder that was looked in.
        InputError: if no folder was given.
    """
    if data_dir is None:
        raise InputError(
            f"{what} data {entry.name} is read from files, and no folder was given to look in; give data_dir "
            f"(--data-dir), a folder that holds {_folder_names(entry)}"
        )
    root = data_dir.expanduser().absolute()
    if not root.is_dir():
        raise MissingFilesError(f"{what} data {entry.name}: the data folder {root} does not exist; {_remedy(entry)}")
    folders = _candidates(entry, root)
    for folder in folders:
        if any((folder / name).is_file() for name in wanted):
            return folder
    raise _missing(entry, wanted, folders, what)


def _candidates(entry: ImageSet, root: Path) -> list[Path]:
    """Folders to look in: below the given one, and below its subfolders that have the data set's name."""
    own = sorted(child for child in root.iterdir() if child.is_dir() and _owner(child) == entry.name)
    tops = [root, *(own or [root / entry.title])]
    found = [top / inner if inner else top for top in tops for inner in entry.folders]
    return [folder for folder in dict.fromkeys(found) if not _foreign(folder, entry)]


def _owner(folder: Path) -> str | None:
    """The data set that a folder's name says it belongs to."""
    plain = plain_name(folder.name)
    return _OTHER_NAMES.get(plain, plain if plain in CATALOG else None)


def _foreign(folder: Path, entry: ImageSet) -> bool:
    """Whether a folder's name, or the one above it, says that its files are another data set's."""
    if entry.name not in _SAME_FILES:
        return False
    owners = [owner for level in (folder, folder.parent) if (owner := _owner(level)) in _SAME_FILES]
    return bool(owners) and owners[0] != entry.name


def _missing(entry: ImageSet, wanted: Sequence[str], folders: Sequence[Path], what: str) -> MissingFilesError:
    """The error for files that are nowhere."""
    archive = next((folder / name for folder in folders for name in entry.archives if (folder / name).is_file()), None)
    places = ", ".join(str(folder) for folder in folders)
    remedy = _remedy(entry)
    if archive is not None:
        known = entry.md5.get(archive.name)
        check = f" (its MD5 should be {known})" if known else ""
        remedy = f"{archive}{check} is there but not unpacked: run tar -xf {archive} -C {archive.parent}"
    names = " or ".join(wanted[:2])
    return MissingFilesError(f"{what} data {entry.name}: {names} not found; looked in {places}; {remedy}")


def _folder_names(entry: ImageSet) -> str:
    """The folder or file names that a data set is known by, for messages."""
    return next((folder for folder in entry.folders if folder), entry.title)


def _remedy(entry: ImageSet) -> str:
    """How to get a data set."""
    return (
        f"get the files from {entry.url} and unpack them there, or run: {how_to_install('torchvision')}, "
        "and try again with --download"
    )


def require(path: Path, entry: ImageSet, what: str) -> Path:
    """Hold on to a file that must be there.

    Args:
        path: the file.
        entry: the data set it belongs to.
        what: name of the data, for messages.

    Returns:
        The same path.

    Raises:
        MissingFilesError: if it is missing.
    """
    if not path.is_file():
        raise _missing(entry, [path.name], [path.parent], what)
    return path


def md5_of(path: Path) -> str:
    """MD5 sum of a file, 32 lower-case hexadecimal digits."""
    total = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            total.update(block)
    return total.hexdigest()


def damaged(path: Path, entry: ImageSet, problem: str, what: str) -> InputError:
    """Build the error for a file that is not what it should be.

    Args:
        path: the file.
        entry: the data set it belongs to.
        problem: what was found and what was expected.
        what: name of the data, for messages.

    Returns:
        The error, to be raised by the caller; it has the official and the found MD5 sum where one is known.
    """
    known = entry.md5.get(path.name)
    sums = ""
    if known is not None:
        try:
            sums = f" Its MD5 is {md5_of(path)}, that of the official file {known}."
        except OSError as error:
            sums = f" The MD5 of the official file is {known}; that of this one cannot be read: {error}."
    return InputError(
        f"{what} data {entry.name}: {path} cannot be used: {problem}.{sums} Get it again from {entry.url}"
    )


def check_labels(labels: npt.NDArray[np.int64], classes: int, path: Path, entry: ImageSet, what: str) -> None:
    """Refuse labels that are no class.

    Args:
        labels: class numbers from 0, ``(samples,)``.
        classes: number of classes.
        path: the file they come from.
        entry: the data set.
        what: name of the data, for messages.

    Raises:
        InputError: naming the first wrong one, or if there are none at all.
    """
    if len(labels) == 0:
        raise damaged(path, entry, "it holds no samples, expected at least 1", what)
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        problem = f"the label of sample {wrong[0]} is {labels[wrong[0]]}, expected 0 to {classes - 1}"
        raise damaged(path, entry, problem, what)
