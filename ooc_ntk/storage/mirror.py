"""A run and its store: whose the store is, and the copy of the run's papers that is kept in it.

Plan, job, receipts and manifest stay with the driver. A copy of each lies beside the tiles, so that the kernel can be
opened from the store alone.
"""

from __future__ import annotations

import json
import logging
import shutil
import socket
import tempfile
import uuid
import weakref
from pathlib import Path
from typing import Final

import numpy as np

from ooc_ntk.errors import RunConflictError, StorageError

from .directory import STORE, RunDirectory, recorded_meta
from .files import Files
from .local import LocalFiles
from .manifest import Manifest
from .retries import storage_error
from .storeurl import checked_store, files_at

logger = logging.getLogger(__name__)

#: The object that says which run a store is of, and the manifest's note of the same.
OWNER: Final = "run.json"
STORE_ID: Final = "store_id"

#: What is copied: small files, and the weights of a live model, which never change. The manifest comes last.
_PAPERS: Final = ("plan.json", "job.toml", "receipts.jsonl", "audit.json", "weights.safetensors")
_UNCHANGED: Final = "weights.safetensors"

#: Bytes that are copied at a time.
_PIECE_BYTES: Final = 2**22


def check_store(directory: RunDirectory) -> None:
    """Refuse a store that cannot be used, or is of another run; nothing is changed.

    Raises:
        RunConflictError: if other files or another run are there.
        StorageError: if it cannot be reached.
    """
    if directory.store is None:
        return
    if isinstance(directory.files, LocalFiles) and directory.files.root.resolve() == directory.root.resolve():
        raise RunConflictError(f"{directory.root} is both run directory and store; leave --store out, or give another")
    files, mine = directory.files, recorded_meta(directory.root, STORE_ID)
    names = files.names()
    if OWNER in names:
        _check_owner(files, mine)
    elif names and mine is None:
        some = ", ".join(names[:3])
        raise RunConflictError(f"{directory.store} holds other files ({some}) and no run; choose an empty prefix")


def claim_store(directory: RunDirectory, manifest: Manifest) -> None:
    """Make the store this run's, unless it is already; of several runs that try at once one succeeds.

    Raises:
        RunConflictError: if it is another run's.
        StorageError: if it cannot be written.
    """
    if directory.store is None:
        return
    mine = manifest.meta(STORE_ID)
    if mine is None:
        mine = uuid.uuid4().hex
        manifest.set_meta(STORE_ID, mine)
    if manifest.meta(STORE) != directory.store:  # of a run that was cut off before it had a plan, it may be another
        manifest.set_meta(STORE, directory.store)
    said = {"id": mine, "run": str(directory.root.absolute()), "host": socket.gethostname()}
    if not directory.files.write_new(OWNER, (json.dumps(said) + "\n").encode()):
        _check_owner(directory.files, mine)


def _check_owner(files: Files, mine: str | None) -> None:
    """Refuse a store that is of another run than that of the number ``mine``."""
    try:
        said = json.loads(files.read_text(OWNER))
        owner, where = str(said["id"]), f"{said['run']} on {said['host']}"
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise StorageError(f"{files.place(OWNER)} cannot be read as what marks a run; choose another prefix") from error
    if owner != mine:
        raise RunConflictError(
            f"{files.place('')} holds the tiles of another run ({where}); go on with that one, choose another prefix, "
            "or delete what is there"
        )


def check_recorded(directory: RunDirectory, given: str | None) -> None:
    """Refuse a store that is not the one of a run that is there.

    Args:
        directory: the run.
        given: URL of the store that is asked for; None asks for none.

    Raises:
        RunConflictError: if it is another.
    """
    if given is None:
        return
    there = recorded_meta(directory.root, STORE)
    if there is None:
        raise RunConflictError(
            f"{directory.root} holds a run whose tiles are in it, and --store asks for {given}; leave --store out to "
            "go on, or choose another --out"
        )
    if there != checked_store(given):
        raise RunConflictError(
            f"the tiles of the run in {directory.root} are in {there}, and --store asks for {given}; leave --store out "
            "to go on, or choose another --out"
        )


def write_mirror(directory: RunDirectory, manifest: Manifest) -> None:
    """Copy the run's papers into its store, the manifest last; each is whole at any time.

    Raises:
        StorageError: if they cannot be read or written.
    """
    if directory.store is None:
        return
    for name in _PAPERS:
        if (directory.root / name).exists():
            _copy_in(directory.files, directory.root / name, name)
    with tempfile.TemporaryDirectory(dir=directory.local, prefix=".manifest-") as folder:
        copy = Path(folder) / "manifest"
        manifest.copy_to(copy)
        _copy_in(directory.files, copy, "manifest")


def mirror_paper(directory: RunDirectory, name: str) -> None:
    """Copy a small one of the run's papers into its store, if it is there and the run has a store.

    Raises:
        StorageError: if it cannot be read or written.
    """
    source = directory.root / name
    if directory.store is None or not source.exists():
        return
    try:
        data = source.read_bytes()
    except OSError as error:
        raise storage_error("copying", source, error) from error
    directory.files.write_whole(name, data)


def _copy_in(files: Files, source: Path, name: str) -> None:
    if name == _UNCHANGED:
        try:
            if files.size(name) == source.stat().st_size:
                return
        except FileNotFoundError:
            pass
    staged = files.stage(name)
    try:
        with source.open("rb") as file:
            while data := file.read(_PIECE_BYTES):
                staged.append(np.frombuffer(data, dtype=np.uint8))
        staged.seal()
        staged.publish()
    except StorageError:
        raise
    except OSError as error:
        raise storage_error("copying", source, error) from error
    finally:
        staged.discard()


def open_mirror(url: str) -> RunDirectory:
    """Fetch the papers of a run from its store into a folder of this process alone.

    Args:
        url: the store.

    Returns:
        The run; its folder is deleted when nothing refers to it any more.

    Raises:
        InputError: if the URL is none, may hold a secret, or obstore is not installed.
        StorageError: if the store cannot be reached, or holds no run.
    """
    store = checked_store(url)
    files = files_at(store)
    folder = Path(tempfile.mkdtemp(prefix="ooc-ntk-"))
    directory = RunDirectory(folder, store)
    weakref.finalize(directory, shutil.rmtree, folder, ignore_errors=True)
    try:
        for name in ("plan.json", "job.toml", "manifest", "audit.json"):
            try:
                _copy_out(files, name, folder / name)
            except FileNotFoundError:
                if name != "audit.json":
                    raise StorageError(
                        f"{store} holds no finished run: there is no {name} in it; open the run directory of the run "
                        "instead"
                    ) from None
        manifest = Manifest(folder)
        try:
            manifest.set_meta(STORE, store)  # it may have been copied from elsewhere
        finally:
            manifest.close()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return directory


def _copy_out(files: Files, name: str, target: Path) -> None:
    source, buffer, done = files.open(name), np.empty(_PIECE_BYTES, dtype=np.uint8), 0
    try:
        with target.open("wb") as file:
            while count := source.read_at(buffer, done):
                file.write(buffer[:count].data)
                done += count
    finally:
        source.close()
