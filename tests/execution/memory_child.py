"""Child of test_memory.py: plans and runs one job under a host budget and prints what it promised and what it took.

Run as ``python memory_child.py CASE DATAFLOW BUDGET OUT``; the last line of standard output is JSON.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import ooc_ntk


def mlp(inputs: int, width: int, outputs: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)
    )


def deep() -> nn.Module:
    """A convolution and many layers of one position per sample: large factors, cheap to contract."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2048, 512),
    ]
    for _ in range(44):
        layers += [nn.Tanh(), nn.Linear(512, 512)]
    return nn.Sequential(*layers, nn.Tanh(), nn.Linear(512, 10)).eval()


def images(count: int, features: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, features, generator=torch.Generator().manual_seed(seed))


def make_job(case: str) -> ooc_ntk.Job:
    """Jobs whose Jacobian (``jacobian-SAMPLES``, ``full``), layer factors (``factors-SAMPLES``) or kernel
    (``kernel``) is several times the budget."""
    if case == "kernel":
        torch.manual_seed(0)
        return ooc_ntk.Job(model=nn.Linear(6, 1), train=images(17_000, 6), device="cpu")
    if case == "tiny":
        torch.manual_seed(0)
        return ooc_ntk.Job(model=nn.Linear(6, 3), train=images(40, 6), device="cpu")
    if case == "full":
        return ooc_ntk.Job(
            model=mlp(64, 512, 10), train=images(140, 64), test=images(15, 64, 1), kernel="full", device="cpu"
        )
    if case.startswith("factors-"):
        count = int(case.removeprefix("factors-"))
        return ooc_ntk.Job(model=deep(), train=images(count, 3 * 256).view(-1, 3, 16, 16), device="cpu")
    samples = int(case.removeprefix("jacobian-"))
    return ooc_ntk.Job(model=mlp(64, 512, 10), train=images(samples, 64), device="cpu")


def high_water() -> int:
    """VmHWM of this process, and the largest child added, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    own = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return own + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def main(case: str, dataflow: str, budget: str, out: str) -> None:
    # Dense gradients are what does not fit; layer rules would hold far less.
    dense = case == "full" or case.startswith("jacobian")
    preferences = ooc_ntk.Preferences(dataflow=None if dataflow == "any" else dataflow, layer_rules=not dense)
    if case not in ("kernel", "tiny"):  # few large products: what is measured here is memory, not the choice of tiles
        preferences = replace(preferences, tile_samples=80, span_columns=6_553)
    job = make_job(case)
    limit = ooc_ntk.Budget(host=budget)
    plan = ooc_ntk.plan(job, limit, preferences=preferences, out=Path(out).parent)
    planned = high_water()
    start = time.perf_counter()
    # Without the proof, whose peak is not that of a task, and which the grid of jobs has.
    ooc_ntk.run(job, out, plan=plan, budget=limit, progress=False, proof=False)
    elapsed = time.perf_counter() - start
    peak = high_water()
    found = ooc_ntk.info(out)
    print(plan, file=sys.stderr)
    print(
        json.dumps(
            {
                "dataflow": plan.dataflow,
                "held": plan.held_bytes,
                "passes": len(plan.passes),
                "tasks": plan.task_count,
                "tile_samples": plan.tile_samples,
                "batch_size": plan.batch_size,
                "method": plan.method,
                "calibrated": plan.calibrated,
                "budget": limit.host,
                "promised": plan.promised.host_bytes,
                "terms": dict(plan.host_terms),
                "planned_peak": planned,
                "peak": peak,
                "info_peak": found.host_bytes,
                "info_finished": found.finished,
                "jacobian": plan.jacobian_bytes,
                "kernel": plan.kernel_bytes,
                "promised_seconds": plan.promised.seconds,
                "info_seconds": found.seconds,
                "elapsed": elapsed,
                "promised_rows_seconds": plan.promised.rows_seconds,
                "info_rows_seconds": found.rows_seconds,
                "disk_bytes": found.disk_bytes,
                "promised_disk_bytes": plan.promised.disk_bytes,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
