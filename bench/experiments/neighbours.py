"""The five most similar train images of some test digits, by kernel (Engel et al. 2023, figure of similar images)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np

import ooc_ntk
from bench.table import aligned
from ooc_ntk.report.neighbours import MARKS, OTHER, SAME, UNKNOWN
from ooc_ntk.report.pictures import picture

from .finding import Finding, Setting
from .surrogates import candidates

CLAIM: Final = "the nearest train images by the (projected) trace kernel look like the test image and are of its class"

#: Neighbours of a test image, and test images in the picture.
NEAREST, SHOWN = 5, 3

#: Shares of neighbours of the same class from which the claim counts as seen, and as seen in part, and that of the
#: exact kernel's neighbours that the projected one must find (choices).
ALIKE, MIXED, KEPT = 0.9, 0.5, 0.5


def run(setting: Setting) -> Finding:
    """Find the nearest train digits of all test digits by each kernel, and draw those of a few."""
    found: dict[str, Any] = {}
    shown = 1 if setting.smoke else SHOWN
    for each in candidates(setting):
        kernel = setting.kernel(each.name, setting.job(**each.changes))
        by = "kernel" if "normalize" not in each.changes else "cosine"
        found[each.label] = ooc_ntk.nearest(kernel.path, NEAREST, by=by, show=shown, seed=setting.seed)
    exact = found["trNTK"].neighbours.indices
    alike = {label: each.figures["same_class"] for label, each in found.items()}
    kept = {label: _overlap(each.neighbours.indices, exact) for label, each in found.items()}
    hubs = {label: each.figures["near_to_most"][0]["of_samples"] / len(exact) for label, each in found.items()}
    figure = setting.out / "neighbours.png"
    _draw(figure, found)
    seen = (
        f"{alike['trNTK']['all_k']:.0%} of the five nearest by the trace kernel are of the test digit's class "
        f"({alike['trNTK']['by_chance']:.0%} by chance), and {alike['projected trNTK']['all_k']:.0%} by the projected "
        f"one, which finds {kept['projected trNTK']:.0%} of the exact one's neighbours; without normalising, one train "
        f"digit is among the five of {hubs['trNTK, not normalised']:.0%} of all test digits"
    )
    share = min(alike["trNTK"]["all_k"], alike["projected trNTK"]["all_k"])
    agrees = "no" if share < MIXED else "yes" if share >= ALIKE and kept["projected trNTK"] >= KEPT else "partly"
    rows = [("kernel", "nearest of class", "five of class", "shared with trNTK", "largest hub")]
    rows += [
        (
            label,
            f"{alike[label]['nearest']:.1%}",
            f"{alike[label]['all_k']:.1%}",
            f"{kept[label]:.1%}",
            f"{hubs[label]:.1%}",
        )
        for label in found
    ]
    return Finding(
        title=f"Five most similar of {setting.train_samples:,} train digits, {setting.test_samples} test digits",
        table=aligned(rows),
        seen=seen,
        agrees=agrees,
        claim=CLAIM,
        figure=figure,
        numbers={
            "same_class": alike,
            "shared_with_trace": kept,
            "largest_hub": hubs,
            "shown": {label: each.figures["shown"] for label, each in found.items()},
        },
        notes=("largest hub: share of test digits among whose five nearest the same train digit is",),
    )


def _overlap(mine: Any, theirs: Any) -> float:
    """Mean share of neighbours that are among the other's."""
    return float(np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(mine, theirs, strict=True)]))


def _draw(path: Path, found: dict[str, Any]) -> None:
    """A line for each kernel; on it the nearest images of each test digit, which stand above them."""
    labels = list(found)
    count = len(found[labels[0]].shown)
    width = count * NEAREST + count - 1
    with picture(path, 10.6, 0.64 * (len(labels) + 1) + 0.6) as figure:
        ratios = [0.25 if place % (NEAREST + 1) == NEAREST else 1.0 for place in range(width)]
        grid = figure.add_gridspec(len(labels) + 1, width + 1, width_ratios=[2.4, *ratios], wspace=0.02, hspace=0.02)
        for number, row in enumerate(found[labels[0]].shown):
            axis = figure.add_subplot(grid[0, 1 + number * (NEAREST + 1) + NEAREST // 2])
            _image(axis, row.sample.pixels, UNKNOWN)
            axis.set_title(f"test digit {row.sample.index}, a {row.sample.label}", fontsize=9)
        for line, label in enumerate(labels, 1):
            name = figure.add_subplot(grid[line, 0])
            name.set_axis_off()
            name.text(1, 0.5, label.replace(", ", ",\n"), ha="right", va="center", fontsize=9)
            for number, row in enumerate(found[label].shown):
                for place, sample in enumerate(row.neighbours):
                    same = row.same(place)
                    axis = figure.add_subplot(grid[line, 1 + number * (NEAREST + 1) + place])
                    _image(axis, sample.pixels, SAME if same else OTHER)
                    if not same:
                        axis.text(
                            0.97,
                            0.97,
                            f"{sample.label} {MARKS[same]}",
                            transform=axis.transAxes,
                            ha="right",
                            va="top",
                            fontsize=8,
                            color="white",
                            bbox={"facecolor": OTHER, "edgecolor": "none", "pad": 1},
                        )
        figure.supxlabel(
            "nearest on the left; green frame: of the test digit's class; red frame, ✗ and its class: another",
            fontsize=8.5,
            color=UNKNOWN,
        )


def _image(axis: Any, pixels: Any, colour: str) -> None:
    axis.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set(color=colour, linewidth=1.8)
