"""A study that takes a second or two, on the digits' small ViT, pretrained for one epoch; and reading labeled data."""

from __future__ import annotations

from pathlib import Path

from tnadapt.finetune import Choice, Spec, Study, Training
from tnadapt.finetune.data import Data, labelled_texts, open_source

TRAINING = Training(epochs=1, batch=64)
CHOICE = Choice(presets=("lora", "superlora"), ranks=(1,))


def spec(cache: Path) -> Spec:
    return Spec(cache=cache, pretrain_epochs=1)


def study(cache: Path, choice: Choice = CHOICE, rates: tuple[float, ...] = (0.01, 0.03), seeds: int = 1) -> Study:
    return Study(spec(cache), choice, TRAINING, rates, seeds)


def read(source: str, text_column: str | None = None, label_column: str | None = None) -> Data:
    """Read texts or images that each have one class."""
    opened = open_source(source, text_column, label_column)
    return opened if isinstance(opened, Data) else labelled_texts(opened, text_column, label_column)
