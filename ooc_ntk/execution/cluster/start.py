"""Starting worker processes on this machine, or connecting to a cluster that is there."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from importlib.metadata import version
from typing import Any, Final

import dask
from distributed import Client, LocalCluster, SpecCluster, Status, performance_report
from distributed.diagnostics.plugin import WorkerPlugin
from tornado.ioloop import IOLoop
from tornado.platform.asyncio import BaseAsyncIOLoop

from ooc_ntk.errors import ClusterError, InputError
from ooc_ntk.extras import how_to_install

from .options import Cluster

logger = logging.getLogger(__name__)

#: Seconds to wait for an answer of a scheduler (chosen: an address that is wrong is noticed while one still looks).
CONNECT_SECONDS: Final = 10.0

#: How often each process on this machine is begun again when it ended at its start.
REVIVED_TIMES: Final = 20

#: Seconds to wait for workers to forget a session; those that do not answer are lost or hung.
FORGET_SECONDS: Final = 5.0

#: What names of sessions begin with; the client's follows.
_SESSION: Final = "ooc-ntk~"

#: Seconds to wait until all workers are told of a session.
REGISTER_SECONDS: Final = 30.0

#: How often workers are told of a session, where some die meanwhile.
REGISTER_TIMES: Final = 5


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
        found = {}
        for name, spec in super().new_worker_spec().items():  # the very same object for every process
            device = self._devices[self._started % len(self._devices)]
            options = {**spec["options"], "env": {**spec["options"]["env"], "CUDA_VISIBLE_DEVICES": device}}
            found[name] = {**spec, "options": options}
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
    """
    with ExitStack() as opened:
        if isinstance(options.scheduler, Client):
            client = options.scheduler
        elif options.scheduler is not None:
            client = opened.enter_context(_connected(options.scheduler))
        else:
            settings = {
                "distributed.scheduler.work-stealing": False,
                "distributed.comm.timeouts.connect": "10s",
                "distributed.worker.daemon": False,  # workers may have processes that decode images
            }
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
        "preload": ["ooc_ntk.execution.cluster.preload"],  # a list: dask-cuda adds its own
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
        logger.info("dask-cuda is not installed (%s): processes are not bound to cores", how_to_install("dask_cuda"))
        return PinnedCluster(devices, **shared)
    cluster: LocalCluster = LocalCUDACluster(CUDA_VISIBLE_DEVICES=visible(devices), device_memory_limit=0, **shared)
    return cluster


def tell(loop: IOLoop | None, call: Coroutine[Any, Any, Any]) -> Future[Any]:
    """Begin a call on the event loop of a client or a cluster, from any other thread."""
    assert isinstance(loop, BaseAsyncIOLoop)
    return asyncio.run_coroutine_threadsafe(call, loop.asyncio_loop)


class Own:
    """Worker processes that were begun here: those whose starter has given up are begun again."""

    def __init__(self, client: Client | None) -> None:
        """Look after the processes of the cluster that a client was begun with; None if others look after them."""
        found = None if client is None else client.cluster
        self._cluster = found if isinstance(found, SpecCluster) else None
        self._left = REVIVED_TIMES * self.wanted

    @property
    def is_ours(self) -> bool:
        """Whether the processes were begun here."""
        return self._cluster is not None

    @property
    def wanted(self) -> int:
        """Processes that should be there; 0 if they are someone else's."""
        return 0 if self._cluster is None else len(self._cluster.worker_spec)

    def revive(self) -> None:
        """Begin processes again that ended while they were being begun; a nanny gives up on those.

        It returns at once.
        """
        cluster = self._cluster
        if cluster is None or not self._left:
            return
        self._left -= 1

        async def again() -> None:
            for name, nanny in list(cluster.workers.items()):
                if nanny.status in (Status.closed, Status.closing, Status.failed):
                    del cluster.workers[name]
            await cluster._correct_state()

        tell(cluster.loop, again())

    def retire(self, name: str) -> None:
        """Begin a process no more."""
        if self._cluster is not None:
            for key in [key for key in self._cluster.worker_spec if str(key) == name]:
                del self._cluster.worker_spec[key]


def has_dashboard(client: Client) -> bool:
    """Whether the scheduler serves a dashboard; where it says nothing, there is none."""
    scheduler: Any = client.scheduler
    with suppress(Exception):
        found = tell(client.loop, scheduler.identity(n_workers=0)).result(CONNECT_SECONDS)
        return bool(client.dashboard_link) and "dashboard" in found["services"]
    return False


def session_name(client: Client) -> str:
    """A name for a new session of a client."""
    return f"{_SESSION}{client.id}~{uuid.uuid4().hex[:12]}"


def forget_dead(client: Client) -> None:
    """Have workers forget sessions whose driver was killed: they hold a model and its buffers.

    A scheduler that does not answer, or runs no functions for its clients, is left as it is.
    """

    def dead(dask_scheduler: Any) -> list[str]:  # sent as it stands: the scheduler need not have this package
        names = [name for name in dask_scheduler.worker_plugins if name.startswith("ooc-ntk~")]
        return [name for name in names if name.split("~")[1] not in dask_scheduler.clients]

    with suppress(Exception):
        for name in tell(client.loop, client._run_on_scheduler(dead)).result(FORGET_SECONDS):
            logger.info("forgetting session %s, whose driver is gone", name)
            tell(client.loop, client._unregister_worker_plugin(name))


def register(client: Client, plugin: WorkerPlugin, name: str, check_stop: Callable[[], None]) -> None:
    """Send something to every worker there is and every one that joins later.

    A worker that hangs is not waited for: whatever it does not know it says when it is asked to use it.

    Args:
        client: the client.
        plugin: what is sent.
        name: its name.
        check_stop: raises if the run should stop.

    Raises:
        ClusterError: if workers cannot take it.
    """
    failure: list[BaseException] = []

    def tell_all() -> None:
        for attempt in range(REGISTER_TIMES):
            try:
                client.register_plugin(plugin, name=name)
            except OSError as error:  # a worker died while it was told
                if attempt + 1 == REGISTER_TIMES:
                    failure.append(error)
                time.sleep(1.0)
            except BaseException as error:  # noqa: BLE001 - raised by the caller
                failure.append(error)
                return
            else:
                return

    thread = threading.Thread(target=tell_all, name="ooc-ntk-register", daemon=True)
    thread.start()
    until = time.monotonic() + REGISTER_SECONDS
    while thread.is_alive() and time.monotonic() < until:
        thread.join(0.1)
        check_stop()
    if not failure:
        return
    if isinstance(failure[0], ImportError):
        raise ClusterError(
            f"a worker cannot load this package ({failure[0]}); install ooc-ntk {version('ooc-ntk')} in its environment"
        ) from failure[0]
    raise ClusterError(f"workers cannot be told what to do: {failure[0]}; run the same command again") from failure[0]
