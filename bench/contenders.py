"""Who takes part: ooc-ntk, ooc-ntk without its layer rules, and the peers, all from model and data to a result."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
from torch import nn

import ooc_ntk

from .inputs import Inputs
from .peers import MEMORY_BYTES, Refused, Result, jacobian_contraction, per_sample_loop
from .peers.curvlinops_peer import curvlinops_kernel
from .peers.dattri_peer import dattri_kernel
from .peers.neural_tangents_peer import interpreter, neural_tangents_kernel
from .peers.nngeometry_peer import nngeometry_kernel
from .peers.opacus_peer import opacus_kernel
from .peers.traker_peer import traker_kernel

#: Where everything is computed.
DEVICE = "cpu"

#: Names of the table.
OURS, DENSE, LOOP, TUTORIAL = "ooc-ntk", "ooc-ntk, dense engine", "per-sample loop", "torch.func tutorial"
NNGEOMETRY, OPACUS, DATTRI, TRAK = "nngeometry", "Opacus", "dattri", "TRAK"
CURVLINOPS, NEURAL_TANGENTS = "curvlinops", "neural-tangents"

#: Peers by the name that ``--peers`` takes.
PEERS = {
    "loop": LOOP,
    "torch.func": TUTORIAL,
    "nngeometry": NNGEOMETRY,
    "opacus": OPACUS,
    "dattri": DATTRI,
    "trak": TRAK,
    "curvlinops": CURVLINOPS,
    "neural-tangents": NEURAL_TANGENTS,
}

#: By peer what it is imported as, where it is a package that may be absent.
MODULES = {NNGEOMETRY: "nngeometry", OPACUS: "opacus", DATTRI: "dattri", TRAK: "trak", CURVLINOPS: "curvlinops"}


def ooc_kernel(model: nn.Module, inputs: Inputs, preferences: ooc_ntk.Preferences | None = None) -> Result:
    """ooc-ntk through its public face: plan (probe included), then run into a new directory on disk.

    Args:
        model: in eval mode.
        inputs: (samples, ...).
        preferences: what to fix in its plan.

    Returns:
        The kernel and its times; ``other_seconds`` is what a run does beside its tasks.
    """
    with tempfile.TemporaryDirectory(prefix="ooc-ntk-bench-") as folder:
        job = ooc_ntk.Job(model=model, train=inputs, kernel="trace", device=DEVICE)
        budget = ooc_ntk.Budget(host=MEMORY_BYTES, disk=MEMORY_BYTES)
        start = time.perf_counter()
        plan = ooc_ntk.plan(job, budget, preferences=preferences, out=folder)
        planned = time.perf_counter()
        kernel = ooc_ntk.run(job, Path(folder) / "run", plan=plan, progress=False)
        done = time.perf_counter()
        info = ooc_ntk.info(kernel.path)
        return Result(
            np.asarray(kernel),
            plan_seconds=planned - start,
            derive_seconds=info.rows_seconds,
            contract_seconds=info.kernel_seconds,
            other_seconds=done - planned - info.seconds,
            remark=f"{plan.method}, {plan.layout.describe()}, promised {plan.promised.seconds:.1f} s",
            figures={
                "plan_flops": plan.flops,
                "held_bytes": sum(block.held_bytes for block in plan.blocks),
                "jacobian_bytes": plan.jacobian_bytes,
            },
            phases={name: float(seconds) for name, seconds in getattr(info, "phases", {}).items()},
        )


def dense_kernel(model: nn.Module, inputs: Inputs) -> Result:
    """ooc-ntk with every layer's gradients materialised.

    Args:
        model: in eval mode.
        inputs: (samples, ...).

    Returns:
        The kernel and its times.

    Raises:
        Refused: if this version has no layer rules to leave out.
    """
    if "layer_rules" not in {field.name for field in fields(ooc_ntk.Preferences)}:
        raise Refused(f"version {ooc_ntk.__version__} knows no preference 'layer_rules'")
    return ooc_kernel(model, inputs, ooc_ntk.Preferences(layer_rules=False))


#: Contenders by name.
CONTENDERS: dict[str, Callable[[nn.Module, Inputs], Result]] = {
    LOOP: per_sample_loop,
    TUTORIAL: jacobian_contraction,
    NNGEOMETRY: nngeometry_kernel,
    OPACUS: opacus_kernel,
    DATTRI: dattri_kernel,
    TRAK: traker_kernel,
    CURVLINOPS: curvlinops_kernel,
    NEURAL_TANGENTS: neural_tangents_kernel,
    DENSE: dense_kernel,
    OURS: ooc_kernel,
}


def absent(contender: str) -> str | None:
    """Why a contender cannot take part here, whatever the workload.

    Args:
        contender: its name.

    Returns:
        The reason with what to do about it, or None if it can.
    """
    if contender == NEURAL_TANGENTS and interpreter() is None:
        return "its environment is not there; bash bench/neural_tangents/make_environment.sh"
    if contender in MODULES and importlib.util.find_spec(MODULES[contender]) is None:
        return "not installed; pip install 'ooc-ntk[bench]'"
    return None
