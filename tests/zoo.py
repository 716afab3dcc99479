"""Small seeded networks, one for each kind of layer and each way to use one: what layer rules are measured on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import ooc_ntk
from tests import oracle
from tests.cases import KINKED, SMOOTH, digits

#: Train and test samples of every network: a tile of 7 holds both, and the last one is padded.
TRAIN, TEST = 11, 5

Inputs = Tensor | tuple[Tensor, ...] | dict[str, Tensor]

# --- convolutions ----------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """The basic block of a ResNet: one ReLU module called twice in place, and an addition in place."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outside)
        self.second = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outside)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = None
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.norm1(self.first(x)))
        out = self.norm2(self.second(out))
        out += x if self.shortcut is None else self.shortcut(x)
        return self.relu(out)


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        Residual(6, 6, 1),
        Residual(6, 8, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def mobilenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.SiLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.SiLU(inplace=True),
        nn.Conv2d(8, 12, 1),
        nn.Conv2d(12, 12, 3, padding="same", groups=3),
        nn.SiLU(),
        nn.Conv2d(12, 24, 3, stride=2, padding=1, groups=12),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 3),
    )


def padding_modes() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect"),
        nn.Tanh(),
        nn.Conv2d(4, 5, (3, 5), padding=(2, 1), padding_mode="circular"),
        nn.Tanh(),
        nn.Conv2d(5, 4, (2, 3), padding="same"),  # one row more below than above
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, padding="same", dilation=2, padding_mode="circular"),
        nn.Tanh(),
        nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="replicate"),
        nn.Conv2d(6, 5, 2, stride=3, padding="valid"),  # leaves a border that no window reaches
        nn.Flatten(),
        nn.LazyLinear(3),
    )


class Volumes(nn.Module):
    """Three-dimensional convolutions both ways, over a digit folded into a cube."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 4, 3, padding=1)
        self.second = nn.Conv3d(4, 6, (2, 3, 1), stride=(1, 2, 1), padding=(0, 1, 0))
        self.back = nn.ConvTranspose3d(6, 4, 2, stride=(1, 2, 1), groups=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.first(x.reshape(-1, 1, 4, 4, 4)))
        return self.head(torch.tanh(self.back(F.gelu(self.second(x)))).mean((2, 3, 4)))


class Signals(nn.Module):
    """One-dimensional convolutions both ways, over the pixels of a digit in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, 4, 5, stride=2, padding=2)
        self.second = nn.Conv1d(4, 6, 3, dilation=2, padding=1, groups=2, bias=False)
        self.back = nn.ConvTranspose1d(6, 4, 3, stride=2, padding=1, output_padding=1)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.second(torch.tanh(self.first(x.flatten(2)))))
        return self.head(F.adaptive_avg_pool1d(torch.tanh(self.back(x)), 4).flatten(1))


def autoencoder() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(6, 8, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1),
        nn.Tanh(),
        nn.ConvTranspose2d(6, 4, 3, padding=2, dilation=2, groups=2, bias=False),
        nn.Tanh(),
        nn.ConvTranspose2d(4, 1, (3, 1), padding=(1, 0)),
    )


# --- attention -------------------------------------------------------------------------------------------------------


class PatchTransformer(nn.Module):
    """A vision transformer of torch's own layers; class token and positions belong to the model itself."""

    def __init__(self, batch_first: bool, width: int = 12) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.token = nn.Parameter(0.3 * torch.randn(1, 1, width))
        self.position = nn.Parameter(0.3 * torch.randn(17, 1, width))
        self.patches = nn.Conv2d(1, width, 2, 2)
        layer = nn.TransformerEncoderLayer(
            width, 2, 16, activation="gelu", batch_first=batch_first, norm_first=batch_first
        )
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2)
        if self.batch_first:
            x = torch.cat([self.token.expand(len(x), -1, -1), x.transpose(1, 2)], 1)
            return self.head(self.encoder(x + self.position.transpose(0, 1))[:, 0])
        x = torch.cat([self.token.repeat(1, len(x), 1), x.permute(2, 0, 1)])
        return self.head(self.encoder(x + self.position)[0])


class Conv1D(nn.Module):
    """A linear layer as GPT-2 of Hugging Face has it: the weight the other way round, tokens in one row."""

    def __init__(self, outside: int, inside: int) -> None:
        super().__init__()
        self.outside = outside
        self.weight = nn.Parameter(torch.randn(inside, outside) / inside**0.5)
        self.bias = nn.Parameter(0.1 * torch.randn(outside))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return flat.view(*x.shape[:-1], self.outside)


