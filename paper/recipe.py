"""Recipes: settings files of experiments, parsed strictly."""

from __future__ import annotations

import dataclasses
import importlib.resources
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from tnadapt.algebra.config import Config
from tnadapt.algebra.update_plan import UpdatePlan
from tnadapt.errors import ConfigError, TnadaptError, safe_repr
from tnadapt.planning import known_as

from .adapted_weights import WEIGHTS, AdaptedWeights
from .sweep import configs

__all__ = ["SCALES", "Arm", "Recipe", "RecipePoint", "at_scale", "names", "open_recipe", "parse"]

SCALES = ("full", "mini")
KINDS = ("counts", "classification", "diffusion", "geometry")
_TOP = frozenset({"title", "paper", "kind", "arms", "arms_of", "stated", "notes", *SCALES})
_ARM = frozenset({"name", "settings", "by", *SCALES})
#: Fields that an arm can be split by, one curve per value, and the paper's notation.
_BY = {"groups": "G = ", "splits": "K = ", "order": "", "projection": ""}
_STATED = frozenset({"what", "parameters", "settings"})


@dataclasses.dataclass(frozen=True)
class RecipePoint:
    """One setting of an experiment.

    Attributes
    ----------
    arm : str
        The curve that it belongs to, named as in the paper's legends.
    config : Config
    parameters : int
        Number of parameters for the recipe's weights.
    """

    arm: str
    config: Config
    parameters: int

    @property
    def setting(self) -> str:
        """The setting in the paper's notation."""
        return known_as(self.config).label


@dataclasses.dataclass(frozen=True)
class Arm:
    """A curve: a method whose rank, groups or ratio are swept.

    Attributes
    ----------
    name : str
    configs : tuple of Config
    """

    name: str
    configs: tuple[Config, ...]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One experiment at one scale.

    Attributes
    ----------
    name, title : str
    paper : str
        The section and figures of the paper.
    kind : {"counts", "classification", "diffusion", "geometry"}
        The kind of experiment.
    scale : {"full", "mini"}
    weights : AdaptedWeights
        The adapted weights.
    arms : tuple of Arm
    stated : tuple of (str, int, Config)
        Counts that the paper states: words, number, setting. Only at full scale.
    settings : dict
        The settings of training.
    notes : tuple of str
        Details that the paper leaves open, and deviations from it.
    rank_below_sizes : bool
        Whether settings of too large a rank are left out.
    """

    name: str
    title: str
    paper: str
    kind: str
    scale: str
    weights: AdaptedWeights
    arms: tuple[Arm, ...]
    stated: tuple[tuple[str, int, Config], ...]
    settings: dict[str, Any]
    notes: tuple[str, ...]
    rank_below_sizes: bool = False

    def points(self) -> list[RecipePoint]:
        """Return every setting with its count; of equal ones in an arm only the first.

        With ``rank_below_sizes``, settings are left out if a factor's rank is not less than its size: the paper's
        r < min(d_in, d_out).

        Raises
        ------
        ConfigError
            If a setting does not fit the weights.
        """
        found = []
        for arm in self.arms:
            for config in dict.fromkeys(arm.configs):
                plan = UpdatePlan(config, self.weights.shapes, self.weights.layers)
                if not self.rank_below_sizes or _below(plan):
                    found.append(RecipePoint(arm.name, config, plan.num_parameters))
        return found

    def only(self, arms: Sequence[str]) -> Recipe:
        """Return the recipe with only these arms; with all if none is given.

        Raises
        ------
        TnadaptError
            If it has no such arm.

        Examples
        --------
        >>> len(open_recipe("cifar10").points()), len(open_recipe("cifar10").only(["LoRA"]).points())
        (533, 34)
        """
        known = [arm.name for arm in self.arms]
        if missing := [arm for arm in arms if arm not in known]:
            raise TnadaptError(
                f"recipe {self.name} has no arm {safe_repr(missing[0])}; expected one of {', '.join(known)}"
            )
        return dataclasses.replace(self, arms=tuple(arm for arm in self.arms if not arms or arm.name in arms))

    def count(self, config: Config) -> int:
        """Count the trainable parameters of a setting on the recipe's weights."""
        return UpdatePlan(config, self.weights.shapes, self.weights.layers).num_parameters

    def checked(self) -> list[tuple[str, int, int]]:
        """Return the counts that the paper states: description, the paper's number, and ours."""
        return [(what, stated, self.count(config)) for what, stated, config in self.stated]


def names() -> list[str]:
    """Return the names of all recipes.

    Examples
    --------
    >>> "cifar100" in names()
    True
    """
    folder = importlib.resources.files(__package__) / "recipes"
    return sorted(one.name.removesuffix(".toml") for one in folder.iterdir() if one.name.endswith(".toml"))


def at_scale(scale: str) -> list[str]:
    """Return the names of the recipes that have a scale.

    Raises
    ------
    TnadaptError
        If there is no such scale.

    Examples
    --------
    >>> "cifar100" in at_scale("full"), "cifar100" in at_scale("mini")
    (True, False)
    """
    if scale not in SCALES:
        raise TnadaptError(f"scale must be one of {', '.join(SCALES)}; got {safe_repr(scale)}")
    return [name for name in names() if scale in tomllib.loads(_text(name))]


def open_recipe(name: str, scale: str = "full") -> Recipe:
    """Open a recipe of the paper by name.

    Parameters
    ----------
    name : str
        One of :func:`names`.
    scale : {"full", "mini"}
        As in the paper, or a miniature for two cores with models and data from package registries.

    Raises
    ------
    TnadaptError
        If there is no such recipe, or it has no such scale.

    Examples
    --------
    >>> recipe = open_recipe("cifar100")
    >>> all(stated == ours for _, stated, ours in recipe.checked())
    True
    """
    return parse(name, _text(name), scale)


