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
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

import ooc_ntk

from .contenders import DEVICE
from .exact import machine, parse_counts
from .models import build
from .peers import exact_kernel
from .process import calibrate_once, peak_resident_bytes, start_child
from .table import CHECKED_SAMPLES, aligned, relative_error

#: The workload of ``bench.models``.
WORKLOAD = "mlp"

#: Sample counts, in full and in smoke size.
SAMPLES, SMOKE_SAMPLES = (4_000, 32_000), (24, 96)

#: Memory and disk of every run.
HOST, DISK = "2GiB", "20GiB"

#: What an entry may cost at the largest count, as a multiple of its cost at the smallest.
BAR = 1.2

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

    @property
    def entry_seconds(self) -> float:
        """Seconds of the run per kernel entry."""
        return self.run_seconds / self.samples**2


def grow_here(samples: int, smoke: bool) -> Growth:
    """Body of a child process: plan and run once, timed.

    Args:
        samples: sample count.
        smoke: whether to take the small network, and not to warm up.

    Returns:
        What was measured.
    """
    if not smoke:
        _run(WARM_SAMPLES, smoke, compared=False)  # the comparison would raise the peak of the process
    return _run(samples, smoke)


def _run(samples: int, smoke: bool, *, compared: bool = True) -> Growth:
    model, inputs = build(WORKLOAD, samples, smoke)
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
        )


def grow_apart(samples: int, smoke: bool, threads: int) -> Growth:
    """Measure one sample count in a fresh process.

    Args:
        samples: sample count.
        smoke: whether in smoke size.
        threads: CPU threads.

    Returns:
        What was measured.

    Raises:
        RuntimeError: if the process fails.
    """
    with tempfile.TemporaryDirectory(prefix="ooc-ntk-bench-") as folder:
        record = Path(folder) / "growth.json"
        arguments = ["--child", str(record), "--samples", str(samples), "--threads", str(threads)]
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m bench.growth", description="Growth of the cost of a kernel entry.")
    parser.add_argument("--samples", help="sample counts, separated by commas (default: 4000,32000)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--smoke", action="store_true", help="a tiny network, to see that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="leave the figures there")
    parser.add_argument("--child", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    counts = parse_counts(parser, chosen.samples) or (SMOKE_SAMPLES if chosen.smoke else SAMPLES)
    if chosen.threads is not None and chosen.threads < 1:
        parser.error("--threads must be at least 1")
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    if chosen.child:
        chosen.child.write_text(json.dumps(asdict(grow_here(counts[0], chosen.smoke))))
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
