"""Budgets: what a run may take of each memory, and how an automatic budget is drawn from what is free."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from ooc_ntk.units import format_bytes, parse_bytes

#: Share of the free memory or disk that an automatic budget takes (a choice: the rest is left to other programs).
AUTOMATIC_SHARE: Final = 0.8

#: Resident bytes of a worker process beyond those of a process that runs tasks itself: Dask's worker and its libraries
#: (measured: 24 MiB once a job was loaded; rounded up).
WORKER_BYTES: Final = 32 * 2**20

#: Resident bytes of the driver's process for its scheduler, and for what starts worker processes. Measured, with Bokeh:
#: 34 MiB for scheduler, dashboard and two or four nannies, 12 for multiprocessing's resource tracker, 23 more after
#: 10,000 tasks (2 of them in the latter half), 9 for a performance report; rounded up.
DRIVER_BYTES: Final = 96 * 2**20


@dataclass(frozen=True)
class Resources:
    """What the machine has free now, and what this process already holds.

    Attributes:
        host_free: bytes of host memory free to this process: what is available, or less if its cgroup allows less.
        host_taken: resident bytes of this process.
        device_free: free bytes on the device (0 on a CPU).
        device_taken: bytes of the device already held by this process.
        disk_free: free bytes where the run directory will be.
    """

    host_free: int
    host_taken: int
    device_free: int
    device_taken: int
    disk_free: int


@dataclass(frozen=True)
class Budget:
    """The user's limits; a limit left None is set to 80% of what is free.

    Attributes:
        host: resident memory of the whole process, interpreter and libraries included (``"16GiB"`` or bytes).
        device: memory on the device.
        disk: bytes the run directory may grow to.

    >>> Budget(host="2GiB").host
    2147483648
    """

    host: str | int | None = None
    device: str | int | None = None
    disk: str | int | None = None

    def __post_init__(self) -> None:
        """Turn text into bytes."""
        for field in ("host", "device", "disk"):
            value = getattr(self, field)
            if value is not None:
                object.__setattr__(self, field, parse_bytes(value))

    def limits(self, resources: Resources) -> Limits:
        """Fill the automatic limits from what is free.

        Args:
            resources: what the machine has now.

        Returns:
            Limits in bytes; the automatic ones count what the process already holds as usable.
        """
        return Limits(
            host=int(self.host) if self.host else int(resources.host_taken + AUTOMATIC_SHARE * resources.host_free),
            device=int(self.device)
            if self.device
            else int(resources.device_taken + AUTOMATIC_SHARE * resources.device_free),
            disk=int(self.disk) if self.disk else int(AUTOMATIC_SHARE * resources.disk_free),
            automatic=tuple(name for name in ("host", "device", "disk") if getattr(self, name) is None),
        )


@dataclass(frozen=True)
class Limits:
    """A budget with every limit in bytes.

    Attributes:
        host: bytes of resident memory.
        device: bytes on the device (0 on a CPU).
        disk: bytes of the run directory.
        automatic: names of the limits that were drawn from what is free.
        workers: worker processes that share the host memory; 0 where one process does all.
        driver: bytes of host memory that the process takes which hands out their tasks.
        shared: bytes of host memory of all these processes together, of which ``host`` is what each worker may take.
    """

    host: int
    device: int
    disk: int
    automatic: tuple[str, ...] = ()
    workers: int = 0
    driver: int = 0
    shared: int = 0

    def of_one_worker(self, workers: int, driver: int) -> Limits:
        """What is left to each of several worker processes; every one has a device of its own, and all share the disk.

        Args:
            workers: how many.
            driver: bytes of host memory of the process that hands out their tasks.

        >>> Limits(host=10, device=5, disk=7).of_one_worker(2, 4).host
        3
        """
        each = max(0, self.host - driver) // workers
        return replace(self, host=each, workers=workers, driver=driver, shared=self.host)

    def all_bytes(self, name: str, count: int) -> int:
        """What all processes take together of a memory, of which one takes so many bytes.

        >>> Limits(host=3, device=5, disk=7, workers=2, driver=4).all_bytes("host", 3)
        10
        """
        return self.workers * count + self.driver if self.workers and name == "host" else count

    def describe(self, name: str) -> str:
        """Print one limit, with a mark if it was automatic.

        >>> Limits(host=2**30, device=0, disk=0, automatic=("host",)).describe("host")
        '1.0 GiB (automatic)'
        """
        size = self.shared if self.workers and name == "host" else getattr(self, name)
        return format_bytes(size) + (" (automatic)" if name in self.automatic else "")
