"""Out of core: what reading tiles from disk costs, how many bytes move, the largest kernels, and resuming.

``python -m bench.outofcore`` prints four parts, each in ratios of one run:

- ``spill``: a job whose tiles are eight times the host budget beside the same job with all of them in memory, and
  the time that its bytes take at the disk rate measured in the same run.
- ``bytes``: measured Q beside the promised one and beside the lower bound (Beaumont et al. 2022), for squares and
  triangles, N/b whole and not.
- ``large``: the kernel of an MLP that is four times the host budget.
- ``resume``: a finished run typed again, with few tiles and with ten thousand.

Every run is a process of its own. The networks are dense on purpose (``representation="dense"``): with layer factors
their tiles would fit in memory, and nothing would have to be read.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

import ooc_ntk
from ooc_ntk.planning.memory import LIBRARY_GROWTH_BYTES, PROCESS
from ooc_ntk.storage.diskrate import measure_disk

from .bars import Bar, checked
from .contenders import DEVICE, OURS
from .exact import machine
from .models import build
from .process import ROOT, calibrate_once, peak_resident_bytes, start_child
from .records import Finding, Record, texts
from .registry import part
from .table import aligned

MIB: Final = 2**20

#: Bars, as the project set them.
SPILL_BAR, TRIANGLE_BAR, WHOLE_BAR, OTHER_BAR, PROMISE_BAR = 1.4, 1.3, 1.6, 2.3, 0.05
NO_OP_BAR, MANY_TILES_BAR = 2.0, 5.0

#: Samples and width of part ``spill``: in a run of its own, and of the same bytes in half the time beside other parts.
SPILL, SHORT_SPILL, SMOKE_SPILL = (6_000, 2_700), (3_000, 5_400), (300, 64)

#: What is judged.
SPILLED, FINISHED = (
    "spilled / in memory, seconds, tiles eight times the budget",
    "finished run typed again, few tiles, s",
)
MANY_FINISHED = "finished run typed again, ten thousand tiles, s"


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        samples: train samples.
        width: hidden units of the network 64-width-10; 0 takes the benchmark's MLP.
        preferences: what is fixed of the plan.
        host_bytes: host budget; None is ample.
        room_bytes: in place of it, what the budget leaves beside the process itself (S of the lower bound).
    """

    samples: int
    width: int
    preferences: Mapping[str, Any]
    host_bytes: int | None = None
    room_bytes: int | None = None

    def job(self) -> ooc_ntk.Job:
        """The job: one output, so that a sample has one Jacobian row; of the MLP all ten, as its trace."""
        if not self.width:
            model, inputs = build("mlp", self.samples, False)
            return ooc_ntk.Job(model=model, train=inputs, device=DEVICE)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, self.width), nn.Tanh(), nn.Linear(self.width, 10))
        inputs = torch.randn(self.samples, 64, generator=torch.Generator().manual_seed(1))
        return ooc_ntk.Job(model=model, train=inputs, kernel="output:0", device=DEVICE)


@dataclass(frozen=True)
class Measured:
    """What a run took.

    Attributes:
        seconds: wall clock of the run, without planning.
        promised_seconds: what the plan promised for its tasks.
        rows_seconds: of its rows tasks.
        kernel_seconds: of its kernel tasks.
        peak_bytes: VmHWM of its process.
        promised_bytes: what the plan promised for it.
        budget_bytes: host budget.
        held_bytes: tiles in all.
        read_bytes: bytes read by tasks.
        written_bytes: bytes written by tasks.
        moved: measured Q over the promised one; None where nothing is spilled.
        ratio: measured Q/LB.
        side: N/b, with b the square root of f·S/s_K.
        share: f, the share of fast memory given to the kernel.
        layout: the layout in one phrase.
        disk_write: bytes/s, measured after the run.
        disk_read: bytes/s.
    """

    seconds: float
    promised_seconds: float
    rows_seconds: float
    kernel_seconds: float
    peak_bytes: int
    promised_bytes: int
    budget_bytes: int
    held_bytes: int
    read_bytes: int
    written_bytes: int
    moved: float | None
    ratio: float | None
    side: float
    share: float
    layout: str
    disk_write: float
    disk_read: float


