"""The arrays that a config and its targets imply: their shapes, and the frozen ones a file may omit."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tnadapt.algebra.config import Config
from tnadapt.algebra.formats import make_format
from tnadapt.algebra.init import Initializer
from tnadapt.algebra.layout import Layout, make_layout
from tnadapt.algebra.named_fold import group_fold, is_named
from tnadapt.algebra.sources import Multiplied, Source, SourceMap, Tied, Trained, inner_source
from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.errors import ConfigError, ShapeError, safe_repr, summarize
from tnadapt.targets.target import Target

# Maximum number of frozen arrays that a file omits, and of their elements in total. They bound the work that a small
# file can impose on its reader.
MAX_LEFT_OUT, MAX_DRAWN = 1024, 1 << 24
# Maximum number of arrays that a file's plan may have beyond those that are stored, and beyond so many per target:
# arrays that are frozen, tied or made from θ take no bytes in it.
_MAX_UNSTORED, _PER_TARGET = 1 << 12, 64
# Maximum trial divisions for factoring: enough for one number of 2**36, or about a hundred of 2**23.
_MAX_DIVISIONS = 1 << 18


def plan_of(config: Config, targets: Sequence[Target], given: Mapping[str, np.ndarray] | None = None) -> SuperLoRA:
    """Return the plan of an adapter, with frozen arrays that are not computed."""
    return SuperLoRA(
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
) -> SuperLoRA:
    """Return the plan, or raise an error unless the shapes are those of a file's arrays.

    A file has the parameters of the plan, of which some that are not ``trained`` may be missing; the frozen arrays that
    the caller brought; and possibly those that are computed from the base weights, and those of a start.

    Time and memory are proportional to the number of shapes and targets, however large the numbers in the config are.

    Raises
    ------
    ConfigError, ShapeError
        If arrays are missing, unknown or of another shape; the message names them.
    """
    # Count before planning: a hostile config of a few bytes can ask for millions of arrays.
    counts = [_checked_counts(own, weights) for own, weights in config.split(targets)]
    every, expected = (sum(numbers) for numbers in zip(*counts, strict=True))
    if expected > len(shapes) + 1024:
        raise ShapeError(f"config and targets require {expected} arrays; there are {len(shapes)}")
    most = len(shapes) + _PER_TARGET * len(targets) + _MAX_UNSTORED
    if every > most:
        raise ShapeError(f"config and targets make {every} arrays; at most {most} can come from so few that are stored")
    plan = plan_of(config, targets)
    params = plan.param_shapes
    found = {**params, **plan.fixed_shapes}
    missing = found.keys() - shapes.keys() - plan.base_shapes.keys() - plan.start_shapes.keys()
    if trained is not None:
        # Parameters of weights start at numbers of the base, which a reader may not have.
        drawn_ones = params.keys() - plan.weight_param_shapes.keys()
        missing -= drawn_ones - set(checked_trained(trained, params) or params)
    left_out = params.keys() - shapes.keys() - missing
    if len(left_out) > MAX_LEFT_OUT or sum(math.prod(found[name]) for name in left_out) > MAX_DRAWN:
        raise ShapeError(
            f"{len(left_out)} frozen arrays are left out; at most {MAX_LEFT_OUT} with {MAX_DRAWN} elements in total "
            "may be"
        )
    if missing or not shapes.keys() <= found.keys():
        raise ShapeError(
            f"the arrays must be those of config and targets; missing: {summarize(missing)}; "
            f"unknown: {summarize(shapes.keys() - found.keys())}"
        )
    for name, shape in found.items():
        if shapes.get(name, shape) != shape:
            raise ShapeError(f"{name} has shape {shapes[name]}; config and targets require {shape}")
    return plan


def _checked_counts(config: Config, targets: Sequence[Target]) -> tuple[int, int]:
    """Return the numbers of all arrays of a config and of those that are stored; refuse sizes that take too long."""
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
    every, stored = _arrays_of_group(config)
    return layout.num_groups * every, layout.num_groups * stored


def _folds(config: Config, layout: Layout) -> Iterable[Sequence[int]]:
    """Return the sizes of each different network, which are to be factored: of the fold, or the group's length."""
    if is_named(config.fold):
        return {group_fold(config.fold, layout, group) for group in range(layout.num_groups)}
    lengths = {size for _, _, size in layout.same_size()}
    return [[int(each) for each in config.fold] if isinstance(config.fold, tuple) else [size] for size in lengths]


def _arrays_of_group(config: Config) -> tuple[int, int]:
    """Count the arrays of a group, without listing them, as there may be many terms: all, and those that are stored."""
    leading = "dense" if config.leading == "dense" else config.format
    names = [
        f"split{split}.{name}"
        for split in range(config.splits)
        for name in make_format(
            config.format if split == config.splits - 1 else leading, (1,) * config.order, config.rank
        ).shapes
    ]
    every = config.terms * len(names)
    sources = SourceMap(config.sources)
    if config.before is not None or any(isinstance(inner_source(source), Tied) for source in sources.values()):
        return every, 0  # how many are stored is known only from the plan

    def stored(prefix: str) -> int:
        return sum(_stored(sources.of(prefix + name) or Trained()) for name in names)

    usual = stored("")
    # Terms with keys of their own, such as term3.split0.factor0.
    terms = {key.partition(".")[0] for key in sources if key.startswith("term")}
    named = {term for term in terms if config.terms > 1 and int(term.removeprefix("term")) < config.terms}
    return every, config.terms * usual + sum(stored(f"{term}.") - usual for term in named)


def _stored(source: Source) -> int:
    """Return how many arrays of a file an array with this source has in every group."""
    multipliers = len(source.multipliers) if isinstance(source, Multiplied) else 0
    inner = inner_source(source)
    return multipliers + (inner.trained or (inner.brought and not inner.independent_of_group))


def checked_trained(trained: Any, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...] | None:
    """Return the names of the trained arrays in the order of the plan; None if all are trained."""
    if trained is None:
        return None
    if isinstance(trained, str) or not isinstance(trained, Sequence) or not all(isinstance(n, str) for n in trained):
        raise ConfigError(f"trained must be a list of names of arrays, or None for all; got {safe_repr(trained)}")
    chosen = set(trained)
    if not chosen or len(chosen) < len(trained) or not chosen <= shapes.keys():
        raise ConfigError(
            f"trained must name some of the arrays, each once; unknown: {summarize(chosen - shapes.keys())}; there are "
            f"{summarize(shapes)}"
        )
    return None if len(chosen) == len(shapes) else tuple(name for name in shapes if name in chosen)


def drawn(plan: SuperLoRA, trained: Sequence[str] | None, dtype: str) -> dict[str, Callable[[], np.ndarray]]:
    """Map each frozen array, in the order of the plan, to a function that draws it from the seed, rounded to a dtype.

    Arrays of bfloat16 are returned as float32 with rounded values.
    """
    if trained is None or plan.theta is not None or plan.point.subtracts:
        return {}  # θ is stored, as it is short; so is what starts at arrays that may not be drawn
    chosen, found = set(trained), dict[str, Callable[[], np.ndarray]]()
    kind = "float32" if dtype == "bfloat16" else dtype
    for group, start in zip(plan.groups, plan.starts(trained), strict=True):
        for name, full in group.names.items():
            if full not in chosen:
                found[full] = functools.partial(_drawn, start, name, dtype, kind)
    return found


def _drawn(start: Initializer, name: str, dtype: str, kind: str) -> np.ndarray:
    made: np.ndarray = start.make((name, dtype)).astype(kind)
    return made
