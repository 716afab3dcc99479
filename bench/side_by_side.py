"""Exact kernels beside every peer, as a part of ``python -m bench``: what ``bench.exact`` measures, within minutes.

Ours goes first. A peer is ended when it has computed for :data:`PATIENCE` times what ours took with planning (in part
``text`` for what the workload's bar asks, if that is more), and for at least :data:`LEAST_SECONDS`; starting it does
not count. It then counts as slow as it was until then: how much slower it would have been is what ``bench.exact``
waits for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final

import torch

from . import contenders
from .bars import BARS, BEST_PEER, Bar
from .contenders import OURS
from .exact import Setting
from .floors import Floors
from .models import WORKLOADS
from .process import FLOORS, Case, Measurement, floors_apart, measure_apart, run_seconds
from .records import WITH_PLAN, Finding, Record, named
from .registry import load_peers, part
from .table import Comparison, compare, format_comparison

#: Workloads and samples of the full size: those of the bars, and two that take less than a second.
CASES: Final = (
    *(Case("mlp", 128), Case("resnet18", 64), Case("vit", 64)),
    *(Case(name, 64) for name in ("small-mlp", "small-cnn") if name in WORKLOADS),
)
TEXT_CASES: Final = (Case("minilm", 64),)
SMOKE_CASES: Final = (Case("mlp", 6),)

#: Times ours, plan included, after which a peer is ended, and the seconds of computing that it gets in any case
#: (guessed: so that all parts together take a quarter of an hour).
PATIENCE, LEAST_SECONDS = 1.1, 2.0

#: Of the time that a bar asks peers to take at least, so that one that is ended there has met it.
SURELY = 1.02

#: What a peer says that no workload would bring about.
ABSENT: Final = re.compile(r"No module named '[\w.]+'|not installed|environment is not there")


def title(case: Case) -> str:
    """A case as tables name it."""
    return f"{case.workload}, N = {case.samples:,}"


def exact_bars(cases: Sequence[Case]) -> tuple[Bar, ...]:
    """The bars of some cases, named as the parts name their checks."""
    found: list[Bar] = []
    for case in cases:
        mine = (bar for bar in BARS.get(case.workload, ()) if bar.samples in (None, case.samples))
        found.extend(replace(bar, figure=f"{title(case)}: {bar.figure}") for bar in mine)
    return tuple(found)


@part(
    "exact",
    "Exact kernels beside peers and floors",
    seconds=310,
    limit_seconds=600,
    bars=exact_bars(CASES),
    results="exact",
)
def measure(smoke: bool) -> Iterator[Finding]:
    """Every workload with all contenders, one after another."""
    yield from measure_cases(SMOKE_CASES if smoke else CASES, smoke)


@part(
    "text",
    "An exact kernel of a text model beside peers and floors",
    seconds=160,
    limit_seconds=600,
    bars=exact_bars(TEXT_CASES),
    results="exact",
    asked=True,
)
def measure_text(smoke: bool) -> Iterator[Finding]:
    """The workload that needs transformers, which take longer to import than most contenders compute."""
    yield from measure_cases(TEXT_CASES, smoke)


def measure_cases(cases: Sequence[Case], smoke: bool) -> Iterator[Finding]:
    """Cases with all contenders, one after another.

    Args:
        cases: workloads and samples.
        smoke: smoke size: in this process, and nothing is left out for what is not installed.
    """
    load_peers()
    peers = tuple(contenders.PEERS.values())
    for case in cases:
        missing = () if smoke else WORKLOADS[case.workload].missing()
        if missing:
            yield f"{case.workload} is left out: {', '.join(missing)} not installed; pip install 'ooc-ntk[bench]'"
            continue
        setting = Setting((OURS, *peers), 1, smoke, torch.get_num_threads(), LEAST_SECONDS, False)
        outcomes, floors = measure_case(case, setting)
        comparison = compare(case, smoke, outcomes, floors)
        known = least_is_known(outcomes)
        # Of peers that were stopped a least time is known: it can show that a bar is met, and not that it is missed.
        told = (check for check in comparison.checks if known or check.met or check.figure != BEST_PEER)
        yield from named(title(case), told)
        yield from records(case, outcomes, comparison)
        yield from [*format_comparison(comparison, profile=False).splitlines(), ""]
        absent = [peer for peer in peers if isinstance(outcomes[peer], str) and ABSENT.search(str(outcomes[peer]))]
        peers = tuple(peer for peer in peers if peer not in absent)  # one line of them is enough


def measure_case(case: Case, setting: Setting) -> tuple[dict[str, Measurement | str], Floors]:
    """Measure floors, ours, and then the peers, each as long as ours allows.

    Args:
        case: workload and samples.
        setting: contenders, ours first; ``peer_seconds`` are the least that a peer gets.

    Returns:
        By contender the measurement, or why there is none; and the floors.
    """
    here = replace(setting.task(FLOORS, (case,)), here=setting.smoke)
    floors = floors_apart(here)[case]
    outcomes: dict[str, Measurement | str] = {}
    limit = setting.peer_seconds
    for contender in setting.contenders:
        task = replace(here, contender=contender, limit_seconds=None if contender == OURS else limit)
        outcomes[contender] = measure_apart(task)[case]
        if contender == OURS:
            limit = max(limit, patience(case, outcomes[contender]))
    return outcomes, floors


def least_is_known(outcomes: Mapping[str, Measurement | str]) -> bool:
    """Whether the fastest peer came to its end, so that none of those that were stopped could be faster."""
    peers = {name: seconds for name, found in outcomes.items() if name != OURS and (seconds := run_seconds(found))}
    ended = [seconds for name, seconds in peers.items() if isinstance(outcomes[name], Measurement)]
    return bool(ended) and min(ended) <= min(peers.values())


def patience(case: Case, ours: Measurement | str) -> float:
    """Seconds of computing after which a peer is stopped: then it is slower than ours with its planning.

    Beside the cases of part ``exact``, for which that has to do, it also is slower than any bar asks.

    Args:
        case: whose bars count.
        ours: what ours took for it.
    """
    if isinstance(ours, str):
        return 0.0
    asked = [bar.limit for bar in BARS.get(case.workload, ()) if bar.figure == BEST_PEER]
    whole = [SURELY * limit * ours.result.run_seconds for limit in asked if case not in CASES]
    return max([PATIENCE * ours.total_seconds, *whole])


def records(case: Case, outcomes: Mapping[str, Measurement | str], comparison: Comparison) -> Iterator[Record]:
    """A record per contender: ours, peers that gave a kernel, those that were stopped, those that gave none."""
    ours = outcomes[OURS]
    assert isinstance(ours, Measurement)
    base = ours.result.run_seconds
    errors = {row.contender.removesuffix(", run"): row.error for row in comparison.rows}
    for name, outcome in outcomes.items():
        start = Record(title(case), name, samples=case.samples, series="peers")
        if isinstance(outcome, Measurement):
            promised = outcome.promised
            tasks = outcome.result.derive_seconds + outcome.result.contract_seconds
            yield replace(
                start,
                seconds=outcome.result.run_seconds,
                ratio=outcome.result.run_seconds / base,
                peak_bytes=outcome.peak_bytes,
                moved_bytes=int(promised["moved_bytes"]) if "moved_bytes" in promised else None,
                error=errors[name],
                promised_seconds=promised.get("seconds"),
                task_seconds=tasks if "seconds" in promised else None,
                promised_bytes=int(promised["host_bytes"]) if "host_bytes" in promised else None,
                remark=outcome.result.remark,
            )
            if name == OURS:
                total = outcome.total_seconds
                yield replace(start, contender=WITH_PLAN, seconds=total, ratio=total / base)
        elif (seconds := run_seconds(outcome)) and seconds > base:
            yield replace(start, seconds=seconds, ratio=seconds / base, at_least=True, remark=outcome)
        else:
            yield replace(start, remark=outcome)
