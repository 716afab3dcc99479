"""The report of a run: one HTML file that needs nothing else, with what was computed and every result that is there."""

from __future__ import annotations

from pathlib import Path

from ooc_ntk import api
from ooc_ntk.errors import InputError
from ooc_ntk.storage.storeurl import is_store
from ooc_ntk.units import format_bytes, format_count, format_seconds

from .embed import check_target, render, require_bokeh, save
from .parts import Page, Section
from .sections import drift, entries, origin, results, similar, work
from .sections.run import REPORT, Run, open_run
from .tables import state


def write_page(path: str | Path, out: str | Path | None = None, *, job: api.Job | None = None) -> Path:
    """Write the report of a run; made again from the same results, it is the same to the byte.

    Args:
        path: run directory, finished or not; or a directory of checkpoints; or the URL of the store of a finished run.
        out: file to write; None is ``report.html`` in the directory.
        job: the job, for labels and samples of a run that was made from live objects.

    Returns:
        The file.

    Raises:
        InputError: if Bokeh is not installed, ``out`` is a folder, or a store is given and no file.
        StorageError: if there is no run, or the file cannot be written.
    """
    require_bokeh()
    if out is None and is_store(path):
        raise InputError(f"say where the report of {path} goes: --out report.html")
    target = Path(path) / REPORT if out is None else Path(out)
    check_target(target)
    return save(make_page(path, job), target)


def render_page(path: str | Path, job: api.Job | None = None) -> str:
    """The report of a run as HTML, everything that it shows inside; see :func:`write_page`."""
    require_bokeh()
    return render(make_page(path, job))


def make_page(path: str | Path, job: api.Job | None = None) -> Page:
    """All that the report of a run shows.

    Args:
        path: as for :func:`write_page`.
        job: likewise.

    Raises:
        InputError: if it is a file.
        StorageError: if there is no run.
    """
    if Path(path).is_file():
        raise InputError(f"{path} is a file; name the directory of a run")
    if not is_store(path) and (several := api.info_checkpoints(path)):
        return drift.page(Path(path), several)
    run = open_run(path, job)
    return Page(title=run.name, lead=_lead(run), sections=tuple(_sections(run)), facts=tuple(_facts(run)))


def _lead(run: Run) -> str:
    """What the run is, in a line."""
    return f"{run.info.plan.summary()[0][1]}. {state(run.info).capitalize()}."


def _sections(run: Run) -> list[Section]:
    """Sections in the order of what a reader asks."""
    found = [origin.computed(run)]
    if run.kernel is not None:
        found += [entries.heat_map(run), entries.distributions(run)]
        if run.info.layer_traces:
            found.append(entries.layers(run))
        if run.info.plan.projection is not None:
            found.append(entries.residuals(run))
        found += [results.spectrum(run), results.regression(run)]
        surrogates = results.surrogates(run)
        if surrogates is not None:
            found.append(surrogates)
        found.append(similar.nearest(run))
    found += [work.promised(run), work.timeline(run)]
    if run.kernel is not None:
        found.append(origin.verification(run))
    found.append(origin.origin(run))
    return found


def _facts(run: Run) -> list[tuple[str, str]]:
    """The figures that are looked for first."""
    info, plan = run.info, run.info.plan
    rows, columns = plan.kernel_shape
    found = [
        (f"{rows:,} × {columns:,}", "kernel"),
        (format_count(plan.columns).strip(), "parameters"),
        (format_seconds(info.seconds), "time of work"),
        (format_bytes(info.host_bytes), "peak host memory"),
    ]
    if not info.finished:
        return [*found, (f"{info.kernel_tiles_done:,} of {info.kernel_tiles:,}", "tiles done")]
    if info.expected_error is not None:
        found.append((f"{info.expected_error:.2%}", "expected error of the projection"))
    kept, network = run.result("fit"), results.network_accuracy(run)
    if network is not None:
        found.append((f"{network[0]:.1%}", "test accuracy, network"))
    if kept is not None and kept.get("accuracy") is not None:
        found.append((f"{kept['accuracy']:.1%}", "test accuracy, kernel"))
    return found
