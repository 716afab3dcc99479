"""Object stores: whole objects or none, checked reads, errors that say what to do, and no secret anywhere."""

import asyncio
import gc
import logging
import pickle
import sys
import time

import google_crc32c
import numpy as np
import pytest
import zarr
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype

from ooc_ntk.errors import DamagedFileError, InputError, StorageError, TransientStorageError
from ooc_ntk.storage import diskrate, objectreads, objects, objectwrites, retries
from ooc_ntk.storage.arrays import TileArray, TileRows, add_attributes, open_tile_array
from ooc_ntk.storage.atomic import FileRecord
from ooc_ntk.storage.checked import read_checked, read_stripes
from ooc_ntk.storage.directory import RunDirectory
from ooc_ntk.storage.local import LocalFiles
from ooc_ntk.storage.manifest import Manifest, Receipt
from ooc_ntk.storage.retries import retries as retries_so_far
from ooc_ntk.storage.storeurl import checked_store, files_at, is_store
from ooc_ntk.storage.stripes import TileStripes
from tests.s3 import BUCKET, KEY, SECRET, TOKEN, answering, environment, set_environment

obstore = pytest.importorskip("obstore")

VALUES = np.random.default_rng(0).normal(size=(25, 13)).astype("<f4")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(retries, "CALL_DELAYS", (0.0, 0.0, 0.0))


@pytest.fixture
def prefix(request):
    return f"objects/{request.node.name.translate(str.maketrans('[]', '--'))}"


@pytest.fixture
def files(s3, prefix, tmp_path):
    return files_at(f"s3://{BUCKET}/{prefix}", lambda: tmp_path)


def uploaded(files, path, data):
    file = staged(files, path, data)
    try:
        return file.seal()
    finally:
        file.discard()


def staged(files, path, data):
    file = files.stage(path)
    for start in range(0, len(data), 1000):
        file.append(data[start : start + 1000])
    return file


# --- URLs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("s3://my.bucket//a b/run=1", "s3://my.bucket/a b/run=1"),
        ("file:///shared/folder/", "file:///shared/folder"),
    ],
)
def test_urls_are_kept_in_one_form(given, kept):
    assert checked_store(given) == kept == checked_store(kept)
    assert is_store(given)


@pytest.mark.parametrize(
    "given",
    [
        f"s3://{KEY}:{SECRET}@bucket/a",
        f"s3://{SECRET}@bucket/a",
        f"s3://bucket/a?aws_secret_access_key={SECRET}",
        f"s3://bucket/a?token={SECRET}",
        f"s3://bucket/a#{SECRET}",
        f"s3://{KEY}:{SECRET}/x@bucket/a",
        f"https://bucket.s3.amazonaws.com/a?X-Amz-Signature={SECRET}",
    ],
)
def test_a_url_that_may_hold_a_secret_is_refused_and_not_repeated(given):
    with pytest.raises(InputError, match=r"credentials or options.*AWS_ACCESS_KEY_ID") as error:
        checked_store(given)
    assert SECRET not in str(error.value)
    assert KEY not in str(error.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("bucket/a", "a store is a URL"),
        ("gs://bucket/a", r"got one of gs://"),
        ("s3:///a", "names no bucket"),
        ("s3://b/a", "names no bucket"),
        ("s3://bucket/../a", "characters that not all stores take"),
        ("s3://bucket/a*", "characters that not all stores take"),
        ("file://host/a", "file:///folder"),
        ("file:///", "file:///folder"),
    ],
)
def test_what_is_no_store_is_refused(given, said):
    with pytest.raises(InputError, match=said):
        checked_store(given)


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(InputError, match=r"pip install 'ooc-ntk\[cloud\]'"):
        files_at("s3://bucket/a")
    assert isinstance(files_at("file:///a"), LocalFiles)


# --- writing ---------------------------------------------------------------------------------------------------------


