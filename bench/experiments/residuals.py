"""How far projected kernels are from exact ones, by dim and kind (Engel et al. 2023, figure of residuals)."""

from __future__ import annotations

import contextlib
import io
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from scipy.stats import norm

import ooc_ntk
from bench.contenders import DEVICE
from bench.exact import machine
from bench.inputs import count_parameters
from bench.projection_data import RealData
from bench.projection_records import Outcome, Residual
from bench.residuals import log_slope, measure_residuals
from bench.table import aligned
from bench.tails import TAIL_START
from ooc_ntk import demo
from ooc_ntk.report.pictures import picture

from .figures import COLOURS, GREY, ORDERED, SMALL, beside, plain, spread
from .finding import Finding, Setting

CLAIM: Final = (
    "residuals of the projected trace kernel fall away exponentially, at a thousandth of a ResNet-18's gradients"
)

#: Kinds of projections; a tensor sketch has a larger variance and says so.
KINDS: Final = ("sjlt", "rademacher", "gaussian", "tensorsketch")


def run(setting: Setting) -> Finding:
    """Measure projected against exact kernels of the trained network, and draw both pictures."""
    samples, dims = (24, (128, 512)) if setting.smoke else (200, (256, 512, 1024, 2048, 4096))
    kinds, seeds = (("sjlt",), 1) if setting.smoke else (KINDS, 3)
    job = partial(
        ooc_ntk.Job,
        "ooc_ntk.demo:network",
        f"mnist5k[0:{samples}]",
        weights=setting.weights(trained=True),
        device=DEVICE,
    )
    parameters = count_parameters(demo.network())
    title = f"trained CNN on {samples} digits, 10 outputs, {parameters:,} parameters"
    data = RealData("digits", title, parameters, job, kinds, dims, seeds)
    outcome = Outcome(machine(0))
    with contextlib.redirect_stdout(io.StringIO()):  # its tables are of the benchmark; a shorter one is printed
        measure_residuals(data, setting.work, outcome)
    trace = [record for record in outcome.residuals if record.kernel == "trace"]
    figure = setting.out / "residuals.png"
    _draw(figure, [each for each in trace if each.cosine], kinds, parameters)
    cosine = [each for each in outcome.residuals if each.cosine]
    tails = [each.tail.better for each in cosine]
    over = [each.standardised.better for each in cosine]
    ratios = [float(np.mean(each.predicted) / np.mean(each.observed)) for each in outcome.residuals]
    slopes = {
        kind: log_slope(dims, [float(np.mean(each.observed)) for each in trace if each.cosine and each.kind == kind])
        for kind in kinds
    }
    last = next(each for each in cosine if each.kernel == "trace" and each.kind == "sjlt" and each.dim == dims[-1])
    steepest, flattest = min(slopes.values()), max(slopes.values())
    seen = (
        f"the residual falls as dim^{steepest:.2f} to dim^{flattest:.2f} by kind, a power of dim and not an "
        "exponential in it; within a kernel the tail of the residuals lies nearer to a normal tail, which ends sooner "
        f"than an exponential, in {tails.count('normal')} of {len(tails)} kernels, and to an exponential in "
        f"{tails.count('exponential')} (each residual divided by its standard error: {over.count('normal')} and "
        f"{over.count('exponential')})"
    )
    agrees = "yes" if tails.count("exponential") > len(tails) / 2 else "partly"
    return Finding(
        title=f"Residuals of projected kernels: {title}",
        table=_table([each for each in trace if each.cosine], parameters),
        seen=seen,
        agrees=agrees,
        claim=CLAIM,
        figure=figure,
        numbers={
            "samples": samples,
            "seeds": seeds,
            "parameters": parameters,
            "slopes": slopes,
            "predicted_over_observed": {"least": min(ratios), "most": max(ratios)},
            "tails": {name: tails.count(name) for name in ("exponential", "normal", "alike")},
            "standardised_tails": {name: over.count(name) for name in ("exponential", "normal", "alike")},
            "largest_dim_99.9%": last.rare,
            "residuals": [_figures(each) for each in outcome.residuals],
        },
        notes=(
            f"predicted over observed residuals of all kernels: {min(ratios):.2f} to {max(ratios):.2f}; the prediction "
            "is made from the projected kernel alone",
        ),
    )


