"""The kernel itself: its map, its diagonal, its entries by class, its layers, and residuals where it is projected."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ooc_ntk.planning.layers import layer_name
from ooc_ntk.report.blocks import ClassBlocks
from ooc_ntk.report.figures.distributions import (
    between,
    draw_diagonal,
    draw_residuals,
    draw_scores,
    draw_shares,
    draw_within,
    within,
    within_bars,
)
from ooc_ntk.report.figures.heatmap import CLIPPED, draw_classes, draw_map
from ooc_ntk.report.parts import Figure, Figures, Missing, Part, Section, Table, Text
from ooc_ntk.report.words import number, with_spread

from .run import Run

#: Classes up to which the figure of means within and between them is drawn; a table has more.
DRAWN_CLASSES: Final = 30


def heat_map(run: Run) -> Section:
    """The kernel as a picture, by class."""
    kernel = run.kernel
    assert kernel is not None
    found = run.map
    rows, columns = kernel.shape
    pixels = found.means.shape
    by_class = bool(found.columns.groups)
    order = "rows and columns ordered by class, with lines between classes"
    if len(found.columns.groups) == 1:
        order = f"of one class, {found.columns.groups[0].name}"
    if not by_class:
        order = "rows and columns in the order of the data"
        order += f" ({run.without_labels})" if run.without_labels else " (more classes than are told apart)"
    each = ""
    if pixels != (rows, columns):
        each = f" Each pixel is the mean of about {rows / pixels[0]:,.0f} × {columns / pixels[1]:,.0f} entries."
    some = "" if found.looked_at == rows else f" Of {rows:,} rows {found.looked_at:,} were looked at, spread evenly."
    inside = f", {kernel.entries_per_sample} outputs, within a class by output" if kernel.entries_per_sample > 1 else ""
    test = " Below the thick line are the test samples." if kernel.test_samples else ""
    caption = (
        f"The kernel, {rows:,} × {columns:,} entries, {order}{inside}.{test}{each}{some} The outermost "
        f"{CLIPPED:.1%} of the pixels on either side share the last colour."
    )
    alt = (
        f"Map of the kernel's entries, {order}; values from {number(found.means.min())} to {number(found.means.max())}."
    )
    figures = [Figure("map", draw_map(found), caption, alt)]
    if found.blocks is not None:
        said = contrast(found.blocks)
        figures.append(
            Figure(
                "classes",
                draw_classes(found.blocks),
                f"Mean entry of each class against each other class, of the train samples. {said}",
                f"Map of mean entries by class. {said}",
            )
        )
    return Section("map", "The kernel", (Figures(tuple(figures)),))


def distributions(run: Run) -> Section:
    """Diagonal and class blocks."""
    kernel, blocks = run.kernel, run.map.blocks
    assert kernel is not None
    diagonal = kernel.diagonal()
    train, test = diagonal[: kernel.shape[1]], diagonal[kernel.shape[1] :]
    largest = int(np.argmax(train)) // kernel.entries_per_sample
    said = (
        f"mean {number(train.mean())}, standard deviation {number(train.std(), 3)}, from {number(train.min())} to "
        f"{number(train.max())} (train sample {largest})"
    )
    raw = ", before it was normalised" if kernel.plan is not None and kernel.plan.normalize else ""
    figures = [
        Figure(
            "diagonal",
            draw_diagonal(train, test),
            f"How large gradients are: diagonal entries of the kernel{raw}, the squared norm of each "
            f"sample’s gradient. Train samples: {said}.",
            f"Histogram of diagonal entries: {said}.",
        )
    ]
    if blocks is None:
        known = 0 if run.labels is None else len(np.unique(run.labels.train))
        why = "there is one class only" if known == 1 else "they are too many classes to be told apart"
        why = f"without labels ({run.without_labels})" if run.labels is None else why
        return Section(
            "diagonal",
            "Diagonal and classes",
            (Figures(tuple(figures)), Text(f"No statistics by class: {why}.", soft=True)),
        )
    if len(blocks.names) <= DRAWN_CLASSES:
        figures.append(
            Figure(
                "within",
                draw_within(blocks),
                "Entries within each class and with the others, the diagonal left out.",
                contrast(blocks),
            )
        )
    return Section("diagonal", "Diagonal and classes", (Figures(tuple(figures)), _class_table(blocks)))


def contrast(blocks: ClassBlocks) -> str:
    """How far apart entries within classes and between them are."""
    (inner, inner_spread), (outer, outer_spread) = blocks.within, blocks.between
    spread = float(np.sqrt((inner_spread**2 + outer_spread**2) / 2))
    apart = f": {(inner - outer) / spread:.2f} standard deviations apart" if spread > 0 else ""
    both = with_spread(inner, inner_spread), with_spread(outer, outer_spread)
    return f"Entries within a class are {both[0]} (mean ± standard deviation), between classes {both[1]}{apart}."


def _class_table(blocks: ClassBlocks) -> Table:
    inner, outer = within(blocks), between(blocks)
    rows = [
        (
            name,
            f"{blocks.samples[place]:,}",
            with_spread(inner[0][place], inner[1][place]),
            with_spread(outer[0][place], outer[1][place]),
            _ratio(inner[0][place], outer[0][place]),
        )
        for place, name in enumerate(blocks.names)
    ]
    all_ = (*blocks.within, *blocks.between)
    rows.append(
        (
            "all",
            f"{int(blocks.samples.sum()):,}",
            with_spread(*all_[:2]),
            with_spread(*all_[2:]),
            _ratio(all_[0], all_[2]),
        )
    )
    head = ("class", "train samples", "within it", "with other classes", "ratio")
    return Table(head, tuple(rows), "Entries by class: mean ± standard deviation", folded=len(rows) > DRAWN_CLASSES)


def _ratio(inner: float, outer: float) -> str:
    return f"{inner / outer:.2f}" if np.isfinite(inner) and outer > 0 else "-"


def layers(run: Run) -> Section:
    """What each layer adds to the kernel."""
    traces, plan = run.info.layer_traces, run.info.plan
    sizes = dict.fromkeys(traces, 0)
    for block in plan.blocks:
        sizes[layer_name(block)] += block.columns
    whole = sum(traces.values()) or 1.0
    shares = np.array([trace / whole for trace in traces.values()])
    of_parameters = np.array([size / plan.columns for size in sizes.values()])
    most = max(traces, key=lambda name: traces[name])
    said = f"most, {shares.max():.0%}, is of {most}, which has {sizes[most] / plan.columns:.0%} of the parameters"
    figure = Figure(
        "layers",
        draw_shares(list(traces), shares, of_parameters),
        f"What every layer adds to the trace of the kernel, beside its share of the parameters: {said}.",
        f"Bars of shares of the trace by layer: {said}.",
    )
    aligned = (run.result("spectrum") or {}).get("layers")
    parts: list[Part] = [Figures((figure,))]
    if isinstance(aligned, dict):
        parts = [Figures((figure, _alignment(aligned)))]
    else:
        parts.append(Missing("Alignment of the layers with each other", run.command("spectrum", " --layers")))
    return Section("layers", "Layers", tuple(parts))


def _alignment(found: dict[str, Any]) -> Figure:
    from ooc_ntk.report.figures.comparing import draw_matrix

    matrix = np.array(found["matrix"], dtype=np.float64)
    return Figure(
        "alignment",
        draw_matrix(found["names"], matrix, "CKA"),
        "How alike the layers' summands are: centred kernel alignment (CKA), 1 for the same up to a factor.",
        f"Map of alignments of {len(matrix)} layers.",
    )


def residuals(run: Run) -> Section:
    """Residuals of a projected kernel beside their error bars."""
    assert run.kernel is not None
    expected = run.info.expected_error
    lead = Text(
        "Entries of a projected kernel are estimates. "
        + (
            f"Of the whole kernel a relative error of {expected:.2%} (Frobenius norm) is to be expected."
            if expected
            else ""
        )
    )
    found = compared(run)
    if found is None:
        command = run.command("verify", " --samples 24")
        return Section(
            "residuals", "Error of the projection", (lead, Missing("Exact entries to compare with", command))
        )
    exact, off, errors = found
    scores = off / np.where(errors > 0, errors, np.inf)
    covered = float(within_bars(off, errors).mean())
    said = (
        f"{covered:.0%} of {len(exact):,} recomputed entries are within their 95% error bars; the residuals' root mean "
        f"square is {np.sqrt(np.mean(scores**2)):.2f} predicted standard errors"
    )
    figures = (
        Figure(
            "residuals",
            draw_residuals(exact, off, errors, "exact entry, recomputed in float64"),
            f"Projected less exact entries, with the error bars that the features predict: {said}.",
            f"Scatter of residuals with error bars: {said}.",
        ),
        Figure(
            "scores",
            draw_scores(scores),
            "Residuals over their predicted standard errors. All entries share one projection, so that they are not "
            "independent of each other.",
            f"Histogram of standardised residuals: {said}.",
        ),
    )
    return Section("residuals", "Error of the projection", (lead, Figures(figures)))


def compared(run: Run) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]] | None:
    """Exact entries, residuals and standard errors of the last audit; None where it kept none of this plan."""
    audited = run.info.audited or {}
    kept = audited.get("compared")
    if not kept or kept.get("standard_errors") is None or audited.get("plan") != run.info.plan.digest:
        return None
    exact, stored, errors = (np.array(kept[name], dtype=np.float64) for name in ("exact", "stored", "standard_errors"))
    return exact, stored - exact, errors
