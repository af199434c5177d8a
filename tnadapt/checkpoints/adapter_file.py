"""AdapterFile, the content of an adapter file in memory: a config, targets and arrays that fit together."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tnadapt.algebra.base_arrays import checked_given
from tnadapt.algebra.config import Config, group_fold, is_named
from tnadapt.algebra.formats import make_format
from tnadapt.algebra.init import Initializer
from tnadapt.algebra.layout import Layout, make_layout
from tnadapt.algebra.update_plan import UpdatePlan
from tnadapt.argument_checks import checks_arguments
from tnadapt.errors import BackendError, ConfigError, ShapeError, pluralize, safe_repr, summarize
from tnadapt.targets.target import Target, check_distinct

from .container import DTYPES, encodes
from .fingerprint import Fingerprint
from .pretrained_model import Pretrained

# -- The arrays that a config and its targets imply, and the frozen ones a file may omit -------------------------------


# Maximum number of frozen arrays that a file omits, and of their elements in total, to bound the work that a small
# file can impose on its reader.
MAX_LEFT_OUT, MAX_DRAWN = 1024, 1 << 24
# Maximum number of arrays that a file's plan may have beyond the stored ones, and beyond this many per target:
# arrays that are frozen, tied or made from θ take no bytes in it.
_MAX_UNSTORED, _PER_TARGET = 1 << 12, 64
#: Maximum number of arrays that the numbers of a population's row may be: the header has no entries for them.
MAX_IN_ROW = 1 << 16
# Maximum trial divisions for factoring: enough for one number of 2**36, or about a hundred of 2**23.
_MAX_DIVISIONS = 1 << 18


def plan_of(config: Config, targets: Sequence[Target], given: Mapping[str, np.ndarray] | None = None) -> UpdatePlan:
    """Return the plan of an adapter, with frozen arrays that are not computed."""
    return UpdatePlan(
        config,
        [target.shape for target in targets],
        layers=[target.layer for target in targets],
        roles=[target.role for target in targets],
        given=given,
    )


def check_fit(
    config: Config,
    targets: Sequence[Target],
    shapes: Mapping[str, tuple[int, ...]],
    trained: Sequence[str] | None = None,
    numbers: int | None = None,
) -> UpdatePlan:
    """Return the plan, or raise an error unless the shapes are those of a file's arrays.

    A file has the parameters of the plan, of which some that are not ``trained`` may be missing; the frozen arrays that
    the caller provided; and possibly those that are computed from the base weights, and those of a start. Of a
    population's file, the shapes are those of the frozen arrays alone, and the parameters must have ``numbers``
    elements, which is what a row of the file holds.

    Time and memory are proportional to the number of shapes and targets, however large the numbers in the config are.

    Raises
    ------
    ConfigError, ShapeError
        If arrays are missing, unknown or of another shape; the message names them.
    """
    # Count before planning: a hostile config of a few bytes can ask for millions of arrays.
    counts = [(_checked_count(part, weights), part) for part, weights in config.split(targets)]
    # Some arrays with sources are not stored; only the plan knows how many.
    expected = sum(count for count, part in counts if part.before is None and not part.sources)
    stored = len(shapes) + min(numbers or 0, MAX_IN_ROW)
    if expected > stored + MAX_LEFT_OUT:
        raise ShapeError(f"config and targets require {expected} arrays; there are {stored}")
    count = sum(count for count, _ in counts)
    most = stored + _PER_TARGET * len(targets) + _MAX_UNSTORED
    if count > most:
        raise ShapeError(f"config and targets make {count} arrays; at most {most} can come from so few that are stored")
    plan = plan_of(config, targets)
    params = plan.param_shapes
    if numbers is not None:
        if both := params.keys() & shapes.keys():
            raise ShapeError(f"the members' arrays must be in the rows alone; got tensors {summarize(both)}")
        if (size := sum(map(math.prod, params.values()))) != numbers:
            raise ShapeError(f"config and targets require {size} numbers of each member; a row has {numbers}")
        shapes = {**params, **shapes}
    required = {**params, **plan.fixed_shapes}
    missing = required.keys() - shapes.keys() - plan.base_shapes.keys() - plan.start_shapes.keys()
    if trained is not None:
        # Parameters of weights start at values from the base, which a reader may not have.
        drawn_ones = params.keys() - plan.weight_param_shapes.keys()
        missing -= drawn_ones - set(checked_trained(trained, params) or params)
    left_out = params.keys() - shapes.keys() - missing
    if len(left_out) > MAX_LEFT_OUT or sum(math.prod(required[name]) for name in left_out) > MAX_DRAWN:
        raise ShapeError(
            f"{len(left_out)} frozen arrays are left out; at most {MAX_LEFT_OUT} with {MAX_DRAWN} elements in total "
            "may be"
        )
    if missing or not shapes.keys() <= required.keys():
        raise ShapeError(
            f"the arrays must be those of config and targets; missing: {summarize(missing)}; "
            f"unknown: {summarize(shapes.keys() - required.keys())}"
        )
    for name, shape in required.items():
        if shapes.get(name, shape) != shape:
            raise ShapeError(f"{name} has shape {shapes[name]}; config and targets require {shape}")
    return plan


def _checked_count(config: Config, targets: Sequence[Target]) -> int:
    """Return the number of arrays of a config without listing them, refusing sizes that take too long to factor."""
    layout = make_layout(
        config.groups,
        [target.shape for target in targets],
        [target.layer for target in targets],
        [target.role for target in targets],
    )
    if config.splits > 1 and config.combine == "kronecker" and config.split_size == "balanced":
        folds = _folds(config, layout)
        if sum(math.isqrt(size) for fold in folds for size in fold) > _MAX_DIVISIONS:
            raise ConfigError(
                "the sizes that split_size='balanced' has to factor are too large; give split_size as an integer"
            )
    leading = "dense" if config.leading == "dense" else config.format
    last, other = (len(make_format(name, (1,) * config.order, config.rank).shapes) for name in (config.format, leading))
    return layout.num_groups * config.terms * (last + (config.splits - 1) * other)


def _folds(config: Config, layout: Layout) -> Iterable[Sequence[int]]:
    """Return the sizes to factor for each different network: those of the fold, or the group's length."""
    if is_named(config.fold):
        return {group_fold(config.fold, layout, group) for group in range(layout.num_groups)}
    lengths = {size for _, _, size in layout.same_size()}
    return [[int(each) for each in config.fold] if isinstance(config.fold, tuple) else [size] for size in lengths]


