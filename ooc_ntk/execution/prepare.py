"""From a job to a measured workload: load, check, probe."""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from ooc_ntk.compute.check import checked_structure, with_matches
from ooc_ntk.compute.contract import TORCH_DTYPE, check_precision, measure_block, tf32
from ooc_ntk.compute.discover import find_structure
from ooc_ntk.compute.features import FeatureModel, feature_model
from ooc_ntk.compute.functions import ClipOutput, SampleFunction
from ooc_ntk.compute.heads import narrowed
from ooc_ntk.compute.jacobian import ModelBatch, ModelFunction
from ooc_ntk.compute.machine import (
    device_memory,
    free_host_bytes,
    resident_bytes,
    return_free_memory,
    steady_allocator,
)
from ooc_ntk.compute.model import check_finite_state, check_mode, choose_parameters, model_digest, parameter_blocks
from ooc_ntk.compute.outputs import OutputRows
from ooc_ntk.compute.probe import LARGEST_CAPTURE, LARGEST_PROJECTED, CaptureFailed, Probe, look_at, probe
from ooc_ntk.compute.rules.table import registered_rules
from ooc_ntk.compute.structure import Structure
from ooc_ntk.errors import DataChangedError, InputError, RunConflictError
from ooc_ntk.inputs.images.spec import is_image_spec
from ooc_ntk.inputs.job import Job
from ooc_ntk.inputs.samples import Samples, digest_samples
from ooc_ntk.planning.budget import Limits, Resources
from ooc_ntk.planning.factors import LayerFactors
from ooc_ntk.planning.layers import FEATURES
from ooc_ntk.planning.memory import LIBRARY_GROWTH_BYTES
from ooc_ntk.planning.outputs import PER_CLASS, OutputSpec
from ooc_ntk.planning.plan import Plan
from ooc_ntk.planning.projection import SPARSE_KINDS, sketch_digest
from ooc_ntk.planning.tiles import Range
from ooc_ntk.planning.workload import HeadRows, ParameterBlock, Workload

from .blame import failing_on
from .context import SampleReader, joined
from .lengths import cut_share
from .pilot import measure_sketch

logger = logging.getLogger(__name__)

#: Samples spread over train and test that are compared alone and together where a model branches on data.
SPREAD_SAMPLES = 16

#: Samples whose tokens are compared to price the contraction of embeddings.
MATCHED_SAMPLES = 16

#: Counted FLOPs that differ by this factor decide between two contractions without timing them.
DECIDED = 6.0

#: Positions of the tile on which both are timed, all samples together.
TIMED_POSITIONS = 1024

#: Pairs of the bank that ``outputs="clip"`` sets every sample against, drawn from the train samples (TRAK's number).
BANK_SAMPLES = 300

#: Samples of it that are run together (a choice: small beside any budget that takes the model).
BANK_BATCH = 16

#: Samples of train and of test that are read twice before anything is computed, spread evenly, to catch data sets that
#: augment at random.
READ_TWICE_SAMPLES = 4


@dataclass(frozen=True)
class PreparedJob:
    """A job loaded and checked.

    Attributes:
        job: the job.
        module: its model.
        device: resolved torch device string.
        function: model and chosen parameters on the device.
        reader: train and test samples.
        outputs: the output function, or its name.
        digests: digests of model, data and kernel settings.
        stand_ins: the same job with another head, by the head's name, once planning has made it.
    """

    job: Job
    module: nn.Module
    device: str
    function: ModelFunction
    reader: SampleReader
    outputs: str | SampleFunction
    digests: dict[str, str]
    stand_ins: dict[str, PreparedJob] = field(default_factory=dict, compare=False, repr=False)

    def batch_of(self, indices: Sequence[int]) -> ModelBatch:
        """Some samples by their numbers, on the device."""
        pieces = [next(self.reader.pieces(Range(index, index + 1), 1))[1] for index in indices]
        return _joined(pieces).to(self.device, self.job.precision)

    def sketch_digest(self, plan: Plan) -> str:
        """Digest of what features of this job share with those that may be multiplied with them; empty if exact."""
        if plan.projection is None:
            return ""
        settings = [self.job.kernel, output_identity(self.outputs)]
        model = "/".join([self.digests["model"], *settings])
        return sketch_digest(plan.projection, plan.structured, self.function.names, model)

    @property
    def digest(self) -> str:
        """Digest of the whole job."""
        return hashlib.blake2b("".join(self.digests.values()).encode(), digest_size=16).hexdigest()