class TinyGpt(nn.Module):
    """Causal attention over tokens, the embedding tied to the output layer.

    ``flattened`` is the way of Hugging Face: position ids with a first dimension of 1, layers that see all tokens of
    all samples in one row, and logits of the last token.
    """

    def __init__(self, flattened: bool, words: int = 7, width: int = 12, length: int = 6) -> None:
        super().__init__()
        self.flattened = flattened
        self.words = nn.Embedding(words, width)
        self.places = nn.Embedding(length, width)
        self.norm1 = nn.LayerNorm(width)
        self.qkv = Conv1D(3 * width, width) if flattened else nn.Linear(width, 3 * width)
        self.mix = Conv1D(width, width) if flattened else nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 16)
        self.down = nn.Linear(16, width)
        self.norm3 = nn.LayerNorm(width)
        self.output = nn.Linear(width, words, bias=False)
        self.output.weight = self.words.weight
        self.register_buffer("ids", torch.arange(length)[None], persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        samples, length = tokens.shape
        ids = self.ids[:, :length] if self.flattened else torch.arange(length, device=tokens.device)
        x = self.words(tokens) + self.places(ids)
        parts = self.qkv(self.norm1(x)).reshape(samples, length, 3, 2, -1).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.mix(found.transpose(1, 2).reshape(samples, length, -1))
        inner = self.norm2(x).reshape(samples * length, -1) if self.flattened else self.norm2(x)
        x = x + self.down(F.gelu(self.up(inner))).reshape(x.shape)
        if self.flattened:
            return self.output(self.norm3(x)[:, -1])
        return self.output(self.norm3(x)).mean(1)


class CrossAttention(nn.Module):
    """``nn.MultiheadAttention`` with keys and values of other widths, masks, added rows, and samples second."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.across = nn.MultiheadAttention(width, 2, kdim=6, vdim=7, batch_first=True)
        self.within = nn.MultiheadAttention(width, 2, add_bias_kv=True, add_zero_attn=True, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.packed = nn.MultiheadAttention(width, 4, bias=False)
        self.head = nn.Linear(width, 3)

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, padding: Tensor) -> Tensor:
        x = query + self.across(query, keys, values, key_padding_mask=padding, need_weights=False)[0]
        x = self.norm(x + self.within(x, x, x, key_padding_mask=padding[:, : x.shape[1]])[0])
        memory = values[..., :6].repeat(1, 1, 2)[..., : x.shape[2]].transpose(0, 1)
        x = x + self.packed(x.transpose(0, 1), memory, memory)[0].transpose(0, 1)
        return self.head(torch.tanh(x).mean(1))


# --- recurrent -------------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """Reads a digit row by row."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind == "lstm":
            self.reader: nn.Module = nn.LSTM(8, 5, num_layers=2, bidirectional=True, batch_first=True)
        elif kind == "gru":
            self.reader = nn.GRU(8, 7, num_layers=2)
        elif kind == "rnn":
            self.reader = nn.RNN(8, 10, batch_first=True, bias=False)
        else:
            self.reader = nn.LSTM(8, 12, proj_size=10, batch_first=True)
        self.head = nn.Linear(7 if kind == "gru" else 10, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 8, 8)
        if self.kind == "gru":
            return self.head(self.reader(rows.transpose(0, 1))[1][-1])
        if self.kind == "lstm":
            _, (hidden, _) = self.reader(rows)
            return self.head(torch.cat([hidden[-2], hidden[-1]], 1))
        return self.head(self.reader(rows)[0].mean(1))


class Cell(nn.Module):
    """A recurrent cell that the model itself calls step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(8, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 6)
        for row in x.reshape(-1, 8, 8).unbind(1):
            state = self.cell(row, state)
        return self.head(state)


# --- embeddings, norms, bare parameters ------------------------------------------------------------------------------


class Bags(nn.Module):
    """Bags of tokens, weighted and averaged, and embeddings with a row that never learns."""

    def __init__(self, words: int = 9) -> None:
        super().__init__()
        self.total = nn.EmbeddingBag(words, 5, mode="sum")
        self.average = nn.EmbeddingBag(words, 4, mode="mean", padding_idx=0)
        self.each = nn.Embedding(words, 6, padding_idx=2)
        self.head = nn.Linear(15, 3)

    def forward(self, tokens: Tensor, weights: Tensor) -> Tensor:
        each = torch.tanh(self.each(tokens)).mean(1)
        bags = self.total(tokens, per_sample_weights=weights), self.average(tokens)
        return self.head(torch.tanh(torch.cat([*bags, each], 1)))


def norms() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.GroupNorm(3, 6),
        nn.Tanh(),
        nn.InstanceNorm2d(6, affine=True),
        nn.Tanh(),
        nn.Conv2d(6, 4, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.LayerNorm([4, 4]),
        nn.Tanh(),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        nn.Tanh(),
        nn.LayerNorm(4, bias=False),
        nn.Flatten(),
        nn.RMSNorm(64, eps=1e-6),
        nn.Linear(64, 10),
        nn.BatchNorm1d(10),
        nn.Linear(10, 3),
    )


def prelu() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 5, 3, padding=1),
        nn.PReLU(5),
        nn.Conv2d(5, 4, 3, stride=2, padding=1),
        nn.PReLU(),
        nn.Flatten(),
        nn.Linear(64, 12),
        nn.PReLU(12),
        nn.Linear(12, 3),
    )


class Gain(nn.Module):
    """Parameters that are only multiplied and added, and one scalar."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(1 + 0.2 * torch.randn(width))
        self.shift = nn.Parameter(0.2 * torch.randn(1, width))
        self.temperature = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.gain + self.shift) / self.temperature