def checked_trained(trained: Sequence[str] | None, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...] | None:
    """Return the names of the trained arrays in the order of the plan; None if all are trained."""
    if trained is None:
        return None
    chosen = set(trained)
    if not chosen or len(chosen) < len(trained) or not chosen <= shapes.keys():
        raise ConfigError(
            f"trained must name some of the arrays, each once; unknown: {summarize(chosen - shapes.keys())}; there are "
            f"{summarize(shapes)}"
        )
    return None if len(chosen) == len(shapes) else tuple(name for name in shapes if name in chosen)


def drawn(plan: UpdatePlan, trained: Sequence[str] | None, dtype: str) -> dict[str, Callable[[], np.ndarray]]:
    """Map each frozen array, in the order of the plan, to a function that draws it from the seed, rounded to a dtype.

    Arrays of bfloat16 are returned as float32 with rounded values.
    """
    if trained is None or plan.theta is not None or plan.point.subtracts:
        return {}  # θ is stored, as it is short, and so are arrays whose start may not be drawn
    chosen, numpy_dtype = set(trained), "float32" if dtype == "bfloat16" else dtype
    return {
        full: functools.partial(_drawn, start, name, dtype, numpy_dtype)
        for group, start in zip(plan.groups, plan.starts(trained), strict=True)
        for name, full in group.names.items()
        if full not in chosen
    }


def _drawn(start: Initializer, name: str, dtype: str, numpy_dtype: str) -> np.ndarray:
    return np.asarray(start.make((name, dtype)).astype(numpy_dtype))