def resolved_device(device: str | None) -> str:
    """The device of a job: CUDA if there is one and none was named."""
    if device is not None:
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def prepare(job: Job) -> PreparedJob:
    """Load model and data of a job and check them.

    Args:
        job: the job.

    Returns:
        The prepared job.

    Raises:
        InputError: if the model's mode, weights or parameters, or the data, are not usable.
    """
    module = job.module()
    check_mode(module)
    check_finite_state(module)
    device = resolved_device(job.device)
    check_precision(job.precision, device)
    reader = SampleReader(job.train_source(), job.test_source())
    digest = model_digest(module)
    if job.of_features:
        place = next(iter([*module.parameters(), *module.buffers()]), torch.zeros(()))
        first = next(reader.pieces(Range(0, 1), 1))[1]
        module = feature_model(module, _joined([first]).placed_as(place), job.kernel)
        names = choose_parameters(module, [f"{FEATURES}.*"])
    else:
        names = choose_parameters(module, job.parameters)
    outputs = job.output_function()
    if outputs == "clip":
        outputs = _against_bank(job, module, reader, device)
    function = ModelFunction(module, names, OutputRows.of(outputs, job.kernel), job.precision, device)
    data = job.data_digests()
    settings = [
        job.kernel,
        job.scale,
        str(job.normalize),
        job.precision,
        output_identity(outputs),
        *names,
        *([] if job.sketch is None else [job.sketch.identity]),
        *([] if job.by is None else [f"by {job.by}"]),
    ]
    return PreparedJob(
        job=job,
        module=module,
        device=device,
        function=function,
        reader=reader,
        outputs=outputs,
        digests={
            "model": digest,
            "data": _digest("/".join(data)),
            "kernel": _digest("\n".join(settings)),
        },
    )


def _against_bank(job: Job, module: nn.Module, reader: SampleReader, device: str) -> ClipOutput:
    """The contrastive output function against pairs drawn from the train samples by the job's seed."""
    train = len(reader.train)
    chosen = np.random.default_rng(job.seed).choice(train, min(BANK_SAMPLES, train), replace=False)
    # A function of some bank brings (image, text) side by side; this one is never evaluated.
    pairs = OutputRows.of(ClipOutput(torch.zeros(1, 1), torch.zeros(1, 1)), job.kernel)
    function = ModelFunction(module, (), pairs, job.precision, device)
    found = []
    for start in range(0, len(chosen), BANK_BATCH):
        pieces = [next(reader.pieces(Range(i, i + 1), 1))[1] for i in map(int, chosen[start : start + BANK_BATCH])]
        batch = _joined(pieces).to(device, job.precision)
        with torch.no_grad(), tf32(allowed=False), failing_on("the bank of train samples"):
            found.append(function.logits({}, batch).cpu())
    images, texts = torch.cat(found).chunk(2, dim=1)
    return ClipOutput(images, texts)


def output_identity(outputs: str | SampleFunction) -> str:
    """What identifies an output function: its name, or what it is made of."""
    if isinstance(outputs, str):
        return outputs
    return outputs.identity if isinstance(outputs, ClipOutput) else callable_identity(outputs)


