"""Parts ``large`` and ``tiles`` of ``bench.algebra``: kernels larger than the memory that may be taken to solve them.

``python -m bench.algebra_large WHAT GIVEN RECORD`` is the child that solves, measures floors, or lets Dask solve.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import numpy as np
import psutil
import torch

import ooc_ntk
from ooc_ntk.algebra import blockcg, precondition, ridge
from ooc_ntk.compute.machine import limited_threads, resident_bytes
from ooc_ntk.planning.solving import PASS_BYTES, cholesky_bound_bytes, tile_cholesky_bytes
from ooc_ntk.storage.reading import forget_pages

from .algebra_floors import measure_floors, triangle_files, tile_product_rate
from .algebra_kernels import mlp_problem
from .bars import checked
from .process import peak_resident_bytes, start_child
from .table import aligned

MIB: Final = 2**20

#: Bar, as the project set it: time over the larger of the floors.
FLOOR_BAR: Final = 2.0

#: Samples of part ``large``, those that Dask can do beside us, and those of part ``tiles``; smoke sizes.
SAMPLES, DASK_SAMPLES, TILE_SAMPLES, SMOKE_SAMPLES = 30_000, 6_000, 8_000, 300

#: Host budget of part ``large``, and its ridge over the mean diagonal (that of the demonstration).
HOST_BYTES, RATIO = 1536 * MIB, 1e-3

#: Blocks along an edge of the factor of part ``tiles``.
BLOCKS: Final = 4

#: Seconds after which Dask is stopped, and its share of the memory that is free.
DASK_SECONDS, DASK_SHARE = 900.0, 0.8


def tiles_budget(size: int, targets: int, blocks: int) -> ooc_ntk.Budget:
    """A host budget that lets Cholesky on disk have so many blocks along an edge, for this process as it is."""
    edge = -(-size // blocks // 16) * 16
    # Half a step more, so that rounding and a little growth of the process do not make blocks smaller.
    return ooc_ntk.Budget(
        host=resident_bytes() + tile_cholesky_bytes(edge + 8) + 2 * 8 * size * targets + PASS_BYTES
    )


def solve_here(path: str, targets: str, method: str, host: int | None, blocks: int, cold: bool) -> dict[str, Any]:
    """Body of a child: solve once within a budget, timing its phases.

    Args:
        path: run directory of the kernel.
        targets: file of the targets.
        method: of ``kernel.solve``.
        host: budget in bytes; None is the one for so many blocks, or without them an automatic one.
        blocks: along an edge of Cholesky on disk; 0 for any.
        cold: whether the tiles are dropped from the page cache before every pass; the dropping is not counted.

    Returns:
        Figures.
    """
    kernel, y = ooc_ntk.open(path), np.load(targets)
    mean = float(kernel.diagonal()[: kernel.train_samples].mean())
    budget = tiles_budget(len(y), y.shape[1], blocks) if blocks else ooc_ntk.Budget(host=host)
    plan = kernel.plan_solve(y.shape[1], budget=budget)
    edge = next(price.edge for price in plan.prices if price.method == "tiles")
    files = triangle_files(kernel)
    phases = dict.fromkeys(("passes", "preconditioner, build", "preconditioner, apply", "dropping"), 0.0)

    def drop() -> None:
        start = time.perf_counter()
        for file in files:
            forget_pages(file)
        phases["dropping"] += time.perf_counter() - start

    with _timed(phases, drop if cold else None):
        start = time.perf_counter()
        found = kernel.solve(y, RATIO * mean, method=method, budget=budget)
        seconds = time.perf_counter() - start
    peak, dropping = peak_resident_bytes(), phases.pop("dropping")
    np.save(Path(targets).with_name("found.npy"), found.coefficients)
    return {
        "seconds": seconds - dropping,
        "phases": phases,
        "peak_bytes": peak,
        "budget_bytes": int(budget.host or 0),
        "edge": edge,
        **{
            name: getattr(found, name)
            for name in ("method", "iterations", "passes", "rank", "residual", "bytes_read", "bytes_written", "io_ratio")
        },
    }


@contextmanager
def _timed(phases: dict[str, float], drop: Callable[[], None] | None) -> Iterator[None]:
    """Time the phases of conjugate gradients, and drop the page cache before each pass if that is wanted."""

    def timing(phase: str, call: Callable[..., Any], before: Callable[[], None] | None = None) -> Callable[..., Any]:
        @wraps(call)
        def timed(*arguments: Any, **named: Any) -> Any:
            if before is not None:
                before()
            start = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                phases[phase] += time.perf_counter() - start

        return timed

    apply = timing("preconditioner, apply", precondition.Preconditioner.apply)
    with (
        patch.object(ridge, "square_product", timing("passes", ridge.square_product, drop)),
        patch.object(ridge, "pivoted_cholesky", timing("preconditioner, build", ridge.pivoted_cholesky)),
        patch.object(precondition.Preconditioner, "apply", apply),
    ):
        yield


def dask_here(path: str, targets: str, limit_bytes: int | None) -> dict[str, Any]:
    """Body of a child: Dask's solver for positive definite matrices on the same tiles.

    Args:
        path: run directory of the kernel.
        targets: file of the targets.
        limit_bytes: of memory of its own; a child that goes beyond ends with ``MemoryError``. None sets none.

    Returns:
        Figures.
    """
    import dask
    import dask.array as da

    if limit_bytes is not None:
        import resource  # of Unix only

        resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes))
        Path("/proc/self/oom_score_adj").write_text("1000")  # where memory runs out all the same, this process goes
    kernel, y, workers = ooc_ntk.open(path), np.load(targets), torch.get_num_threads()
    size, edge = len(y), min(kernel.chunk_rows, len(y))
    mean = float(kernel.diagonal()[:size].mean())
    stored = kernel.dask()[:size].rechunk((edge, edge)).astype(np.float64)
    matrix = stored + RATIO * mean * da.eye(size, chunks=edge)
    given = da.from_array(y, chunks=(edge, y.shape[1]))
    start = time.perf_counter()
    # Its tasks run side by side, so that BLAS has one thread in each.
    with limited_threads(1), dask.config.set(scheduler="threads", num_workers=workers):
        try:
            found = da.linalg.solve(matrix, given, assume_a="pos").compute()
        except MemoryError as error:
            return {"seconds": time.perf_counter() - start, "ended": f"MemoryError: {error}"}
    seconds = time.perf_counter() - start
    np.save(Path(targets).with_name("dask.npy"), found)
    return {"seconds": seconds, "ended": ""}


def floors_here(path: str, targets: int, rank: int) -> dict[str, Any]:
    """Body of a child: see :func:`~bench.algebra_floors.measure_floors`."""
    return measure_floors(ooc_ntk.open(path), targets, rank)


def tile_rate_here(edge: int) -> dict[str, Any]:
    """Body of a child: FLOP/s of the products of Cholesky on disk."""
    return {"rate": tile_product_rate(edge)}


CHILDREN: Final[dict[str, Callable[..., dict[str, Any]]]] = {
    "solve": solve_here,
    "dask": dask_here,
    "floors": floors_here,
    "tile-rate": tile_rate_here,
}


def apart(what: str, folder: Path, *, here: bool = False, limit_seconds: float | None = None, **given: Any) -> Any:
    """Run one of :data:`CHILDREN` in a fresh process.

    Args:
        what: its name.
        folder: for its record.
        here: run it in this process instead, in smoke size.
        limit_seconds: after which it is stopped.
        given: its arguments.

    Returns:
        What it found, with ``peak_bytes``; of one that was stopped or failed, how it ``ended``.
    """
    if here:
        return {"peak_bytes": 0, **CHILDREN[what](**given)}
    record, ended = folder / f"{what}.json", ""
    record.unlink(missing_ok=True)
    try:
        arguments = [what, json.dumps(given), str(record)]
        start_child("bench.algebra_large", arguments, torch.get_num_threads(), limit_seconds)
    except subprocess.TimeoutExpired:
        ended = f"stopped after {limit_seconds:.0f} s"
    except RuntimeError as error:
        if what != "dask":
            raise
        ended = str(error)
    found = json.loads(record.read_text())
    return {**found, "ended": ended} if ended else found


@contextmanager
def _recorded_peak(record: Path) -> Iterator[None]:
    """Leave the peak of this process in a file twice a second, so that it is known of one that is stopped."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            staged = record.with_suffix(".part")
            staged.write_text(json.dumps({"peak_bytes": peak_resident_bytes()}))
            os.replace(staged, record)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def large(folder: Path, smoke: bool) -> list[str]:
    """A kernel of 3.6 GB solved within 1.5 GiB, beside floors and Dask."""
    size = SMOKE_SAMPLES if smoke else SAMPLES
    problem = mlp_problem(folder, size)
    kernel = problem.kernel
    with tempfile.TemporaryDirectory(prefix="ooc-ntk-bench-") as name:
        scratch, here = Path(name), smoke
        y = scratch / "targets.npy"
        np.save(y, problem.targets)
        wanted: dict[str, Any] = {"path": str(kernel.path), "targets": str(y), "method": "cg", "blocks": 0}
        wanted["host"] = None if smoke else HOST_BYTES
        solved = apart("solve", scratch, here=here, cold=False, **wanted)
        floors = apart("floors", scratch, here=here, path=str(kernel.path), targets=10, rank=solved["rank"])
        cold = apart("solve", scratch, here=here, cold=True, **wanted)
        lines = _solved_lines(kernel, solved, cold, floors, smoke)
        lines += _dask_lines(scratch, kernel, y, solved, smoke)
    if not smoke:
        lines += _both(folder)
    return lines


