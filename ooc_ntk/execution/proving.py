"""The proof as the last step of a run: within a tenth of the run's time and the memory that was promised."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

from ooc_ntk.compute.machine import resident_bytes, return_free_memory
from ooc_ntk.errors import VerificationError
from ooc_ntk.planning.plan import Plan
from ooc_ntk.storage.directory import RunDirectory
from ooc_ntk.units import format_bytes, format_seconds

from .prepare import PreparedJob
from .products import directions_held
from .proof import PANEL_BYTES, Proof, Prover
from .status import keep_proof, read_audit

logger = logging.getLogger(__name__)

#: Share of the time that a session's tasks took, up to which they are proven.
TIME_SHARE: Final = 0.1

#: Less time than this is not enough: the first backward pass through a backward pass loads parts of torch before the
#: first number is there (measured: 0.6 to 0.8 s).
SHORTEST_SECONDS: Final = 1.0

#: Bytes of the smallest batch that a proof counts on, and of what libraries load for it (measured: 10 MB for forward
#: mode).
BATCH_BYTES: Final = 2**24
LIBRARY_BYTES: Final = 2**24

#: Bytes in which R is made anew for a projected kernel (65,536 parameters by 32 dense columns, and their random words).
SKETCH_BYTES: Final = 2**27


def prove_run(
    directory: RunDirectory, plan: Plan, prepared: PreparedJob, seconds: float, note: Callable[[str], None]
) -> None:
    """Prove what a session finished, or say why not.

    Args:
        directory: the finished run, locked.
        plan: its plan.
        prepared: the job.
        seconds: what the session's tasks took; 0 if there were none, and then nothing is proven again.
        note: told the outcome in one line.

    Raises:
        VerificationError: if the kernel is not what float64 gradients say, now or when it was finished.
    """
    if not seconds:
        before = (read_audit(directory) or {}).get("proof")
        if before is not None and before["plan"] == plan.digest and not before["passed"]:
            raise _refuted(directory, before["line"])
        return
    began, allowed = time.perf_counter(), TIME_SHARE * seconds
    how = f"'ooc-ntk verify {directory.root}' proves it"
    if allowed < SHORTEST_SECONDS:
        note(f"proof left out: the run took {format_seconds(seconds)}, a tenth of which is too short; {how}")
        return
    return_free_memory()
    room = plan.promised.host_bytes - resident_bytes(children=True)  # idle workers are still there
    needed = needed_bytes(plan, prepared)
    if needed > room:
        note(
            f"proof left out: needs {format_bytes(needed)} for the model in float64, {format_bytes(max(0, room))} of "
            f"the promised {format_bytes(plan.promised.host_bytes)} are free; {how}"
        )
        return
    found = _proven(directory, plan, prepared, room - needed, began + allowed)
    return_free_memory()
    if isinstance(found, str):
        note(f"proof left out: {found}; {how}")
        return
    keep_proof(directory, plan, found, by="run")
    if not found.passed:
        raise _refuted(directory, str(found))
    note(f"proof: {found}")


def _proven(
    directory: RunDirectory,
    plan: Plan,
    prepared: PreparedJob,
    spare: int,
    until: float,
) -> Proof | str:
    """As large a proof as time and memory allow, or why there is none; the model's copy goes with this function."""
    held = directions_held(plan, spare // 2)
    prover = Prover(
        directory.root,
        plan,
        prepared,
        plan.seed,
        held=held,
        batch_bytes=BATCH_BYTES + spare // 2,
        seconds=until - time.perf_counter(),
    )
    if prover.sweep_bytes > BATCH_BYTES + spare // 2:
        return (
            f"one sample takes {format_bytes(prover.sweep_bytes)} in float64, which the promised memory does not hold"
        )
    left = until - time.perf_counter()
    if prover.least_seconds() > left:
        wanted = format_seconds(prover.least_seconds())
        return (
            f"two samples would take {wanted}, {format_seconds(max(0.0, left))} of a tenth of the run's time are left"
        )
    return prover.grown(left, plan.samples)


def needed_bytes(plan: Plan, prepared: PreparedJob) -> int:
    """Host memory that the smallest proof takes: a float64 copy of the model, a direction, gradients, a batch, a panel.

    The copy is made in the model's own precision first: 12 bytes a parameter at most while it is.
    """
    state = sum(value.numel() for value in prepared.module.state_dict().values())
    copies = 4 if plan.projection is not None else 3
    fixed = BATCH_BYTES + LIBRARY_BYTES + 2 * PANEL_BYTES
    fixed += SKETCH_BYTES if plan.projection is not None else 0
    diagonal = 4 * 8 * plan.kernel_shape[0]
    return int(12 * state + 8 * copies * sum(prepared.function.sizes.values()) + fixed + diagonal)


def _refuted(directory: RunDirectory, line: str) -> VerificationError:
    return VerificationError(
        f"the kernel in {directory.root} is not what float64 gradients say: {line}; it is kept, do not rely on it: "
        f"'ooc-ntk verify {directory.root} --full' says more, and the same job with --no-layer-rules or --precision "
        "float64 in another --out tells whether a layer rule or rounding is to blame"
    )
