"""Explaining a plan: the measured job, and beside an exact one a pilot of its projection."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Final

from ooc_ntk.errors import InputError
from ooc_ntk.planning.budget import Budget, Limits
from ooc_ntk.planning.explain import PILOT_KIND, Explanation, explain
from ooc_ntk.planning.planner import Preferences
from ooc_ntk.planning.projection import Projection
from ooc_ntk.planning.rates import MachineRates
from ooc_ntk.planning.workload import Workload

from .measure import measure
from .prepare import PreparedJob
from .session import measured

logger = logging.getLogger(__name__)

#: Columns of the sketch whose speed is timed beside an exact kernel (a usual size; its error is extrapolated).
PILOT_COLUMNS: Final = 4096

#: Parameters below which a projection is not looked at: the exact kernel takes no time to speak of (a choice).
FEWEST_PARAMETERS: Final = 1024


def explained(
    prepared: PreparedJob,
    before: int,
    budget: Budget | None,
    preferences: Preferences | None,
    out: Path,
    rates: MachineRates | None,
    store: str | None = None,
) -> Explanation:
    """Measure a prepared job, plan it, and say why the plan is as it is.

    Args:
        prepared: the job.
        before: peak resident bytes before it was prepared.
        budget: limits; None takes 80% of what is free.
        preferences: what is fixed by hand.
        out: where the run will be.
        rates: machine rates; None uses the calibrated ones.
        store: URL of the store that tiles and kernel will go to; None is ``out``.

    Returns:
        The explanation, with the plan.

    Raises:
        InputError: if the model cannot be run or differentiated on its data.
        BudgetError: if no plan fits.
    """
    workload, limits, rates = measured(prepared, before, budget, preferences, out, rates, store)
    pilot = _pilot(prepared, workload, limits, preferences)
    return explain(workload, limits, rates, preferences, pilot, prepared.digest)


def _pilot(
    prepared: PreparedJob, workload: Workload, limits: Limits, preferences: Preferences | None
) -> Workload | None:
    """An exact job as it would be projected, measured; None where it cannot be, or is too small for it to pay."""
    job = prepared.job
    if job.sketch is not None or job.of_features or job.by is not None or workload.columns < FEWEST_PARAMETERS:
        return None
    dim = min(PILOT_COLUMNS, workload.columns // 2 // 4 * 4)
    try:
        projected = replace(prepared, job=replace(job, projection=Projection(PILOT_KIND, dim=dim)), stand_ins={})
        rules = preferences is None or preferences.layer_rules
        found = measure(projected, limits, layer_rules=rules)
    except InputError as error:
        logger.info("no price of a projection: %s", error)
        return None
    return replace(found, planning_bytes=workload.planning_bytes)
