"""The peer neural-tangents (Novak et al. 2020, 2022), on JAX, in an environment and a process of its own.

The weights of a torch model are handed over as arrays. Its three ways to an empirical kernel are all timed, where their
Jacobian fits, and the fastest counts; what compiling took stands in ``plan_seconds``, as it is done once per shape.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bench.inputs import Inputs, count_outputs, count_parameters, count_samples

from .result import MEMORY_BYTES, Refused, Result

#: Environment variable that names the environment; without it the folder that ``make_environment.sh`` makes.
VARIABLE = "OOC_NTK_BENCH_JAX"

#: The repository, whose modules the child imports.
ROOT = Path(__file__).parents[2]

#: Share of the memory up to which the whole Jacobian may be held (guessed: it is held twice at times).
JACOBIAN_SHARE = 0.4


def interpreter() -> Path | None:
    """Python of the environment, or None where there is none."""
    place = os.environ.get(VARIABLE) or ROOT / "bench" / "neural_tangents" / ".venv"
    found = Path(place) / "bin" / "python"
    return found if found.exists() else None


def neural_tangents_kernel(model: nn.Module, inputs: Inputs, memory_bytes: int = MEMORY_BYTES) -> Result:
    """The trace kernel from ``empirical_ntk_fn``.

    Args:
        model: in eval mode: ``nn.Sequential`` of Linear, Conv2d, ReLU and Flatten.
        inputs: (samples, ...), a tensor.
        memory_bytes: what it may take.

    Returns:
        The kernel and its times, measured in the child.

    Raises:
        Refused: if there is no environment, or the model is of another kind.
        RuntimeError: if its process fails.
    """
    python = interpreter()
    if python is None:
        raise Refused("its environment is not there; bash bench/neural_tangents/make_environment.sh")
    if not isinstance(inputs, torch.Tensor):
        raise Refused("is handed single tensors alone")
    layers, arrays = _layers(model)
    jacobian_bytes = 4 * count_samples(inputs) * count_outputs(model, inputs) * count_parameters(model)
    ways = [1, 2, 3] if jacobian_bytes < JACOBIAN_SHARE * memory_bytes else [3]
    threads = torch.get_num_threads()
    flags = f"--xla_cpu_multi_thread_eigen={str(threads > 1).lower()} intra_op_parallelism_threads={threads}"
    with tempfile.TemporaryDirectory(prefix="ooc-ntk-bench-") as name:
        folder = Path(name)
        np.savez(folder / "arrays.npz", inputs=inputs.numpy(), **arrays)
        (folder / "layers.json").write_text(json.dumps({"layers": layers, "implementations": ways}))
        command = [str(python), "-m", "bench.neural_tangents.child", name]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": ""}
        done = subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if "Error" in line]
            raise RuntimeError(f"the process of neural-tangents failed: {(said or [f'status {done.returncode}'])[-1]}")
        figures = json.loads((folder / "figures.json").read_text())
        kernel = np.load(folder / "kernel.npy")
    compiling, peak = figures["compile_seconds"], figures["peak_bytes"] / 2**30
    return Result(
        kernel,
        plan_seconds=compiling,
        derive_seconds=figures["seconds"],
        remark=f"{figures['versions']}, {figures['way']}, timed as a whole; compiling took {compiling:.2f} s beside; "
        f"peak of its own process {peak:.2f} GiB",
    )


def _layers(model: nn.Module) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """The model as a list of layers, and its arrays by layer and name.

    Raises:
        Refused: if it is of another kind.
    """
    if not isinstance(model, nn.Sequential):
        raise Refused(f"weights are handed over of nn.Sequential alone, not of {type(model).__name__}")
    layers, arrays = [], {}
    for index, module in enumerate(model):
        own = {name: parameter.detach().numpy() for name, parameter in module.named_parameters()}
        layer: dict[str, Any] = {"arrays": list(own)}
        if isinstance(module, nn.Linear):
            layer["kind"] = "linear"
        elif isinstance(module, nn.ReLU):
            layer["kind"] = "relu"
        elif isinstance(module, nn.Flatten):
            layer["kind"] = "flatten"
        elif isinstance(module, nn.Conv2d) and module.groups == 1 and module.dilation == (1, 1):
            layer |= {"kind": "conv", "stride": module.stride, "padding": module.padding}
        else:
            raise Refused(f"weights of {type(module).__name__} are not handed over")
        layers.append(layer)
        arrays |= {f"{index}.{name}": array for name, array in own.items()}
    return layers, arrays
