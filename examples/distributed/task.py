"""Stand-ins for your model and data: a small vision transformer, and images of bars to classify."""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.data import Dataset

SIZE, PATCH, WIDTH, CLASSES = 8, 2, 32, 4


class Block(nn.Module):
    """Attention and an MLP, each with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.proj(scaled_dot_product_attention(q, k, v))
        return x + self.mlp(x)


class VisionTransformer(nn.Module):
    """Patches of 2 x 2 pixels, two blocks, and a head on their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, PATCH, PATCH)
        self.position = nn.Parameter(torch.randn((SIZE // PATCH) ** 2, WIDTH))
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).mT + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def pretrained_model() -> VisionTransformer:
    """Return a model with fixed weights, as if read from a file."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VisionTransformer()


class Bars(Dataset):
    """Noisy images with one bright bar; its position is the class."""

    def __init__(self, length: int = 64) -> None:
        random = torch.Generator().manual_seed(1)
        self.labels = torch.randint(CLASSES, (length,), generator=random)
        self.images = torch.randn(length, 1, SIZE, SIZE, generator=random)
        for image, label in zip(self.images, self.labels, strict=True):
            image[0, 2 * label] += 4.0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]