def test_an_object_appears_whole_and_the_scratch_file_goes(files, s3, prefix, tmp_path):
    data = np.arange(5000, dtype=np.uint8)
    file = staged(files, "a/tile", data)
    assert s3.objects(prefix) == {}
    record = file.seal()
    assert record == FileRecord("a/tile", 5000, google_crc32c.value(data.tobytes())) == file.seal()
    file.publish()
    file.discard()
    assert s3.objects(prefix) == {"a/tile": data.tobytes()}
    assert list(tmp_path.iterdir()) == []


def test_a_large_object_is_sent_in_parts_and_the_last_may_be_short(files, s3, prefix, monkeypatch):
    monkeypatch.setattr(objectwrites, "PART_BYTES", 5 * 2**20)
    data = np.random.default_rng(1).integers(0, 256, 11 * 2**20 + 17, dtype=np.uint8)
    file = files.stage("large")
    file.append(data)
    record = file.seal()
    assert s3.objects(prefix)["large"] == data.tobytes()
    assert files.stamp("large").endswith("-3")  # the entity tag of three parts
    assert files.checksum("large") == record.crc32c
    assert s3.unfinished() == 0


def test_an_upload_that_breaks_off_leaves_nothing(files, s3, prefix, monkeypatch):
    monkeypatch.setattr(objectwrites, "PART_BYTES", 5 * 2**20)
    file = files.stage("broken")
    file.append(np.zeros(11 * 2**20, np.uint8))
    whole, left = file._file, [0, 1, 1]

    class Failing:
        """A scratch disk that fails in the middle."""

        def read(self, size=-1):
            if size and not left.pop():
                raise OSError(5, "Input/output error")
            return whole.read(size)

        def __getattr__(self, name):
            return getattr(whole, name)

    file._file = Failing()
    with pytest.raises(StorageError, match="uploading from"):
        file.seal()
    file.discard()
    assert s3.objects(prefix) == {}
    assert s3.unfinished() == 0


def test_a_discarded_object_never_appears(files, s3, prefix, tmp_path):
    staged(files, "a", np.ones(10, np.uint8)).discard()
    assert s3.objects(prefix) == {}
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_must_be_new_is_written_once(files, s3, prefix):
    assert files.write_new("mark", b"first")
    assert not files.write_new("mark", b"second")
    assert s3.objects(prefix) == {"mark": b"first"}


def test_names_sizes_and_deleting(files, s3, prefix):
    for path in ("a/one", "a/b/two", "ab/three", "four"):
        files.write_whole(path, path.encode())
    assert files.names() == ["a", "ab", "four"]
    assert files.names("a") == ["b", "one"]
    assert files.names("nothing") == []
    assert files.size("a/one") == 5
    assert files.size_bytes() == 5 + 7 + 8 + 4
    assert files.read_text("four") == "four"
    assert files.free_bytes() is None
    assert files.sweep() == 0
    files.delete("four", "not there")
    files.delete_folder("a")
    assert s3.objects(prefix) == {"ab/three": b"ab/three"}
    with pytest.raises(FileNotFoundError):
        files.size("four")


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 4999, 5000, 70_001])
def test_whole_reads_are_checked(files, size, monkeypatch):
    for module in (objects, objectreads):
        monkeypatch.setattr(module, "PIECE_BYTES", 5000)
    monkeypatch.setattr(objectreads, "_LEAST_BYTES", 700)
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    record = files.write_whole("tile", data.tobytes())
    buffer = np.empty(size + 8, np.uint8)
    files.reader(direct=True).read(record, buffer)
    assert buffer[:size].tobytes() == data.tobytes()
    assert files.read_bytes("tile") == data.tobytes()
    assert files.checksum("tile") == record.crc32c
    if size:
        stripe = np.empty((3, size), np.uint8)
        assert np.concatenate([part.copy() for part in read_stripes(files, record, stripe)]).tobytes() == data.tobytes()


def test_reads_past_the_end_are_short(files):
    files.write_whole("tile", b"abcde")
    file, buffer = files.open("tile"), np.empty(4, np.uint8)
    assert [file.read_at(buffer, at) for at in (0, 3, 5, 9)] == [4, 2, 0, 0]


