"""The command line: flags in, tables out. What is decided is decided in the API."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import OocNtkError, RunInterrupted

if TYPE_CHECKING:
    from .api import Budget, Job, Preferences

#: Exit codes: a finding (a kernel that does not verify), a wrong input or full disk, a stop by Ctrl-C.
EXIT_FINDING, EXIT_INPUT, EXIT_STOPPED = 1, 2, 130

app = typer.Typer(
    name="ooc-ntk",
    help="Empirical neural tangent kernels larger than memory, exact or projected: planned, resumable, verified.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _complete(*names: str) -> Any:
    """Tab completion from fixed names."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return complete


_WHAT, _HOW, _BUDGET = "What is computed", "How it is computed", "Budget"

JobFileArgument = Annotated[
    Path | None, typer.Argument(help="Job file (TOML); flags override what it says.", show_default=False)
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", help="pkg.module:factory or file.py:factory.", rich_help_panel=_WHAT, show_default=False),
]
WeightsOption = Annotated[
    Path | None,
    typer.Option("--weights", help="Weights: .safetensors, or .pt with tensors only.", rich_help_panel=_WHAT),
]
TrainOption = Annotated[
    str | None,
    typer.Option(
        "--train",
        help="Train data: mnist5k, digits, a .npy/.npz/.zarr file or file.py:factory, with an optional slice [0:2500].",
        rich_help_panel=_WHAT,
        autocompletion=_complete("mnist5k", "mnist5k[0:4000]", "digits"),
        show_default=False,
    ),
]
TestOption = Annotated[
    str | None,
    typer.Option(
        "--test",
        help="Test data: rows after the train rows.",
        rich_help_panel=_WHAT,
        autocompletion=_complete("mnist5k[4000:5000]", "digits"),
        show_default=False,
    ),
]
KernelOption = Annotated[
    str | None,
    typer.Option(
        "--kernel",
        help="trace, pseudo, output:C or full; or of features: embedding, embedding:LAYERS or conjugate. "
        "(default: trace)",
        rich_help_panel=_WHAT,
        autocompletion=_complete("trace", "pseudo", "output:0", "full", "embedding", "embedding:*", "conjugate"),
        show_default=False,
    ),
]
OutputsOption = Annotated[
    str | None,
    typer.Option(
        "--outputs",
        help="logits, logprob, loss, margin, next-token, clip or file.py:function; a part as logits[0:3]. "
        "(default: logits)",
        rich_help_panel=_WHAT,
        autocompletion=_complete("logits", "logits[0:3]", "logprob", "loss", "margin", "next-token", "clip"),
        show_default=False,
    ),
]
ParametersOption = Annotated[
    list[str] | None,
    typer.Option(
        "--parameters",
        help="Name pattern of parameters, '!pattern' leaves out; may be given several times. (default: all)",
        rich_help_panel=_WHAT,
        show_default=False,
    ),
]
NormalizeOption = Annotated[
    str | None,
    typer.Option(
        "--normalize", help="cosine.", rich_help_panel=_WHAT, autocompletion=_complete("cosine"), show_default=False
    ),
]
ScaleOption = Annotated[
    str | None,
    typer.Option(
        "--scale",
        help="sum over outputs, or mean. (default: sum)",
        rich_help_panel=_WHAT,
        autocompletion=_complete("sum", "mean"),
        show_default=False,
    ),
]
ByOption = Annotated[
    str | None,
    typer.Option(
        "--by",
        help="layer: keep every layer's summand of the kernel as well.",
        rich_help_panel=_WHAT,
        autocompletion=_complete("layer"),
        show_default=False,
    ),
]
PrecisionOption = Annotated[
    str | None,
    typer.Option(
        "--precision",
        help="float32, bf16 (for held tiles and products), tf32 (CUDA) or float64. (default: float32)",
        rich_help_panel=_HOW,
        autocompletion=_complete("float32", "bf16", "tf32", "float64"),
        show_default=False,
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="cpu or cuda:0. (default: CUDA if there is one)",
        rich_help_panel=_HOW,
        autocompletion=_complete("cpu", "cuda", "cuda:0"),
        show_default=False,
    ),
]
BatchOption = Annotated[
    int | None,
    typer.Option("--batch-size", help="Samples derived together. (default: measured)", rich_help_panel=_HOW, min=1),
]
SeedOption = Annotated[
    int | None, typer.Option("--seed", help="Seed of everything random. (default: 0)", rich_help_panel=_HOW)
]
ProjectionOption = Annotated[
    str | None,
    typer.Option(
        "--projection",
        help="Project the Jacobian: kind:columns, as sjlt:4096; kinds sjlt, shift, rademacher, gaussian, tensorsketch. "
        "(default: the exact kernel)",
        rich_help_panel=_WHAT,
        autocompletion=_complete(
            "sjlt:4096", "sjlt:10240", "shift:4096", "rademacher:4096", "gaussian:4096", "tensorsketch:4096"
        ),
        show_default=False,
    ),
]
TargetErrorOption = Annotated[
    float | None,
    typer.Option(
        "--target-error",
        help="In place of columns: the relative error wanted of the kernel, as 0.02; a pilot chooses the columns.",
        rich_help_panel=_WHAT,
        show_default=False,
    ),
]
ProjectionSeedOption = Annotated[
    int | None,
    typer.Option("--projection-seed", help="Seed of the projection. (default: 0)", rich_help_panel=_WHAT, min=0),
]
BackendOption = Annotated[
    str | None,
    typer.Option(
        "--backend",
        help="What projects: numba (CPU), cupy (CUDA) or torch. (default: the compiled one where it is installed)",
        rich_help_panel=_HOW,
        autocompletion=_complete("auto", "numba", "torch", "cupy"),
        show_default=False,
    ),
]
FeaturesOnlyOption = Annotated[
    bool,
    typer.Option(
        "--features-only",
        help="Keep the projected features and assemble no kernel; its entries are computed when asked for.",
        rich_help_panel=_HOW,
    ),
]
DataflowOption = Annotated[
    str | None,
    typer.Option(
        "--dataflow",
        help="resident, recompute or spill. (default: the fastest that fits)",
        rich_help_panel=_HOW,
        autocompletion=_complete("resident", "recompute", "spill"),
        show_default=False,
    ),
]
TileOption = Annotated[
    int | None,
    typer.Option("--tile-samples", help="Samples per tile. (default: planned)", rich_help_panel=_HOW, min=1),
]
RepresentationOption = Annotated[
    str | None,
    typer.Option(
        "--representation",
        help="dense, factored or pairwise, wherever a block allows it. (default: planned for each block)",
        rich_help_panel=_HOW,
        autocompletion=_complete("dense", "factored", "pairwise"),
        show_default=False,
    ),
]
NoLayerRulesOption = Annotated[
    bool, typer.Option("--no-layer-rules", help="Derive everything by torch.func.", rich_help_panel=_HOW)
]
EveryOutputOption = Annotated[
    bool,
    typer.Option(
        "--every-output",
        help="Derive a row for every output, even where a linear head allows fewer.",
        rich_help_panel=_HOW,
    ),
]
BatchDependenceOption = Annotated[
    bool,
    typer.Option(
        "--allow-batch-dependence",
        help="Accept outputs that change with a sample's batch mates: each sample is computed alone.",
        rich_help_panel=_HOW,
    ),
]
ProfileOption = Annotated[bool, typer.Option("--profile", help="Show where the time went, phase by phase.")]
HostOption = Annotated[
    str | None,
    typer.Option(
        "--host-memory",
        help="Peak memory of the whole process, as 16GiB. (default: 80% of what is free)",
        rich_help_panel=_BUDGET,
        show_default=False,
    ),
]
DeviceMemoryOption = Annotated[
    str | None,
    typer.Option(
        "--device-memory",
        help="Memory on the device. (default: 80% of what is free)",
        rich_help_panel=_BUDGET,
        show_default=False,
    ),
]
DiskOption = Annotated[
    str | None,
    typer.Option(
        "--disk",
        help="Size the run directory may grow to. (default: 80% of what is free)",
        rich_help_panel=_BUDGET,
        show_default=False,
    ),
]
RunArgument = Annotated[Path, typer.Argument(help="Run directory.", show_default=False)]


