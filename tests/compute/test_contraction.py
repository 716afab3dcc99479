"""Every way to contract factors against the gradients that they stand for, expanded by definition in float64."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from hypothesis import given, settings
from hypothesis import strategies as st

from ooc_ntk.compute import expand as expand_module
from ooc_ntk.compute import pairwise as pairwise_module
from ooc_ntk.compute.contract import KernelAccumulator
from ooc_ntk.compute.expand import expand, expand_piece, pieces
from ooc_ntk.compute.held import MOST_ROWS, as_tile, join_digits, split_digits
from ooc_ntk.compute.matching import contract_matching
from ooc_ntk.compute.pairwise import contract_pairwise, sum_positions
from ooc_ntk.compute.products import multiply
from ooc_ntk.compute.rownorms import factor_norms
from ooc_ntk.compute.unfold import unfold_windows
from ooc_ntk.planning.factors import LayerFactors, Window

ROWS = 3

#: Relative Frobenius error: float64 rounding of sums of some thousand terms.
BOUND = 1e-13


def window(size, kernel, stride=1, dilation=1, before=0, after=None):
    """A window, numbers for all dimensions alike."""
    every = [(v,) * len(size) if isinstance(v, int) else v for v in (kernel, stride, dilation, before)]
    behind = every[3] if after is None else (after,) * len(size) if isinstance(after, int) else after
    return Window(size, every[0], every[1], every[2], every[3], behind)


def convolution(channels, outputs, shape, bias=False):
    positions = math.prod(shape.output)
    return LayerFactors("convolution", positions, channels * shape.taps, outputs, bias, shape)


BY_PIXELS = {
    "line": convolution(3, 4, window((7,), 3, before=1)),
    "square": convolution(3, 4, window((4, 5), 3, before=1), bias=True),
    "cube": convolution(2, 3, window((3, 2, 4), 2, before=1, after=0), bias=True),
    "dilated": convolution(2, 3, window((5, 5), 3, dilation=2, before=2)),
    "two padded sides": convolution(2, 3, window((3, 4), (2, 3), before=(1, 0), after=(0, 2)), bias=True),
    "strided": convolution(2, 3, window((3, 3), 3, stride=2, before=2)),
    "wide padding": convolution(2, 3, window((2, 2), 2, before=3), bias=True),
    "cropped in front": convolution(2, 3, window((9,), 3, before=-1, after=1)),
}
UNFOLDED = {
    "strided": convolution(3, 4, window((6, 6), 3, stride=2, before=1), bias=True),
    "patches": convolution(2, 4, window((4, 6), 2, stride=2)),
    "strided line": convolution(3, 4, window((9,), 3, stride=3), bias=True),
    "strided, dilated": convolution(2, 3, window((7, 6), 2, stride=(2, 3), dilation=(3, 2), before=1)),
    "cropped": convolution(2, 3, window((5, 5), 3, before=-1, after=0)),
    "one tap, padded": convolution(2, 3, window((3, 3), 1, before=1), bias=True),
    "one tap, strided, padded": convolution(2, 3, window((5, 4), 1, stride=2, before=1)),
    "cube": convolution(2, 3, window((4, 3, 4), 2, stride=2, before=(0, 1, 0))),
}
LINEAR = {
    "one position": LayerFactors("linear", 1, 5, 4),
    "one position with bias": LayerFactors("linear", 1, 5, 4, bias=True),
    "positions": LayerFactors("linear", 6, 5, 4),
    "positions with bias": LayerFactors("linear", 6, 5, 4, bias=True),
    "many positions of a small layer": LayerFactors("linear", 40, 3, 2, bias=True),
    "few positions of a large layer": LayerFactors("linear", 2, 30, 20, bias=True),
}
FACTORS = {
    **LINEAR,
    **{f"pixels, {name}": factors for name, factors in BY_PIXELS.items()},
    **{f"unfolded, {name}": factors for name, factors in UNFOLDED.items()},
}

every_layer = pytest.mark.parametrize("name", FACTORS)
orders = pytest.mark.parametrize("contraction", ["pairwise", "gemm"], ids=["positions first", "positions last"])
kinds = pytest.mark.parametrize("entries", [1, ROWS], ids=["trace", "full"])


def tile(factors, samples, rows=ROWS, dtype=torch.float64, contraction="pairwise"):
    """Factors in the order in which convolutions hold them for a contraction."""
    inputs = torch.randn(samples, factors.input_items, dtype=dtype)
    gradients = torch.randn(samples, rows * factors.gradient_items, dtype=dtype)
    return as_tile(dataclasses.replace(factors, channels_first=True), inputs, gradients, rows, contraction)


def token_tile(factors, samples, highest=None, rows=ROWS):
    """Token 0 is in every sample, others are in some, once or several times; there is padding."""
    tokens = torch.randint(-1, factors.inputs if highest is None else highest, (samples, factors.positions))
    tokens[:, 0] = 0
    gradients = torch.randn(samples, factors.positions, rows, factors.outputs, dtype=torch.float64)
    return tokens.to(torch.int32), gradients


def unfolded(factors, inputs):
    """Inputs by definition: (samples, positions, inputs), every window looked up pixel by pixel."""
    samples, shape = len(inputs), factors.window
    if shape is None:
        return inputs.view(samples, factors.positions, factors.inputs)
    pixels = inputs.view(samples, *shape.size, factors.channels)
    found = inputs.new_zeros(samples, factors.positions, shape.taps, factors.channels)
    for s, position in enumerate(itertools.product(*map(range, shape.output))):
        for t, tap in enumerate(itertools.product(*map(range, shape.kernel))):
            place = [
                p * step + k * apart - before
                for p, k, step, apart, before in zip(
                    position, tap, shape.stride, shape.dilation, shape.before, strict=True
                )
            ]
            if all(0 <= at < size for at, size in zip(place, shape.size, strict=True)):
                found[:, s, t] = pixels[(slice(None), *place)]
    return found.flatten(2)


def dense(factors, inputs, gradients):
    """Gradients by definition, bias included: (samples, rows, columns)."""
    if factors.kind == "tokens":
        hot = F.one_hot((inputs.long() + 1), factors.inputs + 1)[..., 1:].to(gradients)
        return torch.einsum("nsv,nsro->nrvo", hot, gradients).flatten(2)
    weight = torch.einsum("nsro,nsi->nroi", gradients, unfolded(factors, inputs)).flatten(2)
    return torch.cat([weight, gradients.sum(1)], 2) if factors.bias else weight


def block(left, right, entries):
    """The kernel of two sets of dense gradients."""
    one, other = (value.reshape(len(value) * entries, -1) for value in (left, right))
    return one @ other.T


def error(found, wanted):
    assert found.shape == wanted.shape
    return float((found - wanted).norm() / wanted.norm())


def contracted(method, factors, left, right, entries):
    """A tile by an accumulator; of a diagonal tile only the lower triangle counts."""
    rows, columns = len(left[0]) * entries, len((right or left)[0]) * entries
    accumulator = KernelAccumulator(max(rows, columns), "float64")
    accumulator.begin(rows, columns)
    getattr(accumulator, method)(*((factors,) if method != "add_matching" else ()), left, right, entries)
    return accumulator.result().clone()


# --- windows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in FACTORS if FACTORS[name].window is not None])
def test_windows_by_definition(name):
    factors = FACTORS[name]
    inputs, _ = tile(factors, 3)
    pixels = inputs.view(3, *factors.window.size, factors.channels)
    wanted = unfolded(factors, inputs)
    assert torch.equal(unfold_windows(pixels, factors.window).flatten(2), wanted)
    strided = torch.empty(3, factors.channels, *factors.window.size, dtype=torch.float64).movedim(1, -1).copy_(pixels)
    assert not strided.is_contiguous() or factors.channels == 1
    assert torch.equal(unfold_windows(strided, factors.window).flatten(2), wanted), "channels first in memory"
    out = torch.full((3, factors.positions, factors.window.taps, factors.channels), torch.nan, dtype=torch.float64)
    found = unfold_windows(pixels, factors.window, out)
    assert found.data_ptr() == out.data_ptr()
    assert torch.equal(out.flatten(2), wanted)


def test_windows_are_those_of_torch():
    shape = window((7, 6), (3, 2), stride=(2, 1), dilation=(1, 3), before=(1, 2))
    pixels = torch.randn(2, 5, 7, 6, dtype=torch.float64)
    wanted = F.unfold(
        pixels, shape.kernel, shape.dilation, shape.before, shape.stride
    )  # (images, channels·taps, places)
    found = unfold_windows(pixels.movedim(1, -1), shape)
    assert torch.equal(found.permute(0, 3, 2, 1).reshape(wanted.shape), wanted)
    assert math.prod(shape.output) == wanted.shape[2]


# --- expanding -------------------------------------------------------------------------------------------------------


@orders
@pytest.mark.parametrize("unfolded_bytes", [1, 1000, 2**24])
@every_layer
def test_expanding_all_of_a_layer(name, unfolded_bytes, contraction, monkeypatch):
    """Windows of a large image are unfolded for some channels at a time."""
    monkeypatch.setattr(expand_module, "UNFOLDED_BYTES", unfolded_bytes)
    factors = FACTORS[name]
    inputs, gradients = tile(factors, 4, contraction=contraction)
    wanted = dense(dataclasses.replace(factors, bias=False), inputs, gradients)
    found = expand(factors, (inputs, gradients))
    assert found.shape == (4, ROWS, factors.outputs, factors.inputs)
    assert error(found.flatten(2), wanted) <= BOUND


def test_expanding_tokens():
    factors = LayerFactors("tokens", 6, 5, 4)
    inputs, gradients = token_tile(factors, 4)
    inputs[1] = -1
    found = expand(factors, (inputs, gradients))
    assert found.shape == (4, ROWS, 5, 4)
    assert error(found.flatten(2), dense(factors, inputs, gradients)) <= BOUND
    assert not found[1].any(), "a sample of nothing but padding"
    single = inputs.clone()
    single[1] = 4
    assert not torch.equal(expand(factors, (single, gradients)), found), "padding is not the last row"


@settings(max_examples=100, deadline=None)
@given(
    taps=st.sampled_from([None, 1, 4, 9, 49]),
    channels=st.integers(1, 70),
    outputs=st.integers(1, 70),
    rows=st.integers(1, 5),
    whole=st.booleans(),
    items=st.sampled_from([1, 10, 200, 1500, 5000]),
)
def test_pieces_cover_every_element_once(taps, channels, outputs, rows, whole, items):
    shape = None if taps is None else window((taps + 2,), taps)
    factors = LayerFactors(
        "linear" if shape is None else "convolution", 3, channels * (taps or 1), outputs, window=shape
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expand_module, "LINEAR_INPUTS", 25)
        found = list(pieces(factors, rows, whole_rows=whole, items=items))
    covered = np.zeros((channels, rows, outputs), dtype=np.int8)
    for piece in found:
        view = covered[piece.channels, piece.rows, piece.outputs]
        view += 1
        assert piece.items(factors) == view.size * (taps or 1)
        assert 0 <= piece.channels.start < piece.channels.stop <= channels
        assert not whole or (piece.rows.start, piece.rows.stop) == (0, rows)
    assert (covered == 1).all()
    chosen = max(found, key=lambda piece: piece.items(factors))
    if chosen.items(factors) > items:
        assert chosen.outputs.stop - chosen.outputs.start == 1, "a piece is too large only if a single output is"
        assert not whole or chosen.channels.stop - chosen.channels.start == 1, "and a single channel, with all rows"


@pytest.mark.parametrize("items", [1, 40, 10**6])
@pytest.mark.parametrize("by_rows", [True, False])
@orders
@every_layer
def test_expanding_piece_by_piece_into_a_used_buffer(name, contraction, by_rows, items, monkeypatch):
    monkeypatch.setattr(expand_module, "PIECE_INPUTS", 2)
    monkeypatch.setattr(expand_module, "LINEAR_INPUTS", 2)
    monkeypatch.setattr(expand_module, "UNFOLDED_BYTES", 2000)  # a few samples are unfolded at a time
    factors = FACTORS[name]
    inputs, gradients = tile(factors, 5, contraction=contraction)
    taps = factors.window.taps if factors.window is not None else 1
    parts = list(pieces(factors, ROWS, whole_rows=False, items=items))
    assert len(parts) == 1 if items == 10**6 and factors.channels <= 2 else parts
    buffer = torch.full((5 * max(piece.items(factors) for piece in parts) + 7,), torch.nan, dtype=torch.float64)
    found = torch.full((5, ROWS, factors.outputs, taps, factors.channels), torch.nan, dtype=torch.float64)
    for piece in parts:
        one = expand_piece(factors, (inputs, gradients), piece, buffer, by_rows=by_rows)
        assert one.data_ptr() == buffer.data_ptr()
        assert one.shape == (5, piece.items(factors))
        lengths = [part.stop - part.start for part in (piece.rows, piece.outputs, piece.channels)]
        if by_rows:
            one = one.view(5, lengths[0], lengths[1], taps, lengths[2])
        else:
            one = one.view(5, taps, lengths[2], lengths[0], lengths[1]).permute(0, 3, 4, 1, 2)
        found[:, piece.rows, piece.outputs, :, piece.channels] = one
    wanted = dense(dataclasses.replace(factors, bias=False), inputs, gradients)
    assert error(found.flatten(2), wanted) <= BOUND
    assert buffer[-7:].isnan().all(), "nothing behind a piece is written"


# --- tiles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["add_factored", "add_pairwise"])
@orders
@kinds
@every_layer
def test_tiles_off_the_diagonal(name, entries, contraction, method):
    factors = FACTORS[name]
    left, right = (tile(factors, samples, contraction=contraction) for samples in (5, 3))
    wanted = block(dense(factors, *left), dense(factors, *right), entries)
    assert error(contracted(method, factors, left, right, entries), wanted) <= BOUND


@pytest.mark.parametrize("method", ["add_factored", "add_pairwise"])
@kinds
@every_layer
def test_tiles_on_the_diagonal(name, entries, method):
    factors = FACTORS[name]
    left = tile(factors, 6)
    found = contracted(method, factors, left, None, entries)
    gradients = dense(factors, *left)
    assert error(found.tril(), block(gradients, gradients, entries).tril()) <= BOUND


@pytest.mark.parametrize("positions", [(1, 1), (20, 45), (45, 20), (1000, 1000)])
@pytest.mark.parametrize("diagonal", [True, False])
@kinds
@every_layer
def test_pairwise_in_blocks_of_any_size(name, entries, diagonal, positions, monkeypatch):
    """Blocks of one sample, of a few, unevenly on both sides, and of all: together every pair that is needed once."""
    monkeypatch.setattr("ooc_ntk.planning.memory.ROW_POSITIONS", positions[0])
    monkeypatch.setattr("ooc_ntk.planning.memory.COLUMN_POSITIONS", positions[1])
    factors = FACTORS[name]
    left, right = tile(factors, 5), None if diagonal else tile(factors, 4)
    found = torch.zeros(5 * entries, (5 if diagonal else 4) * entries, dtype=torch.float64)
    times = torch.zeros_like(found)
    steps = pairwise_module.pairwise_steps(factors, entries)

    def add_block(values, row, column):
        assert values.shape[0] <= steps[0] * entries
        assert values.shape[1] <= steps[1] * entries
        part = slice(row, row + values.shape[0]), slice(column, column + values.shape[1])
        found[part] += values
        times[part] += 1

    contract_pairwise(factors, left, right, entries, add_block)
    wanted = block(dense(factors, *left), dense(factors, *(right or left)), entries)
    if diagonal:
        assert (times.tril() == torch.ones_like(times).tril()).all()
        found, wanted = found.tril(), wanted.tril()
    else:
        assert (times == 1).all()
    assert error(found, wanted) <= BOUND


def test_both_ways_to_multiply_windows_are_tried():
    assert all(factors.by_pixels for factors in BY_PIXELS.values())
    assert not any(factors.by_pixels for factors in (*UNFOLDED.values(), *LINEAR.values()))


@st.composite
def _windows(draw):
    dims = draw(st.integers(1, 3))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel, stride, dilation, before, after = each(1, 3), each(1, 3), each(1, 3), each(0, 3), each(0, 3)
    least = [max(1, d * (k - 1) + 1 - b - a) for k, d, b, a in zip(kernel, dilation, before, after, strict=True)]
    size = tuple(low + draw(st.integers(0, 3 if dims < 3 else 1)) for low in least)
    return Window(size, kernel, stride, dilation, before, after)


@settings(max_examples=100, deadline=None)
@given(shape=_windows(), bias=st.booleans(), full=st.booleans(), diagonal=st.booleans(), by_pixels=st.booleans())
def test_pairwise_over_windows_of_any_geometry(shape, bias, full, diagonal, by_pixels):
    """By pixels and by unfolding, whichever would be cheaper."""
    factors, entries = convolution(2, 2, shape, bias), 2 if full else 1
    torch.manual_seed(0)
    left, right = tile(factors, 3, rows=2), None if diagonal else tile(factors, 2, rows=2)
    found = torch.zeros(3 * entries, (3 if diagonal else 2) * entries, dtype=torch.float64)

    def add_block(values, row, column):
        found[row : row + values.shape[0], column : column + values.shape[1]] += values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerFactors, "by_pixels", by_pixels)
        contract_pairwise(factors, left, right, entries, add_block)
    wanted = block(dense(factors, *left), dense(factors, *(right or left)), entries)
    assert float((found - wanted).tril(0 if diagonal else 99).norm()) <= 1e-12 * float(1 + wanted.norm())


@pytest.mark.parametrize("positions", [1, 4])
@kinds
def test_the_sum_over_pairs_of_positions(entries, positions):
    rows, columns = 3, 5
    inputs = torch.randn(positions, rows, positions, columns, dtype=torch.float64)
    gradients = torch.randn(positions, rows, entries, positions, columns, entries, dtype=torch.float64)
    wanted = torch.einsum("sitj,siatjb->iajb", inputs, gradients).reshape(rows * entries, columns * entries)
    given_inputs = inputs.reshape(positions * rows, positions * columns)
    given_gradients = gradients.reshape(positions * rows * entries, positions * columns * entries).clone()
    assert error(sum_positions(given_inputs, given_gradients, rows, columns, positions, entries), wanted) <= BOUND
    assert torch.equal(given_inputs, inputs.view_as(given_inputs)), "the inputs' products may be used again"


@pytest.mark.parametrize("depth", [1, 7, 8, 9, 40])
def test_products_in_blocks_of_columns(depth):
    left, right = torch.randn(3, depth, dtype=torch.float64), torch.randn(5, depth, dtype=torch.float64)
    assert error(multiply(left, right, columns=8), left @ right.T) <= BOUND
    out = torch.full((3, 5), torch.nan, dtype=torch.float64)
    assert multiply(left, right, out, columns=8).data_ptr() == out.data_ptr()
    assert error(out, left @ right.T) <= BOUND


@pytest.mark.parametrize("method", ["add_factored", "add_pairwise"])
def test_layers_add_up_in_one_tile(method):
    """Buffers of one layer are reused for a larger and a smaller one, on both sides."""
    chosen = [FACTORS[name] for name in ("positions", "unfolded, strided", "one position", "pixels, square")]
    tiles = [(tile(factors, 5), tile(factors, 3)) for factors in chosen]
    accumulator = KernelAccumulator(5, "float64")
    accumulator.begin(5, 3)
    for factors, (left, right) in zip(chosen, tiles, strict=True):
        getattr(accumulator, method)(factors, left, right, 1)
    wanted = sum(block(dense(f, *left), dense(f, *right), 1) for f, (left, right) in zip(chosen, tiles, strict=True))
    assert error(accumulator.result(), wanted) <= BOUND


@pytest.mark.parametrize("method", ["add_factored", "add_pairwise"])
def test_factors_in_bf16(method):
    """Small whole numbers, of which nothing is lost."""
    factors = LayerFactors("linear", 4, 3, 2, bias=True)
    left, right = ((torch.randint(-2, 3, v.shape).bfloat16() for v in tile(factors, n)) for n in (5, 3))
    left, right = tuple(left), tuple(right)
    accumulator = KernelAccumulator(5, "bf16")
    accumulator.begin(5, 3)
    getattr(accumulator, method)(factors, left, right, 1)
    wanted = block(*(dense(factors, *(v.double() for v in side)) for side in (left, right)), 1)
    assert torch.equal(accumulator.result(), wanted)


def test_bf16_products_are_widened_in_stripes(monkeypatch):
    monkeypatch.setattr("ooc_ntk.compute.contract.WIDENED_ITEMS", 7)
    left, right = torch.randint(-2, 3, (5, 6)).bfloat16(), torch.randint(-2, 3, (4, 6)).bfloat16()
    accumulator = KernelAccumulator(5, "bf16")
    accumulator.begin(5, 4)
    accumulator.add(left, right)
    accumulator.add(left, right)
    assert torch.equal(accumulator.result(), 2 * left.double() @ right.double().T)


# --- tokens ----------------------------------------------------------------------------------------------------------

TOKENS = LayerFactors("tokens", 7, 9, 4)


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("case", ["mixed", "all alike", "padding", "nothing shared", "positions"])
@kinds
def test_tokens(entries, case, diagonal):
    left, right = token_tile(TOKENS, 5), None if diagonal else token_tile(TOKENS, 4, highest=6)
    if case == "all alike":
        for side in (left, right or left):
            side[0].fill_(3)
    elif case == "padding":
        left[0][2] = -1  # a sample without any token: no token is everywhere
    elif case == "nothing shared" and right is not None:
        left[0].clamp_(max=3)
        right[0].add_(5).clamp_(max=8)
    elif case == "positions":
        for side in (left, right or left):
            side[0].copy_(torch.arange(7).expand_as(side[0]))  # as position embeddings have them
    wanted = block(dense(TOKENS, *left), dense(TOKENS, *(right or left)), entries)
    found = contracted("add_matching", TOKENS, left, right, entries)
    if case == "nothing shared" and right is not None:
        assert not wanted.any()
        assert not found.any()
        return
    assert error(found.tril() if diagonal else found, wanted.tril() if diagonal else wanted) <= BOUND


@kinds
def test_tokens_that_every_sample_has_go_through_one_product(entries):
    """And no other ones: rows that a sample does not have would be multiplied for nothing."""
    tokens = torch.tensor([[0, 1, 1, 5], [1, 0, 6, -1], [0, 0, 1, 6]], dtype=torch.int32)
    other = torch.tensor([[1, 0, 6, 6], [0, 1, -1, -1]], dtype=torch.int32)
    left = tokens, torch.randn(3, 4, ROWS, 2, dtype=torch.float64)
    right = other, torch.randn(2, 4, ROWS, 2, dtype=torch.float64)
    products, places = [], []
    contract_matching(
        left,
        right,
        entries,
        lambda one, two: products.append((one.shape, two.shape)),
        lambda value, rows, columns: places.append((value.shape, rows.tolist(), columns.tolist())),
    )
    depth = 2 * 2 * ROWS // entries  # two tokens of two outputs
    assert products == [((3 * entries, depth), (2 * entries, depth))]
    (place,) = places  # token 6: samples 1 and 2 of the rows, 0 of the columns
    assert place[0] == (2 * entries, entries)
    assert place[1] == [sample * entries + entry for sample in (1, 2) for entry in range(entries)]
    assert place[2] == list(range(entries))


def test_a_tile_of_nothing_but_padding():
    left = torch.full((3, 4), -1, dtype=torch.int32), torch.randn(3, 4, ROWS, 2, dtype=torch.float64)
    assert not contracted("add_matching", TOKENS, left, None, 1).any()
    assert not expand(LayerFactors("tokens", 4, 9, 2), left).any()
    assert not factor_norms(LayerFactors("tokens", 4, 9, 2), left).any()


# --- an embedding that is tied to a linear layer ---------------------------------------------------------------------

TIED = {
    "a word at a time": LayerFactors("linear", 1, 4, 9, lookups=5),
    "words": LayerFactors("linear", 6, 4, 9, lookups=5),
    "one looked up": LayerFactors("linear", 3, 5, 300, bias=True, lookups=1),
}

every_tied = pytest.mark.parametrize("name", TIED)


def tied_tile(factors, samples, rows=ROWS):
    """Row 0 is looked up by every sample, others by some, once or several times; the highest one is there as well."""
    inputs = torch.randn(samples, factors.input_items, dtype=torch.float64)
    gradients = torch.randn(samples, rows * factors.gradient_items, dtype=torch.float64)
    found = as_tile(factors, inputs, gradients, rows)
    numbers = torch.randint(factors.outputs, (samples, factors.lookups))
    numbers[:, 0] = 0
    numbers[-1] = factors.outputs - 1
    found[2].copy_(split_digits(numbers))
    return found


def tied_dense(factors, found):
    """Gradients by definition: those of the linear layer and those of the embedding, of one weight."""
    plain = dataclasses.replace(factors, lookups=0)
    gradients = dense(plain, *found[:2])
    hot = F.one_hot(join_digits(found[2]), factors.outputs).double()
    weight = factors.outputs * factors.inputs
    gradients[:, :, :weight] += torch.einsum("ntv,ntri->nrvi", hot, found[3]).flatten(2)
    return gradients


@pytest.mark.parametrize("method", ["add_factored", "add_pairwise"])
@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("positions", [(1, 1), (7, 11), (512, 1024)])
@kinds
@every_tied
def test_tied_tiles_meet_in_all_pairs(name, entries, positions, diagonal, method, monkeypatch):
    monkeypatch.setattr("ooc_ntk.planning.memory.ROW_POSITIONS", positions[0])
    monkeypatch.setattr("ooc_ntk.planning.memory.COLUMN_POSITIONS", positions[1])
    factors = TIED[name]
    left, right = tied_tile(factors, 6), None if diagonal else tied_tile(factors, 4)
    wanted = block(tied_dense(factors, left), tied_dense(factors, right or left), entries)
    found = contracted(method, factors, left, right, entries)
    assert error(found.tril() if diagonal else found, wanted.tril() if diagonal else wanted) <= BOUND


@pytest.mark.parametrize("items", [1, 40, 10**6])
@pytest.mark.parametrize("by_rows", [True, False])
@every_tied
def test_tied_layers_piece_by_piece(name, by_rows, items, monkeypatch):
    monkeypatch.setattr(expand_module, "LINEAR_INPUTS", 2)
    factors = TIED[name]
    left = tied_tile(factors, 5)
    found = torch.full((5, ROWS, factors.outputs, factors.inputs), torch.nan, dtype=torch.float64)
    buffer = torch.full((found.numel(),), torch.nan, dtype=torch.float64)
    for piece in pieces(factors, ROWS, whole_rows=False, items=items):
        one = expand_piece(factors, left, piece, buffer, by_rows=by_rows)
        rows, outputs, channels = (part.stop - part.start for part in (piece.rows, piece.outputs, piece.channels))
        shaped = (
            one.view(5, rows, outputs, channels)
            if by_rows
            else one.view(5, channels, rows, outputs).permute(0, 2, 3, 1)
        )
        found[:, piece.rows, piece.outputs, piece.channels] = shaped
    wanted = tied_dense(dataclasses.replace(factors, bias=False), left)
    assert error(found.flatten(2), wanted) <= BOUND
    assert error(expand(factors, left).flatten(2), wanted) <= BOUND


@every_tied
def test_norms_of_tied_layers(name):
    factors = TIED[name]
    left = tied_tile(factors, 40)
    assert error(factor_norms(factors, left), tied_dense(factors, left).square().sum(2)) <= BOUND


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_row_numbers_survive_every_dtype(dtype):
    numbers = torch.tensor([[0, 1, 255, 256], [257, 65_535, 65_536, MOST_ROWS - 1]])
    assert torch.equal(join_digits(split_digits(numbers).to(dtype)), numbers)


@pytest.mark.parametrize("method", ["add_factored", "add_pairwise"])
def test_a_row_that_is_looked_up_many_times_in_bf16(method):
    """512 equal terms: added up in bf16 they would stop growing at 256."""
    factors = LayerFactors("linear", 1, 2, 3, lookups=512)
    inputs, gradients = (torch.zeros(3, items).bfloat16() for items in (factors.input_items, factors.gradient_items))
    left = as_tile(factors, inputs, gradients, 1)
    left[3].fill_(1)
    accumulator = KernelAccumulator(3, "bf16")
    accumulator.begin(3, 3)
    getattr(accumulator, method)(factors, left, None, 1)
    assert (accumulator.result().tril() == 2 * 512**2 * torch.ones(3, 3).tril()).all()


def test_a_token_that_is_repeated_many_times_in_bf16():
    left = torch.zeros(3, 512, dtype=torch.int32), torch.ones(3, 512, 1, 4).bfloat16()
    accumulator = KernelAccumulator(3, "bf16")
    accumulator.begin(3, 3)
    accumulator.add_matching(left, None, 1)
    assert (accumulator.result().tril() == 4 * 512**2 * torch.ones(3, 3).tril()).all()


# --- norms -----------------------------------------------------------------------------------------------------------


@orders
@every_layer
def test_norms_are_the_diagonal(name, contraction):
    factors = FACTORS[name]
    left = tile(factors, 5, contraction=contraction)
    found = factor_norms(factors, left)
    assert found.shape == (5, ROWS)
    assert found.dtype == torch.float64
    assert error(found, dense(factors, *left).square().sum(2)) <= BOUND
    full = contracted("add_pairwise", factors, left, None, ROWS).diagonal().view(5, ROWS)
    trace = contracted("add_factored", factors, left, None, 1).diagonal()
    assert error(found, full) <= BOUND
    assert error(found.sum(1), trace) <= BOUND


def test_norms_are_taken_both_ways(monkeypatch):
    """Pairs of positions where they are fewer than columns; every layer here is tried the other way as well."""
    expanded = []

    def counted(*args, **options):
        expanded.append(args[0])
        return expand_piece(*args, **options)

    monkeypatch.setattr("ooc_ntk.compute.rownorms.expand_piece", counted)
    for name, factors in FACTORS.items():
        before, left = len(expanded), tile(factors, 2)
        found = factor_norms(factors, left)
        assert error(found, dense(factors, *left).square().sum(2)) <= BOUND, name
        if factors.positions == 1:
            assert len(expanded) == before, "one position is never expanded"
    names = [name for name, factors in FACTORS.items() if factors in expanded]
    assert {"many positions of a small layer", "pixels, square"} <= set(names)
    assert any(FACTORS[name].bias for name in names)
    assert any(FACTORS[name].window is not None and name not in names for name in FACTORS)


def test_norms_of_tokens():
    left = token_tile(TOKENS, 6)
    left[0][1] = -1
    left[0][2] = 3
    found = factor_norms(TOKENS, left)
    assert error(found, dense(TOKENS, *left).square().sum(2)) <= BOUND
    assert not found[1].any()


def test_norms_of_float32_are_summed_in_float64():
    factors = LayerFactors("linear", 300, 4, 3)
    inputs, gradients = tile(factors, 2)
    found = factor_norms(factors, (inputs.float(), gradients.float()))
    assert found.dtype == torch.float64
    wanted = dense(factors, inputs.float().double(), gradients.float().double()).square().sum(2)
    assert error(found, wanted) <= 1e-6
