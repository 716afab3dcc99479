"""Sizes of images through a resize and a centre crop: arithmetic alone, no image is touched.

The rules are those of torchvision's ``Resize`` and ``CenterCrop`` on PIL images, so that kernels of published
pipelines can be reproduced to the pixel.
"""

from __future__ import annotations

from dataclasses import dataclass

#: A side, or (height, width).
Size = int | tuple[int, int]


@dataclass(frozen=True)
class Geometry:
    """What happens to the size of every image.

    Attributes:
        resize: an int scales the shorter side to that many pixels and keeps the aspect; (height, width) scales to
            exactly that; None leaves the image as it is.
        crop: side or (height, width) of the centre that is kept after resizing; None keeps all.
    """

    resize: Size | None = None
    crop: Size | None = None

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Size after the resize.

        Args:
            height: pixels before.
            width: pixels before.

        Returns:
            (height, width) in pixels; the longer side is rounded down.

        >>> Geometry(resize=256).resized(300, 451), Geometry(resize=(224, 224)).resized(300, 451)
        ((256, 384), (224, 224))
        """
        if self.resize is None:
            return height, width
        if isinstance(self.resize, tuple):
            return self.resize
        if height <= width:
            return self.resize, int(self.resize * width / height)
        return int(self.resize * height / width), self.resize

    def output(self, height: int, width: int) -> tuple[int, int]:
        """Size after resize and crop, (height, width) in pixels.

        >>> Geometry(resize=256, crop=224).output(300, 451)
        (224, 224)
        """
        size = self.resized(height, width)
        return size if self.crop is None else pair(self.crop)

    @property
    def fixed(self) -> tuple[int, int] | None:
        """(height, width) that every image comes out with, whatever its size; None where that depends on the image.

        >>> Geometry(resize=256).fixed, Geometry(resize=256, crop=224).fixed
        (None, (224, 224))
        """
        if self.crop is not None:
            return pair(self.crop)
        return self.resize if isinstance(self.resize, tuple) else None

    def changes(self, height: int, width: int) -> bool:
        """Whether an image of this size comes out different.

        >>> Geometry(resize=32).changes(32, 32), Geometry(crop=28).changes(32, 32)
        (False, True)
        """
        return self.resized(height, width) != (height, width) or self.output(height, width) != (height, width)

    def __str__(self) -> str:
        return f"resize={size_text(self.resize)},crop={size_text(self.crop)}"


def pair(size: Size) -> tuple[int, int]:
    """(height, width) of a size; a side stands for a square."""
    return size if isinstance(size, tuple) else (size, size)


def size_text(size: Size | None) -> str:
    """A size as it is written in a data spec.

    >>> size_text(64), size_text((224, 160)), size_text(None)
    ('64', '224x160', 'none')
    """
    if size is None:
        return "none"
    return str(size) if isinstance(size, int) else f"{size[0]}x{size[1]}"


def crop_box(height: int, width: int, crop: Size) -> tuple[int, int, int, int]:
    """Where a centre crop lies in an image; beyond the edges where the image is smaller.

    A missing border is split in two with the larger half after the image, and half a pixel is rounded to even, both
    as torchvision does.

    Args:
        height: of the image, pixels.
        width: of the image, pixels.
        crop: what is kept.

    Returns:
        left, top, right, bottom, pixels from the image's upper left corner.

    >>> crop_box(7, 10, 4), crop_box(3, 10, 4)
    ((3, 2, 7, 6), (3, 0, 7, 4))
    """
    tall, wide = pair(crop)
    top, left = (_offset(held, kept) for held, kept in ((height, tall), (width, wide)))
    return left, top, left + wide, top + tall


def _offset(held: int, kept: int) -> int:
    """First pixel of the centre along one axis."""
    # round() is to even: 3/2 -> 2, 1/2 -> 0. A border that is missing is padded before, so nothing is left to round.
    return round((held - kept) / 2.0) if held > kept else -((kept - held) // 2)
