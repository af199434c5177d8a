"""A study that takes a second or two: the digits' small ViT, pretrained for one epoch and cached for all tests."""

from __future__ import annotations

from pathlib import Path

from tnadapt.finetune import Choice, Spec, Study, Training

TRAINING = Training(epochs=1, batch=64)
CHOICE = Choice(presets=("lora", "superlora"), ranks=(1,))


def spec(cache: Path) -> Spec:
    return Spec(cache=cache, pretrain_epochs=1)


def study(cache: Path, choice: Choice = CHOICE, rates: tuple[float, ...] = (0.01, 0.03), seeds: int = 1) -> Study:
    return Study(spec(cache), choice, TRAINING, rates, seeds)
