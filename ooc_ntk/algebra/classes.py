"""Class labels as numbers to be fitted: one column per class."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from ooc_ntk.errors import InputError

#: Classes of labels that are made into targets, one column each. (A choice: more are numbers of something else.)
MOST_CLASSES: Final = 2000


def one_hot(labels: NDArray[np.int64], classes: int, most: int | None = MOST_CLASSES) -> NDArray[np.float64]:
    """One column per class, 1 for the right one and 0 elsewhere.

    Args:
        labels: (samples,) from 0, below ``classes``.
        classes: how many there are.
        most: classes that are made into columns at most; None where their number is no guess from the labels.

    Returns:
        (samples, classes).

    Raises:
        InputError: for more classes than are made into columns.

    >>> one_hot(np.array([1, 0]), 2)
    array([[0., 1.],
           [1., 0.]])
    """
    if most is not None and classes > most:
        raise InputError(
            f"labels of {classes:,} classes are not made into columns, at most {most:,} are: if they are numbers to be "
            "fitted, give them as targets; if they are classes, number these from 0 without gaps"
        )
    found = np.zeros((len(labels), classes))
    found[np.arange(len(labels)), labels] = 1.0
    return found
