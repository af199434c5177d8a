"""The contract of a source: where the numbers of one array of a network come from."""

from __future__ import annotations

import dataclasses
import math
import re
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np

from tnadapt.algebra import rng
from tnadapt.argument_checks import require_frozen
from tnadapt.errors import ConfigError, safe_repr, summarize

__all__ = [
    "Given",
    "Place",
    "Seeded",
    "Source",
    "SourceMap",
    "Stream",
    "Tied",
    "Trained",
    "check_class",
]


# -- The contract of a source: where the numbers of one array of a network come from -----------------------------------


class Place(NamedTuple):
    """One array of a network, as integers: a source checks with it whether it can compute the array.

    Attributes
    ----------
    name : str
        The network's name of the array: ``"split0.factor1"``.
    shape : tuple of int
    mode : int or None
        The mode of the folded group whose factor it is, counted from 0, if the array is a matrix of shape
        ``(sizes[mode], rank)``; None for a core, weights, a dense tensor, and a factor of a Kronecker split.
    sizes : tuple of int
        Sizes of the folded group.
    projection : bool
        Whether a map F other than the identity follows the network.
    """

    name: str
    shape: tuple[int, ...]
    mode: int | None
    sizes: tuple[int, ...]
    projection: bool


@dataclasses.dataclass(frozen=True)
class Stream:
    """What a source may use to compute an array: random words that belong to it, and the base weights.

    Parameters
    ----------
    seed : int
        The config's.
    group : int
        Index of the group. A source whose arrays are the same in all groups uses 0 instead.
    purpose : int
        Different for each array of a group: ``2**16`` plus its position among the group's arrays.
    largest : tuple of int, optional
        The largest size of the array along each axis, over all groups of the plan. A source whose array is the same in
        all groups computes it at these sizes, and returns the leading elements along each axis.
    base : ndarray of float64, optional
        The group's base weights, folded to the sizes of its network; only for a source that ``needs_base``.
    mode : int, optional
        The array's mode; see :class:`Place`.
    factors : mapping of int to ndarray
        The group's frozen factors without their multipliers, by their modes; only for a source that ``needs_factors``.
    """

    seed: int
    group: int
    purpose: int
    largest: tuple[int, ...] | None = None
    base: np.ndarray | None = dataclasses.field(default=None, compare=False)
    mode: int | None = None
    factors: Mapping[int, np.ndarray] = dataclasses.field(default_factory=dict, compare=False)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the numbers of one array of a network come from.

    A subclass is a frozen dataclass whose fields are its settings. They are written into adapter files, so that their
    values must be ``None``, booleans, numbers, strings, sources, or tuples of these.

    Attributes
    ----------
    trained : bool
        Whether the array is a parameter. If False, the array is frozen: it is not counted or trained, and
        :meth:`array` computes it.
    needs_base : bool
        Whether :meth:`array` needs the base weights. Plans count without them; arrays need
        :meth:`tnadapt.SuperLoRA.with_base`.
    needs_factors : bool
        Whether :meth:`array` also needs the factors of the same split, all of which must be computed from the base.
    brought : bool
        Whether the caller brings the array: ``SuperLoRA(…, given={name: array})``. It is stored in files.

    Examples
    --------
    A frozen array of normal numbers:

    >>> import dataclasses
    >>> import numpy as np
    >>> from tnadapt.algebra import rng
    >>> from tnadapt.algebra.sources import Source
    >>> @dataclasses.dataclass(frozen=True)
    ... class Normal(Source):
    ...     def array(self, shape, stream):
    ...         size = int(np.prod(shape))
    ...         return rng.normals(stream.seed, stream.group, stream.purpose, 0, size).reshape(shape)
    >>> Normal().trained
    False
    """

    trained: ClassVar[bool] = False
    needs_base: ClassVar[bool] = False
    needs_factors: ClassVar[bool] = False
    brought: ClassVar[bool] = False

    @property
    def independent_of_group(self) -> bool:
        """Whether :meth:`array` does not depend on the group: groups of equal shapes then share one copy."""
        return False

    def check(self, place: Place) -> None:
        """Raise a ConfigError if the source cannot be that of an array. Default: any array will do.

        Parameters
        ----------
        place : Place
        """

    def array(self, shape: tuple[int, ...], stream: Stream) -> np.ndarray:
        """Compute the numbers of a frozen array.

        Parameters
        ----------
        shape : tuple of int
        stream : Stream
            The array's random words, and the base weights if the source needs them.

        Returns
        -------
        ndarray of float32
            Finite, of the given shape. A function of the arguments and the source's fields alone, with the same bits on
            every machine: the array is recomputed wherever it is needed. (A source that needs the base weights may
            differ between machines by rounding.)
        """
        raise ConfigError(
            f"source {type(self).__name__} does not define array(shape, stream), which computes a frozen array; define "
            "it, or set trained = True"
        )

    def mean_square(self, shape: tuple[int, ...]) -> float | None:
        """Return the mean square of the array if it is known without computing it; None otherwise."""
        return None

    def expected_square(self, shape: tuple[int, ...]) -> float | None:
        """Return the same for the units of training, which are those of any base; None to compute the array.

        A source that needs the base weights, and whose mean square depends on them, returns that for usual weights.
        """
        return self.mean_square(shape)


# -- The sources that a config names: array names to sources, immutable and hashable -----------------------------------


# factor0, split1.factor0, term2.split1.factor0: the last part is the format's own name of the array.
_KEY = re.compile(r"(?:(?:term(?:0|[1-9]\d*)\.)?split(?:0|[1-9]\d*)\.)?[A-Za-z_]\w*")
_MAX_ENTRIES = 1 << 12


class SourceMap(Mapping[str, Source]):
    """Sources by the names of arrays; arrays without an entry are trained.

    Parameters
    ----------
    sources : mapping of str to Source
        A key is an array's last name (``"factor0"``, for that array in every split and term), or begins with its split
        (``"split0.factor0"``), or with its term and split (``"term1.split0.factor0"``). The longest key that fits an
        array counts.

    Raises
    ------
    ConfigError
        If a key is not such a name, a value is not a source, or a setting of a source cannot be stored in a file.

    Examples
    --------
    >>> from tnadapt.algebra.sources import Trained
    >>> found = SourceMap({"factor0": Trained()})
    >>> found.of("split2.factor0"), found == {"factor0": Trained()}
    (Trained(), True)
    """

    def __init__(self, sources: Mapping[str, Source] = types.MappingProxyType({})) -> None:
        if not isinstance(sources, Mapping):
            raise ConfigError(f"sources must be a mapping of names to sources; got {safe_repr(sources)}")
        self._sources = dict(sources)
        if len(self._sources) > _MAX_ENTRIES:
            raise ConfigError(f"sources has {len(self._sources)} entries; at most {_MAX_ENTRIES} are allowed")
        for key, source in self._sources.items():
            if not isinstance(key, str) or not _KEY.fullmatch(key):
                raise ConfigError(
                    "a key of sources is the name of an array, such as 'factor0', 'split0.factor0' or "
                    f"'term0.split0.factor0'; got {safe_repr(key)}"
                )
            if not isinstance(source, Source):
                raise ConfigError(
                    f"sources[{key!r}] must be a source, such as tnadapt.sources.Trained(); got {safe_repr(source)}"
                )
            check_class(type(source))
            for field in dataclasses.fields(source):
                if not _is_plain(getattr(source, field.name)):
                    raise ConfigError(
                        f"sources[{key!r}]: {field.name} must be None, a boolean, an integer, a finite float, a "
                        f"string, a source or a tuple of these; got {safe_repr(getattr(source, field.name))}"
                    )

    def __getitem__(self, key: str) -> Source:
        return self._sources[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def __hash__(self) -> int:
        return hash(frozenset(self._sources.items()))

    def __repr__(self) -> str:
        return repr(self._sources)

    def of(self, name: str) -> Source | None:
        """Return the source of a network's array, such as ``"term0.split1.factor0"``; None if no key fits."""
        keys = _keys_of(name)
        return next((self._sources[key] for key in keys if key in self._sources), None)

    def check_names(self, names: Collection[str]) -> None:
        """Raise a ConfigError if a key fits none of a network's arrays."""
        known = dict.fromkeys(key for name in names for key in _keys_of(name)[::-1])
        for key in self:
            if key not in known:
                raise ConfigError(
                    f"sources names {safe_repr(key)}, which fits no array; the arrays are "
                    f"{summarize([name for name in known if '.' not in name])}, in {summarize(list(names))}"
                )


