"""What every contender answers with: a result, or in one line why there is none."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field

import numpy as np

#: Bytes that a contender may take; what bounds the chunks of the peers and the budget of ooc-ntk.
MEMORY_BYTES = 18 * 2**30


class Refused(Exception):  # noqa: N818 - an outcome that the table prints, not a failure of the benchmark
    """A contender cannot take a workload; the message says why."""


@dataclass(frozen=True)
class Result:
    """What a contender computed and how long each phase took.

    Attributes:
        kernel: (samples, samples), float32 or float64.
        plan_seconds: deciding how (0 for those that decide nothing).
        derive_seconds: the Jacobian.
        contract_seconds: its products.
        other_seconds: whatever else it does before the kernel is there.
        remark: how it went about it, for the table's foot.
        figures: what its plan says, in FLOPs and bytes (ooc-ntk only).
        phases: seconds by phase (ooc-ntk only).
    """

    kernel: np.ndarray
    plan_seconds: float = 0.0
    derive_seconds: float = 0.0
    contract_seconds: float = 0.0
    other_seconds: float = 0.0
    remark: str = ""
    figures: dict[str, int] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)

    @property
    def run_seconds(self) -> float:
        """All of it but the plan."""
        return self.derive_seconds + self.contract_seconds + self.other_seconds


def require(module: str, package: str) -> None:
    """Refuse where a package is not installed.

    Args:
        module: what is imported.
        package: what is installed for it.

    Raises:
        Refused: if the module is not found.
    """
    if importlib.util.find_spec(module) is None:
        raise Refused(f"{package} is not installed; pip install 'ooc-ntk[bench]'")
