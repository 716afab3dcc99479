"""The pages that ``python -m bench`` writes: ``RESULTS.md``, and the table between the markers of the README."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .bars import Bar, Check
from .earlier import earlier
from .playing import Played
from .records import NEVER_SLOWER, SERIES, Record, never_slower, promises
from .registry import Part

#: What the README's table stands between.
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"

#: What is not measured, by command and why.
LEFT_OUT = {
    "python -m bench.gpu_exact": "needs an NVIDIA GPU",
    "python -m bench.gpu_projection": "needs an NVIDIA GPU",
    "python -m bench.experiments all": "experiments of two papers, see docs/experiments.md",
    "python -m bench.faults": "a proof, not a measurement: 200 scenarios, ten minutes",
}

#: Verdicts of a claim.
MET, MISSED, UNJUDGED = "met", "**missed**", "smoke size: not judged"


@dataclass(frozen=True)
class Claim:
    """A line of the table of claims.

    Attributes:
        figure: what is claimed.
        bar: in words.
        measured: in words; "–" where there is nothing.
        verdict: met, missed, or why it is neither.
        command: that makes it.
    """

    figure: str
    bar: str
    measured: str
    verdict: str
    command: str


def claims(parts: Mapping[str, Part], played: Mapping[str, Played]) -> list[Claim]:
    """Every figure with a bar: that no peer is faster and what the planner promises first, then part by part.

    A bar whose figure is not there is a line as well, and says why.

    Args:
        parts: all that there are.
        played: by name those that were.
    """
    records = [record for one in played.values() for record in one.records]
    smoke = any(one.smoke for one in played.values())
    everything = "python -m bench"
    slower = never_slower(records, smoke)
    found = [_claim(check, everything) for check in slower]
    bar, why = _bar(1.0, at_least=True), "not measured: no peer gave figures"
    found += [
        Claim(f"{what}{NEVER_SLOWER}", bar, "–", why, everything)
        for what in SERIES.values()
        if not any(check.figure.startswith(f"{what}{NEVER_SLOWER}") for check in slower)
    ]
    found += [_claim(check, everything) for check in promises(records, smoke)]
    for name, part in parts.items():
        command = f"python -m bench --parts {name}"
        one = played.get(name)
        checks = {check.figure: check for check in one.checks} if one is not None else {}
        bars = {bar.figure: bar for bar in part.bars}
        for figure, check in checks.items():
            if check.limit is not None:
                found.append(_claim(check, command))
            bars.pop(figure, None)
        if one is None or not one.smoke:  # smoke sizes have figures of their own
            found += [_unmeasured(bar, one, command) for bar in bars.values()]
    return found


def _claim(check: Check, command: str) -> Claim:
    assert check.limit is not None
    verdict = UNJUDGED if check.met is None else MET if check.met else MISSED
    plan = "" if check.with_plan is None else f" (with planning {check.with_plan:.3g})"
    bar = _bar(check.limit, at_least=check.at_least)
    return Claim(check.figure, bar, f"{check.value:.3g}{plan}", verdict, command)


def _unmeasured(bar: Bar, one: Played | None, command: str) -> Claim:
    why = "the part was not played" if one is None else one.failure or "left out, see the part"
    return Claim(bar.figure, _bar(bar.limit, at_least=bar.at_least), "–", f"not measured: {why}", command)


def _bar(limit: float, *, at_least: bool) -> str:
    return f"{'≥' if at_least else '≤'} {limit:.3g}"


def claims_table(found: Sequence[Claim], *, commands: bool = True) -> list[str]:
    """Claims as a Markdown table."""
    rows = [["figure", "bar", "measured", "", "command"], ["---"] * 5]
    rows += [[claim.figure, claim.bar, claim.measured, claim.verdict, f"`{claim.command}`"] for claim in found]
    return [_row(row if commands else row[:-1]) for row in rows]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '¦') for cell in cells)} |"


def results_page(
    parts: Mapping[str, Part], played: Mapping[str, Played], figures: Mapping[str, Sequence[str]], results: Path
) -> str:
    """``RESULTS.md``.

    Args:
        parts: all that there are.
        played: by name those that were.
        figures: by part, paths of pictures as the page links to them.
        results: folder of the pages of longer runs.
    """
    found = claims(parts, played)
    page = [
        "# Results",
        "",
        _written(played),
        "",
        "## Claims: ratios of earlier work, measured again",
        "",
        *claims_table(found),
        "",
    ]
    failed = [one for one in played.values() if one.failure]
    page += [f"Part `{one.name}` did not come to its end: {one.failure}." for one in failed]
    page += [""] if failed else []
    page += _longer(results)
    for name, part in parts.items():
        if name in played:
            page += _section(part, played[name], figures.get(name, ()))
    page += ["## Not measured by this command", ""]
    page += [f"- part `{name}`: not played" for name in parts if name not in played]
    page += [f"- `{command}`: {why}" for command, why in LEFT_OUT.items()]
    return "\n".join(page) + "\n"


def _written(played: Mapping[str, Played]) -> str:
    """By what the page was written, when and where."""
    if not played:
        return "Written by `python -m bench`, which has not been run yet."
    latest = max(played.values(), key=lambda one: str(one.setting["date"]))
    minutes = sum(one.seconds for one in played.values()) / 60
    return (
        f"Written by `python -m bench{' --smoke' if latest.smoke else ''}`: {_setting(latest)}. Its parts took "
        f"{minutes:.1f} minutes. Ratios are of one run on one machine; seconds are only there to compare lines of the "
        "same table. Every part says when it was played and what load there was before."
    )


def _setting(one: Played) -> str:
    return ", ".join(value if name in ("date", "machine") else f"{name} {value}" for name, value in _words(one))


def _words(one: Played) -> list[tuple[str, str]]:
    return [(name, str(value)) for name, value in one.setting.items()]


def _longer(results: Path) -> list[str]:
    """What runs of single modules measured in sizes that take longer."""
    lines = earlier(results)
    if not lines:
        return []
    rows = [["figure", "bar", "measured", "", "command", "date"], ["---"] * 6]
    for line in lines:
        command = f"[`{line.command}`](results/{line.page})"
        rows.append([line.figure, line.bar, line.measured, line.verdict, command, line.date])
    return [
        "## Longer runs",
        "",
        "Full sizes, each measured by a command of its own on the date and machine that its page names; all pages: "
        + ", ".join(f"[{page.stem}](results/{page.name})" for page in sorted(results.glob("*.md")))
        + ".",
        "",
        *map(_row, rows),
        "",
    ]


def _section(part: Part, one: Played, figures: Sequence[str]) -> list[str]:
    page = [f"## {part.title} (`--parts {part.name}`)", ""]
    again = f" Longer runs: [{part.results}](results/{part.results}.md)." if part.results else ""
    page += [f"{one.setting['date']}, load before {one.setting['load']}, {one.seconds:.0f} s.{again}", ""]
    if one.failure:
        page += [f"**Not complete: {one.failure}.**", ""]
    page += [line for path in figures for line in (f"![{part.title}]({path})", "")]
    if one.records:
        page += [*records_table(one.records), ""]
    loose = [check for check in one.checks if check.limit is None]
    page += [f"- {check}" for check in loose] + ([""] if loose else [])
    text = "\n".join(one.text).strip("\n")
    if text:
        page += ["<details><summary>As it was printed</summary>", "", "```text", text, "```", "", "</details>", ""]
    return page


def records_table(records: Sequence[Record]) -> list[str]:
    """Records as a Markdown table."""
    head = ["workload", "contender", "seconds", "ratio", "peak", "moved", "error", "promised", "remark"]
    rows = [head, ["---", "---", *["--:"] * 6, "---"]]
    for record in records:
        least = "≥ " if record.at_least else ""
        rows.append(
            [
                record.workload,
                record.contender,
                "–" if record.seconds is None else f"{least}{record.seconds:.3g}",
                "–" if record.ratio is None else f"{least}{record.ratio:.3g}",
                _size(record.peak_bytes),
                _size(record.moved_bytes),
                "–" if record.error is None else f"{record.error:.1e}",
                _promise(record),
                record.remark,
            ]
        )
    return [_row(row) for row in rows]


def _size(number: int | None) -> str:
    return "–" if number is None else f"{number / 2**20:,.0f} MiB"


def _promise(record: Record) -> str:
    """Tasks' seconds and peak memory as shares of what was promised."""
    found = []
    if record.promised_seconds and record.task_seconds is not None:
        found.append(f"{record.task_seconds / record.promised_seconds:.2f} of {record.promised_seconds:.3g} s")
    if record.promised_bytes and record.peak_bytes:
        found.append(f"{record.peak_bytes / record.promised_bytes:.2f} of {_size(record.promised_bytes)}")
    return ", ".join(found) or "–"


def readme_table(parts: Mapping[str, Part], played: Mapping[str, Played]) -> str:
    """What stands between the README's markers."""
    latest = max(played.values(), key=lambda one: str(one.setting["date"]))
    smoke = " --smoke" if latest.smoke else ""
    lines = [
        f"`python -m bench{smoke}`, {_setting(latest)}. Tables, figures and longer runs: "
        "[bench/RESULTS.md](bench/RESULTS.md).",
        "",
        *claims_table(claims(parts, played), commands=False),
    ]
    return "\n".join(lines)


def replace_between(text: str, table: str) -> str:
    r"""Put a table between the markers, and change nothing else.

    Args:
        text: of the README.
        table: without the markers.

    Raises:
        ValueError: if the markers are not there, once each and in their order.

    >>> replace_between(f"a\n{BEGIN}\nold\n{END}\nb\n", "new") == f"a\n{BEGIN}\n\nnew\n\n{END}\nb\n"
    True
    """
    found = re.fullmatch(f"(.*{re.escape(BEGIN)})(.*)({re.escape(END)}.*)", text, re.DOTALL)
    if found is None or text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"needs the lines {BEGIN} and {END}, once each and in this order")
    return f"{found[1]}\n\n{table}\n\n{found[3]}"
