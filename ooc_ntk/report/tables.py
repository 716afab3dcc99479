"""Tables for the terminal: plans, runs, audits, rates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ooc_ntk.planning.layers import layer_name
from ooc_ntk.planning.plan import Plan, PlannedBlock
from ooc_ntk.planning.rates import MachineRates
from ooc_ntk.planning.scratch import scratch_bytes
from ooc_ntk.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from ooc_ntk.api import Audit, Drift, RunInfo

#: Disk limits above this are none: no bucket says how full it is.
NO_LIMIT: Final = 2**58

#: Blocks shown before the rest is summed up in one line.
SHOWN_BLOCKS: Final = 10


def plan_table(plan: Plan, *, every_block: bool = False, store: str | None = None) -> RenderableType:
    """A plan: what, how, how long, how much; the alternatives and why they lost; the blocks.

    Args:
        plan: the plan.
        every_block: whether to list all blocks instead of the largest.
        store: URL of the store that tiles and kernel go to; None is the run directory.

    Returns:
        Something to print.
    """
    pairs = list(plan.summary())
    if store is not None:
        disk = format_bytes(plan.promised.disk_bytes)
        pairs = [(name, disk if name == "disk" and plan.limits.disk > NO_LIMIT else value) for name, value in pairs]
        pairs.append(
            ("store", f"{store}: 'disk' above is there; here up to {format_bytes(scratch_bytes(plan))} of scratch")
        )
    parts: list[RenderableType] = [_pairs(pairs)]
    alternatives = Table(title="dataflows considered", title_justify="left", box=None, pad_edge=False)
    for name in ("dataflow", "time", "host", "disk", "verdict"):
        alternatives.add_column(name, justify="right" if name in ("time", "host", "disk") else "left")
    for entry in plan.alternatives:
        alternatives.add_row(
            entry.layout,
            "-" if entry.seconds is None else format_seconds(entry.seconds),
            format_bytes(entry.host_bytes),
            format_bytes(entry.disk_bytes),
            entry.verdict,
            style="bold" if entry.verdict == "chosen" else "dim",
        )
    parts += [Text(), alternatives, Text(), _blocks(plan, every_block)]
    parts += [Text(f"note: {note}", style="yellow") for note in plan.notes]
    return Group(*parts)


def _blocks(plan: Plan, every_block: bool) -> Table:
    """The blocks, each with what it holds and spends and the share saved of what dense gradients would.

    Of many blocks the largest are listed, and the others summed up by how they are derived and held.
    """
    table = Table(title="parameter blocks", title_justify="left", box=None, pad_edge=False)
    table.add_column("block", overflow="fold")
    for name in ("size", "by", "held as", "bytes", "saved", "FLOP", "saved"):
        table.add_column(name, justify="left" if name in ("by", "held as") else "right", no_wrap=True)
    shown = set(range(len(plan.blocks)))
    if not every_block and len(plan.blocks) > SHOWN_BLOCKS + 1:
        shown = set(sorted(shown, key=lambda index: plan.blocks[index].dense_flops)[-SHOWN_BLOCKS:])
    folded: dict[tuple[str, str], list[PlannedBlock]] = {}
    for index, block in enumerate(plan.blocks):
        kind = (block.source, block.choice.name)
        if index in shown:
            table.add_row(block.name or "(model)", *_sums([block], *kind))
        else:
            folded.setdefault(kind, []).append(block)
    for kind, rest in sorted(folded.items(), key=lambda item: -len(item[1])):
        name = rest[0].name if len(rest) == 1 else f"{len(rest)} smaller"
        table.add_row(name or "(model)", *_sums(rest, *kind), style="dim")
    if len(plan.blocks) > 1:
        table.add_row(f"all {len(plan.blocks)}", *_sums(plan.blocks, "", ""), style="bold")
    return table


def _sums(blocks: Sequence[PlannedBlock], source: str, held_as: str) -> list[str]:
    """Cells of some blocks together."""
    held, dense = sum(block.held_bytes for block in blocks), sum(block.dense_bytes for block in blocks)
    flops, dense_flops = sum(block.flops for block in blocks), sum(block.dense_flops for block in blocks)
    return [
        format_count(sum(block.columns for block in blocks)),
        source,
        held_as,
        format_bytes(held),
        _saved(held, dense),
        format_count(flops),
        _saved(flops, dense_flops),
    ]


def _saved(spent: float, dense: float) -> str:
    """The share saved of what dense gradients take; negative if it is more, and their multiple if far more.

    >>> _saved(1, 1000), _saved(12, 10), _saved(10, 10), _saved(223, 10)
    ('99.9%', '-20%', '-', '22× dense')
    """
    if spent == dense or not dense:
        return "-"
    share = 1 - spent / dense
    if share <= -1:
        return f"{spent / dense:,.0f}× dense"
    return f"{share:.1%}" if share >= 0.95 else f"{share:.0%}"


def many_runs(plan: Plan, count: int) -> RenderableType:
    """What several runs of one plan take, one after the other."""
    promised = plan.promised
    return Text(
        f"{count} checkpoints, one after the other: {format_seconds(count * promised.seconds)}, "
        f"{format_bytes(promised.host_bytes)} host at any time, {format_bytes(count * plan.kernel_bytes)} of kernels "
        f"on disk and up to {format_bytes(promised.disk_bytes)} for the one that runs",
        style="bold",
    )


def checkpoints_table(runs: Sequence[RunInfo], drift: Drift | None) -> RenderableType:
    """Kernels of several checkpoints: what became of each, and how far they moved, as bars."""
    table = Table(title="checkpoints", title_justify="left", box=None, pad_edge=False)
    table.add_column("checkpoint", overflow="fold")
    for name in ("state", "time", "norm", "change", "from the last", "from the first"):
        table.add_column(name, justify="left" if name == "state" else "right")
    table.add_column("")
    largest = 1.0 if drift is None else float(drift.distances[0].max()) or 1.0
    for index, info in enumerate(runs):
        state = "complete" if info.finished else f"{info.kernel_tiles_done:,} of {info.kernel_tiles:,} tiles"
        cells = ["-"] * 4
        bar = Text()
        if drift is not None:
            first = float(drift.distances[0, index])
            last = f"{drift.distances[index - 1, index]:.4f}" if index else "-"
            cells = [f"{drift.norms[index]:.4g}", f"{drift.changes[index]:.1%}", last, f"{first:.4f}"]
            bar = Text("█" * round(30 * first / largest), style="cyan")
        table.add_row(info.path.name, state, format_seconds(info.seconds), *cells, bar)
    if drift is None:
        return table
    what = "change: ‖K − K₀‖/‖K₀‖; from the last, from the first: kernel distance 1 − ⟨K, K'⟩/(‖K‖‖K'‖), train square"
    return Group(table, Text(what, style="dim"))


def phases_table(info: RunInfo) -> RenderableType:
    """Where the time of a run went, phase by phase, longest first, with the rest that no phase covers."""
    table = Table(title="where the time went", title_justify="left", box=None, pad_edge=False)
    table.add_column("phase")
    table.add_column("time", justify="right")
    table.add_column("share", justify="right")
    table.add_column("")
    rest = max(0.0, info.seconds - sum(info.phases.values()))
    for name, seconds in [*info.phases.items(), ("between phases", rest)]:
        share = seconds / info.seconds if info.seconds else 0.0
        table.add_row(name, format_seconds(seconds), f"{share:.0%}", Text("█" * round(30 * share), style="cyan"))
    return Group(Text(), table)


def info_table(info: RunInfo) -> RenderableType:
    """A run: progress, promises beside measurements, provenance."""
    plan = info.plan
    summary = plan.summary()[: 4 if plan.projection is None else 6]
    where = [] if info.store is None else [("store", f"{info.store}, which has tiles and kernel")]
    head = _pairs([("run", str(info.path)), *where, ("state", state(info)), *summary, *provenance(info)])
    table = Table(title="promised and measured", title_justify="left", box=None, pad_edge=False)
    table.add_column("quantity")
    for name in ("promised", "measured", "ratio"):
        table.add_column(name, justify="right")
    for row in promised_and_measured(info):
        table.add_row(*row)
    parts: list[RenderableType] = [head, Text(), table]
    if info.layer_traces:
        parts += [Text(), _layers(info)]
    return Group(*parts)


def state(info: RunInfo) -> str:
    """How far a run is."""
    tiles = "feature tiles" if info.plan.features_only else "kernel tiles"
    found = "complete" if info.finished else "not finished: run the same command again to go on"
    return f"{info.kernel_tiles_done:,} of {info.kernel_tiles:,} {tiles}, {found}"


def provenance(info: RunInfo) -> list[tuple[str, str]]:
    """Where a run comes from and what happened to it, as label and value."""
    return [
        *((name, digest) for name, digest in sorted(info.job_digests.items())),
        ("plan", info.plan.digest),
        *(("grown", line) for line in _grown(info)),
        *_extension(info),
        *_proof(info),
        ("versions", ", ".join(f"{name} {version}" for name, version in info.versions.items())),
        *([("retries", f"{info.retries:,}, after errors of the file system that passed")] if info.retries else ()),
        *_micro_batches(info),
    ]


def _extension(info: RunInfo) -> list[tuple[str, str]]:
    """An extension that is not finished."""
    if info.extension is None:
        return []
    samples, done, tiles = info.extension
    return [
        (
            "extension",
            f"to {samples:,} train samples, {done:,} of {tiles:,} kernel tiles, not finished: type the same "
            "ooc-ntk extend again to go on",
        )
    ]


def promised_and_measured(info: RunInfo) -> list[tuple[str, str, str, str]]:
    """Promises of the plan beside what was measured: quantity, promised, measured, ratio."""
    plan, promised = info.plan, info.plan.promised
    seconds = [
        ("time", promised.seconds, info.seconds),
        ("  rows", promised.rows_seconds, info.rows_seconds),
        ("  kernel", promised.kernel_seconds, info.kernel_seconds),
    ]
    rows = [
        (name, format_seconds(before), format_seconds(after), _ratio(after, before)) for name, before, after in seconds
    ]
    sizes = [
        ("peak host memory", promised.host_bytes, info.host_bytes),
        ("peak device memory", promised.device_bytes, info.device_bytes),
        ("disk (promised peak, present size)", promised.disk_bytes, info.disk_bytes),
        ("bytes read", plan.bytes_read, info.bytes_read),
        ("bytes written", plan.bytes_written, info.bytes_written),
    ]
    for name, before, after in sizes:
        if before or after:
            rows.append((name, format_bytes(before), format_bytes(after), _ratio(after, before)))
        if name == "peak host memory" and promised.pinned_bytes:
            rows.append(("  pinned", format_bytes(promised.pinned_bytes), "-", "-"))
    if info.io_ratio is not None and plan.io_ratio is not None:
        moved = (format_bytes(plan.moved_bytes), format_bytes(info.moved_bytes))
        rows.append(("moved while contracting (Q)", *moved, _ratio(info.moved_bytes, plan.moved_bytes)))
        over = (f"{plan.io_ratio:.2f}", f"{info.io_ratio:.2f}")
        rows.append(("  over the lower bound (Q/LB)", *over, _ratio(info.io_ratio, plan.io_ratio)))
    audited = info.audited or {}
    if info.expected_error is not None:
        seen = audited.get("relative_error")
        ratio = "-" if seen is None else _ratio(seen, audited.get("predicted_error") or info.expected_error)
        errors = (f"{info.expected_error:.2%}", "-" if seen is None else f"{seen:.2%}")
        rows.append(("error of the kernel (expected, last audit)", *errors, ratio))
    return rows


def _micro_batches(info: RunInfo) -> list[tuple[str, str]]:
    """What the device had no room for."""
    if not info.micro_batches:
        return []
    sizes = ", ".join(f"{count:,} with {size:,}" for size, count in sorted(info.micro_batches.items(), reverse=True))
    planned = f"fewer samples than the planned {info.plan.batch_size:,}"
    return [("batches", f"{planned} in tasks for which the device had no memory: {sizes}")]


def _grown(info: RunInfo) -> list[str]:
    """What a run was grown from, generation by generation."""
    sizes = [*(entry["train_samples"] for entry in info.history), info.plan.train_samples]
    return [
        f"from {entry['train_samples']:,} to {after:,} train samples (plan {entry['plan'][:8]})"
        for entry, after in zip(info.history, sizes[1:], strict=True)
    ]


def _proof(info: RunInfo) -> list[tuple[str, str]]:
    """The last proof of a run by products with vectors."""
    proof = (info.audited or {}).get("proof")
    if proof is None or proof["plan"] != info.plan.digest:
        return []
    return [("proof", f"{'passed' if proof['passed'] else 'FAILED'}: {proof['line']}, by {proof['by']}")]


def _layers(info: RunInfo) -> Table:
    """What every layer adds to the kernel's trace, as bars."""
    table = Table(title="layers", title_justify="left", box=None, pad_edge=False)
    table.add_column("layer", overflow="fold")
    for name in ("of the trace", "of the parameters"):
        table.add_column(name, justify="right")
    table.add_column("")
    sizes = dict.fromkeys(info.layer_traces, 0)
    for block in info.plan.blocks:
        sizes[layer_name(block)] += block.columns
    whole = sum(info.layer_traces.values()) or 1.0
    for name, trace in info.layer_traces.items():
        share = trace / whole
        bar = Text("█" * round(30 * max(0.0, share)), style="cyan")
        table.add_row(name, f"{share:.1%}", f"{sizes[name] / info.plan.columns:.1%}", bar)
    return table


