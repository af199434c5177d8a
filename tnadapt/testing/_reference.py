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
from tnadapt.algebra.maps import KINDS, BroughtMap, Map, input_length, make_map, make_map_on_weights
from tnadapt.algebra.sources import Mixed, Multiplied, Scaled, Source, Tied, Trained
from tnadapt.errors import ConfigError

# -- Circuits: gates applied one after another to the unit vectors of the columns --------------------------------------


Float = NDArray[np.floating[Any]]


def circuit(gates: Mapping[str, Float], sizes: tuple[int, ...]) -> Float:
    """Return the tensor of a circuit.

    Parameters
    ----------
    gates : mapping of str to ndarray
        In order.
    sizes : tuple of int
        The digits of the rows, then those of the columns.

    Examples
    --------
    >>> circuit({"gate0": np.arange(6.0).reshape(2, 3)}, (2, 3)).tolist()
    [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    """
    axes = -(-len(sizes) // 2)
    cols = sizes[axes:]
    # One axis per digit, of length 1 for a row digit without a column digit, and the unit vectors last.
    state = np.eye(math.prod(cols)).reshape(*cols, *(1,) * (axes - len(cols)), -1)
    for gate, pair in zip(gates.values(), _pairs(axes), strict=True):
        before = tuple(state.shape[axis] for axis in pair)
        after = gate.shape[: len(pair)]
        turned = np.moveaxis(state, pair, range(len(pair)))
        rest = turned.shape[len(pair) :]
        turned = gate.reshape(math.prod(after), math.prod(before)) @ turned.reshape(math.prod(before), -1)
        state = np.moveaxis(turned.reshape(*after, *rest), range(len(pair)), pair)
    return np.asarray(state.reshape(sizes), np.float64)


def circuit_count(sizes: tuple[int, ...]) -> int:
    """Return the number of elements of the gates.

    Examples
    --------
    >>> circuit_count((2, 3, 2, 3))
    36
    """
    axes = -(-len(sizes) // 2)
    now, total = [*sizes[axes:], *(1,) * (axes - len(sizes) // 2)], 0
    for pair in _pairs(axes):
        total += math.prod(sizes[axis] * now[axis] for axis in pair)
        for axis in pair:
            now[axis] = sizes[axis]
    return total


def _pairs(axes: int) -> list[tuple[int, ...]]:
    return list(itertools.combinations(range(axes), 2)) or [(0,)]


# -- Maps F: the dense matrix of each, and tanhshrink ------------------------------------------------------------------


# The longest side of a dense matrix of F: half a gigabyte.
LARGEST = 1 << 13


def matrix_of(f: Map) -> Float:
    """Return the dense matrix of a linear map, or of the linear part of a nonlinear one.

    Raises
    ------
    ConfigError
        If a side is longer than 2**13, or the map defines no matrix.

    Notes
    -----
    Maps define it independently of what they compute with.

    Examples
    --------
    >>> matrix_of(make_map("shuffle", 4, 4, seed=0))
    array([[0., 0., 0., 1.],
           [0., 1., 0., 0.],
           [0., 0., 1., 0.],
           [1., 0., 0., 0.]])
    """
    n_in, n_out = f.n_in, f.n_out
    if max(n_in, n_out) > LARGEST:
        raise ConfigError(
            f"the dense matrix of F has {n_out} x {n_in} elements; it is for checking small ones, of up to {LARGEST} "
            "per side: give smaller shapes, or more groups"
        )
    return np.asarray(f.linear_part.matrix(), np.float64)


def tanhshrink(t: Float) -> Float:
    """Compute ``t - tanh(t)``; near 0 by a series of ``(t cosh t - sinh t) / cosh t``, whose terms do not cancel.

    Examples
    --------
    >>> tanhshrink(np.array([1e-5, 5.0]))
    array([3.33333333e-16, 4.00009080e+00])
    """
    near = np.where(np.abs(t) < 3.0, t, 0.0)
    terms = [2 * k * near ** (2 * k + 1) / math.factorial(2 * k + 1) for k in range(1, 26)]
    return np.asarray(np.where(np.abs(t) < 3.0, sum(terms) / np.cosh(near), t - np.tanh(t)))


# -- Counts, starts and updates of a plan ------------------------------------------------------------------------------


Params = Mapping[str, Float]
Shapes = Sequence[tuple[int, int]]
Keys = Sequence[Hashable] | None


def positions(config: Config, shapes: Shapes, layers: Keys = None, roles: Keys = None) -> list[NDArray[np.int64]]:
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
    config: Config, shapes: Shapes, params: Params, layers: Keys = None, start: Params | None = None, roles: Keys = None
) -> list[Float]:
    """Return ΔW of every weight from the textbook formula.

    Parameters
    ----------
    config : Config
    shapes : sequence of (rows, cols)
    params : mapping of str to ndarray of float64
        Named as by :class:`tnadapt.UpdatePlan`.
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
    """Return the shapes of a group's weights, in order, if F is applied to each, or None if to the vector."""
    if config.on == "vector":
        return None
    return [shapes[weight] for weight in dict.fromkeys(owners.tolist())]


def _length(config: Config, n: int, weights: Shapes | None) -> int:
    """Return the length before F."""
    # If the settings of a map determine the length, it has no second definition here.
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
    """Find the factorization of least sum by exhaustive search, preferring larger first factors."""
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
    is_tuple = isinstance(config.split_size, tuple)
    f = [int(config.split_size[m] if is_tuple else config.split_size) for m in range(len(sizes))]  # type: ignore[index,arg-type]
    return [tuple(f)] * (k - 1) + [tuple(math.ceil(d / f[m] ** (k - 1)) for m, d in enumerate(sizes))]


def _network(config: Config, params: Params, group: int, sizes: tuple[int, ...]) -> Float:
    total: Float | float = 0.0
    for term in range(config.terms):
        tensor: Float | None = None
        for k, split_sizes in enumerate(_split_sizes(config, sizes)):
            prefix = f"group{group}." + (f"term{term}." if config.terms > 1 else "") + f"split{k}."
            arrays = {name.removeprefix(prefix): array for name, array in params.items() if name.startswith(prefix)}
            last = k == config.splits - 1
            split = _split(config, config.format if last or config.leading == "same" else "dense", arrays, split_sizes)
            combine = np.multiply if config.combine == "hadamard" else np.kron
            tensor = split if tensor is None else combine(tensor, split)
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


def _split(config: Config, format_name: str, arrays: Params, sizes: tuple[int, ...]) -> Float:
    order = len(sizes)
    if format_name not in FORMATS.built_in:
        # The formula that a registered format declares, contracted by NumPy.
        formula = FORMATS.find(format_name)(sizes, config.rank).formula
        return np.asarray(np.einsum(formula, *arrays.values(), optimize=True))
    modes, ranks = string.ascii_lowercase[:order], string.ascii_uppercase[: order + 1]
    if format_name == "dense":
        return arrays["dense"]
    if format_name == "circuit":
        return circuit(arrays, sizes)
    if format_name == "cp-batched" and order < 3:
        return arrays[f"factor{order - 1}"]
    if format_name in ("cp", "cp-weighted"):
        indices = {f"factor{m}": f"{modes[m]}R" for m in range(order)}
        if format_name == "cp-weighted":
            indices["weights"] = "R"
    elif format_name == "cp-batched":
        indices = {f"factor{m}": f"{modes[0]}{modes[m]}R" for m in range(1, order)}
    elif format_name == "tucker":
        indices = {f"factor{m}": modes[m] + ranks[m] for m in range(order) if f"factor{m}" in arrays}
        indices["core"] = "".join(ranks[m] if f"factor{m}" in indices else modes[m] for m in range(order))
    elif format_name == "tt":
        # The outer bonds have size 1: summing over them changes nothing.
        indices = {f"core{m}": ranks[m] + modes[m] + ranks[m + 1] for m in range(order)}
    else:
        raise ConfigError(f"format {format_name!r} has no reference implementation")
    formula = ",".join(indices.values()) + "->" + modes
    return np.asarray(np.einsum(formula, *(arrays[name] for name in indices), optimize=True))


def count(config: Config, shapes: Shapes, layers: Keys = None, roles: Keys = None) -> int:
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
        group_shapes = [shapes[weight] for weight in np.unique(owner[where])]
        for k, sizes in enumerate(_split_sizes(config, _fold(config, n_in, group_shapes))):
            last = k == config.splits - 1
            format_name = config.format if last or config.leading == "same" else "dense"
            total += config.terms * _split_count(format_name, config.rank, sizes)
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


def _split_count(format_name: str, rank: Any, sizes: tuple[int, ...]) -> int:
    order = len(sizes)
    if format_name not in FORMATS.built_in:
        return sum(math.prod(shape) for shape in FORMATS.find(format_name)(sizes, rank).shapes.values())
    if format_name == "dense":
        return math.prod(sizes)
    if format_name == "cp":
        return int(rank) * sum(sizes)
    if format_name == "cp-weighted":
        return int(rank) + int(rank) * sum(sizes)
    if format_name == "cp-batched":
        return int(rank) * sizes[0] * sum(sizes[1:]) if order > 2 else math.prod(sizes)
    if format_name == "tucker":
        ranks = [rank] * order if isinstance(rank, int) else list(rank)
        cut = [d if r is None else min(r, d) for r, d in zip(ranks, sizes, strict=True)]
        factors = (d * r for d, r, given in zip(sizes, cut, ranks, strict=True) if given is not None)
        return math.prod(cut) + sum(factors)
    if format_name == "circuit":
        return circuit_count(sizes)
    if format_name != "tt":
        raise ConfigError(f"format {format_name!r} has no reference count")
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
    projection = _map(config, len(x), n_out, stream, weights)
    y: Float = matrix_of(projection) @ x
    if projection.linear:
        return y
    last = config.projection[-1] if isinstance(config.projection, tuple) else config.projection
    if last not in ("nonlinear", "nonlinear_v2"):
        raise ConfigError(f"projection {config.projection!r} is not linear and has no reference implementation")
    return tanhshrink(y)


# -- The arrays of a plan: sources, and the map before the network -----------------------------------------------------

# Names are followed one by one, and P is a dense matrix. Frozen arrays that a source computes are given: they have no
# second definition.


Names = Sequence[Mapping[str, tuple[int, ...]]]

# Group index of the draws of the first map before a network.
_FIRST_STREAM = 2**31


def network_arrays(config: Config, names: Names, params: Params, frozen: Params, begun: Params) -> dict[str, Float]:
    """Return all arrays of all networks by their full names.

    Parameters
    ----------
    config : Config
    names : sequence of dict of str to tuple of int
        For each group, the network's arrays and their shapes, in order.
    params : mapping of str to ndarray of float64
        The parameters.
    frozen : mapping of str to ndarray
        What sources compute, and what the map before the network is given, by full names.
    begun : mapping of str to ndarray
        Initial arrays, which θ moves.

    Examples
    --------
    >>> tied = Config(rank=1, sources={"factor1": Tied("group0.split0.factor1")})
    >>> shapes = [{"split0.factor0": (2, 1), "split0.factor1": (3, 1)}] * 2
    >>> params = {name: np.ones(shape) for name, shape in trained_shapes(tied, shapes).items()}
    >>> list(network_arrays(tied, shapes, params, {}, {}))
    ['group0.split0.factor0', 'group0.split0.factor1', 'group1.split0.factor0', 'group1.split0.factor1']
    """
    if config.before is not None:
        params = _from_theta(config, trained_shapes(config, names), params, frozen, begun)
    return {
        f"group{group}.{name}": _value(config, group, name, _source(config, name), params, frozen)
        for group, arrays in enumerate(names)
        for name in arrays
    }


def trained_shapes(config: Config, names: Names) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the arrays and diagonals that are trained, or made from θ, in order."""
    trained: dict[str, tuple[int, ...]] = {}
    for group, arrays in enumerate(names):
        for name, shape in arrays.items():
            full, source = f"group{group}.{name}", _source(config, name)
            inner = source.of if isinstance(source, Multiplied) else source
            if isinstance(inner, Trained) or (isinstance(inner, Tied) and _target(inner, group) == (group, name)):
                trained[full] = shape
            if isinstance(source, Scaled):
                trained |= {f"{full}.size": shape[:1]} if source.size else {}
                trained |= {f"{full}.rank": shape[1:]} if source.rank else {}
            if isinstance(source, Mixed):
                trained[f"{full}.mix"] = shape[1], shape[1]
    return trained


def _source(config: Config, name: str) -> Source:
    words = name.split(".")
    keys = [".".join(words[start:]) for start in range(len(words))]
    return next((config.sources[key] for key in keys if key in config.sources), Trained())


def _target(tied: Tied, group: int) -> tuple[int, str]:
    first, _, rest = tied.to.partition(".")
    return (int(first.removeprefix("group")), rest) if first.startswith("group") else (group, tied.to)


def _value(config: Config, group: int, name: str, source: Source, params: Params, frozen: Params) -> Float:
    full = f"group{group}.{name}"
    if isinstance(source, Scaled):
        array = _value(config, group, name, source.of, params, frozen)
        if source.size:
            array = np.diag(params[f"{full}.size"]) @ array
        return array @ np.diag(params[f"{full}.rank"]) if source.rank else array
    if isinstance(source, Mixed):
        return _value(config, group, name, source.of, params, frozen) @ params[f"{full}.mix"]
    if isinstance(source, Tied):
        other, theirs = _target(source, group)
        if (other, theirs) == (group, name):
            return params[full]
        target_source = _source(config, theirs)
        # An array with multipliers of its own is tied to the array under the other one's multipliers.
        if isinstance(target_source, Multiplied) and isinstance(_source(config, name), Multiplied):
            target_source = target_source.of
        return _value(config, other, theirs, target_source, params, frozen)
    return params[full] if source.trained else frozen[full]


def _from_theta(
    config: Config, shapes: Mapping[str, tuple[int, ...]], params: Params, frozen: Params, begun: Params
) -> dict[str, Float]:
    scopes: dict[str, list[str]] = {}
    for full in shapes:
        scope = {"plan": "", "group": full.split(".")[0] + ".", "array": full + "."}[config.scope]
        scopes.setdefault(scope + "theta", []).append(full)
    arrays: dict[str, Float] = {}
    assert config.before is not None
    for stream, (theta, names) in enumerate(scopes.items()):
        sizes = [math.prod(shapes[full]) for full in names]
        taken = make_map(config.before, len(params[theta]), sum(sizes), config.seed, _FIRST_STREAM + stream)
        if isinstance(taken, BroughtMap):
            taken.bring(frozen[f"{theta}.{taken.brings}"])
        parts = np.split(matrix_of(taken) @ params[theta], np.cumsum(sizes)[:-1])
        for full, part in zip(names, parts, strict=True):
            arrays[full] = part.reshape(shapes[full]) + (begun[full] if config.offset else 0.0)
    return arrays
