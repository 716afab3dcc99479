"""R by its formulas, every backend bit for bit, and sketches of any cut of the gradients."""

import dataclasses
import functools
import importlib.util
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ooc_ntk.compute.gradients import GradientPiece, contiguous_pieces
from ooc_ntk.compute.projection import backends
from ooc_ntk.compute.projection.backends import TorchBackend, backend_name, load_backend
from ooc_ntk.compute.projection.entries import Outer, dense_columns, factor_hash, rows_and_signs
from ooc_ntk.compute.projection.sketch import Sketch
from ooc_ntk.errors import InputError
from ooc_ntk.planning.memory import DEVICE_CHUNKS, HOST_CHUNKS
from ooc_ntk.planning.projection import KINDS, SPARSE_KINDS, Projection
from tests.compute.test_philox import plain_philox

DENSE_KINDS = ("rademacher", "gaussian")
LOCAL = ["torch", "numba"] if importlib.util.find_spec("numba") else ["torch"]
SEEDS = [0, 7, 2**32 - 1, 2**32 + 5, 2**64 - 1]

#: Sizes that are no multiple of 128, of 4 or of a power of two; blocks of odd sizes.
PROJECTIONS = [
    Projection("sjlt", 36),
    Projection("sjlt", 35, nonzeros=5),
    Projection("shift", 28),
    Projection("shift", 32 * 5, nonzeros=32),
    Projection("rademacher", 300),
    Projection("rademacher", 3),
    Projection("gaussian", 7),
    Projection("gaussian", 130),
    Projection("tensorsketch", 21, nonzeros=3),
    Projection("tensorsketch", 32 * 4),
]

#: Around 0, 2³² and 2³³, where the words of a counter change.
INDICES = [0, 1, 2, 5, 63, 2**32 - 2, 2**32 - 1, 2**32, 2**32 + 3, 2**33 - 1, 2**33, 2**33 + 1]

#: Weights with elements among them, of which one begins above 2³².
OUTERS = (Outer(1, 3, 7), Outer(2**32 - 1, 2, 3), Outer(2**33, 5, 4))


def named(projection):
    return f"{projection.text}/{projection.nonzeros}"


def seeded(projection, seed):
    return Projection(projection.kind, projection.dim, seed, projection.nonzeros)


