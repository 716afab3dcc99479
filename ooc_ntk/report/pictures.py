"""Pictures: one way to begin and to save a figure, by matplotlib (extra ``plots``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ooc_ntk.extras import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


@contextmanager
def picture(path: Path, width: float = 7.0, height: float = 4.2) -> Iterator[Figure]:
    """A figure to draw on, saved when all went well; needs no display.

    Args:
        path: file to write, ``.png`` or ``.svg``.
        width: inches.
        height: inches.

    Yields:
        An empty figure with constrained layout.

    Raises:
        InputError: if matplotlib is not installed.
    """
    figure: Figure = require("matplotlib.figure", "a picture").Figure(
        figsize=(width, height), dpi=130, layout="constrained"
    )
    yield figure
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format=path.suffix[1:])
    temporary.replace(path)
