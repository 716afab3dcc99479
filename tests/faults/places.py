"""Where disturbed runs live: a folder in memory, or a small file system that can be filled and made read-only."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

#: Bytes of the small file system.
SMALL: Final = 32 * 2**20

_BALLAST: Final = "ballast"


def memory_folder() -> str | None:
    """A folder in memory where there is one: a run syncs hundreds of times, and here no power is lost."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _mount(*arguments: str) -> str | None:
    """Call ``mount``; returns why it failed."""
    try:
        done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"there is no mount command ({error})"
    return None if done.returncode == 0 else f"mounting a tmpfs is not permitted ({done.stderr.strip()})"


@contextmanager
def small_disk(folder: Path) -> Iterator[str | None]:
    """A tmpfs of :data:`SMALL` bytes at a folder; yields why there is none, or None."""
    reason = _mount("-t", "tmpfs", "-o", f"size={SMALL}", "tmpfs", str(folder))
    try:
        yield reason
    finally:
        if reason is None:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def no_mount() -> str | None:
    """Why no file system can be mounted here, or None."""
    with tempfile.TemporaryDirectory() as folder, small_disk(Path(folder)) as reason:
        return reason


def fill(disk: Path, left: int) -> None:
    """Leave ``left`` bytes, in whole pages, of a file system."""
    with (disk / _BALLAST).open("wb", buffering=0) as file:
        for piece in (2**16, 4096):
            with suppress(OSError):
                while True:
                    file.write(bytes(piece))
        file.truncate(max(0, file.tell() - left))


def make_room(disk: Path) -> None:
    """Take away what :func:`fill` wrote."""
    (disk / _BALLAST).unlink()


def read_only_way() -> str:
    """How a directory can be made read-only here: ``modes``, ``remount`` or ``injected``."""
    if os.geteuid() != 0:
        return "modes"
    return "remount" if no_mount() is None else "injected"


@contextmanager
def read_only(disk: Path, out: Path, way: str) -> Iterator[None]:
    """A run directory that cannot be written, while no process has its files open.

    Args:
        disk: the file system that holds it.
        out: the run directory.
        way: ``modes`` or ``remount``.
    """
    if way == "remount":
        failed = _mount("-o", "remount,ro", str(disk))
        assert failed is None, failed
        try:
            yield
        finally:
            failed = _mount("-o", "remount,rw", str(disk))
            assert failed is None, failed
        return
    modes = {path: path.stat().st_mode for path in (out, *out.rglob("*"))}
    for path, mode in modes.items():
        path.chmod(mode & ~0o222)
    try:
        yield
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
