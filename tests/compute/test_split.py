"""Products of bf16 parts: what they lose is what the arithmetic says, in every representation, and no more."""

from __future__ import annotations

import contextlib
import dataclasses

import numpy as np
import pytest
import torch

import ooc_ntk
from ooc_ntk.compute import split as split_module
from ooc_ntk.compute.contract import KernelAccumulator, measure_block
from ooc_ntk.compute.products import multiply
from ooc_ntk.compute.split import Parts, SplitProducts, parts_in_place, product_way, split_in_place
from ooc_ntk.planning.layout import Layout
from ooc_ntk.planning.memory import split_bytes
from ooc_ntk.planning.spans import DENSE, FACTORED, PAIRWISE
from ooc_ntk.planning.tiles import Range
from ooc_ntk.planning.workload import ParameterBlock
from tests import oracle
from tests.cases import NAMES, TRAIN, case
from tests.compute.test_contraction import FACTORS, ROWS, block, dense, error, tile, token_tile
from tests.compute.test_contraction import TOKENS as EMBEDDING
from tests.planning.strategies import small_workload

#: Relative error of one product of parts on independent normal numbers, the worst case: three terms of 2.8e-6 each, of
#: which two are left where a matrix meets itself. (Measured 3.4e-6 to 4.9e-6 at depths of 5 to 330,001.)
PRODUCT = 6e-6

#: The same of two products multiplied elementwise (measured 4.6e-6 to 8.8e-6).
TWO_PRODUCTS = 1e-5

#: End to end on real networks (measured 3.4e-7 to 1.8e-6).
NETWORKS = 3e-6


def gram(values, right=None):
    accumulator = KernelAccumulator(len(values), "bf16x3")
    accumulator.begin(len(values), len(values if right is None else right))
    accumulator.add(values, right)
    return accumulator.result().clone()


@pytest.mark.parametrize("depth", [64, 1000, 30_000, 200_001])
def test_products_of_any_depth(depth):
    left, right = torch.randn(32, depth), torch.randn(24, depth)
    for found, wanted in (
        (gram(left), left.double() @ left.double().T),
        (gram(left, right), left.double() @ right.double().T),
    ):
        assert 1e-6 < error(found, wanted) <= PRODUCT
    positive = torch.rand(32, depth) + 0.5
    assert error(gram(positive), positive.double() @ positive.double().T) <= 1e-6


def test_both_triangles_of_a_gram_matrix_are_there_and_alike():
    found = gram(torch.randn(40, 5000))
    assert error(found, found.T) <= 2e-7


def test_all_three_products_count():
    """Numbers whose low parts all matter: each product has its own digits in the result."""
    left = torch.tensor([[1.0 + 2.0**-9, 2.0]])
    right = torch.tensor([[3.0 + 2.0**-7, 1.0 - 2.0**-10]])
    parts = SplitProducts("cpu").split(left, "left")
    assert parts.low.abs().max() > 0
    exact = float(left.double() @ right.double().T)
    dropped = float(parts.low.double() @ SplitProducts("cpu").split(right, "right").low.double().T)
    assert float(gram(left, right)) == pytest.approx(exact - dropped, abs=1e-7 * exact)


def test_parts_are_what_they_are_said_to_be():
    values = torch.randn(7, 33)
    parts = SplitProducts("cpu").split(values, "left")
    assert torch.equal(parts.high, values.bfloat16().float())
    assert torch.equal(parts.low, (values - parts.high).bfloat16().float())
    assert float(((parts.high.double() + parts.low - values) / values).abs().max()) <= 2.0**-17


@pytest.mark.parametrize("items", [1, 70, 10**6])
def test_parts_in_place(items, monkeypatch):
    monkeypatch.setattr(split_module, "IN_PLACE_ITEMS", items)
    values = torch.randn(9, 35)
    wanted = SplitProducts("cpu").split(values, "left")
    memory = values.data_ptr()
    split_in_place(values)
    found = parts_in_place(values)
    assert found.high.data_ptr() == memory
    assert torch.equal(found.high.float(), wanted.high)
    assert torch.equal(found.low.float(), wanted.low)


def test_what_is_in_parts_already_is_not_split_again():
    """As panels on a device are: split once, and multiplied with many others."""
    left, right = torch.randn(6, 9000), torch.randn(5, 9000)
    split = SplitProducts("cpu")
    parts, others = split.split(left, "a"), split.split(right, "b")
    assert isinstance(parts, Parts)
    accumulator = KernelAccumulator(6, "bf16x3")
    accumulator.begin(6, 5)
    accumulator.add(parts, others)
    assert error(accumulator.result(), gram(left, right)) <= 2e-7
    accumulator.begin(4, 3)
    accumulator.add(parts.rows(slice(4)), left[:3])
    assert error(accumulator.result(), gram(left[:4], left[:3])) <= 2e-7