def measure_here(case: Case, folder: Path) -> Measured:
    """Body of a child process: plan and run once."""
    job, wanted = case.job(), ooc_ntk.Preferences(**case.preferences)
    host: int | None = case.host_bytes
    if case.room_bytes is not None:
        probe = ooc_ntk.plan(job, ooc_ntk.Budget("64GiB"), preferences=replace(wanted, order=None), out=folder)
        fixed = probe.host_terms[PROCESS]
        host = fixed + fixed_host_bytes_beside() + case.room_bytes
    budget = ooc_ntk.Budget(host or "64GiB", disk="60GiB")
    plan = ooc_ntk.plan(job, budget, preferences=wanted, out=folder)
    start = time.perf_counter()
    kernel = ooc_ntk.run(job, folder / "run", plan=plan, progress=False, proof=False)
    seconds = time.perf_counter() - start
    peak, info = peak_resident_bytes(), ooc_ntk.info(kernel.path)
    spilled = plan.dataflow == "spill"
    room = plan.limits.host - plan.host_terms[PROCESS]
    room -= fixed_host_bytes_beside()
    most = max(len(block.tiles) for block in plan.superblocks)
    share = most * plan.tile_samples**2 * 4 / room
    rates = measure_disk(folder)
    return Measured(
        seconds=seconds,
        promised_seconds=plan.promised.seconds,
        rows_seconds=info.rows_seconds,
        kernel_seconds=info.kernel_seconds,
        peak_bytes=peak,
        promised_bytes=plan.promised.host_bytes,
        budget_bytes=plan.limits.host,
        held_bytes=plan.held_bytes,
        read_bytes=info.bytes_read,
        written_bytes=info.bytes_written,
        moved=info.moved_bytes / plan.moved_bytes if spilled else None,
        ratio=info.io_ratio,
        side=plan.train_samples / (share * room / 4) ** 0.5,
        share=share,
        layout=f"{plan.layout.describe()}, {plan.order}",
        disk_write=rates.write,
        disk_read=rates.read,
    )


def fixed_host_bytes_beside() -> int:
    """What the model of memory counts for libraries beside the process itself."""
    return LIBRARY_GROWTH_BYTES


def measure_apart(case: Case, *, here: bool = False) -> Measured:
    """Measure one run in a fresh process (or here), in a folder that is deleted afterwards."""
    with tempfile.TemporaryDirectory(prefix="ooc-ntk-bench-") as folder:
        if here:
            return measure_here(case, Path(folder))
        record = Path(folder) / "record.json"
        given = json.dumps({**asdict(case), "folder": folder})
        start_child("bench.outofcore", ["--child", given, "--record", str(record)], torch.get_num_threads())
        return Measured(**json.loads(record.read_text()))


DENSE: Final = {"representation": "dense"}


def spill(smoke: bool, size: tuple[int, int] = SPILL, *, here: bool = False) -> list[Finding]:
    """Tiles of eight times the host budget, beside the same job in memory."""
    samples, width = SMOKE_SPILL if smoke else size
    resident = measure_apart(Case(samples, width, {**DENSE, "dataflow": "resident"}), here=here)
    budget = None if smoke else resident.held_bytes // 8
    spilled = measure_apart(Case(samples, width, {**DENSE, "dataflow": "spill"}, budget), here=here)
    floor = spilled.held_bytes / spilled.disk_write + max(0, spilled.read_bytes) / spilled.disk_read
    lines = [("", "in memory", "spilled")]
    for name, value in (
        ("seconds", lambda run: f"{run.seconds:.1f}"),
        ("  rows", lambda run: f"{run.rows_seconds:.1f}"),
        ("  kernel", lambda run: f"{run.kernel_seconds:.1f}"),
        ("host budget, MiB", lambda run: f"{run.budget_bytes / MIB:,.0f}"),
        ("peak, MiB", lambda run: f"{run.peak_bytes / MIB:,.0f}"),
        ("tiles, MiB", lambda run: f"{run.held_bytes / MIB:,.0f}"),
        ("read, MiB", lambda run: f"{run.read_bytes / MIB:,.0f}"),
        ("written, MiB", lambda run: f"{run.written_bytes / MIB:,.0f}"),
    ):
        lines.append((name, value(resident), value(spilled)))
    workload = f"64-{width}-10, one output, N = {samples:,}, dense"
    return [
        _record(workload, "in memory", resident, samples, resident.seconds),
        _record(workload, "tiles eight times the budget", spilled, samples, resident.seconds),
        *aligned(lines),
        f"  in memory: {resident.layout}; spilled: {spilled.layout}",
        f"  disk, measured in the same process: {spilled.disk_write / 1e9:.2f} GB/s written and synced, "
        f"{spilled.disk_read / 1e9:.2f} GB/s read: {floor:.1f} s for these bytes",
        f"tiles / budget = {spilled.held_bytes / spilled.budget_bytes:.1f}",
        checked(SPILLED, spilled.seconds / resident.seconds, SPILL_BAR, smoke),
    ]


