"""Matrix products in torch that lose no digits to their length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final

import torch
from torch import Tensor

#: Columns that torch multiplies at a time on a CPU: its products of longer ones have errors above 5e-7 (measured on one
#: processor; others sum any length as well as this).
PRODUCT_COLUMNS: Final = 4096

#: The same where one side has fewer rows than this: then torch sums each entry in one chain (measured without AVX-512,
#: 12 × 9 entries: 6e-7 with 4,096 columns, 3e-7 with 1,024).
NARROW_ROWS: Final = 16
NARROW_COLUMNS: Final = 1024


#: Blocks that are added up one after the other; more are added in groups of as many, in float64.
CHAINED_BLOCKS: Final = 64

#: What makes ``left @ right.T`` of float32 matrices in place of :func:`multiply`, in this thread.
_maker: ContextVar[Callable[[Tensor, Tensor], Tensor] | None] = ContextVar("maker", default=None)


@contextmanager
def made_by(maker: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Have float32 products made in another way, whoever asks for them; set back after.

    Args:
        maker: given (rows, depth) and (columns, depth), returns (rows, columns) in new memory.
    """
    token = _maker.set(maker)
    try:
        yield
    finally:
        _maker.reset(token)


def multiply(left: Tensor, right: Tensor, out: Tensor | None = None, columns: int | None = None) -> Tensor:
    """``left @ right.T``, summed over blocks of columns in the dtype of ``out``.

    Args:
        left: (rows, depth).
        right: (columns, depth).
        out: (rows, columns) to fill, contiguous rows; allocated if None.
        columns: depth of a block; None for what keeps the digits on a CPU.

    Returns:
        The product.
    """
    maker = _maker.get()
    if maker is not None and left.dtype == torch.float32:
        found = maker(left, right)
        return found if out is None else out.copy_(found)
    if columns is None:
        columns = NARROW_COLUMNS if min(len(left), len(right)) < NARROW_ROWS else PRODUCT_COLUMNS
    group = columns * CHAINED_BLOCKS
    if left.shape[1] > group:
        whole = torch.zeros(len(left), len(right), dtype=torch.float64, device=left.device)
        for start in range(0, left.shape[1], group):
            whole += multiply(left[:, start : start + group], right[:, start : start + group], columns=columns)
        return whole.to(left.dtype) if out is None else out.copy_(whole)
    total = torch.mm(left[:, :columns], right[:, :columns].T, out=out)
    for start in range(columns, left.shape[1], columns):
        total.addmm_(left[:, start : start + columns], right[:, start : start + columns].T)
    return total
