"""The probe: measure a model on the real device, at the batch size that the run will use."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import torch
from torch import Tensor

from ooc_ntk.errors import BudgetError, InputError, OocNtkError
from ooc_ntk.planning.factors import LayerFactors
from ooc_ntk.planning.tiles import even_size
from ooc_ntk.planning.workload import Derivation
from ooc_ntk.units import format_bytes

from .capture import Capture, Captured
from .held import Tile, as_tile
from .jacobian import LoopJacobian, ModelBatch, ModelFunction, VmapJacobian, plain_layers
from .machine import PeakSampler
from .model import is_smooth
from .structure import SAME_OUTPUT, Structure

logger = logging.getLogger(__name__)

#: Samples of the first vmap trial (guessed: enough to amortise its overhead, few enough to be cheap).
TRIAL_SAMPLES: Final = 4

#: Largest batch that is tried without being asked for (measured: nothing gained beyond it on a CPU).
LARGEST_BATCH: Final = 64

#: Share of the memory left by the process that deriving one batch may take; the rest is for tiles.
BATCH_SHARE: Final = 0.25

#: A vmap trial slower than the loop by this factor is not repeated at a larger batch.
HOPELESS: Final = 1.3

#: vmap is taken if it needs less than this share of the loop's time: it holds a whole batch of rows at once, whose
#: copying the probe does not time (guessed from measurements: 0.85 in the probe was a tie in the run).
CLEARLY_FASTER: Final = 0.85

#: Activations of one captured batch: large enough for whole-batch products, small enough to stay near the cache
#: (measured: ResNet-18 at 32 samples 1.59 s, at 128 2.25 s for the same 128 samples).
CAPTURE_BYTES: Final = 160 * 2**20

#: Factors of a captured batch that are only held until its gradients are expanded (measured: ResNet-18 with ten outputs
#: takes 12 s for its rows at 19 samples, 15 to 20 s at 32, where fresh memory is slow).
ROOM_BYTES: Final = 256 * 2**20

#: The same of both on a device, which has no such cache, and which small batches leave idle (guessed).
DEVICE_CAPTURE_BYTES: Final = 8 * 2**30

#: Fewest and most samples of a captured batch that are chosen without being asked for, and most where each batch makes
#: a dense R again on a device.
SMALLEST_CAPTURE: Final = 4
LARGEST_CAPTURE: Final = 512
LARGEST_PROJECTED: Final = 1024

#: Seconds after which a timing is not repeated.
ENOUGH_SECONDS: Final = 0.2

#: How often a trial that is not long is repeated; the best counts (guessed).
TRIAL_REPEATS: Final = 3


@dataclass(frozen=True)
class Probe:
    """What the probe found.

    Attributes:
        outputs: scalars of the output function per sample (C).
        rows_per_sample: Jacobian rows per sample.
        derivation: the faster method with its batch size and measurements.
        smooth: whether no kinked operation was seen.
    """

    outputs: int
    rows_per_sample: int
    derivation: Derivation
    smooth: bool


def probe(
    function: ModelFunction,
    fetch: Callable[[int], ModelBatch],
    available: int,
    free_bytes: int,
    machine_bytes: int,
    batch_size: int | None = None,
    chain_names: Sequence[str] = (),
    structure: Structure | None = None,
    largest: int = LARGEST_CAPTURE,
) -> Probe:
    """Measure how rows of ``function`` are derived fastest.

    Args:
        function: model, parameters and rows.
        fetch: returns the first n samples, on the device.
        available: samples there are.
        free_bytes: bytes of the memory of the device that the process has left under its budget; bounds the batch. One
            sample is measured even if it is too little, so that the planner can say how much would do.
        machine_bytes: bytes that are free at all.
        batch_size: batch size to use; None chooses one.
        chain_names: parameters of the earliest block that no rule covers, whose derivation alone costs the chain of a
            backward pass.
        structure: what layer rules cover; None for nothing.
        largest: samples of a captured batch at most, where none is asked for.

    Returns:
        The measurements.

    Raises:
        InputError: if the model cannot be run or differentiated on its data.
        BudgetError: if the machine cannot even derive one sample.
    """
    first = fetch(1)
    look = look_at(function, first)
    outputs, rows, activation_bytes = look.outputs, look.rows_per_sample, look.activation_bytes
    ruled = [name for name in function.names if structure is not None and name in structure.layers]
    others = [name for name in function.names if name not in ruled]
    item = next(iter(function.parameters.values())).element_size()
    row_bytes = sum(function.sizes[name] for name in others) * item
    needed = 2 * activation_bytes + 2 * row_bytes
    if needed > machine_bytes:
        raise BudgetError(
            f"deriving one sample needs about {format_bytes(needed)} "
            f"(saved activations {format_bytes(activation_bytes)}, one Jacobian row {format_bytes(row_bytes)}), "
            f"the machine has {format_bytes(machine_bytes)} free; choose fewer parameters or a larger machine"
        )
    captured = None
    if structure is not None and ruled:
        capture = Capture(function, structure, ruled, rows)
        try:
            captured = _measure_capture(capture, fetch, available, free_bytes, activation_bytes, batch_size, largest)
        except (OocNtkError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise CaptureFailed(_refusal(error)) from error
        logger.info("layer rules: %.4f s per sample", captured.capture_seconds_per_sample)
    if not others:
        assert captured is not None
        return Probe(outputs, rows, captured, look.smooth)

    loop = LoopJacobian(function)
    samples = min(available, 2)
    _drain(loop, first, others)
    seconds, peak = _timed(lambda: _drain(loop, fetch(samples), others))
    chain = min(1.0, _timed(lambda: _drain(loop, fetch(samples), chain_names))[0] / seconds) if chain_names else 1.0
    best = Derivation(
        method="loop",
        batch_size=min(batch_size or LARGEST_BATCH, available),
        seconds_per_sample=seconds / samples,
        chain_seconds_per_sample=chain * seconds / samples,
        working_bytes=max(peak, 2 * activation_bytes + 2 * row_bytes),
        activation_bytes=activation_bytes,
    )
    per_sample = 2 * activation_bytes + 2 * rows * row_bytes
    share, largest = (1.0, batch_size) if batch_size else (BATCH_SHARE, LARGEST_BATCH)
    allowed = int(min(max(0, share * free_bytes) // max(1, per_sample), largest, available))
    if not batch_size:
        allowed = min(allowed, max(TRIAL_SAMPLES, available // 10))  # the trial must not take longer than it can save
    vmapped, refused = None, None
    if per_sample < machine_bytes:
        vmapped, refused = _try_vmap(function, others, fetch, best, per_sample, allowed, batch_size)
    if vmapped is not None and vmapped.seconds_per_sample < CLEARLY_FASTER * best.seconds_per_sample:
        best = vmapped
    elif refused is not None:
        best = replace(best, refused=refused)
    logger.info("rows by %s: %.4f s per sample, %s", best.method, best.seconds_per_sample, best.refused or "")
    if captured is not None:
        best = replace(
            best,
            batch_size=min(best.batch_size, captured.batch_size) if best.method == "vmap" else captured.batch_size,
            working_bytes=best.working_bytes + captured.working_bytes,
            batch_bytes=best.batch_bytes + captured.batch_bytes,
            capture_seconds_per_sample=captured.capture_seconds_per_sample,
        )
    return Probe(outputs, rows, best, look.smooth)


class CaptureFailed(Exception):  # noqa: N818 - never reaches a user
    """A model that takes a few samples at a time does not take a whole batch; says why."""


def _measure_capture(
    capture: Capture,
    fetch: Callable[[int], ModelBatch],
    available: int,
    free_bytes: int,
    activation_bytes: int,
    batch_size: int | None,
    largest: int,
) -> Derivation:
    """Choose a batch size for layer rules and time it, on fewer samples if a whole batch would take long."""
    item = next(iter(capture.function.parameters.values())).element_size()
    merged = {layer.parameters[0]: layer.factors for layer in capture.layers if layer.factors is not None}
    held = sum(factors.held_bytes(capture.rows, item) for factors in merged.values())
    per_sample = 2 * activation_bytes + held
    sizes = {factors: factors.held_bytes(capture.rows, item) for factors in merged.values()}
    # What is smaller as gradients will be held so, and its factors only until the next batch.
    rooms = sum(sizes[f] for f in merged.values() if capture.rows * f.columns * item <= sizes[f])
    on_cpu = next(iter(capture.function.parameters.values())).device.type == "cpu"
    activations, room = (CAPTURE_BYTES, ROOM_BYTES) if on_cpu else (DEVICE_CAPTURE_BYTES, DEVICE_CAPTURE_BYTES)
    fitting = min(activations // max(1, activation_bytes), room // max(1, rooms))
    wanted = batch_size or max(SMALLEST_CAPTURE, min(largest, fitting))
    affordable = int(BATCH_SHARE * max(0, free_bytes)) // max(1, per_sample)
    size = max(1, min(wanted, available, batch_size or affordable))
    if not batch_size:
        size = even_size(available, size)

    def timed(samples: int, repeats: int = TRIAL_REPEATS) -> tuple[float, int]:
        batch = fetch(samples)
        given = {name: _room(factors, len(batch), capture, item) for name, factors in merged.items()}
        return _timed(lambda: _let_go(capture.run(batch, given.get)), repeats)

    trial = min(size, SMALLEST_CAPTURE)
    seconds, peak = timed(trial, 1 if trial < size else TRIAL_REPEATS)
    if trial < size:
        # As large a trial as a tenth of the run pays for, or a fifth of a second.
        spendable = max(ENOUGH_SECONDS, 0.1 * seconds / trial * available)
        larger = min(size, int(spendable / (seconds / trial)))
        if larger > trial:
            trial = larger
            # A run that is over in no time is not worth repeating this trial, which may be as large as all of it.
            short = seconds / SMALLEST_CAPTURE * available <= ENOUGH_SECONDS
            seconds, peak = timed(trial, 0 if short else 1 if 2 * trial > available else TRIAL_REPEATS)
    working = max(peak * size // trial, size * 2 * activation_bytes)
    return Derivation(
        method="rules",
        batch_size=size,
        seconds_per_sample=0.0,
        chain_seconds_per_sample=0.0,
        working_bytes=working,
        batch_bytes=working,
        activation_bytes=size * activation_bytes,
        capture_seconds_per_sample=seconds / trial,
    )


def _room(factors: LayerFactors, samples: int, capture: Capture, item: int) -> Tile:
    """Memory for one layer's factors, as a tile store would give it."""
    device = next(iter(capture.function.parameters.values())).device
    kind = torch.float64 if item == 8 else torch.float32
    inputs = torch.int32 if factors.kind == "tokens" else kind
    return as_tile(
        factors,
        torch.zeros(samples, factors.input_items, dtype=inputs, device=device),
        torch.zeros(samples, capture.rows * factors.gradient_items, dtype=kind, device=device),
        capture.rows,
        "gemm",
    )