@contextmanager
def _reporting_errors() -> Iterator[None]:
    """Turn errors raised on purpose into one line and an exit code."""
    try:
        yield
    except RunInterrupted as stopped:
        typer.secho(str(stopped), fg="yellow", err=True)
        raise typer.Exit(EXIT_STOPPED) from stopped
    except OocNtkError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(EXIT_INPUT) from error
    except KeyboardInterrupt as stopped:
        typer.secho("stopped", fg="yellow", err=True)
        raise typer.Exit(EXIT_STOPPED) from stopped


def _print(renderable: Any) -> None:
    from rich.console import Console

    # Without a terminal nothing is wrapped: a table in a log file keeps one line per row.
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=200)
    console.print(renderable)


def _job(job_file: Path | None, run: Path | None, **flags: Any) -> tuple[Job, Budget]:
    """The job and budget of flags over a job file, or over what a run directory has stored."""
    from . import api

    given = {name: value for name, value in flags.items() if value not in (None, [])}
    budget = {name: given.pop(name) for name in ("host", "device_memory", "disk") if name in given}
    return api.describe_job(
        job_file,
        given,
        run=run,
        host=budget.get("host"),
        device_memory=budget.get("device_memory"),
        disk=budget.get("disk"),
    )


def _preferences(
    dataflow: str | None,
    tile_samples: int | None,
    representation: str | None,
    no_layer_rules: bool,
    features_only: bool,
    every_output: bool,
) -> Preferences:
    from . import api

    return api.Preferences(
        dataflow=dataflow,
        tile_samples=tile_samples,
        representation=representation,
        layer_rules=not no_layer_rules,
        features_only=features_only,
        every_output=every_output,
    )


