"""URLs of stores: which are taken, and that none carries a secret."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ooc_ntk.errors import InputError
from ooc_ntk.registry import Registry

from .files import Files

#: What is said of a URL that may hold a secret; the URL itself is not repeated.
_SECRET: Final = (
    "the store's URL carries credentials or options, which would be kept with the run; give s3://bucket/prefix alone, "
    "and credentials by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or by the machine's profile"
)


@dataclass(frozen=True)
class StoreScheme:
    """A sort of store, by the scheme of its URLs.

    Attributes:
        form: what a URL looks like, for messages.
        checked: a URL in the one form that is kept, without a slash at its end; raises InputError for one that is none.
            It is given none with ``?``, ``#``, or a user, password or port.
        files: the files of a checked URL. The second argument gives the local folder in which files may be gathered
            before they are uploaded; None is that of :mod:`tempfile`.
    """

    form: str
    checked: Callable[[str], str]
    files: Callable[[str, Callable[[], Path] | None], Files]


#: Every sort of store, by scheme.
STORES: Final[Registry[StoreScheme]] = Registry("scheme of stores", "ooc_ntk.storage.schemes")


def register_store(scheme: str, store: StoreScheme) -> None:
    """Add a sort of store, for ``--store scheme://...``.

    Its files answer every call of :class:`~ooc_ntk.storage.files.Files`: what is published appears whole or not at all.

    Args:
        scheme: what stands before ``://``.
        store: what it is.

    Raises:
        InputError: if it is one of this project's own.
    """
    STORES.register(scheme, store)


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
    if scheme not in STORES:
        forms = " or ".join(STORES.get(name).form for name in STORES)
        raise InputError(f"stores are {forms}, got one of {scheme}://")
    return STORES.get(scheme).checked(url)


def files_at(url: str, scratch: Callable[[], Path] | None = None) -> Files:
    """The files of a store.

    Args:
        url: its URL, checked.
        scratch: gives the local folder in which files are gathered before they are uploaded; None is that of
            :mod:`tempfile`.

    Raises:
        InputError: if what its sort of store needs is not installed.
    """
    return STORES.get(url.partition("://")[0]).files(url, scratch)