def _let_go(captured: Captured) -> None:
    """Drop what a trial captured."""
    del captured


@dataclass(frozen=True)
class Look:
    """What one forward pass of one sample shows.

    Attributes:
        outputs: scalars of the output function (C).
        rows_per_sample: Jacobian rows.
        smooth: whether no kinked operation was seen.
        activation_bytes: activations saved for the backward pass, in bytes.
    """

    outputs: int
    rows_per_sample: int
    smooth: bool
    activation_bytes: int


def look_at(function: ModelFunction, batch: ModelBatch) -> Look:
    """Run one sample forward, twice.

    Args:
        function: model, parameters and rows.
        batch: one sample.

    Returns:
        What was seen.

    Raises:
        InputError: if the model fails on it, is random, does not depend on the parameters, or the target does not fit.
    """
    held = (*function.parameters.values(), *function.buffers.values(), *batch.args, *batch.kwargs.values())
    known = {value.untyped_storage().data_ptr() for value in held}
    saved: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in known:
            size = min(storage.nbytes(), value.numel() * value.element_size())
            saved[storage.data_ptr()] = max(size, saved.get(storage.data_ptr(), 0))
        # Detached: an operation that saves its own result (ReLU) would otherwise own itself, and its graph with every
        # parameter would never be freed.
        return value.detach()

    leaves = {name: function.parameters[name].detach().requires_grad_() for name in function.names}
    known.update(leaf.untyped_storage().data_ptr() for leaf in leaves.values())
    try:
        with torch.enable_grad(), plain_layers(), torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            logits = function.logits(leaves, batch)
        with torch.no_grad(), plain_layers():
            again = function.logits(leaves, batch)
    except OocNtkError:
        raise
    except Exception as error:
        shapes = [f"{value.dtype} {tuple(value.shape)}" for value in batch.args]
        shapes += [f"{name}={value.dtype} {tuple(value.shape)}" for name, value in batch.kwargs.items()]
        raise InputError(
            f"the model failed on the first sample ({type(error).__name__}: {error}); it was called with "
            f"{', '.join(shapes)}; check that the data has the shape and dtype that the model takes"
        ) from error
    if not logits.requires_grad:
        raise InputError(
            "the model's output does not depend on the chosen parameters; check for torch.no_grad() or .detach() in it"
        )
    if logits.shape[0] != 1:
        raise InputError(
            f"the model turned one sample into {logits.shape[0]} outputs along its first dimension; "
            "it must keep samples first"
        )
    if not torch.allclose(logits.detach(), again, rtol=SAME_OUTPUT, atol=SAME_OUTPUT, equal_nan=True):
        difference = float((logits.detach() - again).abs().max())
        raise InputError(
            f"the model gives different outputs for the same sample (by {difference:.2g}), so it is random; "
            "switch off dropout and other noise"
        )
    target = None if batch.targets is None else batch.targets[0]
    output = logits[0].detach()
    with torch.no_grad(), plain_layers():
        function.rows.check_shape(function.returned({}, batch), batch.targets)
    function.rows.check_labels(batch.targets, output.shape[0])
    count = function.rows.count(output, target)
    function.rows.check(count)
    rows = function.rows.cotangents(output, target).shape[0]
    return Look(count, rows, is_smooth(logits), sum(saved.values()))


