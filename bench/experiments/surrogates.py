"""How faithful kernel surrogates are to their network, by kernel (Engel et al. 2023, tables of τ and accuracy)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import ooc_ntk
from bench.table import aligned
from ooc_ntk.api import Surrogate
from ooc_ntk.report.pictures import picture

from .figures import BLUE, GREY, ORANGE, plain
from .finding import Finding, Setting

CLAIM: Final = (
    "kernel machines by approximate NTKs are effective surrogates, the trace NTK the most consistent of them, and "
    "their projected variants nearly as good"
)

#: Columns of projected kernels, in full and in smoke size.
DIM, SMOKE_DIM = 2048, 128


@dataclass(frozen=True)
class Candidate:
    """A kernel that is compared.

    Attributes:
        label: as the paper names it.
        name: of its run.
        changes: of the job.
    """

    label: str
    name: str
    changes: dict[str, Any]


def candidates(setting: Setting) -> tuple[Candidate, ...]:
    """Kernels of the trained network, all as cosines but the one that says otherwise."""
    sketch = ooc_ntk.Projection("sjlt", SMOKE_DIM if setting.smoke else DIM, seed=setting.seed)
    cosine = {"normalize": "cosine"}
    return (
        Candidate("trNTK", "trace-cosine", cosine),
        Candidate("trNTK, not normalised", "trace-trained-own", {}),
        Candidate("pNTK", "pseudo-cosine", {**cosine, "kernel": "pseudo"}),
        Candidate("projected trNTK", "trace-projected", {**cosine, "projection": sketch}),
        Candidate("projected pNTK", "pseudo-projected", {**cosine, "kernel": "pseudo", "projection": sketch}),
        Candidate("embedding", "embedding-cosine", {**cosine, "kernel": "embedding:*"}),
        Candidate("conjugate", "conjugate-cosine", {**cosine, "kernel": "conjugate"}),
    )


def run(setting: Setting) -> Finding:
    """Fit a logistic surrogate by each kernel, and compare it with the network."""
    found: dict[str, Surrogate] = {}
    for each in candidates(setting):
        job = setting.job(**each.changes)
        kernel = setting.kernel(each.name, job)
        report = ooc_ntk.surrogate(
            kernel.path, job, kinds=("logistic",), baselines=(), seed=setting.seed, progress=False
        )
        found[each.label] = report.surrogates[0]
        network = report.network
    figure = setting.out / "surrogates.png"
    _draw(figure, found, network.accuracy)
    tau = {label: each.kendall_tau for label, each in found.items()}
    best = max(tau, key=lambda label: tau[label].value)
    mine = tau["trNTK"]
    behind = tau[best].value - mine.value
    difference = found["trNTK"].accuracy_difference
    lost = mine.value - tau["projected trNTK"].value
    seen = (
        f"the trace kernel's surrogate has τ = {mine.value:.3f} ± {mine.error:.3f} and loses "
        f"{100 * difference.value:+.1f} ± {100 * difference.error:.1f} points of accuracy; "
        + (
            "no other kernel has a larger τ"
            if best == "trNTK"
            else f"the largest τ is {tau[best].value:.3f}, of the kernel {best!r}"
        )
        + f"; projecting it costs {lost:+.3f} of τ"
    )
    close = behind <= 3 * mine.error or best == "trNTK, not normalised"  # which is a trace NTK, too
    agrees = "yes" if behind <= mine.error else "partly" if close else "no"
    if abs(difference.value) > max(0.02, 2 * difference.error):
        agrees = "no"
    return Finding(
        title=f"Surrogates of a CNN trained on {setting.train_samples:,} digits, {setting.test_samples} test digits; "
        f"network {network.accuracy:.1%}",
        table=_table(found),
        seen=seen,
        agrees=agrees,
        claim=CLAIM,
        figure=figure,
        numbers={
            "network_accuracy": network.accuracy,
            "network_train_accuracy": network.train_accuracy,
            "dim": SMOKE_DIM if setting.smoke else DIM,
            "surrogates": {label: each.figures() for label, each in found.items()},
        },
        notes=("kernels are cosines but the one that says otherwise; ± is one standard error over test digits",),
    )


def _table(found: dict[str, Surrogate]) -> list[str]:
    rows = [("kernel", "accuracy", "network − surrogate", "Kendall τ-b", "R²")]
    for label, each in found.items():
        difference = each.accuracy_difference
        rows.append(
            (
                label,
                f"{each.accuracy.value:.1%}",
                f"{100 * difference.value:+.1f} ± {100 * difference.error:.1f}",
                f"{each.kendall_tau.value:.3f} ± {each.kendall_tau.error:.3f}",
                f"{each.r_squared.value:.3f}",
            )
        )
    return aligned(rows)


def _draw(path: Path, found: dict[str, Surrogate], accuracy: float) -> None:
    """A dot with its standard error for each kernel: τ on the left, difference of accuracy on the right."""
    labels = list(found)
    places = range(len(labels), 0, -1)
    colours = [ORANGE if label in ("embedding", "conjugate") else BLUE for label in labels]
    with picture(path, 8.6, 3.6) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        for axis, name, factor in ((left, "kendall_tau", 1.0), (right, "accuracy_difference", 100.0)):
            for place, label, colour in zip(places, labels, colours, strict=True):
                estimate = getattr(found[label], name)
                value = factor * estimate.value
                marker = "s" if colour == ORANGE else "o"
                axis.errorbar(value, place, xerr=factor * estimate.error, fmt=marker, color=colour, capsize=3)
                text = f"{value:.3f}" if factor == 1 else f"{value:+.1f}"
                axis.annotate(
                    text,
                    (value, place),
                    xytext=(0, 6),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                    color=colour,
                )
        plain(left, "Agreement with the network (more is better)", "Kendall τ-b ± standard error", "")
        plain(right, f"Accuracy lost (network {accuracy:.1%})", "network − surrogate, percentage points", "")
        left.set_yticks(list(places), labels)
        left.set_ylim(0.5, len(labels) + 0.75)
        right.axvline(0, color=GREY, linewidth=1)
        left.text(0.02, 0.02, "● tangent kernels   ■ features", transform=left.transAxes, fontsize=8, color=GREY)