class Bare(nn.Module):
    """Matrices without a layer around them."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(12, 64) / 8)
        self.mixer = nn.Parameter(torch.randn(3, 12) / 3)
        self.gain = Gain(12)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.gain(x.flatten(1) @ self.matrix.T))
        return torch.einsum("ni,oi->no", x, self.mixer)


# --- ways to use a layer ---------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """A linear layer and a convolution that are each called twice, the convolution at two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(1, 5, 3, padding=1)
        self.again = nn.Conv2d(5, 5, 3, padding=1)
        self.mix = nn.Linear(20, 20)
        self.head = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.again(torch.tanh(self.enter(x))))
        x = torch.tanh(self.again(F.avg_pool2d(x, 2)))
        x = self.mix(F.adaptive_avg_pool2d(x, 2).flatten(1))
        return self.head(self.mix(torch.tanh(x)))


def frozen() -> nn.Module:
    module = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.GroupNorm(2, 6),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(96, 8),
        nn.Tanh(),
        nn.Linear(8, 3),
    )
    for name in ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "4.bias", "7.bias"):
        module.get_parameter(name).requires_grad_(False)
    return module


class Uncovered(nn.Module):
    """Parameters that a layer is computed from, and a layer without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = weight_norm(nn.Conv2d(1, 4, 3, stride=2, padding=1))
        self.middle = nn.Linear(64, 10)
        self.narrow = spectral_norm(nn.Linear(10, 8, bias=False))
        self.pairs = nn.Bilinear(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.middle(torch.tanh(self.conv(x)).flatten(1)))
        return self.pairs(torch.tanh(self.narrow(x)), x[:, :4])


class Dictionaries(nn.Module):
    """Takes its inputs by name and returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Linear(64, 8)
        self.extra = nn.Linear(5, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, image: Tensor, extra: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.image(image.flatten(1)) * torch.sigmoid(self.extra(extra)))
        return {"hidden": hidden, "logits": self.head(hidden)}


