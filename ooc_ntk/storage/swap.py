"""Swapping in a new generation of a run directory: either the old kernel is there, whole, or the new one.

The new generation is written in a hidden folder beside the run (``.NAME.next``), exchanged with it in one step where
the file system can do that, and the old one is then deleted. Elsewhere the old one is first renamed
(``.NAME.previous``). Whatever a kill leaves is told apart by the digests of the plans and completed by
:func:`complete_swap`.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ooc_ntk.errors import RunConflictError, StorageError

from .atomic import TEMPORARY, sync_folder
from .directory import RunDirectory
from .manifest import Manifest
from .retries import storage_error

#: ``renameat2`` of Linux: its flag for exchanging two names, and "relative to the current folder".
_RENAME_EXCHANGE: Final = 2
_CURRENT_FOLDER: Final = -100

#: What a kernel or a file system says that cannot exchange two names.
_CANNOT: Final = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)

#: Name of the manifest's note on earlier generations.
HISTORY: Final = "history"

#: Everything that the engine writes into a run directory; whatever else lies there is the user's.
_OURS: Final = (
    *("plan.json", "job.toml", "manifest", "lock", "weights.safetensors", "receipts.jsonl", "kernel.zarr"),
    *(
        "layers.zarr",
        "diagonal",
        "features.zarr",
        "heavy.zarr",
        "tiles",
        "pending",
        "audit.json",
        "again.json",
        "attribution.zarr",
    ),
    *("report.html", "zarr.json"),
)


@dataclass(frozen=True)
class Generations:
    """Where the generations of a run lie.

    Attributes:
        run: the run directory, links followed.
        next: the folder in which the next one is written.
        previous: the folder of the one before, until it is deleted.
    """

    run: Path
    next: Path
    previous: Path

    @classmethod
    def of(cls, path: str | Path) -> Generations:
        """Those of a run directory, which need not be there."""
        root = Path(path).resolve()
        return cls(root, *(root.with_name(f".{root.name}.{which}") for which in ("next", "previous")))


def plan_digest(folder: Path) -> str | None:
    """Digest of the plan in a folder, as it is written there; None if there is no plan."""
    with suppress(OSError, ValueError):
        return str(json.loads((folder / "plan.json").read_text())["digest"])
    return None


def read_history(folder: Path) -> list[dict[str, Any]]:
    """What a run was grown from, the earliest first; empty for one that was made at once.

    Raises:
        StorageError: if there is no manifest.
    """
    manifest = Manifest(folder, read_only=True)
    try:
        found: list[dict[str, Any]] = json.loads(manifest.meta(HISTORY) or "[]")
    finally:
        manifest.close()
    return found


def cut_off(path: str | Path) -> StorageError | None:
    """The error of a run directory that is missing because a swap was cut off; None if that is not so."""
    places = Generations.of(path)
    if RunDirectory(places.run).holds_run or not RunDirectory(places.previous).holds_run:
        return None
    return StorageError(
        f"an extension of {path} was cut off while it was swapped in; type the same 'ooc-ntk extend {path} --train …' "
        f"again to complete it (the kernel before it is in {places.previous})"
    )


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step.

    Returns:
        Whether that was done; not every file system can.

    Raises:
        StorageError: if it failed for another reason.
    """
    if not sys.platform.startswith("linux"):
        return False
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    if call(_CURRENT_FOLDER, names[0], _CURRENT_FOLDER, names[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise storage_error("exchanging", one, OSError(number, os.strerror(number)))


def swap_in(places: Generations) -> None:
    """Put the finished next generation in the place of the run, and delete the old one; both are locked.

    Raises:
        StorageError: if a step fails; what is there is whole, and :func:`complete_swap` goes on from it.
        RunConflictError: if a folder of someone else is in the way.
    """
    if places.previous.exists():
        raise RunConflictError(f"{places.previous} is in the way of the extension and is no part of it; move it away")
    try:
        if exchange(places.run, places.next):
            sync_folder(places.run.parent)
            os.rename(places.next, places.previous)
        else:
            os.rename(places.run, places.previous)
            sync_folder(places.run.parent)
            os.rename(places.next, places.run)
        sync_folder(places.run.parent)
    except StorageError:
        raise
    except OSError as error:
        raise storage_error("swapping in", places.run, error) from error
    _retire(places)


def complete_swap(places: Generations) -> None:
    """Complete a swap that was cut off; where there was none, nothing is touched.

    Raises:
        StorageError: if a step fails.
    """
    run, coming, previous = (RunDirectory(path) for path in (places.run, places.next, places.previous))
    try:
        if not run.holds_run and previous.holds_run:
            # Cut off between two renames: the next generation is finished, or it would not have come to that.
            whole = coming.holds_run and _replaced(coming.root) == plan_digest(previous.root)
            os.rename(coming.root if whole else previous.root, places.run)
            sync_folder(places.run.parent)
        if not run.holds_run:
            return
        replaced = _replaced(places.run)
        if replaced is not None and not previous.root.exists() and plan_digest(coming.root) == replaced:
            os.rename(coming.root, previous.root)  # cut off after the exchange
        if previous.root.is_dir():
            emptied = not any(previous.root.iterdir())
            if emptied or (replaced is not None and plan_digest(previous.root) == replaced):
                _retire(places)
    except StorageError:
        raise
    except OSError as error:
        raise storage_error("completing the swap of", places.run, error) from error


def _replaced(folder: Path) -> str | None:
    """Digest of the plan that a run was grown from, None if it was made at once."""
    history = read_history(folder)
    return str(history[-1]["plan"]) if history else None


def _retire(places: Generations) -> None:
    """Delete the generation before, its plan last, as that says what the folder is; files of the user move on."""
    plan = places.previous / "plan.json"
    try:
        for path in sorted(places.previous.iterdir()):
            ours = path.name in _OURS or path.name.startswith(("manifest", ".weights.safetensors."))
            if path == plan:
                continue
            if not ours and TEMPORARY not in path.name and not (places.run / path.name).exists():
                os.rename(path, places.run / path.name)
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        plan.unlink(missing_ok=True)
        places.previous.rmdir()
        sync_folder(places.run.parent)
    except OSError as error:
        raise storage_error("deleting", places.previous, error) from error