@pytest.mark.parametrize("damage", ["altered", "shorter", "longer", "missing"])
def test_damage_is_told(files, s3, prefix, damage):
    data = np.arange(2000, dtype=np.uint8)
    record = files.write_whole("tile", data.tobytes())
    before = files.stamp("tile")
    if damage == "missing":
        s3.delete(f"{prefix}/tile")
    else:
        changed = {"altered": data ^ 1, "shorter": data[:-1], "longer": np.append(data, np.uint8(0))}[damage]
        s3.put(f"{prefix}/tile", changed.tobytes())
        assert files.stamp("tile") != before
    said = "is missing" if damage == "missing" else "is not what was committed"
    with pytest.raises(DamagedFileError, match=said):
        read_checked(files, record, np.empty(2000, np.uint8))
    if damage != "longer":  # stripes stop at the size that was committed, and the checksum of that is right
        with pytest.raises(DamagedFileError, match=said):
            list(read_stripes(files, record, np.empty((1, 2000), np.uint8)))


def test_stamps_of_many_are_those_of_each(files, monkeypatch):
    for number in range(7):
        files.write_whole(f"c/{number}", bytes([number]))
    paths = [f"c/{number}" for number in range(7)]
    each = {path: files.stamp(path) for path in paths}
    assert files.stamps(paths) == each == files.known_stamps([*paths, "c/8"])
    monkeypatch.setattr(objects, "_LISTED", 3)
    assert files.known_stamps([*paths[1:], "c/8"]) == {path: each[path] for path in paths[1:]}
    with pytest.raises(FileNotFoundError):
        files.stamps([*paths, "c/8"])


def test_a_store_is_timed_and_left_as_it_was(files, s3, prefix, monkeypatch):
    files.write_whole("kept", b"1")
    asked, put = [], obstore.put

    def slow(store, path, *more, **options):
        asked.append(path)
        time.sleep(0.05)
        return put(store, path, *more, **options)

    monkeypatch.setattr(obstore, "put", slow)
    found = diskrate.measure_store(files)
    assert len(asked) == 2 * diskrate.STORE_PROBES
    assert 0 < found.write < diskrate.STORE_PROBE_BYTES / 0.05
    assert found.read > 0
    assert found.commit_seconds >= 3 * 0.05
    assert s3.objects(prefix) == {"kept": b"1"}


# --- arrays ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def array(files):
    made = TileArray(files, "kernel.zarr", VALUES.shape, (10, 4), "<f4")
    made.create({"kernel": "trace"})
    made.create({"kernel": "trace"})  # what is there stays
    records = {}
    for i in range(3):
        for j in range(4):
            part = VALUES[10 * i : 10 * i + 10, 4 * j : 4 * j + 4]
            file = made.stage(made.chunk_path((i, j)), part)
            record = file.seal()
            records[record.path] = record
    return made, records


def test_arrays_are_read_by_plain_zarr(array, s3, prefix):
    store = zarr.storage.ObjectStore(
        obstore.store.S3Store.from_url(f"s3://{BUCKET}/{prefix}", client_options={"allow_http": True}), read_only=True
    )
    plain = zarr.open_array(store, path="kernel.zarr", mode="r")
    assert np.array_equal(plain[:], VALUES)
    assert plain.attrs["kernel"] == "trace"
    assert np.array_equal(open_tile_array(array[0].files, "kernel.zarr")[3:21, 2:9], VALUES[3:21, 2:9])


def test_attributes_are_added(array):
    add_attributes(array[0].files, "kernel.zarr", {"more": [1, 2]})
    assert dict(array[0].open().attrs) == {"kernel": "trace", "more": [1, 2]}


def test_an_array_of_another_shape_is_refused(array):
    with pytest.raises(StorageError, match=r"s3://.*holds an array of"):
        TileArray(array[0].files, "kernel.zarr", (5, 5), (10, 4), "<f4").create()
    with pytest.raises(StorageError, match=r"there is no array other.zarr in s3://"):
        open_tile_array(array[0].files, "other.zarr")