# -- AdapterFile -------------------------------------------------------------------------------------------------------


KEPT = "kept."
ACTIVATIONS = ("relu", "gelu", "tanh", "silu")

_FLOATS = ("float64", "float32", "float16")
# Each digest draws up to three million numbers: of many distinct F, only this many at either end are included.
_DIGESTED = 8


@checks_arguments
@dataclasses.dataclass(frozen=True, eq=False)
class AdapterFile:
    """The content of an adapter file.

    Parameters
    ----------
    config : Config
        The structure of the updates. A :class:`tnadapt.CompositeConfig` has one for each part of the targets.
    targets : sequence of Target
        The weights that are updated, in the order of the long vector. Their ``layer`` is dropped unless
        ``config.groups`` is "layer".
    arrays : dict of str to ndarray
        Arrays with the names and shapes of ``plan.param_shapes``; float64, float32 or float16, all of one dtype.
    kept : dict of str to ndarray, optional
        Parameters of the model that were trained alongside the adapter, by dotted path, of any shape; bool and
        integers are allowed as well.
    dtypes : dict of str to str, optional
        Arrays to store as "bfloat16", by name; the name of a kept parameter begins with ``kept.``. NumPy lacks
        bfloat16, so these arrays are float32 here and hold values that bfloat16 can represent. (Arrays of ml_dtypes'
        bfloat16 are accepted and converted.)
    base : Fingerprint, optional
        Fingerprint of the base model's weights at the targets.
    activation : {None, "relu", "gelu", "tanh", "silu"}
        LoDA's nonlinearity.
    model : str
        Class name of the base model, for human readers.
    given : dict of str to ndarray, optional
        The frozen arrays in ``plan.given_shapes``, all of them, and those in ``plan.base_shapes`` and
        ``plan.start_shapes`` that are stored: in float32.
    trained : sequence of str, optional
        Names of the trained arrays if some are frozen; all if None. A frozen array that equals what the seed draws is
        not stored in the file, but recomputed when the file is loaded.
    pretrained : Pretrained, optional
        The pretrained model that it was trained on: name, revision, task, labels.
    ties : dict of str to sequence of str, optional
        The other names, in the model, of the tensor of a kept parameter; none if it belongs to its module alone. A
        target whose module alone was updated may be here as well, with no names: those of one that is tied are in
        ``Target.tied``. What is not here is not known.

    Raises
    ------
    ConfigError, ShapeError, BackendError, TargetError
        If the arrays do not fit config and targets, two targets update the same row of a parameter, or a field has
        another type or dtype.

    Examples
    --------
    >>> config, targets = Config(rank=1), [Target("blocks.0.attn.query", (4, 6), "q")]
    >>> arrays = UpdatePlan(config, [(4, 6)]).init()
    >>> file = AdapterFile(config, targets, arrays, model="ViT")
    >>> file, file.deltas()[0].shape
    (AdapterFile(10 parameters in 2 arrays, 1 target, 0 kept), (4, 6))
    """

    config: Config
    targets: Sequence[Target]
    arrays: Mapping[str, np.ndarray]
    kept: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    dtypes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    base: Fingerprint | None = None
    activation: str | None = None
    model: str = ""
    trained: Sequence[str] | None = None
    given: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    pretrained: Pretrained | None = None
    ties: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)  # the class is frozen

        put("targets", own_targets(self.targets, self.config))
        if not self.targets:
            raise ConfigError("targets is empty: an adapter updates at least one weight")
        check_distinct(self.targets)
        if self.activation is not None and self.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ConfigError(f"activation must be None or one of {known}; got {safe_repr(self.activation)}")
        dtypes = dict(self.dtypes)
        put("arrays", _own_arrays("arrays", self.arrays, dtypes))
        put("kept", _own_arrays("kept", self.kept, dtypes))
        put("dtypes", dtypes)
        put("ties", _own_ties(self))
        _check_dtypes(self)
        _check_text(self)
        plan = self.__dict__.pop("plan", None)  # from fitting_file
        if plan is None or plan.param_shapes.keys() != self.arrays.keys():
            shapes = {name: tuple(array.shape) for name, array in [*self.arrays.items(), *self.given.items()]}
            plan = check_fit(self.config, self.targets, shapes)
        put("given", checked_given(self.given, plan.fixed_shapes, plan.brought_shapes))
        if not self.given:
            put("plan", plan)
        if self.activation is not None and plan.point.subtracts:
            raise ConfigError(
                f"activation={self.activation!r} depends on the input, so that the update of a start cannot be "
                f"subtracted: use start='zero' instead of {self.config.start!r}"
            )
        put("trained", checked_trained(self.trained, plan.param_shapes))

    def __repr__(self) -> str:
        return (
            f"AdapterFile({self.num_parameters} parameters in {pluralize(len(self.arrays), 'array')}, "
            f"{pluralize(len(self.targets), 'target')}, {len(self.kept)} kept)"
        )

    @functools.cached_property
    def plan(self) -> UpdatePlan:
        """The plan of the adapter, with the arrays in ``given``."""
        return plan_of(self.config, self.targets, self.given)

    @property
    def complete(self) -> bool:
        """Whether all arrays are known: False if some are computed from the base weights and are not stored."""
        return self.plan.base_shapes.keys() <= self.given.keys()

    @checks_arguments
    def with_base(
        self, weights: Sequence[Any] | Callable[[int], Any], progress: Callable[[int, int], None] | None = None
    ) -> AdapterFile:
        """Return this file with the arrays that are computed from the base weights in ``given``.

        Parameters
        ----------
        weights, progress
            As for :meth:`tnadapt.UpdatePlan.with_base`.

        Notes
        -----
        :meth:`deltas` needs these arrays. They are stored if this file is saved, as with ``store_bases=True``.
        """
        return dataclasses.replace(self, given=self.plan.with_base(weights, progress).given)

    @property
    def num_parameters(self) -> int:
        """Number of trained elements in the adapter's arrays, not counting kept parameters."""
        return sum(array.size for name, array in self.arrays.items() if self.trained is None or name in self.trained)

    @property
    def dtype(self) -> str:
        """The dtype in which the adapter's arrays are stored."""
        first = next(iter(self.arrays))
        return self.dtypes.get(first, self.arrays[first].dtype.name)

    @property
    def depends_on_dtype(self) -> bool:
        """Whether the update, or the file, has fixed numbers that are rounded to :attr:`dtype`."""
        if self.plan.theta is not None or not self.complete or self.left_out:
            return True
        for group in self.plan.groups:
            fixed = ((group.frozen.make(name), group.frozen.make((name, self.dtype))) for name in group.frozen.entries)
            if group.subtracts or any(not np.array_equal(*pair) for pair in fixed):
                return True
        return False

    # Not cached, because the arrays may change in place.
    @property
    def left_out(self) -> tuple[str, ...]:
        """Names of the frozen arrays that a file omits because the seed draws them, up to a limit on count and size."""
        names, left = list[str](), MAX_DRAWN
        for name, make in drawn(self.plan, self.trained, self.dtype).items():
            left -= self.arrays[name].size
            if left < 0 or len(names) == MAX_LEFT_OUT:
                break
            # Compare the bits: a negative zero must be stored.
            if np.array_equal(self.arrays[name].view(np.uint8), make().view(np.uint8)):
                names.append(name)
            else:
                left += self.arrays[name].size
        return tuple(names)

    @property
    def draws(self) -> str | None:
        """Digest of what this machine draws instead of reading a file: F and the omitted arrays; None if nothing."""
        return self.draws_without(self.left_out)

    @checks_arguments
    def draws_without(self, left_out: Sequence[str]) -> str | None:
        """Return :attr:`draws` for a file that omits the given arrays."""
        key = tuple(left_out)
        if unknown := [name for name in key if name not in self.arrays]:
            raise ConfigError(f"left_out names {safe_repr(unknown[0])}; the arrays are {summarize(self.arrays)}")
        if key not in self._digests:
            self._digests[key] = self._digest_without(key)
        return self._digests[key]

    @functools.cached_property
    def _digests(self) -> dict[tuple[str, ...], str | None]:
        # Digests are costly, and depend only on the omitted arrays and on fields that never change.
        return {}

    def _digest_without(self, left_out: Sequence[str]) -> str | None:
        plan, groups = self.plan, self.plan.groups
        plain = all(group.projection.map.identity for group in groups)
        # A start that is subtracted is drawn, except for arrays that are stored or computed from the base.
        subtracting = any(group.subtracts for group in groups)
        begun = list(_drawn_starts(plan, subtracted=True)) if subtracting else []
        if plain and not left_out and not plan.frozen_shapes and plan.theta is None and not begun:
            return None
        total = hashlib.sha256()
        distinct = [] if plain else list({id(group.projection): group.projection for group in groups}.values())
        before = [] if plan.theta is None else [part.projection for part in plan.theta.parts]
        for projections in (distinct, before):
            for projection in [*projections[:_DIGESTED], *projections[_DIGESTED:][-_DIGESTED:]]:
                total.update(projection.digest.encode())
        if plan.theta is not None and self.config.offset:
            starts = hashlib.sha256()
            _add(starts, _limited(_drawn_starts(plan)))
            total.update(starts.digest())
        else:
            _add(total, (draw() for draw, _ in begun))
        frozen = (
            (functools.partial(group.frozen.make, name), math.prod(group.network.shapes[name]))
            for group in groups
            for name, entry in group.frozen.entries.items()
            if not (entry.source.brought or entry.source.needs_base)  # stored, or known by the fingerprint of the base
        )
        _add(total, _limited(frozen))
        draws = drawn(plan, self.trained, "float32") if left_out else {}
        _add(total, (draws[name]() for name in left_out))
        return total.hexdigest()

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield all arrays with their names in a file, where those of kept parameters begin with ``kept.``."""
        kept = ((KEPT + name, array) for name, array in self.kept.items())
        yield from itertools.chain(self.arrays.items(), self.given.items(), kept)

    def check_finite(self) -> None:
        """Raise ShapeError, naming the array, if one contains NaN or infinity."""
        for name, array in self.tensors():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise ShapeError(
                    f"{safe_repr(name)} holds NaN or infinity; an adapter file may only have finite numbers"
                )

    def deltas(self) -> list[np.ndarray]:
        """Compute the update of every target.

        Returns
        -------
        list of ndarray, shape (rows, cols)
            In the dtype of the arrays; float32 for bfloat16 arrays. They may share memory with the arrays.

        Raises
        ------
        ConfigError
            If there is an activation: LoDA acts on activations and does not update weights. If arrays are computed from
            the base weights and are not stored: call :meth:`with_base` first.
        """
        if self.activation is not None:
            raise ConfigError(
                f"an adapter with activation={self.activation!r} does not update weights: what it adds to an output "
                "depends on the input; attach it to the model"
            )
        return self.plan.deltas(self.arrays, self.dtype)


def fitting_file(plan: UpdatePlan, *fields: Any, **named: Any) -> AdapterFile:
    """Return the adapter of these fields, whose arrays fit this plan of theirs, as :func:`check_fit` has found."""
    file = AdapterFile.__new__(AdapterFile)
    object.__setattr__(file, "plan", plan)
    AdapterFile.__init__(file, *fields, **named)
    return file


_Draw = tuple[Callable[[], np.ndarray], int]  # what draws an array, and its size


def _drawn_starts(plan: UpdatePlan, subtracted: bool = False) -> Iterator[_Draw]:
    """Yield the starts that the seed draws, with ``subtracted`` only those that the update subtracts."""
    # The other arrays start at stored values, or at values computed from the base.
    for full, shape in plan.array_shapes.items():
        number, _, name = full.removeprefix("group").partition(".")
        group = plan.groups[int(number)]
        if (group.subtracts or not subtracted) and group.start.draws(name):
            yield functools.partial(group.start.make, name), math.prod(shape)


def _limited(draws: Iterable[_Draw]) -> Iterator[np.ndarray]:
    """Draw arrays until their elements in total reach a limit."""
    total = 0
    for draw, size in draws:
        total += size
        if total <= MAX_DRAWN:
            yield draw()


def _add(digest: Any, arrays: Iterable[np.ndarray]) -> None:
    for array in arrays:
        digest.update(array.astype("<f4").tobytes())


def own_targets(targets: Sequence[Target], config: Config) -> tuple[Target, ...]:
    """Return targets without the layers that a config does not use."""
    return tuple(
        target if part.groups == "layer" or not target.layer else dataclasses.replace(target, layer="")
        for part, weights in config.split(targets)
        for target in weights
    )


def _own_arrays(what: str, arrays: Mapping[str, np.ndarray], dtypes: dict[str, str]) -> dict[str, np.ndarray]:
    """Return the arrays as a dictionary, in native byte order, with bfloat16 converted to float32."""
    native = {}
    for name, array in arrays.items():
        if not name:
            raise ShapeError(f"{what} must be named by strings that are not empty")
        if not isinstance(array, np.ndarray) or isinstance(array, (np.matrix, np.ma.MaskedArray)):
            raise ShapeError(f"{what}[{name!r}] must be a NumPy array; got {type(array).__name__}")
        if array.dtype.name == "bfloat16":
            dtypes[name if what == "arrays" else KEPT + name] = "bfloat16"
            array = array.astype(np.float32)
        allowed = _FLOATS if what == "arrays" else [name for name in DTYPES.values() if name != "bfloat16"]
        if array.dtype.name not in allowed:
            raise BackendError(f"{what}[{name!r}] has dtype {array.dtype.name}; expected one of {', '.join(allowed)}")
        native[name] = array.astype(array.dtype.newbyteorder("="), copy=False)
    return native


def _own_ties(file: AdapterFile) -> dict[str, tuple[str, ...]]:
    """Return the ties as a dictionary of tuples."""
    alone = {target.name for target in file.targets if not target.tied}
    for name, others in file.ties.items():
        if not all(others):
            raise ConfigError(f"ties of {safe_repr(name)} must be a list of dotted paths; got {safe_repr(others)}")
        if len({name, *others}) <= len(others):
            raise ConfigError(f"ties of {safe_repr(name)} must be different names; got {safe_repr(others)}")
        if name not in file.kept and (others or name not in alone):
            raise ConfigError(
                f"ties names {safe_repr(name)}, which is neither a kept parameter nor a target without ties; the names "
                "to which a target is tied are its own"
            )
    return {name: tuple(others) for name, others in file.ties.items()}


def _check_dtypes(file: AdapterFile) -> None:
    tensors = dict(file.tensors())
    for name, dtype in file.dtypes.items():
        if name not in tensors:
            raise BackendError(f"dtypes names {safe_repr(name)}, which is not an array of the file")
        if dtype != "bfloat16" or tensors[name].dtype != np.float32:
            raise BackendError(
                f"dtypes says which float32 arrays are stored as 'bfloat16'; got {safe_repr(dtype)} for "
                f"{safe_repr(name)}, which is {tensors[name].dtype.name}"
            )
        if (tensors[name].view(np.uint32) & np.uint32(0xFFFF)).any():
            raise BackendError(
                f"{safe_repr(name)} has values that bfloat16 cannot represent; round them, or leave it out of dtypes"
            )
    kinds = sorted({file.dtypes.get(name, array.dtype.name) for name, array in file.arrays.items()})
    if len(kinds) > 1:
        raise BackendError(f"the arrays must be of one dtype; got {' and '.join(kinds)}")


def _check_text(file: AdapterFile) -> None:
    texts = [("model", file.model), *(("kept", name) for name in file.kept)]
    texts += [("ties", name) for names in file.ties.values() for name in names]
    for target in file.targets:
        texts += [("targets", text) for text in (target.module, target.parameter, target.layer)]
    for field, text in texts:
        if not encodes(text):
            raise ConfigError(f"{field}: {safe_repr(text)} has half a surrogate pair, which no file can hold")
