"""The kernel in scikit-learn: ``NTKRegressor``, ``NTKClassifier`` and ``NTKTransformer`` (extra ``sklearn``)."""

from __future__ import annotations

from importlib.util import find_spec

# Inside this package ``sklearn`` is scikit-learn, as everywhere: imports are absolute.
if find_spec("sklearn") is None:
    raise ModuleNotFoundError(
        "ooc_ntk.sklearn needs scikit-learn, which is not installed; run: python -m pip install 'ooc-ntk[sklearn]'",
        name="sklearn",
    )

from .ridge import NTKClassifier, NTKRegressor
from .transformer import NTKTransformer

__all__ = ["NTKClassifier", "NTKRegressor", "NTKTransformer"]