def parse(name: str, text: str, scale: str = "full") -> Recipe:
    """Parse a recipe from the text of its settings file.

    Raises
    ------
    ConfigError
        If the text is not valid TOML, has an unknown key, or lacks a required one.
    TnadaptError
        If the recipe has no such scale.
    """
    try:
        read = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"recipe {name}: {error}") from None
    _known(f"recipe {name}", read, _TOP, ("title", "paper", "kind"))
    if ("arms" in read) == ("arms_of" in read):
        raise ConfigError(f"recipe {name} needs either arms or arms_of another recipe")
    if read["kind"] not in KINDS:
        raise ConfigError(f"recipe {name}: kind must be one of {', '.join(KINDS)}; got {read['kind']!r}")
    if scale not in SCALES:
        raise TnadaptError(f"scale must be one of {', '.join(SCALES)}; got {safe_repr(scale)}")
    there = [one for one in SCALES if one in read]
    if scale not in there:
        raise TnadaptError(f"recipe {name} has no scale {safe_repr(scale)}; it has {' and '.join(there)}")
    settings = _settings(name, read[scale], scale)
    weights, below = settings.pop("weights", None), settings.pop("rank_below_sizes", False)
    title = settings.pop("title", read["title"])
    notes = read.get("notes", [])
    words = [read["title"], title, read["paper"], weights, *(notes if isinstance(notes, list) else [None])]
    if not all(isinstance(word, str) for word in words) or not isinstance(below, bool):
        raise ConfigError(
            f"recipe {name}: title, paper and weights must be strings, notes a list of strings, and rank_below_sizes "
            "true or false"
        )
    if weights not in WEIGHTS:
        raise ConfigError(f"recipe {name}: weights must be one of {', '.join(WEIGHTS)}; got {weights!r}")
    if "arms_of" in read:
        arms = list(open_recipe(read["arms_of"], scale).arms)
    else:
        given_arms = read["arms"]
        if not isinstance(given_arms, list):
            raise ConfigError(f"the arms of recipe {name} must be tables, [[arms]]; got {given_arms!r}")
        arms = [arm for given in given_arms for arm in _arms(name, given, scale)]
    stated = [_stated(name, given) for given in read.get("stated", [])] if scale == "full" else []
    return Recipe(
        name, title, read["paper"], read["kind"], scale, WEIGHTS[weights], tuple(arms), tuple(stated),
        settings, tuple(notes), below,
    )  # fmt: skip


def _settings(name: str, given: Any, scale: str) -> dict[str, Any]:
    """Return the settings of training; ``like`` names a recipe whose settings are the defaults."""
    settings = dict(_table(f"{scale} of recipe {name}", given))
    like = settings.pop("like", None)
    if like is None:
        return settings
    others = _settings(like, _table(f"recipe {like}", tomllib.loads(_text(like))).get(scale), scale)
    others.pop("title", None)
    return {**others, **settings}


def _text(name: str) -> str:
    if name not in names():
        raise TnadaptError(f"no recipe {safe_repr(name)}; expected one of {', '.join(names())}")
    return (importlib.resources.files(__package__) / "recipes" / f"{name}.toml").read_text(encoding="utf-8")


def _below(plan: UpdatePlan) -> bool:
    """Return whether every factor has fewer columns than rows."""
    factors = [shape for name, shape in plan.param_shapes.items() if ".factor" in name]
    return all(rank < size for size, rank in factors)


def _arms(recipe: str, given: Mapping[str, Any], scale: str) -> list[Arm]:
    """Return an arm at a scale, or one arm per value of the field ``by``; none if the scale lacks it."""
    _known(f"an arm of recipe {recipe}", given, _ARM, ("name", "settings"))
    if scale not in given:
        return []
    several = given[scale] if isinstance(given[scale], list) else [given[scale]]
    fixed = _table(f"settings of arm {given['name']!r} of recipe {recipe}", given["settings"])
    found = [config for swept in several for config in configs(fixed, swept)]
    by = given.get("by")
    if by is None:
        return [Arm(given["name"], tuple(found))]
    if by not in _BY:
        raise ConfigError(f"arm {given['name']!r} of recipe {recipe}: by must be one of {', '.join(_BY)}; got {by!r}")
    values = dict.fromkeys(getattr(config, by) for config in found)
    return [
        Arm(
            f"{given['name']}, {_BY[by]}{f'{value}D' if by == 'order' else value}",
            tuple(config for config in found if getattr(config, by) == value),
        )
        for value in values
    ]


def _stated(recipe: str, given: Mapping[str, Any]) -> tuple[str, int, Config]:
    _known(f"a stated count of recipe {recipe}", given, _STATED, tuple(_STATED))
    return given["what"], given["parameters"], Config.from_dict(given["settings"])


def _table(what: str, given: Any) -> Mapping[str, Any]:
    if not isinstance(given, dict):
        raise ConfigError(f"{what} must be a table; got {given!r}")
    return given


def _known(what: str, given: Mapping[str, Any], known: frozenset[str], needed: tuple[str, ...]) -> None:
    given = _table(what, given)
    if unknown := sorted(given.keys() - known):
        raise ConfigError(f"{what} has {unknown[0]!r}; expected {', '.join(sorted(known))}")
    if missing := [word for word in needed if word not in given]:
        raise ConfigError(f"{what} has no {missing[0]!r}")
