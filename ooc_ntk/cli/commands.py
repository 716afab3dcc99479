"""The commands: flags in, tables out. What is decided is decided in the API."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .flags import JobFlags, with_job_flags
from .options import (
    DataDirOption,
    DeviceMemoryOption,
    DeviceOption,
    DevicesOption,
    DiskOption,
    HostOption,
    ManyWeights,
    ModelOption,
    MoreOption,
    NoProofOption,
    OutputsOption,
    PerformanceOption,
    ProcessesOption,
    ProfileOption,
    RunArgument,
    SchedulerOption,
    StoreOption,
    TestOption,
    TrainOption,
    WatchDiskOption,
    WeightsOption,
)
from .terminal import EXIT_FINDING, app, heading, reporting_errors, show, status


@app.command(cls=ManyWeights)
@with_job_flags
def plan(
    flags: JobFlags,
    out: Annotated[Path | None, typer.Option("--out", help="Where the run will be, for the free disk space.")] = None,
    store: StoreOption = None,
    save: Annotated[Path | None, typer.Option("--save", help="Write the plan to this file (JSON).")] = None,
    blocks: Annotated[bool, typer.Option("--blocks", help="List every parameter block.")] = False,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain", help="Say why this plan: other ways, what limits it, what other budgets or errors would cost."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Say how a job would be run, how long it takes and how much memory, without computing the kernel."""
    with reporting_errors():
        from ooc_ntk import api
        from ooc_ntk.report.explanation import explanation_json, explanation_table
        from ooc_ntk.report.tables import many_runs, plan_table
        from ooc_ntk.storage.storeurl import checked_store

        store = None if store is None else checked_store(store)  # before anything shows it
        wanted, budget = flags.describe()
        if flags.checkpoints:
            wanted = wanted.with_model(weights=flags.checkpoints[0])
        reasons = None
        with status("measuring the model"):
            if explain:
                reasons = api.explain(wanted, budget, preferences=flags.preferences(), out=out, store=store)
                made = reasons.plan
            else:
                made = api.plan(wanted, budget, preferences=flags.preferences(), out=out, store=store)
        if save is not None:
            made.save(save)
        if as_json:
            typer.echo(made.to_json() if reasons is None else explanation_json(reasons))
        else:
            show(plan_table(made, every_block=blocks, store=store))
            if flags.checkpoints:
                show(many_runs(made, len(flags.checkpoints)))
            if reasons is not None:
                show(explanation_table(reasons, every_block=blocks))
        if save is not None:
            typer.echo(f"plan written to {save}", err=True)


@app.command(cls=ManyWeights)
@with_job_flags
def run(
    flags: JobFlags,
    out: Annotated[Path, typer.Option("--out", help="Run directory; an unfinished run in it goes on.")],
    plan_file: Annotated[Path | None, typer.Option("--plan", help="Plan written by 'ooc-ntk plan --save'.")] = None,
    store: StoreOption = None,
    scheduler: SchedulerOption = None,
    performance_report: PerformanceOption = None,
    watch_disk: WatchDiskOption = None,
    profile: ProfileOption = False,
    no_proof: NoProofOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors.")] = False,
) -> None:
    """Compute the kernel into a run directory; typed again after a stop, it goes on where it was.

    Exit codes: 0 done, 1 a kernel that its proof finds wrong, 2 a wrong input, a budget too small or a disk that cannot
    be used, 130 stopped by Ctrl-C, 143 by SIGTERM, within ten seconds.
    """
    with reporting_errors():
        from ooc_ntk.storage.again import is_done
        from ooc_ntk.storage.storeurl import checked_store

        store = None if store is None else checked_store(store)  # before anything shows it
        command = {**flags.asked(), "plan": str(plan_file), "scheduler": scheduler, "store": store}
        if is_done(out, command):
            if not quiet:
                typer.echo(f"nothing to do: the kernel is complete   see it: ooc-ntk info {shlex.quote(str(out))}")
            return

        from ooc_ntk import api
        from ooc_ntk.errors import InputError
        from ooc_ntk.report.tables import info_table, phases_table, plan_table

        cluster = flags.scheduler(scheduler, performance_report)
        if flags.checkpoints:
            if store is not None:
                raise InputError(
                    "checkpoints share a folder, and no store yet; leave --store out, or run each by itself"
                )
            given = {"scheduler": cluster, "watch_disk": watch_disk, "proof": not no_proof}
            _run_checkpoints(flags, out, plan_file, given, quiet)
            return
        wanted, budget = flags.describe(out)
        chosen = api.Plan.load(plan_file) if plan_file is not None else None
        if not (out / "plan.json").exists() and chosen is None:
            with status("measuring the model", quiet):
                chosen = api.plan(wanted, budget, preferences=flags.preferences(cluster), out=out, store=store)
        if chosen is not None and not quiet:
            show(plan_table(chosen, store=store))
        api.run(
            wanted,
            out,
            plan=chosen,
            budget=budget,
            preferences=flags.preferences(cluster),
            scheduler=cluster,
            progress=not quiet,
            watch_disk=watch_disk,
            proof=not no_proof,
            store=store,
        )
        files = [path for path in (flags.job, plan_file) if path is not None and Path(path).is_file()]
        api.remember(wanted, out, command, [out / "job.toml", *map(Path, files)])
        if not quiet:
            found = api.info(out)
            show(info_table(found))
            if profile:
                show(phases_table(found))
            made = "features" if found.plan.features_only else "kernel"
            typer.echo(f"\n{made}: {found.store or out}/{made}.zarr   check it: ooc-ntk verify {shlex.quote(str(out))}")


