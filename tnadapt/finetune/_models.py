"""A vision transformer small enough to pretrain within a short wait."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from tnadapt.errors import ShapeError

__all__ = ["SmallViT", "ViTSizes"]


@dataclasses.dataclass(frozen=True)
class ViTSizes:
    """Sizes of a :class:`SmallViT`: sides of image and patch in pixels, channels, width, layers, heads, MLP ratio."""

    image: int = 8
    patch: int = 2
    channels: int = 1
    width: int = 64
    depth: int = 4
    heads: int = 4
    ratio: int = 2


class Attention(nn.Module):
    """Self-attention with query, key and value in one fused ``qkv``, as in timm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, tokens, width)`` to the same shape."""
        n, tokens, width = x.shape
        q, k, v = self.qkv(x).view(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed: Tensor = self.proj(
            nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width)
        )
        return mixed


class Block(nn.Module):
    """Attention and an MLP, each after a norm and with a residual connection."""

    def __init__(self, width: int, heads: int, ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, ratio * width), nn.GELU(), nn.Linear(ratio * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(n, tokens, width)`` to the same shape."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class SmallViT(nn.Module):
    """A vision transformer: patches, learned positions, blocks, the mean over patches, a linear head.

    Parameters
    ----------
    classes : int
    sizes : ViTSizes

    Raises
    ------
    ShapeError
        If the patch does not divide the image, or the heads the width.

    Examples
    --------
    >>> model = SmallViT(5)
    >>> model(torch.zeros(3, 1, 8, 8)).shape, sum(p.numel() for p in model.parameters())
    (torch.Size([3, 5]), 135685)
    """

    def __init__(self, classes: int, sizes: ViTSizes = ViTSizes()) -> None:
        super().__init__()
        if sizes.image % sizes.patch or sizes.width % sizes.heads:
            raise ShapeError(f"the patch must divide the image and the heads the width; got {sizes}")
        self.sizes = sizes
        self.embed = nn.Linear(sizes.channels * sizes.patch**2, sizes.width)
        self.position = nn.Parameter(0.02 * torch.randn((sizes.image // sizes.patch) ** 2, sizes.width))
        self.blocks = nn.ModuleList(Block(sizes.width, sizes.heads, sizes.ratio) for _ in range(sizes.depth))
        self.norm = nn.LayerNorm(sizes.width)
        self.head = nn.Linear(sizes.width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(n, channels, size, size)`` to logits ``(n, classes)``."""
        patches = nn.functional.unfold(images, self.sizes.patch, stride=self.sizes.patch).transpose(1, 2)
        x = self.embed(patches) + self.position
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits
