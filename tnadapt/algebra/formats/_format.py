"""The contract of a format: one way of making a tensor of given sizes from a few arrays.

A format has to say two things: which arrays it has (:meth:`Format.array_shapes`), and the einsum that makes the tensor
of them (:attr:`Format.formula`). All else follows from these by computation, and a class overrides what it has a faster
way or a sharper formula for.
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
from ._contraction import Contraction, Formula, least_cut
from ._jacobian import jacobian_rank

if TYPE_CHECKING:
    from typing import Self

__all__ = ["Format", "Ranges", "Rank", "rank_a_mode", "rows_of", "unfolded"]

Rank = int | tuple[int | None, ...]
Ranges = Sequence[tuple[int, int]]

# A rank beyond this is a slip or hostile.
MAX_RANK = 1 << 40
# Unfoldings that are looked at for a lower bound, of each number of modes as rows.
_UNFOLDINGS = 16


class Format:
    """One way of making a tensor of given sizes from a few arrays.

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
        What people call the format; the class's name by default.
    ones : frozenset of str
        Arrays that start at one.
    unfolds : bool
        Whether :meth:`inner` has an answer for every cut of a tensor of integer rank. A format that defines no
        ``inner`` says False.
    diagram : str
        How :func:`tnadapt.plot.network` places its arrays: ``"network"`` places any, by the formula.

    Notes
    -----
    A subclass defines :meth:`array_shapes` and :attr:`formula`. The tensor has to be linear in each array, which an
    einsum is. What the methods below compute for it is correct for every network; a subclass overrides what it has a
    faster way or a sharper formula for.

    Examples
    --------
    A matrix product of three, in full:

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
            # Planned at once, so that no compiler that traces a call comes to trace the planning.
            self._contractions = self._planned()

    # -- What a format is ----------------------------------------------------------------------

    @classmethod
    def checked_rank(cls, name: str, rank: Any, order: int) -> Rank:
        """The rank of a config, or an error that says which ranks the format takes. By default one integer.

        Parameters
        ----------
        name : str
            Of the format, for the message.
        rank : object
            As the user gave it.
        order : int
            M.
        """
        if isinstance(rank, (tuple, list)):
            raise ConfigError(f"format={name!r} has one rank; got rank={safe_repr(rank)}: give an integer")
        return integer("rank", rank, 1, MAX_RANK, ConfigError, "or a tuple of one rank a mode")

    def array_shapes(self, rank: Rank) -> dict[str, tuple[int, ...]]:
        """Name and shape of each array, for these sizes; the array that starts at zero first, if none else is said."""
        raise ConfigError(f"{type(self).__name__} does not say which arrays it has: define array_shapes(rank)")

    @property
    def formula(self) -> str:
        """The einsum of the arrays, in the order of ``shapes``, that is the tensor: one open index a mode."""
        raise ConfigError(
            f"{type(self).__name__} does not say how its arrays make the tensor: define formula, an einsum string "
            "such as 'ar,br->ab'"
        )

    @functools.cached_property
    def _parsed(self) -> tuple[Formula, dict[str, int]]:
        found = Formula.parsed(self.formula, len(self.shapes), len(self.sizes))
        sizes = found.sizes(list(self.shapes.values()))
        made = tuple(sizes[index] for index in found.output)
        if made != self.sizes:
            raise ConfigError(f"the formula of {type(self).__name__} makes a tensor of {made}; expected {self.sizes}")
        return found, sizes

    @property
    def zero(self) -> str:
        """The array that is zero at the start of a linear adapter: by default the first one with the leading mode."""
        formula, _ = self._parsed
        return next(name for name, own in zip(self.shapes, formula.inputs, strict=True) if formula.output[0] in own)

    @property
    def num_parameters(self) -> int:
        """Elements of all arrays."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    # -- The tensor ----------------------------------------------------------------------------

    def tensor(self, backend: Backend, arrays: Mapping[str, Array], ranges: Ranges) -> Array:
        """The tensor on a box. By default the einsum of the formula, with the rows of the box alone.

        Parameters
        ----------
        backend : Backend
            Of the arrays.
        arrays : mapping of str to array
            Of the shapes in ``shapes``.
        ranges : sequence of (int, int)
            Start and stop in every mode.

        Returns
        -------
        array
            Of the box's sizes.
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
        """The contraction that is the tensor, which axis of each array is which mode, and the adjoint of each array."""
        formula, _ = self._parsed
        modes = {index: mode for mode, index in enumerate(formula.output)}
        axes = [[(axis, modes[i]) for axis, i in enumerate(own) if i in modes] for own in formula.inputs]
        adjoints = []
        for k, (own, shape) in enumerate(zip(formula.inputs, self.shapes.values(), strict=True)):
            inputs = [formula.output, *formula.inputs[:k], *formula.inputs[k + 1 :]]
            reached = "".join(i for i in own if any(i in each for each in inputs))
            # An index that is on this array alone is summed over: its elements share one gradient.
            kept = [d if i in reached else 1 for i, d in zip(own, shape, strict=True)]
            adjoints.append((Contraction(inputs, reached), kept, len(reached) < len(own)))
        return Contraction(formula.inputs, formula.output), axes, adjoints

    def adjoint(self, backend: Backend, arrays: Mapping[str, Array], tensor: Array) -> dict[str, Array]:
        """The gradient of ``<tensor, T>`` with respect to each array, T being what the arrays make.

        T is linear in each array, so this is the adjoint of each of these maps, the other arrays held. By default the
        einsum of the tensor with the other arrays.

        Parameters
        ----------
        backend : Backend
        arrays : mapping of str to array
        tensor : array, shape (d_1, …, d_M)

        Returns
        -------
        dict of str to array
            In the shapes of ``shapes``.
        """
        _, _, adjoints = self._contractions
        names, found = list(self.shapes), dict[str, Array]()
        for k, (name, (contraction, kept, shared)) in enumerate(zip(names, adjoints, strict=True)):
            others = [arrays[other] for other in names[:k] + names[k + 1 :]]
            gradient = backend.reshape(contraction(backend, [tensor, *others]), kept)
            found[name] = gradient + arrays[name] * 0.0 if shared else gradient
        return found

    def inner(self, modes: int) -> int | None:
        """How many columns L has where the first ``modes`` modes are rows and the tensor is ``L R``; None for no such.

        ``1 <= modes < M``. A format without it is formed box by box, which takes a few times as long for thin slices.
        """
        return None

    def unfolded(self, backend: Backend, arrays: Mapping[str, Array], cut: Cut) -> tuple[Array, Array]:
        """L and R of a part of an unfolding, where :meth:`inner` says that there are such.

        Parameters
        ----------
        backend : Backend
        arrays : mapping of str to array
        cut : Cut
            Which modes are rows, and which rows and columns are wanted.

        Returns
        -------
        (array, array)
            Of shapes (rows, inner) and (inner, columns); their product is that part.
        """
        raise ConfigError(f"{type(self).__name__} has inner() and no unfolded(): define both, or neither")

    def summed(self, terms: int) -> Self | None:
        """The format whose arrays are those of so many terms side by side along the last axis; None for no such."""
        return None

    # -- What the start of training asks -------------------------------------------------------

    def num_terms_per_array(self, name: str) -> int:
        """How many elements of one array each element of the tensor is a sum over. By default, by the formula."""
        formula, size = self._parsed
        own = formula.inputs[list(self.shapes).index(name)]
        return math.prod(size[index] for index in own if index not in formula.output)

    @property
    def num_terms(self) -> int:
        """How many products, of one element of each array, an element of the tensor is a sum of; by the formula."""
        formula, size = self._parsed
        return math.prod(length for index, length in size.items() if index not in formula.output)

    # -- What the planner, the solvers and the costs ask ---------------------------------------

    def unfolding_rank(self, modes: Sequence[int]) -> int:
        """What the rank of the unfolding with these modes as rows is at most.

        By default the least product of bonds between them and the others: a minimal cut of the network.
        """
        rows = math.prod(self.sizes[mode] for mode in modes)
        formula, size = self._parsed
        return min(rows, math.prod(self.sizes) // rows, least_cut(formula, size, modes))

    def bounded_unfoldings(self) -> Iterator[tuple[list[int], int]]:
        """Unfoldings whose rank is limited, and that limit, for lower bounds of a fit's error.

        By default of up to half of the modes, some of each number.
        """
        order = len(self.sizes)
        for size in range(1, order // 2 + 1):
            for modes in itertools.islice(itertools.combinations(range(order), size), _UNFOLDINGS):
                rows = math.prod(self.sizes[mode] for mode in modes)
                rank = self.unfolding_rank(modes)
                if rank < min(rows, math.prod(self.sizes) // rows):
                    yield list(modes), rank

    def matrix_rank(self) -> int | None:
        """The rank of a matrix (M = 2) of this format with random arrays; None where it has to be computed of one."""
        return None

    def freedom(self, sizes: Sequence[int], times: int = 1, power: int = 1) -> int:
        """The dimension of the set of all tensors of some sizes that the format makes; never less than it.

        Parameters
        ----------
        sizes : sequence of int
            In place of the format's own, none larger.
        times : int
            Of sums of so many.
        power : int
            Of elementwise products of so many.

        Notes
        -----
        By default, of small networks, the rank of the Jacobian at random arrays; of others the number of parameters,
        or of elements if those are fewer.
        """
        elements = math.prod(sizes)
        if power > 1:
            return elements
        own = type(self)(sizes, self.rank_given)
        return min(elements, jacobian_rank(own, times) or times * own.num_parameters)

    def useful_rank(self) -> int | None:
        """The rank beyond which none makes anything that a smaller one does not; None if the format has no rank.

        By default the number of elements, which is never too small.
        """
        return math.prod(self.sizes)

    @property
    def products(self) -> int:
        """Products an element of the tensor is a sum of in the last step that forms it; by default all of them."""
        return self.num_terms

    def fit(self, algebra: Any, tensor: Array, start: Mapping[str, Array] | None, limits: Any) -> Any:
        """The arrays nearest to a tensor, as a :class:`tnadapt.decomposition.Fit`; None for the general solver.

        The general solver is alternating least squares with :meth:`tensor` and :meth:`adjoint`, from several starts.
        See :func:`tnadapt.decomposition.fit_format` for the parameters.
        """
        return None


def rank_a_mode(name: str, rank: Any, order: int, expected: int, optional: bool = False) -> Rank:
    """:meth:`Format.checked_rank` of a format that takes one integer, or so many; ``optional``: each may be None."""
    if not isinstance(rank, (tuple, list)):
        return integer("rank", rank, 1, MAX_RANK, ConfigError, "or a tuple of one rank a mode")
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
    """One mode as rows, the others in order as columns."""
    moved = backend.moveaxis(tensor, mode, 0)
    return backend.reshape(moved, (tensor.shape[mode], math.prod(tensor.shape) // tensor.shape[mode]))


def rows_of(array: Array, bounds: tuple[int, int], axis: int = 0) -> Array:
    """A range of one axis; the array itself where that is all of it."""
    start, stop = bounds
    if (start, stop) == (0, array.shape[axis]):
        return array
    return array[(*(slice(None),) * axis, slice(start, stop), ...)]
