"""What a job loaded is freed with it: nothing of a model may stay after its kernel is planned, run and verified."""

import gc

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
