"""What is not needed any more is freed: gradients before the next are derived, and with a job all that it loaded."""

import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import ooc_ntk
from ooc_ntk.execution import context, rows
from ooc_ntk.planning.budget import WORKER_BYTES
from ooc_ntk.planning.memory import DECODERS, LIBRARIES, PROCESS, SPENT, STANDING


def test_a_model_is_freed_after_plan_run_and_verify(memory_path, rates):
    """ReLU and its like save their own results: kept by a hook as they are, they would own their graph."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 2))
    job = ooc_ntk.Job(model.eval(), torch.randn(6, 1, 4, 4), device="cpu")
    places = {value.untyped_storage().data_ptr() for value in model.parameters()}
    plan = ooc_ntk.plan(job, rates=rates)
    ooc_ntk.run(job, memory_path / "run", plan=plan, progress=False)
    assert ooc_ntk.verify(memory_path / "run", job, full=True).passed
    del model, job, plan
    gc.collect()
    alive = [each for each in gc.get_objects() if type(each) in (torch.Tensor, nn.Parameter)]
    assert not [each.shape for each in alive if each.untyped_storage().data_ptr() in places]


def dense_job():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 2))
    return ooc_ntk.Job(model.eval(), torch.randn(24, 1, 4, 4), device="cpu")


def dense_plan(folder, rates):
    """Of 24 samples, two tiles of two batches each, whose gradients are dense."""
    wanted = ooc_ntk.Preferences(dataflow="spill", tile_samples=12, representation="dense")
    plan = ooc_ntk.plan(dense_job(), ooc_ntk.Budget(disk="1GiB"), preferences=wanted, out=folder, rates=rates)
    return replace(plan, batch_size=6)


def run_dense(plan, out):
    ooc_ntk.run(dense_job(), out, plan=plan, progress=False, proof=False)


@pytest.mark.parametrize("mixed", [False, True])
def test_gradients_are_freed_before_the_next_are_derived(memory_path, rates, monkeypatch, mixed):
    """Both at once would take twice the memory that is promised for them."""
    by_rules, derived, alive = rows._PassRows._by_rules, [], []

    def watched(self, *arguments):
        alive.append(sum(each() is not None for each in derived))
        found = by_rules(self, *arguments)
        derived.extend(weakref.ref(each) for each in found.values())
        return found

    monkeypatch.setattr(rows, "rule_samples", lambda size: 2)
    monkeypatch.setattr(rows._PassRows, "_by_rules", watched)
    if mixed:  # one parameter by torch.func, row by row, beside three by rules

        class Mixed(nn.Module):
            def __init__(self):
                super().__init__()
                self.mixing = nn.Parameter(torch.zeros(16, 16))

            def forward(self, inputs):
                return inputs.flatten(1) @ torch.linalg.matrix_exp(self.mixing)

        monkeypatch.setattr(nn, "Flatten", Mixed)
    plan = dense_plan(memory_path, rates)
    run_dense(plan, memory_path / "run")
    assert mixed == any(block.source != "rule" for block in plan.blocks)
    assert len(alive) >= 12
    assert alive == [0] * len(alive)


@pytest.fixture
def returned(monkeypatch):
    """``returned(resident)`` makes a process as large as that many bytes; the list counts what it gives back."""
    found: list[str] = []

    def large(resident):
        monkeypatch.setattr(context.RunContext, "resident_bytes", lambda self: resident)
        monkeypatch.setattr(context, "return_host_memory", lambda: found.append("all that is free"))
        return found

    return large


def test_freed_memory_goes_back_where_the_next_batch_would_not_fit_beside_it(memory_path, rates, returned):
    """Between batches nothing may stay but what every task finds: a batch takes all of its own anew."""
    plan = dense_plan(memory_path, rates)
    standing = sum(plan.host_terms[term] for term in (PROCESS, LIBRARIES, SPENT) if term in plan.host_terms)
    assert 0 < standing < plan.promised.host_bytes
    for more, times in ((0, 0), (1, 4)):  # two tiles of two batches each
        found = returned(standing + more)
        found.clear()
        run_dense(plan, memory_path / f"run-{more}")
        assert len(found) == times


def test_freed_memory_goes_back_where_the_next_gradients_would_not_fit_beside_it(memory_path, rates, returned):
    """Within a batch as many bytes are asked for as the gradients before took."""
    plan = dense_plan(memory_path, rates)
    group = 6 * plan.rows_per_sample * plan.columns * 4
    for resident, times in ((plan.promised.host_bytes - group, 4), (plan.promised.host_bytes - group + 1, 8)):
        found = returned(resident)
        found.clear()
        run_dense(plan, memory_path / f"run-{resident}")
        assert len(found) == times


@pytest.mark.parametrize(("processes", "promised"), [(0, WORKER_BYTES), (1000, None)])
def test_a_worker_keeps_to_what_is_promised_of_one(memory_path, rates, processes, promised):
    plan = replace(dense_plan(memory_path, rates), process_bytes=processes)
    plan = replace(plan, host_terms={**plan.host_terms, DECODERS: 30, "a task's": 500})
    whole = processes or plan.promised.host_bytes + promised
    taken = sum(size for term, size in plan.host_terms.items() if term not in STANDING)
    assert taken > 500
    worker = SimpleNamespace(plan=plan, worker="first")
    assert context.RunContext._standing_bytes.func(worker) == (whole - 30, whole - 30 - taken)
