"""What a worker process on this machine does first: it leaves Ctrl-C to the driver, and loads what tasks need.

A terminal sends Ctrl-C to every process of a command. The driver asks workers to stop, and commits what they finish.
"""

from __future__ import annotations

import signal

from distributed import Worker

from . import workers  # noqa: F401 - loads torch before the first task needs it


def dask_setup(worker: Worker) -> None:
    """Called by Dask in the main thread of a worker process.

    Args:
        worker: the worker.
    """
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
