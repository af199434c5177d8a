"""Where the numbers of an array come from: trained, or frozen (from a seed, the base weights, the caller), or tied.

:class:`Source` is the contract, and each source one class. A config names sources in a :class:`SourceMap`.
:func:`origins_of` follows its ties and multipliers to where each array of a group comes from, and
:class:`FrozenArrays` computes the frozen ones when they are first used.

A new built-in source is one more class and one more line in :data:`SOURCES`; another package calls
``tnadapt.register_source``. :class:`tnadapt.testing.SourceContract` checks both kinds. Users find the classes in
``tnadapt.sources``.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np

from tnadapt.argument_checks import from_stored, require_frozen, require_plain
from tnadapt.backends import Array, Backend, FixedArrays
from tnadapt.backends.stored_floats import rounded_to
from tnadapt.errors import ConfigError, TnadaptError, safe_repr, summarize
from tnadapt.plugins import Registry

from . import rng
from .singular_vectors import OVERSAMPLING, dominant_basis, dominant_svd, leading_qr, minor_svd, orthonormal

__all__ = [
    "OVERSAMPLING",
    "SOURCES",
    "BaseCore",
    "FromBase",
    "FrozenArray",
    "FrozenArrays",
    "Given",
    "Mixed",
    "Multiplied",
    "Origin",
    "Place",
    "Scaled",
    "Seeded",
    "Source",
    "SourceMap",
    "Stream",
    "Tied",
    "Trained",
    "check_term",
    "dominant_svd",
    "inner_source",
    "leading_qr",
    "minor_svd",
    "origins_of",
    "register_source",
    "source_from_dict",
    "source_to_dict",
]


# -- The contract of a source ------------------------------------------------------------------------------------------


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
        :meth:`tnadapt.UpdatePlan.with_base`.
    needs_factors : bool
        Whether :meth:`array` also needs the factors of the same split, all of which must be computed from the base.
    brought : bool
        Whether the caller brings the array: ``UpdatePlan(…, given={name: array})``. It is stored in files.

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


def require_flags(**settings: Any) -> None:
    """Raise a ConfigError that names a setting unless all are booleans."""
    for name, value in settings.items():
        if not isinstance(value, bool):
            raise ConfigError(f"{name} must be True or False; got {safe_repr(value)}")


# -- Trained arrays: the parameters of an adapter ----------------------------------------------------------------------


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


# -- Tied arrays: another array of the plan ----------------------------------------------------------------------------


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
    >>> plan = tna.UpdatePlan(tna.presets.lora(2, sources=shared), [(6, 4), (5, 4)])
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
        match = _NAME.fullmatch(self.to)
        assert match is not None  # checked above
        return group if match[1] is None else int(match[1]), match[2]


# -- Given arrays: frozen, and provided by the caller ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Given(Source):
    """A frozen array that the caller brings. It is stored in files, in float32.

    The arrays are given to the plan, ``UpdatePlan(config, shapes, given={"group0.split0.factor1": array})``, or to
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
    >>> arrays = {"group0.split0.factor1": np.eye(4, 2)}
    >>> plan = tna.UpdatePlan(config, [(3, 4), (3, 4)], given=arrays)
    >>> plan.num_parameters
    12
    """

    shared: bool = False

    brought: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_flags(shared=self.shared)

    @property
    def independent_of_group(self) -> bool:
        """Whether all groups have the same array."""
        return self.shared


# -- Seeded arrays: normal, uniform, signs, orthonormal, one-hot, identity ---------------------------------------------


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
        require_flags(shared=self.shared)
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


def _random_signs(shape: Shape, stream: Stream) -> np.ndarray:
    words = rng.words(stream.seed, stream.group, stream.purpose, 0, math.prod(shape))
    return np.where(words >> 31, -1.0, 1.0).reshape(shape)


def _random_orthonormal(shape: Shape, stream: Stream) -> np.ndarray:
    matrix = _normal(shape, stream).reshape(-1, shape[-1])
    wide = matrix.shape[0] < matrix.shape[1]
    q = orthonormal(matrix.T if wide else matrix)
    return (q.T if wide else q).reshape(shape)


def _one_hot(shape: Shape, stream: Stream) -> np.ndarray:
    columns = shape[-1]
    rows = math.prod(shape) // columns
    words = rng.words(stream.seed, stream.group, stream.purpose, 0, rows * -(-columns // rows))
    # Each block of n columns, where n is the number of rows, takes the rows in the order of its words.
    order = np.argsort(words.reshape(-1, rows), axis=1, kind="stable").reshape(-1)[:columns]
    matrix = np.zeros((rows, columns))
    matrix[order, np.arange(columns)] = 1.0
    return matrix.reshape(shape)


def _eye(shape: Shape, stream: Stream) -> np.ndarray:
    return np.eye(math.prod(shape) // shape[-1], shape[-1]).reshape(shape)


_DRAW: dict[str, Callable[[Shape, Stream], np.ndarray]] = {
    "normal": _normal,
    "uniform": _uniform,
    "signs": _random_signs,
    "orthonormal": _random_orthonormal,
    "one-hot": _one_hot,
    "eye": _eye,
}
_INDEPENDENT = ("normal", "uniform", "signs")


def _require_no_projection(source: Source, place: Place) -> None:
    if place.projection:
        raise ConfigError(
            f"{type(source).__name__} makes {place.name!r} of the base weights, and a projection follows the network, "
            "so that the two have no rows and columns in common: use projection='identity'"
        )


# -- Factors: bases of the base's dominant singular subspaces ----------------------------------------------------------


_SIDES = ("rows", "cols", "mode")


@dataclasses.dataclass(frozen=True)
class FromBase(Source):
    """A frozen factor: an orthonormal basis of a dominant singular subspace of the group's base weights.

    Parameters
    ----------
    side : {"rows", "cols", "mode"}
        ``"rows"`` for left, ``"cols"`` for right singular vectors of the weight, or of a stack of weights (weights,
        rows, cols) unfolded along that mode. ``"mode"`` is the array's own mode, of a tensor of any order (HOSVD).
    vectors : bool
        Whether the columns are the singular vectors themselves, from the largest singular value down, each with its
        largest entry positive. By default the columns are another basis of the same subspace, which does not depend on
        the machine's LAPACK.

    Raises
    ------
    ConfigError
        If the side is unknown or ``vectors`` is not a boolean.

    Notes
    -----
    The subspace has as many dimensions as the array has columns. It is computed in float64 by
    four passes of subspace iteration from seeded normal numbers (``dominant_basis``) and rounded
    to float32: the same bits on one machine, and equal to about 1e-6 between machines. It costs ``8 d n (r + 8)``
    multiply-adds for a weight of d × n.

    A plan counts without the base weights; arrays need them: :meth:`tnadapt.UpdatePlan.with_base`.
    :func:`tnadapt.torch.attach` takes them from the model. A file stores the fingerprint of the base, or, with
    ``save(…, store_bases=True)``, the arrays.

    Examples
    --------
    LoRA-XS, which trains an r × r matrix between them:

    >>> import numpy as np, tnadapt as tna
    >>> from tnadapt.sources import FromBase
    >>> bases = {"factor0": FromBase("rows"), "factor1": FromBase("cols")}
    >>> config = tna.Config(format="tucker", rank=2, sources=bases)
    >>> plan = tna.UpdatePlan(config, [(6, 4)]).with_base([np.arange(24.0).reshape(6, 4) ** 2])
    >>> plan.param_shapes, plan.deltas({"group0.split0.core": np.eye(2)})[0].shape
    ({'group0.split0.core': (2, 2)}, (6, 4))
    """

    side: str
    vectors: bool = False

    needs_base: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.side, str) or self.side not in _SIDES:
            raise ConfigError(f"side must be one of {', '.join(map(repr, _SIDES))}; got {safe_repr(self.side)}")
        require_flags(vectors=self.vectors)

    def _unfolded(self, order: int, mode: int | None) -> int:
        """Return the mode along which a base of this order is unfolded for an array of this mode."""
        if self.side != "mode":
            return order - (2 if self.side == "rows" else 1)
        assert mode is not None  # checked by the plan
        return mode

    def check(self, place: Place) -> None:
        """See :meth:`Source.check`."""
        _require_no_projection(self, place)
        if place.mode is None:
            raise ConfigError(
                f"FromBase makes factors of shape (size of a mode, rank), and {place.name!r} of shape {place.shape} is "
                "none: use format='cp', 'cp-weighted' or 'tucker' with splits=1 or combine='hadamard'"
            )
        if self.side != "mode" and len(place.sizes) not in (2, 3):
            raise ConfigError(
                f"FromBase({self.side!r}) needs matrices, or a stack (weights, rows, cols), and the group is folded to "
                f"{place.sizes}: use FromBase('mode')"
            )
        mode = self._unfolded(len(place.sizes), place.mode)
        size, rank = place.shape
        if size != place.sizes[mode]:
            raise ConfigError(
                f"FromBase({self.side!r}) gives vectors of {place.sizes[mode]} elements, and {place.name!r} has "
                f"{size} rows: use the other side, or 'mode'"
            )
        most = min(size, math.prod(place.sizes) // size)
        if rank > most:
            raise ConfigError(
                f"FromBase({self.side!r}) needs {rank} singular vectors for {place.name!r}, and a base weight folded "
                f"to {place.sizes} has {most} at most along that mode: use rank={most} or less"
            )

    def array(self, shape: tuple[int, ...], stream: Stream) -> np.ndarray:
        """See :meth:`Source.array`."""
        base = stream.base
        assert base is not None  # the plan gives it to a source that needs it
        mode = self._unfolded(base.ndim, stream.mode)
        matrix = np.moveaxis(base, mode, 0).reshape(base.shape[mode], -1)
        rows, rank = shape
        width = min(rank + OVERSAMPLING, rows)
        drawn = rng.normals(stream.seed, stream.group, stream.purpose, 0, rows * width)
        normals = drawn.astype(np.float64).reshape(rows, width)
        what = f"FromBase({self.side!r}) of group {stream.group}"
        return dominant_basis(matrix, normals, rank, self.vectors, what).astype(np.float32)

    def mean_square(self, shape: tuple[int, ...]) -> float:
        """See :meth:`Source.mean_square`: the columns have norm 1."""
        return 1.0 / shape[0]


# -- The core of the base's higher-order singular value decomposition --------------------------------------------------


@dataclasses.dataclass(frozen=True)
class BaseCore(Source):
    """The core of a Tucker decomposition of the group's base weights: ``W ×_0 U_0ᵀ ×_1 U_1ᵀ …``.

    The factors U of all modes are computed from the base, too: ``FromBase("mode")``, or :class:`Mixed` of it. With
    orthonormal factors, ``core ×_0 U_0 ×_1 U_1 …`` is the projection of the base weights to their subspaces: the
    truncated higher-order SVD, or CRAFT's frozen tensor. Computed in float64 from the factors in float32, and rounded.

    Examples
    --------
    >>> import numpy as np, tnadapt as tna
    >>> from tnadapt.sources import BaseCore, FromBase, Mixed
    >>> sources = {"core": BaseCore(), "factor0": Mixed(FromBase("rows")), "factor1": FromBase("cols")}
    >>> plan = tna.UpdatePlan(tna.Config(format="tucker", rank=2, sources=sources), [(6, 4)])
    >>> plan = plan.with_base([np.diag([3.0, 2.0, 1.0, 0.5, 0.0, 0.0])[:, :4]])
    >>> plan.param_shapes
    {'group0.split0.factor0.mix': (2, 2)}
    >>> plan.deltas({"group0.split0.factor0.mix": np.eye(2)})[0].diagonal().round(4)[:2].tolist()
    [3.0, 2.0]
    """

    needs_base: ClassVar[bool] = True
    needs_factors: ClassVar[bool] = True

    def check(self, place: Place) -> None:
        """See :meth:`Source.check`."""
        _require_no_projection(self, place)
        if place.name.rpartition(".")[2] != "core" or len(place.shape) != len(place.sizes):
            raise ConfigError(
                f"BaseCore is for the core of format='tucker'; {place.name!r} has the shape {place.shape}"
            )

    def expected_square(self, shape: tuple[int, ...]) -> float:
        """See :meth:`Source.expected_square`: every slice of the first mode has singular values of 1."""
        return 1.0 / max(shape[1:] or shape)

    def array(self, shape: tuple[int, ...], stream: Stream) -> np.ndarray:
        """See :meth:`Source.array`."""
        assert stream.base is not None  # a plan gives both to a source that needs them
        core = stream.base
        for mode, factor in stream.factors.items():
            wide = factor.astype(np.float64)
            core = np.moveaxis(np.tensordot(wide.T, core, axes=(1, mode)), 0, mode)
        return np.ascontiguousarray(core, np.float32)


# -- Multiplied arrays: another source's array times trained multipliers -----------------------------------------------


@dataclasses.dataclass(frozen=True)
class Multiplied(Source):
    """A factor A of shape (d, r) times trained arrays, its multipliers; linear in A and in each multiplier.

    A subclass names the multipliers, and defines their shapes, their initial values and the product.

    Parameters
    ----------
    of : Source
        Source of A: usually frozen; a trained or tied one is trained as well.

    Raises
    ------
    ConfigError
        If ``of`` is not a source, or itself multiplied.
    """

    of: Source

    def __post_init__(self) -> None:
        if not isinstance(self.of, Source) or isinstance(self.of, Multiplied):
            raise ConfigError(
                f"of must be a source, for {type(self).__name__} one without trained diagonals or matrices; got "
                f"{safe_repr(self.of)}"
            )

    @property
    def multipliers(self) -> tuple[str, ...]:
        """Names of the multipliers, in order; ``split0.factor0.size`` is the multiplier ``size`` of an array."""
        raise NotImplementedError

    def multiplier_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return the shape of each multiplier of an array."""
        raise NotImplementedError

    @property
    def starts(self) -> dict[str, float]:
        """Initial value of each multiplier, where it is not the one that has to be zero; 1 changes nothing."""
        raise NotImplementedError

    @property
    def zero(self) -> str | None:
        """The multiplier that starts at zero by the settings; None if there is none."""
        return next((name for name, value in self.starts.items() if value == 0.0), None)

    def initial(self, name: str, shape: tuple[int, ...], value: float) -> np.ndarray:
        """Return the multiplier of an array of this shape that multiplies by ``value``, in float32."""
        return np.full(self.multiplier_shapes(shape)[name], value, np.float32)

    def check(self, place: Place) -> None:
        """See :meth:`Source.check`."""
        if len(place.shape) != 2:
            raise ConfigError(
                f"{type(self).__name__} is for factors, of shape (size, rank); {place.name!r} has the shape "
                f"{place.shape}: give another source"
            )

    def touched(self, name: str, columns: int, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return what the initialization needs to know of a multiplier.

        Parameters
        ----------
        name : str
        columns : int
            The number of columns of A that an element of the update sums over.
        shape : tuple of int
            Of A.

        Returns
        -------
        entries, products : int
            How many entries of the multiplier an element of the update sums over, and of how many products of an entry
            of A and entries of the multipliers an entry of the product is a sum.
        """
        raise NotImplementedError

    def product(self, backend: Backend, array: Array, multipliers: Mapping[str, Array]) -> Array:
        """Compute the array times its multipliers, which are given by name."""
        raise NotImplementedError

    def times(
        self, backend: Backend, x: Array, array: Array, multipliers: Mapping[str, Array], transposed: bool
    ) -> Array:
        """Multiply the rows of x by the product of A with its multipliers, or by its transpose."""
        product = self.product(backend, array, multipliers)
        return backend.matmul(x, backend.matrix_transpose(product) if transposed else product)

    def gradients(
        self, array: np.ndarray, multipliers: Mapping[str, np.ndarray], gradient: np.ndarray
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return the gradients of A and of each multiplier, from that of the product."""
        raise NotImplementedError


# -- Mixed: times a trained square matrix ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Mixed(Multiplied):
    """A factor times a trained square matrix: ``A J``, whose columns are mixtures of those of A.

    J is the array ``split0.factor0.mix``, of shape (r, r). It starts at the identity, or at zero if it falls to this
    array to make ΔW zero at the start (:mod:`tnadapt.algebra.init`).

    Parameters
    ----------
    of : Source
        Source of A, a factor of shape (d, r): usually frozen, as in CRAFT.

    Raises
    ------
    ConfigError
        If ``of`` is not a source, or itself multiplied.

    Examples
    --------
    >>> import tnadapt as tna
    >>> from tnadapt.sources import Mixed, Seeded
    >>> plan = tna.UpdatePlan(tna.presets.lora(2, sources={"factor0": Mixed(Seeded("orthonormal"))}), [(6, 4)])
    >>> plan.param_shapes
    {'group0.split0.factor0.mix': (2, 2), 'group0.split0.factor1': (4, 2)}
    """

    @property
    def multipliers(self) -> tuple[str, ...]:
        """The matrix alone: ``mix``."""
        return ("mix",)

    def multiplier_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return the shape of the matrix."""
        return {"mix": (shape[1], shape[1])}

    @property
    def starts(self) -> dict[str, float]:
        """The matrix starts at 1 times the identity."""
        return {"mix": 1.0}

    def initial(self, name: str, shape: tuple[int, ...], value: float) -> np.ndarray:
        """Return ``value`` times the identity."""
        return np.eye(shape[1], dtype=np.float32) * np.float32(value)

    def touched(self, name: str, columns: int, shape: tuple[int, ...]) -> tuple[int, int]:
        """See :meth:`Multiplied.touched`: a column of the product has all columns of A."""
        return columns * shape[1], shape[1]

    def product(self, backend: Backend, array: Array, multipliers: Mapping[str, Array]) -> Array:
        """Compute ``A J``."""
        return backend.matmul(array, multipliers["mix"])

    def gradients(
        self, array: np.ndarray, multipliers: Mapping[str, np.ndarray], gradient: np.ndarray
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return ``G Jᵀ`` and ``Aᵀ G``."""
        return gradient @ multipliers["mix"].T, {"mix": array.T @ gradient}


# -- Scaled: times trained diagonals -----------------------------------------------------------------------------------


# The diagonals, and the axis of the array that each one scales.
_AXES = {"size": 0, "rank": 1}


@dataclasses.dataclass(frozen=True)
class Scaled(Multiplied):
    """A factor times trained diagonals: ``diag(size) A diag(rank)``, or one of the two.

    Parameters
    ----------
    of : Source
        Source of A, a factor of shape (d, r): usually frozen, as in VeRA; a trained or tied one is trained as well.
    size : bool
        Whether the d rows have trained factors: the array ``split0.factor0.size``, of shape (d,).
    rank : bool
        Whether the r columns have trained factors: ``split0.factor0.rank``, of shape (r,).
    start : float or tuple of float, optional
        Initial value of the diagonals, or of each one (size, rank). By default 1; but if it falls to this array to make
        ΔW zero at the start (:mod:`tnadapt.algebra.init`), its first diagonal is 0. A start of 0 makes it the array
        that is zero; with two diagonals, ``start=0`` is ``(0, 1)``.

    Raises
    ------
    ConfigError
        If ``of`` is not a source, or itself scaled; if there is no diagonal; or the start is not a finite number, or
        has another number of values than there are diagonals, or more than one zero.

    Examples
    --------
    VeRA, where both factors are frozen and shared by all layers:

    >>> import tnadapt as tna
    >>> from tnadapt.sources import Scaled, Seeded
    >>> frozen = Seeded("uniform")
    >>> vera = {"factor0": Scaled(frozen), "factor1": Scaled(frozen, size=False, rank=True, start=0.1)}
    >>> plan = tna.UpdatePlan(tna.presets.lora(2, sources=vera), [(6, 4)])
    >>> plan.param_shapes
    {'group0.split0.factor0.size': (6,), 'group0.split0.factor1.rank': (2,)}
    """

    size: bool = True
    rank: bool = False
    start: float | tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_flags(size=self.size, rank=self.rank)
        if not self.size and not self.rank:
            raise ConfigError("Scaled needs a diagonal: size=True, rank=True, or both")
        if self.start is None:
            return
        numbers = self.start if isinstance(self.start, tuple) else (self.start,)
        for number in numbers:
            known = isinstance(number, (int, float)) and not isinstance(number, bool)
            if not known or not abs(number) <= 1e30:  # also false for NaN
                raise ConfigError(
                    "start must be a finite number of at most 1e30, a tuple of one per diagonal, or None; got "
                    f"{safe_repr(self.start)}"
                )
        if isinstance(self.start, tuple) and (len(numbers) != len(self.multipliers) or numbers.count(0.0) > 1):
            raise ConfigError(
                f"start={safe_repr(self.start)} must have one number for each of {', '.join(self.multipliers)}, at "
                "most one of them 0"
            )
        floats = tuple(map(float, numbers))
        object.__setattr__(self, "start", floats if isinstance(self.start, tuple) else floats[0])  # the class is frozen

    @property
    def starts(self) -> dict[str, float]:
        """Initial value of each diagonal, where it is not the one that has to be zero."""
        if isinstance(self.start, tuple):
            return dict(zip(self.multipliers, self.start, strict=True))
        first, *others = self.multipliers
        if self.start == 0.0:
            return {first: 0.0, **dict.fromkeys(others, 1.0)}
        return dict.fromkeys(self.multipliers, 1.0 if self.start is None else self.start)

    @property
    def multipliers(self) -> tuple[str, ...]:
        """Names of the diagonals, in order: ``size``, ``rank``."""
        return tuple(name for name in _AXES if getattr(self, name))

    def multiplier_shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return the shape of each diagonal of an array."""
        return {name: (shape[_AXES[name]],) for name in self.multipliers}

    def touched(self, name: str, columns: int, shape: tuple[int, ...]) -> tuple[int, int]:
        """See :meth:`Multiplied.touched`: one entry for each column, or one for all of them."""
        return (columns if name == "rank" else 1), 1

    def product(self, backend: Backend, array: Array, multipliers: Mapping[str, Array]) -> Array:
        """Compute the array times its diagonals, which are given by name."""
        for name in self.multipliers:
            diagonal: Any = multipliers[name]
            array = array * backend.reshape(diagonal, (-1, 1) if _AXES[name] == 0 else (1, -1))
        return array

    def times(
        self, backend: Backend, x: Array, array: Array, multipliers: Mapping[str, Array], transposed: bool
    ) -> Array:
        """See :meth:`Multiplied.times`; the diagonals multiply x and the result, so that A is never copied."""
        before, after = ("rank", "size") if transposed else ("size", "rank")
        x = x * multipliers[before] if before in multipliers else x
        x = backend.matmul(x, backend.matrix_transpose(array) if transposed else array)
        return x * multipliers[after] if after in multipliers else x

    def gradients(
        self, array: np.ndarray, multipliers: Mapping[str, np.ndarray], gradient: np.ndarray
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return the gradients of A and of each diagonal."""
        wide = {name: multipliers[name].reshape((-1, 1) if _AXES[name] == 0 else (1, -1)) for name in self.multipliers}
        gradients = {}
        for name in self.multipliers:
            others = math.prod((diagonal for other, diagonal in wide.items() if other != name), start=np.float64(1.0))
            gradients[name] = (gradient * array * others).sum(axis=1 - _AXES[name])
        return gradient * math.prod(wide.values(), start=np.float64(1.0)), gradients


# -- The sources that a config names, by the names of arrays -----------------------------------------------------------


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
    >>> sources = SourceMap({"factor0": Trained()})
    >>> sources.of("split2.factor0"), sources == {"factor0": Trained()}
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
            require_frozen(type(source), f"source {type(source).__name__}", "source")
            require_plain(source, f"sources[{key!r}]", ", a source", Source)

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
    """Return the keys that match an array, longest first."""
    parts = name.split(".")
    return [".".join(parts[skipped:]) for skipped in range(len(parts))]


# -- Where each array of a group comes from, after ties and multipliers ------------------------------------------------


class Origin(NamedTuple):
    """Origin of the numbers of one array.

    Attributes
    ----------
    group : int
        Group of the array that has the numbers: another one's if the array is tied to it.
    name : str
        The network's name of that array.
    source : Source
        That array's source: trained, or one that computes it or takes it from the caller.
    multiplied : Multiplied or None
        The source whose multipliers multiply it, if there are any.
    owner : (int, str)
        Group and network's name of the array that the multipliers belong to.
    """

    group: int
    name: str
    source: Source
    multiplied: Multiplied | None
    owner: tuple[int, str]

    @property
    def key(self) -> tuple[int, str]:
        """Group and name of the array that has the numbers."""
        return self.group, self.name

    @property
    def learns(self) -> bool:
        """Whether anything of the array is trained."""
        return self.source.trained or self.multiplied is not None


def origins_of(sources: SourceMap, group: int, names: Collection[str], num_groups: int) -> dict[str, Origin]:
    """Return the origin of each array of a group, in order.

    Parameters
    ----------
    sources : SourceMap
    group : int
    names : collection of str
        The network's names of the arrays, the same for all groups.
    num_groups : int

    Raises
    ------
    ConfigError
        If an array is tied to one that does not exist, or in a circle.

    Notes
    -----
    An array that is tied to a scaled one shares its multipliers; one that is scaled itself, ``Scaled(Tied(…))``, has
    its own.

    Examples
    --------
    >>> names = ["split0.factor0", "split0.factor1"]
    >>> tied = SourceMap({"factor1": Tied("group0.split0.factor1")})
    >>> origins_of(tied, 3, names, 5)["split0.factor1"].key
    (0, 'split0.factor1')
    """
    return {name: _origin(sources, (group, name), names, num_groups) for name in names}


def _origin(sources: SourceMap, array: tuple[int, str], names: Collection[str], num_groups: int) -> Origin:
    """Follow ties to the array that has the numbers, with the first multipliers found on the way."""
    source, multiplied, owner, seen = sources.of(array[1]) or Trained(), None, array, [array]
    while isinstance(source, (Multiplied, Tied)):
        if isinstance(source, Multiplied):
            if multiplied is None:
                multiplied, owner = source, array
            source = source.of
            continue
        group, name = source.target(array[0])
        if name not in names or group >= num_groups:
            raise ConfigError(
                f"sources ties {array[1]!r} to {safe_repr(source.to)}, which is not there: there are groups 0 to "
                f"{num_groups - 1} with the arrays {summarize(list(names))}"
            )
        if (group, name) == array:
            source = Trained()  # the array that the others are tied to
            break
        array = group, name
        if array in seen:
            circle = ", ".join(repr(name) for _, name in seen)
            raise ConfigError(f"sources ties {circle} in a circle, so that none of them has numbers: train one of them")
        seen.append(array)
        source = sources.of(name) or Trained()
    return Origin(*array, source, multiplied, owner)


def inner_source(source: Source) -> Source:
    """Return the source without its multipliers."""
    return source.of if isinstance(source, Multiplied) else source


def check_term(origins: Mapping[str, Origin], term: Collection[str]) -> None:
    """Raise a ConfigError if nothing of a term's arrays is trained."""
    if not any(origins[name].learns for name in term):
        raise ConfigError(
            f"sources freezes all of {', '.join(term)}, and nothing is left to train there: give one of them "
            "tnadapt.sources.Trained()"
        )


# -- The frozen arrays of one group ------------------------------------------------------------------------------------


class FrozenArray(NamedTuple):
    """One frozen array: what computes it.

    Attributes
    ----------
    full : str
        Name of the array in the plan's ``frozen_shapes``; that of the array it is tied to, if it is.
    source : Source
    shape : tuple of int
    stream : Stream
    """

    full: str
    source: Source
    shape: tuple[int, ...]
    stream: Stream

    def compute(self, stream: Stream | None = None) -> np.ndarray:
        """Compute the array in float32, or raise a ConfigError that names it; with another stream if one is given."""
        source, shape = self.source, self.shape
        try:
            numbers = np.asarray(source.array(shape, self.stream if stream is None else stream))
        except TnadaptError:
            raise
        except Exception as error:  # another package's source may raise anything
            raise ConfigError(
                f"{safe_repr(source)} failed to compute {self.full!r}: {type(error).__name__}: {error}"
            ) from error
        if numbers.shape != shape or numbers.dtype.kind != "f":
            raise ConfigError(
                f"{safe_repr(source)} must compute floating-point numbers of shape {shape} for {self.full!r}; it "
                f"returned {numbers.dtype} of shape {numbers.shape}"
            )
        with np.errstate(over="ignore"):
            single = numbers.astype(np.float32)
        if not np.isfinite(single).all():
            raise ConfigError(
                f"{safe_repr(source)} computes NaN, infinity, or numbers beyond float32 for {self.full!r}"
            )
        if not single.any():
            raise ConfigError(
                f"{safe_repr(source)} computes only zeros for {self.full!r}, so that nothing could be trained"
            )
        return single


class FrozenArrays(FixedArrays):
    """The frozen arrays of one group, by the network's names.

    Parameters
    ----------
    entries : mapping of str to FrozenArray
    given : mapping of str to ndarray, optional
        Arrays that are not computed, by their full names, in float32.

    Examples
    --------
    >>> FrozenArrays({}).entries
    {}
    """

    def __init__(self, entries: Mapping[str, FrozenArray], given: Mapping[str, np.ndarray] | None = None) -> None:
        super().__init__()
        self.entries = dict(entries)
        self._given = {} if given is None else given  # filled in later if it is empty
        self._squares: dict[str, float] = {}  # of arrays that depend on the seed alone and never change

    def make(self, key: Any) -> np.ndarray:
        """Return an array in float32, by its name, or by (name, dtype) with its values rounded to that dtype."""
        if isinstance(key, tuple):
            name, dtype = key
            rounded = rounded_to(self.make(name), dtype)
            if not np.isfinite(rounded).all():
                raise ConfigError(
                    f"{safe_repr(self.entries[name].source)} computes numbers for {name!r} that {dtype} cannot "
                    "represent; use float32"
                )
            return rounded
        entry = self.entries[key]
        array = self._given.get(entry.full)
        if array is not None:
            return array[tuple(map(slice, entry.shape))]
        if entry.source.brought:
            raise ConfigError(
                f"{entry.full!r} is an array that the caller brings: tnadapt.UpdatePlan(…, given={{{entry.full!r}: "
                "array}), or tnadapt.torch.attach(…, given=…)"
            )
        if entry.source.needs_base:
            raise ConfigError(
                f"{entry.full!r} is computed from the base weights: bind the plan to them with "
                "plan.with_base(weights); on a model that was on the meta device, call adapter.reset() once it has "
                "its weights"
            )
        return entry.compute()

    def mean_square(self, name: str) -> float:
        """Return the mean square of an array, rounded to eight bits so that all machines agree."""
        return self._square(name, self.entries[name].source.mean_square(self.entries[name].shape))

    def expected_square(self, name: str) -> float:
        """Return the mean square of an array for any base weights; see :meth:`Source.expected_square`."""
        return self._square(name, self.entries[name].source.expected_square(self.entries[name].shape))

    def _square(self, name: str, known: float | None) -> float:
        if known is None:
            entry = self.entries[name]
            changes = entry.full in self._given or entry.source.brought or entry.source.needs_base
            known = None if changes else self._squares.get(name)
            if known is None:
                known = _mean_square(self.host(name))
                if not changes:
                    self._squares[name] = known
        mantissa, exponent = math.frexp(known)
        return math.ldexp(round(mantissa * 256.0), exponent - 8)


def _mean_square(array: np.ndarray) -> float:
    wide = array.astype(np.float64).reshape(-1)
    return float(wide @ wide) / wide.size


# -- The sources by name, and as JSON ----------------------------------------------------------------------------------


SOURCES: Registry[Source] = Registry(
    "source",
    Source,
    {
        "trained": Trained,
        "seeded": Seeded,
        "from-base": FromBase,
        "base-core": BaseCore,
        "given": Given,
        "tied": Tied,
        "scaled": Scaled,
        "mixed": Mixed,
    },
)
# The limit for nested sources, which a hostile file may have.
_MAX_DEPTH = 4


def register_source(name: str, cls: type[Source]) -> None:
    """Make a source known by a name, for ``Config(sources={array: cls(…)})`` and adapter files.

    Parameters
    ----------
    name : str
        Lower-case letters, digits, ``.``, ``_`` and ``-``. It is written into adapter files.
    cls : type
        A subclass of :class:`tnadapt.sources.Source`: a frozen dataclass.

    Raises
    ------
    ConfigError
        If the name is not of that form, is built in, or registered by another module, or the class is not a Source, or
        not a frozen dataclass.

    See Also
    --------
    tnadapt.testing.SourceContract : The tests that such a class has to pass.

    Examples
    --------
    LoRA with a frozen factor, so that half of the numbers are trained:

    >>> import dataclasses
    >>> import tnadapt as tna
    >>> from tnadapt.algebra import rng
    >>> @dataclasses.dataclass(frozen=True)
    ... class Normal(tna.sources.Source):
    ...     std: float = 1.0
    ...     def array(self, shape, stream):
    ...         drawn = rng.normals(stream.seed, stream.group, stream.purpose, 0, shape[0] * shape[1])
    ...         return self.std * drawn.reshape(shape)
    >>> tna.register_source("normal", Normal)
    >>> plan = tna.UpdatePlan(tna.Config(rank=2, sources={"factor1": Normal(0.1)}), [(6, 4)])
    >>> plan.param_shapes, plan.frozen_shapes
    ({'group0.split0.factor0': (6, 2)}, {'group0.split0.factor1': (4, 2)})
    """
    SOURCES.check(name, cls)
    require_frozen(cls, f"source {cls.__name__}", "source")
    SOURCES.register(name, cls)


def source_to_dict(source: Source) -> dict[str, Any]:
    """Return a source as JSON knows it: its registered name as ``"source"``, and its fields.

    Raises
    ------
    ConfigError
        If its class is not registered.

    Examples
    --------
    >>> source_to_dict(Trained())
    {'source': 'trained'}
    """
    name = next((name for name, cls in SOURCES.items() if cls is type(source)), None)
    if name is None:
        raise ConfigError(
            f"{safe_repr(source)} cannot be written: its class is not registered; call tnadapt.register_source(name, "
            f"{type(source).__name__}). If a class of this name was registered again since, create the source again"
        )
    return {
        "source": name,
        **{field.name: _stored(getattr(source, field.name)) for field in dataclasses.fields(source)},
    }


def _stored(value: Any) -> Any:
    if isinstance(value, Source):
        return source_to_dict(value)
    return [_stored(item) for item in value] if isinstance(value, tuple) else value


def source_from_dict(settings: Mapping[str, Any]) -> Source:
    """Return the source of a dictionary that :func:`source_to_dict` wrote.

    Raises
    ------
    ConfigError
        If it is not a mapping, its name is not registered, or its fields are not those of the source.

    Examples
    --------
    >>> source_from_dict({"source": "trained"})
    Trained()
    >>> source_from_dict({"source": "trained", "seed": 1})
    Traceback (most recent call last):
        ...
    tnadapt.errors.ConfigError: source 'trained' has no setting 'seed'; it has none
    """
    return _from_dict(settings, _MAX_DEPTH)


def _from_dict(settings: Any, depth: int) -> Source:
    if depth == 0:
        raise ConfigError(f"sources are nested more than {_MAX_DEPTH} deep")
    if not isinstance(settings, Mapping) or "source" not in settings:
        raise ConfigError(f"a source must be a mapping with its name as 'source'; got {safe_repr(settings)}")
    name = settings["source"]
    cls = SOURCES.find(name)
    fields = {
        key: _from_dict(value, depth - 1) if isinstance(value, Mapping) else value
        for key, value in settings.items()
        if key != "source"
    }
    return from_stored(cls, fields, f"source {name!r}")
