"""Random projection on one NVIDIA GPU: first that it is right, then what it costs beside what bounds it.

``python -m bench.gpu_projection`` compares R with its definition, Φ with float64 and two runs with each other, and only
then takes times: of the kernels beside a copy of the same bytes, of dense signs beside the product that uses them, and
of a ResNet-18 for 32×32 images from its samples to its features. Without a CUDA device it says so and ends.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ooc_ntk.compute.capture import Capture
from ooc_ntk.compute.contract import tf32
from ooc_ntk.compute.discover import find_structure
from ooc_ntk.compute.jacobian import ModelBatch, ModelFunction
from ooc_ntk.compute.model import choose_parameters
from ooc_ntk.compute.outputs import OutputRows
from ooc_ntk.compute.projection.backends import Backend, backend_name, load_backend
from ooc_ntk.compute.projection.entries import Outer, dense_columns, factor_hash, rows_and_signs
from ooc_ntk.compute.projection.sketch import FLOAT32_PARTS, exact_product, tile_dtype
from ooc_ntk.execution.features import Projector, parameter_starts
from ooc_ntk.planning.projection import KINDS, SPARSE_KINDS, Projection

from .models import SEED, build
from .table import aligned, relative_error

#: Largest relative error of float32 sums beside float64 (a choice: rounding is 6e-8, over chains of thousands).
TOLERANCE = 3e-6

#: After so many seconds nothing further is timed, and the table says what is missing.
LIMIT_SECONDS = 420.0

#: Repeats of a time, after one that warms up; the fastest counts.
REPEATS = 5


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        device: torch device string.
        backend: what projects.
        smoke: whether in the size of tests.
        dim: columns of Φ.
        batch: samples of a batch of the network.
        span: parameters whose part of a dense R is made at a time.
        rows: gradients that such a part is used for, fewest first.
        width: parameters of the kernels that are timed alone.
    """

    device: str
    backend: str
    smoke: bool
    dim: int = 10_240
    batch: int = 256
    span: int = 65_536
    rows: tuple[int, ...] = (1024, 4096)
    width: int = 2**21

    def small(self) -> Setting:
        """The same in the size of tests."""
        return replace(self, dim=320, batch=4, span=300, rows=(8,), width=2000)


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Attributes:
        what: was timed.
        milliseconds: it took.
        rate: in its own unit, as text.
        ratio: to what bounds it, as text.
    """

    what: str
    milliseconds: float
    rate: str
    ratio: str = ""


@dataclass(frozen=True)
class Network:
    """A network, what derives its gradients, and one batch.

    Attributes:
        function: model and parameters on the device.
        capture: its layer rules.
        batch: samples.
        starts: global index of every parameter's first element.
    """

    function: ModelFunction
    capture: Capture
    batch: ModelBatch
    starts: dict[str, int]


# --- checks -----------------------------------------------------------------------------------------------------------


def check_entries(backend: Backend, setting: Setting) -> int:
    """Compare samples of R with its definition in NumPy, bit for bit.

    Returns:
        Entries that were compared.

    Raises:
        AssertionError: if one differs.
    """
    rng = np.random.default_rng(SEED)
    near = np.concatenate([np.arange(0, 300), np.arange(2**32 - 100, 2**32 + 100), 2**33 + np.arange(50)])
    p = np.unique(np.concatenate([near, rng.integers(0, 2**40, 300)]))
    there = torch.from_numpy(p).to(setting.device)
    outers = (Outer(5, 12, 11), Outer(2**32 - 50, 9, 13))
    count = 0
    for kind in KINDS:
        for seed in (0, 2**32 + 3, 2**64 - 1):
            projection = Projection(kind, setting.dim, seed)
            if kind in SPARSE_KINDS:
                rows, signs = rows_and_signs(projection, p, outers)
                found = backend.table(projection, there, outers).cpu().numpy().astype(np.int64)
                _same(found, 2 * rows + signs, f"table of {kind}")
                count += found.size
                continue
            columns = rng.integers(0, setting.dim, 200)
            scale = setting.dim**0.5 * (8**0.5 if kind == "gaussian" else 1)
            wanted = np.rint(scale * dense_columns(projection, p, columns))
            for dtype in (torch.float32, torch.bfloat16):
                tile = backend.tile(projection, there, dtype)
                found = tile[:, torch.from_numpy(columns).to(setting.device)].double().cpu().numpy()
                _same(found, wanted, f"tile of {kind} in {dtype}")
                count += found.size
    projection, index = Projection("tensorsketch", setting.dim), np.arange(500)
    for side in (0, 1):
        rows, signs = factor_hash(projection, outers[1], side, index)
        hashes = backend.hashes(projection, outers[1], side, torch.from_numpy(index).to(setting.device))
        _same(hashes.cpu().numpy().astype(np.int64), 2 * rows + signs, "hashes of a tensor sketch")
        count += rows.size
    return count


def _same(found: np.ndarray, wanted: np.ndarray, what: str) -> None:
    if not np.array_equal(found, wanted):
        raise AssertionError(f"{what}: {int((found != wanted).sum()):,} of {wanted.size:,} entries of R differ")


def product(backend: Backend, projection: Projection, values: Tensor, start: int) -> Tensor:
    """``values`` (rows, n) of consecutive parameters times R, unscaled, (rows, dim) float64: the backend's own way."""
    assert projection.dim is not None
    p = torch.arange(start, start + values.shape[1], device=values.device)
    if projection.kind not in SPARSE_KINDS:
        return exact_product(values, backend.tile(projection, p, tile_dtype(values)), FLOAT32_PARTS).double()
    total = torch.zeros(len(values), projection.dim, dtype=torch.float64, device=values.device)
    if projection.kind != "shift" or not backend.shifted(values, start, projection, total):
        backend.scatter(values, backend.table(projection, p, ()), projection, total)
    return total


