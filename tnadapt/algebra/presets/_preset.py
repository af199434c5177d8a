"""Preset, the record of a named method: how it is made, counted, recognized and checked."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tnadapt.algebra.config import Config
from tnadapt.argument_checks import checks_arguments
from tnadapt.errors import ConfigError, safe_repr

if TYPE_CHECKING:
    from tnadapt.algebra.update_plan import UpdatePlan

Shapes = Sequence[tuple[int, int]]
Float = NDArray[np.float64]
Params = Mapping[str, Float]


# -- Sizes: settings in order of their number of parameters ------------------------------------------------------------


class Ladder(NamedTuple):
    """Settings indexed by a size from 1 upward, with a growing number of parameters.

    Attributes
    ----------
    config : callable
        Returns the setting of a size.
    most : callable
        Returns, given the plan of size 1, the size beyond which more parameters gain nothing.
    """

    config: Callable[[int], Config]
    most: Callable[[UpdatePlan], int]


@dataclasses.dataclass(frozen=True)
class AdaptedWeights:
    """The weights for which a preset offers sizes.

    Attributes
    ----------
    shapes : sequence of (rows, cols)
    layers, roles : sequence of hashable, optional
        One key per weight.
    head_size : int, optional
        Rows of an attention head, if every weight consists of heads.
    """

    shapes: Shapes
    layers: Sequence[Hashable] | None = None
    roles: Sequence[Hashable] | None = None
    head_size: int | None = None

    @functools.cached_property
    def size(self) -> int:
        """Number of elements of all weights."""
        return sum(rows * cols for rows, cols in self.shapes)

    @functools.cached_property
    def side(self) -> int:
        """The shorter side of the smallest weight, beyond which a matrix rank gains nothing."""
        return min(min(shape) for shape in self.shapes)

    @functools.cached_property
    def uniform(self) -> bool:
        """Whether all weights have one shape."""
        return len(set(self.shapes)) == 1

    @functools.cached_property
    def divisors(self) -> list[int]:
        """The common divisors of all sides."""
        common = math.gcd(*itertools.chain(*self.shapes))
        return [size for size in range(1, common + 1) if common % size == 0]


def by_factors(plan: UpdatePlan) -> int:
    """Return the smallest size of a factored mode, beyond which a rank gains nothing."""
    return min(shape[0] for group, _ in plan.alike for name, shape in group.network.shapes.items() if ".factor" in name)


# -- Labels of settings -----------------------------------------------------------------------------------------------


def groups_label(config: Config) -> list[str]:
    """Return the words of a label that say how many groups there are, unless there is one."""
    groups = config.groups
    return [] if groups == 1 else [f"G = {groups if isinstance(groups, (str, int)) else len(groups)}"]


def rank_label(rank: int | tuple[int | None, ...]) -> str:
    return str(rank) if isinstance(rank, int) else ", ".join("–" if size is None else str(size) for size in rank)


# -- The record --------------------------------------------------------------------------------------------------------


@checks_arguments
@dataclasses.dataclass(frozen=True, eq=False)
class Preset:
    """A named method. Planning, verification, the command line and conversions read what they need from it.

    Attributes
    ----------
    name : str
        ``tnadapt.presets.NAME`` and ``--preset NAME``: a Python identifier in lower case.
    make : callable
        Returns a :class:`~tnadapt.Config`. Takes its own arguments, and fields of ``Config`` as further keywords.
    title : str
        The name in the paper.
    reference : str
        The paper.
    example : mapping
        Arguments of ``make`` for four weights of 12 × 8: the instance that :func:`tnadapt.verify` checks.
    sizes : callable, optional
        Maps the weights (:class:`AdaptedWeights`) to a sequence of :class:`Ladder`, which the planner searches; empty
        if the method does not fit the weights. By default the ranks, which are the first argument of ``make``, up to
        the shorter side of the weights.
    recognize : callable, optional
        Maps a config to the label of its setting, such as ``"r = 4"``, or to None if it is not of this method. The
        config's alpha, seed and rate are those of a preset. Without it, no config has the title as its name.
    formula : callable, optional
        Maps arrays by name, config and shapes to the list of ΔW, in NumPy and float64, as the paper defines them. The
        arrays are the trained and the frozen ones, and the initial values of all under ``"begun."`` and the name.
    changed : callable, optional
        The same for W', of a method that does not add ΔW; takes the base weights in place of the shapes.
    planned : bool
        Whether ``plan`` compares it with the paper's methods. Presets of other packages are always compared.
    peers : mapping of str to str
        Names in other libraries: ``{"PEFT": "LORA"}``.

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.presets.PRESETS["vera"].reference, dict(tna.presets.PRESETS["vera"].peers)
    ('Kopiczko et al., arXiv 2310.11454', {'PEFT': 'VERA'})
    """

    name: str
    make: Callable[..., Config]
    title: str
    reference: str
    example: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sizes: Callable[[AdaptedWeights], Sequence[Ladder]] | None = None
    recognize: Callable[[Config], str | None] | None = None
    formula: Callable[[Params, Config, Shapes], list[Float]] | None = None
    changed: Callable[[Params, Config, Sequence[Float]], list[Float]] | None = None
    planned: bool = False
    peers: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def config(self, **settings: Any) -> Config:
        """Return the config that ``make`` returns for these settings.

        Raises
        ------
        ConfigError
            If it refuses them, or returns something else.
        """
        config = self.make(**settings)
        if not isinstance(config, Config):
            raise ConfigError(
                f"preset {self.name!r} must return a tnadapt.Config; got {safe_repr(config)}: correct its make"
            )
        return config

    def ladders(self, weights: AdaptedWeights) -> Sequence[Ladder]:
        """Return the settings for these weights in order of size."""
        if self.sizes is None:
            return [Ladder(self.make, lambda plan: weights.side)]
        return self.sizes(weights)

    @property
    def served_as_lora(self) -> bool:
        """Whether its smallest updates of 768 × 768 are exactly a smaller LoRA, as engines such as vLLM serve it."""
        from tnadapt.algebra.update_plan import UpdatePlan

        roles = ["q", "v"] * 12
        weights = AdaptedWeights([(768, 768)] * 24, [place // 2 for place in range(24)], roles, head_size=64)
        smallest = self.ladders(weights)[0].config(1)
        rank = UpdatePlan(smallest, weights.shapes, weights.layers, roles).lora_rank
        # Frozen factors may be as wide as the weight, as RandLoRA's are.
        return rank is not None and 2 * rank < 768
