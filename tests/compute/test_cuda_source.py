"""The CUDA kernels and their launches: run on the host through a shim, compiled for a device, and run where one is."""

import contextlib
import ctypes
import importlib
import importlib.util
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import ooc_ntk.compute.projection
from ooc_ntk.compute.projection.backends import TorchBackend
from ooc_ntk.compute.projection.entries import Outer, dense_columns, factor_hash, rows_and_signs
from ooc_ntk.planning.projection import KINDS, SPARSE_KINDS, Projection
from tests.compute.test_philox import KNOWN

SOURCE = Path(ooc_ntk.compute.projection.__file__).with_name("kernels.cu")
KERNELS = re.findall(r'extern "C" __global__ void (\w+)\(', SOURCE.read_text())
MODULE = "ooc_ntk.compute.projection.cuda"
SEEDS = [0, 2**32 - 1, 2**32 + 5, 2**64 - 1]

#: Consecutive, apart, and around 2³² and 2³³, where the words of a counter change.
INDICES = np.array([*range(70), 3000, *range(2**32 - 40, 2**32 + 40), 2**33 - 1, 2**33, 2**40 + 7], dtype=np.int64)

#: Weights among them, one of which begins above 2³².
OUTERS = (Outer(3, 6, 7), Outer(2**32 - 10, 5, 3), Outer(2**32 + 6, 4, 9))

#: Blocks of odd and of many rows, a single and 32 non-zeros, dims that are no multiple of 128, 8 or 4.
SPARSE = [
    Projection("sjlt", 36),
    Projection("sjlt", 35, nonzeros=5),
    Projection("sjlt", 2**17, nonzeros=2),
    Projection("shift", 28),
    Projection("shift", 37, nonzeros=1),
    Projection("shift", 32 * 5),
    Projection("shift", 32 * 5, nonzeros=32),
    Projection("shift", 4096),
    Projection("tensorsketch", 21, nonzeros=3),
    Projection("tensorsketch", 32 * 5),
]
DENSE = [Projection(kind, dim) for kind in ("rademacher", "gaussian") for dim in (3, 7, 128, 300, 301, 1030, 1280)]


def seeded(projection, seed):
    return Projection(projection.kind, projection.dim, seed, projection.nonzeros)


def named(projection):
    return f"{projection.text}/{projection.nonzeros}"


# --- kernels on the host ---------------------------------------------------------------------------------------------


class HostKernels:
    """Kernels as a library for the host, called as CuPy's are."""

    def __init__(self, library):
        self.library = library

    def get_function(self, name):
        def run(grid, threads, arguments):
            holders = [
                ctypes.c_void_p(each.data_ptr())
                if isinstance(each, torch.Tensor)
                else np.ctypeslib.as_ctypes_type(each.dtype)(each.item())
                for each in arguments
            ]
            count = len(holders)
            pointers = (ctypes.c_void_p * count)(*(ctypes.addressof(holder) for holder in holders))
            sizes = (ctypes.c_uint * count)(*(ctypes.sizeof(holder) for holder in holders))
            pair = ctypes.c_uint * 2
            wrong = getattr(self.library, f"run_{name}")(pair(*grid), pair(*threads), pointers, sizes, count)
            assert wrong != 1, f"arguments of {name} are not those that it declares"
            assert wrong != 2, f"{name} writes several columns where memory does not allow it"

        return run


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    compiler = next(filter(None, map(shutil.which, ("g++", "c++", "clang++"))), None)
    if compiler is None:
        pytest.skip("no C++ compiler: the CUDA source is not run on the host")
    folder = tmp_path_factory.mktemp("kernels")
    exports = "\n".join(f"EXPORT({name})" for name in KERNELS)
    shim = Path(__file__).with_name("host_shim.hpp")
    (folder / "host.cpp").write_text(f'#include "{shim}"\n#include "{SOURCE}"\n{exports}\n')
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "host.cpp", "-o", "host.so"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return HostKernels(ctypes.CDLL(str(folder / "host.so")))


