"""Small training jobs for one process or several, each on its share of the batch."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import tnadapt.torch
from tests.support.array_presets import P
from tnadapt import Config

STEPS, BATCH, TOKENS, WIDTH, CLASSES = 4, 8, 5, 16, 3

CONFIGS: dict[str, Config | None] = {
    "default": None,
    "linear": P.superlora(4, projection="linear", ratio=0.5),
    "lora": P.lora(2),
    "dense": P.dense(),
}


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor that processes may share; every process must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Block(nn.Module):
    """A transformer block whose query, key and value are one weight or three."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attn = nn.Module()
        if fused:
            self.attn.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        else:
            for name in ("query", "key", "value"):
                self.attn.register_module(name, nn.Linear(WIDTH, WIDTH))
        self.attn.proj = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        attn, y = self.attn, self.norm(x)
        q, k, v = attn.qkv(y).chunk(3, -1) if self.fused else (attn.query(y), attn.key(y), attn.value(y))
        x = x + attn.proj(functional.scaled_dot_product_attention(q, k, v))
        return x + self.mlp(x)


class Model(nn.Module):
    """A small vision transformer on vectors instead of images: two blocks between an embedding and a head."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.embed = nn.Linear(6, WIDTH)
        self.blocks = nn.ModuleList(Block(fused) for fused in (True, False))
        self.head = nn.Linear(WIDTH, CLASSES)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        if self.reentrant:
            # Without an input that has a gradient, torch's reentrant checkpoint gives none to anything inside.
            x.requires_grad_()
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x.mean(1))


@dataclasses.dataclass(frozen=True)
class Job:
    """One training run."""

    #: "ddp" or "fsdp2": how it is spread over processes, where there are several.
    how: str
    config: str = "default"
    #: Mode of activation checkpointing; none of it if None.
    reentrant: bool | None = None
    #: Backward passes before a step of the optimiser.
    accumulate: int = 1
    #: Parameters of the base that are trained, too.
    keep: tuple[str, ...] = ("head",)
    #: DDP's promise that every step is the same.
    static_graph: bool = False


JOBS: dict[str, Job] = {
    **{f"{how}-{config}": Job(how, config) for how in ("ddp", "fsdp2") for config in CONFIGS},
    "ddp-checkpoint": Job("ddp", reentrant=False),
    "ddp-reentrant": Job("ddp", reentrant=True, static_graph=True),
    "ddp-accumulate": Job("ddp", accumulate=2),
    "fsdp2-checkpoint": Job("fsdp2", reentrant=False),
    "fsdp2-accumulate": Job("fsdp2", accumulate=2),
    "fsdp2-mixed": Job("fsdp2", "linear", keep=("norm", "head")),
}


def build(job: Job) -> tuple[Model, tnadapt.torch.Adapter]:
    """Build the same model and adapter in every process."""
    torch.manual_seed(0)
    model = Model(job.reentrant)
    return model, tnadapt.torch.attach(model, CONFIGS[job.config], keep_trainable=job.keep)


def batches(job: Job) -> list[list[tuple[Tensor, Tensor]]]:
    """Return for every step the batches to accumulate."""
    random = torch.Generator().manual_seed(1)

    def batch() -> tuple[Tensor, Tensor]:
        x = torch.randn(BATCH, TOKENS, 6, generator=random)
        return x, (x.sum((1, 2)) > 0).long() + (x[:, 0, 0] > 1).long()

    return [[batch() for _ in range(job.accumulate)] for _ in range(STEPS)]


def spread(job: Job, model: Model) -> nn.Module:
    """Wrap the model for training by several processes."""
    if job.how == "ddp":
        return DistributedDataParallel(model, static_graph=job.static_graph)
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def synchronized(model: Any, now: bool) -> contextlib.AbstractContextManager[None]:
    """Set whether this backward pass reduces gradients across processes."""
    if isinstance(model, DistributedDataParallel) and not now:
        return model.no_sync()
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(now)
    return contextlib.nullcontext()


def train(job: Job, rank: int = 0, world: int = 1) -> tuple[list[float], tnadapt.torch.Adapter, bool]:
    """Train; return the losses of the whole batch at every step, the adapter, and whether the base kept its bits."""
    model, adapter = build(job)
    base = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    running = model if world == 1 else spread(job, model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5, momentum=0.9)
    losses = []
    for step in batches(job):
        total = torch.zeros(())
        for number, (x, y) in enumerate(step, 1):
            with synchronized(running, number == len(step)):
                loss = functional.cross_entropy(running(x[rank::world]), y[rank::world]) / len(step)
                loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        if world > 1:
            dist.all_reduce(total)
        losses.append(float(total) / world)
    kept = [torch.equal(whole(p), base[name]) for name, p in model.named_parameters() if name in base]
    return losses, adapter, all(kept)


# -- transformers' Trainer -------------------------------------------------------------------


def train_by_trainer(folder: Path, world: int = 1) -> tuple[list[float], tnadapt.torch.Adapter]:
    """Train with a Trainer, which detects several processes itself; return losses and adapter."""
    from . import hugging_face as hf

    model = hf.bert()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    adapter = tnadapt.torch.attach(model, keep_trainable="classifier")
    trainer = hf.trainer_of(
        model, folder, per_device_train_batch_size=BATCH // world, optim="sgd", learning_rate=0.1, max_grad_norm=0.0
    )
    trainer.train()
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry], adapter
