"""Config, the settings of an adapter (r, M, K, G, ρ, α and others): immutable and validated."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from tnadapt.errors import ConfigError, keyword_hint, safe_repr
from tnadapt.report import fact_table

from ._axes import checked_axes
from ._config_checks import (
    checked_before,
    checked_fold,
    checked_groups,
    checked_integer,
    checked_number,
    checked_sources,
    checked_split_size,
    checked_weight_shape,
    checked_word,
)
from ._rate_names import RATE_NAMES
from .applying import APPLYING, AXES
from .folding import MAX_ORDER
from .formats import FORMATS
from .maps import (
    ON,
    Recipe,
    checked_projection,
    projection_to_json,
    require_ratio_fits,
)
from .named_fold import is_named
from .sources import Source, SourceMap, source_to_dict
from .starting_points import starting_point

__all__ = ["Config"]

_Item = TypeVar("_Item")

COMBINES = ("kronecker", "hadamard")
LEADINGS = ("dense", "same")

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
    "rate": "sgd",
}

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
        linear map; "tied" and "given" take an index or a matrix of your own, ``SuperLoRA(…, given=…)``. None trains the
        arrays themselves. Adapter files leave out this field and the next three at their defaults.
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
        (``SuperLoRA(…, start_from=…)``, ``adapter.start_from(…)``); "random" for arrays of which none is zero; "pissa",
        "milora" and "olora" for LoRA's factors computed from the base weight. Adapter files leave out "zero".
    rate : "adam" or "sgd"
        The optimizer for which one learning rate fits all configs. It determines the units in which the arrays are
        trained (:attr:`tnadapt.SuperLoRA.training_plan`) and does not affect ΔW, its arrays or files of them. With
        "adam", which is that of the presets, train with Adam at a rate of about 1e-2; "sgd" trains the
        arrays themselves. Adapter files leave out "sgd".

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
    rate: str = "sgd"

    def __new__(cls, *args: Any, **settings: Any) -> Config:
        # Raise ConfigError for an unknown field, where a dataclass would raise TypeError.
        _known(settings)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)  # the class is frozen

        for name, low, high in (("order", 1, MAX_ORDER), ("splits", 1, MAX_ORDER), ("terms", 1, MAX_TERMS)):
            put(name, checked_integer(name, getattr(self, name), low, high))
        put("seed", checked_integer("seed", self.seed, 0, (1 << 64) - 1))
        for name, words in (
            ("combine", COMBINES),
            ("leading", LEADINGS),
            ("on", ON),
            ("rate", RATE_NAMES),
        ):
            checked_word(name, getattr(self, name), words)
        put("rank", FORMATS.find(self.format).checked_rank(self.format, self.rank, self.order))
        put("projection", checked_projection(self.projection))
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
        require_ratio_fits(self.projection, self.on, self.ratio)
        if self.ratio != 1.0 and is_named(self.fold):
            raise ConfigError(
                f"fold={self.fold} has the sizes of the weights, and ratio={self.ratio} folds a shorter vector: use "
                "ratio=1, or fold='hypercube'"
            )
        if not isinstance(self.shared, bool):
            raise ConfigError(f"shared must be True or False; got {safe_repr(self.shared)}")
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
        if starting_point(self.start).subtracts and not self.offset:
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
        return fact_table(type(self).__name__, [(name, repr(value)) for name, value in self._chosen()])

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


# What a field is compared with, to leave it out where it has its default.
_USUAL = Config()
