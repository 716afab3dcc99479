"""The columns of a pass: every one in exactly one piece, in the place that the oracle's order gives it."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ooc_ntk.planning.columns import pass_columns
from ooc_ntk.planning.planner import Preferences, make_plan
from ooc_ntk.planning.rates import UNCALIBRATED
from tests.planning.strategies import ample, blocks_of, sizes_of, small_workload


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6), span=st.integers(1, 40), passes=st.integers(1, 6))
def test_pieces_cover_every_column_once_and_in_order(sizes, span, passes):
    workload = small_workload(blocks=blocks_of(sizes), train_samples=3)
    spans = -(-workload.columns // min(span, workload.columns))
    passes = min(passes, spans)
    preferences = Preferences("resident" if passes == 1 else "recompute", 2, span, passes)
    plan = make_plan(workload, ample(), UNCALIBRATED, preferences)
    parameters = sizes_of(workload.blocks)
    starts = dict(zip(parameters, np.cumsum([0, *parameters.values()]), strict=False))
    owner = {name: block.name for block in workload.blocks for name in block.parameters}

    layout = plan.layout.spans(plan)
    filled = np.full(plan.columns, -1)
    for generation, spans_of_pass in enumerate(plan.passes):
        found = pass_columns(plan, parameters, generation)
        assert [index for index, _ in found.spans] == list(range(spans_of_pass.start, spans_of_pass.stop))
        assert found.blocks == tuple(owner[name] for name in found.names)
        used = set()
        for index, pieces in found.spans:
            first = layout[index].start
            for piece in pieces:
                name = found.names[piece.parameter]
                used.add(name)
                wanted = np.arange(parameters[name])[found.wanted[piece.parameter]]
                source = wanted[piece.source] + starts[name]
                target = np.arange(first + piece.target.start, first + piece.target.stop)
                assert (filled[target] == -1).all(), "a column is filled twice"
                filled[target] = source
        assert used == set(found.names), "a parameter is derived for nothing"
    assert (filled == np.arange(plan.columns)).all()
