"""The files that a job comes from, so that a finished run sees whether any of them changed."""

from __future__ import annotations

from pathlib import Path

from ooc_ntk.errors import InputError
from ooc_ntk.planning.outputs import is_output_name

from .callables import is_callable_spec, is_import_path
from .job import LIVE, Job
from .joined import split_joined
from .models import is_model_name
from .opened import files_read
from .specs import parse_spec


def named_files(job: Job, own: Path) -> list[Path] | None:
    """Every file that a job's model, weights, data and output function come from.

    Args:
        job: the job, after it was run: what the code of a ``file.py`` has read counts as well.
        own: the run directory, whose files do not count.

    Returns:
        The files; None where they are not known: live objects, import paths, folders, data sets and texts by name,
        processes that load data, and code that may read files unseen.
    """
    spec = job.spec()
    named: list[Path] = []
    code = False
    for text, is_name in ((str(spec["model"]), is_model_name), (str(spec["outputs"]), is_output_name)):
        if is_name(text) and ":" not in text:
            continue
        if text == LIVE or not is_callable_spec(text) or is_import_path(text):
            return None
        code = True
    if spec["weights"] is not None:
        named.append(Path(str(spec["weights"])))
    for what in ("train", "test"):
        for part in [] if spec[what] is None else split_joined(str(spec[what])):
            try:
                data = parse_spec(part, what)
            except InputError:  # a live object
                return None
            if data.kind not in ("builtin", "file", "factory") or is_import_path(data.target):
                return None
            code = code or data.kind == "factory"
            if data.kind == "file":
                named.append(Path(data.target))
    if not all(path.is_file() for path in named) or job.loader_workers:
        return None
    read = files_read(own) if code else []
    return None if read is None else [*named, *read]
