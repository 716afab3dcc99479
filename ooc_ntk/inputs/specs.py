"""Data specs: texts that name a data set, ``NAME_OR_FILE[:factory][a:b]``, and the sources they stand for.

Several of them joined by `` + `` are one data set, part after part.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from ooc_ntk.errors import InputError, unknown_name

from .arrays import Column
from .builtin import BUILTIN, load_builtin
from .callables import absolute_callable, call_factory, is_callable_spec
from .datasets import Collate
from .files import open_columns, split_members
from .images.catalog import CATALOG
from .images.seeds import SEED_NAMES, parse_seed_name
from .images.spec import is_image_spec, parse_image_spec
from .joined import JOINT, JoinedSource, split_joined
from .options import parse_named, plain_name
from .samples import as_source
from .source import SampleSource, SlicedSource

#: Endings of the files that hold arrays.
FILE_KINDS: Final = (".npy", ".npz", ".zarr")


#: Names of data that are texts, as :mod:`ooc_ntk.inputs.text` has them.
TEXT_NAMES: Final = ("text", "cola")


@dataclass(frozen=True)
class Reading:
    """How data that are named are found and read.

    Attributes:
        data_dir: folder that holds data sets in their original files.
        workers: processes that decode images ahead; 0 decodes ahead in a thread.
        cache: folder in which decoded images are kept, or None.
        download: whether missing files are downloaded through torchvision.
        tokenizer: folder or package of the tokenizer where a spec of texts names none.
        limit: most tokens that the model takes, or None.
        vocabulary: different tokens that the model knows, or None.
    """

    data_dir: Path | None = None
    workers: int = 0
    cache: Path | None = None
    download: bool = False
    tokenizer: str | None = None
    limit: int | None = None
    vocabulary: int | None = None


@dataclass(frozen=True)
class DataSpec:
    """A data spec taken apart.

    Attributes:
        target: built-in name, file, callable spec, or the name of images or texts with its options.
        kind: ``"builtin"``, ``"file"``, ``"factory"``, ``"images"`` or ``"texts"``.
        start: first sample of the slice, None from the beginning.
        stop: one past its last sample, None to the end.
    """

    target: str
    kind: str
    start: int | None = None
    stop: int | None = None

    @property
    def sliced(self) -> bool:
        """Whether the spec names a part."""
        return self.start is not None or self.stop is not None

    def __str__(self) -> str:
        if not self.sliced:
            return self.target
        start, stop = ("" if bound is None else str(bound) for bound in (self.start, self.stop))
        return f"{self.target}[{start}:{stop}]"


def parse_spec(text: str, what: str = "train") -> DataSpec:
    """Take a data spec apart, without looking at any file.

    Args:
        text: the spec, of one part.
        what: name of the data set, for messages.

    Returns:
        Its parts.

    Raises:
        InputError: if the text is no spec.

    >>> parse_spec("mnist5k[0:4000]")
    DataSpec(target='mnist5k', kind='builtin', start=0, stop=4000)
    >>> str(parse_spec("data/train.npz[100:]")), parse_spec("my.py:load").kind
    ('data/train.npz[100:]', 'factory')
    """
    target, start, stop = text.strip(), None, None
    match = re.fullmatch(r"(.*?)\[([^\[\]]*)\]", target, flags=re.DOTALL)
    if match is not None:
        target = match.group(1).rstrip()
        start, stop = _parse_slice(match.group(2), text, what)
    if not target:
        raise InputError(f"{what} data spec {text!r} names no data; write for example 'mnist5k[0:4000]' or 'x.npz'")
    name, colon, _ = target.partition(":")
    if re.split("[:,]", target)[0].strip() in TEXT_NAMES:
        return DataSpec(target, "texts", start, stop)
    if is_image_spec(target):
        return DataSpec(target, "images", start, stop)
    if name in BUILTIN:
        if colon:
            raise InputError(f"{what} data {name!r} has no parts, got {target!r}; slice it, for example {name}[0:1000]")
        return DataSpec(name, "builtin", start, stop)
    trimmed = target.rstrip("/")
    if trimmed.endswith(FILE_KINDS):
        return DataSpec(trimmed, "file", start, stop)
    if is_callable_spec(target):
        return DataSpec(target, "factory", start, stop)
    if target.endswith(".py"):
        raise InputError(f"{what} data {target!r} is a Python file; name the function in it too, as {target}:function")
    if "/" in target or "\\" in target or re.search(r"\.\w+$", target):
        raise InputError(
            f"{what} data {target!r} is of a kind that cannot be read; use {', '.join(FILE_KINDS)}, "
            "or file.py:function that returns the data"
        )
    numbers = re.fullmatch(r"(.+?)(_\d+){4}", target, flags=re.ASCII)
    if numbers is not None:
        given, rest = numbers.group(1), target[numbers.end(1) :]
        same = [name for name in SEED_NAMES if plain_name(name) == plain_name(given)]
        raise unknown_name("data set", target, [f"{name}{rest}" for name in same or SEED_NAMES])
    named = [*BUILTIN, *CATALOG, "text:FILE", "cola:train"]
    raise unknown_name("data set", target, [*named, "file.npy", "file.npz", "file.zarr", "file.py:function"])


def train_and_test(text: str) -> tuple[str, str | None]:
    """Train and test data that one name stands for.

    Args:
        text: a name of empirical-ntks (``CIFAR-10_0_2500_0_1000``, read as it reads it), a data set with splits and
            without one (``cifar10,resize=64``: train and test), or any data spec, which is train data alone.

    Returns:
        The spec of the train data, and that of the test data or None.

    Raises:
        InputError: if the text is none of these.

    >>> train_and_test("cifar10,resize=64")
    ('cifar10:train,resize=64', 'cifar10:test,resize=64')
    >>> train_and_test("digits[0:100]"), train_and_test("cifar10:train[0:9]")
    (('digits[0:100]', None), ('cifar10:train[0:9]', None))
    """
    if len(split_joined(text)) > 1:
        return text, None
    seeds = parse_seed_name(text)
    if seeds is not None:
        return seeds
    spec = parse_spec(text)
    named = parse_named(spec.target) if spec.kind == "images" else None
    if named is None or named.part or spec.sliced or "test" not in CATALOG[plain_name(named.name)].splits:
        return text, None
    train, test = (str(parse_image_spec(str(replace(named, part=part)))) for part in ("train", "test"))
    return train, test


def _parse_slice(inside: str, text: str, what: str) -> tuple[int | None, int | None]:
    """Read what stands between the brackets."""
    match = re.fullmatch(r"\s*([+-]?\d*)\s*:\s*([+-]?\d*)\s*", inside, flags=re.ASCII)
    if match is None or not (match.group(1) or match.group(2)) or any(part in ("+", "-") for part in match.groups()):
        raise InputError(
            f"cannot read the slice [{inside}] of {what} data {text!r}; write [start:stop], [start:] or [:stop]"
        )
    bounds = [int(part) if part else None for part in match.groups()]
    if any(bound is not None and bound < 0 for bound in bounds):
        raise InputError(
            f"the slice [{inside}] of {what} data {text!r} counts from the end; write sample numbers from 0 upwards"
        )
    return bounds[0], bounds[1]


def absolute_spec(text: str, base: Path | None = None, what: str = "train") -> str:
    """Write a data spec so that it means the same from any folder.

    Args:
        text: the spec, of one part or of several.
        base: folder that relative paths are relative to; None is the current one.
        what: name of the data set, for messages.

    Returns:
        The spec with absolute paths; built-in names and import paths stay as they are.

    Raises:
        InputError: if the text is no spec.
    """
    parts = split_joined(text)
    if len(parts) > 1:
        return JOINT.join(absolute_spec(part, base, what) for part in parts)
    spec = parse_spec(text, what)
    if spec.kind == "file":
        return str(DataSpec(str(_absolute(spec.target, base)), "file", spec.start, spec.stop))
    if spec.kind == "factory":
        return str(DataSpec(absolute_callable(spec.target, base), "factory", spec.start, spec.stop))
    if spec.kind == "images":
        return str(DataSpec(str(parse_image_spec(spec.target, what, base)), "images", spec.start, spec.stop))
    if spec.kind == "texts":
        from .text.sources import absolute_text  # needed for texts alone

        return str(DataSpec(absolute_text(spec.target, base, what), "texts", spec.start, spec.stop))
    return str(spec)


def _absolute(path: str, base: Path | None) -> Path:
    """Absolute path, links left alone."""
    return (Path.cwd() / (base or ".") / Path(path).expanduser()).absolute()


def resolve_spec(
    text: str,
    *,
    base: Path | None = None,
    what: str = "train",
    collate: Collate | None = None,
    reading: Reading | None = None,
) -> SampleSource:
    """Open the data that a spec names.

    Args:
        text: ``mnist5k``, ``digits``, images such as ``cifar10:train,resize=64``, texts such as ``text:file.tsv``, a
            ``.npy``, ``.npz`` or ``.zarr``, ``file.py:factory`` or ``pkg.module:factory``, each with an optional slice
            ``[a:b]``; or several of these joined by `` + ``.
        base: folder that relative paths are relative to; None is the current one.
        what: name of the data set, for messages.
        collate: for factories that return a Dataset: makes a batch of a list of samples.
        reading: where data sets lie and how they are decoded.

    Returns:
        The source; files are read when samples are fetched. Its ``spec`` has absolute paths and a full slice.

    Raises:
        InputError: if the spec cannot be read, the data is missing or damaged, or the slice is outside it.
    """
    parts = split_joined(text)
    if len(parts) > 1:
        each = (resolve_spec(part, base=base, what=what, collate=collate, reading=reading) for part in parts)
        return JoinedSource(list(each), what)
    spec, reading = parse_spec(text, what), reading or Reading()
    if collate is not None and spec.kind != "factory":
        raise InputError(f"collate works on the samples of a Dataset, but {what} is {text!r}; leave collate out")
    if spec.kind == "builtin":
        source = load_builtin(spec.target)
    elif spec.kind == "file":
        source = _open_file(_absolute(spec.target, base), what)
    elif spec.kind == "images":
        from .images.source import open_images  # brings Pillow

        source = open_images(
            spec.target,
            data_dir=reading.data_dir,
            workers=reading.workers,
            cache=reading.cache,
            download=reading.download,
            what=what,
            base=base,
        )
    elif spec.kind == "texts":
        from .text.sources import open_text  # needed for texts alone

        source = open_text(
            spec.target,
            base=base,
            data_dir=reading.data_dir,
            tokenizer=reading.tokenizer,
            limit=reading.limit,
            vocabulary=reading.vocabulary,
            what=what,
        )
    else:
        data = call_factory(spec.target, base, f"{what} data")
        source = as_source(data, collate=collate, what=what)
    if source.spec is None:
        source.spec = absolute_spec(spec.target, base, what)
    if not spec.sliced:
        return source
    count = len(source)
    start = 0 if spec.start is None else spec.start
    stop = count if spec.stop is None else spec.stop
    try:
        return SlicedSource(source, start, stop)
    except InputError as error:
        raise InputError(f"{what} data {text!r}: {error}") from error


def _open_file(path: Path, what: str) -> SampleSource:
    """Source over an array file."""
    columns = open_columns(path, what)
    data: object = columns
    if isinstance(columns, dict):
        if not columns:
            raise InputError(f"{what} data {path} holds no arrays; it needs at least one, for example x and y")
        data = split_members(columns)
    elif not isinstance(columns, Column):
        raise InputError(f"{what} data {path} holds no array")
    return as_source(data, what=what)
