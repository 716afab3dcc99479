"""The spectrum of a kernel on the terminal and as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .pictures import picture

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ooc_ntk.algebra.powerlaw import Exponent
    from ooc_ntk.algebra.spectrum import Bounds
    from ooc_ntk.algebra.summary import SpectrumSummary

#: Ranks whose eigenvalues are listed.
SHOWN_RANKS: Final = (1, 2, 3, 4, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)

#: Layers up to which the alignments are printed as a table; of more only the picture and the files tell.
SHOWN_LAYERS: Final = 12

#: Characters of a layer's name in the table's head and in the picture.
NAME_WIDTH: Final = 14


def spectrum_table(summary: SpectrumSummary) -> RenderableType:
    """A spectrum: what it is of, its exponents, eigenvalues, effective dimensions, and alignments.

    Args:
        summary: what was found.

    Returns:
        Something to print.
    """
    spectrum = summary.spectrum
    pairs = Table(box=None, show_header=False, pad_edge=False)
    pairs.add_column(no_wrap=True)
    pairs.add_column(overflow="fold")
    how = f"{len(spectrum):,} of {spectrum.size:,} eigenpairs, {spectrum.method}, {spectrum.passes} passes"
    reached = f"largest residual {spectrum.residuals.max(initial=0.0):.1e} of the largest eigenvalue"
    pairs.add_row("kernel", summary.kernel)
    pairs.add_row("spectrum", f"{how}, {reached}")
    pairs.add_row("trace", f"{spectrum.trace:.6g}, {spectrum.explained:.2%} of it in these eigenvalues")
    pairs.add_row("decay", _exponent(summary.decay, "eigenvalue ~ rank^-α, α"))
    pairs.add_row("targets", summary.targets)
    if summary.alignment is not None:
        aligned = float(summary.alignment.cumulative[-1])
        pairs.add_row("alignment", f"{aligned:.2%} of the targets' energy along these eigenvectors")
        pairs.add_row("target decay", _exponent(summary.target_exponent, "energy beyond a rank ~ rank^-β, β"))
    parts: list[RenderableType] = [pairs, Text(), _eigenvalues(summary), Text(), _dimensions(summary)]
    if summary.runs:
        parts += [Text(), _runs(summary)]
    if summary.layers is not None:
        parts += [Text(), _layers(summary.layers.names, summary.layers.matrix)]
    if not spectrum.converged:
        short = len(spectrum) - spectrum.within_tolerance
        parts.append(Text(f"note: {short} eigenpairs are not within the tolerance {spectrum.tolerance:g}", "yellow"))
    return Group(*parts)


def _exponent(found: Exponent | None, what: str) -> str:
    if found is None:
        return "not fitted: fewer than three ranks are above rounding"
    first, last = found.window
    return f"{what} = {found.value:.3f} ± {found.error:.3f} over ranks {first} to {last}, r² {found.r2:.3f}"


def _eigenvalues(summary: SpectrumSummary) -> Table:
    spectrum, alignment = summary.spectrum, summary.alignment
    table = _table("eigenvalues", ["rank", "eigenvalue", "of the first", "of the trace up to it"])
    if alignment is not None:
        table.add_column("of the targets up to it", justify="right")
    along = np.cumsum(spectrum.values) / (spectrum.trace or 1.0)
    ranks = [rank for rank in SHOWN_RANKS if rank < len(spectrum)] + [len(spectrum)]
    for rank in ranks:
        value = float(spectrum.values[rank - 1])
        cells = [f"{rank:,}", f"{value:.6g}", f"{value / (spectrum.values[0] or 1.0):.2e}", f"{along[rank - 1]:.2%}"]
        if alignment is not None:
            cells.append(f"{alignment.cumulative[rank - 1]:.2%}")
        table.add_row(*cells)
    return table


def _dimensions(summary: SpectrumSummary) -> Table:
    table = _table("effective dimension", ["ridge over mean diagonal", "ridge", "dimension", "of the rows"])
    for each in summary.dimensions:
        table.add_row(f"{each.ratio:.0e}", f"{each.ridge:.4g}", *_between(each.bounds, summary.spectrum.size))
    return table


def _between(bounds: Bounds, size: int) -> tuple[str, str]:
    """A dimension and its share, as one number where the bounds print the same."""
    lower, upper = f"{bounds.lower:,.1f}", f"{bounds.upper:,.1f}"
    if lower == upper:
        return lower, f"{bounds.lower / size:.1%}"
    return f"{lower} to {upper}", f"{bounds.lower / size:.1%} to {bounds.upper / size:.1%}"


def _runs(summary: SpectrumSummary) -> Table:
    table = _table("alignment (CKA) with other runs", ["run", "CKA"])
    table.columns[0].justify = "left"
    for name, value in summary.runs.items():
        table.add_row(name, f"{value:.6f}")
    return table


def _layers(names: Sequence[str], matrix: NDArray[np.float64]) -> RenderableType:
    if len(names) > SHOWN_LAYERS:
        return Text(f"alignment (CKA) of {len(names)} layers: see the picture and the files")
    table = _table("alignment (CKA) of layers", ["layer", *(_short(name) for name in names)])
    table.columns[0].justify = "left"
    for name, row in zip(names, matrix, strict=True):
        table.add_row(name, *("-" if np.isnan(value) else f"{value:.3f}" for value in row))
    return table


def _short(name: str) -> str:
    """A name that fits its column: its end, which tells layers apart.

    >>> _short("encoder.linear1"), _short("head")
    ('…coder.linear1', 'head')
    """
    return name if len(name) <= NAME_WIDTH else f"…{name[-NAME_WIDTH + 1 :]}"


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, min_width=len(title))
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def draw_spectrum(path: Path, summary: SpectrumSummary) -> None:
    """Eigenvalues with their power law, and the targets' energy along the eigenvectors.

    Args:
        path: file to write, ``.png`` or ``.svg``.
        summary: what was found.

    Raises:
        InputError: if matplotlib is not installed.
    """
    two = summary.alignment is not None
    with picture(path, width=9.6 if two else 5.2, height=4.2) as figure:
        left = figure.add_subplot(1, 2 if two else 1, 1)
        _draw_eigenvalues(left, summary)
        if two:
            _draw_targets(figure.add_subplot(1, 2, 2), summary)


def _draw_eigenvalues(axes: Any, summary: SpectrumSummary) -> None:
    values = summary.spectrum.values
    ranks = np.arange(1, len(values) + 1)
    positive = values > 0
    axes.loglog(ranks[positive], values[positive], ".", markersize=4, color="#1f77b4", label="eigenvalues")
    if summary.decay is not None:
        _draw_law(axes, summary.decay, "α")
    floor = summary.spectrum.resolution * float(values.max(initial=0.0))
    if positive.any() and values[positive].min() < floor:
        axes.axhline(floor, color="0.6", linewidth=0.8, linestyle=":", label="rounding of entries")
    axes.set(xlabel="rank", ylabel="eigenvalue", title="Spectrum")
    axes.legend(frameon=False)


def _draw_targets(axes: Any, summary: SpectrumSummary) -> None:
    alignment = summary.alignment
    assert alignment is not None
    ranks = np.arange(1, len(alignment.shares) + 1)
    axes.semilogx(ranks, alignment.cumulative, color="#d62728", label="targets")
    trace = np.cumsum(summary.spectrum.values) / (summary.spectrum.trace or 1.0)
    axes.semilogx(ranks, trace, color="#1f77b4", linestyle="--", label="trace of the kernel")
    if summary.target_exponent is not None:
        found = summary.target_exponent
        axes.plot([], [], " ", label=f"β = {found.value:.2f} ± {found.error:.3f}")
    axes.set(xlabel="rank", ylabel="share up to this rank", title="Targets along the eigenvectors", ylim=(0, 1.02))
    axes.legend(frameon=False)


def _draw_law(axes: Any, law: Exponent, name: str) -> None:
    first, last = law.window
    ends = np.array([first, last], dtype=np.float64)
    axes.loglog(ends, law.at(ends), color="black", linewidth=1.2, label=f"{name} = {law.value:.2f} ± {law.error:.3f}")


def draw_alignment(path: Path, names: Sequence[str], matrix: NDArray[np.float64]) -> None:
    """Alignments of layers as a map of colours.

    Args:
        path: file to write, ``.png`` or ``.svg``.
        names: of the layers.
        matrix: (layers, layers).

    Raises:
        InputError: if matplotlib is not installed.
    """
    side = min(12.0, 3.2 + 0.28 * len(names))
    with picture(path, width=side + 0.8, height=side) as figure:
        axes = figure.add_subplot(1, 1, 1)
        image = axes.imshow(matrix, vmin=0.0, vmax=1.0, cmap="viridis")
        short = [_short(name) for name in names]
        axes.set_xticks(range(len(names)), short, rotation=90, fontsize=7)
        axes.set_yticks(range(len(names)), short, fontsize=7)
        axes.set_title("Alignment (CKA) of layers")
        if len(names) <= SHOWN_LAYERS:
            for row, column in np.ndindex(matrix.shape):
                if not np.isnan(matrix[row, column]):
                    shade = "black" if matrix[row, column] > 0.6 else "white"
                    axes.text(column, row, f"{matrix[row, column]:.2f}", ha="center", va="center", color=shade, size=7)
        figure.colorbar(image, ax=axes, shrink=0.8)
