import multiprocessing
import os

import numpy as np
import pytest
import torch
from PIL import Image

from ooc_ntk.errors import InputError, StorageError
from ooc_ntk.inputs.images import ahead
from ooc_ntk.inputs.images.cache import PixelCache
from ooc_ntk.inputs.images.source import open_images
from tests.inputs.images import real_files

pytestmark = pytest.mark.usefixtures("one_thread")
RANGES = [(0, 4), (4, 5), (5, 11)]


@pytest.fixture
def photos(tmp_path):
    real_files.write_imagefolder(tmp_path / "photos", samples=11)
    return tmp_path / "photos"


def open_photos(folder, cache, options="resize=12,crop=10", workers=0):
    return open_images(f"imagefolder:{folder},{options}", data_dir=None, cache=cache, workers=workers)


def run(source):
    found = torch.cat([samples.args[0] for samples in source.stream(RANGES)])
    source.close()
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_each_image_is_decoded_once_and_never_again(photos, tmp_path, workers, monkeypatch):
    monkeypatch.setattr(ahead, "_PIECE_IMAGES", 2)
    plain = open_photos(photos, None).fetch(0, 11).args[0]
    source = open_photos(photos, tmp_path / "cache", workers=workers)
    assert torch.equal(run(source), plain)
    assert source.decoded == 11
    assert torch.equal(run(source), plain)
    assert torch.equal(source.fetch(3, 9).args[0], plain[3:9])
    assert source.decoded == 11
    again = open_photos(photos, tmp_path / "cache")
    assert torch.equal(again.fetch(0, 11).args[0], plain)
    assert again.decoded == 0


def test_layout_of_the_files(photos, tmp_path):
    source = open_photos(photos, tmp_path / "cache", "resize=12,crop=10,normalize=none")
    source.fetch(2, 4)
    pixels_path, done_path = (next((tmp_path / "cache").glob(f"*.{ending}")) for ending in ("u8", "done"))
    assert pixels_path.stem == done_path.stem
    assert list(done_path.read_bytes()) == [0, 0, 1, 1] + [0] * 7
    held = np.fromfile(pixels_path, np.uint8).reshape(11, 3, 10, 10)
    expected = (source.fetch(2, 4).args[0] * 255).round().to(torch.uint8).numpy()
    assert np.array_equal(held[2:4], expected)
    assert not held[4:].any()


def test_the_cache_is_read_and_not_the_files(photos, tmp_path):
    source = open_photos(photos, tmp_path / "cache", "resize=12,crop=10,normalize=none")
    source.fetch(0, 11)
    pixels_path = next((tmp_path / "cache").glob("*.u8"))
    content = bytearray(pixels_path.read_bytes())
    content[5 * 300 : 6 * 300] = bytes([51]) * 300
    pixels_path.write_bytes(content)
    assert torch.equal(source.fetch(5, 6).args[0], torch.full((1, 3, 10, 10), 51) / 255)


def test_images_that_a_killed_process_did_not_mark_are_decoded_again(photos, tmp_path):
    source = open_photos(photos, tmp_path / "cache")
    plain = source.fetch(0, 11).args[0]
    pixels_path, done_path = (next((tmp_path / "cache").glob(f"*.{ending}")) for ending in ("u8", "done"))
    marks = bytearray(done_path.read_bytes())
    content = bytearray(pixels_path.read_bytes())
    for number in (3, 4, 8):
        marks[number] = 0
        content[number * 300 : (number + 1) * 300] = bytes(300)  # pixels that never reached the disk
    done_path.write_bytes(marks)
    pixels_path.write_bytes(content)
    again = open_photos(photos, tmp_path / "cache")
    assert torch.equal(run(again), plain)
    assert again.decoded == 3
    assert done_path.read_bytes() == b"\1" * 11


def test_pixels_are_flushed_before_they_are_marked(photos, tmp_path, monkeypatch):
    events = []
    source = open_photos(photos, tmp_path / "cache")
    done_path = next((tmp_path / "cache").glob("*.done"))
    pixels_path = next((tmp_path / "cache").glob("*.u8"))

    def fsync(descriptor):
        events.append((any(done_path.read_bytes()), any(pixels_path.read_bytes())))

    monkeypatch.setattr("ooc_ntk.inputs.images.cache.os.fsync", fsync)
    source.fetch(0, 3)
    assert events == [(False, True)]
    assert done_path.read_bytes()[:4] == b"\1\1\1\0"


