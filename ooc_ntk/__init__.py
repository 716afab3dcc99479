"""ooc-ntk: empirical neural tangent kernels larger than memory, exact or projected, planned before they start.

>>> import ooc_ntk
>>> ooc_ntk.Budget(host="16GiB").host
17179869184

Nothing heavy is imported until a name is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .api import (
        Budget,
        Checkpoints,
        ClipOutput,
        Cluster,
        Features,
        Featurizer,
        InputError,
        Job,
        Kernel,
        OocNtkError,
        Plan,
        Preferences,
        Projection,
        ProjectionKind,
        Solver,
        StoreScheme,
        calibrate,
        explain,
        extend,
        fit,
        forget_layer_rule,
        info,
        layer_rule,
        nearest,
        open,  # noqa: A004 - ooc_ntk.open(path), as zarr.open
        open_checkpoints,
        open_features,
        plan,
        register_projection,
        register_solver,
        register_store,
        run,
        run_checkpoints,
        spectrum,
        surrogate,
        verify,
    )

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "Checkpoints",
    "ClipOutput",
    "Cluster",
    "Features",
    "Featurizer",
    "InputError",
    "Job",
    "Kernel",
    "OocNtkError",
    "Plan",
    "Preferences",
    "Projection",
    "ProjectionKind",
    "Solver",
    "StoreScheme",
    "__version__",
    "calibrate",
    "explain",
    "extend",
    "fit",
    "forget_layer_rule",
    "info",
    "layer_rule",
    "nearest",
    "open",
    "open_checkpoints",
    "open_features",
    "plan",
    "register_projection",
    "register_solver",
    "register_store",
    "run",
    "run_checkpoints",
    "spectrum",
    "surrogate",
    "verify",
]


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(import_module(".api", __name__), name)
    if name == "sklearn":  # needs scikit-learn, and is not among the names that `from ooc_ntk import *` brings
        return import_module(".sklearn", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
