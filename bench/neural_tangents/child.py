"""Measure neural-tangents' ``empirical_ntk_fn`` in its own environment: NumPy, JAX and neural-tangents alone.

``python -m bench.neural_tangents.child FOLDER``: ``layers.json`` and ``arrays.npz`` say what network and which samples;
``kernel.npy`` and ``figures.json`` are left beside them.
"""

from __future__ import annotations

import json
import resource
import sys
import time
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

#: Its ways to a kernel, by the number that it gives them.
IMPLEMENTATIONS = {1: "Jacobian contraction", 2: "NTK-vector products", 3: "structured derivatives"}

#: Timings of each way, of which the best counts; the first call, which compiles, is timed apart.
REPEATS = 2


def neural_tangents() -> Any:
    """The library without its experimental part, which imports TensorFlow for functions that play no part here."""
    sys.modules.setdefault("neural_tangents.experimental", types.ModuleType("neural_tangents.experimental"))
    import neural_tangents

    return neural_tangents


def network(layers: list[dict[str, Any]]) -> Callable[..., jax.Array]:
    """The function of a list of layers, from (parameters by layer, samples) to logits.

    Args:
        layers: of kinds ``linear``, ``relu``, ``flatten`` and ``conv``, in order.
    """

    def apply(parameters: list[Mapping[str, jax.Array]], x: jax.Array, **_: object) -> jax.Array:
        for layer, own in zip(layers, parameters, strict=True):
            if layer["kind"] == "relu":
                x = jax.nn.relu(x)
            elif layer["kind"] == "flatten":
                x = x.reshape(len(x), -1)
            elif layer["kind"] == "linear":
                x = x @ own["weight"].T + own.get("bias", 0.0)
            else:
                padding = [(size, size) for size in layer["padding"]]
                axes = ("NCHW", "OIHW", "NCHW")
                x = jax.lax.conv_general_dilated(x, own["weight"], layer["stride"], padding, dimension_numbers=axes)
                if "bias" in own:
                    x = x + own["bias"][:, None, None]
        return x

    return apply


def measure(folder: Path) -> None:
    """Time every implementation that was asked for and leave the fastest one's kernel and figures.

    Args:
        folder: of the files.
    """
    task = json.loads((folder / "layers.json").read_text())
    arrays = np.load(folder / "arrays.npz")
    layers, x = task["layers"], jnp.asarray(arrays["inputs"])
    parameters = [
        {name: jnp.asarray(arrays[f"{index}.{name}"]) for name in layer["arrays"]} for index, layer in enumerate(layers)
    ]
    nt, apply = neural_tangents(), network(layers)
    outputs = apply(parameters, x[:1]).shape[1]
    best: dict[str, Any] | None = None
    for implementation in task["implementations"]:
        kind = nt.NtkImplementation(implementation)
        compute = jax.jit(nt.empirical_ntk_fn(apply, trace_axes=(-1,), vmap_axes=0, implementation=kind))
        start = time.perf_counter()
        kernel = compute(x, None, parameters).block_until_ready()
        first = time.perf_counter() - start
        times = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            kernel = compute(x, None, parameters).block_until_ready()
            times.append(time.perf_counter() - start)
        found = {"seconds": min(times), "compile_seconds": max(0.0, first - min(times)), "way": IMPLEMENTATIONS[kind]}
        if best is None or found["seconds"] < best["seconds"]:
            best = found
            # It divides the trace by the number of outputs.
            np.save(folder / "kernel.npy", np.asarray(kernel) * outputs)
    assert best is not None
    best["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    best["versions"] = f"neural-tangents {nt.__version__}, jax {jax.__version__}"
    (folder / "figures.json").write_text(json.dumps(best))


if __name__ == "__main__":
    if sys.argv[1] == "--version":
        print(f"neural-tangents {neural_tangents().__version__}, jax {jax.__version__}")
    else:
        measure(Path(sys.argv[1]))