def _keys_of(name: str) -> list[str]:
    """The keys that fit an array, the longest first."""
    parts = name.split(".")
    return [".".join(parts[skipped:]) for skipped in range(len(parts))]


def check_class(cls: type[Source]) -> None:
    """Raise a ConfigError unless the settings of a class are the fields of a frozen dataclass."""
    require_frozen(cls, f"source {cls.__name__}", "source")


def _is_plain(value: Any, depth: int = 4) -> bool:
    """Return whether a file can hold a value and give it back."""
    if isinstance(value, tuple):
        return depth > 0 and all(_is_plain(item, depth - 1) for item in value)
    if isinstance(value, Source):
        fields = [getattr(value, field.name) for field in dataclasses.fields(value)]
        return depth > 0 and all(_is_plain(item, depth - 1) for item in fields)
    if isinstance(value, float):
        return type(value) is float and math.isfinite(value)
    if type(value) is int:
        return abs(value) < 1 << 64
    return value is None or type(value) in (bool, str)


# -- Arrays that are trained: the parameters of an adapter -------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Trained(Source):
    """The array is a parameter: it starts as :mod:`tnadapt.algebra.init` says, and is trained. The default.

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.Config(sources={"factor1": tna.sources.Trained()}).sources["factor1"]
    Trained()
    """

    trained: ClassVar[bool] = True


