import gzip
import os
import pickle
import re

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from ooc_ntk.errors import InputError
from ooc_ntk.inputs.images.layout import md5_of
from ooc_ntk.inputs.images.source import open_images
from tests.inputs.images import real_files


def test_a_missing_set_is_named_with_every_folder_and_how_to_get_it(tmp_path):
    with pytest.raises(InputError) as caught:
        open_images("cifar10", data_dir=tmp_path, what="test")
    message = str(caught.value)
    assert "test data cifar10: data_batch_1 or data_batch_1.bin not found" in message
    for folder in ("cifar-10-batches-py", "cifar-10-batches-bin", "CIFAR-10/cifar-10-batches-py", "CIFAR-10"):
        assert f"{tmp_path}/{folder}," in message or f"{tmp_path}/{folder};" in message
    assert "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz" in message
    assert "'ooc-ntk[vision]'" in message
    assert "--download" in message


def test_other_ways_of_missing(tmp_path):
    with pytest.raises(InputError, match="no folder was given to look in; give data_dir"):
        open_images("cifar10", data_dir=None)
    with pytest.raises(InputError, match="data folder .*/none does not exist"):
        open_images("cifar10", data_dir=tmp_path / "none")
    with pytest.raises(InputError, match="there is no folder .*/none"):
        open_images("imagefolder:none", data_dir=None, base=tmp_path)
    (tmp_path / "cifar-10-python.tar.gz").touch()
    with pytest.raises(InputError, match=r"MD5 should be c58f\w+\) is there but not unpacked: run tar -xf"):
        open_images("cifar10", data_dir=tmp_path)
    real_files.write_cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(InputError, match="data_batch_3 not found; looked in .*cifar-10-batches-py"):
        open_images("cifar10", data_dir=tmp_path)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bombed",)


def cifar_pickle(**changes) -> bytes:
    held = {"data": np.zeros((2, 3072), np.uint8), "labels": [1, 2]} | changes
    return pickle.dumps({key: value for key, value in held.items() if value is not None}, 2)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"not a pickle", "no pickle of numbers and texts"),
        (cifar_pickle()[:-2000], "no pickle of numbers and texts"),
        (b"", "no pickle of numbers and texts"),
        (pickle.dumps([1]), "holds a list, expected a dict"),
        (cifar_pickle(labels=None), "holds data, expected data and labels"),
        (cifar_pickle(data=np.zeros((2, 3071), np.uint8)), r"uint8 \(2, 3071\), expected uint8 \(samples, 3072\)"),
        (cifar_pickle(data=np.zeros((2, 3072))), r"float64 \(2, 3072\), expected uint8"),
        (cifar_pickle(data=[1, 2]), "its pixels are list"),
        (cifar_pickle(labels=[1, 10]), "label of sample 1 is 10, expected 0 to 9"),
        (cifar_pickle(labels=[-1, 1]), "label of sample 0 is -1"),
        (cifar_pickle(labels=[1]), "2 images and 1 labels"),
        (cifar_pickle(labels=["a", "b"]), "its labels are <U1"),
        (real_files.python2_pickle({"data": np.zeros((0, 3072), np.uint8), "labels": []}), "no samples"),
        (cifar_pickle(data=np.array([None])), "asks for an array of dtype 'O8'"),
    ],
)
def test_damaged_pickles(tmp_path, content, problem):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "test_batch").write_bytes(content)
    with pytest.raises(InputError, match=f"{re.escape(str(folder))}/test_batch cannot be used: .*{problem}") as caught:
        open_images("cifar10:test", data_dir=tmp_path)
    found = md5_of(folder / "test_batch")
    assert f"Its MD5 is {found}, that of the official file 40351d587109b95175f43aff81a1287e" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "asked"),
    [
        (pickle.dumps(Bomb(), 2), "asks for posix.mkdir"),
        (pickle.dumps({"data": Bomb()}, 4), "asks for posix.mkdir"),
        (pickle.dumps(np.random.RandomState), "asks for numpy.random"),
        (b"\x80\x02cbuiltins\neval\nU\x031+1\x85R.", "asks for builtins.eval"),
        (b"\x80\x02c_codecs\nencode\nU\x01aU\x05rot13\x86R.", "asks to encode a str as 'rot13'"),
        (b"\x80\x02cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85R.", "TypeError"),
        (
            real_files.python2_pickle({"data": np.zeros((1, 2), np.uint8)}).replace(b"U\x01|NNN", b"U\x01|U\x01aNN"),
            "a dtype with the state",
        ),
        (b"\x80\x02U\x04evilQ.", "refers to an object outside the file"),
    ],
)
def test_pickles_cannot_run_anything(tmp_path, monkeypatch, content, asked):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test").write_bytes(content)
    with pytest.raises(InputError, match=asked):
        open_images("cifar100:test", data_dir=tmp_path)
    assert not (tmp_path / "bombed").exists()


def test_damaged_binary_cifar(tmp_path):
    real_files.write_cifar10(tmp_path, binary=True)
    path = tmp_path / "cifar-10-batches-bin" / "test_batch.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(InputError, match=r"12291 bytes, expected a multiple of 3073"):
        open_images("cifar10:test", data_dir=tmp_path)
    path.write_bytes(b"\x0a" + whole[1:])
    with pytest.raises(InputError, match="label of sample 0 is 10, expected 0 to 9"):
        open_images("cifar10:test", data_dir=tmp_path)
    path.write_bytes(b"")
    with pytest.raises(InputError, match="no samples"):
        open_images("cifar10:test", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"X": np.zeros((32, 32, 3, 2), np.float64)}, r"X is float64 \(32, 32, 3, 2\), expected uint8"),
        ({"X": np.zeros((2, 3, 32, 32), np.uint8)}, r"expected uint8 \(32, 32, 3, samples\)"),
        ({"y": np.zeros((3, 1), np.uint8)}, "for 2 images, expected one number for each"),
        ({"y": np.full((2, 1), 11, np.uint8)}, "label of sample 0 is 11"),
        ({"y": None}, "does not hold both X"),
    ],
)
def test_damaged_svhn(tmp_path, changes, problem):
    held = {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.ones((2, 1), np.uint8)} | changes
    savemat(tmp_path / "train_32x32.mat", {key: value for key, value in held.items() if value is not None})
    with pytest.raises(InputError, match=problem) as caught:
        open_images("svhn", data_dir=tmp_path)
    assert "official file e26dedcc434d2e4c54c9b2d4a06d8373" in str(caught.value)


