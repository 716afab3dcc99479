"""Files of texts: tab- or comma-separated tables, JSON lines and plain lines, with a label and a second text or not."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from ooc_ntk.errors import InputError, unknown_name

#: Endings of files of texts.
TEXT_KINDS: Final = (".tsv", ".csv", ".jsonl", ".txt")
#: Names of the columns that hold text and label where none are given.
TEXT_COLUMNS: Final = ("sentence", "text")
LABEL_COLUMN: Final = "label"
#: Columns of CoLA (source, label, original judgement, sentence), whose files have no header.
_COLA_COLUMNS: Final = 4
_COLA_TEXT, _COLA_LABEL = "3", "1"


@dataclass(frozen=True)
class Columns:
    """Which columns are meant: names of a header, or numbers from 0.

    Attributes:
        text: the text, None for the usual one.
        label: the label, None for the usual one if there is one.
        pair: the second text, None for none.
        header: whether the first line names the columns, None to find out.
    """

    text: str | None = None
    label: str | None = None
    pair: str | None = None
    header: bool | None = None


@dataclass(frozen=True)
class TextRows:
    """Texts of a file.

    Attributes:
        path: the file.
        lines: line of each text (its last one, if a quoted text has several), from 1.
        texts: the texts.
        pairs: the second text of each, or None.
        labels: what stands in the label column, or None.
    """

    path: Path
    lines: list[int]
    texts: list[str]
    pairs: list[str] | None
    labels: list[object] | None


def read_texts(path: Path, columns: Columns, what: str = "train") -> TextRows:
    """Read a file of texts. Blank lines are skipped.

    Args:
        path: a ``.tsv`` (no quoting: quotes are part of the text), ``.csv`` (quoting as in :mod:`csv`), ``.jsonl`` (an
            object a line) or ``.txt`` (a text a line), UTF-8.
        columns: which columns hold what. By default those named ``sentence`` or ``text``, and ``label``; a TSV of four
            columns without such a header is read as CoLA, a table of one column as texts. Without a header and with a
            text column given, labels are read only from a column that is given too.
        what: name of the data set, for messages.

    Returns:
        The texts, in the order of the file.

    Raises:
        InputError: naming file and line, for a file that is missing, empty or not UTF-8, for lines of unequal columns,
            a missing column, or a text that is empty or no text.
    """
    content = _decode(path, what)
    if path.suffix == ".txt":
        for key, value in vars(columns).items():
            if value is not None:
                raise InputError(f"{what} data {path} has one text a line and no columns; leave {key} out")
        rows: list[tuple[int, Mapping[str, object]]] = [(line, {"0": text}) for line, text in _lines(content)]
        return _collect(path, rows, Columns("0"), what)
    if path.suffix == ".jsonl":
        return _collect(path, *_read_json(path, content, columns, what), what)
    if path.suffix not in TEXT_KINDS:
        raise InputError(f"{what} data {path} is no file of texts; use {', '.join(TEXT_KINDS)}")
    return _collect(path, *_read_table(path, content, columns, what), what)


def _decode(path: Path, what: str) -> str:
    """Text of a file."""
    if not path.is_file():
        raise InputError(f"{what} data not found: there is no file {path}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{what} data {path} cannot be read: {error}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(
            f"{what} data {path}, line {line}, is not UTF-8 (byte {content[error.start]:#04x}); convert the file, for "
            "example with: iconv -f latin1 -t utf-8"
        ) from error


def _lines(content: str) -> list[tuple[int, str]]:
    """Lines that are not blank, with their numbers; a line ends at a newline and nowhere else."""
    split = [line.removesuffix("\r") for line in content.split("\n")]
    return [(number, line) for number, line in enumerate(split, 1) if line.strip()]


def _read_json(
    path: Path, content: str, columns: Columns, what: str
) -> tuple[list[tuple[int, Mapping[str, object]]], Columns]:
    """Objects of a JSON-lines file, and the keys that hold text and label."""
    if columns.header is not None:
        raise InputError(f"{what} data {path} is JSON lines, which have no header; leave header out")
    rows: list[tuple[int, Mapping[str, object]]] = []
    for line, text in _lines(content):
        try:
            value = json.loads(text)
        except ValueError as error:
            raise InputError(f"{what} data {path}, line {line}, is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise InputError(
                f"{what} data {path}, line {line}, is a {type(value).__name__}, not an object; write a line such as "
                '{"text": "...", "label": 0}'
            )
        rows.append((line, value))
    names = list(rows[0][1]) if rows else []
    return rows, _named_columns(path, names, columns, what)


def _read_table(
    path: Path, content: str, columns: Columns, what: str
) -> tuple[list[tuple[int, Mapping[str, object]]], Columns]:
    """Rows of a table by column name (or number, without a header), and the columns that hold text and label."""
    table: list[tuple[int, list[str]]] = []
    if path.suffix == ".tsv":
        table = [(line, text.split("\t")) for line, text in _lines(content)]
    else:
        reader = csv.reader(io.StringIO(content, newline=""), strict=True)
        try:
            table = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
        except csv.Error as error:
            raise InputError(f"{what} data {path}, line {reader.line_num}, is not CSV: {error}") from error
    if not table:
        return [], columns
    width = len(table[0][1])
    for line, cells in table:
        if len(cells) != width:
            raise InputError(
                f"{what} data {path}, line {line}, has {len(cells)} columns, but line {table[0][0]} has {width}; every "
                f"line needs the same number ({'tabs' if path.suffix == '.tsv' else 'unquoted commas'} end columns)"
            )
    names = [str(number) for number in range(width)]
    headed = columns.header
    if headed is None:
        wanted = [name for name in (columns.text, columns.label, columns.pair) if name is not None]
        headed = bool(set(TEXT_COLUMNS) & set(table[0][1])) or any(not name.isdecimal() for name in wanted)
    if headed:
        names = [cell.strip() for cell in table[0][1]]
        table = table[1:]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"{what} data {path}: the header names the column {twice!r} twice")
        return [(line, dict(zip(names, cells, strict=True))) for line, cells in table], _named_columns(
            path, names, columns, what
        )
    return [(line, dict(zip(names, cells, strict=True))) for line, cells in table], _numbered_columns(
        path, names, columns, what
    )


def _named_columns(path: Path, names: list[str], columns: Columns, what: str) -> Columns:
    """Columns by the names that a file gives them; a number counts the names."""

    def find(wanted: str) -> str:
        if wanted not in names and wanted.isdecimal() and int(wanted) < len(names):
            return names[int(wanted)]
        if names and wanted not in names:
            raise unknown_name(f"column of {what} data {path}", wanted, names)
        return wanted

    text = columns.text or next((name for name in TEXT_COLUMNS if name in names), None)
    if text is None and len(names) == 1:
        text = names[0]
    if text is None and names:
        raise InputError(
            f"{what} data {path} has the columns {', '.join(names)}, none named {' or '.join(TEXT_COLUMNS)}; name the "
            "one with the texts: column=NAME"
        )
    label = columns.label or (LABEL_COLUMN if LABEL_COLUMN in names else None)
    found = [None if name is None else find(name) for name in (text, label, columns.pair)]
    return Columns(found[0], found[1], found[2])


def _numbered_columns(path: Path, names: list[str], columns: Columns, what: str) -> Columns:
    """Columns by number, those of CoLA by default."""
    for wanted in (columns.text, columns.label, columns.pair):
        if wanted is not None and wanted not in names:
            raise InputError(
                f"{what} data {path} has no column {wanted!r}: it has {len(names)} without a header, numbered from 0; "
                "give a number below that, or header=1 if the first line names them"
            )
    if columns.text is not None:
        return columns
    if len(names) == 1:
        return Columns("0", columns.label, columns.pair)
    if path.suffix == ".tsv" and len(names) == _COLA_COLUMNS:
        return Columns(_COLA_TEXT, columns.label or _COLA_LABEL, columns.pair)
    raise InputError(
        f"{what} data {path} has {len(names)} columns and no header with {' or '.join(TEXT_COLUMNS)}; name the one "
        "with the texts, for example column=1,label=0"
    )


def _collect(path: Path, rows: list[tuple[int, Mapping[str, object]]], columns: Columns, what: str) -> TextRows:
    """Take texts, second texts and labels out of rows."""
    if not rows:
        raise InputError(f"{what} data {path} holds no texts; at least one is needed")
    assert columns.text is not None

    def value(line: int, row: Mapping[str, object], name: str) -> object:
        if name not in row:
            raise InputError(f"{what} data {path}, line {line}, has no {name!r}; every line needs one")
        return row[name]

    def texts(name: str) -> list[str]:
        found = []
        for line, row in rows:
            text = value(line, row, name)
            if not isinstance(text, str) or not text.strip():
                kind = (
                    "an empty text" if isinstance(text, str) else f"a value of type {type(text).__name__}, not a text,"
                )
                raise InputError(f"{what} data {path}, line {line}, has {kind} in column {name}; remove the line")
            found.append(text)
        return found

    return TextRows(
        path,
        [line for line, _ in rows],
        texts(columns.text),
        None if columns.pair is None else texts(columns.pair),
        None if columns.label is None else [value(line, row, columns.label) for line, row in rows],
    )


def label_tensor(rows: TextRows, what: str = "train") -> torch.Tensor | None:
    """Labels as numbers.

    Args:
        rows: the texts.
        what: name of the data set, for messages.

    Returns:
        (texts,): int64 if all are written as whole numbers, otherwise float32; None without labels.

    Raises:
        InputError: naming file and line of the first label that is no finite number.
    """
    if rows.labels is None:
        return None
    numbers: list[int | float] = []
    for line, label in zip(rows.lines, rows.labels, strict=True):
        try:
            numbers.append(_number(label))
        except ValueError as error:
            raise InputError(
                f"{what} data {rows.path}, line {line}: the label {label!r} is not a finite number; write classes as "
                "0, 1, …, or name another label column"
            ) from error
    if all(isinstance(number, int) for number in numbers):
        return torch.tensor(numbers, dtype=torch.int64)
    return torch.tensor(numbers, dtype=torch.float32)


def _number(label: object) -> int | float:
    """A label as a number that its tensor can hold.

    >>> _number(" 1"), _number(True), _number("2.5")
    (1, 1, 2.5)
    """
    if isinstance(label, bool):
        return int(label)
    if not isinstance(label, str | int | float):
        raise ValueError("no number")
    try:
        number: int | float = int(label) if isinstance(label, str) else label
    except ValueError:
        number = float(label)
    fits = -(2**63) <= number < 2**63 if isinstance(number, int) else abs(number) <= torch.finfo(torch.float32).max
    if not fits or (isinstance(number, float) and not math.isfinite(number)):
        raise ValueError("out of range")
    return number
