"""Several recipes in one unattended run: where their inputs are, and what must be right before the first training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from tnadapt.errors import TnadaptError

from .recipe import Recipe, at_scale, open_recipe

__all__ = ["EVERY", "check_counts", "check_inputs", "inputs_of", "recipes_of"]

#: The name that stands for all recipes of a scale.
EVERY = "all"


def recipes_of(names: Sequence[str], scale: str) -> list[Recipe]:
    """Return recipes by name, each once; ``all`` stands for all that have the scale.

    Raises
    ------
    TnadaptError
        If there is no such recipe, or one that is named has no such scale.

    Examples
    --------
    >>> [recipe.name for recipe in recipes_of(["all"], "mini")]
    ['cifar10', 'digits', 'geometry', 'mnist-svhn', 'params', 'reviews', 'svhn-mnist']
    >>> [recipe.name for recipe in recipes_of(["params", "cifar100"], "full")]
    ['params', 'cifar100']
    """
    every = [name for given in names for name in (at_scale(scale) if given == EVERY else [given])]
    return [open_recipe(name, scale) for name in dict.fromkeys(every)]


def inputs_of(recipe: Recipe, model: str | None, data: str | None) -> tuple[str | None, str | None]:
    """Return the model and data of one of several recipes.

    Parameters
    ----------
    recipe : Recipe
    model, data : str, optional
        Folders with a subfolder for each model and data set, named as in the recipe, without the owner on the hub.
        Models and sets that are not there come from where the recipe says.

    Returns
    -------
    model, data : str or None

    Examples
    --------
    >>> inputs_of(open_recipe("svhn-mnist"), "models", "data")
    (None, 'data')
    """
    if recipe.kind == "diffusion":
        return None, data
    return _below(model, recipe.settings.get("model")), _below(data, recipe.settings.get("data"))


def _below(folder: str | None, name: str | None) -> str | None:
    if folder is None or name is None:
        return None
    path = Path(folder, PurePosixPath(name).name)
    return str(path) if path.exists() else None


def check_counts(recipes: Sequence[Recipe]) -> int:
    """Count the parameters of every setting, and compare with what the paper states.

    Returns
    -------
    int
        The number of settings.

    Raises
    ------
    TnadaptError
        If a setting does not fit the weights, or a count differs from the paper's.

    Examples
    --------
    >>> check_counts([open_recipe("params"), open_recipe("cifar100")])
    1044
    """
    wrong = [
        f"recipe {recipe.name}: the paper states {paper:,} for {what}, and here it has {ours:,}"
        for recipe in recipes
        for what, paper, ours in recipe.checked()
        if paper != ours
    ]
    if wrong:
        raise TnadaptError(f"{'; '.join(wrong)}. Nothing was trained")
    return sum(len(recipe.points()) for recipe in recipes)


def check_inputs(recipes: Sequence[Recipe], data: str | None, features: str | None) -> None:
    """Find what is missing and cannot be fetched, before days are spent on the recipes in front of it.

    Raises
    ------
    TnadaptError
        With everything that is missing.

    Examples
    --------
    >>> check_inputs([open_recipe("params"), open_recipe("svhn-mnist")], None, "classifier")
    Traceback (most recent call last):
    tnadapt.errors.TnadaptError: svhn-mnist: it needs --data, with the folders svhn and mnist. Nothing was trained; ...
    """
    found = {recipe.name: [*_missing(recipe, data, features)] for recipe in recipes}
    if missing := [f"{name}: {'; '.join(words)}" for name, words in found.items() if words]:
        raise TnadaptError(
            f"{'. '.join(missing)}. Nothing was trained; give these, or name the recipes that need none of them"
        )


def _missing(recipe: Recipe, data: str | None, features: str | None) -> Iterator[str]:
    if recipe.kind != "diffusion":
        return
    if (features or recipe.settings["features"]) == "inception":
        yield "it needs --features, a file of Inception's weights or classifier"
    elif features not in (None, "classifier") and not Path(features).is_file():
        yield f"--features {features} is not there"
    if recipe.settings.get("fetch", False) and data is None:
        return
    names = (recipe.settings["from"], recipe.settings["to"])
    if data is None:
        yield f"it needs --data, with the folders {' and '.join(names)}"
    else:
        from .diffusion.images import missing_files

        for name in names:
            if files := missing_files(name, Path(data)):
                yield f"no {', '.join(files)} in {Path(data, name)}"
