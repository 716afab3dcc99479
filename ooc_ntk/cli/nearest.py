"""``ooc-ntk nearest``: the most similar train samples of each test sample."""

from __future__ import annotations

import json
import shlex
from typing import Annotated

import typer

from ooc_ntk.extras import how_to_install

from .completion import complete
from .options import DataDirOption, ModelOption, RunArgument, TestOption, TrainOption
from .terminal import app, reporting_errors, show, status


@app.command()
def nearest(
    run: RunArgument,
    k: Annotated[int, typer.Option("--k", "-k", help="Neighbours of each sample.")] = 5,
    by: Annotated[
        str,
        typer.Option(
            "--by",
            help="kernel (its entries), or cosine (lengths of gradients do not count).",
            autocompletion=complete("kernel", "cosine"),
        ),
    ] = "kernel",
    rows: Annotated[
        str,
        typer.Option(
            "--rows", help="Whose neighbours are found: test or train.", autocompletion=complete("test", "train")
        ),
    ] = "test",
    backend: Annotated[
        str,
        typer.Option(
            "--backend",
            help="exact, or faiss to search projected features in memory (extra faiss).",
            autocompletion=complete("exact", "faiss"),
        ),
    ] = "exact",
    shown: Annotated[int, typer.Option("--show", help="Samples in the table and the picture.")] = 8,
    seed: Annotated[int, typer.Option("--seed", help="Seed of their choice.", min=0)] = 0,
    model: ModelOption = None,
    train: TrainOption = None,
    test: TestOption = None,
    data_dir: DataDirOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print figures as JSON.")] = False,
) -> None:
    """Find the train samples that are nearest to each test sample, and show some: images, texts or numbers.

    Writes RUN/nearest/nearest.npz (all), nearest.json (settings, summary, those shown) and nearest.png. The data are
    those of the run; where it was made from live data, give them (--train, --test), or only numbers are found.
    """
    with reporting_errors():
        from ooc_ntk import api
        from ooc_ntk.report.neighbours import draw_neighbours, neighbours_table
        from ooc_ntk.report.pictures import can_draw

        flags = {"model": model, "train": train, "test": test, "data_dir": data_dir}
        given = {name: value for name, value in flags.items() if value is not None}
        with status("finding the nearest samples", quiet or as_json):
            found = api.nearest(run, k, by=by, rows=rows, backend=backend, show=shown, seed=seed, given=given)
        folder = run / "nearest"
        image = folder / "nearest.png"
        drawn = can_draw() and draw_neighbours(found, image)
        if as_json:
            typer.echo(json.dumps(found.figures, indent=2))
        elif not quiet:
            show(neighbours_table(found))
            typer.echo(f"\nall of them: {folder}/nearest.npz" + (f"   picture: {image}" if drawn else ""))
        if not can_draw():
            typer.echo(f"the picture is left out: {how_to_install('matplotlib')}", err=True)
        elif not quiet and not as_json:
            typer.echo(f"page with all results: ooc-ntk report {shlex.quote(str(run))}")
