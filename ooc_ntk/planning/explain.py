"""Why a plan is as it is: what each block's other ways cost, what limits it, what another budget or an error would buy.

Nothing is measured here: the job is planned again with other budgets and rates, which takes a second or so each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final, Literal

from ooc_ntk.errors import BudgetError

from .budget import Limits
from .cost import block_flops, price
from .layout import Dataflow
from .plan import Plan, PlannedBlock
from .planner import FLAGS, RESTART_BYTES, Preferences, make_plan
from .projection import DEFAULT_KIND
from .rates import MachineRates
from .representation import allowed_choices, choice_bytes, choice_seconds
from .sketched import features_workload
from .spans import DENSE
from .workers import one_worker
from .workload import ParameterBlock, Workload

#: A budget is named if it makes the run this much faster (a choice: less is within what promises are off).
WORTH_NAMING: Final = 1.05

#: Bytes of a memory that nothing here needs.
AMPLE: Final = 2**60

#: Errors of a projected kernel that are priced beside the exact one (relative Frobenius norm).
TARGET_ERRORS: Final = (0.05, 0.1)


@dataclass(frozen=True)
class Way:
    """One way to hold and contract a parameter block.

    Attributes:
        name: ``dense``, ``factored``, ``pairwise`` or ``tokens``.
        held_bytes: bytes that its tiles take over all samples.
        flops: contraction FLOPs, the symmetric part counted once.
        seconds: what storing, reading, expanding and contracting it takes.
        chosen: whether the plan takes it.
    """

    name: str
    held_bytes: int
    flops: int
    seconds: float
    chosen: bool


@dataclass(frozen=True)
class BlockReason:
    """A parameter block, why it is held as it is, and what its other ways would cost.

    Attributes:
        name: the layer's name.
        reason: in words.
        ways: every way that its factors allow, the chosen one first.
    """

    name: str
    reason: str
    ways: tuple[Way, ...]


@dataclass(frozen=True)
class Faster:
    """How much faster the same layout would run if one thing took half the time.

    Attributes:
        what: ``deriving rows``, ``products``, ``the disk``, ``copying in memory`` or ``copies to the device``.
        factor: seconds of the plan over seconds then.
    """

    what: str
    factor: float


@dataclass(frozen=True)
class OtherBudget:
    """The plan of the same job under another limit for one memory.

    Attributes:
        memory: ``host``, ``device`` or ``disk``.
        limit_bytes: the other limit, which suffices when it is typed in.
        added_bytes: what it has more than the limit of the plan; negative where it has less.
        dataflow: of the plan then.
        seconds: promised then.
        factor: how many times faster that is; below 1 it is slower.
    """

    memory: str
    limit_bytes: int
    added_bytes: int
    dataflow: Dataflow
    seconds: float
    factor: float

    @property
    def flag(self) -> str:
        """The option that sets the limit."""
        return FLAGS[self.memory]


@dataclass(frozen=True)
class ForError:
    """What a projected kernel would cost at a wanted error.

    Attributes:
        error: expected relative error of the kernel in the Frobenius norm.
        kind: of projection.
        columns: columns that it needs.
        seconds: promised time; None where it has no fewer columns than the Jacobian, or does not fit.
        factor: how many times faster than the plan.
    """

    error: float
    kind: str
    columns: int
    seconds: float | None
    factor: float | None


@dataclass(frozen=True)
class Explanation:
    """Why a plan is as it is.

    Attributes:
        plan: the plan.
        blocks: reasons for every parameter block; none of a projected job, which holds nothing of them.
        faster: what the time depends on, the largest factor first.
        terms: the largest terms of host memory at its peak, in bytes, by name.
        more: larger limits that pay, by memory and size.
        less: the smallest limit for each memory that still works, where it is below that of the plan.
        projected: what errors would cost; empty where no pilot was run.
    """

    plan: Plan
    blocks: tuple[BlockReason, ...]
    faster: tuple[Faster, ...]
    terms: tuple[tuple[str, int], ...]
    more: tuple[OtherBudget, ...]
    less: tuple[OtherBudget, ...]
    projected: tuple[ForError, ...]

    @property
    def limit(self) -> str:
        """What limits the time, in words."""
        first = self.faster[0]
        return f"{first.what}: in half the time, the run would be {first.factor:.2f} times faster"


def explain(
    workload: Workload,
    limits: Limits,
    rates: MachineRates,
    preferences: Preferences | None = None,
    pilot: Workload | None = None,
    job_digest: str = "",
) -> Explanation:
    """Plan a job and say why the plan is as it is.

    Args:
        workload: the measured job.
        limits: budget in bytes.
        rates: the machine's rates.
        preferences: what the user fixed by hand.
        pilot: the same job with a projection and its pilot, for the price of errors; None takes the job's own pilot.
        job_digest: digest of the job.

    Returns:
        The explanation, with the plan.

    Raises:
        BudgetError: if no plan fits.
    """
    preferences = preferences or Preferences()
    plan = make_plan(workload, limits, rates, preferences, job_digest)
    contracted, each = _contracted(workload, limits, rates, preferences, plan)
    blocks = (
        ()
        if workload.sketch is not None
        else tuple(
            _block_reason(contracted, rates, plan, block, planned, preferences.representation)
            for block, planned in zip(contracted.blocks, plan.blocks, strict=True)
        )
    )
    terms = sorted(plan.host_terms.items(), key=lambda item: -item[1])
    return Explanation(
        plan=plan,
        blocks=blocks,
        faster=_faster(contracted, each, rates, plan),
        terms=tuple(terms[:4]),
        more=tuple(_more(workload, limits, rates, preferences, plan)),
        less=tuple(_less(workload, limits, rates, preferences, plan)),
        projected=tuple(_projected(pilot or workload, limits, rates, preferences, plan)),
    )


def _contracted(
    workload: Workload, limits: Limits, rates: MachineRates, preferences: Preferences, plan: Plan
) -> tuple[Workload, Limits]:
    """The job in the plan's batches as the planner prices it: of one worker, and of a projected job its features."""
    if preferences.workers is not None:
        workload, limits = one_worker(workload, limits, preferences.workers, preferences.dataflow)
    sized = replace(workload, derivation=workload.derivation.at(plan.batch_size))
    if sized.sketch is not None:
        sized = replace(sized, sketch=replace(sized.sketch, features_only=plan.features_only))
        return features_workload(sized, rates), limits
    return sized, limits


