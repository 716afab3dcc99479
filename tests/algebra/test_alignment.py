"""Alignment of kernels by its definition: runs, layers, tiles of other sizes, features, views; what is refused."""

import shutil

import numpy as np
import pytest
import torch

import ooc_ntk
from ooc_ntk.algebra import alignment as alignment_module
from ooc_ntk.algebra.alignment import layer_alignment
from ooc_ntk.algebra.entries import FeatureEntries
from ooc_ntk.algebra.kernel import Kernel
from ooc_ntk.algebra.operator import KernelOperator
from ooc_ntk.algebra.products import PASSES
from ooc_ntk.errors import DamagedFileError, InputError, RunConflictError, TransientStorageError
from tests.cases import case, digits, relu_mlp, smooth_mlp

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES = 90


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("alignment")


def run(folder, name, rates, module, tile, samples=SAMPLES, first=0, **options):
    images, labels = digits()
    train = (images[first : first + samples], labels[first : first + samples])
    job = ooc_ntk.Job(module.eval(), train, images[400:405], device="cpu", **options)
    preferences = ooc_ntk.Preferences(tile_samples=tile, features_only=name == "features")
    budget = ooc_ntk.Budget(host="16GiB", device="16GiB", disk="1GiB")
    plan = ooc_ntk.plan(job, budget, preferences=preferences, rates=rates)
    return ooc_ntk.run(job, folder / name, plan=plan, progress=False)


@pytest.fixture(scope="module")
def kernels(folder, rates, frozen):
    torch.manual_seed(5)
    smooth, kinked = smooth_mlp(), relu_mlp()
    return {
        "layers": run(folder, "layers", rates, smooth, 17, by="layer"),
        "same tiles": run(folder, "same tiles", rates, kinked, 17),
        "other tiles": run(folder, "other tiles", rates, kinked, 40),
        "features": run(folder, "features", rates, kinked, 30, projection="sjlt:256"),
        "double": run(folder, "double", rates, kinked, 17, precision="float64"),
    }


def square(kernel) -> np.ndarray:
    found = np.asarray(kernel, dtype=np.float64)[: kernel.shape[1]]
    return np.tril(found) + np.tril(found, -1).T


def wanted(first: np.ndarray, second: np.ndarray, centered: bool = True) -> float:
    """By definition."""
    size = len(first)
    centring = np.eye(size) - 1 / size if centered else np.eye(size)
    first, second = centring @ first @ centring, centring @ second @ centring
    return float((first * second).sum() / np.linalg.norm(first) / np.linalg.norm(second))


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("other", ["layers", "same tiles", "other tiles", "features", "double"])
@pytest.mark.parametrize("one", ["layers", "features"])
def test_runs_against_the_definition(one, other, centered, kernels):
    first, second = kernels[one], kernels[other]
    found = first.cka(second, centered=centered)
    tolerance = 1e-6 if "features" in (one, other) else 1e-11  # their entries are read in float32 by the oracle
    assert found == pytest.approx(wanted(square(first), square(second), centered), rel=tolerance)
    assert second.cka(first, centered=centered) == pytest.approx(found, rel=1e-12)
    assert (found > 1 - 1e-12) == (one == other)


def test_each_is_read_once(kernels):
    first, second = kernels["layers"], kernels["same tiles"]
    first.cka(second)  # the first time, tiles are read with their padding for their checksums
    before = [kernel.entries.bytes_read for kernel in (first, second)]
    first.cka(second)
    read = [kernel.entries.bytes_read - start for kernel, start in zip((first, second), before, strict=True)]
    assert read[0] == read[1] <= 21 * 17 * 17 * 4  # 21 tiles on and below the diagonal


def test_views(kernels):
    first, second = kernels["layers"], kernels["other tiles"]
    roots = [np.sqrt(kernel.sample_diagonal()[:SAMPLES]) for kernel in (first, second)]
    cosines = [square(kernel) / root[:, None] / root for kernel, root in zip((first, second), roots, strict=True)]
    assert first.cosine().cka(second.cosine()) == pytest.approx(wanted(*cosines), rel=1e-10)
    # Centring twice is centring once.
    assert first.centered().cka(second) == pytest.approx(first.cka(second), rel=1e-10)
    assert first.centered().cka(second.centered(), centered=False) == pytest.approx(first.cka(second), rel=1e-10)


