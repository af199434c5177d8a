"""Pretraining of the diffusion model: trained once, cached, and resumed after an interruption."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from tnadapt.checkpoints.atomic_files import atomic_write
from tnadapt.errors import FileError, TnadaptError
from tnadapt.finetune.loop import Schedule, train_steps

from .images import ImageSet
from .process import Process
from .unet import Generator

__all__ = ["Pretraining", "images_digest", "pretrained"]

#: The state is saved every this many steps.
KEPT = 200
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """The settings of pretraining: those of :class:`~tnadapt.finetune.loop.Schedule`, and the number of steps.

    Attributes
    ----------
    steps, batch : int
    rate : float
        The highest learning rate.
    weight_decay : float
    """

    steps: int
    batch: int = 256
    rate: float = 2e-4
    weight_decay: float = 1e-4


def images_digest(images: ImageSet) -> str:
    """Return the SHA-256 of pixels and labels."""
    seen = hashlib.sha256(f"{tuple(images.pixels.shape)}".encode())
    for tensor in (images.pixels, images.labels):
        seen.update(tensor.contiguous().numpy().tobytes())
    return seen.hexdigest()


def pretrained(
    folder: Path,
    how: Pretraining,
    process: Process,
    images: ImageSet,
    base: int,
    device: str = "cpu",
    progress: Callable[[float], None] = lambda done: None,
) -> dict[str, Tensor]:
    """Return the weights of a :class:`~paper.diffusion.unet.Generator` trained on these images.

    Parameters
    ----------
    folder : Path
        Cache folder, with files named by the digest of everything the weights depend on; created if needed.
    how : Pretraining
    process : Process
    images : ImageSet
    base : int
        Width of the U-Net's first level.
    device : str
    progress : callable
        Called with the fraction done.

    Returns
    -------
    dict of str to Tensor
        On the CPU.

    Raises
    ------
    FileError
        If the folder cannot be written.

    Notes
    -----
    Every step seeds its images, noise and dropout with its number, so that an interrupted and resumed training gives
    the same weights as an uninterrupted one.
    """
    recipe = {
        "version": 1, "how": dataclasses.asdict(how), "steps": process.steps, "hidden": process.hidden,
        "images": images_digest(images), "base": base,
    }  # fmt: skip
    key = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"unet-{key}.safetensors"
    channels = images.pixels.shape[1]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        state = _read(path)
        model = _fresh(channels, base)
        if state is not None and not _fits(model, *state, how.steps):
            state = None
        if state is not None and state[0] == how.steps:
            return state[1]
        model = model.to(device).train()
        parameters, schedule = list(model.parameters()), Schedule(how.rate, weight_decay=how.weight_decay)
        optimiser = torch.optim.AdamW(parameters, how.rate, weight_decay=how.weight_decay)
        first = 0 if state is None else _go_on(model, optimiser, *state)
        rates = LambdaLR(optimiser, lambda step: schedule.factor(first + step, how.steps))
        for taken in train_steps(
            lambda step: _loss(model, how, process, images, step, device), parameters, optimiser, rates, how.steps,
            schedule.clip, first,
        ):  # fmt: skip
            if taken.gradient_norm is None:
                raise TnadaptError(f"the loss of pretraining is {taken.loss} at step {taken.done}; give a lower rate")
            progress(taken.done / how.steps)
            if taken.done % KEPT == 0 and taken.done < how.steps:
                _write(path, taken.done, model, optimiser)
        _write(path, how.steps, model, None)
    except OSError as error:
        raise FileError(
            f"cannot keep the pretrained model in {folder}: {error}; give another folder with --cache"
        ) from None
    return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}


def _fresh(channels: int, base: int) -> Generator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Generator(channels, base)


def _loss(model: Generator, how: Pretraining, process: Process, images: ImageSet, step: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    chosen = images[torch.randint(len(images), (how.batch,), generator=generator)]
    with torch.random.fork_rng(devices=[torch.device(device)] if device.startswith("cuda") else []):
        torch.manual_seed(step)
        return process.loss(model, chosen.pixels.to(device), chosen.labels.to(device), generator)


# -- The file ----------------------------------------------------------------------------------


def _read(path: Path) -> tuple[int, dict[str, Tensor]] | None:
    """Return the step of a saved state and its tensors; None if the file does not exist or is damaged."""
    try:
        with safe_open(path, "pt") as file:
            step = int((file.metadata() or {})["step"])
        return step, load_file(path)
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def _fits(model: Generator, step: int, held: dict[str, Tensor], steps: int) -> bool:
    """Return whether a saved state fits the model and its number of steps, with moments if it is not the last step."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if step != steps:
        shapes |= {f"{moment}:{name}": one.shape for name, one in model.named_parameters() for moment in _MOMENTS}
    return 0 < step <= steps and {name: tensor.shape for name, tensor in held.items()} == shapes


def _write(path: Path, step: int, model: Generator, optimiser: Any) -> None:
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if optimiser is not None:
        for name, weight in model.named_parameters():
            for moment in _MOMENTS:
                held[f"{moment}:{name}"] = optimiser.state[weight][moment].cpu().contiguous()
    with atomic_write(str(path)) as file:
        file.write(save(held, {"step": str(step)}))


def _go_on(model: Generator, optimiser: Any, step: int, held: dict[str, Tensor]) -> int:
    """Restore model and optimizer moments of a saved state; return its step."""
    model.load_state_dict({name: tensor for name, tensor in held.items() if ":" not in name})
    for name, weight in model.named_parameters():
        moments = {moment: held[f"{moment}:{name}"].to(weight.device) for moment in _MOMENTS}
        optimiser.state[weight] = {"step": torch.tensor(float(step)), **moments}
    return step
