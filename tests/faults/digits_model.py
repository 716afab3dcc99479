"""A small CNN for 8 × 8 digits, as a user's own file would hold it."""

import torch
from torch import nn


def make_model() -> nn.Module:
    """Two convolutions and a linear layer, 10 outputs."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 3 * 3, 10),
    )