# -- Arrays that are another array of the plan -------------------------------------------------------------------------


_NAME = re.compile(r"(?:group(0|[1-9]\d*)\.)?((?:term(?:0|[1-9]\d*)\.)?split(?:0|[1-9]\d*)\.[A-Za-z_]\w*)")


@dataclasses.dataclass(frozen=True)
class Tied(Source):
    """The array is another array of the plan, of the same shape.

    Parameters
    ----------
    to : str
        Name of the other array: ``"split0.factor0"`` of the same group, or ``"group0.split0.factor0"`` of another one.
        An array that is tied to itself, as that of group 0 in the second case, is trained.

    Raises
    ------
    ConfigError
        If it is not such a name.

    Notes
    -----
    It is what the other array is: trained, frozen, or scaled. A trained array is counted and stored once, and its
    gradient is the sum over all its uses.

    Examples
    --------
    LoRA with one A for all layers (ShareLoRA):

    >>> import tnadapt as tna
    >>> shared = {"factor1": tna.sources.Tied("group0.split0.factor1")}
    >>> plan = tna.SuperLoRA(tna.presets.lora(2, sources=shared), [(6, 4), (5, 4)])
    >>> list(plan.param_shapes)
    ['group0.split0.factor0', 'group0.split0.factor1', 'group1.split0.factor0']
    """

    to: str

    def __post_init__(self) -> None:
        if not isinstance(self.to, str) or not _NAME.fullmatch(self.to):
            raise ConfigError(
                "Tied needs the full name of an array, such as 'split0.factor0' for the same group or "
                f"'group0.split0.factor0'; got {safe_repr(self.to)}"
            )

    def target(self, group: int) -> tuple[int, str]:
        """Return the group and the network's name of the other array, for an array of this group."""
        found = _NAME.fullmatch(self.to)
        assert found is not None  # checked above
        return group if found[1] is None else int(found[1]), found[2]


# -- Frozen arrays that the caller brings ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Given(Source):
    """A frozen array that the caller brings. It is stored in files, in float32.

    The arrays are given to the plan, ``SuperLoRA(config, shapes, given={"group0.split0.factor1": array})``, or to
    :func:`tnadapt.torch.attach`.

    Parameters
    ----------
    shared : bool
        Whether all groups have the same array: only that of the first group is then given and stored. If their sizes
        differ, it has the largest size along each axis, and the groups use its leading elements.

    Examples
    --------
    >>> import numpy as np, tnadapt as tna
    >>> config = tna.presets.lora(2).replace(sources={"factor1": tna.sources.Given(shared=True)})
    >>> given = {"group0.split0.factor1": np.eye(4, 2)}
    >>> plan = tna.SuperLoRA(config, [(3, 4), (3, 4)], given=given)
    >>> plan.num_parameters
    12
    """

    shared: bool = False

    brought: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.shared, bool):
            raise ConfigError(f"shared must be True or False; got {safe_repr(self.shared)}")

    @property
    def independent_of_group(self) -> bool:
        """Whether all groups have the same array."""
        return self.shared


