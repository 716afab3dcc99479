"""Optional dependencies: which extra brings each, and the one error that is raised where it is missing."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Final

from .errors import InputError

#: Optional modules: what people call it, and what pip is told to install.
EXTRAS: Final = {
    "bokeh": ("Bokeh", "ooc-ntk[report]"),  # the extra cluster brings it as well
    "cupy": ("CuPy", "ooc-ntk[cu13]"),
    "dask_cuda": ("dask-cuda", "ooc-ntk[cuda-cluster]"),
    "faiss": ("FAISS", "ooc-ntk[faiss]"),
    "kvikio": ("KvikIO", "ooc-ntk[gds]"),
    "matplotlib": ("matplotlib", "ooc-ntk[plots]"),
    "mlxtend": ("mlxtend", "ooc-ntk[demo]"),
    "numba": ("numba", "numba"),  # a dependency, but a machine may lack it
    "obstore": ("the package obstore", "ooc-ntk[cloud]"),
    "sklearn": ("scikit-learn", "ooc-ntk[sklearn]"),
    "timm": ("timm", "ooc-ntk[timm]"),
    "torchvision": ("torchvision", "ooc-ntk[vision]"),
    "transformers": ("transformers", "ooc-ntk[text]"),
    "triton": ("Triton", "triton"),  # comes with torch's builds for CUDA
}


def is_installed(module: str) -> bool:
    """Whether an optional module is there; it is not imported."""
    return importlib.util.find_spec(module.partition(".")[0]) is not None


def how_to_install(module: str) -> str:
    """The command that installs an optional module.

    >>> how_to_install("matplotlib")
    "python -m pip install 'ooc-ntk[plots]'"
    """
    what = EXTRAS[module.partition(".")[0]][1]
    return f"python -m pip install {repr(what) if '[' in what else what}"


def missing(module: str, need: str, instead: str = "", error: Exception | None = None) -> InputError:
    """The error for an optional module that cannot be imported.

    Args:
        module: the module.
        need: what needs it, as a message begins.
        instead: what else would do.
        error: what importing raised; None where it is not installed.

    >>> str(missing("matplotlib", "a picture"))
    "a picture needs matplotlib, which is not installed; run: python -m pip install 'ooc-ntk[plots]'"
    """
    root = module.partition(".")[0]
    absent = error is None or (isinstance(error, ModuleNotFoundError) and (error.name or root).startswith(root))
    problem = "is not installed" if absent else f"cannot be imported here ({type(error).__name__}: {error})"
    return InputError(
        f"{need} needs {EXTRAS[root][0]}, which {problem}; run: {how_to_install(root)}"
        + (f"; or {instead}" if instead else "")
    )


def require(module: str, need: str, instead: str = "") -> ModuleType:
    """Import an optional module.

    Args:
        module: its name, or that of a module inside it.
        need: what needs it, as a message begins.
        instead: what else would do.

    Raises:
        InputError: if it is missing or broken; names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # an installation that is broken raises other errors than a missing one
        raise missing(module, need, instead, error) from error
