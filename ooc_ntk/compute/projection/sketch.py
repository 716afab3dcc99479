"""The sketch of a batch: gradients and factors go in piece by piece, ``Φ = J·R`` comes out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final, cast

import numpy as np
import torch
from torch import Tensor

from ooc_ntk.compute.gradients import GradientPiece, contiguous_pieces
from ooc_ntk.compute.held import Tile, some_samples
from ooc_ntk.planning.memory import HOST_CHUNKS, SPECTRUM_BYTES, SketchChunks
from ooc_ntk.planning.projection import Projection

from .backends import Backend
from .entries import Outer

#: Parts of 8 bits that hold the 24 bits of a float32.
FLOAT32_PARTS: Final = 3

#: Whether torch multiplies bfloat16 into float32 (on CUDA, from 2.8 on).
MIXED_PRODUCTS: Final = hasattr(torch.ops.aten.mm, "dtype")


class Sketch:
    """Sums the projections of a batch's gradients, in float64 across pieces.

    The same pieces in the same order and under the same number of threads give the same bits.
    """

    def __init__(
        self,
        projection: Projection,
        starts: Mapping[str, int],
        backend: Backend,
        outers: Mapping[str, Outer] | None = None,
        *,
        heavy: Sequence[int] = (),
        parts: int = FLOAT32_PARTS,
        chunks: SketchChunks = HOST_CHUNKS,
        columns: int = 0,
    ) -> None:
        """Project onto ``projection.dim`` columns.

        Args:
            projection: with its dim.
            starts: global index of the first element of every parameter, by name.
            backend: what computes it.
            outers: weights that are sketched from their factors, by name.
            heavy: global indices of parameters whose gradients are wanted as they are, in ascending order.
            parts: bfloat16 numbers that a gradient is split into where tensor cores multiply it with a dense R; one
                rounds it, :data:`FLOAT32_PARTS` keep it.
            chunks: what is worked on at a time.
            columns: parameters that are projected, whose part of R may be kept from batch to batch.
        """
        assert projection.dim is not None
        self.projection, self.dim = projection, projection.dim
        self._starts, self._backend, self._outers = starts, backend, dict(outers or {})
        self._total = torch.empty(0, dtype=torch.float64)
        self._table_before: tuple[tuple[object, ...] | None, Tensor] = None, torch.empty(0)
        self._tables: dict[tuple[object, ...], Tensor] = {}
        self._room = chunks.kept_bytes(projection, columns)
        self._parts, self._chunks = parts, chunks
        self._wanted = torch.tensor(list(heavy), dtype=torch.int64)
        #: Where wanted parameters are in a piece, and among the wanted ones, by parameter and place.
        self._found: dict[tuple[object, ...], tuple[Tensor, Tensor] | None] = {}
        self.heavy = torch.empty(0, dtype=torch.float64)

    def begin(self, samples: int, rows: int, device: str | torch.device = "cpu") -> None:
        """Start a batch of so many samples and Jacobian rows each, at zero."""
        self._total = torch.zeros(samples, rows, self.dim, dtype=torch.float64, device=device)
        self.heavy = torch.zeros(samples, rows, len(self._wanted), dtype=torch.float64, device=device)

    def add(self, name: str, pieces: Iterable[GradientPiece]) -> None:
        """Add the gradients of a parameter."""
        for piece in pieces:
            self._add_piece(name, piece, self._total[piece.samples, piece.rows])
            self._pick(name, piece, self.heavy[piece.samples, piece.rows])

    def _add_piece(self, name: str, piece: GradientPiece, total: Tensor) -> None:
        """Add a piece to a part of the sum, (samples, rows, dim)."""
        values, backend, projection, start = piece.values, self._backend, self.projection, self._starts[name]
        if not projection.about.sparse:
            self._add_dense(piece.columns + start, values, total)
            return
        if projection.kind == "shift" and piece.start is not None:
            first = start + piece.start
            if all(backend.shifted(values[:, row], first, projection, total[:, row]) for row in range(values.shape[1])):
                return
        table = self._table(name, piece)
        for row in range(values.shape[1]):
            backend.scatter(values[:, row], table, projection, total[:, row])

    def _pick(self, name: str, piece: GradientPiece, heavy: Tensor) -> None:
        """Add the gradients of wanted parameters of a piece, (samples, rows, wanted)."""
        if not len(self._wanted):
            return
        key = None if piece.key is None else (name, *piece.key)
        if key is None or key not in self._found:
            p = piece.columns + self._starts[name]
            wanted = self._wanted.to(p.device)
            place = torch.searchsorted(wanted, p).clamp(max=len(wanted) - 1)
            here = (wanted[place] == p).nonzero()[:, 0]
            known = (here, place[here]) if len(here) else None
            if key is not None:
                self._found[key] = known
        else:
            known = self._found[key]
        if known is not None:
            here, place = known
            heavy.index_add_(2, place, piece.values[:, :, here].to(heavy.dtype))

    def _table(self, name: str, piece: GradientPiece) -> Tensor:
        """The part of R that a piece meets; pieces that differ in rows alone have the same."""
        key = None if piece.key is None else (name, *piece.key)
        if key is None or self._table_before[0] != key:
            table = None if key is None else self._tables.get(key)
            if table is None:
                table = self._backend.table_at(
                    self.projection, self._starts[name], piece.outer, piece.inner, tuple(self._outers.values())
                )
                if key is not None:
                    self._keep(key, table)
            self._table_before = key, table
        return self._table_before[1]

    def _keep(self, key: tuple[object, ...], table: Tensor) -> None:
        """Keep a table, and what a backend makes of it, for the next batch, while there is room."""
        taken = 2 * table.numel() * table.element_size() + 4 * (self.dim + self.projection.nonzeros)
        if taken <= self._room:
            self._room -= taken
            self._tables[key] = table

    def add_rows(self, name: str, position: int, values: Tensor) -> None:
        """Add whole gradients of a parameter for consecutive rows of the batch, counted over its samples.

        Args:
            name: the parameter.
            position: the first of these rows, ``sample · rows per sample + row``.
            values: (rows, numel).
        """
        rows = self._total.flatten(0, 1)[position : position + len(values), None]
        heavy = self.heavy.flatten(0, 1)[position : position + len(values), None]
        for piece in contiguous_pieces(values[:, None], slice(0, len(values)), self._chunks):
            self._add_piece(name, piece, rows)
            self._pick(name, piece, heavy)

    def _add_dense(self, p: Tensor, values: Tensor, total: Tensor) -> None:
        """Products with a part of R at a time, which all rows share."""
        dtype = tile_dtype(values)
        step = max(1, self._chunks.tile_bytes // (self.dim * dtype.itemsize))
        samples, rows, _ = values.shape
        for first in range(0, len(p), step):
            part = values[:, :, first : first + step].reshape(samples * rows, -1)
            tile = self._backend.tile(self.projection, p[first : first + step], dtype)
            _add_to(total, exact_product(part, tile, self._parts).view(samples, rows, -1))

    def add_factors(self, name: str, tile: Tile, *, transposed: bool) -> None:
        """Add a weight from its factors, never forming its gradient (Pham and Pagh 2013, tensor sketch).

        ``Σ_s G_s ⊗ A_s`` is hashed by the sums of the hashes of both sides: a product of the spectra of their count
        sketches, added up over positions before going back.

        Args:
            name: the weight.
            tile: inputs (samples, positions · inputs) and gradients (samples, positions, rows, outputs).
            transposed: whether the rows of the weight belong to the inputs.
        """
        outer, gradients = self._outers[name], tile[1]
        _, positions, rows, _ = gradients.shape
        vectors = max(1, SPECTRUM_BYTES // (16 * (rows + 1) * self.dim))
        step, block = max(1, vectors // positions), self.projection.block
        tables = [self._hashes(outer, side, gradients.device) for side in ((1, 0) if transposed else (0, 1))]
        for first in range(0, len(gradients), step):
            here = slice(first, min(first + step, len(gradients)))
            inputs, some = some_samples(tile[:2], here)
            inputs = inputs.view(len(some), positions, -1)
            # Long sequences some positions at a time: spectra add up.
            spectrum = sum(
                self._spectra(some[:, start : start + vectors], inputs[:, start : start + vectors], tables)
                for start in range(0, positions, vectors)
            )
            product = torch.fft.irfft(cast("Tensor", spectrum), n=block, dim=-1)
            _add_to(self._total[here], product.flatten(2))

    def _spectra(self, gradients: Tensor, inputs: Tensor, tables: Sequence[Tensor]) -> Tensor:
        """Products of both sides' spectra, summed over positions: (samples, rows, blocks, frequencies)."""
        count, positions, rows, _ = gradients.shape
        left = self._spectrum(gradients.reshape(count * positions * rows, -1), tables[0])
        right = self._spectrum(inputs.reshape(count * positions, -1), tables[1])
        left = left.view(count, positions, rows, self.projection.nonzeros, -1)
        return (left * right.view(count, positions, 1, self.projection.nonzeros, -1)).sum(1)

    def _hashes(self, outer: Outer, side: int, device: torch.device) -> Tensor:
        """Rows and signs of one side of a weight."""
        length = outer.inputs if side else outer.outputs
        return self._backend.hashes(self.projection, outer, side, torch.arange(length, device=device))

    def _spectrum(self, values: Tensor, table: Tensor) -> Tensor:
        """Spectra of the count sketches of vectors: (vectors, blocks, frequencies)."""
        sketch = torch.zeros(len(values), self.dim, dtype=torch.float64, device=values.device)
        self._backend.scatter(values.contiguous(), table, self.projection, sketch)
        blocks = sketch.view(len(values), self.projection.nonzeros, -1).to(values.dtype)
        return cast("Tensor", torch.fft.rfft(blocks, dim=-1))

    def result(self) -> Tensor:
        """Φ of the batch, (samples, rows, dim) float64: a buffer that the next batch does not reuse."""
        about = self.projection.about
        if about.sparse:
            return self._total.div_(self.projection.nonzeros**0.5)
        return self._total.div_((about.unit * self.dim) ** 0.5)


