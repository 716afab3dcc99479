import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from ooc_ntk.errors import InputError
from ooc_ntk.inputs.images import ahead
from ooc_ntk.inputs.images.source import open_images
from tests.inputs.images import real_files

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    real_files.write_imagefolder(folder, samples=11)
    return folder


def open_photos(folder, **keywords):
    return open_images(f"imagefolder:{folder},resize=12,crop=10", data_dir=None, **keywords)


RANGES = [(0, 3), (3, 4), (4, 9), (9, 11), (0, 2)]


@pytest.mark.parametrize("workers", [0, 2])
def test_streams_are_what_fetch_returns_in_order(photos, workers, monkeypatch):
    monkeypatch.setattr(ahead, "_PIECE_IMAGES", 2)
    source = open_photos(photos, workers=workers)
    single = open_photos(photos)
    for _ in range(2):  # the second pass finds the workers of the first
        found = list(source.stream(RANGES))
        assert len(found) == len(RANGES)
        for (start, stop), samples in zip(RANGES, found, strict=True):
            expected = single.fetch(start, stop)
            assert torch.equal(samples.args[0], expected.args[0])
            assert torch.equal(samples.targets, expected.targets)
    assert source.decoded == 2 * 13
    source.close()


def test_workers_serve_sets_in_memory_that_are_resized_and_made_up_ones(tmp_path):
    real_files.write_cifar10(tmp_path)
    for text in ("cifar10:train,resize=40", "fakedata:train,samples=10,size=9"):
        source = open_images(text, data_dir=tmp_path, workers=2)
        (found,) = source.stream([(0, 10)])
        assert torch.equal(found.args[0], source.fetch(0, 10).args[0])
        assert torch.equal(found.targets, source.fetch(0, 10).targets)
        source.close()


def test_nothing_is_started_where_pixels_are_ready(tmp_path):
    real_files.write_cifar10(tmp_path)
    source = open_images("cifar10:test", data_dir=tmp_path, workers=2)
    found = list(source.stream([(0, 3), (3, 4)]))
    assert [samples.size for samples in found] == [3, 1]
    assert multiprocessing.active_children() == []
    assert source.decoded == 0


def test_random_numbers_of_the_user_are_left_alone(photos):
    for workers in (0, 2):
        source = open_photos(photos, workers=workers)
        before = torch.get_rng_state()
        list(source.stream([(0, 4)]))
        assert torch.equal(torch.get_rng_state(), before)
        source.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_ranges_outside_the_data_are_refused_at_once(photos, workers):
    source = open_photos(photos, workers=workers)
    for wrong in ((-1, 2), (3, 3), (4, 2), (10, 12)):
        with pytest.raises(InputError, match="cannot fetch samples"):
            source.stream([(0, 1), wrong])
    assert list(source.stream([])) == []
    source.close()


def test_the_thread_stays_two_ranges_ahead(photos, monkeypatch):
    read = []
    decode = ahead.read_pixels

    def spy(images, cache, start, stop):
        found = decode(images, cache, start, stop)
        read.append(start)
        return found

    monkeypatch.setattr(ahead, "read_pixels", spy)
    stream = open_photos(photos).stream([(number, number + 1) for number in range(8)])
    next(stream)
    deadline = time.monotonic() + 20
    while len(read) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert read == [0, 1, 2]
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ooc-ntk-images")]
    assert len(read) <= 4


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_closed_early_leaves_the_source_usable(photos, workers, monkeypatch):
    monkeypatch.setattr(ahead, "_PIECE_IMAGES", 1)
    source = open_photos(photos, workers=workers)
    stream = source.stream([(0, 2), (2, 4), (4, 11)])
    next(stream)
    stream.close()
    found = list(source.stream([(5, 8)]))
    assert torch.equal(found[0].args[0], source.fetch(5, 8).args[0])
    source.close()
    source.close()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_two_streams_at_once_do_not_disturb_each_other(photos, workers):
    source = open_photos(photos, workers=workers)
    single = [source.fetch(start, start + 2).args[0] for start in range(0, 8, 2)]
    ranges = [(start, start + 2) for start in range(0, 8, 2)]
    first, second = source.stream(ranges), source.stream(ranges[::-1])
    pairs = list(zip(first, second, strict=True))
    for position, (forward, backward) in enumerate(pairs):
        assert torch.equal(forward.args[0], single[position])
        assert torch.equal(backward.args[0], single[3 - position])
    source.close()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_arrive_unchanged_at_their_range(tmp_path, workers):
    real_files.write_imagefolder(tmp_path, samples=9, size=(8, 8))
    broken = sorted(tmp_path.glob("*/*"))[4]
    broken.write_bytes(b"no image")
    source = open_photos(tmp_path, workers=workers)
    with pytest.raises(InputError) as expected:
        source.fetch(4, 5)
    stream = source.stream([(0, 2), (2, 4), (4, 6), (6, 9)])
    assert [next(stream).size, next(stream).size] == [2, 2]
    with pytest.raises(InputError) as caught:
        next(stream)
    assert type(caught.value) is InputError
    assert str(caught.value) == str(expected.value)
    assert f"sample 4 cannot be decoded: {broken}" in str(caught.value)
    assert [samples.size for samples in source.stream([(6, 9)])] == [3]
    source.close()


