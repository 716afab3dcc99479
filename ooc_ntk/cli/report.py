"""``ooc-ntk report``: one HTML file with everything that is known of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import RunArgument
from .terminal import app, reporting_errors


@app.command()
def report(
    run: RunArgument,
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write. (default: report.html in the run directory)")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors.")] = False,
) -> None:
    """Write a page with what was computed, promises beside measurements, and every result that is there.

    One HTML file with all pictures inside, which loads nothing from elsewhere. Made again, it shows what is new.
    """
    with reporting_errors():
        from ooc_ntk import api
        from ooc_ntk.report.page import write_page

        page = write_page(api.info(run), out)
        if not quiet:
            typer.echo(f"report: {page}")
