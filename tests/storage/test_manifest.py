"""The manifest: what is committed, what became of it, and which manifests are refused."""

import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest

from ooc_ntk.errors import StorageError
from ooc_ntk.storage.atomic import write_whole
from ooc_ntk.storage.manifest import MANIFEST_VERSION, Manifest, Receipt


@pytest.fixture
def manifest(tmp_path):
    manifest = Manifest(tmp_path)
    yield manifest
    manifest.close()


def publish(root, key, *paths, replaces=()):
    files = tuple(write_whole(root, path, f"{key}:{path}".encode()) for path in paths)
    return Receipt(key, 1.5, 10, 20, 30, 40, files, "digest", tuple(replaces))


def test_a_receipt_there_and_back(tmp_path):
    receipt = publish(tmp_path, "kernel-0-1-0", "k/1/0", "k/0/1", replaces=("old",))
    assert Receipt.from_json(receipt.to_json()) == receipt
    assert "\n" not in receipt.to_json()


def test_commits_survive_closing(tmp_path):
    receipt = publish(tmp_path, "kernel-0-1-0", "k/1/0", "k/0/1")
    manifest = Manifest(tmp_path)
    manifest.set_meta("job", "first")
    manifest.set_meta("job", "second")
    manifest.commit(receipt)
    manifest.close()
    for read_only in (True, False):
        manifest = Manifest(tmp_path, read_only=read_only)
        assert manifest.receipts() == {receipt.key: receipt}
        assert manifest.files() == {record.path: record for record in receipt.files}
        assert manifest.meta("job") == "second"
        assert manifest.meta("nothing") is None
        manifest.close()


def test_several_texts_are_one_transaction(manifest):
    statements = []
    manifest._database.set_trace_callback(statements.append)
    manifest.set_metas({"job": "a", "plan": "b", "sketch": ""})
    assert [manifest.meta(name) for name in ("job", "plan", "sketch")] == ["a", "b", ""]
    assert statements.count("COMMIT") == 1


def test_a_replaced_file_is_forgotten_not_deleted(manifest, tmp_path):
    manifest.commit(publish(tmp_path, "kernel-0-0-0", "partial-0"))
    manifest.commit(publish(tmp_path, "kernel-1-0-0", "partial-1", replaces=("partial-0",)))
    assert list(manifest.files()) == ["partial-1"]
    assert (tmp_path / "partial-0").exists()
    assert list(manifest.receipts()) == ["kernel-0-0-0", "kernel-1-0-0"]


def test_withdrawing(manifest, tmp_path):
    manifest.commit(publish(tmp_path, "rows-0-0-0", "a", "b"))
    manifest.commit(publish(tmp_path, "rows-0-1-0", "c"))
    manifest.withdraw(["rows-0-0-0", "unknown"])
    assert list(manifest.receipts()) == ["rows-0-1-0"]
    assert list(manifest.files()) == ["c"]


def test_a_released_folder_is_forgotten_with_its_tasks_finished(manifest, tmp_path):
    manifest.commit(publish(tmp_path, "rows-0-0-0", "tiles/jacobian.zarr/c/0/0/0", "diagonal/c/0"))
    manifest.forget_files("tiles/jacobian.zarr")
    assert list(manifest.files()) == ["diagonal/c/0"]
    assert "rows-0-0-0" in manifest.receipts()


def test_a_file_that_is_not_there_cannot_be_committed(manifest, tmp_path):
    receipt = publish(tmp_path, "rows-0-0-0", "a")
    (tmp_path / "a").unlink()
    with pytest.raises(StorageError, match=r"manifest.*No such file"):
        manifest.commit(receipt)
    assert manifest.receipts() == {}


def rewrite_in_place(path):
    """Alter one byte and restore the times: only the change time tells."""
    stat = path.stat()
    with path.open("r+b") as file:
        file.write(b"X")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("thorough", [False, True])
@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: os.truncate(path, 3), "has 3 bytes instead of"),
        (lambda path: path.write_bytes(path.read_bytes() + b"+"), "bytes instead of"),
        (rewrite_in_place, "differs from its checksum"),
    ],
)
def test_damage_is_found_and_named(harm, reason, thorough, manifest, tmp_path):
    manifest.commit(publish(tmp_path, "kernel-0-1-0", "k/1/0", "k/0/1"))
    manifest.commit(publish(tmp_path, "kernel-0-0-0", "k/0/0"))
    assert not manifest.damage(thorough=thorough).reasons
    harm(tmp_path / "k/0/1")
    damage = manifest.damage(thorough=thorough)
    assert list(damage.reasons) == ["k/0/1"]
    assert reason in damage.reasons["k/0/1"]
    assert damage.tasks == {"kernel-0-1-0"}


