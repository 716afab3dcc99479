"""GCV against the test risk of kernel regression, over samples and ridges (Wei, Hu and Steinhardt 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import scipy.stats
from numpy.typing import NDArray

import ooc_ntk
from bench.algebra_kernels import one_hot
from bench.table import aligned
from ooc_ntk import demo
from ooc_ntk.report.pictures import picture

from .figures import BLUE, GREEN, GREY, ORANGE, ORDERED, SMALL, beside, plain, spread
from .finding import FRESH, TEST_START, Finding, Setting

CLAIM: Final = (
    "GCV predicts the test risk of regression with networks' kernels, over sample counts and ridges, for pretrained "
    "and for initial networks"
)

#: Median of |GCV / risk − 1| up to which the claim counts as seen, and as seen in part (choices).
CLOSE, NEAR = 0.1, 0.25


@dataclass(frozen=True)
class Curve:
    """GCV, leave-one-out and test risk of one kernel at one sample count; mean squared errors over samples and classes.

    Attributes:
        samples: train samples.
        ratios: ridges over the mean diagonal.
        gcv: by ridge.
        loo: leave-one-out, by ridge.
        risk: on the test digits, by ridge.
        accuracy: at GCV's ridge.
    """

    samples: int
    ratios: NDArray[np.float64]
    gcv: NDArray[np.float64]
    loo: NDArray[np.float64]
    risk: NDArray[np.float64]
    accuracy: float

    def off(self, name: str = "gcv") -> NDArray[np.float64]:
        """An estimate, ``gcv`` or ``loo``, over the risk, less 1."""
        return np.asarray(getattr(self, name) / self.risk - 1)

    @property
    def chosen(self) -> float:
        """The risk at GCV's ridge over the least one."""
        return float(self.risk[int(self.gcv.argmin())] / self.risk.min())

    def figures(self) -> dict[str, Any]:
        """In values that JSON has."""
        arrays = {name: getattr(self, name).tolist() for name in ("ratios", "gcv", "loo", "risk")}
        return {"samples": self.samples, **arrays, "accuracy": self.accuracy, "risk_at_gcv_over_least": self.chosen}


def leading(kernel: ooc_ntk.Kernel, samples: int) -> ooc_ntk.Kernel:
    """The kernel of the first train samples and all test samples: part of it, in memory."""
    train, test = kernel.samples
    rows = np.r_[0:samples, train : train + test]
    entries = np.asarray(kernel)[rows, :samples]
    return ooc_ntk.Kernel.of_array(kernel.path, entries, kernel.diagonal()[rows], samples, test)


def curve(kernel: ooc_ntk.Kernel, labels: NDArray[np.int64], ratios: NDArray[np.float64]) -> Curve:
    """GCV and test risk of regression of one-hot classes.

    Args:
        kernel: train digits first.
        labels: of train and test digits.
        ratios: ridges over the mean diagonal.
    """
    size = kernel.train_samples
    mean = float(kernel.diagonal()[:size].mean())
    found = kernel.gcv(one_hot(labels[:size]), ratios * mean, method="spectrum")
    coefficients = np.stack(list(found.path.coefficients), axis=1)  # (train, ridges, classes)
    predicted = kernel.matmat(coefficients.reshape(size, -1), rows="test").reshape(-1, *coefficients.shape[1:])
    risk = ((predicted - one_hot(labels[size:])[:, None]) ** 2).mean((0, 2))
    right = predicted[:, found.best].argmax(1) == labels[size:]
    return Curve(size, ratios, found.gcv, found.loo, risk, float(right.mean()))


