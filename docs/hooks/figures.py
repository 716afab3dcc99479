"""Figures in pages, computed by the planner while the site is built: ``<!-- figures: NAME -->`` marks their place."""

import re
from collections.abc import Callable
from functools import cache
from typing import Any

from ooc_ntk.planning.budget import Limits
from ooc_ntk.planning.cost import block_flops
from ooc_ntk.planning.factors import LayerFactors, Window
from ooc_ntk.planning.planner import Preferences, make_plan
from ooc_ntk.planning.rates import UNCALIBRATED
from ooc_ntk.planning.representation import allowed_choices, choice_bytes, choose
from ooc_ntk.planning.spans import DENSE, FACTORED, PAIRWISE
from ooc_ntk.planning.workload import Derivation, ParameterBlock, Workload
from ooc_ntk.units import format_bytes, format_count, format_seconds

MARK = re.compile(r"^<!-- figures: (\w+) -->$", re.MULTILINE)

GIB = 2**30


def _convolution(size: int, inputs: int, outputs: int, kernel: int = 3) -> LayerFactors:
    """A convolution with stride 1 that keeps the size."""
    pad = kernel // 2
    window = Window((size, size), (kernel, kernel), (1, 1), (1, 1), (pad, pad), (pad, pad))
    return LayerFactors("convolution", size**2, inputs * kernel**2, outputs, window=window)


#: Layers as they occur, with the samples and outputs for which they are priced.
LAYERS = {
    "Linear 1,024 → 1,024 of an MLP": LayerFactors("linear", 1, 1024, 1024, True),
    "Linear 192 → 576 of a ViT, 65 tokens": LayerFactors("linear", 65, 192, 576, True),
    "Linear 768 → 3,072 of a BERT, 128 tokens": LayerFactors("linear", 128, 768, 3072, True),
    "3×3 convolution, 64 → 64 channels at 32×32": _convolution(32, 64, 64),
    "3×3 convolution, 256 → 256 channels at 8×8": _convolution(8, 256, 256),
    "3×3 convolution, 512 → 512 channels at 4×4": _convolution(4, 512, 512),
}


def _workload(blocks: tuple[ParameterBlock, ...], samples: int, outputs: int, seconds: float = 1e-3) -> Workload:
    """A trace kernel of so many samples, derived by layer rules."""
    derivation = Derivation("rules", 64, 0.0, 0.0, 64 * 2**20, 2**20, capture_seconds_per_sample=seconds)
    return Workload("trace", samples, 0, outputs, outputs, 1, blocks, 12_288, 350 * 2**20, 2**26, derivation)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put every table of figures in its place."""
    return MARK.sub(lambda match: FIGURES[match.group(1)](), markdown)


@cache
def layers() -> str:
    """What each layer holds and spends, dense, factored and pairwise, and what the planner takes."""
    samples, outputs = 1000, 10
    lines = [
        "| layer | gradients | factors | FLOP dense | FLOP factored | FLOP pairwise | planned |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for name, factors in LAYERS.items():
        block = ParameterBlock("layer", ("weight",), 0, factors.columns, "rule", "", factors)
        job = _workload((block,), samples, outputs)
        cells = [format_bytes(samples * choice_bytes(job, block, choice)) for choice in (DENSE, FACTORED)]
        cells += [format_count(block_flops(job, block, choice)) for choice in (DENSE, FACTORED, PAIRWISE)]
        (chosen,) = choose(job, UNCALIBRATED, "resident", samples)
        assert chosen in allowed_choices(block)
        lines.append(f"| {name} | {' | '.join(cells)} | {chosen.name} |")
    return "\n".join(lines)


def _network() -> tuple[ParameterBlock, ...]:
    """A small convolutional network on 32 × 32 images."""
    blocks, start = [], 0
    for name, factors in {
        "conv1": _convolution(32, 3, 32),
        "conv2": _convolution(16, 32, 64),
        "conv3": _convolution(8, 64, 128),
        "head": LayerFactors("linear", 1, 2048, 10, True),
    }.items():
        blocks.append(ParameterBlock(name, (f"{name}.weight",), start, start + factors.columns, "rule", "", factors))
        start += factors.columns
    return tuple(blocks)


@cache
def budgets() -> str:
    """One network under shrinking budgets: dataflow, time, disk."""
    job = _workload(_network(), 4000, 10, 2e-3)
    lines = [
        "| `--host-memory` | dataflow | time | host memory promised | disk promised | Q/LB |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for share in (16, 4, 2, 1):
        plan = make_plan(job, Limits(share * GIB, 0, 100 * GIB), UNCALIBRATED)
        passes = f", {len(plan.passes)} passes" if len(plan.passes) > 1 else ""
        cells = [
            f"{share} GiB",
            f"{plan.dataflow}{passes}",
            format_seconds(plan.promised.seconds),
            format_bytes(plan.promised.host_bytes),
            format_bytes(plan.promised.disk_bytes),
            "-" if plan.io_ratio is None else f"{plan.io_ratio:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@cache
def dataflows() -> str:
    """The same network made to take each dataflow where all fit."""
    job = _workload(_network(), 4000, 10, 2e-3)
    lines = ["| dataflow | time | host memory | disk | read |", "| --- | ---: | ---: | ---: | ---: |"]
    for name in ("resident", "recompute", "spill"):
        plan = make_plan(job, Limits(16 * GIB, 0, 100 * GIB), UNCALIBRATED, Preferences(dataflow=name))
        cells = [name, format_seconds(plan.promised.seconds)]
        cells += [format_bytes(size) for size in (plan.promised.host_bytes, plan.promised.disk_bytes, plan.bytes_read)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@cache
def features() -> str:
    """Bytes that a row takes: gradients and projected features."""
    lines = ["| parameters | gradients of a row | 4,096 columns | 10,240 columns |", "| ---: | ---: | ---: | ---: |"]
    for parameters in (20_842, 1_000_000, 11_200_000, 110_000_000):
        sizes = [format_bytes(4 * count) for count in (parameters, 4096, 10_240)]
        lines.append(f"| {parameters:,} | {' | '.join(sizes)} |")
    return "\n".join(lines)


FIGURES: dict[str, Callable[[], str]] = {
    "layers": layers,
    "budgets": budgets,
    "dataflows": dataflows,
    "features": features,
}
