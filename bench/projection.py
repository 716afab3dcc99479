"""Random projection beside the exact kernel on real data, beside the capture that feeds it, and beside TRAK.

``python -m bench.projection`` has three parts. ``residual``: how far projected kernels are from exact ones, what their
error bars say, and how the tail of the residuals falls. ``throughput``: what projecting costs, as a multiple of
deriving the layer factors that go into it. ``trak``: TRAK's projector on the same gradients. All is float32 on the CPU
with two threads; seconds mean nothing between machines, the ratios are what is claimed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ooc_ntk.compute.machine import limited_threads

from . import residual_figures, trak_peer
from .exact import machine
from .process import calibrate_once
from .projection_data import real_data
from .projection_records import Outcome, Residual, Setting
from .residuals import measure_residuals
from .tails import CLEARLY, TAIL_START
from .throughput import measure_throughput
from .trak_projection import measure_trak

#: Parts that ``--parts`` takes, in the order in which they run.
PARTS = ("residual", "throughput", "trak")

#: Threads of everything, unless asked otherwise.
THREADS = 2


def run_parts(parts: Sequence[str], setting: Setting, threads: int) -> Outcome:
    """Measure some parts and print their tables.

    Args:
        parts: of :data:`PARTS`.
        setting: sizes.
        threads: of torch, BLAS and numba.

    Returns:
        Everything that was measured.
    """
    with limited_threads(threads), tempfile.TemporaryDirectory(prefix="ooc-ntk-bench-") as name:
        folder = Path(name)
        calibrate_once()
        outcome = Outcome({**machine(threads), "load": f"{os.getloadavg()[0]:.1f}"})
        print("; ".join(f"{key} {value}" for key, value in outcome.setting.items()), flush=True)
        if "residual" in parts:
            for data in real_data(setting, folder, outcome):
                measure_residuals(data, folder, outcome)
        if "throughput" in parts:
            measure_throughput(setting, ("sjlt", "shift", "rademacher"), outcome)
        if "trak" in parts:
            if trak_peer.installed():
                measure_trak(setting, folder, outcome)
            else:
                outcome.note("TRAK is left out: traker is not installed; pip install 'ooc-ntk[bench]'")
        if setting.out is not None and outcome.residuals:
            if setting.smoke and not residual_figures.drawing():
                outcome.note("figures are left out: matplotlib is not installed; pip install 'ooc-ntk[bench]'")
            else:
                print(
                    "\n".join(f"figure {path}" for path in residual_figures.draw(outcome.residuals, setting.out)),
                    flush=True,
                )
    return outcome


def markdown(outcome: Outcome, arguments: Sequence[str]) -> str:
    """What may be pasted into results/projection.md: bars as a table, everything else as it was printed."""
    command = " ".join(["python -m bench.projection", *arguments])
    text = [f"## `{command}`, {str(outcome.setting['date'])[:10]}", ""]
    if outcome.checks:
        text += ["| figure | bar | measured | |", "| --- | --- | --- | --- |"]
        for check in outcome.checks:
            verdict = "" if check.met is None else "met" if check.met else "missed"
            sign = "≥" if check.at_least else "≤"
            text.append(f"| {check.figure} | {sign} {check.limit:g} | {check.value:.2f} | {verdict} |")
        text.append("")
    if outcome.residuals:
        text += [*tail_summary(outcome.residuals), ""]
    text += ["```text", "; ".join(f"{name} {value}" for name, value in outcome.setting.items())]
    for title, lines in outcome.tables.items():
        text += ["", title, *lines]
    return "\n".join([*text, *(["", *outcome.notes] if outcome.notes else []), "```"])


def tail_summary(residuals: Sequence[Residual]) -> list[str]:
    """What the tails say, counted."""
    cosine = [record for record in residuals if record.cosine]
    plain, over = ([getattr(r, which).better for r in cosine] for which in ("tail", "standardised"))
    text = (
        f"Tails of |cosine residual| from survival {TAIL_START:g} on: an exponential lies nearer in "
        f"{plain.count('exponential')} of {len(plain)} lines, a normal tail in {plain.count('normal')}, and in "
        f"{plain.count('alike')} they are alike. Divided by their own standard errors: exponential "
        f"{over.count('exponential')}, normal {over.count('normal')}, alike {over.count('alike')}. Misfits "
        "(exponential/normal) are root mean squares of log10 survival, both tails with a free scale and factor; alike "
        f"are those that differ by less than a factor of {CLEARLY:g}."
    )
    return textwrap.wrap(text, 120)


def main(arguments: Sequence[str] | None = None) -> Outcome:
    """Command line of the benchmark."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m bench.projection", description="Measure projected kernels.")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"any of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where figures go (default: none are drawn)")
    parser.add_argument("--dims", help="columns of the residuals, separated by commas (default: each data set's own)")
    parser.add_argument("--seeds", type=int, help="projections of every kind and size (default: 3; sentences 2)")
    parser.add_argument("--repeats", type=int, default=3, help="timings, of which the best counts")
    parser.add_argument("--threads", type=int, default=THREADS, help=f"CPU threads (default: {THREADS})")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--json", type=Path, metavar="FILE", help="leave the figures there")
    chosen = parser.parse_args(given)
    parts = [part.strip() for part in chosen.parts.split(",")]
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; known are {', '.join(PARTS)}")
    if min(chosen.repeats, chosen.threads, 1 if chosen.seeds is None else chosen.seeds) < 1:
        parser.error("--repeats, --seeds and --threads must be at least 1")
    if chosen.out is not None and not chosen.smoke and not residual_figures.drawing():
        parser.error("--out draws figures, which need matplotlib; pip install 'ooc-ntk[bench]'")
    dims = None
    if chosen.dims is not None:
        counts = chosen.dims.split(",")
        if not all(count.strip().isdecimal() and int(count) for count in counts):
            parser.error(f"--dims takes numbers of at least 1, separated by commas, got {chosen.dims!r}")
        dims = tuple(sorted({int(count) for count in counts}))
    setting = Setting(chosen.smoke, dims, chosen.seeds, chosen.repeats, chosen.out)
    outcome = run_parts(parts, setting, chosen.threads)
    print(f"\nFor bench/results/projection.md:\n\n{markdown(outcome, given)}", flush=True)
    if chosen.json:
        chosen.json.write_text(json.dumps(asdict(outcome), indent=2) + "\n")
    return outcome


if __name__ == "__main__":
    main()
