"""``Cluster``: which worker processes run the tasks, as a caller says it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from ooc_ntk.errors import InputError
from ooc_ntk.extras import require

#: Seconds without any worker after which a run stops, to go on later (a choice: a nanny restarts a worker in five, and
#: a job queue that has taken one back may take minutes to give another).
PATIENCE_SECONDS: Final = 300.0

_ADDRESS: Final = re.compile(r"(tcp|tls|ucx|ws|wss|inproc)://\S+")


@dataclass(frozen=True)
class Cluster:
    """Which worker processes run the tasks of a run. Each runs one task at a time.

    Attributes:
        scheduler: address of a Dask scheduler that is there, such as ``tcp://host:8786``, or a ``distributed.Client``
            of it; None starts worker processes on this machine.
        workers: how many processes to start on this machine's processor.
        devices: CUDA devices of this machine that get a process each: ``all``, or numbers as ``0,2`` or ``[0, 2]``.
        performance_report: file to write Dask's performance report to (HTML), or None.
        patience: seconds to go on without any worker before the run stops.

    Raises:
        InputError: if these do not go together, or there are no such devices.

    >>> Cluster(workers=2).processes
    2
    """

    scheduler: Any = None
    workers: int | None = None
    devices: str | int | tuple[int, ...] | list[int] | None = None
    performance_report: str | Path | None = None
    patience: float = PATIENCE_SECONDS

    def __post_init__(self) -> None:
        """Check the values."""
        given = [name for name in ("scheduler", "workers", "devices") if getattr(self, name) is not None]
        if len(given) != 1:
            asked = " and ".join(given) if given else "none of them"
            raise InputError(
                f"tasks run on one of scheduler (a cluster that is there), workers (processes here) and devices (one "
                f"process per GPU here), got {asked}"
            )
        if isinstance(self.scheduler, str) and not _ADDRESS.fullmatch(self.scheduler):
            raise InputError(
                f"scheduler {self.scheduler!r} is no address of a Dask scheduler; it looks like 'tcp://host:8786'"
            )
        if getattr(self.scheduler, "asynchronous", False):
            raise InputError(
                "an asynchronous Client cannot be waited for; give the scheduler's address, or Client(...)"
            )
        if self.workers is not None and (
            isinstance(self.workers, bool) or not isinstance(self.workers, int) or not 1 <= self.workers <= 1024
        ):
            raise InputError(f"workers must be a whole number from 1 to 1024, got {self.workers!r}")
        if not self.patience > 0:
            raise InputError(f"patience must be a positive number of seconds, got {self.patience!r}")
        if self.devices is not None:
            object.__setattr__(self, "devices", _devices(self.devices))
        if self.performance_report is not None:
            _check_report(Path(self.performance_report))

    @property
    def processes(self) -> int:
        """Processes that are started here and share this machine's memory; 1 where the cluster is somewhere else."""
        if self.workers is not None:
            return self.workers
        return len(self.devices) if isinstance(self.devices, tuple) else 1


def _devices(given: Any) -> tuple[int, ...]:
    """Numbers of the devices that are asked for, each once."""
    count = torch.cuda.device_count()
    if count == 0:
        raise InputError(
            f"devices={given!r} asks for a process per GPU, and torch sees none here; use workers=... (--workers) for "
            "processes on the processor"
        )
    if given == "all":
        return tuple(range(count))
    parts = given.split(",") if isinstance(given, str) else [given] if isinstance(given, int) else given
    try:
        numbers = tuple(dict.fromkeys(int(part) for part in parts))
    except (TypeError, ValueError) as error:
        raise InputError(f"devices must be 'all' or numbers as '0,2', got {given!r}") from error
    wrong = [number for number in numbers if not 0 <= number < count]
    if wrong or not numbers:
        raise InputError(f"there is no CUDA device {wrong[0] if wrong else given!r}; torch sees 0 to {count - 1}")
    return numbers


def _check_report(path: Path) -> None:
    """Refuse a performance report that could not be written in the end."""
    require("bokeh", "a performance report")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise InputError(f"the performance report {path} cannot be written there; name a file in a folder that exists")