def _record(workload: str, way: str, run: Measured, samples: int, base: float) -> Record:
    return Record(
        workload,
        f"{OURS}, {way}",
        run.seconds,
        samples,
        "out of core",
        ratio=run.seconds / base,
        peak_bytes=run.peak_bytes,
        moved_bytes=run.read_bytes + run.written_bytes,
        promised_seconds=run.promised_seconds,
        task_seconds=run.rows_seconds + run.kernel_seconds,
        promised_bytes=run.promised_bytes,
        figures={"held_bytes": run.held_bytes, "budget_bytes": run.budget_bytes},
        remark=run.layout,
    )


#: Cases of part ``bytes``: name, samples, MiB beside the process, order of superblocks, bar.
MOVED: Final = (
    ("square, N/b whole", 23_000, 310, "square", WHOLE_BAR),
    ("square, N/b not whole", 17_000, 140, "square", OTHER_BAR),
    ("triangle", 40_000, 60, "triangle", TRIANGLE_BAR),
    ("triangle and strip", 28_000, 50, "triangle", TRIANGLE_BAR),
    ("as planned", 20_000, 140, None, OTHER_BAR),
)

#: Beside other parts: one that a minute is enough for.
SHORT_MOVED: Final = (("as planned", 6_000, 40, None, OTHER_BAR),)


def moved_figures(name: str, samples: int) -> tuple[str, str]:
    """The figures that are judged of a case: Q over the bound, and over what was promised."""
    return f"Q/LB, {name}, N = {samples:,}", f"share by which Q differs from its promise, {name}, N = {samples:,}"


