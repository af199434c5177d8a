"""Adapters trained with accelerate and Lightning."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import tnadapt.torch
from tnadapt.torch import attach

from .loops import CONFIGS, bits, same, snapshot
from .small import batch, small

pytestmark = pytest.mark.slow

CLASSES = 3


@pytest.fixture
def accelerate() -> Iterator[Any]:
    found = pytest.importorskip("accelerate")
    # Its state belongs to the process: the trainers of other tests leave one, and the next test must not find ours.
    found.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield found
    found.state.AcceleratorState._reset_state(reset_partial_state=True)


def points() -> TensorDataset:
    return TensorDataset(batch(size=16), torch.arange(16) % CLASSES)


def epoch(accelerator: Any, model: Any, optimizer: Any, loader: Any) -> list[float]:
    losses = []
    for x, labels in loader:
        with accelerator.accumulate(model):
            with accelerator.autocast():
                loss = functional.cross_entropy(model(x).float(), labels)
            losses.append(float(loss.detach()))
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    return losses


@pytest.mark.law("launchers")
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("config", CONFIGS)
def test_accelerate(accelerate: Any, tmp_path: Path, config: str, precision: str) -> None:
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    model = small()
    adapter = attach(model, CONFIGS[config], keep_trainable=("head",))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(points(), 4))
    base, start = bits(model, "head"), snapshot(adapter)
    first = epoch(accelerator, model, optimizer, loader)
    # Two batches a step: the second sees what the first saw.
    assert not same(snapshot(adapter), start)
    accelerator.save_state(str(tmp_path))
    second = epoch(accelerator, model, optimizer, loader)
    end = snapshot(adapter)
    assert sum(second) < sum(first)
    assert {array.dtype for array in end.values()} == {torch.float32}

    accelerator.load_state(str(tmp_path))
    assert epoch(accelerator, model, optimizer, loader) == second
    assert same(snapshot(adapter), end)
    assert same(bits(model, "head"), base)
    adapter.save(tmp_path / "adapter.safetensors")
    plain = small()
    assert same(snapshot(tnadapt.torch.load(plain, tmp_path / "adapter.safetensors")), end)


def test_accelerate_when_the_model_is_the_layer(accelerate: Any) -> None:
    # accelerate puts a forward of its own on the very module whose forward the adapter stands in for.
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(16, 2, batch_first=True)
    adapter = attach(layer)
    x = batch()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = layer(x, x, x)[0].float()
    prepared = accelerator.prepare(layer)
    y = prepared(x, x, x)[0]
    assert torch.equal(y.detach(), expected)
    y.square().mean().backward()
    assert any(bool(p.grad.any()) for p in adapter.parameters() if p.grad is not None)


def module_of(lightning: Any, config: str) -> Any:
    class Module(lightning.LightningModule):
        """A module as users of Lightning write it."""

        def __init__(self) -> None:
            super().__init__()
            self.model = small().train()
            self.adapter = attach(self.model, CONFIGS[config], keep_trainable=("head",))
            self.losses: list[float] = []

        def training_step(self, data: Any, index: int) -> Tensor:
            x, labels = data
            loss = functional.cross_entropy(self.model(x).float(), labels)
            self.losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    return Module()


# Of Lightning itself: its own use of torch's trees, and advice on workers and callbacks.
@pytest.mark.filterwarnings("ignore::FutureWarning:lightning", "ignore::UserWarning:lightning")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("config", ["default", "lora"])
def test_lightning(tmp_path: Path, config: str, precision: str) -> None:
    lightning = pytest.importorskip("lightning")

    def fit(epochs: int, keep: bool = False, resume: str | None = None) -> Any:
        module = module_of(lightning, config)
        base = bits(module.model, "head")
        trainer = lightning.Trainer(
            default_root_dir=tmp_path, max_epochs=epochs, accelerator="cpu", devices=1, precision=precision,
            accumulate_grad_batches=2, logger=False, enable_checkpointing=keep, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader(points(), 4), ckpt_path=resume)
        assert same(bits(module.model, "head"), base)
        return module

    half, whole = fit(2, keep=True), fit(4)
    resumed = fit(4, resume=half.trainer.checkpoint_callback.best_model_path)
    assert sum(whole.losses[-4:]) < sum(whole.losses[:4])
    assert resumed.losses == whole.losses[8:]
    assert same(snapshot(resumed.adapter), snapshot(whole.adapter))
    assert {array.dtype for array in whole.adapter.arrays().values()} == {torch.float32}