class Logits(nn.Module):
    """The logits alone of a model that returns a dict."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.module(**inputs)["logits"]


class Bypass(nn.Module):
    """Never calls its layers, only uses what they hold, so that no hook of theirs fires."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.LayerNorm(36)
        self.layer = nn.Linear(144, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(F.conv2d(x, self.conv.weight, self.conv.bias, stride=1)).flatten(2)
        x = F.layer_norm(x, (36,), self.norm.weight, self.norm.bias).flatten(1)
        return self.head(torch.tanh(F.linear(x, self.layer.weight, self.layer.bias)))


class InPlace(nn.Module):
    """Writes over outputs of layers, and over what a layer read, wherever autograd allows it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 12)
        self.second = nn.Linear(12, 12)
        self.third = nn.Linear(12, 12)
        self.offset = nn.Linear(12, 12)
        self.offset.weight.requires_grad_(False)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1)).relu_()
        y = self.second(x)
        y += x
        y.mul_(0.5)
        z = self.third(y)
        z[:, :4] *= 2
        z.tanh_()
        y = z * 1.5
        shifted = self.offset(y)
        y += 1  # its weight is frozen, so autograd does not hold what it read
        return self.head(torch.tanh(shifted) + y)


# --- traps: right for a sample alone, easily wrong in a batch --------------------------------------------------------


class Tail(nn.Module):
    """A linear layer, something in between, and a head."""

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.layer = nn.Linear(64, width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.between(torch.tanh(self.layer(x.flatten(1))))))

    def between(self, x: Tensor) -> Tensor:
        return self.mix(x)


class Reversed(Tail):
    """The layer sees the samples of a batch in the opposite order."""

    def between(self, x: Tensor) -> Tensor:
        return self.mix(x.flip(0)).flip(0)


class TwoViews(Tail):
    """The layer sees two rows of every sample, half a batch apart."""

    def between(self, x: Tensor) -> Tensor:
        one, other = self.mix(torch.cat([x, x.flip(1)])).chunk(2)
        return one * other


class TokensFirst(Tail):
    """The layer sees all tokens of all samples in one row, samples running fastest."""

    def between(self, x: Tensor) -> Tensor:
        tokens = torch.stack([x, x.roll(1, 1), x.square()])
        return torch.tanh(self.mix(tokens.reshape(-1, x.shape[1]))).reshape(tokens.shape).prod(0)


class SampleLoop(Tail):
    """The layer is called once per sample, without a dimension for samples."""

    def between(self, x: Tensor) -> Tensor:
        return torch.stack([self.mix(row) for row in x])


class StopGradient(Tail):
    """The weight is used again where no gradient may flow back to it."""

    def between(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.mix(x.square())
        return self.mix(x) * target + F.linear(x, self.mix.weight.detach(), self.mix.bias) - self.mix(x).detach()


class Unused(Tail):
    """One layer that is never called and one whose output goes nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Linear(4, 2)
        self.nowhere = nn.LayerNorm(10)

    def between(self, x: Tensor) -> Tensor:
        self.nowhere(x)
        return self.mix(x)


class Penalised(Tail):
    """The layer is called, and its weight is used once more in a way of its own."""

    def between(self, x: Tensor) -> Tensor:
        return self.mix(x) + 0.1 * self.mix.weight.square().sum(0)


class Sliced(Tail):
    """Parts of one weight are used as the weights of two layers."""

    def between(self, x: Tensor) -> Tensor:
        upper = F.linear(x[:, :5], self.mix.weight[:, :5], self.mix.bias)
        return upper * F.linear(x, self.mix.weight.view(10, 10))


class Doubled(Tail):
    """The same tensor is both weight and input of a layer."""

    def between(self, x: Tensor) -> Tensor:
        return self.mix(x) + F.linear(self.mix.weight, self.mix.weight, self.mix.bias).mean(0)


class MaskBranch(Tail):
    """Leaves out a mask that masks nothing, as transformers do: another path for other data, the same function."""

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        x = torch.tanh(self.layer(image.flatten(1)))
        x = torch.tanh(self.mix(x))
        return self.head(x if mask.all() else x.masked_fill(~mask, 0.0))


class AddedInPlace(Tail):
    """A part of the layer's output is replaced and another one scaled, then all of it is written over."""

    def between(self, x: Tensor) -> Tensor:
        y = self.mix(x)
        y[:, :2] = x[:, 3:5]
        y[:, 2:6] *= x[:, 2:6]
        return y.add_(x).sigmoid_()


class TiedMatrix(nn.Module):
    """An embedding that is also the output layer, as a plain product."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 6)
        self.middle = nn.Linear(6, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.middle(self.words(tokens))).mean(1) @ self.words.weight.T


class Shared(nn.Module):
    """Layers that see what no sample has a part in: relative positions, as Swin has them, and a gathered table."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.table = nn.Parameter(0.3 * torch.randn(15, 2))
        self.positions = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 2, bias=False))
        self.shapes = nn.Conv1d(2, 2, 3, padding=1, bias=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.head = nn.Linear(width, 3)
        distance = torch.arange(8)[:, None] - torch.arange(8)[None]
        self.register_buffer("distance", distance + 7)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 8, 8)
        parts = self.qkv(rows).reshape(-1, 8, 3, 2, 4).permute(2, 0, 3, 1, 4)
        near = self.positions(self.distance[..., None].to(x.dtype) / 7 - 1)
        bias = (self.table[self.distance] + near).permute(2, 0, 1)
        bias = bias + self.shapes(bias.mean(2)[None])[0, :, None]
        found = F.scaled_dot_product_attention(*parts, attn_mask=bias[None])
        return self.head(found.transpose(1, 2).flatten(2).mean(1))


