"""Rates of this machine as they were measured last, kept under the user's cache directory."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import torch

from ooc_ntk.errors import StorageError
from ooc_ntk.planning.rates import UNCALIBRATED, MachineRates

from .machine import machine_name


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


def cached_rates(device: str) -> MachineRates:
    """The kept rates of this machine and device, or a guess that says it is one."""
    try:
        return MachineRates.from_json(rates_path(device).read_text())
    except (OSError, StorageError):
        return UNCALIBRATED
