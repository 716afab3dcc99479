"""The flags that describe a job, which several commands share."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_type_hints

from .options import (
    BackendOption,
    BatchDependenceOption,
    BatchOption,
    ByOption,
    DataDirOption,
    DataflowOption,
    DeviceMemoryOption,
    DeviceOption,
    DevicesOption,
    DiskOption,
    DownloadOption,
    EveryOutputOption,
    FeaturesOnlyOption,
    HostOption,
    ImageCacheOption,
    JobArgument,
    KernelOption,
    ModelArgument,
    ModelOption,
    NoLayerRulesOption,
    NormalizeOption,
    OrderOption,
    OutputsOption,
    ParametersOption,
    PrecisionOption,
    ProcessesOption,
    ProjectionOption,
    ProjectionSeedOption,
    RepresentationOption,
    ScaleOption,
    SeedOption,
    TargetErrorOption,
    TestOption,
    TileOption,
    TrainOption,
    WeightsOption,
    WorkersOption,
)

if TYPE_CHECKING:
    from ooc_ntk.api import Budget, Cluster, Job, Preferences


@dataclass(frozen=True, kw_only=True)
class JobFlags:
    """Flags that say what is computed and how; None where a flag is not given."""

    job: JobArgument = None
    named_model: ModelArgument = None
    model: ModelOption = None
    weights: WeightsOption = None
    train: TrainOption = None
    test: TestOption = None
    data_dir: DataDirOption = None
    download: DownloadOption = False
    kernel: KernelOption = None
    outputs: OutputsOption = None
    parameters: ParametersOption = None
    normalize: NormalizeOption = None
    scale: ScaleOption = None
    by: ByOption = None
    projection: ProjectionOption = None
    target_error: TargetErrorOption = None
    projection_seed: ProjectionSeedOption = None
    precision: PrecisionOption = None
    device: DeviceOption = None
    batch_size: BatchOption = None
    seed: SeedOption = None
    backend: BackendOption = None
    features_only: FeaturesOnlyOption = False
    dataflow: DataflowOption = None
    order: OrderOption = None
    tile_samples: TileOption = None
    representation: RepresentationOption = None
    no_layer_rules: NoLayerRulesOption = False
    every_output: EveryOutputOption = False
    allow_batch_dependence: BatchDependenceOption = False
    loader_workers: WorkersOption = None
    image_cache: ImageCacheOption = None
    host_memory: HostOption = None
    device_memory: DeviceMemoryOption = None
    disk: DiskOption = None
    workers: ProcessesOption = None
    devices: DevicesOption = None

    @property
    def checkpoints(self) -> list[Path]:
        """The weights, if there are several."""
        return list(self.weights) if self.weights is not None and len(self.weights) > 1 else []

    def describe(self, run: Path | None = None) -> tuple[Job, Budget]:
        """The job and budget of these flags over a job file, or over what a run directory has stored.

        Several weights are left out: each is given to the job by itself.
        """
        from ooc_ntk import api

        given = {name: getattr(self, name) for name in _JOB_FLAGS}
        given = {
            name: value for name, value in given.items() if value is not None and value is not False and value != []
        }
        weights = list(self.weights or [])
        if len(weights) == 1:
            given["weights"] = weights[0]
        return api.describe_job(
            self.job,
            given,
            run=run,
            named_model=self.named_model,
            host=self.host_memory,
            device_memory=self.device_memory,
            disk=self.disk,
        )

    def asked(self) -> dict[str, str]:
        """Everything that was asked for, and from where, as text."""
        found = {field.name: str(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {**found, "folder": str(Path.cwd()), "data": os.environ.get("OOC_NTK_DATA", "")}

    def scheduler(self, named: str | None = None, report: Path | None = None) -> str | Cluster | None:
        """Where tasks are run.

        Args:
            named: name of an executor, or address of a scheduler.
            report: file of Dask's performance report.
        """
        return scheduler_of(named, self.workers, self.devices, report)

    def preferences(self, scheduler: str | Cluster | None = None) -> Preferences:
        """What is fixed by hand of how it is computed, by workers if ``scheduler`` is a cluster."""
        from ooc_ntk import api

        scheduler = scheduler or self.scheduler()
        return api.Preferences(
            dataflow=self.dataflow,
            order=self.order,
            tile_samples=self.tile_samples,
            representation=self.representation,
            layer_rules=not self.no_layer_rules,
            features_only=self.features_only,
            every_output=self.every_output,
            workers=scheduler.processes if isinstance(scheduler, api.Cluster) else None,
        )


def scheduler_of(
    named: str | None, workers: int | None, devices: str | None, report: Path | None
) -> str | Cluster | None:
    """Where tasks are run: an executor of this process by name, or a cluster."""
    from ooc_ntk import api
    from ooc_ntk.errors import InputError

    if named is not None and "://" not in named:
        if workers is not None or devices is not None:
            raise InputError(
                f"--scheduler {named} runs tasks in this process; leave it out with --workers or --devices"
            )
        address = None
    else:
        address = named
    if address is None and workers is None and devices is None:
        if report is not None:
            raise InputError(
                "--performance-report is of worker processes; give --workers, --devices or --scheduler tcp://…"
            )
        return named
    return api.Cluster(scheduler=address, workers=workers, devices=devices, performance_report=report)


_KEYWORD: Final = inspect.Parameter.KEYWORD_ONLY

#: Flags that are arguments of a job as they are.
_JOB_FLAGS: Final = (
    *("model", "train", "test", "data_dir", "download", "kernel", "outputs", "parameters", "normalize", "scale", "by"),
    *("projection", "target_error", "projection_seed", "precision", "device", "batch_size", "seed", "backend"),
    *("allow_batch_dependence", "loader_workers", "image_cache"),
)


def with_job_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the flags of a job: it takes them as ``flags`` beside parameters of its own."""
    hints = get_type_hints(JobFlags, include_extras=True)
    shared = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in dataclasses.fields(JobFlags)
    ]
    mine = get_type_hints(command, include_extras=True)
    own = [
        inspect.Parameter(name, _KEYWORD, default=parameter.default, annotation=mine[name])
        for name, parameter in inspect.signature(command).parameters.items()
        if name != "flags"
    ]
    names = {parameter.name for parameter in shared}

    def called(**given: Any) -> None:
        flags = JobFlags(**{name: value for name, value in given.items() if name in names})
        command(flags=flags, **{name: value for name, value in given.items() if name not in names})

    called.__name__, called.__doc__ = command.__name__, command.__doc__
    called.__signature__ = inspect.Signature([*shared, *own])  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in (*shared, *own)}
    return called
