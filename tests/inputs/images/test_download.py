import sys
import types

import pytest

from ooc_ntk.errors import InputError
from ooc_ntk.inputs.images.download import download
from ooc_ntk.inputs.images.source import open_images
from tests.inputs.images import real_files


def install(monkeypatch, **classes):
    """Put a stand-in for torchvision where it is imported from."""
    datasets = types.ModuleType("torchvision.datasets")
    for name, made in classes.items():
        setattr(datasets, name, made)
    package = types.ModuleType("torchvision")
    package.datasets = datasets
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)


def test_without_torchvision_the_message_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(InputError, match=r"torchvision, which is not installed.*'ooc-ntk\[vision\]'; or get the files"):
        open_images("cifar10", data_dir=tmp_path, download=True)


def test_a_broken_torchvision_is_said_to_be_broken(monkeypatch, tmp_path):
    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.raises(InputError, match=r"here \(RuntimeError: operator torchvision::nms does not exist\)"):
        download("svhn", tmp_path)


def test_files_that_are_there_are_not_downloaded(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    real_files.write_cifar10(tmp_path)
    assert len(open_images("cifar10:test", data_dir=tmp_path, download=True)) == 4


def test_downloaded_files_are_found(monkeypatch, tmp_path):
    calls = []

    def cifar(root, download, train):
        calls.append(("cifar", download, train))
        real_files.write_cifar10(tmp_path / root)

    def svhn(root, download, split):
        calls.append(("svhn", download, split))
        real_files.write_svhn(tmp_path / root)

    def flowers(root, download, split):
        calls.append(("flowers", download, split))
        real_files.write_flowers102(tmp_path / root)

    install(monkeypatch, CIFAR10=cifar, SVHN=svhn, Flowers102=flowers)
    data = tmp_path / "new" / "data"
    assert len(open_images("cifar10:test", data_dir=data, download=True)) == 4
    assert len(open_images("svhn:extra", data_dir=data, download=True)) == 3
    assert len(open_images("flowers102:trainval", data_dir=data, download=True)) == 4
    assert calls == [("cifar", True, False), ("svhn", True, "extra"), ("flowers", True, "train")]
    assert (data / "SVHN" / "extra_32x32.mat").is_file()


def test_a_download_that_fails_says_why(monkeypatch, tmp_path):
    def offline(root, **options):
        raise OSError("no route to host")

    install(monkeypatch, MNIST=offline)
    with pytest.raises(InputError, match="mnist could not be downloaded to .*OSError: no route to host; get the files"):
        open_images("mnist", data_dir=tmp_path, download=True)
    with pytest.raises(InputError, match="fakedata cannot be downloaded: it has no files of its own"):
        download("fakedata", tmp_path)
