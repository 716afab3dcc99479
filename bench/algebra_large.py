"""Parts ``large`` and ``tiles`` of ``bench.algebra``: kernels larger than the memory that solving may take."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil

import ooc_ntk
from ooc_ntk.planning.solving import cholesky_bound_bytes, tile_cholesky_bytes

from .algebra_children import MIB, RATIO, apart
from .algebra_kernels import mlp_problem
from .bars import checked
from .records import Finding
from .table import aligned

#: Bar, as the project set it: time over the larger of the floors.
FLOOR_BAR: Final = 2.0

#: Samples of part ``large``, those that Dask can do beside us, and those of part ``tiles``; smoke sizes.
SAMPLES, DASK_SAMPLES, TILE_SAMPLES, SMOKE_SAMPLES, SMOKE_TILE_SAMPLES = 30_000, 6_000, 8_000, 300, 1_200

#: Host budget of part ``large``.
HOST_BYTES: Final = 1536 * MIB

#: Blocks along an edge of the factor of part ``tiles``.
BLOCKS: Final = 4

#: Seconds after which Dask is stopped, and its share of the memory that is free.
DASK_SECONDS, DASK_SHARE = 300.0, 0.8


def large(folder: Path, smoke: bool) -> list[Finding]:
    """A kernel of 3.6 GB solved within 1.5 GiB, beside floors and Dask."""
    kernel, targets = problem_file(folder, SMOKE_SAMPLES if smoke else SAMPLES)
    path, count = str(kernel.path), np.load(targets).shape[1]
    wanted: dict[str, Any] = {
        "path": path,
        "targets": str(targets),
        "method": "cg",
        "host": None if smoke else HOST_BYTES,
    }
    with tempfile.TemporaryDirectory(prefix="ooc-ntk-bench-") as name:
        scratch = Path(name)
        wanted["out"] = str(scratch / "ours.npy")
        solved = apart("solve", scratch, here=smoke, **wanted)
        floors = apart("floors", scratch, here=smoke, path=path, targets=count, rank=solved["rank"])
        cold = apart("solve", scratch, here=smoke, **wanted, cold=True)
        lines = _solved_lines(kernel, count, {"as it is": solved, "dropped": cold}, floors, smoke)
        lines += _dask_lines(scratch, kernel, targets, solved, smoke)
        if smoke:
            return lines
        smaller, targets = problem_file(folder, DASK_SAMPLES)  # that Dask can do, too
        wanted |= {"path": str(smaller.path), "targets": str(targets), "method": "auto"}
        return lines + _dask_lines(scratch, smaller, targets, apart("solve", scratch, **wanted), smoke)


def problem_file(folder: Path, samples: int) -> tuple[ooc_ntk.Kernel, Path]:
    """A kernel, and a file of its targets."""
    problem = mlp_problem(folder, samples)
    targets = folder / f"targets-{samples}.npy"
    np.save(targets, problem.targets)
    return problem.kernel, targets


def gemm_seconds(size: int, targets: int, solved: dict[str, Any], rates: dict[str, float]) -> dict[str, float]:
    """What the products of preconditioned conjugate gradients take at the rates of products of their shapes.

    Args:
        size: rows of the kernel.
        targets: right-hand sides.
        solved: ``passes``, ``iterations`` and ``rank``.
        rates: FLOP/s of a ``pass``, of an ``apply`` and of a ``build`` of the preconditioner.

    >>> solved = {"passes": 2, "iterations": 1, "rank": 0}
    >>> gemm_seconds(1000, 10, solved, {"pass": 4e7, "apply": 1.0, "build": 1.0})
    {'pass': 1.0, 'apply': 0.0, 'build': 0.0}
    """
    rank = solved["rank"]
    flops = {
        # Every entry once: those above the diagonal are taken from below it.
        "pass": 2 * size * size * targets * solved["passes"],
        # An inverse root on both sides of every product: the basis and its transpose each time.
        "apply": 2 * 4 * size * rank * targets * solved["iterations"],
        # The columns less what is there already; two Gram matrices, one triangle each; two rotations.
        "build": (1 + 2 + 4) * size * rank * rank,
    }
    return {name: flops[name] / rates[name] for name in flops}


def _solved_lines(
    kernel: ooc_ntk.Kernel, targets: int, runs: dict[str, dict[str, Any]], floors: dict[str, Any], smoke: bool
) -> list[Finding]:
    """What was measured, of the page cache as it is and dropped before every pass, beside the floors."""
    size, item, solved = kernel.train_samples, kernel.dtype.itemsize, runs["as it is"]
    triangle, free = size * (size + 1) // 2 * item, psutil.virtual_memory().available
    disk, larger = {}, {}
    for name, run in runs.items():
        disk[name] = (run["passes"] * triangle + run["rank"] * size * item) / floors["read"][name]
        larger[name] = max(disk[name], sum(gemm_seconds(size, targets, run, floors["rates"]).values()))
    rows: list[tuple[str, ...]] = [
        ("page cache", *runs),
        ("seconds", *(f"{run['seconds']:.1f}" for run in runs.values())),
    ]
    rows += [(f"  {phase}", *(f"{run['phases'][phase]:.1f}" for run in runs.values())) for phase in solved["phases"]]
    rows += [
        ("  beside these", *(f"{run['seconds'] - sum(run['phases'].values()):.1f}" for run in runs.values())),
        ("peak, MiB", *(f"{run['peak_bytes'] / MIB:,.0f}" for run in runs.values())),
        ("read, MiB", *(f"{run['bytes_read'] / MIB:,.0f}" for run in runs.values())),
        ("plain reading, GB/s", *(f"{floors['read'][name] / 1e9:.2f}" for name in runs)),
        ("disk floor, s", *(f"{disk[name]:.1f}" for name in runs)),
        ("larger floor, s", *(f"{larger[name]:.1f}" for name in runs)),
        ("seconds / larger floor", *(f"{run['seconds'] / larger[name]:.2f}" for name, run in runs.items())),
    ]
    products = gemm_seconds(size, targets, solved, floors["rates"])
    budget = solved["budget_bytes"] or free
    return [
        f"  {size:,} digits ({size * size * item / 1e9:.1f} GB of {kernel.dtype}), {targets} targets, ridge {RATIO:g} "
        f"of the mean diagonal, within {budget / MIB:,.0f} MiB: {solved['iterations']} steps, rank {solved['rank']}, "
        f"{solved['passes']} passes, residual {solved['residual']:.1e}",
        f"  the triangle that a pass reads, {triangle / MIB:,.0f} MiB, "
        f"{'fits' if triangle < free else 'does not fit'} in the page cache ({free / MIB:,.0f} MiB are free for it)",
        *aligned(rows),
        "  GEMM floor: "
        + ", ".join(
            f"{name} {seconds:.1f} s at {floors['rates'][name] / 1e9:.1f} GFLOP/s" for name, seconds in products.items()
        ),
        "  one pass, seconds: " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in floors["pass"].items()),
        checked("peak / budget", solved["peak_bytes"] / budget, 1.0, smoke),
        checked("seconds / larger floor", solved["seconds"] / larger["as it is"], FLOOR_BAR, smoke),
    ]


def _dask_lines(scratch: Path, kernel: ooc_ntk.Kernel, targets: Path, solved: dict[str, Any], smoke: bool) -> list[str]:
    """Dask on the same problem, in one or two lines."""
    limit = None if smoke else int(DASK_SHARE * psutil.virtual_memory().available)
    peer = apart(
        "dask",
        scratch,
        here=smoke,
        limit_seconds=DASK_SECONDS,
        path=str(kernel.path),
        targets=str(targets),
        out=str(scratch / "dask.npy"),
        limit_bytes=limit,
    )
    allowed = "" if limit is None else f", {limit / MIB:,.0f} MiB allowed"
    name, peak = f"  dask.array.linalg.solve, N = {kernel.train_samples:,}", f"peak {peer['peak_bytes'] / MIB:,.0f} MiB"
    if peer["ended"]:
        return [f"{name}: no solution: {peer['ended']}; {peak}{allowed}"]
    ours, theirs = np.load(scratch / "ours.npy"), np.load(scratch / "dask.npy")
    error = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
    lines = [f"{name}: {peer['seconds']:.1f} s, {peak}{allowed}; our coefficients differ by {error:.1e}"]
    if not smoke:
        lines.append(
            f"  Dask / ours ({solved['method']}, {solved['seconds']:.1f} s, {solved['peak_bytes'] / MIB:,.0f} MiB): "
            f"time {peer['seconds'] / solved['seconds']:.2f}, peak {peer['peak_bytes'] / solved['peak_bytes']:.2f}"
        )
    return lines


def tiles(folder: Path, smoke: bool) -> list[Finding]:
    """Cholesky on disk in several blocks."""
    size = SMOKE_TILE_SAMPLES if smoke else TILE_SAMPLES
    kernel, targets = problem_file(folder, size)
    given: dict[str, Any] = {"path": str(kernel.path), "targets": str(targets), "method": "tiles", "blocks": BLOCKS}
    with tempfile.TemporaryDirectory(prefix="ooc-ntk-bench-") as name:
        solved = apart("solve", Path(name), out=f"{name}/ours.npy", **given)
        rate = apart("tile-rate", Path(name), edge=solved["edge"])["rate"]
    edge, floor = solved["edge"], size**3 / 3 / rate
    bound = cholesky_bound_bytes(size, tile_cholesky_bytes(edge))
    return [
        f"  N = {size:,}, 10 targets, blocks of {edge:,} (N/edge = {size / edge:.2f}), "
        f"residual {solved['residual']:.1e}",
        f"  {solved['seconds']:.1f} s; n³/3 multiplications and additions at {rate / 1e9:.1f} GFLOP/s, measured in the "
        f"same run: {floor:.1f} s",
        f"  factor read {solved['bytes_read'] / MIB:,.0f} MiB with the kernel, written "
        f"{solved['bytes_written'] / MIB:,.0f} MiB; bound of the factorisation {bound / MIB:,.0f} MiB",
        f"seconds / GEMM floor = {solved['seconds'] / floor:.2f}",
        f"bytes moved / bound = {solved['io_ratio']:.2f}",
        f"peak {solved['peak_bytes'] / MIB:,.0f} MiB of {solved['budget_bytes'] / MIB:,.0f} allowed",
    ]
