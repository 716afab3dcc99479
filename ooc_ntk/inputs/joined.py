"""Data put together from several parts: samples of the first, then of the next, read across the borders."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

import torch

from ooc_ntk.errors import InputError

from .source import Samples, SampleSource

#: What stands between the parts of a data spec, blanks and all; a file's name cannot have it.
JOINT: Final = " + "


def split_joined(text: str) -> list[str]:
    """The parts of a data spec, one if it joins none.

    >>> split_joined("digits[0:100] + digits[100:150]"), split_joined("a+b.npy")
    (['digits[0:100]', 'digits[100:150]'], ['a+b.npy'])
    """
    return [part.strip() for part in f" {text} ".split(JOINT)]


@dataclass(frozen=True, eq=False)
class JoinedData:
    """Data as a user holds them, one after the other; a job opens every part as it would open it alone.

    Attributes:
        parts: data sets, arrays, specs or sources.
    """

    parts: tuple[object, ...]

    @classmethod
    def of(cls, *given: object) -> JoinedData:
        """Join data; those that are joined already are taken apart first."""
        parts = [part for one in given for part in (one.parts if isinstance(one, JoinedData) else (one,))]
        return cls(tuple(parts))


class JoinedSource(SampleSource):
    """Samples of several sources, one source after the other.

    Args:
        parts: the sources; those that are joined themselves are taken apart. Texts are padded alike.
        what: name of the data set, for messages.

    Raises:
        InputError: if the parts differ in their inputs, shapes or dtypes, or some have targets and others none.
    """

    def __init__(self, parts: Sequence[SampleSource], what: str = "train") -> None:
        flat: list[SampleSource]
        flat = [piece for part in parts for piece in (part.parts if isinstance(part, JoinedSource) else (part,))]
        texts = [part.length for part in flat if part.length is not None]
        if texts and len(texts) == len(flat):
            flat = [part if part.length == max(texts) else part.padded(max(texts)) for part in flat]
        _check_alike(flat, what)
        self.parts: tuple[SampleSource, ...] = tuple(flat)
        self._starts = list(itertools.accumulate((len(part) for part in flat), initial=0))
        specs, sizes = [part.spec for part in flat], [part.sample_bytes for part in flat]
        self.spec = None if None in specs else JOINT.join(str(spec) for spec in specs)
        self.sample_bytes = None if None in sizes else max(size for size in sizes if size is not None)
        self.chunk_rows = max(part.chunk_rows for part in flat)
        self.decoded_bytes = max((part.decoded_bytes for part in flat if part.decoded_bytes is not None), default=None)
        self.length = max(texts) if texts else None
        lengths = [part.lengths for part in flat if part.lengths is not None]
        self.lengths = torch.cat(lengths) if lengths else None
        known = {part.normalisation for part in flat}
        self.normalisation = known.pop() if len(known) == 1 else None
        self._what = what

    def __len__(self) -> int:
        return self._starts[-1]

    def _pieces(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """A range as (part, its first sample, one past its last)."""
        return [
            (number, max(start, first) - first, min(stop, last) - first)
            for number, (first, last) in enumerate(itertools.pairwise(self._starts))
            if start < last and first < stop
        ]

    def _read(self, start: int, stop: int) -> Samples:
        return _whole([self.parts[number].fetch(first, last) for number, first, last in self._pieces(start, stop)])

    def texts(self, numbers: Sequence[int]) -> list[str] | None:
        """See :meth:`SampleSource.texts`."""
        found: dict[int, str] = {}
        for part, (first, last) in zip(self.parts, itertools.pairwise(self._starts), strict=True):
            mine = [number for number in numbers if first <= number < last]
            texts = part.texts([number - first for number in mine]) if mine else []
            if texts is None:
                return None
            found.update(zip(mine, texts, strict=True))
        return [found[number] for number in numbers]

    def stream(self, ranges: Sequence[tuple[int, int]]) -> Iterator[Samples]:
        """See :meth:`SampleSource.stream`; every part decodes ahead within its own ranges."""
        for start, stop in ranges:
            if not 0 <= start < stop <= len(self):
                raise InputError(f"cannot fetch samples {start} to {stop} of data with {len(self)} samples")
        return self._streamed([self._pieces(start, stop) for start, stop in ranges])

    def _streamed(self, ranges: Sequence[Sequence[tuple[int, int, int]]]) -> Iterator[Samples]:
        found = self._in_turn([piece for pieces in ranges for piece in pieces])
        try:
            for pieces in ranges:
                yield _whole([next(found) for _ in pieces])
        finally:
            found.close()  # type: ignore[attr-defined]

    def _in_turn(self, pieces: Sequence[tuple[int, int, int]]) -> Iterator[Samples]:
        """Pieces one after another, each run of pieces of one part as one stream of it."""
        for number, run in itertools.groupby(pieces, key=lambda piece: piece[0]):
            yield from self.parts[number].stream([(first, last) for _, first, last in run])

    def targets(self, start: int, stop: int) -> torch.Tensor | None:
        """See :meth:`SampleSource.targets`."""
        found = [self.parts[number].targets(first, last) for number, first, last in self._pieces(start, stop)]
        there = [each for each in found if each is not None]
        return torch.cat(there) if len(there) == len(found) else None

    def padded(self, length: int) -> SampleSource:
        """See :meth:`SampleSource.padded`."""
        return JoinedSource([part.padded(length) for part in self.parts], self._what)

    def digest(self) -> str:
        """Digest the content.

        That of one array with the same samples; where parts have digests of their own that need no decoding, it is made
        of those, and then depends on where the parts meet.
        """
        ready = [part.digest_range(0, len(part)) for part in self.parts]
        if all(digest is None for digest in ready):
            return super().digest()
        total = blake2b(b"joined", digest_size=16)
        for part, digest in zip(self.parts, ready, strict=True):
            total.update(f"\n{len(part)} {digest or part.digest()}".encode())
        return total.hexdigest()

    def close(self) -> None:
        """See :meth:`SampleSource.close`."""
        for part in self.parts:
            part.close()


def joined(parts: Sequence[Samples]) -> Samples:
    """Several ranges as one.

    Raises:
        InputError: if they differ in their inputs or shapes.
    """
    first = parts[0]
    try:
        return Samples(
            tuple(torch.cat([part.args[index] for part in parts]) for index in range(len(first.args))),
            {name: torch.cat([part.kwargs[name] for part in parts]) for name in first.kwargs},
            None if first.targets is None else torch.cat([part.targets for part in parts if part.targets is not None]),
        )
    except (RuntimeError, IndexError, KeyError) as error:
        raise InputError(
            f"batches differ in their inputs or their shapes ({error}); all samples must be of one shape"
        ) from error


def _whole(parts: Sequence[Samples]) -> Samples:
    """Pieces of a range as one, a single one as it is."""
    return parts[0] if len(parts) == 1 else joined(parts)


def _check_alike(parts: Sequence[SampleSource], what: str) -> None:
    """Refuse parts that do not make one data set, by their first samples; the message names both."""
    names = [part.spec or f"part {number + 1}, {len(part)} samples" for number, part in enumerate(parts)]
    layouts = [_layout(part.fetch(0, 1)) for part in parts]
    texts = [part.lengths is not None for part in parts]
    for name, layout, is_text in zip(names[1:], layouts[1:], texts[1:], strict=True):
        both = f"{what} data {names[0]!r} and {name!r} do not join"
        first = layouts[0]
        if is_text != texts[0]:
            with_texts, without = (names[0], name) if texts[0] else (name, names[0])
            raise InputError(f"{both}: {with_texts!r} is texts and {without!r} is none; give both in one form")
        if ("targets" in first) != ("targets" in layout):
            has, lacks = (names[0], name) if "targets" in first else (name, names[0])
            raise InputError(f"{both}: {has!r} has targets and {lacks!r} has none; give both with targets or without")
        if first.keys() != layout.keys():
            raise InputError(f"{both}: the first has {', '.join(first)}, the other {', '.join(layout)}")
        for key, (shape, dtype) in layout.items():
            if shape != first[key][0]:
                raise InputError(f"{both}: {key} of a sample has shape {first[key][0]} in the first, {shape} here")
            if dtype != first[key][1]:
                raise InputError(f"{both}: {key} has dtype {first[key][1]} in the first, {dtype} here; make them alike")


def _layout(samples: Samples) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor of a sample, by name."""
    return {name: (tuple(tensor.shape[1:]), tensor.dtype) for name, tensor in samples.named()}
