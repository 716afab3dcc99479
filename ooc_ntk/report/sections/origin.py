"""What a run computed, from what, by which versions; and what proves it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ooc_ntk.errors import OocNtkError
from ooc_ntk.inputs.jobfile import read_job_file
from ooc_ntk.report.parts import Missing, Part, Section, Table, Text
from ooc_ntk.report.tables import provenance
from ooc_ntk.storage.directory import RunDirectory
from ooc_ntk.units import format_seconds

from .run import Run

#: Keys of a job file in words.
JOB_WORDS: Final = {
    "model": "model",
    "weights": "weights",
    "train": "train data",
    "test": "test data",
    "data_dir": "data folder",
    "outputs": "output function",
    "parameters": "parameters",
    "scale": "several outputs",
    "normalize": "normalisation",
    "seed": "seed of the job",
}

#: Labels of a plan's summary that say more where nothing is known of it.
PLAN_WORDS: Final = {
    "rows by": "rows derived by",
    "head": "output layer",
    "arithmetic": "work",
    "time": "time promised",
    "host memory": "host memory promised",
    "device memory": "device memory promised",
    "disk": "disk promised",
    "error": "error expected",
    "digest": "digest of the plan",
}

#: Digests and the rest of a run's provenance in words.
ORIGIN_WORDS: Final = {
    "model": "digest of the model's state",
    "data": "digest of the data",
    "kernel": "digest of the kernel's settings",
    "plan": "digest of the plan",
    "grown": "grown",
    "versions": "versions",
    "retries": "tried again",
    "batches": "batches",
}

#: Labels of the plan's summary that say what was computed; the others say how.
_WHAT: Final = ("kernel", "samples", "Jacobian", "projection", "error", "head")


def computed(run: Run) -> Section:
    """What was computed and from what."""
    rows = [(PLAN_WORDS.get(label, label), value) for label, value in run.info.plan.summary() if label in _WHAT]
    parts: list[Part] = [Table((), tuple(rows + _job(run)))]
    return Section("computed", "What was computed", tuple(parts))


def _job(run: Run) -> list[tuple[str, str]]:
    """The job as its file has it."""
    try:
        given = read_job_file(RunDirectory(run.path).job_path).arguments()
    except OocNtkError:
        return []
    found = []
    for name, words in JOB_WORDS.items():
        value = given.get(name)
        if value is not None:
            found.append((words, _in_words(name, value)))
    return found


def _in_words(name: str, value: object) -> str:
    if value == "live":
        return "a live Python object"
    if name == "scale":
        return {"sum": "summed", "mean": "summed, divided by their number"}.get(str(value), str(value))
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def how(run: Run) -> Table:
    """How the plan has it done."""
    rows = [(PLAN_WORDS.get(label, label), value) for label, value in run.info.plan.summary() if label not in _WHAT]
    return Table((), tuple(rows), caption="How it was done", folded=True)


def verification(run: Run) -> Section:
    """What an audit or a proof showed, check by check."""
    audited, plan = run.info.audited, run.info.plan
    command = run.command("verify")
    if not audited:
        return Section("verification", "Verification", (Missing("Checks of the finished kernel", command),))
    proof: Mapping[str, Any] | None = audited.get("proof")
    parts: list[Part] = []
    mine = audited.get("plan", (proof or {}).get("plan", plan.digest)) == plan.digest
    if not mine:
        parts.append(Text("The last verification was of an earlier state of this run.", soft=True))
    rows = [
        (str(check["name"]), "passed" if check["passed"] else "FAILED", str(check["detail"]))
        for check in audited.get("checks") or []
    ]
    if not rows and proof is not None:
        rows = [
            ("products with vectors", "passed" if proof["passed"] else "FAILED", str(proof["line"])),
        ]
    if rows:
        parts.append(Table(("check", "verdict", "what was seen"), tuple(rows), words=(1, 2)))
    if audited.get("relative_error") is not None and "checks" not in audited:
        projected = audited.get("predicted_error") is not None
        error = f"{audited['relative_error']:.2%}" if projected else f"{audited['relative_error']:.1e}"
        line = f"{audited['entries']:,} entries recomputed in float64, relative error {error}"
        if projected:
            line += f", {audited['predicted_error']:.2%} predicted of the projection"
        elif audited.get("tolerance") is not None:
            line += f", tolerance {audited['tolerance']:.0e}"
        parts.append(Text(f"{line}."))
    if proof is not None and "checks" not in audited:
        rows_, columns = proof["samples"]
        what = f"{rows_:,} × {columns:,} samples" if columns else f"features of {rows_:,} samples"
        took = format_seconds(proof["seconds"])
        by = {"verify": "‘ooc-ntk verify’", "run": "the last step of the run"}.get(str(proof["by"]), str(proof["by"]))
        parts.append(
            Text(f"K v against J(Jᵀv) by automatic differentiation in float64, over {what}, by {by}, in {took}.")
        )
    if "checks" not in audited:
        parts.append(Missing("Checksums, symmetry and recomputed entries", command))
    return Section("verification", "Verification", tuple(parts))


def origin(run: Run) -> Section:
    """Digests, versions, machine, seeds."""
    plan = run.info.plan
    rows = [(ORIGIN_WORDS.get(label, label), value) for label, value in provenance(run.info) if label != "proof"]
    if run.info.machine:
        rows.append(("machine", run.info.machine))
    rows.append(("device", f"{plan.device}, {plan.threads} thread{'s' if plan.threads != 1 else ''}"))
    rows.append(("seed of the plan", str(plan.seed)))
    if plan.projection is not None:
        rows.append(("seed of the projection", str(plan.projection.seed)))
    rows.append(("run directory", run.place))
    if run.info.store is not None:
        rows.append(("store of the tiles", run.info.store))
    return Section("provenance", "Where it comes from", (Table((), tuple(rows)),))