def check_products(backend: Backend, setting: Setting) -> dict[str, float]:
    """Hold Φ of a small batch against float64, and against a second run.

    Returns:
        Relative errors by kind.

    Raises:
        AssertionError: if an error is above :data:`TOLERANCE`, or two runs differ in a bit.
    """
    errors, start = {}, 2**32 - 700
    values = torch.randn(40, 1500, generator=torch.Generator().manual_seed(SEED))
    for kind in KINDS:
        projection = Projection(kind, 320, seed=5)
        # Unscaled entries are whole numbers: products of them with float64 are exact up to their own sums.
        scale = projection.nonzeros**0.5 if kind in SPARSE_KINDS else 320**0.5 * (8**0.5 if kind == "gaussian" else 1)
        r = np.rint(scale * dense_columns(projection, np.arange(start, start + 1500), np.arange(320)))
        found = [product(backend, projection, values.to(setting.device), start) for _ in range(2)]
        if not torch.equal(*found):
            raise AssertionError(f"two runs of {kind} differ")
        errors[kind] = relative_error(found[0].cpu().numpy(), values.double().numpy() @ r)
        if not errors[kind] <= TOLERANCE:
            raise AssertionError(f"Φ of {kind} is {errors[kind]:.1e} from float64, more than {TOLERANCE:.0e}")
    return errors


def check_network(backend: Backend, setting: Setting) -> float:
    """Features of two samples of the network beside those of the CPU in float64.

    Returns:
        The relative error.
    """
    projection = Projection("sjlt", setting.dim)
    found = whole_gradient_features(backend, network(setting, 2), projection, {})
    exact = replace(setting, device="cpu")
    wanted = whole_gradient_features(load_backend("numba"), network(exact, 2, "float64"), projection, {})
    return relative_error(found.cpu().numpy(), wanted.numpy())


# --- the network ------------------------------------------------------------------------------------------------------


def network(setting: Setting, samples: int, precision: str = "float32") -> Network:
    """ResNet-18 with one output on the device; in smoke size a narrow one."""
    model, inputs = build("resnet18", samples, setting.smoke)
    assert isinstance(inputs, Tensor)
    rows = OutputRows.of("logits", "trace")
    function = ModelFunction(model, choose_parameters(model, None), rows, precision, setting.device)
    batch = ModelBatch((inputs,), {}, None).to(setting.device, precision)
    structure = find_structure(function, batch)
    capture = Capture(function, structure, function.names, 1)
    return Network(function, capture, batch, parameter_starts(function))


