"""Starting worker processes on this machine, or connecting to a cluster that is there."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Final

import dask
from distributed import Client, LocalCluster, performance_report

from ooc_ntk.errors import ClusterError, InputError

from .options import Cluster
from .workers import versions_there

logger = logging.getLogger(__name__)

#: Seconds to wait for an answer of a scheduler (chosen: an address that is wrong is noticed while one still looks).
CONNECT_SECONDS: Final = 10.0

#: Seconds in which processes on this machine must have started (chosen: importing torch takes 2 to 20).
START_SECONDS: Final = 120.0

#: Libraries that must be the same in every process, and those of which a difference may change the last bits.
_SAME: Final = ("ooc-ntk",)
_ALIKE: Final = ("torch", "numpy")


class PinnedCluster(LocalCluster):
    """Processes on this machine, one for every device, which sees that device alone."""

    def __init__(self, devices: tuple[int, ...], **options: Any) -> None:
        """Start one process per device; other arguments as for ``distributed.LocalCluster``."""
        self._devices = visible(devices)
        self._started = 0
        super().__init__(n_workers=0, **options)
        self.scale(len(devices))
        self.sync(self._correct_state)

    def new_worker_spec(self) -> dict[Any, Any]:
        """The next process: the same as others, but for the device that it sees."""
        found: dict[Any, Any] = super().new_worker_spec()
        for spec in found.values():
            device = self._devices[self._started % len(self._devices)]
            spec["options"] = {**spec["options"], "env": {**spec["options"]["env"], "CUDA_VISIBLE_DEVICES": device}}
            self._started += 1
        return found


def visible(devices: tuple[int, ...], environment: Mapping[str, str] | None = None) -> list[str]:
    """What ``CUDA_VISIBLE_DEVICES`` is for a process that should see one of the devices that this one sees.

    Args:
        devices: numbers as torch counts them here.
        environment: of this process; None takes it as it is.

    >>> visible((0, 1), {"CUDA_VISIBLE_DEVICES": "4,7"}), visible((1,), {})
    (['4', '7'], ['1'])
    """
    shown = (os.environ if environment is None else environment).get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in shown.split(",")] if shown else []
    return [names[number] if number < len(names) else str(number) for number in devices]


@contextmanager
def client_of(options: Cluster, threads: int) -> Iterator[Client]:
    """A client of the cluster that is asked for; what was started here is ended again.

    Args:
        options: which cluster.
        threads: CPU threads of a task.

    Yields:
        The client.

    Raises:
        InputError: if there is no scheduler at the address, or processes cannot be started.
        ClusterError: if workers have another version of this package.
    """
    with ExitStack() as opened:
        if isinstance(options.scheduler, Client):
            client = options.scheduler
        elif options.scheduler is not None:
            client = opened.enter_context(_connected(options.scheduler))
        else:
            settings = {"distributed.scheduler.work-stealing": False, "distributed.worker.daemon": True}
            opened.enter_context(dask.config.set(settings))
            cluster = opened.enter_context(_started(options, threads))
            client = opened.enter_context(Client(cluster, set_as_default=False))
        yield client


@contextmanager
def reported(options: Cluster, client: Client) -> Iterator[None]:
    """Write Dask's performance report of the body, if one is asked for."""
    path = options.performance_report
    with client.as_current(), performance_report(str(path)) if path is not None else nullcontext():
        yield


def _connected(address: str) -> Client:
    try:
        return Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        raise InputError(
            f"no Dask scheduler answers at {address} ({' '.join(str(error).split())[:120] or type(error).__name__}); "
            "start one with 'dask scheduler', or leave --scheduler out to run in this process"
        ) from error


def _started(options: Cluster, threads: int) -> LocalCluster:
    """Processes on this machine."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise InputError(
            "worker processes begin by importing the script that started them, and this one starts a run when it is "
            "imported; put what it does under  if __name__ == '__main__':"
        )
    count = str(threads)
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    shared: dict[str, Any] = {
        "threads_per_worker": 1,
        "memory_limit": 0,  # bounded by the plan
        "dashboard_address": "127.0.0.1:0",
        "silence_logs": logging.CRITICAL,
        "env": dict.fromkeys(names, count),
    }
    try:
        if options.devices is None:
            cluster = LocalCluster(n_workers=options.processes, processes=True, **shared)
        else:
            assert isinstance(options.devices, tuple)
            cluster = _on_devices(options.devices, shared)
    except (RuntimeError, OSError, TimeoutError) as error:
        raise InputError(
            f"worker processes could not be started ({' '.join(str(error).split())[:200]}); a script that starts them "
            "must do so under  if __name__ == '__main__':"
        ) from error
    return cluster


def _on_devices(devices: tuple[int, ...], shared: Mapping[str, Any]) -> LocalCluster:
    """One process per device; by dask-cuda where it is installed, which also binds each to the nearest processors."""
    try:
        from dask_cuda import LocalCUDACluster
    except ImportError:
        logger.info(
            "dask-cuda is not installed (pip install 'ooc-ntk[cuda-cluster]'): processes are not bound to cores"
        )
        return PinnedCluster(devices, **shared)
    cluster: LocalCluster = LocalCUDACluster(CUDA_VISIBLE_DEVICES=visible(devices), device_memory_limit=0, **shared)
    return cluster


def check_versions(client: Client, here: Mapping[str, str]) -> list[str]:
    """Compare what computes in the workers with what computes here.

    Args:
        client: the client.
        here: versions by name, as :func:`versions_there` gives them.

    Returns:
        What differs without being refused, for people.

    Raises:
        ClusterError: if a worker has no ooc-ntk, or another version of it.
    """
    found = client.run(versions_there, on_error="return")
    said: dict[str, None] = {}
    for address, there in found.items():
        if isinstance(there, BaseException):
            if "ooc_ntk" not in str(there):
                raise ClusterError(f"worker {address} does not answer: {there}") from there
            raise ClusterError(
                f"worker {address} has no ooc-ntk ({there}); install version {here['ooc-ntk']} in its environment"
            ) from there
        for name in _SAME:
            if there[name] != here[name]:
                raise ClusterError(
                    f"worker {address} has {name} {there[name]}, the driver has {here[name]}; install the same version"
                )
        for name in _ALIKE:
            if there[name] != here[name]:
                said[f"{name} is {there[name]} on {address} and {here[name]} here: the last bits may differ"] = None
    return list(said)
