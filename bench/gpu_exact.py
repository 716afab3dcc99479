"""Exact kernels on one NVIDIA GPU: first that they are right, then what they cost beside what the card allows.

``python -m bench.gpu_exact`` compares every representation, precision and kind of kernel with float64 and ends there if
one is wrong. Then it measures the card's own products, copies and the disk, runs ResNet-18 at 32×32 and at 224×224 with
more and more samples, and says what the whole 60,000 × 50,000 kernel would take. ``--full`` computes that kernel, in
slices that go on where the last one stopped. Without a CUDA device it says so and ends with an error.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

import psutil
import torch

import ooc_ntk
from ooc_ntk.compute.rates import cached_rates
from ooc_ntk.units import ITEM_BYTES, format_bytes

from .exact import machine
from .gpu_ceilings import Ways, measure_ways, product_rate
from .gpu_checks import FUSED_TOLERANCE, KINDS, NETWORKS, Check, check_fused, check_kernels, precisions_of, table_of
from .gpu_growth import FORMULA, extrapolate, format_whole, grow, summary
from .gpu_networks import SMALL_SUBJECTS, SUBJECTS, Subject
from .gpu_slices import Slice, run_slice
from .process import ROOT
from .table import aligned

#: Where results are kept.
RESULTS: Final = ROOT / "bench/results/gpu.md"

#: Edges of tiles at which the card's products are timed, and those of tests.
EDGES: Final = (1024, 4096, 8192)
SMALL_EDGES: Final = (32,)

#: Columns of these products in tests.
SMALL_COLUMNS: Final = 512

#: What a smoke run computes of the other precisions and of kinds, to stay below a minute.
SMALL_NETWORK, SMALL_KIND = "convolutions", "trace, test rows"


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        device: torch device string.
        smoke: whether in the size of tests.
        minutes: for everything.
        folder: where runs are; None takes the system's folder for temporary files.
        begun: when the process began, by ``time.time``.
    """

    device: str
    smoke: bool
    minutes: float
    folder: Path | None
    begun: float

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.begun + 60 * self.minutes - time.time()

    @property
    def subjects(self) -> tuple[Subject, ...]:
        """Networks."""
        return SMALL_SUBJECTS if self.smoke else SUBJECTS

    @property
    def card(self) -> str:
        """Name of the device."""
        return torch.cuda.get_device_name(self.device) if self.device != "cpu" else "CPU"


def float32_grade() -> str:
    """The fastest precision with errors like float32's: three products of bf16 where they are known."""
    return "bf16x3" if "bf16x3" in ITEM_BYTES else "float32"


def check_all(setting: Setting) -> tuple[list[str], bool]:
    """Compare with float64.

    Returns:
        Lines, and whether all is right.
    """
    names = precisions_of(setting.device)
    checks: list[Check] = []
    if setting.smoke:
        checks += check_kernels(setting.device, ["float32"], list(NETWORKS), list(KINDS))
        others = [name for name in names if name != "float32"]
        checks += check_kernels(setting.device, others, [SMALL_NETWORK], [SMALL_KIND])
    else:
        checks += check_kernels(setting.device, names, list(NETWORKS), list(KINDS))
    lines = [
        f"{len(checks)} kernels in {', '.join(names)}; blocks "
        f"{', '.join(sorted(frozenset().union(*(check.choices for check in checks))))}",
        *table_of(checks),
    ]
    passed = all(check.passed for check in checks)
    fused = check_fused(setting.device)
    if fused is None:
        lines.append("fused pairwise kernel: none here (it takes a CUDA device and Triton)")
    else:
        right = max(fused) <= FUSED_TOLERANCE
        verdict = "passed" if right else "FAILED"
        lines.append(f"fused pairwise kernel: {fused[0]:.1e}, a contraction with it {fused[1]:.1e}: {verdict}")
        passed = passed and right
    return lines, passed


def ceilings(setting: Setting) -> tuple[list[str], Ways]:
    """What the machine allows."""
    edges, columns = (SMALL_EDGES, SMALL_COLUMNS) if setting.smoke else (EDGES, 65_536)
    cells = [("products, TFLOP/s", *(f"{edge:,} rows" for edge in edges))]
    for precision in precisions_of(setting.device):
        rates = (product_rate(precision, edge, setting.device, columns) for edge in edges)
        cells.append((precision, *(f"{rate / 1e12:.2f}" for rate in rates)))
    lines = aligned(cells)
    ways = measure_ways(setting.device, setting.folder or Path(tempfile.gettempdir()))
    if setting.device != "cpu":
        free, total = torch.cuda.mem_get_info(setting.device)
        lines.append(
            f"  copies from page-locked memory {ways.there / 1e9:.1f} GB/s, to it {ways.back / 1e9:.1f} GB/s; memory "
            f"{format_bytes(free)} of {format_bytes(total)} free"
        )
    lines.append(f"  disk: {ways.write / 1e9:.2f} GB/s written and synced, {ways.read / 1e9:.2f} GB/s read")
    return lines, ways