def _block_reason(
    workload: Workload,
    rates: MachineRates,
    plan: Plan,
    block: ParameterBlock,
    planned: PlannedBlock,
    wanted: str | None,
) -> BlockReason:
    """What every way of a block costs, and why the plan takes the one that it takes."""
    grid = plan.sample_grid
    panels = sum(len(grid.rows(i)) + (0 if i == j else len(grid.columns(j))) for i, j in grid.kernel_tiles())
    allowed = allowed_choices(block)
    choices = [planned.choice, *(choice for choice in {*allowed, DENSE} if choice != planned.choice)]
    ways = [
        Way(
            choice.name,
            workload.samples * choice_bytes(workload, block, choice),
            block_flops(workload, block, choice, None if choice == DENSE else panels),
            choice_seconds(workload, rates, plan.dataflow, plan.tile_samples, block, choice),
            choice == planned.choice,
        )
        for choice in choices
    ]
    ways[1:] = sorted(ways[1:], key=lambda way: way.seconds)
    return BlockReason(block.name, _why(block, ways, wanted), tuple(ways))


def _why(block: ParameterBlock, ways: list[Way], wanted: str | None) -> str:
    """Why a block is held as it is, in words."""
    if block.source != "rule":
        return f"derived by torch.func, as gradients: {block.reason or 'no layer rule covers it'}"
    if block.factors is None:
        return "has no factors, only gradients"
    if wanted is not None:
        return f"--representation {wanted}"
    if block.factors.single:
        return "one position per sample: two small products in place of gradients"
    chosen, others = ways[0], ways[1:]
    smaller = [way for way in others if way.held_bytes < chosen.held_bytes]
    if all(chosen.seconds <= way.seconds for way in others):
        return "the fastest" + ("" if smaller else " and the smallest")
    quickest = min(others, key=lambda way: way.seconds)
    ratio = chosen.seconds / quickest.seconds
    if not smaller:
        return f"the smallest; {quickest.name} is {ratio:.1f} times faster by itself, and holds more"
    return f"smaller than {quickest.name}, which is {ratio:.1f} times faster by itself"


def _faster(workload: Workload, limits: Limits, rates: MachineRates, plan: Plan) -> tuple[Faster, ...]:
    """What the same layout gains where one thing takes half the time, the largest gain first."""
    derivation = workload.derivation
    derived = replace(
        workload,
        derivation=replace(
            derivation,
            seconds_per_sample=derivation.seconds_per_sample / 2,
            chain_seconds_per_sample=derivation.chain_seconds_per_sample / 2,
            capture_seconds_per_sample=derivation.capture_seconds_per_sample / 2,
        ),
    )
    timed = [
        replace(block, expand_seconds=_half(block.expand_seconds), pairwise_seconds=_half(block.pairwise_seconds))
        for block in workload.blocks
    ]
    products = replace(
        rates,
        gemm={name: {edge: 2 * rate for edge, rate in table.items()} for name, table in rates.gemm.items()},
        syrk={name: {edge: 2 * rate for edge, rate in table.items()} for name, table in rates.syrk.items()},
        expand={name: 2 * rate for name, rate in rates.expand.items()},
        elements=2 * rates.elements,
    )
    disk = replace(
        rates,
        disk_write=2 * rates.disk_write,
        disk_read=2 * rates.disk_read,
        commit_seconds=rates.commit_seconds / 2,
    )
    others = {
        "deriving rows": (derived, rates),
        "products": (replace(workload, blocks=tuple(timed)), products),
        "the disk": (workload, disk),
        "copying in memory": (workload, replace(rates, fill=2 * rates.fill, copy=2 * rates.copy)),
    }
    if workload.device != "cpu":
        others["copies to the device"] = (workload, replace(rates, host_to_device=2 * rates.host_to_device))
    before = price(workload, plan.layout, rates, limits.host).seconds
    found = []
    for what, (job, changed) in others.items():
        found.append(Faster(what, before / price(job, plan.layout, changed, limits.host).seconds))
    return tuple(sorted(found, key=lambda each: -each.factor))


