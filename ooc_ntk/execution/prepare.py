"""From a job to a prepared one: load, check, and say what identifies it."""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ooc_ntk.compute.contract import check_precision, tf32
from ooc_ntk.compute.device import set_up_device
from ooc_ntk.compute.features import feature_model
from ooc_ntk.compute.functions import ClipOutput, SampleFunction
from ooc_ntk.compute.heads import narrowed
from ooc_ntk.compute.jacobian import ModelBatch, ModelFunction
from ooc_ntk.compute.machine import (
    device_memory,
    free_host_bytes,
    resident_bytes,
)
from ooc_ntk.compute.model import check_finite_state, check_mode, choose_parameters, model_digest
from ooc_ntk.compute.outputs import OutputRows
from ooc_ntk.errors import RunConflictError
from ooc_ntk.inputs.job import Job
from ooc_ntk.inputs.joined import joined
from ooc_ntk.inputs.samples import Samples
from ooc_ntk.planning.budget import Resources
from ooc_ntk.planning.layers import FEATURES
from ooc_ntk.planning.plan import Plan
from ooc_ntk.planning.projection import sketch_digest
from ooc_ntk.planning.tiles import Range
from ooc_ntk.planning.workload import HeadRows

from .blame import failing_on
from .context import SampleReader

logger = logging.getLogger(__name__)


#: Pairs of the bank that ``outputs="clip"`` sets every sample against, drawn from the train samples (TRAK's number).
BANK_SAMPLES = 300

#: Samples of it that are run together (a choice: small beside any budget that takes the model).
BANK_BATCH = 16


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
        return joined_batch(pieces).to(self.device, self.job.precision)

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
    set_up_device(device)
    reader = SampleReader(job.train_source(), job.test_source())
    digest = model_digest(module)
    if job.of_features:
        place = next(iter([*module.parameters(), *module.buffers()]), torch.zeros(()))
        first = next(reader.pieces(Range(0, 1), 1))[1]
        module = feature_model(module, joined_batch([first]).placed_as(place), job.kernel)
        names = choose_parameters(module, [f"{FEATURES}.*"])
    else:
        names = choose_parameters(module, job.parameters)
    outputs = job.output_function()
    if outputs == "clip":
        outputs = _against_bank(job, module, reader, device)
    function = ModelFunction(module, names, OutputRows.of(outputs, job.kernel), job.precision, device)
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
            "data": data_digest(job),
            "kernel": _digest("\n".join(settings)),
        },
    )


def data_digest(job: Job) -> str:
    """What identifies the data of a job; needs no model."""
    return _digest("/".join(job.data_digests()))


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
        batch = joined_batch(pieces).to(device, job.precision)
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


def first_samples(prepared: PreparedJob, count: int, start: int = 0) -> ModelBatch:
    """Some of a job's samples, train before test, on its device."""
    reader = prepared.reader
    _, samples = next(reader.pieces(Range(start, min(start + count, len(reader))), count))
    batch = ModelBatch(samples.args, samples.kwargs, samples.targets)
    return batch.to(prepared.device, prepared.job.precision)


def joined_batch(pieces: Sequence[Samples]) -> ModelBatch:
    """Single samples as one batch."""
    whole = joined(pieces)
    return ModelBatch(whole.args, whole.kwargs, whole.targets)
