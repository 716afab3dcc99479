"""From a prepared job to a measured workload: structure, probe, timings, and remarks for the reader of the plan."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from ooc_ntk.compute.check import checked_structure, with_matches
from ooc_ntk.compute.contract import TORCH_DTYPE, measure_block, measure_fused, tf32
from ooc_ntk.compute.discover import find_structure
from ooc_ntk.compute.features import FeatureModel
from ooc_ntk.compute.jacobian import ModelBatch
from ooc_ntk.compute.machine import (
    device_memory,
    free_host_bytes,
    resident_bytes,
    return_free_memory,
    steady_allocator,
)
from ooc_ntk.compute.model import parameter_blocks
from ooc_ntk.compute.probe import LARGEST_CAPTURE, LARGEST_PROJECTED, CaptureFailed, Probe, look_at, probe
from ooc_ntk.compute.rules.table import registered_rules
from ooc_ntk.compute.structure import Structure
from ooc_ntk.errors import DataChangedError, InputError
from ooc_ntk.inputs.images.spec import is_image_spec
from ooc_ntk.inputs.job import LIVE, Job
from ooc_ntk.inputs.joined import split_joined
from ooc_ntk.inputs.samples import Samples, digest_samples
from ooc_ntk.planning.budget import Limits
from ooc_ntk.planning.factors import LayerFactors
from ooc_ntk.planning.memory import DEVICE_POSITIONS, LIBRARY_GROWTH_BYTES
from ooc_ntk.planning.outputs import PER_CLASS, OutputSpec
from ooc_ntk.planning.tiles import Range
from ooc_ntk.planning.workload import Derivation, ParameterBlock, Workload
from ooc_ntk.units import item_bytes

from .context import SampleReader
from .lengths import cut_share
from .pilot import measure_sketch
from .prepare import PreparedJob, find_head, first_samples, joined_batch, with_head

logger = logging.getLogger(__name__)

#: Samples spread over train and test that are compared alone and together where a model branches on data.
SPREAD_SAMPLES = 16


#: Samples whose tokens are compared to price the contraction of embeddings.
MATCHED_SAMPLES = 16


#: Counted FLOPs that differ by this factor decide between two contractions without timing them.
DECIDED = 6.0

#: Nor does anything where the lower count of a block is no more than this for all pairs of samples, on a CPU: a tenth
#: of a second at 40 GFLOP/s, and timing both takes as long (measured on a small convolutional network, 1e9: 0.10 s to
#: choose between 0.006 and 0.008 s). That a wrong choice of the counts costs more than that is possible, up to
#: DECIDED times as long.
UNTIMED_FLOPS = 4e9


#: Positions of the tile on which both are timed, all samples together.
TIMED_POSITIONS = 1024


#: The same on a device: one whole block of a pairwise contraction.
DEVICE_TIMED_POSITIONS = DEVICE_POSITIONS[0]


#: Bytes of the factors of such a tile at most, which are made twice (a choice).
DEVICE_TIMED_BYTES = 2**28


#: Samples of train and of test that are read twice before anything is computed, spread evenly, to catch data sets that
#: augment at random.
READ_TWICE_SAMPLES = 4


#: Host bytes that the pilot of a projection takes beside a batch: Numba, and features of some samples (measured: 160 to
#: 275 MiB).
PILOT_BYTES = 280 * 2**20


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
        dense = job.sketch is not None and not job.sketch.about.sparse
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
            piloted = _leaving_room(found.derivation, limits.host) if on_cpu else found.derivation
            sketch = measure_sketch(prepared, blocks, piloted, found.rows_per_sample)
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
        saved_bytes=_saved_bytes(job),
        live_bytes=_live_bytes(job),
    )


def _leaving_room(derivation: Derivation, limit: int) -> Derivation:
    """The same in batches in which a pilot stays within the budget, as far as that goes.

    Without it a budget that would do for the run could be spent before the run begins.
    """
    room = limit - resident_bytes() - PILOT_BYTES
    while derivation.batch_size > 1 and derivation.working_bytes > room:
        derivation = derivation.at(derivation.batch_size // 2)
    return derivation


def _saved_bytes(job: Job) -> int:
    """Bytes of the weights that a run directory keeps of a live model, in the model's own precision."""
    if job.spec()["model"] != LIVE:
        return 0
    values = (value for value in job.module().state_dict().values() if isinstance(value, torch.Tensor))
    return sum(value.numel() * value.element_size() for value in values)


def _live_bytes(job: Job) -> int:
    """Bytes of the live tensors and arrays of a job; those inside a Dataset of one's own are not known."""
    live = [_bytes_of(data) for data in (job.train, job.test)]
    if isinstance(job.model, nn.Module):
        live.append(sum(_bytes_of(value) for value in job.model.state_dict().values()))
    return sum(live)


def _bytes_of(data: object) -> int:
    if isinstance(data, torch.Tensor):
        return data.numel() * data.element_size()
    if isinstance(data, np.ndarray):
        return int(data.nbytes)
    if isinstance(data, TensorDataset):
        return _bytes_of(data.tensors)
    if isinstance(data, dict):
        return sum(map(_bytes_of, data.values()))
    return sum(map(_bytes_of, data)) if isinstance(data, tuple | list) else 0


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
        return joined_batch(pieces).to(prepared.device, job.precision)

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


def _with_timings(blocks: Sequence[ParameterBlock], prepared: PreparedJob, rows: int) -> tuple[ParameterBlock, ...]:
    """Time both contractions of blocks for which the counted FLOPs do not decide by far.

    On a device pairwise contraction is timed wherever it may be chosen: it has a fused kernel, which wins or does not.
    """
    entries = rows if prepared.job.kernel == "full" else 1
    precision, device, samples = prepared.job.precision, prepared.device, len(prepared.reader)
    on_device = device != "cpu"
    positions = DEVICE_TIMED_POSITIONS if on_device else TIMED_POSITIONS
    timed: dict[LayerFactors, tuple[float, float, float]] = {}
    found = []
    for block in blocks:
        factors = block.factors
        if factors is None or factors.kind == "tokens" or factors.single:
            found.append(block)
            continue
        pairs = max(1.0, samples / 2)
        gemm = factors.dense_pair_flops(rows, entries) + factors.expand_flops(rows) / pairs
        pairwise_flops = factors.pairwise_pair_flops(rows, entries)
        ratio = pairwise_flops / gemm
        short = not on_device and min(pairwise_flops, gemm) * samples**2 / 2 <= UNTIMED_FLOPS
        if short or ratio >= DECIDED or (ratio <= 1 / DECIDED and not on_device):
            found.append(block)
            continue
        if factors not in timed:
            tile = max(2, min(samples, positions // factors.positions))
            if on_device:
                tile = max(2, min(tile, DEVICE_TIMED_BYTES // factors.held_bytes(rows, item_bytes(precision))))
            how = factors, rows, entries, precision, device, tile
            timed[factors] = (*measure_block(*how), measure_fused(*how))
        expand, pairwise, fused = timed[factors]
        fastest = min(pairwise, fused)
        found.append(replace(block, expand_seconds=expand, pairwise_seconds=fastest, fused=fused < pairwise))
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
    if prepared.job.precision == "bf16x3" and prepared.device == "cpu":
        notes.append(
            "bf16x3 is for tensor cores; a CPU makes its three products in float32, slower than float32 itself"
        )
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
    return isinstance(data, str) and any(is_image_spec(part) for part in split_joined(data))


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
