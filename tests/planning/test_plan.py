"""Plans: JSON there and back, the digest, what is refused."""

import dataclasses
import json

import pytest

from ooc_ntk.errors import StorageError
from ooc_ntk.planning.plan import PLAN_FORMAT, Plan
from ooc_ntk.planning.planner import Preferences, make_plan
from ooc_ntk.planning.rates import UNCALIBRATED
from tests.planning.strategies import ample, small_workload


def make(workload=None, limits=None, rates=UNCALIBRATED, job_digest="job", **preferences):
    return make_plan(workload or small_workload(), limits or ample(), rates, Preferences(**preferences), job_digest)


RECOMPUTE = {"dataflow": "recompute", "passes": 3, "tile_samples": 50, "span_columns": 9000}


@pytest.mark.parametrize("preferences", [{}, {"dataflow": "spill"}, RECOMPUTE])
def test_json_there_and_back(preferences, tmp_path):
    plan = make(small_workload(test_samples=30, notes=("a note",)), ample(automatic=("host",)), **preferences)
    assert Plan.from_json(plan.to_json()) == plan
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert Plan.load(tmp_path / "plan.json").digest == plan.digest


def test_the_digest_does_not_depend_on_rates_or_limits():
    plan = make(**RECOMPUTE)
    slow = dataclasses.replace(UNCALIBRATED, fill=1.0, disk_write=1.0, commit_seconds=9.0, measured=True)
    assert make(rates=slow, **RECOMPUTE).digest == plan.digest
    assert make(limits=ample(host=2**35, disk=2**36), **RECOMPUTE).digest == plan.digest
    measured_elsewhere = small_workload(
        baseline_bytes=2**28, derivation=dataclasses.replace(small_workload().derivation, seconds_per_sample=1.0)
    )
    assert make(measured_elsewhere, **RECOMPUTE).digest == plan.digest


def test_the_digest_depends_on_what_changes_the_result():
    derivation = small_workload().derivation
    plans = {
        "as it is": make(**RECOMPUTE),
        "tile": make(**{**RECOMPUTE, "tile_samples": 40}),
        "span": make(**{**RECOMPUTE, "span_columns": 5000}),
        "passes": make(**{**RECOMPUTE, "passes": 2}),
        "batch": make(small_workload(derivation=dataclasses.replace(derivation, batch_size=4)), **RECOMPUTE),
        "method": make(small_workload(derivation=dataclasses.replace(derivation, method="vmap")), **RECOMPUTE),
        "seed": make(small_workload(seed=1), **RECOMPUTE),
        "threads": make(small_workload(threads=2), **RECOMPUTE),
        "precision": make(small_workload(precision="float64"), **RECOMPUTE),
        "device": make(small_workload(device="cuda"), **RECOMPUTE),
        "scale": make(small_workload(scale="mean"), **RECOMPUTE),
        "normalize": make(small_workload(normalize="cosine"), **RECOMPUTE),
        "samples": make(small_workload(train_samples=199), **RECOMPUTE),
        "test": make(small_workload(test_samples=1), **RECOMPUTE),
        "blocks": make(small_workload(sizes=(20_000, 30_000)), **RECOMPUTE),
        "job": make(job_digest="another", **RECOMPUTE),
    }
    digests = {name: plan.digest for name, plan in plans.items()}
    assert len(set(digests.values())) == len(plans), digests


@pytest.mark.parametrize(
    ("field", "value"), [("tile_samples", 7), ("batch_size", 9), ("span_columns", 10), ("job_digest", "x"), ("seed", 3)]
)
def test_an_edited_plan_is_refused(field, value):
    fields = json.loads(make().to_json())
    assert fields[field] != value
    fields[field] = value
    with pytest.raises(StorageError, match=r"changed after it was written.*make a new one"):
        Plan.from_json(json.dumps(fields))


def test_a_plan_of_a_newer_version_is_refused():
    fields = json.loads(make().to_json())
    fields["format"] = PLAN_FORMAT + 1
    fields["something new"] = 1
    with pytest.raises(StorageError, match=rf"format {PLAN_FORMAT + 1}.*up to {PLAN_FORMAT}\); upgrade"):
        Plan.from_json(json.dumps(fields))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"format": 1}', '{"format": "x", "digest": ""}'])
def test_garbage_is_refused(text):
    with pytest.raises(StorageError, match="cannot read the plan"):
        Plan.from_json(text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"gone\.json"):
        Plan.load(tmp_path / "gone.json")


def test_the_printed_plan_says_what_a_person_wants_to_know():
    plan = make(small_workload(test_samples=30, notes=("frozen parameters left out",)), dataflow="spill")
    text = str(plan)
    for part in (
        "trace kernel, 230 × 200 float32",
        "200 train + 30 test, 4 outputs each",
        "50,000 parameters",
        "spill",
        "Q/LB",
        "not calibrated",
        "frozen parameters left out",
        plan.digest[:12],
    ):
        assert part in text, part


def test_blocks_add_up():
    plan = make(small_workload(sizes=(10, 20_000, 7)))
    assert [(block.start, block.stop) for block in plan.blocks] == [(0, 10), (10, 20_010), (20_010, 20_017)]
    assert sum(block.held_bytes for block in plan.blocks) == plan.jacobian_bytes == 200 * 4 * 20_017 * 4
    assert sum(block.flops for block in plan.blocks) <= plan.flops <= sum(block.flops for block in plan.blocks) + 3
