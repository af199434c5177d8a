"""Initial values of the arrays: which is zero and how large the others are, so that ΔW is zero and can be trained.

**Linear F.** In every term, one array is zero: the one of the last split that carries the leading mode, in the role
of ``lora_B``. All other arrays are random, with a common root mean square σ. ΔW is then exactly zero, and the zero
array has a gradient.

**Arrays frozen during training.** If that array is frozen and others are trained, one of the trained arrays is zero
instead: the first one of the last split of the term that has a trained array, CP weights last. The frozen array is
then random like the others, from its own stream, with the σ that belongs to the new choice. Which array is zero
depends only on which are trained.

**Arrays of a source.** Arrays that ``Config.sources`` freezes are not drawn here. The array that starts at zero is then
one of the others, by the same rule, and σ takes the mean square of the frozen ones into account. Of the trained
multipliers of a frozen array (:class:`tnadapt.sources.Scaled`, :class:`tnadapt.sources.Mixed`), the first one starts at
zero; the others start at one, or at their ``start``. A multiplier with a ``start`` of 0 is the one that makes its term
zero. An array that is tied to another one starts like it; a term that is zero by such an array needs no other.

**Nonlinear F.** ``tanhshrink'(0) = 0``, so that nothing would ever move from a zero start. All arrays are random with
a common σ, and ΔW is ``F(x) - F(x_start)``, with ``x_start`` recomputed from the seed.

**Given starts.** With ``Config.start`` other than "zero", ΔW is ``net(x) - net(x_0)`` in the same way. Arrays of x_0
that are neither given nor computed from the base start as above. With "random" no array of x_0 is zero, and the only
random array of a product has σ = ``STEP``. Which arrays are trained does not affect x_0.

**σ** makes the first SGD step change ΔW equally, whatever the rank, order, splits, terms and ρ are. For a white
gradient and a scale of 1, the root mean square of ΔW after one step is ``STEP`` times that of the same step of dense
fine-tuning. This is what PEFT's LoRA of rank 8 on 768 columns does, so that its learning rates carry over; the scale
``alpha / rank`` enters squared, as it does there. Let Z be the zero array, let each element of ΔW be a sum over q of
its entries, and let ΔW have n elements. The step is ``V * sqrt(q (q + P))`` times the dense one, where V is the
variance of what multiplies an entry of Z, and ``P = n q / |Z|`` is the number of elements of ΔW that an entry
affects. If no array is random (dense, and every format at order 1), there is nothing to scale, and the step is that
of dense fine-tuning times the rank.

**Draws.** Purpose 16 and up, one per array in the order of ``param_shapes`` within the group (arrays of zeros and
ones use up a purpose, too). Element i of an array is the normal number of word i. An array of up to 2**14 elements is
then scaled to have the root mean square σ exactly, because a product of a few small draws could be close to zero and
leave the group without a gradient. CP weights start at one.
"""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from tnadapt.backends import FixedArrays
from tnadapt.backends.stored_floats import rounded_to
from tnadapt.errors import ConfigError

from . import rng
from .maps.projection import Projection
from .network import Network, parsed_name
from .sources import FrozenArrays, Multiplied, Origin
from .starting_points import PREFIX, Start, ZeroStart

# -- Which array of each term is zero ----------------------------------------------------------------------------------

# An array is zero itself, or by one of its trained multipliers. Groups whose arrays are tied are decided together,
# in order: the choice of one group counts for the later ones.


# A group, and the network's name of an array or multiplier in it.
_Part = tuple[int, str]


class ZeroArray(NamedTuple):
    """An array or multiplier of a group that is the zero of its term, or could be.

    Attributes
    ----------
    split : int
        Index of the array's split.
    name : str
        Its name in that split.
    multiplier : str
        The multiplier that is zero, ``"size"`` or ``"rank"``; empty if it is the array itself.
    array : str
        The network's name of the array.
    part : (int, str)
        Group and name of the array or multiplier that is zero: in another group if it is tied to one there.
    """

    split: int
    name: str
    multiplier: str
    array: str
    part: _Part

    @property
    def label(self) -> str:
        """The group's name of the array or multiplier."""
        return f"{self.array}.{self.multiplier}" if self.multiplier else self.array


