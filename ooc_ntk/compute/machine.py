"""What this machine has: memory of process, host and device, and the rates of its matrix products."""

from __future__ import annotations

import ctypes
import gc
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import torch
from threadpoolctl import threadpool_limits


def resident_bytes(*, children: bool = False) -> int:
    """Resident memory of this process now, in bytes; with ``children`` that of its living children added."""
    total = 0
    for process in _processes(children):
        with suppress(psutil.Error):  # one that has just ended
            total += int(process.memory_info().rss)
    return total


def peak_resident_bytes(*, children: bool = True) -> int:
    """Highest resident memory of this process so far, in bytes; with ``children`` that of its living children added.

    Linux reads ``VmHWM``; elsewhere the present resident size is the best there is.
    """
    return sum(_high_water(process.pid) for process in _processes(children))


def _processes(children: bool) -> list[psutil.Process]:
    process = psutil.Process()
    if not children or _childless():
        return [process]
    return [process, *process.children(recursive=True)]


def _childless() -> bool:
    """Whether Linux says that no thread of this process has a child; psutil reads every process of the machine."""
    try:
        return not any((thread / "children").read_text() for thread in Path("/proc/self/task").iterdir())
    except OSError:  # another system, or a thread has just ended and its children are another one's now
        return False


def _high_water(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return int(psutil.Process(pid).memory_info().rss)
    except (OSError, psutil.Error):
        return 0


def free_host_bytes() -> int:
    """Host memory this process may still take, in bytes: what is available, or less if its cgroups leave less."""
    free = int(psutil.virtual_memory().available)
    for limit, used in _cgroup_files():
        try:
            allowed, taken = limit.read_text().strip(), used.read_text().strip()
        except OSError:
            continue
        if allowed.isdigit():
            free = min(free, max(0, int(allowed) - int(taken) + _reclaimable_bytes(used.parent)))
    return free


def _reclaimable_bytes(folder: Path) -> int:
    """File cache of a memory cgroup that the system gives back when memory is short, in bytes."""
    try:
        lines = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(lines.get("total_inactive_file", lines.get("inactive_file", 0)))


def _cgroup_files() -> Iterator[tuple[Path, Path]]:
    """Limit and usage files of the memory cgroups this process is in, version 2 (every ancestor) and 1."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    root = Path("/sys/fs/cgroup")
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            folder = root / path.lstrip("/")
            for parent in (folder, *folder.parents):
                yield parent / "memory.max", parent / "memory.current"
                if parent == root:
                    break
        elif "memory" in controllers.split(","):
            folder = root / "memory" / path.lstrip("/")
            yield folder / "memory.limit_in_bytes", folder / "memory.usage_in_bytes"
            yield root / "memory/memory.limit_in_bytes", root / "memory/memory.usage_in_bytes"


def device_memory(device: str) -> tuple[int, int]:
    """Free bytes on the device and bytes this process holds there; (0, 0) for the CPU."""
    if torch.device(device).type != "cuda":
        return 0, 0
    free, _ = torch.cuda.mem_get_info(device)
    return int(free), int(torch.cuda.memory_reserved(device))


def peak_device_bytes(device: str) -> int:
    """Highest device memory reserved by this process, in bytes; 0 for the CPU."""
    return int(torch.cuda.max_memory_reserved(device)) if torch.device(device).type == "cuda" else 0


def return_free_memory() -> None:
    """Give memory that was freed back to the system, where the allocators would keep it (glibc, torch on a device).

    No garbage collection: tensors go with their last reference, and one takes 0.15 s with torch loaded (measured).
    """
    return_host_memory()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


def return_host_memory() -> None:
    """Give host memory that was freed back to the system, where the allocator would keep it (glibc)."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def return_device_memory(device: str) -> None:
    """Give device memory that torch's allocator keeps back to the device; does nothing on a CPU."""
    gc.collect()  # graphs of a pass that failed hold on to each other
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def limited_threads(threads: int) -> Iterator[None]:
    """Run with ``threads`` CPU threads in torch and in BLAS, and set them back after.

    The count changes the order of floating-point sums, so it belongs to the plan.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(threads, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def steady_allocator() -> Iterator[None]:
    """Keep memory that is freed and wanted again at once in the process, for the time of a run (glibc).

    Gradients of tens of MiB are freed and allocated for every row; left alone, glibc gives them back to the system each
    time and every page is faulted in anew (measured: a fifth of the time of a ResNet's rows). What a phase leaves is
    given back by :func:`return_free_memory`.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL("libc.so.6")
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    libc.mallopt(mmap_threshold, 2**25)
    libc.mallopt(trim_threshold, 2**30)
    try:
        yield
    finally:
        libc.mallopt(trim_threshold, 2**26)
        libc.malloc_trim(0)


class PeakSampler:
    """Context manager that samples resident memory and keeps the highest increase.

    ``VmHWM`` cannot be used for this: it never falls, so a second measurement below the first would read as zero.

    Attributes:
        increase: highest resident bytes above those at the start.
    """

    def __init__(self, interval_seconds: float = 0.002) -> None:
        """Prepare; ``interval_seconds`` is the time between samples."""
        self.increase = 0
        self._interval = interval_seconds
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._start = 0
        self._process = psutil.Process()

    def _watch(self) -> None:
        while not self._done.is_set():
            self.increase = max(self.increase, self._process.memory_info().rss - self._start)
            self._done.wait(self._interval)

    def __enter__(self) -> PeakSampler:
        self._start = self._process.memory_info().rss
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.increase = max(self.increase, self._process.memory_info().rss - self._start)


def machine_name(device: str, threads: int) -> str:
    """Name under which rates are cached: host, processor, device, threads and torch version."""
    kind = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu"
    version = torch.__version__.split("+")[0]
    return f"{platform.node()}/{platform.machine()}/{kind}/{threads} threads/torch {version}/numpy {np.__version__}"


def best_seconds(work: Callable[[], object], *, budget_seconds: float = 0.3, repeats: int = 20) -> float:
    """Best of a few timings of ``work``, after one run to warm up, in seconds."""
    work()
    best, spent = float("inf"), 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        took = time.perf_counter() - start
        best, spent = min(best, took), spent + took
        if spent > budget_seconds:
            break
    return best


def memory_rates() -> tuple[float, float]:
    """Rates at which float32 rows are copied and their norms taken.

    Returns:
        Bytes/s into memory that is touched for the first time, and into memory that was touched before.
    """
    source = torch.ones(2**20)
    slab = torch.empty(16, 2**20)

    def work() -> None:
        for row in slab:
            row.copy_(source)
            np.vecdot(row.numpy(), row.numpy())

    start = time.perf_counter()
    work()
    fresh = time.perf_counter() - start
    size = slab.numel() * 4
    return size / fresh, size / best_seconds(work)


def host_to_device_rate(device: str) -> float:
    """Bytes/s from host to device; 0 for the CPU."""
    if torch.device(device).type != "cuda":
        return 0.0
    source = torch.ones(2**24).pin_memory()

    def work() -> None:
        source.to(device, non_blocking=True)
        torch.cuda.synchronize(device)

    return source.numel() * 4 / best_seconds(work)
