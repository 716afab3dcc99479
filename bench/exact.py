"""Exact trace kernels: ooc-ntk beside its floors and beside what its users would otherwise write, in one run.

``python -m bench.exact`` prints one table per workload and sample count. Every contender computes in a fresh process,
warmed up with one sample. All are float32, on the CPU, with the same threads. Seconds mean nothing between machines;
the ratios are what is claimed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import torch

import ooc_ntk

from .contenders import DENSE, OURS, PEERS, absent
from .floors import Floors
from .models import WORKLOADS
from .process import FLOORS, Case, Measurement, Task, calibrate_once, floors_apart, measure_apart
from .table import Comparison, compare, format_comparison, format_growth

#: Seconds of computing after which a peer's process is ended (guessed: none should need them where a bar is set).
PEER_SECONDS = 600


@dataclass(frozen=True)
class Setting:
    """How everything is measured.

    Attributes:
        contenders: names, ours among them.
        repeats: measurements of each; the one with the fastest total counts.
        smoke: smoke size: one process per contender for all cases, to save imports.
        threads: CPU threads.
        peer_seconds: of computing, after which a peer's process is ended.
        profile: whether to print where ooc-ntk spends its time.
    """

    contenders: tuple[str, ...]
    repeats: int
    smoke: bool
    threads: int
    peer_seconds: float
    profile: bool

    def task(self, contender: str, cases: tuple[Case, ...]) -> Task:
        """The task of a contender, limited if it is a peer."""
        limit = self.peer_seconds if contender in PEERS.values() else None
        return Task(contender, cases, self.smoke, self.threads, limit)


def measure_all(cases: tuple[Case, ...], setting: Setting) -> list[Comparison]:
    """Measure floors and contenders of some cases, one after another.

    Args:
        cases: which share their processes.
        setting: how.

    Returns:
        A comparison per case.
    """
    outcomes: dict[Case, dict[str, Measurement | str]] = {case: {} for case in cases}
    floors: dict[Case, Floors] = {}
    for _ in range(setting.repeats):
        for case, found in floors_apart(setting.task(FLOORS, cases)).items():
            floors[case] = fastest_floors(floors[case], found) if case in floors else found
        for contender in setting.contenders:
            open_cases = tuple(case for case in cases if not isinstance(outcomes[case].get(contender), str))
            if not open_cases:
                continue
            for case, outcome in measure_apart(setting.task(contender, open_cases)).items():
                before = outcomes[case].get(contender)
                if before is None or (
                    isinstance(before, Measurement)
                    and isinstance(outcome, Measurement)
                    and outcome.total_seconds < before.total_seconds
                ):
                    outcomes[case][contender] = outcome
    return [compare(case, setting.smoke, outcomes[case], floors[case]) for case in cases]


def fastest_floors(before: Floors, found: Floors) -> Floors:
    """The lower capture of two measurements with the higher rate of products."""
    capture = min(before, found, key=lambda floors: floors.capture_seconds)
    rate = max(before, found, key=lambda floors: floors.flops_per_second)
    return Floors(capture.capture_seconds, capture.capture_batch, rate.flops_per_second, rate.product_columns)


def compare_all(workloads: Sequence[str], samples: Sequence[int] | None, setting: Setting) -> list[Comparison]:
    """Measure every workload at every sample count and print each table as soon as it is complete.

    Args:
        workloads: names.
        samples: sample counts; None takes each workload's own.
        setting: how.

    Returns:
        A comparison per workload and sample count.
    """
    cases = tuple(
        Case(name, count) for name in workloads for count in samples or WORKLOADS[name].size(setting.smoke).samples
    )
    comparisons: list[Comparison] = []
    for group in [cases] if setting.smoke else [(case,) for case in cases]:
        for comparison in measure_all(group, setting):
            comparisons.append(comparison)
            print(f"\n{format_comparison(comparison, setting.profile)}", flush=True)
            found = [entry for entry in comparisons if entry.workload == comparison.workload]
            if len(found) == sum(case.workload == comparison.workload for case in cases) > 1:
                print(f"\n{format_growth(found)}", flush=True)
    return comparisons


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.exact", description="Time exact trace kernels.")
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="names, separated by commas")
    parser.add_argument("--samples", help="sample counts, separated by commas (default: each workload's own)")
    parser.add_argument("--peers", default=",".join(PEERS), help=f"any of {', '.join(PEERS)}, or none (default: all)")
    parser.add_argument(
        "--peer-seconds", type=float, default=PEER_SECONDS, help="of computing, after which a peer is stopped"
    )
    parser.add_argument("--dense", action="store_true", help="time ooc-ntk without its layer rules, too")
    parser.add_argument("--profile", action="store_true", help="print where ooc-ntk spends its time")
    parser.add_argument("--repeats", type=int, default=1, help="measurements of each; the fastest counts")
    parser.add_argument("--threads", type=int, help="CPU threads of every contender (default: torch's)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="leave the figures there")
    return parser


def parse_counts(parser: argparse.ArgumentParser, text: str | None) -> tuple[int, ...] | None:
    """Sample counts from the command line, smallest first.

    Args:
        parser: to which a wrong one is reported.
        text: numbers separated by commas, or None.

    Returns:
        The counts, or None.
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        parser.error(f"--samples takes numbers of at least 1, separated by commas, got {text!r}")
    return tuple(sorted({int(part) for part in parts}))


def _names(parser: argparse.ArgumentParser, what: str, text: str, known: Sequence[str]) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"unknown {what} {unknown[0]!r}; known are {', '.join(known)}")
    return names


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the benchmark."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    workloads = _names(parser, "workload", chosen.workloads, list(WORKLOADS))
    keys = [] if chosen.peers == "none" else _names(parser, "peer", chosen.peers, list(PEERS))
    samples = parse_counts(parser, chosen.samples)
    if min(chosen.repeats, chosen.threads or 1, chosen.peer_seconds) <= 0 or chosen.threads == 0:
        parser.error("--repeats, --threads and --peer-seconds must be above 0")
    if chosen.threads:
        torch.set_num_threads(chosen.threads)

    calibrate_once()
    setting = machine(torch.get_num_threads())
    print("; ".join(f"{name} {value}" for name, value in setting.items()), flush=True)
    for name in workloads.copy():
        missing = WORKLOADS[name].missing()
        if missing:
            print(f"{name} is left out: {', '.join(missing)} not installed; pip install 'ooc-ntk[bench]'")
            workloads.remove(name)
    peers = [PEERS[key] for key in keys]
    for name in peers.copy():
        reason = absent(name)
        if reason:
            print(f"{name} is left out: {reason}")
            peers.remove(name)
    contenders = (*peers, *([DENSE] if chosen.dense else []), OURS)
    how = Setting(
        contenders, chosen.repeats, chosen.smoke, torch.get_num_threads(), chosen.peer_seconds, chosen.profile
    )
    comparisons = compare_all(workloads, samples, how)
    if chosen.json:
        record = {**setting, "comparisons": [asdict(comparison) for comparison in comparisons]}
        chosen.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
