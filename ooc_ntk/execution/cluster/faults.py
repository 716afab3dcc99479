"""What went wrong with a task on a worker, and what helps: another worker, none of this kind, or nothing."""

from __future__ import annotations

import re
from typing import Final

from ooc_ntk.errors import ClusterError

#: What CUDA says after which nothing works in that process any more (https://docs.nvidia.com/cuda/cuda-runtime-api,
#: section "Error handling": those that leave the process in an inconsistent state), as torch prints it.
_BROKEN: Final = re.compile(
    r"an illegal memory access|device-side assert|unspecified launch failure|misaligned address|"
    r"an illegal instruction|invalid program counter|hardware stack error|uncorrectable ECC error|"
    r"uncorrectable NVLink error|device\(s\) is/are busy or unavailable|device is lost|GPU is lost|"
    r"CUDNN_STATUS_EXECUTION_FAILED|CUBLAS_STATUS_EXECUTION_FAILED",
    re.IGNORECASE,
)


class BrokenDeviceError(ClusterError):
    """A worker can no longer use its device; the task is done by another one."""


class UnknownSessionError(ClusterError):
    """A worker has not been told of a session yet."""


def breaks_device(error: BaseException) -> bool:
    """Whether an error leaves a process unable to use its device, so that its worker must go.

    >>> breaks_device(RuntimeError("CUDA error: an illegal memory access was encountered"))
    True
    >>> breaks_device(RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"))
    False
    """
    seen: BaseException | None = error
    while seen is not None:
        if _BROKEN.search(str(seen)):
            return True
        seen = seen.__cause__
    return False
