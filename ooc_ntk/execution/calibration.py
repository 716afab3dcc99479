"""Calibration: measure the machine's rates once and keep them under the user's cache directory."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import torch

from ooc_ntk.compute.contract import measure_factored, measure_products
from ooc_ntk.compute.machine import (
    host_to_device_rate,
    limited_threads,
    machine_name,
    memory_rates,
    return_free_memory,
)
from ooc_ntk.errors import StorageError
from ooc_ntk.planning.rates import UNCALIBRATED, MachineRates
from ooc_ntk.storage.diskrate import measure_disk


def cache_folder() -> Path:
    """Folder of cached rates: ``$OOC_NTK_CACHE``, or ``ooc-ntk`` under the user's cache directory."""
    named = os.environ.get("OOC_NTK_CACHE")
    if named:
        return Path(named)
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/ooc-ntk"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ooc-ntk"


def rates_path(device: str) -> Path:
    """File of the rates of this machine, device, thread count and library versions."""
    name = machine_name(device, torch.get_num_threads())
    return cache_folder() / f"rates-{hashlib.blake2b(name.encode(), digest_size=8).hexdigest()}.json"


def calibrate(device: str, disk: Path) -> MachineRates:
    """Measure the rates of this machine and keep them.

    Args:
        device: torch device string.
        disk: folder on the file system where runs will be.

    Returns:
        The rates.
    """
    threads = torch.get_num_threads()
    precisions = ("float32", "bf16", "float64") if device == "cpu" else ("float32", "tf32", "bf16", "float64")
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
    )
    path = rates_path(device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(rates.to_json())
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"cannot keep the measured rates in {path}: {error.strerror}; set OOC_NTK_CACHE") from error
    return rates


def cached_rates(device: str) -> MachineRates:
    """The kept rates of this machine and device, or a guess that says it is one."""
    try:
        return MachineRates.from_json(rates_path(device).read_text())
    except (OSError, StorageError):
        return UNCALIBRATED
