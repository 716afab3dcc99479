"""Contraction of embeddings: only positions with the same token meet, so only matching rows are multiplied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .held import Tile
from .products import multiply

#: Adds ``left @ right.T`` to the whole tile: (rows, depth) and (columns, depth).
AddProduct = Callable[[Tensor, Tensor], None]

#: Adds values at (row indices) × (column indices) of the tile.
AddAt = Callable[[Tensor, np.ndarray, np.ndarray], None]


@dataclass(frozen=True)
class _Merged:
    """One tile's rows, a sample's equal tokens added up, sorted by token and then by sample.

    Attributes:
        values: (merged rows, rows, outputs).
        samples: sample of every merged row.
        tokens: the different tokens.
        edges: first merged row of every token, and one past the last.
        count: samples of the tile.
    """

    values: Tensor
    samples: np.ndarray
    tokens: np.ndarray
    edges: np.ndarray
    count: int


def _merge(tile: Tile) -> _Merged:
    """Sort and merge a tile; positions without a token are left out."""
    tokens, gradients = tile
    samples, positions = tokens.shape
    numbers = tokens.cpu().numpy().astype(np.int64)
    keys = np.where(numbers >= 0, numbers * samples + np.arange(samples)[:, None], -1).reshape(-1)
    unique, inverse = np.unique(keys, return_inverse=True)
    device = gradients.device
    # Many terms may be added up, so not in bf16, which stops growing at 256 equal ones.
    precise = torch.float32 if gradients.dtype == torch.bfloat16 else gradients.dtype
    values = torch.zeros(len(unique), *gradients.shape[2:], dtype=precise, device=device)
    every = gradients.reshape(-1, *gradients.shape[2:]).to(precise)
    values.index_add_(0, torch.from_numpy(inverse.reshape(-1)).to(device, non_blocking=True), every)
    values = values.to(gradients.dtype)
    if len(unique) and unique[0] < 0:
        unique, values = unique[1:], values[1:]
    different, edges = np.unique(unique // samples, return_index=True)
    del positions
    return _Merged(values, unique % samples, different, np.append(edges, len(unique)), samples)


def contract_matching(
    left: Tile,
    right: Tile | None,
    entries: int,
    add_product: AddProduct,
    add_at: AddAt,
) -> None:
    """Contract one embedding of two tiles.

    Tokens that every sample of both tiles has (positions, a class token) go through one product; every other one
    through a product of the rows that have it.

    Args:
        left: token numbers (samples, positions) and gradients (samples, positions, rows, outputs).
        right: the same of the column tile; None for the tile with itself.
        entries: kernel rows per sample: 1 if Jacobian rows are contracted, otherwise all rows.
        add_product: adds a product over the whole tile.
        add_at: adds a product at some rows and columns, counted in samples · entries.
    """
    one = _merge(left)
    other = one if right is None else _merge(right)
    _, ours, theirs = np.intersect1d(one.tokens, other.tokens, assume_unique=True, return_indices=True)
    everywhere: list[tuple[int, int]] = []
    for mine, its in zip(ours, theirs, strict=True):
        rows, columns = slice(*one.edges[mine : mine + 2]), slice(*other.edges[its : its + 2])
        if rows.stop - rows.start == one.count and columns.stop - columns.start == other.count:
            everywhere.append((int(rows.start), int(columns.start)))
            continue
        product = multiply(_matrix(one.values[rows], entries), _matrix(other.values[columns], entries))
        add_at(product, _indices(one.samples[rows], entries), _indices(other.samples[columns], entries))
    if everywhere:
        add_product(
            _side_by_side(one, [start for start, _ in everywhere], entries),
            _side_by_side(other, [start for _, start in everywhere], entries),
        )


def _matrix(values: Tensor, entries: int) -> Tensor:
    """Merged rows as (samples · entries, depth)."""
    return values.reshape(values.shape[0] * entries, -1)


def _indices(samples: np.ndarray, entries: int) -> np.ndarray:
    """Kernel rows of samples."""
    return (samples[:, None] * entries + np.arange(entries)).reshape(-1)


def _side_by_side(merged: _Merged, starts: list[int], entries: int) -> Tensor:
    """Rows of tokens that every sample has, as (samples · entries, tokens · depth)."""
    rows = torch.stack([merged.values[start : start + merged.count] for start in starts], 1)
    count, tokens, gradients, outputs = rows.shape
    if entries == 1:
        return rows.reshape(count, -1)
    return rows.transpose(1, 2).reshape(count * gradients, tokens * outputs)
