"""Job files: a job as TOML that people write, checked key by key."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

import msgspec
from torch import nn

from ooc_ntk.errors import InputError, StorageError, unknown_name

from .callables import absolute_callable, is_callable_spec
from .images.seeds import parse_seed_name
from .job import LIVE
from .models import absolute_model
from .specs import absolute_spec


class BudgetTable(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The ``[budget]`` table: sizes as text, such as ``"16GiB"``.

    Attributes:
        host: memory of the process.
        device: memory of the accelerator.
        disk: space in the run directory.
    """

    host: str | None = None
    device: str | None = None
    disk: str | None = None


class JobFile(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """What a job file holds; None where it says nothing, so that defaults live in ``Job`` alone.

    The names are those of :class:`ooc_ntk.inputs.job.Job`; paths are absolute once the file is read.
    """

    model: str | None = None
    weights: str | None = None
    train: str | None = None
    test: str | None = None
    kernel: str | None = None
    outputs: str | None = None
    projection: str | dict[str, str | int | float] | None = None
    normalize: str | None = None
    scale: str | None = None
    parameters: str | list[str] | None = None
    precision: str | None = None
    device: str | None = None
    batch_size: int | None = None
    seed: int | None = None
    allow_batch_dependence: bool | None = None
    by: str | None = None
    data_dir: str | None = None
    loader_workers: int | None = None
    image_cache: str | None = None
    download: bool | None = None
    base: str | None = None
    budget: BudgetTable | None = None

    def arguments(self) -> dict[str, object]:
        """The arguments of a job that the file gives, ready for ``Job.from_spec``; the budget is left out."""
        return {
            name: value
            for name in self.__struct_fields__
            if name != "budget" and (value := getattr(self, name)) is not None
        }


def data_stand_ins(stored: JobFile) -> dict[str, object]:
    """Arguments over those of a stored job, with which its data are opened wherever they are there.

    Neither the network, where that was a live one, nor the device of the run is needed for them.

    Args:
        stored: the job as its run stored it.

    Returns:
        Arguments of :class:`~ooc_ntk.inputs.job.Job`.
    """
    found: dict[str, object] = {"device": "cpu"}
    if stored.model == LIVE:
        found |= {"model": nn.Identity(), "weights": None}
    if stored.outputs == LIVE:
        found["outputs"] = "logits"
    return found


def read_job_file(path: Path | str) -> JobFile:
    """Read a job file.

    Args:
        path: the TOML file.

    Returns:
        What it holds, relative paths made absolute with the file's folder (or its ``base``).

    Raises:
        InputError: if it is missing, no TOML, has a key that is not known or a value of the wrong type.
    """
    path = Path(path).expanduser().absolute()
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"job file not found: there is no file {path}") from error
    except OSError as error:
        raise InputError(f"job file {path} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"job file {path} is not UTF-8 text: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"job file {path} is not valid TOML: {error}") from error
    _check_keys(table, JobFile.__struct_fields__, f"key in {path}")
    if isinstance(table.get("budget"), dict):
        _check_keys(table["budget"], BudgetTable.__struct_fields__, f"key of [budget] in {path}")
    try:
        read = msgspec.convert(table, JobFile, strict=True)
    except msgspec.ValidationError as error:
        problem, _, place = str(error).partition(" - at `$")
        key = place.rstrip("`").lstrip(".")
        raise InputError(f"job file {path}, key {key!r}: {problem[:1].lower()}{problem[1:]}") from error
    return _absolute(read, path.parent)


def _check_keys(table: Mapping[str, object], known: tuple[str, ...], kind: str) -> None:
    """Refuse keys that are not known, by name."""
    for key in table:
        if key not in known:
            raise unknown_name(kind, key, known)


def _absolute(read: JobFile, folder: Path) -> JobFile:
    """Make the paths of a job file absolute."""
    base = folder / Path(read.base or ".").expanduser()
    changed: dict[str, str] = {"base": str(base)}
    if read.weights is not None:
        changed["weights"] = str(base / Path(read.weights).expanduser())
    if read.model is not None and read.model != LIVE:
        changed["model"] = absolute_model(read.model, base)
    for name in ("data_dir", "image_cache"):
        if getattr(read, name) is not None:
            changed[name] = str(base / Path(getattr(read, name)).expanduser())
    for what in ("train", "test"):
        text = getattr(read, what)
        if text not in (None, LIVE) and not ("_" in text and parse_seed_name(text)):
            changed[what] = absolute_spec(text, base, what)
    if read.outputs is not None and is_callable_spec(read.outputs):
        changed["outputs"] = absolute_callable(read.outputs, base, "output function")
    return msgspec.structs.replace(read, **changed)


def write_job_file(path: Path | str, spec: Mapping[str, object]) -> None:
    """Write a job file: whole or not at all.

    Args:
        path: the file to write; replaced if it is there.
        spec: text, numbers, booleans, lists of those and tables of those by key; None is left out.

    Raises:
        InputError: for a value that such a file cannot hold.
        StorageError: if it cannot be written.
    """
    path = Path(path)
    text = format_toml(spec)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(f"cannot write the job file {path}: {error}") from error


def format_toml(spec: Mapping[str, object]) -> str:
    r"""Write values as TOML, tables last.

    Args:
        spec: as for :func:`write_job_file`.

    Returns:
        The text; ``tomllib.loads`` gives the values back.

    Raises:
        InputError: for a value that such a file cannot hold.

    >>> print(format_toml({"kernel": "trace", "budget": {"host": "16GiB"}, "seed": 0, "test": None}), end="")
    kernel = "trace"
    seed = 0
    <BLANKLINE>
    [budget]
    host = "16GiB"
    """
    lines = [f"{_key(key)} = {_value(value, key)}" for key, value in _given(spec) if not isinstance(value, Mapping)]
    for key, value in _given(spec):
        if isinstance(value, Mapping):
            lines += [""] if lines else []
            lines.append(f"[{_key(key)}]")
            lines += [f"{_key(name)} = {_value(inner, f'{key}.{name}')}" for name, inner in _given(value)]
    return "".join(f"{line}\n" for line in lines)


def _given(table: Mapping[str, object]) -> list[tuple[str, object]]:
    """The entries that are not None."""
    return [(key, value) for key, value in table.items() if value is not None]


def _key(key: str) -> str:
    """A key, bare where TOML allows that."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _text(key)


def _value(value: object, key: str) -> str:
    """One value as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, float):
        return repr(float(value))
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, list | tuple) and not any(isinstance(item, list | tuple | Mapping) for item in value):
        return f"[{', '.join(_value(item, key) for item in value)}]"
    raise InputError(f"a job file cannot hold {key} = {value!r} of type {type(value).__name__}")


def _text(text: str) -> str:
    """A basic string, everything that TOML wants escaped escaped."""
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    if any(0xD800 <= ord(char) <= 0xDFFF for char in text):
        raise InputError(f"a job file cannot hold the text {text!r}, which is not valid Unicode")
    return (
        '"'
        + "".join(
            escapes.get(char) or (f"\\u{ord(char):04X}" if ord(char) < 0x20 or ord(char) == 0x7F else char)
            for char in text
        )
        + '"'
    )