def run(setting: Setting) -> Finding:
    """Compare GCV with the risk for the initial network, and for the trained one on new digits and on its own."""
    counts = (40, 80) if setting.smoke else (125, 250, 500, 1000)
    ratios = np.logspace(-5, 0, 6 if setting.smoke else 16)
    cases = {
        "initial network": {"trained": False, "fresh": True},
        "trained network, new digits": {"trained": True, "fresh": True},
        "trained network, its own digits": {"trained": True, "fresh": False},
    }
    curves: dict[str, list[Curve]] = {}
    for name, case in cases.items():
        whole = setting.digits_kernel(**case)
        first = FRESH if case["fresh"] else 0
        train = demo.digits(first, first + setting.train_samples)[1].numpy()
        test = demo.digits(TEST_START, TEST_START + setting.test_samples)[1].numpy()
        curves[name] = [curve(leading(whole, count), np.concatenate([train[:count], test]), ratios) for count in counts]
    figure = setting.out / "gcv.png"
    _draw(figure, curves)
    off = {
        name: {part: float(np.median([each.off(part) for each in some])) for part in ("gcv", "loo")}
        for name, some in curves.items()
    }
    initial, fresh, own = cases
    worst = max(float(np.median([abs(each.off()) for each in curves[name]])) for name in (initial, fresh))
    every = [each for name in (initial, fresh) for each in curves[name]]
    ranks = float(scipy.stats.spearmanr(*(np.concatenate([getattr(c, n) for c in every]) for n in ("gcv", "risk")))[0])
    chosen = max(each.chosen for each in every)
    seen = (
        f"on digits that the network has not seen GCV is off the test risk by {off[initial]['gcv']:+.0%} (initial "
        f"network) and {off[fresh]['gcv']:+.0%} (trained), leave-one-out by {off[initial]['loo']:+.0%} and "
        f"{off[fresh]['loo']:+.0%} (medians over sample counts and ridges); GCV still puts them in their order (rank "
        f"correlation {ranks:.2f}), and its ridge costs at most {chosen - 1:.0%} of risk; on the digits that the "
        f"network was trained on GCV is off by {off[own]['gcv']:+.0%} and leave-one-out by {off[own]['loo']:+.0%}"
    )
    agrees = "yes" if worst <= CLOSE else "partly" if worst <= NEAR else "no"
    return Finding(
        title=f"GCV and test risk of the trace kernel's regression, {setting.test_samples} test digits",
        table=_table(curves),
        seen=seen,
        agrees=agrees,
        claim=CLAIM,
        figure=figure,
        numbers={
            "median_off": off,
            "rank_correlation_of_gcv_and_risk": ranks,
            "curves": {name: [each.figures() for each in some] for name, some in curves.items()},
        },
        notes=(
            "risk: mean squared error over test digits and classes; medians over ridges of 1e-5 to 1 mean diagonals",
        ),
    )


def _table(curves: dict[str, list[Curve]]) -> list[str]:
    rows = [("kernel", "N", "GCV/risk − 1", "leave-one-out/risk − 1", "risk at GCV's ridge", "over least", "accuracy")]
    for name, some in curves.items():
        rows += [
            (
                name,
                f"{each.samples:,}",
                f"{np.median(each.off()):+.1%}",
                f"{np.median(each.off('loo')):+.1%}",
                f"{each.risk[int(each.gcv.argmin())]:.4f}",
                f"{each.chosen:.3f}",
                f"{each.accuracy:.1%}",
            )
            for each in some
        ]
    return aligned(rows)


def _draw(path: Path, curves: dict[str, list[Curve]]) -> None:
    """For each kernel risk and GCV over ridges by sample count; then all of GCV against all of the risk."""
    marks = dict(zip(curves, ((BLUE, "o"), (GREEN, "D"), (ORANGE, "s")), strict=True))
    values = np.concatenate([np.r_[each.gcv, each.risk] for some in curves.values() for each in some])
    low, high = 0.85 * values.min(), 1.15 * values.max()
    with picture(path, 9.6, 7.2) as figure:
        panels = figure.subplots(2, 2).reshape(-1)
        for axis, (title, some) in zip(panels, curves.items(), strict=False):
            for each, colour in zip(some, ORDERED[::2] + ORDERED[5:], strict=False):
                axis.loglog(each.ratios, each.risk, color=colour, linewidth=1.6)
                axis.loglog(each.ratios, each.gcv, "o", color=colour, markersize=4, markerfacecolor="white")
                axis.loglog(each.ratios, each.loo, "x", color=colour, markersize=4)
            places = spread([float(np.log(each.risk[0])) for each in some], 0.09 * float(np.log(high / low)) * 0.7)
            for each, colour, place in zip(some, ORDERED[::2] + ORDERED[5:], places, strict=False):
                beside(
                    axis,
                    each.ratios[0],
                    float(np.exp(place)),
                    f"N = {each.samples:,}",
                    colour,
                    shift=(-6, 0),
                    ha="right",
                )
            axis.set_xlim(some[0].ratios[0] / 24, 1.5)
            axis.set_ylim(low, high)
            plain(axis, title[0].upper() + title[1:], "ridge / mean diagonal", "mean squared error")
        text = "lines: test risk   ○ GCV   × leave-one-out"
        panels[0].text(0.02, 0.97, text, transform=panels[0].transAxes, fontsize=SMALL, va="top", color=GREY)
        last = panels[3]
        last.loglog([low, high], [low, high], color=GREY, linewidth=1)
        for name, some in curves.items():
            colour, marker = marks[name]
            x, y, loo = (np.concatenate([getattr(each, part) for each in some]) for part in ("risk", "gcv", "loo"))
            last.loglog(x, y, marker, color=colour, markersize=4, label=f"GCV, {name}", alpha=0.8)
            last.loglog(x, loo, "x", color=colour, markersize=3.5, alpha=0.8)
        last.loglog([], [], "x", color=GREY, markersize=4, label="leave-one-out, in the same colours")
        last.legend(fontsize=SMALL, frameon=False, loc="upper left")
        last.set_xlim(low, high)
        last.set_ylim(low, high)
        plain(last, "All sample counts and ridges", "test risk (mean squared error)", "estimate of it")
