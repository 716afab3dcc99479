"""Jobs by name as they are typed: commands in this process, and inputs made from raw pixels by hand.

Apart from the command line nothing of ooc_ntk is used here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from ooc_ntk.cli import app

#: Mean and deviation per channel, as the authors of the usual pipelines publish them.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NORMALISATIONS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": ((0.4380, 0.4440, 0.4730), (0.1751, 0.1771, 0.1744)),
    "mnist": ((0.1307,), (0.3081,)),
    "fashionmnist": ((0.2860,), (0.3530,)),
    "fgvcaircraft": IMAGENET,
    "food101": IMAGENET,
    "flowers102": IMAGENET,
    "imagefolder": IMAGENET,
    "fakedata": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


def command(*arguments: object) -> Result:
    """Run ``ooc-ntk`` with these words."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def done(*arguments: object) -> str:
    """What a command prints that has to succeed."""
    result = command(*arguments)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result.output


def refused(*arguments: object) -> str:
    """The message of a command that has to be refused as wrong input."""
    result = command(*arguments)
    assert result.exit_code == 2, f"{result.output}\n{result.exception!r}"
    assert "Traceback" not in result.output
    return result.output


def by_hand(
    pixels: np.ndarray,
    normalisation: tuple[tuple[float, ...], tuple[float, ...]],
    *,
    resize: int | tuple[int, int] | None = None,
    crop: int | None = None,
    channels: int | None = None,
) -> torch.Tensor:
    """Model input (channels, height, width) of one image: PIL's bilinear resize, centre crop, normalisation.

    Args:
        pixels: ``(1 or 3, height, width)``, uint8.
        normalisation: mean and deviation per channel.
        resize: shorter side, or (height, width).
        crop: side of the centre that is kept; not beyond the image.
        channels: 3 repeats a grey value.
    """
    image = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0).copy())
    if resize is not None:
        short = min(image.size)
        width, height = resize[::-1] if isinstance(resize, tuple) else (resize * side // short for side in image.size)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    if crop is not None:
        left, top = (round((side - crop) / 2) for side in image.size)
        image = image.crop((left, top, left + crop, top + crop))
    values = np.asarray(image, dtype=np.float64) / 255
    values = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
    if channels is not None:
        values = np.repeat(values, channels // len(values), axis=0)
    mean, deviation = (np.array(part)[:, None, None] for part in normalisation)
    return torch.from_numpy(((values - mean) / deviation).astype(np.float32))


def torchvision_fake(number: int, size: int, classes: int = 10) -> tuple[np.ndarray, int]:
    """Image (3, size, size) and label that torchvision's FakeData has under a number."""
    generator = torch.Generator().manual_seed(number)
    image = torch.randn(3, size, size, generator=generator)
    return image.mul(255).byte().numpy(), int(torch.randint(0, classes, (1,), generator=generator))


def files_of(folder: Path) -> list[str]:
    """Names of the files under a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
