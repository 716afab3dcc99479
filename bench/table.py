"""The table of a workload at one sample count: contenders, floors, figures beside their bars, phases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from . import bars
from .bars import Check, judge
from .contenders import DENSE, LOOP, OURS, PEERS
from .floors import Floors
from .inputs import count_outputs, count_parameters
from .models import WORKLOADS, build
from .peers import exact_kernel
from .process import Case, Measurement, run_seconds

#: Samples on which every kernel is held against the float64 oracle.
CHECKED_SAMPLES = 8


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        contender: who.
        seconds: wall clock.
        ratio: to the fastest peer; None without peers.
        entry_seconds: seconds per kernel entry.
        derive_seconds: the Jacobian's part.
        contract_seconds: the products' part.
        peak_bytes: highest resident memory.
        error: relative Frobenius error on :data:`CHECKED_SAMPLES` samples, against float64.
        disagreement: largest relative Frobenius difference to another contender, over all entries; None without one.
    """

    contender: str
    seconds: float
    ratio: float | None
    entry_seconds: float
    derive_seconds: float
    contract_seconds: float
    peak_bytes: int
    error: float
    disagreement: float | None


@dataclass(frozen=True)
class Comparison:
    """All contenders on one workload at one sample count.

    Attributes:
        workload: its name.
        samples: its sample count.
        title: what it is.
        rows: the table.
        refusals: by contender, why it has no row.
        floors: what the floors are made of.
        dense_floor_seconds: the floor with the products of the whole Jacobian.
        representation_floor_seconds: the floor with the products of the engine's plan.
        checks: figures beside their bars.
        phases: seconds of ooc-ntk and of its dense engine by phase.
        remarks: how contenders went about it.
    """

    workload: str
    samples: int
    title: str
    rows: tuple[Row, ...]
    refusals: dict[str, str]
    floors: Floors
    dense_floor_seconds: float
    representation_floor_seconds: float
    checks: tuple[Check, ...]
    phases: dict[str, dict[str, float]]
    remarks: tuple[str, ...]


def compare(case: Case, smoke: bool, outcomes: Mapping[str, Measurement | str], floors: Floors) -> Comparison:
    """Hold the contenders' kernels and times against each other and against the floors.

    Args:
        case: workload and sample count.
        smoke: whether in smoke size.
        outcomes: measurements by contender, or why there is none.
        floors: those of the case.

    Returns:
        The comparison.
    """
    model, inputs = build(case.workload, case.samples, smoke)
    outputs, parameters = count_outputs(model, inputs), count_parameters(model)
    checked = np.linspace(0, case.samples - 1, min(case.samples, CHECKED_SAMPLES)).astype(int).tolist()
    oracle = exact_kernel(model, inputs, checked)
    measured = {name: found for name, found in outcomes.items() if isinstance(found, Measurement)}
    kernels = {name: found.result.kernel for name, found in measured.items()}
    peers = [found.result.run_seconds for name, found in measured.items() if name in PEERS.values()]

    def row(label: str, name: str, seconds: float) -> Row:
        found, others = measured[name], [kernel for key, kernel in kernels.items() if key != name]
        return Row(
            contender=label,
            seconds=seconds,
            ratio=seconds / min(peers) if peers else None,
            entry_seconds=seconds / case.samples**2,
            derive_seconds=found.result.derive_seconds,
            contract_seconds=found.result.contract_seconds,
            peak_bytes=found.peak_bytes,
            error=relative_error(kernels[name][np.ix_(checked, checked)], oracle),
            disagreement=max((relative_error(kernels[name], other) for other in others), default=None),
        )

    rows = [row(name, name, found.result.run_seconds) for name, found in measured.items() if name != OURS]
    ours = measured[OURS]
    rows.append(row(f"{OURS}, run", OURS, ours.result.run_seconds))
    rows.append(row(f"{OURS}, plan + run", OURS, ours.total_seconds))
    dense_floor = floors.seconds(case.samples**2 * outputs * parameters)
    representation_floor = floors.seconds(ours.result.figures["plan_flops"])
    return Comparison(
        workload=case.workload,
        samples=case.samples,
        title=f"{WORKLOADS[case.workload].title}{' (smoke size)' if smoke else ''}: trace kernel, C = {outputs}, "
        f"N = {case.samples:,}, P = {parameters:,}",
        rows=tuple(rows),
        refusals={name: found for name, found in outcomes.items() if isinstance(found, str)},
        floors=floors,
        dense_floor_seconds=dense_floor,
        representation_floor_seconds=representation_floor,
        checks=judge(case.workload, case.samples, _figures(outcomes, dense_floor, representation_floor), smoke),
        phases={name: measured[name].result.phases for name in (DENSE, OURS) if name in measured},
        remarks=tuple(
            f"{name}: {found.result.remark + '; ' if found.result.remark else ''}"
            f"processor time {found.cpu_seconds:.1f} s, load before {found.load:.1f}"
            for name, found in measured.items()
        ),
    )