def _try_vmap(
    function: ModelFunction,
    names: Sequence[str],
    fetch: Callable[[int], ModelBatch],
    loop: Derivation,
    per_sample: int,
    allowed: int,
    batch_size: int | None,
) -> tuple[Derivation | None, str | None]:
    """Time vmap on a small batch and, if it has a chance, at the batch size that the run would use."""
    method = VmapJacobian(function)
    if allowed < 1:
        # Too little memory to use it; tried all the same, so that the process has loaded what the next budget needs.
        try:
            _drain(method, fetch(1), names)
        except OocNtkError:
            raise
        except Exception as error:  # noqa: BLE001
            return None, _refusal(error)
        return None, None
    wanted = min(batch_size or allowed, allowed)
    result = None
    for size in sorted({min(TRIAL_SAMPLES, wanted), wanted}):
        try:
            if result is None:
                _drain(method, fetch(1), names)
            seconds, peak = _timed(partial(_drain_first, method, fetch, size, names))
        except OocNtkError:
            raise
        except Exception as error:  # noqa: BLE001
            # vmap refuses by many kinds of exception (RuntimeError, NotImplementedError, ValueError of a user's code).
            return None, _refusal(error)
        # The share first: a quotient of at most one, so that rounding leaves the chain at most the whole.
        share = loop.chain_seconds_per_sample / loop.seconds_per_sample
        working = max(peak, size * per_sample)
        tried = Derivation(
            method="vmap",
            batch_size=size,
            seconds_per_sample=seconds / size,
            chain_seconds_per_sample=seconds / size * share,
            working_bytes=working,
            batch_bytes=working,
            activation_bytes=size * loop.activation_bytes,
        )
        if result is None or batch_size or tried.seconds_per_sample < result.seconds_per_sample:
            result = tried
        if not batch_size and tried.seconds_per_sample > HOPELESS * loop.seconds_per_sample:
            break
    return result, None