def whole_gradient_features(
    backend: Backend, net: Network, projection: Projection, tables: dict[str, Tensor]
) -> Tensor:
    """Features of a batch from whole gradients of one parameter after another.

    Args:
        backend: what projects.
        net: network and batch.
        projection: sparse.
        tables: parts of R by parameter, which are made where they are missing and kept for the next batch.

    Returns:
        (samples, dim) float64, on the device.
    """
    assert projection.dim is not None
    captured = net.capture.run(net.batch)
    device = net.batch.args[0].device
    total = torch.zeros(len(net.batch), projection.dim, dtype=torch.float64, device=device)
    for name in net.function.names:
        if name not in tables:
            start = net.starts[name]
            p = torch.arange(start, start + net.function.sizes[name], device=device)
            tables[name] = backend.table(projection, p, ())
        values = net.capture.dense(captured, name, slice(None))[:, 0]
        backend.scatter(values, tables[name], projection, total)
    return total / projection.nonzeros**0.5


def run_features(setting: Setting, net: Network, projection: Projection) -> Callable[[], Tensor]:
    """Features of a batch as runs make them, by pieces."""
    chosen = replace(projection, backend=setting.backend)
    projector = Projector(net.function, chosen, (), (), net.capture, (), "loop", "float32")
    return lambda: projector.project(net.batch, 1)[:, 0]


# --- times ------------------------------------------------------------------------------------------------------------


class Clock:
    """Takes times, until none is left.

    Attributes:
        lines: what was found.
    """

    def __init__(self, setting: Setting) -> None:
        self._cuda = setting.device.startswith("cuda")
        self._repeats = 1 if setting.smoke else REPEATS
        self._begin = time.perf_counter()
        self.lines: list[Line] = []

    def seconds(self, work: Callable[[], object]) -> float:
        """Fastest of several runs, after one that warms up and compiles."""
        work()
        best = np.inf
        for _ in range(self._repeats):
            self._wait()
            start = time.perf_counter()
            work()
            self._wait()
            best = min(best, time.perf_counter() - start)
        return float(best)

    def _wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()

    @property
    def late(self) -> bool:
        """Whether the limit has passed."""
        return time.perf_counter() - self._begin > LIMIT_SECONDS

    def left_out(self, what: str) -> bool:
        """Whether there is no time left for something, which is noted."""
        if self.late:
            self.add(f"{what}: left out, {LIMIT_SECONDS:.0f} s have passed", np.nan, "")
        return self.late

    def add(self, what: str, seconds: float, rate: str, ratio: str = "") -> None:
        """Note a time."""
        self.lines.append(Line(what, seconds * 1e3, rate, ratio))