def test_it_does_not_see_a_factor_or_a_constant(kernels):
    """Nor does it lose digits where a constant is all but everything."""
    first, matrix = kernels["layers"], square(kernels["layers"])
    other = square(kernels["same tiles"])
    moved = Kernel.of_array("moved", 3.0 * matrix + 1e6 * matrix.max(), matrix.diagonal(), SAMPLES, 0)
    assert first.cka(moved) == pytest.approx(1.0, abs=1e-8)
    assert moved.cka(kernels["same tiles"]) == pytest.approx(wanted(matrix, other), rel=1e-7)


@pytest.mark.parametrize("centered", [True, False])
def test_layers_each_with_each(centered, kernels):
    kernel = kernels["layers"]
    found = kernel.layer_cka(centered=centered)
    assert found.names == kernel.layers
    squares = [square(kernel.layer(name)) for name in kernel.layers]
    matrix = [[wanted(left, right, centered) for right in squares] for left in squares]
    np.testing.assert_allclose(found.matrix, matrix, rtol=1e-11)
    assert (found.matrix.diagonal() == 1.0).all()
    first, last = kernel.layers[0], kernel.layers[-1]
    assert kernel.layer(first).cka(kernel.layer(last), centered=centered) == pytest.approx(found.matrix[0, -1])


@pytest.mark.parametrize("group", [1, 2])
def test_layers_in_groups_where_buffers_are_many(group, kernels, monkeypatch):
    kernel = kernels["layers"]
    whole = kernel.layer_cka().matrix
    buffer = kernel.layer(kernel.layers[0]).entries.buffer_bytes
    monkeypatch.setattr(alignment_module, "BUFFER_BYTES", 2 * group * buffer)
    np.testing.assert_allclose(kernel.layer_cka().matrix, whole, rtol=1e-12)


def test_a_layer_with_the_whole_kernel_and_with_another_run(kernels):
    kernel, other = kernels["layers"], kernels["other tiles"]
    layer = kernel.layer(kernel.layers[-1])
    assert layer.cka(kernel) == pytest.approx(wanted(square(layer), square(kernel)), rel=1e-11)
    assert layer.cka(other) == pytest.approx(wanted(square(layer), square(other)), rel=1e-11)


def test_a_layer_that_adds_nothing_is_not_a_number(kernels):
    kernel = kernels["layers"]
    zero = Kernel.of_array("zero", np.zeros((SAMPLES, SAMPLES)), np.zeros(SAMPLES), SAMPLES, 0)
    found = layer_alignment([kernel, zero], ["one", "none"], centered=True)
    assert found.matrix[0, 0] == 1.0
    assert np.isnan(found.matrix[[0, 1, 1], [1, 0, 1]]).all()


def test_small_pieces_give_the_same(kernels, monkeypatch):
    first, second = kernels["layers"], kernels["other tiles"]
    whole = first.cka(second)
    monkeypatch.setattr(alignment_module, "PIECE", 50)
    assert first.cka(second) == pytest.approx(whole, rel=1e-12)


def test_other_samples_are_refused(kernels, folder, rates):
    kernel = kernels["same tiles"]
    fewer = run(folder, "fewer", rates, relu_mlp(), 17, samples=40)
    with pytest.raises(InputError, match="kernels of 90 and 40 train rows cannot be aligned"):
        kernel.cka(fewer)
    moved = run(folder, "moved", rates, relu_mlp(), 17, first=200)
    with pytest.raises(
        RunConflictError, match=r"are kernels of other data \(digests [0-9a-f]{8} and .*check_data=False"
    ):
        kernel.centered().cka(moved.cosine())
    found = kernel.cka(moved, check_data=False)
    assert found == pytest.approx(wanted(square(kernel), square(moved)), rel=1e-11)


def test_a_full_kernel_with_as_many_rows_is_of_other_samples():
    one = Kernel.of_array("one", np.eye(8), np.ones(8), 8, 0)
    other = Kernel.of_array("other", np.eye(8), np.ones(8), 4, 0)
    with pytest.raises(InputError, match="cannot be aligned: both must be of the same samples"):
        one.cka(other)