class StartingGroup(NamedTuple):
    """One group whose zeros are chosen, given what is zero already.

    Attributes
    ----------
    number : int
    network : Network
    origins : mapping of str to Origin
        Origin of each array; empty if the config has no sources.
    trained : collection of str or None
        The group's arrays and multipliers that are trained; None for all that are not frozen.
    """

    number: int
    network: Network
    origins: Mapping[str, Origin]
    trained: Collection[str] | None

    def terms(self) -> list[list[ZeroArray]]:
        """Return for each term what could be its zero, in the order of preference."""
        splits = self.network.splits
        # CP weights are one number per component: make them zero only if nothing else is trained.
        arrays = [
            (k, name)
            for k in range(len(splits) - 1, -1, -1)
            for name in sorted(splits[k].shapes, key=lambda name: name in splits[k].ones)
        ]
        arrays.sort(key=lambda array: array != (len(splits) - 1, splits[-1].zero))
        return [
            [zero for k, name in arrays for zero in self._of_array(k, name, prefixes[k] + name)]
            for prefixes in self.network.prefixes
        ]

    def _of_array(self, k: int, name: str, array: str) -> list[ZeroArray]:
        """Return the array, if it is trained or tied to a trained one, and its multipliers."""
        origin = self.origins.get(array)
        if origin is None:
            return [ZeroArray(k, name, "", array, (self.number, array))]
        zeros = [ZeroArray(k, name, "", array, origin.key)] if origin.source.trained else []
        if origin.multiplied is not None:
            group, owner = origin.owner
            zeros += [ZeroArray(k, name, m, array, (group, f"{owner}.{m}")) for m in origin.multiplied.multipliers]
        return zeros

    def by_start(self) -> list[_Part]:
        """Return the multipliers that the ``start`` of their source makes zero, if they are trained."""
        zeros = []
        for array, origin in self.origins.items():
            zero = origin.multiplied and origin.multiplied.zero
            if zero and origin.owner == (self.number, array) and self._trains(f"{array}.{zero}"):
                zeros.append((self.number, f"{array}.{zero}"))
        return zeros

    def chosen(self, candidates: Sequence[ZeroArray], zero: Collection[_Part], settled: Collection[_Part]) -> ZeroArray:
        """Return the zero of a term."""
        known = next((candidate for candidate in candidates if candidate.part in zero), None)
        if known is not None:
            return known
        # A product of an array with itself has no gradient where the array is zero.
        keys = {candidate.array: candidate.part for candidate in candidates if not candidate.multiplier}
        occurs = collections.Counter(keys.values())
        able = [each for each in candidates if each.part not in settled and occurs[keys.get(each.array, each.part)] < 2]
        if not able:
            arrays = dict.fromkeys(candidate.array for candidate in candidates)
            raise ConfigError(
                f"none of {', '.join(arrays)} can be zero at the start: each one that is trained occurs twice in the "
                "product, or in another one that has its zero. Tie fewer of them"
            )
        # If no trained one can be zero, a frozen one must be, so that the term contributes nothing.
        return next((candidate for candidate in able if self._trains(candidate.label)), able[0])

    def _trains(self, name: str) -> bool:
        """Return whether an array or multiplier is trained, counting all as trained in a term where nothing is."""
        if self.trained is None or name in self.trained:
            return True
        term = name.partition("split")[0]
        return all(trained.partition("split")[0] != term for trained in self.trained)


def zero_arrays(groups: Sequence[StartingGroup]) -> dict[int, list[ZeroArray]]:
    """Return the zero of each term of each group, by the groups' indices.

    Parameters
    ----------
    groups : sequence of StartingGroup
        All groups that have tied arrays in common, for a linear F.

    Raises
    ------
    ConfigError
        If more than one array of a term is zero, or none can be.

    Examples
    --------
    >>> from tnadapt import Config
    >>> zero_arrays([StartingGroup(0, Network(Config(rank=2), 24, 4), {}, None)])
    {0: [ZeroArray(split=0, name='factor0', multiplier='', array='split0.factor0', part=(0, 'split0.factor0'))]}
    """
    zero = {part for group in groups for part in group.by_start()}
    # Arrays of a term that has its zero array must not become zero for another term.
    settled = set[_Part]()
    zeros: dict[int, list[ZeroArray]] = {}
    terms = [(group, candidates) for group in groups for candidates in group.terms()]
    for group, candidates in terms:
        chosen = group.chosen(candidates, zero, settled)
        zeros.setdefault(group.number, []).append(chosen)
        zero.add(chosen.part)
        settled |= {candidate.part for candidate in candidates}
    for group, candidates in terms:
        arrays = dict.fromkeys(candidate.array for candidate in candidates if candidate.part in zero)
        if len(arrays) > 1:
            raise ConfigError(
                f"sources makes {', '.join(arrays)} of group {group.number} all zero at the start, so that their "
                "gradients are zero and nothing would learn; only one of them may be"
            )
    return zeros


