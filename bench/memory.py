"""Promises of memory over a grid of jobs: measured ≤ promised ≤ budget, and promised ≤ 1.5 × measured.

``python -m bench.memory`` plans and runs every chosen cell in a process of its own and prints what was promised beside
the high-water mark of the process and its children (VmHWM), and the largest size of the run directory beside the
promised one. ``pytest -m grid`` asserts the same.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ooc_ntk
from ooc_ntk.compute.machine import peak_resident_bytes
from ooc_ntk.errors import BudgetError

from .bars import Bar, checked
from .contenders import OURS
from .memory_cells import CELLS, Cell, chosen_cells, make_job, preferences
from .records import Finding, Record
from .registry import part

#: The repository, from which children start.
ROOT = Path(__file__).parents[1]

#: The most that a promise may be above what was measured.
WASTE = 1.5

#: What an ample budget is.
AMPLE = 6 * 2**30

#: A middle budget over the smallest.
MIDDLE = 1.4

#: Cells of the part of ``python -m bench``, the one of its smoke size, and what it judges.
PART_CELLS, SMOKE_CELL = 4, "cnn/resident/ample/few-outputs/float32"
KEPT, WASTED = (
    "measured / promised memory, largest of the grid's cells",
    "promised / measured memory, largest of the cells",
)

#: Seconds between samples of the run directory and of child processes.
INTERVAL_SECONDS = 0.02


@dataclass(frozen=True)
class Outcome:
    """What became of one cell.

    Attributes:
        cell: its name.
        budget: host budget, in bytes.
        smallest: the smallest host budget that the planner named, in bytes; 0 under an ample one.
        promised: of host memory, in bytes.
        measured: high-water mark of the process and its children, in bytes.
        planned: the same when the plan was made.
        baseline: resident bytes that the plan counted for the process itself.
        disk_promised: largest size of the run directory, as promised, in bytes.
        disk_measured: the same as sampled.
        batch_size: samples that are derived together.
        method: how rows are derived.
        layout: tiles and passes in one phrase.
        terms: of the promised host memory, in bytes.
        seconds: wall clock of the run.
        task_seconds: of its tasks.
        promised_seconds: for them; 0 where the machine was not calibrated for one thread.
        moved_bytes: read and written by tasks.
    """

    cell: str
    budget: int
    smallest: int
    promised: int
    measured: int
    planned: int
    baseline: int
    disk_promised: int
    disk_measured: int
    batch_size: int
    method: str
    layout: str
    terms: dict[str, int]
    seconds: float
    task_seconds: float
    promised_seconds: float
    moved_bytes: int

    @property
    def broken(self) -> list[str]:
        """Promises that were not kept, in words."""
        found = []
        if not self.measured <= self.promised:
            found.append("measured > promised")
        if not self.promised <= self.budget:
            found.append("promised > budget")
        if not self.promised <= WASTE * self.measured:
            found.append(f"promised > {WASTE} × measured")
        if not self.disk_measured <= self.disk_promised:
            found.append("disk: measured > promised")
        # A run directory without tiles is a megabyte or two of records; their share of it says nothing.
        if "/spill/" in self.cell and not self.disk_promised <= WASTE * self.disk_measured:
            found.append(f"disk: promised > {WASTE} × measured")
        return found


class _Watch:
    """Largest size of a folder, and of the child processes at once, as sampled."""

    def __init__(self, folder: Path) -> None:
        self.folder_bytes, self.tree_bytes = 0, 0
        self._folder, self._done = folder, threading.Event()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Sample in the background."""
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join()
            self._look()

    def _run(self) -> None:
        while not self._done.wait(INTERVAL_SECONDS):
            self._look()

    def _look(self) -> None:
        self.folder_bytes = max(self.folder_bytes, _folder_bytes(self._folder))
        self.tree_bytes = max(self.tree_bytes, peak_resident_bytes())


