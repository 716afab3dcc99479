"""Two kernels of the same samples: maps, alignment, entries, spectra, regressions, neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ooc_ntk import api
from ooc_ntk.algebra.alignment import together
from ooc_ntk.errors import OocNtkError
from ooc_ntk.report.blocks import BlockSums, KernelMap, make_axes
from ooc_ntk.report.figures.comparing import draw_curves, draw_entries, draw_shared
from ooc_ntk.report.figures.distributions import draw_residuals, draw_scores, within_bars
from ooc_ntk.report.figures.heatmap import colour_range, draw_map
from ooc_ntk.report.figures.spectrum import draw_eigenvalues
from ooc_ntk.report.parts import Figure, Figures, Gallery, Missing, Part, Section, Table, Text, Thumbnail
from ooc_ntk.report.words import number

from .results import accuracies, curve_of, eigenvalues
from .run import Run
from .similar import QUICK_BYTES, SHOWN, picture_address

#: Train rows and columns whose entries are drawn one by one (a choice: 576 entries).
DRAWN_SAMPLES: Final = 24

#: Samples whose neighbours changed most that are shown.
CHANGED: Final = 4


@dataclass(frozen=True, eq=False)
class Pair:
    """Two kernels beside each other.

    Attributes:
        runs: the one that is compared with, and the one that is compared.
        maps: pictures of both train squares, and of the second less the first.
        difference: ``‖B − A‖ / ‖A‖`` over the train square.
        factor: ``⟨A, B⟩ / ⟨A, A⟩``: what A is multiplied with to be nearest to B.
        scaled: ``‖B − factor · A‖ / ‖B‖``.
        alignment: centred alignment (CKA).
        cosine: ``⟨A, B⟩ / (‖A‖ ‖B‖)``.
    """

    runs: tuple[Run, Run]
    maps: tuple[KernelMap, KernelMap, KernelMap]
    difference: float
    factor: float
    scaled: float
    alignment: float
    cosine: float


def look(first: Run, second: Run) -> Pair:
    """Look at two kernels at once: one pass over both for the pictures, and one for their alignment.

    Raises:
        InputError: if one of them is zero once it is centred.
        StorageError: if a tile cannot be read.
    """
    kernels = first.kernel, second.kernel
    assert kernels[0] is not None
    assert kernels[1] is not None
    labels = first.labels if first.labels is not None else second.labels
    columns = make_axes(kernels[0], labels)[1]
    sums = [BlockSums(columns, columns) for _ in range(3)]
    product, squares = 0.0, np.zeros(3)
    for rows, across, (a, b) in together([kernels[0].entries, kernels[1].entries]):
        mirrored = rows != across
        wide = a.astype(np.float64), b.astype(np.float64)
        values = (*wide, wide[1] - wide[0])
        for each, found in zip(sums, values, strict=True):
            each.add(slice(rows.start, rows.stop), across, found, mirrored=mirrored)
        weight = 2.0 if mirrored else 1.0
        product += weight * float(np.vdot(wide[0], wide[1]))
        squares += weight * np.array([float(np.vdot(found, found)) for found in values])
    norms = np.sqrt(squares)
    factor = product / squares[0] if squares[0] else 0.0
    scaled = np.sqrt(max(0.0, squares[1] - factor * product))
    size = kernels[0].shape[1]
    maps = [KernelMap(each.means(), columns, columns, None, size) for each in sums]
    return Pair(
        runs=(first, second),
        maps=(maps[0], maps[1], maps[2]),
        difference=float(norms[2] / norms[0]) if norms[0] else float("nan"),
        factor=factor,
        scaled=float(scaled / norms[1]) if norms[1] else float("nan"),
        alignment=_aligned(kernels[0], kernels[1]),
        cosine=product / float(norms[0] * norms[1]) if norms[0] and norms[1] else float("nan"),
    )


def _aligned(first: api.Kernel, second: api.Kernel) -> float:
    """CKA of two kernels; NaN where one is constant, so that nothing is left of it once it is centred."""
    try:
        return first.cka(second)
    except api.InputError:
        return float("nan")


def maps(found: Pair) -> Section:
    """Both kernels as pictures, and their difference."""
    names = [run.name for run in found.runs]
    by_class = "by class" if found.maps[0].columns.groups else "in the order of the data"
    both = colour_range(np.stack([each.means for each in found.maps[:2]]))
    titles = (
        (f"The train square of {names[0]}, {by_class}.", "first", "mean entry", both),
        (f"The train square of {names[1]}, in the same colours.", "second", "mean entry", both),
        (
            f"{names[1]} less {names[0]}: block means, so that errors of either sign cancel in part.",
            "difference",
            "mean difference",
            None,
        ),
    )
    figures = tuple(
        Figure(name, draw_map(each, what, ends, signed=name == "difference"), title, title)
        for (title, name, what, ends), each in zip(titles, found.maps, strict=True)
    )
    rows = (
        (
            "centred alignment (CKA), 1 for kernels that are the same but for a factor and a constant",
            number(found.alignment, 6),
        ),
        ("cosine of both, ⟨A, B⟩ / (‖A‖ ‖B‖)", number(found.cosine, 6)),
        ("relative Frobenius difference, ‖B − A‖ / ‖A‖", f"{number(100 * found.difference)}%"),
        ("factor that brings A nearest to B", number(found.factor, 5)),
        ("what is left of the difference then, over ‖B‖", f"{number(100 * found.scaled)}%"),
    )
    table = Table(("", "value"), rows, f"A is {names[0]}, B is {names[1]}; train squares")
    return Section("maps", "Both kernels", (table, Figures(figures)))


def entries(found: Pair) -> Section:
    """The same entries of both kernels, one by one."""
    rows, columns = _chosen(found.runs)
    kernels = [run.kernel for run in found.runs]
    assert kernels[0] is not None
    assert kernels[1] is not None
    values = [np.asarray(each[rows, columns], dtype=np.float64).reshape(-1) for each in kernels if each is not None]
    projected = [run.info.plan.projection is not None for run in found.runs]
    names = (found.runs[0].name, found.runs[1].name)
    errors: NDArray[np.float64] | None = None
    if projected[1]:
        errors = kernels[1].errors(rows, columns).reshape(-1)
    said = f"{len(values[0]):,} entries between {DRAWN_SAMPLES} train samples drawn at random"
    title = f"{said}: {names[1]} over {names[0]}."
    figures = [Figure("entries", draw_entries(values[0], values[1], errors, names), title, title)]
    if projected[0] != projected[1]:
        which = 1 if projected[1] else 0
        sketch = kernels[which]
        assert sketch is not None
        bars = sketch.errors(rows, columns).reshape(-1)
        figures += _residuals(values[1 - which], values[which] - values[1 - which], bars, names[1 - which])
    return Section("entries", "Entry by entry", (Figures(tuple(figures)),))


def _residuals(
    exact: NDArray[np.float64], off: NDArray[np.float64], bars: NDArray[np.float64], name: str
) -> Iterator[Figure]:
    scores = off / np.where(bars > 0, bars, np.inf)
    said = (
        f"{within_bars(off, bars).mean():.0%} are within their 95% error bars; the root mean square is "
        f"{np.sqrt(np.mean(scores**2)):.2f} predicted standard errors"
    )
    caption = (
        f"Projected less exact entries with predicted error bars: {said}. All share one projection and are not "
        "independent: one draw can shift most of them the same way."
    )
    yield Figure("residuals", draw_residuals(exact, off, bars, f"entry of {name}"), caption, caption)
    caption = "Residuals over their predicted standard errors. All share one projection and are not independent."
    yield Figure("scores", draw_scores(scores), caption, f"Histogram of standardised residuals: {said}.")


def _chosen(runs: tuple[Run, Run]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns of some train samples."""
    kernel = runs[0].kernel
    assert kernel is not None
    size = kernel.shape[1]
    random = np.random.default_rng(0)
    found = [np.sort(random.choice(size, min(DRAWN_SAMPLES, size), replace=False)).astype(np.int64) for _ in range(2)]
    return found[0], found[1]


