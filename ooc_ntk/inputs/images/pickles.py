"""Pickles of NumPy arrays, lists and texts, read without letting the file run anything.

A pickle is a program. CIFAR's official files are pickles of Python 2, and all they need is one array, lists and
strings, so that is all that can be made of one here: every other name in a file is refused before it is looked up.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Final

import numpy as np

#: Stands for the class numpy.ndarray: the files only hand it to ``_reconstruct``, and calling it could take any memory.
_ARRAY_CLASS: Final = "numpy.ndarray"
#: Byte orders: none, little, big, this machine's.
_ORDERS: Final = ("|", "<", ">", "=")


class ForbiddenPickleError(pickle.UnpicklingError):
    """A pickle asks for something that is neither a number, a text, a container nor an array of numbers."""


def read_pickle(content: bytes) -> object:
    """Read a pickle of numbers, texts, containers and arrays of numbers.

    Args:
        content: the whole pickle; strings of Python 2 are read as latin-1.

    Returns:
        What it holds.

    Raises:
        ForbiddenPickleError: if it asks for anything else.
        Exception: of any kind the unpickler knows, if the pickle is damaged.
    """
    return _Unpickler(io.BytesIO(content), encoding="latin1").load()


class _Unpickler(pickle.Unpickler):
    """An unpickler that knows five names, each of them a stand-in that can only do what arrays of numbers need."""

    def find_class(self, module_name: str, global_name: str, /) -> object:
        found = _ALLOWED.get((module_name, global_name))
        if found is None:
            raise ForbiddenPickleError(f"it asks for {module_name}.{global_name}, which could run code")
        return found

    def persistent_load(self, pid: object) -> object:
        raise ForbiddenPickleError(f"it refers to an object outside the file ({pid!r})")


class _Kind:
    """Stands for a dtype, of numbers only: a real one would take any state, fields and all, from the file."""

    def __init__(self, text: object, *_: object) -> None:
        if not isinstance(text, str) or np.dtype(text).kind not in "buif":
            raise ForbiddenPickleError(f"it asks for an array of dtype {text!r}")
        self.dtype = np.dtype(text)

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) < 5 or state[1] not in _ORDERS or any(state[2:5]):
            raise ForbiddenPickleError(f"it asks for an array of a dtype with the state {state!r}")
        if state[1] != "|":
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray[tuple[int, ...], np.dtype[np.generic]]):
    """An array that takes its content from the file, if that is numbers."""

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[2], _Kind):
            raise ForbiddenPickleError("it asks for an array with a state that is not one of numbers")
        version, shape, kind, fortran, content = state
        if not isinstance(content, bytes | str):
            raise ForbiddenPickleError(f"it asks for an array of the values of a {type(content).__name__}")
        super().__setstate__((version, shape, kind.dtype, fortran, content))  # type: ignore[arg-type]


def _empty_array(kind: object, *_: object) -> _Array:
    """An array to be filled by its state, which follows in the pickle."""
    if kind != _ARRAY_CLASS:
        raise ForbiddenPickleError(f"it asks for an array of class {kind!r}")
    return _Array((0,), np.int8)


def _encode(text: object, encoding: object = None) -> bytes:
    """Bytes that Python 3 wrote as a text to keep the pickle readable by Python 2."""
    if not isinstance(text, str) or encoding != "latin1":
        raise ForbiddenPickleError(f"it asks to encode a {type(text).__name__} as {encoding!r}")
    return text.encode("latin1")


_ALLOWED: Final[dict[tuple[str, str], str | Callable[..., object]]] = {
    ("numpy.core.multiarray", "_reconstruct"): _empty_array,
    ("numpy._core.multiarray", "_reconstruct"): _empty_array,
    ("numpy", "ndarray"): _ARRAY_CLASS,
    ("numpy", "dtype"): _Kind,
    ("_codecs", "encode"): _encode,
}
