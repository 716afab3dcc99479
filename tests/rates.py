"""Rates of a machine that no test has to measure: a calibration takes ten seconds, and its figures would vary."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ooc_ntk.compute.rates import rates_path
from ooc_ntk.planning.rates import UNCALIBRATED

#: Plausible ones that count as measured.
RATES = replace(UNCALIBRATED, machine="tests", measured=True)


def keep_rates() -> Path:
    """Keep them in the cache that the environment names, for as many threads as torch has now."""
    path = rates_path("cpu")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(RATES.to_json())
    return path
