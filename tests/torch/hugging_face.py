"""Tiny transformers models, data for them, and a fast and silent Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

CLASSES = 3


SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "num_labels": CLASSES,
}  # fmt: skip


def bert() -> Any:
    torch.manual_seed(0)
    # Ten times the usual range: attention then matters, which no pretraining has taught it here.
    config = transformers.BertConfig(**SMALL, vocab_size=40, max_position_embeddings=16, initializer_range=0.2)
    return transformers.BertForSequenceClassification(config)


def vit() -> Any:
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, image_size=8, patch_size=4))


def sentences(number: int = 16) -> list[dict[str, Any]]:
    """Sentences of eight words; the first word determines the class."""
    words = torch.randint(4, 40, (number, 8), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(8, dtype=torch.long)
    return [{"input_ids": row, "attention_mask": mask, "labels": int(row[0]) % CLASSES} for row in words]


def images(number: int = 16) -> list[dict[str, Any]]:
    pixels = torch.randn(number, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return [{"pixel_values": one, "labels": index % CLASSES} for index, one in enumerate(pixels)]


def trainer_of(model: Any, folder: Path, data: Any = None, **settings: Any) -> Any:
    """Return a fast and silent Trainer on the CPU."""
    data = sentences() if data is None else data
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "save_strategy": "no",
        "learning_rate": 2e-2,
        **settings,
    }
    arguments = transformers.TrainingArguments(
        str(folder),
        use_cpu=True,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.remove_callback(transformers.PrinterCallback)
    # BERT takes any keyword, and the Trainer would trust it to divide its loss by the size of the whole step.
    trainer.model_accepts_loss_kwargs = False
    return trainer


def checkpointing(reentrant: bool) -> dict[str, Any]:
    """Return the settings of activation checkpointing under the name of this release."""
    fields = transformers.TrainingArguments.__dataclass_fields__
    name = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": reentrant}}