class _Widened:
    """Stands for the products of a device that multiplies bf16 into float32: CPUs have no such product."""

    def __init__(self, monkeypatch, way):
        self.calls = []
        plain_mm, plain_addmm = torch.mm, torch.addmm

        def mm(a, b, out_dtype=None, *, out=None):
            assert a.dtype == b.dtype == torch.bfloat16
            assert out_dtype == torch.float32
            self.calls.append(("mm", a.shape[1]))
            return plain_mm(a.float(), b.float(), out=out)

        def addmm(total, a, b, out_dtype=None, *, out=None):
            assert a.dtype == b.dtype == torch.bfloat16
            assert out_dtype == torch.float32
            assert out is total
            self.calls.append(("addmm", a.shape[1]))
            return plain_addmm(total, a.float(), b.float(), out=out)

        monkeypatch.setattr(torch, "mm", mm)
        monkeypatch.setattr(torch, "addmm", addmm)
        monkeypatch.setattr(split_module, "product_way", lambda device: way)


@pytest.mark.parametrize("way", ["added", "apart"])
def test_products_of_bf16_into_float32(way, monkeypatch):
    left, right = torch.randn(6, 2500), torch.randn(5, 2500)
    wanted = gram(left, right), gram(left)
    calls = _Widened(monkeypatch, way).calls
    monkeypatch.setattr(
        SplitProducts, "_steps", lambda *_: (split_module.LEADING_COLUMNS, split_module.CONTRACTION_COLUMNS)
    )
    assert error(gram(left, right), wanted[0]) <= 3e-7
    assert [depth for _, depth in calls] == [1024, 1024, 452, 2500, 2500], (
        "high parts are multiplied a little at a time"
    )
    assert {name for name, _ in calls[1:]} == {"addmm" if way == "added" else "mm"}
    calls.clear()
    assert error(gram(left), wanted[1]) <= 3e-7
    assert [depth for _, depth in calls] == [1024, 1024, 452, 2500], "two products where a matrix meets itself"


def test_a_cpu_multiplies_widened_parts():
    assert product_way("cpu") == "widened"


def test_flags_are_set_back():
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32, matmul.allow_bf16_reduced_precision_reduction
    with contextlib.suppress(ZeroDivisionError), split_module.fast_parts("widened"):
        assert matmul.allow_tf32
        assert not matmul.allow_bf16_reduced_precision_reduction
        raise ZeroDivisionError
    assert before == (matmul.allow_tf32, matmul.allow_bf16_reduced_precision_reduction)


@pytest.mark.parametrize("entries", [1, ROWS], ids=["trace", "full"])
@pytest.mark.parametrize("method", ["add_factored", "add_pairwise"])
@pytest.mark.parametrize("name", FACTORS)
def test_factors(name, method, entries):
    factors = FACTORS[name]
    order = "gemm" if method == "add_factored" else "pairwise"
    left, right = (tile(factors, n, dtype=torch.float32, contraction=order) for n in (12, 9))
    exact = [dense(factors, *(part.double() for part in side)) for side in (left, right)]
    bound = PRODUCT if method == "add_factored" else TWO_PRODUCTS
    accumulator = KernelAccumulator(12 * entries, "bf16x3")
    for other, wanted in ((right, exact[1]), (None, exact[0])):
        accumulator.begin(12 * entries, len(wanted) * entries)
        getattr(accumulator, method)(factors, left, other, entries)
        found = accumulator.result().clone()
        if other is None:
            found = found.tril() + found.tril(-1).T
        assert 3e-7 < error(found, block(exact[0], wanted, entries)) <= bound


@pytest.mark.parametrize("entries", [1, ROWS], ids=["trace", "full"])
def test_tokens(entries):
    left, right = token_tile(EMBEDDING, 8), token_tile(EMBEDDING, 7)
    results = {}
    for precision in ("float64", "bf16x3"):
        accumulator = KernelAccumulator(8 * entries, precision)
        accumulator.begin(8 * entries, 7 * entries)
        sides = [(t, g if precision == "float64" else g.float()) for t, g in (left, right)]
        accumulator.add_matching(*sides, entries)
        results[precision] = accumulator.result().clone()
    assert 3e-7 < error(results["bf16x3"], results["float64"]) <= PRODUCT


def test_a_left_side_is_split_once_for_all_that_it_meets(monkeypatch):
    split, seen = SplitProducts("cpu"), []
    plain = SplitProducts.split
    monkeypatch.setattr(SplitProducts, "split", lambda self, v, room: seen.append(room) or plain(self, v, room))
    one, two = torch.randn(20, 800), torch.randn(20, 600)
    with split.making_products():
        for _ in range(3):
            for left in (one, two):
                right = torch.randn(14, left.shape[1])
                assert error(multiply(left, right).double(), left.double() @ right.double().T) <= PRODUCT
    assert seen.count("other") == 6
    assert len(seen) == 8
    three = torch.randn(20, 600)
    assert torch.equal(multiply(one, one), one @ one.T), "other products are made as before"
    with split.making_products():  # the buffers of one and two are used again, not their parts
        assert error(multiply(three, two).double(), three.double() @ two.double().T) <= PRODUCT


