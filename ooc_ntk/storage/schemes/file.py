"""``file:///folder``: a folder of a shared file system."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ooc_ntk.errors import InputError
from ooc_ntk.storage.files import Files
from ooc_ntk.storage.local import LocalFiles
from ooc_ntk.storage.storeurl import StoreScheme, register_store


def _checked(url: str) -> str:
    host, path = urlsplit(url).netloc, unquote(urlsplit(url).path)
    if host or not path.startswith("/") or path == "/":
        raise InputError(f"a folder as a store is file:///folder, with its whole path, got {url!r}")
    return "file://" + path.rstrip("/")


def _files(url: str, scratch: Callable[[], Path] | None) -> Files:
    del scratch
    return LocalFiles(url.removeprefix("file://"))


register_store("file", StoreScheme("file:///folder", _checked, _files))
