"""Adapter files as a study writes them, without any training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import tnadapt as tna


def untrained(path: Path, model: str, data: str, **options: Any) -> Path:
    """Write the file of a fresh LoRA adapter for a model and data."""
    from tnadapt.finetune import Spec, open_problem

    from .internals import recorded

    problem = open_problem(Spec(model=model, data=data, **options))
    built = problem.build(0)
    adapter = tna.torch.attach(built, tna.presets.lora(1), keep_trainable=problem.keep_trainable)
    assert adapter.pretrained is not None
    adapter.pretrained = recorded(adapter.pretrained, problem)
    adapter.save(path)
    return path


def changed(file: Path, path: Path, **about: Any) -> Path:
    """Write another file whose description of the base has these values; ``inputs`` are added to those that are there.

    An input of the value ``...`` is left out.
    """
    found = tna.load(file)
    assert found.pretrained is not None
    if "inputs" in about:
        inputs = {**found.pretrained.inputs, **about["inputs"]}
        about["inputs"] = {name: value for name, value in inputs.items() if value is not ...}
    tna.save(path, dataclasses.replace(found, pretrained=dataclasses.replace(found.pretrained, **about)))
    return path
