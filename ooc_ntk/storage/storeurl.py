"""URLs of stores: which are taken, and that none carries a secret."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from ooc_ntk.errors import InputError

from .files import Files
from .local import LocalFiles

#: Bytes in names that every object store and every URL takes as they are.
_PREFIX: Final = re.compile(r"[\w.=+,()!' @-]*")
_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}")

#: What is said of a URL that may hold a secret; the URL itself is not repeated.
_SECRET: Final = (
    "the store's URL carries credentials or options, which would be kept with the run; give s3://bucket/prefix alone, "
    "and credentials by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or by the machine's profile"
)


def is_store(where: object) -> bool:
    """Whether a place is a URL, as no path of a run directory is.

    >>> is_store("s3://bucket/runs/a"), is_store("runs/a")
    (True, False)
    """
    return isinstance(where, str) and "://" in where


def checked_store(url: str) -> str:
    """A store's URL in the one form that is kept, or why it is none.

    Args:
        url: ``s3://bucket/prefix``, or ``file:///folder`` of a shared file system.

    Returns:
        The URL, without a slash at its end.

    Raises:
        InputError: if it is none; a URL that may hold a secret is not repeated.

    >>> checked_store("s3://bucket/runs/a/")
    's3://bucket/runs/a'
    """
    if not isinstance(url, str) or "://" not in url:
        raise InputError(f"a store is a URL, s3://bucket/prefix or file:///folder, got {str(url)!r}")
    scheme, _, rest = url.partition("://")
    if "?" in rest or "#" in rest or "@" in rest.partition("/")[0] or ":" in rest:
        raise InputError(_SECRET)
    if scheme == "file":
        host, path = urlsplit(url).netloc, unquote(urlsplit(url).path)
        if host or not path.startswith("/") or path == "/":
            raise InputError(f"a folder as a store is file:///folder, with its whole path, got {url!r}")
        return "file://" + path.rstrip("/")
    if scheme != "s3":
        raise InputError(f"stores are s3://bucket/prefix or file:///folder, got one of {scheme}://")
    bucket, _, prefix = rest.strip("/").partition("/")
    parts = [part for part in prefix.split("/") if part]
    if not _BUCKET.fullmatch(bucket):
        raise InputError(f"{url!r} names no bucket; a store is s3://bucket/prefix")
    if any(not _PREFIX.fullmatch(part) or set(part) == {"."} for part in parts):
        raise InputError(f"the prefix of {url!r} has characters that not all stores take; use letters, digits, - _ . =")
    return "/".join([f"s3://{bucket}", *parts])


def files_at(url: str, scratch: Callable[[], Path] | None = None) -> Files:
    """The files of a store.

    Args:
        url: its URL, checked.
        scratch: gives the local folder in which files are gathered before they are uploaded; None is that of
            :mod:`tempfile`.

    Raises:
        InputError: if what object stores need is not installed.
    """
    if url.startswith("file://"):
        return LocalFiles(url.removeprefix("file://"))
    if importlib.util.find_spec("obstore") is None:
        raise InputError(f"{url} needs the package obstore, which is not installed: pip install 'ooc-ntk[cloud]'")
    from .objects import ObjectFiles  # imports obstore

    return ObjectFiles(url, scratch)
