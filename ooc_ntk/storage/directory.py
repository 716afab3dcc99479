"""The run directory: names of what is in it, its lock, and what may be swept away."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from ooc_ntk.errors import RunConflictError, StorageError

from .atomic import TEMPORARY, write_whole
from .lock import HELD, LOCK, hold
from .manifest import Receipt
from .retries import retried, storage_error

#: Names of metadata that Zarr was writing (it renames them when they are whole).
ZARR_TEMPORARY: Final = "zarr.*.partial"


class RunDirectory:
    """One run on disk.

    Attributes:
        root: its folder.
    """

    def __init__(self, root: str | Path) -> None:
        """Name a run directory; nothing is touched."""
        self.root = Path(root)

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
        count = 0
        unfinished = (f"*{TEMPORARY}*", ZARR_TEMPORARY)
        found = [path for pattern in unfinished for path in self.root.rglob(pattern)]
        for path in [*found, *self.root.glob(".weights.safetensors.*")]:
            with suppress(OSError):
                path.unlink()
                count += 1
        return count

    def leave_receipt(self, receipt: Receipt) -> None:
        """Keep a task's receipt until the driver has committed it, so that its files can be adopted after a crash."""
        write_whole(self.root, f"pending/{receipt.key}.json", receipt.to_json().encode())

    def pending_receipts(self) -> list[Receipt]:
        """Receipts of tasks that finished but were not committed.

        Raises:
            StorageError: if one cannot be read; one that is torn is passed over.
        """
        found = []
        for path in sorted((self.root / "pending").glob("*.json")):
            with suppress(ValueError, KeyError, TypeError):
                try:
                    text = path.read_text()
                except OSError as error:
                    raise storage_error("reading", path, error) from error
                found.append(Receipt.from_json(text))
        return found

    def drop_receipt(self, key: str) -> None:
        """Forget a pending receipt."""
        with suppress(OSError):
            (self.root / "pending" / f"{key}.json").unlink()

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
        """Delete files of the run that are no longer needed."""
        for path in paths:
            with suppress(OSError):
                (self.root / path).unlink()

    def delete_folder(self, path: str) -> None:
        """Delete a folder of the run that is no longer needed."""
        shutil.rmtree(self.root / path, ignore_errors=True)

    def size_bytes(self) -> int:
        """Bytes of all files."""
        total = 0
        for path in self.root.rglob("*"):
            with suppress(OSError):
                total += path.stat().st_size if path.is_file() else 0
        return total


def free_disk_bytes(path: Path) -> int:
    """Free bytes on the file system that will hold ``path``."""
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError as error:
        raise StorageError(f"cannot measure the free disk space at {folder}: {error}") from error
