"""Config, the settings of an adapter (r, M, K, G, ρ, α and others): immutable and validated."""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from tnadapt.errors import ConfigError, integer, peft_hint, safe_repr

from ._axes import checked_axes
from .applying import APPLYING, AXES
from .folding import MAX_ORDER
from .formats import FORMATS
from .maps import (
    ON,
    Recipe,
    checked_projection,
    is_linear,
    projection_name,
    projection_to_json,
    require_ratio_fits,
    takes_ratio,
)
from .named_fold import check_fold, is_named
from .sources import Source, SourceMap, source_from_dict, source_to_dict
from .starting_points import starting_point

__all__ = ["Config"]

FOLDS = ("stack", "hypercube", "balanced")
COMBINES = ("kronecker", "hadamard")
LEADINGS = ("dense", "same")
SCOPES = ("plan", "group", "array")

# Fields that are newer than file format 1, with their defaults as JSON: files that do not use them keep their bytes.
_NEWER: dict[str, Any] = {
    "sources": {},
    "on": "vector",
    "before": None,
    "parameters": None,
    "scope": "plan",
    "offset": True,
    "weight_shape": None,
    "axes": None,
    "apply": "add",
    "magnitude_axis": "rows",
    "start": "zero",
}

# Values beyond these are typing errors or hostile.
MAX_INT = 1 << 40
MAX_TERMS = 1 << 16
MAX_BEFORE = 8
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
        The weights of a group must then have one shape; see :mod:`tnadapt.algebra.named_fold`.
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
        is trained. "one-hot" (Uni-LoRA), "signed-one-hot", "normal" (TinyLoRA, NOLA), "linear", or another registered
        linear map. None trains the arrays themselves. Adapter files leave out this field and the next three at their
        defaults.
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
        (``SuperLoRA(…, start_from=…)``, ``adapter.start_from(…)``); "pissa", "milora" and "olora" for LoRA's factors
        computed from the base weight. Adapter files leave out "zero".

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
    # A condition on the weights that does not affect results: configs of older files stay equal.
    weight_shape: tuple[int, int] | None = dataclasses.field(default=None, compare=False)
    axes: tuple[int | tuple[int, ...], ...] | None = None
    apply: str = "add"
    magnitude_axis: str = "rows"
    start: str = "zero"

    def __new__(cls, *args: Any, **settings: Any) -> Config:
        # Raise ConfigError for an unknown field, where a dataclass would raise TypeError.
        _known(settings)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)  # the class is frozen

        for name, low, high in (("order", 1, MAX_ORDER), ("splits", 1, MAX_ORDER), ("terms", 1, MAX_TERMS)):
            put(name, _integer(name, getattr(self, name), low, high))
        put("seed", _integer("seed", self.seed, 0, (1 << 64) - 1))
        for name, words in (
            ("combine", COMBINES),
            ("leading", LEADINGS),
            ("on", ON),
        ):
            _word(name, getattr(self, name), words)
        put("rank", FORMATS.find(self.format).checked_rank(self.format, self.rank, self.order))
        put("projection", checked_projection(self.projection))
        put("groups", _checked_groups(self.groups))
        put("fold", self._checked_fold())
        put("axes", checked_axes(self.axes, self.fold, self.order))
        if self.axes is not None and self.combine == "kronecker" and self.splits > 1:
            raise ConfigError(
                "axes give the modes of one tensor an order, and Kronecker splits have several: leave axes out, or use "
                "splits=1"
            )
        put("split_size", self._checked_split_size())
        put("ratio", _number("ratio", self.ratio))
        if not 0.0 < self.ratio <= 1.0:
            raise ConfigError(f"ratio must be above 0 and at most 1; got {self.ratio!r}")
        require_ratio_fits(self.projection, self.on, self.ratio)
        if self.ratio != 1.0 and is_named(self.fold):
            raise ConfigError(
                f"fold={self.fold} has the sizes of the weights, and ratio={self.ratio} folds a shorter vector: use "
                "ratio=1, or fold='hypercube'"
            )
        if not isinstance(self.shared, bool):
            raise ConfigError(f"shared must be True or False; got {safe_repr(self.shared)}")
        if self.alpha is not None:
            put("alpha", _number("alpha", self.alpha))
            if not MIN_ALPHA <= self.alpha <= MAX_ALPHA:
                raise ConfigError(
                    f"alpha must be from {MIN_ALPHA:g} to {MAX_ALPHA:g}, or None for a scale of 1; got {self.alpha!r}"
                )
        if self.combine == "hadamard" and self.splits > 1 and self.split_size != "balanced":
            raise ConfigError(
                "split_size sizes Kronecker splits; with combine='hadamard' every split has the full sizes: "
                "leave split_size out"
            )
        put("sources", _checked_sources(self.sources))
        self._check_before()
        if starting_point(self.start).subtracts and not self.offset:
            raise ConfigError(
                f"start={self.start!r} says where the arrays start, and offset=False starts them at P θ = 0: leave "
                "offset out, or use start='zero'"
            )
        put("weight_shape", self._checked_weight_shape())
        rescales = APPLYING.find(self.apply)().rescales
        _word("magnitude_axis", self.magnitude_axis, tuple(AXES))
        if self.magnitude_axis != "rows" and not rescales:
            raise ConfigError(
                f"magnitude_axis={self.magnitude_axis!r} is about the trained magnitude, and apply={self.apply!r} has "
                "none: use apply='magnitude', or leave magnitude_axis out"
            )

    def _check_before(self) -> None:
        _word("scope", self.scope, SCOPES)
        if not isinstance(self.offset, bool):
            raise ConfigError(f"offset must be True or False; got {safe_repr(self.offset)}")
        if self.before is None:
            for name, default in (("parameters", None), ("scope", "plan"), ("offset", True)):
                if getattr(self, name) != default:
                    raise ConfigError(
                        f"{name}={getattr(self, name)!r} is about the map before the network, and there is none: set "
                        f"before='one-hot', or leave {name} out"
                    )
            return
        object.__setattr__(self, "before", checked_projection(self.before))
        if not is_linear(self.before) or not takes_ratio(self.before):
            raise ConfigError(
                f"before must be a linear map from vectors of any length, such as 'one-hot', 'normal' or 'linear'; got "
                f"{projection_name(self.before)}"
            )
        if isinstance(self.before, tuple) and len(self.before) > MAX_BEFORE:
            raise ConfigError(f"before composes at most {MAX_BEFORE} maps; got {len(self.before)}")
        if self.parameters is None:
            raise ConfigError(f"before={self.before!r} needs the number of parameters: parameters=p, an integer")
        object.__setattr__(self, "parameters", _integer("parameters", self.parameters, 1, MAX_INT))
        if not self.offset and not is_linear(self.projection):
            raise ConfigError(
                f"offset=False starts the arrays at zero, where projection={projection_name(self.projection)!r} has no "
                "gradient: use offset=True"
            )

    def _checked_weight_shape(self) -> tuple[int, int] | None:
        given = self.weight_shape
        if given is None:
            return None
        if not isinstance(given, (tuple, list)) or len(given) != 2:
            raise ConfigError(f"weight_shape must be (rows, cols), or None for any weights; got {safe_repr(given)}")
        rows, cols = (_integer(f"weight_shape[{side}]", size, 1, 1 << 62) for side, size in enumerate(given))
        if not isinstance(self.fold, tuple):
            raise ConfigError(
                f"weight_shape={(rows, cols)} says what the sizes of a fold stand for, and fold={self.fold!r} names "
                "none: give fold=(weights, rows, cols), or weight_shape=None"
            )
        if is_named(self.fold):
            raise ConfigError(
                f"fold={self.fold} takes the shapes that the weights have, and weight_shape={(rows, cols)} demands "
                "one: leave weight_shape out, or give the fold in integers"
            )
        fold = [int(size) for size in self.fold]
        inner = list(itertools.accumulate(reversed(fold), operator.mul))
        if cols not in inner or rows * cols not in inner[inner.index(cols) :]:
            raise ConfigError(
                f"the last sizes of fold={self.fold} do not multiply to the {rows} rows and {cols} columns of "
                f"weight_shape={(rows, cols)}: give fold=(weights, rows, cols), or weight_shape=None"
            )
        return rows, cols

    def _checked_fold(self) -> str | tuple[int | str, ...]:
        if isinstance(self.fold, (tuple, list)):
            sizes = tuple(
                size if isinstance(size, str) else _integer(f"fold[{mode}]", size, 1, 1 << 62)
                for mode, size in enumerate(self.fold)
            )
            if is_named(sizes):
                check_fold(sizes)
            if self.axes is None and len(sizes) != self.order:
                raise ConfigError(
                    f"fold={sizes} has {len(sizes)} sizes and order is {self.order}; set order={len(sizes)}"
                )
            return sizes
        _word("fold", self.fold, FOLDS, "or a tuple of sizes")
        if self.fold == "stack" and self.order > 2:
            raise ConfigError(
                f"fold='stack' makes matrices only and order is {self.order}; use fold='hypercube' or 'balanced'"
            )
        return self.fold

    def _checked_split_size(self) -> int | str | tuple[int, ...]:
        if isinstance(self.split_size, (tuple, list)):
            sizes = tuple(
                _integer(f"split_size[{mode}]", size, 1, MAX_INT) for mode, size in enumerate(self.split_size)
            )
            if len(sizes) != self.order:
                raise ConfigError(
                    f"split_size={safe_repr(sizes)} has {len(sizes)} sizes and order is {self.order}: give one per mode"
                )
            return sizes
        if isinstance(self.split_size, str) and self.split_size == "balanced":
            return self.split_size
        return _integer("split_size", self.split_size, 1, MAX_INT, 'or "balanced", or a tuple of one size per mode')

    @property
    def scale(self) -> float:
        """``alpha / rank``, or 1 where alpha is None."""
        if self.alpha is None:
            return 1.0
        if isinstance(self.rank, int):
            return self.alpha / self.rank
        return self.alpha / max((rank for rank in self.rank if rank is not None), default=1)

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
        found = {field.name: _listed(getattr(self, field.name)) for field in dataclasses.fields(self)}
        found["projection"] = projection_to_json(self.projection)
        found["before"] = None if self.before is None else projection_to_json(self.before)
        found["sources"] = {name: source_to_dict(self.sources[name]) for name in sorted(self.sources)}
        for name, default in _NEWER.items():
            if found[name] == default:
                del found[name]
        return found

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
        tnadapt.errors.ConfigError: Config has no field 'rnak'; did you mean 'rank'? Fields: rank, order,
        splits, groups, fold, format, combine, split_size, leading, terms, projection, ratio, shared, alpha, seed,
        sources, on, before, parameters, scope, offset, weight_shape, axes, apply, magnitude_axis, start
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
            hint = peft_hint(name)
            close = difflib.get_close_matches(str(name), known, n=1)
            meant = f" {hint}." if hint else f" did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"Config has no field {safe_repr(name)};{meant} Fields: {', '.join(known)}")


