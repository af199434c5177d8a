"""Reference implementation of the library: the definitions, written out in float64 NumPy.

Nothing is sliced, pruned or reordered; sizes are found by search; products are ``einsum`` and ``numpy.kron``; F is a
dense matrix. It shares only the random draws with the rest of the library, and these are checked against known answers.
:mod:`tnadapt.verify` and the tests compare results with it. It is for small sizes: F takes L² elements.
"""

from __future__ import annotations

import itertools
import math
import string
from collections.abc import Hashable, Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tnadapt.algebra.config import Config
from tnadapt.algebra.formats import FORMATS
from tnadapt.algebra.maps import KINDS, Map, Recipe, input_length, make_map, make_map_on_weights
from tnadapt.errors import ConfigError

from ._reference_circuit import circuit, circuit_count
from ._reference_maps import LINEAR_PARTS, matrix_of, tanhshrink

__all__ = ["count", "count_of_magnitudes", "deltas", "positions", "project"]

Float = NDArray[np.floating[Any]]
Params = Mapping[str, Float]
Shapes = Sequence[tuple[int, int]]


def positions(
    config: Config,
    shapes: Shapes,
    layers: Sequence[Hashable] | None = None,
    roles: Sequence[Hashable] | None = None,
) -> list[NDArray[np.int64]]:
    """Return the elements of the vector of all updates that each group holds.

    Parameters
    ----------
    config : Config
    shapes : sequence of (rows, cols)
    layers, roles : sequence of hashable, optional

    Returns
    -------
    list of ndarray of int64
        One array per group, in the order of the group's vector.

    Examples
    --------
    >>> [group.tolist() for group in positions(Config(groups=2), [(1, 2), (1, 3)])]
    [[0, 1, 2], [3, 4]]
    """
    sizes = [rows * cols for rows, cols in shapes]
    of_weight = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1].tolist())
    if isinstance(config.groups, int):
        length = math.ceil(sum(sizes) / config.groups)
        return [np.arange(lo, min(lo + length, sum(sizes))) for lo in range(0, sum(sizes), length)]
    if config.groups == "weight":
        members = [[weight] for weight in range(len(shapes))]
    elif config.groups in ("layer", "role"):
        keys = layers if config.groups == "layer" else roles
        assert keys is not None
        members = [[w for w, key in enumerate(keys) if key == wanted] for wanted in dict.fromkeys(keys)]
    else:
        members = [list(group) for group in config.groups if not isinstance(group, str)]
    return [np.concatenate([of_weight[weight] for weight in group]) for group in members]


def deltas(
    config: Config,
    shapes: Shapes,
    params: Params,
    layers: Sequence[Hashable] | None = None,
    start: Params | None = None,
    roles: Sequence[Hashable] | None = None,
) -> list[Float]:
    """Return ΔW of every weight from the textbook formula.

    Parameters
    ----------
    config : Config
    shapes : sequence of (rows, cols)
    params : mapping of str to ndarray of float64
        Named as by :class:`tnadapt.SuperLoRA`.
    layers : sequence of hashable, optional
    start : mapping of str to ndarray, optional
        The initial parameters, which a nonlinear F needs, and every start but "zero".
    roles : sequence of hashable, optional

    Returns
    -------
    list of ndarray of float64, shape (rows, cols)

    Examples
    --------
    >>> b, a = np.array([[1.0], [2.0]]), np.array([[3.0], [4.0]])
    >>> deltas(Config(rank=1), [(2, 2)], {"group0.split0.factor0": b, "group0.split0.factor1": a})
    [array([[3., 4.],
           [6., 8.]])]
    """
    edges = np.cumsum([rows * cols for rows, cols in shapes]).tolist()
    owner = np.repeat(np.arange(len(shapes)), [rows * cols for rows, cols in shapes])
    long_vector = np.empty(edges[-1])
    for group, where in enumerate(positions(config, shapes, layers, roles)):
        n, weights = len(where), _weights(config, shapes, owner[where])
        n_in = _length(config, n, weights)
        sizes = _fold(config, n_in, [shapes[weight] for weight in np.unique(owner[where])])
        stream = 0 if config.shared else group
        y = project(config, _network(config, params, group, sizes).reshape(-1)[:n_in], n, stream, weights)
        if config.start != "zero" or not _map(config, n_in, n, stream, weights).linear:
            assert start is not None
            y = y - project(config, _network(config, start, group, sizes).reshape(-1)[:n_in], n, stream, weights)
        long_vector[where] = y
    return [part.reshape(shape) for part, shape in zip(np.split(long_vector, edges[:-1]), shapes, strict=True)]


