"""Makes the run directories by which a change of the run format is noticed: ``python -m tests.data.make``.

One is finished, one was stopped halfway, one has projected features. They are made by the version whose format they
have and never again: a later version must open them as they are. See CONTRIBUTING.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

import ooc_ntk
from ooc_ntk.errors import RunInterrupted
from ooc_ntk.execution.driver import Observer
from ooc_ntk.storage.manifest import RUN_FORMAT
from tests.rates import RATES

#: Where they are.
DATA = Path(__file__).parent

#: Of which job: everything is made from names, so that it can be made again anywhere.
BUDGET = ooc_ntk.Budget("16GiB", disk="1GiB")


def job(**given: object) -> ooc_ntk.Job:
    """The job of the stored runs."""
    return ooc_ntk.Job("mlp,width=4,classes=2", "digits[0:24]", test="digits[24:30]", device="cpu", seed=0, **given)


def stopping_after(steps: int) -> Observer:
    """Stops a run once some work is done."""
    left = [steps]

    def advance(phase: str, amount: float) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    return Observer(advance=advance)


def make(folder: Path) -> None:
    """Make the runs of today's format in a folder."""
    ways = {
        "finished": (job(), ooc_ntk.Preferences(dataflow="recompute", tile_samples=8), 0),
        "half": (job(), ooc_ntk.Preferences(dataflow="spill", tile_samples=8, superblock_tiles=1), 7),
        "projected": (job(projection="sjlt:16"), ooc_ntk.Preferences(tile_samples=8), 0),
    }
    for name, (wanted, preferences, stop) in ways.items():
        plan = ooc_ntk.plan(wanted, BUDGET, preferences=preferences, rates=RATES)
        try:
            ooc_ntk.run(
                wanted, folder / name, plan=plan, scheduler="serial", progress=stopping_after(stop) if stop else False
            )
        except RunInterrupted:
            assert stop


if __name__ == "__main__":
    target = DATA / f"run-format-{RUN_FORMAT}"
    if target.exists():
        sys.exit(f"{target} is there already: runs of a format are made once")
    make(target)
