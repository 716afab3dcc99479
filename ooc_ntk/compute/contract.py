"""Contraction: products of Jacobian tiles summed into one kernel tile without losing digits to its length."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Final

import numpy as np
import torch
from torch import Tensor

from ooc_ntk.errors import InputError
from ooc_ntk.planning.factors import LayerFactors
from ooc_ntk.planning.layout import CONTRACTION_COLUMNS
from ooc_ntk.planning.memory import pairwise_steps
from ooc_ntk.planning.rates import CALIBRATED_DEPTH, CALIBRATED_EDGES
from ooc_ntk.planning.spans import Contraction
from ooc_ntk.units import partial_products

from .expand import Piece, expand_piece, pieces, rows_first
from .fused import can_fuse
from .held import Tile, as_tile, split_digits
from .machine import best_seconds
from .matching import contract_matching
from .pairwise import contract_crossed, contract_pairwise, looked_up, sum_positions
from .products import multiply
from .split import Parts, SplitProducts

logger = logging.getLogger(__name__)

#: What models and their gradients are computed in.
TORCH_DTYPE = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.float32,
    "bf16x3": torch.float32,
    "float64": torch.float64,
}

#: What tiles are held in and multiplied in.
HELD_TORCH_DTYPE = {**TORCH_DTYPE, "bf16": torch.bfloat16}


#: Tiles with a narrower side than this go through torch's products on a CPU, Gram matrices in blocks of rows up to the
#: diagonal: ``ssyrk`` is slower there, and a second BLAS beside torch's own threads costs (measured, triangle counted:
#: 128 rows 167 against 110 GFLOP/s, 256 rows 208 against 151, 384 rows 233 against 183).
SYRK_EDGE: Final = 512

#: Gram matrices of up to so many rows are made in two blocks, larger ones in three or more of :data:`GRAM_ROWS`
#: (measured: fastest of 1 to 8 blocks).
GRAM_HALVED: Final = 192
GRAM_ROWS: Final = 128

#: Elements of a bf16 product that are widened to float32 at a time, within the second-level cache.
WIDENED_ITEMS: Final = 2**18

#: Columns of such tiles whose sum stays in float32.
SUMMED_COLUMNS: Final = 32_768


class KernelAccumulator:
    """Sums ``left @ right.T`` over many column blocks into one kernel tile.

    Blocks of at most :data:`CONTRACTION_COLUMNS` columns are multiplied in the plan's precision and added up in
    float64, so the rounding error does not grow with the number of parameters. On a CPU large products go through
    NumPy's BLAS, which computes a Gram matrix by ``ssyrk`` (half the arithmetic) and, unlike SciPy's wrapper, lets
    other threads run meanwhile. In ``bf16x3`` each product is three of bf16 parts. All buffers are allocated once and
    reused for every tile.
    """

    def __init__(self, edge: int, precision: str, device: str = "cpu") -> None:
        """Allocate for tiles of up to edge × edge entries.

        Args:
            edge: largest number of kernel rows or columns of a tile.
            precision: ``float32``, ``tf32``, ``bf16``, ``bf16x3`` or ``float64``.
            device: torch device string.
        """
        self._on_cpu = torch.device(device).type == "cpu"
        self._device = torch.device(device)
        self._precision, self._tf32 = precision, precision == "tf32"
        self._split = SplitProducts(self._device) if precision == "bf16x3" else None
        self._sums = torch.empty(edge * edge, dtype=torch.float64, device=device)
        self._dtype = HELD_TORCH_DTYPE[precision]
        self._products = torch.empty(edge * edge, dtype=self._dtype, device=device)
        self._sum, self._product = self._sums, self._products
        self._expanded: tuple[Tensor, Tensor] | None = None
        self._copied: torch.cuda.Event | None = None

    def begin(self, rows: int, columns: int) -> None:
        """Start a new tile of rows × columns entries, at zero."""
        self._sum = self._sums[: rows * columns].view(rows, columns).zero_()
        self._product = self._products[: rows * columns].view(rows, columns)

    def go_on(self, rows: int, columns: int, total: Tensor) -> None:
        """Add to a sum held elsewhere, (entries or more,), in place of a tile of its own."""
        self._sum = total[: rows * columns].view(rows, columns)
        self._product = self._products[: rows * columns].view(rows, columns)

    def add(self, left: Tensor | Parts, right: Tensor | Parts | None = None) -> None:
        """Add ``left @ right.T`` to the tile.

        Args:
            left: (rows, depth), in the plan's precision, on the host or the device; in ``bf16x3`` perhaps its parts.
            right: (columns, depth); None for the Gram matrix of ``left``.
        """
        if self._split is not None:
            self._add_by_parts(left, right)
            return
        assert isinstance(left, Tensor)
        assert not isinstance(right, Parts)
        left = self._there(left)
        right = None if right is None else self._there(right)
        if not self._on_cpu or min(self._product.shape) < SYRK_EDGE or self._dtype == torch.bfloat16:
            self._add_by_torch(left, right)
            self._settle()
            return
        for start in range(0, left.shape[1], CONTRACTION_COLUMNS):
            a = left[:, start : start + CONTRACTION_COLUMNS]
            b = a if right is None else right[:, start : start + CONTRACTION_COLUMNS]
            np.matmul(a.numpy(), b.numpy().T, out=self._product.numpy())
            self._add_to(self._sum, self._product)

    def _add_by_torch(self, left: Tensor, right: Tensor | None) -> None:
        """The same by torch's products: for narrow tiles, on a device, and between other work of torch.

        NumPy's BLAS has threads of its own, and both sets wait for work by spinning (measured in turns with torch's
        expansion of 512 samples: 125 GFLOP/s, torch alone 212).
        """
        if self._split is not None:
            self._add_by_parts(left, right)
            return
        step = SUMMED_COLUMNS if self._on_cpu else CONTRACTION_COLUMNS
        for start in range(0, left.shape[1], step):
            a = left[:, start : start + step]
            if right is None and self._on_cpu:
                self._add_gram(a)
                continue
            b = a if right is None else right[:, start : start + step]
            with tf32(self._tf32):
                multiply(a, b, self._product, None if self._on_cpu else step)
            self._add_to(self._sum, self._product)

    def _add_by_parts(self, left: Tensor | Parts, right: Tensor | Parts | None) -> None:
        """The same in ``bf16x3``; what is not in parts yet is split some columns at a time."""
        assert self._split is not None
        whole = isinstance(left, Parts) and (right is None or isinstance(right, Parts))
        step = CONTRACTION_COLUMNS if whole else self._split.columns
        left = left if isinstance(left, Parts) else self._there(left)
        right = right if right is None or isinstance(right, Parts) else self._there(right)
        depth = (left.high if isinstance(left, Parts) else left).shape[1]
        for start in range(0, depth, step):
            a = self._parts(left, slice(start, start + step), "left")
            b = None if right is None else self._parts(right, slice(start, start + step), "right")
            self._add_to(self._sum, self._split.product(a, b, self._product))

    def _parts(self, values: Tensor | Parts, columns: slice, side: str) -> Parts:
        assert self._split is not None
        return values.columns(columns) if isinstance(values, Parts) else self._split.split(values[:, columns], side)

    def _add_gram(self, rows: Tensor) -> None:
        """Add ``rows @ rows.T`` in blocks of rows, each up to the diagonal; what is above it is left as it is."""
        count = len(rows)
        step = max(1, -(-count // 2) if count <= GRAM_HALVED else min(GRAM_ROWS, -(-count // 3)))
        for start in range(0, count, step):
            stop = min(start + step, count)
            product = self._product[start:stop, :stop]
            multiply(rows[start:stop], rows[:stop], product)
            self._add_to(self._sum[start:stop, :stop], product)

    def add_factored(self, factors: LayerFactors, left: Tile, right: Tile | None, entries: int) -> None:
        """Expand a layer's factors piece by piece into reused buffers, and add the product of each.

        Args:
            factors: shapes of the factors.
            left: the factors of the row tile.
            right: the same of the column tile; None for the Gram matrix of ``left``.
            entries: kernel rows per sample.
        """
        left, right = self._move(left), None if right is None else self._move(right)
        rows = left[1].shape[2]
        parts = list(pieces(factors, rows, whole_rows=entries > 1))
        items = max(piece.items(factors) for piece in parts)
        for piece in parts:
            expanded = self._expand(factors, left, piece, 0, items, entries)
            other = None if right is None else self._expand(factors, right, piece, 1, items, entries)
            self._add_by_torch(expanded, other)
        if factors.bias:
            self._add_by_torch(self._summed(left, entries), None if right is None else self._summed(right, entries))
        self._settle()

    def add_pairwise(
        self, factors: LayerFactors, left: Tile, right: Tile | None, entries: int, *, fused: bool = False
    ) -> None:
        """Add a layer's contraction from its factors; see :meth:`add_factored`, and for ``fused`` the plan's block."""

        def add_block(block: Tensor, row: int, column: int) -> None:
            self._add_to(self._sum[row : row + block.shape[0], column : column + block.shape[1]], block)

        with _products_in(self._precision, self._split):
            left, right = self._move(left), None if right is None else self._move(right)
            contract_pairwise(factors, left, right, entries, add_block, fused=fused)
        if factors.lookups:
            with _products_in(self._precision, self._split):
                contract_crossed(factors, left, right, entries, add_block)
            self.add_matching(looked_up(left), None if right is None else looked_up(right), entries)
        self._settle()

    def add_matching(self, left: Tile, right: Tile | None, entries: int) -> None:
        """Add an embedding's contraction from tokens and gradients; see :meth:`add_factored`."""

        def add_at(block: Tensor, rows: np.ndarray, columns: np.ndarray) -> None:
            if self._on_cpu:
                added = block.float() if block.dtype == torch.bfloat16 else block
                self._sum.numpy()[np.ix_(rows, columns)] += added.numpy()
            else:
                places = (torch.from_numpy(part).to(self._device, non_blocking=True) for part in (rows, columns))
                index = next(places)[:, None], next(places)[None, :]
                self._sum[index] += block.to(self._sum)

        # The host decides by the token numbers what is multiplied.
        sides = [None if side is None else (side[0], self._there(side[1])) for side in (left, right)]
        assert sides[0] is not None
        with _products_in(self._precision, self._split):
            contract_matching(sides[0], sides[1], entries, self.add, add_at)
        self._settle()

    def _expand(self, factors: LayerFactors, tile: Tile, piece: Piece, side: int, items: int, entries: int) -> Tensor:
        """One piece of one side: (samples · entries, depth)."""
        needed = len(tile[0]) * items
        if self._expanded is None or self._expanded[side].numel() < needed:
            sides = list(self._expanded or (self._sums.new_empty(0, dtype=self._dtype),) * 2)
            sides[side] = torch.empty(needed, dtype=self._dtype, device=self._device)
            self._expanded = sides[0], sides[1]
        with tf32(self._tf32):
            found = expand_piece(factors, tile, piece, self._expanded[side], by_rows=entries > 1 or rows_first(tile))
        return found.view(len(tile[0]) * entries, -1)

    @staticmethod
    def _summed(tile: Tile, entries: int) -> Tensor:
        """Gradients of the bias: (samples · entries, depth)."""
        return tile[1].sum(1).reshape(len(tile[0]) * entries, -1)

    def _there(self, value: Tensor) -> Tensor:
        if value.device.type == self._device.type:
            return value
        moved = value.to(self._device, non_blocking=True)
        if value.is_pinned():
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record(torch.cuda.current_stream(self._device))
        return moved

    def _settle(self) -> None:
        """Wait for copies from page-locked memory, not for the products behind them: the caller may reuse that memory.

        A copy from other memory has read it all when the call returns.
        """
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None

    def _move(self, tile: Tile) -> Tile:
        return tuple(self._there(part) for part in tile)

    def _add_to(self, total: Tensor, block: Tensor) -> None:
        """Add a block to a part of the sum."""
        if not self._on_cpu:
            total += block
            return
        # Ten times faster than torch's addition of mixed dtypes (measured). bf16 is widened some rows at a time.
        step = len(block) if block.dtype != torch.bfloat16 else max(1, WIDENED_ITEMS // block.shape[1])
        for start in range(0, len(block), step):
            values = block[start : start + step]
            part = total[start : start + step].numpy()
            np.add(part, (values.float() if values.dtype == torch.bfloat16 else values).numpy(), out=part)

    def add_to(self, total: Tensor, *, first: bool) -> None:
        """Add the tile to a sum held elsewhere, or set that to the tile.

        Args:
            total: (entries or more,) in float32 or float64, on the device.
            first: whether nothing was added yet.
        """
        part = total[: self._sum.numel()]
        if not self._on_cpu:
            part.copy_(self._sum.view(-1)) if first else part.add_(self._sum.view(-1))
            return
        values = self._sum.numpy().reshape(-1)
        if first:
            np.copyto(part.numpy(), values, casting="same_kind")
        else:
            np.add(part.numpy(), values, out=part.numpy(), casting="same_kind")

    def take_from(self, total: Tensor) -> None:
        """Set the tile to a sum held elsewhere; see :meth:`add_to`."""
        self._sum.copy_(total[: self._sum.numel()].view(self._sum.shape))

    def result(self) -> Tensor:
        """The tile so far: (rows, columns) float64 on the host; a view of a buffer that the next tile reuses."""
        return self._sum.cpu()


def check_precision(precision: str, device: str) -> None:
    """Refuse a precision that the device does not have.

    Raises:
        InputError: for ``tf32`` without CUDA.
    """
    if precision == "tf32" and torch.device(device).type != "cuda":
        raise InputError(f"precision 'tf32' needs a CUDA device, got {device}; use 'float32'")


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 in matrix products; convolutions never use it. Set back after."""
    products, convolutions = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allowed, False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = products, convolutions


@contextmanager
def _products_in(precision: str, split: SplitProducts | None) -> Iterator[None]:
    """Have other modules make products in a precision."""
    with tf32(precision == "tf32"), nullcontext() if split is None else split.making_products():
        yield


def measure_products(device: str, precisions: tuple[str, ...]) -> tuple[dict[str, dict[int, float]], ...]:
    """Time general and symmetric products at the calibrated edges.

    Args:
        device: torch device string.
        precisions: the precisions to time.

    Returns:
        FLOP/s per precision and edge, of general products and of Gram matrices (whose FLOPs count half).
    """
    general: dict[str, dict[int, float]] = {}
    symmetric: dict[str, dict[int, float]] = {}
    generator = torch.Generator().manual_seed(0)
    for precision in precisions:
        general[precision], symmetric[precision] = {}, {}
        for edge in CALIBRATED_EDGES:
            left = torch.randn(edge, CALIBRATED_DEPTH, generator=generator).to(device, HELD_TORCH_DTYPE[precision])
            right = torch.randn(edge, CALIBRATED_DEPTH, generator=generator).to(device, HELD_TORCH_DTYPE[precision])
            accumulator = KernelAccumulator(edge, precision, device)
            accumulator.begin(edge, edge)
            flops = 2 * edge * edge * CALIBRATED_DEPTH * partial_products(precision)

            general[precision][edge] = flops / best_seconds(partial(_multiply, accumulator, left, right))
            symmetric[precision][edge] = flops / 2 / best_seconds(partial(_multiply, accumulator, left, None))
        # Noise can only slow a timing down, and a larger tile is not slower than a smaller one.
        for table in (general[precision], symmetric[precision]):
            fastest = 0.0
            for edge in CALIBRATED_EDGES:
                fastest = table[edge] = max(fastest, table[edge])
    return general, symmetric


def measure_factored(device: str, precisions: tuple[str, ...]) -> tuple[dict[str, float], float]:
    """Time what contracting factors takes beside products of large tiles.

    Args:
        device: torch device string.
        precisions: the precisions to time.

    Returns:
        FLOP/s at which factors are expanded into gradients, per precision, and elements/s at which two Gram matrices
        are multiplied and summed over positions.
    """
    expand: dict[str, float] = {}
    factors = LayerFactors("linear", 64, 512, 256)
    for precision in precisions:
        tile = _random_tile(factors, 8, 1, precision, device, "gemm")
        piece = next(pieces(factors, 1, whole_rows=False, items=factors.inputs * factors.outputs))
        out = torch.empty(8 * piece.items(factors), dtype=HELD_TORCH_DTYPE[precision], device=device)
        seconds = best_seconds(partial(_wait, partial(expand_piece, factors, tile, piece, out), device))
        expand[precision] = 8 * factors.expand_flops(1) / seconds
    # Blocks as contractions make them: a device would hardly be busy with those of a CPU.
    on_device = torch.device(device).type != "cpu"
    rows, columns = pairwise_steps(LayerFactors("linear", 16, 1, 1), 1, on_device=on_device)
    inputs = torch.ones(16 * rows, 16 * columns, device=device)
    gradients = inputs.clone()
    seconds = best_seconds(partial(_wait, partial(sum_positions, inputs, gradients, rows, columns, 16, 1), device))
    return expand, inputs.numel() / seconds


def measure_block(
    factors: LayerFactors, rows: int, entries: int, precision: str, device: str, samples: int
) -> tuple[float, float]:
    """Time both contractions of a block on random factors.

    Args:
        factors: shapes of the factors (linear or convolution).
        rows: Jacobian rows per sample.
        entries: kernel rows per sample.
        precision: the plan's precision.
        device: torch device string.
        samples: samples of the tile to try.

    Returns:
        Seconds to expand one sample, and seconds to contract one pair of samples pairwise.
    """
    tile = _random_tile(factors, samples, rows, precision, device, "gemm")
    pairs = _random_tile(factors, samples, rows, precision, device, "pairwise")
    parts = list(pieces(factors, rows, whole_rows=entries > 1))
    items = max(piece.items(factors) for piece in parts)
    out = torch.empty(samples * items, dtype=HELD_TORCH_DTYPE[precision], device=device)

    def expanding() -> None:
        for piece in parts:
            expand_piece(factors, tile, piece, out, by_rows=entries > 1 or rows_first(tile))

    expand_seconds = best_seconds(partial(_wait, expanding, device), budget_seconds=0.02, repeats=3)
    return expand_seconds / samples, _pair_seconds(factors, pairs, entries, precision, device)


def measure_fused(factors: LayerFactors, rows: int, entries: int, precision: str, device: str, samples: int) -> float:
    """Time the pairwise contraction of a block by the fused kernel; arguments as for :func:`measure_block`.

    Returns:
        Seconds to contract one pair of samples, infinity where there is no such kernel or it cannot be compiled.
    """
    if not can_fuse(factors, device):
        return math.inf
    pairs = _random_tile(factors, samples, rows, precision, device, "pairwise")
    try:
        return _pair_seconds(factors, pairs, entries, precision, device, fused=True)
    except Exception as error:  # noqa: BLE001 - it takes a C compiler, too; without one the other way is there
        logger.info("the fused kernel is not used: %s: %s", type(error).__name__, error)
        return math.inf


def _pair_seconds(
    factors: LayerFactors, pairs: Tile, entries: int, precision: str, device: str, *, fused: bool = False
) -> float:
    """Seconds to contract one pair of samples of a tile with itself, both triangles of it."""

    def drop(block: Tensor, row: int, column: int) -> None:
        del block, row, column

    split = SplitProducts(device) if precision == "bf16x3" else None

    def by_pairs() -> None:
        with _products_in(precision, split):
            contract_pairwise(factors, pairs, pairs, entries, drop, fused=fused)
            if factors.lookups:
                contract_crossed(factors, pairs, pairs, entries, drop)

    return best_seconds(partial(_wait, by_pairs, device), budget_seconds=0.02, repeats=3) / len(pairs[0]) ** 2


def _random_tile(
    factors: LayerFactors, samples: int, rows: int, precision: str, device: str, contraction: Contraction
) -> Tile:
    generator = torch.Generator(device).manual_seed(0)
    dtype = HELD_TORCH_DTYPE[precision]
    inputs = torch.randn(samples, factors.input_items, generator=generator, device=device)
    gradients = torch.randn(samples, rows * factors.gradient_items, generator=generator, device=device)
    tile = as_tile(factors, inputs.to(device, dtype), gradients.to(device, dtype), rows, contraction)
    if factors.lookups:
        numbers = torch.randint(factors.outputs, (samples, factors.lookups), generator=generator, device=device)
        tile[2].copy_(split_digits(numbers))
    return tile


def _wait(work: Callable[[], object], device: str) -> None:
    """Do something and wait for the device."""
    work()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _multiply(accumulator: KernelAccumulator, left: Tensor, right: Tensor | None) -> None:
    """One product, waited for."""
    accumulator.add(left, right)
    if left.device.type == "cuda":
        torch.cuda.synchronize(left.device)
