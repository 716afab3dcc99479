"""Projection as a part of ``python -m bench``: what ``bench.projection`` measures, with fewer kinds and sizes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Final

import numpy as np

from . import trak_peer
from .bars import Bar, Check
from .contenders import OURS
from .projection_data import digits
from .projection_records import Outcome, Residual, Setting
from .records import Finding, Record
from .registry import part
from .residuals import measure_residuals
from .throughput import CAPTURE_BAR, OVER_CAPTURE, large_samples, large_title, measure_throughput
from .trak_projection import TRAK_BAR, TRAK_OVER_OURS, measure_trak

#: Samples, kinds, columns and seeds of the residuals, and samples, columns and seeds of TRAK on the same network.
SAMPLES, KINDS, DIMS, SEEDS = 400, ("sjlt", "tensorsketch"), (256, 1024), 1
TRAK_SMALL: Final = (400, (1024,), 1)


@part(
    "projection",
    "Projected kernels beside exact ones, capture and TRAK",
    seconds=120,
    limit_seconds=360,
    bars=(Bar(OVER_CAPTURE, CAPTURE_BAR), Bar(TRAK_OVER_OURS, TRAK_BAR, at_least=True)),
    results="projection",
)
def measure(smoke: bool) -> Iterator[Finding]:
    """Residuals and coverage, then throughput, then TRAK where it is installed."""
    setting = Setting(smoke, seeds=1 if smoke else SEEDS, repeats=1 if smoke else 3)
    outcome = Outcome({})
    with tempfile.TemporaryDirectory(prefix="ooc-ntk-bench-") as name:
        folder = Path(name)
        data = digits(setting, folder, 24 if smoke else SAMPLES, KINDS, (128, 512) if smoke else DIMS, SEEDS)
        measure_residuals(data, folder, outcome)
        for residual in outcome.residuals:
            yield _residual(residual, f"{'small MLP' if smoke else 'CNN, mnist5k'}, {24 if smoke else SAMPLES} samples")
        inside = float(np.mean([share for residual in outcome.residuals for share in residual.inside]))
        yield Check("entries within their 95% bars, mean", inside, None, None, False, None)
        measure_throughput(setting, ("sjlt",), outcome)
        base = outcome.projecting("sjlt").sample_seconds
        for step in outcome.steps:
            yield Record(
                f"{large_title(setting)}, per sample",
                f"{OURS}, {step.name}",
                step.sample_seconds,
                series="throughput",
                ratio=step.sample_seconds / base,
                peak_bytes=step.peak_bytes or None,
            )
        if trak_peer.installed():
            measure_trak(setting, folder, outcome, TRAK_SMALL, dattri=False)  # it takes as long as TRAK's
            yield from _trak(outcome, setting)
        else:
            missing = "not installed; pip install 'ooc-ntk[bench]'"
            yield Record(large_title(setting), "TRAK BasicProjector", series="throughput", remark=missing)
    yield from outcome.checks
    for title, lines in outcome.tables.items():
        yield from ["", title, *lines]


def _residual(found: Residual, data: str) -> Record:
    figures = {"dim": found.dim, "cosine": found.cosine, "inside": np.mean(found.inside)}
    figures |= {"observed": np.mean(found.observed), "predicted": np.mean(found.predicted)}
    return Record(
        f"{data}, {found.kernel} kernel{', cosine' if found.cosine else ''}",
        f"{OURS}, {found.kind}:{found.dim}",
        series="projection",
        error=float(np.mean(found.observed)),
        figures={name: float(value) for name, value in figures.items()},
        remark=f"predicted {np.mean(found.predicted):.4f}, {np.mean(found.inside):.1%} within 95% bars",
    )


def _trak(outcome: Outcome, setting: Setting) -> Iterator[Record]:
    """TRAK's projector on gradients that it is given, on both networks; seconds per sample."""
    for store in outcome.stores:
        base = next(other for other in outcome.stores if other.dim == store.dim and other.name == trak_peer.SJLT)
        yield Record(
            f"projecting to {store.dim:,}, {'small MLP' if setting.smoke else 'CNN'}, per sample",
            store.name,
            store.sample_seconds,
            24 if setting.smoke else TRAK_SMALL[0],
            "throughput",
            ratio=store.sample_seconds / base.sample_seconds,
            error=store.residual,
            figures={name: float(value) for name, value in asdict(store).items() if name != "name"},
            remark=f"error is the residual; predicted {store.predicted:.4f}",
        )
    if outcome.trak is not None:
        seconds, ours = outcome.trak.sample_seconds, outcome.projecting("sjlt").sample_seconds
        yield Record(
            f"{large_title(setting)}, per sample",
            "TRAK BasicProjector",
            seconds,
            large_samples(setting),
            "throughput",
            ratio=seconds / ours,
            remark=f"{outcome.trak.timed} of {outcome.trak.blocks} blocks timed and scaled",
        )