# --- the zoo ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ZooCase:
    """A network with data.

    Attributes:
        name: for the test's id.
        module: in eval mode.
        inputs: of train and test samples together, as the model takes them.
        labels: of the same samples.
        train: how many of the samples are train.
        bound: relative error allowed for logits in float32.
        functional: names of the parameter blocks that no rule covers.
        either: names of those that a rule may cover or not.
        reference: what the oracle differentiates: the module, or one of the same parameters that returns a tensor.
    """

    name: str
    module: nn.Module
    inputs: Inputs
    labels: Tensor
    train: int
    bound: float
    functional: frozenset[str] = frozenset()
    either: frozenset[str] = frozenset()
    reference: nn.Module | None = None

    @property
    def samples(self) -> int:
        return len(self.labels)

    def data(self, part: slice) -> tuple[Inputs, Tensor] | dict[str, Tensor]:
        """Some of the samples, as a job takes them: with labels, but for a dict."""
        if isinstance(self.inputs, dict):
            return {name: value[part] for name, value in self.inputs.items()}
        if isinstance(self.inputs, tuple):
            return tuple(value[part] for value in self.inputs), self.labels[part]
        return self.inputs[part], self.labels[part]

    def job(self, *, test: bool = True, **options: object) -> ooc_ntk.Job:
        return ooc_ntk.Job(
            model=self.module,
            train=self.data(slice(0, self.train)),
            test=self.data(slice(self.train, None)) if test else None,
            **{"device": "cpu", **options},
        )


def _images(count: int) -> Tensor:
    return digits(3)[0][:count]


def _tokens(count: int) -> Tensor:
    return torch.randint(0, 7, (count, 6), generator=torch.Generator().manual_seed(3))


