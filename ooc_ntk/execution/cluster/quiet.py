"""Loaded first by worker processes of this machine: Ctrl-C is the driver's, which stops them."""

from __future__ import annotations

import signal
from typing import Any


def dask_setup(worker: Any) -> None:  # noqa: ARG001 - Dask's signature
    """Ignore Ctrl-C, which a terminal sends to every process: the driver ends tasks at their next step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
