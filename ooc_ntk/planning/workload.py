"""What is to be computed, in numbers: the measured size of a job, free of tensors and of the machine's rates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ooc_ntk.errors import InputError
from ooc_ntk.units import held_item_bytes, item_bytes

from .factors import LayerFactors
from .projection import PilotMoments, Projection
from .spans import BlockShape


@dataclass(frozen=True)
class ParameterBlock:
    """The chosen parameters of one layer: the unit for which a plan chooses a representation.

    Attributes:
        name: the layer's name in the model (``"conv1"``), ``""`` for parameters of the model itself.
        parameters: names of its parameters, in the model's order.
        start: first column of the block in the Jacobian of the chosen parameters.
        stop: one past its last column.
        source: what derives it: ``rule`` (a layer rule) or ``torch.func``.
        reason: why no rule does, for the reader of the plan.
        factors: shapes of its factors, None if it has none and is only ever dense.
        expand_seconds: measured seconds to expand the factors of one sample, None where they were not timed.
        pairwise_seconds: measured seconds to contract one pair of samples pairwise, None where it was not timed.
        fused: whether the fused kernel was the faster way to do so.
    """

    name: str
    parameters: tuple[str, ...]
    start: int
    stop: int
    source: str = "torch.func"
    reason: str = ""
    factors: LayerFactors | None = None
    expand_seconds: float | None = None
    pairwise_seconds: float | None = None
    fused: bool = False

    @property
    def columns(self) -> int:
        """Number of parameters (scalars) in the block."""
        return self.stop - self.start


@dataclass(frozen=True)
class Derivation:
    """How Jacobian rows are derived, as the probe measured it on the real device.

    Attributes:
        method: ``"rules"`` (layer rules alone), or what derives the blocks that no rule covers: ``"loop"`` (batch-1
            autograd) or ``"vmap"`` (``torch.func``, vmap of vjp).
        batch_size: samples derived together.
        seconds_per_sample: time to derive every row of one sample for all parameters that no rule covers, in seconds.
        chain_seconds_per_sample: the part of it that does not shrink when fewer parameters are asked for (forward
            pass and the chain of activation gradients), in seconds.
        working_bytes: memory needed beside the results while one batch is derived, in bytes.
        activation_bytes: activations that the forward pass saves for one batch, in bytes.
        refused: the operation that ``vmap`` refused, or None.
        capture_seconds_per_sample: time to capture the layer factors of one sample, in seconds.
        batch_bytes: the part of ``working_bytes`` that grows with the batch, in bytes; the batch-1 loop has none.
    """

    method: str
    batch_size: int
    seconds_per_sample: float
    chain_seconds_per_sample: float
    working_bytes: int
    activation_bytes: int
    refused: str | None = None
    capture_seconds_per_sample: float = 0.0
    batch_bytes: int = 0

    def at(self, batch_size: int) -> Derivation:
        """The same in batches of another size: memory in proportion, times per sample as they are.

        >>> Derivation("vmap", 8, 0.1, 0.1, 100, 40, batch_bytes=80).at(2).working_bytes
        40
        """
        grown = -(-self.batch_bytes * batch_size // self.batch_size)
        return replace(
            self,
            batch_size=batch_size,
            working_bytes=self.working_bytes - self.batch_bytes + grown,
            batch_bytes=grown,
            activation_bytes=-(-self.activation_bytes * batch_size // self.batch_size),
        )


@dataclass(frozen=True)
class Sketched:
    """How a Jacobian is projected, and what that costs.

    Attributes:
        projection: with its dim and its backend.
        structured: weights whose part of R is made of hashes of both sides (a tensor sketch), by name.
        from_factors: those of them that are projected from their factors, where that is faster than from gradients.
        row_seconds: seconds to project one Jacobian row of all parameters, as timed.
        batch_seconds: seconds per batch to make R, which all its rows share, as timed.
        moments: what the size of the error depends on, from a pilot; None if there was none.
        features_only: whether features are all that is wanted, and no kernel.
        heavy: global indices of the heaviest parameters, in ascending order.
        heavy_share: their share of the sum of squared mean squares.
        batch_terms: bytes that a batch takes while it is projected, by term.
    """

    projection: Projection
    structured: tuple[str, ...] = ()
    from_factors: tuple[str, ...] = ()
    row_seconds: float = 0.0
    batch_seconds: float = 0.0
    moments: PilotMoments | None = None
    features_only: bool = False
    heavy: tuple[int, ...] = ()
    heavy_share: float = 0.0
    batch_terms: Mapping[str, int] = field(default_factory=dict)

    @property
    def dim(self) -> int:
        """Columns of the features."""
        assert self.projection.dim is not None
        return self.projection.dim


@dataclass(frozen=True)
class HeadRows:
    """A linear head with more outputs (C) than inputs (h), of which h rows in place of C give the trace kernel.

    Attributes:
        name: the layer's name.
        outputs: its outputs.
        width: its inputs.
    """

    name: str
    outputs: int
    width: int

    @property
    def pays(self) -> bool:
        """Whether fewer rows are derived: each costs a backward pass and its share of every product.

        >>> HeadRows("fc", 1000, 512).pays, HeadRows("fc", 10, 512).pays
        (True, False)
        """
        return self.width < self.outputs

    def __str__(self) -> str:
        return f"{self.width:,} backward passes in place of {self.outputs:,}, by {self.name or 'the layer'} = U Σ Vᵀ"


@dataclass(frozen=True)
class Workload:
    """A job measured: everything the planner needs to know about model and data.

    Attributes:
        kernel: ``trace``, ``pseudo``, ``output:c`` or ``full``.
        train_samples: samples whose kernel columns are wanted.
        test_samples: further samples that get rows but no columns.
        outputs: scalars of the output function per sample (C).
        rows_per_sample: Jacobian rows derived per sample: C for ``trace`` and ``full``, otherwise 1; fewer with a head.
        entries_per_sample: kernel rows per sample: C for ``full``, otherwise 1.
        blocks: the parameter blocks, in column order.
        sample_bytes: bytes of one sample's inputs and target.
        baseline_bytes: resident memory of the process with model and libraries loaded, before any task.
        planning_bytes: resident memory that calibration and probe reached, 0 if they stayed below an earlier peak.
        model_bytes: bytes of the model's parameters and buffers on the device.
        derivation: how rows are derived and what it costs.
        precision: ``float32``, ``tf32``, ``bf16``, ``bf16x3`` or ``float64``.
        scale: ``sum`` or ``mean``.
        normalize: None or ``cosine``.
        device: torch device string.
        smooth: whether the model has no operation whose derivative jumps (ReLU, max pooling, ...).
        cancelling: whether the output function cancels digits (loss and margin do: ``1 − p``; a user's function may).
        threads: CPU threads used by one task.
        seed: seed of the job.
        notes: remarks for the reader of the plan.
        sketch: how its Jacobian is projected, None for the exact kernel.
        head: the head whose rows are fewer than its outputs, None if every output has a row.
        by_layer: whether every layer's summand of the kernel is wanted as well.
        by_length: whether the texts of a tile are derived from short to long, each batch cut at its longest.
        loader_bytes: resident memory of the processes that decode images, in bytes.
        saved_bytes: bytes of the weights that are kept in the run directory, 0 where the job names what they are.
        live_bytes: bytes of live tensors and arrays of the job, which worker processes are sent.
        workers: worker processes that do the tasks, each with so many threads; 0 where one process does all.
    """

    kernel: str
    train_samples: int
    test_samples: int
    outputs: int
    rows_per_sample: int
    entries_per_sample: int
    blocks: tuple[ParameterBlock, ...]
    sample_bytes: int
    baseline_bytes: int
    model_bytes: int
    derivation: Derivation
    precision: str = "float32"
    scale: str = "sum"
    normalize: str | None = None
    device: str = "cpu"
    smooth: bool = False
    cancelling: bool = False
    threads: int = 1
    seed: int = 0
    planning_bytes: int = 0
    notes: tuple[str, ...] = ()
    sketch: Sketched | None = None
    head: HeadRows | None = None
    by_layer: bool = False
    by_length: bool = False
    loader_bytes: int = 0
    saved_bytes: int = 0
    live_bytes: int = 0
    workers: int = 0

    def __post_init__(self) -> None:
        """Check what a caller could get wrong."""
        if self.train_samples < 1:
            raise InputError("the training data is empty: a kernel needs at least one sample")
        if not self.blocks or self.columns < 1:
            raise InputError("no parameters are left to differentiate; widen the parameter patterns")

    @property
    def held_shapes(self) -> list[BlockShape]:
        """Columns and factors of every block, as tiles are cut from them."""
        return [BlockShape(block.columns, block.factors) for block in self.blocks]

    @property
    def samples(self) -> int:
        """Train and test samples together."""
        return self.train_samples + self.test_samples

    @property
    def pairs(self) -> float:
        """Pairs of samples to contract: each unordered pair of train samples once (half of N²), every test × train."""
        return self.train_samples**2 / 2 + self.test_samples * self.train_samples

    @property
    def columns(self) -> int:
        """Chosen parameters in all (P)."""
        return self.blocks[-1].stop

    @property
    def item_bytes(self) -> int:
        """Bytes of one Jacobian or kernel element."""
        return item_bytes(self.precision)

    @property
    def held_item_bytes(self) -> int:
        """Bytes of one element of a held tile."""
        return held_item_bytes(self.precision)

    @property
    def jacobian_bytes(self) -> int:
        """Bytes of the whole dense Jacobian: samples × rows per sample × parameters."""
        return self.samples * self.rows_per_sample * self.columns * self.held_item_bytes

    @property
    def kernel_bytes(self) -> int:
        """Bytes of the whole kernel, both triangles."""
        return self.samples * self.train_samples * self.entries_per_sample**2 * self.item_bytes
