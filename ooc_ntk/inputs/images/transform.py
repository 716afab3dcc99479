"""From an image to the model's input: colour, resize, centre crop as PIL does them, then scaling and normalisation.

Pixels stay bytes until a batch is handed over: bytes are a quarter of the size, and all that a cache has to keep.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from .geometry import Geometry, crop_box, pair

#: Modes of more than 8 bits per channel, which conversion would cut off without a word.
_DEEP_MODES: Final = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")


def open_photo(path: Path, geometry: Geometry) -> npt.NDArray[np.uint8]:
    """Decode an image file.

    Args:
        path: a file of any format that PIL reads; palettes, greyscale and CMYK become RGB, transparency is dropped.
        geometry: resize and crop.

    Returns:
        Pixels ``(3, height, width)``.

    Raises:
        Exception: of many kinds, whatever PIL raises for a file that is damaged or of no known format.
        ValueError: for pixels of more than 8 bits.
    """
    with Image.open(path) as image:
        if image.mode in _DEEP_MODES:
            raise ValueError(f"its pixels are of mode {image.mode}, expected 8 bits per channel; convert it to 8 bits")
        if image.mode == "P" and "transparency" in image.info:
            # The same colours as straight to RGB, but PIL warns about transparency on that way.
            return _arrange(image.convert("RGBA").convert("RGB"), geometry)
        return _arrange(image.convert("RGB"), geometry)


def photo_size(path: Path) -> tuple[int, int]:
    """(height, width) of an image file, from its header.

    Raises:
        Exception: of many kinds, whatever PIL raises for a file that is damaged or of no known format.
    """
    with Image.open(path) as image:
        return image.height, image.width


def arrange_pixels(pixels: npt.NDArray[np.uint8], geometry: Geometry) -> npt.NDArray[np.uint8]:
    """Resize and crop an image that is an array already.

    Args:
        pixels: ``(channels, height, width)``, 1 or 3 channels.
        geometry: resize and crop.

    Returns:
        Pixels ``(channels, height, width)`` of the new size.
    """
    if not geometry.changes(*pixels.shape[1:]):
        return pixels
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    return _arrange(image, geometry)


def _arrange(image: Image.Image, geometry: Geometry) -> npt.NDArray[np.uint8]:
    """Resize and crop; torchvision's results to the pixel."""
    height, width = geometry.resized(image.height, image.width)
    if min(height, width) < 1:
        raise ValueError(f"resizing {image.height}x{image.width} to {height}x{width} leaves nothing of it")
    if (height, width) != (image.height, image.width):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    if geometry.crop is not None and (height, width) != pair(geometry.crop):
        image = image.crop(crop_box(height, width, geometry.crop))
    values = np.asarray(image)
    return np.ascontiguousarray(values[None] if values.ndim == 2 else values.transpose(2, 0, 1))


def to_inputs(
    pixels: npt.NDArray[np.uint8],
    channels: int,
    normalisation: tuple[tuple[float, ...], tuple[float, ...]] | None,
) -> torch.Tensor:
    """Turn pixels into model inputs: value / 255, then (value − mean) / deviation per channel, in float32.

    Args:
        pixels: ``(samples, held channels, height, width)``; one held channel is repeated to ``channels``.
        channels: channels of the inputs.
        normalisation: mean and deviation per channel of the inputs; None leaves the values in [0, 1].

    Returns:
        ``(samples, channels, height, width)``, float32, on the CPU, in memory of its own.
    """
    held = torch.from_numpy(pixels)
    if held.shape[1] != channels:
        held = held.expand(-1, channels, -1, -1)
    # Contiguous first: a repeated channel shares its memory, and what follows is in place.
    inputs = held.to(torch.float32, memory_format=torch.contiguous_format, copy=True).div_(255)
    if normalisation is not None:
        mean, deviation = (torch.tensor(values, dtype=torch.float32)[:, None, None] for values in normalisation)
        inputs.sub_(mean).div_(deviation)
    return inputs
