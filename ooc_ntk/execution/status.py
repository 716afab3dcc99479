"""What became of a run: promises beside measurements, progress, provenance."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from ooc_ntk.errors import StorageError
from ooc_ntk.planning.plan import Plan
from ooc_ntk.storage.directory import RunDirectory
from ooc_ntk.storage.manifest import Manifest


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
        disk_bytes: present size of the run directory.
        bytes_read: measured bytes read by tasks.
        bytes_written: measured bytes written by tasks.
        job_digests: digests of model, data and kernel settings.
        versions: versions of what computed it.
        phases: measured seconds by what was done in them, longest first; what tasks spend between phases is left out.
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

    @property
    def finished(self) -> bool:
        """Whether the kernel is complete."""
        return self.kernel_tiles_done == self.kernel_tiles

    @property
    def seconds(self) -> float:
        """Measured seconds of all tasks."""
        return self.rows_seconds + self.kernel_seconds

    def to_json(self) -> str:
        """Figures as JSON: promises, measurements, digests."""
        promised = self.plan.promised
        return json.dumps(
            {
                "path": str(self.path),
                "finished": self.finished,
                "kernel_tiles": [self.kernel_tiles_done, self.kernel_tiles],
                "promised": asdict(promised),
                "measured": {
                    "host_bytes": self.host_bytes,
                    "device_bytes": self.device_bytes,
                    "disk_bytes": self.disk_bytes,
                    "seconds": self.seconds,
                    "rows_seconds": self.rows_seconds,
                    "kernel_seconds": self.kernel_seconds,
                    "bytes_read": self.bytes_read,
                    "bytes_written": self.bytes_written,
                    "phases": self.phases,
                },
                "plan": self.plan.digest,
                "job": self.job_digests,
                "versions": self.versions,
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
        raise StorageError(f"{directory.root} holds no run: there is no plan.json in it")
    plan = Plan.load(directory.plan_path)
    manifest = Manifest(directory.root, read_only=True)
    try:
        receipts = manifest.receipts()
        job, versions = manifest.meta("job"), manifest.meta("versions")
    finally:
        manifest.close()
    last = f"kernel-{len(plan.passes) - 1}-"
    seconds = {
        kind: sum(receipt.seconds for key, receipt in receipts.items() if key.startswith(kind))
        for kind in ("rows", "kernel")
    }
    phases: Counter[str] = Counter()
    for receipt in receipts.values():
        phases.update(receipt.phases)
    return RunInfo(
        path=directory.root,
        plan=plan,
        kernel_tiles_done=sum(key.startswith(last) for key in receipts),
        kernel_tiles=plan.sample_grid.kernel_tile_count,
        rows_seconds=seconds["rows"],
        kernel_seconds=seconds["kernel"],
        host_bytes=max((receipt.peak_host_bytes for receipt in receipts.values()), default=0),
        device_bytes=max((receipt.peak_device_bytes for receipt in receipts.values()), default=0),
        disk_bytes=directory.size_bytes(),
        bytes_read=sum(receipt.bytes_read for receipt in receipts.values()),
        bytes_written=sum(receipt.bytes_written for receipt in receipts.values()),
        job_digests=json.loads(job or "{}"),
        versions=json.loads(versions or "{}"),
        phases=dict(phases.most_common()),
    )
