"""What projecting a batch costs, as a multiple of deriving the layer factors that go into it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import ooc_ntk
from ooc_ntk.compute.capture import Capture
from ooc_ntk.compute.gradients import gradient_pieces
from ooc_ntk.compute.jacobian import ModelBatch
from ooc_ntk.compute.machine import steady_allocator
from ooc_ntk.compute.projection.backends import load_backend
from ooc_ntk.execution.features import Projector, projector_of
from ooc_ntk.execution.measure import structure_of
from ooc_ntk.execution.prepare import first_samples, prepare
from ooc_ntk.planning.projection import SPARSE_KINDS

from .bars import Check
from .contenders import DEVICE
from .models import WORKLOADS, build
from .process import peak_resident_bytes
from .projection_records import Outcome, Setting, Step
from .table import aligned

#: A figure and its bar: projecting, with expanding the factors, over the capture.
OVER_CAPTURE, CAPTURE_BAR = "project (sjlt, expanding included) / capture", 2.0


def measure_throughput(setting: Setting, kinds: Sequence[str], outcome: Outcome) -> None:
    """Time the capture, expanding, and projecting with several kinds.

    Args:
        setting: sizes.
        kinds: of projections; the first is timed with expanding and has a bar.
        outcome: takes steps, a table and a check.
    """
    capture, rows = np.inf, []
    for kind in kinds:
        print(f"throughput: {kind} …", file=sys.stderr, flush=True)
        bench = bench_of(large_job(setting, kind))
        with steady_allocator():
            if kind == kinds[0]:
                rows.append(("expand, nothing projected", time_expanding(bench, setting.repeats), 0, ""))
            reset_peak()
            seconds = time_projecting(bench, setting.repeats)
        capture = min(capture, seconds["capture"])
        remark = "" if kind in SPARSE_KINDS else "one batch"
        rows.append((f"project, {kind}, expanding included", seconds["project"], peak_resident_bytes(), remark))
        batch = len(bench.batch)
        parameters = sum(bench.capture.function.sizes.values())
    rows.insert(0, ("capture alone", capture, 0, ""))
    outcome.steps = [Step(name, took, took / capture, peak, remark) for name, took, peak, remark in rows]
    cells = [("step", "ms/sample", "/ capture", "peak GiB", "")]
    cells += [
        (
            step.name,
            f"{step.sample_seconds * 1e3:.2f}",
            f"{step.ratio:.2f}",
            f"{step.peak_bytes / 2**30:.2f}" if step.peak_bytes else "–",
            step.remark,
        )
        for step in outcome.steps
    ]
    dim = bench.projection.dim
    title = f"{large_title(setting)}, C = {bench.rows}, P = {parameters:,}"
    title = f"{title}: dim {dim:,}, batch {batch}, best of {setting.repeats}"
    over = outcome.projecting(kinds[0]).ratio
    check = Check(OVER_CAPTURE, over, None, CAPTURE_BAR, False, None if setting.smoke else over <= CAPTURE_BAR)
    outcome.checks.append(check)
    outcome.table(title, [*aligned(cells), f"  {check}"])


def large_job(setting: Setting, kind: str) -> ooc_ntk.Job:
    """The job whose projection is timed: ResNet-18, one output, 4,096 columns; in smoke size a small MLP, 64."""
    model, inputs = build("mlp" if setting.smoke else "resnet18", large_samples(setting), setting.smoke)
    projection = ooc_ntk.Projection(kind, 64 if setting.smoke else 4096)
    return ooc_ntk.Job(model, inputs, projection=projection, device=DEVICE)


def large_samples(setting: Setting) -> int:
    """Samples of :func:`large_job`."""
    return 10 if setting.smoke else 64


def large_title(setting: Setting) -> str:
    """What :func:`large_job` projects."""
    return "small MLP (smoke size)" if setting.smoke else WORKLOADS["resnet18"].title


@dataclass(frozen=True)
class Bench:
    """What projects a batch as a run of its own plan would.

    Attributes:
        projector: capture and sketch.
        capture: the same capture.
        batch: samples of the planned batch size.
        rows: Jacobian rows per sample.
        projection: with its backend.
    """

    projector: Projector
    capture: Capture
    batch: ModelBatch
    rows: int
    projection: ooc_ntk.Projection


def bench_of(job: ooc_ntk.Job) -> Bench:
    """Plan a projected job and make what its rows tasks use.

    Raises:
        RuntimeError: if layer rules do not cover the whole model, which would time something else.
    """
    plan = ooc_ntk.plan(job, preferences=ooc_ntk.Preferences(features_only=True))
    if plan.projection is None or any(block.source != "rule" for block in plan.blocks):
        raise RuntimeError("layer rules do not cover all of this model")
    prepared = prepare(job)
    function = prepared.function
    function.structure = structure = structure_of(prepared, plan.rows_per_sample)
    made: list[Capture] = []

    def capture(names: Sequence[str]) -> Capture:
        made.append(Capture(function, structure, names, plan.rows_per_sample))
        return made[-1]

    projector = projector_of(plan, function, capture)
    return Bench(projector, made[0], first_samples(prepared, plan.batch_size), plan.rows_per_sample, plan.projection)


class Stopwatch:
    """Adds up the time of phases.

    Attributes:
        seconds: by phase.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the time of the body under a name."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def time_projecting(bench: Bench, repeats: int) -> dict[str, float]:
    """Best seconds per sample of the capture and of what follows it, after a batch that warms up.

    Making a dense R takes nearly all the time of a batch: for those kinds a few parameters warm up, and one batch is
    timed.
    """
    projection = bench.projection
    if projection.kind in SPARSE_KINDS:
        bench.projector.project(bench.batch, bench.rows)
    else:
        load_backend(projection.backend).tile(projection, torch.arange(8), torch.float32)
        bench.capture.run(bench.batch)
        repeats = 1
    best: dict[str, float] = {}
    for _ in range(repeats):
        watch = Stopwatch()
        bench.projector.project(bench.batch, bench.rows, watch)
        for name, seconds in watch.seconds.items():
            best[name] = min(best.get(name, np.inf), seconds / len(bench.batch))
    return best


def time_expanding(bench: Bench, repeats: int) -> float:
    """Best seconds per sample of expanding a batch's factors into gradients piece by piece, which are dropped."""
    captured = bench.capture.run(bench.batch)
    names = [name for layer in bench.capture.layers for name in layer.parameters]
    best = np.inf
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for name in names:
            for _piece in gradient_pieces(bench.capture, captured, name):
                pass
        best = min(best, time.perf_counter() - start)
    return float(best) / len(bench.batch)


def reset_peak() -> None:
    """Have the highest resident memory counted from now on (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
