"""Texts by length: whether batches may be cut at their longest text, and what that saves."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from typing import Final

import torch

from ooc_ntk.compute.capture import Capture
from ooc_ntk.compute.contract import tf32
from ooc_ntk.compute.jacobian import LoopJacobian, ModelBatch, ModelFunction
from ooc_ntk.inputs.samples import Samples

from .context import SampleReader, trimmed

logger = logging.getLogger(__name__)

#: Mean share of the padded length from which cutting is not worth an order of its own (guessed).
LONG: Final = 0.9

#: Difference of a gradient, over the largest one, that rounding may explain (measured on small transformers in float32:
#: below 2e-6).
SAME_GRADIENT: Final = 3e-5

#: Texts of the batch that is timed whole and cut.
TIMED_TEXTS: Final = 16


def cut_share(function: ModelFunction, reader: SampleReader, rows: int, device: str, precision: str) -> float | None:
    """Whether texts may be derived from short to long, each batch cut at its longest, and the time that is left.

    Gradients of a short text and of a middling one, cut, are compared with those of the same texts padded, and layer
    rules are tried on them.

    Args:
        function: the model, with its structure.
        reader: train and test samples.
        rows: Jacobian rows per sample.
        device: torch device string.
        precision: of the model.

    Returns:
        Seconds of cut texts over those of padded ones; None if samples are no texts, if cutting saves little, or if a
        gradient changes.
    """
    length, lengths = reader.train.length, reader.train.lengths
    if length is None or lengths is None or (reader.test is not None and reader.test.length != length):
        return None
    mean = float(lengths.double().mean())
    if mean > LONG * length:
        return None
    chosen = sorted({int(lengths.argmin()), int((lengths.double() - mean).abs().argmin())})
    for number in chosen:
        whole = reader.train.fetch(number, number + 1)
        cut = trimmed(whole, length, int(lengths[number]))
        if not _same_gradients(function, _batch(whole, device, precision), _batch(cut, device, precision), rows):
            logger.info("texts are not cut: gradients of sample %d change", number)
            return None
    structure = function.structure
    names = [name for name in function.names if structure is not None and name in structure.layers]
    whole = reader.train.fetch(0, min(TIMED_TEXTS, len(lengths)))
    few = trimmed(whole, length, max(1, round(mean)))
    if structure is None or not names:
        return mean / length
    capture = Capture(function, structure, names, rows, shorter=True)
    try:
        with tf32(allowed=False):
            seconds = [_seconds(capture, _batch(each, device, precision)) for each in (whole, few)]
    except Exception as error:  # noqa: BLE001 - whatever a model says to shorter texts, they stay padded then
        logger.info("texts are not cut: layer rules fail on them (%s)", error)
        return None
    return min(1.0, seconds[1] / seconds[0])


def _batch(samples: Samples, device: str, precision: str) -> ModelBatch:
    return ModelBatch(samples.args, samples.kwargs, samples.targets).to(device, precision)


def _same_gradients(function: ModelFunction, whole: ModelBatch, cut: ModelBatch, rows: int) -> bool:
    """Whether the first and the last Jacobian row of one text are the same, padded and cut."""
    loop, wanted = LoopJacobian(function), sorted({0, rows - 1})
    try:
        with tf32(allowed=False):
            found = [_copied(loop.some_rows(each, function.names, wanted)) for each in (whole, cut)]
    except Exception as error:  # noqa: BLE001 - a model that takes one length alone says so in its own way
        logger.info("texts are not cut: the model does not take fewer tokens (%s)", error)
        return False
    largest = max(float(part.abs().max()) for row in found[0] for part in row if part.numel())
    pairs = ((one, other) for both in zip(*found, strict=True) for one, other in zip(*both, strict=True))
    return all(float((one - other).abs().max()) <= SAME_GRADIENT * largest for one, other in pairs if one.numel())


def _copied(rows: Iterator[Sequence[torch.Tensor]]) -> list[list[torch.Tensor]]:
    return [[part.clone() for part in row] for row in rows]


def _seconds(capture: Capture, batch: ModelBatch) -> float:
    """Seconds to capture a batch, the better of two."""
    best = float("inf")
    for _ in range(2):
        start = time.perf_counter()
        captured = capture.run(batch)
        del captured
        best = min(best, time.perf_counter() - start)
    return best
