"""Config, the settings of an adapter (r, M, K, G, ρ, α and others): immutable and validated.

The sections before the class check its fields, and resolve axes and named folds to the sizes of a group.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import operator
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, TypeVar

from tnadapt.argument_checks import integer
from tnadapt.errors import ConfigError, keyword_hint, safe_repr
from tnadapt.report import TextTable

from . import maps
from .applying import APPLYING, AXES
from .folding import FOLDS, MAX_ORDER
from .formats import FORMATS, Axes
from .layout import Layout, checked_groups
from .maps import ON, Recipe
from .sources import Source, SourceMap, require_flags, source_from_dict, source_to_dict
from .starting_points import STARTS

# -- Axes: which sizes of the fold each mode of the network indexes, and in which order --------------------------------


def checked_axes(axes: Any, fold: Any, order: int) -> Axes | None:
    """Return the axes as one tuple of positions per mode, or raise a ConfigError that says what is allowed.

    Examples
    --------
    >>> checked_axes((2, 0, 1), (24, 768, 768), 3)
    ((2,), (0,), (1,))
    >>> checked_axes(((0, 2), (1, 3)), (24, 32, 24, 32), 2)
    ((0, 2), (1, 3))
    """
    if axes is None:
        return None
    if not isinstance(fold, (tuple, list)):
        raise ConfigError(
            f"axes={safe_repr(axes)} are positions in a fold of explicit sizes, and fold={fold!r} has none: give "
            'fold=("weights", "rows", "cols"), or leave axes out'
        )
    if len(fold) > MAX_ORDER:
        raise ConfigError(f"axes reorder up to {MAX_ORDER} sizes; fold has {len(fold)}: merge neighboring ones")
    what = f"axes must name each of the positions 0 to {len(fold) - 1} of fold={tuple(fold)} once"
    if not isinstance(axes, (tuple, list)):
        raise ConfigError(f"{what}, such as {tuple(range(len(fold)))}; got {safe_repr(axes)}")
    modes = tuple(
        tuple(
            integer(f"axes[{mode}]", digit, 0, len(fold) - 1, ConfigError)
            for digit in (axis if isinstance(axis, (tuple, list)) else (axis,))
        )
        for mode, axis in enumerate(axes)
    )
    if not all(modes) or sorted(itertools.chain.from_iterable(modes)) != list(range(len(fold))):
        raise ConfigError(f"{what}, in the order of the network's modes; got {safe_repr(axes)}")
    if len(modes) != order:
        raise ConfigError(f"axes={safe_repr(axes)} are {len(modes)} modes and order is {order}; set order={len(modes)}")
    return modes


# -- Named folds: ("weights", "rows", "cols") stands for the sizes of each group ---------------------------------------

# A named fold makes one setting fit groups of different weights, such as the queries and the values of grouped-query
# attention. A size is an integer, one of the names, or a name divided by an integer: ``("weights", 12, "rows/12",
# "cols")`` splits the rows into 12 heads, ``("weights", "rows/64", 64, "cols")`` into heads of 64 rows.


#: What a size may stand for: the number of weights in a group, and the rows and columns of each.
NAMES = ("weights", "rows", "cols")

_SIZE = re.compile(r"(weights|rows|cols)(?:/([1-9][0-9]{0,17}))?")


def is_named(fold: Any) -> bool:
    """Return whether a fold has a size that is a name.

    Examples
    --------
    >>> is_named(("weights", "rows", "cols")), is_named((4, 8, 8)), is_named("stack")
    (True, False, False)
    """
    return isinstance(fold, (tuple, list)) and any(isinstance(size, str) for size in fold)


def check_fold(fold: Sequence[int | str]) -> None:
    """Raise a ConfigError unless the sizes are those of the weights, of their rows and of their columns, in this order.

    Then the tensor has as many elements as the group, and its ``vec`` is the group's vector, whatever the shapes are.

    Examples
    --------
    >>> check_fold(("weights/2", 2, "rows", "cols"))
    >>> check_fold(("weights", "cols", "rows"))
    Traceback (most recent call last):
        ...
    tnadapt.errors.ConfigError: fold=('weights', 'cols', 'rows') must give the number of weights, then their rows, ...
    """
    # From the last size to the first: a block is complete once its name has occurred and its divisors are matched.
    parsed = [_parsed(mode, size) if isinstance(size, str) else size for mode, size in enumerate(fold)]
    blocks = list(NAMES)
    name, product = "", Fraction(1)
    for size in reversed(parsed):
        if isinstance(size, tuple):
            block, divisor = size
            if name or not blocks or block != blocks[-1]:
                raise _misplaced(fold)
            name, product = block, product / divisor
        else:
            product *= size
        if name and product == 1:
            blocks.pop()
            name = ""
    if blocks or product != 1:
        raise _misplaced(fold)


def group_fold(fold: Sequence[int | str], layout: Layout, group: int) -> tuple[int, ...]:
    """Return the sizes that a fold in names stands for in one group.

    Parameters
    ----------
    fold : sequence of int and str
        For which :func:`check_fold` raises no error.
    layout : Layout
    group : int

    Returns
    -------
    tuple of int

    Raises
    ------
    ConfigError
        If the group cuts a weight, has weights of different shapes, or a number is not divisible as the fold says.

    Examples
    --------
    >>> from tnadapt.algebra.layout import make_layout
    >>> layout = make_layout("role", [(64, 32), (16, 32)] * 2, roles="qvqv")
    >>> [group_fold(("weights", "rows/16", 16, "cols"), layout, group) for group in range(2)]
    [(2, 4, 16, 32), (2, 1, 16, 32)]
    """
    counts = collections.Counter(layout.whole_weights(group, f"fold={tuple(fold)}"))
    if len(counts) > 1:
        listed = ", ".join(f"{count} of {rows}×{cols}" for (rows, cols), count in list(counts.items())[:6])
        raise ConfigError(
            f"fold={tuple(fold)} needs groups of weights of one shape, and group {group} has {listed}"
            f'{", …" if len(counts) > 6 else ""}: use groups="role", which makes one group of all queries, one of all '
            "values and so on (grouped-query attention); or lists of weights of one shape; or a preset that takes any "
            "shapes, such as superlora or lora"
        )
    (((rows, cols), number),) = counts.items()
    known = {"weights": number, "rows": rows, "cols": cols}
    return tuple(size if isinstance(size, int) else _quotient(fold, size, known, group) for size in fold)


def _quotient(fold: Sequence[int | str], size: str, known: dict[str, int], group: int) -> int:
    name, divisor = _parsed(0, size)  # valid: check_fold has checked it
    quotient, rest = divmod(known[name], divisor)
    if rest:
        raise ConfigError(
            f"fold={tuple(fold)} divides the {name} of each group by {divisor}, and group {group} has {known[name]} "
            f"{name}: give a divisor of it, or groups whose {name} it divides"
        )
    return quotient


def _parsed(mode: int, size: str) -> tuple[str, int]:
    match = _SIZE.fullmatch(size)
    if match is None:
        raise ConfigError(
            f"fold[{mode}] must be an integer, one of {', '.join(map(repr, NAMES))}, or one of these divided by an "
            f"integer, such as 'rows/12'; got {safe_repr(size)}"
        )
    return match[1], int(match[2] or 1)


def _misplaced(fold: Sequence[int | str]) -> ConfigError:
    return ConfigError(
        f"fold={tuple(fold)} must give the number of weights, then their rows, and then their columns, each once and "
        'whole, such as ("weights", "rows", "cols") or, with 12 heads, ("weights", 12, "rows/12", "cols")'
    )


# -- Checks of the fields: each returns the value in its canonical form, or raises ConfigError -------------------------


SCOPES = ("plan", "group", "array")

# Values beyond these are typing errors or hostile.
MAX_INT = 1 << 40
MAX_BEFORE = 8


def checked_before(
    before: Any, parameters: Any, scope: Any, offset: Any, projection: Recipe
) -> tuple[Recipe | None, int | None]:
    """Return the map from θ and the number of its parameters."""
    checked_word("scope", scope, SCOPES)
    require_flags(offset=offset)
    if parameters is not None:
        parameters = checked_integer("parameters", parameters, 1, MAX_INT)
    if before is None:
        for name, value, default in (
            ("parameters", parameters, None),
            ("scope", scope, "plan"),
            ("offset", offset, True),
        ):
            if value != default:
                raise ConfigError(
                    f"{name}={safe_repr(value)} is about the map before the network, and there is none: set "
                    f"before='one-hot', take a preset that has one, such as unilora, or leave {name} out"
                )
        return None, None
    try:
        recipe = maps.checked_projection(before)
    except ConfigError as error:
        raise ConfigError(f"before: {error}") from error
    if not maps.is_linear(recipe) or not maps.takes_ratio(recipe):
        raise ConfigError(
            f"before must be a linear map from vectors of any length, such as 'one-hot', 'normal' or 'linear'; got "
            f"{maps.projection_name(recipe)}"
        )
    if isinstance(recipe, tuple) and len(recipe) > MAX_BEFORE:
        raise ConfigError(f"before composes at most {MAX_BEFORE} maps; got {len(recipe)}")
    if isinstance(recipe, tuple) and maps.is_brought(recipe):
        raise ConfigError(
            f"before={maps.projection_name(recipe)} composes a map whose array the caller brings, which must be the "
            "only map: compose its array with the others"
        )
    if parameters is None:
        raise ConfigError(f"before={recipe!r} needs the number of parameters: parameters=p, an integer")
    if not offset and not maps.is_linear(projection):
        raise ConfigError(
            f"offset=False starts the arrays at zero, where projection={maps.projection_name(projection)!r} has no "
            "gradient: use offset=True"
        )
    return recipe, parameters


def checked_weight_shape(weight_shape: Any, fold: str | tuple[int | str, ...]) -> tuple[int, int] | None:
    """Return the shape that all weights must have; None for any."""
    if weight_shape is None:
        return None
    if not isinstance(weight_shape, (tuple, list)) or len(weight_shape) != 2:
        raise ConfigError(f"weight_shape must be (rows, cols), or None for any weights; got {safe_repr(weight_shape)}")
    rows, cols = (checked_integer(f"weight_shape[{side}]", size, 1, 1 << 62) for side, size in enumerate(weight_shape))
    if not isinstance(fold, tuple):
        raise ConfigError(
            f"weight_shape={(rows, cols)} says what the sizes of a fold stand for, and fold={fold!r} names "
            "none: give fold=(weights, rows, cols), or weight_shape=None"
        )
    if is_named(fold):
        raise ConfigError(
            f"fold={fold} takes the shapes that the weights have, and weight_shape={(rows, cols)} demands "
            "one: leave weight_shape out, or give the fold in integers"
        )
    sizes = [int(size) for size in fold]
    inner = list(itertools.accumulate(reversed(sizes), operator.mul))
    if cols not in inner or rows * cols not in inner[inner.index(cols) :]:
        raise ConfigError(
            f"the last sizes of fold={fold} do not multiply to the {rows} rows and {cols} columns of "
            f"weight_shape={(rows, cols)}: give fold=(weights, rows, cols), or weight_shape=None"
        )
    return rows, cols


def checked_fold(fold: Any, axes: Any, order: int) -> str | tuple[int | str, ...]:
    """Return the fold: its name, or its sizes."""
    if isinstance(fold, (tuple, list)):
        sizes = tuple(
            size if isinstance(size, str) else checked_integer(f"fold[{mode}]", size, 1, 1 << 62)
            for mode, size in enumerate(fold)
        )
        if is_named(sizes):
            check_fold(sizes)
        if axes is None and len(sizes) != order:
            raise ConfigError(f"fold={sizes} has {len(sizes)} sizes and order is {order}; set order={len(sizes)}")
        return sizes
    checked_word("fold", fold, FOLDS, "or a tuple of sizes")
    if fold == "stack" and order > 2:
        raise ConfigError(f"fold='stack' makes matrices only and order is {order}; use fold='hypercube' or 'balanced'")
    return str(fold)


def checked_split_size(split_size: Any, order: int) -> int | str | tuple[int, ...]:
    """Return the size of the first split, or of its modes; "balanced"."""
    if isinstance(split_size, (tuple, list)):
        sizes = tuple(checked_integer(f"split_size[{mode}]", size, 1, MAX_INT) for mode, size in enumerate(split_size))
        if len(sizes) != order:
            raise ConfigError(
                f"split_size={safe_repr(sizes)} has {len(sizes)} sizes and order is {order}: give one per mode"
            )
        return sizes
    if isinstance(split_size, str) and split_size == "balanced":
        return split_size
    return checked_integer("split_size", split_size, 1, MAX_INT, 'or "balanced", or a tuple of one size per mode')


def checked_integer(name: str, value: Any, low: int, high: int, other: str = "") -> int:
    return integer(name, value, low, high, ConfigError, other)


def checked_number(name: str, value: Any, most: float = math.inf) -> float:
    if isinstance(value, (bool, str)):
        raise ConfigError(f"{name} must be a number; got {safe_repr(value)}")
    try:
        # Read it as the decimal that it prints as: a float32 of 0.07 means 0.07, not 0.07000000029802322.
        number = float(value) if isinstance(value, (int, float, Fraction)) else float(str(value))
    except Exception:  # str() of any object may raise anything
        raise ConfigError(f"{name} must be a number; got {safe_repr(value)}") from None
    if not math.isfinite(number):
        raise ConfigError(f"{name} must be finite; got {number!r}")
    if abs(number) > most:
        raise ConfigError(f"{name} must be at most {most:g} in absolute value; got {number!r}")
    return number


def checked_word(name: str, value: Any, words: tuple[str, ...], other: str = "") -> None:
    if not isinstance(value, str) or value not in words:
        other = f" {other}" if other else ""
        raise ConfigError(f"{name} must be one of {', '.join(map(repr, words))}{other}; got {safe_repr(value)}")


def checked_sources(sources: Any) -> SourceMap:
    """Return the sources of a config; each may be given as a dictionary, as :meth:`Config.to_dict` writes it."""
    if isinstance(sources, SourceMap):
        return sources
    if not isinstance(sources, Mapping):
        raise ConfigError(
            f"sources must be a mapping of array names to sources, such as {{'factor0': Trained()}}; got "
            f"{safe_repr(sources)}"
        )
    by_name = {}
    for name, source in sources.items():
        try:
            by_name[name] = source_from_dict(source) if isinstance(source, Mapping) else source
        except ConfigError as error:
            raise ConfigError(f"sources[{safe_repr(name)}]: {error}") from error
    return SourceMap(by_name)


# -- Names of the optimizers that tnadapt.algebra.units has units for --------------------------------------------------


#: Values of ``Config.rate``.
RATE_NAMES = ("adam", "sgd")


# -- Config ------------------------------------------------------------------------------------------------------------


_Item = TypeVar("_Item")

COMBINES = ("kronecker", "hadamard")
LEADINGS = ("dense", "same")

# Values beyond these are typing errors or hostile.
MAX_TERMS = 1 << 16
MIN_ALPHA, MAX_ALPHA = 1e-9, 1e9


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of an adapter: how weights are grouped, and the tensor network and map of each group.

    The update of a group is ``F(scale * sum_t kron_k(core_k x_1 A_k1 … x_M A_kM))``, cut to length (the paper's
    equation 2).

    Parameters
    ----------
    rank : int or tuple
        r, the rank of each factorization. Tucker also takes one rank per mode, where None means no factor in that mode
        (partial Tucker); a tensor train also takes its M - 1 inner ranks. For "dense" it affects ``alpha / rank`` only.
    order : int
        M, the number of modes of the tensor that a group is folded to; 1 is a vector.
    splits : int
        K, the number of tensors whose product is a group.
    groups : "weight", "layer", "role", int or list of lists of int
        One group per weight, one per layer, one per role (all queries, all values, …), G equal pieces of the long
        vector, or explicit lists of weight indices.
    fold : "stack", "hypercube", "balanced" or tuple of int and str
        How a group becomes a tensor: weights stacked along rows (M = 2 only), the paper's reshape to equal sizes, the
        smallest nearly equal sizes, or explicit sizes, one per mode. A size may be a name, which stands for a number of
        each group: ``("weights", "rows", "cols")``, or ``("weights", "rows/64", 64, "cols")`` with heads of 64 rows.
        The weights of a group must then have one shape.
    format : str
        Format of each split: "dense", "cp", "cp-weighted", "tucker", "tt", or a name given to
        :func:`tnadapt.register_format`.
    combine : "kronecker" or "hadamard"
        How splits are combined.
    split_size : int, "balanced" or tuple of int
        Sizes of the Kronecker splits: f in every mode of all but the last, each mode factored evenly, or one size per
        mode for all but the last.
    leading : "dense" or "same"
        Format of splits 1 to K - 1: dense arrays, or ``format`` like the last.
    terms : int
        T, the number of such products that are summed.
    projection : str, settings of a map, or list of these
        F: "identity", "shuffle", "linear", "linear_v2", "nonlinear", "nonlinear_v2", "gather", "sign-gather", "dct2",
        "dft2", "wavelet", or a name given to :func:`tnadapt.register_map`; settings, such as
        ``tnadapt.maps.Scatter(size=1000)``; or a list of maps that are applied one after another, the first one first.
    ratio : float
        ρ, the length before F divided by the length after it, in (0, 1]; read as the decimal that it prints as. Left
        out if the settings of F determine the length before it.
    shared : bool
        Whether all groups use the same F (the paper's choice).
    alpha : float, optional
        The scale is ``alpha / rank`` (with the largest of several ranks); None means a scale of 1.
    seed : int
        Seed of the projection and of the initial values; 0 to 2**64 - 1.
    sources : mapping of str to Source
        Where the numbers of arrays come from, by their names: ``{"factor1": source}`` for that array in every split and
        term, ``"split0.factor1"`` or ``"term0.split0.factor1"`` for one of them. Arrays without an entry are trained
        (:class:`tnadapt.sources.Trained`). Adapter files leave it out if it is empty.
    on : "vector" or "weight"
        What F is applied to: the vector of a group, or each of its weights as a matrix, which needs groups of whole
        weights. Adapter files leave out "vector".
    before : str, settings of a map, or list of these, optional
        P, a linear map before the network: all trained arrays of the plan, in order, are ``a_start + P θ``, and θ alone
        is trained. "one-hot" (Uni-LoRA), "signed-one-hot", "normal" (NOLA), "linear", or another registered
        linear map; "tied" and "given" take an index or a matrix of your own, ``UpdatePlan(…, given=…)``. None trains
        the arrays themselves. Adapter files leave out this field and the next three at their defaults.
    parameters : int, optional
        p, the number of elements of each θ; with ``before`` only.
    scope : "plan", "group" or "array"
        Whether there is one θ for all arrays, one for each group, or one for each array.
    offset : bool
        Whether the arrays start at ``a_start`` of :mod:`tnadapt.algebra.init`; if False they are ``P θ`` alone.
    weight_shape : (int, int), optional
        Rows and columns that every weight must have, for a ``fold`` whose sizes stand for weights, rows (or heads and
        rows per head) and columns. Weights of another shape or number are refused, because the fold would cut through
        weights. Presets that have such a fold set it; None accepts any weights. It does not affect results: configs
        that differ only in it are equal, and adapter files leave it out.
    axes : tuple of int or of tuples of int, optional
        For a fold of explicit sizes: the order in which the network's modes index them, as positions in ``fold``. With
        ``fold=("weights", "rows", "cols")``, ``axes=(1, 0, 2)`` is a network over rows, weights and columns. A tuple
        puts several sizes into one mode, the first one slow: ``fold=(8, 4, 8, 4)`` and ``axes=((0, 2), (1, 3))`` pair
        digits of the row with digits of the column. ``order`` is the number of modes. None is the order of the fold.
        Adapter files leave it out if it is None.
    apply : "add", "hadamard" or "magnitude"
        How ΔW meets the base weight W: ``W + ΔW``; ``W + W ∘ ΔW`` (HiRA); or ``m ∘ (W + ΔW) / ‖W + ΔW‖`` (DoRA), where
        m is trained and starts at ‖W‖. See :mod:`tnadapt.algebra.applying`. Adapter files leave out "add".
    magnitude_axis : "rows" or "cols"
        For "magnitude": whether m and the norm belong to the rows, the outputs (PEFT, and the default of LyCORIS), or
        to the columns, the inputs. Adapter files leave out "rows".
    start : str
        Where training starts. "zero": one array of each term is zero (:mod:`tnadapt.algebra.init`). Any other one
        subtracts, ``ΔW = net(x) - net(x_0)``, and x starts at x_0: "given" for arrays that the caller brings
        (``UpdatePlan(…, start_from=…)``, ``adapter.start_from(…)``); "random" for arrays of which none is zero;
        "pissa", "milora" and "olora" for LoRA's factors computed from the base weight. Adapter files leave out "zero".
    rate : "adam" or "sgd"
        The optimizer for which one learning rate fits all configs. It determines the units in which the arrays are
        trained (:attr:`tnadapt.UpdatePlan.training_plan`) and does not affect ΔW, its arrays or files of them. With
        "adam", which is that of the presets, train with Adam at :func:`tnadapt.learning_rate`; "sgd" trains
        the arrays themselves. Adapter files leave out "sgd".

    Raises
    ------
    ConfigError
        If a field has the wrong type, is out of range, or contradicts another; the message says what is allowed.

    Examples
    --------
    >>> Config(rank=8).to_dict()["format"], Config(rank=8, alpha=16).scale
    ('cp', 2.0)
    >>> Config(order=3)
    Traceback (most recent call last):
        ...
    tnadapt.errors.ConfigError: fold='stack' makes matrices only and order is 3; use fold='hypercube' or 'balanced'
    """

    rank: int | tuple[int | None, ...] = 4
    order: int = 2
    splits: int = 1
    groups: str | int | tuple[tuple[int, ...], ...] = "weight"
    fold: str | tuple[int | str, ...] = "stack"
    format: str = "cp"
    combine: str = "kronecker"
    split_size: int | str | tuple[int, ...] = "balanced"
    leading: str = "dense"
    terms: int = 1
    projection: Recipe = "identity"
    ratio: float = 1.0
    shared: bool = True
    alpha: float | None = None
    seed: int = 0
    sources: Mapping[str, Source] = dataclasses.field(default_factory=SourceMap)
    on: str = "vector"
    before: Recipe | None = None
    parameters: int | None = None
    scope: str = "plan"
    offset: bool = True
    # A condition on the weights that does not affect results, so configs of older files compare equal.
    weight_shape: tuple[int, int] | None = dataclasses.field(default=None, compare=False)
    axes: tuple[int | tuple[int, ...], ...] | None = None
    apply: str = "add"
    magnitude_axis: str = "rows"
    start: str = "zero"
    rate: str = "sgd"

    def __new__(cls, *args: Any, **settings: Any) -> Config:
        # Raises ConfigError for an unknown field, where a dataclass would raise TypeError.
        _known(settings)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)  # the class is frozen

        for name, low, high in (("order", 1, MAX_ORDER), ("splits", 1, MAX_ORDER), ("terms", 1, MAX_TERMS)):
            put(name, checked_integer(name, getattr(self, name), low, high))
        put("seed", checked_integer("seed", self.seed, 0, (1 << 64) - 1))
        for name, words in (("combine", COMBINES), ("leading", LEADINGS), ("on", ON), ("rate", RATE_NAMES)):
            checked_word(name, getattr(self, name), words)
        put("rank", FORMATS.find(self.format).checked_rank(self.format, self.rank, self.order))
        put("projection", maps.checked_projection(self.projection))
        put("groups", checked_groups(self.groups))
        put("fold", checked_fold(self.fold, self.axes, self.order))
        put("axes", checked_axes(self.axes, self.fold, self.order))
        if self.axes is not None and self.combine == "kronecker" and self.splits > 1:
            raise ConfigError(
                "axes give the modes of one tensor an order, and Kronecker splits have several: leave axes out, or use "
                "splits=1"
            )
        put("split_size", checked_split_size(self.split_size, self.order))
        put("ratio", checked_number("ratio", self.ratio))
        if not 0.0 < self.ratio <= 1.0:
            raise ConfigError(f"ratio must be above 0 and at most 1; got {self.ratio!r}")
        maps.require_ratio_fits(self.projection, self.on, self.ratio)
        if self.ratio != 1.0 and is_named(self.fold):
            raise ConfigError(
                f"fold={self.fold} has the sizes of the weights, and ratio={self.ratio} folds a shorter vector: use "
                "ratio=1, or fold='hypercube'"
            )
        require_flags(shared=self.shared)
        if self.alpha is not None:
            put("alpha", checked_number("alpha", self.alpha))
            if not MIN_ALPHA <= self.alpha <= MAX_ALPHA:
                raise ConfigError(
                    f"alpha must be from {MIN_ALPHA:g} to {MAX_ALPHA:g}, or None for a scale of 1; got {self.alpha!r}"
                )
        if self.combine == "hadamard" and self.splits > 1 and self.split_size != "balanced":
            raise ConfigError(
                "split_size sizes Kronecker splits; with combine='hadamard' every split has the full sizes: "
                "leave split_size out"
            )
        put("sources", checked_sources(self.sources))
        before, parameters = checked_before(self.before, self.parameters, self.scope, self.offset, self.projection)
        put("before", before)
        put("parameters", parameters)
        if STARTS.find(self.start).subtracts and not self.offset:
            raise ConfigError(
                f"start={self.start!r} says where the arrays start, and offset=False starts them at P θ = 0: leave "
                "offset out, or use start='zero'"
            )
        put("weight_shape", checked_weight_shape(self.weight_shape, self.fold))
        rescales = APPLYING.find(self.apply)().rescales
        checked_word("magnitude_axis", self.magnitude_axis, tuple(AXES))
        if self.magnitude_axis != "rows" and not rescales:
            raise ConfigError(
                f"magnitude_axis={self.magnitude_axis!r} is about the trained magnitude, and apply={self.apply!r} has "
                "none: use apply='magnitude', or leave magnitude_axis out"
            )

    @property
    def scale(self) -> float:
        """``alpha / rank``, or 1 where alpha is None."""
        if self.alpha is None:
            return 1.0
        if isinstance(self.rank, int):
            return self.alpha / self.rank
        return self.alpha / max((rank for rank in self.rank if rank is not None), default=1)

    def split(self, items: Sequence[_Item]) -> list[tuple[Config, Sequence[_Item]]]:
        """Return each config of an adapter with its own of the items, of which there is one for each weight.

        A :class:`~tnadapt.CompositeConfig` has several; any other config has all items.

        Examples
        --------
        >>> Config().split("qv")
        [(Config(rank=4), 'qv')]
        """
        return [(self, items)]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._chosen())})"

    def _repr_html_(self) -> str:
        return TextTable([(name, repr(value)) for name, value in self._chosen()], caption=type(self).__name__).html()

    def _chosen(self) -> list[tuple[str, Any]]:
        """Return rank and all fields that differ from their defaults, by name."""
        values = [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]
        return [(name, value) for name, value in values if name == "rank" or value != getattr(_USUAL, name)]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON knows them: tuples become lists; those newer than file format 1 only if set.

        Returns
        -------
        dict
            :meth:`from_dict` gives an equal Config back.

        Examples
        --------
        >>> Config.from_dict(Config(groups=[[0, 1]]).to_dict()) == Config(groups=[[0, 1]])
        True
        """
        fields = {field.name: _listed(getattr(self, field.name)) for field in dataclasses.fields(self)}
        fields["projection"] = maps.projection_to_json(self.projection)
        fields["before"] = None if self.before is None else maps.projection_to_json(self.before)
        fields["sources"] = {name: source_to_dict(self.sources[name]) for name in sorted(self.sources)}
        # The fields from sources on are newer than file format 1: files that do not use them keep their bytes.
        older = itertools.takewhile(lambda name: name != "sources", fields)
        used = {*older, *(name for name in fields if getattr(self, name) != getattr(_USUAL, name))}
        return {name: value for name, value in fields.items() if name in used}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Config:
        """Return the config of a dictionary that :meth:`to_dict` wrote.

        Parameters
        ----------
        settings : mapping
            Field names and values; missing fields have their defaults.

        Raises
        ------
        ConfigError
            If it is not a mapping, names an unknown field, or holds an invalid value.

        Examples
        --------
        >>> Config.from_dict({"rnak": 4})
        Traceback (most recent call last):
            ...
        tnadapt.errors.ConfigError: Config has no field 'rnak'; did you mean 'rank'? The fields are rank, order,
        splits, groups, fold, format, combine, split_size, leading, terms, projection, ratio, shared, alpha, seed,
        sources, on, before, parameters, scope, offset, weight_shape, axes, apply, magnitude_axis, start, rate
        """
        if not isinstance(settings, Mapping):
            raise ConfigError(f"expected a mapping of field names to values; got {type(settings).__name__}")
        _known(settings)
        return cls(**settings)

    def replace(self, **changes: Any) -> Config:
        """Return a copy with some fields changed; it is validated again.

        Examples
        --------
        >>> Config(rank=4).replace(rank=8).rank
        8
        """
        return Config.from_dict({**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}, **changes})


def _known(settings: Mapping[str, Any]) -> None:
    """Raise a ConfigError if a name is not a field."""
    import difflib

    known = [field.name for field in dataclasses.fields(Config)]
    for name in settings:
        if name not in known:
            hint = keyword_hint(name)
            close = difflib.get_close_matches(str(name), known, n=1)
            meant = f"{hint}. The" if hint else f"did you mean {close[0]!r}? The" if close else "the"
            raise ConfigError(f"Config has no field {safe_repr(name)}; {meant} fields are {', '.join(known)}")


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, tuple) else value


# The value that a field is compared with, to leave it out if it has its default.
_USUAL = Config()
