"""``s3://bucket/prefix``: objects of an S3-compatible store."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

from ooc_ntk.errors import InputError
from ooc_ntk.extras import require
from ooc_ntk.storage.files import Files
from ooc_ntk.storage.storeurl import StoreScheme, register_store

#: Bytes in names that every object store and every URL takes as they are.
_PREFIX: Final = re.compile(r"[\w.=+,()!' @-]*")
_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}")


def _checked(url: str) -> str:
    bucket, _, prefix = url.removeprefix("s3://").strip("/").partition("/")
    parts = [part for part in prefix.split("/") if part]
    if not _BUCKET.fullmatch(bucket):
        raise InputError(f"{url!r} names no bucket; a store is s3://bucket/prefix")
    if any(not _PREFIX.fullmatch(part) or set(part) == {"."} for part in parts):
        raise InputError(f"the prefix of {url!r} has characters that not all stores take; use letters, digits, - _ . =")
    return "/".join([f"s3://{bucket}", *parts])


def _files(url: str, scratch: Callable[[], Path] | None) -> Files:
    require("obstore", url)
    from ooc_ntk.storage.objects import ObjectFiles  # imports obstore

    return ObjectFiles(url, scratch)


register_store("s3", StoreScheme("s3://bucket/prefix", _checked, _files))
