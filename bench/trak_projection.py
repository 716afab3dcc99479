"""TRAK's projector beside ours on the same gradients: residuals and time on a small network, time on a large one."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import ooc_ntk
from ooc_ntk.execution.prepare import first_samples, prepare

from . import trak_peer
from .bars import Check
from .contenders import DATTRI, absent
from .peers import dattri_peer
from .process import peak_resident_bytes
from .projection_data import RealData, digits
from .projection_records import Outcome, Setting
from .table import aligned, relative_error
from .throughput import Bench, bench_of, large_job, large_title, measure_throughput, reset_peak

#: A figure and its bar: TRAK's projector over ours.
TRAK_OVER_OURS, TRAK_BAR = "TRAK's projector / project (sjlt, expanding included)", 10.0


#: Samples, columns and seeds of the small network.
SMALL = (400, (1024, 4096), 3)


def measure_trak(
    setting: Setting,
    folder: Path,
    outcome: Outcome,
    small: tuple[int, tuple[int, ...], int] = SMALL,
    *,
    dattri: bool = True,
) -> None:
    """TRAK's projector beside ours, and dattri's: residuals and time on the small network, time on the large one."""
    sizes = (24, (64,), 1) if setting.smoke else small
    data = replace(digits(setting, folder, sizes[0], ("sjlt", "rademacher"), sizes[1], sizes[2]), dims=sizes[1])
    exact = np.asarray(ooc_ntk.run(data.job(), folder / "trak-exact", progress=False), dtype=np.float64)
    gradients = _all_gradients(data)
    for dim in data.dims:
        print(f"trak: small network, dim {dim} …", file=sys.stderr, flush=True)
        ours = {kind: _ours(data, kind, dim, exact) for kind in data.kinds}
        outcome.stores += trak_peer.compare_stores(gradients, exact, dim, data.seeds, folder, ours)
    cells = [("projector", "dim", "residual", "predicted", "raw residual", "scale", "ms/sample", "/ sjlt")]
    for store in outcome.stores:
        base = next(other for other in outcome.stores if other.dim == store.dim and other.name == trak_peer.SJLT)
        cells.append(
            (
                store.name,
                f"{store.dim}",
                f"{store.residual:.4f}",
                f"{store.predicted:.4f}",
                f"{store.raw_residual:.4f}",
                f"{store.scale:.4g}",
                f"{store.sample_seconds * 1e3:.3f}",
                f"{store.sample_seconds / base.sample_seconds:.2f}",
            )
        )
    lines = [
        *aligned(cells),
        "  raw residual: of the store as it was written; scale: mean diagonal of its kernel over the exact one's. "
        "TRAK's is opened with open_features(path, parameters=P).",
        "  times: TRAK is given dense gradients, ours expands them from captured factors first; neither derives them.",
    ]
    outcome.table(data.heading("TRAK's BasicProjector on the same gradients"), lines)
    del gradients
    if not outcome.steps:
        measure_throughput(setting, ("sjlt",), outcome)
    _trak_on_large(setting, outcome, dattri=dattri)


def _trak_on_large(setting: Setting, outcome: Outcome, *, dattri: bool) -> None:
    """Time TRAK's projector on the gradients of the large network's batch."""
    print("trak: large network …", file=sys.stderr, flush=True)
    bench = bench_of(large_job(setting, "sjlt"))
    gradients, dim, samples = dense_gradients(bench), int(bench.projection.dim or 0), len(bench.batch)
    del bench
    reset_peak()
    outcome.trak = timing = trak_peer.time_blocks(gradients, samples, dim)
    sjlt = outcome.projecting("sjlt")
    over = timing.sample_seconds / sjlt.sample_seconds
    check = Check(TRAK_OVER_OURS, over, None, TRAK_BAR, True, None if setting.smoke else over >= TRAK_BAR)
    outcome.checks.append(check)
    rows = [("TRAK BasicProjector", timing.sample_seconds, over * sjlt.ratio, peak_resident_bytes())]
    if dattri and absent(DATTRI) is None:
        reset_peak()
        took = trak_peer.time_blocks(gradients, samples, dim, dattri_peer.projector).sample_seconds
        ratio = took / sjlt.sample_seconds * sjlt.ratio
        rows.append(("dattri BasicProjector", took, ratio, peak_resident_bytes()))
    rows.append((trak_peer.SJLT, sjlt.sample_seconds, sjlt.ratio, sjlt.peak_bytes))
    cells = [
        ("projector", "ms/sample", "/ sjlt", "/ capture", "peak GiB"),
        *(
            (name, f"{took * 1e3:.1f}", f"{took / sjlt.sample_seconds:.1f}", f"{ratio:.1f}", f"{peak / 2**30:.2f}")
            for name, took, ratio, peak in rows
        ),
    ]
    title = f"{large_title(setting)}, dim {dim:,}, batch {samples}: TRAK beside sjlt"
    remark = (
        f"  TRAK: {timing.timed} of {timing.blocks} blocks of {timing.block_columns} columns timed "
        f"({timing.timed_seconds:.2f} s) and scaled by {timing.blocks / timing.timed:g}; each makes P × "
        f"{timing.block_columns} signs anew. dattri's, where it is installed, goes about it likewise."
    )
    outcome.table(title, [*aligned(cells), remark, f"  {check}"])


def _all_gradients(data: RealData) -> torch.Tensor:
    """Dense gradients of all samples, (samples · outputs, parameters)."""
    job = data.job(projection=ooc_ntk.Projection("sjlt", 64))
    bench = bench_of(job)
    prepared = prepare(job)
    step, samples = len(bench.batch), len(prepared.reader)
    batches = (first_samples(prepared, step, start) for start in range(0, samples, step))
    return torch.cat([dense_gradients(replace(bench, batch=batch)) for batch in batches])


def dense_gradients(bench: Bench) -> torch.Tensor:
    """The batch's gradients as TRAK's projector takes them: (samples · rows, parameters), in the model's order."""
    captured, capture = bench.capture.run(bench.batch), bench.capture
    names = [name for name, _ in capture.function.module.named_parameters()]
    found = torch.empty(len(bench.batch) * bench.rows, sum(capture.function.sizes[name] for name in names))
    position = 0
    for name in names:
        part = capture.dense(captured, name, slice(None)).flatten(2).flatten(0, 1)
        found[:, position : position + part.shape[1]] = part
        position += part.shape[1]
    return found


def _ours(data: RealData, kind: str, dim: int, exact: NDArray[np.float64]) -> trak_peer.Store:
    """Residual and time of our features of several seeds, the time as a run's own receipts have it."""
    residuals, predicted, scales, seconds = [], [], [], []
    for seed in range(data.seeds):
        with tempfile.TemporaryDirectory(prefix="ooc-ntk-bench-") as folder:
            job = data.job(projection=ooc_ntk.Projection(kind, dim, seed=seed))
            preferences = ooc_ntk.Preferences(features_only=True)
            kernel = ooc_ntk.run(job, Path(folder) / "run", preferences=preferences, progress=False)
            entries = np.asarray(kernel, dtype=np.float64)
            residuals.append(relative_error(entries, exact))
            predicted.append(float(np.linalg.norm(kernel.errors()) / np.linalg.norm(entries)))
            scales.append(float(np.trace(entries) / np.trace(exact)))
            seconds.append(ooc_ntk.info(kernel.path).phases["project"] / len(exact))
    residual = float(np.mean(residuals))
    return trak_peer.Store(
        f"ooc-ntk, {kind}", dim, residual, float(np.mean(predicted)), residual, float(np.mean(scales)), min(seconds)
    )