@pytest.fixture
def threads():
    """Puts back how many threads torch uses."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# --- the definition, number by number --------------------------------------------------------------------------------


@functools.cache
def words(seed, counter):
    return plain_philox(counter, (seed % 2**32, seed // 2**32))


def sparse_entry(projection, p, j, outers):
    """Row within block j and sign of parameter p, in whole numbers."""
    seed, block = projection.seed, projection.dim // projection.nonzeros
    counter = p % 2**32, p // 2**32
    if projection.kind == "shift":
        of_block = p // block
        shift = words(seed, (of_block % 2**32, of_block // 2**32, j, 3))[0] * block // 2**32
        bits = words(seed, (*counter, 0, 4))[0]
        return (p + shift) % block, -1 if bits // 2**j % 2 else 1
    for outer in outers if projection.kind == "tensorsketch" else ():
        if outer.start <= p < outer.start + outer.outputs * outer.inputs:
            output, given_input = divmod(p - outer.start, outer.inputs)
            row, sign = 0, 1
            for side, index in enumerate((output, given_input)):
                purpose = 5 + 256 * (outer.start // 2**32)
                found = words(seed, (index, outer.start % 2**32, 2 * j + side, purpose))
                row += found[0] * block // 2**32
                sign *= -1 if found[1] % 2 else 1
            return row % block, sign
    found = words(seed, (*counter, j, 1))
    return found[0] * block // 2**32, -1 if found[1] % 2 else 1


def entry(projection, p, column, outers=()):
    """One entry of R by DESIGN §9, unscaled."""
    seed, counter = projection.seed, (p % 2**32, p // 2**32)
    if projection.kind == "rademacher":
        word = words(seed, (*counter, column // 128, 0))[column // 32 % 4]
        return -1 if word // 2 ** (column % 32) % 2 else 1
    if projection.kind == "gaussian":
        return bin(words(seed, (*counter, column // 4, 2))[column % 4]).count("1") - 16
    j, row = divmod(column, projection.dim // projection.nonzeros)
    place, sign = sparse_entry(projection, p, j, outers)
    return sign if place == row else 0


def scale(projection):
    """What unscaled entries are divided by."""
    if projection.kind in SPARSE_KINDS:
        return projection.nonzeros**0.5
    return projection.dim**0.5 * (8**0.5 if projection.kind == "gaussian" else 1)


def matrix(projection, p, outers=()):
    """Entries of R, unscaled, by :mod:`~ooc_ntk.compute.projection.entries`: (n, dim) float64 whole numbers."""
    found = dense_columns(projection, np.asarray(p, dtype=np.int64), np.arange(projection.dim), outers)
    return np.rint(found * scale(projection))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("projection", PROJECTIONS, ids=named)
def test_entries_by_their_formulas(projection, seed):
    projection = seeded(projection, seed)
    wanted = np.array([[entry(projection, p, c, OUTERS) for c in range(projection.dim)] for p in INDICES], dtype=float)
    columns = np.arange(projection.dim)
    found = dense_columns(projection, np.array(INDICES), columns, OUTERS)
    np.testing.assert_allclose(found, wanted / scale(projection), rtol=1e-15, atol=0)
    by_torch = dense_columns(projection, torch.tensor(INDICES), torch.from_numpy(columns), OUTERS)
    np.testing.assert_array_equal(by_torch.numpy(), found)
    some = np.array([projection.dim - 1, 0])
    np.testing.assert_array_equal(dense_columns(projection, np.array(INDICES), some, OUTERS), found[:, some])


@pytest.mark.parametrize("projection", [each for each in PROJECTIONS if each.kind in SPARSE_KINDS], ids=named)
def test_sparse_kinds_have_one_non_zero_in_each_block(projection):
    found = matrix(projection, [*range(500), *INDICES], OUTERS)
    assert set(np.unique(found)) == {-1, 0, 1}
    blocks = found.reshape(len(found), projection.nonzeros, projection.block)
    assert (np.count_nonzero(blocks, axis=2) == 1).all()
    assert np.count_nonzero(blocks, axis=(0, 1)).all(), "every row of a block is used"


@pytest.mark.parametrize("projection", [each for each in PROJECTIONS if each.dim > 4], ids=named)
def test_rows_of_r_have_length_one(projection):
    """And different ones have nothing in common but by chance: 1/√dim."""
    p = np.arange(400)
    rows = dense_columns(projection, p, np.arange(projection.dim), (Outer(100, 10, 20),))
    gram = rows @ rows.T
    if projection.kind == "gaussian":
        assert gram.diagonal().mean() == pytest.approx(1, abs=0.05)
    else:
        np.testing.assert_allclose(gram.diagonal(), 1, rtol=1e-12)
    others = gram[~np.eye(len(p), dtype=bool)]
    assert abs(others.mean()) < 0.02
    assert np.square(others).mean() == pytest.approx(1 / projection.dim, rel=0.1)


def test_r_depends_on_the_whole_seed_and_the_whole_index():
    for projection in PROJECTIONS:
        if projection.dim < 20:
            continue
        found = [matrix(seeded(projection, seed), range(40), OUTERS) for seed in (0, 1, 2**32)]
        assert all((a != b).any() for a, b in ((found[0], found[1]), (found[0], found[2]), (found[1], found[2])))
        assert (matrix(projection, np.arange(40) + 2**32) != matrix(projection, np.arange(40))).any()


# --- backends give the same bits -------------------------------------------------------------------------------------


def twice_and_sign(found):
    rows, signs = found
    return 2 * np.asarray(rows) + np.asarray(signs)


#: More parameters than one thread makes at a time; an order of no kind; around the words' edges.
LISTS = {
    "many": torch.arange(9000),
    "mixed": torch.tensor([*INDICES, 3, 3, 0, 2**33 + 7]),
    "high": torch.arange(2**32 - 50, 2**32 + 5000),
    "one": torch.tensor([2**32 + 1]),
    "strided": torch.arange(200)[::3],
}


@pytest.mark.parametrize("numbers", LISTS)
@pytest.mark.parametrize("seed", [7, 2**32 + 5])
@pytest.mark.parametrize("name", LOCAL)
@pytest.mark.parametrize(
    "projection",
    [
        *(each for each in PROJECTIONS if each.kind in SPARSE_KINDS),
        Projection("sjlt", 4 * 2**15),
        Projection("sjlt", 4 * 40_000),
        Projection("shift", 4 * 40_000),
        Projection("tensorsketch", 2 * 40_000, nonzeros=2),
    ],
    ids=named,
)
def test_tables(projection, name, seed, numbers):
    projection, p = seeded(projection, seed), LISTS[numbers]
    found = load_backend(name).table(projection, p, OUTERS)
    assert not found.dtype.is_floating_point
    wanted = twice_and_sign(rows_and_signs(projection, p.numpy(), OUTERS))
    np.testing.assert_array_equal(found.numpy().astype(np.int64), wanted)


@pytest.mark.parametrize("start", [0, 1, 2**32 - 40, 2**33 + 2**32])
@pytest.mark.parametrize("projection", [each for each in PROJECTIONS if each.kind in SPARSE_KINDS], ids=named)
@pytest.mark.parametrize("name", LOCAL)
def test_tables_of_summed_places(name, projection, start):
    """Of outputs and inputs apart, inputs running fastest; both in any order, the inner ones of any size."""
    outer = torch.tensor([60, 0, 30, 2**32])
    for inner in (torch.tensor([0]), torch.tensor([7, 3, 3, 29, 2**32 - 1]), torch.tensor([5, 2**32, 2**33])):
        p = (start + outer[:, None] + inner).reshape(-1)
        found = load_backend(name).table_at(projection, start, outer, inner, OUTERS)
        wanted = twice_and_sign(rows_and_signs(projection, p.numpy(), OUTERS))
        np.testing.assert_array_equal(found.numpy().astype(np.int64), wanted)


@pytest.mark.parametrize("name", LOCAL)
@pytest.mark.parametrize("seed", [7, 2**32 + 5])
@pytest.mark.parametrize("dim", [21, 3 * 40_000])
def test_hashes(dim, seed, name):
    projection = Projection("tensorsketch", dim, seed, nonzeros=3)
    for outer in (*OUTERS, Outer(2**33 + 2**32 + 9, 5, 5)):
        for side in (0, 1):
            index = torch.arange(50)
            found = load_backend(name).hashes(projection, outer, side, index).numpy().astype(np.int64)
            np.testing.assert_array_equal(found, twice_and_sign(factor_hash(projection, outer, side, index.numpy())))
            for i in (0, 3, 49):
                for j in range(3):
                    purpose = 5 + 256 * (outer.start // 2**32)
                    word = words(seed, (i, outer.start % 2**32, 2 * j + side, purpose))
                    assert found[j, i] == 2 * (word[0] * (dim // 3) // 2**32) + word[1] % 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [1, 3, 5, 31, 127, 128, 129, 258])
@pytest.mark.parametrize("kind", DENSE_KINDS)
@pytest.mark.parametrize("name", LOCAL)
def test_tiles(name, kind, dim, dtype, monkeypatch):
    """In torch also where a part of them is made at a time."""
    monkeypatch.setattr(backends, "TORCH_WORDS", 5 * dim + 1)
    projection, p = Projection(kind, dim, seed=2**32 + 3), LISTS["mixed"]
    found = load_backend(name).tile(projection, p, dtype)
    assert (found.dtype, tuple(found.shape)) == (dtype, (len(p), dim))
    np.testing.assert_array_equal(found.double().numpy(), matrix(projection, p))


@pytest.mark.parametrize("name", LOCAL)
def test_a_tile_after_a_larger_one(name):
    backend, p = load_backend(name), torch.arange(10, 17)
    backend.tile(Projection("rademacher", 300), torch.arange(20), torch.float32)
    projection = Projection("gaussian", 9)
    np.testing.assert_array_equal(backend.tile(projection, p, torch.float32).numpy(), matrix(projection, p))


# --- products --------------------------------------------------------------------------------------------------------


def spread_out(rows, columns, dtype=torch.float32):
    """A matrix in the middle of a larger one, with every second of its rows, and the larger one."""
    whole = torch.randn(2 * rows + 1, columns + 11).to(dtype)
    return whole[1 : 2 * rows + 1 : 2, 4 : 4 + columns], whole


def agrees(found, values, r, dtype):
    """A product within rounding: as many roundings as there are terms, of their absolute sum."""
    exact = values.double().numpy() @ r
    size = np.abs(values.double().numpy()) @ np.abs(r)
    bound = torch.finfo(dtype).eps * max(4.0, np.count_nonzero(r, axis=0).max() ** 0.5)
    assert (np.abs(found - exact) <= bound * size + 1e-300).all()


#: Both ways to scatter: fewer parameters than half a block, and more.
SIZES = [(1, 4 * 64), (5, 4 * 64), (31, 4 * 64), (32, 4 * 64), (2000, 4 * 9), (3000, 4 * 64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("parameters", "dim"), SIZES)
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("kind", SPARSE_KINDS)
@pytest.mark.parametrize("name", LOCAL)
def test_scattering(name, kind, rows, parameters, dim, dtype):
    """Values and totals are views, what is around them is left alone, and what is there is added to."""
    projection = Projection(kind, dim, seed=3, nonzeros=4)
    backend, outers = load_backend(name), (Outer(7, 3, 5),)
    p = torch.randperm(2 * parameters)[:parameters] + 2**32 * (torch.arange(parameters) % 2)
    values, _ = spread_out(rows, parameters, dtype)
    total, around = spread_out(rows, dim, torch.float64)
    before, start = around.clone(), total.clone()
    backend.scatter(values, backend.table(projection, p, outers), projection, total)
    agrees((total - start).numpy(), values, matrix(projection, p, outers), dtype)
    total.copy_(start)
    assert torch.equal(around, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("start", [0, 5, 64, 2**32 - 100, 2**33 + 1])
@pytest.mark.parametrize(("parameters", "dim"), [(1, 28), (3, 28), (40, 4 * 64), (200, 4 * 64), (500, 28)])
@pytest.mark.parametrize("rows", [1, 3])
def test_shifted_runs(rows, parameters, dim, start, dtype):
    pytest.importorskip("numba")
    projection, backend = Projection("shift", dim, seed=9), load_backend("numba")
    for _ in range(2):  # made, and kept
        values, _ = spread_out(rows, parameters, dtype)
        total, around = spread_out(rows, dim, torch.float64)
        before, first = around.clone(), total.clone()
        assert backend.shifted(values, start, projection, total)
        agrees((total - first).numpy(), values, matrix(projection, np.arange(start, start + parameters)), dtype)
        total.copy_(first)
        assert torch.equal(around, before)


def test_runs_that_are_kept_are_given_up_when_there_are_many(monkeypatch):
    compiled = pytest.importorskip("ooc_ntk.compute.projection.compiled", exc_type=ImportError)
    monkeypatch.setattr(compiled, "KEPT_SIGNS_BYTES", 2000)
    backend, projection = compiled.NumbaBackend(), Projection("shift", 28)
    for start in (0, 100, 200, 0, 300, 100):
        values, total = torch.randn(2, 50), torch.zeros(2, 28, dtype=torch.float64)
        backend.shifted(values, start, projection, total)
        agrees(total.numpy(), values, matrix(projection, np.arange(start, start + 50)), torch.float32)
    assert len(backend._known_runs) < 4


def test_torch_cannot_shift():
    total = torch.zeros(2, 28, dtype=torch.float64)
    assert not TorchBackend().shifted(torch.randn(2, 9), 0, Projection("shift", 28), total)
    assert not total.any()


# --- sketches --------------------------------------------------------------------------------------------------------

SAMPLES, ROWS, NUMEL, START = 3, 2, 700, 2**32 - 300

#: Sketches of one parameter: by kind, of a size that is not a power of two.
SKETCHED = {
    "sjlt": Projection("sjlt", 60, seed=4),
    "shift": Projection("shift", 60, seed=4),
    "rademacher": Projection("rademacher", 60, seed=4),
    "gaussian": Projection("gaussian", 59, seed=4),
    "tensorsketch": Projection("tensorsketch", 60, seed=4, nonzeros=6),
}
WEIGHT = Outer(START + 40, 12, 25)


def gradients(samples=SAMPLES, rows=ROWS, numel=NUMEL, seed=0):
    return torch.randn(samples, rows, numel, generator=torch.Generator().manual_seed(seed))


def sketch_of(projection, name, starts=None, outers=None, **options):
    outers = outers if outers is not None else ({"w": WEIGHT} if projection.kind == "tensorsketch" else {})
    return Sketch(projection, starts or {"w": START}, load_backend(name), outers, **options)


def sketched(sketch, pieces, samples=SAMPLES, rows=ROWS):
    sketch.begin(samples, rows)
    sketch.add("w", pieces)
    return sketch.result()


def error(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LOCAL)
def test_a_sketch_is_the_gradients_times_r(name, kind):
    projection, values = SKETCHED[kind], gradients()
    found = sketched(sketch_of(projection, name), contiguous_pieces(values, slice(0, SAMPLES)))
    r = dense_columns(
        projection, np.arange(START, START + NUMEL), np.arange(projection.dim), (WEIGHT,)
    )  # those of a weight that is sketched from its factors count for one kind only
    assert found.dtype == torch.float64
    assert error(found, torch.from_numpy(values.double().numpy() @ r)) < 1e-6


def piece_of(samples, rows, values, places, key=None, start=None):
    """A piece whose places are sums of nothing."""
    return GradientPiece(samples, rows, values, places, torch.zeros(1, dtype=torch.int64), key, start)


def cut_pieces(values, columns, rows, samples, order, keyed):
    """Gradients cut into pieces at some places, in some order; columns that follow each other or not."""
    cuts = zip(values.shape, (samples, rows, columns), strict=True)
    edges = [sorted({0, length, *(cut % length for cut in each)}) for length, each in cuts]
    slices = [[slice(a, b) for a, b in itertools.pairwise(each)] for each in edges]
    # Rows last, as they come from rules: consecutive pieces have the same part of R.
    pieces = [(s, r, c) for c in slices[2] for s in slices[0] for r in slices[1]]
    if order is not None:
        order.shuffle(pieces)
    for number, (s, r, c) in enumerate(pieces):
        part, place = values[s, r, c], torch.arange(c.start, c.stop)
        if number % 3 == 2:  # the other way round, which no start describes
            yield piece_of(s, r, part.flip(2), place.flip(0))
        elif keyed:
            yield piece_of(s, r, part, place, (c.start, c.stop), c.start)
        else:
            yield piece_of(s, r, part, place)


@settings(max_examples=30, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    name=st.sampled_from(LOCAL),
    columns=st.lists(st.integers(0, NUMEL - 1), max_size=8),
    rows=st.lists(st.integers(0, ROWS - 1), max_size=2),
    samples=st.lists(st.integers(0, SAMPLES - 1), max_size=2),
    order=st.none() | st.randoms(use_true_random=False),
    keyed=st.booleans(),
    tile_bytes=st.sampled_from([1, 60 * 4 * 13, 2**25]),
)
def test_any_cut_into_pieces_gives_the_same(kind, name, columns, rows, samples, order, keyed, tile_bytes):
    projection, values = SKETCHED[kind], gradients()
    whole = sketched(sketch_of(projection, name), contiguous_pieces(values, slice(0, SAMPLES)))
    chunks = dataclasses.replace(HOST_CHUNKS, tile_bytes=tile_bytes)
    found = sketched(
        sketch_of(projection, name, chunks=chunks), cut_pieces(values, columns, rows, samples, order, keyed)
    )
    assert error(found, whole) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LOCAL)
def test_rows_that_come_one_after_the_other(name, kind):
    """Whole gradients of some rows at a time, counted over samples."""
    values = gradients()
    whole = sketched(sketch_of(SKETCHED[kind], name), contiguous_pieces(values, slice(0, SAMPLES)))
    sketch = sketch_of(SKETCHED[kind], name, heavy=[START + 3, START + 698])
    sketch.begin(SAMPLES, ROWS)
    flat, position = values.flatten(0, 1), 0
    for count in (1, 3, 2):
        sketch.add_rows("w", position, flat[position : position + count])
        position += count
    assert torch.equal(sketch.heavy, values[:, :, [3, 698]].double())
    assert error(sketch.result(), whole) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LOCAL)
def test_a_sketch_is_begun_at_zero(name, kind):
    sketch = sketch_of(SKETCHED[kind], name, heavy=[START])
    first = sketched(sketch, contiguous_pieces(gradients(), slice(0, SAMPLES)))
    kept = first.clone()
    second = sketched(sketch, contiguous_pieces(gradients(2, seed=1), slice(0, 2)), samples=2)
    assert torch.equal(first, kept), "a result is not written over"
    alone = sketched(sketch_of(SKETCHED[kind], name), contiguous_pieces(gradients(2, seed=1), slice(0, 2)), samples=2)
    assert torch.equal(second, alone)
    assert tuple(sketch.heavy.shape) == (2, ROWS, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LOCAL)
def test_parts_of_r_that_are_kept_give_the_same_bits(name, kind):
    """Over pieces and batches, of two parameters whose pieces have the same names."""
    found = []
    for keyed in (False, True):
        sketch = sketch_of(SKETCHED[kind], name, {"w": START, "v": START + NUMEL}, heavy=[START + 9, START + 709])
        for batch in range(3):
            sketch.begin(SAMPLES, ROWS)
            for parameter in ("w", "v"):
                for piece in cut_pieces(gradients(seed=batch), [100, 400], [1], [], None, keyed=keyed):
                    sketch.add(parameter, [dataclasses.replace(piece, start=None)])
            found.append(torch.cat([sketch.heavy, sketch.result()], 2))
    assert all(torch.equal(a, b) for a, b in zip(found[:3], found[3:], strict=True))
    both = torch.cat([gradients(seed=2)] * 2, 2)
    whole = sketched(sketch_of(SKETCHED[kind], name), contiguous_pieces(both, slice(0, SAMPLES)))
    assert torch.equal(found[2][:, :, :2], both[:, :, [9, 709]].double())
    assert error(found[2][:, :, 2:], whole) < 1e-6


class Counting:
    """A backend that counts the parameters whose part of a sparse R it makes."""

    def __init__(self, backend):
        self._backend, self.made = backend, 0

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def table_at(self, projection, start, outer, inner, outers):
        self.made += len(outer) * len(inner)
        return self._backend.table_at(projection, start, outer, inner, outers)


@pytest.mark.parametrize("room", [0, 1, 2], ids=["none", "some", "all"])
@pytest.mark.parametrize("name", LOCAL)
def test_tables_are_kept_from_batch_to_batch_while_there_is_room(name, room):
    projection = SKETCHED["sjlt"]
    item = load_backend(name).table(projection, torch.arange(3), ()).element_size()
    each = 2 * item * projection.nonzeros * NUMEL + 3 * 4 * (projection.dim + projection.nonzeros)
    chunks = dataclasses.replace(DEVICE_CHUNKS, items=300, table_bytes=(0, each, 2 * each)[room])
    counting = Counting(load_backend(name))
    sketch = Sketch(projection, {"w": START, "v": START + NUMEL}, counting, chunks=chunks, columns=2 * NUMEL)
    for batch in range(3):
        sketch.begin(SAMPLES, ROWS)
        for parameter in ("w", "v"):
            sketch.add(parameter, contiguous_pieces(gradients(seed=batch), slice(0, SAMPLES), chunks))
        both = torch.cat([gradients(seed=batch)] * 2, 2)
        whole = sketched(sketch_of(projection, name), contiguous_pieces(both, slice(0, SAMPLES)))
        assert error(sketch.result(), whole) < 1e-6
    assert counting.made == (6, 4, 2)[room] * NUMEL
    starts = 4 * (projection.dim + projection.nonzeros)
    kept = sum(2 * table.numel() * table.element_size() + starts for table in sketch._tables.values())
    assert kept == room * each <= chunks.kept_bytes(projection, 2 * NUMEL)


def test_no_more_is_kept_than_is_promised():
    assert HOST_CHUNKS.kept_bytes(Projection("sjlt", 4096), 10**8) == 0
    assert DEVICE_CHUNKS.kept_bytes(Projection("sjlt", 4096), 10**8) == DEVICE_CHUNKS.table_bytes
    assert DEVICE_CHUNKS.kept_bytes(Projection("rademacher", 4096), 10**8) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_whose_pieces_have_the_same_name_are_told_apart(kind):
    """One whole piece each, directly after each other and from batch to batch."""
    values, starts = gradients(numel=50), {"w": START, "v": START + 50}
    both = torch.cat([values, values], 2)
    whole = sketched(sketch_of(SKETCHED[kind], "torch"), contiguous_pieces(both, slice(0, SAMPLES)))
    sketch = sketch_of(SKETCHED[kind], "torch", starts, heavy=[START + 3, START + 53])
    for order in ("wv", "vw", "wv"):
        sketch.begin(SAMPLES, ROWS)
        for name in order:
            sketch.add(name, contiguous_pieces(values, slice(0, SAMPLES)))
        assert torch.equal(sketch.heavy, both[:, :, [3, 53]].double())
        assert error(sketch.result(), whole) < 1e-6


def _bits(projection, name, values, samples, *, factors=True):
    """A sketch by pieces with and without a start, and from the factors where there are some."""
    sketch = sketch_of(projection, name)
    sketch.begin(samples, values.shape[1])
    sketch.add("w", contiguous_pieces(values, slice(0, samples)))
    sketch.add("w", cut_pieces(values, [100, 450], [1], [1], None, keyed=False))
    if projection.kind == "tensorsketch" and factors:
        generator = torch.Generator().manual_seed(5)
        inputs = torch.randn(samples, 3 * WEIGHT.inputs, generator=generator)
        outputs = torch.randn(samples, 3, values.shape[1], WEIGHT.outputs, generator=generator)
        sketch.add_factors("w", (inputs, outputs), transposed=False)
    return sketch.result()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LOCAL)
def test_the_same_bits_twice(name, kind):
    first, second = (_bits(SKETCHED[kind], name, gradients(40), 40) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("kind", SPARSE_KINDS)
@pytest.mark.parametrize("name", LOCAL)
def test_the_same_bits_for_any_number_of_threads(name, kind, threads):
    """By the table of R, whose rows are each summed by one thread."""
    found = []
    for count in (1, 2):
        threads(count)
        found.append(_bits(SKETCHED[kind], name, gradients(40), 40, factors=False))
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", DENSE_KINDS)
@pytest.mark.parametrize("name", LOCAL)
def test_a_dense_r_has_the_same_bits_for_any_number_of_threads(name, kind, threads):
    found = []
    for count in (1, 2):
        threads(count)
        found.append(load_backend(name).tile(SKETCHED[kind], torch.arange(5000), torch.float32).clone())
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", [*DENSE_KINDS, "tensorsketch"])
@pytest.mark.parametrize("name", LOCAL)
def test_products_of_libraries_agree_within_rounding_for_any_number_of_threads(name, kind, threads):
    """The order of sums in a product with a dense R and in a Fourier transform is that of BLAS and of MKL."""
    found = []
    for count in (1, 2):
        threads(count)
        found.append(_bits(SKETCHED[kind], name, gradients(40), 40))
    assert error(*found) < 1e-6


@pytest.mark.parametrize("kind", SPARSE_KINDS)
@pytest.mark.parametrize("name", LOCAL)
def test_a_row_has_the_same_bits_in_any_batch(name, kind):
    values = gradients(5)
    found = sketched(sketch_of(SKETCHED[kind], name), contiguous_pieces(values, slice(0, 5)), 5)
    for index in range(5):
        one = sketched(sketch_of(SKETCHED[kind], name), contiguous_pieces(values[index, None], slice(0, 1)), 1)
        assert torch.equal(one[0], found[index])


# --- from factors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spectrum_bytes", [1, 2**26])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("positions", "rows"), [(1, 1), (1, 3), (4, 1), (6, 3)])
@pytest.mark.parametrize(("dim", "nonzeros"), [(60, 6), (4 * 7, 4), (32 * 8, 32)])
@pytest.mark.parametrize("name", LOCAL)
def test_a_weight_from_its_factors(name, dim, nonzeros, positions, rows, transposed, spectrum_bytes, monkeypatch):
    """The same as its gradient by the table of R, with blocks of even and odd size, some samples at a time or all."""
    monkeypatch.setattr("ooc_ntk.compute.projection.sketch.SPECTRUM_BYTES", spectrum_bytes)
    samples, height, width = 5, 13, 22
    projection = Projection("tensorsketch", dim, seed=8, nonzeros=nonzeros)
    inputs, outputs = torch.randn(samples, positions, width), torch.randn(samples, rows, height, positions)
    outputs = outputs.permute(0, 3, 1, 2)  # as convolutions give them
    order = "nsro,nsi->nrio" if transposed else "nsro,nsi->nroi"
    dense = torch.einsum(order, outputs.double(), inputs.double())
    outer = Outer(START, *dense.shape[2:])
    sketch = sketch_of(projection, name, outers={"w": outer})
    wanted = sketched(sketch, contiguous_pieces(dense.flatten(2), slice(0, samples)), samples, rows)
    sketch.begin(samples, rows)
    sketch.add_factors("w", (inputs.flatten(1), outputs), transposed=transposed)
    assert error(sketch.result(), wanted) < 1e-6


# --- gradients of heavy parameters -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_heavy_gradients_are_exact(kind):
    """Of several parameters, by pieces in any order, with places that a piece has twice."""
    values, other = gradients(), gradients(numel=50, seed=1)
    heavy = [START, START + 99, START + 100, START + 699, START + 700 + 7, START + 700 + 49]
    sketch = sketch_of(SKETCHED[kind], "torch", {"w": START, "v": START + 700, "u": START + 750}, heavy=heavy)
    for batch in range(2):
        sketch.begin(SAMPLES, ROWS)
        sketch.add("w", cut_pieces(values, [100, 333], [1], [2], None, keyed=True))
        sketch.add("v", contiguous_pieces(other, slice(0, SAMPLES)))
        sketch.add("u", contiguous_pieces(other, slice(0, SAMPLES)))
        wanted = torch.cat([values[:, :, [0, 99, 100, 699]], other[:, :, [7, 49]]], 2)
        assert torch.equal(sketch.heavy, wanted.double()), f"batch {batch}"
    sketch.begin(SAMPLES, ROWS)
    place = torch.tensor([7, 3, 7, 49])
    sketch.add("v", [piece_of(slice(1, 2), slice(0, ROWS), other[1:2, :, :4], place)])
    wanted = torch.zeros(SAMPLES, ROWS, len(heavy), dtype=torch.float64)
    wanted[1, :, 4] = other[1, :, 0].double() + other[1, :, 2].double()
    wanted[1, :, 5] = other[1, :, 3].double()
    assert torch.equal(sketch.heavy, wanted)


def test_without_heavy_parameters_there_are_none():
    sketch = sketch_of(SKETCHED["sjlt"], "torch")
    sketched(sketch, contiguous_pieces(gradients(), slice(0, SAMPLES)))
    assert tuple(sketch.heavy.shape) == (SAMPLES, ROWS, 0)


# --- which backend ---------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)


@pytest.fixture
def everything_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: object())


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize(
    ("wanted", "device", "extra"), [("numba", "cpu", "pip install numba"), ("cupy", "cuda:0", "'ooc-ntk[cu13]'")]
)
def test_a_missing_backend_is_an_error_that_names_what_to_install(wanted, device, extra):
    with pytest.raises(InputError) as got:
        backend_name(wanted, device)
    for said in (f"backend '{wanted}' needs", "which is not installed", extra, "or use the backend 'torch'"):
        assert said in str(got.value)


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_without_compiled_backends_torch_is_taken(device):
    assert backend_name("auto", device) == backend_name("torch", device) == "torch"


@pytest.mark.usefixtures("everything_installed")
@pytest.mark.parametrize(("device", "name"), [("cpu", "numba"), ("cuda", "cupy"), ("cuda:1", "cupy")])
def test_the_compiled_backend_of_a_device_is_taken(device, name):
    assert backend_name("auto", device) == backend_name(name, device) == name
    assert backend_name("torch", device) == "torch"


@pytest.mark.usefixtures("everything_installed")
@pytest.mark.parametrize(("wanted", "device", "other"), [("cupy", "cpu", "numba"), ("numba", "cuda:0", "cupy")])
def test_a_backend_of_another_device_is_refused(wanted, device, other):
    message = f"backend '{wanted}' does not run on {device}; use '{other}', 'torch' or leave it to 'auto'"
    with pytest.raises(InputError) as got:
        backend_name(wanted, device)
    assert str(got.value) == message


@pytest.mark.parametrize("name", LOCAL)
def test_backends_say_their_names(name):
    assert load_backend(name).name == name
