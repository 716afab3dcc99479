"""What is on disk after a fault, read without the engine, and what must hold of it."""

from __future__ import annotations

import fcntl
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import google_crc32c
import numpy as np

import ooc_ntk
from ooc_ntk.errors import IncompleteRunError, StorageError
from ooc_ntk.execution.status import AUDIT
from ooc_ntk.execution.stores import FACTORS, FEATURES, HEAVY, JACOBIAN

#: Where tiles of Jacobian rows are; rows whose tiles are in memory, or released, may have to be derived again.
SPILLED: Final = (JACOBIAN, FACTORS)
KEPT: Final = (FEATURES, HEAVY)


#: Marks of files that are being written: the engine's, and Zarr's for metadata.
UNFINISHED: Final = (".tmp-", ".partial")


@dataclass(frozen=True)
class File:
    """A committed file: the task that wrote it, its bytes and its CRC-32C."""

    task: str
    size: int
    crc32c: int


@dataclass(frozen=True)
class Snapshot:
    """What the manifest says.

    Attributes:
        tasks: commit time of every finished task.
        files: files by path relative to the run directory.
        journal: whether a transaction was under way that SQLite has to roll back.
    """

    tasks: dict[str, float] = field(default_factory=dict)
    files: dict[str, File] = field(default_factory=dict)
    journal: bool = False


def snapshot(out: Path) -> Snapshot:
    """Read a copy of the manifest, so that what a kill left is repaired by the engine and not by the test."""
    if not (out / "manifest").exists():
        return Snapshot()
    with tempfile.TemporaryDirectory() as copy:
        for path in out.glob("manifest*"):
            shutil.copy(path, copy)
        journal = (out / "manifest-journal").exists()
        database = sqlite3.connect(Path(copy) / "manifest")
        try:
            if not database.execute("SELECT count(*) FROM sqlite_master WHERE name = 'files'").fetchone()[0]:
                return Snapshot(journal=journal)
            tasks = dict(database.execute("SELECT key, committed FROM tasks"))
            rows = database.execute("SELECT path, task, size, crc32c FROM files")
            return Snapshot(tasks, {path: File(*rest) for path, *rest in rows}, journal)
        finally:
            database.close()


@dataclass(frozen=True)
class Reference:
    """An undisturbed run.

    Attributes:
        out: its run directory.
        tasks: keys of all tasks.
        contents: bytes of every committed file that a finished run keeps, by path.
        names: every file of the finished run.
        counts: calls at the file layer.
    """

    out: Path
    tasks: frozenset[str]
    contents: dict[str, bytes]
    names: frozenset[str]
    counts: dict[str, int]


def reference_of(out: Path, counts: dict[str, int]) -> Reference:
    """Read an undisturbed run that is finished."""
    seen = snapshot(out)
    contents = {path: (out / path).read_bytes() for path in seen.files}
    return Reference(out, frozenset(seen.tasks), contents, frozenset(names(out)), counts)


def names(out: Path) -> set[str]:
    """Every file of a run directory but what an audit leaves."""
    return {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} - {AUDIT}


def is_whole(out: Path, path: str, file: File) -> bool:
    """Whether a file is what was committed."""
    try:
        data = (out / path).read_bytes()
    except FileNotFoundError:
        return False
    return len(data) == file.size and google_crc32c.value(data) == file.crc32c


def family(key: str) -> tuple[str, str]:
    """What a task has in common with the same task of other passes, which are undone together."""
    kind, _, place = key.split("-", 2)
    return kind, place


def check_kept(
    before: Snapshot, after: Snapshot, damaged: Iterable[str], ever_damaged: bool, wanted: frozenset[str]
) -> None:
    """No finished task is lost, or done again without need.

    Args:
        before: the manifest before a fault.
        after: the manifest after it.
        damaged: files that faults have damaged and that were not computed again yet, as of ``before``.
        ever_damaged: whether any file was damaged so far.
        wanted: keys of the tasks of a finished run.
    """
    undone = {family(before.files[path].task) for path in damaged if path in before.files}
    # Spilled tiles are forgotten array by array once every kernel tile is there.
    releasing = all(key in before.tasks for key in wanted if key.startswith("kernel"))
    tiles = KEPT if releasing else (*SPILLED, *KEPT)
    stored = {file.task for path, file in before.files.items() if path.startswith(tiles)}
    # A tile that is found damaged when all others are there, and theirs are given up, takes its rows again.
    had, has = (any(path.startswith(SPILLED) for path in seen.files) for seen in (before, after))
    released = bool(undone) and had and not has
    unfinished = len(before.tasks) < len(wanted) or bool(undone)
    for key, committed in before.tasks.items():
        if after.tasks.get(key) == committed or family(key) in undone:
            continue
        kind = key.split("-")[0]
        if kind == "release" and ever_damaged:
            continue
        assert key in after.tasks, f"the finished task {key} is lost"
        assert kind == "rows", f"the finished task {key} was done again"
        assert key not in stored or released, f"{key} was done again although its tiles are on disk"
        assert unfinished, f"{key} was done again although nothing needs its tiles"


