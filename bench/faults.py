"""Randomised kill tests: 200 scenarios of one to three faults each, and the same bits after every one.

``python -m bench.faults`` plays them all, prints a line for every failure and one per kind of fault, and ends with exit
code 1 if anything did not hold. The scenarios are those of ``python -m pytest -m faults tests/faults``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.faults.scenarios import (
    KILLED,
    KINDS,
    STOPPED,
    STORAGE,
    TERMINATED,
    WHOLE,
    Laboratory,
    Outcome,
    play,
    scenario,
)
from tests.faults.server import ForkServer

from .exact import machine
from .table import aligned


def kinds_table(outcomes: Sequence[Outcome]) -> str:
    """One line per kind of fault: how often it was tried and struck, and how the run ended.

    Args:
        outcomes: of every step.
    """
    rows = [["fault", "steps", "struck", "what became of the run", "where"]]
    for kind in KINDS:
        steps = [outcome for outcome in outcomes if outcome.kind == kind]
        ends = Counter(_end(outcome.code) for outcome in steps)
        notes = Counter(outcome.note for outcome in steps if outcome.note)
        rows.append(
            [
                kind,
                str(len(steps)),
                str(sum(outcome.fired for outcome in steps)),
                ", ".join(f"{count} {end}" for end, count in ends.most_common()),
                ", ".join(f"{count} {note}" for note, count in notes.most_common()),
            ]
        )
    return "\n".join(line.rstrip() for line in aligned(rows))


def _end(code: int | None) -> str:
    """How a run ended."""
    if code is None:
        return "was stopped before"
    names = {
        0: "finished",
        STORAGE: "ended with one line",
        KILLED: "killed",
        TERMINATED: "terminated outside of its work",
    }
    return names.get(code, "stopped cleanly" if code in STOPPED else f"exit code {code}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Play scenarios and print what became of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", type=int, default=WHOLE, help=f"how many, from 0 (default {WHOLE})")
    parser.add_argument("--only", type=int, help="the number of a single one")
    parser.add_argument("--out", type=Path, help="write the table to this file as well")
    given = parser.parse_args(arguments)
    numbers = range(given.scenarios) if given.only is None else [given.only]
    outcomes: list[Outcome] = []
    failures = 0
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, ForkServer() as server:
        laboratory = Laboratory(server, Path(folder))
        for number in numbers:
            try:
                outcomes += play(scenario(number), laboratory)
            except AssertionError as error:
                failures += 1
                print(f"FAILED: {error}\n", flush=True)
        disk = "tmpfs" if laboratory.no_mount is None else f"injected, {laboratory.no_mount}"
        way = laboratory.read_only_way
    struck = sum(outcome.fired for outcome in outcomes)
    text = "\n".join(
        [
            "; ".join(f"{name} {value}" for name, value in machine(1).items()),
            f"{len(numbers)} scenarios, {failures} failed; {len(outcomes)} faults, {struck} struck, "
            f"{sum(outcome.journal for outcome in outcomes)} kills left a transaction to be rolled back; "
            f"full disk: {disk}; read-only: {way}; {time.perf_counter() - start:.0f} s",
            "",
            kinds_table(outcomes),
        ]
    )
    print(text)
    if given.out is not None:
        given.out.write_text(text + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