@app.command()
def plan(
    job: JobFileArgument = None,
    model: ModelOption = None,
    weights: WeightsOption = None,
    train: TrainOption = None,
    test: TestOption = None,
    kernel: KernelOption = None,
    outputs: OutputsOption = None,
    parameters: ParametersOption = None,
    normalize: NormalizeOption = None,
    scale: ScaleOption = None,
    by: ByOption = None,
    precision: PrecisionOption = None,
    device: DeviceOption = None,
    batch_size: BatchOption = None,
    seed: SeedOption = None,
    projection: ProjectionOption = None,
    target_error: TargetErrorOption = None,
    projection_seed: ProjectionSeedOption = None,
    backend: BackendOption = None,
    features_only: FeaturesOnlyOption = False,
    dataflow: DataflowOption = None,
    tile_samples: TileOption = None,
    representation: RepresentationOption = None,
    no_layer_rules: NoLayerRulesOption = False,
    every_output: EveryOutputOption = False,
    allow_batch_dependence: BatchDependenceOption = False,
    host_memory: HostOption = None,
    device_memory: DeviceMemoryOption = None,
    disk: DiskOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="Where the run will be, for the free disk space.")] = None,
    save: Annotated[Path | None, typer.Option("--save", help="Write the plan to this file (JSON).")] = None,
    blocks: Annotated[bool, typer.Option("--blocks", help="List every parameter block.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Say how a job would be run, how long it takes and how much memory, without computing the kernel."""
    with _reporting_errors():
        wanted, budget = _job(
            job,
            None,
            model=model,
            weights=weights,
            train=train,
            test=test,
            kernel=kernel,
            outputs=outputs,
            parameters=parameters,
            normalize=normalize,
            scale=scale,
            by=by,
            precision=precision,
            device=device,
            batch_size=batch_size,
            seed=seed,
            projection=projection,
            target_error=target_error,
            projection_seed=projection_seed,
            backend=backend,
            allow_batch_dependence=allow_batch_dependence or None,
            host=host_memory,
            device_memory=device_memory,
            disk=disk,
        )
        from . import api
        from .report.tables import plan_table

        with _status("measuring the model"):
            preferences = _preferences(
                dataflow, tile_samples, representation, no_layer_rules, features_only, every_output
            )
            made = api.plan(wanted, budget, preferences=preferences, out=out)
        if save is not None:
            made.save(save)
        if as_json:
            typer.echo(made.to_json())
        else:
            _print(plan_table(made, every_block=blocks))
        if save is not None:
            typer.echo(f"plan written to {save}", err=True)


@app.command()
def run(
    out: Annotated[Path, typer.Option("--out", help="Run directory; an unfinished run in it goes on.")],
    job: JobFileArgument = None,
    model: ModelOption = None,
    weights: WeightsOption = None,
    train: TrainOption = None,
    test: TestOption = None,
    kernel: KernelOption = None,
    outputs: OutputsOption = None,
    parameters: ParametersOption = None,
    normalize: NormalizeOption = None,
    scale: ScaleOption = None,
    by: ByOption = None,
    precision: PrecisionOption = None,
    device: DeviceOption = None,
    batch_size: BatchOption = None,
    seed: SeedOption = None,
    projection: ProjectionOption = None,
    target_error: TargetErrorOption = None,
    projection_seed: ProjectionSeedOption = None,
    backend: BackendOption = None,
    features_only: FeaturesOnlyOption = False,
    dataflow: DataflowOption = None,
    tile_samples: TileOption = None,
    representation: RepresentationOption = None,
    no_layer_rules: NoLayerRulesOption = False,
    every_output: EveryOutputOption = False,
    allow_batch_dependence: BatchDependenceOption = False,
    host_memory: HostOption = None,
    device_memory: DeviceMemoryOption = None,
    disk: DiskOption = None,
    plan_file: Annotated[Path | None, typer.Option("--plan", help="Plan written by 'ooc-ntk plan --save'.")] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            "--scheduler", help="threads or serial. (default: threads)", autocompletion=_complete("threads", "serial")
        ),
    ] = None,
    profile: ProfileOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors.")] = False,
) -> None:
    """Compute the kernel into a run directory; typed again after a stop, it goes on where it was."""
    with _reporting_errors():
        from . import api
        from .report.tables import info_table, phases_table, plan_table

        wanted, budget = _job(
            job,
            out,
            model=model,
            weights=weights,
            train=train,
            test=test,
            kernel=kernel,
            outputs=outputs,
            parameters=parameters,
            normalize=normalize,
            scale=scale,
            by=by,
            precision=precision,
            device=device,
            batch_size=batch_size,
            seed=seed,
            projection=projection,
            target_error=target_error,
            projection_seed=projection_seed,
            backend=backend,
            allow_batch_dependence=allow_batch_dependence or None,
            host=host_memory,
            device_memory=device_memory,
            disk=disk,
        )
        preferences = _preferences(dataflow, tile_samples, representation, no_layer_rules, features_only, every_output)
        chosen = api.Plan.load(plan_file) if plan_file is not None else None
        if not (out / "plan.json").exists() and chosen is None:
            with _status("measuring the model", quiet):
                chosen = api.plan(wanted, budget, preferences=preferences, out=out)
        if chosen is not None and not quiet:
            _print(plan_table(chosen))
        api.run(
            wanted,
            out,
            plan=chosen,
            budget=budget,
            preferences=preferences,
            scheduler=scheduler,
            progress=not quiet,
        )
        if not quiet:
            found = api.info(out)
            _print(info_table(found))
            if profile:
                _print(phases_table(found))
            made = "features" if found.plan.features_only else "kernel"
            typer.echo(f"\n{made}: {out}/{made}.zarr   check it: ooc-ntk verify {shlex.quote(str(out))}")


