"""From a job to a measured workload: load, check, probe."""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ooc_ntk.compute.contract import TORCH_DTYPE, check_precision, tf32
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
from ooc_ntk.compute.probe import Probe, look_at, probe
from ooc_ntk.errors import DataChangedError, InputError
from ooc_ntk.inputs.job import Job
from ooc_ntk.inputs.samples import Samples, digest_samples
from ooc_ntk.planning.budget import Limits, Resources
from ooc_ntk.planning.memory import LIBRARY_GROWTH_BYTES
from ooc_ntk.planning.tiles import Range
from ooc_ntk.planning.workload import Workload

from .context import SampleReader

logger = logging.getLogger(__name__)

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
        digests: digests of model, data and kernel settings.
    """

    job: Job
    module: nn.Module
    device: str
    function: ModelFunction
    reader: SampleReader
    digests: dict[str, str]

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
    names = choose_parameters(module, job.parameters)
    device = resolved_device(job.device)
    check_precision(job.precision, device)
    outputs = job.output_function()
    rows = OutputRows.of(outputs, job.kernel)
    function = ModelFunction(module, names, rows, job.precision, device)
    reader = SampleReader(job.train_source(), job.test_source())
    data = [source.digest() for source in (reader.train, reader.test) if source is not None]
    settings = [
        job.kernel,
        job.scale,
        str(job.normalize),
        job.precision,
        outputs if isinstance(outputs, str) else callable_identity(outputs),
        *names,
    ]
    return PreparedJob(
        job=job,
        module=module,
        device=device,
        function=function,
        reader=reader,
        digests={
            "model": model_digest(module),
            "data": _digest("/".join(data)),
            "kernel": _digest("\n".join(settings)),
        },
    )


def callable_identity(function: Callable[..., Any]) -> str:
    """What identifies a user's function: its source, its defaults and the values it closes over."""
    if isinstance(function, functools.partial):
        return f"{callable_identity(function.func)} {function.args!r} {sorted(function.keywords.items())!r}"
    try:
        parts = [inspect.getsource(function)]
    except (OSError, TypeError):
        parts = [f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', repr(type(function)))}"]
    if inspect.isfunction(function):
        closed = inspect.getclosurevars(function).nonlocals
        parts += [repr(function.__defaults__), repr(function.__kwdefaults__), repr(sorted(closed.items()))]
    else:
        parts.append(repr(sorted(getattr(function, "__dict__", {}).items())))
    # Addresses of objects differ from process to process.
    return re.sub(r" at 0x[0-9a-f]+", "", " ".join(parts))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def available_resources(device: str, disk_free: int) -> Resources:
    """What the machine has free for this process now."""
    free, taken = device_memory(device)
    return Resources(free_host_bytes(), resident_bytes(), free, taken, disk_free)


def measure(prepared: PreparedJob, limits: Limits) -> Workload:
    """Probe a prepared job on its device.

    Args:
        prepared: the job.
        limits: the budget, which bounds the batch that is tried.

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
    blocks = parameter_blocks(prepared.module, prepared.function.names)

    def fetch(count: int, start: int = 0) -> ModelBatch:
        _, samples = next(reader.pieces(Range(start, min(start + count, len(reader))), count))
        return ModelBatch(samples.args, samples.kwargs, samples.targets).to(prepared.device, job.precision)

    on_cpu = prepared.device == "cpu"
    taken = resident_bytes() + LIBRARY_GROWTH_BYTES
    free = limits.host - taken if on_cpu else limits.device - device_memory(prepared.device)[1]
    machine = free_host_bytes() if on_cpu else device_memory(prepared.device)[0]
    with tf32(allowed=False), steady_allocator():
        found = probe(prepared.function, fetch, train, free, machine, job.batch_size, blocks[0].parameters)
    if reader.test is not None:
        try:
            look = look_at(prepared.function, fetch(1, train))
        except InputError as error:
            raise InputError(f"test data: {error}") from error
        if look.outputs != found.outputs:
            raise InputError(
                f"the model has {found.outputs} outputs for a train sample and {look.outputs} for a test sample; "
                "both must have the same"
            )
    return_free_memory()
    values = [*first.args, *first.kwargs.values(), *([first.targets] if first.targets is not None else [])]
    full = job.kernel == "full"
    return Workload(
        kernel=job.kernel,
        train_samples=train,
        test_samples=len(reader) - train,
        outputs=found.outputs,
        rows_per_sample=found.rows_per_sample,
        entries_per_sample=found.rows_per_sample if full else 1,
        blocks=blocks,
        sample_bytes=sum(value.numel() * value.element_size() for value in values) // len(values[0]) + 1,
        baseline_bytes=resident_bytes(),
        model_bytes=prepared.function.state_bytes,
        derivation=found.derivation,
        precision=job.precision,
        scale=job.scale,
        normalize=job.normalize,
        device=prepared.device,
        smooth=found.smooth,
        cancelling=job.outputs != "logits",
        threads=torch.get_num_threads(),
        seed=job.seed,
        notes=_notes(prepared, found),
    )


def _notes(prepared: PreparedJob, found: Probe) -> tuple[str, ...]:
    """Remarks that the reader of the plan should see."""
    notes = []
    if isinstance(prepared.job.model, str):
        notes.append("the model was built from its spec and put in eval mode")
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
