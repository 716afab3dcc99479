"""Columns over ``.npy``, ``.npz`` and ``.zarr`` files, read by rows when rows are asked for.

Rows are read with plain file reads into fresh memory wherever the layout allows: the pages of a memory map that
stays open would count as resident memory of this process, and the budget is a promise about exactly that.
"""

from __future__ import annotations

import ast
import math
import os
import struct
import zipfile
from pathlib import Path
from typing import IO, Final

import numpy as np
import numpy.typing as npt
import torch

from ooc_ntk.errors import InputError

from .arrays import Column, as_column
from .tensors import array_tensor, check_dtype

#: Member names that mean "the model's input" and "the targets" when a file holds one of each and nothing else.
INPUT_MEMBERS: Final = ("x", "X", "inputs", "images", "data", "features", "arr_0")
TARGET_MEMBERS: Final = ("y", "Y", "labels", "label", "targets", "target", "arr_1")

_MAGIC: Final = b"\x93NUMPY"


class RowFile:
    """An array that lies raw in a file: an ``.npy`` file, or an uncompressed member of an ``.npz``.

    Args:
        path: the file.
        where: what it is, for messages.
        offset: where the ``.npy`` header starts in the file, bytes.

    Raises:
        InputError: if there is no ``.npy`` header there, or it describes Python objects.
    """

    chunk_rows = 1

    def __init__(self, path: Path, where: str, offset: int = 0) -> None:
        self._path = path
        self._where = where
        try:
            with path.open("rb") as file:
                file.seek(offset)
                self.shape, self._fortran, self._dtype = read_header(file, where)
                self._offset = file.tell()
        except OSError as error:
            raise InputError(f"{where}: cannot read {path}: {error}") from error
        self.item_bytes = self._dtype.itemsize
        needed = self._offset + math.prod(self.shape) * self.item_bytes
        held = path.stat().st_size
        if held < needed:
            raise InputError(f"{where}: {path} is cut short: {held} bytes, its header asks for {needed}; copy it again")

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Read rows into fresh memory.

        Args:
            start: first row.
            stop: one past the last row.

        Returns:
            ``(stop - start, ...)``, on the CPU.

        Raises:
            InputError: if the file has become shorter or cannot be read.
        """
        block: npt.NDArray[np.generic]
        try:
            if self._fortran and len(self.shape) > 1:
                whole = np.memmap(self._path, self._dtype, "r", self._offset, self.shape, order="F")
                block = np.array(whole[start:stop], order="C", subok=False)
            else:
                row_items = math.prod(self.shape[1:])
                begin = self._offset + start * row_items * self.item_bytes
                count = (stop - start) * row_items
                block = np.fromfile(self._path, self._dtype, count, offset=begin) if count else np.empty(0, self._dtype)
                block = block.reshape(stop - start, *self.shape[1:])
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self._where}: cannot read rows {start} to {stop} of {self._path}: {error}; has the file changed?"
            ) from error
        return array_tensor(block, self._where)


class PackedMember:
    """A compressed member of an ``.npz``: its header is read at once, its values on first use, then kept.

    Args:
        path: the ``.npz`` file.
        member: name inside the archive, with ``.npy``.
        where: what it is, for messages.

    Raises:
        InputError: if the member is no array of numbers.
    """

    chunk_rows = 1

    def __init__(self, path: Path, member: str, where: str) -> None:
        self._path = path
        self._member = member
        self._where = where
        self._values: npt.NDArray[np.generic] | None = None
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
            self.shape, _, dtype = read_header(file, where)
        self.item_bytes = dtype.itemsize

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Read rows; a view of the unpacked member."""
        if self._values is None:
            try:
                with zipfile.ZipFile(self._path) as archive, archive.open(self._member) as file:
                    self._values = np.lib.format.read_array(file, allow_pickle=False)
            except (OSError, ValueError, zipfile.BadZipFile) as error:
                raise InputError(f"{self._where}: cannot unpack {self._path}: {error}; copy it again") from error
        return array_tensor(self._values[start:stop], self._where)