def _bags(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randint(0, 9, (count, 7), generator=generator), torch.rand(count, 7, generator=generator)


def _named(count: int) -> dict[str, Tensor]:
    return {"image": _images(count), "extra": torch.randn(count, 5, generator=torch.Generator().manual_seed(5))}


def _sequences(count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(6)
    lengths = torch.randint(2, 6, (count, 1), generator=generator)
    return {
        "query": torch.randn(count, 4, 8, generator=generator),
        "keys": torch.randn(count, 5, 6, generator=generator),
        "values": torch.randn(count, 5, 7, generator=generator),
        "padding": torch.arange(5) >= lengths,
    }


def _masked(count: int) -> dict[str, Tensor]:
    mask = torch.rand(count, 10, generator=torch.Generator().manual_seed(8)) > 0.2
    mask[::3] = True
    return {"image": _images(count), "mask": mask}


@dataclass(frozen=True)
class _Recipe:
    """How to make one case; ``gain`` scales the weights, so that every parameter has a part in the kernel."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs] = _images
    bound: float = SMOOTH
    gain: float = 1.0
    functional: tuple[str, ...] = ()
    either: tuple[str, ...] = ()
    reference: Callable[[nn.Module], nn.Module] | None = None


_LAYERS: dict[str, _Recipe] = {
    "resnet": _Recipe(resnet, bound=KINKED),
    "mobilenet": _Recipe(mobilenet, gain=2),
    "padding-modes": _Recipe(padding_modes, gain=2),
    "conv1d": _Recipe(Signals, gain=2),
    "conv3d": _Recipe(Volumes, gain=2),
    "autoencoder": _Recipe(autoencoder, gain=2),
    "vit": _Recipe(lambda: PatchTransformer(batch_first=True), either=("",)),
    # The class token is repeated, not broadcast.
    "vit-sequence-first": _Recipe(lambda: PatchTransformer(batch_first=False), either=("",)),
    "gpt": _Recipe(lambda: TinyGpt(flattened=False), _tokens),
    "gpt-flattened": _Recipe(lambda: TinyGpt(flattened=True), _tokens),
    "cross-attention": _Recipe(CrossAttention, _sequences, gain=2, either=("across", "within", "packed")),
    "lstm": _Recipe(lambda: Recurrent("lstm"), gain=2),
    "gru": _Recipe(lambda: Recurrent("gru")),
    "rnn": _Recipe(lambda: Recurrent("rnn")),
    "bags": _Recipe(Bags, _bags),
    "norms": _Recipe(norms),
    "prelu": _Recipe(prelu, bound=KINKED, gain=2),
    # Two matrices that are multiplied by no layer.
    "bare": _Recipe(Bare, either=("", "gain")),
    "twice": _Recipe(Twice, gain=2),
    "frozen": _Recipe(frozen),
    # The bias of the weight-normed convolution is its own, the weight is not.
    "uncovered": _Recipe(
        Uncovered,
        functional=("conv.parametrizations.weight", "narrow.parametrizations.weight", "pairs"),
        either=("conv",),
    ),
    "dictionaries": _Recipe(Dictionaries, _named, reference=Logits),
    "bypass": _Recipe(Bypass),
    "in-place": _Recipe(InPlace, bound=KINKED),
}

_TRAPS: dict[str, _Recipe] = {
    "samples reversed": _Recipe(Reversed, either=("mix",)),
    "two views": _Recipe(TwoViews, either=("mix",)),
    "tokens first": _Recipe(TokensFirst, either=("mix",)),
    "sample by sample": _Recipe(SampleLoop, either=("layer", "mix", "head")),
    "stopped gradient": _Recipe(StopGradient, either=("mix",)),
    "unused": _Recipe(Unused, either=("never", "nowhere")),
    "penalised": _Recipe(Penalised, either=("mix",)),
    "sliced": _Recipe(Sliced, either=("mix",)),
    "doubled": _Recipe(Doubled, either=("mix",)),
    "added in place": _Recipe(AddedInPlace),
    "tied matrix": _Recipe(TiedMatrix, _tokens, either=("words",)),
    "shared": _Recipe(Shared, gain=2, either=("", "positions.0", "positions.2", "shapes")),
    "mask branch": _Recipe(MaskBranch, _masked, either=("layer", "mix", "head")),
    "gru cell": _Recipe(Cell, either=("cell",)),
    "projected lstm": _Recipe(lambda: Recurrent("projected"), either=("reader",)),
}

#: Networks of layers that have a rule.
NAMES = tuple(_LAYERS)

#: Networks that use a layer in a way that a rule must notice.
TRAPS = tuple(_TRAPS)


@functools.cache
def zoo_case(name: str) -> ZooCase:
    """One of :data:`NAMES` or :data:`TRAPS`; the same object every time, as no test may change it."""
    recipe = {**_LAYERS, **_TRAPS}[name]
    count = TRAIN + TEST
    with torch.random.fork_rng():
        torch.manual_seed(11)
        module = recipe.make()
        with torch.no_grad():
            _call(module, recipe.inputs(64))  # lazy layers get their size
            _spread(module, recipe.gain)
            for _ in range(20):  # running statistics that are not 0 and 1, power iterations that have converged
                _call(module, recipe.inputs(64))
    module.eval()
    case = ZooCase(
        name,
        module,
        recipe.inputs(count),
        digits(3)[1][:count],
        TRAIN,
        recipe.bound,
        frozenset(recipe.functional),
        frozenset(recipe.either),
    )
    return case if recipe.reference is None else replace(case, reference=recipe.reference(module))


def _call(module: nn.Module, inputs: Inputs) -> object:
    if isinstance(inputs, dict):
        return module(**inputs)
    return module(*(inputs if isinstance(inputs, tuple) else (inputs,)))


def _spread(module: nn.Module, gain: float) -> None:
    """Scale weights, and move what torch starts at 0 or 1, where a wrong factor would not show."""
    for parameter in module.parameters():
        if parameter.ndim > 1:
            parameter *= gain
        if parameter.unique().numel() == 1 and parameter.numel() > 1:
            parameter += 0.3 * torch.randn_like(parameter)


@functools.cache
def jacobian(name: str, outputs: str = "logits") -> np.ndarray:
    """The oracle's Jacobian of a case, train and test samples, computed once per session."""
    chosen = zoo_case(name)
    module = chosen.reference or chosen.module
    names = [key for key, value in module.named_parameters() if value.requires_grad]
    return oracle.jacobian(module, chosen.inputs, chosen.labels, outputs, names)


def kernel(name: str, kind: str = "trace", normalize: str | None = None, outputs: str = "logits") -> np.ndarray:
    """The oracle's kernel of a case."""
    return oracle.kernel(jacobian(name, outputs), TRAIN, kind, normalize=normalize)