@pytest.fixture
def on_host(host, monkeypatch):
    """The backend's module with a stand-in for CuPy, which hands it the kernels of the host."""
    cupy = types.ModuleType("cupy")
    cupy.from_dlpack = lambda tensor: tensor
    cupy.RawModule = lambda code, options: host
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, MODULE, cupy)  # so that the module made here is gone afterwards
    del sys.modules[MODULE]
    module = importlib.import_module(MODULE)
    monkeypatch.setattr(module, "_on_stream", lambda device: contextlib.nullcontext())
    return module


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def made(request):
    """The backend and its device, on the host and, where there is one, on a CUDA device."""
    if request.param == "host":
        return request.getfixturevalue("on_host").CupyBackend(), "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("CuPy is not installed")
    return importlib.import_module(MODULE).CupyBackend(), "cuda"


def test_the_source_names_its_kernels():
    assert {"philox_words", "sjlt_table", "scatter_sorted_f32", "shift_multiply_f64"} <= set(KERNELS)
    assert len(KERNELS) == len(set(KERNELS)) == SOURCE.read_text().count('extern "C"')


def test_known_answers(host):
    for counter, key, words in KNOWN:
        counters = torch.tensor([(0, 0, 0, 0), counter]).to(torch.int32)  # the bits are those of unsigned words
        out = torch.zeros(2, 4, dtype=torch.int32)
        arguments = counters, np.int64(2), np.uint32(key[0]), np.uint32(key[1]), out
        host.get_function("philox_words")((1, 1), (3, 1), arguments)
        assert tuple(int(word) % 2**32 for word in out[1]) == words


# --- entries of R ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("projection", SPARSE, ids=named)
def test_tables(projection, seed, made):
    backend, device = made
    projection = seeded(projection, seed)
    rows, signs = rows_and_signs(projection, INDICES, OUTERS)
    found = backend.table(projection, torch.from_numpy(INDICES).to(device), OUTERS).cpu().numpy()
    np.testing.assert_array_equal(found, 2 * rows + signs)


def test_tables_of_sums(made):
    """``start + outer[i] + inner[j]``, above 2³²."""
    backend, device = made
    projection = Projection("sjlt", 36, seed=3)
    outer, inner = torch.tensor([0, 100, 2**33]), torch.tensor([1, 5, 7])
    p = (2**32 - 3 + outer[:, None] + inner).reshape(-1)
    found = backend.table_at(projection, 2**32 - 3, outer.to(device), inner.to(device), ())
    torch.testing.assert_close(found.cpu(), TorchBackend().table(projection, p, ()), rtol=0, atol=0)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("outer", OUTERS)
def test_hashes(outer, seed, side, made):
    backend, device = made
    projection, index = Projection("tensorsketch", 32 * 5, seed), np.array([0, 1, 5, 2**31, 2**32 - 1])
    rows, signs = factor_hash(projection, outer, side, index)
    found = backend.hashes(projection, outer, side, torch.from_numpy(index).to(device)).cpu().numpy()
    np.testing.assert_array_equal(found, 2 * rows + signs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("projection", DENSE, ids=named)
def test_tiles(projection, dtype, made):
    backend, device = made
    for seed in SEEDS:
        projection = seeded(projection, seed)
        scale = projection.dim**0.5 * (8**0.5 if projection.kind == "gaussian" else 1)
        wanted = np.rint(scale * dense_columns(projection, INDICES, np.arange(projection.dim)))
        found = backend.tile(projection, torch.from_numpy(INDICES).to(device), dtype)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found.double().cpu().numpy(), wanted)


@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("dim", [96, 130, 131, 135])
@pytest.mark.parametrize("kind", ["sign", "gaussian"])
@pytest.mark.parametrize("suffix", ["f32", "bf16"])
def test_tiles_leave_other_memory_alone(kind, suffix, dim, shift, host):
    """Wherever the output begins: several columns are written at once only where memory allows it."""
    item, n = torch.float32 if suffix == "f32" else torch.int16, 5
    projection = Projection("rademacher" if kind == "sign" else "gaussian", dim, seed=5)
    p = torch.arange(2**32 - 2, 2**32 + 3)
    wanted = TorchBackend().tile(projection, p, torch.float32)
    if suffix == "bf16":
        wanted = wanted.bfloat16().view(torch.int16)
    memory = torch.full((16 + n * dim + 16,), 99, dtype=item)
    out = memory[16 + shift : 16 + shift + n * dim]
    arguments = p, np.int64(n), np.int64(dim), np.uint32(5), np.uint32(0), out
    host.get_function(f"{kind}_tile_{suffix}")((2, 1), (3, 2), arguments)
    assert torch.equal(out.view(n, dim), wanted)
    assert (memory[: 16 + shift] == 99).all()
    assert (memory[16 + shift + n * dim :] == 99).all()


