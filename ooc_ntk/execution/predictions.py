"""What the network of a job says of its samples: class scores and labels, in batches."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ooc_ntk.algebra.faithfulness import ClassOutputs
from ooc_ntk.compute.contract import tf32
from ooc_ntk.compute.finite import all_finite
from ooc_ntk.compute.jacobian import ModelBatch, ModelFunction
from ooc_ntk.compute.outputs import OutputRows, logits_of
from ooc_ntk.errors import InputError
from ooc_ntk.inputs.text.network import TextNetwork
from ooc_ntk.planning.outputs import OutputSpec
from ooc_ntk.planning.tiles import Range

from .blame import failing_on
from .prepare import PreparedJob

#: Outputs whose kernels do not look at a sample's label; those of the others would tell the surrogate what to find.
WITHOUT_LABEL: Final = ("logits", "logprob")


def class_outputs(prepared: PreparedJob, batch: int) -> ClassOutputs:
    """Run the network on every train and test sample, in eval mode, a batch at a time.

    The network is a classifier: one output per class and a class label per sample; or a single output z and labels 0
    and 1, whose scores are then (0, z). Only (samples, classes) numbers are kept.

    Args:
        prepared: the job.
        batch: samples per batch.

    Returns:
        Scores and labels, train and test.

    Raises:
        InputError: if the job has no test samples, its outputs are no class scores or look at the labels, or samples
            have no class labels.
    """
    job, reader = prepared.job, prepared.reader
    _check_outputs(job.outputs)
    if reader.test is None:
        raise InputError("surrogates are compared with the network on test samples; give test data to the job (--test)")
    module = job.module()
    if isinstance(module, TextNetwork) and module.task != "classification":
        raise InputError(
            f"the network's outputs are no class scores: it was read as task={module.task}; surrogates need a "
            "classifier, as task=classification"
        )
    function = ModelFunction(module, (), OutputRows.of("logits", "trace"), job.precision, prepared.device)
    train = len(reader.train)
    scores: list[NDArray[np.float64]] = []
    labels: list[NDArray[np.int64]] = []
    for part, samples in reader.pieces(Range(0, len(reader)), 1 if job.allow_batch_dependence else batch, ahead=True):
        kind, shift = ("train", 0) if part.start < train else ("test", train)
        where = f"{kind} samples {Range(part.start - shift, part.stop - shift)}"
        labels.append(_labels(samples.targets, where))
        given = ModelBatch(samples.args, samples.kwargs, None).to(prepared.device, job.precision)
        with torch.no_grad(), tf32(allowed=False), failing_on(where):
            returned = function.returned({}, given)
            scores.append(_scores(function.rows.model_output(returned), returned))
    found, known = np.concatenate(scores), np.concatenate(labels)
    if found.shape[1] == 1:
        found = np.concatenate([np.zeros_like(found), found], axis=1)
    wrong = known[(known < 0) | (known >= found.shape[1])]
    if wrong.size:
        raise InputError(
            f"label {wrong[0]} is out of range: the network tells {found.shape[1]} classes, so labels run from 0 to "
            f"{found.shape[1] - 1}"
        )
    return ClassOutputs(found[:train], found[train:], known[:train], known[train:])


def _check_outputs(outputs: object) -> None:
    """Refuse kernels of outputs that look at the labels."""
    if not isinstance(outputs, str) or outputs.partition("[")[0] not in WITHOUT_LABEL:
        shown = repr(outputs) if isinstance(outputs, str) else "of a function"
        raise InputError(
            f"the kernel's outputs {shown} may look at each sample's label, which a surrogate has to find; run the job "
            "with outputs='logits' or 'logprob'"
        )
    OutputSpec.parse(outputs)


def _scores(outputs: Tensor, returned: object) -> NDArray[np.float64]:
    """Class scores of a batch, (samples, classes), float64 on the CPU."""
    shape = tuple(value.shape) if isinstance(value := logits_of(returned), Tensor) else ()
    if any(size > 1 for size in shape[2:]):
        raise InputError(f"surrogates need one row of class scores a sample, the model returned {shape}")
    if not all_finite(outputs):
        raise InputError("the network's outputs are NaN or infinite; check these samples and the weights")
    return np.asarray(outputs.double().cpu().numpy())


def _labels(targets: Tensor | None, where: str) -> NDArray[np.int64]:
    """Class labels of a batch, (samples,)."""
    if targets is None:
        raise InputError(f"{where} have no class labels, which surrogates are judged by; give data as (inputs, labels)")
    if targets.is_floating_point() or targets.is_complex() or targets[0].numel() != 1:
        got = f"{targets[0].numel()} values" if targets[0].numel() != 1 else str(targets.dtype).removeprefix("torch.")
        raise InputError(f"surrogates need one whole number a sample as its class label, {where} have {got}")
    return np.asarray(targets.reshape(-1).long().cpu().numpy())
