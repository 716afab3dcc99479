"""Bytes, seconds and dtypes: parsing what people type and printing what they read."""

from __future__ import annotations

import re
from typing import Final

from .errors import InputError, unknown_name

_BYTE_UNITS: Final = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "k": 2**10,
    "m": 2**20,
    "g": 2**30,
    "t": 2**40,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}

#: Bytes of one element of each precision the engine computes in.
ITEM_BYTES: Final = {"float32": 4, "tf32": 4, "bf16": 4, "bf16x3": 4, "float64": 8}

#: NumPy dtype in which a kernel of each precision is stored.
STORED_DTYPE: Final = {"float32": "<f4", "tf32": "<f4", "bf16": "<f4", "bf16x3": "<f4", "float64": "<f8"}

#: NumPy dtype in which Jacobian tiles of each precision are held; bf16 as its bits (NumPy has no such type).
HELD_DTYPE: Final = {"float32": "<f4", "tf32": "<f4", "bf16": "<u2", "bf16x3": "<f4", "float64": "<f8"}

#: Products of bf16 matrices that one product is made of, where it is more than one.
PARTIAL_PRODUCTS: Final = {"bf16x3": 3}

#: NumPy dtype of stored token numbers.
TOKEN_DTYPE: Final = "<i4"


def parse_bytes(text: str | int | float) -> int:
    """Read a number of bytes as people write it.

    Args:
        text: ``"16GiB"``, ``"500 MB"``, ``"1.5g"`` or a plain number of bytes.

    Returns:
        Bytes, at least 1.

    Raises:
        InputError: if the text is no positive size.

    >>> parse_bytes("1.5GiB")
    1610612736
    >>> parse_bytes("500 MB"), parse_bytes(4096)
    (500000000, 4096)
    """
    if isinstance(text, bool):
        raise InputError(f"a size is a number of bytes or text such as '16GiB', got {text!r}")
    if isinstance(text, int | float):
        value = float(text)
    else:
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", text)
        if match is None:
            raise InputError(f"cannot read {text!r} as a size; write for example '16GiB', '500MB' or a number of bytes")
        unit = match.group(2).lower()
        if unit not in _BYTE_UNITS:
            raise unknown_name(
                "unit of size", match.group(2), ["B", "KiB", "MiB", "GiB", "TiB", "kB", "MB", "GB", "TB"]
            )
        value = float(match.group(1)) * _BYTE_UNITS[unit]
    if not 1 <= value < 2**63:
        raise InputError(f"a size must be at least one byte, got {text!r}")
    return int(value)


def format_bytes(count: float) -> str:
    """Print bytes in the largest binary unit that keeps the number above one.

    >>> format_bytes(0), format_bytes(1536), format_bytes(7 * 2**30)
    ('0 B', '1.5 KiB', '7.0 GiB')
    """
    if count < 1024:
        return f"{int(count)} B"
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        count /= 1024
        if count < 1024 or unit == "PiB":
            break
    return f"{count:.1f} {unit}" if count < 100 else f"{count:.0f} {unit}"


def format_seconds(seconds: float) -> str:
    """Print a duration with two significant parts.

    >>> format_seconds(0.0312), format_seconds(42.25), format_seconds(125), format_seconds(7384)
    ('0.03 s', '42.2 s', '2 min 5 s', '2 h 3 min')
    """
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"


def format_count(count: float) -> str:
    """Print a count or FLOPs with a decimal prefix.

    >>> format_count(950), format_count(11_200_000), format_count(3.1e12)
    ('950', '11.2 M', '3.1 T')
    """
    if count < 1000:
        return f"{count:.0f}"
    for unit in ("k", "M", "G", "T", "P", "E"):
        count /= 1000
        if count < 1000 or unit == "E":
            break
    return f"{count:.1f} {unit}"


def item_bytes(precision: str) -> int:
    """Bytes of one element of a precision.

    Args:
        precision: ``float32``, ``tf32``, ``bf16``, ``bf16x3`` or ``float64``.

    Returns:
        Bytes per element of what is computed; held tiles may take less (:func:`held_item_bytes`).

    Raises:
        InputError: for a precision that is not known.
    """
    if precision not in ITEM_BYTES:
        raise unknown_name("precision", precision, ITEM_BYTES)
    return ITEM_BYTES[precision]


def held_item_bytes(precision: str) -> int:
    """Bytes of one element of a held Jacobian tile.

    Args:
        precision: as for :func:`item_bytes`.

    Returns:
        Bytes per element.

    Raises:
        InputError: for a precision that is not known.

    >>> held_item_bytes("bf16"), held_item_bytes("bf16x3")
    (2, 4)
    """
    return 2 if precision == "bf16" else item_bytes(precision)


def partial_products(precision: str) -> int:
    """Matrix products that one product of a precision is made of.

    >>> partial_products("bf16x3"), partial_products("float32")
    (3, 1)
    """
    return PARTIAL_PRODUCTS.get(precision, 1)
