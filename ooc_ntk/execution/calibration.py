"""Calibration: measure the machine's rates once and keep them under the user's cache directory."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Final

import torch

from ooc_ntk.compute.contract import measure_factored, measure_products
from ooc_ntk.compute.machine import (
    free_host_bytes,
    host_to_device_rate,
    limited_threads,
    machine_name,
    memory_rates,
    return_free_memory,
)
from ooc_ntk.compute.rates import cached_rates, rates_path
from ooc_ntk.planning.rates import MachineRates
from ooc_ntk.storage.diskrate import measure_disk
from ooc_ntk.units import ITEM_BYTES

logger = logging.getLogger(__name__)

#: Share of the free memory that tiles may fill for the page cache to serve them again (chosen; others use it as well).
CACHED_SHARE: Final = 0.5


def calibrate(device: str, disk: Path) -> MachineRates:
    """Measure the rates of this machine and keep them.

    Args:
        device: torch device string.
        disk: folder on the file system where runs will be.

    Returns:
        The rates.

    Raises:
        StorageError: if nothing can be written on that disk. That they cannot be kept is only said.
    """
    threads = torch.get_num_threads()
    precisions = tuple(name for name in ITEM_BYTES if name != "tf32" or device != "cpu")
    with limited_threads(threads):
        gemm, syrk = measure_products(device, precisions)
        expand, elements = measure_factored(device, precisions)
        fill, copy = memory_rates()
    return_free_memory()
    measured = measure_disk(disk)
    rates = MachineRates(
        machine=machine_name(device, threads),
        gemm=gemm,
        syrk=syrk,
        fill=fill,
        copy=copy,
        disk_write=measured.write,
        disk_read=measured.read,
        host_to_device=host_to_device_rate(device),
        commit_seconds=measured.commit_seconds,
        expand=expand,
        elements=elements,
        direct_wins=measured.direct_wins,
    )
    path = rates_path(device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(rates.to_json())
        temporary.replace(path)
    except OSError as error:
        logger.warning(
            "cannot keep the measured rates in %s (%s), so the next plan measures them again; set OOC_NTK_CACHE to a "
            "folder that can be written",
            path,
            error.strerror or error,
        )
    return rates


def reads_directly(device: str, stored_bytes: int) -> bool:
    """Whether a run reads its tiles past the page cache: where that was measured to be faster, and they do not fit it.

    Args:
        device: the plan's device.
        stored_bytes: what the run keeps on disk.
    """
    return cached_rates(device).direct_wins and stored_bytes > CACHED_SHARE * free_host_bytes()