def time_copies(setting: Setting, clock: Clock) -> float:
    """Bytes a second of a copy within the device, read and written: what memory allows.

    Returns:
        The rate.
    """
    size = 2**20 if setting.smoke else 2**32
    source = torch.ones(size // 4, device=setting.device)
    target = torch.empty_like(source)
    seconds = clock.seconds(lambda: target.copy_(source))
    clock.add("copy on the device", seconds, f"{2 * size / seconds / 1e9:,.0f} GB/s")
    filled = clock.seconds(target.zero_)
    clock.add("fill with zeros", filled, f"{size / filled / 1e9:,.0f} GB/s")
    if setting.device.startswith("cuda"):
        host = torch.ones(size // 16, pin_memory=True)
        crossing = clock.seconds(lambda: target[: len(host)].copy_(host))
        clock.add("copy from pinned host memory", crossing, f"{size / 4 / crossing / 1e9:,.0f} GB/s")
    return 2 * size / seconds


def time_sparse(backend: Backend, setting: Setting, clock: Clock, rate: float) -> None:
    """Products of sparse kinds alone, on whole gradients that are already there."""
    values = torch.randn(setting.batch, setting.width, device=setting.device)
    total = torch.zeros(setting.batch, setting.dim, dtype=torch.float64, device=setting.device)
    p = torch.arange(setting.width, device=setting.device)
    read = clock.seconds(lambda: values.sum(1))
    once = values.numel() * values.element_size() / rate
    size = f"{setting.batch} × {setting.width:,}"
    clock.add(f"read {size} gradients once", read, _elements(values, read), f"{read / once:.1f} × bytes/copy rate")
    for kind in ("sjlt", "shift"):
        projection = Projection(kind, setting.dim)
        made = clock.seconds(lambda projection=projection: backend.table(projection, p, ()))
        clock.add(f"table of {kind}", made, f"{setting.width / made / 1e9:.2f} G parameters/s")
        table = backend.table(projection, p, ())
        fresh = clock.seconds(
            lambda table=table, projection=projection: backend.scatter(values, table.clone(), projection, total)
        )
        kept = clock.seconds(
            lambda table=table, projection=projection: backend.scatter(values, table, projection, total)
        )
        clock.add(f"scatter of {kind}, new table", fresh, _elements(values, fresh), f"{fresh / read:.1f} × read")
        clock.add(f"scatter of {kind}, kept table", kept, _elements(values, kept), f"{kept / read:.1f} × read")
    shift = Projection("shift", setting.dim)
    if backend.shifted(values[:1], 0, shift, total[:1]):
        seconds = clock.seconds(lambda: backend.shifted(values, 0, shift, total))
        clock.add("shifted product", seconds, _elements(values, seconds), f"{seconds / read:.1f} × read")


def _elements(values: Tensor, seconds: float) -> str:
    return f"{values.numel() / seconds / 1e9:.1f} G elements/s"


def time_dense(backend: Backend, setting: Setting, clock: Clock, rate: float) -> None:
    """Dense signs: made once for a span of parameters, and used for many gradients by a product."""
    projection = Projection("rademacher", setting.dim)
    p = torch.arange(setting.span, device=setting.device)
    for kind in ("rademacher", "gaussian"):
        for dtype in (torch.float32, torch.bfloat16):
            wanted = Projection(kind, setting.dim)
            seconds = clock.seconds(lambda wanted=wanted, dtype=dtype: backend.tile(wanted, p, dtype))
            size = setting.span * setting.dim * dtype.itemsize
            name = str(dtype).removeprefix("torch.")
            floor = size / rate
            clock.add(
                f"tile of {kind} in {name}",
                seconds,
                f"{size / seconds / 1e9:,.0f} GB/s",
                f"{seconds / floor:.1f} × bytes/copy rate",
            )
    for rows in setting.rows:
        values = torch.randn(rows, setting.span, device=setting.device)
        dtype = tile_dtype(values)
        tile = backend.tile(projection, p, dtype)
        signs = tile.double().cpu() if setting.smoke else tile[:, :64].double()
        exact = values.to(signs) @ signs
        low = values.to(dtype)
        alone = clock.seconds(lambda low=low, tile=tile: low @ tile)
        flops = 2 * rows * setting.span * setting.dim
        clock.add(f"product alone, {rows:,} rows", alone, f"{flops / alone / 1e12:,.1f} TFLOP/s")
        for parts in range(1, FLOAT32_PARTS + 1) if dtype == torch.bfloat16 else (FLOAT32_PARTS,):

            def project(values: Tensor = values, dtype: torch.dtype = dtype, parts: int = parts) -> Tensor:
                return exact_product(values, backend.tile(projection, p, dtype), parts)

            error = relative_error(project()[:, : exact.shape[1]].double().cpu().numpy(), exact.cpu().numpy())
            seconds = clock.seconds(project)
            clock.add(
                f"  tile and product, {parts} part(s), error {error:.0e}",
                seconds,
                f"{rows * setting.span / seconds / 1e9:.1f} G elements/s",
                f"{seconds / alone:.2f} × product",
            )


def time_network(backend: Backend, setting: Setting, clock: Clock) -> None:
    """The network from its samples to its features."""
    net, projection = network(setting, setting.batch), Projection("sjlt", setting.dim)
    parameters = sum(net.function.sizes.values())
    alone = clock.seconds(lambda: net.capture.run(net.batch))
    gradients = f"{setting.batch / alone:,.0f} gradients/s"
    clock.add(f"capture alone, {setting.batch} samples, P = {parameters:,}", alone, gradients)

    def expand() -> None:
        captured = net.capture.run(net.batch)
        for name in net.function.names:
            net.capture.dense(captured, name, slice(None))

    tables: dict[str, Tensor] = {}
    ways: list[tuple[str, Callable[[], object]]] = [
        ("capture and whole gradients", expand),
        ("  and sjlt, tables kept", lambda: whole_gradient_features(backend, net, projection, tables)),
        ("  and sjlt, tables made anew", lambda: whole_gradient_features(backend, net, projection, {})),
        ("features as runs make them, sjlt", run_features(setting, net, projection)),
        ("features as runs make them, shift", run_features(setting, net, replace(projection, kind="shift"))),
    ]
    for what, work in ways:
        if not clock.left_out(what):
            seconds = clock.seconds(work)
            clock.add(what, seconds, f"{setting.batch / seconds:,.0f} gradients/s", f"{seconds / alone:.1f} × capture")


def time_dense_network(setting: Setting, clock: Clock) -> None:
    """The same with dense signs, which are made for one batch of many samples at a time."""
    samples = setting.rows[0]
    what = f"features as runs make them, rademacher, {samples:,} samples"
    if clock.left_out(what):
        return
    net = network(setting, samples)
    seconds = clock.seconds(run_features(setting, net, Projection("rademacher", setting.dim)))
    flops = 2 * samples * sum(net.function.sizes.values()) * setting.dim
    clock.add(
        what, seconds, f"{samples / seconds:,.0f} gradients/s", f"{flops / seconds / 1e12:,.1f} TFLOP/s, one part"
    )


# --- all of it --------------------------------------------------------------------------------------------------------


@contextmanager
def float32_products() -> Iterator[None]:
    """Keep products and convolutions in float32, which torch otherwise rounds to TF32 for convolutions on CUDA."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with tf32(False):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def measure(setting: Setting) -> str:
    """Check, then measure.

    Args:
        setting: sizes and device.

    Returns:
        The table.

    Raises:
        AssertionError: if something is wrong; nothing is timed then.
    """
    backend = load_backend(setting.backend)
    name = torch.cuda.get_device_name() if setting.device.startswith("cuda") else "CPU"
    print(f"{name}, torch {torch.__version__}, backend {setting.backend}, dim {setting.dim:,}", flush=True)
    with float32_products():
        print(f"R: {check_entries(backend, setting):,} entries of {len(KINDS)} kinds as defined, bit for bit")
        errors = ", ".join(f"{kind} {error:.0e}" for kind, error in check_products(backend, setting).items())
        print(f"Φ beside float64: {errors}; two runs give the same bits")
        print(f"Φ of ResNet-18, two samples, beside float64: {check_network(backend, setting):.0e}", flush=True)
        clock = Clock(setting)
        rate = time_copies(setting, clock)
        time_sparse(backend, setting, clock, rate)
        time_network(backend, setting, clock)
        time_dense(backend, setting, clock, rate)
        time_dense_network(setting, clock)
    cells = [("what", "ms", "rate", "beside")]
    cells += [(line.what, f"{line.milliseconds:,.3f}", line.rate, line.ratio) for line in clock.lines]
    return "\n".join(aligned(cells))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or say why not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on the CPU where there is no CUDA device")
    parser.add_argument("--backend", default="auto", help="auto, cupy, torch or (on the CPU) numba")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.smoke:
        print("no CUDA device: not measured")
        return
    setting = Setting(device, backend_name(options.backend, device), options.smoke)
    print(measure(setting.small() if options.smoke else setting))


if __name__ == "__main__":
    main()
