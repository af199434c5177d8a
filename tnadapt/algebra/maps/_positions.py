"""Maps that move elements to seeded or given positions: scatter, gather, one-hot, tied elements, and a permutation."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from tnadapt.algebra import rng
from tnadapt.algebra.folding import MAX_SIZE
from tnadapt.algebra.torch_streams import DEFAULT_SEED, permutation_head
from tnadapt.argument_checks import integer
from tnadapt.backends import Array, Backend
from tnadapt.errors import ConfigError, safe_repr

from ._map import ENDS, BroughtMap, Copying, Map, MapSettings, Space, digest_of, sum_of_runs

# -- Scatter: a few values at positions of a vector that is zero elsewhere ---------------------------------------------


# An adapter file bounds the length of its config, which holds the positions as decimal numbers.
_MOST_DIGITS = 50_000


@dataclasses.dataclass(frozen=True)
class Scatter(MapSettings):
    """Values at distinct positions; every other element is zero.

    Parameters
    ----------
    size : int, optional
        Number of values; by default, the number of positions given.
    positions : tuple of int, optional
        The position of each value in the output. By default they are seeded: the first ``size`` elements of
        :func:`tnadapt.algebra.rng.permutation` of the output's length (purpose 1).

    Raises
    ------
    ConfigError
        If neither is given, or positions are not ``size`` distinct integers of at least 0.

    Examples
    --------
    >>> import numpy as np, tnadapt as tna
    >>> f = tna.Projection(tna.maps.Scatter(positions=(4, 0)), n_out=6)
    >>> f(np.array([1.0, 2.0]))
    array([2., 0., 0., 0., 1., 0.])
    >>> tna.Projection(tna.maps.Scatter(size=2), n_out=6, seed=1)(np.array([1.0, 2.0]))
    array([0., 0., 0., 2., 0., 1.])
    """

    size: int | None = None
    positions: tuple[int, ...] | None = None

    _sizes = ("size",)

    def __post_init__(self) -> None:
        if self.positions is None and self.size is None:
            raise ConfigError("Scatter needs the number of values, Scatter(size=1000), or their positions")
        if self.positions is not None:
            object.__setattr__(self, "positions", self._checked_positions(self.positions))
        super().__post_init__()
        if self.positions is not None:
            if self.size not in (None, len(self.positions)):
                raise ConfigError(f"Scatter has size={self.size} and {len(self.positions)} positions: leave size out")
            object.__setattr__(self, "size", len(self.positions))

    def _checked_positions(self, value: Any) -> tuple[int, ...]:
        if not isinstance(value, (tuple, list, np.ndarray)) or getattr(value, "shape", value) == () or not len(value):
            raise ConfigError(f"Scatter's positions must be a tuple of integers, or None; got {safe_repr(value)}")
        positions = tuple(integer("one of Scatter's positions", place, 0, MAX_SIZE - 1, ConfigError) for place in value)
        if len(set(positions)) < len(positions):
            (twice, _), *_ = collections.Counter(positions).most_common(1)
            raise ConfigError(f"Scatter's positions must be distinct; {twice} is given twice or more often")
        if sum(len(str(place)) + 1 for place in positions) > _MOST_DIGITS:
            raise ConfigError(
                f"Scatter's {len(positions)} positions have more digits than an adapter file's config may hold "
                f"({_MOST_DIGITS}): use seeded positions, Scatter(size={len(positions)})"
            )
        return positions


class ScatterMap(Map):
    """``y[positions[i]] = x[i]``, and 0 elsewhere."""

    kind = "scatter"
    settings_class: ClassVar[type[MapSettings]] = Scatter
    settings: Scatter | TorchScatter
    fixed = ("positions",)
    exact_in_batches = _sized_by_settings = True

    @classmethod
    def domain(cls, codomain: Space, settings: Scatter | TorchScatter) -> Space:
        assert settings.size is not None  # the positions set it otherwise
        if settings.size > codomain.length:
            raise ConfigError(
                f"{type(settings).__name__} has size={settings.size}, more positions than places: its output has "
                f"{codomain.length} elements; give a size of at most {codomain.length}"
            )
        if isinstance(settings, Scatter) and settings.positions and max(settings.positions) >= codomain.length:
            raise ConfigError(
                f"Scatter's position {max(settings.positions)} is beyond its output of {codomain.length} elements, "
                f"whose positions are 0 to {codomain.length - 1}"
            )
        return Space(settings.size)

    @property
    def samples(self) -> bool:
        return isinstance(self.settings, TorchScatter) or self.settings.positions is None

    def make(self, key: object) -> np.ndarray:
        if isinstance(key, tuple):
            return self._sources(*key[1:])
        if key == "sources":
            return self._sources(0, self.n_out)
        if isinstance(self.settings, TorchScatter):
            return permutation_head(self.n_out, self.n_in, self.settings.seed)
        if self.settings.positions is not None:
            return np.array(self.settings.positions, np.int64)
        return rng.permutation(self.n_out, self.seed, self.group, 0, self.n_in)

    def _sources(self, start: int, stop: int) -> np.ndarray:
        """Return the index in x of each of these elements of y, where ``n_in`` stands for a zero appended to x."""
        positions = self.kept.get("positions")
        seeded = isinstance(self.settings, Scatter) and self.settings.positions is None
        if positions is None and (not seeded or stop - start == self.n_out):
            positions = self.make("positions")
        if positions is None:  # a slice: drawn without the rest
            inverse = rng.permutation(self.n_out, self.seed, self.group, start, stop, inverse=True)
            sources = np.minimum(inverse, self.n_in)
        else:
            sources = np.full(stop - start, self.n_in)
            inside = np.flatnonzero((start <= positions) & (positions < stop))
            sources[positions[inside] - start] = inside
        return sources.astype(np.int32) if self.n_in < 1 << 31 else sources

    def forward(self, backend: Backend, x: Array) -> Array:
        return backend.take(backend.pad_last(x, self.n_in + 1), self.on(backend, "sources", x))

    def adjoint(self, backend: Backend, y: Array) -> Array:
        return backend.take(y, self.on(backend, "positions", y))

    def slice(self, backend: Backend, x: Array, start: int, stop: int) -> Array:
        sources = self._piece(backend, "sources", x, start, stop)
        return backend.take(backend.pad_last(x, self.n_in + 1), sources)

    def squared_norm(self) -> float:
        return float(self.n_in)

    def cost(self) -> int:
        return 0

    def matrix(self) -> np.ndarray:
        matrix = np.zeros((self.n_out, self.n_in))
        matrix[self.make("positions"), np.arange(self.n_in)] = 1.0
        return matrix


# -- Scatter at the positions that torch's generator draws: PEFT's FourierFT and SHiRA ---------------------------------


@dataclasses.dataclass(frozen=True)
class TorchScatter(MapSettings):
    """Values at the first ``size`` positions of ``torch.randperm(n)``, n the length of the output; zero elsewhere.

    PEFT leaves the positions of FourierFT and SHiRA to a torch seed. With this map, such an adapter is the trained
    values and this seed, for weights of any shapes. The positions are drawn without torch, and depend on neither the
    config's seed nor the group. For new adapters, use :class:`Scatter`.

    Parameters
    ----------
    size : int
        Number of values.
    seed : int
        Of ``torch.Generator().manual_seed(seed)``; by default that of a generator that nobody has seeded.

    Raises
    ------
    ConfigError
        If one of them is not an integer in its range.

    Examples
    --------
    >>> import numpy as np, tnadapt as tna
    >>> f = tna.Projection(tna.maps.TorchScatter(size=2, seed=777), n_out=6)
    >>> f(np.array([1.0, 2.0]))  # torch.randperm(6, generator=torch.Generator().manual_seed(777))[:2] is [5, 0]
    array([2., 0., 0., 0., 0., 1.])
    """

    size: int
    seed: int = DEFAULT_SEED

    _sizes = ("size",)

    def __post_init__(self) -> None:
        seed = integer("TorchScatter's seed", self.seed, -(1 << 63), (1 << 64) - 1, ConfigError)
        object.__setattr__(self, "seed", seed)
        super().__post_init__()


class TorchScatterMap(ScatterMap):
    """``y[positions[i]] = x[i]``, and 0 elsewhere."""

    kind = "torch-scatter"
    settings_class = TorchScatter


# -- Gather: every element is an element of a shorter vector, or its negative (hashing) --------------------------------


@dataclasses.dataclass(frozen=True)
class Gather(MapSettings):
    """Every element of the output is a seeded element of the input: ``y[j] = x[h(j)]``.

    Parameters
    ----------
    size : int, optional
        Length of the input; by default it follows from ``Config.ratio``.

    Raises
    ------
    ConfigError
        If the size is not an integer of at least 1.

    Notes
    -----
    ``h(j) = perm(j) mod n_in`` with perm the permutation of ``n_out`` of purpose 10, so that the numbers of elements
    that copy two elements of x differ by at most one.

    Examples
    --------
    >>> import numpy as np, tnadapt as tna
    >>> tna.Projection(tna.maps.Gather(size=2), n_out=6, seed=1)(np.array([1.0, 2.0]))
    array([2., 2., 2., 1., 1., 1.])
    """

    size: int | None = None

    _sizes = ("size",)


@dataclasses.dataclass(frozen=True)
class SignGather(Gather):
    """:class:`Gather` with seeded signs: ``y[j] = s(j) x[h(j)]``; the signs have purpose 11.

    Examples
    --------
    >>> import numpy as np, tnadapt as tna
    >>> tna.Projection(tna.maps.SignGather(size=2), n_out=6, seed=1)(np.array([1.0, 2.0]))
    array([ 2., -2.,  2., -1., -1., -1.])
    """


class GatherMap(Copying):
    """``y[j] = x[perm[j] mod n_in]``, times ``signs[j]`` if the signs are one of its arrays."""

    kind = "gather"
    settings_class: ClassVar[type[MapSettings] | None] = Gather
    fixed: tuple[str, ...] = ("index",)
    exact_in_batches = True
    #: Purposes of the streams of the permutation and of the signs.
    purposes = rng.PURPOSE["gather"], rng.PURPOSE["gather_signs"]

    @classmethod
    def fixes_length(cls, settings: Any) -> bool:
        return settings is not None and settings.size is not None

    @classmethod
    def domain(cls, codomain: Space, settings: Gather) -> Space:
        assert settings.size is not None  # else ratio determines the length
        return Space(settings.size)

    @property
    def signed(self) -> bool:
        return "signs" in self.fixed

    def part(self, name: str, start: int, stop: int) -> np.ndarray:
        """Draw elements ``start`` to ``stop - 1`` of one of the arrays, or of the permutation, without the rest."""
        draw = (self.seed, self.group, start, stop)
        if name == "signs":
            return rng.signs(*draw, purpose=self.purposes[1])
        positions = rng.permutation(self.n_out, *draw, inverse=name == "back", purpose=self.purposes[0])
        if name == "index":
            positions %= self.n_in
        return positions.astype(np.int32) if self.n_out < 1 << 31 else positions

    def streams(self) -> Iterator[np.ndarray]:
        # The two ends identify a long stream: each element is a pure function of its index.
        if self.n_out <= 2 * ENDS:
            yield from super().streams()
            return
        for name in self.fixed:
            ends = self.part(name, 0, ENDS), self.part(name, self.n_out - ENDS, self.n_out)
            yield np.concatenate(ends).astype("<i8")

    def make(self, key: object) -> np.ndarray:
        return self.part(*key) if isinstance(key, tuple) else self.part(str(key), 0, self.n_out)

    def forward(self, backend: Backend, x: Array) -> Array:
        taken = backend.take(x, self.on(backend, "index", x))
        return taken * self.on(backend, "signs", x, backend.dtype_name(x)) if self.signed else taken

    def adjoint(self, backend: Backend, y: Array) -> Array:
        if self.signed:
            y = y * self.on(backend, "signs", y, backend.dtype_name(y))
        # Sorted by perm, the elements that copy x[i] are at i, i + n_in, i + 2 n_in, …
        return sum_of_runs(backend, backend.take(y, self.on(backend, "back", y)), self.n_in)

    def slice(self, backend: Backend, x: Array, start: int, stop: int) -> Array:
        taken = backend.take(x, self._piece(backend, "index", x, start, stop))
        return taken * self._piece(backend, "signs", x, start, stop, backend.dtype_name(x)) if self.signed else taken

    def cost(self) -> int:
        return self.n_out if self.signed else 0

    def matrix(self) -> np.ndarray:
        draw = (self.seed, self.group)
        matrix = np.eye(self.n_in)[rng.permutation(self.n_out, *draw, purpose=self.purposes[0]) % self.n_in]
        if self.signed:
            matrix *= rng.signs(*draw, 0, self.n_out, purpose=self.purposes[1])[:, None]
        return matrix


class SignGatherMap(GatherMap):
    """``y[j] = signs[j] * x[perm[j] mod n_in]``."""

    kind = "sign-gather"
    settings_class = SignGather
    fixed = ("index", "signs")


# -- One-hot: like gather, scaled so that the map is an isometry -------------------------------------------------------


class OneHot(GatherMap):
    """``y_i = x_j / sqrt(c_j)`` with ``j = perm[i] mod n_in``, and c_j the number of outputs that take x_j.

    The permutation of the outputs is that of :func:`tnadapt.algebra.rng.permutation`, so that every input is taken
    ⌊n_out / n_in⌋ or ⌈n_out / n_in⌉ times, and ``FᵀF = 1`` for ``n_in <= n_out``. Uni-LoRA's map (arXiv 2506.00799),
    whose positions are drawn independently.
    """

    kind = "one-hot"
    settings_class = None
    purposes = rng.PURPOSE["permutation"], rng.PURPOSE["signs"]

    def make(self, key: object) -> np.ndarray:
        if key != "coefficients":
            return super().make(key)
        taken, rest = divmod(self.n_out, self.n_in)
        counts = np.full(self.n_in, taken, np.int64)
        counts[:rest] += 1
        return 1.0 / np.sqrt(np.maximum(counts, 1))  # 1 for an input that no output takes

    def digest(self) -> str:
        return digest_of(self, self.part, dict.fromkeys(("perm", "signs") if self.signed else ("perm",), self.n_out))

    def forward(self, backend: Backend, x: Array) -> Array:
        return super().forward(backend, x * self.on(backend, "coefficients", x, backend.dtype_name(x)))

    def slice(self, backend: Backend, x: Array, start: int, stop: int) -> Array:
        for name in self.fixed:
            self.on(backend, name, x)  # cached, because slices of a map before the network are computed one by one
        return super().slice(backend, x * self.on(backend, "coefficients", x, backend.dtype_name(x)), start, stop)

    def adjoint(self, backend: Backend, y: Array) -> Array:
        return super().adjoint(backend, y) * self.on(backend, "coefficients", y, backend.dtype_name(y))

    def squared_norm(self) -> float:
        return float(min(self.n_in, self.n_out))

    def matrix(self) -> np.ndarray:
        matrix = super().matrix()
        return np.asarray(matrix / np.sqrt(np.maximum(1.0, np.abs(matrix).sum(axis=0))))


class SignedOneHot(OneHot):
    """:class:`OneHot` with a random sign for every output: those of :func:`tnadapt.algebra.rng.signs`."""

    kind = "signed-one-hot"
    fixed = ("index", "signs")


# -- Tied elements: a given index selects the element of the input -----------------------------------------------------


# The index is stored in float32, which holds the integers up to this one.
_MOST = 1 << 24


@dataclasses.dataclass(frozen=True)
class TiedElements(MapSettings):
    """Each trained element is an element of θ, which a given index names: ``a[i] = a_start[i] + θ[index[i]]``.

    For ``Config.before`` only. The plan takes the index as ``given={"theta.index": index}``, integers from 0 to
    ``parameters - 1`` in the order of the trained arrays, and files store it.

    Parameters
    ----------
    normalized : bool
        Whether to divide each element by the square root of the number of elements with its index, so that the map is
        an isometry. Uni-LoRA's indices in PEFT are normalized.

    Raises
    ------
    ConfigError
        If normalized is not a boolean.

    Examples
    --------
    One number for all elements of the first factor, and one for those of the second:

    >>> import numpy as np, tnadapt as tna
    >>> config = tna.presets.lora(1, before="tied", parameters=2, offset=False)
    >>> plan = tna.UpdatePlan(config, [(2, 3)], given={"theta.index": np.array([0, 0, 1, 1, 1])})
    >>> plan.deltas({"theta": np.array([2.0, 5.0])})[0]
    array([[10., 10., 10.],
           [10., 10., 10.]])
    """

    normalized: bool = False

    _flags = ("normalized",)


class TiedMap(BroughtMap):
    """``y[i] = c[index[i]] x[index[i]]``, where c is 1, or 1 / sqrt of the number of outputs with the index."""

    kind = "tied"
    settings_class = TiedElements
    settings: TiedElements
    brings = "index"
    fixed = ("index",)

    @property
    def brought_shape(self) -> tuple[int, ...]:
        return (self.n_out,)

    def check(self, array: np.ndarray, label: str) -> None:
        if self.n_in > _MOST:
            raise ConfigError(f"map 'tied' takes at most {_MOST} parameters; got {self.n_in}: use 'one-hot'")
        wrong = np.flatnonzero((array != np.floor(array)) | (array < 0) | (array >= self.n_in))
        if wrong.size:
            raise ConfigError(
                f"{label} must hold integers from 0 to {self.n_in - 1}, one less than the number of parameters; "
                f"element {wrong[0]} is {array[wrong[0]]:g}"
            )

    def stand_in(self, rng: np.random.Generator) -> np.ndarray:
        return rng.integers(self.n_in, size=self.n_out).astype(np.float32)

    def make(self, key: object) -> np.ndarray:
        index = self.brought.astype(np.int64)
        if key == "coefficients":
            return 1.0 / np.sqrt(np.maximum(np.bincount(index, minlength=self.n_in), 1))
        if isinstance(key, tuple):
            return self._stages[key[1]][0]
        return index.astype(np.int32)

    @functools.cached_property
    def _stages(self) -> list[tuple[np.ndarray, int]]:
        """Return for each stage of :meth:`adjoint` the elements to gather, and the length of the runs to sum."""
        # A stage sums runs of elements with the same index; an index one past the end stands for a zero, as padding. A
        # run is as long as the mean number of elements per index, but at least 2, so that a stage gathers at most about
        # twice as many elements as it receives, however uneven the counts are. The sums of runs are the elements of the
        # next stage.
        owners = self.brought.astype(np.int64)
        order, stages = np.argsort(owners, kind="stable"), list[tuple[np.ndarray, int]]()
        while True:
            counts = np.bincount(owners, minlength=self.n_in)
            if counts.max() <= 1:
                break
            length = max(2, -(-owners.size // self.n_in))
            runs = -(-counts // length)
            ends, firsts = np.cumsum(runs), np.cumsum(counts) - counts
            owner = np.repeat(np.arange(self.n_in), runs)
            number = np.arange(owner.size) - (ends - runs)[owner]  # of the run among the runs of its index
            place = number[:, None] * length + np.arange(length)
            inside = place < counts[owner][:, None]
            taken = np.where(inside, order[np.minimum(firsts[owner][:, None] + place, order.size - 1)], order.size)
            stages.append((taken.reshape(-1), length))
            owners, order = owner, np.arange(owner.size)
        # Back to one element per index: the padding zero for an index that has no element.
        last = np.full(self.n_in, owners.size)
        last[owners[order]] = order
        stages.append((last, 1))
        return stages

    def bring(self, array: np.ndarray, label: str = "the index") -> None:
        super().bring(array, label)
        self.__dict__.pop("_stages", None)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in super().__getstate__().items() if name != "_stages"}

    def slice(self, backend: Backend, x: Array, start: int, stop: int) -> Array:
        if self.settings.normalized:
            x = x * self.on(backend, "coefficients", x, backend.dtype_name(x))
        return backend.take(x, self.on(backend, "index", x)[start:stop])

    def adjoint(self, backend: Backend, y: Array) -> Array:
        for number, (_, length) in enumerate(self._stages):
            padded = backend.pad_last(y, y.shape[-1] + 1)
            y = backend.take(padded, self.on(backend, ("stage", number), y))
            if length > 1:
                y = backend.sum(backend.reshape(y, (*y.shape[:-1], y.shape[-1] // length, length)), axis=-1)
        if self.settings.normalized:
            y = y * self.on(backend, "coefficients", y, backend.dtype_name(y))
        return y

    def squared_norm(self) -> float:
        return float(np.unique(self.brought).size) if self.settings.normalized else float(self.n_out)

    def freedom(self) -> int:
        return int(np.unique(self.brought).size)

    def matrix(self) -> np.ndarray:
        matrix = np.eye(self.n_in)[self.brought.astype(np.int64)]
        if self.settings.normalized:
            matrix /= np.sqrt(np.maximum(matrix.sum(axis=0), 1.0))
        return matrix


# -- A permutation of the long vector ----------------------------------------------------------------------------------


class Shuffle(Copying):
    """``y[j] = x[perm[j]]``; ρ = 1 only."""

    kind = "shuffle"
    square = isometry = exact_in_batches = True
    fixed = ("perm",)

    def __init__(self, n_in: int, n_out: int, seed: int = 0, group: int = 0, **settings: Any) -> None:
        super().__init__(n_in, n_out, seed, group, **settings)
        #: The integers that define the permutation. A compiler takes text for a constant, not always a number.
        self.recipe = f"{seed} {group}"

    def part(self, name: str, start: int, stop: int) -> np.ndarray:
        """Draw elements ``start`` to ``stop - 1`` of the permutation or its inverse without the rest."""
        return rng.permutation(self.n_out, self.seed, self.group, start, stop, inverse=name == "inverse")

    def make(self, key: object) -> np.ndarray:
        if isinstance(key, tuple):
            return self.part(*key)
        whole = self.part(str(key), 0, self.n_out)
        # Half the memory if positions fit in 32 bits.
        return whole.astype(np.int32) if self.n_out <= 1 << 31 else whole

    def forward(self, backend: Backend, x: Array) -> Array:
        return self._shuffled(backend, x, inverse=False)

    def adjoint(self, backend: Backend, y: Array) -> Array:
        return self._shuffled(backend, y, inverse=True)

    def _shuffled(self, backend: Backend, x: Array, inverse: bool) -> Array:
        def forward(x: Array) -> Array:
            return backend.take(x, self.on(backend, "perm", x))

        def adjoint(x: Array) -> Array:
            return backend.take(x, self.on(backend, "inverse", x))

        shuffled = backend.shuffle(x, self.recipe, inverse, fallback=(forward, adjoint))
        return (adjoint if inverse else forward)(x) if shuffled is None else shuffled

    def slice(self, backend: Backend, x: Array, start: int, stop: int) -> Array:
        return backend.take(x, self._piece(backend, "perm", x, start, stop))

    def matrix(self) -> np.ndarray:
        return np.eye(self.n_out)[rng.permutation(self.n_out, self.seed, self.group)]

    def digest(self) -> str:
        return digest_of(self, self.part, {"perm": self.n_out})