# -- The initial arrays of a group -------------------------------------------------------------------------------------


STEP = 1.0 / 32.0


class Initializer(FixedArrays):
    """Initial arrays of one group.

    Parameters
    ----------
    network : Network
        The network that has the arrays.
    projection : Projection
        F of the group.
    seed, group : int
        Select the random words.
    names : mapping of str to str
        The names in the plan of its trained arrays and multipliers.
    frozen : FrozenArrays
        The network's arrays that are not trained themselves.
    trained : set of str, optional
        The names of the arrays and multipliers that are trained; all that are not frozen if None.
    origins : mapping of str to Origin, optional
        Origin of each array, if the config has sources.
    starts : callable, optional
        Returns the Initializer of a group by its index, for arrays that are tied to it.
    table : callable, optional
        Returns the zero arrays of all groups, if their arrays are tied.
    point : Start, optional
        The config's start; the usual one if None.
    given : mapping of str to ndarray, optional
        Arrays of x_0 that are not drawn, by their full names after ``"start."``.

    Attributes
    ----------
    subtracts : bool
        Whether the update of x_0 is subtracted, whatever F is.
    zeros : frozenset of str
        Names of the arrays and multipliers that are zero.

    Examples
    --------
    >>> from tnadapt import Config
    >>> start = Initializer(Network(Config(rank=8), 768 * 768, 768), Projection("identity", 768**2, 768**2), 0, 0)
    >>> round(start.std, 4)  # PEFT's LoRA: 1 / sqrt(3 * 768) = 0.0208
    0.0199
    >>> bool(start.host("split0.factor0").any()), start.host("split0.factor1").shape
    (False, (768, 8))
    """

    def __init__(
        self,
        network: Network,
        projection: Projection,
        seed: int,
        group: int,
        names: Mapping[str, str] = MappingProxyType({}),
        frozen: FrozenArrays | None = None,
        trained: Collection[str] | None = None,
        origins: Mapping[str, Origin] = MappingProxyType({}),
        starts: Callable[[int], Initializer] | None = None,
        table: Callable[[], Mapping[int, list[ZeroArray]]] | None = None,
        point: Start | None = None,
        given: Mapping[str, np.ndarray] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.network, self.projection, self.seed, self.group, self.names = network, projection, seed, group, names
        self.frozen = FrozenArrays({}) if frozen is None else frozen
        self.trained, self.origins, self._starts, self._table = trained, origins, starts, table
        self.point = ZeroStart() if point is None else point
        self.subtracts = self.point.subtracts
        self._given = given
        self._units: Mapping[str, float] = {}
        # Terms with the same zero and frozen arrays have the same σ: that of the first of them.
        self._stds: dict[tuple[int, str, str, tuple[float, int]], float] = {}

    def in_units(self, units: Mapping[str, float]) -> Initializer:
        """Return the same start for parameters in units, by the names of arrays: an array is its unit times one."""
        return self._with(_units=units)

    def drawn_for(self, members: Sequence[int]) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the random arrays of members of a population by their names in the network, with an axis of members.

        A member's number is added to the seed.
        """
        seeds = np.array([(self.seed + member) % (1 << 64) for member in members], np.uint64)
        for name, shape in self.network.shapes.items():
            if name not in self.names or not self._is_random(name):
                continue
            arrays, std = np.empty((seeds.size, *shape), np.float32), self.std_of(name)
            # Pieces that stay in cache. Threads would wait for each other: NumPy's operations on them are too short.
            for first, last in rng.chunks(0, seeds.size, max(1, rng.CHUNK // math.prod(shape))):
                self._draw(name, std, seeds[first:last], arrays[first:last])
            yield name, arrays

    def _draw(self, name: str, std: float, seeds: np.ndarray, arrays: np.ndarray) -> None:
        """Draw a random array of each seed, as ``make`` computes it of one."""
        if arrays[0].size > _SHORT:
            for seed, array in zip(seeds.tolist(), arrays, strict=True):
                array[...] = self._with(seed=seed).make(name)
            return
        drawn = rng.normals_of_seeds(seeds, self.group, self._purposes[name], arrays[0].size)
        arrays[...] = self._in_unit(name, _scaled_rows(drawn, std)).reshape(arrays.shape)

    def _is_random(self, name: str) -> bool:
        origin = self.origins.get(name)
        owned = origin is None or origin.key == (self.group, name)
        _, split, array = parsed_name(self.network, name)
        return owned and name not in self.zeros and array not in split.ones

    def _with(self, **attributes: Any) -> Initializer:
        changed = Initializer.__new__(Initializer)
        changed.__dict__.update(self.__getstate__(), **attributes)  # without the arrays
        return changed

    @functools.cached_property
    def _zero(self) -> list[ZeroArray]:
        """For each term, the array that starts at zero if F is linear."""
        if self._table is not None and self.projection.linear:
            return self._table()[self.group]
        origins = self.origins if self.projection.linear else {}
        return zero_arrays([StartingGroup(self.group, self.network, origins, self.trained)])[self.group]

    @functools.cached_property
    def zeros(self) -> frozenset[str]:
        """Names of the arrays and multipliers that are zero: one per term, or none for a nonlinear F.

        There is none either if x_0 is computed from the base, or is the start "random". Of arrays that are tied, only
        the group that they belong to lists them.
        """
        if not self.projection.linear or self.point.needs_base or not self.point.leaves_zero:
            return frozenset()
        if self._table is None:
            return frozenset(zero.part[1] for zero in self._zero)
        zeros = {zero.part for terms in self._table().values() for zero in terms}
        return frozenset(name for group, name in zeros if group == self.group)

    def for_trained(
        self,
        trained: Collection[str],
        starts: Callable[[int], Initializer] | None = None,
        table: Callable[[], Mapping[int, list[ZeroArray]]] | None = None,
    ) -> Initializer:
        """Return the initial arrays if only these of the network's arrays and multipliers are trained.

        ``starts`` and ``table`` are those of the same choice for all groups, if arrays are tied.
        """
        if self.subtracts:
            return self
        initializer = Initializer(
            self.network, self.projection, self.seed, self.group, self.names, self.frozen, trained, self.origins,
            starts, table,
        ).in_units(self._units)  # fmt: skip
        return self if table is None and initializer.zeros == self.zeros else initializer

    @property
    def std(self) -> float:
        """σ of the random arrays; that of the first term, if terms differ in which array is zero."""
        return self._std(0)

    def _std(self, term: int) -> float:
        zero, frozen = self._zero[term], self._frozen_in_term(term)
        key = zero.split, zero.name, zero.multiplier, frozen
        if key in self._stds:
            return self._stds[key]
        try:
            if not self.point.leaves_zero and _random_arrays(self.network) - frozen[1] == 1:
                std = STEP  # of the only random array, which would be zero otherwise
            elif self.projection.linear:
                origin = self.origins.get(zero.array)
                std = _linear_std(self.network, self.projection, zero, frozen, origin and origin.multiplied)
            else:
                std = _nonlinear_std(self.network, self.projection, frozen)
        except OverflowError:
            raise ConfigError(
                f"so many arrays of such ranks are multiplied that their initial scale is out of floating-point range "
                f"({len(self.network.shapes)} arrays per group); use a smaller rank, order or number of splits"
            ) from None
        # Round to single precision: the last bit of a power differs between machines, and x_start must not.
        self._stds[key] = float(np.float32(std))
        return self._stds[key]

    def std_of(self, name: str) -> float:
        """Return σ of an array that is random, by its name in the network; 1 for CP weights, which start at one."""
        term, split, array = parsed_name(self.network, name)
        return 1.0 if array in split.ones else self._std(term)

    def _frozen_in_term(self, term: int) -> tuple[float, int]:
        """Return the product of the mean squares of a term's frozen arrays, and how many would be random if trained."""
        if not self.frozen.entries and not self.origins:
            return 1.0, 0
        squares, count = [1.0], 0
        for prefix, split in zip(self.network.prefixes[term], self.network.splits, strict=True):
            for name in split.shapes:
                if prefix + name in self.frozen.entries:
                    squares.append(self.frozen.mean_square(prefix + name))
                    count += name not in split.ones
                origin = self.origins.get(prefix + name)
                if origin is not None and origin.multiplied is not None:
                    squares += [value**2 for value in origin.multiplied.starts.values() if value]
        return math.prod(squares), count

    def make(self, key: Any) -> np.ndarray:
        """Compute an array in float32, by its name, or by (name, dtype) to round its values to that dtype."""
        if isinstance(key, tuple):
            return rounded_to(self.make(key[0]), key[1])
        return self._in_unit(key, self._array(key))

    def _in_unit(self, name: str, array: np.ndarray) -> np.ndarray:
        unit = self._units.get(name, 1.0)
        return array if unit == 1.0 else array * np.float32(1.0 / unit)  # exact: units are powers of two

    def draws(self, name: str) -> bool:
        """Return whether an array or multiplier starts at what the seed draws, rather than at what is given."""
        return not self.subtracts or not (self.point.needs_base or PREFIX + self.names[name] in self._given)

    def _array(self, key: str) -> np.ndarray:
        """Compute an array or multiplier without its unit."""
        if not self.draws(key):
            return self._brought(key)
        if key not in self.network.shapes:
            return self._multiplier(key)
        origin = self.origins.get(key)
        if origin is not None and origin.key != (self.group, key):
            return self._tied(*origin.key)
        shape = self.network.shapes[key]
        if key in self.zeros:
            return np.zeros(shape, np.float32)
        term, split, name = parsed_name(self.network, key)
        if name in split.ones:
            return np.ones(shape, np.float32)
        drawn = rng.normals(self.seed, self.group, self._purposes[key], 0, math.prod(shape))
        return _scaled(drawn, self._std(term)).reshape(shape)

    @functools.cached_property
    def _purposes(self) -> dict[str, int]:
        return {name: purpose for purpose, name in enumerate(self.network.shapes, rng.PURPOSE["start"])}

    def _tied(self, group: int, name: str) -> np.ndarray:
        assert self._starts is not None  # the plan passes it wherever arrays are tied
        return self._starts(group)._array(name)

    def _brought(self, name: str) -> np.ndarray:
        array = self._given.get(PREFIX + self.names[name])
        if array is None:
            raise ConfigError(
                f"the start of {self.names[name]!r} is computed from the base weights: bind the plan to them with "
                "plan.with_base(weights), or save the adapter with store_bases=True; on a model that was on the meta "
                "device, call adapter.reset() once it has its weights"
            )
        return array

    def _multiplier(self, key: str) -> np.ndarray:
        """Compute a multiplier, such as ``split0.factor0.size``."""
        array, _, multiplier = key.rpartition(".")
        origin = self.origins[array]
        if origin.owner != (self.group, array):
            return self._tied(origin.owner[0], f"{origin.owner[1]}.{multiplier}")
        assert origin.multiplied is not None
        # An untrained multiplier starts at one, even if it could make its term zero: another array does so then.
        value = 0.0 if key in self.zeros else origin.multiplied.starts[multiplier] or 1.0
        return origin.multiplied.initial(multiplier, self.network.shapes[array], value)


# Longer arrays have the root mean square within half a percent without scaling.
_SHORT = 1 << 14


def _scaled(drawn: np.ndarray, std: float) -> np.ndarray:
    """Scale normal numbers to a root mean square."""
    if drawn.size > _SHORT:
        return drawn * np.float32(std)
    # fsum is correctly rounded, with the same bits on every machine; a vectorized sum does not promise that.
    wide = drawn.astype(np.float64)
    return (wide * (std / math.sqrt(math.fsum((wide * wide).tolist()) / wide.size))).astype(np.float32)


def _scaled_rows(drawn: np.ndarray, std: float) -> np.ndarray:
    """Scale rows of up to ``_SHORT`` normal numbers, each as ``_scaled`` does."""
    wide = drawn.astype(np.float64)
    wide *= (std / np.sqrt(_sums_of_squares(wide) / wide.shape[1]))[:, None]
    return wide.astype(np.float32)


def _sums_of_squares(rows: np.ndarray) -> np.ndarray:
    """Sum the squares of each of such rows, correctly rounded like ``math.fsum``."""
    # The squares of float32 numbers are exact in float64. Those of normal numbers are below 2**6 and multiples of
    # 2**-110: cut at 2**-33 and 2**-73, each of the three parts of up to 2**14 of them has an exact sum in any order.
    rest, part, sums = rows * rows, np.empty_like(rows), list[np.ndarray]()
    for cut in (33, 73):
        rounding = 1.5 * 2.0 ** (52 - cut)  # adding it leaves multiples of 2**-cut, and subtracting it is exact
        np.add(rest, rounding, out=part)
        part -= rounding
        rest -= part
        sums.append(part.sum(axis=1))
    sums.append(rest.sum(axis=1))
    return np.array([math.fsum(parts) for parts in zip(*sums, strict=True)])


def _linear_std(
    network: Network, projection: Projection, zero: ZeroArray, frozen: tuple[float, int], source: Multiplied | None
) -> float:
    split, name, multiplier = network.splits[zero.split], zero.name, zero.multiplier
    # Frozen arrays contribute their own mean squares to V instead of σ².
    arrays = _random_arrays(network) - frozen[1]
    # V = paths * std ** (2 * arrays), where paths is the number of products that multiply an entry of Z.
    paths = math.prod(each.num_terms for each in network.splits) / split.num_terms_per_array(name)
    if multiplier:
        # Z multiplies an array, which is one of the factors of V.
        assert source is not None
        columns, shape = split.num_terms_per_array(name), split.shapes[name]
        entries, products = source.touched(multiplier, columns, shape)
        paths *= columns * products / entries
        spread = _spread(network, entries, math.prod(source.multiplier_shapes(shape)[multiplier]))
    else:
        arrays -= name not in split.ones
        spread = _spread(network, split.num_terms_per_array(name), math.prod(split.shapes[name]))
    if arrays <= 0:
        return 0.0
    step = spread * projection.map.gain() * frozen[0]
    return float((STEP / (step * paths)) ** (1.0 / (2 * arrays)))


def _nonlinear_std(network: Network, projection: Projection, frozen: tuple[float, int]) -> float:
    # t, the argument of tanhshrink, has variance tau = scale² paths n_in / L * std ** (2 arrays). The derivative
    # tanh(t)² ~ t² scales a step twice, in the backward and in the forward pass: together by E[t⁴] = 3 tau², or in the
    # v2 kinds, where t = g' u and the step passes through g' too, by E[g'² t⁴] = 15 * 3 tau². Every array moves.
    moment = projection.map.fourth_moment()
    arrays = _random_arrays(network)
    paths = network.terms * math.prod(split.num_terms for split in network.splits)
    tau = network.scale**2 * paths * projection.map.variance()
    moving = [
        (split.num_terms_per_array(name), math.prod(shape))
        for split in network.splits
        for name, shape in split.shapes.items()
        if name not in split.ones
    ]
    moved = sum(_spread(network, entries, size) / (network.terms * entries) for entries, size in moving)
    # Frozen arrays enter tau and the multiplier of every array by their mean squares. (They do not move, which
    # ``moved`` neglects: at most a factor of the number of arrays in the step.)
    step = moment * tau**2 * paths * moved * projection.map.gain() * frozen[0] ** 3
    arrays -= frozen[1]
    return float((STEP / step) ** (1.0 / (6 * arrays - 2))) if arrays > 0 else 1.0


def _random_arrays(network: Network) -> int:
    """Return the number of arrays in one product, except those that start at one."""
    return sum(len(split.shapes) - len(split.ones) for split in network.splits)


def _spread(network: Network, entries: int, size: int) -> float:
    """Return ``sqrt(q (q + P))`` of an array of ``size`` elements; a term sums ``entries`` of them per ΔW element."""
    paths = network.terms * entries
    touched = network.size * entries / size
    return math.sqrt(paths * (paths + touched))
