"""The jobs that are disturbed: every dataflow and every kind of result, tens of small tasks each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

#: Where the model is; a job names it as ``file.py:function``, as the command line would.
MODEL: Final = f"{Path(__file__).with_name('digits_model.py').resolve()}:make_model"


@dataclass(frozen=True)
class Subject:
    """A job with the plan that is fixed for it by hand.

    Attributes:
        name: its name.
        train: train samples.
        test: test samples.
        settings: further arguments of the job.
        preferences: what is fixed of its plan.
    """

    name: str
    train: int
    test: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    preferences: Mapping[str, Any] = field(default_factory=dict)

    def arguments(self, data: Path) -> dict[str, Any]:
        """Arguments of the job, as they are given by hand.

        Args:
            data: folder of the samples, see :func:`write_samples`.
        """
        given: dict[str, Any] = {"model": MODEL, "train": f"{data / 'digits.npy'}[0:{self.train}]", "device": "cpu"}
        if self.test:
            given["test"] = f"{data / 'digits.npy'}[{self.train}:{self.train + self.test}]"
        return {**given, **self.settings}

    def flags(self, data: Path) -> list[str]:
        """The same job as flags of ``ooc-ntk run``."""
        return [word for name, value in self.arguments(data).items() for word in (f"--{name}", str(value))]


SUBJECTS: Final = {
    subject.name: subject
    for subject in (
        Subject(
            "spill",
            60,
            18,
            {"normalize": "cosine"},
            {
                "dataflow": "spill",
                "tile_samples": 10,
                "span_columns": 400,
                "layer_rules": False,
                "superblock_tiles": 4,
            },
        ),
        Subject(
            "recompute",
            42,
            14,
            {"normalize": "cosine"},
            {"dataflow": "recompute", "tile_samples": 14, "span_columns": 200, "passes": 3, "layer_rules": False},
        ),
        Subject(
            "resident",
            60,
            0,
            {},
            {"dataflow": "resident", "tile_samples": 10, "span_columns": 400, "layer_rules": False},
        ),
        Subject(
            "factored",
            60,
            18,
            {"normalize": "cosine"},
            {"dataflow": "spill", "tile_samples": 10, "superblock_tiles": 1},
        ),
        Subject(
            "projected",
            60,
            18,
            {"projection": "sjlt:64", "backend": "torch", "normalize": "cosine"},
            {"tile_samples": 10, "superblock_tiles": 4},
        ),
        Subject(
            "features",
            60,
            18,
            {"projection": "sjlt:64", "backend": "torch"},
            {"tile_samples": 5, "features_only": True},
        ),
        Subject("layers", 32, 8, {"by": "layer"}, {"dataflow": "spill", "tile_samples": 8}),
        Subject(
            "full",
            14,
            4,
            {"kernel": "full"},
            {"dataflow": "spill", "tile_samples": 2, "order": "triangle", "superblock_tiles": 4},
        ),
    )
}


def write_samples(data: Path) -> None:
    """Write the digits that every job reads, (100, 1, 8, 8) float32."""
    from sklearn.datasets import load_digits

    np.save(data / "digits.npy", (load_digits().images[:100, None] / 16).astype(np.float32))
