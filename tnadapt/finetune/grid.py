"""The methods that a study compares, by default, by name or within a budget, and the trainings of each."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from tnadapt.algebra import presets
from tnadapt.algebra.config import Config
from tnadapt.algebra.named_config import require_preset
from tnadapt.algebra.presets import PRESETS, AdaptedWeights
from tnadapt.argument_checks import checks_arguments
from tnadapt.errors import TnadaptError
from tnadapt.planning import known_as
from tnadapt.planning.families import Family, Search, few, usual

# -- Methods, and the default grid -------------------------------------------------------------------------------------


Shapes = Sequence[tuple[int, int]]

HEAD = "head alone"
#: The reference for a model that needs no new head: nothing is trained.
BASE = "untrained base"
DENSE = "dense"


@dataclasses.dataclass(frozen=True)
class Method:
    """One setting of the comparison.

    Attributes
    ----------
    family : str
        Determines the color in a plot.
    label : str
        The setting within the family.
    config : Config, optional
        None for the head alone.
    """

    family: str
    label: str
    config: Config | None

    @property
    def name(self) -> str:
        """Family and label together."""
        return f"{self.family} {self.label}".strip()

    @property
    def reference(self) -> bool:
        """Whether it is only a reference for comparison rather than a small adapter."""
        return self.family in (HEAD, BASE, DENSE)


def head_alone() -> Method:
    return Method(HEAD, "", None)


def method_of(config: Config) -> Method:
    """Return the method of a config, under its usual name."""
    return Method(*known_as(config), config)


@dataclasses.dataclass(frozen=True)
class Task:
    """One training to be done."""

    method: Method
    seed: int
    rate: float

    @property
    def key(self) -> str:
        """The key of its result line, unique within a study."""
        return hashlib.sha256(repr((self.settings(), self.seed, self.rate)).encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return f"{self.method.name}, rate {self.rate:g}, seed {self.seed}"

    def settings(self) -> dict[str, Any] | None:
        """Return the config with this seed as JSON values; None for the head alone."""
        if self.method.config is None:
            return None
        return self.method.config.replace(seed=self.seed).to_dict()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of a result line that describe the task."""
        return {
            "key": self.key,
            "family": self.method.family,
            "label": self.method.label,
            "config": self.settings(),
            "seed": self.seed,
            "rate": self.rate,
        }

    def file_name(self) -> str:
        """Return the file name of its adapter."""
        words = re.findall(r"[a-z0-9.]+", self.method.name.lower())
        return f"{'-'.join([*words, self.key])}.safetensors"


@checks_arguments
def default_methods(short: bool = False) -> list[Method]:
    """Return the default grid of methods, from tens of parameters to dense.

    Parameters
    ----------
    short : bool
        About half of them, for models that train slowly.

    Examples
    --------
    >>> len(default_methods()), len(default_methods(short=True))
    (19, 10)
    """
    if short:
        configs = [
            presets.lora(1), presets.lora(8), presets.lokr(4), presets.lorta(1, 5), presets.lorta(8, 3),
            presets.superlora(1), presets.superlora(4), presets.superlora(4, projection="linear", ratio=0.1),
        ]  # fmt: skip
    else:
        configs = [
            presets.lora(1), presets.lora(4), presets.lokr(1), presets.lokr(4),
            presets.lonkr(1, splits=3, split_size=6), presets.lonkr(2, splits=2, split_size=8),
            presets.lorta(1, 5), presets.lorta(1, 3), presets.lorta(2, 5), presets.lorta(6, 3),
            presets.superlora(1), presets.superlora(4), presets.superlora(11),
            presets.superlora(1, projection="linear", ratio=0.01),
            presets.superlora(1, projection="linear", ratio=0.1),
            presets.superlora(4, projection="linear", ratio=0.1),
            presets.fastfood(0.1),
        ]  # fmt: skip
    return [head_alone(), Method(DENSE, "", presets.dense()), *map(method_of, configs)]


