"""How fast the disk under a folder writes, syncs and reads."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import google_crc32c
import numpy as np

from .atomic import StagedFile, raw_bytes, write_whole

#: Most bytes of the file that is timed. (Measured: 64 MiB and 256 MiB vary by a factor of four with the state of the
#: page cache, 512 MiB agrees with several GiB within 10%.) A nearly full disk gets a smaller one.
PROBE_BYTES: Final = 2**29

#: Bytes of the buffer it is written from and read into.
PIECE_BYTES: Final = 2**24


@dataclass(frozen=True)
class DiskRates:
    """Measured rates of one file system.

    Attributes:
        write: bytes/s written and synced.
        read: bytes/s read into a reused buffer and checked. The page cache is dropped first where the system allows it.
        commit_seconds: seconds to write, sync and rename one small file.
    """

    write: float
    read: float
    commit_seconds: float


def measure_disk(folder: Path) -> DiskRates:
    """Measure the file system that holds ``folder`` (made if needed), in a second or two.

    Returns:
        The rates.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = np.random.default_rng(0).integers(0, 256, PIECE_BYTES, dtype=np.uint8)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".ooc-ntk-rate-") as name:
        root = Path(name)
        pieces = max(1, min(PROBE_BYTES, shutil.disk_usage(root).free // 8) // PIECE_BYTES)
        start = time.perf_counter()
        staged = StagedFile(root, "tile")
        for _ in range(pieces):
            staged.append(data)
        staged.seal()
        staged.publish()
        write = pieces * PIECE_BYTES / (time.perf_counter() - start)

        descriptor = os.open(root / "tile", os.O_RDONLY)
        try:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
        start = time.perf_counter()
        with (root / "tile").open("rb", buffering=0) as file:
            while file.readinto(data.data):
                google_crc32c.value(raw_bytes(data))
        read = pieces * PIECE_BYTES / (time.perf_counter() - start)

        start = time.perf_counter()
        for index in range(5):
            write_whole(root, f"small/{index}", b"x" * 1024)
        commit = (time.perf_counter() - start) / 5
    return DiskRates(write, read, 3 * commit)
