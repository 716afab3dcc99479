"""How torch uses a CUDA device: an allocator that does not fragment, and the same bits every time."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch

logger = logging.getLogger(__name__)

#: Variables by which a user sets the allocator up; the first is the name since torch 2.9.
ALLOCATOR_VARIABLES: Final = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")

#: Segments that grow, so that buffers of one size are not stranded between those of another.
EXPANDABLE: Final = "expandable_segments:True"

#: The workspace that cuBLAS needs to be deterministic: 8 buffers of 4 MiB, as much as torch gives it on Hopper anyway.
CUBLAS_VARIABLE: Final = "CUBLAS_WORKSPACE_CONFIG"
CUBLAS_WORKSPACE: Final = ":4096:8"


def set_up_device(device: str) -> None:
    """Set up a CUDA device before anything is put there; what a user has set stays. Does nothing for a CPU.

    Args:
        device: torch device string.
    """
    if torch.device(device).type != "cuda":
        return
    os.environ.setdefault(CUBLAS_VARIABLE, CUBLAS_WORKSPACE)
    if sys.platform != "linux" or any(os.environ.get(name) for name in ALLOCATOR_VARIABLES):
        return
    if torch.cuda.get_allocator_backend() != "native":
        return
    core: Any = torch._C
    if getattr(core, "_accelerator_getAllocatorSettings", str)():
        return  # set from Python
    try:
        if hasattr(core, "_accelerator_setAllocatorSettings"):
            core._accelerator_setAllocatorSettings(EXPANDABLE)
        else:  # before torch 2.9
            torch.cuda.memory._set_allocator_settings(EXPANDABLE)
    except RuntimeError as error:
        logger.info("the allocator's segments stay as they are: %s", error)


@contextmanager
def deterministic_device() -> Iterator[None]:
    """Have cuDNN take the same deterministic algorithms every time, and bf16 summed up in float32; set back after.

    A search for the fastest algorithm (``benchmark``) may find another one in the next run.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.deterministic, cudnn.benchmark, matmul.allow_bf16_reduced_precision_reduction
    cudnn.deterministic, cudnn.benchmark, matmul.allow_bf16_reduced_precision_reduction = True, False, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark, matmul.allow_bf16_reduced_precision_reduction = before