# -- Presets by name ---------------------------------------------------------------------------------------------------


def methods_of(
    names: Sequence[str], ranks: Sequence[int], changes: Mapping[str, Any], shapes: Shapes, layers: int
) -> list[Method]:
    """Return named presets at the given ranks, with other fields of :class:`~tnadapt.Config` changed.

    Parameters
    ----------
    names : sequence of str
        Names in :mod:`tnadapt.presets`; ``superlora`` if empty.
    ranks : sequence of int
        The default of each preset if empty.
    changes : mapping
        Fields of the config, or arguments of the preset.
    shapes : sequence of (rows, cols)
        Shapes of the model's targets, from which some presets compute their fold.
    layers : int
        Number of layers with these targets.

    Returns
    -------
    list of Method

    Raises
    ------
    TnadaptError
        If a preset does not exist, does not accept a setting, or does not fit the weights.

    Examples
    --------
    >>> [m.name for m in methods_of(["lora"], [1, 8], {"alpha": 16}, [(64, 64)] * 8, 4)]
    ['LoRA r = 1, alpha = 16', 'LoRA r = 8, alpha = 16']
    """
    methods = []
    for name, settings, of_weights in _wishes(names, ranks, changes):
        config = _config(name, {**(_stacked(name, shapes, layers) if of_weights else {}), **settings})
        if "rank" in inspect.signature(PRESETS[name].make).parameters:
            settings = {"rank": config.rank, **settings}
        label = ", ".join(f"{'r' if key == 'rank' else key} = {value}" for key, value in settings.items())
        projected = name == "superlora" and config.projection != "identity"
        methods.append(Method("SuperLoRA + F" if projected else PRESETS[name].title, label, config))
    return methods


