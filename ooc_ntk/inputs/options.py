"""Names with options, ``name:part,key=value,flag``: the form of built-in data sets and models in text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ooc_ntk.errors import InputError, unknown_name


@dataclass(frozen=True)
class NamedSpec:
    """A name with a part and options, taken apart.

    Attributes:
        name: as it was written.
        part: what follows the first colon, empty if there is none.
        options: (key, value) in the order given; a bare flag has the value ``"1"``.
    """

    name: str
    part: str = ""
    options: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        part = f":{self.part}" if self.part else ""
        return self.name + part + "".join(f",{key}={value}" for key, value in self.options)


def parse_named(text: str, what: str = "spec") -> NamedSpec:
    """Take ``name:part,key=value,...`` apart.

    Args:
        text: the text, without a slice.
        what: what it stands for, for messages.

    Returns:
        Its parts.

    Raises:
        InputError: for an empty name or key, or a key given twice.

    >>> parse_named("cifar10:train,resize=64,rgb")
    NamedSpec(name='cifar10', part='train', options=(('resize', '64'), ('rgb', '1')))
    >>> str(parse_named("imagefolder:/data/my photos , size=8"))
    'imagefolder:/data/my photos,size=8'
    """
    head, *rest = text.split(",")
    name, _, part = head.strip().partition(":")
    if not name:
        raise InputError(f"{what} {text!r} has no name before its options; write for example 'cifar10:train,resize=64'")
    options: dict[str, str] = {}
    for item in rest:
        key, equals, value = (piece.strip() for piece in item.partition("="))
        if not re.fullmatch(r"[A-Za-z_]+", key) or (equals and not value):
            raise InputError(f"cannot read the option {item.strip()!r} of {what} {text!r}; write key=value")
        if key in options:
            raise InputError(f"{what} {text!r} gives {key} twice")
        options[key] = value if equals else "1"
    return NamedSpec(name.strip(), part.strip(), tuple(options.items()))


def plain_name(name: str) -> str:
    """A name as it is looked up: lower case, letters and digits only.

    >>> plain_name("CIFAR-10"), plain_name("resnext101_32x8d")
    ('cifar10', 'resnext10132x8d')
    """
    return re.sub(r"[^a-z0-9]", "", name.lower())


def check_keys(spec: NamedSpec, known: Iterable[str], what: str) -> None:
    """Refuse options that are not known.

    Raises:
        InputError: naming the first one, with near names.
    """
    names = list(known)
    for key, _ in spec.options:
        if key not in names:
            raise unknown_name(f"option of {what} {spec.name!r}", key, names)


def whole_number(spec: NamedSpec, key: str, default: int, smallest: int = 1, largest: int = 2**31 - 1) -> int:
    """A whole number among the options.

    Raises:
        InputError: if it is none, or out of range.

    >>> whole_number(parse_named("mlp,width=64"), "width", 512), whole_number(parse_named("mlp"), "width", 512)
    (64, 512)
    """
    text = dict(spec.options).get(key)
    if text is None:
        return default
    try:
        value = int(text)
    except ValueError as error:
        raise InputError(f"option {key} of {str(spec)!r} must be a whole number, got {text!r}") from error
    if not smallest <= value <= largest:
        raise InputError(f"option {key} of {str(spec)!r} must be from {smallest} to {largest}, got {value}")
    return value
