"""Text data as a source of samples: ``text:FILE,...`` and ``cola:PART,...``, tokenised once when it is opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch

from ooc_ntk.errors import InputError, unknown_name
from ooc_ntk.inputs.options import NamedSpec, check_keys, parse_named, whole_number
from ooc_ntk.inputs.source import Samples, SampleSource

from .files import TEXT_KINDS, Columns, TextRows, label_tensor, read_texts
from .folders import absolute_place, flag
from .tokens import TokenTable, load_tokenizer, tokenise

_TEXT_KEYS: Final = ("column", "label", "pair", "header", "tokenizer", "length", "truncate", "next")
_COLA_KEYS: Final = ("tokenizer", "length", "truncate", "next")
#: Parts of CoLA's public release. The labels of its hidden test set were never published, so ``test`` is the
#: out-of-domain part.
_COLA_FILES: Final = {
    "train": "in_domain_train.tsv",
    "dev": "in_domain_dev.tsv",
    "test": "out_of_domain_dev.tsv",
    "in_domain_train": "in_domain_train.tsv",
    "in_domain_dev": "in_domain_dev.tsv",
    "out_of_domain_dev": "out_of_domain_dev.tsv",
}
#: Where they can lie in the data folder.
_COLA_FOLDERS: Final = ("cola_public/raw", "cola/raw", "cola", "raw", ".")
#: Letters of a text shown in messages.
_SHOWN: Final = 60


@dataclass(frozen=True)
class TextFile:
    """Where texts were read from; kept instead of the texts, which may be many times as large as the tokens.

    Attributes:
        path: the file.
        columns: which of its columns hold what.
    """

    path: Path
    columns: Columns

    def read(self, what: str) -> TextRows:
        """The texts.

        Raises:
            InputError: if the file, or a line of it, cannot be read.
        """
        return read_texts(self.path, self.columns, what)


class TextSource(SampleSource):
    """Tokenised texts, all padded on the right to one length, so that no sample depends on the others in its batch.

    Samples have ``input_ids``, ``attention_mask`` and, where the tokenizer gives them, ``token_type_ids`` by keyword,
    each (samples, length) int64. Tokens are kept without padding, 4 bytes each (5 with types).

    Args:
        tokens: the tokens.
        labels: (samples,) int64 or float32, or None.
        length: tokens to which all texts are padded; None for the longest.
        limit: most tokens that the model takes, or None.
        next_tokens: whether the targets are the tokens that follow, (samples, length) int64, -100 where none does;
            then labels are not used.
        spec: text the source can be made from again.
        file: where the texts stand, or None.
        what: name of the data set, for messages.

    Raises:
        InputError: if the length is below the longest text or above the limit.

    Attributes:
        is_text: True; marks sources of texts.
        mask_key: keyword of the mask, 1 for real tokens and 0 for padding.
        length: tokens of every sample, padding included.
        lengths: (samples,), int64: real tokens.
    """

    is_text = True
    mask_key = "attention_mask"
    length: int
    lengths: torch.Tensor

    def __init__(
        self,
        tokens: TokenTable,
        labels: torch.Tensor | None,
        *,
        length: int | None = None,
        limit: int | None = None,
        next_tokens: bool = False,
        spec: str | None = None,
        file: TextFile | None = None,
        what: str = "train",
    ) -> None:
        longest = int(tokens.lengths.max())
        self.length = longest if length is None else length
        if self.length < longest:
            raise InputError(
                f"{what} data cannot be padded to {self.length} tokens: its longest text, number "
                f"{int(tokens.lengths.argmax())}, has {longest}; use a length of at least that"
            )
        if limit is not None and self.length > limit:
            raise InputError(
                f"{what} data is to be padded to {self.length} tokens, but the model takes {limit}; use fewer"
            )
        self.lengths = torch.from_numpy(tokens.lengths)
        self.spec = spec
        self._tokens = tokens
        self._labels = None if next_tokens else labels
        self._limit = limit
        self._next = next_tokens
        self._file = file
        self._what = what
        columns = 2 + (tokens.types is not None) + next_tokens
        label_bytes = 0 if self._labels is None else self._labels.element_size()
        self.sample_bytes = 8 * columns * self.length + label_bytes

    def __len__(self) -> int:
        return len(self._tokens)

    def _read(self, start: int, stop: int) -> Samples:
        return Samples((), self._tokens.padded(start, stop, self.length), self.targets(start, stop))

    def targets(self, start: int, stop: int) -> torch.Tensor | None:
        """See :meth:`SampleSource.targets`."""
        if self._next:
            return self._tokens.following(start, stop, self.length)
        return None if self._labels is None else self._labels[start:stop]

    def texts(self, numbers: Sequence[int]) -> list[str] | None:
        """Texts as they stand in the file, read again; of two texts a sample, both with a bar between them.

        Args:
            numbers: of the samples.

        Returns:
            The texts, None where the tokens came without a file.

        Raises:
            InputError: if the file cannot be read, or holds another number of texts by now.
        """
        if self._file is None:
            return None
        rows = self._file.read(self._what)
        if len(rows.texts) != len(self):
            raise InputError(
                f"{self._what} data {rows.path} holds {len(rows.texts):,} texts by now and held {len(self):,}; bring "
                "the file back as it was"
            )
        if rows.pairs is None:
            return [rows.texts[number] for number in numbers]
        return [f"{rows.texts[number]} | {rows.pairs[number]}" for number in numbers]

    def padded(self, length: int) -> TextSource:
        """The same texts padded to another length; the tokens are shared.

        Args:
            length: tokens of every sample.

        Returns:
            The source; its spec names the length.

        Raises:
            InputError: if the length is below the longest text or above the model's limit.
        """
        spec = None if self.spec is None else str(_with_option(parse_named(self.spec), "length", str(length)))
        return TextSource(
            self._tokens,
            self._labels,
            length=length,
            limit=self._limit,
            next_tokens=self._next,
            spec=spec,
            file=self._file,
            what=self._what,
        )

    def digest(self) -> str:
        """Digest of all tokens, token types and targets; it does not depend on the padding.

        Returns:
            32 hexadecimal digits, equal for equal texts, whatever file they came from.
        """
        return self.digest_range(0, len(self))

    def digest_range(self, start: int, stop: int) -> str:
        """Digest of a range of samples, which is that of a source of just these texts.

        Args:
            start: first sample.
            stop: one past the last one.

        Returns:
            32 hexadecimal digits.

        Raises:
            InputError: for an empty range or one outside the data.
        """
        if not 0 <= start < stop <= len(self):
            raise InputError(f"cannot digest samples {start} to {stop} of data with {len(self)} samples")
        labels = None if self._labels is None else self._labels[start:stop]
        return self._tokens.digest(start, stop, "next tokens" if self._next else "", labels)


def absolute_text(text: str, base: Path | None = None, what: str = "train") -> str:
    """Write a text spec so that it means the same from any folder, without looking into any file.

    Args:
        text: the spec, without a slice.
        base: folder that relative paths are relative to; None is the current one.
        what: name of the data set, for messages.

    Returns:
        The spec with an absolute file and tokenizer. CoLA is named by its part: where it lies is not in the spec.

    Raises:
        InputError: if the text is no spec of texts, or an option is not known.
    """
    return str(_absolute(_parse(text, what), base))


def _parse(text: str, what: str) -> NamedSpec:
    """Take a spec apart and check its names."""
    spec = parse_named(text, f"{what} data")
    if spec.name == "cola":
        if spec.part not in _COLA_FILES:
            raise unknown_name("part of cola", spec.part, _COLA_FILES)
        check_keys(spec, _COLA_KEYS, f"{what} data")
        return spec
    if spec.name != "text" or not spec.part:
        raise InputError(
            f"{what} data {text!r} names no texts; write text:FILE ({', '.join(TEXT_KINDS)}) or cola:train"
        )
    check_keys(spec, _TEXT_KEYS, f"{what} data")
    if not spec.part.endswith(TEXT_KINDS):
        raise InputError(f"{what} data {spec.part!r} is no file of texts; use {', '.join(TEXT_KINDS)}")
    return spec


def _absolute(spec: NamedSpec, base: Path | None) -> NamedSpec:
    """The spec with absolute paths."""
    part = spec.part if spec.name == "cola" else str(_path(spec.part, base))
    options = [(key, absolute_place(value, base) if key == "tokenizer" else value) for key, value in spec.options]
    return NamedSpec(spec.name, part, tuple(options))


def _path(path: str, base: Path | None) -> Path:
    """Absolute path, links left alone."""
    return (Path.cwd() / (base or ".") / Path(path).expanduser()).absolute()


def _with_option(spec: NamedSpec, key: str, value: str) -> NamedSpec:
    """The spec with an option set, in its place if it is there."""
    options = {**dict(spec.options), key: value}
    return replace(spec, options=tuple(options.items()))


def open_text(
    text: str,
    *,
    base: Path | None,
    data_dir: Path | None,
    tokenizer: str | None,
    limit: int | None = None,
    vocabulary: int | None = None,
    what: str = "train",
) -> TextSource:
    """Open and tokenise the texts that a spec names.

    ``text:FILE[,column=..][,label=..][,pair=..][,header=0|1][,tokenizer=FOLDER_OR_PACKAGE][,length=..][,truncate=1]
    [,next=1]`` with a ``.tsv``, ``.csv``, ``.jsonl`` or ``.txt``; ``cola:train|dev|test`` with the options from
    ``tokenizer`` on: in-domain train, in-domain dev and out-of-domain dev of CoLA's public release. ``length`` is the
    number of tokens to pad to, by default that of the longest text; ``truncate=1`` cuts texts there, or at the limit.

    Args:
        text: the spec, without a slice.
        base: folder that relative paths are relative to; None is the current one.
        data_dir: folder with the release of CoLA.
        tokenizer: folder or package of the tokenizer where the spec names none; usually the model's own.
        limit: most tokens that the model takes, None for no limit.
        vocabulary: different tokens that the model knows, None if that is not known.
        what: name of the data set, for messages.

    Returns:
        The source. Its spec has absolute paths and names the tokenizer.

    Raises:
        InputError: if the spec cannot be read, a file, column or tokenizer is missing, a line cannot be used, or a text
            has too many tokens or none.
    """
    spec = _absolute(_parse(text, what), base)
    options = dict(spec.options)
    length = whole_number(spec, "length", 0) if "length" in options else None
    truncate, following = flag(spec, "truncate"), flag(spec, "next")
    if length is not None and limit is not None and length > limit:
        raise InputError(f"{what} data {text!r}: length={length}, but the model takes {limit} tokens; lower it")
    if truncate and length is None and limit is None:
        raise InputError(
            f"{what} data {text!r}: truncate=1 needs to know where to cut, and the model has no limit of its own; give "
            "length=..., for example length=128"
        )
    if following and "label" in options:
        raise InputError(f"{what} data {text!r}: with next=1 the targets are the next tokens; leave label out")
    place = options.get("tokenizer") or tokenizer
    if place is None:
        raise InputError(
            f"{what} data {text!r} needs a tokenizer; use a model hf:FOLDER, whose tokenizer is taken, or write "
            "tokenizer=FOLDER"
        )
    place = absolute_place(place, base)
    file = TextFile(_file(spec, data_dir, what), _columns(spec))
    rows = file.read(what)
    labels = None if following else label_tensor(rows, what)
    most = length if length is not None else limit
    tokens = tokenise(load_tokenizer(place), rows.texts, rows.pairs, most if truncate else None)
    largest = max(int(tokens.ids.max(initial=0)), tokens.pad_id)
    if vocabulary is not None and largest >= vocabulary:
        raise InputError(
            f"{what} data {text!r} has token {largest} by the tokenizer {place}, and the model knows tokens 0 to "
            f"{vocabulary - 1}; use the tokenizer that belongs to the model"
        )
    _check_lengths(tokens, rows, most, "length" if length is not None else "the model's limit", what)
    return TextSource(
        tokens,
        labels,
        length=length,
        limit=limit,
        next_tokens=following,
        spec=str(_with_option(spec, "tokenizer", place)),
        file=file,
        what=what,
    )


def _columns(spec: NamedSpec) -> Columns:
    """The columns that a spec names."""
    if spec.name == "cola":
        return Columns("3", "1", header=False)
    options = dict(spec.options)
    header = flag(spec, "header") if "header" in options else None
    return Columns(options.get("column"), options.get("label"), options.get("pair"), header)


def _file(spec: NamedSpec, data_dir: Path | None, what: str) -> Path:
    """The file that a spec names."""
    if spec.name != "cola":
        return Path(spec.part)
    name = _COLA_FILES[spec.part]
    release = "the public release from https://nyu-mll.github.io/CoLA/ (cola_public/raw)"
    if data_dir is None:
        raise InputError(f"{what} data cola:{spec.part} needs the data folder that holds {release}; none is given")
    for folder in _COLA_FOLDERS:
        path = (Path.cwd() / data_dir / folder / name).absolute()
        if path.is_file():
            return path
    raise InputError(
        f"{what} data cola:{spec.part} not found: there is no {name} in {data_dir} or in its folders "
        f"{', '.join(_COLA_FOLDERS[:-1])}; unpack {release} there"
    )


def _check_lengths(tokens: TokenTable, rows: TextRows, most: int | None, limit_name: str, what: str) -> None:
    """Refuse texts with too many tokens or none, naming the first."""
    lengths = tokens.lengths
    wrong = (lengths == 0) if most is None else (lengths == 0) | (lengths > most)
    if not wrong.any():
        return
    number = int(wrong.argmax())
    text, count = rows.texts[number], int(lengths[number])
    start = text if len(text) <= _SHOWN else f"{text[:_SHOWN].rsplit(' ', 1)[0]} …"
    where = f"{what} data {rows.path}, line {rows.lines[number]} (sample {number}, {start!r})"
    if count == 0:
        raise InputError(f"{where} has no tokens; remove the line, or use the tokenizer that belongs to the model")
    raise InputError(
        f"{where} has {count} tokens, {limit_name} is {most}; use truncate=1 to cut texts there, or shorten it"
    )
