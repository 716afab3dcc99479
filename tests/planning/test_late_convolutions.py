"""What is chosen for a ResNet-18 for 32×32 images on a GPU: its last stage, at 4 × 4 positions, pairwise."""

from __future__ import annotations

import dataclasses

import pytest

from ooc_ntk.planning.cost import block_flops, pair_seconds
from ooc_ntk.planning.factors import LayerFactors, Window
from ooc_ntk.planning.memory import DEVICE_POSITIONS, pairwise_bytes, pairwise_steps
from ooc_ntk.planning.plan import Plan
from ooc_ntk.planning.planner import Preferences, make_plan
from ooc_ntk.planning.rates import MachineRates
from ooc_ntk.planning.representation import choose
from ooc_ntk.planning.spans import DENSE, FACTORED, PAIRWISE
from ooc_ntk.planning.workload import Derivation, ParameterBlock
from tests.planning.strategies import ample, small_workload


def convolution(name, channels, outputs, size, kernel=3, stride=1):
    """A convolution without a bias; one tap without padding is a linear layer of its positions."""
    positions = (size // stride) ** 2
    if kernel == 1:
        return name, LayerFactors("linear", positions, channels, outputs, channels_first=True)
    pairs = [(value, value) for value in (size, kernel, stride, 1, kernel // 2, kernel // 2)]
    window = Window(*pairs)
    return name, LayerFactors(
        "convolution", positions, channels * kernel**2, outputs, window=window, channels_first=True
    )


def resnet18(outputs=10):
    """Blocks of the network with a 3×3 stem and no pooling, in the order of its parameters, by hand."""
    layers = [convolution("stem", 3, 64, 32), ("norm", 2 * 64)]
    channels, size = 64, 32
    for stage, width in enumerate((64, 128, 256, 512)):
        for number in range(2):
            name, stride = f"stages.{2 * stage + number}", 2 if stage and not number else 1
            layers.append(convolution(f"{name}.conv1", channels, width, size, stride=stride))
            layers.append((f"{name}.norm1", 2 * width))
            layers.append(convolution(f"{name}.conv2", width, width, size // stride))
            layers.append((f"{name}.norm2", 2 * width))
            if stride != 1:
                layers.append(convolution(f"{name}.shortcut.0", channels, width, size, 1, stride))
                layers.append((f"{name}.shortcut.1", 2 * width))
            channels, size = width, size // stride
    layers.append(("head", LayerFactors("linear", 1, 512, outputs, bias=True)))
    found, start = [], 0
    for name, given in layers:
        factors = given if isinstance(given, LayerFactors) else None
        columns = given if factors is None else factors.columns
        two = factors is None or factors.bias
        parameters = (f"{name}.weight", f"{name}.bias") if two else (f"{name}.weight",)
        found.append(ParameterBlock(name, parameters, start, start + columns, "rule", "", factors))
        start += columns
    return tuple(found)


LAST_STAGE = [block.name for block in resnet18() if block.factors and block.name.startswith(("stages.6", "stages.7"))]


def gpu_rates(**changes):
    """Rates of about the size that data sheets of an H200 give (not measured)."""
    peaks = {"float32": 5e13, "tf32": 4e14, "bf16": 7e14, "float64": 5e13}
    tables = [{name: {32: p / 40, 128: p / 10, 512: p / 2, 1024: p} for name, p in peaks.items()} for _ in range(2)]
    fields = {
        "fill": 5e9,
        "copy": 1e10,
        "disk_write": 2e9,
        "disk_read": 4e9,
        "host_to_device": 5e10,
        "commit_seconds": 0.005,
        "expand": {name: peak / 2 for name, peak in peaks.items()},
        "elements": 2e11,
    }
    return MachineRates("gpu", *tables, **{**fields, **changes})


def workload(train=50_000, test=10_000, **changes):
    derivation = Derivation("rules", 256, 0.0, 0.0, 2**32, 2**31, capture_seconds_per_sample=1e-3, batch_bytes=2**32)
    fields = {
        "train_samples": train,
        "test_samples": test,
        "outputs": 10,
        "rows_per_sample": 10,
        "blocks": resnet18(),
        "derivation": derivation,
        "device": "cuda",
    }
    return small_workload(**{**fields, **changes})


def test_the_network_is_that_of_the_benchmark():
    """The same blocks as layer rules find in the real one."""
    import torch

    from bench.models import ResNet18
    from ooc_ntk.compute.discover import find_structure
    from ooc_ntk.compute.jacobian import ModelBatch, ModelFunction
    from ooc_ntk.compute.model import choose_parameters, parameter_blocks
    from ooc_ntk.compute.outputs import OutputRows

    model = ResNet18(64, 10).eval()
    rows = OutputRows.of("logits", "trace")
    function = ModelFunction(model, choose_parameters(model, None), rows, "float32", "cpu")
    structure = find_structure(function, ModelBatch((torch.randn(2, 3, 32, 32),), {}, None))
    assert parameter_blocks(model, function.names, structure) == resnet18()
    assert sum(block.columns for block in resnet18()) == 11_173_962


@pytest.mark.parametrize("precision", ["float32", "tf32"])
@pytest.mark.parametrize("dataflow", ["resident", "spill", "recompute"])
def test_the_last_stage_is_contracted_pairwise(dataflow, precision):
    """All but its shortcut, whose FLOPs are the same either way, are by far the fastest so; early layers are not."""
    job = workload(precision=precision)
    found = dict(zip((block.name for block in job.blocks), choose(job, gpu_rates(), dataflow, 4096), strict=True))
    for name in LAST_STAGE:
        if "shortcut" not in name:
            assert found[name] == PAIRWISE, name
    assert found["head"] == PAIRWISE
    others = [block.name for block in job.blocks if block.factors and block.name not in (*LAST_STAGE, "head")]
    assert {found[name] for name in others} <= {DENSE, FACTORED}


def test_pairwise_stays_the_choice_where_elementwise_steps_are_slow():
    """Even at a tenth of the rate at which such a device multiplies elements, as they are unfused."""
    found = choose(workload(), gpu_rates(elements=2e10), "spill", 4096)
    names = [block.name for block, choice in zip(resnet18(), found, strict=True) if choice == PAIRWISE]
    assert {name for name in LAST_STAGE if "shortcut" not in name} <= set(names)


def test_a_kernel_of_60_000_by_50_000_takes_a_third_of_the_flops():
    """Ten outputs: 3.9e17 by dense gradients, about 1.3e17 with the last stage pairwise."""
    job = workload()
    dense = sum(block_flops(job, block, DENSE) for block in job.blocks)
    assert dense == pytest.approx(3.9e17, rel=0.01)
    # 1.75e9 pairs of samples: of train samples half of 50,000², of test samples all with all train samples.
    assert dense == 1_750_000_000 * 2 * 10 * 11_173_962
    limits = ample(host=128 * 2**30, device=130 * 2**30)
    plan = make_plan(job, limits, gpu_rates(), Preferences(dataflow="spill", tile_samples=4096))
    total = sum(block.flops for block in plan.blocks)
    assert total == pytest.approx(1.3e17, rel=0.05)
    pairwise = {block.name: block.flops for block in plan.blocks if block.choice == PAIRWISE}
    assert set(pairwise) == {*LAST_STAGE, "head"}
    # Three convolutions of 512 channels at 4 × 4: 2·16²·(512 + 10·512) a pair, from pixels; dense 2·10·9·512².
    assert pairwise["stages.7.conv1"] == 1_750_000_000 * 2 * 256 * (512 + 5120)
    assert sum(pairwise.values()) < 0.1 * sum(block.dense_flops for block in plan.blocks if block.name in pairwise)


def test_blocks_of_a_device_are_larger_and_are_counted():
    factors = next(block.factors for block in resnet18() if block.name == "stages.7.conv1")
    assert pairwise_steps(factors, 1) == (512 // 16, 1024 // 16)
    rows, columns = pairwise_steps(factors, 1, on_device=True)
    assert (rows * 16, columns * 16) == DEVICE_POSITIONS
    copied = (rows + columns) * (factors.input_items + 10 * factors.gradient_items)
    found = pairwise_bytes(factors, 4096, 10, 1, 4, on_device=True)
    assert found == 4 * (5 * rows * columns * 16**2 + copied)
    assert pairwise_bytes(factors, 20, 10, 1, 4, on_device=True) < found, "small tiles make smaller blocks"


def test_pairs_are_priced_at_the_rate_of_such_blocks():
    block = next(block for block in resnet18() if block.name == "stages.7.conv1")
    job, rates = workload(), gpu_rates()
    found = pair_seconds(job, block, PAIRWISE, rates, 4096)
    flops, elements = 2 * 256 * (512 + 5120), 256 * (1 + 6)
    assert found == pytest.approx(flops / 5e13 + elements / 2e11)
    timed = dataclasses.replace(block, pairwise_seconds=1.0)
    assert pair_seconds(job, timed, PAIRWISE, rates, 4096) == 1.0


@pytest.mark.parametrize("fused", [True, False])
def test_a_plan_keeps_whether_the_fused_kernel_won(fused, tmp_path):
    """It changes the order of sums, and so the digest; of blocks that are not contracted pairwise it says nothing."""
    blocks = tuple(dataclasses.replace(block, fused=fused and block.factors is not None) for block in resnet18())
    plan = make_plan(workload(400, 100, blocks=blocks), ample(), gpu_rates(), Preferences(dataflow="resident"))
    pairwise = {block.name for block in plan.blocks if block.choice == PAIRWISE}
    assert pairwise > {*LAST_STAGE, "head"}
    assert {block.name for block in plan.blocks if block.fused} == (pairwise if fused else set())
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    without = tuple(dataclasses.replace(block, fused=False) for block in plan.blocks)
    assert (dataclasses.replace(plan, blocks=without).digest == plan.digest) == (not fused)
