"""A small vision transformer, with the names that timm and the DeiT authors give its layers."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

#: Standard deviation of the initial weights (DeiT's and timm's value), and of the class token.
_WEIGHT_STD: Final = 0.02
_TOKEN_STD: Final = 1e-6
#: Of the layer norms, as ViT and DeiT have them; torch's own is 1e-5.
_EPS: Final = 1e-6


class PatchEmbed(nn.Module):
    """Cuts images into patches and embeds each: (samples, channels, size, size) → (samples, patches, width)."""

    def __init__(self, patch: int, channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        """Embed the patches, row by row; shapes as in the class."""
        embedded: Tensor = self.proj(x)
        return embedded.flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention: (samples, tokens, width) → the same.

    Vaswani et al. 2017, arXiv 1706.03762. Queries, keys and values come from one Linear layer, so that hooks see it.

    Args:
        width: of a token; a multiple of ``heads``.
        heads: number of heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend from every token to all tokens of its sample; shapes as in the class."""
        samples, tokens, width = x.shape
        split = self.qkv(x).reshape(samples, tokens, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(samples, tokens, width))
        return out


class FeedForward(nn.Module):
    """Two Linear layers with GELU between, for each token: (samples, tokens, width) → the same."""

    def __init__(self, width: int, inside: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inside)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(inside, width)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both layers; shapes as in the class."""
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class Block(nn.Module):
    """Pre-norm transformer block, four times wider inside: (samples, tokens, width) → the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=_EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=_EPS)
        self.mlp = FeedForward(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        """Add attention, then the feed-forward layers; shapes as in the class."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class VisionTransformer(nn.Module):
    """A vision transformer: (samples, channels, size, size), float32 → (samples, classes).

    Dosovitskiy et al. 2021, *An image is worth 16x16 words*, arXiv 2010.11929, with a class token and learned
    positions; the default sizes are DeiT-tiny's (Touvron et al. 2021, arXiv 2012.12877). The names are those of timm's
    ``deit_tiny_patch16_224``. Weights of Linear layers and positions start from a normal distribution of standard
    deviation 0.02, cut off at ±2, biases at zero: timm's distribution, not the bits that a seed gives there.

    Args:
        size: side of the images, pixels; a multiple of ``patch``.
        patch: side of a patch, pixels.
        channels: input channels.
        classes: outputs.
        width: of a token; a multiple of ``heads``.
        depth: number of blocks.
        heads: of each attention layer.
    """

    def __init__(
        self,
        size: int = 224,
        patch: int = 16,
        *,
        channels: int = 3,
        classes: int = 1000,
        width: int = 192,
        depth: int = 12,
        heads: int = 3,
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(patch, channels, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (size // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=_EPS)
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.pos_embed, std=_WEIGHT_STD)
        nn.init.normal_(self.cls_token, std=_TOKEN_STD)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=_WEIGHT_STD)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (samples, classes) from the class token of images (samples, channels, size, size)."""
        patches: Tensor = self.patch_embed(x)
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1) + self.pos_embed
        logits: Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
        return logits
