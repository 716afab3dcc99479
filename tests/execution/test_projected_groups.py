"""Gradients of layers with groups reach the loops of a projection in memory order, whatever products made them."""

import numpy as np
import pytest
import torch
from torch import nn

import ooc_ntk
from ooc_ntk.compute.projection.entries import dense_columns
from tests import oracle

LAYERS = {
    "depthwise 1×1": lambda: nn.Conv2d(8, 8, 1, groups=8),
    "one output a group": lambda: nn.Conv2d(8, 4, 1, groups=4),
    "depthwise 3×3": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8),
    "transposed": lambda: nn.ConvTranspose2d(8, 8, 1, groups=8),
}


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("layer", LAYERS)
def test_features_of_grouped_layers_are_the_projected_jacobian(layer: str, backend: str, tmp_path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Tanh(), LAYERS[layer](), nn.Tanh(), nn.Flatten(), nn.LazyLinear(10))
    data = torch.randn(6, 1, 6, 6)
    net(data)
    net.eval()
    job = ooc_ntk.Job(net, data, projection=ooc_ntk.Projection("sjlt", 128, backend=backend), device="cpu")
    kernel = ooc_ntk.run(job, tmp_path / "run", progress=False)
    assert all(block.source == "rule" for block in kernel.plan.blocks)
    rows = oracle.jacobian(net, data).reshape(60, -1)
    wanted = rows @ dense_columns(kernel.plan.projection, np.arange(rows.shape[1]), np.arange(128))
    found = np.asarray(kernel.features.array)
    assert np.linalg.norm(found - wanted) <= 1e-6 * np.linalg.norm(wanted)
