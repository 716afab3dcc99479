"""Options of the command line, with their help and completion."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final

import typer
from typer.core import TyperCommand

from ooc_ntk.planning.projection import KINDS

from .completion import complete, complete_data, complete_model, complete_run

_WHAT, _HOW, _WHERE, _BUDGET = "What is computed", "How it is computed", "Where it is computed", "Budget"

#: Endings of files of weights, by which those after the first are told from other arguments.
WEIGHT_FILES: Final = (".pt", ".pth", ".bin", ".safetensors")


class ManyWeights(TyperCommand):
    """A command whose ``--weights`` takes several files: ``--weights a.pt b.pt``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give every file that follows ``--weights`` an option of its own."""
        found: list[str] = []
        for arg in args:
            if arg.startswith("--weights="):
                found += ["--weights", arg.partition("=")[2]]
                continue
            after = len(found) >= 2 and found[-2] == "--weights"
            if after and arg.endswith(WEIGHT_FILES):
                found.append("--weights")
            found.append(arg)
        return super().parse_args(ctx, found)


JobArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="JOB_OR_DATA",
        help="Job file (TOML), whose words flags override; or a data set: CIFAR-10_0_2500_0_1000, cifar10.",
        show_default=False,
        autocompletion=complete_data,
    ),
]
ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A model by name, beside a data set: resnet-18_init, resnet18,classes=10.",
        show_default=False,
        autocompletion=complete_model,
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="A name (resnet18,classes=10; hf:FOLDER), file.py:factory or pkg.module:factory.",
        rich_help_panel=_WHAT,
        autocompletion=complete_model,
        show_default=False,
    ),
]
WeightsOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--weights",
        help="Weights: .safetensors, or .pt with tensors only; several are checkpoints: a run each, mean and drift.",
        rich_help_panel=_WHAT,
        show_default=False,
    ),
]
TrainOption = Annotated[
    str | None,
    typer.Option(
        "--train",
        help="Train data: mnist5k, cifar10:train,resize=64, text:FILE.tsv, a .npy/.npz/.zarr file or file.py:factory, "
        "with an optional slice [0:2500]; several join by ' + '.",
        rich_help_panel=_WHAT,
        autocompletion=complete_data,
        show_default=False,
    ),
]
TestOption = Annotated[
    str | None,
    typer.Option(
        "--test",
        help="Test data: rows after the train rows.",
        rich_help_panel=_WHAT,
        autocompletion=complete_data,
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
        autocompletion=complete("trace", "pseudo", "output:0", "full", "embedding", "embedding:*", "conjugate"),
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
        autocompletion=complete("logits", "logits[0:3]", "logprob", "loss", "margin", "next-token", "clip"),
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
        "--normalize", help="cosine.", rich_help_panel=_WHAT, autocompletion=complete("cosine"), show_default=False
    ),
]
ScaleOption = Annotated[
    str | None,
    typer.Option(
        "--scale",
        help="sum over outputs, or mean. (default: sum)",
        rich_help_panel=_WHAT,
        autocompletion=complete("sum", "mean"),
        show_default=False,
    ),
]
DataDirOption = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        help="Folder of data sets in their original files. (default: $OOC_NTK_DATA)",
        rich_help_panel=_WHAT,
        show_default=False,
    ),
]
DownloadOption = Annotated[
    bool,
    typer.Option(
        "--download", help="Download missing files of a data set, through torchvision.", rich_help_panel=_WHAT
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        "--loader-workers",
        help="Processes that decode images ahead. (default: 0, a thread)",
        rich_help_panel=_HOW,
        min=0,
        show_default=False,
    ),
]
ImageCacheOption = Annotated[
    Path | None,
    typer.Option(
        "--image-cache",
        help="Folder in which decoded images are kept from pass to pass and run to run.",
        rich_help_panel=_HOW,
        show_default=False,
    ),
]
ByOption = Annotated[
    str | None,
    typer.Option(
        "--by",
        help="layer: keep every layer's summand of the kernel as well.",
        rich_help_panel=_WHAT,
        autocompletion=complete("layer"),
        show_default=False,
    ),
]
PrecisionOption = Annotated[
    str | None,
    typer.Option(
        "--precision",
        help="float32, bf16x3 (three bf16 products in place of one), bf16 (for held tiles and products), tf32 (CUDA) "
        "or float64. (default: float32)",
        rich_help_panel=_HOW,
        autocompletion=complete("float32", "bf16x3", "bf16", "tf32", "float64"),
        show_default=False,
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="cpu or cuda:0. (default: CUDA if there is one)",
        rich_help_panel=_HOW,
        autocompletion=complete("cpu", "cuda", "cuda:0"),
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
        help=f"Project the Jacobian: kind:columns, as sjlt:4096; kinds {', '.join(KINDS)}. (default: the exact kernel)",
        rich_help_panel=_WHAT,
        autocompletion=complete(*(f"{kind}:4096" for kind in KINDS), "sjlt:10240"),
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
        autocompletion=complete("auto", "numba", "torch", "cupy"),
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
        autocompletion=complete("resident", "recompute", "spill"),
        show_default=False,
    ),
]
NoProofOption = Annotated[
    bool, typer.Option("--no-proof", help="Leave out the proof of some samples at the end of the run.")
]
OrderOption = Annotated[
    str | None,
    typer.Option(
        "--order",
        help="How kernel tiles are grouped where tiles are read from disk: square or triangle. (default: planned)",
        rich_help_panel=_HOW,
        autocompletion=complete("square", "triangle"),
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
        autocompletion=complete("dense", "factored", "pairwise"),
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
WatchDiskOption = Annotated[
    str | None,
    typer.Option(
        "--watch-disk",
        help="Disk to leave free, as 2GiB: below, the run stops, to go on later. (default: it may fill the disk)",
        rich_help_panel=_BUDGET,
        show_default=False,
    ),
]
ProfileOption = Annotated[bool, typer.Option("--profile", help="Show where the time went, phase by phase.")]
HostOption = Annotated[
    str | None,
    typer.Option(
        "--host-memory",
        help="Peak memory of the process, or of all of them together, as 16GiB. (default: 80% of what is free)",
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
        help="Size the run may grow to, in its directory or its store. (default: 80% of what is free)",
        rich_help_panel=_BUDGET,
        show_default=False,
    ),
]
SchedulerOption = Annotated[
    str | None,
    typer.Option(
        "--scheduler",
        help="threads or serial in this process; or the address of a Dask scheduler, as tcp://host:8786. "
        "(default: threads)",
        autocompletion=complete("threads", "serial", "tcp://"),
        rich_help_panel=_WHERE,
        show_default=False,
    ),
]
ProcessesOption = Annotated[
    int | None,
    typer.Option(
        "--workers",
        help="Worker processes on this machine, which share its cores and its memory. (default: none)",
        rich_help_panel=_WHERE,
        show_default=False,
    ),
]
DevicesOption = Annotated[
    str | None,
    typer.Option(
        "--devices",
        help="GPUs of this machine that get a worker process each: all, or numbers as 0,2.",
        autocompletion=complete("all", "0", "0,1"),
        rich_help_panel=_WHERE,
        show_default=False,
    ),
]
PerformanceOption = Annotated[
    Path | None,
    typer.Option(
        "--performance-report",
        help="Write Dask's performance report of the workers to this file (HTML).",
        rich_help_panel=_WHERE,
        show_default=False,
    ),
]
StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        help="Where tiles and kernel go in place of --out: s3://bucket/prefix, or file:///folder of a shared file "
        "system. Credentials come from the environment. (default: --out; a run remembers its store)",
        show_default=False,
    ),
]
MoreOption = Annotated[
    str,
    typer.Option(
        "--train",
        help="Train data to append, in the form of the run's: mnist5k[4000:5000], more.npy; ' + ' joins several.",
        rich_help_panel=_WHAT,
        autocompletion=complete_data,
        show_default=False,
    ),
]
RunArgument = Annotated[Path, typer.Argument(help="Run directory.", show_default=False, autocompletion=complete_run)]
