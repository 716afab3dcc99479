"""Specs of image data sets, ``cifar10:test,resize=64``: parsed, checked, and written in one canonical way."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ooc_ntk.errors import InputError, unknown_name
from ooc_ntk.inputs.options import NamedSpec, check_keys, parse_named, plain_name, whole_number

from .catalog import CATALOG, IMAGENET, ImageSet, find_set
from .geometry import Geometry, Size, size_text

#: Largest side in pixels; guessed: far above any network's input, and it stops a slip from filling the memory.
_LARGEST_SIDE: Final = 16_384
_NORMALISATIONS: Final = ("own", "imagenet", "none")
_OPTIONS: Final = ("resize", "crop", "channels", "rgb", "normalize")
_FAKE_OPTIONS: Final = ("samples", "size", "classes")


@dataclass(frozen=True)
class ImageSpec:
    """A data set with its split and preprocessing.

    Attributes:
        entry: the data set.
        split: one of its splits; empty for an image folder.
        path: the image folder as it was given; empty for the others.
        channels: channels of the inputs, 1 or 3.
        resize: as in :class:`Geometry`.
        crop: as in :class:`Geometry`.
        normalize: ``"own"``, ``"imagenet"`` or ``"none"``.
        samples: number of made-up samples (``fakedata``).
        size: height and width of made-up images in pixels.
        classes: number of made-up classes.
    """

    entry: ImageSet
    split: str = ""
    path: str = ""
    channels: int = 3
    resize: Size | None = None
    crop: Size | None = None
    normalize: str = "own"
    samples: int = 250
    size: int = 224
    classes: int = 10

    @property
    def geometry(self) -> Geometry:
        """What happens to the size of the images."""
        return Geometry(self.resize, self.crop)

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Mean and deviation per channel of the inputs; None where pixels stay in [0, 1]."""
        if self.normalize == "none" or (self.entry.name == "fakedata" and self.normalize == "own"):
            return None
        mean, deviation = IMAGENET if self.normalize == "imagenet" else (self.entry.mean, self.entry.deviation)
        if len(mean) == self.channels:
            return mean, deviation
        return mean * self.channels, deviation * self.channels

    def __str__(self) -> str:
        entry = self.entry
        parts = [f"{entry.name}:{self.path or self.split}"]
        if entry.name == "fakedata":
            parts += [f"samples={self.samples}", f"size={self.size}", f"classes={self.classes}"]
        if self.channels != entry.channels:
            parts.append(f"channels={self.channels}")
        if (self.resize, self.crop) != (entry.resize, entry.crop):
            if self.resize is not None or self.crop is None:
                parts.append(f"resize={size_text(self.resize)}")
            if self.crop is not None:
                parts.append(f"crop={size_text(self.crop)}")
        if self.normalize != "own":
            parts.append(f"normalize={self.normalize}")
        return ",".join(parts)


def is_image_spec(text: str) -> bool:
    """Whether a text names one of these data sets, in any spelling; its options may still be wrong.

    >>> is_image_spec("CIFAR-10:train,resize=64"), is_image_spec("mnist5k"), is_image_spec("data/x.npz")
    (True, False, False)
    """
    head = text.partition(",")[0].partition(":")[0].strip()
    return re.fullmatch(r"[A-Za-z0-9 _-]+", head) is not None and plain_name(head) in CATALOG


def parse_image_spec(text: str, what: str = "train", base: Path | None = None) -> ImageSpec:
    """Take the spec of an image data set apart, without looking at any file.

    Args:
        text: the spec without a slice: a name, a split (default: train) or a folder, and options.
        what: name of the data, for messages.
        base: folder that a relative image folder is relative to; None is the current one.

    Returns:
        The spec; ``str()`` of it is the canonical text. ``resize`` and ``crop`` have the data set's defaults only
        where neither is given.

    Raises:
        InputError: for an unknown name, split or option, or a value out of range.

    >>> str(parse_image_spec("Cifar_10", "train")), str(parse_image_spec("MNIST:test,rgb,resize=32"))
    ('cifar10:train', 'mnist:test,channels=3,resize=32')
    """
    named = parse_named(text, f"{what} data")
    entry = find_set(named.name, what)
    fake = entry.name == "fakedata"
    check_keys(named, _OPTIONS + _FAKE_OPTIONS if fake else _OPTIONS, f"{what} data")
    resize, crop = (_parse_size(named, key, what) for key in ("resize", "crop"))
    options = dict(named.options)
    if "resize" not in options and "crop" not in options:
        resize, crop = entry.resize, entry.crop
    normalize = options.get("normalize", "own")
    if normalize not in _NORMALISATIONS:
        raise unknown_name(f"normalisation of {what} data {text!r}", normalize, _NORMALISATIONS)
    channels = _parse_channels(named, entry, what)
    if normalize == "imagenet" and channels == 1:
        raise InputError(
            f"{what} data {text!r}: ImageNet's normalisation is for 3 channels, and the images have 1; add channels=3 "
            "or use normalize=own"
        )
    return ImageSpec(
        entry=entry,
        split=_parse_split(named, entry, what),
        path=_parse_path(named, base, what) if entry.name == "imagefolder" else "",
        channels=channels,
        resize=resize,
        crop=crop,
        normalize=normalize,
        samples=whole_number(named, "samples", 250),
        size=whole_number(named, "size", 224, largest=_LARGEST_SIDE),
        classes=whole_number(named, "classes", 10),
    )


def _parse_split(named: NamedSpec, entry: ImageSet, what: str) -> str:
    """The split that a spec names."""
    if not entry.splits:
        return ""
    split = named.part.lower() or entry.splits[0]
    if split not in entry.splits:
        raise unknown_name(f"split of {what} data {entry.name}", named.part, entry.splits)
    return split


def _parse_path(named: NamedSpec, base: Path | None, what: str) -> str:
    """Absolute path of an image folder, links left alone."""
    if not named.part:
        raise InputError(f"{what} data {str(named)!r} names no folder; write for example imagefolder:photos/train")
    return str((Path.cwd() / (base or ".") / Path(named.part).expanduser()).absolute())


def _parse_size(named: NamedSpec, key: str, what: str) -> Size | None:
    """A size among the options; None where it is not given or ``none``."""
    text = dict(named.options).get(key, "none")
    if text == "none":
        return None
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text, flags=re.ASCII)
    if match is None:
        raise InputError(
            f"option {key} of {what} data {str(named)!r} must be a number of pixels, HEIGHTxWIDTH or none, got {text!r}"
        )
    sides = [int(side) for side in match.groups() if side is not None]
    if not all(1 <= side <= _LARGEST_SIDE for side in sides):
        raise InputError(
            f"option {key} of {what} data {str(named)!r} must be from 1 to {_LARGEST_SIDE} pixels, got {text}"
        )
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def _parse_channels(named: NamedSpec, entry: ImageSet, what: str) -> int:
    """Channels of the inputs; ``rgb`` is another way to say 3."""
    options = dict(named.options)
    if options.get("rgb", "1") != "1":
        raise InputError(f"option rgb of {what} data {str(named)!r} is a flag and takes no value; write rgb alone")
    channels = whole_number(named, "channels", 3 if "rgb" in options else entry.channels, largest=3)
    if channels == 2 or ("rgb" in options and channels != 3):
        raise InputError(f"{what} data {str(named)!r} asks for {channels} channels; use 1, or 3 (which rgb means)")
    if channels < entry.channels and entry.name != "fakedata":
        raise InputError(
            f"{what} data {entry.name} is in colour, {entry.channels} channels, and {str(named)!r} asks for "
            f"{channels}; leave channels out"
        )
    return channels