def spectra(runs: tuple[Run, Run]) -> Section:
    """Eigenvalues of both kernels over each other."""
    found = [eigenvalues(run) for run in runs]
    parts: list[Part] = [
        Missing(f"Eigenvalues of {run.name}", run.command("spectrum"))
        for run, each in zip(runs, found, strict=True)
        if each is None
    ]
    there = [each for each in found if each is not None]
    if len(there) == len(runs):
        there = [replace(each, name=run.name) for run, each in zip(runs, there, strict=True)]
        laws = [
            f"{each.name} as rank to the power −{each.decay['value']:.3f} ± {each.decay['error']:.3f}"
            for each in there
            if each.decay is not None
        ]
        said = f"Eigenvalues of both train squares{': ' + ', '.join(laws) if laws else ''}."
        parts = [Figures((Figure("spectra", draw_eigenvalues(there), said, said),))]
    return Section("spectra", "Spectra", tuple(parts))


def regressions(runs: tuple[Run, Run]) -> Section:
    """GCV, test error and accuracy of both kernels."""
    parts: list[Part] = []
    rows = [(f"{run.name}: {what}", *rest) for run in runs for what, *rest in accuracies(run)]
    if rows:
        parts.append(Table(("classified right", "train samples", "test samples"), tuple(rows)))
    parts += [
        Missing(f"Errors over the ridge of {run.name}", run.command("fit")) for run in runs if run.result("fit") is None
    ]
    curves = [curve for run in runs if (curve := curve_of(run)) is not None]
    if len(curves) == len(runs) and curves[0].relative == curves[1].relative:
        best = [float(np.nanmin(curve.errors["GCV"])) for curve in curves]
        least = [f"{number(value)} of {curve.name}" for value, curve in zip(best, curves, strict=True)]
        said = f"GCV over the ridge; the least is {' and '.join(least)}."
        figures = [Figure("gcv", draw_curves(curves, "GCV"), said, said)]
        if all("test" in curve.errors for curve in curves):
            figures.append(_curves(curves, "test", "Mean squared error of the test samples over the ridge."))
        if all(len(curve.accuracies) for curve in curves):
            figures.append(_curves(curves, "accuracy", "Test samples that kernel regression classifies right."))
        parts.append(Figures(tuple(figures)))
    return Section("regressions", "Kernel regression", tuple(parts))


