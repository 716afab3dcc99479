"""A job from what a person gives: a job file, the name of a data set, a run directory, flags over them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .errors import InputError
from .inputs.callables import absolute_callable, is_callable_spec
from .inputs.images.seeds import parse_seed_name
from .inputs.job import LIVE, Job
from .inputs.jobfile import read_job_file
from .inputs.models import absolute_model
from .inputs.specs import FILE_KINDS, absolute_spec, train_and_test
from .planning.budget import Budget
from .planning.projection import parsed_fields
from .storage.directory import RunDirectory


def describe_job(
    job_file: str | Path | None,
    given: Mapping[str, object],
    *,
    run: str | Path | None = None,
    named_model: str | None = None,
    host: str | int | None = None,
    device_memory: str | int | None = None,
    disk: str | int | None = None,
) -> tuple[Job, Budget]:
    """Make a job and a budget from a job file or a run directory, with some arguments given by hand.

    Args:
        job_file: TOML file, or the name of a data set (``CIFAR-10_0_2500_0_1000``, ``cifar10``), or None.
        given: arguments of a job that override what the file says.
        run: a run directory; its stored job is used where neither a file nor a model is given.
        named_model: a model beside the name of a data set.
        host: host budget that overrides the file's.
        device_memory: device budget that overrides the file's.
        disk: disk budget that overrides the file's.

    Returns:
        The job and the budget.

    Raises:
        InputError: for unknown keys, missing model or data, or wrong values.
    """
    stored: dict[str, object] = {}
    sizes: dict[str, str | int | None] = {}
    if job_file is not None and not _is_job_file(job_file):
        given, job_file = {**given, **_named_job(str(job_file), named_model, given)}, None
    elif named_model is not None:
        raise InputError(f"a job file names its own model; give another one as --model {named_model}")
    if job_file is not None:
        read = read_job_file(job_file)
        stored = read.arguments()
        if read.budget is not None:
            sizes = {"host": read.budget.host, "device": read.budget.device, "disk": read.budget.disk}
    elif run is not None and RunDirectory(run).job_path.exists():
        stored = read_job_file(RunDirectory(run).job_path).arguments()
        if "model" in given and "weights" not in given and stored.get("model") != LIVE:
            stored.pop("weights", None)
    given = _projected(_absolute(given), stored.get("projection"))
    wanted = {"host": host, "device": device_memory, "disk": disk}
    sizes.update({name: size for name, size in wanted.items() if size is not None})
    return Job.from_spec({**stored, **given}), Budget(**sizes)


def _is_job_file(text: str | Path) -> bool:
    """Whether a word is a job file and no data set."""
    return isinstance(text, Path) or text.endswith(".toml") or (Path(text).is_file() and not text.endswith(FILE_KINDS))


def _named_job(data: str, model: str | None, given: Mapping[str, object]) -> dict[str, object]:
    """Train data, test data and model of the words before all flags."""
    for flag, value in (("train", data), ("model", model)):
        if value is not None and given.get(flag) is not None:
            raise InputError(
                f"{flag} is given twice, as {value!r} and as --{flag} {given[flag]}; leave one of them out"
            )
    train, test = train_and_test(data)
    found: dict[str, object] = {"train": train}
    if test is not None and given.get("test") is not None:
        raise InputError(
            f"{data!r} names test data as well, {test}, beside --test {given['test']}; leave --test out, or name the "
            f"train data alone: --train {train}"
        )
    if test is not None:
        found["test"] = test
    return found if model is None else {**found, "model": model}


def _projected(given: Mapping[str, object], stored: object) -> dict[str, object]:
    """Arguments with the parts of a projection that were given by hand brought together, over what a file says.

    Raises:
        InputError: for a wrong projection, or parts of one where there is none.
    """
    found = dict(given)
    names = {"target_error": "target_error", "projection_seed": "seed", "backend": "backend"}
    parts = {field: found.pop(name) for name, field in names.items() if name in found}
    text = found.get("projection", stored)
    if not parts:
        return found
    if text is None and "target_error" not in parts:
        flag = next(name for name, field in names.items() if field in parts).replace("_", "-")
        raise InputError(f"--{flag} belongs to a projection; give one, for example --projection sjlt:4096")
    fields: dict[str, object] = {}
    if isinstance(text, Mapping):
        fields = dict(text)
    elif isinstance(text, str):
        fields = parsed_fields(text)
    if "target_error" in parts and "projection" not in found:
        fields.pop("dim", None)
    found["projection"] = {**fields, **parts}
    return found


def _absolute(given: Mapping[str, object]) -> dict[str, object]:
    """Arguments given by hand, with paths relative to the current folder and not to a job file's."""
    found = dict(given)
    for name, value in given.items():
        if name in ("train", "test") and isinstance(value, str):
            found[name] = value if "_" in value and parse_seed_name(value) else absolute_spec(value, None, name)
        elif name == "model" and isinstance(value, str):
            found[name] = absolute_model(value)
        elif name == "outputs" and isinstance(value, str):
            found[name] = absolute_callable(value, None, name) if is_callable_spec(value) else value
        elif name in ("weights", "data_dir", "image_cache") and isinstance(value, str | Path):
            found[name] = Path(value).expanduser().absolute()
    return found
