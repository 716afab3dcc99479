"""``python -m bench.experiments NAME --out DIR``: one experiment of two papers, or ``all``; ``--list`` names them.

Each writes ``NAME.png`` and ``NAME.json``, and prints a table and a sentence that says what is seen and whether it is
what the paper claims. Wei, Hu and Steinhardt 2022 is arXiv 2203.06176, Engel et al. 2023 is arXiv 2305.14585.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from bench.exact import machine
from bench.process import calibrate_once
from ooc_ntk.compute.machine import limited_threads
from ooc_ntk.report.pictures import can_draw

from . import gcv, neighbours, residuals, spectra, surrogates
from .figures import shrink
from .finding import Finding, Setting

#: Experiments: what each shows, and of which paper.
EXPERIMENTS: Final[dict[str, tuple[str, Callable[[Setting], Finding]]]] = {
    "residuals": ("residuals of projected kernels by dim and kind (Engel et al. 2023)", residuals.run),
    "surrogates": ("Kendall τ and accuracy difference of kernel surrogates (Engel et al. 2023)", surrogates.run),
    "neighbours": ("five most similar images by kernel (Engel et al. 2023)", neighbours.run),
    "gcv": ("GCV against test risk over samples and ridges (Wei et al. 2022)", gcv.run),
    "spectra": ("eigenvalue decay and labels, trained against initial (Wei et al. 2022)", spectra.run),
}


def perform(name: str, setting: Setting, threads: int) -> dict[str, Any]:
    """Do an experiment, print what it found, and leave it as JSON beside its figure.

    Args:
        name: of :data:`EXPERIMENTS`.
        setting: how.
        threads: CPU threads, for the record.

    Returns:
        What is in the JSON.
    """
    started = time.perf_counter()
    found = EXPERIMENTS[name][1](setting)
    shrink(found.figure)
    agrees = "not judged in smoke size" if setting.smoke else found.agrees
    record = {
        "experiment": name,
        "title": found.title,
        "claim": found.claim,
        "seen": found.seen,
        "agrees": agrees,
        "notes": list(found.notes),
        "smoke": setting.smoke,
        "seed": setting.seed,
        "seconds": time.perf_counter() - started,
        "setting": machine(threads),
        "numbers": found.numbers,
    }
    path = setting.out / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    sentence = f"Seen: {found.seen}. The paper: {found.claim}. Agrees: {agrees}."
    lines = ["", found.title, *found.table, *(f"  {note}" for note in found.notes)]
    print("\n".join([*lines, "", *textwrap.wrap(sentence, 120), f"{found.figure}, {path}"]), flush=True)
    print(f"{record['seconds']:.0f} s", flush=True)
    return record


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Command line of the experiments."""
    parser = argparse.ArgumentParser(prog="python -m bench.experiments", description="Experiments of two papers.")
    parser.add_argument("name", nargs="?", help=f"{', '.join(EXPERIMENTS)}, or all")
    parser.add_argument("--list", action="store_true", help="say what there is")
    parser.add_argument("--out", type=Path, default=Path("experiments"), help="folder for figures and numbers")
    parser.add_argument("--work", type=Path, help="folder that keeps weights and kernels (default: deleted)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, training, projections and bootstrap")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it works")
    chosen = parser.parse_args(arguments)
    if chosen.list:
        print("\n".join(f"{name:<12}{what}" for name, (what, _) in EXPERIMENTS.items()))
        return []
    if chosen.name not in (*EXPERIMENTS, "all"):
        parser.error(f"give the name of an experiment: {', '.join(EXPERIMENTS)}, or all; got {chosen.name!r}")
    if chosen.threads < 1 or chosen.seed < 0:
        parser.error("--threads must be at least 1 and --seed at least 0")
    if not can_draw():
        parser.error("experiments draw figures, which need matplotlib; pip install 'ooc-ntk[bench]'")
    with ExitStack() as stack:
        work = chosen.work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ooc-ntk-experiments-")))
        stack.enter_context(limited_threads(chosen.threads))
        chosen.out.mkdir(parents=True, exist_ok=True)
        calibrate_once()
        setting = Setting(chosen.out, work, chosen.smoke, chosen.seed)
        names = EXPERIMENTS if chosen.name == "all" else (chosen.name,)
        return [perform(name, setting, chosen.threads) for name in names]


if __name__ == "__main__":
    main(sys.argv[1:])