def test_a_file_that_is_no_mat(tmp_path):
    (tmp_path / "test_32x32.mat").write_bytes(b"x" * 500)
    with pytest.raises(InputError, match="test_32x32.mat cannot be used: it is no MATLAB file"):
        open_images("svhn:test", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("kind", "content", "problem"),
    [
        ("images-idx3", b"\0\0\x08", "has 3 bytes, expected a header of 16 bytes"),
        (
            "images-idx3",
            real_files.idx_bytes(np.zeros(20, np.uint8)),
            "magic number is 0x00000801, expected 0x00000803",
        ),
        ("images-idx3", real_files.idx_bytes(np.zeros((2, 28, 28), np.uint8))[:-1], "1583 bytes .*expected 1584"),
        ("images-idx3", real_files.idx_bytes(np.zeros((12, 28, 27), np.uint8)), r"\(28, 27\), expected \(28, 28\)"),
        ("images-idx3", real_files.idx_bytes(np.zeros((2, 28, 28), np.uint8)), "12 labels, and .* has 2 images"),
        ("labels-idx1", real_files.idx_bytes(np.full(12, 10, np.uint8)), "label of sample 0 is 10, expected 0 to 9"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_damaged_idx(tmp_path, kind, content, problem, packed):
    real_files.write_mnist(tmp_path, packed=packed)
    path = tmp_path / "MNIST" / "raw" / f"train-{kind}-ubyte{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(InputError, match=problem) as caught:
        open_images("mnist", data_dir=tmp_path)
    assert ("that of the official file" in str(caught.value)) == packed


def test_a_gzip_that_is_cut_short(tmp_path):
    real_files.write_mnist(tmp_path, packed=True)
    path = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="cannot be unpacked .*official file 9fb629c4189551a2d022fa330f9573f3"):
        open_images("mnist:test", data_dir=tmp_path)


def test_damaged_lists_of_photos(tmp_path):
    real_files.write_food101(tmp_path)
    listed = tmp_path / "food-101" / "meta" / "train.json"
    for content, problem in (("{", "no JSON"), ("[1]", "list of image names"), ("{}", "no samples")):
        listed.write_text(content)
        with pytest.raises(InputError, match=f"train.json cannot be used: .*{problem}"):
            open_images("food101", data_dir=tmp_path)
    real_files.write_aircraft(tmp_path)
    data = tmp_path / "fgvc-aircraft-2013b" / "data"
    (data / "images_variant_train.txt").write_text("0000001 Boeing 7E7\n")
    with pytest.raises(InputError, match="line 1 is '0000001 Boeing 7E7', expected an image and one of the 4"):
        open_images("fgvcaircraft", data_dir=tmp_path)
    (data / "variants.txt").unlink()
    with pytest.raises(InputError, match="variants.txt not found"):
        open_images("fgvcaircraft", data_dir=tmp_path)
    real_files.write_flowers102(tmp_path)
    savemat(tmp_path / "flowers-102" / "setid.mat", {"trnid": np.array([[1, 10]])})
    with pytest.raises(InputError, match="names image 10, and imagelabels.mat has labels of images 1 to 9"):
        open_images("flowers102", data_dir=tmp_path)
    with pytest.raises(InputError, match="holds no numbers named tstid"):
        open_images("flowers102:test", data_dir=tmp_path)
    savemat(tmp_path / "flowers-102" / "imagelabels.mat", {"labels": np.full((1, 10), 103)})
    with pytest.raises(InputError, match="label of sample 0 is 102, expected 0 to 101.*Its MD5 is"):
        open_images("flowers102", data_dir=tmp_path)


def test_image_folders_without_classes_or_images(tmp_path):
    real_files.write_photo(tmp_path / "loose.jpg", 5, 5, 0)
    with pytest.raises(InputError, match="has no subfolders, expected one for each class"):
        open_images(f"imagefolder:{tmp_path}", data_dir=None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="class folder .*/empty holds no image"):
        open_images(f"imagefolder:{tmp_path}", data_dir=None)


def test_images_that_cannot_be_used_are_named_with_their_number(tmp_path):
    real_files.write_imagefolder(tmp_path, samples=6, size=(8, 8))
    source = open_images(f"imagefolder:{tmp_path},resize=none", data_dir=None)
    files = sorted(tmp_path.glob("*/*"))
    assert len(source) == 6
    files[1].write_bytes(files[1].read_bytes()[:120])
    with pytest.raises(InputError, match=f"sample 1 cannot be decoded: {files[1]}: .*expected an image of 8 bits"):
        source.fetch(0, 3)
    files[2].unlink()
    with pytest.raises(InputError, match=f"sample 2 is missing: there is no file {files[2]}"):
        source.fetch(2, 3)
    Image.new("RGB", (9, 8)).save(files[3])
    with pytest.raises(InputError, match=r"sample 3, .*, comes out as \(3, 8, 9\), but sample 0 as \(3, 8, 8\)"):
        source.fetch(3, 4)
    assert source.fetch(4, 6).args[0].shape == (2, 3, 8, 8)
