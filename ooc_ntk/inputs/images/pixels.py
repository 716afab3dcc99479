"""Images of a data set by number, as bytes after resize and crop: from memory, from files, or made up."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from ooc_ntk.errors import InputError
from ooc_ntk.inputs.source import spaced_samples

from .geometry import Geometry
from .transform import arrange_pixels, open_photo, photo_size

#: Image files whose content is hashed, as many as samples of a Dataset are.
_DIGEST_FILES: Final = 512

#: Takes bytes of a digest.
Feed = Callable[[bytes], None]


class Images(ABC):
    """The images and labels of a data set. Objects are sent to decoding processes, so they hold plain data only.

    Attributes:
        count: number of images.
        ready: whether the pixels lie in memory as they are wanted, so that nothing is gained by reading ahead.
    """

    count: int
    ready: bool = False

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of every image.

        Raises:
            InputError: if the first image has to be looked at and cannot be.
        """

    @abstractmethod
    def read(self, number: int) -> npt.NDArray[np.uint8]:
        """Pixels of one image, of the set's shape.

        Raises:
            InputError: if it cannot be decoded or comes out with another shape.
        """

    @abstractmethod
    def labels(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Labels of a range, ``(stop - start,)``, in memory of their own."""

    @abstractmethod
    def feed(self, feed: Feed, start: int, stop: int) -> None:
        """Hand over bytes that change when the pixels, labels, sizes or the order of a range change."""

    def identity(self) -> str:
        """Digest of all images, for the name of their cache: 32 hexadecimal digits."""
        total = blake2b(digest_size=16)
        self.feed(total.update, 0, self.count)
        return total.hexdigest()


class ArrayImages(Images):
    """Images held in memory.

    Args:
        pixels: ``(samples, channels, height, width)``.
        labels: ``(samples,)``.
        geometry: resize and crop.
    """

    def __init__(self, pixels: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], geometry: Geometry) -> None:
        self._pixels = np.ascontiguousarray(pixels)
        self._labels = labels
        self._geometry = geometry
        self.count = len(pixels)
        self.ready = not geometry.changes(*pixels.shape[2:])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of every image."""
        channels, height, width = self._pixels.shape[1:]
        return channels, *self._geometry.output(height, width)

    def read(self, number: int) -> npt.NDArray[np.uint8]:
        """Pixels of one image; a view of the array where they are not changed."""
        return arrange_pixels(self._pixels[number], self._geometry)

    def block(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Pixels of a range as they are held, ``(stop - start, channels, height, width)``, a view."""
        return self._pixels[start:stop]

    def labels(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Labels of a range."""
        return self._labels[start:stop].copy()

    def feed(self, feed: Feed, start: int, stop: int) -> None:
        """Hand over every pixel and label of a range, as held, and what happens to their size."""
        feed(f"array {self._pixels.shape[1:]} {stop - start} {self._geometry}\n".encode())
        feed(self._pixels[start:stop].reshape(-1).data)  # type: ignore[arg-type]
        feed(self._labels[start:stop].astype("<i8").tobytes())


class FileImages(Images):
    """Images in files, decoded when they are read.

    Args:
        folder: the folder that names are relative to.
        names: a file for each image.
        labels: ``(samples,)``.
        geometry: resize and crop.
        what: name of the data, for messages.
    """

    def __init__(
        self, folder: Path, names: list[str], labels: npt.NDArray[np.int64], geometry: Geometry, what: str
    ) -> None:
        self._folder = folder
        self._names = names
        self._labels = labels
        self._geometry = geometry
        self._what = what
        self._shape: tuple[int, int, int] | None = None
        self.count = len(names)

    def _path(self, number: int) -> Path:
        return self._folder / self._names[number]

    def _problem(self, number: int, error: Exception) -> InputError:
        """The error for an image that cannot be used."""
        path = self._path(number)
        if isinstance(error, FileNotFoundError):
            return InputError(
                f"{self._what}: sample {number} is missing: there is no file {path}; unpack the data set again"
            )
        return InputError(
            f"{self._what}: sample {number} cannot be decoded: {path}: {type(error).__name__}: {error}; expected an "
            "image of 8 bits per channel that PIL can read; get the file again"
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of every image; sample 0 is looked at where its own size decides."""
        if self._shape is None:
            size = self._geometry.fixed
            if size is None:
                try:
                    size = self._geometry.output(*photo_size(self._path(0)))
                except Exception as error:
                    raise self._problem(0, error) from error
            self._shape = (3, *size)
        return self._shape

    def read(self, number: int) -> npt.NDArray[np.uint8]:
        """Decode one image."""
        try:
            pixels = open_photo(self._path(number), self._geometry)
        except Exception as error:
            raise self._problem(number, error) from error
        if pixels.shape != self.shape:
            raise InputError(
                f"{self._what}: sample {number}, {self._path(number)}, comes out as {pixels.shape}, but sample 0 as "
                f"{self.shape}; all samples need one shape: add resize=HEIGHTxWIDTH, or crop=N"
            )
        return pixels

    def labels(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Labels of a range."""
        return self._labels[start:stop].copy()

    def feed(self, feed: Feed, start: int, stop: int) -> None:
        """Hand over names, sizes and labels of a range, and the content of up to 512 files of it."""
        feed(f"files {stop - start} {self._geometry}\n".encode())
        for number in range(start, stop):
            feed(f"{self._names[number]} {self._status(number).st_size} {self._labels[number]}\n".encode())
        for offset in spaced_samples(stop - start, _DIGEST_FILES):
            try:
                feed(self._path(start + offset).read_bytes())
            except OSError as error:
                raise self._problem(start + offset, error) from error

    def _status(self, number: int) -> os.stat_result:
        """Size and times of a file."""
        try:
            return self._path(number).stat()
        except OSError as error:
            raise self._problem(number, error) from error

    def identity(self) -> str:
        """Digest of the folder, and of the names, sizes and times of all files; none is read."""
        folder = self._folder.resolve()
        total = blake2b(f"files {self.count} {self._geometry} in {folder}\n".encode(), digest_size=16)
        for number, name in enumerate(self._names):
            status = self._status(number)
            total.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode())
        return total.hexdigest()


class FakeImages(Images):
    """Random images, those of torchvision's FakeData: image i is drawn after seeding with i.

    Args:
        count: number of images.
        shape: (channels, height, width) before resize and crop; 1 or 3 channels.
        classes: number of classes.
        geometry: resize and crop.
    """

    def __init__(self, count: int, shape: tuple[int, int, int], classes: int, geometry: Geometry) -> None:
        self.count = count
        self._native = shape
        self._classes = classes
        self._geometry = geometry

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of every image."""
        channels, height, width = self._native
        return channels, *self._geometry.output(height, width)

    def _draw(self, number: int) -> tuple[torch.Tensor, int]:
        """Image and label of one number."""
        # A generator of its own draws the same numbers as the global one after torch.manual_seed(number), and does
        # not disturb it: images are drawn in another thread too.
        generator = torch.Generator().manual_seed(number)
        image = torch.randn(*self._native, generator=generator)
        label = torch.randint(0, self._classes, (1,), generator=generator)
        return image, int(label)

    def read(self, number: int) -> npt.NDArray[np.uint8]:
        """Draw one image; values are wrapped to bytes as torchvision does on the way through a PIL image."""
        image, _ = self._draw(number)
        return arrange_pixels(image.mul(255).byte().numpy(), self._geometry)

    def labels(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Labels of a range; each needs its image drawn first, since that is the order of the random numbers."""
        return np.array([self._draw(number)[1] for number in range(start, stop)], np.int64)

    def feed(self, feed: Feed, start: int, stop: int) -> None:
        """Hand over what the images are made from, and the first one, which shows that they are made the same way."""
        feed(f"fake {self._native} {self._classes} {start} {stop} {self._geometry}\n".encode())
        feed(self.read(start).tobytes())
