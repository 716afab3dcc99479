"""Samples, and the sources that hand them out range by range.

A source knows its length, fetches any contiguous range as CPU tensors and has a digest of its content that does
not depend on the container: the same samples held as tensors, as ``.npz`` or as zarr have the same digest.
"""

from __future__ import annotations

import hashlib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import torch

from ooc_ntk.errors import InputError

#: Bytes hashed at a time; guessed: large against the cost of a call, small against any budget.
_SLICE_BYTES: Final = 4 * 2**20
#: Arrays up to this size are hashed whole (about a second, measured at 1 GB/s of BLAKE2b).
_WHOLE_BYTES: Final = 2**30
#: Samples hashed of an array that is larger than that.
_ARRAY_SAMPLES: Final = 4096
#: Samples hashed of a Dataset, whose samples cost an unknown time each.
_DATASET_SAMPLES: Final = 512


class Samples(NamedTuple):
    """A range of samples, every tensor stacked over the samples (leading dimension), on the CPU.

    Attributes:
        args: positional model inputs, each ``(samples, ...)``.
        kwargs: keyword model inputs, each ``(samples, ...)``.
        targets: ``(samples, ...)``, or None where the data has none.
    """

    args: tuple[torch.Tensor, ...]
    kwargs: dict[str, torch.Tensor]
    targets: torch.Tensor | None

    def named(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor with the name that messages and digests use, in a fixed order."""
        for position, tensor in enumerate(self.args):
            yield f"input {position}", tensor
        for key in sorted(self.kwargs):
            yield f"input {key!r}", self.kwargs[key]
        if self.targets is not None:
            yield "targets", self.targets

    @property
    def size(self) -> int:
        """Number of samples."""
        return next((int(tensor.shape[0]) for _, tensor in self.named()), 0)


class SampleHasher:
    """Digest of a stream of samples that does not depend on how the stream is cut into ranges."""

    def __init__(self, header: str = "") -> None:
        self._header = header
        self._streams: dict[str, hashlib.blake2b] = {}
        self._layouts: dict[str, list[str]] = {}
        self._count = 0

    def update(self, samples: Samples) -> None:
        """Append a range of samples.

        Args:
            samples: the range; any shapes and dtypes, on the CPU.
        """
        for name, tensor in samples.named():
            stream = self._streams.setdefault(name, hashlib.blake2b(digest_size=16))
            # The layout is written where it changes, so equal streams in other cuts write the same layouts.
            layout = f"{tensor.dtype} {tuple(tensor.shape[1:])}"
            layouts = self._layouts.setdefault(name, [])
            if not layouts or layouts[-1].split(":", 1)[1] != layout:
                layouts.append(f"{self._count}:{layout}")
            row_bytes = max(1, math.prod(tensor.shape[1:]) * tensor.element_size())
            step = max(1, _SLICE_BYTES // row_bytes)
            for start in range(0, int(tensor.shape[0]), step):
                rows = tensor[start : start + step].resolve_conj().resolve_neg().contiguous()
                stream.update(rows.reshape(-1).view(torch.uint8).numpy().data)
        self._count += samples.size

    def hexdigest(self) -> str:
        """Digest of everything so far: 32 hexadecimal digits."""
        total = hashlib.blake2b(f"samples {self._count} {self._header}".encode(), digest_size=16)
        for name in sorted(self._streams):
            total.update(f"\n{name} {self._layouts[name]} {self._streams[name].hexdigest()}".encode())
        return total.hexdigest()


def digest_samples(samples: Samples) -> str:
    """Digest one range of samples: names, dtypes, shapes and bytes of all its tensors.

    Args:
        samples: the range, on the CPU.

    Returns:
        BLAKE2b of 16 bytes, as 32 hexadecimal digits; equal to the digest of a source that holds just these samples.
    """
    hasher = SampleHasher()
    hasher.update(samples)
    return hasher.hexdigest()


def spaced_samples(count: int, wanted: int) -> list[int]:
    """Evenly spaced sample numbers, the first and the last among them.

    Args:
        count: samples there are.
        wanted: samples wanted, at least 1.

    Returns:
        ``min(count, wanted)`` different numbers, ascending.

    >>> spaced_samples(10, 4), spaced_samples(3, 5), spaced_samples(5, 1)
    ([0, 3, 6, 9], [0, 1, 2], [0])
    """
    if wanted >= count:
        return list(range(count))
    if wanted == 1:
        return [0]
    return [position * (count - 1) // (wanted - 1) for position in range(wanted)]


class SampleSource(ABC):
    """Samples by range.

    Attributes:
        spec: text the source can be made from again (``"mnist5k[0:4000]"``), None for live objects.
        sample_bytes: bytes of one sample where that is known without reading any, else None.
        chunk_rows: samples that the storage below reads at once; 1 where any row costs the same.
    """

    spec: str | None = None
    sample_bytes: int | None = None
    chunk_rows: int = 1
    #: Bytes of one decoded sample where reading decodes, so that keeping it saves time; otherwise None.
    decoded_bytes: int | None = None
    #: Of texts that are padded to one length: that length, and the real tokens of every sample, (samples,) int64.
    length: int | None = None
    lengths: torch.Tensor | None = None
    #: Mean and deviation per channel that were taken off pixels in [0, 1], where that is known.
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _read(self, start: int, stop: int) -> Samples:
        """Read samples ``start`` to ``stop``, a range known to be valid."""

    def fetch(self, start: int, stop: int) -> Samples:
        """Read a range of samples, and no others.

        Args:
            start: first sample.
            stop: one past the last sample.

        Returns:
            The samples as CPU tensors in their original dtypes; they may share memory with the data they came from.

        Raises:
            InputError: for an empty range or one outside the data, or if a sample cannot be used.
        """
        if not 0 <= start < stop <= len(self):
            raise InputError(f"cannot fetch samples {start} to {stop} of data with {len(self)} samples")
        return self._read(start, stop)

    def texts(self, numbers: Sequence[int]) -> list[str] | None:  # noqa: ARG002 - for sources that have some
        """Samples as they were written, before they became tokens; None where samples are no texts, or not known."""
        return None

    def stream(self, ranges: Sequence[tuple[int, int]]) -> Iterator[Samples]:
        """Read ranges one after another; sources that decode do so ahead of the consumer.

        Args:
            ranges: (first sample, one past the last) of each range, in the order they are wanted.

        Yields:
            The samples of each range, as :meth:`fetch` returns them.

        Raises:
            InputError: as :meth:`fetch`.
        """
        for start, stop in ranges:
            yield self.fetch(start, stop)

    def targets(self, start: int, stop: int) -> torch.Tensor | None:
        """Targets of a range alone; sources that decode inputs, or keep targets apart, read no inputs for them.

        Args:
            start: first sample.
            stop: one past the last sample.

        Returns:
            (stop - start, ...) on the CPU, or None where the data has none.

        Raises:
            InputError: as :meth:`fetch`.
        """
        return self.fetch(start, stop).targets

    def padded(self, length: int) -> SampleSource:
        """The same samples padded to another length, where they are texts.

        Args:
            length: tokens of every sample.

        Returns:
            The source.

        Raises:
            InputError: if samples are not texts, or the length is too small.
        """
        raise InputError(f"samples that are no texts have no length, got a wish for {length} tokens")

    def digest_range(self, start: int, stop: int) -> str | None:  # noqa: ARG002 - for sources that have one
        """Digest of a range of samples that is cheaper than reading it, or None if there is none."""
        return None

    def close(self) -> None:  # noqa: B027 - most sources hold nothing
        """Give back processes and files that are held for the next pass; a later pass takes them again."""

    def digest(self) -> str:
        """Digest the content: the number of samples and the samples themselves.

        All samples are hashed where that is cheap (arrays up to 1 GiB, Datasets up to 512 samples), otherwise
        4,096 (Datasets: 512) evenly spaced ones. Memory is bounded by a few MiB or one storage chunk.

        Returns:
            32 hexadecimal digits, the same wherever and in whatever container the samples are.

        Raises:
            InputError: if a sample cannot be read.
        """
        count = len(self)
        if self.sample_bytes is None:
            limit = _DATASET_SAMPLES
        else:
            limit = count if count * self.sample_bytes <= _WHOLE_BYTES else _ARRAY_SAMPLES
        if limit < count:
            hasher = SampleHasher(f"spaced over {count}")
            for samples in self._pick(spaced_samples(count, limit)):
                hasher.update(samples)
            return hasher.hexdigest()
        hasher = SampleHasher()
        rows = 1 if self.sample_bytes is None else max(1, _SLICE_BYTES // max(1, self.sample_bytes))
        rows = -(-rows // self.chunk_rows) * self.chunk_rows
        for start in range(0, count, rows):
            hasher.update(self.fetch(start, min(start + rows, count)))
        return hasher.hexdigest()

    def _pick(self, numbers: list[int]) -> Iterator[Samples]:
        """Read single samples, each storage chunk once."""
        start = 0
        while start < len(numbers):
            chunk = numbers[start] // self.chunk_rows
            stop = start + 1
            while stop < len(numbers) and numbers[stop] // self.chunk_rows == chunk:
                stop += 1
            first = numbers[start]
            block = self.fetch(first, numbers[stop - 1] + 1)
            rows = torch.tensor([number - first for number in numbers[start:stop]])
            yield Samples(
                tuple(tensor[rows] for tensor in block.args),
                {key: tensor[rows] for key, tensor in block.kwargs.items()},
                None if block.targets is None else block.targets[rows],
            )
            start = stop


class SlicedSource(SampleSource):
    """A contiguous part of another source.

    Args:
        source: the whole.
        start: first sample of the part.
        stop: one past its last sample.

    Raises:
        InputError: for an empty or reversed range, a negative number, or one beyond the length.
    """

    def __init__(self, source: SampleSource, start: int, stop: int) -> None:
        count = len(source)
        if start < 0 or stop < 0 or start >= count or stop > count:
            raise InputError(
                f"slice [{start}:{stop}] is outside the data, which has {count} samples; use numbers from 0 to {count}"
            )
        if start >= stop:
            raise InputError(f"slice [{start}:{stop}] holds no sample; the first number must be the smaller one")
        self._source = source
        self._start = start
        self._stop = stop
        self.spec = _slice_spec(source.spec, start, stop)
        self.sample_bytes = source.sample_bytes
        self.chunk_rows = source.chunk_rows
        self.decoded_bytes = source.decoded_bytes
        self.length = source.length
        self.lengths = None if source.lengths is None else source.lengths[start:stop]
        self.normalisation = source.normalisation

    def __len__(self) -> int:
        return self._stop - self._start

    def _read(self, start: int, stop: int) -> Samples:
        return self._source.fetch(self._start + start, self._start + stop)

    def texts(self, numbers: Sequence[int]) -> list[str] | None:
        """See :meth:`SampleSource.texts`."""
        return self._source.texts([self._start + number for number in numbers])

    def stream(self, ranges: Sequence[tuple[int, int]]) -> Iterator[Samples]:
        """See :meth:`SampleSource.stream`."""
        for start, stop in ranges:
            if not 0 <= start < stop <= len(self):
                raise InputError(f"cannot fetch samples {start} to {stop} of data with {len(self)} samples")
        return self._source.stream([(self._start + start, self._start + stop) for start, stop in ranges])

    def targets(self, start: int, stop: int) -> torch.Tensor | None:
        """See :meth:`SampleSource.targets`."""
        return self._source.targets(self._start + start, self._start + stop)

    def padded(self, length: int) -> SampleSource:
        """See :meth:`SampleSource.padded`."""
        return SlicedSource(self._source.padded(length), self._start, self._stop)

    def digest_range(self, start: int, stop: int) -> str | None:
        """See :meth:`SampleSource.digest_range`."""
        return self._source.digest_range(self._start + start, self._start + stop)

    def digest(self) -> str:
        """See :meth:`SampleSource.digest`."""
        return self.digest_range(0, len(self)) or super().digest()

    def close(self) -> None:
        """See :meth:`SampleSource.close`."""
        self._source.close()


def _slice_spec(spec: str | None, start: int, stop: int) -> str | None:
    """Spec of a part of what ``spec`` names; a slice of a slice becomes one slice.

    >>> _slice_spec("digits", 2, 9), _slice_spec("digits[100:200]", 2, 9)
    ('digits[2:9]', 'digits[102:109]')
    """
    if spec is None or " + " in spec:  # a slice of a joined spec cannot be written
        return None
    match = re.fullmatch(r"(.*)\[(\d+):(\d+)\]", spec, flags=re.DOTALL)
    if match is None:
        return f"{spec}[{start}:{stop}]"
    offset = int(match.group(2))
    return f"{match.group(1)}[{offset + start}:{offset + stop}]"
