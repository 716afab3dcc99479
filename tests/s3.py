"""A local S3 server for tests, moto's on loopback; what it keeps is looked at directly, past every client."""

from __future__ import annotations

import http.server
import logging
import os
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

#: Credentials that no test can mistake for anything else.
KEY, SECRET, TOKEN = "AKIARECOGNISABLEKEY", "recognisable-secret-3Q9x", "recognisable-token-7Lm2"

BUCKET = "bucket"


@dataclass(frozen=True)
class Server:
    """The server.

    Attributes:
        endpoint: its address.
    """

    endpoint: str

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        """Everything that it keeps below a prefix of the bucket, by the path below that."""
        bucket = _backend().buckets[BUCKET]
        below = f"{prefix}/" if prefix else ""
        return {key.removeprefix(below): one.value for key, one in bucket.keys.items() if key.startswith(below)}

    def unfinished(self) -> int:
        """Uploads of parts that were neither completed nor given up."""
        return len(_backend().buckets[BUCKET].multiparts)

    def put(self, key: str, data: bytes) -> None:
        """Replace an object, as somebody else would."""
        _backend().put_object(BUCKET, key, data)

    def delete(self, key: str) -> None:
        """Delete an object, as somebody else would."""
        _backend().delete_object(BUCKET, key)


def _backend() -> Any:
    """What the server, which runs in this process, keeps its objects in."""
    from moto.s3.models import s3_backends

    return s3_backends["123456789012"]["aws"]


@contextmanager
def serving() -> Iterator[Server]:
    """A server with an empty bucket, on a free port of this machine."""
    server = pytest.importorskip("moto.server")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    try:
        host, port = running.get_host_and_port()
        made = Server(f"http://{host}:{port}")
        urllib.request.urlopen(urllib.request.Request(f"{made.endpoint}/{BUCKET}", method="PUT"), timeout=10).close()
        yield made
    finally:
        running.stop()


def environment(endpoint: str, **more: str) -> dict[str, str]:
    """Settings under which obstore asks a server."""
    return {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_SESSION_TOKEN": TOKEN,
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ENDPOINT_URL": endpoint,
        "NO_PROXY": "127.0.0.1",
        **more,
    }


def set_environment(patch: pytest.MonkeyPatch, settings: Mapping[str, str]) -> None:
    """Set them, and nothing else that begins with AWS_."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            patch.delenv(name)
    for name, value in settings.items():
        patch.setenv(name, value)


@contextmanager
def answering(status: int, body: bytes, times: int | None = None) -> Iterator[list[str]]:
    """A server that answers everything so; or only the first ``times`` requests, and what follows with an empty object.

    Yields:
        Its address, and then what it was asked.
    """
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            self.rfile.read(length)
            asked.append(f"{self.command} {self.path}")
            failing = times is None or len(asked) - 1 <= times
            self.send_response(status if failing else 200)
            self.send_header("content-length", str(len(body) if failing and self.command != "HEAD" else 0))
            self.send_header("etag", '"1"')
            self.send_header("last-modified", "Fri, 27 Nov 2026 20:00:00 GMT")
            self.end_headers()
            if failing and self.command != "HEAD":
                self.wfile.write(body)

        do_PUT = do_HEAD = do_POST = do_DELETE = do_GET  # noqa: N815

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    asked.append(f"http://127.0.0.1:{server.server_port}")
    try:
        yield asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
