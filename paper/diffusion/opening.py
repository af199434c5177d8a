"""Opening of a diffusion recipe: from its settings to the adaptations that it describes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tnadapt import torch as tnt
from tnadapt.errors import ConfigError, TnadaptError
from tnadapt.finetune import Engine, Reporter, usable_device

from ..classification import method_of
from ..recipe import Recipe
from ..registries import fetch_images
from .bench import Adapting, Setup
from .generation import Generation
from .pretrain import Pretraining
from .process import Process
from .unet import Generator

__all__ = ["generation_of"]

_SETUP = ("channels", "base", "limit", "held_out", "real")
_PROCESS = ("hidden", "guidance", "sampler", "sampling_steps")
_PRETRAINING = ("pretrain_steps", "pretrain_batch", "pretrain_rate")
_ADAPTING = ("batch", "epochs", "steps", "samples", "optimiser", "shape", "weight_decay")
_OTHERS = ("from", "to", "fetch", "image_size", "features", "rates", "seeds")


def generation_of(
    recipe: Recipe,
    cache: Path,
    *,
    model: str | None = None,
    data: str | None = None,
    features: str | None = None,
    rates: Sequence[float] = (),
    seeds: int | None = None,
    device: str | None = None,
    reporter: Reporter | None = None,
    engine: Engine | None = None,
) -> Generation:
    """Return the adaptations that a recipe describes.

    Parameters
    ----------
    recipe : Recipe
        A recipe of kind ``diffusion``.
    cache : Path
        Folder for fetched images and trained models.
    model : str, optional
        A safetensors file of the pretrained U-Net, instead of training it.
    data : str, optional
        A folder of the images: see :func:`~paper.diffusion.images.read_images`.
    features : str, optional
        ``classifier``, or a file of Inception's weights; the recipe's by default.
    rates, seeds, device, reporter, engine
        As in :func:`~paper.classification.study_of`; but this machine must have the device, too, for the base.

    Returns
    -------
    Generation
        Not run yet.

    Raises
    ------
    TnadaptError
        If images, model or extractor are unavailable.
    """
    settings = dict(recipe.settings)
    known = {*_SETUP, *_PROCESS, *_PRETRAINING, *_ADAPTING, *_OTHERS}
    if unknown := sorted(settings.keys() - known):
        raise ConfigError(f"recipe {recipe.name}, scale {recipe.scale}, has an unknown setting {unknown[0]!r}")

    def of(names: Sequence[str], before: str = "") -> dict[str, Any]:
        return {name.removeprefix(before): settings[name] for name in names if name in settings}

    looks = features or settings["features"]
    if looks == "inception":
        raise TnadaptError(
            "the paper's measures use Inception, whose weights no package registry has: give --features the file of "
            "torch-fidelity's weights (weights-inception-2015-12-05-6726825d.pth of its release 0.2.0), or --features "
            "classifier for one that is trained on the real images"
        )
    setup = Setup(
        data=_images(recipe, cache, data),
        cache=cache,
        source=settings["from"],
        target=settings["to"],
        size=settings["image_size"],
        pretraining=Pretraining(**of(_PRETRAINING, "pretrain_")),
        process=Process(**of(_PROCESS)),
        model=None if model is None else Path(model),
        features=looks,
        device=usable_device(device if engine is None else engine.device(device) or device),
        **of(_SETUP),
    )
    model_there = Generator(setup.channels, setup.base)
    shapes = tuple(target.shape for target in tnt.find_targets(model_there, "qv"))
    if shapes != recipe.weights.shapes:
        raise ConfigError(
            f"recipe {recipe.name} counts the {recipe.weights.what}; its U-Net of width {setup.base} has {len(shapes)} "
            f"weights of other shapes, the first of {shapes[0]}"
        )
    methods = [method_of(point.arm, point.config) for point in recipe.points()]
    return Generation(
        setup, Adapting(**of(_ADAPTING)), methods, rates or settings["rates"], seeds or settings["seeds"], reporter
    )


def _images(recipe: Recipe, cache: Path, data: str | None) -> Path:
    """Return the folder of both sets: the given one, or that of images fetched from a registry."""
    if data is not None:
        return Path(data)
    if not recipe.settings.get("fetch", False):
        raise TnadaptError(
            f"recipe {recipe.name} needs --data: a folder with the folders {recipe.settings['from']!r} and "
            f"{recipe.settings['to']!r} with their original files; --scale mini fetches other images itself"
        )
    for name in (recipe.settings["from"], recipe.settings["to"]):
        fetch_images(name, cache / "images")
    return cache / "images"
