"""A small model that stores q and v in many forms: fused, separate, 1x1 convolutions, nn.MultiheadAttention."""

from __future__ import annotations

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.nn import functional

#: A model that is compiled whole, with a weight in whose place a sum stands for a moment.
compiles_whole = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13"), reason="this torch.compile does not know how an attribute is deleted"
)

WIDTH = 16


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + self.proj(functional.scaled_dot_product_attention(q, k, v))


class Separate(nn.Module):
    """Grouped-query attention: one head of keys and values for two of queries."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k_proj = nn.Linear(WIDTH, WIDTH // 2, bias=False)
        self.v_proj = nn.Linear(WIDTH, WIDTH // 2, bias=False)
        self.o_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (2, -1)).transpose(-2, -3)
        k, v = (proj(x).unsqueeze(-3) for proj in (self.k_proj, self.v_proj))
        y = functional.scaled_dot_product_attention(q, k.expand_as(q), v.expand_as(q))
        return x + self.o_proj(y.transpose(-2, -3).flatten(-2))


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj_q, self.proj_k, self.proj_v = (nn.Conv1d(WIDTH, WIDTH, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (proj(x.mT).mT for proj in (self.proj_q, self.proj_k, self.proj_v))
        return x + functional.scaled_dot_product_attention(q, k, v)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(x, x, x, need_weights=False)[0]


class Small(nn.Module):
    """A model of all these attentions, one after another, and a head."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, dropout=0.0, batch_first=True)
        self.blocks = nn.ModuleList([Fused(), Separate(), Convolved(), Heads(), layer])
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(-2))


def small(seed: int = 0) -> Small:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Small().eval()


def batch(seed: int = 1, size: int = 3) -> Tensor:
    return torch.randn(size, 5, WIDTH, generator=torch.Generator().manual_seed(seed))


def stir(adapter: object, size: float = 0.05, seed: int = 2) -> None:
    """Move an adapter's arrays as training would."""
    made = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():  # type: ignore[attr-defined]
            parameter.add_(size / adapter.plan.units[name] * torch.randn(parameter.shape, generator=made).to(parameter))
