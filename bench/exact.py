"""Exact trace kernels: ooc-ntk beside the per-sample loop and the torch.func tutorial, in one run.

``python -m bench.exact`` prints one table per workload. Every contender computes in a fresh process, so that memory
peaks and warm-up are its own: the process imports, builds model and data from a seed, computes the kernel of one sample
to warm up, then computes the kernel once, timed. All are float32, on the CPU, with the same threads. Seconds mean
nothing between machines; the ratios are what is claimed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import ooc_ntk
from ooc_ntk.execution.calibration import cached_rates

from .models import WORKLOADS, build
from .peers import MEMORY_BYTES, Result, exact_kernel, jacobian_contraction, per_sample_loop

#: Where everything is computed.
DEVICE = "cpu"

#: Samples on which every kernel is held against the float64 oracle.
CHECKED_SAMPLES = 8

#: What ooc-ntk may take, as a multiple of the faster peer's time (issue 'The engine, end to end').
BAR = 1.1


def ooc_kernel(model: nn.Module, inputs: Tensor) -> Result:
    """ooc-ntk through its public face: plan (probe included), then run into a new directory on disk.

    Args:
        model: in eval mode.
        inputs: (samples, ...).

    Returns:
        The kernel and its times; ``other`` is what a run does beside its tasks.
    """
    with tempfile.TemporaryDirectory(prefix="ooc-ntk-bench-") as folder:
        job = ooc_ntk.Job(model=model, train=inputs, kernel="trace", device=DEVICE)
        start = time.perf_counter()
        plan = ooc_ntk.plan(job, ooc_ntk.Budget(host=MEMORY_BYTES, disk=MEMORY_BYTES), out=folder)
        planned = time.perf_counter()
        kernel = ooc_ntk.run(job, Path(folder) / "run", plan=plan, progress=False)
        done = time.perf_counter()
        info = ooc_ntk.info(kernel.path)
        return Result(
            np.asarray(kernel),
            plan_seconds=planned - start,
            derive_seconds=info.rows_seconds,
            contract_seconds=info.kernel_seconds,
            other_seconds=done - planned - info.seconds,
            remark=f"{plan.method}, {plan.layout.describe()}, promised {plan.promised.seconds:.1f} s",
        )


#: Contenders by name: from model and data to a result. The last one is ours, the others are its peers.
CONTENDERS: dict[str, Callable[[nn.Module, Tensor], Result]] = {
    "per-sample loop": per_sample_loop,
    "torch.func tutorial": jacobian_contraction,
    "ooc-ntk": ooc_kernel,
}
OURS = "ooc-ntk"
PEERS = tuple(name for name in CONTENDERS if name != OURS)


@dataclass(frozen=True)
class Task:
    """What one child process measures.

    Attributes:
        contender: its name.
        workloads: one, or several one after another (then the memory peak is that of all before, too).
        samples: number of samples; None takes each workload's own.
        smoke: whether in smoke size, which is not warmed up.
        threads: CPU threads.
    """

    contender: str
    workloads: tuple[str, ...]
    samples: int | None
    smoke: bool
    threads: int

    def count(self, workload: str) -> int:
        """Samples of a workload."""
        return self.samples or WORKLOADS[workload].size(self.smoke).samples


@dataclass(frozen=True)
class Measurement:
    """One contender on one workload, as its child process reports it.

    Attributes:
        result: kernel and times.
        cpu_seconds: processor time of all its threads, plan included.
        peak_bytes: highest resident memory of the process (VmHWM).
        load: load average of the machine over the last minute, before it started.
    """

    result: Result
    cpu_seconds: float
    peak_bytes: int
    load: float


def measure(task: Task, folder: Path) -> None:
    """Body of a child process: measure, and leave ``<workload>.npz`` in a folder.

    Args:
        task: what to measure.
        folder: where to leave it.
    """
    torch.set_num_threads(task.threads)
    for workload in task.workloads:
        model, inputs = build(workload, task.count(workload), task.smoke)
        compute = CONTENDERS[task.contender]
        if not task.smoke:
            compute(model, inputs[:1])
        start = time.process_time()
        result = compute(model, inputs)
        cpu_seconds = time.process_time() - start
        figures = {**asdict(result), "cpu_seconds": cpu_seconds, "peak_bytes": peak_resident_bytes()}
        np.savez(folder / f"{workload}.npz", **{name: np.asarray(value) for name, value in figures.items()})


def peak_resident_bytes() -> int:
    """Highest resident memory of this process so far (VmHWM; Linux only, elsewhere 0)."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), 0)