# -- Frozen arrays that a seed determines: normal, uniform, signs, orthonormal, one-hot, identity ----------------------


Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Seeded(Source):
    """A frozen array, computed from the config's seed. It is not stored.

    Parameters
    ----------
    distribution : str
        - ``"normal"``: independent normal numbers;
        - ``"uniform"``: independent numbers, uniform on an interval around 0;
        - ``"signs"``: independent signs;
        - ``"orthonormal"``: orthonormal columns (or rows, if there are fewer of them), the Q of a QR decomposition of
          normal numbers whose R has a positive diagonal;
        - ``"one-hot"``: a single one per column, in a random row; no row has two before every row has one;
        - ``"eye"``: ones on the diagonal.

        The last three are for matrices; an array with more axes counts as the matrix of its last axis.
    shared : bool
        Whether all groups have the same array (VeRA). If their sizes differ, it is that of the largest sizes, cut to
        the leading elements along each axis.
    scale : float, optional
        Root mean square of the first three; factor of the last three. By default :math:`1 / \\sqrt d` for the first
        three, with d the size of the leading axis (before it is cut), and 1 for the others.

    Raises
    ------
    ConfigError
        If the distribution is unknown, or the scale is not a positive number.

    Notes
    -----
    All but ``"orthonormal"`` have the same bits on every machine. QR decompositions differ between LAPACKs in the last
    bits of float64, and rarely after rounding to float32.

    Examples
    --------
    LoRA with a frozen random factor (LoRA-FA):

    >>> import tnadapt as tna
    >>> config = tna.presets.lora(4).replace(sources={"factor1": tna.sources.Seeded("normal")})
    >>> tna.parameter_count(config, [(768, 768)] * 24)
    73728
    >>> Seeded("eye").array((3, 2), Stream(seed=0, group=0, purpose=1 << 16)).tolist()
    [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
    """

    distribution: str
    shared: bool = True
    scale: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.distribution, str) or self.distribution not in _DRAW:
            raise ConfigError(
                f"distribution must be one of {', '.join(map(repr, _DRAW))}; got {safe_repr(self.distribution)}"
            )
        if not isinstance(self.shared, bool):
            raise ConfigError(f"shared must be True or False; got {safe_repr(self.shared)}")
        if self.scale is None:
            return
        number = isinstance(self.scale, (int, float)) and not isinstance(self.scale, bool)
        if not number or not 1e-30 <= self.scale <= 1e30:
            raise ConfigError(f"scale must be a number from 1e-30 to 1e30, or None; got {safe_repr(self.scale)}")
        object.__setattr__(self, "scale", float(self.scale))  # the class is frozen

    @property
    def independent_of_group(self) -> bool:
        """Whether all groups have the same array."""
        return self.shared

    def array(self, shape: Shape, stream: Stream) -> np.ndarray:
        """See :meth:`Source.array`."""
        if self.shared:
            whole = stream.largest or shape
            stream = dataclasses.replace(stream, group=0)
        else:
            whole = shape
        drawn = _DRAW[self.distribution](whole, stream)
        if self.scale is not None:
            drawn = drawn * self.scale
        elif self.distribution in _INDEPENDENT:
            drawn = drawn / math.sqrt(whole[0])
        return np.ascontiguousarray(drawn[tuple(map(slice, shape))], np.float32)


def _normal(shape: Shape, stream: Stream) -> np.ndarray:
    drawn = rng.normals(stream.seed, stream.group, stream.purpose, 0, math.prod(shape))
    return drawn.astype(np.float64).reshape(shape)


def _uniform(shape: Shape, stream: Stream) -> np.ndarray:
    words = rng.words(stream.seed, stream.group, stream.purpose, 0, math.prod(shape))
    # The middle of each of 2**32 intervals of [-√3, √3], whose variance is 1.
    return ((words.astype(np.float64) + 0.5) * 2.0**-31 - 1.0).reshape(shape) * math.sqrt(3.0)


def _signs(shape: Shape, stream: Stream) -> np.ndarray:
    words = rng.words(stream.seed, stream.group, stream.purpose, 0, math.prod(shape))
    return np.where(words >> 31, -1.0, 1.0).reshape(shape)


def _orthonormal(shape: Shape, stream: Stream) -> np.ndarray:
    matrix = _normal(shape, stream).reshape(-1, shape[-1])
    wide = matrix.shape[0] < matrix.shape[1]
    q, r = np.linalg.qr(matrix.T if wide else matrix)
    q = q * np.where(np.diagonal(r) < 0.0, -1.0, 1.0)
    return (q.T if wide else q).reshape(shape)


def _one_hot(shape: Shape, stream: Stream) -> np.ndarray:
    columns = shape[-1]
    rows = math.prod(shape) // columns
    words = rng.words(stream.seed, stream.group, stream.purpose, 0, rows * -(-columns // rows))
    # Each block of so many columns as there are rows takes the rows in the order of its words.
    order = np.argsort(words.reshape(-1, rows), axis=1, kind="stable").reshape(-1)[:columns]
    found = np.zeros((rows, columns))
    found[order, np.arange(columns)] = 1.0
    return found.reshape(shape)


def _eye(shape: Shape, stream: Stream) -> np.ndarray:
    return np.eye(math.prod(shape) // shape[-1], shape[-1]).reshape(shape)


_DRAW: dict[str, Callable[[Shape, Stream], np.ndarray]] = {
    "normal": _normal,
    "uniform": _uniform,
    "signs": _signs,
    "orthonormal": _orthonormal,
    "one-hot": _one_hot,
    "eye": _eye,
}
_INDEPENDENT = ("normal", "uniform", "signs")
