"""Exact kernels of a network by the engine, with more and more samples, and what they say of the whole kernel."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

import ooc_ntk
from ooc_ntk.api import RunInfo
from ooc_ntk.errors import BudgetError
from ooc_ntk.inputs.callables import call_factory
from ooc_ntk.planning.plan import Plan, PlannedBlock
from ooc_ntk.units import format_bytes, format_count, format_seconds

from .gpu_ceilings import Ways, capture_rate, product_rate
from .gpu_networks import Subject
from .table import aligned

#: Bars, as the project set them for an H200: contraction beside the device's own products, and seconds of the whole
#: 60,000 × 50,000 kernel of ResNet-18 by precision.
CONTRACTION_BAR: Final = 0.85
SECONDS_BARS: Final = {"bf16x3": 600.0, "tf32": 240.0}

#: How much longer the next run takes at most, with twice the samples (products take four times as long).
NEXT: Final = 4.5

#: Phases that contract, by what the plan calls the contraction; the others move bytes.
CONTRACTING: Final = {
    "product": "gemm",
    "expand and product": "gemm",
    "pairwise": "pairwise",
    "matching": "matching",
}

#: Where a thread waits for products that are queued on a device.
WAITING: Final = "wait for the device"


@dataclass(frozen=True)
class Grown:
    """One run.

    Attributes:
        subject: the network.
        precision: of the job.
        samples: train samples.
        info: what its receipts say.
        wall_seconds: of the run, without planning.
        ways: rates at which bytes go.
        ceiling: FLOP/s of the device's own products at the edge of the plan's tiles.
        capture: samples/s of capture without the engine.
    """

    subject: Subject
    precision: str
    samples: int
    info: RunInfo
    wall_seconds: float
    ways: Ways
    ceiling: float
    capture: float

    @property
    def plan(self) -> Plan:
        """The plan that was followed."""
        return self.info.plan

    @property
    def flops(self) -> int:
        """FLOPs of the contraction."""
        return sum(block.flops for block in self.plan.blocks)

    @property
    def rate(self) -> float:
        """FLOP/s of all kernel tasks, with all that they do beside."""
        return self.flops / max(1e-9, self.info.kernel_seconds)

    @property
    def share(self) -> float:
        """Seconds that the device's own products of whole tiles would take, over those of all kernel tasks."""
        grid = self.plan.sample_grid
        entries = sum(
            len(grid.rows(i)) * len(grid.columns(j))
            for i in range(grid.row_tiles)
            for j in range(min(i + 1, grid.column_tiles))
        )
        pairs = self.plan.train_samples**2 / 2 + self.plan.test_samples * self.plan.train_samples
        return self.rate / self.ceiling * entries / pairs

    @property
    def contracting_seconds(self) -> float:
        """Seconds of the phases that contract, and of waiting for them."""
        return sum(seconds for name, seconds in self.info.phases.items() if name in (*CONTRACTING, WAITING))


def grow(
    subject: Subject,
    precision: str,
    device: str,
    ways: Ways,
    deadline: float,
    folder: Path | None,
    announce: Callable[[str], None],
) -> list[Grown]:
    """Run a network with more and more samples until the next run would end too late.

    Args:
        subject: the network.
        precision: of the jobs.
        device: torch device string.
        ways: rates at which bytes go.
        deadline: by ``time.perf_counter``.
        folder: where runs are; None takes the system's folder for temporary files.
        announce: told about every run.

    Returns:
        The runs; the first one in any case.
    """
    found: list[Grown] = []
    rates: dict[int, float] = {}
    for samples in subject.samples:
        start = time.perf_counter()
        if device != "cpu":
            torch.cuda.empty_cache()  # what was timed before holds memory that the plan may count on
        with tempfile.TemporaryDirectory(prefix="ooc-ntk-bench-", dir=folder) as made:
            job = subject.job(samples, 0, precision, device)
            try:
                plan = ooc_ntk.plan(job, out=made)
            except BudgetError as error:
                announce(f"  N = {samples:,} is left out: {error}")
                break
            begun = time.perf_counter()
            kernel = ooc_ntk.run(job, Path(made) / "run", plan=plan, progress=False, proof=False)
            wall = time.perf_counter() - begun
            info = ooc_ntk.info(kernel.path)
        if plan.batch_size not in rates:
            rates[plan.batch_size] = _capture(subject, plan.batch_size, device)
        ceiling = product_rate(precision, min(samples, plan.tile_samples), device)
        run = Grown(subject, precision, samples, info, wall, ways, ceiling, rates[plan.batch_size])
        found.append(run)
        announce(format_run(run))
        now = time.perf_counter()
        if samples != subject.samples[-1] and now + NEXT * (now - start) > deadline:
            announce("  no time for more samples")
            break
    return found


