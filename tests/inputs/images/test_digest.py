import shutil
import time

import numpy as np
import pytest

from ooc_ntk.errors import InputError
from ooc_ntk.inputs.images import pixels
from ooc_ntk.inputs.images.catalog import find_set
from ooc_ntk.inputs.images.geometry import Geometry
from ooc_ntk.inputs.images.pixels import ArrayImages
from ooc_ntk.inputs.images.source import ImageSource, open_images
from ooc_ntk.inputs.images.spec import ImageSpec
from tests.inputs.images import real_files


def array_source(images, labels, **options):
    spec = ImageSpec(find_set("cifar10"), "train", **options)
    return ImageSource(spec, ArrayImages(images, labels, spec.geometry))


def test_digest_of_arrays_sees_every_difference():
    images, labels = real_files.made_up(6, (3, 8, 8), 10, 0)
    plain = array_source(images, labels).digest()
    assert plain == array_source(images.copy(), labels.copy()).digest()
    other_pixel, other_label = images.copy(), labels.copy()
    other_pixel[5, 2, 7, 7] ^= 1
    other_label[5] ^= 1
    order = np.array([1, 0, 2, 3, 4, 5])
    others = [
        array_source(other_pixel, labels),
        array_source(images, other_label),
        array_source(images[order], labels[order]),
        array_source(images[order], labels),
        array_source(images[:5], labels[:5]),
        array_source(images.reshape(6, 3, 4, 16), labels),
        array_source(images, labels, resize=9),
        array_source(images, labels, crop=4),
        array_source(images, labels, normalize="none"),
        array_source(images, labels, normalize="imagenet"),
    ]
    digests = [source.digest() for source in others]
    assert len({plain, *digests}) == 1 + len(others)


def test_digest_of_a_part_is_that_of_a_source_of_the_part():
    images, labels = real_files.made_up(6, (3, 8, 8), 10, 0)
    source = array_source(images, labels)
    assert source.digest() == source.digest_range(0, 6)
    assert source.digest_range(2, 5) == array_source(images[2:5], labels[2:5]).digest()
    assert source.digest_range(2, 5) != source.digest_range(1, 4)


def test_digest_does_not_depend_on_the_container_of_the_same_set(tmp_path):
    real_files.write_cifar10(tmp_path / "a")
    real_files.write_cifar10(tmp_path / "b", binary=True)
    found = {open_images("cifar10:train,resize=40", data_dir=tmp_path / name).digest() for name in "ab"}
    assert len(found) == 1


def test_digest_decodes_nothing_and_is_cheap_for_a_whole_training_set():
    images = np.zeros((60_000, 1, 28, 28), np.uint8)
    spec = ImageSpec(find_set("mnist"), "train", resize=224, channels=3)
    source = ImageSource(spec, ArrayImages(images, np.zeros(60_000, np.int64), Geometry(224)))
    started = time.monotonic()
    source.digest()
    assert time.monotonic() - started < 10  # 47 MB; as floats of 224 pixels it would be 36 GB
    assert source.decoded == 0


def test_digest_of_files(tmp_path):
    real_files.write_food101(tmp_path / "a")

    def digest(text="food101:train", name="a"):
        source = open_images(text, data_dir=tmp_path / name)
        found = source.digest()
        assert source.decoded == 0
        return found

    plain = digest()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert digest(name="b") == plain
    assert digest("food101:test") != plain
    assert digest("food101:train,resize=240,crop=224") != plain
    assert digest("food101:train,normalize=none") != plain
    path = next((tmp_path / "b" / "food-101" / "images" / "sushi").glob("1*.jpg"))
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    assert digest(name="b") != plain


def test_digest_of_files_reads_spaced_ones_and_sees_names_sizes_and_labels_of_all(tmp_path, monkeypatch):
    monkeypatch.setattr(pixels, "_DIGEST_FILES", 2)
    real_files.write_imagefolder(tmp_path / "a", samples=9)
    text = "imagefolder:{},resize=8x8"

    def source(name="a"):
        return open_images(text.format(tmp_path / name), data_dir=None)

    plain, part = source().digest(), source().digest_range(3, 6)
    names = sorted((tmp_path / "a").glob("*/*"))
    content = names[4].read_bytes()
    names[4].write_bytes(bytes(len(content)))
    assert source().digest() == plain  # not one of the two that are read
    names[4].write_bytes(content + b"\0")
    assert source().digest() != plain
    assert source().digest_range(3, 6) != part
    names[4].write_bytes(content)
    assert source().digest() == plain
    (tmp_path / "a" / "cow").rename(tmp_path / "a" / "aaa")
    assert source().digest() != plain
    assert source().digest_range(0, 3) != source().digest_range(3, 6)


def test_digest_of_files_sees_labels(tmp_path):
    real_files.write_aircraft(tmp_path)
    plain = open_images("fgvcaircraft:test", data_dir=tmp_path).digest()
    variants = tmp_path / "fgvc-aircraft-2013b" / "data" / "variants.txt"
    variants.write_text("\n".join(reversed(variants.read_text().split("\n"))))
    assert open_images("fgvcaircraft:test", data_dir=tmp_path).digest() != plain


def test_digest_of_a_file_that_is_missing(tmp_path):
    real_files.write_flowers102(tmp_path)
    source = open_images("flowers102:trainval", data_dir=tmp_path)
    for image in (tmp_path / "flowers-102" / "jpg").iterdir():
        image.unlink()
    with pytest.raises(InputError, match="sample 0 is missing: there is no file .*unpack the data set again"):
        source.digest()


def test_digest_of_made_up_data():
    def digest(options=""):
        return open_images(f"fakedata:train,samples=20,size=8{options}", data_dir=None)

    assert digest().digest() == digest().digest()
    others = [digest(), digest(",channels=1"), digest(",classes=3"), digest(",resize=9"), digest(",normalize=imagenet")]
    assert len({source.digest() for source in others}) == 5
    assert digest().digest_range(0, 10) != digest().digest_range(10, 20)
