"""Pairwise contraction: Gram matrices of both factors, multiplied position by position and summed (DESIGN §3).

``K_ij = Σ_{s,t} (A_is·A_jt)(Σ_c G_ics·G_jct)``: no gradient is ever formed. With one position per sample it is
``(A Aᵀ) ∘ (Σ_c G_c G_cᵀ)``, hundreds of times fewer FLOPs than dense gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ooc_ntk.planning.factors import LayerFactors, Window
from ooc_ntk.planning.memory import crossed_steps, pairwise_steps

from .fused import sum_windows
from .held import Tile, join_digits
from .products import multiply
from .unfold import unfold_windows

#: Takes a finished block: its values, its first row and its first column in the tile.
AddBlock = Callable[[Tensor, int, int], None]


def contract_pairwise(
    factors: LayerFactors,
    left: Tile,
    right: Tile | None,
    entries: int,
    add_block: AddBlock,
    *,
    fused: bool = False,
) -> None:
    """Contract one layer of two tiles, without the rows that are looked up in its weight.

    Args:
        factors: shapes of the factors (linear or convolution).
        left: the factors of the row tile.
        right: the same of the column tile; None for the tile with itself, of which the lower triangle is made.
        entries: kernel rows per sample: 1 if Jacobian rows are contracted, otherwise all rows.
        add_block: takes blocks (row samples · entries, column samples · entries), in float32 or float64.
        fused: whether Gram matrices are multiplied and summed in one step, see :mod:`ooc_ntk.compute.fused`.

    Raises:
        InputError: if they are to be fused and Triton is not installed.
    """
    inputs, gradients = left[:2]
    other_inputs, other_gradients = (right or left)[:2]
    step, other_step = pairwise_steps(factors, entries, on_device=inputs.device.type != "cpu")
    product = _InputProduct(factors)
    for start in range(0, len(inputs), step):
        stop = min(start + step, len(inputs))
        own = product.prepare(inputs[start:stop])
        own_gradients = _matrix(gradients[start:stop], entries)
        last = len(other_inputs) if right is not None else stop
        for first in range(0, last, other_step):
            end = min(first + other_step, last)
            sides = stop - start, end - first
            products = multiply(own, product.prepare(other_inputs[first:end]))
            weights = multiply(own_gradients, _matrix(other_gradients[first:end], entries))
            if fused:
                block = sum_windows(products, weights, factors, *sides, entries)
            else:
                summed = product.summed(products, *sides)
                if weights.dtype == torch.bfloat16:
                    weights, summed = weights.float(), summed.float()
                block = sum_positions(summed, weights, *sides, factors.positions, entries)
            add_block(block, start * entries, first * entries)


def looked_up(tile: Tile) -> Tile:
    """The rows that are looked up in a linear layer's weight, as the factors of an embedding."""
    return join_digits(tile[2]).to(torch.int32), tile[3]


def contract_crossed(factors: LayerFactors, left: Tile, right: Tile | None, entries: int, add_block: AddBlock) -> None:
    """Contract a linear layer with the embedding of the same weight, both ways.

    ``Σ_{s,t} (A_is·H_jt) G_is[v_jt]`` for the rows v that sample j looks up and their gradients H, and the same of i
    and j exchanged.

    Args:
        factors: shapes of the factors.
        left: the factors of the row tile.
        right: the same of the column tile; None for the tile with itself, of which the lower triangle is made.
        entries: kernel rows per sample: 1 if Jacobian rows are contracted, otherwise all rows.
        add_block: takes blocks (row samples · entries, column samples · entries), in float32 or float64.
    """
    rows = left[1].shape[2]
    step, other_step = crossed_steps(factors, rows)
    samples = len(left[0])
    for start in range(0, samples, step):
        stop = min(start + step, samples)
        own = tuple(part[start:stop] for part in left)
        last = stop if right is None else len(right[0])
        for first in range(0, last, other_step):
            other = tuple(part[first : min(first + other_step, last)] for part in right or left)
            block = _crossed(own, other, entries) + _crossed(other, own, entries).T
            add_block(block, start * entries, first * entries)


