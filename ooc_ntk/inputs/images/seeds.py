"""Names of the project empirical-ntks (https://github.com/aw31/empirical-ntks), written as specs of this one.

One name there stands for train and test data with fixed preprocessing, ``CIFAR-10_0_2500_0_1000``.
"""

from __future__ import annotations

import re
from typing import Final

from ooc_ntk.errors import InputError

#: Name there to (train, test) here, with the preprocessing of its loaders. Flowers-102 trains on train and val.
_SPECS: Final = {
    "FakeData": ("fakedata:train,samples=250,size=224", "fakedata:test,samples=250,size=224"),
    "CIFAR-10": ("cifar10:train,resize=224,normalize=imagenet", "cifar10:test,resize=224,normalize=imagenet"),
    "CIFAR-100": ("cifar100:train,resize=224,normalize=imagenet", "cifar100:test,resize=224,normalize=imagenet"),
    "SVHN": ("svhn:train,resize=224", "svhn:test,resize=224"),
    "MNIST": ("mnist:train,channels=3,resize=224", "mnist:test,channels=3,resize=224"),
    "FashionMNIST": ("fashionmnist:train,channels=3,resize=224", "fashionmnist:test,channels=3,resize=224"),
    "FGVCAircraft": ("fgvcaircraft:trainval,resize=224x224", "fgvcaircraft:test,resize=224x224"),
    "Food-101": ("food101:train,resize=240,crop=224", "food101:test,resize=240,crop=224"),
    "Flowers-102": ("flowers102:trainval,resize=240,crop=224", "flowers102:test,resize=240,crop=224"),
}


#: Names of that project.
SEED_NAMES: Final = tuple(_SPECS)


def parse_seed_name(text: str) -> tuple[str, str] | None:
    """Read ``NAME`` or ``NAME_trainbegin_trainend_testbegin_testend``.

    Args:
        text: the name, in the spelling of that project (``CIFAR-10``, not ``cifar10``).

    Returns:
        The spec of the train data and that of the test data, sliced where the name has numbers; None if the text is
        not of this form.

    Raises:
        InputError: for a known name with numbers that are malformed or reversed.

    >>> parse_seed_name("SVHN_0_2500_0_1000")
    ('svhn:train,resize=224[0:2500]', 'svhn:test,resize=224[0:1000]')
    >>> parse_seed_name("cifar10:train") is None
    True
    """
    name, underscore, numbers = text.strip().partition("_")
    if name not in _SPECS or any(mark in numbers for mark in ":,[=+"):
        return None
    train, test = _SPECS[name]
    if not underscore:
        return train, test
    match = re.fullmatch(r"(\d+)_(\d+)_(\d+)_(\d+)", numbers, flags=re.ASCII)
    if match is None:
        raise InputError(
            f"cannot read the numbers of {text!r}: found {numbers!r}, expected trainbegin_trainend_testbegin_testend, "
            f"for example {name}_0_2500_0_1000"
        )
    train_begin, train_end, test_begin, test_end = (int(number) for number in match.groups())
    for what, begin, end in (("train", train_begin, train_end), ("test", test_begin, test_end)):
        if begin >= end:
            raise InputError(
                f"the {what} range of {text!r} holds no sample: it begins at {begin} and ends at {end}; the first "
                "number must be the smaller one"
            )
    return f"{train}[{train_begin}:{train_end}]", f"{test}[{test_begin}:{test_end}]"
