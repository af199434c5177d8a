"""The U-Net of the paper's image-generation task: classifier-free guidance on 32 x 32 images of ten classes.

Appendix A.2 outlines it, following the public code it cites: base width 64, multipliers 1, 2, 2, 2, two residual
blocks per level, an attention module after every residual block except the last of the middle (21 in total), and 10.42
million parameters, of which 300 embed the class. This one has 10,409,027 and 300: 0.1 % fewer, and no choice that the
outline leaves open explains the difference (one image channel instead of three: 2,306 fewer; a class table of 10 x 30:
5,120 more). Perhaps adapters were counted, too: LoRA of rank 1 on query and value has 9,472, which gives 10.42 million.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["ClassEmbedding", "Generator", "PixelAttention", "UNet", "sinusoids"]

GROUPS = 32


class ClassEmbedding(nn.Module):
    """The embedding of the class: a table and two linear maps, 300 parameters for ten classes.

    Parameters
    ----------
    classes, width : int
        Number of classes, and width of the embedding.

    Notes
    -----
    For guidance, some training images get an embedding of zeros instead of their class's.
    """

    def __init__(self, classes: int = 10, width: int = 10) -> None:
        super().__init__()
        self.table = nn.Embedding(classes, width)
        self.mlp = nn.Sequential(nn.Linear(width, width, bias=False), nn.SiLU(), nn.Linear(width, width, bias=False))

    def forward(self, label: Tensor) -> Tensor:
        """Map labels ``(batch,)`` to embeddings ``(batch, width)``."""
        embedded: Tensor = self.mlp(self.table(label))
        return embedded


class PixelAttention(nn.Module):
    """Single-head attention among the pixels of a feature map; its four projections are 1x1 convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, channels)
        self.proj_q = nn.Conv2d(channels, channels, 1)
        self.proj_k = nn.Conv2d(channels, channels, 1)
        self.proj_v = nn.Conv2d(channels, channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(batch, channels, height, width)`` to the same shape."""
        normed = self.norm(x)
        # An explicit axis for the single head: without it torch does not use its fused kernel.
        q, k, v = (proj(normed).flatten(2).mT[:, None].contiguous() for proj in (self.proj_q, self.proj_k, self.proj_v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v).mT.reshape(x.shape)
        found: Tensor = x + self.proj(mixed)
        return found


class Residual(nn.Module):
    """A residual block: two 3x3 convolutions, with the embeddings of time and class added between them."""

    def __init__(self, channels: int, out: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.norm_in = nn.GroupNorm(GROUPS, channels)
        self.conv_in = nn.Conv2d(channels, out, 3, padding=1)
        self.time = nn.Linear(embedding, out)
        self.label = nn.Linear(embedding, out)
        self.norm_out = nn.GroupNorm(GROUPS, out)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        """Map ``(batch, channels, height, width)`` and two embeddings to ``(batch, out, height, width)``."""
        found = self.conv_in(nn.functional.silu(self.norm_in(x)))
        found = found + (self.time(nn.functional.silu(time)) + self.label(nn.functional.silu(label)))[:, :, None, None]
        found = self.conv_out(self.dropout(nn.functional.silu(self.norm_out(found))))
        added: Tensor = found + self.shortcut(x)
        return added


class Stage(nn.Module):
    """A residual block and its attention, with optional upsampling by two."""

    def __init__(self, channels: int, out: int, embedding: int, dropout: float, double: bool = False) -> None:
        super().__init__()
        self.residual = Residual(channels, out, embedding, dropout)
        self.attention = PixelAttention(out)
        self.upsample = nn.Conv2d(out, out, 3, padding=1) if double else None

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        """Map ``(batch, channels, h, w)`` to ``(batch, out, h, w)``, or to twice the height and width."""
        x = self.attention(self.residual(x, time, label))
        return (
            x
            if self.upsample is None
            else self.upsample(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))
        )


class UNet(nn.Module):
    """Predicts the noise in an image from the image, the time step and the embedded class.

    Parameters
    ----------
    channels : int
        Channels of the image: 3 for SVHN, and for MNIST in combination with SVHN.
    base : int
        Width of the first level, a multiple of 32.
    multipliers : sequence of int
        Width of each level in units of ``base``; every level except the last halves the image.
    blocks : int
        Residual blocks per level on the way down; one more on the way up.
    classes : int
        Size of the class embedding.
    dropout : float
        Dropout in every residual block.

    Notes
    -----
    Time and class are each mapped by an MLP to ``4 * base`` numbers, which every residual block maps to its width. The
    attention modules, in order, have 64, 64, 128 (6 times) channels on the way down, 128 in the middle, and
    128 (9 times), 64, 64, 64 on the way up.

    Examples
    --------
    >>> net = UNet()
    >>> sum(weight.numel() for weight in net.parameters())
    10409027
    >>> net(torch.zeros(1, 3, 8, 8), torch.tensor([10]), torch.zeros(1, 10)).shape
    torch.Size([1, 3, 8, 8])
    """

    def __init__(
        self,
        channels: int = 3,
        base: int = 64,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        blocks: int = 2,
        classes: int = 10,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.base = base
        embedding = 4 * base
        self.time = nn.Sequential(nn.Linear(base, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.label = nn.Sequential(nn.Linear(classes, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.stem = nn.Conv2d(channels, base, 3, padding=1)
        self.down = nn.ModuleList()
        width, skips = base, [base]
        last = len(multipliers) - 1
        for level, multiplier in enumerate(multipliers):
            for _ in range(blocks):
                self.down.append(Stage(width, base * multiplier, embedding, dropout))
                width = base * multiplier
                skips.append(width)
            if level < last:
                self.down.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                skips.append(width)
        self.middle = Stage(width, width, embedding, dropout)
        self.middle_out = Residual(width, width, embedding, dropout)
        self.up = nn.ModuleList()
        for level in range(last, -1, -1):
            for block in range(blocks + 1):
                double = level > 0 and block == blocks
                self.up.append(Stage(width + skips.pop(), base * multipliers[level], embedding, dropout, double))
                width = base * multipliers[level]
        self.norm = nn.GroupNorm(GROUPS, width)
        self.head = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, cemb: Tensor) -> Tensor:
        """Predict the noise.

        Parameters
        ----------
        x : Tensor, shape (batch, channels, height, width)
            Noisy images; height and width divisible by ``2 ** (levels - 1)``.
        t : Tensor, shape (batch,)
            Time steps.
        cemb : Tensor, shape (batch, classes)
            Embedded classes from :class:`ClassEmbedding`; zeros for hidden classes.

        Returns
        -------
        Tensor, shape (batch, channels, height, width)
        """
        time, label = self.time(sinusoids(t, self.base)), self.label(cemb)
        x = self.stem(x)
        skips = [x]
        for layer in self.down:
            x = layer(x, time, label) if isinstance(layer, Stage) else layer(x)
            skips.append(x)
        x = self.middle_out(self.middle(x, time, label), time, label)
        for layer in self.up:
            x = layer(torch.cat([x, skips.pop()], 1), time, label)
        noise: Tensor = self.head(nn.functional.silu(self.norm(x)))
        return noise


class Generator(nn.Module):
    """The U-Net with its class embedding, which predicts the noise in an image of a class.

    Parameters
    ----------
    channels, base, dropout
        As in :class:`UNet`.
    classes : int

    Examples
    --------
    The paper's model: 300 of its parameters embed the class, and 42 weights are adapted.

    >>> model = Generator()
    >>> sum(weight.numel() for weight in model.classes.parameters())
    300
    >>> import tnadapt.torch
    >>> len(tnadapt.torch.find_targets(model, "qv"))
    42
    """

    def __init__(self, channels: int = 3, base: int = 64, classes: int = 10, dropout: float = 0.1) -> None:
        super().__init__()
        self.classes = ClassEmbedding(classes, classes)
        self.net = UNet(channels, base, classes=classes, dropout=dropout)

    def forward(self, x: Tensor, t: Tensor, label: Tensor, known: Tensor) -> Tensor:
        """Predict the noise.

        Parameters
        ----------
        x : Tensor, shape (batch, channels, height, width)
        t : Tensor, shape (batch,)
        label : Tensor, shape (batch,)
        known : Tensor of bool, shape (batch,)
            Whether the class is given; hidden classes are embedded as zeros.

        Returns
        -------
        Tensor, shape (batch, channels, height, width)
        """
        embedded = self.classes(label) * known[:, None]
        noise: Tensor = self.net(x, t, embedded)
        return noise


def sinusoids(t: Tensor, width: int, period: float = 10000.0) -> Tensor:
    """Return cosines, then sines, of the time steps at ``width / 2`` frequencies from 1 to almost ``1 / period``.

    Parameters
    ----------
    t : Tensor, shape (batch,)
    width : int
        Must be even.
    period : float

    Returns
    -------
    Tensor, shape (batch, width), float32
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=t.device) * (-math.log(period) / half))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1)