def measure_apart(task: Task) -> dict[str, Measurement]:
    """Measure in a fresh process.

    Args:
        task: what to measure.

    Returns:
        Measurements by workload.

    Raises:
        RuntimeError: if the process fails.
    """
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="ooc-ntk-bench-") as folder:
        command = [sys.executable, "-m", "bench.exact", "--child", json.dumps(asdict(task)), folder]
        threads = {name: str(task.threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
        root = Path(__file__).parents[1]
        status = subprocess.run(command, cwd=root, env={**os.environ, **threads}, check=False).returncode
        if status:
            raise RuntimeError(f"{task.contender} on {', '.join(task.workloads)} ended with status {status}")
        found = {}
        for workload in task.workloads:
            with np.load(Path(folder) / f"{workload}.npz") as stored:
                values = {name: stored[name] if name == "kernel" else stored[name].item() for name in stored.files}
            cpu_seconds, peak_bytes = values.pop("cpu_seconds"), int(values.pop("peak_bytes"))
            found[workload] = Measurement(Result(**values), cpu_seconds, peak_bytes, load)
        return found


@dataclass(frozen=True)
class Row:
    """A line of a workload's table.

    Attributes:
        contender: who.
        seconds: wall clock.
        ratio: to the faster peer.
        derive_seconds: the Jacobian's part.
        contract_seconds: the products' part.
        peak_bytes: highest resident memory.
        error: relative Frobenius error on :data:`CHECKED_SAMPLES` samples, against float64.
        disagreement: largest relative Frobenius difference to another contender, over all entries.
    """

    contender: str
    seconds: float
    ratio: float
    derive_seconds: float
    contract_seconds: float
    peak_bytes: int
    error: float
    disagreement: float


@dataclass(frozen=True)
class Comparison:
    """All contenders on one workload.

    Attributes:
        workload: its name.
        title: what it is.
        rows: the table.
        run_ratio: seconds of ooc-ntk's run over those of the faster peer.
        total_ratio: the same with its plan.
        remarks: how contenders went about it.
    """

    workload: str
    title: str
    rows: tuple[Row, ...]
    run_ratio: float
    total_ratio: float
    remarks: tuple[str, ...]


def compare(workload: str, task: Task, measured: dict[str, Measurement]) -> Comparison:
    """Hold the contenders' kernels and times against each other.

    Args:
        workload: its name.
        task: any of the workload's tasks, for its size.
        measured: measurements by contender.

    Returns:
        The comparison.
    """
    samples = task.count(workload)
    model, inputs = build(workload, samples, task.smoke)
    outputs = model(inputs[:1]).shape[1]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    checked = np.linspace(0, samples - 1, min(samples, CHECKED_SAMPLES)).astype(int).tolist()
    oracle = exact_kernel(model, inputs, checked)
    kernels = {name: found.result.kernel for name, found in measured.items()}
    fastest = min(measured[name].result.run_seconds for name in PEERS)

    def row(label: str, name: str, seconds: float) -> Row:
        found = measured[name]
        return Row(
            contender=label,
            seconds=seconds,
            ratio=seconds / fastest,
            derive_seconds=found.result.derive_seconds,
            contract_seconds=found.result.contract_seconds,
            peak_bytes=found.peak_bytes,
            error=relative_error(kernels[name][np.ix_(checked, checked)], oracle),
            disagreement=max(relative_error(kernels[name], other) for key, other in kernels.items() if key != name),
        )

    rows = [row(name, name, measured[name].result.run_seconds) for name in PEERS]
    ours = measured[OURS].result
    rows.append(row(f"{OURS}, run", OURS, ours.run_seconds))
    rows.append(row(f"{OURS}, plan + run", OURS, ours.plan_seconds + ours.run_seconds))
    return Comparison(
        workload=workload,
        title=f"{WORKLOADS[workload].title}{' (smoke size)' if task.smoke else ''}: trace kernel, C = {outputs}, "
        f"N = {samples}, P = {parameters:,}",
        rows=tuple(rows),
        run_ratio=rows[-2].ratio,
        total_ratio=rows[-1].ratio,
        remarks=tuple(
            f"{name}: {found.result.remark + '; ' if found.result.remark else ''}"
            f"processor time {found.cpu_seconds:.1f} s, load before {found.load:.1f}"
            for name, found in measured.items()
        ),
    )


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Relative difference in the Frobenius norm."""
    difference = found.astype(np.float64) - wanted
    return float(np.linalg.norm(difference) / np.linalg.norm(wanted))


def format_comparison(comparison: Comparison) -> str:
    """The table of a workload, its remarks and its verdict, as plain text."""
    header = ("contender", "seconds", "ratio", "derive", "contract", "peak GiB", "error", "disagree")
    lines = [header]
    lines += [
        (
            row.contender,
            f"{row.seconds:.2f}",
            f"{row.ratio:.2f}",
            f"{row.derive_seconds:.2f}",
            f"{row.contract_seconds:.2f}",
            f"{row.peak_bytes / 2**30:.2f}",
            f"{row.error:.1e}",
            f"{row.disagreement:.1e}",
        )
        for row in comparison.rows
    ]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = [comparison.title]
    for line in lines:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        text.append("  " + "  ".join(cells))
    text += [f"  {remark}" for remark in comparison.remarks]
    text.append(
        f"{OURS} / faster peer = {comparison.run_ratio:.2f} (run), {comparison.total_ratio:.2f} (plan + run); "
        f"bar {BAR:.2f}"
    )
    return "\n".join(text)


def machine(threads: int) -> dict[str, str | int]:
    """What the numbers were measured on."""
    return {
        "date": datetime.now().astimezone().isoformat(timespec="minutes"),
        "machine": f"{platform.node()}, {platform.machine()}, {os.cpu_count()} CPUs, {platform.system()}",
        "threads": threads,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "ooc_ntk": ooc_ntk.__version__,
        "python": platform.python_version(),
    }


def compare_all(workloads: Sequence[str], samples: int | None, repeats: int, smoke: bool) -> list[Comparison]:
    """Measure every contender on every workload and print each table as soon as it is complete.

    Args:
        workloads: names.
        samples: number of samples; None takes each workload's own.
        repeats: measurements of each; the one with the fastest total counts.
        smoke: smoke size: one process per contender for all workloads, to save imports.

    Returns:
        A comparison per workload.
    """
    threads = torch.get_num_threads()
    comparisons = []
    for group in [tuple(workloads)] if smoke else [(name,) for name in workloads]:
        measured: dict[str, dict[str, Measurement]] = {name: {} for name in group}
        for _ in range(repeats):
            for contender in CONTENDERS:
                task = Task(contender, group, samples, smoke, threads)
                for workload, found in measure_apart(task).items():
                    before = measured[workload].get(contender)
                    if before is None or _total(found) < _total(before):
                        measured[workload][contender] = found
        for workload in group:
            comparisons.append(compare(workload, task, measured[workload]))
            print(f"\n{format_comparison(comparisons[-1])}", flush=True)
    return comparisons


def _total(measurement: Measurement) -> float:
    return measurement.result.plan_seconds + measurement.result.run_seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m bench.exact", description="Time exact trace kernels.")
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="names, separated by commas")
    parser.add_argument("--samples", type=int, help="samples (default: each workload's own)")
    parser.add_argument("--repeats", type=int, default=1, help="measurements of each; the fastest counts")
    parser.add_argument("--threads", type=int, help="CPU threads of every contender (default: torch's)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="leave the figures there")
    parser.add_argument("--child", nargs=2, metavar=("TASK", "FOLDER"), help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.child:
        given = json.loads(chosen.child[0])
        measure(Task(**{**given, "workloads": tuple(given["workloads"])}), Path(chosen.child[1]))
        return
    workloads = [name.strip() for name in chosen.workloads.split(",")]
    unknown = [name for name in workloads if name not in WORKLOADS]
    if unknown:
        parser.error(f"unknown workload {unknown[0]!r}; known are {', '.join(WORKLOADS)}")
    if min(chosen.repeats, *(value for value in (chosen.samples, chosen.threads) if value is not None), 1) < 1:
        parser.error("--samples, --repeats and --threads must be at least 1")
    if chosen.threads:
        torch.set_num_threads(chosen.threads)

    if not cached_rates(DEVICE).measured:
        print("calibrating once, which is not counted")
        ooc_ntk.calibrate(DEVICE, tempfile.gettempdir())
    setting = machine(torch.get_num_threads())
    print("; ".join(f"{name} {value}" for name, value in setting.items()))
    comparisons = compare_all(workloads, chosen.samples, chosen.repeats, chosen.smoke)
    if chosen.json:
        record = {**setting, "bar": BAR, "workloads": [asdict(comparison) for comparison in comparisons]}
        chosen.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
