"""``plan --explain`` for the terminal: why the plan is as it is, and what would change it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ooc_ntk.planning.explain import BlockReason, Explanation, ForError, OtherBudget
from ooc_ntk.units import format_bytes, format_count, format_seconds

from .tables import SHOWN_BLOCKS


def explanation_json(found: Explanation) -> str:
    """The plan and its explanation as JSON: ``{"plan": …, "explanation": …}``."""
    fields = {name: value for name, value in asdict(found).items() if name != "plan"}
    return json.dumps({"plan": json.loads(found.plan.to_json()), "explanation": fields}, indent=2)


def explanation_table(found: Explanation, *, every_block: bool = False) -> RenderableType:
    """An explanation as text and tables.

    Args:
        found: the explanation.
        every_block: whether to list all blocks instead of those that the most arithmetic goes to.

    Returns:
        Something to print.
    """
    parts: list[RenderableType] = []
    if found.blocks:
        parts += [Text(), _blocks(found.blocks, every_block)]
    parts += [Text(), Text("why so", style="bold"), *_lines(_sentences(found))]
    return Group(*parts)


def _blocks(blocks: Sequence[BlockReason], every_block: bool) -> Table:
    """Blocks with every way to hold them, and why the first one was chosen."""
    table = Table(title="ways to hold each block", title_justify="left", box=None, pad_edge=False)
    table.add_column("block", overflow="fold")
    for name in ("way", "bytes", "FLOP", "time"):
        table.add_column(name, justify="left" if name == "way" else "right", no_wrap=True)
    table.add_column("why", overflow="fold")
    shown = list(blocks)
    if not every_block and len(blocks) > SHOWN_BLOCKS + 1:
        largest = sorted(blocks, key=lambda block: max(way.flops for way in block.ways))[-SHOWN_BLOCKS:]
        shown = [block for block in blocks if block in largest]
    for block in shown:
        for way in block.ways:
            cells = [way.name, format_bytes(way.held_bytes), format_count(way.flops), format_seconds(way.seconds)]
            table.add_row(
                (block.name or "(model)") if way.chosen else "",
                *cells,
                block.reason if way.chosen else "",
                style=None if way.chosen else "dim",
            )
    if len(shown) < len(blocks):
        table.add_row(f"{len(blocks) - len(shown)} smaller", "", "", "", "", "--blocks lists them", style="dim")
    return table


def _sentences(found: Explanation) -> list[tuple[str, str]]:
    """Everything but the blocks, as label and sentence."""
    plan = found.plan
    lines = [("dataflow", f"{'features' if plan.projection else plan.dataflow}: {plan.reason}")]
    if plan.io_ratio is not None:
        lines.append(("bytes moved", f"{plan.io_ratio:.2f} times the fewest that any order of the work can move"))
    lines.append(("time", _time(found)))
    terms = ", ".join(f"{name} {format_bytes(size)}" for name, size in found.terms)
    lines.append(("host memory", f"{format_bytes(plan.promised.host_bytes)} at its peak; the largest parts: {terms}"))
    lines += [("with more", _other(other)) for other in found.more] or [
        ("with more", "no more memory or disk would make it faster")
    ]
    lines += [("with less", _other(other)) for other in found.less]
    lines += [("projected", _for_error(each, plan.columns)) for each in found.projected]
    return lines


def _time(found: Explanation) -> str:
    """What the time depends on."""
    others = [f"{each.what} {each.factor:.2f}" for each in found.faster[1:]]
    return f"{format_seconds(found.plan.promised.seconds)}, limited by {found.limit} ({', '.join(others)})"


def _other(other: OtherBudget) -> str:
    """What another budget would do."""
    what = "disk" if other.memory == "disk" else f"{other.memory} memory"
    more = f"{format_bytes(abs(other.added_bytes))} {'more' if other.added_bytes > 0 else 'less'} {what}"
    limit = f"{other.flag} {other.limit_bytes // 2**20}MiB"
    return f"{more} ({limit}): {other.dataflow}, {format_seconds(other.seconds)}, {_speed(other.factor)}"


def _speed(factor: float) -> str:
    """How many times faster something is.

    >>> _speed(1.84), _speed(0.5), _speed(0.98)
    ('1.8 times faster', '2.0 times slower', 'as fast')
    """
    if 0.95 < factor < 1.05:
        return "as fast"
    return f"{factor:.1f} times faster" if factor > 1 else f"{1 / factor:.1f} times slower"


def _for_error(each: ForError, parameters: int) -> str:
    """What a projected kernel would cost."""
    needs = f"an expected error of {each.error:.0%} takes {each.kind}:{each.columns}"
    if each.seconds is None or each.factor is None:
        few = f", no fewer columns than the {parameters:,} parameters" if each.columns >= parameters else ""
        return f"{needs}{few or ', which does not fit this budget'}"
    return f"{needs}: {format_seconds(each.seconds)}, {_speed(each.factor)}"


def _lines(pairs: Iterable[tuple[str, str]]) -> list[RenderableType]:
    """Labels and sentences, each label once."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    last = ""
    for label, text in pairs:
        table.add_row("" if label == last else label, Text(text))
        last = label
    return [table]
