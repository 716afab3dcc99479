"""What is claimed: figures of a comparison, and the bars that hold for them by workload and sample count."""

from __future__ import annotations

from dataclasses import dataclass

#: Names of figures, as the table prints them. Floors and peers are those of the same run.
OVER_REPRESENTATION = "run / representation floor"
ABOVE_REPRESENTATION = "run − representation floor, s"
OVER_DENSE = "run / dense floor"
BEST_PEER = "best peer / run"
LOOP = "per-sample loop / run"
HELD = "held / dense bytes"
DENSE_ENGINE = "run / dense engine"

#: What ooc-ntk may take, as a multiple of its own dense engine's time.
SLOWER_THAN_DENSE = 1.10


@dataclass(frozen=True)
class Bar:
    """What a figure must reach.

    Attributes:
        figure: its name.
        limit: the bar.
        at_least: whether the figure must not be below it; otherwise it must not be above.
        samples: sample count for which it holds; None holds for all.
    """

    figure: str
    limit: float
    at_least: bool = False
    samples: int | None = None


#: Bars by workload, as the issue that asks for layer rules sets them; that of the dense engine holds for all.
BARS = {
    "mlp": (
        Bar(OVER_REPRESENTATION, 1.5, samples=2048),
        Bar(ABOVE_REPRESENTATION, 0.3, samples=128),
        Bar(BEST_PEER, 8, at_least=True, samples=128),
        Bar(HELD, 1 / 200),
    ),
    "resnet18": (Bar(OVER_DENSE, 0.9), Bar(BEST_PEER, 3, at_least=True), Bar(HELD, 1 / 14)),
    "resnet18-c10": (Bar(OVER_DENSE, 0.65), Bar(LOOP, 3, at_least=True)),
    "vit": (Bar(OVER_DENSE, 1.3), Bar(BEST_PEER, 2, at_least=True)),
    "minilm": (Bar(OVER_REPRESENTATION, 1.4), Bar(BEST_PEER, 3, at_least=True)),
}


@dataclass(frozen=True)
class Check:
    """A figure beside its bar.

    Attributes:
        figure: its name.
        value: of the run alone.
        with_plan: of plan and run; None where the plan plays no part.
        limit: the bar, None without one.
        at_least: whether the bar is the least that will do.
        met: whether it is; None without a bar, and in smoke size, where it means nothing.
    """

    figure: str
    value: float
    with_plan: float | None
    limit: float | None
    at_least: bool
    met: bool | None

    def __str__(self) -> str:
        """One line for the foot of a table."""
        text = f"{self.figure} = {self.value:.3g}"
        if self.with_plan is not None:
            text += f", with plan {self.with_plan:.3g}"
        if self.limit is not None:
            text += f"; bar {'at least' if self.at_least else 'at most'} {self.limit:.3g}"
        return text if self.met is None else f"{text}: {'met' if self.met else 'MISSED'}"


def judge(
    workload: str, samples: int, figures: dict[str, tuple[float, float | None]], smoke: bool
) -> tuple[Check, ...]:
    r"""Put every figure beside its bar.

    Args:
        workload: its name.
        samples: sample count.
        figures: by name the value of the run and that of plan and run.
        smoke: smoke size: no bar is judged.

    Returns:
        The checks, in the order of the figures.

    >>> print(*judge("vit", 64, {OVER_DENSE: (1.2, 1.4), BEST_PEER: (1.5, 1.4)}, smoke=False), sep="\n")
    run / dense floor = 1.2, with plan 1.4; bar at most 1.3: met
    best peer / run = 1.5, with plan 1.4; bar at least 2: MISSED
    """
    bars = {bar.figure: bar for bar in BARS.get(workload, ()) if smoke or bar.samples in (None, samples)}
    bars[DENSE_ENGINE] = Bar(DENSE_ENGINE, SLOWER_THAN_DENSE)
    checks = []
    for figure, (value, with_plan) in figures.items():
        bar = bars.get(figure)
        if bar is None:
            checks.append(Check(figure, value, with_plan, None, False, None))
        else:
            met = value >= bar.limit if bar.at_least else value <= bar.limit
            checks.append(Check(figure, value, with_plan, bar.limit, bar.at_least, None if smoke else met))
    return tuple(checks)


def checked(figure: str, value: float, limit: float, smoke: bool, *, at_least: bool = False) -> Check:
    """A figure beside a bar of its own.

    Args:
        figure: its name.
        value: what was measured.
        limit: the bar.
        smoke: smoke size: nothing is judged.
        at_least: whether the bar is the least that will do.

    >>> print(checked("seconds / floor", 2.5, 2.0, smoke=False))
    seconds / floor = 2.5; bar at most 2: MISSED
    """
    met = value >= limit if at_least else value <= limit
    return Check(figure, value, None, limit, at_least, None if smoke else met)
