"""Children of ``bench.algebra``: what solves, lets Dask solve, or measures floors, each in a process of its own.

``python -m bench.algebra_children WHAT GIVEN RECORD`` is such a child.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import numpy as np
import torch

import ooc_ntk
from ooc_ntk.algebra import precondition, solvers
from ooc_ntk.compute.machine import limited_threads
from ooc_ntk.planning.solving import PASS_BYTES, tile_cholesky_bytes
from ooc_ntk.storage.reading import forget_pages

from .algebra_floors import measure_floors, tile_product_rate, triangle_files
from .process import peak_resident_bytes, start_child

MIB: Final = 2**20

#: Ridge of every system, over the mean diagonal (that of the demonstration).
RATIO: Final = 1e-3

#: Rows of Dask's chunks at most: 8 MB in float64 (a choice, of the size of its tutorials' and above that of our tiles).
DASK_CHUNK: Final = 1_000

#: What a process may grow by between the reckoning of its budget and the solver's (guessed).
GROWTH_BYTES: Final = MIB


def tiles_budget(kernel: ooc_ntk.Kernel, targets: int, blocks: int) -> ooc_ntk.Budget:
    """A host budget that lets Cholesky on disk have so many blocks along an edge, for this process as it is."""
    size, ample = kernel.shape[1], 2**40
    edge = -(-size // blocks // 16) * 16
    # What a plan takes off a budget: what the process holds, and what libraries may take.
    taken = ample - kernel.plan_solve(targets, budget=ooc_ntk.Budget(host=ample)).host_free
    needed = tile_cholesky_bytes(edge) + 2 * 8 * size * targets + PASS_BYTES
    return ooc_ntk.Budget(host=taken + needed + GROWTH_BYTES)


def solve_here(
    path: str,
    targets: str,
    out: str,
    method: str,
    host: int | None = None,
    blocks: int = 0,
    cold: bool = False,
) -> dict[str, Any]:
    """Body of a child: solve once within a budget, timing its phases.

    Args:
        path: run directory of the kernel.
        targets: file of the targets.
        out: file for the coefficients.
        method: of ``kernel.solve``.
        host: budget in bytes; None is the one for so many blocks, or without them an automatic one.
        blocks: along an edge of Cholesky on disk; 0 for any.
        cold: whether the tiles are dropped from the page cache before every pass; the dropping is not counted.

    Returns:
        Figures.
    """
    kernel, y = ooc_ntk.open(path), np.load(targets)
    mean = float(kernel.diagonal()[: kernel.train_samples].mean())
    budget = tiles_budget(kernel, y.shape[1], blocks) if blocks else ooc_ntk.Budget(host=host)
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
    np.save(out, found.coefficients)
    named = ("method", "iterations", "passes", "rank", "residual", "bytes_read", "bytes_written", "io_ratio")
    return {
        "seconds": seconds - dropping,
        "phases": phases,
        "peak_bytes": peak,
        "budget_bytes": int(budget.host or 0),
        "edge": edge,
        **{name: getattr(found, name) for name in named},
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
        patch.object(solvers, "square_product", timing("passes", solvers.square_product, drop)),
        patch.object(solvers, "pivoted_cholesky", timing("preconditioner, build", solvers.pivoted_cholesky)),
        patch.object(precondition.Preconditioner, "apply", apply),
    ):
        yield


def dask_here(path: str, targets: str, out: str, limit_bytes: int | None) -> dict[str, Any]:
    """Body of a child: Dask's solver for positive definite matrices on the same tiles.

    Args:
        path: run directory of the kernel.
        targets: file of the targets.
        out: file for the coefficients.
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
    size = len(y)
    # Chunks must be squares of one size: the largest that divides the kernel, and is no larger than asked for.
    edge = next(edge for edge in range(min(size, DASK_CHUNK), 0, -1) if not size % edge)
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
    np.save(out, found)
    return {"seconds": seconds, "ended": ""}


def floors_here(path: str, targets: int, rank: int) -> dict[str, Any]:
    """Body of a child: see :func:`~bench.algebra_floors.measure_floors`."""
    return measure_floors(ooc_ntk.open(path), targets, rank)


def tile_rate_here(edge: int) -> dict[str, Any]:
    """Body of a child: FLOP/s of the products of Cholesky on disk."""
    return {"rate": tile_product_rate(edge)}


def peers_here(path: str, targets: str, out: str, who: str, count: int, ridges: list[float]) -> dict[str, Any]:
    """Body of a child: one contender's coefficients, largest eigenpairs and GCV curve, each timed from the tiles on.

    Args:
        path: run directory of the kernel.
        targets: file of the targets.
        out: ``.npz`` file for what it finds.
        who: of :data:`~bench.algebra_peers.CONTENDERS`.
        count: eigenpairs.
        ridges: of the curve; the first is that of the coefficients.

    Returns:
        By task seconds and peak, or why there are none.
    """
    from .algebra_peers import CONTENDERS, TASKS
    from .throughput import reset_peak

    kernel, y, found, figures = ooc_ntk.open(path), np.load(targets), {}, {}
    for task in TASKS:
        reset_peak()
        start = time.perf_counter()
        try:
            found[task] = CONTENDERS[who](task, kernel, y, count, ridges)
        except NotImplementedError as error:
            figures[task] = {"refused": str(error)}
        else:
            figures[task] = {"seconds": time.perf_counter() - start, "peak_bytes": peak_resident_bytes()}
    np.savez(out, **found)
    return figures


CHILDREN: Final[dict[str, Callable[..., dict[str, Any]]]] = {
    "solve": solve_here,
    "peers": peers_here,
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
        start_child("bench.algebra_children", arguments, torch.get_num_threads(), limit_seconds)
    except subprocess.TimeoutExpired:
        ended = f"stopped after {limit_seconds:.0f} s"
    except RuntimeError as error:
        if what != "dask":
            raise
        ended = str(error)
    found = json.loads(record.read_text()) if record.exists() else {"peak_bytes": 0}
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


if __name__ == "__main__":
    destination = Path(sys.argv[3])
    with _recorded_peak(destination):
        result = CHILDREN[sys.argv[1]](**json.loads(sys.argv[2]))
    destination.write_text(json.dumps({"peak_bytes": peak_resident_bytes(), **result}))
