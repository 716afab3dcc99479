"""The planner: price every dataflow, drop what does not fit, keep the fastest and say why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Final, Literal

from ooc_ntk.errors import BudgetError, InputError, unknown_name
from ooc_ntk.units import format_bytes, format_seconds

from .budget import Limits
from .cost import Cost, block_flops, price
from .grouping import check_superblocks, grouped, keeping, triangle_counts
from .layout import DATAFLOWS, IN_MEMORY, MAX_TASKS, Dataflow, Layout, pass_ranges, span_sizes, tile_sizes
from .memory import ALLOCATOR_SHARE, memory_need, superblock_bytes
from .need import MemoryNeed
from .plan import Alternative, Plan, PlannedBlock, Promise
from .rates import MachineRates
from .representation import POLICIES, REPRESENTATIONS, choose
from .sketched import features_workload, from_factors
from .spans import DENSE, PAIRWISE, PROJECTED, TENSOR_SKETCHED, Choice
from .superblocks import ORDERS
from .tiles import Range, SampleGrid, even_ranges
from .workers import one_worker
from .workload import ParameterBlock, Workload

#: A kernel task should not run longer than this, so that stopping and resuming lose little (DESIGN: 5–60 s).
LONGEST_TASK_SECONDS: Final = 60.0

#: Host bytes by which one job needs more or less from one start of the process to the next, as it holds more or less
#: before its first task (measured: up to 6 MiB; rounded up). What an error advises as a budget has them on top, so that
#: it suffices when it is typed in.
RESTART_BYTES: Final = 12 * 2**20

#: Host bytes that are not worth a slower layout of a short job (a choice: about what differs from start to start).
#: Without it a job of seconds was cut into up to a hundred tasks to save half a MiB.
NEGLIGIBLE_BYTES: Final = 16 * 2**20

#: A job that takes no longer in tiles of all its samples is planned so, though smaller ones may take less memory.
#: (Measured: pricing everything else takes 0.1 to 0.5 s and chose the same tiles for six jobs of up to 5 s; the
#: shortest job that it made faster, by 0.6 s, takes 8 s.)
QUICK_SECONDS: Final = 5.0

#: Layouts within this share of the fastest are taken as equally fast; the one with the smallest memory is kept.
EQUALLY_FAST: Final = 0.03

#: Layouts that move bytes within this share of the fewest are taken as moving equally few (a choice).
EQUALLY_FEW: Final = 0.005

#: Or, of superblocks, not longer than this share of the run: large ones move fewer bytes, and save their sums as they
#: grow, so that stopping loses no more (a choice).
LONGEST_TASK_SHARE: Final = 0.5

#: What moving fewer bytes may cost, where tiles are on disk (a choice: others use the disk too).
FEWER_BYTES_SHARE: Final = 0.1

#: The same where the order of kernel tiles was asked for by hand.
FEWER_BYTES_ASKED: Final = 0.5

#: What short tasks may cost beside the fastest layout (a choice: losing a minute's work, not a tenth of the time).
SHORT_TASKS_SHARE: Final = 1.1

#: End-to-end tolerances against float64 (relative Frobenius norm), by what limits them (DESIGN: run, same bits).
TOLERANCE_SMOOTH: Final = 2e-6
TOLERANCE_KINKED: Final = 5e-5
TOLERANCE_CANCELLING: Final = 1e-5
TOLERANCE_FLOAT64: Final = 1e-12

#: TF32 keeps 10 bits of mantissa. Emulated, not measured on a device: gradients of the tests' networks cut off there
#: are 2.5e-4 to 7e-4 off, rounded 1e-5 to 7e-5, and tensor cores' sums 2e-4; a pairwise contraction takes it twice.
TOLERANCE_TF32: Final = 2e-3

#: bf16 rounds factors and the products on a CPU to 8 bits of mantissa: 2⁻⁹ each, averaged over many products (measured
#: on the tests' networks: 5e-4 to 3e-3).
TOLERANCE_BF16: Final = 1e-2

#: What products of bf16 parts add to the tolerance of float32. Measured on a CPU, end to end on the tests' networks:
#: 3e-7 to 2e-6; tiles of normal numbers, the worst case: 4.9e-6, and 8.8e-6 where two Gram matrices are multiplied.
TOLERANCE_BF16X3: Final = 1e-5


@dataclass(frozen=True)
class Preferences:
    """What a user may fix by hand; None leaves the choice to the planner.

    Attributes:
        dataflow: ``resident``, ``recompute`` or ``spill``.
        tile_samples: samples per tile.
        span_columns: Jacobian columns per span.
        passes: passes over the samples (``recompute`` only).
        representation: ``dense``, ``factored`` or ``pairwise``, wherever a block allows it.
        layer_rules: False derives every block by ``torch.func``.
        features_only: leaves a projected job at its features; entries of the kernel are computed when they are asked
            for.
        every_output: derives a row for every output, even where a linear head allows fewer.
        order: ``square`` or ``triangle``: how kernel tiles are grouped where tiles are read from disk.
        superblock_tiles: most kernel tiles that are contracted together there; 1 contracts them one by one.
        workers: worker processes that do the tasks and share this machine's memory; None does them in one process.
    """

    dataflow: str | None = None
    tile_samples: int | None = None
    span_columns: int | None = None
    passes: int | None = None
    representation: str | None = None
    layer_rules: bool = True
    features_only: bool = False
    every_output: bool = False
    order: str | None = None
    superblock_tiles: int | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        """Check names and signs."""
        if self.dataflow is not None and self.dataflow not in DATAFLOWS:
            raise unknown_name("dataflow", self.dataflow, DATAFLOWS)
        if self.representation is not None and self.representation not in REPRESENTATIONS:
            raise unknown_name("representation", self.representation, REPRESENTATIONS)
        if self.order is not None and self.order not in ORDERS:
            raise unknown_name("order", self.order, ORDERS)
        for field in ("tile_samples", "span_columns", "passes", "superblock_tiles", "workers"):
            value = getattr(self, field)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise InputError(f"{field} must be a whole number, got {value!r}")
            if value < 1:
                raise InputError(f"{field} must be at least 1, got {value}")
        if self.passes is not None and self.passes > 1 and self.dataflow not in (None, "recompute"):
            raise InputError(
                f"dataflow {self.dataflow!r} makes one pass, got passes={self.passes}; use dataflow='recompute'"
            )


@dataclass(frozen=True)
class _Candidate:
    layout: Layout
    need: MemoryNeed
    cost: Cost

    def over(self, limits: Limits) -> str | None:
        """The first memory that this candidate does not fit, or None."""
        for memory in ("host", "device", "disk"):
            if self.need.total(memory) > getattr(limits, memory):
                return memory
        return None


def make_plan(
    workload: Workload,
    limits: Limits,
    rates: MachineRates,
    preferences: Preferences | None = None,
    job_digest: str = "",
    *,
    beside_exact: bool = True,
) -> Plan:
    """Choose the fastest layout that fits.

    Args:
        workload: the measured job.
        limits: budget in bytes.
        rates: the machine's rates.
        preferences: what the user fixed by hand.
        job_digest: digest of model, data, kernel and projection.
        beside_exact: whether the exact kernel is planned beside a projected one.

    Returns:
        The plan.

    Raises:
        BudgetError: if no layout fits, naming the largest term, the smallest budget that would do and its flag.
    """
    preferences = preferences or Preferences()
    if workload.by_layer and (preferences.dataflow == "recompute" or preferences.passes not in (None, 1)):
        raise InputError(
            "layer-wise kernels are made in one pass; leave dataflow='recompute' and passes out, or by='layer'"
        )
    if preferences.superblock_tiles not in (None, 1) or preferences.order is not None:
        check_superblocks(workload, preferences.order)
    budget = limits
    if preferences.workers is not None:
        workload, limits = one_worker(workload, limits, preferences.workers, preferences.dataflow)
    job = workload
    if workload.sketch is not None:
        preferences = _for_features(preferences)
        job = replace(job, sketch=replace(workload.sketch, features_only=preferences.features_only))
    elif preferences.features_only:
        raise InputError(
            "features are what a projection gives; ask for one with --projection, or leave features_only out"
        )
    job, workload, candidates = _in_batches(job, limits, rates, preferences)
    fitting = [candidate for candidate in candidates if candidate.over(limits) is None]
    best = _best(fitting, FEWER_BYTES_SHARE if preferences.order is None else FEWER_BYTES_ASKED)
    keeping_more = _keeping(workload, limits, rates, best)
    candidates[candidates.index(best)] = best = keeping_more
    alternatives, reason = _explain(candidates, best, limits)
    layout, need, cost = best.layout, best.need, best.cost
    saved = (
        max(1, workload.workers) * superblock_bytes(workload, layout)
        if cost.longest_task_seconds > LONGEST_TASK_SECONDS
        else 0
    )
    if need.total("disk") + saved > limits.disk:
        saved = 0
    notes = job.notes
    expected = None
    if job.sketch is not None:
        expected = (
            None
            if job.sketch.moments is None
            else job.sketch.moments.error(job.sketch.dim, job.train_samples * job.entries_per_sample)
        )
        reason = "one sweep, features kept"
        if beside_exact:
            beside, note = _beside_exact(job, limits, rates, cost, expected)
            alternatives, notes = (*alternatives, *beside), (*notes, note)
    return Plan(
        kernel=workload.kernel,
        scale=workload.scale,
        normalize=workload.normalize,
        precision=workload.precision,
        device=workload.device,
        train_samples=workload.train_samples,
        test_samples=workload.test_samples,
        outputs=workload.outputs,
        rows_per_sample=workload.rows_per_sample,
        entries_per_sample=workload.entries_per_sample,
        columns=job.columns,
        method=job.derivation.method,
        batch_size=workload.derivation.batch_size,
        threads=workload.threads,
        seed=workload.seed,
        dataflow=layout.dataflow,
        tile_samples=layout.tile_samples,
        span_columns=layout.span_columns,
        passes=layout.passes,
        blocks=tuple(
            _planned(workload, layout, block, choice)
            for block, choice in zip(workload.blocks, layout.block_choices(workload), strict=True)
        )
        if job.sketch is None
        else tuple(_projected(job, block) for block in job.blocks),
        flops=cost.flops,
        bytes_read=cost.bytes_read,
        bytes_written=cost.bytes_written,
        io_ratio=cost.io_ratio,
        moved_bytes=cost.moved_bytes,
        bound_bytes=cost.bound_bytes,
        order=layout.order,
        superblock_tiles=layout.superblock_tiles,
        kept_bytes=layout.kept_bytes,
        saves_sums=bool(saved),
        jacobian_bytes=job.jacobian_bytes,
        kernel_bytes=workload.kernel_bytes,
        task_count=layout.task_count(workload),
        tolerance=tolerance(workload),
        promised=Promise(
            host_bytes=limits.all_bytes("host", need.total("host")),
            device_bytes=need.total("device"),
            disk_bytes=need.total("disk") + saved,
            pinned_bytes=need.total("pinned"),
            seconds=cost.seconds,
            rows_seconds=cost.rows_seconds,
            kernel_seconds=cost.kernel_seconds,
        ),
        limits=budget,
        host_terms=dict(need.host),
        calibrated=rates.measured,
        reason=reason,
        alternatives=alternatives,
        notes=notes,
        job_digest=job_digest,
        projection=None if job.sketch is None else job.sketch.projection,
        structured=() if job.sketch is None else job.sketch.structured,
        from_factors=() if job.sketch is None else job.sketch.from_factors,
        expected_error=expected,
        features_only=preferences.features_only,
        heavy=() if job.sketch is None else job.sketch.heavy,
        heavy_share=0.0 if job.sketch is None else job.sketch.heavy_share,
        head=workload.head,
        by_layer=workload.by_layer,
        by_length=workload.by_length,
        workers=workload.workers,
        process_bytes=need.total("host") if workload.workers else 0,
        triangles=layout.triangles,
    )


def _as_asked(candidates: list[_Candidate], preferences: Preferences) -> list[_Candidate]:
    """Without spilled layouts that group kernel tiles in another way than was asked for.

    Raises:
        InputError: if no layout groups them so, and spilling was asked for as well.
    """
    if preferences.order is None and preferences.superblock_tiles in (None, 1):
        return candidates
    found = [
        c
        for c in candidates
        if c.layout.in_memory or (c.layout.superblock_tiles > 1 and preferences.order in (None, c.layout.order))
    ]
    if not found:
        raise InputError(
            f"no layout of this job groups kernel tiles in {preferences.order or 'superblock'}s: triangles need seven "
            "row tiles of train samples or more; leave order or tile_samples out"
        )
    return found


def _in_batches(
    job: Workload, limits: Limits, rates: MachineRates, preferences: Preferences
) -> tuple[Workload, Workload, list[_Candidate]]:
    """Candidates in the largest batches, halved from the size that was probed, in which any of them fits.

    Returns:
        The job in these batches, the workload that is contracted (of a projected job its features), and the candidates.

    Raises:
        BudgetError: if nothing fits even in batches of one sample.
        InputError: if every layout has too many tasks.
    """

    def at(size: int) -> tuple[Workload, Workload, list[_Candidate]]:
        sized = job if size == probed else replace(job, derivation=job.derivation.at(size))
        workload = sized if job.sketch is None else features_workload(sized, rates)
        candidates = _quick(workload, limits, rates, preferences) or list(
            _candidates(workload, limits, rates, preferences)
        )
        if not candidates:
            raise InputError(
                f"no layout of this job has at most {MAX_TASKS:,} tasks with the tiles asked for; raise --tile-samples"
            )
        candidates = _as_asked(candidates, preferences)
        return sized, workload, candidates

    def fits(found: tuple[Workload, Workload, list[_Candidate]]) -> bool:
        return any(candidate.over(limits) is None for candidate in found[2])

    size = probed = job.derivation.batch_size
    found = at(size)
    if fits(found):
        return found
    least = at(1) if size > 1 else found
    if not fits(least):
        raise _too_small(least[2], limits)
    while size > 2:
        size //= 2
        found = at(size)
        if fits(found):
            break
    else:
        found, size = least, 1
    note = f"rows are derived in batches of {size}, not of {probed} as probed: more does not fit the budget"
    return replace(found[0], notes=(*job.notes, note)), found[1], found[2]


def _planned(workload: Workload, layout: Layout, block: ParameterBlock, choice: Choice) -> PlannedBlock:
    """A block with what its choice holds and spends, beside what dense gradients would."""
    held = workload.samples * workload.rows_per_sample * workload.held_item_bytes * block.columns
    if choice.representation != "dense" and block.factors is not None:
        held = workload.samples * block.factors.held_bytes(workload.rows_per_sample, workload.held_item_bytes)
    grid = layout.sample_grid(workload)
    # Every kernel tile expands its two panels, a diagonal one only one.
    panels = sum(len(grid.rows(i)) + (0 if i == j else len(grid.columns(j))) for i, j in grid.kernel_tiles())
    return _beside_dense(workload, block, choice, held, block_flops(workload, block, choice, panels))


def _beside_dense(job: Workload, block: ParameterBlock, choice: Choice, held: int, flops: int) -> PlannedBlock:
    """A block that holds so many bytes and spends so many operations, beside what dense gradients would."""
    return PlannedBlock(
        name=block.name,
        parameters=block.parameters,
        start=block.start,
        stop=block.stop,
        representation=choice.representation,
        contraction=choice.contraction,
        held_bytes=held,
        flops=flops,
        source=block.source,
        reason=block.reason,
        factors=block.factors,
        dense_bytes=job.samples * job.rows_per_sample * job.held_item_bytes * block.columns,
        dense_flops=block_flops(job, block, DENSE),
        fused=block.fused and choice == PAIRWISE,
    )


def _for_features(preferences: Preferences) -> Preferences:
    """What of the preferences a projected job follows: its features are always kept on disk.

    Raises:
        InputError: for what it cannot follow.
    """
    if preferences.dataflow not in (None, "spill") or preferences.passes not in (None, 1):
        raise InputError(
            "a projected kernel is one sweep whose features are kept on disk; leave dataflow and passes out"
        )
    if preferences.representation is not None:
        raise InputError("nothing of the Jacobian is held of a projected kernel; leave representation out")
    return replace(preferences, dataflow="spill")


def _beside_exact(
    job: Workload, limits: Limits, rates: MachineRates, cost: Cost, expected: float | None
) -> tuple[tuple[Alternative, ...], str]:
    """The exact kernel beside the projected one: what it would take, and which of them is cheaper for the error."""
    error = "" if expected is None else f" at an expected error of {expected:.1%}"
    took = format_seconds(cost.seconds)
    try:
        exact = make_plan(replace(job, sketch=None), limits, rates)
    except BudgetError as failure:
        return (), f"projected, {took}{error}; the exact kernel does not fit: {failure}"
    chosen = next(entry for entry in exact.alternatives if entry.verdict == "chosen")
    seconds = exact.promised.seconds
    ratio = seconds / max(cost.seconds, 1e-9)
    cheaper = (
        f"projecting is {ratio:.1f} times cheaper" if ratio > 1 else f"the exact one is {1 / ratio:.1f} times cheaper"
    )
    note = f"projected, {took}{error}; the exact kernel would take {format_seconds(seconds)}: {cheaper}"
    sketch = job.sketch
    assert sketch is not None
    rows = job.samples * job.rows_per_sample
    if not sketch.projection.about.sparse and rows <= 2 * sketch.dim:
        note += f" (a dense projection saves arithmetic only from {2 * sketch.dim:,} rows on, here are {rows:,})"
    verdict = "slower than projecting" if ratio > 1 else "no slower, and without error"
    return (replace(chosen, layout=f"exact: {chosen.layout}", verdict=verdict),), note


def _projected(job: Workload, block: ParameterBlock) -> PlannedBlock:
    """A block of a projected job, beside what dense gradients would hold and spend."""
    assert job.sketch is not None
    projection, rows = job.sketch.projection, job.samples * job.rows_per_sample
    if from_factors(block, job.sketch):
        return _beside_dense(job, block, TENSOR_SKETCHED, 0, rows * job.sketch.dim * 16)
    each = 2 * projection.nonzeros if projection.about.sparse else 2 * job.sketch.dim
    return _beside_dense(job, block, PROJECTED, 0, rows * block.columns * each)


def tolerance(workload: Workload) -> float:
    """Relative error against float64 that a correct run stays below."""
    if workload.precision == "float64":
        return TOLERANCE_FLOAT64
    if workload.precision == "tf32":
        return TOLERANCE_TF32
    if workload.precision == "bf16":
        return TOLERANCE_BF16
    exact = TOLERANCE_CANCELLING if workload.cancelling else TOLERANCE_SMOOTH
    if not workload.smooth:
        exact = TOLERANCE_KINKED
    return exact + TOLERANCE_BF16X3 if workload.precision == "bf16x3" else exact


def _quick(workload: Workload, limits: Limits, rates: MachineRates, preferences: Preferences) -> list[_Candidate]:
    """Layouts in the largest tiles alone, where one that fits is over so soon that no search pays; none elsewhere."""
    if workload.workers or preferences.order is not None or preferences.superblock_tiles is not None:
        return []
    largest = tile_sizes(workload, preferences.tile_samples)[:1]
    if len(largest) != 1 or largest[0] < workload.samples:
        return []
    found = list(_candidates(workload, limits, rates, replace(preferences, tile_samples=largest[0])))
    quick = any(c.cost.seconds <= QUICK_SECONDS and c.over(limits) is None for c in found)
    return found if quick else []


def _candidates(
    workload: Workload, limits: Limits, rates: MachineRates, preferences: Preferences
) -> Iterator[_Candidate]:
    """Price every layout worth considering, whether it fits or not."""
    for dataflow in DATAFLOWS:
        if preferences.dataflow not in (None, dataflow):
            continue
        if preferences.passes not in (None, 1) and dataflow != "recompute":
            continue
        if workload.workers and dataflow in IN_MEMORY:
            continue
        if workload.by_layer and dataflow == "recompute":
            continue  # a layer's kernel would have to be put together from several passes
        more = triangle_counts(workload, limits) if dataflow == "spill" and preferences.order != "square" else ()
        for tile in tile_sizes(workload, preferences.tile_samples, more):
            if SampleGrid(workload.train_samples, workload.test_samples, tile).kernel_tile_count > MAX_TASKS:
                continue
            held = {choose(workload, rates, dataflow, tile, policy, preferences.representation) for policy in POLICIES}
            for choices in sorted(held, key=str):
                for one in _layouts(workload, limits, dataflow, tile, choices, preferences):
                    for layout in grouped(workload, limits, one, preferences.order, preferences.superblock_tiles):
                        if layout.task_count(workload) <= MAX_TASKS:
                            need = memory_need(workload, layout)
                            yield _Candidate(layout, need, price(workload, layout, rates, limits.host))


def _layouts(
    workload: Workload,
    limits: Limits,
    dataflow: Dataflow,
    tile: int,
    choices: tuple[Choice, ...],
    preferences: Preferences,
) -> Iterator[Layout]:
    """Layouts of one dataflow, tile size and choice of representations: widths of dense spans, and passes."""
    dense = sum(
        block.columns
        for block, choice in zip(workload.blocks, choices, strict=True)
        if choice.representation == "dense"
    )
    for span in span_sizes(workload, tile, dense, preferences.span_columns):
        one = Layout(dataflow, tile, span, (Range(0, 1),), choices)
        for passes in _passes(workload, limits, one, preferences.passes):
            yield replace(one, passes=passes)
        if not dense:
            return


def _keeping(workload: Workload, limits: Limits, rates: MachineRates, chosen: _Candidate) -> _Candidate:
    """The same layout with the memory that is left for panels that stay."""
    layout = keeping(workload, limits, chosen.layout)
    found = _Candidate(layout, memory_need(workload, layout), price(workload, layout, rates, limits.host))
    return chosen if found.over(limits) else found


def _passes(workload: Workload, limits: Limits, layout: Layout, wanted: int | None) -> Iterator[tuple[Range, ...]]:
    """Passes worth pricing: one; for ``recompute`` the fewest that the host budget allows, and some more.

    More passes than needed pay where deriving is cheaper than touching fresh memory.
    """
    spans = layout.spans(workload)
    if layout.dataflow != "recompute":
        yield (Range(0, len(spans)),)
        return
    if wanted is not None:
        if 2 <= wanted <= len(spans):
            yield even_ranges(len(spans), wanted)
        return
    sizes = [workload.samples * size for size in layout.cut(workload).held]
    free = limits.host - memory_need(workload, layout).total("host")
    room = sizes[0] + int(max(0, free) / (1 + ALLOCATOR_SHARE))
    found = set()
    for share in (1, 2, 4):
        found.add(pass_ranges(sizes, max(room // share, *sizes)) or even_ranges(len(spans), len(spans)))
    for passes in sorted(found, key=len):
        if len(passes) >= 2:
            yield passes
    if len(spans) >= 2 and all(len(passes) < 2 for passes in found):
        yield even_ranges(len(spans), 2)


def _longest(candidate: _Candidate) -> float:
    """Seconds that a kernel task should take at most."""
    if candidate.layout.superblock_tiles == 1:
        return LONGEST_TASK_SECONDS
    return max(LONGEST_TASK_SECONDS, LONGEST_TASK_SHARE * candidate.cost.seconds)


def _best(fitting: list[_Candidate], fewer_bytes: float = FEWER_BYTES_SHARE) -> _Candidate:
    """The fastest, preferring short tasks; of equally fast ones of that dataflow the one that moves the fewest bytes.

    Of those on disk that move equally few the fastest. Where none move, the one with the smallest memory; of those that
    hardly differ in it the fastest, where the whole run is no longer than one task should be, so that stopping it loses
    little.
    """
    short = [c for c in fitting if c.cost.longest_task_seconds <= _longest(c)]
    fastest = min(fitting, key=lambda c: c.cost.seconds)
    pool = fitting
    if short:
        quick = min(short, key=lambda c: c.cost.seconds)
        if quick.cost.seconds <= SHORT_TASKS_SHARE * fastest.cost.seconds:
            pool, fastest = short, quick
    share = EQUALLY_FAST if fastest.layout.in_memory else fewer_bytes
    equal = [
        c
        for c in pool
        if c.layout.dataflow == fastest.layout.dataflow and c.cost.seconds <= fastest.cost.seconds * (1 + share)
    ]
    moved = min(c.cost.moved_bytes for c in equal)
    few = [c for c in equal if c.cost.moved_bytes <= moved * (1 + EQUALLY_FEW)]
    if not fastest.layout.in_memory:  # what memory is left is filled with panels that stay
        return min(few, key=lambda c: c.cost.seconds)
    least = min(few, key=lambda c: c.need.total("host"))
    if fastest.cost.seconds > LONGEST_TASK_SECONDS:
        return least
    near = [c for c in few if c.need.total("host") <= least.need.total("host") + NEGLIGIBLE_BYTES]
    return min(near, key=lambda c: (c.cost.seconds, c.need.total("host")))


def _explain(candidates: list[_Candidate], best: _Candidate, limits: Limits) -> tuple[tuple[Alternative, ...], str]:
    """Describe the best layout of every dataflow and say why the chosen one was."""
    alternatives = []
    slower, too_large = [], []
    for dataflow in DATAFLOWS:
        group = [c for c in candidates if c.layout.dataflow == dataflow]
        if not group:
            continue
        fitting = [c for c in group if c.over(limits) is None]
        if fitting:
            shown = best if dataflow == best.layout.dataflow else _best(fitting)
            verdict = "chosen" if shown is best else f"{shown.cost.seconds / best.cost.seconds:.1f} times slower"
            if shown is not best:
                slower.append(f"{dataflow} would take {format_seconds(shown.cost.seconds)}")
        else:
            shown = min(group, key=lambda c: sum(max(0, c.need.total(m) - getattr(limits, m)) for m in _MEMORIES))
            memory = shown.over(limits) or "host"
            short = limits.all_bytes(memory, shown.need.total(memory))
            verdict = f"needs {format_bytes(short)} {memory}, limit {limits.describe(memory)}"
            too_large.append(f"{dataflow} {verdict}")
        alternatives.append(
            Alternative(
                dataflow=dataflow,
                layout=shown.layout.describe(),
                seconds=shown.cost.seconds if fitting else None,
                host_bytes=limits.all_bytes("host", shown.need.total("host")),
                disk_bytes=shown.need.total("disk"),
                verdict=verdict,
            )
        )
    others = "; ".join(too_large + slower)
    alone = "the one whose tiles worker processes can share" if limits.workers else "the only one asked for"
    reason = f"fastest that fits ({others})" if others else alone
    return tuple(alternatives), reason


_MEMORIES: Final[tuple[Literal["host", "device", "disk"], ...]] = ("host", "device", "disk")
#: Options that set the limits.
FLAGS: Final = {"host": "--host-memory", "device": "--device-memory", "disk": "--disk"}


def _too_small(candidates: list[_Candidate], limits: Limits) -> BudgetError:
    """The error when nothing fits: the memory that is short, its largest term, the smallest budget that would do."""
    for memory in _MEMORIES:
        others = [m for m in _MEMORIES if m != memory]
        able = [c for c in candidates if all(c.need.total(m) <= getattr(limits, m) for m in others)]
        if able:
            return _short_of(memory, min(able, key=lambda c: c.need.total(memory)), limits)
    nearest = min(candidates, key=lambda c: c.need.total("host"))
    return _short_of(nearest.over(limits) or "host", nearest, limits)


def _short_of(memory: str, candidate: _Candidate, limits: Limits) -> BudgetError:
    """Name one memory that is short, and every other one that is short too."""
    need = candidate.need
    short = [m for m in _MEMORIES if need.total(m) > getattr(limits, m)]
    apart = {"host": RESTART_BYTES}
    enough: dict[str, int] = {m: limits.all_bytes(m, need.total(m) + apart.get(m, 0)) for m in short}
    flags = " and ".join(f"{FLAGS[m]} to {format_up(size)}" for m, size in enough.items())
    share = f" for {limits.workers} worker process{'es' * (limits.workers > 1)}" if limits.workers else ""
    error = BudgetError(
        f"no plan fits{share}: the smallest one needs {format_bytes(limits.all_bytes(memory, need.total(memory)))} of "
        f"{'disk' if memory == 'disk' else f'{memory} memory'} ({candidate.layout.describe()}), the budget is "
        f"{limits.describe(memory)}; its largest term is {need.largest(memory)}. Raise {flags} or more."
    )
    error.smallest = enough
    return error


def format_up(count: int) -> str:
    """Print bytes rounded up to whole MiB, so that the figure can be typed back as a budget that suffices.

    >>> format_up(2**20 + 1)
    '2MiB'
    """
    return f"{-(-count // 2**20)}MiB"