def _half(seconds: float | None) -> float | None:
    return None if seconds is None else seconds / 2


Limited = Literal["host", "device", "disk"]


def _limited(workload: Workload) -> tuple[Limited, ...]:
    """Memories that have a limit."""
    return ("host", "disk") if workload.device == "cpu" else ("host", "device", "disk")


def _under(
    workload: Workload, limits: Limits, rates: MachineRates, preferences: Preferences, memory: Limited, size: int
) -> Plan:
    """The plan under another limit for one memory."""
    changed = {"host": limits.host, "device": limits.device, "disk": limits.disk, memory: size}
    other = replace(limits, host=changed["host"], device=changed["device"], disk=changed["disk"])
    return make_plan(workload, other, rates, preferences, beside_exact=False)


def _more(
    workload: Workload, limits: Limits, rates: MachineRates, preferences: Preferences, plan: Plan
) -> Iterator[OtherBudget]:
    """For each memory the limit above which nothing is gained, and one half way there, where they pay."""
    for memory in _limited(workload):
        free = _under(workload, limits, rates, preferences, memory, AMPLE)
        if plan.promised.seconds / free.promised.seconds < WORTH_NAMING:
            continue
        now = getattr(limits, memory)
        enough = _whole(_promised(free, memory) + (RESTART_BYTES if memory == "host" else 0))
        found: list[OtherBudget] = []
        for size in (_whole((now + enough) // 2), enough):
            then = _under(workload, limits, rates, preferences, memory, size)
            factor = plan.promised.seconds / then.promised.seconds
            if factor >= WORTH_NAMING * (found[-1].factor if found else 1.0):
                found.append(OtherBudget(memory, size, size - now, then.dataflow, then.promised.seconds, factor))
        yield from found


def _less(
    workload: Workload, limits: Limits, rates: MachineRates, preferences: Preferences, plan: Plan
) -> Iterator[OtherBudget]:
    """For each memory the smallest limit that works, where it is smaller than what the plan takes."""
    for memory in _limited(workload):
        try:
            _under(workload, limits, rates, preferences, memory, 1)
        except BudgetError as error:
            size = _whole(error.smallest.get(memory, AMPLE))
        else:
            continue
        if size >= _promised(plan, memory):
            continue
        try:
            then = _under(workload, limits, rates, preferences, memory, size)
        except BudgetError:  # a smaller one also needs more of another memory
            continue
        seconds = then.promised.seconds
        now = getattr(limits, memory)
        yield OtherBudget(memory, size, size - now, then.dataflow, seconds, plan.promised.seconds / seconds)


def _promised(plan: Plan, memory: str) -> int:
    """What a plan promises of one memory, in bytes."""
    found: int = getattr(plan.promised, f"{memory}_bytes")
    return found


def _whole(size: int) -> int:
    """Rounded up to whole MiB, as budgets are typed.

    >>> _whole(2**20 + 1) == 2 * 2**20
    True
    """
    return -(-size // 2**20) * 2**20


def _projected(
    pilot: Workload, limits: Limits, rates: MachineRates, preferences: Preferences, plan: Plan
) -> Iterator[ForError]:
    """Columns and time of a projected kernel at each of the target errors, from the moments that a pilot measured."""
    sketch = pilot.sketch
    if sketch is None or sketch.moments is None:
        return
    rows = pilot.train_samples * pilot.entries_per_sample
    fixed = Preferences(features_only=preferences.features_only, workers=preferences.workers)
    for error in TARGET_ERRORS:
        wanted = replace(sketch.projection, dim=None, target_error=error)
        columns = sketch.moments.dim_for(wanted, rows)
        missing = ForError(error, wanted.kind, columns, None, None)
        if columns >= pilot.columns:
            yield missing
            continue
        # A sparse projection takes as long for any number of columns, a dense one in proportion.
        longer = 1.0 if wanted.about.sparse else columns / sketch.dim
        projection = replace(sketch.projection, dim=columns)
        at = replace(sketch, projection=projection, row_seconds=longer * sketch.row_seconds)
        try:
            then = make_plan(replace(pilot, sketch=at), limits, rates, fixed, beside_exact=False)
        except BudgetError:
            yield missing
            continue
        seconds = then.promised.seconds
        yield ForError(error, wanted.kind, columns, seconds, plan.promised.seconds / seconds)


#: The kind that an exact kernel is set beside.
PILOT_KIND: Final = DEFAULT_KIND
