"""What the spectrum of a kernel says, put together: decay, targets, effective dimensions, alignments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ooc_ntk.errors import InputError

from .alignment import LayerAlignment
from .classes import MOST_CLASSES, one_hot
from .dense import too_little_memory, usable_bytes
from .powerlaw import Exponent
from .spectrum import Bounds, Spectrum, TargetAlignment

#: Ridges at which effective dimensions are shown, over the mean diagonal of the train square.
RIDGE_RATIOS: Final = (1e-6, 1e-4, 1e-2, 1.0)

#: Arrays of the targets' size that are held at once: these, and their squares. (Counted.)
TARGET_COPIES: Final = 2

#: Bytes of eigenvectors that are kept beside the figures. (A choice: 139 of 60,000 samples, all of 2,900.)
KEPT_BYTES: Final = 2**26


@dataclass(frozen=True)
class Dimension:
    """An effective dimension.

    Attributes:
        ratio: the ridge over the mean diagonal.
        ridge: absolute.
        bounds: of the dimension.
    """

    ratio: float
    ridge: float
    bounds: Bounds


@dataclass(frozen=True, eq=False)
class SpectrumSummary:
    """The spectrum of a kernel and what follows from it.

    Attributes:
        kernel: what it is of, in words.
        spectrum: the eigenpairs.
        decay: exponent of the eigenvalues; None where too few are above rounding.
        targets: what the targets are, or why there are none.
        alignment: of the targets; None if there are none.
        target_exponent: of the targets' tail; None if there are none or it is not fitted.
        dimensions: effective dimensions at a few ridges.
        layers: alignments of the layers; None if not asked for.
        runs: alignments with other runs, by their paths.
    """

    kernel: str
    spectrum: Spectrum
    decay: Exponent | None
    targets: str
    alignment: TargetAlignment | None
    target_exponent: Exponent | None
    dimensions: tuple[Dimension, ...]
    layers: LayerAlignment | None
    runs: Mapping[str, float]

    def figures(self) -> dict[str, Any]:
        """All figures, in values that JSON has (arrays as NumPy's)."""
        spectrum = self.spectrum
        found: dict[str, Any] = {
            "kernel": self.kernel,
            "rows": spectrum.size,
            "eigenpairs": len(spectrum),
            "method": spectrum.method,
            "passes": spectrum.passes,
            "tolerance": spectrum.tolerance,
            "converged": spectrum.converged,
            "largest_residual": float(spectrum.residuals.max(initial=0.0)),
            "trace": spectrum.trace,
            "explained": spectrum.explained,
            "values": spectrum.values,
            "decay": None if self.decay is None else self.decay.figures(),
            "targets": self.targets,
            "target_exponent": None if self.target_exponent is None else self.target_exponent.figures(),
            "effective_dimension": [
                {"ratio": each.ratio, "ridge": each.ridge, **each.bounds._asdict()} for each in self.dimensions
            ],
            "runs": dict(self.runs),
        }
        if self.alignment is not None:
            found["target_shares"] = self.alignment.shares
        if self.layers is not None:
            found["layers"] = {"names": list(self.layers.names), "matrix": self.layers.matrix}
        return found

    def arrays(self) -> dict[str, NDArray[np.float64]]:
        """Eigenvalues, residuals, eigenvectors (the leading ones, where all would be large), shares, alignments."""
        spectrum = self.spectrum
        kept = max(1, min(len(spectrum), KEPT_BYTES // (8 * spectrum.size)))
        found = {
            "values": spectrum.values,
            "residuals": spectrum.residuals,
            "vectors": np.ascontiguousarray(spectrum.vectors[:, :kept]),
        }
        if self.alignment is not None:
            found["target_shares"] = self.alignment.shares
        if self.layers is not None:
            found["layer_cka"] = self.layers.matrix
        return found


def summarise(
    kernel: str,
    spectrum: Spectrum,
    targets: NDArray[np.float64] | None,
    what: str,
    layers: LayerAlignment | None,
    runs: Mapping[str, float],
) -> SpectrumSummary:
    """Put together what a spectrum says.

    Args:
        kernel: what it is of, in words.
        spectrum: the eigenpairs.
        targets: (n,) or (n, targets); None without any.
        what: what the targets are, or why there are none.
        layers: alignments of layers, if they were asked for.
        runs: alignments with other runs.
    """
    mean = spectrum.trace / spectrum.size
    dimensions = tuple(
        Dimension(ratio, ratio * mean, spectrum.effective_dimension(ratio * mean)) for ratio in RIDGE_RATIOS if mean > 0
    )
    return SpectrumSummary(
        kernel=kernel,
        spectrum=spectrum,
        decay=_decay(spectrum),
        targets=what,
        alignment=None if targets is None else spectrum.alignment(targets),
        target_exponent=None if targets is None else _target_exponent(spectrum, targets),
        dimensions=dimensions,
        layers=layers,
        runs=runs,
    )


def _decay(spectrum: Spectrum) -> Exponent | None:
    """The exponent of the eigenvalues, where there are enough of them."""
    try:
        return spectrum.decay()
    except InputError:
        return None


def _target_exponent(spectrum: Spectrum, targets: NDArray[np.float64]) -> Exponent | None:
    """The exponent of the targets' tail, where there are enough ranks."""
    try:
        return spectrum.target_exponent(targets)
    except InputError:
        return None


def label_targets(labels: NDArray[np.int64], entries: int, memory: int | None = None) -> NDArray[np.float64]:
    """Targets of labels: one column per class, 1 for the right one, minus the class's share of the samples.

    Args:
        labels: (samples,) from 0.
        entries: kernel rows per sample; of a full kernel its outputs, where a label is the number of an output.
        memory: bytes that may be taken beyond what the process holds; None is a share of what is free.

    Returns:
        (samples, classes), or of a full kernel (samples · outputs, 1).

    Raises:
        InputError: for a single class, for too many, or for a full kernel with labels that are no outputs.
        BudgetError: if they do not fit the memory.
    """
    known, place = np.unique(labels, return_inverse=True)
    if not 2 <= len(known) <= MOST_CLASSES:
        raise InputError(f"the labels are of {len(known):,} classes, not of 2 to {MOST_CLASSES:,}; give targets")
    columns = len(known) if entries == 1 else entries
    needed = TARGET_COPIES * 8 * len(labels) * columns
    if needed > usable_bytes(memory):
        what = f"targets of {len(labels):,} labels of {columns:,} classes"
        raise too_little_memory(what, needed, memory, "give targets of fewer columns")
    if entries > 1:
        if int(known[-1]) >= entries:
            raise InputError(
                f"the kernel has {entries} outputs per sample and a label is {int(known[-1])}; give targets of its "
                f"{len(labels) * entries:,} rows"
            )
        found = one_hot(labels, entries, most=None)  # as many as the kernel has rows
    else:
        found = one_hot(place, len(known))
    found -= found.mean(0)
    return found if entries == 1 else found.reshape(-1, 1)