def _figures(record: Residual) -> dict[str, Any]:
    """A record without its survival function."""
    found = asdict(record)
    return {**found, "tail": str(record.tail), "standardised": str(record.standardised)}


def _table(records: list[Residual], parameters: int) -> list[str]:
    rows = [("kind:dim", "parameters/dim", "observed", "predicted", "inside 95%", "99.9% |r|", "tail nearer to")]
    rows += [
        (
            f"{each.kind}:{each.dim}",
            f"{parameters / each.dim:.0f}",
            f"{np.mean(each.observed):.4f}",
            f"{np.mean(each.predicted):.4f}",
            f"{np.mean(each.inside):.1%}",
            f"{each.rare:.4f}",
            each.tail.better,
        )
        for each in records
    ]
    return aligned(rows)


def _draw(path: Path, records: list[Residual], kinds: tuple[str, ...], parameters: int) -> None:
    """Survival of cosine residuals by dim, of the default kind, and residual against dim, of all kinds."""
    with picture(path, 9.6, 4.1) as figure:
        left, right = figure.subplots(1, 2)
        _draw_survival(left, [each for each in records if each.kind == kinds[0]])
        plain(left, f"|residual| of cosines, {kinds[0]}", "|projected − exact cosine|", "share of pairs above")
        ends: list[tuple[float, str, str]] = []
        for kind, colour, marker in zip(kinds, COLOURS, "osD^", strict=False):
            mine = [each for each in records if each.kind == kind]
            dims = [each.dim for each in mine]
            right.loglog(dims, [np.mean(each.observed) for each in mine], marker, color=colour, markersize=5)
            right.loglog(dims, [np.mean(each.predicted) for each in mine], color=colour, linewidth=1.2)
            ends.append((float(np.mean(mine[-1].predicted)), kind, colour))
        places = spread([float(np.log(value)) for value, _, _ in ends], 0.17)
        for (_, kind, colour), place in zip(ends, places, strict=True):
            beside(right, dims[-1], float(np.exp(place)), kind, colour, shift=(8, 0))
        first = min(np.mean(each.observed) for each in records if each.dim == dims[0])
        guide = np.array([dims[0], dims[-1]])
        right.loglog(guide, 0.8 * first * (guide / guide[0]) ** -0.5, ":", color=GREY)
        beside(right, dims[0], 0.8 * first, "slope −1/2", GREY, shift=(0, -14))
        right.set_xticks(dims, [str(dim) for dim in dims])
        right.set_xticks([], minor=True)
        right.set_xlim(dims[0] * 0.9, dims[-1] * 2.2)
        plain(
            right,
            "Marks observed, lines predicted by error bars",
            f"dim (columns; the network has {parameters:,} parameters)",
            "relative Frobenius residual",
        )


def _draw_survival(axis: Any, records: list[Residual]) -> None:
    """One line a dim, each with its normal and its exponential tail."""
    widest = 0.0
    for each, colour in zip(records, ORDERED, strict=False):
        tail = each.tail
        x, survival = np.array(tail.values), np.array(tail.survival)
        shown = survival > 0
        axis.semilogy(x[shown], survival[shown], color=colour, linewidth=1.6)
        widest = max(widest, float(x[shown].max()))
        fitted = x[shown][survival[shown] <= TAIL_START]
        axis.semilogy(fitted, np.exp(tail.exponential_log - tail.rate * fitted), "--", color="black", linewidth=0.8)
        normal = tail.normal_log + np.log(2) + norm.logcdf(-fitted / tail.spread)
        axis.semilogy(fitted, np.exp(normal), ":", color="black", linewidth=1.2)
        beside(axis, float(x[shown][-1]), float(survival[shown][-1]), str(each.dim), colour, shift=(2, -8), ha="center")
    axis.set_xlim(0, widest * 1.1)
    axis.text(
        0.98,
        0.97,
        "by dim; tails fitted from 0.1 on:\n– – exponential   ··· normal",
        transform=axis.transAxes,
        ha="right",
        va="top",
        fontsize=SMALL,
    )
