"""The run directory: names of what is in it, its lock, its store, and what may be swept away."""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from ooc_ntk.errors import RunConflictError, StorageError

from .atomic import TEMPORARY, write_whole
from .files import Files
from .local import LocalFiles
from .lock import HELD, LOCK, hold
from .manifest import Manifest, Receipt
from .retries import retried, storage_error
from .storeurl import checked_store, files_at

#: Name of the manifest's note on the store that has the tiles.
STORE: Final = "store"


class RunDirectory:
    """One run: its folder, and where the files of its tasks lie, which is that folder or a store.

    Attributes:
        root: its folder. That of a run with a store need not be there for what tasks do.
    """

    def __init__(self, root: str | Path, store: str | None = None) -> None:
        """Name a run directory; nothing is touched.

        Args:
            root: its folder.
            store: URL of the store that has the tiles; None is the one that the run has noted, or the folder itself.

        Raises:
            InputError: if the URL is none, or may hold a secret.
        """
        self.root = Path(root)
        self._given = None if store is None else checked_store(store)

    @cached_property
    def store(self) -> str | None:
        """URL of the store that has the tiles; None where they are in the folder.

        Raises:
            StorageError: if the manifest that says so cannot be read.
        """
        return self._given or recorded_meta(self.root, STORE) or None

    @cached_property
    def files(self) -> Files:
        """Where the files of tasks lie: tiles, arrays, receipts that are not committed.

        Raises:
            InputError: if what object stores need is not installed.
            StorageError: if the manifest cannot be read.
        """
        if self.store is None:
            return LocalFiles(self.root)
        # Weakly: what still reads from the store must not keep a temporary folder of this run.
        mine = weakref.WeakMethod(self._upload_folder)

        def scratch() -> Path:
            found = mine()
            return Path(tempfile.gettempdir()) if found is None else found()

        return files_at(self.store, scratch)

    @cached_property
    def local(self) -> Path:
        """The folder for what stays on this machine: its own, or where that is not here a temporary one."""
        if self.store is None or self.root.is_dir():
            return self.root
        made = Path(tempfile.mkdtemp(prefix="ooc-ntk-"))
        weakref.finalize(self, shutil.rmtree, made, ignore_errors=True)
        return made

    @property
    def scratch(self) -> Path:
        """The folder on this machine for files that are gone when a task, or the run, is; it need not be there."""
        return self.local / "tiles"

    def _upload_folder(self) -> Path:
        self.scratch.mkdir(parents=True, exist_ok=True)
        return self.scratch

    @property
    def plan_path(self) -> Path:
        """The stored plan."""
        return self.root / "plan.json"

    @property
    def job_path(self) -> Path:
        """The stored job file."""
        return self.root / "job.toml"

    @property
    def weights_path(self) -> Path:
        """Weights of a run made from a live model."""
        return self.root / "weights.safetensors"

    @property
    def receipts_path(self) -> Path:
        """One line per committed task, for people and plots."""
        return self.root / "receipts.jsonl"

    @property
    def holds_run(self) -> bool:
        """Whether a plan is stored here."""
        return self.plan_path.exists()

    def check_usable(self) -> None:
        """Refuse a folder that is neither empty nor a run.

        Raises:
            RunConflictError: if other files are there.
            StorageError: if it is a file or cannot be read.
        """
        try:
            names = {entry.name for entry in self.root.iterdir()} if self.root.exists() else set()
        except OSError as error:
            raise storage_error("reading", self.root, error) from error
        if not names or self.holds_run or "manifest" in names:
            return
        # A run that was killed while it was made: the lock comes first, and only these files before the plan.
        begun = {LOCK, HELD, "weights.safetensors", "job.toml"}
        others = sorted(
            name
            for name in names - begun
            if TEMPORARY not in name and not name.startswith(("manifest", ".weights.safetensors."))
        )
        if others or LOCK not in names:
            some = ", ".join(others[:3] or sorted(names)[:3])
            raise RunConflictError(
                f"{self.root} holds other files ({some}) and no run; choose an empty folder as --out"
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run directory for this process; a process that dies holds nothing.

        Raises:
            RunLockedError: if another process holds it.
            StorageError: if it cannot be written.
        """
        with hold(self.root):
            yield

    def write_text(self, path: Path, text: str) -> None:
        """Write a file of the run atomically."""
        write_whole(self.root, path.relative_to(self.root).as_posix(), text.encode())

    def sweep(self) -> int:
        """Delete files that were being written when a run stopped; returns how many."""
        count = LocalFiles(self.local).sweep() + (self.files.sweep() if self.store is not None else 0)
        for path in self.root.glob(".weights.safetensors.*"):
            with suppress(OSError):
                path.unlink()
                count += 1
        return count

    def leave_receipt(self, receipt: Receipt) -> None:
        """Keep a task's receipt until the driver has committed it, so that its files can be adopted after a crash."""
        self.files.write_whole(f"pending/{receipt.key}.json", receipt.to_json().encode())

    def pending_receipts(self) -> list[Receipt]:
        """Receipts of tasks that finished but were not committed.

        Raises:
            StorageError: if one cannot be read; one that is torn is passed over.
        """
        found = []
        for name in self.files.names("pending"):
            if not name.endswith(".json"):
                continue
            with suppress(ValueError, KeyError, TypeError):
                try:
                    text = self.files.read_text(f"pending/{name}")
                except StorageError:
                    raise
                except OSError as error:
                    raise storage_error("reading", self.files.place(f"pending/{name}"), error) from error
                found.append(Receipt.from_json(text))
        return found

    def drop_receipt(self, key: str) -> None:
        """Forget a pending receipt."""
        self.files.delete(f"pending/{key}.json")

    def log_receipt(self, receipt: Receipt) -> None:
        """Append a committed receipt to ``receipts.jsonl`` (without its files; the manifest has them)."""
        fields: dict[str, Any] = json.loads(receipt.to_json())
        del fields["files"], fields["replaces"]
        line = json.dumps(fields) + "\n"

        def append() -> None:
            with self.receipts_path.open("a") as file:
                file.write(line)

        try:
            retried(append, "writing", self.receipts_path)
        except OSError as error:
            raise storage_error("writing", self.receipts_path, error) from error

    def delete(self, *paths: str) -> None:
        """Delete files of tasks that are no longer needed."""
        self.files.delete(*paths)

    def delete_folder(self, path: str) -> None:
        """Delete a folder of the run that is no longer needed, wherever parts of it are."""
        self.files.delete_folder(path)
        if self.store is not None:
            LocalFiles(self.local).delete_folder(path)

    def size_bytes(self) -> int:
        """Bytes of all files, here and in the store."""
        here = LocalFiles(self.root).size_bytes()
        return here if self.store is None else here + self.files.size_bytes()


def recorded_meta(root: Path, name: str) -> str | None:
    """A named text of a manifest, None where there is no manifest or no such text.

    Raises:
        StorageError: if it cannot be read.
    """
    if not (root / "manifest").exists():
        return None
    manifest = Manifest(root, read_only=True)
    try:
        return manifest.meta(name)
    finally:
        manifest.close()