def test_a_worker_that_dies_is_an_error_and_the_next_pass_starts_new_ones(photos, monkeypatch):
    monkeypatch.setattr(ahead, "_PIECE_IMAGES", 1)
    source = open_photos(photos, workers=2)
    list(source.stream([(0, 4)]))
    children = multiprocessing.active_children()
    assert len(children) == 2
    stream = source.stream([(number % 11, number % 11 + 1) for number in range(40)])
    next(stream)
    for child in children:
        child.kill()
        child.join()
    with pytest.raises(InputError, match="a process that decodes images ended before its work was done"):
        list(stream)
    assert multiprocessing.active_children() == []
    assert [samples.size for samples in source.stream([(0, 3)])] == [3]
    source.close()


def _stream_in_a_daemon(folder, results):
    source = open_photos(folder, workers=2)
    results.put([samples.args[0].numpy().tobytes() for samples in source.stream(RANGES)])


def test_a_process_that_may_not_start_others_decodes_in_a_thread(photos):
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    child = context.Process(target=_stream_in_a_daemon, args=(photos, results), daemon=True)
    child.start()
    found = results.get()
    child.join()
    assert found == [open_photos(photos).fetch(*span).args[0].numpy().tobytes() for span in RANGES]


def test_ctrl_c_is_left_to_the_consumer(photos, monkeypatch):
    monkeypatch.setattr(ahead, "_PIECE_IMAGES", 1)
    source = open_photos(photos, workers=2)
    stream = source.stream(RANGES)
    next(stream)
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGINT)
    assert [samples.size for samples in stream] == [1, 5, 2, 2]
    assert len(multiprocessing.active_children()) == 2
    source.close()


def test_idle_workers_end_with_the_process(photos, monkeypatch):
    hooks = []
    monkeypatch.setattr(ahead.atexit, "register", hooks.append)
    source = open_photos(photos, workers=2)
    list(source.stream(RANGES))
    assert len(multiprocessing.active_children()) == 2
    for hook in hooks:
        if "_close_at_exit" in repr(hook):
            hook()
    assert multiprocessing.active_children() == []


def test_fewer_than_no_workers_are_refused(photos):
    with pytest.raises(InputError, match="loader workers must be 0 or more, got -1"):
        open_photos(photos, workers=-1)


def test_what_workers_are_given_can_be_sent_to_a_new_process(photos, tmp_path):
    source = open_photos(photos, cache=tmp_path)
    sent = pickle.loads(pickle.dumps(ahead._Decoder(source._images, source._cache)))
    pixels, decoded = sent[(2, 5)]
    assert decoded == 3
    assert pixels.tobytes() == ahead.read_pixels(source._images, None, 2, 5)[0].tobytes()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("end", ["", "raise SystemExit(3)", "import os, signal; os.kill(os.getpid(), signal.SIGINT)"])
def test_a_process_that_ends_in_mid_stream_leaves_nothing_behind(photos, workers, end):
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from ooc_ntk.inputs.images.source import open_images\n"
        "if __name__ == '__main__':\n"
        f"    source = open_images('imagefolder:{photos},resize=12,crop=10', data_dir=None, workers={workers})\n"
        "    stream = source.stream([(n, n + 1) for n in range(11)])\n"
        "    next(stream)\n"
        "    import multiprocessing\n"
        "    print(*[child.pid for child in multiprocessing.active_children()], flush=True)\n"
        f"    {end}\n"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    seconds = time.monotonic() - started
    # Python ends by the signal itself, or with 1 where another thread ran code after it.
    assert done.returncode in ([3] if "Exit" in end else [-2, 1] if "SIGINT" in end else [0]), done.stderr
    lines = [line for line in done.stderr.splitlines() if "KeyboardInterrupt" not in line and not line.startswith(" ")]
    assert [line for line in lines if not line.startswith("Traceback")] == []
    pids = done.stdout.split()
    assert len(pids) == workers
    for pid in pids:
        assert subprocess.run(["kill", "-0", pid], capture_output=True).returncode != 0
    assert seconds < 30
