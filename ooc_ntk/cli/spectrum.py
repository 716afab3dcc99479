"""``ooc-ntk spectrum``: eigenvalues of a finished kernel, their decay, targets along them, alignments."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Annotated

import typer

from ooc_ntk.extras import how_to_install

from .completion import complete, complete_run
from .options import HostOption, RunArgument
from .terminal import app, reporting_errors, show, status


@app.command()
def spectrum(
    run: RunArgument,
    k: Annotated[
        int | None,
        typer.Option(
            "--k",
            "-k",
            help="Leading eigenpairs. (default: all of up to 4,000 rows, 50 of more)",
            min=1,
            show_default=False,
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="The whole spectrum in memory, of any size.")] = False,
    targets: Annotated[
        Path | None,
        typer.Option(
            "--targets",
            help="NumPy file of targets, (train rows,) or (train rows, targets). (default: the labels of the data)",
            show_default=False,
        ),
    ] = None,
    centered: Annotated[bool, typer.Option("--centered", help="Centre the kernel first, H K H.")] = False,
    cosine: Annotated[bool, typer.Option("--cosine", help="Divide the kernel by the roots of its diagonal.")] = False,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="auto, full (in memory), krylov or lobpcg.",
            autocompletion=complete("auto", "full", "krylov", "lobpcg"),
        ),
    ] = "auto",
    layers: Annotated[
        bool, typer.Option("--layers", help="Align the layers of a run made with --by layer (CKA), each with each.")
    ] = False,
    compare: Annotated[
        list[Path] | None,
        typer.Option(
            "--compare",
            help="Another run of the same samples to align with (CKA); may be given again.",
            autocompletion=complete_run,
        ),
    ] = None,
    any_data: Annotated[
        bool, typer.Option("--any-data", help="With --compare: also a run whose data differ, such as in its test data.")
    ] = False,
    host_memory: HostOption = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the random start.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors.")] = False,
) -> None:
    """Eigenvalues of a finished kernel, their decay, targets along the eigenvectors, effective dimension, alignment.

    Figures, eigenvectors and pictures are kept in RUN/spectrum.
    """
    with reporting_errors():
        from ooc_ntk import api
        from ooc_ntk.report.pictures import can_draw
        from ooc_ntk.report.spectrum import draw_alignment, draw_spectrum, spectrum_table
        from ooc_ntk.storage.results import read_result

        with status("computing the spectrum", quiet), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*eigenpairs are not within the tolerance")  # the table says it
            found = api.spectrum(
                run,
                k,
                every=every,
                targets=targets,
                centered=centered,
                cosine=cosine,
                method=method,
                layers=layers,
                compare=compare or (),
                check_data=not any_data,
                budget=api.Budget(host=host_memory),
                seed=seed,
            )
        folder = run / "spectrum"
        drawn = can_draw()
        if drawn:
            draw_spectrum(folder / "spectrum.png", found)
            if found.layers is not None:
                draw_alignment(folder / "cka.png", found.layers.names, found.layers.matrix)
        if as_json:
            typer.echo(json.dumps(read_result(run, "spectrum"), indent=2))
        elif not quiet:
            show(spectrum_table(found))
            what = "figures, eigenvectors and pictures" if drawn else "figures and eigenvectors"
            typer.echo(f"\n{what}: {folder}")
        if not drawn and not quiet:
            typer.echo(f"no pictures without matplotlib: {how_to_install('matplotlib')}", err=True)
