"""How fast the disk under a folder, or a store, writes and reads."""

from __future__ import annotations

import shutil
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ooc_ntk.errors import StorageError

from .atomic import FileRecord, StagedFile, write_whole
from .files import Files
from .reading import O_DIRECT, FileReader, aligned_buffer, forget_pages
from .retries import storage_error

#: Most bytes of the files that are timed. (Measured: 64 MiB and 256 MiB vary by a factor of four with the state of the
#: page cache, 512 MiB agrees with several GiB within 10%.) A nearly full disk gets a smaller one.
PROBE_BYTES: Final = 2**29

#: Bytes of one of them, and of the buffer it is written from and read into.
PIECE_BYTES: Final = 2**24

#: Bytes of an object that is timed, a part of a large one, and how many are (choices: a few seconds over a slow line).
STORE_PROBE_BYTES: Final = 2**23
STORE_PROBES: Final = 3

#: How much faster reads past the page cache must be to be used (chosen: two timings of one disk differ by as much).
DIRECT_MARGIN: Final = 1.15


@dataclass(frozen=True)
class DiskRates:
    """Measured rates of one file system.

    Attributes:
        write: bytes/s written and synced.
        read: bytes/s read as runs read and check tiles, the faster way. The page cache is dropped first, if the system
            allows it.
        direct_wins: whether that is past the page cache.
        commit_seconds: seconds to write, sync and rename one small file.
    """

    write: float
    read: float
    commit_seconds: float
    direct_wins: bool


def measure_disk(folder: Path) -> DiskRates:
    """Measure the file system that holds ``folder`` (made if needed), in a second or two.

    Returns:
        The rates.

    Raises:
        StorageError: if nothing can be written there.
    """
    try:
        return _measure(folder)
    except StorageError:
        raise
    except OSError as error:
        raise storage_error("measuring the disk at", folder, error) from error


def _measure(folder: Path) -> DiskRates:
    folder.mkdir(parents=True, exist_ok=True)
    data = aligned_buffer(PIECE_BYTES)
    data[:] = np.random.default_rng(0).integers(0, 256, PIECE_BYTES, dtype=np.uint8)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".ooc-ntk-rate-") as name:
        root = Path(name)
        pieces = max(1, min(PROBE_BYTES, shutil.disk_usage(root).free // 8) // PIECE_BYTES)
        start = time.perf_counter()
        staged = []
        for index in range(pieces):
            staged.append(StagedFile(root, f"tile-{index}"))
            staged[-1].append(data)
        records = [file.seal() for file in staged]
        write = pieces * PIECE_BYTES / (time.perf_counter() - start)
        for file in staged:
            file.publish()

        buffered = direct = 0.0
        for _ in range(2):  # in turns: what else the machine does slows both
            buffered = max(buffered, _read_rate(root, records, data, direct=False))
            direct = max(direct, _read_rate(root, records, data, direct=True) if O_DIRECT else 0.0)

        start = time.perf_counter()
        for index in range(5):
            write_whole(root, f"small/{index}", b"x" * 1024)
        commit = (time.perf_counter() - start) / 5
    wins = direct > DIRECT_MARGIN * buffered
    return DiskRates(write, direct if wins else buffered, 3 * commit, wins)


def measure_store(files: Files) -> DiskRates:
    """Measure an object store as tasks use it, by a few objects that are deleted again; seconds, by the network.

    Args:
        files: the store.

    Returns:
        The rates; a network is not as steady as a disk, so they are what it was just now.

    Raises:
        StorageError: if objects cannot be written, read or deleted.
    """
    data = np.random.default_rng(0).integers(0, 256, STORE_PROBE_BYTES, dtype=np.uint8)
    folder, count = f".rate-{uuid.uuid4().hex[:12]}", STORE_PROBES
    try:
        start, records = time.perf_counter(), []
        for index in range(count):
            staged = files.stage(f"{folder}/tile-{index}")
            try:
                staged.append(data)
                records.append(staged.seal())
                staged.publish()
            finally:
                staged.discard()
        written, reader = time.perf_counter(), files.reader()
        for record in records:
            reader.read(record, data)
        read = time.perf_counter()
        for index in range(count):
            files.write_whole(f"{folder}/small-{index}", b"x" * 1024)
        commit = (time.perf_counter() - read) / count
    finally:
        files.delete_folder(folder)
    size = count * STORE_PROBE_BYTES
    return DiskRates(size / (written - start), size / (read - written), 3 * commit, direct_wins=False)


def _read_rate(root: Path, records: Sequence[FileRecord], buffer: NDArray[np.uint8], *, direct: bool) -> float:
    """Bytes/s of reading files back one after the other, from the disk where the system allows it."""
    for record in records:
        forget_pages(root / record.path)
    reader = FileReader(root, direct=direct)
    start = time.perf_counter()
    for record in records:
        reader.read(record, buffer)
    return sum(record.size for record in records) / (time.perf_counter() - start)