def _folder_bytes(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(f"{place}/{name}").st_size
            except OSError:  # renamed or deleted meanwhile
                continue
    return total


def smallest_here(cell: Cell) -> int:
    """Body of a child process: the smallest host budget that the planner names, in bytes."""
    try:
        ooc_ntk.plan(make_job(cell), ooc_ntk.Budget(host="1MiB"), preferences=preferences(cell))
    except BudgetError as error:
        found = re.search(r"--host-memory to (\d+)MiB", str(error))
        if found:
            return int(found[1]) * 2**20
        raise
    raise RuntimeError("a plan fits a MiB")


def run_here(cell: Cell, budget: int, folder: Path) -> dict[str, Any]:
    """Body of a child process: plan and run a cell under a budget, watched."""
    job, limit, out = make_job(cell), ooc_ntk.Budget(host=budget), folder / "run"
    watch = _Watch(out)
    with watch.watching():
        plan = ooc_ntk.plan(job, limit, preferences=preferences(cell), out=folder)
        planned = peak_resident_bytes()
        start = time.perf_counter()
        ooc_ntk.run(job, out, plan=plan, budget=limit, progress=False)
        seconds = time.perf_counter() - start
    measured = max(watch.tree_bytes, peak_resident_bytes())
    info = ooc_ntk.info(out)
    print(plan, file=sys.stderr)
    return {
        "promised": plan.promised.host_bytes,
        "measured": measured,
        "planned": planned,
        "baseline": next(iter(plan.host_terms.values())),
        "disk_promised": plan.promised.disk_bytes,
        "disk_measured": watch.folder_bytes,
        "batch_size": plan.batch_size,
        "method": plan.method,
        "layout": plan.layout.describe(),
        "terms": dict(plan.host_terms),
        "seconds": seconds,
        "task_seconds": info.seconds,
        "promised_seconds": plan.promised.seconds if plan.calibrated else 0.0,
        "moved_bytes": info.bytes_read + info.bytes_written,
    }


def measure_cell(cell: Cell, folder: Path | None = None, environment: dict[str, str] | None = None) -> Outcome:
    """Plan and run one cell in fresh processes.

    Args:
        cell: the cell.
        folder: where run directories go; None takes the system's folder for temporary files.
        environment: variables to set.

    Returns:
        What was promised and measured.

    Raises:
        RuntimeError: if a process fails, with what it printed.
    """
    smallest = 0 if cell.budget == "ample" else int(_child(cell, 0, Path(), environment))
    budget = {"smallest": smallest, "middle": int(MIDDLE * smallest), "ample": AMPLE}[cell.budget]
    with tempfile.TemporaryDirectory(prefix="ooc-ntk-memory-", dir=folder) as made:
        found = _child(cell, budget, Path(made), environment)
    return Outcome(cell=str(cell), budget=budget, smallest=smallest, **found)


def _child(cell: Cell, budget: int, folder: Path, environment: dict[str, str] | None) -> Any:
    """What a child process prints as its last line; a budget of 0 asks for the smallest."""
    command = [sys.executable, "-m", "bench.memory", "--child", str(cell), str(budget), str(folder)]
    # One thread: BLAS threads that wait for each other on a shared machine are slow.
    given = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{cell} under {budget / 2**20:.0f} MiB:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def format_outcomes(outcomes: Sequence[Outcome]) -> str:
    """A table of all cells, in MiB, with the verdict."""
    width = max(len(outcome.cell) for outcome in outcomes)
    lines = [
        f"{'cell':<{width}}  measured promised   budget ratio   disk promised ratio  batch  largest terms",
    ]
    for found in outcomes:
        largest = sorted(found.terms.items(), key=lambda term: -term[1])
        terms = ", ".join(f"{name.partition(' (')[0]} {size / 2**20:.0f}" for name, size in largest[:4])
        lines.append(
            f"{found.cell:<{width}}  {found.measured / 2**20:8.0f} {found.promised / 2**20:8.0f} "
            f"{found.budget / 2**20:8.0f} {found.promised / found.measured:5.2f} {found.disk_measured / 2**20:6.1f} "
            f"{found.disk_promised / 2**20:8.1f} {found.disk_promised / found.disk_measured:5.2f}  "
            f"{found.batch_size:5}  {terms}" + "".join(f"; BROKEN: {text}" for text in found.broken)
        )
    broken = sum(bool(found.broken) for found in outcomes)
    ratios = sorted(found.promised / found.measured for found in outcomes)
    lines.append(
        f"{len(outcomes)} cells, {broken} broken; promised / measured {ratios[0]:.2f} to {ratios[-1]:.2f}, "
        f"median {ratios[len(ratios) // 2]:.2f}"
    )
    return "\n".join(lines)


@part(
    "memory",
    "Promises of memory over a grid of jobs",
    seconds=55,
    limit_seconds=180,
    bars=(Bar(KEPT, 1.0), Bar(WASTED, WASTE)),
    results="memory",
)
def measure(smoke: bool) -> Iterator[Finding]:
    """A few cells of the grid."""
    outcomes = []
    for cell in [Cell.parse(SMOKE_CELL)] if smoke else chosen_cells(PART_CELLS):
        if smoke:
            with tempfile.TemporaryDirectory(prefix="ooc-ntk-memory-") as made:
                found = Outcome(cell=str(cell), budget=AMPLE, smallest=0, **run_here(cell, AMPLE, Path(made)))
        else:
            found = measure_cell(cell)
        outcomes.append(found)
        yield Record(
            found.cell,
            OURS,
            found.seconds,
            peak_bytes=found.measured,
            moved_bytes=found.moved_bytes,
            promised_seconds=found.promised_seconds,
            task_seconds=found.task_seconds,
            promised_bytes=found.promised,
            remark=f"{found.method}, {found.layout}, one thread",
        )
    ratios = [found.measured / found.promised for found in outcomes]
    yield checked(KEPT, max(ratios), 1.0, smoke)
    yield checked(WASTED, 1 / min(ratios), WASTE, smoke)
    yield from format_outcomes(outcomes).splitlines()


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description="Promises of memory over a grid.")
    parser.add_argument("--cells", type=int, default=CELLS, help=f"how many cells (default: {CELLS})")
    parser.add_argument("--only", metavar="TEXT", help="cells whose name holds this text")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where run directories go for the time of a cell")
    parser.add_argument("--json", type=Path, metavar="FILE", help="leave the figures there")
    parser.add_argument("--child", nargs=3, metavar=("CELL", "BUDGET", "FOLDER"), help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.child:
        name, budget, folder = chosen.child
        cell = Cell.parse(name)
        print(json.dumps(run_here(cell, int(budget), Path(folder)) if int(budget) else smallest_here(cell)))
        return
    outcomes = []
    for cell in chosen_cells(chosen.cells):
        if chosen.only is not None and chosen.only not in str(cell):
            continue
        try:
            outcomes.append(measure_cell(cell, chosen.out))
        except RuntimeError as error:
            print(error, file=sys.stderr, flush=True)
            continue
        print(format_outcomes(outcomes[-1:]).splitlines()[1], file=sys.stderr, flush=True)
        if chosen.json:
            chosen.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=2) + "\n")
    if outcomes:
        print(format_outcomes(outcomes))


if __name__ == "__main__":
    main()
