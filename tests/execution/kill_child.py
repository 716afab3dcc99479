"""Child of test_kill.py: runs or goes on with one job until it is done, killed or interrupted.

Run as ``python kill_child.py OUT PLAN SCHEDULER``. Also holds the job, which the test itself makes again from here.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

import ooc_ntk
from ooc_ntk.errors import RunInterrupted

#: Exit code of a run that was asked to stop.
INTERRUPTED = 130


def make_model() -> nn.Module:
    """A small CNN for 8×8 digits, 10 outputs."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 3 * 3, 10),
    )


def make_job(folder: Path) -> ooc_ntk.Job:
    """The job, from files only, as the command line would make it."""
    return ooc_ntk.Job(
        model=f"{Path(__file__).resolve()}:make_model",
        train=str(folder / "train.npy"),
        test=str(folder / "test.npy"),
        normalize="cosine",
        device="cpu",
    )


def main(out: str, plan: str, scheduler: str) -> int:
    job = make_job(Path(plan).parent)
    stored = None if (Path(out) / "plan.json").exists() else ooc_ntk.Plan.load(plan)
    try:
        ooc_ntk.run(job, out, plan=stored, scheduler=scheduler, progress=False)
    except RunInterrupted as error:
        print(error)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
