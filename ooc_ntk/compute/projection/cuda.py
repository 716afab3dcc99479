"""The projection by CUDA kernels: the backend of NVIDIA devices, and the only module that imports CuPy.

Memory is torch's. CuPy compiles ``kernels.cu`` at run time and launches it on torch's current stream, on views that
DLPack hands over. Nothing is added atomically, so that two runs give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final

import cupy
import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ooc_ntk.planning.projection import SMALL_BLOCK, Projection

from .backends import TorchBackend, summed_places
from .entries import Outer
from .philox import key_of

#: Threads of a block, and blocks of a grid along y at most (CUDA allows 65,535): kernels go on from there.
_THREADS: Final = 256
_MOST_BLOCKS: Final = 2**15

#: Rows of values from which on a sorted product reads them transposed, so that the threads of a warp, which add the
#: same parameter of different rows, read neighbouring memory; and those that such a block of threads spans (guessed).
_TRANSPOSED_ROWS: Final = 16
_WARP: Final = 32

#: Bytes of values that are transposed at a time (a choice).
_TRANSPOSED_BYTES: Final = 2**30

#: Rows of values that one thread of a shifted product sums: ROWS in ``kernels.cu``.
_SHIFTED_ROWS: Final = 4

#: Parameters of a sorted table at most: twice their number and a sign fit 32 bits.
_MOST_SORTED: Final = 2**31

_SUFFIX: Final = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16"}


@cache
def _module() -> Any:
    """The kernels, compiled for the device on first use; CuPy keeps the result on disk for later processes."""
    source = Path(__file__).with_name("kernels.cu").read_text(encoding="utf-8")
    return cupy.RawModule(code=source, options=("--std=c++17",))


class _TorchStream:
    """Torch's current stream by the CUDA stream protocol, which its own streams have only in later releases."""

    def __init__(self, device: torch.device) -> None:
        self.pointer = torch.cuda.current_stream(device).cuda_stream

    def __cuda_stream__(self) -> tuple[int, int]:
        """Version of the protocol and the stream."""
        return 0, self.pointer


@contextmanager
def _on_stream(device: torch.device) -> Iterator[None]:
    """Have CuPy work on a device and on torch's current stream there."""
    index = torch.cuda.current_device() if device.index is None else device.index
    with cupy.cuda.Device(index):
        stream = _TorchStream(device)
        # CuPy 14 deprecates ExternalStream, and 13 has nothing else.
        if hasattr(cupy.cuda.Stream, "from_external"):
            external = cupy.cuda.Stream.from_external(stream)
        else:
            external = cupy.cuda.ExternalStream(stream.pointer, index)
        with external:
            yield


