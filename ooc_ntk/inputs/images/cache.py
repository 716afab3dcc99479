"""Decoded images kept on disk: raw bytes in one file, and a byte per image in another that says it is there.

Both files are written in place and read with plain reads, by any number of processes at once: all of them write the
same bytes, and an image is marked only after its pixels are on the disk, so a process that is killed leaves nothing
wrong behind.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL

from ooc_ntk.errors import StorageError

from .pixels import ArrayImages, Images


class PixelCache:
    """The cache of one data set with one geometry. Plain data, so that it can be sent to decoding processes.

    Args:
        folder: made where it does not exist; may hold the caches of other data sets.
        key: name of the files, different for different images.
        count: number of images.
        shape: (channels, height, width) of every image.

    Raises:
        StorageError: if the files cannot be made.
    """

    def __init__(self, folder: Path, key: str, count: int, shape: tuple[int, int, int]) -> None:
        self._pixels = folder / f"{key}.u8"
        self._done = folder / f"{key}.done"
        self._shape = shape
        self._image_bytes = math.prod(shape)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            kept = self._pixels.is_file() and self._pixels.stat().st_size == count * self._image_bytes
            _grow(self._pixels, count * self._image_bytes)
            # Marks without their pixels (someone removed the large file) must not be believed.
            _grow(self._done, count, clear=not kept)
        except OSError as error:
            raise self._problem("made", error) from error

    def _problem(self, verb: str, error: OSError) -> StorageError:
        return StorageError(
            f"the image cache {self._pixels} cannot be {verb}: {error}; free space there, remove the file, or name "
            "another cache folder"
        )

    def load(self, start: int, stop: int) -> tuple[npt.NDArray[np.uint8], list[int]]:
        """Read a range, as far as it is there.

        Args:
            start: first image.
            stop: one past the last image.

        Returns:
            ``(stop - start, channels, height, width)``, and the numbers of the images that are not there, whose
            pixels mean nothing.

        Raises:
            StorageError: if the files cannot be read.
        """
        pixels = np.empty((stop - start, *self._shape), np.uint8)
        try:
            with self._done.open("rb") as file:
                file.seek(start)
                marks = file.read(stop - start).ljust(stop - start, b"\0")
            present = [start + offset for offset, mark in enumerate(marks) if mark == 1]
            with self._pixels.open("rb") as file:
                for first, last in _runs(present):
                    file.seek(first * self._image_bytes)
                    target = pixels[first - start : last - start].reshape(-1)
                    if file.readinto(target.data) != target.nbytes:
                        raise OSError(f"it ends before image {last - 1}")
        except OSError as error:
            raise self._problem("read", error) from error
        there = set(present)
        return pixels, [number for number in range(start, stop) if number not in there]

    def store(self, start: int, pixels: npt.NDArray[np.uint8], numbers: list[int]) -> None:
        """Write images and mark them as there.

        Args:
            start: number of the first image in ``pixels``.
            pixels: ``(images, channels, height, width)``.
            numbers: the images to write, ascending.

        Raises:
            StorageError: if the disk is full or the files cannot be written.
        """
        try:
            with self._pixels.open("r+b") as file:
                for first, last in _runs(numbers):
                    file.seek(first * self._image_bytes)
                    file.write(pixels[first - start : last - start].reshape(-1).data)
                file.flush()
                os.fsync(file.fileno())
            with self._done.open("r+b") as file:
                for first, last in _runs(numbers):
                    file.seek(first)
                    file.write(b"\1" * (last - first))
        except OSError as error:
            raise self._problem("written", error) from error


def open_cache(folder: Path, images: Images) -> PixelCache | None:
    """Open the cache of a data set.

    Args:
        folder: where caches are kept.
        images: the data set; its files and geometry, and the version of PIL that decodes them, name the cache.

    Returns:
        The cache; None where the images are in memory already and not changed.

    Raises:
        InputError: if a file of the data set is missing.
        StorageError: if the cache cannot be made.
    """
    if images.ready:
        return None
    return PixelCache(folder, f"{images.identity()}-pil{PIL.__version__}", images.count, images.shape)


def read_pixels(images: Images, cache: PixelCache | None, start: int, stop: int) -> tuple[npt.NDArray[np.uint8], int]:
    """Pixels of a range, from the cache as far as they are there; what had to be decoded is added to it.

    Args:
        images: the data set.
        cache: its cache, or None.
        start: first image.
        stop: one past the last image.

    Returns:
        ``(stop - start, channels, height, width)``, and the number of images that were decoded.

    Raises:
        InputError: if an image cannot be decoded.
        StorageError: if the cache cannot be read or written.
    """
    if isinstance(images, ArrayImages) and images.ready:
        return images.block(start, stop), 0
    if cache is None:
        pixels, wanted = np.empty((stop - start, *images.shape), np.uint8), list(range(start, stop))
    else:
        pixels, wanted = cache.load(start, stop)
    for number in wanted:
        pixels[number - start] = images.read(number)
    if cache is not None and wanted:
        cache.store(start, pixels, wanted)
    return pixels, len(wanted)


def _grow(path: Path, size: int, clear: bool = False) -> None:
    """Make a file of a size, new bytes being 0; on most file systems they take no space until they are written."""
    with path.open("ab") as file:
        if clear:
            file.truncate(0)
        file.truncate(size)


def _runs(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Cut ascending numbers into ranges without gaps.

    >>> list(_runs([2, 3, 4, 7]))
    [(2, 5), (7, 8)]
    """
    start = 0
    for position in range(1, len(numbers) + 1):
        if position == len(numbers) or numbers[position] != numbers[position - 1] + 1:
            yield numbers[start], numbers[position - 1] + 1
            start = position
