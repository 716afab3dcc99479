"""What every task body of a run shares: plan, model, data, stores, and the wish to stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

import numpy as np
import psutil
import torch

from ooc_ntk.compute.capture import Capture
from ooc_ntk.compute.contract import KernelAccumulator, check_precision, tf32
from ooc_ntk.compute.device import deterministic_device
from ooc_ntk.compute.finite import all_finite
from ooc_ntk.compute.fused import load_fused
from ooc_ntk.compute.jacobian import ModelBatch, ModelFunction
from ooc_ntk.compute.machine import (
    limited_threads,
    peak_resident_bytes,
    return_device_memory,
    return_free_memory,
    return_host_memory,
    steady_allocator,
)
from ooc_ntk.compute.streams import DeviceFeed, Queues, queues_of
from ooc_ntk.compute.structure import Structure
from ooc_ntk.errors import NonFiniteError, RunInterrupted, StorageError
from ooc_ntk.inputs.samples import Samples, SampleSource
from ooc_ntk.planning.budget import WORKER_BYTES
from ooc_ntk.planning.memory import DECODERS, STANDING
from ooc_ntk.planning.plan import Plan
from ooc_ntk.planning.superblocks import Superblock
from ooc_ntk.planning.tiles import Range
from ooc_ntk.stopping import Stop
from ooc_ntk.storage.arrays import TileArray
from ooc_ntk.storage.atomic import FileRecord
from ooc_ntk.storage.directory import RunDirectory
from ooc_ntk.storage.files import Staged
from ooc_ntk.storage.local import free_disk_bytes
from ooc_ntk.storage.retries import retries
from ooc_ntk.units import STORED_DTYPE, format_bytes

from .factorring import FactorRing
from .features import Projector, projector_of
from .stores import DeviceTile, Matrix, TileStore

#: Name of the Zarr array of the finished kernel.
KERNEL: Final = "kernel.zarr"


class SampleReader:
    """Train and test samples as one sequence, train first."""

    def __init__(self, train: SampleSource, test: SampleSource | None) -> None:
        """Join two sources; ``test`` may be None."""
        self.train, self.test = train, test

    def __len__(self) -> int:
        return len(self.train) + (len(self.test) if self.test is not None else 0)

    def order(self, samples: Range) -> np.ndarray | None:
        """The order in which texts of a tile are derived: train before test, each from short to long.

        Returns:
            Their numbers counted from the tile's first, (samples,) int64; None where samples are no texts.
        """
        if self.train.lengths is None or (self.test is not None and self.test.lengths is None):
            return None
        parts, train = [], len(self.train)
        for source, start, stop, offset in (
            (self.train, samples.start, min(samples.stop, train), 0),
            (self.test, max(samples.start, train), samples.stop, train),
        ):
            if source is not None and start < stop:
                assert source.lengths is not None
                lengths = source.lengths[start - offset : stop - offset].numpy()
                parts.append(np.argsort(lengths, kind="stable") + (start - samples.start))
        return np.concatenate(parts)

    def by_length(self, samples: Range, batch: int) -> Iterator[tuple[list[int], Samples]]:
        """Texts of a tile in batches of about one length, each cut at its longest text; train and test do not mix.

        Yields:
            The numbers of a batch's samples and the samples.

        Raises:
            NonFiniteError: if an input holds NaN or infinity.
        """
        order = self.order(samples)
        assert order is not None
        train = len(self.train)
        for source, offset in ((self.train, 0), (self.test, train)):
            numbers = [n for n in (order + samples.start).tolist() if (n >= train) == (offset > 0)]
            if source is None or not numbers:
                continue
            assert source.lengths is not None
            first = min(numbers)
            whole = source.fetch(first - offset, max(numbers) + 1 - offset)
            self._check_finite(whole, first)
            for start in range(0, len(numbers), batch):
                chosen = numbers[start : start + batch]
                places = torch.tensor([number - first for number in chosen])
                longest = int(source.lengths[[number - offset for number in chosen]].max())
                yield chosen, trimmed(taken(whole, places), source.length, longest)

    def pieces(self, samples: Range, batch: int, *, ahead: bool = False) -> Iterator[tuple[Range, Samples]]:
        """Read a range of samples in batches that do not mix train and test.

        Args:
            samples: the range.
            batch: samples per batch.
            ahead: whether sources that decode do so ahead, with their loader workers.

        Yields:
            The global range of a batch and its samples.

        Raises:
            NonFiniteError: if an input holds NaN or infinity.
        """
        train, start = len(self.train), samples.start
        parts: list[tuple[SampleSource, int, list[tuple[int, int]]]] = []
        while start < samples.stop:
            in_train = start < train
            stop = min(start + batch, samples.stop, train if in_train else samples.stop)
            offset = 0 if in_train else train
            source = self.train if in_train or self.test is None else self.test
            if not parts or parts[-1][1] != offset:
                parts.append((source, offset, []))
            parts[-1][2].append((start - offset, stop - offset))
            start = stop
        for source, offset, ranges in parts:
            read = source.stream(ranges) if ahead else (source.fetch(*part) for part in ranges)
            for (first, last), found in zip(ranges, read, strict=True):
                self._check_finite(found, offset + first)
                yield Range(offset + first, offset + last), found

    def close(self) -> None:
        """Give back what the sources hold for another pass."""
        for source in (self.train, self.test):
            if source is not None:
                source.close()

    def _check_finite(self, samples: Samples, start: int) -> None:
        for value in (*samples.args, *samples.kwargs.values()):
            if not all_finite(value):
                flat = torch.isfinite(value).reshape(value.shape[0], -1).all(1)
                index = start + int((~flat).nonzero()[0])
                train = len(self.train)
                where = f"train sample {index}" if index < train else f"test sample {index - train}"
                raise NonFiniteError(f"the inputs hold NaN or infinity, first in {where}; clean the data")


def taken(samples: Samples, places: torch.Tensor | slice) -> Samples:
    """Some samples of a range by their places in it."""
    return Samples(
        tuple(value[places] for value in samples.args),
        {name: value[places] for name, value in samples.kwargs.items()},
        None if samples.targets is None else samples.targets[places],
    )


def trimmed(samples: Samples, length: int | None, longest: int) -> Samples:
    """Texts cut to fewer tokens: every tensor whose second axis counts them."""

    def cut(value: torch.Tensor) -> torch.Tensor:
        return value[:, :longest] if value.ndim > 1 and value.shape[1] == length else value

    return Samples(
        tuple(cut(value) for value in samples.args),
        {name: cut(value) for name, value in samples.kwargs.items()},
        None if samples.targets is None else cut(samples.targets),
    )


@dataclass
class PeakMeter:
    """Peak resident memory since the run began.

    The kernel's high-water mark is exact but covers the whole life of the process; where it has not risen during the
    run, samples of the resident size are the best there is.

    Attributes:
        children: whether child processes are counted; workers, which are children of the driver, count themselves.
    """

    children: bool = True
    _mark: int = field(init=False)
    _sampled: int = 0
    _done: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        """Take the mark that is there."""
        self._mark = peak_resident_bytes(children=self.children)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Sample in the background."""
        thread = threading.Thread(target=self._watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join()

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._done.wait(0.02):
            self._sampled = max(self._sampled, process.memory_info().rss)

    def peak_bytes(self) -> int:
        """Peak resident bytes since the run began."""
        mark = peak_resident_bytes(children=self.children)
        return mark if mark > self._mark else max(self._sampled, psutil.Process().memory_info().rss)


@dataclass
class RunContext:
    """What task bodies share. One per process; one task at a time.

    Attributes:
        plan: the plan.
        directory: the run directory.
        function: model and chosen parameters on the plan's device.
        reader: train and test samples.
        store: Jacobian tiles.
        stop: the wish to stop.
        meter: peak memory since the run began.
        advance: called with (phase, amount) as work gets done: samples for ``rows``, tiles for ``kernel``.
        digests: known digests of sample ranges by row tile, from earlier passes and sessions.
        records: committed files by path, kept up to date by the driver.
        tiles_only: keys of ``rows`` tasks that are finished but for their tiles, which were lost.
        structure: what layer rules cover of the model.
        disk_margin: free bytes of the run's file system below which the run stops; 0 lets it fill the disk.
        batch_size: samples derived together: as planned, or fewer once the device had no room for them.
        frugal: whether the device had no room for a kernel task as planned, so that no panels stay there or are copied
            ahead; that changes no bits.
        retries_counted: retries of this process that are in a receipt, or were before the run.
        phases: wall-clock of the phases of the task at hand, by name.
        kept: panels that stay in memory while kernel tiles are contracted, by span and row tile.
        worker: name of this process among the workers of a cluster; empty for the driver itself.
    """

    plan: Plan
    directory: RunDirectory
    function: ModelFunction
    reader: SampleReader
    store: TileStore
    stop: Stop
    meter: PeakMeter
    advance: Callable[[str, float], None]
    digests: dict[int, str]
    records: Mapping[str, FileRecord]
    tiles_only: set[str] = field(default_factory=set)
    structure: Structure = field(default_factory=Structure)
    disk_margin: int = 0
    batch_size: int = 0
    frugal: bool = False
    retries_counted: int = field(default_factory=retries)
    phases: dict[str, float] = field(default_factory=dict)
    kept: dict[tuple[int, int], DeviceTile] = field(default_factory=dict)
    worker: str = ""
    _buffers: list[Matrix] = field(default_factory=list)
    _feed: DeviceFeed | None = None
    _queues: Queues | None = None
    _ring: FactorRing | None = None
    _sums: torch.Tensor | None = None
    _accumulator: KernelAccumulator | None = None
    _projector: Projector | None = None
    _phase: str = ""
    _process: psutil.Process = field(default_factory=psutil.Process)

    def __post_init__(self) -> None:
        """Derive as many samples together as planned, unless told otherwise."""
        self.batch_size = self.batch_size or self.plan.batch_size

    @cached_property
    def plan_digest(self) -> str:
        """Digest of the plan."""
        return self.plan.digest

    @property
    def kernel_array(self) -> TileArray:
        """The finished kernel: (samples · entries, train · entries), one chunk per kernel tile."""
        plan, edge = self.plan, self.plan.tile_samples * self.plan.entries_per_sample
        return TileArray(self.directory.files, KERNEL, plan.kernel_shape, (edge, edge), STORED_DTYPE[plan.precision])

    @property
    def diagonal_array(self) -> TileArray:
        """The diagonal of all samples: (samples · entries,), float64."""
        plan, edge = self.plan, self.plan.tile_samples * self.plan.entries_per_sample
        return TileArray(self.directory.files, "diagonal", (plan.kernel_shape[0],), (edge,), "<f8")

    def capture(self, names: Sequence[str]) -> Capture:
        """What derives parameters that layer rules cover."""
        rows, shorter = self.plan.rows_per_sample, self.plan.by_length
        return Capture(self.function, self.structure, names, rows, shorter=shorter)

    def stored_order(self, row: int) -> np.ndarray | None:
        """Natural place of every stored sample of a row tile; None where samples are stored as they come."""
        return self.reader.order(self.plan.sample_grid.rows(row)) if self.plan.by_length else None

    def projector(self) -> Projector:
        """What derives and projects rows, made once: it keeps its buffers from task to task."""
        if self._projector is None:
            self._projector = projector_of(self.plan, self.function, self.capture)
        return self._projector

    @cached_property
    def _standing_bytes(self) -> tuple[int, int]:
        """Host bytes of this process that its plan promises, and those of them that stay between batches."""
        plan = self.plan
        decoders = plan.host_terms.get(DECODERS, 0)
        promised = plan.promised.host_bytes
        if self.worker:
            promised = plan.process_bytes or promised + WORKER_BYTES
        taken = sum(size for term, size in plan.host_terms.items() if term not in STANDING)
        return promised - decoders, promised - decoders - taken

    def resident_bytes(self) -> int:
        """Resident memory of this process now, in bytes; some twenty microseconds."""
        return int(self._process.memory_info().rss)

    def settle(self, coming: int | None = None) -> None:
        """Give freed memory back where what the allocator keeps of it would take the process past its promise.

        Blocks of tens of MiB that come and go leave gaps in which small ones settle; the next large one then takes new
        memory, again and again (measured: 200 MiB of gaps beside 110 in use, of 500 samples of 1.6 MB each).

        Args:
            coming: bytes that may be taken before the next call; None, between batches, where those of a task are free
                and may all be taken anew.
        """
        promised, standing = self._standing_bytes
        if self.resident_bytes() > (standing if coming is None else promised - coming):
            return_host_memory()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the body to a phase of the task at hand."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - start

    def accumulator(self) -> KernelAccumulator:
        """The reused accumulator of kernel tiles."""
        if self._accumulator is None:
            edge = self.plan.tile_samples * self.plan.entries_per_sample
            self._accumulator = KernelAccumulator(edge, self.plan.precision, self.plan.device)
        return self._accumulator

    def superblock_sums(self, block: Superblock) -> list[torch.Tensor]:
        """Reused memory for the sums of a superblock's tiles, as they are stored: (edge²,) each; none for one tile."""
        if len(block.tiles) == 1:
            return []
        if self._sums is None:
            most = max(len(each.tiles) for each in self.plan.superblocks)
            edge = self.plan.tile_samples * self.plan.entries_per_sample
            kind = torch.float64 if self.plan.precision == "float64" else torch.float32
            self._sums = torch.empty(most, edge * edge, dtype=kind, device=self.plan.device)
        return list(self._sums[: len(block.tiles)])

    def panel_buffers(self, count: int) -> list[Matrix]:
        """Reused buffers for panels; none where tiles are in memory."""
        while len(self._buffers) < count:
            buffer = self.store.buffer()
            if buffer is None:
                return []
            self._buffers.append(buffer)
        return self._buffers[:count]

    @property
    def queues(self) -> Queues:
        """Queues of the plan's device."""
        if self._queues is None:
            self._queues = queues_of(self.plan.device)
        return self._queues

    def feed(self) -> DeviceFeed:
        """What brings panels to the device, with its reused memory."""
        if self._feed is None:
            self._feed = DeviceFeed(self.queues, self.store.buffer_bytes())
        return self._feed

    def ring(self, spans: Sequence[int]) -> FactorRing:
        """What brings factors of some spans back from the device, batch by batch, with its reused memory."""
        batch = min(self.batch_size, self.plan.tile_samples)
        if self._ring is None or not self._ring.fits(spans, batch):
            self._ring = None
            self._ring = FactorRing(self.queues, self.store, spans, batch)
        return self._ring

    def finish(self) -> None:
        """Wait for all that was to be computed on the device."""
        if self.queues.overlapping:
            with self.phase("wait for the device"):
                self.queues.finish()

    def enter(self, phase: str) -> None:
        """Note which kind of task runs, and give back what the other kind held: the plan counts only one of them."""
        if phase != self._phase:
            if phase != "kernel":
                self._accumulator = self._sums = self._feed = None
                self.kept.clear()
                self._buffers.clear()
            if phase != "rows":
                self._projector = self._ring = None
            return_free_memory()
            self._phase = phase

    def check_stop(self) -> None:
        """Raise if the run should stop, or the disk gets too full.

        Raises:
            RunInterrupted: if it should.
            StorageError: if less is free than the margin that was asked for.
        """
        if self.stop.event.is_set():
            raise RunInterrupted(
                f"stopped; finished tiles are kept in {self.directory.root}, the same command goes on from there",
                self.stop.signal,
            )
        self.check_disk()

    def check_disk(self) -> None:
        """Raise if less disk is free than the margin that was asked for.

        Raises:
            StorageError: then.
        """
        if self.disk_margin and (free := free_disk_bytes(self.directory.local)) < self.disk_margin:
            raise StorageError(
                f"{format_bytes(free)} of disk are free at {self.directory.local}, and --watch-disk keeps "
                f"{format_bytes(self.disk_margin)} free; make room and run the same command again, finished tiles are "
                "kept"
            )

    def drop_buffers(self) -> None:
        """Give back what is kept from task to task, and what the device's allocator keeps."""
        self._accumulator = self._projector = self._sums = self._feed = self._ring = None
        self.kept.clear()
        self._buffers.clear()
        return_free_memory()
        return_device_memory(self.plan.device)

    def batch(self, samples: Samples) -> ModelBatch:
        """Samples on the plan's device in its precision."""
        bring = self.queues.bring
        there = ModelBatch(
            tuple(bring(value) for value in samples.args),
            {name: bring(value) for name, value in samples.kwargs.items()},
            None if samples.targets is None else bring(samples.targets),
        )
        return there.to(self.plan.device, self.plan.precision)


@dataclass
class Outcome:
    """What a task body leaves behind.

    Attributes:
        files: staged files, complete but not yet published.
        bytes_read: bytes read from disk.
        digest: digest of the samples (``rows`` tasks).
        replaces: files of the generation before, which may go once this task is committed.
        bytes_aside: bytes written to files that are gone already.
    """

    files: Sequence[Staged] = ()
    bytes_read: int = 0
    digest: str | None = None
    replaces: tuple[str, ...] = ()
    bytes_aside: int = 0


@contextmanager
def reproducible(plan: Plan) -> Iterator[None]:
    """Run under the plan's thread count and precision, with deterministic algorithms; set everything back after."""
    # Not use_deterministic_algorithms, which imports torch's compiler first (0.8 s).
    deterministic = torch.get_deterministic_debug_mode()
    memory: Any = torch.utils.deterministic
    filling = memory.fill_uninitialized_memory
    check_precision(plan.precision, plan.device)
    if any(block.fused for block in plan.blocks):
        load_fused()  # refuses before anything is derived
    kind = torch.device(plan.device).type
    products = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    with (
        limited_threads(plan.threads),
        steady_allocator(),
        tf32(allowed=False),
        deterministic_device(),
        torch.autocast(kind, enabled=False),
    ):
        torch.set_deterministic_debug_mode("warn")
        memory.fill_uninitialized_memory = False
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(products)
            torch.set_deterministic_debug_mode(deterministic)
            memory.fill_uninitialized_memory = filling
