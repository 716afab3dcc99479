"""The kernel in scikit-learn: ``NTKRegressor``, ``NTKClassifier`` and ``NTKTransformer`` (extra ``sklearn``)."""

from __future__ import annotations

from ooc_ntk.extras import is_installed, missing

# Inside this package ``sklearn`` is scikit-learn, as everywhere: imports are absolute.
if not is_installed("sklearn"):
    raise ModuleNotFoundError(str(missing("sklearn", "ooc_ntk.sklearn")), name="sklearn")

from .ridge import NTKClassifier, NTKRegressor
from .transformer import NTKTransformer

__all__ = ["NTKClassifier", "NTKRegressor", "NTKTransformer"]
