"""The files that a job names, so that a finished run sees whether any of them changed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from ooc_ntk.errors import InputError
from ooc_ntk.planning.outputs import is_output_name

from .callables import is_callable_spec, is_import_path
from .job import LIVE, Job
from .joined import split_joined
from .models import is_model_name
from .specs import parse_spec


def named_files(job: Job) -> list[Path] | None:
    """Every file that a job's model, weights, data and output function come from.

    Args:
        job: the job, loaded: modules that a ``file.py`` imports from beside it count as well.

    Returns:
        The files; None where they are not known: live objects, import paths, folders, data sets and texts by name.
    """
    spec = job.spec()
    found: list[Path] = []
    model, outputs = str(spec["model"]), str(spec["outputs"])
    if not (is_model_name(model) and ":" not in model):
        found += _of_callable(model)
    if not is_output_name(outputs):
        found += _of_callable(outputs)
    if spec["weights"] is not None:
        found.append(Path(str(spec["weights"])))
    for what in ("train", "test"):
        if spec[what] is not None:
            found += _of_data(str(spec[what]), what)
    return found if all(path.is_file() for path in found) else None


#: Stands for files that are not known: no file has this name.
_UNKNOWN = Path("/nonexistent/unknown")


def _of_callable(spec: str) -> list[Path]:
    if spec == LIVE or not is_callable_spec(spec) or is_import_path(spec):
        return [_UNKNOWN]
    path = Path(spec.rpartition(":")[0]).resolve()
    modules = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    beside = (Path(file).resolve() for file in modules if file)
    return [path, *sorted({file for file in beside if path.parent in file.parents and file.is_file()})]


def _of_data(text: str, what: str) -> list[Path]:
    kinds: dict[str, Callable[[str], list[Path]]] = {
        "builtin": lambda target: [],  # noqa: ARG005 - in installed packages
        "file": lambda target: [Path(target)],
        "factory": _of_callable,
    }
    found: list[Path] = []
    for part in split_joined(text):
        try:
            spec = parse_spec(part, what)
        except InputError:
            return [_UNKNOWN]
        of = kinds.get(spec.kind)
        found += [_UNKNOWN] if of is None else of(spec.target)
    return found