def _launch(name: str, work: tuple[int, int], threads: tuple[int, int], *arguments: Tensor | np.generic) -> None:
    """Run a kernel.

    Args:
        name: of the kernel.
        work: things to do along x and y; nothing is launched for none.
        threads: of a block, likewise.
        arguments: tensors on one device, and numbers of the types that the kernel takes.
    """
    if not all(work):
        return
    grid = -(-work[0] // threads[0]), min(-(-work[1] // threads[1]), _MOST_BLOCKS)
    device = next(each.device for each in arguments if isinstance(each, Tensor))
    with _on_stream(device):
        # The device's memory and streams are those of torch, which keeps views alive until the stream has passed.
        views = [cupy.from_dlpack(each.detach()) if isinstance(each, Tensor) else each for each in arguments]
        _module().get_function(name)(grid, threads, tuple(views))


def _along(n: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Work and threads of kernels that go over one index."""
    return (n, 1), (_THREADS, 1)


def _key(projection: Projection) -> tuple[np.uint32, np.uint32]:
    low, high = key_of(projection.seed)
    return np.uint32(low), np.uint32(high)


def _shape(projection: Projection) -> tuple[np.uint32, np.uint32]:
    """Blocks of rows and their rows."""
    return np.uint32(projection.nonzeros), np.uint32(projection.block)


class CupyBackend:
    """CUDA kernels through CuPy. See :class:`~.backends.Backend`."""

    name = "cupy"

    def __init__(self) -> None:
        """Keep the sorted order of every table for as long as the table itself is kept."""
        self._sorted: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def table(self, projection: Projection, p: Tensor, outers: Sequence[Outer]) -> Tensor:
        """See :meth:`~.backends.Backend.table`."""
        if not projection.about.compiled:
            return TorchBackend().table(projection, p, outers)
        n, numbers = len(p), (*_shape(projection), *_key(projection))
        out = torch.empty(projection.nonzeros, n, dtype=torch.int32, device=p.device)
        kernel = "shift_table" if projection.kind == "shift" else "sjlt_table"
        _launch(kernel, *_along(n), p, np.int64(n), *numbers, out)
        for outer in outers if projection.about.structured else ():
            place = np.int64(outer.start), np.int64(outer.outputs), np.int64(outer.inputs)
            _launch("outer_table", *_along(n), p, np.int64(n), *place, *numbers, out)
        return out

    def table_at(
        self, projection: Projection, start: int, outer: Tensor, inner: Tensor, outers: Sequence[Outer]
    ) -> Tensor:
        """See :meth:`~.backends.Backend.table_at`."""
        return self.table(projection, summed_places(start, outer, inner), outers)

    def hashes(self, projection: Projection, outer: Outer, side: int, index: Tensor) -> Tensor:
        """See :meth:`~.backends.Backend.hashes`."""
        n = len(index)
        out = torch.empty(projection.nonzeros, n, dtype=torch.int32, device=index.device)
        place = np.int64(outer.start), np.uint32(side)
        _launch("factor_table", *_along(n), index, np.int64(n), *place, *_shape(projection), *_key(projection), out)
        return out

    def scatter(self, values: Tensor, table: Tensor, projection: Projection, total: Tensor) -> None:
        """See :meth:`~.backends.Backend.scatter`.

        Every entry of the total is summed by one thread, in the dtype of the values and in the order of parameters.
        """
        rows, n = values.shape
        if not n:
            return
        if table not in self._sorted:
            self._sorted[table] = _sort(table, projection)
        places, starts = self._sorted[table]
        transposed = rows >= _TRANSPOSED_ROWS
        step = max(_WARP, _TRANSPOSED_BYTES // (n * values.element_size())) if transposed else rows
        for first in range(0, rows, step):
            some = values[first : first + step]
            if transposed:
                some = some.T.contiguous().T
            _launch(
                f"scatter_sorted_{_SUFFIX[values.dtype]}",
                (len(some), projection.nonzeros * projection.block),
                (_WARP, _THREADS // _WARP) if transposed else (1, _THREADS),
                some,
                np.int64(some.stride(0)),
                np.int64(some.stride(1)),
                np.int64(len(some)),
                np.int64(n),
                places,
                starts,
                *_shape(projection),
                total[first:],
                np.int64(total.stride(0)),
            )

    def shifted(self, values: Tensor, start: int, projection: Projection, total: Tensor) -> bool:
        """See :meth:`~.backends.Backend.shifted`."""
        rows, n = values.shape
        if not n:
            return True
        shape, key = _shape(projection), _key(projection)
        number = start // projection.block
        blocks = (start + n - 1) // projection.block - number + 1
        shifts = torch.empty(projection.nonzeros, blocks, dtype=torch.int32, device=values.device)
        signs = torch.empty(n, dtype=torch.int32, device=values.device)
        _launch("shift_places", *_along(blocks), np.int64(number), np.int64(blocks), *shape, *key, shifts)
        _launch("shift_signs", *_along(n), np.int64(start), np.int64(n), *key, signs)
        _launch(
            f"shift_multiply_{_SUFFIX[values.dtype]}",
            (projection.nonzeros * projection.block, -(-rows // _SHIFTED_ROWS)),
            (_THREADS, 1),
            values,
            np.int64(values.stride(0)),
            np.int64(rows),
            np.int64(start),
            np.int64(n),
            shifts,
            signs,
            *shape,
            total,
            np.int64(total.stride(0)),
        )
        return True

    def tile(self, projection: Projection, p: Tensor, dtype: torch.dtype) -> Tensor:
        """See :meth:`~.backends.Backend.tile`."""
        assert projection.dim is not None
        if not projection.about.compiled:
            return TorchBackend().tile(projection, p, dtype)
        made = dtype if dtype == torch.bfloat16 else torch.float32
        out = torch.empty(len(p), projection.dim, dtype=made, device=p.device)
        signs = projection.kind == "rademacher"
        # Threads per parameter: four for 128 signs (SHARE in kernels.cu), one for four columns otherwise.
        across = -(-projection.dim // 128) * 4 if signs else -(-projection.dim // 4)
        _launch(
            f"{'sign' if signs else 'gaussian'}_tile_{_SUFFIX[made]}",
            (across, len(p)),
            (_WARP, _THREADS // _WARP),
            p,
            np.int64(len(p)),
            np.int64(projection.dim),
            *_key(projection),
            # CuPy has no bfloat16.
            out.view(torch.int16) if made == torch.bfloat16 else out,
        )
        return out.to(dtype)


def _sort(table: Tensor, projection: Projection) -> tuple[Tensor, Tensor]:
    """A table sorted by rows of R, parameters of one row in their order.

    Args:
        table: (nonzeros, n), int32.
        projection: of a sparse kind.

    Returns:
        Twice the number of each parameter, plus 1 for a minus, (nonzeros, n); and where the parameters of each row
        begin, (nonzeros, block + 1). Both int32, whose bits the kernels read as unsigned.
    """
    nonzeros, n = table.shape
    assert n < _MOST_SORTED, n
    places = torch.empty_like(table)
    starts = torch.empty(nonzeros, projection.block + 1, dtype=torch.int32, device=table.device)
    # Half the digits, half the passes of a radix sort.
    kind = torch.int16 if projection.block < SMALL_BLOCK else torch.int32
    edges = torch.arange(projection.block + 1, dtype=kind, device=table.device)
    for here, place, start in zip(table, places, starts, strict=True):
        rows, order = (here >> 1).to(kind).sort(stable=True)
        place.copy_((2 * order + (here & 1)[order]).to(torch.int32))
        start.copy_(torch.searchsorted(rows, edges))
    return places, starts