def _run_checkpoints(flags: JobFlags, out: Path, plan_file: Path | None, given: Mapping[str, Any], quiet: bool) -> None:
    """Run a job for several weights, and show how the kernels move."""
    from ooc_ntk import api
    from ooc_ntk.errors import InputError
    from ooc_ntk.report.tables import checkpoints_table

    if plan_file is not None:
        raise InputError("a saved plan is for one set of weights; leave --plan out with several of them")
    wanted, budget = flags.describe()
    count = len(flags.checkpoints)

    def announce(number: int, name: str) -> None:
        if not quiet:
            heading(f"checkpoint {number + 1} of {count}: {name}")

    found = api.run_checkpoints(
        wanted,
        out,
        flags.checkpoints,
        budget=budget,
        preferences=flags.preferences(given["scheduler"]),
        progress=not quiet,
        **given,
        announce=announce,
    )
    found.mean()
    drift = found.drift()
    if not quiet:
        show(checkpoints_table(api.info_checkpoints(out), drift))
        typer.echo(f"\nmean kernel: {out}/mean/kernel.zarr   check all: ooc-ntk verify {shlex.quote(str(out))}")


@app.command(cls=ManyWeights)
def extend(
    run: RunArgument,
    train: MoreOption,
    model: ModelOption = None,
    weights: WeightsOption = None,
    outputs: OutputsOption = None,
    data_dir: DataDirOption = None,
    host_memory: HostOption = None,
    device_memory: DeviceMemoryOption = None,
    disk: DiskOption = None,
    workers: ProcessesOption = None,
    devices: DevicesOption = None,
    scheduler: SchedulerOption = None,
    performance_report: PerformanceOption = None,
    watch_disk: WatchDiskOption = None,
    no_proof: NoProofOption = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors.")] = False,
) -> None:
    """Append train samples to a finished run: only their rows and columns are computed. Typed again, it goes on."""
    with reporting_errors():
        from ooc_ntk import api
        from ooc_ntk.errors import InputError
        from ooc_ntk.report.tables import info_table

        given = JobFlags(
            model=model,
            weights=weights,
            outputs=outputs,
            data_dir=data_dir,
            host_memory=host_memory,
            device_memory=device_memory,
            disk=disk,
            workers=workers,
            devices=devices,
        )
        cluster = given.scheduler(scheduler, performance_report)
        api.check_extendable(run)
        if given.checkpoints:
            raise InputError(f"a run has one set of weights, got {len(given.checkpoints)}; give one with --weights")
        wanted, budget = given.describe(run)
        grown = api.extend(
            run,
            train,
            job=wanted,
            budget=budget,
            scheduler=cluster,
            progress=not quiet,
            watch_disk=watch_disk,
            proof=not no_proof,
        )
        if not quiet:
            show(info_table(api.info(run)))
            what = "features" if grown.plan is not None and grown.plan.features_only else "kernel"
            typer.echo(f"\n{what}: {run}/{what}.zarr   check it: ooc-ntk verify {shlex.quote(str(run))}")


@app.command()
def info(
    run: RunArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print figures as JSON.")] = False,
    profile: ProfileOption = False,
) -> None:
    """Show a run: progress, promises beside measurements, where it came from."""
    with reporting_errors():
        from ooc_ntk import api
        from ooc_ntk.report.tables import checkpoints_table, info_table, phases_table

        several = api.info_checkpoints(run)
        if several:
            missing = api.missing_checkpoints(run)
            finished = not missing and all(each.finished for each in several)
            drift = api.open_checkpoints(run).drift() if finished else None
            if as_json:
                typer.echo("[" + ",\n".join(each.to_json() for each in several) + "]")
            else:
                show(checkpoints_table(several, drift))
                _say_missing(missing)
            return
        found = api.info(run)
        if as_json:
            typer.echo(found.to_json())
        else:
            show(info_table(found))
            if profile:
                show(phases_table(found))


