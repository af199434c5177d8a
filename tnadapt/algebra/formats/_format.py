"""Base class of formats: a format computes a tensor of given sizes from a few arrays.

A format must define two things: its arrays (:meth:`Format.array_shapes`), and the einsum that computes the tensor from
them (:attr:`Format.formula`). Everything else is derived from these; a class overrides a method where it has a faster
algorithm or a sharper formula.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tnadapt.backends import Backend
from tnadapt.backends.backend import Array
from tnadapt.errors import ConfigError, integer, safe_repr

from ..unfolding import Cut
from ._contraction import Contraction, Formula
from ._halves import Halves, Legs
from ._jacobian import jacobian_rank
from ._minimal_cut import least_cut, least_cut_of_legs

if TYPE_CHECKING:
    from typing import Self

__all__ = ["Format", "Ranges", "Rank", "rank_a_mode", "rows_of", "unfolded"]

Rank = int | tuple[int | None, ...]
Ranges = Sequence[tuple[int, int]]

# A larger rank is a typo or an attack.
MAX_RANK = 1 << 40
# Number of unfoldings considered for a lower bound, for each number of modes as rows.
_UNFOLDINGS = 16


class Format:
    """A parametrization of tensors of given sizes by a few arrays.

    Parameters
    ----------
    sizes : sequence of int
        ``d_1 … d_M``.
    rank : int or tuple
        As in :class:`~tnadapt.Config`.

    Attributes
    ----------
    sizes : tuple of int
    rank_given : int or tuple
    shapes : dict of str to tuple of int
        The arrays, in order.
    title : str
        Display name of the format; the class's name by default.
    ones : frozenset of str
        Arrays that are initialized to one.
    unfolds : bool
        Whether :meth:`inner` returns a number for every cut of a tensor of integer rank. False for a format that does
        not define ``inner``.
    diagram : str
        How :func:`tnadapt.plot.network` places the arrays: ``"network"`` works for any format, by its formula.

    Notes
    -----
    A subclass defines :meth:`array_shapes` and :attr:`formula`. The tensor must be linear in each array, as any einsum
    is. The default methods are correct for every network; a subclass overrides a method where it has a faster algorithm
    or a sharper formula.

    Examples
    --------
    A product of three matrices, in full:

    >>> from tnadapt.algebra.formats import Format
    >>> class Three(Format):
    ...     formula = "ar,rs,sb->ab"
    ...     def array_shapes(self, rank):
    ...         return {"left": (self.sizes[0], rank), "middle": (rank, rank), "right": (rank, self.sizes[1])}
    >>> Three((5, 7), 2).num_parameters, Three((5, 7), 2).unfolding_rank([0])
    (28, 2)
    """

    title: str = ""
    ones: frozenset[str] = frozenset()
    unfolds: bool = False
    diagram: str = "network"

    def __init__(self, sizes: Sequence[int], rank: Rank) -> None:
        self.sizes = tuple(sizes)
        self.rank_given = rank
        self.shapes: dict[str, tuple[int, ...]] = self.array_shapes(rank)
        if type(self).tensor is Format.tensor or type(self).adjoint is Format.adjoint:
            # Planned here, so that a compiler that traces a call does not have to trace the planning.
            self._contractions = self._planned()

    # -- What a format is ----------------------------------------------------------------------

    @classmethod
    def checked_rank(cls, name: str, rank: Any, order: int) -> Rank:
        """Return the rank of a config, or raise an error that says which ranks the format takes. Default: one integer.

        Parameters
        ----------
        name : str
            Name of the format, for the message.
        rank : object
            As given by the user.
        order : int
            M.
        """
        if isinstance(rank, (tuple, list)):
            raise ConfigError(f"format={name!r} has one rank; got rank={safe_repr(rank)}: give an integer")
        return integer("rank", rank, 1, MAX_RANK, ConfigError, "or a tuple with one rank per mode")

    def array_shapes(self, rank: Rank) -> dict[str, tuple[int, ...]]:
        """Return the name and shape of each array for these sizes, in order; see also :attr:`zero`."""
        raise ConfigError(f"{type(self).__name__} does not define its arrays: define array_shapes(rank)")

    @property
    def formula(self) -> str:
        """Einsum string of the arrays, in the order of ``shapes``, that gives the tensor: one open index per mode."""
        raise ConfigError(
            f"{type(self).__name__} does not define its tensor: define formula, an einsum string such as 'ar,br->ab'"
        )

    @functools.cached_property
    def _parsed(self) -> tuple[Formula, dict[str, int]]:
        found = Formula.parsed(self.formula, len(self.shapes), len(self.sizes))
        sizes = found.sizes(list(self.shapes.values()))
        made = tuple(sizes[index] for index in found.output)
        if made != self.sizes:
            raise ConfigError(
                f"the formula of {type(self).__name__} gives a tensor of sizes {made}; expected {self.sizes}"
            )
        return found, sizes

    @property
    def zero(self) -> str:
        """Name of the array that starts at zero in a linear adapter; by default the first one with the leading mode."""
        formula, _ = self._parsed
        return next(name for name, own in zip(self.shapes, formula.inputs, strict=True) if formula.output[0] in own)

    def mode_of(self, name: str) -> int | None:
        """Return the mode whose factor an array is: a matrix of its size and a bond. None for any other array."""
        formula, _ = self._parsed
        own = formula.inputs[list(self.shapes).index(name)]
        if len(own) != 2 or own[0] not in formula.output or own[1] in formula.output:
            return None
        return formula.output.index(own[0])

    @property
    def num_parameters(self) -> int:
        """Total number of elements of all arrays."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    # -- The tensor ----------------------------------------------------------------------------

    def tensor(self, backend: Backend, arrays: Mapping[str, Array], ranges: Ranges) -> Array:
        """Compute the tensor on a box. Default: the einsum of the formula, restricted to the rows of the box.

        Parameters
        ----------
        backend : Backend
            Backend of the arrays.
        arrays : mapping of str to array
            Arrays with the shapes in ``shapes``.
        ranges : sequence of (int, int)
            Start and stop in every mode.

        Returns
        -------
        array
            With the sizes of the box.
        """
        whole, axes, _ = self._contractions
        parts = []
        for name, own in zip(self.shapes, axes, strict=True):
            part = arrays[name]
            for axis, mode in own:
                part = rows_of(part, ranges[mode], axis)
            parts.append(part)
        return whole(backend, parts)

    def _planned(self) -> tuple[Contraction, list[list[tuple[int, int]]], list[tuple[Contraction, list[int], bool]]]:
        """Plan the contraction that gives the tensor, the modes of each array's axes, and the adjoint of each array.

        The modes are ``(axis, mode)`` pairs per array. An adjoint is a contraction, the shape of its result, and
        whether the array has an index that occurs nowhere else.
        """
        formula, _ = self._parsed
        modes = {index: mode for mode, index in enumerate(formula.output)}
        axes = [[(axis, modes[i]) for axis, i in enumerate(own) if i in modes] for own in formula.inputs]
        adjoints = []
        for k, (own, shape) in enumerate(zip(formula.inputs, self.shapes.values(), strict=True)):
            inputs = [formula.output, *formula.inputs[:k], *formula.inputs[k + 1 :]]
            reached = "".join(i for i in own if any(i in each for each in inputs))
            # An index on this array alone is summed over, so the gradient is constant along that axis: length 1 here,
            # broadcast in :meth:`adjoint`.
            kept = [d if i in reached else 1 for i, d in zip(own, shape, strict=True)]
            adjoints.append((Contraction(inputs, reached), kept, len(reached) < len(own)))
        return Contraction(formula.inputs, formula.output), axes, adjoints

    def adjoint(self, backend: Backend, arrays: Mapping[str, Array], tensor: Array) -> dict[str, Array]:
        """Compute the gradient of ``<tensor, T>`` with respect to each array, where T is the tensor of the arrays.

        T is linear in each array, so the gradient is the adjoint of that linear map with the other arrays fixed.
        Default: the einsum of the tensor with the other arrays.

        Parameters
        ----------
        backend : Backend
        arrays : mapping of str to array
        tensor : array, shape (d_1, …, d_M)

        Returns
        -------
        dict of str to array
            With the shapes in ``shapes``.
        """
        _, _, adjoints = self._contractions
        names, found = list(self.shapes), dict[str, Array]()
        for k, (name, (contraction, kept, shared)) in enumerate(zip(names, adjoints, strict=True)):
            others = [arrays[other] for other in names[:k] + names[k + 1 :]]
            gradient = backend.reshape(contraction(backend, [tensor, *others]), kept)
            found[name] = gradient + arrays[name] * 0.0 if shared else gradient
        return found

    def stored_halves(self, cut: Cut) -> tuple[str, str] | None:
        """Return the names of two arrays that are L and Rᵀ of a part of the unfolding; None if they are computed."""
        return None

    def inner(self, modes: int) -> int | None:
        """Return the number of columns of L in the unfolding ``L R`` with the first ``modes`` modes as rows, or None.

        ``1 <= modes < M``. None if there is no such product; the tensor is then computed box by box, which takes a few
        times as long for thin slices.
        """
        return None

    def unfolded(self, backend: Backend, arrays: Mapping[str, Array], cut: Cut) -> tuple[Array, Array]:
        """Compute L and R of a part of an unfolding for which :meth:`inner` returns a number.

        Parameters
        ----------
        backend : Backend
        arrays : mapping of str to array
        cut : Cut
            Number of modes that are rows, and the range of rows and columns.

        Returns
        -------
        (array, array)
            Shapes (rows, inner) and (inner, columns); their product is that part of the unfolding.
        """
        raise ConfigError(f"{type(self).__name__} defines inner() but not unfolded(): define both, or neither")

    def factors(self, backend: Backend, arrays: Mapping[str, Array]) -> tuple[Array, Array] | None:
        """Return L and R whose product is the tensor of two modes; None if no bond limits its rank.

        Default: :meth:`unfolded`, or else the halves of the network at a minimal cut if that is below both sides.

        Parameters
        ----------
        backend : Backend
        arrays : mapping of str to array

        Returns
        -------
        (array, array) or None
            Shapes (d_1, inner) and (inner, d_2).
        """
        rows, cols = self.sizes
        if self.inner(1) is not None:
            return self.unfolded(backend, arrays, Cut(1, (0, rows), (0, cols), 0))
        halves = self.halves(((rows, 1), (1, cols)))
        if halves.width >= min(rows, cols):
            return None
        left, right = halves(backend, [arrays[name] for name in self.shapes], [(0, rows), (0, cols)])
        return backend.reshape(left, (rows, -1)), backend.matrix_transpose(backend.reshape(right, (cols, -1)))

    def boxed(self, lengths: Sequence[int]) -> Self | None:
        """Return the format of a box with these lengths, whose arrays are those of this one cut to the box.

        Default: None, if :meth:`unfolded` needs more than ``sizes`` to be changed.
        """
        return None

    def summed(self, terms: int) -> Self | None:
        """Return the format of a sum of terms, their arrays concatenated along the last axis; None if there is none."""
        return None

    # -- Used by the initialization ------------------------------------------------------------

    def num_terms_per_array(self, name: str) -> int:
        """Return how many elements of one array each element of the tensor sums over. Default: from the formula."""
        formula, size = self._parsed
        own = formula.inputs[list(self.shapes).index(name)]
        return math.prod(size[index] for index in own if index not in formula.output)

    @property
    def num_terms(self) -> int:
        """Number of products, of one element of each array, that an element of the tensor is a sum of."""
        formula, size = self._parsed
        return math.prod(length for index, length in size.items() if index not in formula.output)

    # -- Used by the planner, the solvers and the cost estimates -------------------------------

    def unfolding_rank(self, modes: Sequence[int]) -> int:
        """Return an upper bound on the rank of the unfolding with these modes as rows.

        Default: the least product of bonds between them and the other modes, a minimal cut of the network.
        """
        rows = math.prod(self.sizes[mode] for mode in modes)
        formula, size = self._parsed
        return min(rows, math.prod(self.sizes) // rows, least_cut(formula, size, modes))

    def rank_of_legs(self, legs: Sequence[tuple[int, int]]) -> int:
        """Return an upper bound on the rank of a box of the tensor as a matrix.

        Default: a minimal cut of the network. It holds for any arrays, trained or not.

        Parameters
        ----------
        legs : sequence of (int, int)
            For each mode, the numbers of rows and of columns that its index in the box stands for, rows slow.
        """
        formula, size = self._parsed
        return least_cut_of_legs(formula, size, legs)

    def halves(self, legs: Legs) -> Halves:
        """Return a way to compute a box as a product of two matrices, whose inner dimension is :meth:`rank_of_legs`."""
        formula, size = self._parsed
        return Halves.of(formula, tuple(size.items()), tuple((m,) for m in range(len(self.sizes))), self.sizes, legs)

    def bounded_unfoldings(self) -> Iterator[tuple[list[int], int]]:
        """Yield unfoldings of limited rank, each with its limit, for lower bounds on the error of a fit.

        Default: unfoldings with up to half of the modes as rows, at most 16 for each number of modes.
        """
        order = len(self.sizes)
        for size in range(1, order // 2 + 1):
            for modes in itertools.islice(itertools.combinations(range(order), size), _UNFOLDINGS):
                rows = math.prod(self.sizes[mode] for mode in modes)
                rank = self.unfolding_rank(modes)
                if rank < min(rows, math.prod(self.sizes) // rows):
                    yield list(modes), rank

    def matrix_rank(self) -> int | None:
        """Return the rank of a matrix (M = 2) of this format with random arrays; None to compute it numerically."""
        return None

    def freedom(self, sizes: Sequence[int], times: int = 1, power: int = 1) -> int:
        """Return the dimension of the set of tensors that the format can represent, or an upper bound on it.

        Parameters
        ----------
        sizes : sequence of int
            Sizes to use instead of the format's; none larger.
        times : int
            For sums of this many tensors.
        power : int
            For elementwise products of this many tensors.

        Notes
        -----
        Default: for small networks the rank of the Jacobian at random arrays; otherwise the number of parameters or of
        elements, whichever is smaller.
        """
        elements = math.prod(sizes)
        if power > 1:
            return elements
        own = type(self)(sizes, self.rank_given)
        return min(elements, jacobian_rank(own, times) or times * own.num_parameters)

    def useful_rank(self) -> int | None:
        """Return the rank beyond which the format gains no expressiveness; None if the format has no rank.

        Default: the number of elements, which is an upper bound.
        """
        return math.prod(self.sizes)

    @property
    def products(self) -> int:
        """Number of products per element in the last step that computes the tensor; by default :attr:`num_terms`."""
        return self.num_terms

    def fit(self, algebra: Any, tensor: Array, start: Mapping[str, Array] | None, limits: Any) -> Any:
        """Fit the arrays to a tensor; return a :class:`tnadapt.decomposition.Fit`, or None to use the general solver.

        The general solver is alternating least squares with :meth:`tensor` and :meth:`adjoint`, from several starts.
        See :func:`tnadapt.decomposition.fit_format` for the parameters.
        """
        return None


def rank_a_mode(name: str, rank: Any, order: int, expected: int, optional: bool = False) -> Rank:
    """:meth:`Format.checked_rank` for one integer or ``expected`` integers; with ``optional``, each may be None."""
    if not isinstance(rank, (tuple, list)):
        return integer("rank", rank, 1, MAX_RANK, ConfigError, "or a tuple with one rank per mode")
    if len(rank) != expected:
        raise ConfigError(
            f"format={name!r} of order {order} needs {expected} ranks; got {len(rank)}: {safe_repr(rank)}"
        )
    other = "or None" if optional else ""
    return tuple(
        None if optional and each is None else integer(f"rank[{mode}]", each, 1, MAX_RANK, ConfigError, other)
        for mode, each in enumerate(rank)
    )


def unfolded(backend: Backend, tensor: Array, mode: int) -> Array:
    """Unfold a tensor: one mode as rows, the others in order as columns."""
    moved = backend.moveaxis(tensor, mode, 0)
    return backend.reshape(moved, (tensor.shape[mode], math.prod(tensor.shape) // tensor.shape[mode]))


def rows_of(array: Array, bounds: tuple[int, int], axis: int = 0) -> Array:
    """Slice one axis; return the array itself if the range covers the whole axis."""
    start, stop = bounds
    if (start, stop) == (0, array.shape[axis]):
        return array
    return array[(*(slice(None),) * axis, slice(start, stop), ...)]
