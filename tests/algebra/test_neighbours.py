"""Nearest samples against a sort of the whole kernel: any tiles, ties, NaN, views, features, FAISS; and bad input."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ooc_ntk
from ooc_ntk.algebra import entries as entries_module
from ooc_ntk.algebra import faiss_search, neighbours
from ooc_ntk.algebra.entries import ArrayEntries, Block, FeatureEntries
from ooc_ntk.algebra.kernel import Kernel
from ooc_ntk.algebra.neighbours import LargestEntries
from ooc_ntk.errors import BudgetError, DamagedFileError, InputError, TransientStorageError
from tests.cases import TEST, TRAIN, case

pytestmark = pytest.mark.usefixtures("one_thread")


def oracle(entries, k, *, square=False):
    """The k largest of every row by a stable sort of all of it; what is no number, or −∞, comes last and is marked."""
    found = np.array(entries, dtype=np.float64)
    if square:
        np.fill_diagonal(found, np.nan)
    found[np.isnan(found)] = -np.inf
    order = np.argsort(-found, axis=1, kind="stable")[:, :k]
    values = np.take_along_axis(found, order, 1)
    return np.where(np.isneginf(values), -1, order), np.where(np.isneginf(values), np.nan, values)


def assert_same(found, wanted):
    assert found.indices.dtype == np.int64
    assert found.values.dtype == np.float64
    np.testing.assert_array_equal(found.indices, wanted[0])
    np.testing.assert_array_equal(found.values, wanted[1])


def symmetric(matrix):
    matrix = np.array(matrix)
    size = matrix.shape[1]
    square = np.tril(matrix[:size])
    matrix[:size] = square + np.tril(square, -1).T
    return matrix


class CutEntries(ArrayEntries):
    """Entries of an array in blocks of given sizes, as tiles hand them out: tile by tile, in stripes."""

    def __init__(self, array, height, width, stripe):
        super().__init__(array)
        self.cut = height, width, stripe

    def blocks(self, rows, *, lower=False):
        height, width, stripe = self.cut
        for top in range(rows.start - rows.start % height, rows.stop, height):
            for left in range(0, self.size, width):
                for start in range(top, min(top + height, rows.stop), stripe):
                    part = range(max(start, rows.start), min(start + stripe, top + height, rows.stop))
                    if not len(part) or (lower and left >= part.stop):
                        continue
                    values = self._array[part.start : part.stop, left : left + width]
                    yield from entries_module._split(part, left, values, lower=lower)


def kernel_of(array, height=4, width=4, stripe=2):
    """A kernel over an array in memory, handed out in tiles."""
    rows, columns = array.shape
    kernel = Kernel.of_array(
        "memory", array, np.concatenate([array[:columns].diagonal(), np.ones(rows - columns)]), columns, rows - columns
    )
    kernel._entries = CutEntries(array, height, width, stripe)
    return kernel


#: Few different values make ties; NaN and −∞ are no entries.
LEVELS = [-2.0, 0.5, np.inf, 0.0, np.nan, -np.inf]


@st.composite
def cases_of_ties(draw):
    train = draw(st.integers(2, 13))
    test = draw(st.integers(1, 6))
    seed = draw(st.integers(0, 10**6))
    levels = LEVELS[: draw(st.integers(2, len(LEVELS)))]
    array = symmetric(np.random.default_rng(seed).choice(levels, (train + test, train)))
    if draw(st.booleans()):
        array = array.astype(np.float32)
    tiles = draw(st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 5)))
    return array, train, tiles, draw(st.integers(1, train - 1))


@settings(max_examples=150, deadline=None)
@given(cases_of_ties())
def test_any_size_tiles_and_ties_as_a_sort_of_everything(drawn):
    array, train, tiles, k = drawn
    kernel = kernel_of(array, *tiles)
    assert_same(kernel.nearest(k), oracle(array[train:], k))
    assert_same(kernel.nearest(k, rows="train"), oracle(array[:train], k, square=True))


def test_all_train_samples_may_be_asked_for():
    array = symmetric(np.random.default_rng(0).normal(size=(12, 9)))
    kernel = kernel_of(array)
    assert_same(kernel.nearest(9), oracle(array[9:], 9))
    assert_same(kernel.nearest(8, rows="train"), oracle(array[:9], 8, square=True))


def test_nan_never_wins_and_places_without_an_entry_are_marked():
    array = symmetric(np.zeros((6, 4)))
    array[4] = [np.nan, 1, 0, -np.inf]
    array[5] = np.nan
    found = kernel_of(array).nearest(3)
    np.testing.assert_array_equal(found.indices, [[1, 2, -1], [-1, -1, -1]])
    np.testing.assert_array_equal(found.values, [[1, 0, np.nan], [np.nan] * 3])


def test_entries_may_be_offered_in_any_order():
    values = np.random.default_rng(1).choice([0.0, 1.0, 2.0], (3, 30))
    found = LargestEntries(3, 7)
    for left in (20, 0, 25, 10, 5, 15):
        found.offer(0, left, values[:, left : left + 5])
    np.testing.assert_array_equal(found.columns, oracle(values, 7)[0])


def run(job, folder, rates, **preferences):
    budget = ooc_ntk.Budget(host="16GiB", device="16GiB", disk="1GiB")
    plan = ooc_ntk.plan(job, budget, preferences=ooc_ntk.Preferences(**preferences), rates=rates)
    return ooc_ntk.run(job, folder, plan=plan, progress=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("neighbours")


@pytest.fixture(scope="module")
def stored(folder, rates):
    """33 × 26 on disk, in tiles of 10."""
    return run(case("smooth-mlp").job(), folder / "stored", rates, tile_samples=10)


SKETCH = ooc_ntk.Projection("sjlt", dim=64, seed=0)


@pytest.fixture(scope="module")
def projected(folder, rates):
    """The same projected, with a kernel on disk."""
    return run(case("smooth-mlp").job(projection=SKETCH), folder / "projected", rates, tile_samples=10)


@pytest.fixture(scope="module")
def features_only(folder, rates):
    """Features alone, divided by the outputs."""
    return run(case("smooth-mlp").job(projection=SKETCH, scale="mean"), folder / "features", rates, features_only=True)


@pytest.fixture(scope="module")
def cosines(folder, rates):
    """Features alone of a kernel that is of cosines already."""
    job = case("smooth-mlp").job(projection=SKETCH, normalize="cosine")
    return run(job, folder / "cosines", rates, features_only=True)


EVERY = ["stored", "projected", "features_only", "cosines"]


@pytest.mark.parametrize("by", ["kernel", "cosine"])
@pytest.mark.parametrize("which", EVERY)
def test_kernels_on_disk_and_of_features(which, by, request):
    kernel = request.getfixturevalue(which)
    entries = np.asarray(kernel, dtype=np.float64)
    if by == "cosine":
        roots = np.sqrt(kernel.sample_diagonal())
        entries = entries / roots[:, None] / roots[:TRAIN]
    for rows, part in (("test", entries[TRAIN:]), ("train", entries[:TRAIN])):
        found = kernel.nearest(4, by=by, rows=rows)
        wanted = oracle(part, 4, square=rows == "train")
        assert (found.by, found.rows, found.k, len(found)) == (by, rows, 4, len(part))
        np.testing.assert_array_equal(found.indices, wanted[0])
        np.testing.assert_allclose(found.values, wanted[1], rtol=1e-6)


def test_views_answer_for_what_they_are(stored):
    seen = stored.cosine()
    assert_same(stored.nearest(3, by="cosine"), (seen.nearest(3).indices, seen.nearest(3).values))
    assert_same(seen.nearest(3, by="cosine"), (seen.nearest(3).indices, seen.nearest(3).values))
    for view in (stored.centered(), seen.centered()):
        assert_same(view.nearest(3), oracle(view[TRAIN:], 3))
    with pytest.raises(InputError, match=r"cosine\(\)\.centered\(\)"):
        stored.centered().nearest(3, by="cosine")


def test_the_train_square_is_read_by_half(stored):
    entries = stored.entries
    before = entries.bytes_read
    stored.nearest(2, rows="train")
    tile = 10 * 10 * 4
    assert 6 * tile <= entries.bytes_read - before < 9 * tile


def test_features_meet_in_squares_of_bounded_size(features_only, monkeypatch):
    monkeypatch.setattr(entries_module, "BLOCK_BYTES", 8 * 7 * 7)
    entries = FeatureEntries(features_only.features)
    for lower, rows in ((False, range(TRAIN, TRAIN + TEST)), (True, range(TRAIN))):
        blocks = [Block(b.rows, b.columns, b.values.copy()) for b in entries.blocks(rows, lower=lower)]
        assert max(block.values.size for block in blocks) <= 49
        whole = np.full(features_only.shape, np.nan)
        for block in blocks:
            whole[block.rows.start : block.rows.stop, block.columns.start : block.columns.stop] = block.values
        wanted = np.asarray(features_only, dtype=np.float64)
        below = np.tril(np.ones((TRAIN, TRAIN), bool)) if lower else np.ones((TEST, TRAIN), bool)
        part = slice(rows.start, rows.stop)
        np.testing.assert_allclose(whole[part][below], wanted[part][below], rtol=1e-6)
    found, wanted = features_only.nearest(5), oracle(features_only[TRAIN:], 5)
    np.testing.assert_array_equal(found.indices, wanted[0])
    np.testing.assert_allclose(found.values, wanted[1], rtol=2e-6)  # products of float32 in pieces of other sizes


@pytest.mark.parametrize("by", ["kernel", "cosine"])
@pytest.mark.parametrize("rows", ["test", "train"])
@pytest.mark.parametrize("which", EVERY[1:])
def test_faiss_finds_the_same(which, rows, by, request, monkeypatch):
    pytest.importorskip("faiss", reason="FAISS is an extra")
    kernel = request.getfixturevalue(which)
    monkeypatch.setattr("ooc_ntk.algebra.features.PANEL_BYTES", 8 * 10 * 64 * 5)  # pieces of five samples
    exact = kernel.nearest(4, by=by, rows=rows)
    found = kernel.nearest(4, by=by, rows=rows, backend="faiss")
    assert (found.by, found.rows) == (by, rows)
    np.testing.assert_array_equal(found.indices, exact.indices)  # no two of these entries are that near
    np.testing.assert_allclose(found.values, exact.values, rtol=2e-6)


def test_faiss_in_order_drops_the_sample_itself_or_the_last():
    values = np.array([[5, 5, 3], [9, 5, 4], [1, 0, -3e38]], dtype=np.float32)
    places = np.array([[7, 2, 10], [3, 11, 4], [12, 5, -1]])
    indices, found = faiss_search._in_order(values, places, range(10, 13), 2)
    np.testing.assert_array_equal(indices, [[2, 7], [3, 4], [5, -1]])
    np.testing.assert_array_equal(found, [[5, 5], [9, 4], [0, np.nan]])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"k": 0}, r"k must be from 1 to 26, as there are 26 train samples, got 0"),
        ({"k": 27}, r"from 1 to 26.*got 27"),
        ({"k": 26, "rows": "train"}, r"from 1 to 25, as there are 25 other train samples, got 26"),
        ({"k": 2.5}, r"k must be a whole number, got 2\.5"),
        ({"k": "3"}, r"k must be a whole number, got '3'"),
        ({"k": True}, r"k must be from 1 to 26.*got True"),
        ({"by": "cosines"}, r"unknown by 'cosines'; did you mean 'cosine'"),
        ({"rows": "tests"}, r"unknown rows 'tests'; did you mean 'test'"),
        ({"backend": "fais"}, r"unknown backend 'fais'; did you mean 'faiss'"),
        ({"backend": "faiss"}, r"is an exact kernel: it has no projection.*--projection sjlt"),
    ],
)
def test_bad_input(given, message, stored):
    with pytest.raises(InputError, match=message):
        stored.nearest(**{"k": 3, **given})


def test_a_full_kernel_is_refused(folder, rates):
    kernel = run(case("attention").job(kernel="full"), folder / "full", rates, tile_samples=8)
    for asked in (kernel, kernel.cosine()):
        with pytest.raises(InputError, match=r"one entry per pair.*4 × 4 entries per pair; compute kernel='trace'"):
            asked.nearest(3)


def test_without_test_samples_the_train_samples_are_offered(folder, rates):
    kernel = run(case("smooth-mlp").job(test=False), folder / "square", rates)
    with pytest.raises(InputError, match=r"no test samples.*rows='train' \(--rows train\).*--test"):
        kernel.nearest(3)
    assert kernel.nearest(3, rows="train").indices.shape == (TRAIN, 3)


def test_faiss_of_a_view_is_refused(projected):
    with pytest.raises(InputError, match=r"is a view, and FAISS.*backend='exact'"):
        projected.cosine().nearest(3, backend="faiss")


def test_faiss_that_is_missing_says_what_to_install(projected, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(InputError, match=r"not installed; run: .*pip install 'ooc-ntk\[faiss\]'.*--backend exact"):
        projected.nearest(3, backend="faiss")


def test_what_does_not_fit_is_refused_before_any_work(projected, monkeypatch):
    monkeypatch.setattr(neighbours, "free_host_bytes", lambda: 1000)
    with pytest.raises(BudgetError, match=r"3 neighbours of each sample need 1\.3 KiB of memory, 500 B are free"):
        projected.nearest(3)
    monkeypatch.undo()
    pytest.importorskip("faiss", reason="FAISS is an extra")
    monkeypatch.setattr(faiss_search, "free_host_bytes", lambda: 1000)
    with pytest.raises(BudgetError, match=r"features of 26 train samples, .*500 B are free.*--backend exact"):
        projected.nearest(3, backend="faiss")


def test_a_pass_that_misread_a_tile_is_made_again(stored, monkeypatch):
    wanted = stored.nearest(3)
    whole, calls = stored.entries.blocks, []

    def misread_once(rows, *, lower=False):
        calls.append(lower)
        for block in whole(rows, lower=lower):
            if len(calls) == 1:
                block.values[:] = 1e9
            yield block
            if len(calls) == 1:
                raise TransientStorageError("misread")

    monkeypatch.setattr(stored.entries, "blocks", misread_once)
    assert_same(stored.nearest(3), (wanted.indices, wanted.values))
    assert len(calls) == 2


def test_a_damaged_tile_is_an_error(stored, tmp_path):
    shutil.copytree(stored.path, tmp_path / "copy")
    tile = Path(tmp_path / "copy" / "kernel.zarr" / "c" / "3" / "0")
    content = bytearray(tile.read_bytes())
    content[5] ^= 255
    tile.write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"c/3/0"):
        ooc_ntk.open(tmp_path / "copy").nearest(3)
