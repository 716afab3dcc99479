"""What computes a projection: the protocol, and the backend in plain torch that runs on every device."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Final, Protocol, cast

import torch
from torch import Tensor

from ooc_ntk.errors import InputError
from ooc_ntk.extras import missing
from ooc_ntk.planning.projection import Projection

from .entries import Outer, draws, factor_hash, rows_and_signs
from .philox import key_of, philox, split

#: Entries of a dense R that torch makes at a time: ten copies of them in int64 stay within 32 MiB.
TORCH_WORDS: Final = 2**18


class Backend(Protocol):
    """Makes parts of R and multiplies with them. All give the same R, bit for bit.

    Attributes:
        name: as plans call it.
    """

    name: str

    def table(self, projection: Projection, p: Tensor, outers: Sequence[Outer]) -> Tensor:
        """Where the non-zeros of a sparse projection are.

        Args:
            projection: of a sparse kind.
            p: (n,) int64 global parameter indices, on the device.
            outers: weights that are sketched from their factors.

        Returns:
            (nonzeros, n) unsigned whole numbers on the device: twice the row within the block, plus 1 for a minus.
        """

    def table_at(
        self, projection: Projection, start: int, outer: Tensor, inner: Tensor, outers: Sequence[Outer]
    ) -> Tensor:
        """The same for the parameters ``start + outer[i] + inner[j]``, j running fastest; see :meth:`table`.

        Args:
            projection: of a sparse kind.
            start: global index of the first element of a parameter.
            outer: (m,) int64, on the device.
            inner: (k,) int64, on the device.
            outers: weights that are sketched from their factors.
        """

    def hashes(self, projection: Projection, outer: Outer, side: int, index: Tensor) -> Tensor:
        """Rows and signs of one side of a tensor sketch, as a table.

        Args:
            projection: the projection.
            outer: the weight.
            side: 0 for the rows of the weight, 1 for its columns.
            index: (n,) int64 numbers of rows or columns, on the device.

        Returns:
            (nonzeros, n), as :meth:`table` gives it.
        """

    def scatter(self, values: Tensor, table: Tensor, projection: Projection, total: Tensor) -> None:
        """Add ``values`` times the part of R that a table describes, unscaled, always in the same order.

        Args:
            values: (rows, n) float32 or float64, columns next to each other in memory, rows at any distance.
            table: of these n parameters.
            projection: of a sparse kind.
            total: (rows, dim) float64, added to, likewise.
        """

    def shifted(self, values: Tensor, start: int, projection: Projection, total: Tensor) -> bool:
        """The same for a block-shift projection of parameters ``start``, ``start + 1``, ...; False if it cannot."""

    def tile(self, projection: Projection, p: Tensor, dtype: torch.dtype) -> Tensor:
        """Part of a dense R, unscaled: ±1, or the bits set in a word less 16, which bfloat16 holds exactly.

        Args:
            projection: of a dense kind.
            p: (n,) int64 global parameter indices, on the device.
            dtype: of the tile.

        Returns:
            (n, dim); valid until the next call.
        """


class TorchBackend:
    """Vectorised torch. See :class:`Backend`."""

    name = "torch"

    def table(self, projection: Projection, p: Tensor, outers: Sequence[Outer]) -> Tensor:
        """See :meth:`Backend.table`."""
        if projection.about.compiled:
            return _packed(*rows_and_signs(projection, p, outers))
        step = max(1, TORCH_WORDS // projection.nonzeros)  # its price counts on that
        parts = [_packed(*rows_and_signs(projection, some, outers)) for some in torch.split(p, step)]
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def table_at(
        self, projection: Projection, start: int, outer: Tensor, inner: Tensor, outers: Sequence[Outer]
    ) -> Tensor:
        """See :meth:`Backend.table_at`."""
        return self.table(projection, summed_places(start, outer, inner), outers)

    def hashes(self, projection: Projection, outer: Outer, side: int, index: Tensor) -> Tensor:
        """See :meth:`Backend.hashes`."""
        return _packed(*factor_hash(projection, outer, side, index))

    def scatter(self, values: Tensor, table: Tensor, projection: Projection, total: Tensor) -> None:
        """See :meth:`Backend.scatter`; on CUDA as a product, whose order of sums is fixed."""
        block = projection.block
        signs = (1 - 2 * (table & 1)).to(values.dtype)
        rows = (table >> 1).long()
        for number in range(projection.nonzeros):
            part = total[:, number * block : (number + 1) * block]
            if values.device.type == "cpu":
                part += torch.zeros(len(values), block, dtype=values.dtype).index_add_(
                    1, rows[number], values * signs[number]
                )
                continue
            matrix = torch.zeros(table.shape[1], block, dtype=values.dtype, device=values.device)
            matrix.scatter_(1, rows[number][:, None], signs[number][:, None])
            part += values @ matrix

    def shifted(self, values: Tensor, start: int, projection: Projection, total: Tensor) -> bool:
        """See :meth:`Backend.shifted`."""
        del values, start, projection, total
        return False

    def tile(self, projection: Projection, p: Tensor, dtype: torch.dtype) -> Tensor:
        """See :meth:`Backend.tile`."""
        assert projection.dim is not None
        out = torch.empty(len(p), projection.dim, dtype=dtype, device=p.device)
        step = max(1, TORCH_WORDS // projection.dim)
        for first in range(0, len(p), step):
            out[first : first + step] = _dense_words(projection, p[first : first + step]).to(dtype)
        return out


def _packed(rows: Tensor, signs: Tensor) -> Tensor:
    """Twice the rows, plus 1 for a minus."""
    return (2 * rows + signs).to(torch.int32)


def summed_places(start: int, outer: Tensor, inner: Tensor) -> Tensor:
    """Global indices ``start + outer[i] + inner[j]``, (m · k,) int64."""
    return (start + outer[:, None] + inner[None]).reshape(-1)


def _dense_words(projection: Projection, p: Tensor) -> Tensor:
    """Entries of a dense R as whole numbers, (n, dim) int64; each counter is used for all of its columns."""
    assert projection.dim is not None
    if not projection.about.compiled:
        columns = torch.arange(projection.dim, device=p.device)
        return cast("Tensor", projection.about.entries(projection, p[:, None], columns[None], draws(projection, p)))
    signs = projection.kind == "rademacher"
    each = 128 if signs else 4
    group = torch.arange(-(-projection.dim // each), device=p.device)
    low, high = split(p)
    purpose = torch.tensor([[0 if signs else 2]], device=p.device)
    words = torch.stack(philox((low[:, None], high[:, None], group[None], purpose), key_of(projection.seed)), -1)
    if signs:
        bits = words[..., None] >> torch.arange(32, device=p.device) & 1
        return (1 - 2 * bits).view(len(p), -1)[:, : projection.dim]
    count = words - (words >> 1 & 0x55555555)
    count = (count & 0x33333333) + (count >> 2 & 0x33333333)
    count = count + (count >> 4) & 0x0F0F0F0F
    return ((count * 0x01010101 & 0xFFFFFFFF) >> 24).view(len(p), -1)[:, : projection.dim] - 16


def backend_name(wanted: str, device: str) -> str:
    """The backend that a device takes.

    Args:
        wanted: ``auto``, ``numba``, ``torch`` or ``cupy``.
        device: torch device string.

    Returns:
        ``numba``, ``torch`` or ``cupy``; ``auto`` takes the compiled one of the device where it is installed.

    Raises:
        InputError: if the one that is wanted is not installed, or not for this device.
    """
    compiled = "numba" if torch.device(device).type == "cpu" else "cupy"
    if wanted == "auto":
        return compiled if _installed(compiled) else "torch"
    if wanted == "torch":
        return wanted
    if wanted != compiled:
        raise InputError(
            f"backend {wanted!r} does not run on {device}; use {compiled!r}, 'torch' or leave it to 'auto'"
        )
    if not _installed(wanted):
        older = " ([cu12] for CUDA 12)" if wanted == "cupy" else ""
        raise missing(wanted, f"backend {wanted!r}", f"use the backend 'torch'{older}")
    return wanted


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def load_backend(name: str) -> Backend:
    """The backend of a name that :func:`backend_name` gave."""
    if name == "numba":
        from .compiled import NumbaBackend  # takes half a second, and only where it is used

        return NumbaBackend()
    if name == "cupy":
        from .cuda import CupyBackend  # the only module that imports CuPy

        return CupyBackend()
    return TorchBackend()
