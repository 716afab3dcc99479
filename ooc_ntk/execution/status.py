"""What became of a run: promises beside measurements, progress, provenance."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ooc_ntk.algebra.kernel import Kernel, no_run
from ooc_ntk.errors import StorageError
from ooc_ntk.planning.plan import Plan
from ooc_ntk.storage.again import AUDIT
from ooc_ntk.storage.directory import RunDirectory
from ooc_ntk.storage.manifest import Manifest, Receipt
from ooc_ntk.storage.results import results_bytes
from ooc_ntk.storage.swap import HISTORY, Generations

from .audit import Audit
from .concurrent import peak_host_bytes, wall_seconds
from .proof import Proof


@dataclass(frozen=True)
class RunInfo:
    """A run as it stands.

    Attributes:
        path: the run directory.
        plan: its plan.
        kernel_tiles_done: kernel tiles that are committed in their last generation.
        kernel_tiles: kernel tiles in all.
        rows_seconds: measured seconds of ``rows`` tasks.
        kernel_seconds: measured seconds of ``kernel`` tasks.
        host_bytes: measured peak resident memory.
        device_bytes: measured peak device memory.
        disk_bytes: present size of the run directory and of what is in its store, results and reports left out.
        bytes_read: measured bytes read by tasks.
        bytes_written: measured bytes written by tasks.
        moved_bytes: measured bytes that kernel tasks read and wrote (Q); 0 unless tiles are on disk.
        job_digests: digests of model, data and kernel settings.
        versions: versions of what computed it.
        phases: measured seconds by what was done in them, longest first; what tasks spend between phases is left out.
        expected_error: of a projected kernel, the relative error to be expected, from its features once it is finished.
        retries: how often tasks, or calls in them, were tried again.
        micro_batches: of rows for which the device had no room in batches as planned: how many tasks, by batch size.
        layer_traces: what every layer adds to the trace of the train square, by name; empty unless kept by layer.
        audited: what the last ``verify``, or the proof at the end of the run, saw: every check, some recomputed entries
            and their relative error, of a projected kernel the predicted one, and the proof; None if there was none.
        history: the generations that the run was grown from, the earliest first: digests of plan and job, train and
            test samples, versions.
        store: URL of the store that has the tiles; None where they are in the run directory.
        extension: of one that was begun and is not finished, its train samples, kernel tiles that are done (those that
            are copied count), and kernel tiles in all; None if there is none.
        machine: that the run was begun on, in words; empty where it is not known.
    """

    path: Path
    plan: Plan
    kernel_tiles_done: int
    kernel_tiles: int
    rows_seconds: float
    kernel_seconds: float
    host_bytes: int
    device_bytes: int
    disk_bytes: int
    bytes_read: int
    bytes_written: int
    job_digests: dict[str, str]
    versions: dict[str, str]
    phases: dict[str, float]
    moved_bytes: int = 0
    expected_error: float | None = None
    retries: int = 0
    micro_batches: dict[int, int] = field(default_factory=dict)
    layer_traces: dict[str, float] = field(default_factory=dict)
    audited: dict[str, Any] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    store: str | None = None
    extension: tuple[int, int, int] | None = None
    machine: str = ""

    @property
    def finished(self) -> bool:
        """Whether the kernel is complete."""
        return self.kernel_tiles_done == self.kernel_tiles

    @property
    def io_ratio(self) -> float | None:
        """Measured ``Q/LB``, None before the kernel is complete and where nothing is spilled."""
        return self.moved_bytes / self.plan.bound_bytes if self.finished and self.plan.bound_bytes else None

    @property
    def seconds(self) -> float:
        """Measured seconds of all tasks."""
        return self.rows_seconds + self.kernel_seconds

    def _audit(self) -> dict[str, Any] | None:
        """What the last audit saw, without single entries."""
        return None if self.audited is None else {k: v for k, v in self.audited.items() if k != "compared"}

    def to_json(self) -> str:
        """Figures as JSON: promises, measurements, digests."""
        promised = self.plan.promised
        return json.dumps(
            {
                "path": str(self.path),
                "store": self.store,
                "finished": self.finished,
                "kernel_tiles": [self.kernel_tiles_done, self.kernel_tiles],
                "promised": {**asdict(promised), "moved_bytes": self.plan.moved_bytes, "io_ratio": self.plan.io_ratio},
                "measured": {
                    "host_bytes": self.host_bytes,
                    "device_bytes": self.device_bytes,
                    "disk_bytes": self.disk_bytes,
                    "seconds": self.seconds,
                    "rows_seconds": self.rows_seconds,
                    "kernel_seconds": self.kernel_seconds,
                    "bytes_read": self.bytes_read,
                    "bytes_written": self.bytes_written,
                    "moved_bytes": self.moved_bytes,
                    "io_ratio": self.io_ratio,
                    "phases": self.phases,
                    "retries": self.retries,
                    "micro_batches": self.micro_batches,
                },
                "projection": None
                if self.plan.projection is None
                else {"projection": self.plan.projection.identity, "expected_error": self.expected_error},
                "layer_traces": self.layer_traces or None,
                "audit": self._audit(),
                "plan": self.plan.digest,
                "job": self.job_digests,
                "versions": self.versions,
                "machine": self.machine or None,
                "history": self.history,
                "extension": None
                if self.extension is None
                else {"train_samples": self.extension[0], "kernel_tiles": list(self.extension[1:])},
            },
            indent=2,
        )


def run_info(path: str | Path) -> RunInfo:
    """Read what is known of a run; works while it is running.

    Args:
        path: the run directory.

    Returns:
        Its state.

    Raises:
        StorageError: if there is no run.
    """
    directory = RunDirectory(path)
    if not directory.holds_run:
        raise no_run(directory.root)
    plan = Plan.load(directory.plan_path)
    manifest = Manifest(directory.root, read_only=True)
    try:
        receipts = manifest.receipts()
        job, versions = manifest.meta("job"), manifest.meta("versions")
        history, machine = manifest.meta(HISTORY), manifest.meta("machine")
    finally:
        manifest.close()
    seconds = {
        kind: wall_seconds(receipt for key, receipt in receipts.items() if key.startswith(kind))
        for kind in ("rows", "kernel")
    }
    phases: Counter[str] = Counter()
    for receipt in receipts.values():
        phases.update(receipt.phases)
    tiles, done = plan.tile_count, plan.finished_tiles(receipts)
    expected = plan.expected_error
    if plan.projection is not None and done == tiles:
        expected = Kernel(directory.root).expected_error()
    traces: dict[str, float] = {}
    if plan.layers and done == tiles:
        kernel = Kernel(directory.root)
        traces = {name: kernel.layer(name).trace() for name in plan.layers}
    return RunInfo(
        path=directory.root,
        plan=plan,
        kernel_tiles_done=done,
        kernel_tiles=tiles,
        rows_seconds=seconds["rows"],
        kernel_seconds=seconds["kernel"],
        host_bytes=peak_host_bytes(receipts.values()),
        device_bytes=max((receipt.peak_device_bytes for receipt in receipts.values()), default=0),
        disk_bytes=directory.size_bytes() - results_bytes(directory.root),
        bytes_read=sum(receipt.bytes_read for receipt in receipts.values()),
        bytes_written=sum(receipt.bytes_written for receipt in receipts.values()),
        moved_bytes=sum(
            receipt.bytes_read + receipt.bytes_written
            for key, receipt in receipts.items()
            if key.startswith("kernel") and not plan.layout.in_memory
        ),
        job_digests=json.loads(job or "{}"),
        versions=json.loads(versions or "{}"),
        phases=dict(phases.most_common()),
        expected_error=expected,
        retries=sum(receipt.retries for receipt in receipts.values()),
        micro_batches=dict(Counter(receipt.batch_size for receipt in receipts.values() if receipt.batch_size)),
        layer_traces=traces,
        audited=read_audit(directory),
        history=json.loads(history or "[]"),
        store=directory.store,
        extension=_extension(directory.root),
        machine=machine or "",
    )


def _extension(root: Path) -> tuple[int, int, int] | None:
    """Train samples, finished kernel tiles and kernel tiles of a next generation that is being written."""
    coming = RunDirectory(Generations.of(root).next)
    # It may be swapped in, or deleted, at any moment.
    with suppress(StorageError, OSError):
        if coming.holds_run:
            plan = Plan.load(coming.plan_path)
            manifest = Manifest(coming.root, read_only=True)
            try:
                return plan.train_samples, plan.finished_tiles(manifest.keys()), plan.tile_count
            finally:
                manifest.close()
    return None


def run_receipts(path: str | Path) -> list[Receipt]:
    """Receipts of all tasks of a run in the order of their commits, those that were done again more than once.

    Args:
        path: the run directory.

    Returns:
        What ``receipts.jsonl`` has, or where it is not there what the manifest has: the last of each task.

    Raises:
        StorageError: if there is no run.
    """
    directory = RunDirectory(path)
    with suppress(OSError):
        found = []
        for line in directory.receipts_path.read_text().splitlines():
            with suppress(ValueError, KeyError, TypeError):  # the last line of a run that was cut off may be torn
                fields: dict[str, Any] = json.loads(line)
                found.append(Receipt(**fields))
        return found
    manifest = Manifest(directory.root, read_only=True)
    try:
        return list(manifest.receipts().values())
    finally:
        manifest.close()


def keep_audit(directory: RunDirectory, plan: Plan, audit: Audit) -> None:
    """Keep what an audit saw, for ``info``; a run that cannot be written is left as it is."""
    if audit.relative_error is None:
        return
    seen = {
        "relative_error": audit.relative_error,
        "predicted_error": audit.predicted_error,
        "entries": audit.entries,
        "passed": audit.passed,
        "plan": plan.digest,
        "tolerance": audit.tolerance,
        "coverage": audit.coverage,
        "checks": [asdict(check) for check in audit.checks],
        "compared": None if audit.compared is None else audit.compared.figures(),
        "proof": None if audit.proof is None else _proof_fields(plan, audit.proof, "verify"),
    }
    _keep(directory, seen)


def keep_proof(directory: RunDirectory, plan: Plan, proof: Proof, by: str) -> None:
    """Keep what a proof alone saw, in the place of an audit before it, which was of other tiles."""
    _keep(directory, {"passed": proof.passed, "proof": _proof_fields(plan, proof, by)})


def _proof_fields(plan: Plan, proof: Proof, by: str) -> dict[str, Any]:
    worst = proof.worst
    return {
        "plan": plan.digest,
        "by": by,
        "passed": proof.passed,
        "samples": [proof.rows, proof.columns],
        "coverage": proof.coverage,
        "relative_error": worst.error,
        "allowed": worst.allowed,
        "seconds": proof.seconds,
        "line": str(proof),
    }


def _keep(directory: RunDirectory, seen: dict[str, Any]) -> None:
    with suppress(StorageError, OSError):
        directory.write_text(directory.root / AUDIT, json.dumps(seen) + "\n")


def read_audit(directory: RunDirectory) -> dict[str, Any] | None:
    """What the last audit saw, None if there was none."""
    with suppress(OSError, ValueError):
        found: dict[str, Any] = json.loads((directory.root / AUDIT).read_text())
        return found
    return None