@pytest.mark.parametrize("gap", [0, 2**18])
def test_rows_are_read_without_their_chunks(array, monkeypatch, gap):
    monkeypatch.setattr(objectreads, "_GAP_BYTES", gap)
    rows = TileRows(array[0].files, "kernel.zarr")
    assert np.array_equal(rows[[3, 21, 3, 19, 0]], VALUES[[3, 21, 3, 19, 0]])
    assert np.array_equal(rows[4:17], VALUES[4:17])
    assert np.array_equal(rows[-1], VALUES[-1])
    assert np.array_equal(rows.region(range(5, 23), range(3, 11)), VALUES[5:23, 3:11])
    assert np.array_equal(np.asarray(rows), VALUES)


def test_the_diagonal_is_read(files, monkeypatch):
    square = np.random.default_rng(2).normal(size=(23, 23))
    made = TileArray(files, "kernel.zarr", (23, 23), (10, 10), "<f8")
    made.create()
    for i in range(3):
        made.stage(made.chunk_path((i, i)), square[10 * i : 10 * i + 10, 10 * i : 10 * i + 10]).seal()
    monkeypatch.setattr(objectreads, "PIECE_BYTES", 100)
    assert np.array_equal(TileRows(files, "kernel.zarr").diagonal(22), square.diagonal()[:22])


def test_stripes_are_checked(array, s3, prefix):
    made, records = array
    found = np.full(VALUES.shape, np.nan, "<f4")
    wanted = [(i, j) for i in range(3) for j in range(4)]
    for stripe, part in TileStripes(made, records).read(wanted):
        top, left = 10 * stripe.tile[0] + stripe.start, 4 * stripe.tile[1]
        found[top : top + len(part), left : left + part.shape[1]] = part
    assert np.array_equal(found, VALUES)
    s3.put(f"{prefix}/kernel.zarr/c/1/2", b"x" * 160)
    with pytest.raises(DamagedFileError, match="is not what was committed"):
        list(TileStripes(made, records).read(wanted))
    s3.delete(f"{prefix}/kernel.zarr/c/1/2")
    with pytest.raises(DamagedFileError, match="is missing"):
        list(TileStripes(made, records).read(wanted))
    with pytest.raises(StorageError, match="it is missing; run again"):
        TileRows(made.files, "kernel.zarr")[12]


def test_what_is_pickled_holds_no_secret(array):
    opened = array[0].open()
    for thing in (array[0].files, opened, opened.store_path.store):
        text = pickle.dumps(thing)
        for secret in (KEY, SECRET, TOKEN):
            assert secret.encode() not in text
            assert secret not in repr(thing)
    assert np.array_equal(pickle.loads(pickle.dumps(opened))[:], VALUES)


# --- a run's directory and manifest ----------------------------------------------------------------------------------


def test_a_worker_needs_no_run_directory(s3, prefix, tmp_path):
    """What tasks do: receipts, scratch files, tiles; the driver's folder is not there."""
    away = RunDirectory(tmp_path / "not here", f"s3://{BUCKET}/{prefix}")
    file = away.files.stage("tiles/a")
    file.append(np.ones(9, np.uint8))
    receipt = Receipt("rows-0-0-0", 1.0, files=(file.seal(),))
    away.leave_receipt(receipt)
    scratch = away.scratch
    assert scratch.is_dir()
    assert not away.root.exists()
    assert set(s3.objects(prefix)) == {"tiles/a", "pending/rows-0-0-0.json"}

    driver = RunDirectory(tmp_path / "run", f"s3://{BUCKET}/{prefix}")
    assert driver.pending_receipts() == [receipt]
    driver.root.mkdir()
    manifest = Manifest(driver.root, driver.files)
    manifest.commit(receipt)
    driver.drop_receipt(receipt.key)
    assert driver.pending_receipts() == []
    assert manifest.damage(thorough=True).reasons == manifest.damage(thorough=False).reasons == {}
    s3.put(f"{prefix}/tiles/a", b"\2" * 9)
    assert manifest.damage(thorough=False).reasons == {"tiles/a": "differs from its checksum"}
    s3.put(f"{prefix}/tiles/a", b"\2" * 8)
    assert manifest.damage(thorough=False).reasons == {"tiles/a": "has 8 bytes instead of 9"}
    s3.delete(f"{prefix}/tiles/a")
    assert manifest.damage(thorough=False).reasons == {"tiles/a": "is missing"}
    with pytest.raises(StorageError, match="No such file|no such object"):
        manifest.commit(receipt)
    manifest.close()
    del away, file
    gc.collect()
    assert not scratch.exists()  # with the worker that made it


