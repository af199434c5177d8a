"""Hypothesis strategies for configs, shapes, plans and their parameters."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tnadapt.algebra.applying import APPLYING, AXES
from tnadapt.algebra.config import COMBINES, LEADINGS, Config
from tnadapt.algebra.folding import FOLDS
from tnadapt.algebra.formats import FORMATS
from tnadapt.algebra.maps import KINDS, Recipe, takes_ratio
from tnadapt.algebra.starting_points import STARTS
from tnadapt.algebra.update_plan import UpdatePlan
from tnadapt.errors import ShapeError

ALPHAS = st.none() | st.sampled_from([0.5, 8.0])
SEEDS = st.sampled_from([0, 1, 2**40 + 7, 2**64 - 1])
# Groups of whole weights.
WHOLE = ("weight", "layer", "listed")


@st.composite
def shapes(draw: st.DrawFn, max_weights: int = 4, max_side: int = 9) -> list[tuple[int, int]]:
    """Draw shapes of one to ``max_weights`` weights, equal or not, with sides 1 to ``max_side``.

    Examples
    --------
    >>> from hypothesis import find
    >>> find(shapes(), lambda shapes: len(shapes) == 2)
    [(1, 1), (1, 1)]
    """
    side = st.integers(1, max_side)
    if draw(st.booleans()):
        return [(draw(side), draw(side))] * draw(st.integers(1, max_weights))
    return draw(st.lists(st.tuples(side, side), min_size=1, max_size=max_weights))


@st.composite
def configs(
    draw: st.DrawFn,
    weights: list[tuple[int, int]],
    projections: tuple[Recipe, ...] = KINDS,
    formats: tuple[str, ...] = FORMATS.built_in,
    on: str = "vector",
) -> Config:
    """Draw configs of every kind for weights of these shapes.

    Parameters
    ----------
    weights : list of (rows, cols)
    projections : tuple
        Projections to choose from: names, settings of maps, or tuples of these. They must fit the weights.
    on : "vector" or "weight"
        What they are applied to.

    Returns
    -------
    strategy of Config
        Valid by itself. A "stack" fold additionally has to fit the groups, which :func:`plans` ensures. One of four has
        any ``apply`` and any ``start``. Starts that are computed from the base weight make LoRA's factors, and are
        drawn where projections and formats allow these.
    """
    settings = draw(changes(projections, formats, on)) if draw(st.integers(0, 3)) == 3 else {}
    if STARTS[settings.get("start", "zero")].needs_base:
        factors = draw(st.integers(1, min(3, *(min(shape) for shape in weights))))
        return Config(factors, alpha=draw(ALPHAS), seed=draw(SEEDS), **settings)
    size = sum(rows * cols for rows, cols in weights)
    order = draw(st.integers(1, 4))
    projection = draw(st.sampled_from(projections))
    ratio = draw(st.sampled_from([1.0, 0.5, 0.3, 0.07])) if takes_ratio(projection) else 1.0
    splits = draw(st.integers(1, 3))
    combine = draw(st.sampled_from(COMBINES))
    name = draw(st.sampled_from(formats))
    small = st.integers(1, 3)
    rank: Any = draw(small)
    if name == "tucker" and draw(st.booleans()):
        rank = draw(st.tuples(*[st.none() | small] * order))
    elif name == "tt" and draw(st.booleans()):
        rank = draw(st.tuples(*[small] * (order - 1)))
    fold: Any = draw(st.sampled_from([f for f in FOLDS if order <= 2 or f != "stack"]))
    # The length before other maps than the paper's may be larger than the weights.
    if fold != "stack" and projection in KINDS and draw(st.integers(0, 4)) == 0:
        # Explicit sizes, large enough for any group.
        side = next(d for d in itertools.count(1) if d**order >= size)
        fold = tuple(draw(st.integers(side, side + 2)) for _ in range(order))
    groups: Any = draw(st.sampled_from(["weight", "layer", "some", "listed"] if on == "vector" else WHOLE))
    if groups == "some":
        groups = draw(st.integers(1, min(size, 5)))
    elif groups == "listed":
        indices = draw(st.permutations(range(len(weights))))
        cut = draw(st.integers(0, len(weights) - 1))
        groups = [group for group in (indices[:cut], indices[cut:]) if group]
    return Config(
        rank=rank,
        order=order,
        splits=splits,
        groups=groups,
        fold=fold,
        format=name,
        combine=combine,
        split_size=(
            draw(st.just("balanced") | st.integers(1, 3) | st.tuples(*[st.integers(1, 3)] * order))
            if combine == "kronecker"
            else "balanced"
        ),
        leading=draw(st.sampled_from(LEADINGS)),
        terms=draw(st.sampled_from([1, 1, 2])),
        projection=projection,
        ratio=ratio,
        shared=draw(st.booleans()),
        alpha=draw(ALPHAS),
        seed=draw(SEEDS),
        on=on,
        **settings,
    )


@st.composite
def changes(draw: st.DrawFn, projections: tuple[Recipe, ...], formats: tuple[str, ...], on: str) -> dict[str, Any]:
    """Draw how ΔW meets W, and where training starts."""
    apply = draw(st.sampled_from(APPLYING.built_in))
    axis = draw(st.sampled_from(tuple(AXES))) if APPLYING[apply]().rescales else "rows"
    lora = "identity" in projections and "cp" in formats and on == "vector"
    starts = [name for name in STARTS.built_in if lora or not STARTS[name].needs_base]
    return {"apply": apply, "magnitude_axis": axis, "start": draw(st.sampled_from(starts))}


@st.composite
def base_weights(draw: st.DrawFn, weights: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """Draw base weights of these shapes: random float64 NumPy arrays."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return [rng.normal(size=shape) for shape in weights]


@st.composite
def plans(draw: st.DrawFn, projections: tuple[Recipe, ...] = KINDS, on: str = "vector") -> UpdatePlan:
    """Draw plans of every kind on small weights: ``UpdatePlan(config, shapes, layers)``.

    Base weights are random where a plan computes something from them. So are the arrays of a given start.

    Parameters
    ----------
    projections : tuple
        Projections to choose from, as for :func:`configs`.
    on : "vector" or "weight"
    """
    weights = draw(shapes())
    config = draw(configs(weights, projections, on=on))
    layers = [draw(st.integers(0, 1)) for _ in weights]
    try:
        plan = UpdatePlan(config, weights, layers)
    except ShapeError:
        # A stack does not fit the groups: use the fold that the error message suggests.
        assert config.fold == "stack"
        plan = UpdatePlan(config.replace(fold="hypercube"), weights, layers)
    if plan.point.brought:
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        # The others start as usual.
        names = draw(st.sets(st.sampled_from(list(plan.array_shapes))))
        plan = plan.with_start({name: rng.normal(size=plan.array_shapes[name]) for name in sorted(names)})
    return plan.with_base(draw(base_weights(weights))) if plan.base_shapes or plan.weight_param_shapes else plan


@st.composite
def parameters(draw: st.DrawFn, plan: UpdatePlan) -> dict[str, np.ndarray]:
    """Draw random float64 parameters of a plan, as NumPy arrays.

    Parameters
    ----------
    plan : UpdatePlan
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return {name: rng.normal(size=shape) for name, shape in plan.param_shapes.items()}
