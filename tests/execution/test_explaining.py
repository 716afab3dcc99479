"""Explanations of measured jobs: an exact one has a pilot beside it, where a projection makes sense."""

import json

import pytest
import torch

import ooc_ntk

NETS = """
import torch


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10))
"""
BUDGET = ooc_ntk.Budget(host="16GiB", disk="1GiB")


def explained(rates, **job):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10))
    wanted = ooc_ntk.Job(model.eval(), "digits[0:60]", device="cpu", batch_size=20, **job)
    return wanted, ooc_ntk.explain(wanted, BUDGET, rates=rates)


def test_an_exact_job_is_explained_with_the_price_of_errors(rates, one_thread):
    job, found = explained(rates)
    assert found.plan.digest == ooc_ntk.plan(job, BUDGET, rates=rates).digest
    assert [block.name for block in found.blocks] == [block.name for block in found.plan.blocks]
    assert [each.error for each in found.projected] == [0.05, 0.1]
    few, many = found.projected[1].columns, found.projected[0].columns
    assert 3 < many / few < 5, "four times the columns for half the error"
    projected = ooc_ntk.plan(
        ooc_ntk.Job(job.model, job.train, device="cpu", projection=ooc_ntk.Projection(target_error=0.1)),
        BUDGET,
        rates=rates,
    )
    assert projected.projection.dim == few


@pytest.mark.parametrize("job", [{"kernel": "embedding"}, {"by": "layer"}, {"parameters": "3.bias"}])
def test_where_nothing_is_projected_no_error_has_a_price(rates, one_thread, job):
    assert explained(rates, **job)[1].projected == ()


def test_the_command_prints_reasons_and_has_them_as_json(cli):
    job = ("plan", "--model", "nets.py:net", "--train", "digits[0:60]", "--device", "cpu", "--host-memory", "4GiB")
    shown = cli(*job, "--explain")
    assert shown.exit_code == 0, shown.output
    for phrase in ("dataflows considered", "ways to hold each block", "one position", "limited by", "sjlt:"):
        assert phrase in shown.output
    found = json.loads(cli(*job, "--explain", "--json", "--save", "plan.json").stdout)
    assert found["plan"]["digest"] == ooc_ntk.Plan.load("plan.json").digest
    assert {way["name"] for way in found["explanation"]["blocks"][0]["ways"]} == {"pairwise", "dense"}