def _capture(subject: Subject, batch: int, device: str) -> float:
    model, data = call_factory(subject.model), call_factory(subject.train, what="train")
    assert isinstance(model, torch.nn.Module)
    assert isinstance(data, torch.Tensor)
    return capture_rate(model, data[: 2 * batch], batch, device)


def format_run(run: Grown) -> str:
    """One run: what it took beside what bounds it, phase by phase."""
    info, plan = run.info, run.plan
    lines = [
        f"  N = {run.samples:,}, {run.precision}: {run.wall_seconds:.2f} s; {plan.layout.describe()}, batches of "
        f"{plan.batch_size}",
        f"    contraction {format_count(run.flops)}FLOP, {run.rate / 1e12:.2f} TFLOP/s over all of its tasks; the "
        f"device's own products of {min(run.samples, plan.tile_samples):,} rows do {run.ceiling / 1e12:.2f}, and whole "
        f"tiles by them would take {run.share:.2f} of that time",
        f"    peak of device memory {format_bytes(info.device_bytes)} of {format_bytes(plan.promised.device_bytes)} "
        f"promised, of host memory {format_bytes(info.host_bytes)} of {format_bytes(plan.promised.host_bytes)}; "
        f"{run.wall_seconds / max(1e-9, plan.promised.seconds):.2f} × the promised seconds",
    ]
    cells = [("phase", "seconds", "share", "rate", "beside")]
    for name, seconds in info.phases.items():
        cells.append((name, f"{seconds:.3f}", f"{seconds / info.seconds:.0%}", *_rate(run, name, seconds)))
    rest = info.seconds - sum(info.phases.values())
    cells.append(("beside these", f"{rest:.3f}", f"{rest / info.seconds:.0%}", "", ""))
    return "\n".join([*lines, *("  " + line for line in aligned(cells))])


def _rate(run: Grown, name: str, seconds: float) -> tuple[str, str]:
    """What a phase did a second, and beside what bounds it."""
    seconds = max(1e-9, seconds)
    if name == "capture":
        rate = run.plan.samples * len(run.plan.passes) / seconds
        return f"{rate:,.0f} samples/s", f"{rate / run.capture:.2f} of capture alone"
    if name in CONTRACTING:
        dense = name == "product"
        flops = sum(
            block.flops
            for block in run.plan.blocks
            if block.contraction == CONTRACTING[name] and (block.representation == "dense") == dense
        )
        return f"{flops / seconds / 1e12:.2f} TFLOP/s", f"{flops / seconds / run.ceiling:.2f} of its products"
    if name == "expand":
        flops = sum(_expansion(run, block) for block in run.plan.blocks if block.representation == "dense")
        return f"{flops / seconds / 1e12:.2f} TFLOP/s", f"{flops / seconds / run.ceiling:.2f} of its products"
    moved = {
        "store": (run.plan.held_bytes, run.ways.back, "copies to the host"),
        "commit": (run.info.bytes_written, run.ways.write, "the disk"),
        "wait for tiles": (run.info.bytes_read, run.ways.read, "the disk"),
    }
    if name not in moved:
        return "", ""
    count, way, what = moved[name]
    rate = count / seconds
    return f"{rate / 1e9:.2f} GB/s", f"{rate / way:.2f} of {what}" if way and count else ""


def _expansion(run: Grown, block: PlannedBlock) -> int:
    """FLOPs of expanding what a layer rule derives of a block that is held dense."""
    if block.source != "rule" or block.factors is None:
        return 0
    return run.plan.samples * block.factors.expand_flops(run.plan.rows_per_sample)


@dataclass(frozen=True)
class Whole:
    """What a run says of the whole kernel.

    Attributes:
        run: the run with the most samples.
        plan: the plan of the whole kernel; None if none fits.
        refusal: why none fits.
        rows_seconds: of deriving all rows.
        contracting_seconds: of the phases that contract.
        other_seconds: of the rest of kernel tasks.
    """

    run: Grown
    plan: Plan | None
    refusal: str
    rows_seconds: float
    contracting_seconds: float
    other_seconds: float

    @property
    def seconds(self) -> float:
        """Of all."""
        return self.rows_seconds + self.contracting_seconds + self.other_seconds