@pytest.mark.parametrize(("matrix", "centered", "message"), [
    (np.zeros((6, 6)), False, "is zero: it is aligned with nothing"),
    (np.zeros((6, 6)), True, "is zero once it is centred"),
    (np.full((6, 6), 0.1), True, "is zero once it is centred"),
])  # fmt: skip
def test_what_is_zero_has_no_alignment(matrix, centered, message):
    one = Kernel.of_array("one", np.eye(6), np.ones(6), 6, 0)
    other = Kernel.of_array("other", matrix, matrix.diagonal(), 6, 0)
    for pair in ((one, other), (other, one)):
        with pytest.raises(InputError, match=message):
            pair[0].cka(pair[1], centered=centered)


def test_what_is_no_kernel_is_refused(kernels):
    with pytest.raises(InputError, match="cka compares two kernels, got ndarray"):
        kernels["layers"].cka(np.eye(SAMPLES))
    with pytest.raises(InputError, match="keeps no kernels of single layers; run the job with by='layer'"):
        kernels["features"].layer_cka()


def test_a_damaged_tile_is_said(folder, rates):
    kernel = run(folder, "damaged", rates, case("smooth-mlp").module, 17, by="layer")
    with (kernel.path / "layers.zarr" / "c" / "1" / "2" / "0").open("r+b") as file:
        file.seek(100)
        file.write(b"\xff")
    with pytest.raises(DamagedFileError, match="layers.zarr/c/1/2/0 is not what was committed"):
        kernel.layer_cka()


@pytest.fixture
def damage(folder, rates):
    """Opens a run, whole or after numbers of one of its tiles were made huge."""
    kernel = run(folder, "damaged kernel", rates, relu_mlp(), 17)

    def damaged(tile=None):
        if tile is not None:
            with (kernel.path / "kernel.zarr" / "c" / tile).open("r+b") as file:
                file.write(np.full(200, 1e6, dtype=np.float32).tobytes())
        return ooc_ntk.open(kernel.path)

    yield damaged
    shutil.rmtree(kernel.path)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("tile", ["2/0", "4/4"])
@pytest.mark.parametrize("other", ["same tiles", "other tiles", "features"])
def test_a_damaged_tile_is_said_in_any_tiles_and_order(other, tile, centered, kernels, damage):
    kernel, sound = damage(tile), kernels[other]
    for pair in ((kernel, sound), (sound, kernel), (sound.cosine(), kernel.cosine())):
        with pytest.raises(DamagedFileError, match=f"kernel.zarr/c/{tile} is not what was committed"):
            pair[0].cka(pair[1], centered=centered)


def test_what_is_above_the_diagonal_takes_no_part(kernels, damage):
    other = kernels["other tiles"]
    whole, kernel = other.cka(damage()), damage("0/1")
    assert other.cka(kernel) == whole
    assert kernel.cka(other) == pytest.approx(whole, rel=1e-12)


def test_a_misread_tile_is_read_again(kernels, monkeypatch):
    first, second = kernels["layers"], kernels["same tiles"]
    whole, blocks, failures = first.cka(second), type(second.entries).blocks, [PASSES - 1]

    def misreading(self, rows, *, lower=False):
        for number, block in enumerate(blocks(self, rows, lower=lower)):
            if number == 3 and self is second.entries and failures[0]:
                failures[0] -= 1
                raise TransientStorageError("misread")
            yield block

    monkeypatch.setattr(type(second.entries), "blocks", misreading)
    assert first.cka(second) == whole
    failures[0] = PASSES
    with pytest.raises(TransientStorageError):
        first.cka(second)


def test_regions_are_what_blocks_are(kernels):
    for name, kernel in kernels.items():
        for seen in (kernel, kernel.cosine(), kernel.centered()):
            assert isinstance(seen, KernelOperator)
            rows, columns = range(13, 60), range(5, 44)
            found = seen.entries.region(rows, columns)
            whole = seen.entries.rows(np.arange(len(seen)))
            np.testing.assert_allclose(found, whole[13:60, 5:44], rtol=1e-6, atol=1e-9 * np.abs(whole).max())
            assert isinstance(kernel.entries, FeatureEntries) == (seen.entries.tiling is None) == (name == "features")