def check_files(out: Path, seen: Snapshot, reference: Reference, damaged: Iterable[str]) -> None:
    """Every committed file is what was committed, and what an undisturbed run has there."""
    for path, file in seen.files.items():
        if path in damaged:
            continue
        assert file.task in seen.tasks, f"{path} belongs to the task {file.task}, which is not finished"
        assert is_whole(out, path, file), f"the committed file {path} is not what was committed"
        if path in reference.contents:
            assert (out / path).read_bytes() == reference.contents[path], f"{path} differs from the undisturbed run"


def check_opened(out: Path, seen: Snapshot, reference: Reference, damaged: Iterable[str]) -> bool:
    """A kernel that opens has the right numbers; one that is not finished does not open.

    Returns:
        Whether it opened.
    """
    try:
        kernel = ooc_ntk.open(out)
    except (IncompleteRunError, StorageError):
        return False
    missing = {key for key in reference.tasks - set(seen.tasks) if not key.startswith("release")}
    results = {key for key in missing if key.startswith("rows" if kernel.plan.features_only else "kernel")}
    assert not results, f"the kernel opened although {sorted(results)[:3]} are not finished"
    if not set(damaged):
        check_same(kernel, ooc_ntk.open(reference.out))
    return True


def check_same(kernel: ooc_ntk.Kernel, expected: ooc_ntk.Kernel) -> None:
    """Kernel, diagonal, layers and features have the same bits."""
    assert np.isfinite(expected[:]).all()
    assert kernel[:].tobytes() == expected[:].tobytes(), "the kernel differs from the undisturbed run"
    assert kernel.diagonal().tobytes() == expected.diagonal().tobytes(), "the diagonal differs"
    for name in expected.layers:
        found, right = np.asarray(kernel.layer(name)), np.asarray(expected.layer(name))
        assert found.tobytes() == right.tobytes(), f"the summand of layer {name} differs"
    if expected.plan is not None and expected.plan.projection is not None:
        assert kernel.features.array[:].tobytes() == expected.features.array[:].tobytes(), "the features differ"
        if expected.features.heavy is not None:
            found, right = kernel.features.heavy[:], expected.features.heavy[:]
            assert found.tobytes() == right.tobytes(), "the heavy gradients differ"


def check_unlocked(out: Path) -> None:
    """Whoever held the run directory has let go of it."""
    if (out / "lock").exists():
        with (out / "lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


def check_swept(out: Path) -> None:
    """A run that stopped cleanly has left no half-written file."""
    left = [name for name in names(out) if any(mark in name for mark in UNFINISHED)]
    assert not left, f"half-written files were left: {left[:3]}"


def check_finished(out: Path, reference: Reference) -> None:
    """A finished run has the same bits as an undisturbed one, the same files and no others, and passes its audit."""
    seen = snapshot(out)
    assert seen.tasks.keys() == reference.tasks
    assert seen.files.keys() == reference.contents.keys()
    check_files(out, seen, reference, ())
    assert names(out) == reference.names, sorted(names(out) ^ reference.names)[:5]
    assert check_opened(out, seen, reference, ())
    audit = ooc_ntk.verify(out, samples=0)
    assert audit.passed, audit.checks
    check_unlocked(out)


#: What a run says of faults that it gets over.
WARNING: Final = re.compile(r"it will be computed again$|computing it again now$|trying again in .* \(retry \d+\)$")


def check_output(said: str, code: int) -> None:
    """What a run printed: one line on what went wrong, if anything did, and no traceback.

    Args:
        said: everything it printed.
        code: its exit code.
    """
    lines = [line for line in said.splitlines() if line and not WARNING.search(line)]
    assert "Traceback" not in said, said
    assert len(lines) == (0 if code in (0, -9, -15) else 1), f"exit code {code}:\n{said}"
    if code == 2:
        assert lines[0].startswith("error: "), said