def measure(setting: Setting) -> tuple[list[str], bool]:
    """Check, then measure, printing on the way.

    Returns:
        Lines for the record, and whether all is right; if not, nothing was timed.
    """
    kept: list[str] = []

    def say(text: str = "", *, keep: bool = True) -> None:
        print(text, flush=True)
        if keep:
            kept.append(text)

    if not cached_rates(setting.device).measured:
        say("calibrating once", keep=False)
        ooc_ntk.calibrate(setting.device, setting.folder or tempfile.gettempdir())
    say("against float64")
    lines, passed = check_all(setting)
    say("\n".join(lines))
    if not passed:
        return kept, False
    say("\nwhat the machine allows")
    lines, ways = ceilings(setting)
    say("\n".join(lines))
    precisions = [float32_grade(), *(name for name in ("tf32",) if name in precisions_of(setting.device))]
    wholes = []
    series = [(subject, precision) for subject in setting.subjects for precision in precisions]
    for number, (subject, precision) in enumerate(series):
        say(f"\n{subject.title}, {precision}")
        deadline = time.perf_counter() + setting.left / (len(series) - number)
        runs = grow(subject, precision, setting.device, ways, deadline, setting.folder, say)
        if runs:
            wholes.append(extrapolate(runs[-1], setting.device, setting.folder))
            say(format_whole(wholes[-1]))
    say("\nPhases are seconds of the thread that runs tasks: work queued on the device counts where it is waited for.")
    say("FLOPs count pairs of samples once; products of whole tiles compute those on the diagonal twice.")
    say(f"The whole kernel: {FORMULA}.")
    say()
    say("\n".join(summary(wholes, judged=not setting.smoke)))
    return kept, True


def record(title: str, card: str, lines: Sequence[str], path: Path = RESULTS) -> None:
    """Append figures to the results, under the card's name.

    Args:
        title: the command.
        card: name of the device.
        lines: what was printed.
        path: the file.
    """
    setting = "; ".join(f"{name} {value}" for name, value in machine(torch.get_num_threads()).items())
    date = datetime.now().astimezone().date().isoformat()
    body = "\n".join(lines).strip("\n")
    versions = f"CUDA {torch.version.cuda}; {setting}"
    with path.open("a", encoding="utf-8") as file:
        file.write(f"\n## `{title}`, {card}, {date}\n\n```text\n{versions}\n\n{body}\n```\n")
    print(f"\nadded to {path}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_exact", description="Exact kernels on one NVIDIA GPU.")
    parser.add_argument("--minutes", type=float, default=20.0, help="for everything but --full (default: 20)")
    parser.add_argument("--full", action="store_true", help="compute the whole 60,000 × 50,000 kernel, slice by slice")
    parser.add_argument("--out", type=Path, help="run directory of --full; otherwise a folder for short runs")
    parser.add_argument("--slice-seconds", type=float, default=450.0, help="after which --full stops (default: 450)")
    parser.add_argument("--outputs", type=int, choices=(1, 10), default=1, help="of the network of --full (default: 1)")
    parser.add_argument("--precision", choices=list(ITEM_BYTES), help=f"of --full (default: {float32_grade()})")
    parser.add_argument("--record", action="store_true", help="append the figures to bench/results/gpu.md")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on the CPU where there is no CUDA device")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or say why not.

    Returns:
        Exit status: 0 where all is done and right, 1 where something is wrong or there is no device, 143 where a slice
        is over before all is done.
    """
    parser = _parser()
    chosen = parser.parse_args(arguments)
    if chosen.full and chosen.out is None:
        parser.error("--full needs --out, the run directory that the next slice goes on with")
    if chosen.smoke and chosen.record:
        parser.error("--record keeps measurements, and --smoke measures nothing; leave one out")
    if min(chosen.minutes, chosen.slice_seconds) < 0:
        parser.error("--minutes and --slice-seconds must not be negative")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not chosen.smoke:
        print("no CUDA device: not measured (--smoke tries everything at tiny sizes)")
        return 1
    if chosen.out is not None and not chosen.full:
        chosen.out.mkdir(parents=True, exist_ok=True)
    begun = psutil.Process(os.getpid()).create_time() if arguments is None else time.time()
    setting = Setting(device, chosen.smoke, chosen.minutes, None if chosen.full else chosen.out, begun)
    print(f"{setting.card}; " + "; ".join(f"{k} {v}" for k, v in machine(torch.get_num_threads()).items()), flush=True)
    if chosen.full:
        status, lines = run_slice(_slice(setting, chosen))
        print("\n".join(lines))
    else:
        lines, passed = measure(setting)
        status = 0 if passed else 1
        if not passed:
            print("\nkernels are wrong: nothing is timed", file=sys.stderr)
    if chosen.record and status == 0:
        title = "python -m bench.gpu_exact" + (" --full" if chosen.full else "")
        record(title, setting.card, lines)
    return status


def _slice(setting: Setting, chosen: argparse.Namespace) -> Slice:
    """The slice that the command line asks for."""
    precision = chosen.precision or float32_grade()
    command = ["python", "-m", "bench.gpu_exact", "--full", "--out", str(chosen.out), "--precision", precision]
    command += ["--outputs", str(chosen.outputs), "--slice-seconds", f"{chosen.slice_seconds:g}"]
    command += [flag for flag, given in (("--smoke", chosen.smoke), ("--record", chosen.record)) if given]
    small = ooc_ntk.Preferences(dataflow="spill", tile_samples=16, superblock_tiles=1) if setting.smoke else None
    return Slice(
        subject=setting.subjects[0 if chosen.outputs == 1 else 1],
        precision=precision,
        device=setting.device,
        out=chosen.out,
        seconds=chosen.slice_seconds,
        begun=setting.begun,
        command=shlex.join(command),
        preferences=small,
    )


if __name__ == "__main__":
    sys.exit(main())
