"""How every block is held and contracted: the cheapest of what its factors allow, by formulas, rates and timings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

from .cost import EXPANDED_SHARE, expand_seconds, pair_seconds
from .layout import Dataflow
from .rates import MachineRates
from .spans import DENSE, FACTORED, PAIRWISE, TOKENS, Choice
from .tiles import SampleGrid
from .workload import ParameterBlock, Workload

if TYPE_CHECKING:
    from .plan import PlannedBlock

#: What a user may ask for wherever a block allows it.
REPRESENTATIONS: Final = ("dense", "factored", "pairwise")

#: Whether seconds or held bytes decide.
Policy = Literal["fastest", "smallest"]
POLICIES: Final[tuple[Policy, ...]] = ("fastest", "smallest")

#: A dense block must be this much faster than a smaller one: fewer held bytes are worth a little time.
CLEARLY_FASTER: Final = 0.9


def allowed_choices(block: ParameterBlock | PlannedBlock, wanted: str | None = None) -> tuple[Choice, ...]:
    """The ways in which a block can be held and contracted.

    Args:
        block: the block.
        wanted: ``dense``, ``factored`` or ``pairwise``; None leaves all that make sense.

    Returns:
        At least one. With a single position per sample pairwise contraction is always the cheapest (DESIGN).

    >>> from .factors import LayerFactors
    >>> block = ParameterBlock("fc", ("w",), 0, 6, "rule", "", LayerFactors("linear", 1, 2, 3))
    >>> allowed_choices(block) == (PAIRWISE,)
    True
    >>> allowed_choices(ParameterBlock("bn", ("w",), 0, 6, "rule"), "pairwise") == (DENSE,)
    True
    """
    factors = block.factors
    if factors is None or wanted == "dense":
        return (DENSE,)
    if factors.kind == "tokens":
        return (TOKENS,) if wanted else (DENSE, TOKENS)
    if wanted is not None:
        return (FACTORED,) if wanted == "factored" else (PAIRWISE,)
    # Rows that are looked up in the same weight are positions, too.
    return (PAIRWISE,) if factors.single else (DENSE, FACTORED, PAIRWISE)


def choose(
    workload: Workload,
    rates: MachineRates,
    dataflow: Dataflow,
    tile: int,
    policy: Policy = "fastest",
    wanted: str | None = None,
) -> tuple[Choice, ...]:
    """Choose how every block is held and contracted under one dataflow and tile size.

    Args:
        workload: the measured job.
        rates: the machine's rates.
        dataflow: where tiles are held.
        tile: samples per tile; more tiles expand factors more often.
        policy: whether seconds or held bytes decide.
        wanted: what the user asked for wherever a block allows it.

    Returns:
        A choice per block.
    """
    found = []
    for block in workload.blocks:
        choices = allowed_choices(block, wanted)
        if len(choices) == 1:
            found.append(choices[0])
            continue
        seconds = {choice: choice_seconds(workload, rates, dataflow, tile, block, choice) for choice in choices}
        held = {choice: choice_bytes(workload, block, choice) for choice in choices}
        smallest = min(choices, key=lambda choice: (held[choice], seconds[choice]))
        fastest = min(choices, key=lambda choice: seconds[choice])
        faster = seconds[fastest] < CLEARLY_FASTER * seconds[smallest]
        found.append(fastest if policy == "fastest" and (faster or held[fastest] <= held[smallest]) else smallest)
    return tuple(found)


def choice_bytes(workload: Workload, block: ParameterBlock, choice: Choice) -> int:
    """Bytes held of one sample."""
    if choice.representation == "dense" or block.factors is None:
        return block.columns * workload.rows_per_sample * workload.held_item_bytes
    return block.factors.held_bytes(workload.rows_per_sample, workload.held_item_bytes)


def choice_seconds(
    workload: Workload, rates: MachineRates, dataflow: Dataflow, tile: int, block: ParameterBlock, choice: Choice
) -> float:
    """Seconds that a block takes in all, where choices differ: expanding, storing, reading and contracting."""
    grid = SampleGrid(workload.train_samples, workload.test_samples, tile)
    panels = min(workload.samples, tile) * (2 * grid.kernel_tile_count - grid.column_tiles)
    held, expanding = choice_bytes(workload, block, choice), expand_seconds(workload, block, rates)
    seconds = workload.samples * held / (rates.fill if dataflow == "resident" else rates.copy)
    if dataflow == "spill":
        seconds += workload.samples * held / rates.disk_write + panels * held / rates.disk_read
    if choice.representation == "dense":
        depth = block.columns * workload.rows_per_sample * workload.entries_per_sample
        edge = tile * workload.entries_per_sample
        product = rates.gemm_seconds(1, 1, depth, workload.precision, edge=edge)
        return seconds + workload.samples * expanding + workload.pairs * product
    if choice.contraction == "gemm":
        seconds += (panels + workload.test_samples) * expanding / EXPANDED_SHARE
    return seconds + workload.pairs * pair_seconds(workload, block, choice, rates, tile)