def _solved_lines(
    kernel: ooc_ntk.Kernel, solved: dict[str, Any], cold: dict[str, Any], floors: dict[str, Any], smoke: bool
) -> list[str]:
    size, rank, steps = kernel.train_samples, solved["rank"], solved["iterations"]
    count = 10
    flops = {
        # Both sides of the triangle for every pass.
        "pass": 2 * size * size * count * solved["passes"],
        # Two applications a step: the inverse root on both sides.
        "apply": 2 * 4 * size * rank * count * steps,
        # What is left of the columns that were drawn; two Gram matrices, one triangle each; two rotations.
        "build": (1 + 2 + 4) * size * rank * rank,
    }
    products = {name: flops[name] / floors["rates"][name] for name in flops}
    triangle = size * (size + 1) // 2 * kernel.dtype.itemsize
    needed = {"as it is": solved, "dropped": cold}
    rows: list[tuple[str, ...]] = [("page cache", *needed)]
    disk = {}
    for name, run in needed.items():
        needed_bytes = run["passes"] * triangle + run["rank"] * size * kernel.dtype.itemsize
        disk[name] = needed_bytes / floors["read"][name]
    gemm = sum(products.values())
    floor = {name: max(disk[name], gemm) for name in needed}
    figures: dict[str, Callable[[dict[str, Any], str], str]] = {
        "seconds": lambda run, _: f"{run['seconds']:.1f}",
        "  passes": lambda run, _: f"{run['phases']['passes']:.1f}",
        "  preconditioner, build": lambda run, _: f"{run['phases']['preconditioner, build']:.1f}",
        "  preconditioner, apply": lambda run, _: f"{run['phases']['preconditioner, apply']:.1f}",
        "  beside these": lambda run, _: f"{run['seconds'] - sum(run['phases'].values()):.1f}",
        "peak, MiB": lambda run, _: f"{run['peak_bytes'] / MIB:,.0f}",
        "read, MiB": lambda run, _: f"{run['bytes_read'] / MIB:,.0f}",
        "plain reading, GB/s": lambda _, name: f"{floors['read'][name] / 1e9:.2f}",
        "disk floor, s": lambda _, name: f"{disk[name]:.1f}",
        "GEMM floor, s": lambda _, name: f"{gemm:.1f}",
        "seconds / larger floor": lambda run, name: f"{run['seconds'] / floor[name]:.2f}",
    }
    rows += [(what, *(text(run, name) for name, run in needed.items())) for what, text in figures.items()]
    budget = solved["budget_bytes"]
    cache = psutil.virtual_memory().available
    ratio = solved["seconds"] / floor["as it is"]
    return [
        f"  {size:,} digits ({size * size * kernel.dtype.itemsize / 1e9:.1f} GB of {kernel.dtype}), 10 targets, ridge "
        f"{RATIO:g} of the mean diagonal, within {budget / MIB:,.0f} MiB: {steps} steps, rank {rank}, "
        f"{solved['passes']} passes, residual {solved['residual']:.1e}",
        f"  the triangle that passes read, {triangle / MIB:,.0f} MiB, "
        f"{'fits' if triangle < cache else 'does not fit'} in the page cache ({cache / MIB:,.0f} MiB are free for it)",
        *aligned(rows),
        "  GEMM floor: "
        + ", ".join(f"{name} {products[name]:.1f} s at {floors['rates'][name] / 1e9:.1f} GFLOP/s" for name in flops),
        "  one pass, seconds: " + ", ".join(f"{name} {value:.2f}" for name, value in floors["pass"].items()),
        checked("peak / budget", solved["peak_bytes"] / budget if budget else 0.0, 1.0, smoke),
        checked("seconds / larger floor", ratio, FLOOR_BAR, smoke),
    ]