def _curves(curves: list[Any], what: str, caption: str) -> Figure:
    return Figure(what, draw_curves(curves, what), caption, caption)


def neighbours(runs: tuple[Run, Run]) -> Section:
    """Whose most similar samples changed."""
    title = "Neighbours that changed"
    kernels = [run.kernel for run in runs if run.kernel is not None]
    rows = "test" if kernels[0].test_samples else "train"
    k = min(SHOWN, kernels[0].train_samples - (rows == "train"))
    if k < 1 or kernels[0].entries_per_sample > 1:
        why = "There is one sample only." if k < 1 else "Neighbours are not defined of a full kernel."
        return Section("neighbours", title, (Text(why, soft=True),))
    if kernels[0].shape[0] * kernels[0].shape[1] * 4 > QUICK_BYTES:
        missing = (Missing(f"Neighbours of {run.name}", run.command("nearest")) for run in runs)
        return Section("neighbours", title, tuple(missing))
    found = [kernel.nearest(k, rows=rows) for kernel in kernels]
    kept = np.array([len(np.intersect1d(*both)) for both in zip(found[0].indices, found[1].indices, strict=True)])
    first = float((found[0].indices[:, 0] == found[1].indices[:, 0]).mean())
    said = (
        f"Of the {k} most similar train samples of each {rows} sample both kernels have {kept.mean():.2f} in common on "
        f"average; the most similar one is the same for {first:.1%}."
    )
    counts = np.bincount(kept, minlength=k + 1)
    parts: list[Part] = [Figures((Figure("neighbours", draw_shared(counts), said, said),))]
    changed = np.argsort(kept, kind="stable")[:CHANGED]
    changed = changed[kept[changed] < k]
    if len(changed):
        parts.append(_gallery(runs, rows, [each.indices for each in found], changed.tolist()))
    return Section("neighbours", title, tuple(parts))


def _gallery(runs: tuple[Run, Run], rows: str, indices: list[NDArray[np.int64]], changed: list[int]) -> Gallery:
    """The samples whose neighbours changed most: on one line by the first kernel, on the next by the second."""
    train = sorted({int(number) for each in indices for number in each[changed].reshape(-1)})
    try:
        assert runs[0].kernel is not None
        mine, theirs = api.describe_samples(runs[0].kernel.path, rows, changed, train, job=runs[0].job)
    except (OocNtkError, OSError):
        mine, theirs = {}, {}
    lines = []
    for sample in changed:
        for run, found in zip(runs, indices, strict=True):
            head = _thumbnail(f"{rows} {sample}", mine.get(sample), by=f"by {run.name}")
            others = [
                _thumbnail(f"train {each}", theirs.get(int(each)), mine.get(sample)) for each in found[sample].tolist()
            ]
            lines.append((head, *others))
    caption = "Samples whose neighbours changed most, each by both kernels; ✓ of the sample’s own class, ✗ of another."
    return Gallery(tuple(lines), caption)


def _thumbnail(name: str, shown: Any, of: Any = None, by: str = "") -> Thumbnail:
    """A sample; a neighbour with a mark whether its class is that of the sample it is near to."""
    lines, mark = [name, *([by] if by else [])], ""
    label = None if shown is None else shown.label
    if label is not None:
        lines.append(f"class {label:,}" if isinstance(label, int) else f"target {label:.4g}")
        if of is not None and isinstance(label, int) and isinstance(of.label, int):
            mark = "same" if label == of.label else "other"
    picture = "" if shown is None or shown.pixels is None else picture_address(shown.pixels)
    text = "" if shown is None or shown.text is None else shown.text[:160]
    return Thumbnail(tuple(lines), picture, text, mark)
