"""Samples as people look at them: pixels, text, label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from ooc_ntk.inputs.samples import SampleSource

#: Numbers of channels that are an image's: grey, or red, green and blue.
CHANNELS: Final = (1, 3)

#: Sides of the smallest image, pixels (a guess: smaller arrays are numbers rather than pictures).
SMALLEST_SIDE: Final = 4

#: How far pixels may lie outside [0, 1] once a known normalisation is undone: rounding of float32.
ROUNDING: Final = 1e-3

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True, eq=False)
class ShownSample:
    """One sample as it is shown; what there is none of is None.

    Attributes:
        index: its number among the train, or the test, samples.
        label: its target where that is one number: whole for a class.
        text: as it was written.
        pixels: (height, width) grey or (height, width, 3) colour, float32 in [0, 1].
        stretched: whether the pixels were brought to [0, 1] by their own smallest and largest value, because nothing is
            known of their scale: brightness and contrast are then not those of the sample.
    """

    index: int
    label: int | float | None = None
    text: str | None = None
    pixels: NDArray[np.float32] | None = None
    stretched: bool = False


def shown_samples(source: SampleSource, numbers: Sequence[int]) -> dict[int, ShownSample]:
    """Some samples as they are shown; only they are read.

    Args:
        source: the data.
        numbers: of the samples.

    Returns:
        The samples by number.

    Raises:
        InputError: if a sample cannot be read.
    """
    wanted = sorted(set(numbers))
    texts = source.texts(wanted)
    found = {}
    for place, number in enumerate(wanted):
        samples = source.fetch(number, number + 1)
        pixels, stretched = None, False
        inputs = [*samples.args, *samples.kwargs.values()]
        if texts is None and source.lengths is None and len(inputs) == 1:
            pixels, stretched = image_of(inputs[0][0], source.normalisation)
        text = None if texts is None else texts[place]
        found[number] = ShownSample(number, _label(samples.targets), text, pixels, stretched)
    return found


def image_of(
    values: torch.Tensor, normalisation: Normalisation | None = None
) -> tuple[NDArray[np.float32] | None, bool]:
    """A sample as an image, if it is one.

    A known normalisation is undone; bytes are divided by 255; numbers that lie in [0, 1] are taken as they are. Any
    others are stretched from their smallest to their largest value.

    Args:
        values: (channels, height, width), (height, width, channels) or (height, width).
        normalisation: mean and deviation per channel that were taken off.

    Returns:
        (height, width) or (height, width, 3) float32 in [0, 1], None if it is no image; and whether it was stretched.
    """
    array = values.detach().cpu()
    if array.dtype == torch.bool or array.is_complex():
        return None, False
    if array.ndim == 2:
        array = array[None]
    elif array.ndim == 3 and array.shape[0] not in CHANNELS and array.shape[2] in CHANNELS:
        array = array.permute(2, 0, 1)
    if array.ndim != 3 or array.shape[0] not in CHANNELS or min(array.shape[1:]) < SMALLEST_SIDE:
        return None, False
    pixels, stretched = _to_unit(array, normalisation)
    image = pixels.transpose(1, 2, 0)
    return np.ascontiguousarray(image[:, :, 0] if image.shape[2] == 1 else image), stretched


def _to_unit(array: torch.Tensor, normalisation: Normalisation | None) -> tuple[NDArray[np.float32], bool]:
    """Pixels in [0, 1], and whether they were stretched to it."""
    pixels = array.to(torch.float64).numpy()
    if array.dtype == torch.uint8:
        return (pixels / 255).astype(np.float32), False
    if normalisation is not None and len(normalisation[0]) == len(pixels):
        mean, deviation = (np.array(each)[:, None, None] for each in normalisation)
        pixels = pixels * deviation + mean
    low, high = np.nanmin(pixels, initial=np.inf), np.nanmax(pixels, initial=-np.inf)
    if low >= -ROUNDING and high <= 1 + ROUNDING:
        return np.clip(pixels, 0, 1).astype(np.float32), False
    return ((pixels - low) / ((high - low) or 1.0)).astype(np.float32), True


def _label(targets: torch.Tensor | None) -> int | float | None:
    """The target of one sample where it is one number."""
    if targets is None or targets.numel() != 1 or targets.is_complex():
        return None
    value: bool | int | float = targets.reshape(()).item()
    return value if isinstance(value, float) else int(value)
