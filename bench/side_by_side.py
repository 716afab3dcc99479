"""Exact kernels beside every peer, as a part of ``python -m bench``: what ``bench.exact`` measures, within minutes.

Ours goes first. A peer is ended when it has computed for :data:`PATIENCE` times what ours took, or for what the
workload's bar asks if that is more, and for at least :data:`LEAST_SECONDS`; starting it does not count. It then counts
as slow as it was until then: how much slower it would have been is what ``bench.exact`` waits for.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
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

#: Workloads and samples of the full size: those of the bars, the text workload on half as many. Cases of one group
#: share a process per contender, as computing them takes less than starting one; their peaks are those of all before.
GROUPS: Final = (
    (Case("mlp", 128),),
    (Case("resnet18", 64),),
    (Case("vit", 64),),
    (Case("minilm", 64),),
    tuple(Case(name, 64) for name in ("small-mlp", "small-cnn") if name in WORKLOADS),
)
SMOKE_GROUPS: Final = ((Case("mlp", 6),),)

#: Times ours, plan included, after which a peer is ended, and the seconds of computing that it gets in any case
#: (guessed: so that all parts together take a quarter of an hour).
PATIENCE, LEAST_SECONDS = 1.5, 3.0

#: Of the time that a bar asks peers to take at least, so that one that is ended there has met it.
SURELY = 1.02

#: What a peer says that no workload would bring about.
ABSENT: Final = re.compile(r"No module named '[\w.]+'|not installed|environment is not there")


def title(case: Case) -> str:
    """A case as tables name it."""
    return f"{case.workload}, N = {case.samples:,}"


def exact_bars() -> tuple[Bar, ...]:
    """The bars of these cases, named as the part names its checks."""
    found: list[Bar] = []
    for case in itertools.chain(*GROUPS):
        mine = (bar for bar in BARS.get(case.workload, ()) if bar.samples in (None, case.samples))
        found.extend(replace(bar, figure=f"{title(case)}: {bar.figure}") for bar in mine)
    return tuple(found)


@part(
    "exact",
    "Exact kernels beside peers and floors",
    seconds=360,
    limit_seconds=600,
    bars=exact_bars(),
    results="exact",
)
def measure(smoke: bool) -> Iterator[Finding]:
    """Every workload with all contenders, one group after another."""
    load_peers()
    peers = tuple(contenders.PEERS.values())
    for group in SMOKE_GROUPS if smoke else GROUPS:
        cases = []
        for case in group:
            missing = () if smoke else WORKLOADS[case.workload].missing()
            if missing:
                yield f"{case.workload} is left out: {', '.join(missing)} not installed; pip install 'ooc-ntk[bench]'"
            else:
                cases.append(case)
        if not cases:
            continue
        setting = Setting((OURS, *peers), 1, smoke, torch.get_num_threads(), LEAST_SECONDS, False)
        outcomes, floors = measure_group(tuple(cases), setting)
        for case in cases:
            comparison = compare(case, smoke, outcomes[case], floors[case])
            yield from named(title(case), comparison.checks)
            yield from records(case, outcomes[case], comparison, alone=case is cases[0])
            yield from [*format_comparison(comparison, profile=False).splitlines(), ""]
        told = outcomes[cases[0]]
        absent = [peer for peer in peers if isinstance(told[peer], str) and ABSENT.search(str(told[peer]))]
        peers = tuple(peer for peer in peers if peer not in absent)  # one line of them is enough


def measure_group(
    cases: tuple[Case, ...], setting: Setting
) -> tuple[dict[Case, dict[str, Measurement | str]], dict[Case, Floors]]:
    """Measure floors, ours, and then the peers, each as long as ours allows.

    Args:
        cases: workloads and samples that share processes.
        setting: contenders, ours first; ``peer_seconds`` are the least that a peer gets.

    Returns:
        By case and contender the measurement, or why there is none; and the floors.
    """
    here = replace(setting.task(FLOORS, cases), here=setting.smoke)
    floors = floors_apart(here)
    outcomes: dict[Case, dict[str, Measurement | str]] = {case: {} for case in cases}
    limit = setting.peer_seconds
    for contender in setting.contenders:
        task = replace(here, contender=contender, limit_seconds=None if contender == OURS else limit)
        found = measure_apart(task)
        for case, outcome in found.items():
            outcomes[case][contender] = outcome
        if contender == OURS:
            limit = max(limit, *(patience(case, outcome) for case, outcome in found.items()))
    return outcomes, floors


def patience(case: Case, ours: Measurement | str) -> float:
    """Seconds of computing after which a peer is known to be slower than is asked.

    Args:
        case: whose bars count.
        ours: what ours took for it.
    """
    if isinstance(ours, str):
        return 0.0
    asked = [bar.limit for bar in BARS.get(case.workload, ()) if bar.figure == BEST_PEER]
    return max([PATIENCE * ours.total_seconds, *(SURELY * limit * ours.result.run_seconds for limit in asked)])


def records(
    case: Case, outcomes: Mapping[str, Measurement | str], comparison: Comparison, *, alone: bool = True
) -> Iterator[Record]:
    """A record per contender: ours, peers that gave a kernel, those that were stopped, those that gave none.

    The peak of a case that is not alone in its process, or its first, is that of all before, and no promise's.
    """
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
                promised_bytes=int(promised["host_bytes"]) if alone and "host_bytes" in promised else None,
                remark=outcome.result.remark,
            )
            if name == OURS:
                total = outcome.total_seconds
                yield replace(start, contender=WITH_PLAN, seconds=total, ratio=total / base)
        elif (seconds := run_seconds(outcome)) and seconds > base:
            yield replace(start, seconds=seconds, ratio=seconds / base, at_least=True, remark=outcome)
        else:
            yield replace(start, remark=outcome)
