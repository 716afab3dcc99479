"""``ooc-ntk surrogate``: kernel surrogates of a run's network, beside the network and beside baselines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from ooc_ntk.extras import how_to_install

from .completion import complete
from .flags import JobFlags
from .options import (
    DataDirOption,
    DeviceMemoryOption,
    DiskOption,
    HostOption,
    ManyWeights,
    ModelOption,
    OutputsOption,
    RunArgument,
    TestOption,
    TrainOption,
    WeightsOption,
)
from .terminal import app, reporting_errors, show

if TYPE_CHECKING:
    from ooc_ntk.api import SurrogateReport

#: Baselines that are run where nobody names others.
DEFAULT_BASELINES: Final = ("embedding:*", "conjugate")

KindOption = Annotated[
    list[str] | None,
    typer.Option(
        "--kind",
        help="ridge or logistic; may be given several times. (default: both)",
        autocompletion=complete("ridge", "logistic"),
        show_default=False,
    ),
]
BaselineOption = Annotated[
    list[str] | None,
    typer.Option(
        "--baseline",
        help="embedding:* (features of all layers), conjugate (of the last one) or embedding; may be given several "
        "times. (default: embedding:* and conjugate)",
        autocompletion=complete("embedding:*", "conjugate", "embedding"),
        show_default=False,
    ),
]
TargetsOption = Annotated[
    str,
    typer.Option(
        "--targets",
        help="labels, or outputs: what the network says of the train samples.",
        autocompletion=complete("labels", "outputs"),
    ),
]


@app.command(cls=ManyWeights)
def surrogate(
    run: RunArgument,
    kind: KindOption = None,
    baseline: BaselineOption = None,
    no_baselines: Annotated[bool, typer.Option("--no-baselines", help="Fit the run's own kernel alone.")] = False,
    targets: TargetsOption = "labels",
    ridge_ratio: Annotated[
        float, typer.Option("--ridge-ratio", help="Ridge over the mean diagonal of each kernel.")
    ] = 1e-3,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the bootstrap for standard errors.", min=0)] = 0,
    model: ModelOption = None,
    weights: WeightsOption = None,
    train: TrainOption = None,
    test: TestOption = None,
    outputs: OutputsOption = None,
    data_dir: DataDirOption = None,
    host_memory: HostOption = None,
    device_memory: DeviceMemoryOption = None,
    disk: DiskOption = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print figures as JSON, and nothing else.")] = False,
) -> None:
    """Fit kernel surrogates of the network, and say how close they come to it on the test samples."""
    with reporting_errors():
        from ooc_ntk import api
        from ooc_ntk.errors import InputError

        if no_baselines and baseline:
            raise InputError("--baseline names one and --no-baselines wants none; leave one of them out")
        given = JobFlags(
            model=model,
            weights=weights,
            train=train,
            test=test,
            outputs=outputs,
            data_dir=data_dir,
            host_memory=host_memory,
            device_memory=device_memory,
            disk=disk,
        )
        api.open(run)
        job, budget = given.describe(run)
        silent = quiet or as_json
        options: dict[str, Any] = {} if kind is None else {"kinds": kind}
        found = api.surrogate(
            run,
            job,
            baselines=() if no_baselines else baseline or DEFAULT_BASELINES,
            targets=targets,
            ridge_ratio=ridge_ratio,
            seed=seed,
            budget=budget,
            progress=not silent,
            advance=lambda what: None if silent else typer.echo(what, err=True),
            **options,
        )
        _report(run, found, quiet=quiet, as_json=as_json)


def _report(run: Path, found: SurrogateReport, *, quiet: bool, as_json: bool) -> None:
    """Draw the picture, where that is possible, and print the figures."""
    from ooc_ntk.report.pictures import can_draw
    from ooc_ntk.report.surrogates import draw_surrogates, surrogate_table

    folder = run / "surrogate"
    drawn = can_draw()
    if drawn:
        draw_surrogates(found, folder / "surrogate.png")
    if as_json:
        typer.echo((folder / "surrogate.json").read_text(), nl=False)
    elif not quiet:
        show(surrogate_table(found))
        picture = "surrogate.png" if drawn else f"no picture: {how_to_install('matplotlib')}"
        typer.echo(f"\nwritten to {folder}: surrogate.json, surrogate.npz, {picture}")