def moved(smoke: bool, cases: Sequence[tuple[str, int, int, str | None, float]] = MOVED) -> list[Finding]:
    """Measured Q beside the promised one and the bound."""
    rows: list[tuple[str, ...]] = [("", "N", "N/b", "f", "Q/LB", "bar", "Q / promised", "peak / promised", "layout")]
    found: list[Finding] = []
    for name, samples, room, order, bar in cases:
        preferences = {**DENSE, "dataflow": "spill", **({"order": order} if order else {})}
        wanted = Case(samples, 260, preferences, room_bytes=room * MIB)
        run = measure_apart(Case(samples // 240, 16, preferences, room_bytes=40 * MIB) if smoke else wanted)
        assert run.ratio is not None
        assert run.moved is not None
        over_bound, over_promise = moved_figures(name, samples)
        found += [
            _record(f"64-260-10, one output, N = {samples:,}, dense", f"spilled, {name}", run, samples, run.seconds),
            checked(over_bound, run.ratio, bar, smoke),
            checked(over_promise, abs(run.moved - 1), PROMISE_BAR, smoke),
        ]
        rows.append(
            (
                name,
                f"{samples:,}",
                f"{run.side:.2f}",
                f"{run.share:.2f}",
                f"{run.ratio:.2f}",
                f"{bar:.1f}",
                f"{run.moved:.3f}",
                f"{run.peak_bytes / run.promised_bytes:.2f}",
                run.layout,
            )
        )
    return [*aligned(rows), *found]


def large(smoke: bool) -> list[Finding]:
    """A kernel four times the host budget."""
    run = measure_apart(Case(400 if smoke else 40_000, 0, {}, (1024 if smoke else 1536) * MIB))
    return [
        f"MLP, N = {400 if smoke else 40_000:,}: {run.seconds:.0f} s, peak {run.peak_bytes / MIB:,.0f} MiB of "
        f"{run.promised_bytes / MIB:,.0f} promised and {run.budget_bytes / MIB:,.0f} allowed"
        f"{_verdict(run.peak_bytes <= run.promised_bytes <= run.budget_bytes)}; {run.layout}"
        + (f"; Q/LB {run.ratio:.2f}" if run.ratio is not None else "")
    ]


JOB: Final = """
import torch


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10))
"""


def resume(smoke: bool, *, many: bool = True) -> list[Finding]:
    """A finished run typed again: the whole command, from the shell's prompt back to it."""
    found: list[Finding] = []
    few = (FINISHED, 300, 100, NO_OP_BAR)
    for figure, samples, tile, bar in (
        few,
        *([(MANY_FINISHED, 300 if smoke else 1_600, 100 if smoke else 11, MANY_TILES_BAR)] if many else []),
    ):
        with tempfile.TemporaryDirectory(prefix="ooc-ntk-bench-") as folder:
            (Path(folder) / "net.py").write_text(JOB)
            command = [sys.executable, "-m", "ooc_ntk", "run", "--model", f"{folder}/net.py:net", "--train"]
            command += [f"digits[0:{samples}]", "--tile-samples", str(tile), "--out", f"{folder}/run", "--quiet"]
            subprocess.run([*command, "--no-proof"], check=True, cwd=ROOT)
            tiles = ooc_ntk.info(f"{folder}/run").kernel_tiles
            seconds = min(_timed(partial(subprocess.run, command, check=True, cwd=ROOT)) for _ in range(3))
        start = min(
            _timed(lambda: subprocess.run([sys.executable, "-c", "import torch"], check=True)) for _ in range(3)
        )
        found.append(f"{tiles:,} tiles: {seconds:.2f} s; importing torch alone takes {start:.2f} s")
        found.append(checked(figure, seconds, bar, smoke))
    return found


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _verdict(met: bool) -> str:
    return ": met" if met else ": MISSED"


PARTS: Final = {"spill": spill, "bytes": moved, "large": large, "resume": resume}


@part(
    "outofcore",
    "Tiles on disk beside tiles in memory",
    seconds=110,
    limit_seconds=300,
    bars=(
        Bar(SPILLED, SPILL_BAR),
        *(Bar(moved_figures(name, samples)[0], bar) for name, samples, _, _, bar in SHORT_MOVED),
        *(Bar(moved_figures(name, samples)[1], PROMISE_BAR) for name, samples, _, _, _ in SHORT_MOVED),
        Bar(FINISHED, NO_OP_BAR),
    ),
    results="outofcore",
)
def measure(smoke: bool) -> Iterator[Finding]:
    """Parts ``spill``, ``bytes`` and ``resume``, smaller."""
    yield from spill(smoke, SHORT_SPILL, here=smoke)
    if smoke:
        return
    yield from ["", *moved(smoke, SHORT_MOVED)]
    yield from ["", *resume(smoke, many=False)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m bench.outofcore", description="Kernels and tiles larger than RAM.")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--smoke", action="store_true", help="tiny jobs, to see that it works")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.child:
        given = json.loads(chosen.child)
        folder = Path(given.pop("folder"))
        chosen.record.write_text(json.dumps(asdict(measure_here(Case(**given), folder))))
        return
    unknown = set(chosen.parts.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"--parts: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
    calibrate_once()
    print("; ".join(f"{name} {value}" for name, value in machine(torch.get_num_threads()).items()), flush=True)
    for name in chosen.parts.split(","):
        print(f"\n{name}", flush=True)
        for line in texts(PARTS[name](chosen.smoke)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