@pytest.mark.parametrize("thorough", [False, True])
def test_a_file_that_was_touched_or_copied_is_not_damaged(thorough, manifest, tmp_path):
    manifest.commit(publish(tmp_path, "kernel-0-0-0", "k/0/0", "k/0/1"))
    os.utime(tmp_path / "k/0/0")
    data = (tmp_path / "k/0/1").read_bytes()
    (tmp_path / "k/0/1").unlink()
    (tmp_path / "k/0/1").write_bytes(data)
    assert not manifest.damage(thorough=thorough).reasons


def test_untouched_files_are_not_read_again(manifest, tmp_path, monkeypatch):
    manifest.commit(publish(tmp_path, "kernel-0-0-0", "k/0/0"))
    read = []
    monkeypatch.setattr("ooc_ntk.storage.local.checksum_file", lambda path: read.append(path) or 0)
    assert not manifest.damage(thorough=False).reasons
    assert read == []
    assert manifest.damage(thorough=True).reasons


def test_a_manifest_of_a_newer_version_is_refused(tmp_path):
    Manifest(tmp_path).close()
    database = sqlite3.connect(tmp_path / "manifest")
    database.execute(f"PRAGMA user_version = {MANIFEST_VERSION + 1}")
    database.close()
    for read_only in (False, True):
        with pytest.raises(StorageError, match=rf"format {MANIFEST_VERSION + 1}.*up to {MANIFEST_VERSION}\); upgrade"):
            Manifest(tmp_path, read_only=read_only)


@pytest.mark.parametrize("read_only", [False, True])
def test_garbage_is_refused_and_kept(read_only, tmp_path):
    (tmp_path / "manifest").write_bytes(b"this is no database, " * 100)
    with pytest.raises(StorageError, match="cannot read the manifest"):
        Manifest(tmp_path, read_only=read_only)
    assert (tmp_path / "manifest").read_bytes().startswith(b"this is no database")


def test_a_damaged_page_is_an_error_of_ours(tmp_path):
    manifest = Manifest(tmp_path)
    for index in range(100):
        manifest.commit(publish(tmp_path, f"rows-0-{index}-0", f"a{index}"))
    manifest.close()
    data = bytearray((tmp_path / "manifest").read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    (tmp_path / "manifest").write_bytes(data)
    with pytest.raises(StorageError, match="manifest"), closing(Manifest(tmp_path, read_only=True)) as damaged:
        damaged.receipts()


def test_reading_makes_nothing(tmp_path):
    with pytest.raises(StorageError, match="holds no run: there is no manifest"):
        Manifest(tmp_path, read_only=True)
    assert list(tmp_path.iterdir()) == []


def test_reading_only_does_not_write(tmp_path):
    Manifest(tmp_path).close()
    manifest = Manifest(tmp_path, read_only=True)
    with pytest.raises((sqlite3.Error, StorageError)):
        manifest.set_meta("a", "b")
    manifest.close()


KILLED_IN_A_COMMIT = """
import os, signal, sys
from pathlib import Path
from ooc_ntk.storage.manifest import Manifest
manifest = Manifest(Path(sys.argv[1]))
database = manifest._database
database.execute("PRAGMA cache_size = 2")  # pages go to the file before the commit, as they do in the middle of one
database.execute("BEGIN IMMEDIATE")
for index in range(60):
    database.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (str(index), "new" * 1000))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("read_only", [True, False])
def test_a_process_killed_within_a_commit_leaves_a_manifest_that_opens(read_only, tmp_path):
    manifest = Manifest(tmp_path)
    for index in range(60):
        manifest.set_meta(str(index), "old" * 1000)
    manifest.close()
    done = subprocess.run([sys.executable, "-c", KILLED_IN_A_COMMIT, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "manifest-journal").stat().st_size > 0
    manifest = Manifest(tmp_path, read_only=read_only)
    assert {manifest.meta(str(index)) for index in range(60)} == {"old" * 1000}
    manifest.close()