def _dask_lines(
    scratch: Path, kernel: ooc_ntk.Kernel, targets: Path, solved: dict[str, Any], smoke: bool
) -> list[str]:
    """Dask on the same problem, in one or two lines."""
    limit = None if smoke else int(DASK_SHARE * psutil.virtual_memory().available)
    peer = apart(
        "dask",
        scratch,
        here=smoke,
        limit_seconds=DASK_SECONDS,
        path=str(kernel.path),
        targets=str(targets),
        limit_bytes=limit,
    )
    allowed = "" if limit is None else f", {limit / MIB:,.0f} MiB allowed"
    name, peak = f"  dask.array.linalg.solve, N = {kernel.train_samples:,}", f"peak {peer['peak_bytes'] / MIB:,.0f} MiB"
    if peer["ended"]:
        return [f"{name}: no solution: {peer['ended']}; {peak}{allowed}"]
    ours, theirs = np.load(scratch / "found.npy"), np.load(scratch / "dask.npy")
    error = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
    lines = [f"{name}: {peer['seconds']:.1f} s, {peak}{allowed}; our coefficients differ by {error:.1e}"]
    if not smoke:
        lines.append(
            f"  Dask / ours ({solved['method']}, {solved['seconds']:.1f} s, {solved['peak_bytes'] / MIB:,.0f} MiB): "
            f"time {peer['seconds'] / solved['seconds']:.2f}, peak {peer['peak_bytes'] / solved['peak_bytes']:.2f}"
        )
    return lines