def callable_identity(function: Callable[..., Any]) -> str:
    """What identifies a user's function: its source, its defaults and the values it closes over."""
    if isinstance(function, functools.partial):
        given = _value_identity(function.args), _value_identity(function.keywords)
        return f"{callable_identity(function.func)} {' '.join(given)}"
    try:
        parts = [inspect.getsource(function)]
    except (OSError, TypeError):
        parts = [f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', repr(type(function)))}"]
    if inspect.isfunction(function):
        closed = inspect.getclosurevars(function).nonlocals
        parts += [_value_identity(value) for value in (function.__defaults__, function.__kwdefaults__, closed)]
    else:
        parts.append(_value_identity(getattr(function, "__dict__", {})))
    # Addresses of objects differ from process to process.
    return re.sub(r" at 0x[0-9a-f]+", "", " ".join(parts))


def _value_identity(value: object) -> str:
    """What identifies a value: of tensors and arrays their bytes, which their text form leaves out."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().resolve_conj().resolve_neg()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    if isinstance(value, np.ndarray) and value.dtype != object:
        content = hashlib.blake2b(np.ascontiguousarray(value).tobytes(), digest_size=16).hexdigest()
        return f"array {value.dtype} {value.shape} {content}"
    if isinstance(value, dict):
        items = sorted(f"{key!r}: {_value_identity(item)}" for key, item in value.items())
        return f"{{{', '.join(items)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value_identity, value))}]"
    return repr(value)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def available_resources(device: str, disk_free: int) -> Resources:
    """What the machine has free for this process now."""
    free, taken = device_memory(device)
    return Resources(free_host_bytes(), resident_bytes(), free, taken, disk_free)


def with_head(prepared: PreparedJob, name: str) -> PreparedJob:
    """The same job with a narrow head in the place of the named one, as a plan has it.

    Raises:
        RunConflictError: if these weights, or this model, do not allow it.
    """
    if name not in prepared.stand_ins:
        found = find_head(prepared)
        if found is None or found.name != name:
            raise RunConflictError(
                f"the plan derives fewer rows than outputs by the layer {name!r}, which this model does not allow; "
                "make a new plan in another --out"
            )
    return prepared.stand_ins[name]


def find_head(prepared: PreparedJob) -> HeadRows | None:
    """The head of a model whose trace kernel needs fewer rows than outputs; None where every output needs one.

    Only where the kernel is the exact trace of the raw logits, and gradients along a random combination agree on the
    first and the last sample of train and test.
    """
    job, reader = prepared.job, prepared.reader
    if job.kernel != "trace" or prepared.outputs != "logits" or job.sketch is not None:
        return None
    train = len(reader.train)
    ends = sorted({0, train - 1, *([train, len(reader) - 1] if reader.test is not None else [])})
    batches = [first_samples(prepared, 1, number) for number in ends]
    with tf32(allowed=False):
        both = narrowed(prepared.function, batches, job.precision, prepared.device)
    if both is None:
        return None
    made, function = both
    found = HeadRows(made.name, made.outputs, made.width)
    prepared.stand_ins[made.name] = replace(prepared, module=made.module, function=function)
    return found if found.pays else None


def measure(
    prepared: PreparedJob, limits: Limits, *, layer_rules: bool = True, timed: bool = True, every_output: bool = False
) -> Workload:
    """Probe a prepared job on its device.

    Args:
        prepared: the job.
        limits: the budget, which bounds the batch that is tried.
        layer_rules: False leaves everything to ``torch.func``.
        timed: whether contractions are timed where formulas do not decide.
        every_output: True derives a row for every output, even where a linear head allows fewer.

    Returns:
        The workload.

    Raises:
        InputError: if the model cannot be run or differentiated on its data.
        DataChangedError: if samples read twice differ.
        BudgetError: if not even one sample can be derived within the budget.
    """
    job, reader = prepared.job, prepared.reader
    first = _read_twice(reader)
    train = len(reader.train)
    head = None
    if not every_output:
        look_at(prepared.function, first_samples(prepared, 1))  # what is wrong with the model is said first
        head = find_head(prepared)
        if head is not None:
            prepared = with_head(prepared, head.name)
    function = prepared.function

    fetch = partial(first_samples, prepared)
    on_cpu = prepared.device == "cpu"
    taken = resident_bytes() + LIBRARY_GROWTH_BYTES
    free = limits.host - taken if on_cpu else limits.device - device_memory(prepared.device)[1]
    machine = free_host_bytes() if on_cpu else device_memory(prepared.device)[0]
    with tf32(allowed=False), steady_allocator():
        look = look_at(function, fetch(1))
        function.structure = Structure()
        if layer_rules:
            function.structure = structure_of(prepared, look.rows_per_sample)
        batch_size = 1 if job.allow_batch_dependence else job.batch_size
        dense = job.sketch is not None and job.sketch.kind not in SPARSE_KINDS
        largest = LARGEST_PROJECTED if dense and not on_cpu else LARGEST_CAPTURE
        while True:
            blocks = parameter_blocks(prepared.module, function.names, function.structure)
            others = next((block.parameters for block in blocks if block.source != "rule"), ())
            try:
                found = probe(function, fetch, train, free, machine, batch_size, others, function.structure, largest)
                break
            except CaptureFailed as failure:
                function.structure = _without_guesses(function.structure, str(failure))
        if layer_rules:
            _FOUND[prepared.module] = (_found_for(prepared), function.structure)
        size, counted = found.derivation.batch_size, min(MATCHED_SAMPLES, train)
        batches = (fetch(min(size, counted - start), start) for start in range(0, counted, size))
        blocks = with_matches(blocks, function, function.structure, batches, look.rows_per_sample)
        if timed:
            blocks = _with_timings(blocks, prepared, found.rows_per_sample)
    if reader.test is not None:
        try:
            look = look_at(function, fetch(1, train))
        except InputError as error:
            raise InputError(f"test data: {error}") from error
        if look.outputs != found.outputs:
            raise InputError(
                f"the model has {found.outputs} outputs for a train sample and {look.outputs} for a test sample; "
                "both must have the same"
            )
    shorter = None
    if job.sketch is None:
        with steady_allocator():
            shorter = cut_share(function, reader, found.rows_per_sample, prepared.device, job.precision)
    derivation = found.derivation
    if shorter is not None:
        derivation = replace(
            derivation,
            seconds_per_sample=shorter * derivation.seconds_per_sample,
            chain_seconds_per_sample=shorter * derivation.chain_seconds_per_sample,
            capture_seconds_per_sample=shorter * derivation.capture_seconds_per_sample,
        )
    sketch = None
    if job.sketch is not None:
        with tf32(allowed=False), steady_allocator():
            sketch = measure_sketch(prepared, blocks, found.derivation, found.rows_per_sample)
    return_free_memory()
    values = [*first.args, *first.kwargs.values(), *([first.targets] if first.targets is not None else [])]
    full = job.kernel == "full"
    return Workload(
        kernel=job.kernel,
        train_samples=train,
        test_samples=len(reader) - train,
        outputs=found.outputs if head is None else head.outputs,
        rows_per_sample=found.rows_per_sample,
        entries_per_sample=found.rows_per_sample if full else 1,
        blocks=blocks,
        sample_bytes=sum(value.numel() * value.element_size() for value in values) // len(values[0]) + 1,
        baseline_bytes=resident_bytes(),
        model_bytes=prepared.function.state_bytes,
        derivation=derivation,
        precision=job.precision,
        scale=job.scale,
        normalize=job.normalize,
        device=prepared.device,
        smooth=found.smooth,
        cancelling=not (isinstance(prepared.outputs, str) and OutputSpec.parse(prepared.outputs).name in PER_CLASS),
        threads=torch.get_num_threads(),
        seed=job.seed,
        notes=(*_notes(prepared, found, blocks), *_length_notes(reader, shorter is not None)),
        sketch=sketch,
        head=head,
        by_layer=job.by is not None,
        by_length=shorter is not None,
        # A process that is forked begins with all that its parent has, shared until it is written.
        loader_bytes=job.loader_workers * (resident_bytes() + LIBRARY_GROWTH_BYTES),
    )


#: Checked structures of live models, so that running a plan in the process that made it finds nothing twice; each with
#: what it was found for.
_FOUND: WeakKeyDictionary[nn.Module, tuple[object, Structure]] = WeakKeyDictionary()


def _found_for(prepared: PreparedJob) -> object:
    """What a structure depends on beside the model's identity."""
    return prepared.digest, prepared.job.allow_batch_dependence, registered_rules()


def known_structure(prepared: PreparedJob) -> Structure | None:
    """The checked structure of this very model, weights and data, if this process planned the job."""
    found_for, structure = _FOUND.get(prepared.module, (None, None))
    return structure if found_for == _found_for(prepared) else None


def _without_guesses(structure: Structure, failure: str) -> Structure:
    """What is left of a structure that holds for a few samples and not for a whole batch.

    First bare parameters go, whose sample axis is a guess: ``table[:length]`` takes all of a few samples and a part of
    many. If there are none, everything is left to ``torch.func``.
    """
    guessed = [name for name, layer in structure.layers.items() if layer.kind == "shared"]
    reason = f"layer rules hold for a few samples at a time and not for a whole batch ({failure})"
    return structure.without(dict.fromkeys(guessed or structure.layers, reason))


def first_samples(prepared: PreparedJob, count: int, start: int = 0) -> ModelBatch:
    """Some of a job's samples, train before test, on its device."""
    reader = prepared.reader
    _, samples = next(reader.pieces(Range(start, min(start + count, len(reader))), count))
    batch = ModelBatch(samples.args, samples.kwargs, samples.targets)
    return batch.to(prepared.device, prepared.job.precision)


def structure_of(prepared: PreparedJob, rows: int) -> Structure:
    """Find what layer rules cover of a job's model, and compare it with autograd.

    Args:
        prepared: the job.
        rows: Jacobian rows per sample.

    Raises:
        InputError: if a sample's outputs change with its batch mates, or a user's rule is wrong.
    """
    # The first sample and the last one, a test sample if there are any: they are the likeliest to differ in kind.
    ends = [first_samples(prepared, 1, start) for start in sorted({0, len(prepared.reader) - 1})]
    structure = discover(prepared)
    if prepared.job.allow_batch_dependence:
        for end in ends:  # alone, as every batch will be
            structure = checked_structure(prepared.function, structure, end, rows)
        return structure
    same = all(_shapes(ends[0]) == _shapes(end) for end in ends)
    return checked_structure(prepared.function, structure, _together(ends) if same else ends[0], rows)


def discover(prepared: PreparedJob) -> Structure:
    """Find what layer rules may cover of a job's model, not yet compared with autograd.

    Raises:
        InputError: if a sample's outputs change with its batch mates.
    """
    job, reader = prepared.job, prepared.reader

    def read(indices: Sequence[int]) -> list[Samples]:
        return [next(reader.pieces(Range(index, index + 1), 1))[1] for index in indices]

    def batch(pieces: Sequence[Samples]) -> ModelBatch:
        return _joined(pieces).to(prepared.device, job.precision)

    train, last = len(reader.train), len(reader) - 1
    spread = sorted({round(part * (train - 1) / (SPREAD_SAMPLES - 1)) for part in range(SPREAD_SAMPLES)})
    found = read(spread)
    if any(_shapes(each) != _shapes(found[0]) for each in found):
        return Structure(reasons=dict.fromkeys(prepared.function.names, "samples have different shapes"))
    if reader.test is not None:
        ends = read([train, last])
        if any(_shapes(each) != _shapes(found[0]) for each in ends):
            # Factors are laid out for samples of one shape; the model may still take both.
            return Structure(reasons=dict.fromkeys(prepared.function.names, "test samples have another shape"))
        found += ends
    return find_structure(
        prepared.function,
        batch(read(range(min(3, train)))),
        batch(found),
        single=job.allow_batch_dependence,
    )


def _shapes(samples: Samples | ModelBatch) -> list[object]:
    """Shapes of a sample's inputs, and whether it has a target."""
    values = (*samples.args, *(samples.kwargs[name] for name in sorted(samples.kwargs)))
    return [samples.targets is None, *(value.shape[1:] for value in values)]


def _together(batches: Sequence[ModelBatch]) -> ModelBatch:
    """Batches as one."""
    first = batches[0]
    targets = [batch.targets for batch in batches if batch.targets is not None]
    return ModelBatch(
        tuple(torch.cat([batch.args[index] for batch in batches]) for index in range(len(first.args))),
        {name: torch.cat([batch.kwargs[name] for batch in batches]) for name in first.kwargs},
        torch.cat(targets) if targets else None,
    )


def _joined(pieces: Sequence[Samples]) -> ModelBatch:
    """Single samples as one batch."""
    whole = joined(pieces)
    return ModelBatch(whole.args, whole.kwargs, whole.targets)


def _with_timings(blocks: Sequence[ParameterBlock], prepared: PreparedJob, rows: int) -> tuple[ParameterBlock, ...]:
    """Time both contractions of blocks for which the counted FLOPs do not decide by far."""
    entries = rows if prepared.job.kernel == "full" else 1
    precision, device, samples = prepared.job.precision, prepared.device, len(prepared.reader)
    timed: dict[LayerFactors, tuple[float, float]] = {}
    found = []
    for block in blocks:
        factors = block.factors
        if factors is None or factors.kind == "tokens" or factors.single:
            found.append(block)
            continue
        pairs = max(1.0, samples / 2)
        gemm = factors.dense_pair_flops(rows, entries) + factors.expand_flops(rows) / pairs
        ratio = factors.pairwise_pair_flops(rows, entries) / gemm
        if not 1 / DECIDED < ratio < DECIDED:
            found.append(block)
            continue
        if factors not in timed:
            tile = max(2, min(samples, TIMED_POSITIONS // factors.positions))
            timed[factors] = measure_block(factors, rows, entries, precision, device, tile)
        expand, pairwise = timed[factors]
        found.append(replace(block, expand_seconds=expand, pairwise_seconds=pairwise))
    return tuple(found)


def _notes(prepared: PreparedJob, found: Probe, blocks: Sequence[ParameterBlock]) -> tuple[str, ...]:
    """Remarks that the reader of the plan should see."""
    notes = []
    if isinstance(prepared.job.model, str):
        notes.append("the model was built from its spec and put in eval mode")
    named = [
        f"{what} {data}" for what, data in (("train", prepared.job.train), ("test", prepared.job.test)) if _named(data)
    ]
    if named:
        notes.append(f"images are {', '.join(named)}")
    if isinstance(prepared.module, FeatureModel):
        notes.append(f"features are {prepared.module.describe()}")
    structure = prepared.function.structure
    if structure is not None and structure.layers:
        by_reason: dict[str, list[str]] = {}
        for block in blocks:
            if block.source != "rule":
                by_reason.setdefault(block.reason, []).append(block.name or "(model)")
        for reason, names in by_reason.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            notes.append(f"by torch.func, not by a layer rule: {', '.join(names[:3])}{more}: {reason}")
        if structure.branches:
            notes.append(
                "the model asks for values of tensors in its forward pass, so it may branch on data; its outputs for "
                f"{SPREAD_SAMPLES} samples spread over the data are the same alone and in a batch"
            )
    elif structure is not None and structure.reasons:
        notes.append(f"no layer rules: {next(iter(structure.reasons.values()))}")
    if prepared.job.allow_batch_dependence:
        notes.append("every sample is computed alone, whatever its batch mates would change")
    if found.derivation.refused:
        notes.append(f"rows by the batch-1 loop, as vmap refused: {found.derivation.refused}")
    dtypes = {parameter.dtype for parameter in prepared.module.parameters()} - {TORCH_DTYPE[prepared.job.precision]}
    if dtypes:
        held = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        notes.append(f"the model's {held} weights are computed with in {prepared.job.precision}")
    asked = prepared.job.batch_size
    if asked is not None and found.derivation.batch_size < min(asked, len(prepared.reader.train)):
        notes.append(
            f"the batch size is {found.derivation.batch_size}, not {asked} as asked: more does not fit the budget"
        )
    frozen = [name for name, parameter in prepared.module.named_parameters() if not parameter.requires_grad]
    if frozen:
        notes.append(f"{len(frozen)} frozen parameters (requires_grad=False) are left out")
    return tuple(notes)


def _named(data: object) -> bool:
    """Whether data are images by name, whose preprocessing is part of the name."""
    return isinstance(data, str) and is_image_spec(data)


def _length_notes(reader: SampleReader, cut: bool) -> tuple[str, ...]:
    """How long texts are, and whether batches are cut."""
    length, lengths = reader.train.length, reader.train.lengths
    if length is None or lengths is None:
        return ()
    mean = float(lengths.double().mean())
    how = "from short to long, each batch cut at its longest" if cut else "all at that length"
    return (f"texts are padded to {length} tokens, {mean:.1f} of them real on average; they are derived {how}",)


def _read_twice(reader: SampleReader) -> Samples:
    """Read a few samples of train and test twice, spread over each.

    Returns:
        The first train sample.

    Raises:
        DataChangedError: if the readings differ.
        InputError: if there are no samples.
    """
    train = len(reader.train)
    if not train:
        raise InputError("the training data is empty: a kernel needs at least one sample")
    spread = {round(part * (train - 1) / (READ_TWICE_SAMPLES - 1)) for part in range(READ_TWICE_SAMPLES)}
    if len(reader) > train:
        last = len(reader) - 1 - train
        spread |= {train + round(part * last / (READ_TWICE_SAMPLES - 1)) for part in range(READ_TWICE_SAMPLES)}
    first: Samples | None = None
    for index in sorted(spread):
        piece = Range(index, index + 1)
        (_, once), (_, again) = (next(reader.pieces(piece, 1)) for _ in range(2))
        if digest_samples(once) != digest_samples(again):
            kind, shift = ("train", 0) if index < train else ("test", train)
            raise DataChangedError(
                f"reading {kind} sample {index - shift} twice gave different values; a data set must return the same "
                "sample for the same index: switch off shuffling and random augmentation"
            )
        first = first or once
    assert first is not None  # there is at least one train sample
    return first
