"""``open_images``: image data sets in their original files, as sources of samples."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from ooc_ntk.errors import InputError
from ooc_ntk.inputs.source import Samples, SampleSource

from .ahead import Decoded, DecodingWorkers, cut_pieces, decode_in_thread, may_start_processes
from .cache import open_cache, read_pixels
from .cifar import read_cifar
from .digits import read_idx_pair, read_svhn
from .download import download as download_files
from .layout import MissingFilesError
from .photos import list_aircraft, list_flowers102, list_food101, list_imagefolder
from .pixels import ArrayImages, FakeImages, FileImages, Images
from .spec import ImageSpec, parse_image_spec
from .transform import to_inputs

_log = logging.getLogger(__name__)

_ARRAY_READERS = {
    "cifar10": read_cifar,
    "cifar100": read_cifar,
    "svhn": read_svhn,
    "mnist": read_idx_pair,
    "fashionmnist": read_idx_pair,
}
_PHOTO_LISTS = {"food101": list_food101, "flowers102": list_flowers102, "fgvcaircraft": list_aircraft}


class ImageSource(SampleSource):
    """Samples of an image data set: inputs ``(n, C, H, W)`` float32, targets ``(n,)`` int64.

    Args:
        spec: data set and preprocessing.
        images: the images.
        workers: processes that decode ahead in :meth:`stream`; 0 decodes ahead in one thread.
        cache: folder that decoded images are kept in; None keeps none.
        what: name of the data, for messages.

    Attributes:
        decoded: images decoded so far for samples that were handed over; those found in the cache are not counted.

    Raises:
        InputError: for fewer than 0 workers.
        StorageError: if the cache cannot be made.
    """

    def __init__(
        self, spec: ImageSpec, images: Images, workers: int = 0, cache: Path | None = None, what: str = "train"
    ) -> None:
        if workers < 0:
            raise InputError(f"{what} data: the number of loader workers must be 0 or more, got {workers}")
        self.spec = str(spec)
        self.decoded = 0
        self._described = spec
        self._images = images
        self._cache = None if cache is None else open_cache(cache, images)
        self._workers = workers
        self._idle: DecodingWorkers | None = None
        self._lock = threading.Lock()
        self._what = what
        if not images.ready:
            self.decoded_bytes = math.prod(images.shape)
        if isinstance(images, ArrayImages):
            channels, height, width = images.shape
            self.sample_bytes = max(channels, spec.channels) * height * width * 4 + 8

    def __len__(self) -> int:
        return self._images.count

    def _read(self, start: int, stop: int) -> Samples:
        return self._samples(start, read_pixels(self._images, self._cache, start, stop))

    def targets(self, start: int, stop: int) -> torch.Tensor:
        """See :meth:`SampleSource.targets`; no image is decoded."""
        return torch.from_numpy(self._images.labels(start, stop))

    def _samples(self, start: int, found: Decoded) -> Samples:
        """Samples of pixels."""
        pixels, decoded = found
        with self._lock:
            self.decoded += decoded
        inputs = to_inputs(pixels, self._described.channels, self._described.normalisation)
        return Samples((inputs,), {}, torch.from_numpy(self._images.labels(start, start + len(pixels))))

    def stream(self, ranges: Sequence[tuple[int, int]]) -> Iterator[Samples]:
        """Read ranges one after another, decoding ahead of the consumer.

        Args:
            ranges: (first sample, one past the last) of each range, in the order they are wanted.

        Returns:
            An iterator over the samples of each range, the same as ``fetch`` returns. At most two ranges (with
            workers: 64 images for each) are held decoded, as bytes.

        Raises:
            InputError: for a range outside the data, at once; if an image cannot be decoded, at its range.
            StorageError: if the cache cannot be read or written.
        """
        for start, stop in ranges:
            if not 0 <= start < stop <= len(self):
                raise InputError(f"cannot fetch samples {start} to {stop} of data with {len(self)} samples")
        if self._images.ready:
            return (self._read(start, stop) for start, stop in ranges)
        if self._workers and not may_start_processes():
            _log.warning(
                "%s data: this process may not start others, so images are decoded in one thread instead of %d loader "
                "workers; for Dask workers set distributed.worker.daemon to false",
                *(self._what, self._workers),
            )
            self._workers = 0
        return self._stream_by_workers(ranges) if self._workers else self._stream_by_thread(ranges)

    def _stream_by_thread(self, ranges: Sequence[tuple[int, int]]) -> Iterator[Samples]:
        parts = decode_in_thread(self._images, self._cache, ranges)
        try:
            for (start, _), found in zip(ranges, parts, strict=True):
                yield self._samples(start, found)
        finally:
            parts.close()  # type: ignore[attr-defined]

    def _stream_by_workers(self, ranges: Sequence[tuple[int, int]]) -> Iterator[Samples]:
        with self._lock:
            pool, self._idle = self._idle, None
        if pool is None:
            # The first pass, or another one that is not finished has the processes.
            pool = DecodingWorkers(self._images, self._cache, self._workers)
        parts = pool.run(cut_pieces(ranges))
        try:
            for start, stop in ranges:
                yield self._samples(start, self._join(parts, stop - start))
        finally:
            parts.close()  # type: ignore[attr-defined]
            with self._lock:
                keep = self._idle is None and not pool.closed
                if keep:
                    self._idle = pool
            if not keep:
                pool.close()

    def _join(self, parts: Iterator[Decoded], count: int) -> Decoded:
        """Put the pieces of one range together."""
        first, decoded = next(parts)
        if len(first) == count:
            return first, decoded
        whole: npt.NDArray[np.uint8] = np.empty((count, *first.shape[1:]), np.uint8)
        whole[: len(first)] = first
        filled = len(first)
        while filled < count:
            pixels, more = next(parts)
            whole[filled : filled + len(pixels)] = pixels
            filled += len(pixels)
            decoded += more
        return whole, decoded

    def digest(self) -> str:
        """Digest the content and the preprocessing, without decoding anything; see :meth:`digest_range`."""
        return self.digest_range(0, len(self))

    def digest_range(self, start: int, stop: int) -> str:
        """Digest a part: equal to that of another source of the same pixels, labels, order and preprocessing.

        Sets held in memory are hashed whole, as bytes before preprocessing. Of sets of files the names, sizes and
        labels are hashed, and the content of up to 512 evenly spaced ones.

        Args:
            start: first sample.
            stop: one past the last sample.

        Returns:
            32 hexadecimal digits. They differ from those of the same floats held as an array.

        Raises:
            InputError: if a file is missing or cannot be read.
        """
        spec = self._described
        total = blake2b(f"images {spec.channels} {spec.normalisation}\n".encode(), digest_size=16)
        self._images.feed(total.update, start, stop)
        return total.hexdigest()

    def close(self) -> None:
        """End the worker processes, if any wait for another pass; a later pass starts new ones."""
        with self._lock:
            pool, self._idle = self._idle, None
        if pool is not None:
            pool.close()


def open_images(
    text_or_spec: str | ImageSpec,
    *,
    data_dir: Path | None,
    workers: int = 0,
    cache: Path | None = None,
    download: bool = False,
    what: str = "train",
    base: Path | None = None,
) -> ImageSource:
    """Open an image data set.

    Args:
        text_or_spec: a spec such as ``cifar10:test,resize=64``, without a slice.
        data_dir: folder that holds the data set's files, or one above it; not needed for ``imagefolder`` and
            ``fakedata``.
        workers: processes that decode ahead in ``stream``; 0 decodes ahead in one thread.
        cache: folder that decoded images are kept in; None keeps none.
        download: get the files by torchvision if they are not there.
        what: name of the data, for messages.
        base: folder that a relative image folder is relative to; None is the current one.

    Returns:
        The source. Its spec is canonical.

    Raises:
        InputError: for a spec that cannot be read, or files that are missing or damaged.
        StorageError: if the cache cannot be made.
    """
    spec = parse_image_spec(text_or_spec, what, base) if isinstance(text_or_spec, str) else text_or_spec
    try:
        images = _open(spec, data_dir, what)
    except MissingFilesError:
        if not download or data_dir is None:
            raise
        download_files(spec.entry.name, data_dir, spec.split, what)
        images = _open(spec, data_dir, what)
    return ImageSource(spec, images, workers, cache, what)


def _open(spec: ImageSpec, data_dir: Path | None, what: str) -> Images:
    """The images of a spec."""
    name = spec.entry.name
    if name == "fakedata":
        return FakeImages(spec.samples, (spec.channels, spec.size, spec.size), spec.classes, spec.geometry)
    if name in _ARRAY_READERS:
        pixels, labels = _ARRAY_READERS[name](spec.entry, spec.split, data_dir, what)
        return ArrayImages(pixels, labels, spec.geometry)
    if name == "imagefolder":
        folder, names, numbers = list_imagefolder(Path(spec.path), what)
    else:
        folder, names, numbers = _PHOTO_LISTS[name](spec.entry, spec.split, data_dir, what)
    return FileImages(folder, names, numbers, spec.geometry, f"{what} data {name}")