def _crossed(linear: Tile, table: Tile, entries: int) -> Tensor:
    """The linear layer of some samples with the embedding of others: (samples · entries, others · entries)."""
    inputs, gradients = linear[:2]
    numbers, rows_of_table = join_digits(table[2]).reshape(-1), table[3]
    samples, positions, rows, _ = gradients.shape
    others, lookups = rows_of_table.shape[:2]
    length = rows_of_table.shape[3]
    products = multiply(inputs.reshape(samples * positions, length), rows_of_table.reshape(-1, length))
    products = products.view(samples, positions, others, lookups, rows)
    chosen = gradients.index_select(3, numbers).view(samples, positions, rows, others, lookups)
    if products.dtype == torch.bfloat16:
        products, chosen = products.float(), chosen.float()
    if entries == 1:
        return torch.einsum("nsrmt,nsmtr->nm", chosen, products)
    return torch.einsum("nscmt,nsmtd->ncmd", chosen, products).reshape(samples * entries, others * entries)


def _matrix(gradients: Tensor, entries: int) -> Tensor:
    """Gradients as (positions · samples, rows · outputs); (positions · samples · rows, outputs) for a full kernel."""
    rows = gradients.shape[0] * gradients.shape[1] * (gradients.shape[2] if entries > 1 else 1)
    return gradients.transpose(0, 1).reshape(rows, -1)


def sum_positions(inputs: Tensor, gradients: Tensor, rows: int, columns: int, positions: int, entries: int) -> Tensor:
    """``Σ_{s,t}`` of the product of both Gram matrices.

    Args:
        inputs: (positions · rows, positions · columns): positions first, so that sums run along whole rows of samples.
        gradients: (positions · rows · entries, positions · columns · entries); overwritten.
        rows: samples of the rows.
        columns: samples of the columns.
        positions: positions per sample.
        entries: kernel rows per sample.

    Returns:
        (rows · entries, columns · entries).
    """
    if entries == 1:
        product = gradients.mul_(inputs)
        return product if positions == 1 else product.view(positions, rows, positions, columns).sum((0, 2))
    product = gradients.view(positions, rows, entries, positions, columns, entries)
    product.mul_(inputs.view(positions, rows, 1, positions, columns, 1))
    return product.sum((0, 3)).reshape(rows * entries, columns * entries)


class _InputProduct:
    """Inner products of the (unfolded) inputs of two ranges of samples, the bias's ones added."""

    def __init__(self, factors: LayerFactors) -> None:
        self._factors = factors

    def prepare(self, inputs: Tensor) -> Tensor:
        """What is multiplied: (positions · samples, inputs), or (pixels · samples, channels)."""
        factors, window = self._factors, self._factors.window
        if window is not None and not factors.by_pixels:
            pixels = inputs.view(len(inputs), *window.size, factors.channels)
            found = unfold_windows(pixels, window).flatten(2)
        else:
            found = inputs.view(len(inputs), factors.positions if window is None else window.pixels, -1)
        return found.transpose(0, 1).reshape(-1, found.shape[2])

    def summed(self, products: Tensor, rows: int, columns: int) -> Tensor:
        """Inner products of positions, (positions · rows, positions · columns); may overwrite what is given."""
        window = self._factors.window
        if window is not None and self._factors.by_pixels:
            products = _sum_shifts(products, window, rows, columns)
        return products.add_(1) if self._factors.bias else products


def _sum_shifts(products: Tensor, window: Window, rows: int, columns: int) -> Tensor:
    """Inner products of windows from those of pixels: the same tap on both sides, one dimension after the other.

    Args:
        products: (pixels · rows, pixels · columns).
        window: geometry; pixels outside the input are zeros.
        rows: samples of the rows.
        columns: samples of the columns.

    Returns:
        (positions · rows, positions · columns).
    """
    dims = len(window.size)
    found = products.view(*window.size, rows, *window.size, columns)
    for dim in range(dims):
        shape = list(found.shape)
        shape[dim] = shape[dims + 1 + dim] = window.output[dim]
        total = found.new_zeros(shape)
        for target, source in _taps(window, dim):
            into, of = [slice(None)] * len(shape), [slice(None)] * len(shape)
            into[dim] = into[dims + 1 + dim] = target
            of[dim] = of[dims + 1 + dim] = source
            total[tuple(into)] += found[tuple(of)]
        found = total
    positions = math.prod(window.output)
    return found.view(positions * rows, positions * columns)


def _taps(window: Window, dim: int) -> Iterator[tuple[slice, slice]]:
    """Per tap of one dimension: the outputs whose tap lies within the input, and the pixels it takes."""
    size, stride, output = window.size[dim], window.stride[dim], window.output[dim]
    for tap in range(window.kernel[dim]):
        offset = tap * window.dilation[dim] - window.before[dim]
        first = max(0, -(offset // stride))
        last = min(output, -(-(size - offset) // stride))
        if first < last:
            start = first * stride + offset
            yield slice(first, last), slice(start, start + (last - first - 1) * stride + 1, stride)
