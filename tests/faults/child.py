"""What runs in a disturbed process: planning a job, or the command line ``ooc-ntk run`` itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import ooc_ntk
from ooc_ntk.api import describe_job
from ooc_ntk.cli import app
from tests.rates import RATES

from .injection import FileLayer, Injection
from .subjects import SUBJECTS


def plan(subject: str, data: str, path: str) -> int:
    """Plan a job and keep the plan.

    Args:
        subject: name of the job.
        data: folder of the samples.
        path: where the plan goes.
    """
    torch.set_num_threads(1)
    chosen = SUBJECTS[subject]
    made = ooc_ntk.plan(
        describe_job(None, chosen.arguments(Path(data)))[0],
        ooc_ntk.Budget("16GiB", disk="16MiB"),
        preferences=ooc_ntk.Preferences(**chosen.preferences),
        out=path,
        rates=RATES,
    )
    made.save(path)
    return 0


def run(
    subject: str, data: str, plan: str, out: str, scheduler: str, injection: str | None, fired: str, counts: str
) -> int:
    """Run a job, or what is left of it, by the command line.

    Args:
        subject: name of the job.
        data: folder of the samples.
        plan: file of the plan, used where no run is there yet.
        out: run directory.
        scheduler: name of the executor.
        injection: the fault, as JSON; None counts calls only.
        fired: a file that is made when the fault strikes.
        counts: a file for the numbers of calls at the file layer; only written when the run ends by itself.

    Returns:
        The exit code.
    """
    layer = FileLayer(Path(out), None if injection is None else Injection.from_json(injection), Path(fired))
    layer.install()
    words = ["run", *SUBJECTS[subject].flags(Path(data)), "--out", out, "--scheduler", scheduler, "--quiet"]
    if not (Path(out) / "plan.json").exists():
        words += ["--plan", plan]
    code = 0
    try:
        app(words)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    Path(counts).write_text(json.dumps(layer.counts))
    return code


CALLS = {"plan": plan, "run": run}
