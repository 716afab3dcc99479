"""Error bars of projected kernels, from the features themselves (DESIGN: projection).

All outputs of a sample share R, so that the error of a trace entry depends on the C × C blocks ``F_ij`` of the full
kernel: ``SE_ij² = (⟨F_ii, F_jj⟩ + tr F_ij²)/K`` for normal entries. Signs lack the squares of single parameters,
``2 Σ_p (Σ_c J_icp J_jcp)²``; where a few hundred of the heaviest parameters make up much of it, their gradients are
kept and it is taken off. A tensor sketch has no such formula in terms of features; its blocks of rows are independent
sketches, and their spread is the error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import scipy.special
from numpy.typing import NDArray

from ooc_ntk.planning.projection import EntryMoments, PilotMoments, Projection

#: (samples, outputs, dim) float64.
Rows = NDArray[np.float64]

#: Share of the formula for normal entries that is left at least, should the heaviest parameters of a sample not be
#: those of the pilot (a choice: taking off more would be rounding).
LEAST_VARIANCE: Final = 0.02

#: Numbers of products of the heaviest parameters that are held at a time.
HEAVY_NUMBERS: Final = 2**24


@dataclass(frozen=True)
class SketchShape:
    """What error bars need to know of a projection.

    Attributes:
        dim: columns of the features.
        blocks: independent blocks of rows, if their spread is to be taken; 0 for the formula.
        share: share of ``Σ_p (mean of J_p²)²`` that the heaviest parameters have, whose squares signs lack; 0 if
            nothing is to be taken off.
    """

    dim: int
    blocks: int = 0
    share: float = 0.0


@dataclass(frozen=True)
class Panel:
    """What is known of some samples.

    Attributes:
        features: (samples, outputs, dim) float64.
        heavy: gradients of the heaviest parameters, (samples, outputs, parameters) float64; None if not known.
    """

    features: Rows
    heavy: Rows | None = None

    def by_rows(self) -> Panel:
        """Every output as a sample of its own, as a full kernel has it."""
        one, other = self.features, self.heavy
        return Panel(one.reshape(-1, 1, one.shape[2]), None if other is None else other.reshape(-1, 1, other.shape[2]))


def sketch_shape(projection: Projection, share: float = 0.0) -> SketchShape:
    """What error bars need to know of a projection.

    Args:
        projection: with its dim.
        share: of the heaviest parameters.
    """
    assert projection.dim is not None
    blocks = projection.nonzeros if projection.about.structured else 0
    return SketchShape(projection.dim, blocks, share if projection.about.signs else 0.0)


def gram_blocks(left: Rows, right: Rows) -> NDArray[np.float64]:
    """Blocks ``F_ij`` of the full kernel, (left samples, right samples, outputs, outputs)."""
    product = left.reshape(-1, left.shape[2]) @ right.reshape(-1, right.shape[2]).T
    return product.reshape(len(left), left.shape[1], len(right), right.shape[1]).transpose(0, 2, 1, 3)


def own_blocks(rows: Rows) -> NDArray[np.float64]:
    """Blocks ``F_ii``, (samples, outputs, outputs)."""
    return rows @ rows.transpose(0, 2, 1)


def standard_errors(left: Panel, right: Panel, shape: SketchShape, *, cosine: bool = False) -> NDArray[np.float64]:
    """Standard errors of the entries ``Σ_c ⟨φ_ic, φ_jc⟩`` between two sets of samples, or of their cosines.

    The cosine's is by the delta method, with ``Cov(K_ij, K_ii) = 2⟨F_ij, F_ii⟩/K`` and ``Cov(K_ii, K_jj) =
    2‖F_ij‖²/K``. Signs lack the squares of single parameters: of each term ``2 Σ_p a_p b_p`` is taken off, where
    ``a_p = Σ_c J_icp J_jcp`` (moments of quadratic forms in normal variables and in signs).

    Args:
        left: features of the rows.
        right: features of the columns.
        shape: of the sketch.
        cosine: whether entries are divided by the roots of the diagonal.

    Returns:
        (left samples, right samples) float64, at least 0.
    """
    if shape.blocks:
        return _spread(left.features, right.features, shape.blocks, cosine=cosine)
    between, one, other = (
        gram_blocks(left.features, right.features),
        own_blocks(left.features),
        own_blocks(right.features),
    )
    terms = _Terms(between, one, other)
    normal = _HeavyTerms.none(len(one), len(other))
    variance = terms.variance(normal, cosine=cosine)
    if left.heavy is not None and right.heavy is not None and shape.share:
        signs = terms.variance(_heavy_terms(left.heavy, right.heavy, shape.share), cosine=cosine)
        variance = np.maximum(signs, LEAST_VARIANCE * variance)
    return np.asarray(np.sqrt(np.maximum(variance, 0) / shape.dim))


@dataclass(frozen=True)
class _Terms:
    """Blocks of the full kernel that the variance of entries is made of.

    Attributes:
        between: ``F_ij``, (rows, columns, outputs, outputs).
        one: ``F_ii`` of the rows, (rows, outputs, outputs).
        other: of the columns.
    """

    between: NDArray[np.float64]
    one: NDArray[np.float64]
    other: NDArray[np.float64]

    def variance(self, heavy: _HeavyTerms, *, cosine: bool) -> NDArray[np.float64]:
        """Variance times dim of entries or of cosines, less what signs lack: (rows, columns)."""
        flat, one, other = (each.reshape(*each.shape[:-2], -1) for each in (self.between, self.one, self.other))
        turned = self.between.transpose(0, 1, 3, 2).reshape(flat.shape)
        variance = one @ other.T + (flat * turned).sum(-1) - 2 * heavy.squares
        if not cosine:
            return np.asarray(variance)
        entry = np.trace(self.between, axis1=2, axis2=3)
        a = np.trace(self.one, axis1=1, axis2=2)[:, None]
        b = np.trace(self.other, axis1=1, axis2=2)[None]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = entry / np.sqrt(a * b)
            own_one, own_other = (one**2).sum(-1) - heavy.own_left, (other**2).sum(-1) - heavy.own_right
            own = 2 * (own_one[:, None] / a**2 + own_other[None] / b**2) / 4
            both = 2 * ((flat**2).sum(-1) - heavy.between) / (2 * a * b)
            with_one = np.einsum("ijk,ik->ij", turned, one) - heavy.with_left
            with_other = np.einsum("ijk,jk->ij", flat, other) - heavy.with_right
            mixed = 2 * (with_one / a + with_other / b)
            variance = variance / (a * b) + ratio**2 * (own + both) - ratio / np.sqrt(a * b) * mixed
        return np.asarray(np.nan_to_num(variance, nan=0.0, posinf=0.0, neginf=0.0))


@dataclass(frozen=True)
class _HeavyTerms:
    """What signs lack of each term of the variance: sums over the heaviest parameters, scaled up to all.

    Attributes:
        squares: ``Σ_p a_ijp²``, (rows, columns), with ``a_ijp = Σ_c J_icp J_jcp``.
        own_left: ``Σ_p a_iip²``, (rows,).
        own_right: the same of the columns.
        between: ``Σ_p a_iip a_jjp``, (rows, columns).
        with_left: ``Σ_p a_ijp a_iip``.
        with_right: ``Σ_p a_ijp a_jjp``.
    """

    squares: NDArray[np.float64]
    own_left: NDArray[np.float64]
    own_right: NDArray[np.float64]
    between: NDArray[np.float64]
    with_left: NDArray[np.float64]
    with_right: NDArray[np.float64]

    @classmethod
    def none(cls, rows: int, columns: int) -> _HeavyTerms:
        """Nothing is lacking: normal entries, or parameters that are not known."""
        pairs = [np.zeros((rows, columns)) for _ in range(4)]
        return cls(pairs[0], np.zeros(rows), np.zeros(columns), *pairs[1:])


def _heavy_terms(left: Rows, right: Rows, share: float) -> _HeavyTerms:
    """Sums over the heaviest parameters, a few of them at a time.

    Args:
        left: their gradients in the rows, (samples, outputs, parameters).
        right: in the columns.
        share: of all parameters.
    """
    rows, columns = len(left), len(right)
    found = _HeavyTerms.none(rows, columns)
    one, other = np.square(left).sum(1), np.square(right).sum(1)
    step = max(1, HEAVY_NUMBERS // (rows * columns))
    for start in range(0, one.shape[1], step):
        part = slice(start, start + step)
        a = np.matmul(left[:, :, part].transpose(2, 0, 1), right[:, :, part].transpose(2, 1, 0))
        found.squares[...] += np.square(a).sum(0)
        found.with_left[...] += np.einsum("pij,ip->ij", a, one[:, part])
        found.with_right[...] += np.einsum("pij,jp->ij", a, other[:, part])
    found.between[...] = one @ other.T
    found.own_left[...], found.own_right[...] = np.square(one).sum(1), np.square(other).sum(1)
    return _HeavyTerms(*(value / share for value in vars(found).values()))


def _spread(left: Rows, right: Rows, blocks: int, *, cosine: bool) -> NDArray[np.float64]:
    """Standard errors from the spread between independent blocks of rows, each an unbiased sketch of its own."""
    entries = np.stack([_entries(_block(left, k, blocks), _block(right, k, blocks)) for k in range(blocks)]) * blocks
    if cosine:
        a, b = (
            np.stack([np.square(_block(rows, k, blocks)).sum((1, 2)) for k in range(blocks)]) * blocks
            for rows in (left, right)
        )
        mean_a, mean_b = a.mean(0)[:, None], b.mean(0)[None]
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = entries.mean(0) / np.sqrt(mean_a * mean_b)
            entries = entries / np.sqrt(mean_a * mean_b) - ratio / 2 * (a[:, :, None] / mean_a + b[:, None] / mean_b)
        entries = np.nan_to_num(entries, nan=0.0, posinf=0.0, neginf=0.0)
    return np.asarray(_widening(blocks) * entries.std(0, ddof=1) / blocks**0.5)


def _widening(blocks: int) -> float:
    """What makes 1.96 errors hold 95%, although so few blocks do not know their spread well (Student's t)."""
    return float(scipy.special.stdtrit(blocks - 1, 0.975) / scipy.special.ndtri(0.975))


def _block(rows: Rows, index: int, blocks: int) -> Rows:
    width = rows.shape[2] // blocks
    return rows[:, :, index * width : (index + 1) * width]


def _entries(left: Rows, right: Rows) -> NDArray[np.float64]:
    """``Σ_c ⟨φ_ic, φ_jc⟩``."""
    return np.asarray(left.reshape(len(left), -1) @ right.reshape(len(right), -1).T)


def moments(panel: Panel, shape: SketchShape, *, outputs: int = 1, cosine: bool = False) -> PilotMoments:
    """What the error of a whole kernel depends on, from the features of some samples.

    Squares of estimates are too large by their own variance, which is taken off.

    Args:
        panel: the samples.
        shape: of the sketch that made them.
        outputs: how many neighbours in the panel are outputs of one sample (a full kernel).
        cosine: whether entries are divided by the roots of the diagonal.

    Returns:
        The moments, of the exact kernel as far as the features tell.
    """
    rows, inflation = panel.features, 1.0
    if cosine:
        variance, squares = _cosine_moments(panel, shape)
    else:
        variance, squares, formula = _entry_moments(panel, shape)
        if shape.blocks and formula.sum() > 0:
            measured = np.square(_spread(rows, rows, shape.blocks, cosine=False) / _widening(shape.blocks))
            inflation = float(measured.sum() / (formula.sum() / shape.dim))
    every = np.arange(len(rows))
    sample = every // outputs
    diagonal, same = every[:, None] == every[None], sample[:, None] == sample[None]

    def mean(chosen: NDArray[np.bool_]) -> EntryMoments:
        if not chosen.any():
            return EntryMoments(0.0, 0.0)
        return EntryMoments(float(variance[chosen].mean()), float(squares[chosen].mean()))

    return PilotMoments(mean(diagonal), mean(~same), mean(same & ~diagonal), outputs, inflation)


def _entry_moments(panel: Panel, shape: SketchShape) -> tuple[NDArray[np.float64], ...]:
    """Of every entry: its variance in one column, its square, and the variance by the formula of normal entries.

    The first two are debiased: products of two estimates are too large by their covariance over ``dim``.
    """
    rows, count = panel.features, len(panel.features)
    one, between = own_blocks(rows), gram_blocks(rows, rows)
    flat = one.reshape(count, -1)
    entry = np.trace(between, axis1=2, axis2=3)
    inner, traces = flat @ flat.T, np.einsum("ijcd,ijdc->ij", between, between)
    formula = inner + traces
    squares = entry**2 - formula / shape.dim
    blocks = inner - (entry**2 + traces) / shape.dim
    own = inner.diagonal() - (np.trace(one, axis1=1, axis2=2) ** 2 + inner.diagonal()) / shape.dim
    np.fill_diagonal(blocks, own)
    variance = blocks + traces - (inner + entry**2) / shape.dim
    if panel.heavy is not None and shape.share:
        variance -= 2 * _heavy_terms(panel.heavy, panel.heavy, shape.share).squares
    return variance, squares, formula


def _cosine_moments(panel: Panel, shape: SketchShape) -> tuple[NDArray[np.float64], ...]:
    """The same of cosines: their variance by the delta method; the diagonal has none."""
    rows = panel.features
    entries = _entries(rows, rows)
    roots = np.sqrt(entries.diagonal())
    inverse = np.divide(1.0, roots, out=np.zeros_like(roots), where=roots > 0)
    ratio = entries * inverse[:, None] * inverse[None]
    variance = np.square(standard_errors(panel, panel, shape, cosine=True))
    if shape.blocks:
        variance = variance / _widening(shape.blocks) ** 2
    np.fill_diagonal(variance, 0.0)
    return variance * shape.dim, np.square(ratio) - variance
