"""Spans: every dense column in exactly one, every factored block in one of its own, and the passes over them."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ooc_ntk.planning.factors import TOKEN_BYTES, LayerFactors, Window
from ooc_ntk.planning.layout import Layout, pass_ranges
from ooc_ntk.planning.spans import DENSE, FACTORED, PAIRWISE, TOKENS, BlockShape, Cut, Span, lay_spans, span_parts
from ooc_ntk.planning.tiles import Range
from ooc_ntk.planning.workload import ParameterBlock
from tests.planning.strategies import small_workload

WINDOW = Window((4, 4), (3, 3), (1, 1), (1, 1), (1, 1), (1, 1))


@st.composite
def _cuts(draw):
    """Blocks of every kind with a choice that each allows."""
    blocks, choices = [], []
    for _ in range(draw(st.integers(1, 7))):
        kind = draw(st.sampled_from(["none", "linear", "convolution", "tokens"]))
        inputs, outputs, bias = draw(st.integers(1, 6)), draw(st.integers(1, 6)), draw(st.booleans())
        if kind == "none":
            blocks.append(BlockShape(draw(st.integers(1, 40))))
            choices.append(DENSE)
            continue
        if kind == "convolution":
            factors = LayerFactors("convolution", 16, 9 * inputs, outputs, bias, WINDOW)
        else:
            factors = LayerFactors(kind, draw(st.integers(1, 9)), inputs, outputs, bias and kind == "linear")
        blocks.append(BlockShape(factors.columns, factors))
        choices.append(draw(st.sampled_from([DENSE, TOKENS] if kind == "tokens" else [DENSE, FACTORED, PAIRWISE])))
    return blocks, choices


@settings(max_examples=200, deadline=None)
@given(cut=_cuts(), width=st.integers(1, 60))
def test_every_dense_column_is_in_one_span_and_every_other_block_has_one(cut, width):
    blocks, choices = cut
    spans = lay_spans(blocks, choices, width)
    assert [span.index for span in spans] == list(range(len(spans)))
    held = [index for index, choice in enumerate(choices) if choice.representation != "dense"]
    assert [span.block for span in spans if span.block is not None] == held
    assert all((span.start, span.stop, span.columns) == (0, 0, 0) for span in spans if span.block is not None)

    dense = [span for span in spans if span.block is None]
    columns = sum(block.columns for block, choice in zip(blocks, choices, strict=True) if choice == DENSE)
    edges = [0, *(span.stop for span in dense)]
    assert [span.start for span in dense] == edges[:-1], "each begins where the one before ends"
    assert edges[-1] == columns
    assert all(span.columns == width for span in dense[:-1])
    assert all(0 < span.columns <= width for span in dense)


@settings(max_examples=200, deadline=None)
@given(cut=_cuts(), width=st.integers(1, 60))
def test_spans_are_in_the_order_of_the_model(cut, width):
    """A dense span stands where the block of its last column does, so that neighbours are derived together."""
    blocks, choices = cut
    owner = [
        index for index, (b, c) in enumerate(zip(blocks, choices, strict=True)) if c == DENSE for _ in range(b.columns)
    ]
    places = [
        span.block if span.block is not None else owner[span.stop - 1] for span in lay_spans(blocks, choices, width)
    ]
    assert places == sorted(places)


@settings(max_examples=200, deadline=None)
@given(cut=_cuts(), width=st.integers(1, 60), rows=st.integers(1, 12), item=st.sampled_from([2, 4, 8]))
def test_parts_hold_what_factors_say_they_hold(cut, width, rows, item):
    blocks, choices = cut
    found = Cut.of(blocks, choices, rows, item, width)
    assert found.spans == lay_spans(blocks, choices, width)
    for span, parts, held, stored in zip(found.spans, found.parts, found.held, found.stored, strict=True):
        assert parts == span_parts(span, blocks, rows, item, width)
        assert all(part.span == span.index for part in parts)
        assert held == sum(part.sample_bytes for part in parts)
        assert stored == sum(part.stored_bytes for part in parts)
        if span.block is None:
            (part,) = parts
            assert (part.name, part.items, part.padded) == ("dense", rows * span.columns, rows * width)
            assert (part.item_bytes, part.tokens) == (item, False)
            continue
        factors = blocks[span.block].factors
        inputs, gradients = parts
        assert (inputs.name, gradients.name) == ("inputs", "gradients")
        assert inputs.items == inputs.padded == factors.input_items
        assert gradients.items == gradients.padded == rows * factors.gradient_items
        assert inputs.tokens == (factors.kind == "tokens")
        assert inputs.item_bytes == (TOKEN_BYTES if inputs.tokens else item)
        assert (gradients.item_bytes, gradients.tokens) == (item, False)
        assert held == stored == factors.held_bytes(rows, item)


def test_a_small_model_by_hand():
    conv = LayerFactors("convolution", 16, 9 * 2, 5, True, WINDOW)
    words = LayerFactors("tokens", 7, 100, 4)
    blocks = [BlockShape(400, words), BlockShape(95, conv), BlockShape(10), BlockShape(7)]
    spans = lay_spans(blocks, [TOKENS, FACTORED, DENSE, DENSE], 6)
    assert spans == (Span(0, 0, 0, 0), Span(1, 0, 0, 1), Span(2, 0, 6), Span(3, 6, 12), Span(4, 12, 17))
    cut = Cut.of(blocks, [TOKENS, FACTORED, DENSE, DENSE], 3, 4, 6)
    # 7 tokens and 7 × 3 × 4 gradients; 16 pixels of 2 channels and 16 × 3 × 5 gradients; 3 rows of 6 or 5 columns.
    assert cut.held == (28 + 336, 128 + 960, 72, 72, 60)
    assert cut.stored == (28 + 336, 128 + 960, 72, 72, 72)
    every = Cut.of(blocks, [DENSE] * 4, 3, 4, 512)
    assert every.held == (3 * 4 * 512,)


def test_a_model_of_factors_alone_has_no_dense_span():
    factors = LayerFactors("linear", 1, 3, 2)
    spans = lay_spans([BlockShape(6, factors)] * 3, [PAIRWISE] * 3, 10)
    assert spans == tuple(Span(index, 0, 0, index) for index in range(3))


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=14), room=st.integers(1, 120))
def test_passes_are_as_few_and_as_equal_as_memory_allows(sizes, room):
    found = pass_ranges(sizes, room)
    if max(sizes) > room:
        assert found is None
        return
    assert [span.start for span in found] == [0, *(span.stop for span in found[:-1])]
    assert found[-1].stop == len(sizes)

    def widest(cuts):
        edges = [0, *cuts, len(sizes)]
        return max(sum(sizes[a:b]) for a, b in itertools.pairwise(edges))

    largest = widest([span.stop for span in found[:-1]])
    assert largest <= room
    if len(sizes) <= 9:  # against all ways to cut
        fewest = next(n for n in range(len(sizes)) if any(widest(c) <= room for c in _cut(sizes, n))) + 1
        assert len(found) <= fewest
        assert largest == min(widest(c) for c in _cut(sizes, fewest - 1))


def _cut(sizes, count):
    return itertools.combinations(range(1, len(sizes)), count)


def test_passes_by_hand():
    assert pass_ranges([5, 1, 1, 1, 5], 7) == (Range(0, 3), Range(3, 5))
    assert pass_ranges([1, 1, 1, 9], 9) == (Range(0, 3), Range(3, 4))
    assert pass_ranges([4], 4) == (Range(0, 1),)
    assert pass_ranges([], 4) is None


@pytest.mark.parametrize("width", [4, 5, 7, 11, 100])
def test_a_pass_derives_the_blocks_of_its_spans(width):
    """A block of which a pass keeps only some columns is derived whole, in every pass that keeps some."""
    linear, words = LayerFactors("linear", 3, 4, 2), LayerFactors("tokens", 5, 6, 2)
    blocks, start = [], 0
    for index, (columns, factors) in enumerate([(5, None), (8, linear), (6, None), (12, words), (3, None)]):
        blocks.append(ParameterBlock(f"b{index}", (f"b{index}.w",), start, start + columns, "rule", "", factors))
        start += columns
    choices = (DENSE, PAIRWISE, DENSE, TOKENS, DENSE)
    workload = small_workload(blocks=tuple(blocks))
    count = len(Layout("recompute", 10, width, (Range(0, 1),), choices).spans(workload))
    assert count == 2 + math.ceil(14 / width)
    layout = Layout("recompute", 10, width, tuple(Range(i, i + 1) for i in range(count)), choices)
    owner = [index for index in (0, 2, 4) for _ in range(blocks[index].columns)]
    for index, span in enumerate(layout.spans(workload)):
        wanted = {span.block} if span.block is not None else set(owner[span.start : span.stop])
        assert layout.pass_blocks(workload, index) == tuple(sorted(wanted))
        assert layout.pass_spans(workload, index) == (span,)
    whole = Layout("recompute", 10, width, (Range(0, count),), choices)
    assert whole.pass_blocks(workload, 0) == tuple(range(5))
    assert whole.pass_bytes(workload, 0) == sum(layout.pass_bytes(workload, index) for index in range(count))