def _wishes(
    names: Sequence[str], ranks: Sequence[int], changes: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Yield each preset with its settings at each rank, and whether it computes its fold from the weights."""
    if "seed" in changes:
        raise TnadaptError(
            "the seed of F and of the initialization is that of the training: give --seeds N for the seeds 0 to N - 1"
        )
    for name in dict.fromkeys(names or ["superlora"]):
        require_preset(name)
        parameters = inspect.signature(PRESETS[name].make).parameters
        needs_heads = "heads" in parameters and not PRESETS[name].ladders(AdaptedWeights([(1, 1)]))
        if needs_heads and changes.keys().isdisjoint({"heads", "head_size"}):
            raise TnadaptError(
                f"preset {name!r} needs the number of 'heads' or their 'head_size'; give it with --set NAME=VALUE"
            )
        of_weights = "rows" in parameters and changes.get("groups") != "role"
        for rank in dict.fromkeys(ranks) or [None]:
            yield name, dict(changes) if rank is None else {"rank": rank, **changes}, of_weights


def _config(name: str, settings: Mapping[str, Any]) -> Config:
    try:
        return PRESETS[name].config(**settings)
    except TypeError as error:
        raise TnadaptError(f"preset {name!r}: {error}; give it with --set NAME=VALUE") from None


def _stacked(name: str, shapes: Shapes, layers: int) -> dict[str, int]:
    """Return the arguments from which a preset computes the fold of stacked weights."""
    if len(set(shapes)) > 1:
        raise TnadaptError(
            f"preset {name!r} needs weights of one shape; the targets have {sorted(set(shapes))}: give --groups role, "
            "for one group of all queries, one of all values and so on"
        )
    (rows, cols), matrices = shapes[0], len(shapes) // layers
    known = {"weights": len(shapes), "rows": rows, "cols": cols, "layers": layers, "matrices": matrices}
    return {key: known[key] for key in inspect.signature(PRESETS[name].make).parameters if key in known}


# -- The largest settings within a budget ------------------------------------------------------------------------------


@checks_arguments
def _check_budget(budget: int) -> None:
    if budget < 1:
        raise TnadaptError(f"a budget must be at least 1 parameter; got {budget}")


def within(budget: int, shapes: Shapes) -> list[Method]:
    """Return, for each method, the setting with the most parameters within a budget.

    Parameters
    ----------
    budget : int
    shapes : sequence of (rows, cols)
        Shapes of the model's targets.

    Returns
    -------
    list of Method
        Without methods whose smallest setting exceeds the budget.

    Raises
    ------
    TnadaptError
        If the smallest setting of every method exceeds the budget.

    Examples
    --------
    >>> from tnadapt import parameter_count
    >>> shapes = [(768, 768)] * 24
    >>> for method in within(10_000, shapes):
    ...     print(method.name, parameter_count(method.config, shapes))
    LoNKr K = 2, f = 24, r = 30 9996
    LoRTA M = 3, r = 11 9317
    LoRTA M = 5, r = 6 8586
    SuperLoRA r = 1 7526
    SuperLoRA + F r = 42, ρ = 0.001 9996
    fastfood ρ = 0.0007064 10000
    LoRA-XS r = 20 9600
    ...
    FourierFT n = 416 9984
    """
    _check_budget(budget)
    search, families = Search(shapes), _families(shapes)
    allowed = min(budget, sum(rows * cols for rows, cols in shapes))
    settings = [largest for family in families if (largest := search.largest(family, allowed))]
    if not settings:
        least = min(least.parameters for family in families if (least := search.least(family)))
        raise TnadaptError(
            f"a budget of {budget} is less than any setting needs on these {len(shapes)} weights; the least is {least}"
        )
    return [method_of(setting.config) for setting in settings]


def _families(shapes: Shapes) -> list[Family]:
    weights = AdaptedWeights(shapes)
    # FourierFT did best with few parameters on a task of docs/quality.md.
    return [*usual(shapes), *few(weights), PRESETS["fourierft"].ladders(weights)]


# -- The user's choice -------------------------------------------------------------------------------------------------


class Chooser(Protocol):
    """The interface of a choice of methods."""

    def methods(self, shapes: Shapes, layers: int) -> list[Method]:
        """Return the methods to compare on weights of these shapes in ``layers`` layers."""
        ...


@checks_arguments
@dataclasses.dataclass(frozen=True)
class Choice:
    """The methods to compare; the head alone is always included.

    Attributes
    ----------
    presets : tuple of str
    ranks : tuple of int
    changes : mapping
        Other fields of the config.
    budgets : tuple of int
        Instead of the three above: see :func:`within`.
    short : bool
        Use the shorter default grid if nothing else is chosen.
    """

    presets: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    budgets: tuple[int, ...] = ()
    short: bool = False

    @property
    def _named(self) -> bool:
        return bool(self.presets or self.ranks or self.changes)

    def check(self) -> None:
        """Refuse what no weights could fit.

        Raises
        ------
        TnadaptError
            If a preset or a setting is unknown or out of range, or budgets and settings are given.

        Examples
        --------
        >>> Choice(budgets=(100,), ranks=(3,)).check()
        Traceback (most recent call last):
        tnadapt.errors.TnadaptError: a budget finds the settings itself: leave out --budget, or ...
        """
        if self.budgets and self._named:
            raise TnadaptError("a budget finds the settings itself: leave out --budget, or --preset, --rank and --set")
        for budget in self.budgets:
            _check_budget(budget)
        if self._named:
            for name, settings, of_weights in _wishes(self.presets, self.ranks, self.changes):
                if not of_weights:
                    _config(name, settings)

    def methods(self, shapes: Shapes, layers: int) -> list[Method]:
        """Return the methods to compare on weights of these shapes in ``layers`` layers.

        Raises
        ------
        TnadaptError
            If a preset is unknown, a setting does not fit, or a budget is too small.
        """
        self.check()
        if self.budgets:
            methods = [method for budget in self.budgets for method in within(budget, shapes)]
            return [head_alone(), *methods]
        if self._named:
            return [head_alone(), *methods_of(self.presets, self.ranks, self.changes, shapes, layers)]
        return default_methods(self.short)
