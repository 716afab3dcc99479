"""Small data sets in the formats of the real ones, written the way their authors did; each returns what it wrote."""

import gzip
import json
import struct
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat


def made_up(samples: int, shape: tuple[int, ...], classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random pixels ``(samples, *shape)`` and labels; every class below ``samples`` occurs."""
    random = np.random.Generator(np.random.PCG64(seed))
    pixels = random.integers(0, 256, (samples, *shape), np.uint8)
    return pixels, random.permutation(np.arange(samples) % classes)


def python2_pickle(content: dict) -> bytes:
    """A pickle as Python 2 wrote them (protocol 2, byte strings), of a dict of strings, lists and one uint8 array."""

    def short(text: str | bytes) -> bytes:
        raw = text.encode() if isinstance(text, str) else text
        return b"T" + struct.pack("<i", len(raw)) + raw if len(raw) > 255 else b"U" + bytes([len(raw)]) + raw

    def integer(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    def written(value: object) -> bytes:
        if isinstance(value, str):
            return short(value)
        if isinstance(value, int | np.integer):
            return integer(int(value))
        if isinstance(value, list):
            return b"](" + b"".join(written(item) for item in value) + b"e"
        assert isinstance(value, np.ndarray)
        assert value.dtype == np.uint8
        made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + integer(0) + b"\x85" + short("b") + b"\x87R"
        dtype = b"cnumpy\ndtype\n" + short("u1") + integer(0) + integer(1) + b"\x87R"
        dtype += b"(" + integer(3) + short("|") + b"NNN" + integer(-1) * 2 + integer(0) + b"tb"
        shape = integer(value.shape[0]) + integer(value.shape[1]) + b"\x86"
        return made + b"(" + integer(1) + shape + dtype + b"\x89" + short(value.tobytes()) + b"tb"

    return b"\x80\x02}(" + b"".join(short(key) + written(value) for key, value in content.items()) + b"u."


def write_cifar10(folder: Path, train: int = 10, test: int = 4, seed: int = 0, binary: bool = False) -> dict:
    """``cifar-10-batches-py`` (or ``-bin``) in the folder: five train batches and a test batch."""
    inner = folder / ("cifar-10-batches-bin" if binary else "cifar-10-batches-py")
    inner.mkdir(parents=True)
    pixels, labels = made_up(train, (3, 32, 32), 10, seed)
    tested = made_up(test, (3, 32, 32), 10, seed + 1)
    parts = {f"data_batch_{n + 1}": (pixels[n::5], labels[n::5]) for n in range(5)} | {"test_batch": tested}
    for name, (images, classes) in parts.items():
        if binary:
            rows = np.concatenate([classes[:, None].astype(np.uint8), images.reshape(len(images), -1)], 1)
            (inner / f"{name}.bin").write_bytes(rows.tobytes())
        else:
            held = {"batch_label": name, "labels": classes.tolist(), "data": images.reshape(len(images), -1)}
            (inner / name).write_bytes(python2_pickle(held | {"filenames": [f"{n}.png" for n in range(len(images))]}))
    order = [np.concatenate([values[n::5] for n in range(5)]) for values in (pixels, labels)]
    return {"train": tuple(order), "test": tested}


def write_cifar100(folder: Path, train: int = 10, test: int = 4, seed: int = 0, binary: bool = False) -> dict:
    """``cifar-100-python`` (or ``-binary``) in the folder, with coarse labels that are not the fine ones."""
    inner = folder / ("cifar-100-binary" if binary else "cifar-100-python")
    inner.mkdir(parents=True)
    parts = {"train": made_up(train, (3, 32, 32), 100, seed), "test": made_up(test, (3, 32, 32), 100, seed + 1)}
    for name, (images, fine) in parts.items():
        coarse = (fine * 7 + 3) % 20
        if binary:
            labels = np.stack([coarse, fine], 1).astype(np.uint8)
            rows = np.concatenate([labels, images.reshape(len(images), -1)], 1)
            (inner / f"{name}.bin").write_bytes(rows.tobytes())
        else:
            held = {"data": images.reshape(len(images), -1), "fine_labels": fine.tolist()}
            (inner / name).write_bytes(python2_pickle(held | {"coarse_labels": coarse.tolist()}))
    return parts


def write_svhn(folder: Path, train: int = 11, test: int = 4, extra: int = 3, seed: int = 0) -> dict:
    """``*_32x32.mat`` in the folder: the digit 0 is label 10 there."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {}
    for offset, (name, samples) in enumerate({"train": train, "test": test, "extra": extra}.items()):
        images, labels = made_up(samples, (3, 32, 32), 10, seed + offset)
        held = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
        savemat(folder / f"{name}_32x32.mat", {"X": images.transpose(2, 3, 1, 0), "y": held}, do_compression=True)
        parts[name] = (images, labels)
    return parts


def idx_bytes(values: np.ndarray) -> bytes:
    """An array of bytes as an idx file."""
    return struct.pack(f">{1 + values.ndim}I", 0x0800 + values.ndim, *values.shape) + values.tobytes()


def write_mnist(
    folder: Path, train: int = 12, test: int = 5, seed: int = 0, title: str = "MNIST", packed: bool = False
) -> dict:
    """``<title>/raw`` in the folder with four idx files, gzipped or not; FashionMNIST has the same files."""
    raw = folder / title / "raw"
    raw.mkdir(parents=True)
    parts = {"train": made_up(train, (28, 28), 10, seed), "test": made_up(test, (28, 28), 10, seed + 1)}
    for name, (images, labels) in parts.items():
        prefix = "train" if name == "train" else "t10k"
        for kind, values in (("images-idx3", images), ("labels-idx1", labels.astype(np.uint8))):
            content = idx_bytes(values)
            file = raw / f"{prefix}-{kind}-ubyte{'.gz' if packed else ''}"
            file.write_bytes(gzip.compress(content, mtime=0) if packed else content)
    return {name: (images[:, None], labels) for name, (images, labels) in parts.items()}


def write_photo(path: Path, height: int, width: int, seed: int) -> np.ndarray:
    """A smooth JPEG (or what the ending says); returns its pixels as decoded, ``(3, height, width)``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.Generator(np.random.PCG64(seed))
    coarse = Image.fromarray(random.integers(0, 256, (4, 5, 3), np.uint8))
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(path)
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def photo_sizes(count: int) -> list[tuple[int, int]]:
    """Heights and widths that differ, tall and wide by turns."""
    return [(20 + 3 * n, 31 + n) if n % 2 else (30 + n, 21 + 2 * n) for n in range(count)]


def write_food101(folder: Path, train: int = 6, test: int = 4, seed: int = 0) -> dict:
    """``food-101`` in the folder: three classes, listed by class in JSON."""
    inner = folder / "food-101"
    (inner / "meta").mkdir(parents=True)
    classes = ["waffles", "apple_pie", "sushi"]
    parts = {}
    for offset, (split, samples) in enumerate({"train": train, "test": test}.items()):
        listed: dict[str, list[str]] = {name: [] for name in classes}
        for number, _ in enumerate(range(samples)):
            name = classes[number % 3]
            listed[name].append(f"{name}/{1000 * (offset + 1) + number}")
        images, labels = [], []
        for name, files in listed.items():
            for file in files:
                size = photo_sizes(samples)[len(images)]
                images.append(write_photo(inner / "images" / f"{file}.jpg", *size, seed + 100 * offset + len(images)))
                labels.append(sorted(classes).index(name))
        (inner / "meta" / f"{split}.json").write_text(json.dumps(listed))
        parts[split] = (images, np.array(labels))
    return parts


def write_flowers102(folder: Path, samples: int = 9, seed: int = 0) -> dict:
    """``flowers-102`` in the folder: images numbered from 1, split by ``setid.mat``, labels from 1."""
    inner = folder / "flowers-102"
    sizes = photo_sizes(samples)
    images = [write_photo(inner / "jpg" / f"image_{n + 1:05d}.jpg", *sizes[n], seed + n) for n in range(samples)]
    labels = (np.arange(samples) * 17) % 102
    order = np.random.Generator(np.random.PCG64(seed)).permutation(samples)
    cuts = {"train": order[: samples // 3], "val": order[samples // 3 : samples // 2], "test": order[samples // 2 :]}
    keys = {"train": "trnid", "val": "valid", "test": "tstid"}
    savemat(inner / "imagelabels.mat", {"labels": (labels + 1)[None].astype(np.uint8)})
    savemat(inner / "setid.mat", {keys[name]: (ids + 1)[None].astype(np.uint16) for name, ids in cuts.items()})
    cuts["trainval"] = np.concatenate([cuts["train"], cuts["val"]])
    return {name: ([images[n] for n in ids], labels[ids]) for name, ids in cuts.items()}


def write_aircraft(folder: Path, samples: int = 8, seed: int = 0) -> dict:
    """``fgvc-aircraft-2013b`` in the folder: variants whose names have spaces, in an order of their own."""
    data = folder / "fgvc-aircraft-2013b" / "data"
    sizes = photo_sizes(samples)
    images = [write_photo(data / "images" / f"{n:07d}.jpg", *sizes[n], seed + n) for n in range(samples)]
    variants = ["707-320", "Falcon 900", "A300B4", "F/A-18"]
    labels = np.arange(samples) % 4
    (data / "variants.txt").write_text("\n".join(variants) + "\n")
    cuts = {"train": range(0, 3), "val": range(3, 5), "trainval": range(0, 5), "test": range(5, samples)}
    for name, ids in cuts.items():
        lines = [f"{n:07d} {variants[labels[n]]}" for n in ids]
        (data / f"images_variant_{name}.txt").write_text("\n".join(lines) + "\n")
    return {name: ([images[n] for n in ids], labels[list(ids)]) for name, ids in cuts.items()}


def write_imagefolder(folder: Path, samples: int = 7, size: tuple[int, int] | None = None, seed: int = 0) -> tuple:
    """A subfolder per class with JPEG and PNG files, one of them a level deeper; returns (images, labels)."""
    classes = ["ant", "bee", "cow"]
    images, labels = [], []
    for label, name in enumerate(classes):
        for number in range(label, samples, 3):
            place = folder / name / "more" if number == samples - 1 else folder / name
            path = place / f"{number:03d}.{'png' if number % 2 else 'jpg'}"
            images.append(write_photo(path, *(size or photo_sizes(samples)[number]), seed + number))
            labels.append(label)
    return images, np.array(labels)
