"""Representations: what a block allows, what is chosen for it, and what of that a plan keeps and digests."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ooc_ntk.errors import StorageError
from ooc_ntk.planning.cost import block_flops
from ooc_ntk.planning.factors import LayerFactors, Window
from ooc_ntk.planning.layout import DATAFLOWS
from ooc_ntk.planning.plan import Plan, PlannedBlock
from ooc_ntk.planning.planner import Preferences, make_plan
from ooc_ntk.planning.rates import UNCALIBRATED
from ooc_ntk.planning.representation import (
    CLEARLY_FASTER,
    POLICIES,
    REPRESENTATIONS,
    allowed_choices,
    choose,
)
from ooc_ntk.planning.spans import DENSE, FACTORED, PAIRWISE, TOKENS
from ooc_ntk.planning.workload import ParameterBlock
from tests.planning.strategies import ample, small_workload

#: A late convolution of a ResNet on small images: 4 × 4 positions, 256 channels, zeros around.
WINDOW = Window((4, 4), (3, 3), (1, 1), (1, 1), (1, 1), (1, 1))

FACTORS = {
    "norm": None,
    "mlp": LayerFactors("linear", 1, 200, 100, bias=True),
    "tokens": LayerFactors("linear", 65, 192, 576, bias=True),
    "narrow": LayerFactors("linear", 400, 3, 2),
    "late": LayerFactors("convolution", 16, 9 * 256, 256, window=WINDOW),
    "words": LayerFactors("tokens", 12, 5000, 32, matches=1.5),
}


def blocks_of(**changes):
    """A block per kind of factors, a norm last and first of no factors; fields of a block may be changed by name."""
    found, start = [], 0
    for name, factors in FACTORS.items():
        columns = 64 if factors is None else factors.columns
        parameters = (f"{name}.weight", f"{name}.bias") if factors is not None and factors.bias else (f"{name}.weight",)
        fields = {"source": "rule", "factors": factors, **changes.get(name, {})}
        found.append(ParameterBlock(name, parameters, start, start + columns, **fields))
        start += columns
    return tuple(found)


def workload_of(blocks=None, **changes):
    return small_workload(blocks=blocks or blocks_of(), **changes)


def chosen(workload=None, dataflow="resident", tile=100, rates=UNCALIBRATED, **options):
    workload = workload or workload_of()
    found = choose(workload, rates, dataflow, tile, **options)
    return {block.name: choice for block, choice in zip(workload.blocks, found, strict=True)}


def planned(workload=None, job_digest="job", **preferences):
    return make_plan(workload or workload_of(), ample(), UNCALIBRATED, Preferences(**preferences), job_digest)


def held(block, choice, workload):
    """Bytes of one sample by definition."""
    item, rows = 8 if workload.precision == "float64" else 4, workload.rows_per_sample
    if choice == DENSE:
        return block.columns * rows * item
    f = block.factors
    inputs = 4 * f.positions if f.kind == "tokens" else item * f.input_items
    return inputs + item * rows * f.positions * f.outputs


# --- what a block allows ---------------------------------------------------------------------------------------------

ALLOWED = {
    "norm": {None: {DENSE}, "dense": {DENSE}, "factored": {DENSE}, "pairwise": {DENSE}},
    "mlp": {None: {PAIRWISE}, "dense": {DENSE}, "factored": {FACTORED}, "pairwise": {PAIRWISE}},
    "words": {None: {DENSE, TOKENS}, "dense": {DENSE}, "factored": {TOKENS}, "pairwise": {TOKENS}},
    **{
        name: {
            None: {DENSE, FACTORED, PAIRWISE},
            "dense": {DENSE},
            "factored": {FACTORED},
            "pairwise": {PAIRWISE},
        }
        for name in ("tokens", "narrow", "late")
    },
}


@pytest.mark.parametrize("wanted", [None, *REPRESENTATIONS])
@pytest.mark.parametrize("name", FACTORS)
def test_what_a_block_allows(name, wanted):
    block = next(entry for entry in blocks_of() if entry.name == name)
    found = allowed_choices(block, wanted)
    assert len(found) == len(set(found))
    assert set(found) == ALLOWED[name][wanted]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dataflow", DATAFLOWS)
@pytest.mark.parametrize("wanted", REPRESENTATIONS)
def test_what_is_asked_for_is_taken_wherever_a_block_allows_it(wanted, dataflow, policy):
    found = chosen(dataflow=dataflow, policy=policy, wanted=wanted)
    assert {name: {choice} for name, choice in found.items()} == {name: ALLOWED[name][wanted] for name in FACTORS}


# --- what is chosen --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("rows", [1, 4, 30])
@pytest.mark.parametrize("dataflow", DATAFLOWS)
def test_the_smallest_holds_the_fewest_bytes(dataflow, rows, precision):
    workload = workload_of(outputs=rows, rows_per_sample=rows, precision=precision)
    for block, choice in zip(workload.blocks, choose(workload, UNCALIBRATED, dataflow, 50, "smallest"), strict=True):
        allowed = allowed_choices(block)
        assert choice in allowed
        assert held(block, choice, workload) == min(held(block, other, workload) for other in allowed)


def test_a_layer_with_many_positions_is_smaller_dense():
    smallest = chosen(policy="smallest")
    assert smallest["narrow"] == DENSE
    assert smallest["late"].representation == smallest["tokens"].representation == "factored"
    assert smallest["words"] == TOKENS


def test_fewer_bytes_are_worth_a_little_time():
    """The fastest counts only if it is clearly faster than the smallest: here by how fast each is timed to be."""

    def late(pairwise_seconds, expand_seconds=1e-12, **changed):
        changes = {"late": {"pairwise_seconds": pairwise_seconds, "expand_seconds": expand_seconds}}
        rates = dataclasses.replace(UNCALIBRATED, **changed)
        return chosen(workload_of(blocks_of(**changes)), rates=rates)["late"]

    assert late(1e-12) == PAIRWISE
    assert late(1.0, fill=1e6) == FACTORED, "as small, and faster than to fill memory with gradients"
    assert late(1.0, 1.0) == DENSE, "expanding once is much faster than expanding in every tile"

    # A pair of samples that takes nearly as long as dense gradients, and one that takes clearly longer.
    workload = workload_of(blocks_of(late={"expand_seconds": 1.0}))
    block = next(block for block in workload.blocks if block.name == "late")
    depth = block.columns * workload.rows_per_sample
    dense = UNCALIBRATED.gemm_seconds(1, 1, depth, "float32", edge=100) * workload.pairs + 200 * 1.0
    assert late(1.05 * dense / workload.pairs, 1.0) == PAIRWISE
    assert late(1.25 * dense / workload.pairs, 1.0) == DENSE


@pytest.mark.parametrize("dataflow", DATAFLOWS)
def test_the_fastest_is_never_clearly_slower_or_larger_for_nothing(dataflow):
    """Of both policies' choices, the plan's price says that the fastest one is the faster one."""
    workload = workload_of(train_samples=500)
    preferences = {"dataflow": dataflow, "tile_samples": 100}
    plans = {wanted: planned(workload, representation=wanted, **preferences) for wanted in (None, "dense", "factored")}
    free = plans.pop(None)
    for other in plans.values():
        assert free.promised.seconds <= other.promised.seconds / CLEARLY_FASTER


def test_more_outputs_speak_for_pairs_of_positions():
    """Dense gradients grow with C, products of inputs do not: a late convolution of ten outputs (DESIGN §3)."""
    workload = workload_of(outputs=10, rows_per_sample=10, train_samples=128)
    block = next(block for block in workload.blocks if block.name == "late")
    flops = {choice: block_flops(workload, block, choice, 128) for choice in (DENSE, FACTORED, PAIRWISE)}
    assert flops[PAIRWISE] < flops[DENSE] / 8
    assert chosen(workload, tile=128)["late"] == PAIRWISE


def test_tokens_that_match_everywhere_are_held_dense_only_if_that_is_faster():
    def words(matches, rows=FACTORS["words"].inputs):
        factors = dataclasses.replace(FACTORS["words"], inputs=rows, matches=matches)
        start = [block.start for block in blocks_of()][-1]
        blocks = (
            *blocks_of()[:-1],
            ParameterBlock("words", ("words.weight",), start, start + factors.columns, "rule", "", factors),
        )
        return chosen(workload_of(blocks))["words"]

    assert words(0.0) == words(1.5) == TOKENS
    assert words(144.0, rows=5) == DENSE, "five rows, and every pair of positions matches"


@settings(max_examples=80, deadline=None)
@given(
    positions=st.integers(1, 80),
    inputs=st.integers(1, 300),
    outputs=st.integers(1, 300),
    rows=st.integers(1, 12),
    tile=st.integers(1, 200),
    dataflow=st.sampled_from(DATAFLOWS),
    full=st.booleans(),
)
def test_both_policies_choose_what_is_allowed(positions, inputs, outputs, rows, tile, dataflow, full):
    factors = LayerFactors("linear", positions, inputs, outputs)
    block = ParameterBlock("layer", ("layer.weight",), 0, factors.columns, "rule", "", factors)
    options = {"kernel": "full", "entries_per_sample": rows} if full else {}
    workload = small_workload(blocks=(block,), outputs=rows, rows_per_sample=rows, **options)
    (fastest,), (smallest,) = (choose(workload, UNCALIBRATED, dataflow, tile, policy) for policy in POLICIES)
    assert {fastest, smallest} <= set(allowed_choices(block))
    assert held(block, smallest, workload) <= held(block, fastest, workload)


# --- what a plan keeps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("representation", [None, *REPRESENTATIONS])
@pytest.mark.parametrize("dataflow", DATAFLOWS)
def test_json_there_and_back(dataflow, representation, tmp_path):
    plan = planned(dataflow=dataflow, representation=representation)
    found = Plan.from_json(plan.to_json())
    assert found == plan
    assert found.digest == plan.digest
    assert found.layout == plan.layout
    blocks = {block.name: block for block in found.blocks}
    assert {name: block.factors for name, block in blocks.items()} == FACTORS
    assert blocks["late"].factors.window == WINDOW
    assert isinstance(blocks["late"].factors.window.kernel, tuple)
    assert blocks["words"].factors.matches == 1.5
    assert blocks["mlp"].parameters == ("mlp.weight", "mlp.bias")
    assert hash(blocks["late"].factors) == hash(FACTORS["late"]), "layouts are kept by it"


@pytest.mark.parametrize("name", FACTORS)
def test_a_block_there_and_back(name):
    (block,) = (block for block in planned().blocks if block.name == name)
    fields = json.loads(json.dumps(dataclasses.asdict(block)))
    assert PlannedBlock.from_fields(fields) == block
    assert fields["factors"] is None or isinstance(fields["factors"], dict), "what is given is not changed"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda block: block.pop("factors"),
        lambda block: block["factors"].pop("positions"),
        lambda block: block["factors"].update(shape=3),
        lambda block: block["factors"].update(window=[1, 2]),
        lambda block: block["factors"]["window"].pop("stride"),
        lambda block: block.update(parameters=None),
    ],
)
def test_a_plan_with_a_spoilt_block_is_refused(spoil):
    fields = json.loads(planned().to_json())
    spoil(next(block for block in fields["blocks"] if block["name"] == "late"))
    with pytest.raises(StorageError, match="cannot read the plan"):
        Plan.from_json(json.dumps(fields))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("representation", "dense"),
        ("contraction", "gemm"),
        ("source", "torch.func"),
        ("factors", {"positions": 17}),
        ("factors", {"bias": True}),
        ("factors", {"kind": "linear"}),
        ("factors", {"window": {"stride": [2, 2]}}),
        ("factors", {"window": None}),
    ],
)
def test_an_edited_block_is_refused(field, value):
    fields = json.loads(planned(representation="pairwise").to_json())
    block = next(entry for entry in fields["blocks"] if entry["name"] == "late")
    if field == "factors":
        window = value.get("window")
        if window:
            block["factors"]["window"].update(window)
        else:
            block["factors"].update(value)
    else:
        assert block[field] != value
        block[field] = value
    with pytest.raises(StorageError, match="changed after it was written"):
        Plan.from_json(json.dumps(fields))


LAYOUT = {"dataflow": "spill", "tile_samples": 50, "span_columns": 4000}


def test_the_digest_changes_with_how_blocks_are_held_and_contracted():
    plans = {representation: planned(representation=representation, **LAYOUT) for representation in REPRESENTATIONS}
    other = dataclasses.replace(WINDOW, stride=(2, 2), before=(0, 0), after=(0, 0))
    plans["window"] = planned(
        workload_of(blocks_of(late={"factors": dataclasses.replace(FACTORS["late"], window=other)})),
        representation="factored",
        **LAYOUT,
    )
    plans["source"] = planned(
        workload_of(blocks_of(norm={"source": "torch.func"})), representation="factored", **LAYOUT
    )
    assert len({plan.digest for plan in plans.values()}) == len(plans)


def test_the_digest_does_not_depend_on_what_was_counted_or_timed():
    plan = planned(representation="factored", **LAYOUT)
    words = {"factors": dataclasses.replace(FACTORS["words"], matches=9.0)}
    late = {"expand_seconds": 1.0, "pairwise_seconds": 2.0}
    counted = planned(workload_of(blocks_of(words=words, late=late)), representation="factored", **LAYOUT)
    assert counted.digest == plan.digest
    assert (
        planned(workload_of(blocks_of(norm={"reason": "another"})), representation="factored", **LAYOUT).digest
        == plan.digest
    )


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_bytes_and_flops_of_every_block(representation):
    """What is held adds up, and is shown beside what dense gradients would take."""
    workload = workload_of(test_samples=30)
    plan = planned(workload, representation=representation, **LAYOUT)
    for block, source in zip(plan.blocks, workload.blocks, strict=True):
        assert block.choice in ALLOWED[block.name][representation]
        assert block.held_bytes == 230 * held(source, block.choice, workload)
        assert block.dense_bytes == 230 * held(source, DENSE, workload)
        if block.choice == DENSE:
            assert (block.held_bytes, block.flops) == (block.dense_bytes, block.dense_flops)
        else:
            assert block.flops > 0
    assert sum(block.dense_bytes for block in plan.blocks) == plan.jacobian_bytes
    assert plan.held_bytes == sum(block.held_bytes for block in plan.blocks)
    mlp = next(block for block in plan.blocks if block.name == "mlp")
    if representation == "pairwise":
        assert mlp.flops < mlp.dense_flops / 50


def test_a_tied_embedding_of_few_rows_is_dense():
    """One position of the output layer, but every word of a long text is looked up in the same small table."""
    characters = LayerFactors("linear", 1, 384, 65, lookups=256, matches=40.0)
    words = dataclasses.replace(characters, outputs=50_000, matches=10.0)
    found = []
    for factors in (characters, words):
        block = ParameterBlock("words", ("words.weight",), 0, factors.columns, "rule", factors=factors)
        assert set(allowed_choices(block)) == {DENSE, FACTORED, PAIRWISE}
        found.append(chosen(workload_of((block,)))["words"])
    assert found[0] == DENSE
    assert found[1] == PAIRWISE
