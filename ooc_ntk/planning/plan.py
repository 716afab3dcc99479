"""The plan: how a job will be run and what is promised, frozen, with JSON and a digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from ooc_ntk.errors import StorageError, newer
from ooc_ntk.units import format_bytes, format_count, format_seconds, held_item_bytes

from .budget import DRIVER_BYTES, WORKER_BYTES, Limits
from .factors import LayerFactors, Window
from .growth import Grown, kept_tiles
from .layers import layer_names
from .layout import Dataflow, Layout
from .memory import PANEL_PAGES_BYTES
from .projection import Projection
from .spans import DENSE, BlockShape, Choice, Contraction, Representation
from .superblocks import KeptPanels, Order, Superblock, kept_panels, panel_loads, superblocks
from .tasks import Task, TaskGraph
from .tiles import Range, SampleGrid
from .triangles import Triangles
from .workload import HeadRows

#: Version of the plan's JSON form; 2 came with layer rules, 3 with projections.
PLAN_FORMAT: Final = 3


@dataclass(frozen=True)
class PlannedBlock:
    """One parameter block and how its part of the Jacobian is held and contracted.

    Attributes:
        name: the layer's name.
        parameters: its parameter names.
        start: first Jacobian column.
        stop: one past the last.
        representation: ``dense``, ``factored`` or ``tokens``.
        contraction: ``gemm``, ``pairwise`` or ``matching``.
        held_bytes: bytes that its tiles take over all samples.
        flops: contraction FLOPs spent on it.
        source: ``rule`` or ``torch.func``.
        reason: why no layer rule derives it, empty if one does.
        factors: shapes of its factors, None if it has none.
        dense_bytes: bytes that its tiles would take as dense gradients.
        dense_flops: contraction FLOPs that these would take.
        fused: whether Gram matrices are multiplied and summed by the fused kernel (pairwise contraction on a device).
    """

    name: str
    parameters: tuple[str, ...]
    start: int
    stop: int
    representation: Representation
    contraction: Contraction
    held_bytes: int
    flops: int
    source: str = "torch.func"
    reason: str = ""
    factors: LayerFactors | None = None
    dense_bytes: int = 0
    dense_flops: int = 0
    fused: bool = False

    @property
    def columns(self) -> int:
        """Number of parameters (scalars) in the block."""
        return self.stop - self.start

    @property
    def choice(self) -> Choice:
        """How it is held and contracted."""
        return Choice(self.representation, self.contraction)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> PlannedBlock:
        """Make one of what JSON holds."""
        factors = fields["factors"]
        if factors is not None:
            window = factors["window"]
            if window is not None:
                window = Window(**{name: tuple(value) for name, value in window.items()})
            factors = LayerFactors(**{**factors, "window": window})
        return cls(**{**fields, "parameters": tuple(fields["parameters"]), "factors": factors})


@dataclass(frozen=True)
class Promise:
    """What the plan promises; ``info`` prints the measured values beside it.

    Attributes:
        host_bytes: peak resident memory of the process.
        device_bytes: peak device memory (0 on a CPU).
        disk_bytes: peak size of the run directory.
        seconds: wall-clock of all tasks.
        rows_seconds: the part spent deriving.
        kernel_seconds: the part spent contracting.
        pinned_bytes: the page-locked part of the host memory (0 on a CPU).
    """

    host_bytes: int
    device_bytes: int
    disk_bytes: int
    seconds: float
    rows_seconds: float
    kernel_seconds: float
    pinned_bytes: int = 0


@dataclass(frozen=True)
class Alternative:
    """The best layout of one dataflow that was considered, for the reader of the plan.

    Attributes:
        dataflow: its name.
        layout: tiles and passes in one phrase.
        seconds: what it would take, None if it does not fit.
        host_bytes: host memory it would need.
        disk_bytes: disk it would need.
        verdict: ``chosen``, or why not.
    """

    dataflow: str
    layout: str
    seconds: float | None
    host_bytes: int
    disk_bytes: int
    verdict: str


@dataclass(frozen=True)
class Plan:
    """How a job will be run: tiles, passes, representation per block, and the promises.

    Fields are in samples, columns, bytes and seconds; ``io_ratio`` is bytes moved over the lower bound (spill only).
    ``projection`` is that of a projected kernel, with its dim; ``structured`` names the weights whose part of R is made
    of hashes of both sides, ``from_factors`` those of them whose gradients are never formed; ``expected_error`` is the
    relative Frobenius error to be expected of the kernel, if a pilot was run, ``features_only`` says that no kernel is
    assembled, and ``heavy`` are the heaviest parameters by their global index, whose gradients are kept beside the
    features for the error bars. ``head`` is the linear head that has fewer rows than outputs,
    ``by_layer`` says that every layer's summand of the kernel is kept as well, and ``by_length`` that the texts of a
    tile are derived from short to long, each batch cut at its longest. ``order`` and ``superblock_tiles`` say how
    kernel tiles are grouped, and ``kept_bytes`` what memory is for panels that stay in it; ``moved_bytes`` (Q) and
    ``bound_bytes`` (LB) are what crosses the level from disk to host while contracting, promised and at least.
    ``saves_sums`` says that the sums of a superblock are saved while it is contracted, as it takes long.
    ``grown`` is the finished run whose entries are copied and not computed, if there is one. ``workers`` is the number
    of worker processes that the promises are for, each of which takes ``process_bytes`` of host memory; 0 where one
    process does all. ``triangles`` says how triangles are made up where that does not follow from ``superblock_tiles``.
    """

    kernel: str
    scale: str
    normalize: str | None
    precision: str
    device: str
    train_samples: int
    test_samples: int
    outputs: int
    rows_per_sample: int
    entries_per_sample: int
    columns: int
    method: str
    batch_size: int
    threads: int
    seed: int
    dataflow: Dataflow
    tile_samples: int
    span_columns: int
    passes: tuple[Range, ...]
    blocks: tuple[PlannedBlock, ...]
    flops: int
    bytes_read: int
    bytes_written: int
    io_ratio: float | None
    jacobian_bytes: int
    kernel_bytes: int
    task_count: int
    tolerance: float
    promised: Promise
    limits: Limits
    host_terms: Mapping[str, int]
    calibrated: bool
    reason: str
    alternatives: tuple[Alternative, ...]
    notes: tuple[str, ...]
    job_digest: str = ""
    projection: Projection | None = None
    structured: tuple[str, ...] = ()
    from_factors: tuple[str, ...] = ()
    expected_error: float | None = None
    features_only: bool = False
    heavy: tuple[int, ...] = ()
    heavy_share: float = 0.0
    head: HeadRows | None = None
    by_layer: bool = False
    by_length: bool = False
    order: Order = "square"
    superblock_tiles: int = 1
    kept_bytes: int = 0
    moved_bytes: int = 0
    bound_bytes: float = 0.0
    saves_sums: bool = False
    grown: Grown | None = None
    workers: int = 0
    process_bytes: int = 0
    triangles: Triangles | None = None

    @cached_property
    def superblocks(self) -> tuple[Superblock, ...]:
        """Kernel tiles grouped into what one task contracts; those that are copied are by themselves."""
        grid = self.sample_grid
        return superblocks(grid, self.order, self.superblock_tiles, kept_tiles(grid, self.grown), self.triangles)

    @cached_property
    def graph(self) -> TaskGraph:
        """Every task, and what each waits for."""
        return TaskGraph(
            self.sample_grid,
            self.superblocks,
            len(self.passes),
            in_memory=self.layout.in_memory,
            normalised=self.normalize is not None,
            features_only=self.features_only,
        )

    @cached_property
    def kept_panels(self) -> KeptPanels:
        """Panels that stay in memory once they were read, in that of the device if there is one."""
        if not self.kept_bytes:
            return KeptPanels()
        pages = 0 if self.device == "cpu" else PANEL_PAGES_BYTES
        sizes = [self.tile_samples * stored + pages for stored in self.layout.cut(self).stored]
        copied = kept_tiles(self.sample_grid, self.grown)
        return kept_panels(panel_loads(b for b in self.superblocks if b.name not in copied), sizes, self.kept_bytes)

    def finished_tiles(self, keys: Iterable[str]) -> int:
        """Kernel tiles (of features alone, row tiles) that are there, from the keys of finished tasks."""
        if self.features_only:
            return sum(key.startswith("rows-0-") for key in keys)
        last = len(self.passes) - 1
        tiles = {Task("kernel", last, *block.name).key: len(block.tiles) for block in self.superblocks}
        return sum(tiles.get(key, 0) for key in keys)

    def is_finished(self, keys: Iterable[str]) -> bool:
        """Whether every task is finished, by the keys of those that are."""
        return {task.key for task in self.graph.tasks()} <= set(keys)

    @property
    def tile_count(self) -> int:
        """Kernel tiles, or row tiles of features alone."""
        return self.sample_grid.row_tiles if self.features_only else self.sample_grid.kernel_tile_count

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers whose kernels are kept by themselves; empty if none are."""
        return layer_names(self.blocks) if self.by_layer else ()

    @property
    def layout(self) -> Layout:
        """Tiles, spans and passes."""
        choices = (DENSE,) if self.projection is not None else tuple(block.choice for block in self.blocks)
        return Layout(
            self.dataflow,
            self.tile_samples,
            self.span_columns,
            self.passes,
            choices,
            self.order,
            self.superblock_tiles,
            self.kept_bytes,
            self.triangles,
        )

    def host_bytes(self, workers: int) -> int:
        """Host memory that is promised for a number of worker processes; with 0 one process does all.

        A plan for one process counts what planning took in that process; workers are begun afresh and have Dask beside.
        """
        if workers == self.workers or not workers:
            return self.promised.host_bytes
        if self.workers:
            return self.promised.host_bytes + (workers - self.workers) * self.process_bytes
        return workers * (self.promised.host_bytes + WORKER_BYTES) + self.promised.host_bytes + DRIVER_BYTES

    @property
    def held_shapes(self) -> list[BlockShape]:
        """Columns and factors of what tiles are cut from: the blocks, or the features of a projected job."""
        if self.projection is not None:
            return [BlockShape(self.projection.dim or 0)]
        return [BlockShape(block.columns, block.factors) for block in self.blocks]

    @property
    def feature_bytes(self) -> int:
        """Bytes of the features of a projected job, 0 of an exact one."""
        dim = 0 if self.projection is None else self.projection.dim or 0
        return self.samples * self.rows_per_sample * dim * self.held_item_bytes

    @property
    def held_item_bytes(self) -> int:
        """Bytes of one element of a held tile."""
        return held_item_bytes(self.precision)

    @property
    def held_bytes(self) -> int:
        """Bytes of everything that is held of the Jacobian, over all samples."""
        return self.feature_bytes or sum(block.held_bytes for block in self.blocks)

    @property
    def sample_grid(self) -> SampleGrid:
        """The grid of sample tiles."""
        return SampleGrid(self.train_samples, self.test_samples, self.tile_samples)

    @property
    def samples(self) -> int:
        """Train and test samples together."""
        return self.train_samples + self.test_samples

    @property
    def kernel_shape(self) -> tuple[int, int]:
        """Shape of the kernel: (samples · entries, train samples · entries)."""
        return self.samples * self.entries_per_sample, self.train_samples * self.entries_per_sample

    @property
    def digest(self) -> str:
        """Digest of everything that changes the result's bits: not of rates, promises or free memory."""
        covered = {name: getattr(self, name) for name in _DIGESTED}
        if self.projection is not None:
            projected = [self.projection.identity, self.projection.backend, *self.structured, "", *self.from_factors]
            kept = [list(self.heavy), self.heavy_share, "features only" if self.features_only else "kernel"]
            covered["projection"] = [*projected, *kept]
        if self.by_layer:
            covered["by_layer"] = True
        if self.by_length:
            covered["by_length"] = True
        if self.superblock_tiles > 1:
            covered["superblocks"] = [self.order, self.superblock_tiles]
        if self.triangles is not None:
            covered["triangles"] = asdict(self.triangles)
        if self.head is not None:
            covered["head"] = asdict(self.head)
        if self.grown is not None:
            covered["grown"] = asdict(self.grown)
        covered["passes"] = [[span.start, span.stop] for span in self.passes]
        covered["blocks"] = [
            [b.name, b.parameters, b.start, b.stop, b.representation, b.contraction, b.source, _shape(b.factors)]
            for b in self.blocks
        ]
        fused = [b.name for b in self.blocks if b.fused]
        if fused:
            covered["fused"] = fused
        text = json.dumps(covered, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def to_json(self) -> str:
        """Serialise, digest included."""
        return json.dumps({"format": PLAN_FORMAT, "digest": self.digest, **asdict(self)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what :meth:`to_json` wrote.

        Raises:
            StorageError: if the text is no plan, is of a newer version, or was edited so that its digest differs.
        """
        try:
            fields: dict[str, Any] = json.loads(text)
            version, digest = fields.pop("format"), fields.pop("digest")
            if version > PLAN_FORMAT:
                raise newer("the plan", version, PLAN_FORMAT)
            if version < PLAN_FORMAT:
                raise StorageError(
                    f"the plan has format {version}, from an earlier version; this version reads {PLAN_FORMAT}: "
                    "make a new plan in another --out"
                )
            fields["passes"] = tuple(Range(**span) for span in fields["passes"])
            fields["blocks"] = tuple(PlannedBlock.from_fields(block) for block in fields["blocks"])
            fields["promised"] = Promise(**fields["promised"])
            fields["limits"] = Limits(**{**fields["limits"], "automatic": tuple(fields["limits"]["automatic"])})
            fields["alternatives"] = tuple(Alternative(**entry) for entry in fields["alternatives"])
            fields["notes"] = tuple(fields["notes"])
            fields["structured"] = tuple(fields["structured"])
            fields["from_factors"] = tuple(fields["from_factors"])
            fields["heavy"] = tuple(fields["heavy"])
            if fields.get("head") is not None:
                fields["head"] = HeadRows(**fields["head"])
            if fields.get("triangles") is not None:
                fields["triangles"] = Triangles(**fields["triangles"])
            if fields.get("grown") is not None:
                fields["grown"] = Grown(**fields["grown"])
            if fields["projection"] is not None:
                fields["projection"] = Projection(**fields["projection"])
            plan = cls(**fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise StorageError(f"cannot read the plan ({type(error).__name__}: {error}); make a new one") from error
        if plan.digest != digest:
            raise StorageError(
                f"the plan was changed after it was written (digest {plan.digest[:8]}, recorded {digest[:8]}); "
                "make a new one"
            )
        return plan

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON.

        Raises:
            StorageError: if the file cannot be written.
        """
        try:
            Path(path).write_text(self.to_json() + "\n")
        except OSError as error:
            raise StorageError(f"cannot write the plan {path}: {error.strerror}") from error

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that :meth:`save` wrote.

        Raises:
            StorageError: if the file is missing or is no plan.
        """
        try:
            text = Path(path).read_text()
        except OSError as error:
            raise StorageError(f"cannot read the plan {path}: {error.strerror}") from error
        try:
            return cls.from_json(text)
        except StorageError as error:
            raise StorageError(f"{path}: {error}") from error

    def summary(self) -> list[tuple[str, str]]:
        """The plan in label and value pairs, for every table that shows it."""
        rows, columns = self.kernel_shape
        promised, limits = self.promised, self.limits
        stored = "float32" if self.precision in ("bf16", "bf16x3") else self.precision
        what = f"{'projected ' if self.projection else ''}{self.kernel} kernel, {rows:,} × {columns:,} {stored}" + (
            f", {self.normalize}-normalised" if self.normalize else ""
        )
        if self.by_layer:
            what += f", and its summands by {len(self.layers)} layers"
        if self.precision == "bf16":
            what += ", tiles held and multiplied in bf16"
        elif self.precision == "bf16x3":
            what += ", multiplied as three products of bf16 parts"
        passes = f", {len(self.passes)} passes" if len(self.passes) > 1 else ""
        lines = [
            ("kernel", f"{what} ({format_bytes(self.kernel_bytes)})"),
            (
                "samples",
                f"{self.train_samples:,} train"
                + (f" + {self.test_samples:,} test" if self.test_samples else "")
                + f", {self.outputs} output{'s' if self.outputs != 1 else ''} each",
            ),
            ("Jacobian", self._jacobian()),
            *self._projected(),
            *([("head", str(self.head))] if self.head is not None else []),
            ("dataflow", f"{'features' if self.projection else self.dataflow}{passes}: {self.reason}"),
            ("tiles", self._tiles()),
            ("rows by", self._rows_by()),
            (
                "arithmetic",
                f"{format_count(self.flops)}FLOP contraction, {format_bytes(self.bytes_read)} read, "
                f"{format_bytes(self.bytes_written)} written"
                + (f", Q/LB {self.io_ratio:.2f}" if self.io_ratio is not None else ""),
            ),
            (
                "time",
                f"{format_seconds(promised.seconds)} (rows {format_seconds(promised.rows_seconds)}, "
                f"kernel {format_seconds(promised.kernel_seconds)})"
                + ("" if self.calibrated else "; not calibrated: run 'ooc-ntk calibrate' for a promise that holds"),
            ),
            (
                "host memory",
                f"{format_bytes(promised.host_bytes)} of {limits.describe('host')}"
                + (
                    f", {format_bytes(self.process_bytes)} in each of {self.workers} worker processes"
                    if self.workers > 1
                    else ""
                )
                + (f", {format_bytes(promised.pinned_bytes)} of it pinned" if promised.pinned_bytes else ""),
            ),
        ]
        if promised.device_bytes:
            lines.append(("device memory", f"{format_bytes(promised.device_bytes)} of {limits.describe('device')}"))
        lines.append(("disk", f"{format_bytes(promised.disk_bytes)} of {limits.describe('disk')}"))
        lines.append(("digest", self.digest[:12]))
        return lines

    def _projected(self) -> list[tuple[str, str]]:
        """The projection, what it holds, and the error to be expected of it."""
        if self.projection is None:
            return []
        backend, dim = self.projection.backend, self.projection.dim or 0
        sparse = f", {self.projection.nonzeros} non-zeros a parameter" if self.projection.nonzeros else ""
        lines = [
            (
                "projection",
                f"{self.projection.kind} to {dim:,} columns{sparse}, seed {self.projection.seed}, by {backend}; "
                f"features of {format_bytes(self.feature_bytes)}{', no kernel' if self.features_only else ''}",
            )
        ]
        if self.expected_error is not None:
            lines.append(("error", f"{self.expected_error:.2%} of the kernel expected (relative Frobenius norm)"))
        return lines

    def _jacobian(self) -> str:
        """Size of the Jacobian, and what is held of it."""
        size = f"{self.samples * self.rows_per_sample:,} rows × {self.columns:,} parameters"
        if self.head is not None:
            size += ", the head's counted for one output,"
        dense = format_bytes(self.jacobian_bytes)
        if self.projection is not None:
            return f"{size} ({dense} as gradients; projected, never held)"
        if self.held_bytes < self.jacobian_bytes:
            ratio = self.jacobian_bytes / self.held_bytes
            return f"{size} ({dense} as gradients; held as {format_bytes(self.held_bytes)}, {ratio:.1f} times less)"
        return f"{size} ({dense}{', never held whole' if self.dataflow != 'resident' else ''})"

    def _tiles(self) -> str:
        """Tile sizes and the number of tasks."""
        factored = sum(block.representation != "dense" for block in self.blocks)
        held = [f"{self.tile_samples:,} samples"]
        if self.projection is not None:
            width = f"{self.tile_samples:,} samples × {self.span_columns:,} columns of features"
            return f"{width}{self._grouped()}, {self.task_count:,} tasks"
        if factored < len(self.blocks):
            held.append(f"{self.span_columns:,} dense columns" if factored else f"{self.span_columns:,} columns")
        also = f" and {factored} factored block{'s' if factored != 1 else ''}" if factored else ""
        return f"{' × '.join(held)}{also}{self._grouped()}, {self.task_count:,} tasks"

    def _grouped(self) -> str:
        """How kernel tiles are grouped, and what stays in memory."""
        if self.superblock_tiles == 1 and not self.kept_bytes:
            return ""
        loads = panel_loads(self.superblocks)
        times = loads.total() / max(1, len(loads))
        found = f", {self.order}s of up to {self.superblock_tiles} kernel tiles" if self.superblock_tiles > 1 else ""
        kept = f", {format_bytes(self.kept_panels.bytes)} of them kept" if self.kept_bytes else ""
        return f"{found}, each panel needed {times:.1f} times{kept}"

    def _rows_by(self) -> str:
        """What derives the rows."""
        ruled = sum(block.source == "rule" for block in self.blocks)
        others = len(self.blocks) - ruled
        by = [f"layer rules ({ruled} block{'s' if ruled != 1 else ''})"] if ruled else []
        by += (
            [f"{self.method} ({others} block{'s' if others != 1 else ''})" if ruled else self.method] if others else []
        )
        threads = f"{self.threads} thread{'s' if self.threads != 1 else ''}"
        if self.workers:
            threads += (
                f" in {'each of ' if self.workers > 1 else ''}{self.workers} worker process{'es' * (self.workers > 1)}"
            )
        return f"{' and '.join(by)}, batch of {self.batch_size}, on {self.device} with {threads}"

    def __str__(self) -> str:
        """The plan as plain text: summary, alternatives, notes."""
        width = max(len(label) for label, _ in self.summary())
        lines = [f"{label:<{width}}  {value}" for label, value in self.summary()]
        for entry in self.alternatives:
            took = "does not fit" if entry.seconds is None else format_seconds(entry.seconds)
            lines.append(
                f"{'':<{width}}  - {entry.layout}: {took}, {format_bytes(entry.host_bytes)} host, "
                f"{format_bytes(entry.disk_bytes)} disk ({entry.verdict})"
            )
        lines.extend(f"{'note':<{width}}  {note}" for note in self.notes)
        return "\n".join(lines)


def _shape(factors: LayerFactors | None) -> list[Any] | None:
    """What of a block's factors changes the result: everything but the counted matches."""
    if factors is None:
        return None
    window = None if factors.window is None else list(asdict(factors.window).values())
    return [
        factors.kind,
        factors.positions,
        factors.inputs,
        factors.outputs,
        factors.bias,
        window,
        factors.lookups,
        factors.channels_first,
    ]


_DIGESTED: Final = (
    "kernel",
    "scale",
    "normalize",
    "precision",
    "device",
    "train_samples",
    "test_samples",
    "outputs",
    "rows_per_sample",
    "entries_per_sample",
    "columns",
    "method",
    "batch_size",
    "threads",
    "seed",
    "tile_samples",
    "span_columns",
    "job_digest",
)
