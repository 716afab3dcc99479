"""``ooc-ntk fit``: kernel ridge regression of a run, its ridge chosen by GCV."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from ooc_ntk.extras import how_to_install
from ooc_ntk.registry import modules_of

from .completion import complete
from .flags import JobFlags
from .options import (
    DataDirOption,
    DiskOption,
    HostOption,
    RunArgument,
    TestOption,
    TrainOption,
)
from .terminal import app, reporting_errors, show, told

if TYPE_CHECKING:
    from ooc_ntk.api import Fit


#: Ways to solve that this project has; plugins may have more.
_METHODS: Final = modules_of("ooc_ntk.algebra.methods")


@app.command()
def fit(
    run: RunArgument,
    targets: Annotated[
        Path | None,
        typer.Option(
            "--targets",
            help="NumPy file of targets: rows of the train samples, or of train and test samples. "
            "(default: the class labels of the data)",
            show_default=False,
        ),
    ] = None,
    ridge: Annotated[
        float | None,
        typer.Option("--ridge", help="One ridge, added to the diagonal. (default: chosen by GCV)", show_default=False),
    ] = None,
    ridge_ratio: Annotated[
        float | None,
        typer.Option("--ridge-ratio", help="One ridge, over the mean diagonal.", show_default=False),
    ] = None,
    ridges: Annotated[
        str | None,
        typer.Option(
            "--ridges",
            help="Ridges that GCV chooses from, as 0.1,1,10. (default: from 1e-6 to 10 of the mean diagonal)",
            show_default=False,
        ),
    ] = None,
    centered: Annotated[
        bool, typer.Option("--centered", help="Centre kernel and targets, which fits an intercept.")
    ] = False,
    cosine: Annotated[bool, typer.Option("--cosine", help="Divide the kernel by the roots of its diagonal.")] = False,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help=f"auto; for one ridge {', '.join(_METHODS)}; for several spectrum or cg.",
            autocompletion=complete("auto", *_METHODS, "spectrum"),
        ),
    ] = "auto",
    probes: Annotated[int, typer.Option("--probes", help="Random probes of GCV, where it is estimated.", min=2)] = 16,
    train: TrainOption = None,
    test: TestOption = None,
    data_dir: DataDirOption = None,
    host_memory: HostOption = None,
    disk: DiskOption = None,
    device: Annotated[
        str, typer.Option("--device", help="Device that multiplies.", autocompletion=complete("cpu", "cuda"))
    ] = "cpu",
    seed: Annotated[int, typer.Option("--seed", help="Seed of everything random.", min=0)] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print figures as JSON, and nothing else.")] = False,
) -> None:
    """Kernel ridge regression on the train samples: the ridge by GCV, and what it makes of the test samples.

    Figures, coefficients, predictions and a picture are kept in RUN/fit.
    """
    with reporting_errors():
        from ooc_ntk import api

        data = JobFlags(train=train, test=test, data_dir=data_dir)
        with told(quiet or as_json) as advance:
            found = api.fit(
                run,
                targets,
                ridge=ridge,
                ridge_ratio=ridge_ratio,
                ridges=None if ridges is None else _numbers(ridges),
                centered=centered,
                cosine=cosine,
                method=method,
                probes=probes,
                job=data.describe(run)[0] if train or test or data_dir else None,
                budget=api.Budget(host=host_memory, disk=disk),
                device=device,
                seed=seed,
                advance=advance,
            )
        _report(found, quiet=quiet, as_json=as_json)


def _numbers(text: str) -> list[float]:
    """Ridges as they are typed."""
    from ooc_ntk.errors import InputError

    try:
        return [float(each) for each in text.split(",")]
    except ValueError as error:
        raise InputError(f"--ridges takes numbers between commas, as 0.1,1,10; got {text!r}") from error


def _report(found: Fit, *, quiet: bool, as_json: bool) -> None:
    """Draw the picture where that is possible, and print the figures."""
    from ooc_ntk.report.fits import draw_fit, fit_table
    from ooc_ntk.report.pictures import can_draw
    from ooc_ntk.storage.results import read_result

    folder = found.path / "fit"
    drawn = can_draw()
    if drawn:
        draw_fit(folder / "fit.png", found)
    if as_json:
        typer.echo(json.dumps(read_result(found.path, "fit"), indent=2))
    elif not quiet:
        show(fit_table(found))
        picture = "fit.png" if drawn else f"no picture: {how_to_install('matplotlib')}"
        typer.echo(f"\nwritten to {folder}: fit.json, fit.npz, {picture}")
