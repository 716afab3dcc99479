"""Decoding ahead of the consumer: in one thread, or in the worker processes of a torch DataLoader."""

from __future__ import annotations

import atexit
import functools
import itertools
import multiprocessing
import signal
import warnings
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ooc_ntk.errors import InputError, OocNtkError

from .cache import PixelCache, read_pixels
from .pixels import Images

#: Ranges decoded ahead by the thread: one that waits and one in work.
_RANGES_AHEAD: Final = 2
#: Images a worker decodes at a time. Guessed: a few MB at 224 pixels, and no worker idles long at the end of a range.
_PIECE_IMAGES: Final = 32
#: Pieces that each worker has waiting or in work.
_PIECES_AHEAD: Final = 2

#: First image, one past the last.
Piece = tuple[int, int]
#: Pixels of a piece, and how many of its images were decoded rather than found in the cache.
Decoded = tuple[npt.NDArray[np.uint8], int]


def decode_in_thread(images: Images, cache: PixelCache | None, ranges: Sequence[Piece]) -> Iterator[Decoded]:
    """Decode ranges one after another in a thread, up to two ahead of the consumer.

    Args:
        images: the data set.
        cache: its cache, or None.
        ranges: what to decode, in order.

    Yields:
        The pixels of each range and the number of images decoded.

    Raises:
        InputError: if an image cannot be decoded, at the range that it is in.
        StorageError: if the cache cannot be read or written.
    """
    # At the end of the process the executor finishes what it was given, two ranges at most, so nothing is cut off.
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ooc-ntk-images")
    upcoming = iter(ranges)
    waiting: deque[Future[Decoded]] = deque()
    try:
        for start, stop in itertools.islice(upcoming, _RANGES_AHEAD):
            waiting.append(executor.submit(read_pixels, images, cache, start, stop))
        while waiting:
            found = waiting.popleft().result()
            for start, stop in itertools.islice(upcoming, 1):
                waiting.append(executor.submit(read_pixels, images, cache, start, stop))
            yield found
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def cut_pieces(ranges: Sequence[Piece]) -> list[Piece]:
    """Cut ranges into the pieces that workers decode, so that all of them work on the range that is wanted next.

    >>> cut_pieces([(0, 40), (40, 45)])
    [(0, 32), (32, 40), (40, 45)]
    """
    return [
        (first, min(first + _PIECE_IMAGES, stop))
        for start, stop in ranges
        for first in range(start, stop, _PIECE_IMAGES)
    ]


def may_start_processes() -> bool:
    """Whether this process may have children; the worker processes of a Dask cluster usually may not."""
    return not multiprocessing.current_process().daemon


class DecodingWorkers:
    """Worker processes that stay alive from one pass to the next.

    Args:
        images: the data set.
        cache: its cache, or None.
        workers: number of processes, at least 1.
    """

    def __init__(self, images: Images, cache: PixelCache | None, workers: int) -> None:
        self._order = _Order()
        with warnings.catch_warnings():
            # More workers than cores is the user's choice: decoding from a slow disk waits more than it computes.
            warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
            self._loader: DataLoader[object] = DataLoader(
                _Decoder(images, cache),
                batch_size=None,  # an "index" is a whole piece
                sampler=self._order,
                num_workers=workers,
                collate_fn=_unchanged,
                worker_init_fn=_start_worker,
                persistent_workers=True,
                prefetch_factor=_PIECES_AHEAD,
                generator=torch.Generator(),  # else each start would draw from the user's random numbers
            )
        self._processes: object = None
        self._at_exit = functools.partial(_close_at_exit, weakref.ref(self))
        self.closed = False

    def run(self, pieces: Sequence[Piece]) -> Iterator[Decoded]:
        """Decode pieces in the workers; one pass at a time.

        Args:
            pieces: what to decode, in the order it is wanted.

        Yields:
            The pixels of each piece and the number of images decoded.

        Raises:
            InputError: if an image cannot be decoded, at the piece that it is in, or if a worker process ended.
            StorageError: if the cache cannot be read or written.
        """
        self._order.pieces = pieces
        try:
            with warnings.catch_warnings():
                # Newer Pythons warn about a fork beside threads; workers only decode and take none of their locks.
                warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
                iterator = iter(self._loader)
            if self._processes is None:
                self._processes = iterator
                # Before torch's own hook, which in older versions waits five seconds for each idle worker.
                atexit.register(self._at_exit)
            for found in iterator:
                if isinstance(found, OocNtkError):
                    raise found
                yield found
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            self.close()
            raise InputError(
                f"a process that decodes images ended before its work was done ({error}); if memory ran out, use fewer "
                "loader workers"
            ) from error

    def close(self) -> None:
        """End the worker processes."""
        self.closed = True
        atexit.unregister(self._at_exit)
        shut_down = getattr(self._processes, "_shutdown_workers", None)
        if callable(shut_down):
            shut_down()
        self._processes = None


def _close_at_exit(workers: weakref.ref[DecodingWorkers]) -> None:
    """End the processes of workers that are still there when Python ends."""
    alive = workers()
    if alive is not None:
        alive.close()


class _Order(Sampler[Piece]):
    """The pieces of the next pass; set anew before each."""

    def __init__(self) -> None:
        self.pieces: Sequence[Piece] = ()

    def __iter__(self) -> Iterator[Piece]:
        return iter(self.pieces)

    def __len__(self) -> int:
        return len(self.pieces)


class _Decoder(Dataset[object]):
    """What a worker process holds: the images by piece."""

    def __init__(self, images: Images, cache: PixelCache | None) -> None:
        self._images = images
        self._cache = cache

    def __getitem__(self, piece: Piece) -> Decoded | OocNtkError:
        """Decode a piece. Errors of ours are handed back: raised here, they would arrive with a traceback as text."""
        try:
            return read_pixels(self._images, self._cache, *piece)
        except OocNtkError as error:
            return error


def _unchanged(value: object) -> object:
    """Leave arrays as they are: as tensors each would take a file descriptor in the consumer."""
    return value


def _start_worker(_: int) -> None:
    """Prepare a worker process."""
    torch.set_num_threads(1)
    # Ctrl-C reaches all processes of a terminal; the consumer decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