# --- products --------------------------------------------------------------------------------------------------------


def strided(rows, columns, dtype, device, fill):
    """A matrix whose rows are further apart than they are wide."""
    whole = torch.zeros(rows, columns + 5, dtype=dtype, device=device)
    whole[:, 2 : columns + 2] = fill
    return whole[:, 2 : columns + 2]


def assert_product(found, values, projection, p, outers=()):
    """``values`` times R, unscaled, on top of ones."""
    r = dense_columns(projection, p, np.arange(projection.dim), outers) * projection.nonzeros**0.5
    tolerance = 1e-13 if values.dtype == torch.float64 else 1e-5
    wanted = 1 + values.double().cpu().numpy() @ r
    np.testing.assert_allclose(found.cpu().numpy(), wanted, rtol=0, atol=tolerance * len(p) ** 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("projection", [each for each in SPARSE if each.dim < 5000], ids=named)
def test_scatter(projection, rows, dtype, made):
    backend, device = made
    p = np.arange(2**32 - 400, 2**32 + 400) if projection.dim > 100 else INDICES
    values = strided(rows, len(p), dtype, device, torch.randn(rows, len(p)).to(device, dtype))
    total = strided(rows, projection.dim, torch.float64, device, 1.0)
    table = backend.table(projection, torch.from_numpy(p).to(device), OUTERS)
    backend.scatter(values, table, projection, total)
    assert_product(total, values, projection, p, OUTERS)

    again = torch.ones(rows, projection.dim, dtype=torch.float64, device=device)
    backend.scatter(values, table.clone(), projection, again)
    assert torch.equal(total, again)


def test_scatter_of_nothing(made):
    backend, device = made
    projection, total = Projection("sjlt", 36), torch.ones(2, 36, dtype=torch.float64, device=device)
    table = backend.table(projection, torch.zeros(0, dtype=torch.int64, device=device), ())
    backend.scatter(torch.zeros(2, 0, device=device), table, projection, total)
    assert backend.shifted(torch.zeros(2, 0, device=device), 5, Projection("shift", 36), total)
    assert (total == 1).all()


def test_orders_are_kept_as_long_as_their_tables(made):
    backend, device = made
    projection, total = Projection("sjlt", 36), torch.zeros(1, 36, dtype=torch.float64, device=device)
    table = backend.table(projection, torch.arange(50, device=device), ())
    for _ in range(2):
        backend.scatter(torch.ones(1, 50, device=device), table, projection, total)
        assert len(backend._sorted) == 1
    del table
    assert len(backend._sorted) == 0


def test_sums_have_the_same_bits_for_any_launch(on_host, monkeypatch):
    """Threads of a block, few blocks that go round, rows transposed in parts or not: each sum keeps its one order."""
    backend, p = on_host.CupyBackend(), torch.arange(2**32 - 300, 2**32 + 300)
    values = torch.randn(37, len(p))

    def both():
        found = []
        for kind in ("sjlt", "shift"):
            projection = Projection(kind, 140, seed=1)
            total = torch.zeros(37, 140, dtype=torch.float64)
            if kind == "sjlt":
                backend.scatter(values, backend.table(projection, p, ()), projection, total)
            else:
                assert backend.shifted(values, 2**32 - 300, projection, total)
            found.append(total)
        return torch.stack(found)

    wanted = both()
    for name, value in (
        ("_TRANSPOSED_ROWS", 1000),
        ("_THREADS", 64),
        ("_MOST_BLOCKS", 2),
        ("_TRANSPOSED_ROWS", 2),
        ("_TRANSPOSED_BYTES", 1),
    ):
        monkeypatch.setattr(on_host, name, value)
        assert torch.equal(both(), wanted), (name, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize(("start", "n"), [(0, 5), (0, 500), (13, 1), (13, 400), (2**32 - 200, 333), (2**33, 64)])
@pytest.mark.parametrize("projection", [each for each in SPARSE if each.kind == "shift"], ids=named)
def test_shifted(projection, start, n, rows, dtype, made):
    backend, device = made
    projection = seeded(projection, 2**32 + 5)
    values = strided(rows, n, dtype, device, torch.randn(rows, n).to(device, dtype))
    total = strided(rows, projection.dim, torch.float64, device, 1.0)
    assert backend.shifted(values, start, projection, total)
    assert_product(total, values, projection, np.arange(start, start + n))

    again = torch.ones(rows, projection.dim, dtype=torch.float64, device=device)
    backend.shifted(values, start, projection, again)
    assert torch.equal(total, again)


@pytest.mark.parametrize("rows", [1, 6])
def test_products_leave_other_memory_alone(rows, made):
    """Not even zero is added beside the rows that are asked for: it would turn a negative zero positive."""
    backend, device = made
    whole = torch.full((rows + 4, 36), -0.0, dtype=torch.float64, device=device)
    values = torch.randn(rows, 100, device=device)
    table = backend.table(Projection("sjlt", 36), torch.arange(100, device=device), ())
    backend.scatter(values, table, Projection("sjlt", 36), whole[:rows])
    backend.shifted(values, 3, Projection("shift", 36), whole[:rows])
    assert torch.signbit(whole[rows:]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_torch_backend_gives_the_same(kind, made):
    backend, device = made
    projection, p, values = (
        Projection(kind, 320, seed=2**40 + 1),
        torch.from_numpy(INDICES),
        torch.randn(4, len(INDICES)),
    )
    if kind not in SPARSE_KINDS:
        for dtype in (torch.float32, torch.bfloat16):
            found = backend.tile(projection, p.to(device), dtype).cpu()
            assert torch.equal(found, TorchBackend().tile(projection, p, dtype))
        return
    for sparse in (projection, Projection(kind, 2**17, nonzeros=2)):  # the second: rows that need over 16 bits
        found = torch.zeros(4, sparse.dim, dtype=torch.float64, device=device)
        backend.scatter(values.to(device), backend.table(sparse, p.to(device), OUTERS), sparse, found)
        wanted = torch.zeros(4, sparse.dim, dtype=torch.float64)
        TorchBackend().scatter(values, TorchBackend().table(sparse, p, OUTERS), sparse, wanted)
        torch.testing.assert_close(found.cpu(), wanted, rtol=0, atol=1e-5)


# --- compiled for a device -------------------------------------------------------------------------------------------


def test_nvrtc_compiles_the_source():
    """With the options of CuPy's ``RawModule``, but for an architecture by name, which needs no device."""
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("CuPy is not installed: NVRTC does not compile the CUDA source")
    nvrtc = importlib.import_module("cupy.cuda").nvrtc
    try:
        nvrtc.getVersion()
    except RuntimeError as error:
        pytest.skip(f"CuPy finds no NVRTC: {error}")
    program = nvrtc.createProgram(SOURCE.read_text(), "kernels.cu", (), ())
    options = ("--std=c++17", "--device-as-default-execution-space", "-arch=sm_90")
    try:
        nvrtc.compileProgram(program, options)
    except nvrtc.NVRTCError:
        pytest.fail(nvrtc.getProgramLog(program))
    assert_kernels(nvrtc.getCUBIN(program))


def test_nvcc_compiles_the_source(tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc: it does not compile the CUDA source")
    command = [
        "nvcc",
        "-std=c++17",
        "-arch=sm_90",
        "-cubin",
        "-Werror=all-warnings",
        str(SOURCE),
        "-o",
        "kernels.cubin",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_kernels((tmp_path / "kernels.cubin").read_bytes())


def assert_kernels(cubin):
    assert cubin.startswith(b"\x7fELF")
    for name in KERNELS:
        assert b".text." + name.encode() + b"\0" in cubin
