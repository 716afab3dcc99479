import pickle
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from ooc_ntk.errors import InputError
from ooc_ntk.inputs.images.source import open_images
from tests.inputs.images import real_files

MEANS = {"cifar10": (0.4914, 0.4822, 0.4465), "cifar100": (0.5071, 0.4865, 0.4409), "svhn": (0.4380, 0.4440, 0.4730)}
DEVIATIONS = {
    "cifar10": (0.2470, 0.2435, 0.2616),
    "cifar100": (0.2673, 0.2564, 0.2762),
    "svhn": (0.1751, 0.1771, 0.1744),
}


def pixels_of(samples) -> np.ndarray:
    """Bytes of inputs that were not normalised."""
    return (samples.args[0] * 255).round().to(torch.uint8).numpy()


def check(folder, name, split, expected):
    images, labels = expected
    source = open_images(f"{name}:{split},normalize=none", data_dir=folder)
    samples = source.fetch(0, len(source))
    assert samples.args[0].dtype == torch.float32
    assert samples.targets.dtype == torch.int64
    assert source.spec == f"{name}:{split},normalize=none"
    assert np.array_equal(pixels_of(samples), images)
    assert samples.targets.tolist() == labels.tolist()
    middle = source.fetch(1, 3)
    assert torch.equal(middle.args[0], samples.args[0][1:3])
    assert torch.equal(middle.targets, samples.targets[1:3])


@pytest.mark.parametrize("binary", [False, True], ids=["pickles", "binary"])
@pytest.mark.parametrize(
    ("name", "write"), [("cifar10", real_files.write_cifar10), ("cifar100", real_files.write_cifar100)]
)
def test_cifar_in_both_forms(tmp_path, name, write, binary):
    parts = write(tmp_path, train=13, test=4, binary=binary)
    for split, expected in parts.items():
        check(tmp_path, name, split, expected)


def test_pickles_that_python3_wrote_are_read_too(tmp_path):
    images, labels = real_files.made_up(4, (3072,), 100, 0)
    held = {b"data": images, b"fine_labels": labels.tolist()}
    for protocol in (2, 4):
        (tmp_path / "train").write_bytes(pickle.dumps(held | {"filenames": ["é.png"]}, protocol))
        check(tmp_path, "cifar100", "train", (images.reshape(4, 3, 32, 32), labels))


def test_svhn(tmp_path):
    parts = real_files.write_svhn(tmp_path)
    assert 0 in parts["train"][1]
    for split, expected in parts.items():
        check(tmp_path, "svhn", split, expected)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("title", ["MNIST", "FashionMNIST"])
def test_idx_files(tmp_path, title, packed):
    parts = real_files.write_mnist(tmp_path, title=title, packed=packed)
    for split, expected in parts.items():
        check(tmp_path, title.lower(), split, expected)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn"])
def test_own_normalisation(tmp_path, name):
    parts = getattr(real_files, f"write_{name}")(tmp_path)
    found = open_images(name, data_dir=tmp_path).fetch(0, 5).args[0].numpy()
    mean, deviation = (np.array(table[name])[:, None, None] for table in (MEANS, DEVIATIONS))
    assert np.allclose(found, (parts["train"][0][:5] / 255 - mean) / deviation, atol=1e-5)


def test_grey_digits_as_colour(tmp_path):
    images, _ = real_files.write_mnist(tmp_path)["train"]
    found = open_images("mnist:train,rgb,resize=32", data_dir=tmp_path).fetch(0, 12).args[0]
    assert found.shape == (12, 3, 32, 32)
    assert torch.equal(found[:, 0], found[:, 2])
    plain = open_images("mnist:train", data_dir=tmp_path).fetch(0, 12).args[0].numpy()
    assert np.allclose(plain, (images / 255 - 0.1307) / 0.3081, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("food101", real_files.write_food101),
        ("flowers102", real_files.write_flowers102),
        ("fgvcaircraft", real_files.write_aircraft),
    ],
)
def test_photos_in_the_order_of_their_lists(tmp_path, name, write):
    for split, (images, labels) in write(tmp_path).items():
        source = open_images(f"{name}:{split},crop=20x18,normalize=none", data_dir=tmp_path)
        assert len(source) == len(images)
        found = source.fetch(0, len(source))
        assert found.targets.tolist() == labels.tolist()
        for number, image in enumerate(images):
            top, left = (round((held - kept) / 2) for held, kept in zip(image.shape[1:], (20, 18), strict=True))
            assert np.array_equal(pixels_of(found)[number], image[:, top : top + 20, left : left + 18])


def test_flowers_trainval_is_train_then_val(tmp_path):
    real_files.write_flowers102(tmp_path)
    spec = "flowers102:{},resize=8x8"
    parts = [open_images(spec.format(split), data_dir=tmp_path) for split in ("train", "val", "trainval")]
    train, val, both = (source.fetch(0, len(source)) for source in parts)
    assert torch.equal(torch.cat([train.args[0], val.args[0]]), both.args[0])
    assert torch.equal(torch.cat([train.targets, val.targets]), both.targets)


