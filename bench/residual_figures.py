"""Figures of the residuals: against dim, and their survival with both fitted tails."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import log_ndtr

from .projection_records import Residual
from .tails import TAIL_START


def drawing() -> bool:
    """Whether figures can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(residuals: Sequence[Residual], folder: Path) -> list[Path]:
    """Write the figures of the residuals.

    Args:
        residuals: of all data.
        folder: made if it is not there.

    Returns:
        The files.

    Raises:
        RuntimeError: if matplotlib is not installed.
    """
    if not drawing():
        raise RuntimeError("figures need matplotlib; pip install 'ooc-ntk[bench]', or leave --out away")
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for name in dict.fromkeys(record.data for record in residuals):
        mine = [record for record in residuals if record.data == name]
        found += [_draw_residuals(name, mine, folder), _draw_survival(name, mine, folder)]
    return found


def _draw_residuals(name: str, records: Sequence[Residual], folder: Path) -> Path:
    """Relative residual against dim, a panel per kernel."""
    from matplotlib import pyplot

    panels = list(dict.fromkeys((record.kernel, record.cosine) for record in records))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3.6), squeeze=False)
    for axis, (kernel, cosine) in zip(axes[0], panels, strict=True):
        mine = [record for record in records if (record.kernel, record.cosine) == (kernel, cosine)]
        for number, kind in enumerate(dict.fromkeys(record.kind for record in mine)):
            some, colour = [record for record in mine if record.kind == kind], f"C{number}"
            dims = [record.dim for record in some]
            axis.loglog(
                dims, [np.mean(record.observed) for record in some], "o", color=colour, label=f"{kind}, observed"
            )
            axis.loglog(
                dims, [np.mean(record.predicted) for record in some], color=colour, label=f"{kind}, predicted by bars"
            )
        first = mine[0]
        level = np.mean(first.observed) * first.dim**0.5 / 1.5
        ends = [min(record.dim for record in mine), max(record.dim for record in mine)]
        axis.loglog(ends, [level * dim**-0.5 for dim in ends], ":", color="gray", label="slope −1/2")
        axis.set_title(f"{kernel}{', cosine' if cosine else ''}")
        axis.set_xlabel("dim")
        every = sorted({record.dim for record in mine})
        axis.set_xticks(every, [str(dim) for dim in every])
        axis.set_xticks([], minor=True)
    axes[0][0].set_ylabel("relative Frobenius residual")
    axes[0][-1].legend(fontsize=6)
    return _save(figure, folder / f"residual-{name}.png")


def _draw_survival(name: str, records: Sequence[Residual], folder: Path) -> Path:
    """Survival of cosine residuals by dim with both fitted tails: as they are, and over their standard errors."""
    from matplotlib import pyplot

    kernels = list(dict.fromkeys(record.kernel for record in records))
    kind = records[0].kind
    figure, axes = pyplot.subplots(2, len(kernels), figsize=(4.5 * len(kernels), 7), squeeze=False)
    for column, kernel in enumerate(kernels):
        mine = [record for record in records if record.kernel == kernel and record.cosine and record.kind == kind]
        for row, label in enumerate(("|cosine residual|", "|cosine residual| / standard error")):
            axis = axes[row][column]
            for number, record in enumerate(mine):
                tail, colour = (record.standardised if row else record.tail), f"C{number}"
                x, survival = np.array(tail.values), np.array(tail.survival)
                axis.semilogy(x, survival, color=colour, label=f"dim {record.dim}")
                x = x[survival <= TAIL_START]
                axis.semilogy(x, np.exp(tail.exponential_log - tail.rate * x), "--", color=colour, linewidth=0.8)
                normal = tail.normal_log + np.log(2) + log_ndtr(-x / tail.spread)
                axis.semilogy(x, np.exp(normal), ":", color=colour, linewidth=1.2)
            axis.set_xlabel(label)
            axis.set_ylabel("share above")
            axis.set_title(f"{kernel}, {kind} (-- exponential, ·· normal tail)", fontsize=8)
            axis.legend(fontsize=6)
    return _save(figure, folder / f"survival-{name}.png")


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
