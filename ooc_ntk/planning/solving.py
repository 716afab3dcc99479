"""How a ridge regression is solved: what each way takes in memory, disk and time, and which one is taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from ooc_ntk.errors import BudgetError, InputError, unknown_name
from ooc_ntk.units import format_bytes, format_seconds

from .rates import MachineRates

#: Passes that preconditioned conjugate gradients are priced at. (The number depends on the spectrum and is not known
#: before; measured: 48 to 69 on the trace kernel of 4,000 digits, with 30,000 up to 224. After a dozen steps it is, and
#: a factorisation takes over where it is faster.)
EXPECTED_PASSES: Final = 60

#: Columns of the preconditioner: half of the rows, at most this many. (Measured on trace kernels of 4,000 and 30,000
#: digits: twice the columns save 4 steps in 10, and building them takes the time of some twenty.)
MAX_RANK: Final = 2000

#: Columns that a round of the preconditioner proposes (a choice: enough for matrix products, few are rejected), and
#: rows that it multiplies at once where a product must not take another array of all rows.
ROUND_COLUMNS: Final = 64
ROWS_AT_ONCE: Final = 4096

#: (n, targets) arrays that conjugate gradients hold at once.
CG_ARRAYS: Final = 11

#: Memory of the stripes and scratch of a pass, in bytes.
PASS_BYTES: Final = 48 * 2**20

#: Strips of a block's height that the tile Cholesky holds beside the block: four that are read, one that is written,
#: and three copies that solving with a triangle takes (measured).
STRIPS: Final = 8

#: Tiles along the edge of a block of the tile Cholesky: more make strips narrower and reads smaller (a choice).
BLOCK_TILES: Final = 32


@dataclass(frozen=True)
class SolvePrice:
    """What one way of solving takes.

    Attributes:
        method: its name.
        host_bytes: memory beyond what the process holds.
        disk_bytes: working space on disk.
        read_bytes: bytes read from disk.
        written_bytes: bytes written to disk.
        seconds: estimated time.
        edge: rows of a tile Cholesky's block.
        rank: columns of the preconditioner.
        factorises: whether its steps are known before it begins, so that an iterative one may fall back to it, and
            nothing needs to precondition it.
    """

    method: str
    host_bytes: int
    disk_bytes: int
    read_bytes: int
    written_bytes: int
    seconds: float
    edge: int = 0
    rank: int = 0
    factorises: bool = True


@dataclass(frozen=True)
class System:
    """What is to be solved, and with what.

    Attributes:
        size: rows of the train square (n).
        targets: right-hand sides.
        triangle_bytes: bytes that a pass over the lower triangle reads.
        host_free: bytes that may be taken beyond what the process holds.
        rates: of the machine.
        rank: columns of the preconditioner; None for as many as pay.
    """

    size: int
    targets: int
    triangle_bytes: int
    host_free: int
    rates: MachineRates
    rank: int | None = None


#: What a way of solving takes: a function of the system, which may look at nothing else.
Pricing: TypeAlias = Callable[[System], SolvePrice]


@dataclass(frozen=True)
class SolvePlan:
    """All ways of solving with their prices, and the one that is taken.

    Attributes:
        size: rows of the train square.
        targets: right-hand sides.
        prices: of every method.
        chosen: the one that is taken.
        host_free: bytes that the solution may take beyond what the process holds.
        fitting: those of them that fit.
    """

    size: int
    targets: int
    prices: tuple[SolvePrice, ...]
    chosen: SolvePrice
    host_free: int
    fitting: tuple[SolvePrice, ...]

    @property
    def direct_seconds(self) -> float:
        """Time of the fastest method that fits and factorises; infinite if none does."""
        return min((price.seconds for price in self.fitting if price.factorises), default=math.inf)

    def __str__(self) -> str:
        """A line per method."""
        lines = [f"solve {self.size:,} × {self.size:,} for {self.targets:,} targets in {format_bytes(self.host_free)}"]
        for price in self.prices:
            verdict = "chosen" if price is self.chosen else "slower"
            if price not in self.fitting:
                verdict = "does not fit"
            lines.append(
                f"{price.method:9} {format_seconds(price.seconds):>12}  {format_bytes(price.host_bytes):>9} host  "
                f"{format_bytes(price.disk_bytes):>9} disk  {format_bytes(price.read_bytes):>9} read  {verdict}"
            )
        return "\n".join(lines)


def plan_solve(
    size: int,
    targets: int,
    triangle_bytes: int,
    host_free: int,
    disk_free: int,
    rates: MachineRates,
    method: str = "auto",
    rank: int | None = None,
    disk: bool = True,
    ridge: float = 1.0,
    held: int = 0,
    pricings: Sequence[Pricing] = (),
) -> SolvePlan:
    """Price every way of solving and take the fastest that fits.

    Args:
        size: rows of the train square (n).
        targets: right-hand sides.
        triangle_bytes: bytes that a pass over the lower triangle reads.
        host_free: bytes that may be taken beyond what the process holds.
        disk_free: bytes that may be taken on disk.
        rates: of the machine.
        method: ``auto``, or the one that is wanted.
        rank: columns of the preconditioner; None for as many as pay.
        disk: whether there is a folder for working space.
        held: bytes that the process holds already, and that libraries will take, for the message.
        pricings: of the ways to solve; none for :data:`PRICINGS`.
        ridge: without one only what factorises the matrix is offered by itself, as nothing preconditions it.

    Returns:
        The plan.

    Raises:
        InputError: for an unknown method, or one that has no working space.
        BudgetError: if the method that is wanted, or every one, needs more than there is.

    >>> from ooc_ntk.planning.rates import UNCALIBRATED
    >>> plan_solve(4000, 10, 32 * 10**6, 2**31, 2**33, UNCALIBRATED).chosen.method
    'cholesky'
    >>> plan_solve(30_000, 10, 18 * 10**8, 2**30, 2**36, UNCALIBRATED).chosen.method
    'cg'
    >>> plan_solve(30_000, 20_000, 18 * 10**8, 2**35, 2**36, UNCALIBRATED).chosen.method
    'cholesky'
    """
    system = System(size, targets, triangle_bytes, host_free, rates, rank)
    found = [pricing(system) for pricing in pricings or PRICINGS]
    prices = tuple(sorted(found, key=lambda price: (price.disk_bytes > 0, not price.factorises)))  # as plans show them
    by_name = {price.method: price for price in prices}
    if method not in (*by_name, "auto"):
        raise unknown_name("method", method, (*by_name, "auto"))
    if method != "auto" and by_name[method].disk_bytes and not disk:
        raise InputError(f"method {method!r} works on disk, and this kernel has no folder; give one: workspace=...")
    fitting = [price for price in prices if price.host_bytes <= host_free and price.disk_bytes <= disk_free]
    fitting = [price for price in fitting if disk or not price.disk_bytes]
    wanted = [by_name[method]] if method != "auto" else fitting
    if method == "auto" and ridge == 0:
        wanted = [price for price in wanted if price.factorises] or wanted
    usable = [price for price in wanted if price in fitting]
    if not usable:
        least = min(wanted or prices, key=lambda price: price.host_bytes)
        if least.disk_bytes > disk_free:
            raise BudgetError(
                f"solving by {least.method} needs {format_bytes(least.disk_bytes)} of disk, "
                f"{format_bytes(disk_free)} are free to use; make room, or give another folder: workspace=..."
            )
        raise BudgetError(
            f"solving {size:,} × {size:,} for {targets:,} right-hand sides by {least.method} needs "
            f"{format_bytes(least.host_bytes)} of memory, {format_bytes(max(0, host_free))} are free to use"
            + (f" beside {format_bytes(held)} for the process and its libraries" if held else "")
            + f"; raise the host budget to {-(-(held + least.host_bytes) // 2**20)}MiB or more (budget=..., "
            "--host-memory)"
        )
    chosen = min(usable, key=lambda price: price.seconds)
    return SolvePlan(size, targets, prices, chosen, host_free, tuple(fitting))


def price_cholesky(system: System) -> SolvePrice:
    """In memory: the matrix in float64, factorised in place."""
    size, targets, triangle_bytes, rates = system.size, system.targets, system.triangle_bytes, system.rates
    host = 8 * size * size + 3 * 8 * size * targets + PASS_BYTES
    flops = size**3 / 3 + 2 * size * size * targets
    seconds = 2 * triangle_bytes / rates.disk_read + flops / _rate(rates, 1024)
    return SolvePrice("cholesky", host, 0, 2 * triangle_bytes, 0, seconds)


def price_conjugate_gradients(system: System) -> SolvePrice:
    """Preconditioned block conjugate gradients; the preconditioner takes the columns that fit."""
    size, targets, triangle_bytes, rates = system.size, system.targets, system.triangle_bytes, system.rates
    host_free, rank = system.host_free, system.rank
    fixed = 8 * size * targets * CG_ARRAYS + PASS_BYTES
    wanted = max(1, min(size // 2, MAX_RANK)) if rank is None else min(rank, size)
    while rank is None and wanted > 64 and fixed + preconditioner_bytes(size, wanted) > host_free:
        wanted -= max(1, wanted // 8)
    host = fixed + (preconditioner_bytes(size, wanted) if wanted else 0)
    passes = EXPECTED_PASSES
    product = max(triangle_bytes / rates.disk_read, 4 * size * size / 2 * targets / _rate(rates, targets))
    applied = 8 * size * wanted * targets / _rate(rates, 512)
    building = (8 * size + 10 * wanted) * wanted * wanted / _rate(rates, 512)
    seconds = passes * (product + 2 * applied) + building
    return SolvePrice("cg", host, 0, passes * triangle_bytes, 0, seconds, rank=wanted, factorises=False)


def price_tiles(system: System) -> SolvePrice:
    """Left-looking Cholesky by blocks on disk."""
    size, targets, triangle_bytes, rates = system.size, system.targets, system.triangle_bytes, system.rates
    host_free = system.host_free
    edge = tile_cholesky_edge(size, host_free - 2 * 8 * size * targets - PASS_BYTES)
    host = tile_cholesky_bytes(edge) + 2 * 8 * size * targets + PASS_BYTES
    read, written = tile_cholesky_traffic(size, edge)
    read += 2 * 4 * size * size  # the factor forth and back
    flops = size**3 / 3 + 2 * size * size * targets
    seconds = max(read / rates.disk_read, flops / _rate(rates, 1024)) + written / rates.disk_write
    seconds += 2 * triangle_bytes / rates.disk_read  # the kernel itself, and once more for the residual
    disk = 4 * size * size + 8 * size * edge
    return SolvePrice("tiles", host, disk, read + 2 * triangle_bytes, written, seconds, edge=edge)


#: The pricings of this project's ways to solve.
PRICINGS: Final[tuple[Pricing, ...]] = (price_cholesky, price_conjugate_gradients, price_tiles)


def _rate(rates: MachineRates, edge: int) -> float:
    """FLOP/s in float64 of products of some edge."""
    table = rates.gemm.get("float64") or rates.gemm["float32"]
    known = sorted(table)
    return table[max((each for each in known if each <= edge), default=known[0])]


def preconditioner_bytes(size: int, rank: int) -> int:
    """Memory of a preconditioner while it is built, in bytes.

    >>> preconditioner_bytes(30_000, 1000) < 500e6
    True
    """
    return 8 * (size * rank + 6 * rank * rank + 4 * ROUND_COLUMNS * size + 2 * ROWS_AT_ONCE * rank)


def tile_cholesky_edge(size: int, host_bytes: int) -> int:
    """Rows of a block of the tile Cholesky: a multiple of BLOCK_TILES, as large as the memory allows.

    >>> tile_cholesky_edge(30_000, 10**9)
    9984
    >>> tile_cholesky_edge(1000, 10**9)
    1024
    """
    fitting = int(math.sqrt(max(0, host_bytes) / 8 / (1 + STRIPS / BLOCK_TILES)))
    whole = -(-size // BLOCK_TILES) * BLOCK_TILES
    return max(BLOCK_TILES, min(whole, fitting // BLOCK_TILES * BLOCK_TILES))


def tile_cholesky_bytes(edge: int) -> int:
    """Memory of the tile Cholesky: a block, and strips of it as wide as a tile.

    >>> tile_cholesky_bytes(tile_cholesky_edge(30_000, 10**9)) <= 10**9
    True
    """
    return 8 * edge * edge + STRIPS * 8 * edge * (edge // BLOCK_TILES)


def tile_cholesky_traffic(size: int, edge: int) -> tuple[int, int]:
    """Bytes of factor that the tile Cholesky reads and writes, without the kernel itself.

    A block (I, J) reads the J blocks left of both its rows (of a block on the diagonal once), and the block on the
    diagonal to solve with it.

    >>> tile_cholesky_traffic(1000, 1024)
    (0, 8000000)
    """
    count, read, written = -(-size // edge), 0, 0
    for column in range(count):
        left = column * edge
        width, below, rows = min(edge, size - left), max(0, size - left - edge), count - column - 1
        read += left * width + left * (below + rows * width) + rows * width * width
        written += width * width + below * width
    return 8 * read, 8 * written


def cholesky_bound_bytes(size: int, memory_bytes: int) -> float:
    """Least bytes that any Cholesky factorisation moves, ``n³/(3√2·√S)`` elements (Beaumont et al. 2022).

    Args:
        size: n.
        memory_bytes: S elements of float64, in bytes; below, twice the triangle is moved at least (read and written).

    >>> cholesky_bound_bytes(30_000, 8 * 10**8) > 8 * 30_000**2
    False
    """
    elements = memory_bytes / 8
    return 8 * max(size**3 / (3 * math.sqrt(2) * math.sqrt(elements)), size * size)