def test_a_store_that_is_down_is_no_damage(s3, prefix, tmp_path, monkeypatch):
    directory = RunDirectory(tmp_path, f"s3://{BUCKET}/{prefix}")
    manifest = Manifest(tmp_path, directory.files)
    manifest.commit(Receipt("rows-0-0-0", 1.0, files=(directory.files.write_whole("a", b"1"),)))
    set_environment(monkeypatch, environment("http://127.0.0.1:9"))
    down = Manifest(tmp_path, files_at(f"s3://{BUCKET}/{prefix}"))
    for thorough in (True, False):
        with pytest.raises(TransientStorageError, match="cannot be reached"):
            down.damage(thorough=thorough)
    manifest.close()
    down.close()


# --- errors ----------------------------------------------------------------------------------------------------------


def asks(files):
    """Every kind of call, by its name."""
    return {
        "read": lambda: read_checked(files, FileRecord("a", 1, 0), np.empty(1, np.uint8)),
        "write": lambda: files.write_whole("a", b"1"),
        "upload": lambda: uploaded(files, "a", np.ones(1, np.uint8)),
        "list": lambda: files.names(),
        "zarr": lambda: files.zarr_store() and open_tile_array(files, "kernel.zarr"),
        "create": lambda: TileArray(files, "kernel.zarr", (2, 2), (2, 2), "<f4").create(),
    }


CALLS = ("read", "write", "upload", "list", "zarr", "create")


@pytest.mark.parametrize("call", CALLS)
def test_an_endpoint_that_is_down_is_said_in_bounded_time(monkeypatch, tmp_path, call):
    set_environment(monkeypatch, environment(f"http://{KEY}:{SECRET}@127.0.0.1:9"))
    files = files_at(f"s3://{BUCKET}/a", lambda: tmp_path)
    began, before = time.perf_counter(), retries_so_far()
    with pytest.raises(TransientStorageError, match=r"127\.0\.0\.1:9 cannot be reached.*AWS_ENDPOINT_URL") as error:
        asks(files)[call]()
    assert time.perf_counter() - began < 10
    assert retries_so_far() - before == len(retries.CALL_DELAYS)
    check_no_secret(error.value)


def check_no_secret(error):
    """No secret is in an error, nor in those that it came from."""
    chain = error
    while chain is not None:
        for secret in (KEY, SECRET, TOKEN):
            assert secret not in f"{chain} {chain!r} {chain.args}"
        chain = chain.__cause__ or chain.__context__


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (403, "InvalidAccessKeyId", r"access denied \(InvalidAccessKeyId\).*AWS_ACCESS_KEY_ID"),
        (403, "SignatureDoesNotMatch", r"access denied \(SignatureDoesNotMatch\)"),
        (401, "", r"access denied"),
        (400, "ExpiredToken", r"access denied \(ExpiredToken\)"),
        (301, "PermanentRedirect", "another region; set AWS_REGION"),
        (400, "AuthorizationHeaderMalformed", "another region; set AWS_REGION"),
        (400, "EntityTooLarge", r"refused it \(EntityTooLarge\)"),
    ],
)
def test_what_a_store_refuses_is_said_without_what_it_repeats(monkeypatch, tmp_path, caplog, call, status, code, said):
    caplog.set_level(logging.DEBUG)
    body = (
        f"<Error><Code>{code}</Code><AWSAccessKeyId>{KEY}</AWSAccessKeyId><StringToSign>{SECRET}</StringToSign></Error>"
    )
    with answering(status, body.encode()) as asked:
        set_environment(monkeypatch, environment(asked[0]))
        if call == "read":
            call = "list" if not code else call  # an answer to HEAD has no body that says why
        with pytest.raises(StorageError) as error:
            asks(files_at(f"s3://{BUCKET}/a", lambda: tmp_path))[call]()
        if call != "read":
            assert error.match(said)
    assert not isinstance(error.value, TransientStorageError)
    assert len(asked) < 5  # what does not pass is not asked again
    check_no_secret(error.value)
    assert KEY not in caplog.text
    assert SECRET not in caplog.text


