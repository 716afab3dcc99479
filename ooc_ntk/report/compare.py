"""Two runs side by side on one page: plans, kernels, spectra, regressions, neighbours."""

from __future__ import annotations

from pathlib import Path

from ooc_ntk import api
from ooc_ntk.errors import IncompleteRunError, InputError, RunConflictError, StorageError
from ooc_ntk.storage.storeurl import is_store

from .embed import check_target, require_bokeh, save
from .parts import Page, Section, Table
from .sections import pair
from .sections.run import Run, open_run
from .tables import promised_and_measured, provenance
from .words import number

#: Name of the comparison in the directory of the second run.
COMPARISON = "comparison.html"


def write_comparison(
    first: str | Path, second: str | Path, out: str | Path | None = None, *, job: api.Job | None = None
) -> Path:
    """Write a page that compares two runs of the same samples, such as an exact and a projected one, or checkpoints.

    Args:
        first: run directory of a finished run, or its store's URL; what is compared with.
        second: likewise; what is compared.
        out: file to write; None is ``comparison.html`` in the second directory.
        job: the job, for labels and samples of runs that were made from live objects.

    Returns:
        The file.

    Raises:
        InputError: if Bokeh is not installed, both are the same, ``out`` is a folder, or the kernels are of other
            shapes.
        RunConflictError: if the runs are of other samples.
        StorageError: if there is no run, or one is not finished, or the file cannot be written.
    """
    require_bokeh()
    if out is None and is_store(second):
        raise InputError(f"say where the comparison with {second} goes: --out comparison.html")
    target = Path(second) / COMPARISON if out is None else Path(out)
    check_target(target)
    return save(make_comparison(first, second, job), target)


def make_comparison(first: str | Path, second: str | Path, job: api.Job | None = None) -> Page:
    """All that the comparison of two runs shows; see :func:`write_comparison`."""
    runs = _named((_opened(first, job), _opened(second, job)))
    _check_comparable(*runs)
    found = pair.look(*runs)
    sections = [
        _plans(runs),
        pair.maps(found),
        pair.entries(found),
        pair.spectra(runs),
        pair.regressions(runs),
        pair.neighbours(runs),
        _origins(runs),
    ]
    lead = f"{runs[1].name}: {_what(runs[1])}. Compared with {runs[0].name}: {_what(runs[0])}."
    facts = [
        (number(found.alignment, 5), "alignment (CKA)"),
        (f"{found.difference:.2%}", "relative difference"),
        *(((f"{found.scaled:.2%}", "difference but for a factor"),) if abs(found.factor - 1) > 0.05 else ()),
    ]
    return Page(f"{runs[1].name} against {runs[0].name}", lead, tuple(sections), tuple(facts))


def _opened(path: str | Path, job: api.Job | None) -> Run:
    """A finished run.

    Raises:
        StorageError: if there is none, or it is not finished.
    """
    if not is_store(path) and api.info_checkpoints(path):
        raise StorageError(f"{path} holds several checkpoints, a run in each folder; name two of them")
    found = open_run(path, job)
    if found.kernel is None:
        raise IncompleteRunError(f"the run in {path} is not finished; two runs are compared when both are")
    return found


def _named(runs: tuple[Run, Run]) -> tuple[Run, Run]:
    """Names that tell the runs apart: as much of their paths as that takes."""
    parts = [Path(run.place).absolute().parts if not is_store(run.place) else (run.place,) for run in runs]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-count:]) for each in parts]
        if names[0] != names[1]:
            runs[0].name, runs[1].name = names
            return runs
    raise InputError(f"{runs[0].place} and {runs[1].place} are the same run; name two")


def _check_comparable(first: Run, second: Run) -> None:
    """Refuse kernels of other samples, or with other rows for each.

    Raises:
        RunConflictError: for other data.
        InputError: for other shapes.
    """
    kernels = first.kernel, second.kernel
    assert kernels[0] is not None
    assert kernels[1] is not None
    digests = [kernel.data_digest for kernel in kernels if kernel is not None]
    if digests[0] != digests[1]:
        raise RunConflictError(
            f"{first.place} and {second.place} are runs of other samples (data digests {digests[0][:8]} and "
            f"{digests[1][:8]}); only runs of the same train and test data are compared"
        )
    if kernels[0].shape != kernels[1].shape:
        shapes = [f"{kernel.shape[0]:,} × {kernel.shape[1]:,}" for kernel in kernels if kernel is not None]
        raise InputError(
            f"the kernels in {first.place} and {second.place} have other shapes, {shapes[0]} and {shapes[1]}; only "
            "kernels with the same rows are compared"
        )


def _what(run: Run) -> str:
    return run.info.plan.summary()[0][1]


def _plans(runs: tuple[Run, Run]) -> Section:
    """Plans and promises side by side."""
    summaries = [dict(run.info.plan.summary()) for run in runs]
    labels = list(dict.fromkeys(label for summary in summaries for label in summary))
    plans = tuple((label, *(summary.get(label, "-") for summary in summaries)) for label in labels)
    tables = [{row[0].strip(): row[1:] for row in promised_and_measured(run.info)} for run in runs]
    quantities = list(dict.fromkeys(name for table in tables for name in table))
    rows = tuple(
        (name, *(cell for table in tables for cell in table.get(name, ("-", "-", "-"))[:2])) for name in quantities
    )
    head = ("quantity", *(f"{run.name}: {what}" for run in runs for what in ("promised", "measured")))
    return Section(
        "plans",
        "Plans and what was measured",
        (
            Table(head, rows),
            Table(("", runs[0].name, runs[1].name), plans, "Both plans in full", folded=True, words=(1, 2)),
        ),
    )


def _origins(runs: tuple[Run, Run]) -> Section:
    found = [dict(provenance(run.info)) for run in runs]
    labels = list(dict.fromkeys(label for each in found for label in each))
    rows = tuple((label, *(each.get(label, "-") for each in found)) for label in labels)
    return Section("provenance", "Where they come from", (Table(("", runs[0].name, runs[1].name), rows, words=(1, 2)),))