@app.command(cls=ManyWeights)
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
    full: Annotated[
        bool,
        typer.Option(
            "--full", help="Let every entry take part in the products with vectors. (default: up to 64 × 64 samples)"
        ),
    ] = False,
) -> None:
    """Prove a finished kernel: checksums, symmetry, entries anew in float64, and K v against J(Jᵀv) by vjp and jvp."""
    with reporting_errors():
        from ooc_ntk import api

        several = api.info_checkpoints(run)
        given = JobFlags(model=model, weights=weights, train=train, test=test, outputs=outputs)
        if several:
            passed = [_verify(each.path, given, samples, seed, full, title=each.path.name) for each in several]
            missing = api.missing_checkpoints(run)
            _say_missing(missing)
            if not missing and all(each.finished for each in several):
                wrong = api.open_checkpoints(run).check_mean()
                typer.echo(f"\nmean: {wrong or 'passed, as far as it was made'}")
                passed.append(not wrong)
            passed.append(not missing)
        else:
            api.open(run)
            passed = [_verify(run, given, samples, seed, full)]
        if not all(passed):
            raise typer.Exit(EXIT_FINDING)


def _say_missing(names: list[str]) -> None:
    """Say which checkpoints of a directory are not there."""
    if names:
        typer.secho(f"missing: {', '.join(names)}; run the same command again to compute them", fg="red")


def _verify(run: Path, given: JobFlags, samples: int, seed: int, full: bool, title: str | None = None) -> bool:
    """Verify one run and print what was seen."""
    from ooc_ntk import api
    from ooc_ntk.report.tables import audit_table

    if title is not None:
        heading(title)
    job = given.describe(run)[0] if samples else None
    with status("verifying"):
        found = api.verify(run, job, samples=samples, seed=seed, full=full)
    show(audit_table(found))
    return found.passed


@app.command()
def calibrate(
    device: DeviceOption = None,
    disk: Annotated[Path, typer.Option("--out", help="A folder on the disk where runs will be.")] = Path(),
) -> None:
    """Measure how fast this machine multiplies, copies, reads and writes (a few seconds); plans then hold."""
    with reporting_errors():
        from ooc_ntk import api
        from ooc_ntk.report.tables import rates_table

        with status("measuring the machine"):
            rates = api.calibrate(device, disk)
        show(rates_table(rates))


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder of the demonstration.")] = Path("ooc-ntk-demo"),
    host_memory: Annotated[
        str, typer.Option("--host-memory", help="Peak memory of the whole process; the Jacobian is larger.")
    ] = "1GiB",
) -> None:
    """Train a small network on real digits, compute its kernel under a small budget, verify it and use it."""
    with reporting_errors():
        _demo(out, host_memory)


def _demo(out: Path, host_memory: str) -> None:
    from ooc_ntk import api
    from ooc_ntk import demo as shown
    from ooc_ntk.report.embed import require_bokeh
    from ooc_ntk.report.page import write_page
    from ooc_ntk.report.tables import audit_table, info_table, plan_table

    require_bokeh()  # before minutes of work that end with it
    out.mkdir(parents=True, exist_ok=True)
    weights = out / "weights.safetensors"
    heading("1. Train a small network on 4,000 MNIST digits")
    if weights.exists():
        typer.echo(f"{weights} is there already")
    else:
        shown.train(weights, say=typer.echo)
    job = shown.job(weights)
    budget = api.Budget(host=host_memory)
    heading(f"2. Plan its trace kernel under a host budget of {host_memory}")
    run_folder = out / "run"
    if (run_folder / "plan.json").exists():
        made = api.Plan.load(run_folder / "plan.json")
    else:
        with status("measuring the model"):
            made = api.plan(job, budget, out=run_folder)
    show(plan_table(made))
    heading("3. Run it (Ctrl-C and type the same command again: it goes on)")
    api.run(job, run_folder, plan=made)
    show(info_table(api.info(run_folder)))
    heading("4. Verify it against float64 autograd")
    found = api.verify(run_folder, job)
    show(audit_table(found))
    if not found.passed:
        raise typer.Exit(EXIT_FINDING)
    heading("5. Use it: kernel regression on 4,000 digits classifies the other 1,000")
    scores = shown.use(run_folder, job, say=typer.echo)
    typer.echo(f"network              {scores.network:.1%} of 1,000 test digits right")
    typer.echo(
        f"its kernel           {scores.kernel:.1%} (ridge {scores.ridge_ratio:.1g} of the mean diagonal, by GCV)"
    )
    typer.echo(f"Kendall's τ-b        {scores.alike:.3f} between probabilities of the network and of the kernel")
    heading("6. Look at it")
    typer.echo(f"report: {write_page(run_folder)}")
