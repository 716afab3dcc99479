"""A run as a report sees it: its state, its kernel where it is finished, its labels where its data have any."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from ooc_ntk import api
from ooc_ntk.errors import OocNtkError, StorageError
from ooc_ntk.report.blocks import KernelMap, kernel_map
from ooc_ntk.storage.results import read_result
from ooc_ntk.storage.storeurl import checked_store, is_store

#: Name of the report in the run directory.
REPORT: Final = "report.html"


@dataclass(eq=False)
class Run:
    """A run.

    Attributes:
        name: what it is called on the page.
        place: directory or URL, as it was given.
        info: its state.
        kernel: None while it is not finished.
        labels: None where they are not known.
        without_labels: why not, in words; empty where they are known.
        job: the job, of a run of live objects.
    """

    name: str
    place: str
    info: api.RunInfo
    kernel: api.Kernel | None
    labels: api.Labels | None = None
    without_labels: str = ""
    job: api.Job | None = None
    _map: KernelMap | None = field(default=None, repr=False)
    _results: dict[str, dict[str, Any] | None] = field(default_factory=dict, repr=False)

    @property
    def path(self) -> Path:
        """The run directory; of a run opened from its store, where its papers are."""
        return self.info.path

    @property
    def map(self) -> KernelMap:
        """The picture of its kernel, looked at once."""
        assert self.kernel is not None
        if self._map is None:
            self._map = kernel_map(self.kernel, self.labels)
        return self._map

    def result(self, name: str) -> dict[str, Any] | None:
        """Figures of a result that is kept in the run; None if there is none that can be read."""
        if name not in self._results:
            found = read_result(self.path, name)
            self._results[name] = dict(found) if isinstance(found, Mapping) else None
        return self._results[name]

    def command(self, name: str, more: str = "") -> str:
        """What makes a result of this run."""
        return f"ooc-ntk {name} {shlex.quote(self.place)}{more}"


def open_run(path: str | Path, job: api.Job | None = None) -> Run:
    """Look at a run.

    Args:
        path: the run directory, finished or not; or the URL of the store of a finished run.
        job: the job, for the labels of a run of live objects.

    Returns:
        The run.

    Raises:
        StorageError: if there is none.
    """
    kernel: api.Kernel | None
    if is_store(path):
        kernel = api.open(path)
        info, place = replace(api.info(kernel.path), path=kernel.path), checked_store(str(path))
    else:
        place = str(path)
        info = api.info(_checked(Path(path)))
        kernel = _opened(info)
    found = Run(Path(place).absolute().name if not is_store(place) else place, place, info, kernel, job=job)
    if kernel is not None:
        try:
            found.labels = api.run_labels(kernel.path, job)
            if found.labels is None:
                found.without_labels = "the data have no class labels"
        except (OocNtkError, OSError) as error:
            found.without_labels = str(error)
    return found


def _checked(path: Path) -> Path:
    """Refuse the mean of checkpoints, which is a kernel and no run.

    Raises:
        StorageError: if it is one.
    """
    if path.name == "mean" and not (path / "plan.json").exists() and (path.parent / "checkpoints.json").exists():
        raise StorageError(f"{path} is the mean of the kernels in {path.parent}, and no run; report on {path.parent}")
    return path


def _opened(info: api.RunInfo) -> api.Kernel | None:
    """The kernel of a run; None if it is not finished."""
    return api.open(info.path) if info.finished else None
