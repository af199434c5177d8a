"""Studies of image or text classification from recipes: all settings of every arm, with equal training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tnadapt.algebra.config import Config
from tnadapt.errors import ConfigError, TnadaptError
from tnadapt.finetune import Engine, Method, Reporter, Spec, Study, Training, usable_device
from tnadapt.finetune.grid import Shapes, head_alone
from tnadapt.planning import known_as

from .recipe import Recipe
from .registries import fetch

__all__ = ["Arms", "method_of", "study_of"]

_TRAINING = ("epochs", "steps", "batch", "optimiser", "shape", "weight_decay", "warmup", "clip")
_SPEC = ("image_size", "max_length", "limit", "pretrain_epochs", "text_column", "label_column")
_SEVERAL = ("label_names", "head_rows")
_OTHERS = ("model", "data", "fetch", "holdout", "rates", "seeds", "tuned_by")


def method_of(arm: str, config: Config) -> Method:
    """Return the method of a setting under its arm's name.

    Examples
    --------
    >>> print(method_of("LoRTA 5D", Config(rank=2, order=5, groups=4, fold="hypercube", format="tucker")).name)
    LoRTA 5D M = 5, G = 4, r = 2
    """
    return Method(arm, known_as(config).label, config)


@dataclasses.dataclass(frozen=True)
class Arms:
    """The settings of a recipe as a study's choice of methods, with the head alone in addition."""

    recipe: Recipe

    def methods(self, shapes: Shapes, layers: int) -> list[Method]:
        """Return the methods in the order of the recipe; of equal settings only the first.

        Raises
        ------
        TnadaptError
            If the model's weights differ from the recipe's.
        """
        expected = self.recipe.weights
        if tuple(shapes) != expected.shapes:
            raise TnadaptError(
                f"recipe {self.recipe.name} adapts the {expected.what} ({_counted(expected.shapes)}); "
                f"this model has {_counted(shapes)}"
            )
        found = {point.config: method_of(point.arm, point.config) for point in reversed(self.recipe.points())}
        return [head_alone(), *reversed(found.values())]


def _counted(shapes: Sequence[tuple[int, int]]) -> str:
    sizes = dict.fromkeys(shapes)
    return ", ".join(f"{list(shapes).count(size)} of {size[0]} × {size[1]}" for size in sizes)


def _fraction(recipe: Recipe, holdout: Any) -> float:
    """Return the held-out fraction, after checking it; it is used with a single rate, where none has to be chosen."""
    if not isinstance(holdout, float) or not 0 < holdout < 1:
        raise ConfigError(f"recipe {recipe.name}: holdout must be a fraction above 0 and below 1; got {holdout!r}")
    return holdout


def study_of(
    recipe: Recipe,
    cache: Path,
    *,
    model: str | None = None,
    data: str | None = None,
    rates: Sequence[float] = (),
    seeds: int | None = None,
    device: str | None = None,
    keep_references: bool = False,
    reporter: Reporter | None = None,
    engine: Engine | None = None,
) -> Study:
    """Return the study that a recipe describes.

    Parameters
    ----------
    recipe : Recipe
        A recipe of kind ``classification`` or ``geometry``.
    cache : Path
        Folder for models and data that are fetched or trained.
    model, data : str, optional
        Local folders to use instead of fetching the recipe's model and data.
    rates, seeds
        Used instead of the recipe's.
    device : str, optional
    keep_references : bool
        Whether to save the adapter of the dense update, too.
    reporter : Reporter, optional
    engine : Engine, optional
        Where it will run: the device is looked for there.

    Returns
    -------
    Study
        Not run yet.

    Raises
    ------
    TnadaptError
        If model or data are unavailable, or differ from the recipe's.
    """
    settings = dict(recipe.settings)
    if unknown := sorted(settings.keys() - {*_TRAINING, *_SPEC, *_SEVERAL, *_OTHERS}):
        raise ConfigError(f"recipe {recipe.name}, scale {recipe.scale}, has an unknown setting {unknown[0]!r}")
    source: dict[str, Any] = {name: settings[name] for name in ("model", "data") if name in settings}
    if "fetch" in settings and None in (model, data):
        found = fetch(settings["fetch"], cache)
        source = dict(zip(("model", "data"), map(str, found), strict=True))
    given = {"model": model, "data": data}
    source |= {name: value for name, value in given.items() if value is not None}
    source |= {name: settings[name] for name in _SPEC if name in settings}
    source |= {name: tuple(settings[name]) for name in _SEVERAL if name in settings}
    rates = tuple(rates or settings["rates"])
    if len(set(rates)) == 1 and "holdout" in settings:
        source["holdout"] = _fraction(recipe, settings["holdout"])
    spec = Spec(**source, cache=cache)
    how = {name: settings[name] for name in _TRAINING if name in settings}
    assumed = None if engine is None else engine.device(device)
    training = Training(  # with torch's second beta and one rate for the head, too, as the published results
        **{"epochs": 1, "beta2": 0.999, "head_factor": 1.0, **how},
        device=assumed or usable_device(device),
        keep_references=keep_references,
    )
    return Study(
        spec, Arms(recipe), training, rates, seeds or settings["seeds"], reporter,
        settings.get("tuned_by"),
    )  # fmt: skip