def _refusal(error: Exception) -> str:
    """The first line of what vmap said, short enough for a table."""
    line = next((text.strip() for text in str(error).splitlines() if text.strip()), "")
    return f"{type(error).__name__}: {line[:160]}"


def _drain(method: LoopJacobian | VmapJacobian, batch: ModelBatch, names: Sequence[str]) -> None:
    """Derive every row of a batch and let it go."""
    for group in method.derive(batch, names):
        del group


def _drain_first(method: VmapJacobian, fetch: Callable[[int], ModelBatch], samples: int, names: Sequence[str]) -> None:
    """Derive every row of the first samples and let it go."""
    _drain(method, fetch(samples), names)


def _timed(work: Callable[[], None], repeats: int = TRIAL_REPEATS) -> tuple[float, int]:
    """Seconds of ``work`` (the best of a few, unless it is long) and the memory it took beside, in bytes."""
    with PeakSampler() as sampler:
        start = time.perf_counter()
        work()
        _synchronize()
        took = time.perf_counter() - start
    best = took
    spent = took
    for _ in range(repeats):
        if spent > ENOUGH_SECONDS:
            break
        start = time.perf_counter()
        work()
        _synchronize()
        took = time.perf_counter() - start
        best, spent = min(best, took), spent + took
    return best, sampler.increase


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
