"""SuperLoRA: from a config and the shapes of weights to parameters, and from parameters to the ΔW of every weight.

``Config`` + shapes -> :class:`SuperLoRA` (integers) -> ``init`` (arrays) -> ``deltas`` (arrays). Everything else in the
library builds on these steps; no other code computes a ΔW.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tnadapt.argument_checks import checks_arguments, flag, is_sequence, wrong_argument
from tnadapt.backends import Array, ArrayT, Backend, get_backend
from tnadapt.errors import BackendError, ShapeError, integer
from tnadapt.report import TextTable

from .config import Config
from .group import updates_of_runs
from .layout import Piece
from .maps.projection import Projection
from .plan import base_weight
from .units import UnitPlan

__all__ = [
    "SuperLoRA",
    "parameter_count",
    "share_maps",
]


# -- SuperLoRA: from parameters to weight updates ----------------------------------------------------------------------


class SuperLoRA(UnitPlan):
    """The weight updates of a model as one long vector, cut into groups, each made from a small tensor network.

    ``ΔW_group = F(scale * sum_t kron_k(core_k x_1 A_k1 … x_M A_kM))``, unfolded and cut to length.

    Parameters
    ----------
    config : Config
        What each group is made of.
    shapes : sequence of (rows, cols)
        Shapes of the weights to update, in torch's order ``(out_features, in_features)``.
    layers : sequence of hashable, optional
        One key per weight, for ``groups="layer"``.
    roles : sequence of hashable, optional
        One key per weight, for ``groups="role"``, such as ``["q", "v", "q", "v"]``.
    given : mapping of str to array, optional
        The frozen arrays in ``given_shapes``, whose source is :class:`tnadapt.sources.Given`; also those in
        ``base_shapes``, in place of :meth:`with_base`. Copied, in float32.
    start_from : mapping of str to array, optional
        For ``config.start="given"``: the arrays at which training starts, of some or all names in ``array_shapes``;
        the others start as usual. Copied, in float32.

    Attributes
    ----------
    config : Config
    shapes : tuple of (int, int)
    size : int
        N, the number of elements of all weights.
    num_groups : int
        G, the number of groups.
    layout : Layout
        Maps slices of weights to slices of groups.

    Raises
    ------
    ConfigError
        If the config does not suit these weights.
    ShapeError
        If a shape is not a pair of positive integers, or a fold does not fit a group.

    Notes
    -----
    Equation (2) of the paper. The object is a plan in integers: it allocates no arrays, imports no framework, and takes
    microseconds for a model of any size. Random draws and initial arrays of a group are cached once they are used.

    Examples
    --------
    >>> import tnadapt as tna
    >>> ad = SuperLoRA(tna.Config(rank=22, groups=1, fold="hypercube"), [(768, 768)] * 24)
    >>> ad.num_parameters, ad.param_shapes
    (165572, {'group0.split0.factor0': (3763, 22), 'group0.split0.factor1': (3763, 22)})
    >>> params = ad.init()
    >>> deltas = ad.deltas(params)
    >>> len(deltas), deltas[0].shape, bool(deltas[0].any())
    (24, (768, 768), False)
    """

    def __repr__(self) -> str:
        return f"SuperLoRA({self.config!r}, {len(self.shapes)} weights, {self.num_groups} groups, {self.size} elements)"

    def _repr_html_(self) -> str:
        share = 100.0 * self.num_parameters / self.size
        facts = [
            ("weights", f"{len(self.shapes):,}"), ("elements", f"{self.size:,}"), ("groups", f"{self.num_groups:,}"),
            ("parameters", f"{self.num_parameters:,} ({share:.3g} % of the elements)"),
            ("config", repr(self.config)),
        ]  # fmt: skip
        return TextTable(facts, caption=type(self).__name__).html()

    def _reduced(self) -> tuple[Any, ...]:
        # Recompute it from its few integers, instead of pickling the cached draws.
        arguments = self.config, self.shapes, self._layers, self._roles
        return functools.partial(SuperLoRA, given=self.given), arguments, {"_base_starts": self._base_starts}

    def __deepcopy__(self, memo: dict[int, Any]) -> SuperLoRA:
        return self  # immutable

    # -- Arrays ------------------------------------------------------------------------------

    def deltas(self, params: Mapping[str, ArrayT], dtype: str | None = None) -> list[ArrayT]:
        """Compute the update of every weight.

        Parameters
        ----------
        params : mapping of str to array
            Names and shapes as in ``param_shapes``; one library, dtype and device.
        dtype : str, optional
            The dtype in which the parameters were trained, if they have been cast since. Frozen arrays, and the initial
            values that a nonlinear F subtracts, are rounded to it; by default to that of the parameters.

        Returns
        -------
        list of array, shape (rows, cols)
            In the library, dtype and device of the parameters; differentiable in torch and JAX.

        Raises
        ------
        ShapeError
            If an array is missing, unknown or of another shape.
        BackendError
            If libraries, dtypes or devices are mixed, or the dtype is not real floating.

        Notes
        -----
        Each group is computed once and split into pieces. Memory: the long vector of N elements; for a linear F about
        three times its padded length L, and twice that in the first call, which draws. A result may share memory with
        the parameters (a dense update is a view of them): do not write to it.

        Examples
        --------
        >>> import numpy as np, tnadapt as tna
        >>> ad = SuperLoRA(tna.Config(rank=1), [(2, 3)])
        >>> b, a = np.array([[1.0], [2.0]]), np.array([[1.0], [10.0], [100.0]])
        >>> ad.deltas({"group0.split0.factor0": b, "group0.split0.factor1": a})[0]
        array([[  1.,  10., 100.],
               [  2.,  20., 200.]])
        """
        backend = self._checked(params)
        arrays = self._arrays(backend, params, dtype)
        parts: dict[int, list[Array]] = {weight: [] for weight in range(len(self.shapes))}
        vectors = updates_of_runs(backend, [(group, 0, group.size) for group in self.groups], arrays, dtype)
        for group, vec in zip(self.groups, vectors, strict=True):
            found = backend.split(vec, [piece.length for piece in group.pieces])
            for piece, part in zip(group.pieces, found, strict=True):
                parts[piece.weight].append(part)
        # Groups cut the long vector in order, so that the parts of each weight are in order, too.
        return [backend.reshape(backend.concat(parts[weight]), shape) for weight, shape in enumerate(self.shapes)]

    def delta(self, params: Mapping[str, ArrayT], i: int, dtype: str | None = None) -> ArrayT:
        """Compute the update of one weight without forming the others.

        Parameters
        ----------
        params : mapping of str to array
            As for :meth:`deltas`.
        i : int
            Index of the weight, ``0 <= i < len(shapes)``.
        dtype : str, optional
            As for :meth:`deltas`.

        Returns
        -------
        array, shape (rows, cols)
            Equal to ``deltas(params)[i]`` up to the order of summation.

        Raises
        ------
        ShapeError
            If there is no weight i, or the parameters do not match ``param_shapes``.

        Notes
        -----
        For CP, Tucker, tensor trains and Kronecker products, only the rows of the factors that the weight needs are
        used. For a linear F, only the slice of the last transform is formed: memory is the compressed vector, two to
        three times the slice, and a few chunks of 2**18 elements, while time is that of all of F's draws. A shuffle
        forms the whole group before F.

        Examples
        --------
        >>> import tnadapt as tna
        >>> ad = SuperLoRA(tna.Config(groups=1, fold="hypercube"), [(2, 3), (4, 5)])
        >>> ad.delta(ad.init(), 1).shape
        (4, 5)
        """
        backend = self._checked(params)
        i = integer("i", i, 0, len(self.shapes) - 1, ShapeError)
        arrays = self._arrays(backend, params, dtype)
        found: ArrayT = backend.reshape(
            self._assembled(backend, arrays, self.layout.of_weight(i), dtype), self.shapes[i]
        )
        return found

    def merged(
        self,
        params: Mapping[str, ArrayT],
        weights: Sequence[ArrayT],
        dtype: str | None = None,
        *,
        detach_norm: bool = False,
    ) -> list[ArrayT]:
        """Compute the changed weights W', as ``config.apply`` says.

        Parameters
        ----------
        params : mapping of str to array
            As for :meth:`deltas`.
        weights : sequence of array
            The base weight W of each update, ``(rows, cols)``, of the library and device of the parameters.
        dtype : str, optional
            As for :meth:`deltas`.
        detach_norm : bool
            For ``apply="magnitude"``: whether the gradient takes the norm for a constant, as PEFT's does.

        Returns
        -------
        list of array, shape (rows, cols)
            In the wider dtype of weight and parameters, at least float32; not rounded to the weight's. Differentiable
            in torch and JAX, with respect to the weights, too.

        Raises
        ------
        ShapeError
            If a weight is missing or has another shape, or as in :meth:`deltas`.
        BackendError
            If the weights are of another library, or as in :meth:`deltas`; with ``apply="magnitude"``, if the library
            has no float64 (JAX, unless it is switched on).

        Notes
        -----
        For the parameters of :meth:`init` W' is W to the bit. :mod:`tnadapt.algebra.applying` has the formulas, and the
        order of the sum in a norm, which makes that so.

        Examples
        --------
        >>> import numpy as np, tnadapt as tna
        >>> w = np.array([[3.0, 4.0], [0.0, 2.0]])
        >>> plan = SuperLoRA(tna.presets.dora(rank=1), [(2, 2)]).with_base([w])
        >>> params = plan.init(dtype="float64")
        >>> params["weight0.magnitude"], bool((plan.merged(params, [w])[0] == w).all())
        (array([5., 2.]), True)
        """
        detach_norm = flag("detach_norm", detach_norm)
        if not is_sequence(weights):
            raise wrong_argument("weights", "a sequence of base weights", weights, ShapeError)
        weights = list(weights)
        if len(weights) != len(self.shapes):
            raise ShapeError(f"weights must be the {len(self.shapes)} base weights; got {len(weights)}")
        deltas, found = self.deltas(params, dtype), list[Array]()
        backend = get_backend(*deltas)
        for index, delta in enumerate(deltas):
            # Weights and parameters may be of different dtypes.
            if not backend.owns(weights[index]):
                raise BackendError(
                    f"base weight {index} is {type(weights[index]).__name__}, and the parameters are arrays of "
                    f"{backend.name}: convert it"
                )
            weight = base_weight(backend, weights[index], index, self.shapes[index])
            kinds = backend.dtype_name(weight), backend.dtype_name(delta)
            kind = "float64" if "float64" in kinds else "float32"
            own = [params[name] for name in self.weight_param_names[index]]
            weight, delta = backend.astype(weight, kind), backend.astype(delta, kind)
            found.append(self.applying.merged(backend, weight, delta, own, dtype, detach_norm))
        return found

    def vector(
        self, params: Mapping[str, ArrayT], start: int = 0, stop: int | None = None, dtype: str | None = None
    ) -> ArrayT:
        """Compute a slice of the long vector, the concatenation of all updates in C order.

        Parameters
        ----------
        params : mapping of str to array
            As for :meth:`deltas`.
        start, stop : int
            ``0 <= start < stop <= size``; the whole vector by default.
        dtype : str, optional
            As for :meth:`deltas`.

        Returns
        -------
        array, shape (stop - start,)

        Raises
        ------
        ShapeError
            If the slice is empty or out of range, or the parameters do not match ``param_shapes``.

        Notes
        -----
        As in :meth:`delta`, nothing outside the slice is formed where the format allows it.

        Examples
        --------
        >>> import tnadapt as tna
        >>> ad = SuperLoRA(tna.Config(groups=1, fold="hypercube"), [(2, 3), (4, 5)])
        >>> ad.vector(ad.init(), 4, 9).shape
        (5,)
        """
        backend = self._checked(params)
        start = integer("start", start, 0, self.size - 1, ShapeError)
        stop = self.size if stop is None else integer("stop", stop, 0, self.size, ShapeError)
        if start >= stop:
            raise ShapeError(f"no slice {start}:{stop} of a vector of {self.size} elements; start must be below stop")
        arrays = self._arrays(backend, params, dtype)
        found: ArrayT = self._assembled(backend, arrays, self.layout.of_slice(start, stop), dtype)
        return found

    @checks_arguments
    def part_of(self, i: int) -> tuple[SuperLoRA, int]:
        """Return the plan of the one config that weight ``i`` has, and the weight's number in it."""
        return self, i

    def _assembled(
        self, backend: Backend, arrays: Mapping[str, Array], pieces: Sequence[Piece], dtype: str | None
    ) -> Array:
        runs = [(self.groups[run.group], run.group_start, run.group_start + run.length) for run in pieces]
        return backend.concat(updates_of_runs(backend, runs, arrays, dtype))