def _ratio(measured: float, promised: float) -> str:
    return f"{measured / promised:.2f}" if promised else "-"


def audit_table(audit: Audit) -> RenderableType:
    """An audit: each check with its verdict, and how much was covered."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for check in audit.checks:
        mark = Text("passed", style="green") if check.passed else Text("FAILED", style="bold red")
        table.add_row(mark, check.name, check.detail)
    covered = (
        f"coverage: {audit.entries:,} entries recomputed ({audit.coverage:.2g} of all), every tile's checksum and "
        "structure"
    )
    if audit.proof is not None:
        covered += f"; products with vectors over {audit.proof.scope}"
    return Group(table, Text(covered, style="dim"))


def rates_table(rates: MachineRates) -> RenderableType:
    """Measured rates of the machine."""
    lines = [("machine", rates.machine)]
    for kind, table in (("products", rates.gemm), ("Gram matrices", rates.syrk)):
        for precision, by_edge in table.items():
            figures = ", ".join(f"{format_count(rate)}FLOP/s at {edge}" for edge, rate in sorted(by_edge.items()))
            lines.append((f"{precision} {kind}", figures))
    if rates.expand:
        figures = ", ".join(f"{format_count(rate)}FLOP/s in {name}" for name, rate in rates.expand.items())
        lines.append(("expanding factors", figures))
    if rates.elements:
        lines.append(("pairs of positions", f"{format_count(rates.elements)}/s"))
    lines += [
        ("rows into fresh memory", f"{format_bytes(rates.fill)}/s"),
        ("rows into used memory", f"{format_bytes(rates.copy)}/s"),
        ("disk write, synced", f"{format_bytes(rates.disk_write)}/s"),
        ("disk read", f"{format_bytes(rates.disk_read)}/s" + (", past the page cache" if rates.direct_wins else "")),
        ("commit of a task", format_seconds(rates.commit_seconds)),
    ]
    if rates.host_to_device:
        lines.append(("host to device", f"{format_bytes(rates.host_to_device)}/s"))
    return _pairs(lines)


def _pairs(lines: Iterable[tuple[str, str]]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in lines:
        table.add_row(label, Text(value))
    return table