#: How seconds of the whole kernel are found from those of a run with N samples.
FORMULA: Final = (
    "rows = samples × passes × (seconds of rows tasks / samples × passes of the run); contraction = FLOPs of the "
    "plan × (seconds of the phases that contract / FLOPs of the run); the rest = entries × (seconds of kernel tasks "
    "beside these / entries of the run)"
)


def extrapolate(run: Grown, device: str, folder: Path | None) -> Whole:
    """Plan the whole kernel, and price it by what a run measured.

    Args:
        run: the run with the most samples.
        device: torch device string.
        folder: where it would be.
    """
    train, test = run.subject.size
    plan, refusal = None, ""
    try:
        job = run.subject.job(train, test, run.precision, device)
        plan = ooc_ntk.plan(job, out=folder or tempfile.gettempdir())
    except BudgetError as error:
        refusal = str(error)
    pairs = (train * train / 2 + test * train) / (run.samples**2 / 2)
    flops = sum(block.flops for block in plan.blocks) if plan else run.flops * pairs
    passes = len(plan.passes) if plan else 1
    per_row = run.info.rows_seconds / (run.samples * len(run.plan.passes))
    entries = (train + test) * train / run.samples**2
    return Whole(
        run=run,
        plan=plan,
        refusal=refusal,
        rows_seconds=(train + test) * passes * per_row,
        contracting_seconds=flops / run.flops * run.contracting_seconds,
        other_seconds=entries * (run.info.kernel_seconds - run.contracting_seconds),
    )


def format_whole(whole: Whole) -> str:
    """The whole kernel by a run, beside what the planner promises."""
    train, test = whole.run.subject.size
    lines = [
        f"  {train + test:,} × {train:,} in {whole.run.precision} by N = {whole.run.samples:,}: "
        f"{format_seconds(whole.seconds)} = rows {format_seconds(whole.rows_seconds)} + contraction "
        f"{format_seconds(whole.contracting_seconds)} + the rest {format_seconds(whole.other_seconds)}"
    ]
    if whole.plan is not None:
        plan = whole.plan
        lines.append(
            f"    planned: {plan.layout.describe()}; {sum(block.flops for block in plan.blocks):.2e} FLOP; promised "
            f"{format_seconds(plan.promised.seconds)}, host {format_bytes(plan.promised.host_bytes)}, device "
            f"{format_bytes(plan.promised.device_bytes)}, disk {format_bytes(plan.promised.disk_bytes)}"
        )
    else:
        lines.append(f"    no plan fits here ({whole.refusal}); FLOPs as those of the run, by pairs of samples")
    return "\n".join(lines)


def summary(wholes: Sequence[Whole], *, judged: bool) -> list[str]:
    """The short table at the end: the largest run of every network and precision, beside the bars.

    Args:
        wholes: what was found.
        judged: whether bars count.
    """
    cells = [("network", "precision", "N", "seconds", "TFLOP/s", "of its products", "device peak", "whole kernel")]
    verdicts = []
    for whole in wholes:
        run = whole.run
        cells.append(
            (
                run.subject.title,
                run.precision,
                f"{run.samples:,}",
                f"{run.wall_seconds:.2f}",
                f"{run.rate / 1e12:.2f}",
                f"{run.share:.2f}",
                format_bytes(run.info.device_bytes),
                format_seconds(whole.seconds),
            )
        )
        if not judged:
            continue
        name = f"{run.subject.title}, {run.precision}"
        verdicts.append(
            f"{name}: products of whole tiles / contraction = {run.share:.2f}; bar at least {CONTRACTION_BAR}"
            f"{_verdict(run.share >= CONTRACTION_BAR)}"
        )
        bar = SECONDS_BARS.get(run.precision)
        if bar is not None and run.subject.judged:
            verdicts.append(
                f"{name}: whole kernel, extrapolated = {whole.seconds:,.0f} s; bar at most {bar:,.0f} (of an H200)"
                f"{_verdict(whole.seconds <= bar)}"
            )
    return [*aligned(cells), *verdicts]


def _verdict(met: bool) -> str:
    return ": met" if met else ": MISSED"