def _figures(
    outcomes: Mapping[str, Measurement | str], dense_floor: float, representation_floor: float
) -> dict[str, tuple[float, float | None]]:
    """Every figure that can be told from what was measured: of the run, and of plan and run.

    A peer that was stopped counts with the time that it had computed, which is the least that it takes.
    """
    measured = {name: found for name, found in outcomes.items() if isinstance(found, Measurement)}
    ours = measured[OURS]
    run, total, plan = ours.result.run_seconds, ours.total_seconds, ours.result.figures
    figures: dict[str, tuple[float, float | None]] = {
        bars.OVER_REPRESENTATION: (run / representation_floor, total / representation_floor),
        bars.ABOVE_REPRESENTATION: (run - representation_floor, total - representation_floor),
        bars.OVER_DENSE: (run / dense_floor, total / dense_floor),
        bars.HELD: (plan["held_bytes"] / plan["jacobian_bytes"], None),
    }
    told = (run_seconds(found) for name, found in outcomes.items() if name in PEERS.values())
    peers = [seconds for seconds in told if seconds is not None]
    if peers:
        figures[bars.BEST_PEER] = (min(peers) / run, min(peers) / total)
    if LOOP in measured:
        loop = measured[LOOP].result.run_seconds
        figures[bars.LOOP] = (loop / run, loop / total)
    if DENSE in measured:
        dense = measured[DENSE]
        figures[bars.DENSE_ENGINE] = (run / dense.result.run_seconds, total / dense.total_seconds)
    return figures


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Relative difference in the Frobenius norm."""
    difference = found.astype(np.float64) - wanted
    return float(np.linalg.norm(difference) / np.linalg.norm(wanted))


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lay out cells in columns, the first to the left, the others to the right.

    >>> aligned([("who", "seconds"), ("ours", "1.5")])
    ['  who   seconds', '  ours      1.5']
    """
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return [
        "  "
        + "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    ]


def format_comparison(comparison: Comparison, profile: bool) -> str:
    """The table of a case, its floors, figures and remarks, as plain text.

    Args:
        comparison: the case.
        profile: whether to add where ooc-ntk spends its time.

    Returns:
        Several lines.
    """
    header = ("contender", "seconds", "ratio", "s/entry", "derive", "contract", "peak GiB", "error", "disagree")
    lines = [header]
    lines += [
        (
            row.contender,
            f"{row.seconds:.2f}",
            "–" if row.ratio is None else f"{row.ratio:.2f}",
            f"{row.entry_seconds:.1e}",
            f"{row.derive_seconds:.2f}",
            f"{row.contract_seconds:.2f}",
            f"{row.peak_bytes / 2**30:.2f}",
            f"{row.error:.1e}",
            "–" if row.disagreement is None else f"{row.disagreement:.1e}",
        )
        for row in comparison.rows
    ]
    floors = comparison.floors
    text = [comparison.title, *aligned(lines)]
    text += [f"  {name}: no figures: {reason}" for name, reason in comparison.refusals.items()]
    text += [
        f"  floors: capture alone {floors.capture_seconds:.2f} s (batch {floors.capture_batch}), ssyrk "
        f"{floors.flops_per_second / 1e9:.1f} GFLOP/s over {floors.product_columns:,} columns; "
        f"dense {comparison.dense_floor_seconds:.2f} s, representation {comparison.representation_floor_seconds:.2f} s"
    ]
    text += [f"  {remark}" for remark in comparison.remarks]
    text += [f"  {check}" for check in comparison.checks]
    if profile:
        for name, phases in comparison.phases.items():
            run = next(row.seconds for row in comparison.rows if row.contender in (name, f"{name}, run"))
            text += format_phases(name, phases, run)
    return "\n".join(text)


def format_phases(name: str, phases: Mapping[str, float], run_seconds: float) -> list[str]:
    """Seconds of a run by phase, as lines of a table.

    Args:
        name: whose run.
        phases: seconds by phase.
        run_seconds: of the whole run.

    Returns:
        The lines.
    """
    if not phases:
        return [f"  {name}: this version records no phases"]
    beside = run_seconds - sum(phases.values())
    lines = [(f"{name}, by phase", "seconds", "share")]
    for phase, seconds in {**phases, "beside these": beside}.items():
        lines.append((phase, f"{seconds:.3f}", f"{seconds / run_seconds:.0%}"))
    return aligned(lines)


def format_growth(comparisons: Sequence[Comparison]) -> str:
    """How the cost of one kernel entry grows with the sample count, for every contender of a workload.

    Args:
        comparisons: of one workload, smallest sample count first.

    Returns:
        Several lines.
    """
    names = list(dict.fromkeys(row.contender for comparison in comparisons for row in comparison.rows))
    lines = [("seconds per kernel entry", *(f"N = {comparison.samples:,}" for comparison in comparisons), "last/first")]
    for name in names:
        found = [
            next((row.entry_seconds for row in comparison.rows if row.contender == name), None)
            for comparison in comparisons
        ]
        first, last = found[0], found[-1]
        grown = "–" if first is None or last is None else f"{last / first:.2f}"
        lines.append((name, *("–" if value is None else f"{value:.2e}" for value in found), grown))
    return "\n".join([f"{comparisons[0].workload}:", *aligned(lines)])
