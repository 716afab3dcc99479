"""Matrix products in torch that lose no digits to their length."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

#: Columns that torch multiplies at a time on a CPU: its products of longer ones have errors above 5e-7 (measured on one
#: processor; others sum any length as well as this).
PRODUCT_COLUMNS: Final = 4096


def multiply(left: Tensor, right: Tensor, out: Tensor | None = None, columns: int = PRODUCT_COLUMNS) -> Tensor:
    """``left @ right.T``, summed over blocks of columns in the dtype of ``out``.

    Args:
        left: (rows, depth).
        right: (columns, depth).
        out: (rows, columns) to fill, contiguous rows; allocated if None.
        columns: depth of a block.

    Returns:
        The product.
    """
    total = torch.mm(left[:, :columns], right[:, :columns].T, out=out)
    for start in range(columns, left.shape[1], columns):
        total.addmm_(left[:, start : start + columns], right[:, start : start + columns].T)
    return total
