"""What a kill costs: a run killed at a random moment and typed again, beside an undisturbed one.

``python -m bench.interrupted`` kills ``ooc-ntk run`` by SIGKILL, once in a run, at a random moment of its tasks: so
many seconds after its manifest is there. The same command then goes on. Counted are the seconds of both, tasks
that were committed before the kill and done again after it, and entries whose bits differ.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

import ooc_ntk
from ooc_ntk.errors import StorageError
from ooc_ntk.storage.manifest import Receipt

from .bars import Bar, Check, checked
from .cluster import receipts_of
from .contenders import DEVICE, OURS
from .exact import machine
from .process import ROOT, calibrate_once
from .records import Finding, Record, texts
from .registry import part

#: Samples and samples of a tile, in full and in smoke size.
SAMPLES, TILE, SMOKE_SAMPLES, SMOKE_TILE = 2_000, 200, 60, 20

#: Kills, each of a run of its own, and their seed.
KILLS, SEED = 3, 9

#: What is judged.
AGAIN, BITS, COST = (
    "finished tasks done again",
    "entries whose bits differ",
    "killed and resumed / undisturbed, seconds, mean",
)


def interrupted(smoke: bool, kills: int = KILLS) -> Iterator[Finding]:
    """An undisturbed run, then runs that are killed and typed again."""
    samples, tile = (SMOKE_SAMPLES, SMOKE_TILE) if smoke else (SAMPLES, TILE)
    kills = 1 if smoke else kills
    with tempfile.TemporaryDirectory(prefix="ooc-ntk-bench-") as name:
        folder, train = Path(name), f"mnist5k[0:{samples}]"
        job = ooc_ntk.Job("bench.models:convolutional", train, device=DEVICE, base=ROOT)
        preferences = ooc_ntk.Preferences(dataflow="spill", tile_samples=tile, superblock_tiles=1)
        plan = ooc_ntk.plan(job, preferences=preferences, out=folder)
        plan.save(folder / "plan.json")
        command = [sys.executable, "-m", "ooc_ntk", "run", "--model", "bench.models:convolutional", "--train", train]
        command += ["--device", DEVICE, "--plan", str(folder / "plan.json"), "--quiet", "--no-proof", "--out"]

        begun = time.time()
        _start([*command, str(folder / "whole")]).check()
        whole, receipts = time.time() - begun, _by_key(folder / "whole")
        wanted = np.asarray(ooc_ntk.open(folder / "whole"))
        first = min(receipt.started for receipt in receipts.values()) - begun
        last = max(receipt.started + receipt.seconds for receipt in receipts.values()) - begun
        workload = f"CNN, N = {samples:,}, {len(receipts)} tasks"
        info = ooc_ntk.info(folder / "whole")
        yield Record(
            workload,
            f"{OURS}, undisturbed",
            whole,
            samples,
            "interrupted",
            ratio=1.0,
            moved_bytes=info.bytes_read + info.bytes_written,
            promised_seconds=plan.promised.seconds,
            task_seconds=info.seconds,
            figures={"first": first, "last": last, "tasks": len(receipts)},
        )
        chance, again, differing, ratios = random.Random(SEED), 0, 0, []
        for number in range(kills):
            moment, out = chance.uniform(0, last - first), folder / f"killed-{number}"
            killed = _start([*command, str(out)]).kill_after(out / "manifest", moment)
            finished = _by_key(out)
            begun = time.time()
            _start([*command, str(out)]).check()
            resumed = time.time() - begun
            after = _by_key(out)
            redone = sum(after.get(key) != receipt for key, receipt in finished.items())
            again += redone
            differing += int((np.asarray(ooc_ntk.open(out)) != wanted).sum())
            ratios.append((killed + resumed) / whole)
            yield Record(
                workload,
                f"{OURS}, killed at {killed:.1f} s and resumed",
                killed + resumed,
                samples,
                "interrupted",
                ratio=ratios[-1],
                figures={"killed": killed, "resumed": resumed, "finished": len(finished), "again": redone},
                remark=f"{len(finished)} of {len(receipts)} tasks were finished, {redone} of them done again",
            )
        yield checked(AGAIN, again, 0, smoke)
        yield checked(BITS, differing, 0, smoke)
        yield Check(COST, float(np.mean(ratios)), None, None, False, None)
        yield (
            f"a run starts its first task after {first:.1f} s, which a resumed one takes once more; its longest task "
            f"takes {max(receipt.seconds for receipt in receipts.values()):.2f} s"
        )


def _by_key(out: Path) -> dict[str, Receipt]:
    """Receipts of the tasks that a run has committed; none where it was killed before it had a manifest."""
    try:
        return {receipt.key: receipt for receipt in receipts_of(out)}
    except StorageError:
        return {}


class _start:  # noqa: N801 - reads as what it does
    """A command in a process of its own."""

    def __init__(self, command: Sequence[str]) -> None:
        threads = dict.fromkeys(
            ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(torch.get_num_threads())
        )
        self._began = time.time()
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **threads},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def check(self) -> None:
        """Wait for its end, which must be a good one."""
        _, text = self._process.communicate()
        if self._process.returncode:
            raise RuntimeError(f"the run ended with status {self._process.returncode}: {text.strip()[-300:]}")

    def kill_after(self, file: Path, seconds: float) -> float:
        """Kill it so many seconds after it made a file, and say how many seconds after its start that was."""
        while not file.exists() and self._process.poll() is None:
            time.sleep(0.01)
        time.sleep(seconds)
        self._process.kill()
        self._process.communicate()
        return time.time() - self._began


@part(
    "interrupted",
    "What a kill costs",
    seconds=50,
    limit_seconds=240,
    bars=(Bar(AGAIN, 0.0), Bar(BITS, 0.0)),
    results="faults",
)
def measure(smoke: bool) -> Iterator[Finding]:
    """Two kills."""
    yield from interrupted(smoke, 2)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=KILLS, help=f"runs that are killed (default: {KILLS})")
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to see that it works")
    chosen = parser.parse_args(arguments)
    if chosen.kills < 1:
        parser.error(f"--kills must be at least 1, got {chosen.kills}")
    calibrate_once()
    print("; ".join(f"{name} {value}" for name, value in machine(torch.get_num_threads()).items()), flush=True)
    found = []
    for finding in interrupted(chosen.smoke, chosen.kills):
        found.append(finding)
        if isinstance(finding, Record):
            print(f"{finding.contender}: {finding.seconds:.1f} s; {finding.remark}", flush=True)
    print("\n".join(texts(found)))


if __name__ == "__main__":
    main()
