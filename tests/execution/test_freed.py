"""What is not needed any more is freed: gradients before the next are derived, and with a job all that it loaded."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

import ooc_ntk


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


def dense_run(folder, rates):
    """A run of 24 samples, two tiles of two batches each, whose gradients are dense."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 2))
    job = ooc_ntk.Job(model.eval(), torch.randn(24, 1, 4, 4), device="cpu")
    wanted = ooc_ntk.Preferences(dataflow="spill", tile_samples=12, representation="dense")
    plan = ooc_ntk.plan(job, ooc_ntk.Budget(disk="1GiB"), preferences=wanted, out=folder, rates=rates)
    ooc_ntk.run(job, folder / "run", plan=replace(plan, batch_size=6), progress=False, proof=False)
    return plan


@pytest.mark.parametrize("mixed", [False, True])
def test_gradients_are_freed_before_the_next_are_derived(memory_path, rates, monkeypatch, mixed):
    """Both at once would take twice the memory that is promised for them."""
    from ooc_ntk.execution import rows

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
    plan = dense_run(memory_path, rates)
    assert mixed == any(block.source != "rule" for block in plan.blocks)
    assert len(alive) >= 12
    assert alive == [0] * len(alive)


@pytest.mark.parametrize(("resident", "times"), [(0, 0), (2**50, 4)])
def test_freed_memory_goes_back_between_batches_near_the_promise(memory_path, rates, monkeypatch, resident, times):
    from ooc_ntk.execution import context

    returned = []
    monkeypatch.setattr(context, "resident_bytes", lambda: resident)
    monkeypatch.setattr(context, "return_host_memory", lambda: returned.append(1))
    dense_run(memory_path, rates)
    assert len(returned) == times