def _weights(config: Config, shapes: Shapes, owners: NDArray[np.int64]) -> Shapes | None:
    """Return the shapes of a group's weights, in order, if F is applied to each; None if it is to the vector."""
    if config.on == "vector":
        return None
    return [shapes[weight] for weight in dict.fromkeys(owners.tolist())]


def _length(config: Config, n: int, weights: Shapes | None) -> int:
    """Return the length before F. Of a map that determines it by its settings, there is no second definition."""
    if weights is None and config.projection in KINDS:
        return max(1, math.ceil(Decimal(str(config.ratio)) * n))
    return input_length(config.projection, n, config.ratio, weights)


def _map(config: Config, n_in: int, n_out: int, stream: int, weights: Shapes | None) -> Map:
    if weights is None:
        return make_map(config.projection, n_in, n_out, config.seed, stream)
    return make_map_on_weights(config.projection, weights, config.ratio, config.seed, stream)


def _hypercube(n: int, order: int) -> int:
    return next(d for d in itertools.count(1) if d**order >= n)


def _fold(config: Config, n: int, weights: Shapes) -> tuple[int, ...]:
    if config.order == 1 and config.axes is None:
        return (n,)
    if config.fold == "stack":
        columns = math.gcd(*(cols for _, cols in weights))
        return (n // columns, columns)
    d = _hypercube(n, config.order)
    if config.fold == "hypercube":
        return (d,) * config.order
    if config.fold == "balanced":
        descending = itertools.combinations_with_replacement((d, d - 1), config.order)
        return min((sizes for sizes in descending if math.prod(sizes) >= n), key=math.prod)
    rows, cols = weights[0]
    named = {"weights": len(weights), "rows": rows, "cols": cols}
    # "rows/12" is a twelfth of the rows.
    parts = (str(size).partition("/") for size in config.fold)
    return tuple(int(named.get(name, name)) // int(divisor or 1) for name, _, divisor in parts)


def _even_factors(d: int, parts: int) -> tuple[int, ...]:
    """Find the factorization of least sum by exhaustive search; ties go to the larger first factor."""
    divisors = [k for k in range(1, d + 1) if d % k == 0]
    exact = (f for f in itertools.combinations_with_replacement(divisors, parts) if math.prod(f) == d)
    return min(exact, key=lambda factors: (sum(factors), [-f for f in factors]))


def _axes(config: Config) -> list[tuple[int, ...]]:
    return [axis if isinstance(axis, tuple) else (axis,) for axis in config.axes or ()]


def _split_sizes(config: Config, sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    k = config.splits
    if config.axes is not None:
        return [tuple(math.prod(sizes[digit] for digit in axis) for axis in _axes(config))] * k
    if config.combine == "hadamard" or k == 1:
        return [sizes] * k
    if config.split_size == "balanced":
        per_mode = [_even_factors(d, k) for d in sizes]
        return [tuple(factors[split] for factors in per_mode) for split in range(k)]
    own = isinstance(config.split_size, tuple)
    f = [int(config.split_size[m] if own else config.split_size) for m in range(len(sizes))]  # type: ignore[index,arg-type]
    return [tuple(f)] * (k - 1) + [tuple(math.ceil(d / f[m] ** (k - 1)) for m, d in enumerate(sizes))]


def _network(config: Config, params: Params, group: int, sizes: tuple[int, ...]) -> Float:
    total: Float | float = 0.0
    for term in range(config.terms):
        tensor: Float | None = None
        for k, split_sizes in enumerate(_split_sizes(config, sizes)):
            prefix = f"group{group}." + (f"term{term}." if config.terms > 1 else "") + f"split{k}."
            own = {name.removeprefix(prefix): array for name, array in params.items() if name.startswith(prefix)}
            last = k == config.splits - 1
            split = _split(config, config.format if last or config.leading == "same" else "dense", own, split_sizes)
            if tensor is None:
                tensor = split
            else:
                tensor = tensor * split if config.combine == "hadamard" else np.kron(tensor, split)
        assert tensor is not None
        total = total + (tensor[tuple(slice(d) for d in sizes)] if config.axes is None else tensor)
    if config.axes is not None:
        # Take each element of the folded tensor from its place in the tensor over the network's modes.
        place = np.zeros(sizes, np.int64)
        for digit in itertools.chain.from_iterable(_axes(config)):
            place = place * sizes[digit] + np.indices(sizes)[digit]
        total = np.asarray(total).reshape(-1)[place]
    rank = config.rank if isinstance(config.rank, int) else max([r for r in config.rank if r is not None], default=1)
    return np.asarray(total * (1.0 if config.alpha is None else config.alpha / rank))


def _split(config: Config, kind: str, own: Params, sizes: tuple[int, ...]) -> Float:
    order = len(sizes)
    if kind not in FORMATS.built_in:
        # The formula that a registered format declares, contracted by NumPy.
        formula = FORMATS.find(kind)(sizes, config.rank).formula
        return np.asarray(np.einsum(formula, *own.values(), optimize=True))
    modes, ranks = string.ascii_lowercase[:order], string.ascii_uppercase[: order + 1]
    if kind == "dense":
        return own["dense"]
    if kind in ("cp", "cp-weighted"):
        operands = [own[f"factor{m}"] for m in range(order)]
        inputs = [f"{mode}R" for mode in modes]
        if kind == "cp-weighted":
            operands, inputs = [own["weights"], *operands], ["R", *inputs]
        return np.asarray(np.einsum(",".join(inputs) + "->" + modes, *operands, optimize=True))
    if kind == "cp-batched":
        if order < 3:
            return own[f"factor{order - 1}"]
        operands = [own[f"factor{m}"] for m in range(1, order)]
        inputs = [f"{modes[0]}{mode}R" for mode in modes[1:]]
        return np.asarray(np.einsum(",".join(inputs) + "->" + modes, *operands, optimize=True))
    if kind == "tucker":
        present = [m for m in range(order) if f"factor{m}" in own]
        core = "".join(ranks[m] if m in present else modes[m] for m in range(order))
        inputs = [core, *(modes[m] + ranks[m] for m in present)]
        operands = [own["core"], *(own[f"factor{m}"] for m in present)]
        return np.asarray(np.einsum(",".join(inputs) + "->" + modes, *operands, optimize=True))
    if kind == "circuit":
        return circuit(own, sizes)
    if kind != "tt":
        raise ConfigError(f"format {kind!r} has no reference implementation")
    inputs = [ranks[m] + modes[m] + ranks[m + 1] for m in range(order)]
    operands = [own[f"core{m}"] for m in range(order)]
    # The outer bonds have size 1: summing over them changes nothing.
    return np.asarray(np.einsum(",".join(inputs) + "->" + modes, *operands, optimize=True))


def count(
    config: Config,
    shapes: Shapes,
    layers: Sequence[Hashable] | None = None,
    roles: Sequence[Hashable] | None = None,
) -> int:
    """Count the trainable elements with the formula of each format.

    Parameters
    ----------
    config : Config
    shapes : sequence of (rows, cols)
    layers, roles : sequence of hashable, optional

    Returns
    -------
    int

    Examples
    --------
    >>> count(Config(rank=4), [(768, 768)])
    6144
    """
    owner = np.repeat(np.arange(len(shapes)), [rows * cols for rows, cols in shapes])
    total = count_of_magnitudes(config, shapes)
    for where in positions(config, shapes, layers, roles):
        n_in = _length(config, len(where), _weights(config, shapes, owner[where]))
        own = [shapes[weight] for weight in np.unique(owner[where])]
        for k, sizes in enumerate(_split_sizes(config, _fold(config, n_in, own))):
            last = k == config.splits - 1
            kind = config.format if last or config.leading == "same" else "dense"
            total += config.terms * _split_count(kind, config.rank, sizes)
    return total


def count_of_magnitudes(config: Config, shapes: Shapes) -> int:
    """Count the parameters that weights have next to those of the updates.

    Examples
    --------
    >>> count_of_magnitudes(Config(apply="magnitude"), [(3, 2), (5, 4)])
    8
    >>> count_of_magnitudes(Config(apply="hadamard"), [(3, 2)])
    0
    """
    if config.apply != "magnitude":
        return 0
    return sum(rows if config.magnitude_axis == "rows" else cols for rows, cols in shapes)


def _split_count(kind: str, rank: Any, sizes: tuple[int, ...]) -> int:
    order = len(sizes)
    if kind not in FORMATS.built_in:
        return sum(math.prod(shape) for shape in FORMATS.find(kind)(sizes, rank).shapes.values())
    if kind == "dense":
        return math.prod(sizes)
    if kind == "cp":
        return int(rank) * sum(sizes)
    if kind == "cp-weighted":
        return int(rank) + int(rank) * sum(sizes)
    if kind == "cp-batched":
        return int(rank) * sizes[0] * sum(sizes[1:]) if order > 2 else math.prod(sizes)
    if kind == "tucker":
        ranks = [rank] * order if isinstance(rank, int) else list(rank)
        cut = [d if r is None else min(r, d) for r, d in zip(ranks, sizes, strict=True)]
        return math.prod(cut) + sum(d * r for d, r, given in zip(sizes, cut, ranks, strict=True) if given is not None)
    if kind == "circuit":
        return circuit_count(sizes)
    if kind != "tt":
        raise ConfigError(f"format {kind!r} has no reference count")
    wanted = [rank] * (order - 1) if isinstance(rank, int) else list(rank)
    bonds = [1, *(min(wanted[m], math.prod(sizes[: m + 1]), math.prod(sizes[m + 1 :])) for m in range(order - 1)), 1]
    return sum(bonds[m] * d * bonds[m + 1] for m, d in enumerate(sizes))


def project(config: Config, x: Float, n_out: int, stream: int = 0, weights: Shapes | None = None) -> Float:
    """Compute F(x) with the dense matrix (the identity needs none).

    Parameters
    ----------
    config : Config
        Its ``projection``, ``on``, ``ratio`` and ``seed`` are used.
    x : ndarray, shape (n_in,)
    n_out : int
    stream : int
        The group whose draws are used.
    weights : sequence of (rows, cols), optional
        The weights of the group, for ``on="weight"``.

    Returns
    -------
    ndarray of float64, shape (n_out,)

    Examples
    --------
    >>> project(Config(projection="shuffle"), np.array([0.0, 1.0, 2.0, 3.0]), 4)
    array([3., 1., 2., 0.])
    """
    if config.projection == "identity":
        return np.asarray(x)
    found = _map(config, len(x), n_out, stream, weights)
    y = matrix_of(found) @ x
    if _last(config.projection) in LINEAR_PARTS:
        return tanhshrink(y)
    if not found.linear:
        raise ConfigError(f"projection {config.projection!r} is not linear and has no reference implementation")
    return np.asarray(y)


def _last(projection: Recipe) -> object:
    return projection[-1] if isinstance(projection, tuple) else projection
