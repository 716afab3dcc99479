"""The spectrum of a run: its kernel as it is looked at, targets from its data, alignments with others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ooc_ntk.algebra.dense import budget_bytes
from ooc_ntk.algebra.eigen import fits_whole
from ooc_ntk.algebra.kernel import Kernel
from ooc_ntk.algebra.operator import KernelOperator
from ooc_ntk.algebra.summary import SpectrumSummary, label_targets, summarise
from ooc_ntk.errors import BudgetError, InputError, RunConflictError
from ooc_ntk.inputs.job import Job
from ooc_ntk.planning.budget import Budget

from .labels import run_labels
from .targets import given_targets

#: Rows up to which all eigenpairs are found unless fewer are asked for, if they fit, so that effective dimensions are
#: exact. (Measured: 1.9 s for 3,000 rows on two cores.)
WHOLE_ROWS: Final = 4000

#: Eigenpairs of larger kernels unless more or fewer are asked for. (A choice.)
LEADING: Final = 50


@dataclass(frozen=True)
class Look:
    """How a kernel is looked at.

    Attributes:
        centered: whether it is centred.
        cosine: whether it is divided by the roots of its diagonal, before that.
    """

    centered: bool = False
    cosine: bool = False

    def at(self, kernel: Kernel) -> KernelOperator:
        """The kernel so seen."""
        seen = self.scaled(kernel)
        return seen.centered() if self.centered else seen

    def scaled(self, kernel: Kernel) -> KernelOperator:
        """The kernel as cosines, or as it is; alignments centre it by themselves."""
        return kernel.cosine() if self.cosine else kernel

    def __str__(self) -> str:
        return "".join(word for word, asked in ((", as cosines", self.cosine), (", centred", self.centered)) if asked)


def spectrum_summary(
    kernel: Kernel,
    look: Look,
    *,
    k: int | None,
    every: bool,
    targets: str | Path | ArrayLike | None,
    job: Job | None,
    method: str,
    layers: bool,
    compare: Sequence[Kernel],
    check_data: bool,
    budget: Budget | None,
    seed: int,
) -> SpectrumSummary:
    """The spectrum of a finished kernel and what follows from it; see :func:`ooc_ntk.api.spectrum`."""
    wanted = None if every else _default(kernel, method, budget_bytes(budget)) if k is None else k
    given, what = _targets(kernel, targets, job, budget_bytes(budget))
    aligned = kernel.layer_cka() if layers else None
    mine = look.scaled(kernel)
    runs = {str(each.path): mine.cka(look.scaled(each), check_data=check_data) for each in compare}
    rows = kernel.shape[1]
    kind = kernel.plan.kernel if kernel.plan is not None else "kernel"
    found = look.at(kernel).eigh(wanted, method=method, memory=budget_bytes(budget), seed=seed)
    return summarise(
        f"{kind}, train square {rows:,} × {rows:,} {kernel.dtype}{look}", found, given, what, aligned, runs
    )


def _default(kernel: Kernel, method: str, memory: int | None) -> int | None:
    """Eigenpairs where no number was asked for: all of a small kernel."""
    small = kernel.shape[1] <= WHOLE_ROWS and method in ("auto", "full")
    return None if small and fits_whole(kernel.entries, memory) else min(LEADING, kernel.shape[1])


def _targets(
    kernel: Kernel, given: str | Path | ArrayLike | None, job: Job | None, memory: int | None
) -> tuple[NDArray[np.float64] | None, str]:
    """Targets of the train rows, and what they are or why there are none.

    Raises:
        InputError: if targets were given that cannot be used.
        StorageError: if their file cannot be read.
        BudgetError: if labels of a given job do not fit the memory as targets.
    """
    if given is not None:
        what = str(given) if isinstance(given, str | Path) else "given"
        return given_targets(given, kernel.shape)[: kernel.shape[1]], what
    try:
        labels = run_labels(kernel.path, job)
        if labels is None:
            return None, "none: the data have no whole numbers as labels; give targets (--targets)"
        found = label_targets(labels.train, kernel.entries_per_sample, memory)
    except (InputError, RunConflictError, BudgetError) as error:
        if job is not None:
            raise
        return None, f"none: {error}"
    return found, f"labels of {len(np.unique(labels.train))} classes, each minus its share of the samples"