@pytest.mark.parametrize("entries", [1, ROWS], ids=["trace", "full"])
@pytest.mark.parametrize(
    "choice", [DENSE, FACTORED, PAIRWISE], ids=lambda choice: f"{choice.representation} {choice.contraction}"
)
@pytest.mark.parametrize("name", ["one position", "positions with bias", "pixels, square", "unfolded, strided"])
def test_buffers_are_no_larger_than_planned(name, choice, entries):
    """For the parts of both sides and one product; a third of what is planned for parts is for splitting them."""
    factors, samples = FACTORS[name], 40
    columns = factors.inputs * factors.outputs + factors.bias * factors.outputs
    block_of = ParameterBlock("b", ("w",), 0, columns, "rule", "", factors)
    workload = dataclasses.replace(
        small_workload(kernel="full" if entries > 1 else "trace", outputs=ROWS, rows_per_sample=ROWS),
        blocks=(block_of,),
        entries_per_sample=entries,
        precision="bf16x3",
    )
    layout = Layout("resident", samples, columns, (Range(0, 1),), (choice,))
    split = SplitProducts("cpu")
    accumulator = KernelAccumulator(samples * entries, "bf16x3")
    accumulator._split = split
    for diagonal in (True, False):
        accumulator.begin(samples * entries, samples * entries)
        if choice == DENSE:
            left, right = torch.randn(2, samples * entries, columns * ROWS // entries)
            accumulator.add(left, None if diagonal else right)
        else:
            left, right = (tile(factors, samples, dtype=torch.float32, contraction=choice.contraction) for _ in "ab")
            method = accumulator.add_factored if choice == FACTORED else accumulator.add_pairwise
            method(factors, left, None if diagonal else right, entries)
    assert 0 < split.held_bytes <= split_bytes(workload, layout) * 2 // 3 + (samples * entries) ** 2 * 4


def test_a_block_can_be_timed():
    assert all(seconds > 0 for seconds in measure_block(FACTORS["positions"], 2, 1, "bf16x3", "cpu", 4))


@pytest.mark.parametrize("representation", ["dense", "factored", "pairwise"])
@pytest.mark.parametrize(("kind", "dataflow"), [("trace", "spill"), ("full", "resident")])
@pytest.mark.parametrize("name", NAMES)
def test_networks(name, kind, dataflow, representation, compute):
    job = case(name).job(kernel=kind, precision="bf16x3")
    found = compute(job, dataflow=dataflow, representation=representation, tile_samples=12)
    wanted = oracle.kernel(oracle.case_jacobian(name), TRAIN, kind)
    assert found.dtype == np.float32
    assert 2e-7 < oracle.error(found, wanted) <= NETWORKS < found.plan.tolerance


def test_a_plan_counts_three_products_and_says_that_a_cpu_is_slow(tmp_path):
    plans = {p: ooc_ntk.plan(case("smooth-mlp").job(precision=p)) for p in ("float32", "bf16x3")}
    assert plans["bf16x3"].flops == 3 * plans["float32"].flops
    assert any("slower than float32" in note for note in plans["bf16x3"].notes)
    assert "multiplied as three products of bf16 parts" in str(plans["bf16x3"])


def test_verify_accepts_it_and_prints_its_error(compute):
    found = compute(case("attention").job(precision="bf16x3"))
    report = ooc_ntk.verify(found.path, case("attention").job(precision="bf16x3"))
    assert report.passed
    assert 1e-7 < report.relative_error <= NETWORKS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("depth", [100, 5000, 200_000])
def test_products_on_a_gpu(depth):
    left, right = torch.randn(64, depth), torch.randn(48, depth)
    accumulator = KernelAccumulator(64, "bf16x3", "cuda")
    for other in (right, None):
        accumulator.begin(64, 64 if other is None else 48)
        accumulator.add(left, other)
        wanted = left.double() @ (left if other is None else right).double().T
        assert 1e-6 < error(accumulator.result(), wanted) <= PRODUCT


# --- TF32, emulated --------------------------------------------------------------------------------------------------


def tf32(values, *, nearest):
    """float32 with 10 bits of mantissa, rounded or cut off: which of them a product does is the library's choice."""
    bits = torch.from_numpy(np.asarray(values, np.float32)).view(torch.int32)
    if nearest:
        bits = bits + 0x0FFF + ((bits >> 13) & 1)
    return (bits & ~0x1FFF).view(torch.float32).numpy().astype(np.float64)


@pytest.mark.parametrize(("nearest", "least", "most"), [(True, 1e-5, 1e-4), (False, 2e-4, 1e-3)])
@pytest.mark.parametrize("name", NAMES)
def test_the_tolerance_of_tf32_is_above_what_it_loses(name, nearest, least, most):
    """Measured 1.3e-5 to 6.7e-5 and 2.5e-4 to 6.9e-4; the plan's tolerance is for a product of two such products."""
    from ooc_ntk.planning.planner import TOLERANCE_TF32

    rows = oracle.case_jacobian(name)
    for kind in ("trace", "full"):
        wanted = oracle.kernel(rows, TRAIN, kind)
        lost = oracle.error(oracle.kernel(tf32(rows, nearest=nearest), TRAIN, kind), wanted)
        assert least <= lost <= most
        assert 2 * lost <= TOLERANCE_TF32
