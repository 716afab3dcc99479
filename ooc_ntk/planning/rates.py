"""Machine rates: how fast this machine multiplies, copies, reads and writes, as measured by ``calibrate``."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Final

from ooc_ntk.errors import StorageError
from ooc_ntk.units import partial_products

#: Tile edges at which products are timed; between them the planner interpolates.
CALIBRATED_EDGES: Final = (32, 128, 512, 1024)

#: Depth of the timed products, each added to a float64 sum as in a run. (Deep enough that the addition is
#: a tenth of it at most, small enough that the operands stay below the memory of the smallest budgets.)
CALIBRATED_DEPTH: Final = 2048


@dataclass(frozen=True)
class MachineRates:
    """Measured rates of one machine and device.

    Attributes:
        machine: name of machine, processor, device and thread count for which the rates hold.
        gemm: FLOP/s of a matrix product per precision and tile edge, e.g. ``{"float32": {512: 2e11}}``; in ``bf16x3``
            those of all three products count.
        syrk: FLOP/s (of the half that is counted) of a symmetric product, same keys.
        fill: bytes/s at which Jacobian rows are copied into memory touched for the first time.
        copy: bytes/s at which they are copied into memory touched before.
        disk_write: bytes/s of a file written and synced.
        disk_read: bytes/s of a file read back into a reused buffer and checked, the faster way.
        host_to_device: bytes/s from host to device (0 on a CPU).
        commit_seconds: seconds to write, sync and commit one small file.
        measured: whether the rates were measured (False: the built-in guess).
        expand: FLOP/s at which factors are expanded into gradients, per precision.
        elements: elements/s at which two Gram matrices are multiplied and summed (0: as bytes are copied).
        direct_wins: whether files are read faster past the page cache (False in rates measured before this was).
    """

    machine: str
    gemm: Mapping[str, Mapping[int, float]]
    syrk: Mapping[str, Mapping[int, float]]
    fill: float
    copy: float
    disk_write: float
    disk_read: float
    host_to_device: float
    commit_seconds: float
    measured: bool = True
    expand: Mapping[str, float] = field(default_factory=dict)
    elements: float = 0.0
    direct_wins: bool = False

    def gemm_seconds(
        self, rows: int, columns: int, depth: int, precision: str, *, symmetric: bool = False, edge: int | None = None
    ) -> float:
        """Seconds of one (rows × depth)·(depth × columns) product.

        Args:
            rows: rows of the result.
            columns: columns of the result.
            depth: length of the contracted dimension.
            precision: one that was measured.
            symmetric: whether it is a Gram matrix, half of which is computed.
            edge: edge of the product that this is a part of; None takes the smaller one of the result.

        Returns:
            Seconds, from the rate measured nearest to that edge.

        >>> r = MachineRates("m", {"float32": {64: 1e9, 256: 4e9}}, {"float32": {64: 1e9}}, 1, 1, 1, 1, 0, 0)
        >>> r.gemm_seconds(256, 256, 1000, "float32") == 2 * 256 * 256 * 1000 / 4e9
        True
        >>> r.gemm_seconds(64, 64, 1000, "float32", symmetric=True) == 64 * 64 * 1000 / 1e9
        True
        """
        flops = rows * columns * depth * (1 if symmetric else 2) * partial_products(precision)
        table = (self.syrk if symmetric else self.gemm)[precision]
        return flops / _nearest(table, min(rows, columns) if edge is None else edge)

    def expand_seconds(self, flops: float, precision: str) -> float:
        """Seconds to expand factors into gradients; at the rate of products where it was not measured."""
        return flops / (self.expand.get(precision) or max(self.gemm[precision].values()))

    def element_seconds(self, elements: float) -> float:
        """Seconds to multiply and sum elements of two Gram matrices; 12 bytes each where it was not measured."""
        return elements / self.elements if self.elements else elements * 12 / self.copy

    def to_json(self) -> str:
        """Serialise."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> MachineRates:
        """Read what :meth:`to_json` wrote.

        Raises:
            StorageError: if the text is not that.
        """
        try:
            fields = json.loads(text)
            for table in ("gemm", "syrk"):
                fields[table] = {
                    precision: {int(edge): float(rate) for edge, rate in rates.items()}
                    for precision, rates in fields[table].items()
                }
            missing = {"expand", "elements"} - set(fields)
            missing |= {"bf16x3"} - set(fields["gemm"])  # of an earlier version
            if missing:
                raise ValueError(f"without {', '.join(sorted(missing))}")
            return cls(**fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise StorageError(f"cannot read the machine's rates ({error}); run 'ooc-ntk calibrate' again") from error


def _nearest(rates: Mapping[int, float], edge: int) -> float:
    """Interpolate a rate between the measured edges, linearly in 1/edge (small tiles pay a fixed cost per edge)."""
    known = sorted(rates)
    if edge <= known[0]:
        return rates[known[0]] * max(edge / known[0], 0.05)
    for low, high in itertools.pairwise(known):
        if low <= edge <= high:
            share = (1 / low - 1 / edge) / (1 / low - 1 / high)
            return rates[low] + share * (rates[high] - rates[low])
    return rates[known[-1]]


_GUESSED: Final = {"float32": 5e10, "tf32": 5e10, "bf16": 5e10, "bf16x3": 5e10, "float64": 2.5e10}

#: A slow laptop, for plans made before the first calibration (guessed; the plan says so).
UNCALIBRATED = MachineRates(
    machine="uncalibrated",
    gemm={p: {32: r / 4, 128: r / 2, 512: r} for p, r in _GUESSED.items()},
    syrk={p: {32: r / 5, 128: r / 2.5, 512: r / 1.25} for p, r in _GUESSED.items()},
    fill=2e9,
    copy=5e9,
    disk_write=4e8,
    disk_read=1e9,
    host_to_device=1e10,
    commit_seconds=0.02,
    measured=False,
)
