"""What a run of ``python -m bench.projection`` is asked for, and the records that it leaves."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from .bars import Check
from .tails import Tail
from .trak_peer import BlockTiming, Store


@dataclass(frozen=True)
class Setting:
    """What is asked for.

    Attributes:
        smoke: tiny sizes.
        dims: columns in place of each data set's own.
        seeds: likewise.
        repeats: timings, of which the best counts.
        out: where figures go; None draws none.
    """

    smoke: bool
    dims: tuple[int, ...] | None = None
    seeds: int | None = None
    repeats: int = 3
    out: Path | None = None


@dataclass(frozen=True)
class Residual:
    """A projected kernel beside the exact one, over several seeds.

    Attributes:
        data: name of the data.
        kernel: ``trace`` or ``pseudo``.
        cosine: whether both are divided by the roots of their diagonals.
        kind: of the projection.
        dim: its columns.
        observed: relative Frobenius residual of all entries, by seed.
        predicted: what the error bars of the projected kernel alone say, by seed.
        inside: share of entries whose 95% bars hold the exact one, each pair once, by seed.
        rare: of a cosine kernel, the absolute residual that one of a thousand exceeds.
        tail: of the absolute residuals of different samples, all seeds together.
        standardised: of the same over their standard errors.
    """

    data: str
    kernel: str
    cosine: bool
    kind: str
    dim: int
    observed: tuple[float, ...]
    predicted: tuple[float, ...]
    inside: tuple[float, ...]
    rare: float | None
    tail: Tail
    standardised: Tail


@dataclass(frozen=True)
class Step:
    """What one step takes.

    Attributes:
        name: of the step.
        sample_seconds: best seconds per sample.
        ratio: to the capture.
        peak_bytes: highest resident memory of the process during it (Linux; 0 where it cannot be told).
        remark: how it was measured.
    """

    name: str
    sample_seconds: float
    ratio: float
    peak_bytes: int
    remark: str = ""


@dataclass
class Outcome:
    """Everything that was measured.

    Attributes:
        setting: what it was measured on.
        residuals: projected kernels beside exact ones.
        slopes: of log residual against log dim, by data, kernel, normalisation and kind.
        steps: of the throughput.
        stores: TRAK's projector beside ours on the small network.
        trak: TRAK's projector on the large network.
        checks: figures beside their bars.
        notes: what was left out, and why.
        tables: as they were printed, by title.
    """

    setting: dict[str, str | int]
    residuals: list[Residual] = field(default_factory=list)
    slopes: dict[str, float] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    stores: list[Store] = field(default_factory=list)
    trak: BlockTiming | None = None
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tables: dict[str, list[str]] = field(default_factory=dict)

    def note(self, text: str) -> None:
        """Print what was left out, and keep it."""
        self.notes.append(text)
        print(text, flush=True)

    def table(self, title: str, lines: list[str]) -> None:
        """Print a table, and keep it."""
        self.tables[title] = lines
        print("\n".join(["", title, *lines]), flush=True)

    def projecting(self, kind: str) -> Step:
        """The step that projects with a kind."""
        return next(step for step in self.steps if step.name.startswith(f"project, {kind},"))