@app.command()
def info(
    run: RunArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print figures as JSON.")] = False,
    profile: ProfileOption = False,
) -> None:
    """Show a run: progress, promises beside measurements, where it came from."""
    with _reporting_errors():
        from . import api
        from .report.tables import info_table, phases_table

        found = api.info(run)
        if as_json:
            typer.echo(found.to_json())
        else:
            _print(info_table(found))
            if profile:
                _print(phases_table(found))


@app.command()
def verify(
    run: RunArgument,
    model: ModelOption = None,
    weights: WeightsOption = None,
    train: TrainOption = None,
    test: TestOption = None,
    outputs: OutputsOption = None,
    samples: Annotated[
        int, typer.Option("--samples", help="Samples whose rows and columns are recomputed in float64.", min=0)
    ] = 8,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the choice of samples.")] = 0,
) -> None:
    """Prove a finished kernel: checksums, symmetry, finite entries, and entries recomputed in float64."""
    with _reporting_errors():
        from . import api
        from .report.tables import audit_table

        job = None
        api.open(run)
        if samples:
            job, _ = _job(None, run, model=model, weights=weights, train=train, test=test, outputs=outputs)
        with _status("verifying"):
            found = api.verify(run, job, samples=samples, seed=seed)
        _print(audit_table(found))
        if not found.passed:
            raise typer.Exit(EXIT_FINDING)


