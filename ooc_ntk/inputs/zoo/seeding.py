"""Seeded construction that leaves the caller's random numbers, and default device, as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw on the CPU from a seed, as after ``torch.manual_seed(seed)``; afterwards the state is what it was.

    Generators of other devices are not touched.

    Args:
        seed: from 0 to 2**64 − 1.

    Yields:
        Nothing.
    """
    state = torch.get_rng_state()
    try:
        torch.default_generator.manual_seed(seed)
        with torch.device("cpu"):
            yield
    finally:
        torch.set_rng_state(state)
