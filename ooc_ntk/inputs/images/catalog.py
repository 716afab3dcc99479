"""The image data sets that are known by name: sizes, splits, usual preprocessing, and where their files come from.

The MD5 sums are the ones that the authors' pages or torchvision's readers publish; a file whose sum is not published
has none here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from ooc_ntk.errors import unknown_name
from ooc_ntk.inputs.options import plain_name

from .geometry import Size

#: Mean and deviation of ImageNet's training images, as torchvision's weights expect them.
IMAGENET: Final = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class ImageSet:
    """One data set.

    Attributes:
        name: as it is looked up.
        title: as its authors write it.
        channels: 1 for greyscale, 3 for colour.
        side: height and width of its images in pixels; None where they differ.
        classes: number of classes; None where the folder says.
        splits: accepted splits, the default one first.
        mean: usual mean per channel, of pixels in [0, 1].
        deviation: usual standard deviation per channel.
        resize: default resize.
        crop: default centre crop.
        url: page or address that the files come from.
        folders: where the files lie inside the data set's folder, in order of preference.
        archives: archives that hold the files until they are unpacked.
        md5: file name to the MD5 sum of the official file, lower-case hexadecimal digits.
    """

    name: str
    title: str
    channels: int
    side: int | None
    classes: int | None
    splits: tuple[str, ...]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    resize: Size | None = None
    crop: Size | None = None
    url: str = ""
    folders: tuple[str, ...] = ("",)
    archives: tuple[str, ...] = ()
    md5: Mapping[str, str] = field(default_factory=dict)


_TRAIN_TEST: Final = ("train", "test")

_SETS: Final = (
    ImageSet(
        name="cifar10",
        title="CIFAR-10",
        channels=3,
        side=32,
        classes=10,
        splits=_TRAIN_TEST,
        mean=(0.4914, 0.4822, 0.4465),
        deviation=(0.2470, 0.2435, 0.2616),
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        folders=("cifar-10-batches-py", "cifar-10-batches-bin", ""),
        archives=("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz"),
        md5={
            "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
            "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            "test_batch": "40351d587109b95175f43aff81a1287e",
        },
    ),
    ImageSet(
        name="cifar100",
        title="CIFAR-100",
        channels=3,
        side=32,
        classes=100,
        splits=_TRAIN_TEST,
        mean=(0.5071, 0.4865, 0.4409),
        deviation=(0.2673, 0.2564, 0.2762),
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        folders=("cifar-100-python", "cifar-100-binary", ""),
        archives=("cifar-100-python.tar.gz", "cifar-100-binary.tar.gz"),
        md5={
            "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
            "cifar-100-binary.tar.gz": "03b5dce01913d631647c71ecec9e9cb8",
            "train": "16019d7e3df5f24257cddd939b257f8d",
            "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
        },
    ),
    ImageSet(
        name="svhn",
        title="SVHN",
        channels=3,
        side=32,
        classes=10,
        splits=("train", "test", "extra"),
        mean=(0.4380, 0.4440, 0.4730),
        deviation=(0.1751, 0.1771, 0.1744),
        url="http://ufldl.stanford.edu/housenumbers/",
        md5={
            "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
            "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
            "extra_32x32.mat": "a93ce644f1a588dc4d68dda5feec44a7",
        },
    ),
    ImageSet(
        name="mnist",
        title="MNIST",
        channels=1,
        side=28,
        classes=10,
        splits=_TRAIN_TEST,
        mean=(0.1307,),
        deviation=(0.3081,),
        url="https://ossci-datasets.s3.amazonaws.com/mnist/",
        folders=("MNIST/raw", "raw", ""),
        md5={
            "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
        },
    ),
    ImageSet(
        name="fashionmnist",
        title="FashionMNIST",
        channels=1,
        side=28,
        classes=10,
        splits=_TRAIN_TEST,
        mean=(0.2860,),
        deviation=(0.3530,),
        url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        folders=("FashionMNIST/raw", "raw", ""),
        md5={
            "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
        },
    ),
    ImageSet(
        name="fgvcaircraft",
        title="FGVCAircraft",
        channels=3,
        side=None,
        classes=100,
        splits=("train", "val", "trainval", "test"),
        mean=IMAGENET[0],
        deviation=IMAGENET[1],
        resize=(224, 224),
        url="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz",
        folders=("fgvc-aircraft-2013b/data", "data", ""),
        archives=("fgvc-aircraft-2013b.tar.gz",),
    ),
    ImageSet(
        name="food101",
        title="Food-101",
        channels=3,
        side=None,
        classes=101,
        splits=_TRAIN_TEST,
        mean=IMAGENET[0],
        deviation=IMAGENET[1],
        resize=256,
        crop=224,
        url="http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz",
        folders=("food-101", ""),
        archives=("food-101.tar.gz",),
        md5={"food-101.tar.gz": "85eeb15f3717b99a5da872d97d918f87"},
    ),
    ImageSet(
        name="flowers102",
        title="Flowers-102",
        channels=3,
        side=None,
        classes=102,
        splits=("train", "val", "trainval", "test"),
        mean=IMAGENET[0],
        deviation=IMAGENET[1],
        resize=256,
        crop=224,
        url="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        folders=("flowers-102", ""),
        archives=("102flowers.tgz",),
        md5={
            "102flowers.tgz": "52808999861908f626f3c1f4e79d11fa",
            "imagelabels.mat": "e0620be6f572b9609742df49c70aed4d",
            "setid.mat": "a5357ecc9cb78c4bef273ce3793fc85c",
        },
    ),
    ImageSet(
        name="imagefolder",
        title="ImageFolder",
        channels=3,
        side=None,
        classes=None,
        splits=(),
        mean=IMAGENET[0],
        deviation=IMAGENET[1],
        resize=256,
        crop=224,
    ),
    ImageSet(
        name="fakedata",
        title="FakeData",
        channels=3,
        side=224,
        classes=10,
        splits=_TRAIN_TEST,
        mean=(0.0, 0.0, 0.0),
        deviation=(1.0, 1.0, 1.0),
    ),
)

#: Every data set by its name.
CATALOG: Final[Mapping[str, ImageSet]] = {entry.name: entry for entry in _SETS}


def find_set(name: str, what: str = "train") -> ImageSet:
    """Look a data set up.

    Args:
        name: in any spelling: ``CIFAR-10``, ``cifar10`` and ``Cifar_10`` are one.
        what: name of the data, for messages.

    Returns:
        Its entry.

    Raises:
        InputError: for a name that is not known, with near names.

    >>> find_set("Food-101").classes
    101
    """
    entry = CATALOG.get(plain_name(name))
    if entry is None:
        raise unknown_name(f"{what} image data set", name, CATALOG)
    return entry