def split_bfloat16(values: Tensor, parts: int) -> list[Tensor]:
    """Float32 as a sum of bfloat16 numbers: three hold all 24 bits.

    >>> values = torch.tensor([1.2345678, -3.0e-5])
    >>> bool((sum(part.float() for part in split_bfloat16(values, 3)) == values).all())
    True
    """
    found, rest = [], values
    for _ in range(parts):
        found.append(rest.bfloat16())
        rest = rest - found[-1].float()
    return found


def tile_dtype(values: Tensor) -> torch.dtype:
    """What a part of a dense R is made in: bfloat16 holds it exactly, and tensor cores are fast in it."""
    fast = values.device.type == "cuda" and values.dtype == torch.float32 and MIXED_PRODUCTS
    return torch.bfloat16 if fast else values.dtype


def exact_product(values: Tensor, tile: Tensor, parts: int) -> Tensor:
    """``values @ tile``; with a bfloat16 tile part by part on tensor cores, summed in float32."""
    if tile.dtype == values.dtype:
        return values @ tile
    products = [torch.mm(part, tile, out_dtype=values.dtype) for part in split_bfloat16(values, parts)]
    total = products[0]
    for product in products[1:]:
        total += product
    return total


def _add_to(total: Tensor, block: Tensor) -> None:
    """Add float32 to float64; NumPy's addition of mixed dtypes is ten times faster than torch's on a CPU (measured)."""
    if total.device.type != "cpu":
        total += block
        return
    array = total.numpy()
    np.add(array, block.numpy(), out=array)
