"""Growth of the cost: the kernel of an MLP at two sample counts under one small budget.

``python -m bench.growth`` prints, for each count, seconds per kernel entry, peak memory, and what was promised beside
what was measured. The Jacobian of the larger count is a thousand times the memory, and the kernel larger than it: an
engine that scales spends no more on an entry than at the smaller count. Each count runs in a fresh process.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

import ooc_ntk

from .bars import Bar, checked
from .contenders import DEVICE, OURS
from .exact import machine, parse_counts
from .inputs import count_parameters
from .models import SEED, build, mlp
from .peers import exact_kernel
from .process import calibrate_once, peak_resident_bytes, start_child
from .records import Finding, Record
from .registry import part
from .table import CHECKED_SAMPLES, aligned, relative_error

#: The workload of ``bench.models``.
WORKLOAD = "mlp"

#: Sample counts, in full and in smoke size.
SAMPLES, SMOKE_SAMPLES = (4_000, 32_000), (24, 96)

#: Memory and disk of every run.
HOST, DISK = "2GiB", "20GiB"

#: What an entry may cost at the largest count, as a multiple of its cost at the smallest.
BAR = 1.2

#: As a part of ``python -m bench``: samples at the network's own width, and widths at so many samples, smoke sizes too.
PART_SAMPLES, PART_WIDTHS, WIDTH_SAMPLES = (1_000, 2_000, 4_000, 8_000), (128, 512, 2_048), 1_000
SMOKE_WIDTHS, SMOKE_WIDTH_SAMPLES = (8, 32), 24

#: The count from which the part's check starts, as in the full size.
PART_FIRST = 4_000

#: The figure that the part judges.
FIGURE = f"seconds per kernel entry, MLP, N = {PART_SAMPLES[-1]:,} / N = {PART_FIRST:,}"

#: Samples of the run that warms up.
WARM_SAMPLES = 8


@dataclass(frozen=True)
class Growth:
    """One run.

    Attributes:
        samples: sample count.
        plan_seconds: planning, probe included.
        run_seconds: wall clock of the run.
        task_seconds: measured seconds of all tasks.
        promised_seconds: what the plan promised for them.
        peak_bytes: highest resident memory of the process (VmHWM).
        promised_host_bytes: what the plan promised for it.
        disk_bytes: size of the run directory in the end.
        promised_disk_bytes: what the plan promised as its peak.
        error: relative Frobenius error of a few entries against float64.
        layout: tiles and passes in one phrase.
        kernel_bytes: size of the kernel.
        jacobian_bytes: size of the dense Jacobian.
        parameters: of the network.
        moved_bytes: read and written by tasks.
    """

    samples: int
    plan_seconds: float
    run_seconds: float
    task_seconds: float
    promised_seconds: float
    peak_bytes: int
    promised_host_bytes: int
    disk_bytes: int
    promised_disk_bytes: int
    error: float
    layout: str
    kernel_bytes: int
    jacobian_bytes: int
    parameters: int
    moved_bytes: int

    @property
    def entry_seconds(self) -> float:
        """Seconds of the run per kernel entry."""
        return self.run_seconds / self.samples**2


def grow_here(samples: int, smoke: bool, width: int = 0) -> Growth:
    """Body of a child process: plan and run once, timed.

    Args:
        samples: sample count.
        smoke: whether to take the small network, and not to warm up.
        width: of the network; 0 takes the workload's own.

    Returns:
        What was measured.
    """
    if not smoke:
        _run(WARM_SAMPLES, smoke, width, compared=False)  # the comparison would raise the peak of the process
    return _run(samples, smoke, width)


def _run(samples: int, smoke: bool, width: int, *, compared: bool = True) -> Growth:
    model, inputs = build(WORKLOAD, samples, smoke)
    if width:
        torch.manual_seed(SEED)
        model = mlp(20, width, 3).eval() if smoke else mlp(784, width, 10).eval()
    with tempfile.TemporaryDirectory(prefix="ooc-ntk-bench-") as folder:
        job = ooc_ntk.Job(model=model, train=inputs, kernel="trace", device=DEVICE)
        start = time.perf_counter()
        plan = ooc_ntk.plan(job, ooc_ntk.Budget(host=HOST, disk=DISK), out=folder)
        planned = time.perf_counter()
        kernel = ooc_ntk.run(job, Path(folder) / "run", plan=plan, progress=False)
        done = time.perf_counter()
        peak_bytes = peak_resident_bytes()
        info = ooc_ntk.info(kernel.path)
        last = samples - min(samples, CHECKED_SAMPLES)
        corner = np.asarray(kernel[last:, last:])
        return Growth(
            samples=samples,
            plan_seconds=planned - start,
            run_seconds=done - planned,
            task_seconds=info.seconds,
            promised_seconds=plan.promised.seconds,
            peak_bytes=peak_bytes,
            promised_host_bytes=plan.promised.host_bytes,
            disk_bytes=info.disk_bytes,
            promised_disk_bytes=plan.promised.disk_bytes,
            error=relative_error(corner, exact_kernel(model, inputs, range(last, samples))) if compared else math.nan,
            layout=f"{plan.method}, {plan.layout.describe()}",
            kernel_bytes=plan.kernel_bytes,
            jacobian_bytes=plan.jacobian_bytes,
            parameters=count_parameters(model),
            moved_bytes=info.bytes_read + info.bytes_written,
        )


def grow_apart(samples: int, smoke: bool, threads: int, width: int = 0) -> Growth:
    """Measure one sample count in a fresh process.

    Args:
        samples: sample count.
        smoke: whether in smoke size.
        threads: CPU threads.
        width: of the network; 0 takes the workload's own.

    Returns:
        What was measured.

    Raises:
        RuntimeError: if the process fails.
    """
    with tempfile.TemporaryDirectory(prefix="ooc-ntk-bench-") as folder:
        record = Path(folder) / "growth.json"
        arguments = ["--child", str(record), "--samples", str(samples), "--threads", str(threads)]
        arguments += ["--width", str(width)]
        start_child("bench.growth", [*arguments, *(["--smoke"] if smoke else [])], threads)
        return Growth(**json.loads(record.read_text()))


def format_growth(runs: Sequence[Growth]) -> str:
    """The table of all counts, each promise beside its measurement, and the verdict.

    Args:
        runs: smallest count first.

    Returns:
        Several lines.
    """
    gib = 2**30
    rows: list[tuple[str, list[str]]] = [
        ("seconds per kernel entry", [f"{run.entry_seconds:.2e}" for run in runs]),
        ("run, seconds", [f"{run.run_seconds:.2f}" for run in runs]),
        ("plan, seconds", [f"{run.plan_seconds:.2f}" for run in runs]),
        ("tasks, seconds", [f"{run.task_seconds:.2f}" for run in runs]),
        ("  promised", [f"{run.promised_seconds:.2f}" for run in runs]),
        ("peak memory, GiB", [f"{run.peak_bytes / gib:.2f}" for run in runs]),
        ("  promised", [f"{run.promised_host_bytes / gib:.2f}" for run in runs]),
        ("disk at the end, GiB", [f"{run.disk_bytes / gib:.2f}" for run in runs]),
        ("  promised peak", [f"{run.promised_disk_bytes / gib:.2f}" for run in runs]),
        ("kernel, GiB", [f"{run.kernel_bytes / gib:.2f}" for run in runs]),
        ("dense Jacobian, GiB", [f"{run.jacobian_bytes / gib:.1f}" for run in runs]),
        ("error", [f"{run.error:.1e}" for run in runs]),
    ]
    header = (f"{WORKLOAD}, {HOST} of memory", *(f"N = {run.samples:,}" for run in runs))
    text = aligned([header, *((name, *cells) for name, cells in rows)])
    text += [f"  N = {run.samples:,}: {run.layout}" for run in runs]
    if len(runs) > 1:
        ratio = growth_ratio(runs)
        text.append(f"seconds per kernel entry, last / first = {ratio:.2f}; bar at most {BAR:.2f}")
    return "\n".join(text)


def growth_ratio(runs: Sequence[Growth]) -> float:
    """Cost of an entry at the largest count over that at the smallest."""
    return runs[-1].entry_seconds / runs[0].entry_seconds


@part(
    "growth",
    "Growth of the cost with samples and parameters",
    seconds=65,
    limit_seconds=240,
    bars=(Bar(FIGURE, BAR),),
    results="growth",
)
def measure(smoke: bool) -> Iterator[Finding]:
    """The MLP at more and more samples, then wider and wider, each in a fresh process."""
    threads = torch.get_num_threads()

    def one(samples: int, width: int = 0) -> Growth:
        return grow_here(samples, smoke, width) if smoke else grow_apart(samples, smoke, threads, width)

    runs = []
    for samples in SMOKE_SAMPLES if smoke else PART_SAMPLES:
        runs.append(one(samples))
        yield _record(runs[-1], "growth with N")
    first = next(run for run in runs if smoke or run.samples == PART_FIRST)
    yield checked(FIGURE, runs[-1].entry_seconds / first.entry_seconds, BAR, smoke)
    yield from format_growth(runs).splitlines()[:-1]
    wider = []
    for width in SMOKE_WIDTHS if smoke else PART_WIDTHS:
        wider.append(one(SMOKE_WIDTH_SAMPLES if smoke else WIDTH_SAMPLES, width))
        yield _record(wider[-1], "growth with P")
    rows = [("parameters", "seconds", "promised", "peak MiB", "promised", "dense Jacobian, MiB", "error")]
    for run in wider:
        sizes = (run.peak_bytes, run.promised_host_bytes, run.jacobian_bytes)
        cells = (f"{run.run_seconds:.2f}", f"{run.promised_seconds:.2f}", *(f"{size / 2**20:,.0f}" for size in sizes))
        rows.append((f"{run.parameters:,}", *cells, f"{run.error:.1e}"))
    yield from ["", *aligned(rows)]


def _record(run: Growth, series: str) -> Record:
    return Record(
        f"MLP, N = {run.samples:,}, P = {run.parameters:,}",
        OURS,
        run.run_seconds,
        run.samples,
        series,
        peak_bytes=run.peak_bytes,
        moved_bytes=run.moved_bytes,
        error=run.error,
        promised_seconds=run.promised_seconds,
        task_seconds=run.task_seconds,
        promised_bytes=run.promised_host_bytes,
        figures={"parameters": run.parameters, "jacobian_bytes": run.jacobian_bytes, "kernel_bytes": run.kernel_bytes},
        remark=run.layout,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m bench.growth", description="Growth of the cost of a kernel entry.")
    parser.add_argument("--samples", help="sample counts, separated by commas (default: 4000,32000)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--smoke", action="store_true", help="a tiny network, to see that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="leave the figures there")
    parser.add_argument("--child", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    parser.add_argument("--width", type=int, default=0, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    counts = parse_counts(parser, chosen.samples) or (SMOKE_SAMPLES if chosen.smoke else SAMPLES)
    if chosen.threads is not None and chosen.threads < 1:
        parser.error("--threads must be at least 1")
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    if chosen.child:
        chosen.child.write_text(json.dumps(asdict(grow_here(counts[0], chosen.smoke, chosen.width))))
        return
    calibrate_once()
    threads = torch.get_num_threads()
    setting = machine(threads)
    print("; ".join(f"{name} {value}" for name, value in setting.items()), flush=True)
    runs = []
    for count in counts:
        print(f"N = {count:,} …", file=sys.stderr, flush=True)
        runs.append(grow_apart(count, chosen.smoke, threads))
    print(f"\n{format_growth(runs)}", flush=True)
    if chosen.json:
        ratio = growth_ratio(runs) if len(runs) > 1 else None
        record = {**setting, "bar": BAR, "ratio": ratio, "runs": [asdict(run) for run in runs]}
        chosen.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