@checks_arguments
def parameter_count(
    config: Config,
    shapes: Sequence[tuple[int, int]],
    layers: Sequence[Hashable] | None = None,
    roles: Sequence[Hashable] | None = None,
) -> int:
    """Return the number of trained elements of a config on these weights: ``SuperLoRA(…).num_parameters``.

    Parameters
    ----------
    config, shapes, layers, roles
        As for :class:`SuperLoRA`.

    Returns
    -------
    int

    Examples
    --------
    >>> import tnadapt as tna
    >>> parameter_count(tna.presets.lora(rank=4), [(768, 768)] * 24)
    147456
    """
    return SuperLoRA(config, shapes, layers, roles).num_parameters


# -- Equal maps of several plans ---------------------------------------------------------------------------------------


def share_maps(plan: SuperLoRA, others: Iterable[SuperLoRA], digests: bool = False) -> None:
    """Let a plan use the maps F of other plans where they are equal.

    Parameters
    ----------
    plan : SuperLoRA
    others : iterable of SuperLoRA
    digests : bool
        Whether to compute the digests of the others' maps now, unless they are known, so that the plan has them.

    Examples
    --------
    >>> import tnadapt as tna
    >>> one, other = (SuperLoRA(tna.presets.fastfood(0.1), [(10, 10)]) for _ in range(2))
    >>> share_maps(one, [other])
    >>> one.groups[0].projection.map is other.groups[0].projection.map
    True
    """
    there = {one.key: one for other in others for one in _projections(other)}
    for one in _projections(plan):
        same = there.get(one.key)
        if same is not None:
            one.share(same, digests)


def _projections(plan: SuperLoRA) -> Iterator[Projection]:
    for group in plan.arrays_plan.groups:
        yield group.projection
