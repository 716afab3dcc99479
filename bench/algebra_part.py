"""Algebra as a part of ``python -m bench``: what ``bench.algebra`` compares, on fewer digits, and peers beside us."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from . import algebra
from .algebra_children import apart
from .algebra_large import problem_file
from .algebra_peers import CONTENDERS, SCIPY, TASKS
from .bars import Bar
from .contenders import OURS
from .records import Finding, Record
from .registry import part
from .table import relative_error

#: Train and test digits of the CNN's kernel, rows of the MLP's kernel that peers solve with, and eigenpairs of it.
DIGITS: Final = (1_500, 500)
ROWS, SMOKE_ROWS, EIGENPAIRS, SMOKE_EIGENPAIRS = 3_000, 300, 50, 5

#: Relative error above which a contender has not done the job.
MOST_ERROR: Final = 1e-3

#: Ridges of the GCV curve, over the mean diagonal; the first is that of the coefficients.
RIDGES: Final = np.logspace(-3, 0, 13)

#: Titles of the tasks.
TITLES: Final = {"solve": "coefficients, 10 targets", "eigh": "largest eigenpairs", "gcv": "GCV curve, 13 ridges"}


@part(
    "algebra",
    "Algebra of a kernel on disk",
    seconds=70,
    limit_seconds=300,
    bars=(
        Bar(algebra.COEFFICIENTS, algebra.COEFFICIENTS_BAR),
        Bar(algebra.ESTIMATES, algebra.GCV_BAR),
        Bar(algebra.eigenvalues_figure(algebra.EIGENVALUES), algebra.EIGENVALUES_BAR),
        Bar(algebra.ACCURACY, algebra.ACCURACY_BAR),
        Bar(algebra.GCV_CHOICE, algebra.GCV_CHOICE_BAR),
    ),
    results="algebra",
)
def measure(smoke: bool) -> Iterator[Finding]:
    """Peers on the kernel of an MLP; then parts ``equal`` and ``regression``."""
    with tempfile.TemporaryDirectory(prefix="ooc-ntk-bench-") as name:
        folder = Path(name)
        yield from beside_peers(folder, smoke)
        yield from ["", *algebra.equal(folder, smoke, DIGITS, covered=False)]
        yield from ["", *algebra.regression(folder, smoke, DIGITS)]


def beside_peers(folder: Path, smoke: bool) -> Iterator[Finding]:
    """Seconds, peak and error of every contender on every task, each contender in a process of its own."""
    size, count = (SMOKE_ROWS, SMOKE_EIGENPAIRS) if smoke else (ROWS, EIGENPAIRS)
    kernel, targets = problem_file(folder, size)
    ridges = (RIDGES * float(kernel.diagonal()[:size].mean())).tolist()
    given: dict[str, Any] = {"path": str(kernel.path), "targets": str(targets), "count": count, "ridges": ridges}
    took, found = {}, {}
    for who in CONTENDERS:
        out = folder / "found.npz"
        took[who] = apart("peers", folder, here=smoke, who=who, out=str(out), **given)
        with np.load(out) as arrays:
            found[who] = dict(arrays)
    for task in TASKS:
        workload = f"{TITLES[task]}, N = {size:,}"
        for who in CONTENDERS:
            one = took[who][task]
            if "refused" in one:
                yield Record(workload, who, samples=size, series="algebra", remark=one["refused"])
                continue
            error = 0.0 if who == SCIPY else relative_error(found[who][task], found[SCIPY][task])
            remark = "" if who == SCIPY else "error against SciPy in float64"
            yield Record(
                workload,
                who,
                one["seconds"],
                size,
                "algebra",
                ratio=one["seconds"] / took[OURS][task]["seconds"] if error <= MOST_ERROR else None,
                peak_bytes=one["peak_bytes"],
                error=None if who == SCIPY else error,
                remark=remark if error <= MOST_ERROR else f"{remark}; too large to count",
            )
