"""What goes wrong with an object store, said in one line, and whether it may pass.

An answer of a store may repeat the key it was asked with, so that none is ever quoted: only its status and its code
are, and the errors of obstore are not chained.
"""

from __future__ import annotations

import errno
import os
import re
from typing import Final
from urllib.parse import urlsplit

from ooc_ntk.errors import StorageError, TransientStorageError

_STATUS: Final = re.compile(r"status code: (\d{3})")
_CODE: Final = re.compile(r"<Code>(\w{1,60})</Code>")

#: Statuses that pass by themselves, beside those of 500 and more: a timeout, too many requests.
_PASSING: Final = (408, 409, 425, 429)

#: Codes of S3 that are about who asks, whatever the status.
_DENIED: Final = frozenset(
    (
        *("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"),
        *("TokenRefreshRequired", "AccountProblem", "AllAccessDisabled", "RequestTimeTooSkewed"),
    )
)

#: Addresses that credentials of an instance or a container come from.
_PROFILE: Final = ("169.254.169.254", "169.254.170.", "latest/api/token", "fd00:ec2::")

#: What libraries say of a connection that could not be made, or that broke.
_CONNECTION: Final = re.compile(r"error sending request|timed out|connection|dns error|body|incomplete|reset", re.I)


def object_error(action: str, place: str, error: Exception) -> OSError:
    """What an error of obstore means.

    Args:
        action: what was done, as ``reading``.
        place: URL of the object.
        error: an error of obstore.

    Returns:
        A FileNotFoundError for an object that is not there, otherwise a :class:`StorageError`: a
        :class:`TransientStorageError` where the same call may succeed later.
    """
    text = str(error)
    found = _STATUS.search(text)
    status = int(found.group(1)) if found else 0
    named = _CODE.search(text)
    code = named.group(1) if named else ""
    failed, bucket = f"{action} {place} failed", place.removeprefix("s3://").partition("/")[0]
    if code == "NoSuchBucket":
        return StorageError(f"{failed}: there is no bucket {bucket!r} at {endpoint()}; make it, or correct --store")
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, "there is no such object", place)
    if any(address in text for address in _PROFILE):
        return StorageError(
            f"{failed}: no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the "
            "machine a profile"
        )
    if (
        status in (401, 403)
        or code in _DENIED
        or type(error).__name__ in ("PermissionDeniedError", "UnauthenticatedError")
    ):
        return StorageError(
            f"{failed}: access denied ({code or status or 'no reason given'}); check AWS_ACCESS_KEY_ID, "
            f"AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, and that they may list, read, write and delete in {bucket!r}"
        )
    if "BadScheme" in text:
        return StorageError(f"{failed}: {endpoint()} is plain http; set AWS_ALLOW_HTTP=true if that is meant")
    if status == 301 or code in ("PermanentRedirect", "AuthorizationHeaderMalformed") or "configured region" in text:
        return StorageError(f"{failed}: the bucket is in another region; set AWS_REGION")
    if status >= 500 or status in _PASSING:
        return TransientStorageError(
            f"{failed}: the store answered {code or status} again and again; run the same command again when it works"
        )
    if not status and _CONNECTION.search(text):
        return TransientStorageError(
            f"{failed}: {endpoint()} cannot be reached, or the connection broke; check AWS_ENDPOINT_URL and the "
            "network, and run the same command again when it works"
        )
    reason = code or (f"status {status}" if status else type(error).__name__)
    return StorageError(f"{failed}: the store refused it ({reason})")


def endpoint() -> str:
    """The host that is asked, without anything secret that its URL may hold."""
    given = (
        os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT")
    )
    if not given:
        return "AWS"
    try:
        parts = urlsplit(given)
        return f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)
    except ValueError:
        return "the endpoint of AWS_ENDPOINT_URL"
