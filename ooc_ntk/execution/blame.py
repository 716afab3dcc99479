"""Errors that name the samples and the block that they are about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ooc_ntk.compute.finite import all_finite
from ooc_ntk.errors import DataChangedError, InputError, NonFiniteError, OocNtkError, RunInterrupted
from ooc_ntk.planning.plan import Plan
from ooc_ntk.planning.tiles import Range


def check_finite_factor(plan: Plan, part: Tensor, block: str, samples: Sequence[int]) -> None:
    """Refuse factors that are not finite, naming block and sample."""
    if all_finite(part):
        return
    bad = ~torch.isfinite(part).reshape(part.shape[0], -1).all(1)
    if bool(bad.any()):
        raise not_finite(plan, block, samples[int(bad.nonzero()[0])])


def not_finite(plan: Plan, block: str, sample: int) -> NonFiniteError:
    """The error when a gradient is not finite."""
    return NonFiniteError(
        f"the gradient of block {block or '(model)'!r} is NaN or infinite in {where(plan, Range(sample, sample + 1))}; "
        "check that sample and the weights, or use precision='float64'"
    )


@contextmanager
def failing_on(samples: str) -> Iterator[None]:
    """Say of which samples it is that the model fails on."""
    try:
        yield
    except (NonFiniteError, DataChangedError, RunInterrupted):
        raise
    except InputError as error:
        raise InputError(f"{error} (in {samples})") from error
    except (OocNtkError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(
            f"the model failed on {samples} ({type(error).__name__}: {error}); "
            "check that these samples have the shape and dtype that the model takes"
        ) from error


def named_errors(groups: Iterator[list[Tensor]], samples: str) -> Iterator[list[Tensor]]:
    """Say of which samples it is that deriving fails on."""
    with failing_on(samples):
        yield from groups


def where(plan: Plan, samples: Range | Sequence[int]) -> str:
    """Name some samples, all train or all test, as the user counts them: each from 0."""
    numbers = range(samples.start, samples.stop) if isinstance(samples, Range) else samples
    train = plan.train_samples
    kind, shift = ("train", 0) if numbers[0] < train else ("test", train)
    first, last = min(numbers) - shift, max(numbers) - shift
    if len(numbers) == 1:
        return f"{kind} sample {first}"
    if last - first + 1 == len(numbers):
        return f"{kind} samples {Range(first, last + 1)}"
    shown = ", ".join(str(number - shift) for number in numbers[:3])
    return f"{kind} samples {shown}{f' and {len(numbers) - 3} more' if len(numbers) > 3 else ''}"
