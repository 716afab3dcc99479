"""Products in ``bf16x3``: both factors split in two bf16 parts, and three products of the parts in place of one.

``x = high + low`` with ``high = bf16(x)`` and ``low = bf16(x − high)`` keeps 16 bits of mantissa, and
``x·y ≈ high·high + high·low + low·high`` loses what both low parts give (2⁻¹⁸ at most, systematic only where a row
meets itself). Of a matrix with itself the third product is the transpose of the second. bf16 products are exact in
float32, so a CPU that multiplies the parts as float32 gives the error of the real thing, slower than plain float32.

A tensor core adds up in float32 but cuts off what does not fit instead of rounding (Ootomo and Yokota 2022,
arXiv 2203.03341), so that sums of equal sign shrink with their depth. Emulated for Gram matrices of normal numbers, 16
terms added at a time: the error of the three products, 2.8e-6, grows to 3.4e-6 at a depth of 512, 4.0e-6 at 1,024,
5.3e-6 at 2,048, 7.9e-6 at 4,096 and 8.5e-5 at 65,536. So the product of the high parts is made a little at a time, each
added in rounded float32; the others are 2⁻⁹ of it and need no care.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ooc_ntk.planning.layout import CONTRACTION_COLUMNS
from ooc_ntk.planning.memory import DEVICE_SPLIT_COLUMNS, IN_PLACE_BYTES, SPLIT_COLUMNS

from .products import NARROW_COLUMNS, NARROW_ROWS, PRODUCT_COLUMNS, made_by

#: Depth of a product of high parts on tensor cores (emulated, see above; not measured on a device).
LEADING_COLUMNS = 1024

#: Elements that are split in place at a time.
IN_PLACE_ITEMS = IN_PLACE_BYTES // 4

#: How bf16 parts are multiplied into float32: added up by the product itself, apart from the sum, or as float32.
Way = Literal["added", "apart", "widened"]


class Parts(NamedTuple):
    """The high and the low parts of a matrix, (rows, depth) each."""

    high: Tensor
    low: Tensor

    def columns(self, part: slice) -> Parts:
        """Some columns; views."""
        return Parts(self.high[:, part], self.low[:, part])

    def rows(self, part: slice) -> Parts:
        """Some rows; views."""
        return Parts(self.high[part], self.low[part])


class SplitProducts:
    """Multiplies float32 matrices by their parts, in buffers that are used again."""

    def __init__(self, device: str | torch.device) -> None:
        """Find out how the device multiplies bf16 into float32.

        Args:
            device: torch device.
        """
        self._device = torch.device(device)
        self._way = product_way(str(self._device))
        self.dtype = torch.float32 if self._way == "widened" else torch.bfloat16
        self._rooms: dict[str, Tensor] = {}
        self._known: list[tuple[Tensor, Parts]] = []

    @property
    def columns(self) -> int:
        """Columns to split at a time."""
        return SPLIT_COLUMNS if self._way == "widened" else DEVICE_SPLIT_COLUMNS

    @property
    def held_bytes(self) -> int:
        """Bytes of the buffers so far, on the device."""
        return sum(room.numel() * room.element_size() for room in self._rooms.values())

    def split(self, values: Tensor, room: str) -> Parts:
        """Split a matrix.

        Args:
            values: (rows, depth), float32.
            room: name of the buffer to use; what was split there before is lost.

        Returns:
            Its parts, in the dtype of products.
        """
        rows, depth = values.shape
        both = self._room(room, 2 * rows * depth, self.dtype).view(2, rows, depth)
        parts = Parts(both[0], both[1])
        if self.dtype == torch.bfloat16:
            _split(values, parts)
        else:
            parts.high.copy_(values.bfloat16())
            parts.low.copy_((values - parts.high).bfloat16())
        return parts

    def product(self, left: Parts, right: Parts | None, out: Tensor) -> Tensor:
        """Set ``out`` to the product.

        Args:
            left: parts of a (rows, depth) matrix.
            right: the same of a (columns, depth) one; None for the Gram matrix of ``left``.
            out: (rows, columns), float32.

        Returns:
            ``out``.
        """
        leading, crossed = self._steps(left, right)
        with fast_parts(self._way):
            self._sum_up(out, left.high, (right or left).high, leading, fresh=True)
            if right is None:
                cross = self._room("cross", out.numel(), torch.float32).view(out.shape)
                self._sum_up(cross, left.high, left.low, crossed, fresh=True)
                return out.add_(cross).add_(cross.T)
            self._sum_up(out, left.high, right.low, crossed, fresh=False)
            self._sum_up(out, left.low, right.high, crossed, fresh=False)
        return out

    def multiply(self, left: Tensor, right: Tensor) -> Tensor:
        """``left @ right.T`` of float32 matrices, in new memory.

        The parts of the last two matrices on the left are remembered: the blocks of a row meet many others.
        """
        parts = next((parts for known, parts in self._known if known is left), None)
        if parts is None:
            if len(self._known) == 2:
                self._known.pop(0)
            used = {parts.high.data_ptr() for _, parts in self._known}
            room = next(n for n in ("own", "own too") if n not in self._rooms or self._rooms[n].data_ptr() not in used)
            parts = self.split(left, room)
            self._known.append((left, parts))
        return self.product(parts, self.split(right, "other"), left.new_empty(len(left), len(right)))

    @contextmanager
    def making_products(self) -> Iterator[None]:
        """Have :func:`products.multiply` multiply float32 matrices so, for the time of a contraction."""
        try:
            with made_by(self.multiply):
                yield
        finally:
            self._known.clear()

    def _steps(self, left: Parts, right: Parts | None) -> tuple[int, int]:
        """Depth of the products of high parts, and of the others."""
        if self._device.type != "cpu":
            return LEADING_COLUMNS, CONTRACTION_COLUMNS
        narrow = min(len(left.high), len((right or left).high)) < NARROW_ROWS
        return (NARROW_COLUMNS if narrow else PRODUCT_COLUMNS,) * 2

    def _sum_up(self, total: Tensor, left: Tensor, right: Tensor, step: int, *, fresh: bool) -> None:
        """Add ``left @ right.T`` to a sum, or set it to that, so many columns at a time."""
        for start in range(0, left.shape[1], step):
            a, b = left[:, start : start + step], right[:, start : start + step].T
            if start == 0 and fresh:
                if self._way == "widened":
                    torch.mm(a, b, out=total)
                else:
                    torch.mm(a, b, out_dtype=torch.float32, out=total)
            elif self._way == "added":
                torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
            elif self._way == "apart":
                spare = self._room("apart", total.numel(), torch.float32).view(total.shape)
                total.add_(torch.mm(a, b, out_dtype=torch.float32, out=spare))
            else:
                total.addmm_(a, b)

    def _room(self, name: str, items: int, dtype: torch.dtype) -> Tensor:
        """So many elements of a buffer that grows as needed."""
        known = self._rooms.get(name)
        if known is None or known.numel() < items:
            self._rooms.pop(name, None)
            known = self._rooms[name] = torch.empty(items, dtype=dtype, device=self._device)
        return known[:items]


def parts_in_place(values: Tensor) -> Parts:
    """Where :func:`split_in_place` puts the parts of a matrix: views of its memory, bf16."""
    both, depth = values.view(torch.bfloat16), values.shape[1]
    return Parts(both[:, :depth], both[:, depth:])


def split_in_place(values: Tensor) -> None:
    """Turn a matrix into its parts, in the same memory: a row of float32 becomes its high and then its low parts.

    Args:
        values: (rows, depth), float32, contiguous; lost.

    >>> values = torch.tensor([[1.0, 1.00390625, 3.0]])
    >>> split_in_place(values)
    >>> parts_in_place(values).high.tolist(), parts_in_place(values).low.tolist()
    ([[1.0, 1.0, 3.0]], [[0.0, 0.00390625, 0.0]])
    """
    (rows, depth), parts = values.shape, parts_in_place(values)
    step = max(1, IN_PLACE_ITEMS // depth)
    copy = torch.empty(min(step, rows), depth, dtype=values.dtype, device=values.device)
    for start in range(0, rows, step):
        block = copy[: min(step, rows - start)].copy_(values[start : start + step])
        _split(block, parts.rows(slice(start, start + step)))


def _split(values: Tensor, parts: Parts) -> None:
    """Round to bf16, and again what that leaves."""
    parts.high.copy_(values)
    torch.sub(values, parts.high, out=parts.low)


@contextmanager
def fast_parts(way: Way) -> Iterator[None]:
    """Let widened parts go through TF32, which holds all of their 8 bits, and sums in nothing less than float32."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32, matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_tf32, matmul.allow_bf16_reduced_precision_reduction = way == "widened", False
    try:
        yield
    finally:
        matmul.allow_tf32, matmul.allow_bf16_reduced_precision_reduction = before


@cache
def product_way(device: str) -> Way:
    """How a device multiplies bf16 matrices into float32, found out by trying.

    ``out_dtype`` is of torch 2.8 and later, on CUDA; whether it takes a float32 sum as well depends on the version.

    Args:
        device: torch device string.
    """
    if torch.device(device).type != "cuda":
        return "widened"
    ways: tuple[Way, ...] = ("added", "apart")
    for way in ways:
        try:
            ones = torch.ones(64, 64, dtype=torch.bfloat16, device=device)
            total = torch.full((64, 64), 2.0**-8, device=device)
            with fast_parts(way):
                if way == "added":
                    torch.addmm(total, ones, ones.T, out_dtype=torch.float32, out=total)
                else:
                    total += torch.mm(ones, ones.T, out_dtype=torch.float32)
        except (RuntimeError, TypeError):  # no such argument, or not on this device
            continue
        if bool((total == 64 + 2.0**-8).all()):  # bf16 would have lost the fraction
            return way
    return "widened"