def _listed(value: Any) -> Any:
    return [_listed(item) for item in value] if isinstance(value, tuple) else value


def _integer(name: str, value: Any, low: int, high: int, other: str = "") -> int:
    return integer(name, value, low, high, ConfigError, other)


def _number(name: str, value: Any) -> float:
    if isinstance(value, (bool, str)):
        raise ConfigError(f"{name} must be a number; got {safe_repr(value)}")
    try:
        # Read it as the decimal that it prints as: a float32 of 0.07 means 0.07, not 0.07000000029802322.
        number = float(value) if isinstance(value, (int, float, Fraction)) else float(str(value))
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{name} must be a number; got {safe_repr(value)}") from None
    if not math.isfinite(number):
        raise ConfigError(f"{name} must be finite; got {number!r}")
    return number


def _word(name: str, value: Any, words: tuple[str, ...], other: str = "") -> None:
    if not isinstance(value, str) or value not in words:
        listed = ", ".join(repr(word) for word in words)
        other = f" {other}" if other else ""
        raise ConfigError(f"{name} must be one of {listed}{other}; got {safe_repr(value)}")


def _checked_groups(groups: Any) -> str | int | tuple[tuple[int, ...], ...]:
    what = '"weight", "layer", "role", an integer of at least 1, or a list of lists of weight indices'
    if isinstance(groups, str):
        if groups not in ("weight", "layer", "role"):
            raise ConfigError(f"groups must be {what}; got {safe_repr(groups)}")
        return groups
    if isinstance(groups, (list, tuple)):
        if not groups or not all(isinstance(group, (list, tuple)) and group for group in groups):
            raise ConfigError(f"groups must be {what}, none of them empty; got {safe_repr(groups)}")
        return tuple(
            tuple(_integer(f"groups[{g}]", weight, 0, MAX_INT) for weight in group) for g, group in enumerate(groups)
        )
    return _integer("groups", groups, 1, 1 << 62, 'or "weight", "layer", "role" or a list of lists')


def _checked_sources(sources: Any) -> SourceMap:
    """Return the sources of a config; each may be given as a dictionary, as :meth:`Config.to_dict` writes it."""
    if isinstance(sources, SourceMap):
        return sources
    if not isinstance(sources, Mapping):
        raise ConfigError(
            f"sources must be a mapping of array names to sources, such as {{'factor0': Trained()}}; got "
            f"{safe_repr(sources)}"
        )
    found = {}
    for name, source in sources.items():
        try:
            found[name] = source_from_dict(source) if isinstance(source, Mapping) else source
        except ConfigError as error:
            raise ConfigError(f"sources[{safe_repr(name)}]: {error}") from error
    return SourceMap(found)