def test_errors_that_pass_are_tried_again_and_counted(monkeypatch, tmp_path):
    with answering(503, b"<Error><Code>SlowDown</Code></Error>", times=4) as asked:
        set_environment(monkeypatch, environment(asked[0]))
        before = retries_so_far()
        files_at(f"s3://{BUCKET}/a").write_whole("a", b"1")
        assert len(asked) == 1 + 4 + 1
        assert retries_so_far() - before == 1  # and three within obstore's own tries


def test_errors_that_do_not_pass_are_given_up(monkeypatch, tmp_path):
    with answering(500, b"") as asked:
        set_environment(monkeypatch, environment(asked[0]))
        with pytest.raises(TransientStorageError, match="answered 500 again and again"):
            files_at(f"s3://{BUCKET}/a").write_whole("a", b"1")
        assert len(asked) == 1 + 4 * 3


def test_a_bucket_that_is_not_there_is_named(s3):
    files = files_at("s3://no-such-bucket/a")
    for call in (lambda: files.names(), lambda: files.write_whole("a", b"1"), lambda: files.read_text("a")):
        with pytest.raises(StorageError, match=r"there is no bucket 'no-such-bucket' at 127\.0\.0\.1.*correct --store"):
            call()


def test_missing_credentials_are_said(monkeypatch):
    with answering(404, b"") as asked:
        settings = {"AWS_REGION": "us-east-1", "AWS_METADATA_ENDPOINT": asked[0], "AWS_ALLOW_HTTP": "true"}
        set_environment(monkeypatch, settings)
        with pytest.raises(StorageError, match="no credentials were found; set AWS_ACCESS_KEY_ID"):
            files_at("s3://bucket/a").names()


def test_plain_http_has_to_be_meant(s3, monkeypatch):
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with pytest.raises(StorageError, match="plain http; set AWS_ALLOW_HTTP=true"):
        files_at(f"s3://{BUCKET}/a").names()


def test_a_full_scratch_disk_is_said(files, monkeypatch):
    file = files.stage("a")

    class Full:
        def write(self, view):
            raise OSError(28, "No space left on device")

        def close(self):
            """Nothing to close."""

    file._file.close()
    file._file = Full()
    with pytest.raises(StorageError, match="the disk is full"):
        file.append(np.ones(4, np.uint8))
    file.discard()


# --- for Zarr --------------------------------------------------------------------------------------------------------


def test_zarr_reads_ranges_and_finds_what_is_there(files):
    store, buffers = files.zarr_store(), default_buffer_prototype()
    wants = {
        None: b"0123456789",
        RangeByteRequest(2, 5): b"234",
        OffsetByteRequest(7): b"789",
        SuffixByteRequest(3): b"789",
        SuffixByteRequest(30): b"0123456789",
    }

    async def go() -> None:
        await store.set("a", buffers.buffer.from_bytes(b"0123456789"))
        await store.set_if_not_exists("a", buffers.buffer.from_bytes(b"other"))
        for want, expected in wants.items():
            found = await store.get("a", buffers, want)
            assert found.to_bytes() == expected
        some = await store.get_partial_values(buffers, [("a", RangeByteRequest(0, 1)), ("b", None)])
        assert [each and each.to_bytes() for each in some] == [b"0", None]
        assert (await store.exists("a"), await store.exists("b")) == (True, False)
        await store.delete("a")
        assert not await store.exists("a")

    asyncio.run(go())


def test_zarrs_store_goes_to_other_processes_without_secrets(files):
    store = files.zarr_store(read_only=True)
    data = pickle.dumps(store)
    assert pickle.loads(data) == store
    assert SECRET.encode() not in data
    assert store.with_read_only() != store
    assert store.with_read_only() == files.zarr_store()
    assert str(store) == files.url

    async def write() -> None:
        await store.set("a", default_buffer_prototype().buffer.from_bytes(b"1"))

    with pytest.raises(ValueError, match="read-only"):
        asyncio.run(write())
