import math

import pytest
import torch

from ooc_ntk.inputs.zoo.vit import Attention, VisionTransformer

pytestmark = pytest.mark.usefixtures("one_thread")


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(state, name, x):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def attention(state, name, tokens, heads):
    """One sample, head by head: (tokens, width) → (tokens, width)."""
    width = tokens.shape[-1]
    query, key, value = linear(state, f"{name}qkv", tokens).split(width, -1)
    mixed = []
    for columns in torch.arange(width).split(width // heads):
        scores = query[:, columns] @ key[:, columns].T / math.sqrt(width // heads)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        mixed.append(weights @ value[:, columns])
    return linear(state, f"{name}proj", torch.cat(mixed, -1))


def by_hand(state, image, patch, heads, depth):
    """Logits of one image (channels, size, size), patch by patch."""
    filters = state["patch_embed.proj.weight"].flatten(1)
    tokens = [state["cls_token"][0, 0]]
    for top in range(0, image.shape[1], patch):
        for left in range(0, image.shape[2], patch):
            pixels = image[:, top : top + patch, left : left + patch].reshape(-1)
            tokens.append(filters @ pixels + state["patch_embed.proj.bias"])
    x = torch.stack(tokens) + state["pos_embed"][0]
    for block in (f"blocks.{index}" for index in range(depth)):
        x = x + attention(state, f"{block}.attn.", norm(state, f"{block}.norm1", x), heads)
        inside = linear(state, f"{block}.mlp.fc1", norm(state, f"{block}.norm2", x))
        gelu = inside * (1 + torch.erf(inside / math.sqrt(2))) / 2
        x = x + linear(state, f"{block}.mlp.fc2", gelu)
    return linear(state, "head", norm(state, "norm", x)[0])


def test_attention_is_that_of_the_paper():
    layer = Attention(12, 3).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    expected = torch.stack([attention(layer.state_dict(), "", sample, 3) for sample in x])
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-14)


def test_the_whole_network_is_that_of_the_paper():
    model = VisionTransformer(6, 2, channels=2, classes=4, width=12, depth=2, heads=3).double().eval()
    state = {key: torch.randn_like(value) / 3 for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    images = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    expected = torch.stack([by_hand(state, image, 2, 3, 2) for image in images])
    torch.testing.assert_close(model(images), expected, rtol=1e-11, atol=1e-12)


def test_names_and_numbers_are_those_of_deit_tiny_in_timm():
    with torch.device("meta"):
        model = VisionTransformer()
    state = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert sum(parameter.numel() for parameter in model.parameters()) == 5_717_416  # as timm 1.0.31 has it
    block = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    layers = ["patch_embed.proj", *(f"blocks.{index}.{name}" for index in range(12) for name in block), "norm", "head"]
    assert list(state) == [
        "cls_token",
        "pos_embed",
        *(f"{name}.{kind}" for name in layers for kind in ("weight", "bias")),
    ]
    assert state["pos_embed"] == (1, 197, 192)
    assert state["patch_embed.proj.weight"] == (192, 3, 16, 16)
    assert state["blocks.11.attn.qkv.weight"] == (576, 192)
    assert state["blocks.0.mlp.fc1.weight"] == (768, 192)


def test_every_layer_with_weights_is_called_so_that_hooks_see_it():
    model = VisionTransformer(8, 4, channels=1, classes=2, width=6, depth=2, heads=2)
    seen = []
    layers = [name for name, module in model.named_modules() if list(module.parameters(recurse=False)) and name]
    for name in layers:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    model(torch.randn(1, 1, 8, 8))
    assert sorted(seen) == sorted(layers)


def test_initial_values_are_narrow_and_biases_zero():
    model = VisionTransformer(32, 4)
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.03)
    assert model.blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert 0 < model.cls_token.abs().max().item() < 1e-5
    assert not model.blocks[3].mlp.fc2.bias.any()