def test_a_process_killed_after_the_flush_marks_nothing(photos, tmp_path, monkeypatch):
    def killed(descriptor):
        raise KeyboardInterrupt

    source = open_photos(photos, tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr("ooc_ntk.inputs.images.cache.os.fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            source.fetch(0, 3)
    again = open_photos(photos, tmp_path / "cache")
    again.fetch(0, 3)
    assert again.decoded == 3


def test_marks_without_their_pixels_are_not_believed(photos, tmp_path):
    plain = open_photos(photos, tmp_path / "cache").fetch(0, 11).args[0]
    next((tmp_path / "cache").glob("*.u8")).unlink()
    again = open_photos(photos, tmp_path / "cache")
    assert torch.equal(again.fetch(0, 11).args[0], plain)
    assert again.decoded == 11


def test_other_geometry_or_files_have_a_cache_of_their_own_and_normalisation_has_not(photos, tmp_path):
    cache = tmp_path / "cache"
    open_photos(photos, cache)
    open_photos(photos, cache, "resize=12,crop=10,normalize=none")
    assert len(list(cache.glob("*.u8"))) == 1
    open_photos(photos, cache, "resize=13,crop=10")
    assert len(list(cache.glob("*.u8"))) == 2
    real_files.write_photo(photos / "ant" / "000.jpg", 40, 40, 99)
    open_photos(photos, cache)
    assert len(list(cache.glob("*.u8"))) == 3


def test_folders_whose_files_look_the_same_have_caches_of_their_own(tmp_path):
    values = []
    for folder, shade in (("a", 10), ("b", 200)):
        for kind in ("x", "y"):
            path = tmp_path / folder / kind / "0.bmp"
            path.parent.mkdir(parents=True)
            Image.new("RGB", (6, 6), (shade, shade, shade)).save(path)
            os.utime(path, ns=(10**18, 10**18))
        spec = f"imagefolder:{tmp_path / folder},resize=6,crop=6,normalize=none"
        source = open_images(spec, data_dir=None, cache=tmp_path / "cache")
        values.append(float(source.fetch(0, 1).args[0].mean()) * 255)
    assert values == pytest.approx([10, 200])


def test_another_decoder_has_a_cache_of_its_own(photos, tmp_path, monkeypatch):
    open_photos(photos, tmp_path / "cache").fetch(0, 11)
    monkeypatch.setattr("PIL.__version__", "99.0")
    source = open_photos(photos, tmp_path / "cache")
    source.fetch(0, 11)
    assert source.decoded == 11


def test_resized_arrays_are_cached_and_ready_ones_are_not(tmp_path):
    real_files.write_cifar10(tmp_path)
    open_images("cifar10:test", data_dir=tmp_path, cache=tmp_path / "cache").fetch(0, 4)
    assert not (tmp_path / "cache").exists()
    source = open_images("cifar10:test,resize=9", data_dir=tmp_path, cache=tmp_path / "cache")
    first = source.fetch(0, 4).args[0]
    assert torch.equal(source.fetch(0, 4).args[0], first)
    assert source.decoded == 4


def _fill(arguments):
    folder, cache = arguments
    source = open_photos(folder, cache)
    return source.fetch(0, 11).args[0].numpy().tobytes()


def test_processes_that_write_at_once_agree(photos, tmp_path):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.map(_fill, [(photos, tmp_path / "cache")] * 4, chunksize=1)
    assert set(found) == {open_photos(photos, None).fetch(0, 11).args[0].numpy().tobytes()}
    assert next((tmp_path / "cache").glob("*.done")).read_bytes() == b"\1" * 11


def test_images_of_other_sizes_never_reach_the_cache(photos, tmp_path):
    source = open_photos(photos, tmp_path / "cache", "resize=none")
    with pytest.raises(InputError, match="comes out as .* all samples need one shape"):
        source.fetch(0, 11)
    assert next((tmp_path / "cache").glob("*.done")).read_bytes() == b"\0" * 11


def test_a_cache_that_cannot_be_used_is_an_error_that_says_so(photos, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be made: .* name another cache folder"):
        open_photos(photos, tmp_path / "file")
    cache = PixelCache(tmp_path / "cache", "key", 4, (1, 2, 2))
    cache.store(0, np.ones((4, 1, 2, 2), np.uint8), [0, 1, 2, 3])
    with (tmp_path / "cache" / "key.u8").open("r+b") as file:
        file.truncate(10)
    assert cache.load(0, 2)[1] == []
    with pytest.raises(StorageError, match="cannot be read: it ends before image 3"):
        cache.load(1, 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_full_disk_is_an_error_that_says_so(photos, tmp_path, monkeypatch, workers):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ooc_ntk.inputs.images.cache.os.fsync", full)
    source = open_photos(photos, tmp_path / "cache", workers=workers)
    with pytest.raises(StorageError, match="cannot be written: .*No space left on device; free space there"):
        list(source.stream([(0, 2)]))
    source.close()
