"""Several worker processes: what each of them may take of the machine."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from ooc_ntk.errors import InputError

from .budget import DRIVER_BYTES, WORKER_BYTES, Limits
from .layout import IN_MEMORY
from .memory import LIBRARY_GROWTH_BYTES
from .workload import Workload

#: What pickling live objects takes of the driver's memory beside them, as a share of their bytes (measured: 1.15).
PICKLED_SHARE: Final = 1.25


def one_worker(workload: Workload, limits: Limits, workers: int, dataflow: str | None) -> tuple[Workload, Limits]:
    """The job and the budget as each of several worker processes has them.

    Args:
        workload: the measured job.
        limits: budget of this machine in bytes.
        workers: worker processes, which share its host memory.
        dataflow: the dataflow that is asked for, if one is.

    Returns:
        Both, for one of them. The driver keeps what planning took, and hands out tasks.

    Raises:
        InputError: if the dataflow keeps tiles in the memory of one process.
    """
    if dataflow in IN_MEMORY:
        raise InputError(
            f"dataflow {dataflow!r} keeps tiles in the memory of one process, and workers share tiles on disk; use "
            "'spill', or leave the dataflow or the workers out"
        )
    running = workload.baseline_bytes + LIBRARY_GROWTH_BYTES + int(PICKLED_SHARE * workload.live_bytes)
    driver = max(workload.planning_bytes, running) + DRIVER_BYTES
    worker = replace(workload, planning_bytes=0, baseline_bytes=workload.baseline_bytes + WORKER_BYTES, workers=workers)
    return worker, limits.of_one_worker(workers, driver)