def test_default_preprocessing_of_photos(tmp_path):
    images, _ = real_files.write_food101(tmp_path)["train"]
    found = open_images("food101", data_dir=tmp_path).fetch(0, 1).args[0]
    assert found.shape == (1, 3, 224, 224)
    height, width = images[0].shape[1:]
    assert (height, width) == (30, 21)
    whole = Image.fromarray(images[0].transpose(1, 2, 0)).resize((256, int(256 * 30 / 21)), Image.Resampling.BILINEAR)
    assert whole.height == 365
    square = np.asarray(whole)[70 : 70 + 224, 16 : 16 + 224]  # (365 − 224) / 2 = 70.5 rounds to even
    expected = (square / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert np.allclose(found[0].permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_image_folder(tmp_path):
    images, labels = real_files.write_imagefolder(tmp_path / "photos" / "train", size=(9, 7))
    (tmp_path / "photos" / "train" / "ant" / "notes.txt").write_text("no image")
    (tmp_path / "photos" / "train" / ".thumbnails").mkdir()
    source = open_images("imagefolder:photos/train,resize=none,normalize=none", data_dir=None, base=tmp_path)
    assert source.spec == f"imagefolder:{tmp_path}/photos/train,resize=none,normalize=none"
    found = source.fetch(0, len(source))
    assert found.targets.tolist() == labels.tolist()
    assert np.array_equal(pixels_of(found), np.stack(images))


def test_fake_data_is_that_of_torchvision():
    source = open_images("fakedata:train,samples=7,size=16,classes=5", data_dir=None)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    found = source.fetch(2, 7)
    assert torch.equal(torch.get_rng_state(), before)
    for position, number in enumerate(range(2, 7)):
        torch.manual_seed(number)
        image = torch.randn(3, 16, 16)
        label = torch.randint(0, 5, (1,), dtype=torch.long)[0]
        assert torch.equal(found.args[0][position], image.mul(255).byte() / 255)
        assert found.targets[position] == label
    test = open_images("fakedata:test,samples=7,size=16,classes=5", data_dir=None).fetch(2, 7)
    assert torch.equal(found.args[0], test.args[0])


@pytest.mark.parametrize(
    ("place", "given"),
    [
        ("CIFAR-10", ""),
        ("cifar10", ""),
        ("", ""),
        ("", "cifar-10-batches-py"),
        ("data/CIFAR-10", "data"),
        ("data/CIFAR-10", "data/CIFAR-10"),
    ],
)
def test_cifar_folders(tmp_path, place, given):
    parts = real_files.write_cifar10(tmp_path / place)
    check(tmp_path / given, "cifar10", "test", parts["test"])


@pytest.mark.parametrize("given", ["", "SVHN"])
def test_svhn_folders(tmp_path, given):
    parts = real_files.write_svhn(tmp_path / "SVHN")
    check(tmp_path / given, "svhn", "extra", parts["extra"])


@pytest.mark.parametrize("given", ["", "FashionMNIST", "FashionMNIST/FashionMNIST", "FashionMNIST/FashionMNIST/raw"])
def test_fashion_mnist_is_not_taken_for_mnist(tmp_path, given):
    real_files.write_mnist(tmp_path, seed=9)
    parts = real_files.write_mnist(tmp_path / "FashionMNIST", title="FashionMNIST")
    check(tmp_path / given, "fashionmnist", "train", parts["train"])
    shutil.rmtree(tmp_path / "FashionMNIST")
    for folder in ("", "MNIST", "MNIST/raw"):
        with pytest.raises(InputError, match="fashionmnist: train-images-idx3-ubyte or .*not found; looked in"):
            open_images("fashionmnist", data_dir=tmp_path / folder)


@pytest.mark.parametrize(
    ("name", "title", "write", "given"),
    [
        ("food101", "Food-101", real_files.write_food101, ("", "Food-101", "Food-101/food-101")),
        ("flowers102", "Flowers-102", real_files.write_flowers102, ("", "Flowers-102", "Flowers-102/flowers-102")),
        (
            "fgvcaircraft",
            "FGVCAircraft",
            real_files.write_aircraft,
            ("", "FGVCAircraft", "FGVCAircraft/fgvc-aircraft-2013b", "FGVCAircraft/fgvc-aircraft-2013b/data"),
        ),
    ],
)
def test_photo_folders(tmp_path, name, title, write, given):
    labels = write(tmp_path / title)["test"][1]
    for folder in given:
        source = open_images(f"{name}:test,resize=8x8", data_dir=tmp_path / folder)
        assert source.fetch(0, len(source)).targets.tolist() == labels.tolist()


def test_flowers_right_in_the_folder_named_after_them(tmp_path):
    real_files.write_flowers102(tmp_path)
    (tmp_path / "flowers-102").rename(tmp_path / "Flowers-102")
    assert len(open_images("flowers102:test", data_dir=tmp_path)) == 5


def test_labels_of_any_whole_numbers_and_byte_order_are_read(tmp_path):
    images, labels = real_files.made_up(4, (3072,), 100, 0)
    for dtype in ("<i8", ">i4", "u1"):
        held = {"data": images, "fine_labels": labels.astype(dtype)}
        (tmp_path / "test").write_bytes(pickle.dumps(held, 2))
        check(tmp_path, "cifar100", "test", (images.reshape(4, 3, 32, 32), labels))