def _both(folder: Path) -> list[str]:
    """A size that Dask can do, too."""
    problem = mlp_problem(folder, DASK_SAMPLES)
    with tempfile.TemporaryDirectory(prefix="ooc-ntk-bench-") as name:
        scratch = Path(name)
        y = scratch / "targets.npy"
        np.save(y, problem.targets)
        path = str(problem.kernel.path)
        solved = apart(
            "solve", scratch, path=path, targets=str(y), method="auto", host=HOST_BYTES, blocks=0, cold=False
        )
        return _dask_lines(scratch, problem.kernel, y, solved, False)


def tiles(folder: Path, smoke: bool) -> list[str]:
    """Cholesky on disk in several blocks."""
    size = SMOKE_SAMPLES if smoke else TILE_SAMPLES
    problem = mlp_problem(folder, size)
    with tempfile.TemporaryDirectory(prefix="ooc-ntk-bench-") as name:
        scratch = Path(name)
        y = scratch / "targets.npy"
        np.save(y, problem.targets)
        path = str(problem.kernel.path)
        solved = apart(
            "solve", scratch, path=path, targets=str(y), method="tiles", host=None, blocks=BLOCKS, cold=False
        )
        rate = apart("tile-rate", scratch, edge=solved["edge"])["rate"]
    edge, floor = solved["edge"], size**3 / 3 / rate
    bound = cholesky_bound_bytes(size, tile_cholesky_bytes(edge))
    return [
        f"  N = {size:,}, 10 targets, blocks of {edge:,} (N/edge = {size / edge:.2f}), residual {solved['residual']:.1e}",
        f"  {solved['seconds']:.1f} s; n³/3 multiplications and additions at {rate / 1e9:.1f} GFLOP/s, measured in the "
        f"same run: {floor:.1f} s",
        f"  factor read {solved['bytes_read'] / MIB:,.0f} MiB with the kernel, written "
        f"{solved['bytes_written'] / MIB:,.0f} MiB; bound of the factorisation {bound / MIB:,.0f} MiB",
        f"seconds / GEMM floor = {solved['seconds'] / floor:.2f}",
        f"bytes moved / bound = {solved['io_ratio']:.2f}",
        f"peak {solved['peak_bytes'] / MIB:,.0f} MiB of {solved['budget_bytes'] / MIB:,.0f} allowed",
    ]


if __name__ == "__main__":
    destination = Path(sys.argv[3])
    with _recorded_peak(destination):
        result = CHILDREN[sys.argv[1]](**json.loads(sys.argv[2]))
    destination.write_text(json.dumps({"peak_bytes": peak_resident_bytes(), **result}))