def read_header(file: IO[bytes], where: str) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    """Read the header of an ``.npy`` stream, leaving the stream at the first value.

    Args:
        file: the stream, at the header's first byte.
        where: what it is, for messages.

    Returns:
        Shape, whether the order is Fortran's, dtype.

    Raises:
        InputError: if this is no ``.npy`` header, or one of Python objects.
    """
    magic = file.read(8)
    if len(magic) < 8 or magic[:6] != _MAGIC or magic[6] not in (1, 2, 3):
        pickled = magic[:1] == b"\x80"
        kind = "a pickle, which could run code and is never loaded" if pickled else "not in NumPy's .npy format"
        raise InputError(f"{where} is {kind}; save it again with numpy.save(path, array, allow_pickle=False)")
    length_format = "<H" if magic[6] == 1 else "<I"
    try:
        (length,) = struct.unpack(length_format, file.read(struct.calcsize(length_format)))
        if length > 10**6:
            raise ValueError(f"header of {length} bytes")
        fields = ast.literal_eval(file.read(length).decode("utf-8" if magic[6] == 3 else "latin-1"))
        dtype = np.lib.format.descr_to_dtype(fields["descr"])
        shape = tuple(int(size) for size in fields["shape"])
        fortran = bool(fields["fortran_order"])
    except (ValueError, SyntaxError, KeyError, TypeError, struct.error) as error:
        raise InputError(f"{where} has a damaged .npy header ({error}); save it again with numpy.save") from error
    if dtype.hasobject:
        raise InputError(
            f"{where} holds pickled Python objects (dtype object), which are never loaded because a pickle can run "
            "code; save it again as an array of numbers"
        )
    check_dtype(dtype, where)
    return shape, fortran, dtype


def npz_columns(path: Path, what: str) -> dict[str, Column]:
    """Columns of the members of an ``.npz`` file.

    Args:
        path: the file.
        what: name of the data set, for messages.

    Returns:
        A column per member, by name without ``.npy``; uncompressed ones are read in place.

    Raises:
        InputError: if it is no zip archive or a member is no array of numbers.
    """
    columns: dict[str, Column] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if not info.is_dir()]
        for info in members:
            name = info.filename.removesuffix(".npy")
            where = f"{what} data {path}, member {name!r}"
            if info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1:
                columns[name] = RowFile(path, where, _member_offset(path, info))
            else:
                columns[name] = PackedMember(path, info.filename, where)
    except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError, struct.error) as error:
        raise InputError(
            f"{what} data {path} cannot be read as .npz: {error}; save it again with numpy.savez"
        ) from error
    return columns


def _member_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Where the content of an uncompressed member starts; the local header has its own name and extra lengths."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        header = file.read(30)
        name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
    return info.header_offset + 30 + int(name_bytes) + int(extra_bytes)


def zarr_columns(path: Path, what: str) -> Column | dict[str, Column]:
    """Columns of a zarr array or of the arrays in a zarr group.

    Args:
        path: the folder (or zip) of the array or group.
        what: name of the data set, for messages.

    Returns:
        One column for an array, a column per member for a group.

    Raises:
        InputError: if there is neither.
    """
    import zarr  # heavy, and only needed for such files

    try:
        node = zarr.open(str(path), mode="r")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{what} data {path} is neither a zarr array nor a zarr group: {error}") from error
    if isinstance(node, zarr.Group):
        return {name: as_column(array, f"{what} data {path}, member {name!r}") for name, array in sorted(node.arrays())}
    return as_column(node, f"{what} data {path}")


def open_columns(path: Path, what: str) -> Column | dict[str, Column]:
    """Open a data file by its ending.

    Args:
        path: absolute path of a ``.npy``, ``.npz`` or ``.zarr``.
        what: name of the data set, for messages.

    Returns:
        One column, or a column per member.

    Raises:
        InputError: if it is missing, damaged or of another kind.
    """
    if not path.exists():
        raise InputError(f"{what} data not found: there is no file {path}")
    if path.suffix == ".zarr":
        return zarr_columns(path, what)
    if not path.is_file() or not os.access(path, os.R_OK):
        raise InputError(f"{what} data {path} is not a file that can be read")
    if path.suffix == ".npy":
        return RowFile(path, f"{what} data {path}")
    return npz_columns(path, what)


def split_members(members: dict[str, Column]) -> object:
    """Arrange the members of a file as data for ``as_source``.

    Args:
        members: columns by name, at least one.

    Returns:
        ``(inputs, targets)`` for one input name with one target name; the single input alone; otherwise all of
        them by keyword.
    """
    inputs = [name for name in members if name in INPUT_MEMBERS]
    targets = [name for name in members if name in TARGET_MEMBERS]
    if len(inputs) == 1 and len(targets) == len(members) - 1 <= 1:
        return members[inputs[0]], members[targets[0]] if targets else None
    return members
