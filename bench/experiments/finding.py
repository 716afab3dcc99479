"""What an experiment is asked for, and what it finds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ooc_ntk
from bench.contenders import DEVICE
from ooc_ntk import demo

#: Digits of mnist5k: the network is trained on the first ones, these are never trained on.
FRESH, TEST_START = 1000, demo.TRAIN_SAMPLES

#: Passes over the train digits, in full size (measured: it gets all of them right) and in smoke size.
EPOCHS, SMOKE_EPOCHS = 12, 1


@dataclass(frozen=True)
class Setting:
    """How experiments are done.

    Attributes:
        out: folder for figures and numbers.
        work: folder for weights and kernels; what is there is not computed again.
        smoke: tiny sizes, to see that it works.
        seed: of first weights, order of training, projections and bootstrap.
    """

    out: Path
    work: Path
    smoke: bool = False
    seed: int = 0

    @property
    def train_samples(self) -> int:
        """Train samples of the digits' kernels, and digits that the network is trained on."""
        return 80 if self.smoke else 1000

    @property
    def test_samples(self) -> int:
        """Test samples of the digits' kernels."""
        return 40 if self.smoke else 500

    def weights(self, *, trained: bool) -> Path:
        """The demonstration's network after training on the first digits, or as it was before."""
        epochs = (SMOKE_EPOCHS if self.smoke else EPOCHS) if trained else 0
        path = self.work / f"cnn-{self.train_samples}-{epochs}-{self.seed}.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            demo.train(path, epochs, samples=self.train_samples, seed=self.seed)
        return path

    def job(self, *, trained: bool = True, fresh: bool = False, **changes: Any) -> ooc_ntk.Job:
        """A kernel of the network on digits.

        Args:
            trained: whether of the trained network or of the initial one.
            fresh: whether the train samples are digits that the network was not trained on, or those that it was.
            changes: of the job.
        """
        first = FRESH if fresh else 0
        return ooc_ntk.Job(
            "ooc_ntk.demo:network",
            f"mnist5k[{first}:{first + self.train_samples}]",
            f"mnist5k[{TEST_START}:{TEST_START + self.test_samples}]",
            weights=self.weights(trained=trained),
            device=DEVICE,
            **changes,
        )

    def kernel(self, name: str, job: ooc_ntk.Job) -> ooc_ntk.Kernel:
        """The kernel of a job, computed or found in the work folder."""
        size = "smoke" if self.smoke else "full"
        return ooc_ntk.run(job, self.work / f"{name}-{size}-{self.seed}", progress=False)

    def digits_kernel(self, *, trained: bool, fresh: bool) -> ooc_ntk.Kernel:
        """The exact trace kernel of the trained or the initial network on digits."""
        name = f"trace-{'trained' if trained else 'initial'}-{'fresh' if fresh else 'own'}"
        return self.kernel(name, self.job(trained=trained, fresh=fresh))


@dataclass(frozen=True)
class Finding:
    """What an experiment found.

    Attributes:
        title: what was done.
        table: lines.
        seen: one sentence that says what is seen.
        agrees: ``yes``, ``partly`` or ``no``: whether that is what the paper claims.
        claim: what the paper claims.
        figure: the picture.
        numbers: all figures, in values that JSON has.
        notes: what was left out, and why.
    """

    title: str
    table: list[str]
    seen: str
    agrees: str
    claim: str
    figure: Path
    numbers: dict[str, Any] = field(repr=False)
    notes: tuple[str, ...] = ()
