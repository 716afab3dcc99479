"""``ooc-ntk report``: one HTML file with everything that is known of a run, or of two side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .completion import complete_run
from .terminal import app, reporting_errors, status


@app.command()
def report(
    run: Annotated[
        str,
        typer.Argument(
            help="Run directory, or one of checkpoints, or a run's store (URL).",
            show_default=False,
            autocompletion=complete_run,
        ),
    ],
    other: Annotated[
        str | None,
        typer.Argument(
            help="Another run of the same samples, to be compared with the first.",
            show_default=False,
            autocompletion=complete_run,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="File to write. (default: report.html in the run directory; of two comparison.html in the second)",
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors.")] = False,
) -> None:
    """Write a page with what was computed, promises beside measurements, the kernel, and every result that is there.

    One HTML file with all figures inside, which loads nothing from elsewhere. Made again, it shows what is new. Of two
    runs it compares the second with the first: an exact and a projected kernel, or two checkpoints.
    """
    with reporting_errors():
        from ooc_ntk.report.compare import write_comparison
        from ooc_ntk.report.page import write_page

        with status("looking at the kernel" if other is None else "looking at both kernels", quiet):
            page = write_page(run, out) if other is None else write_comparison(run, other, out)
        if not quiet:
            typer.echo(f"report: {page}")
