"""A small model with a trained adapter, and helpers for tests of training loops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.support.array_presets import P
from tnadapt import Config
from tnadapt.torch import Adapter, attach

from . import distributed_jobs
from .distributed_jobs import TOKENS, WIDTH, Block

CONFIGS: dict[str, Config | None] = {
    **distributed_jobs.CONFIGS,
    "nonlinear": P.superlora(4, projection="nonlinear", ratio=0.5),
    "lokr": P.lokr(2),
    "lorta": P.lorta(2),
}


def make(config: str = "default", parts: int = 3) -> tuple[nn.Sequential, Adapter]:
    """A fused qkv, attention that reads its weight itself, and separate projections; the adapter is not fresh."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0, batch_first=True)
    model = nn.Sequential(Block(True), layer, Block(False))[:parts]
    adapter = attach(model, CONFIGS[config])
    move(adapter)
    return model, adapter


def move(adapter: Adapter, seed: int = 1) -> None:
    """Change the adapter's arrays."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=random).to(parameter.dtype)


def batch(size: int = 4, seed: int = 2) -> Tensor:
    return torch.randn(size, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def loss_of(model: Any, x: Tensor) -> Tensor:
    # In single precision at least: not every torch has this loss's derivative in half precision on a CPU.
    made = model(x)
    wide = torch.promote_types(made.dtype, torch.float32)
    return functional.smooth_l1_loss(made.to(wide), x.roll(1, 1).to(wide))


def gradients(adapter: Adapter) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in adapter.named_parameters() if p.grad is not None}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


def bits(model: nn.Module, head: str = "") -> dict[str, Tensor]:
    """Return the base's state: everything except the adapter and the head that is trained with it."""
    return {
        name: value.clone()
        for name, value in model.state_dict().items()
        if "tnadapt" not in name and head not in name.split(".")
    }


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return list(found) == list(expected) and all(torch.equal(found[name], expected[name]) for name in expected)


def snapshot(adapter: Adapter) -> dict[str, Tensor]:
    return {name: array.detach().clone() for name, array in adapter.arrays().items()}