@app.command()
def calibrate(
    device: DeviceOption = None,
    disk: Annotated[Path, typer.Option("--out", help="A folder on the disk where runs will be.")] = Path(),
) -> None:
    """Measure how fast this machine multiplies, copies, reads and writes (a few seconds); plans then hold."""
    with _reporting_errors():
        from . import api
        from .report.tables import rates_table

        with _status("measuring the machine"):
            rates = api.calibrate(device, disk)
        _print(rates_table(rates))


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder of the demonstration.")] = Path("ooc-ntk-demo"),
    host_memory: Annotated[
        str, typer.Option("--host-memory", help="Peak memory of the whole process; the Jacobian is larger.")
    ] = "1GiB",
) -> None:
    """Train a small network on real digits, compute its kernel under a small budget, verify it and use it."""
    with _reporting_errors():
        _demo(out, host_memory)


def _demo(out: Path, host_memory: str) -> None:
    from . import api
    from . import demo as show
    from .report.tables import audit_table, info_table, plan_table

    out.mkdir(parents=True, exist_ok=True)
    weights = out / "weights.safetensors"
    _heading("1. Train a small network on 4,000 MNIST digits")
    if weights.exists():
        typer.echo(f"{weights} is there already")
    else:
        show.train(weights, say=typer.echo)
    job = show.job(weights)
    budget = api.Budget(host=host_memory)
    _heading(f"2. Plan its trace kernel under a host budget of {host_memory}")
    run_folder = out / "run"
    if (run_folder / "plan.json").exists():
        made = api.Plan.load(run_folder / "plan.json")
    else:
        with _status("measuring the model"):
            made = api.plan(job, budget, out=run_folder)
    _print(plan_table(made))
    _heading("3. Run it (Ctrl-C and type the same command again: it goes on)")
    kernel = api.run(job, run_folder, plan=made)
    _print(info_table(api.info(run_folder)))
    _heading("4. Verify it against float64 autograd")
    found = api.verify(run_folder, job)
    _print(audit_table(found))
    if not found.passed:
        raise typer.Exit(EXIT_FINDING)
    _heading("5. Use it: kernel regression on 4,000 digits classifies the other 1,000")
    scores = show.score(kernel, job.module())
    typer.echo(f"network              {scores.network:.1%} of 1,000 test digits right")
    typer.echo(f"its kernel, ridge    {scores.kernel:.1%} (ridge {scores.ridge_ratio:.0e} of the mean diagonal)")


def _heading(text: str) -> None:
    typer.secho(f"\n{text}", bold=True)


@contextmanager
def _status(text: str, quiet: bool = False) -> Iterator[None]:
    """Show that something short is going on, on a terminal."""
    if quiet or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


def main() -> None:
    """Entry point of the ``ooc-ntk`` command."""
    app()
