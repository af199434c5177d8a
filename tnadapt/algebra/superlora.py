"""SuperLoRA: the plan of an adapter, and the four steps it is used in.

``Config`` + shapes -> :class:`SuperLoRA` (only integers) -> ``init`` (arrays) -> ``deltas`` (arrays). Everything
else in the library is built on these; nothing else computes a ΔW.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from tnadapt.backends import Backend, get_backend, load_backend
from tnadapt.backends.backend import Array
from tnadapt.errors import BackendError, ConfigError, ShapeError, integer, safe_repr

from .config import Config
from .group import Group
from .init import Initializer
from .layout import Piece, make_layout, require_alike
from .maps.projection import Projection
from .network import Network
from .sources import FrozenArrays, Source, SourceMap

__all__ = ["SuperLoRA", "parameter_count"]

# Plans of up to so many groups are laid out when they are made; larger ones when their arrays are asked for.
LAID_OUT = 4096


class SuperLoRA:
    """The weight updates of a model as one long vector, cut into groups, each made from a small tensor network.

    ``ΔW_group = F(scale * sum_t kron_k(core_k x_1 A_k1 … x_M A_kM))``, unfolded and cut to length.

    Parameters
    ----------
    config : Config
        What each group is made of.
    shapes : sequence of (rows, cols)
        Of the weights to update, in torch's order ``(out_features, in_features)``.
    layers : sequence of hashable, optional
        One key a weight, for ``groups="layer"``.

    Attributes
    ----------
    config : Config
    shapes : tuple of (int, int)
    size : int
        N, the number of elements of all weights.
    num_groups : int
        G, the number of groups.
    layout : Layout
        Which part of which weight lies in which group.

    Raises
    ------
    ConfigError
        If the config does not suit these weights.
    ShapeError
        If a shape is not two integers of at least 1, or a fold does not fit a group.

    Notes
    -----
    Equation (2) of the paper. The object is a plan in integers: it makes no arrays and imports no
    framework, and takes microseconds for a model of any size. (A group's draws and starting arrays, once
    used, are kept.)

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

    def __init__(
        self, config: Config, shapes: Sequence[tuple[int, int]], layers: Sequence[Hashable] | None = None
    ) -> None:
        if not isinstance(config, Config):
            raise ConfigError(f"expected a tnadapt.Config; got {type(config).__name__}")
        self.config = config
        self.layout = make_layout(config.groups, shapes, layers)
        if config.weight_shape is not None:
            assert isinstance(config.fold, tuple)  # Config has refused any other
            require_alike(self.layout, config.weight_shape, config.fold)
        self.shapes = self.layout.shapes
        self.size = self.layout.size
        self.num_groups = self.layout.num_groups
        self._layers = None if layers is None else list(layers)
        self._networks: dict[tuple[int, int], Network] = {}
        # Raise what does not fit now, and not at the first use.
        for group in self._different:
            self._network(group)
        _ = self._frozen_sources
        if self.num_groups <= LAID_OUT:
            # Laid out at once, so that no compiler that traces a call comes to trace this.
            _ = self.param_shapes

    def __repr__(self) -> str:
        return f"SuperLoRA({self.config!r}, {len(self.shapes)} weights, {self.num_groups} groups, {self.size} elements)"

    def __reduce__(self) -> tuple[Any, ...]:
        # Recomputed from its few integers, rather than with every draw that it keeps.
        return SuperLoRA, (self.config, self.shapes, self._layers)

    def __deepcopy__(self, memo: dict[int, Any]) -> SuperLoRA:
        return self  # nothing in it changes

    # -- The plan ----------------------------------------------------------------------------

    @functools.cached_property
    def num_parameters(self) -> int:
        """Number of trained elements; counted without allocating anything."""
        if self._columns_vary:
            return sum(self._num_trained(group) for group in range(self.num_groups))
        return sum(count * self._num_trained(group) for group, count, _ in self.layout.same_size())

    def _num_trained(self, group: int) -> int:
        network = self._network(group)
        frozen = sum(math.prod(network.shapes[name]) for name in self._frozen_sources)
        return network.num_parameters - frozen

    @functools.cached_property
    def param_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every trained array, in order.

        Names are ``group{g}.split{k}.{array}``, with ``term{t}.`` before the split where there are several
        terms; ``array`` is dense, factor0 …, weights, core, or core0 … (tensor train).
        """
        return {full: group.network.shapes[name] for group in self.groups for name, full in group.names.items()}

    @functools.cached_property
    def frozen_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every array that ``config.sources`` freezes, in order; named as in ``param_shapes``."""
        return {full: group.network.shapes[name] for group in self.groups for name, full in group.frozen_names.items()}

    @functools.cached_property
    def _frozen_sources(self) -> dict[str, Source]:
        """The sources of the arrays that are frozen in every group, by the network's names."""
        if not self.config.sources:
            return {}
        sources, network = self.config.sources, self._network(0)  # all networks have arrays of the same names
        assert isinstance(sources, SourceMap)  # Config converts any other mapping
        sources.check_names(network.shapes)
        named = {name: sources.of(name) for name in network.shapes}
        found = {name: source for name, source in named.items() if source is not None and not source.trained}
        for prefixes in network.prefixes:
            term = [name for name in network.shapes if name.startswith(tuple(prefixes))]
            if found.keys() >= set(term):
                raise ConfigError(
                    f"sources freezes all of {', '.join(term)}, and nothing is left to train there: give one of them "
                    "tnadapt.sources.Trained()"
                )
        return found

    @functools.cached_property
    def groups(self) -> list[Group]:
        """What each group is made of, and which pieces of which weights it holds.

        Groups of one length share their network, and their F where ``config.shared``.

        Examples
        --------
        >>> import tnadapt as tna
        >>> SuperLoRA(tna.presets.fastfood(ratio=0.1), [(10, 10)]).groups[0].projection
        Projection('linear', n_in=10, n_out=100, seed=0, group=0)
        """
        config, found = self.config, list[Group]()
        projections: dict[tuple[int, int], Projection] = {}
        for index in range(self.num_groups):
            network, size = self._network(index), self.layout.group_size(index)
            key = size, 0 if config.shared else index
            if key not in projections:
                projections[key] = Projection(config.projection, network.size, size, config.seed, key[1])
            names = {name: f"group{index}.{name}" for name in network.shapes if name not in self._frozen_sources}
            frozen_names = {name: f"group{index}.{name}" for name in self._frozen_sources}
            trained = names if frozen_names else None
            start = Initializer(network, projections[key], config.seed, index, trained)
            frozen = FrozenArrays(network.shapes, self._frozen_sources, config.seed, index)
            pieces = self.layout.of_group(index)
            found.append(Group(size, network, projections[key], start, names, pieces, frozen, frozen_names))
        return found

    @property
    def _stacked(self) -> bool:
        return self.config.fold == "stack" and self.config.order == 2

    @property
    def _columns_vary(self) -> bool:
        """Whether groups of one size may still differ: in a stack's columns."""
        return self._stacked and not self.layout.equal_columns

    @property
    def _different(self) -> Iterable[int]:
        """Groups that between them have every network there is."""
        return range(self.num_groups) if self._columns_vary else [first for first, _, _ in self.layout.same_size()]

    def _network(self, group: int) -> Network:
        size = self.layout.group_size(group)
        columns = self.layout.columns(group) if self._stacked else 1
        found = self._networks.get((size, columns))
        if found is None:
            # The ratio is the decimal it prints as: 0.07 of 100 is 7, not 8.
            n_in = max(1, math.ceil(Fraction(str(self.config.ratio)) * size))
            found = self._networks[size, columns] = Network(self.config, n_in, columns)
        return found

    # -- Arrays ------------------------------------------------------------------------------

    def starts(self, trained: Collection[str] | None = None) -> list[Initializer]:
        """Where each group starts if these of its arrays are trained, by their full names; all if None."""
        if trained is None:
            return [group.start for group in self.groups]
        unknown = [name for name in trained if name not in self.param_shapes]
        if unknown or not trained:
            raise ConfigError(
                f"trained must name some of the arrays in param_shapes; unknown: {_some(unknown)}; there are "
                f"{_some(list(self.param_shapes))}"
            )
        chosen = set(trained)
        return [
            group.start.for_trained({name for name, full in group.names.items() if full in chosen})
            for group in self.groups
        ]

    def init(
        self,
        backend: str = "numpy",
        dtype: str = "float32",
        device: Any = None,
        trained: Collection[str] | None = None,
    ) -> dict[str, Array]:
        """Fresh parameters: ΔW is exactly zero, and its gradient is not.

        Parameters
        ----------
        backend : str
            ``"numpy"``, ``"torch"``, ``"jax"``, ``"cupy"`` or a registered name.
        dtype : str
            ``"float32"``, ``"float64"``, ``"float16"`` or ``"bfloat16"``.
        device : optional
            Where the library puts them; its default if None.
        trained : collection of str, optional
            Names of the arrays that are trained, where the others are frozen as they are returned: zero is then one of
            these, so that the frozen ones leave it a gradient.

        Returns
        -------
        dict of str to array
            In the order of ``param_shapes``. The same numbers in every library.

        Raises
        ------
        BackendError
            If the library, dtype or device is not to be had.
        ConfigError
            If the dtype cannot hold the start (float16, a nonlinear F and a tiny alpha), or ``trained`` names no array.

        Notes
        -----
        For a linear F the factor of the leading mode of the last split is zero, in every term, and the
        other arrays are random; for a nonlinear F all are, and ``deltas`` subtracts what they give. They are
        normal numbers drawn from ``config.seed``, each array scaled to one root mean square, the one for
        which the first SGD step moves ΔW by 1/32 of what it moves in dense fine-tuning (white gradient,
        scale 1), whatever rank, order, splits and ρ are. :mod:`tnadapt.algebra.init` has the formula, and what it
        says of order 1.

        Examples
        --------
        >>> import tnadapt as tna
        >>> params = SuperLoRA(tna.Config(rank=1), [(2, 3)]).init()
        >>> params["group0.split0.factor0"].tolist()
        [[0.0], [0.0]]
        >>> plan = SuperLoRA(tna.Config(rank=1), [(2, 3)])
        >>> params = plan.init(trained=["group0.split0.factor1"])
        >>> [bool(array.any()) for array in params.values()]
        [True, False]
        """
        library = load_backend(backend)
        if not library.usable():
            raise BackendError(f"{backend} is installed and finds no device to compute on here")
        if not isinstance(dtype, str):
            raise BackendError(f"dtype must be a name such as 'float32'; got {safe_repr(dtype)}")
        # An empty array first: a dtype or device that is not there is said before anything is drawn.
        library.asarray(np.zeros(0), dtype, device)
        made = {}
        for group, start in zip(self.groups, self.starts(trained), strict=True):
            for name, full in group.names.items():
                host = start.host(name)
                if dtype == "float16" and np.max(np.abs(host)) > np.finfo(np.float16).max:
                    raise ConfigError(
                        f"{full} starts at numbers of up to {np.max(np.abs(host)):.1e}, which float16 cannot hold; "
                        f"use float32, or a larger alpha than {self.config.alpha}"
                    )
                made[full] = library.asarray(host, dtype, device)
        return made

    def deltas(self, params: Mapping[str, Array]) -> list[Array]:
        """The update of every weight.

        Parameters
        ----------
        params : mapping of str to array
            Named and shaped as ``param_shapes`` says; one library, dtype and device.

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
        Each group is formed whole, once, and handed out in pieces. Memory: the long vector, N elements;
        for a linear F some three times its padded length L, twice that at the first call, which draws. A
        result may share memory with the parameters (a dense update is a view of them): do not write to it.

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
        parts: dict[int, list[Array]] = {weight: [] for weight in range(len(self.shapes))}
        for group in self.groups:
            vec = group.update(backend, params, 0, group.size)
            found = backend.split(vec, [piece.length for piece in group.pieces])
            for piece, part in zip(group.pieces, found, strict=True):
                parts[piece.weight].append(part)
        # Groups cut the long vector in order, so the parts of a weight come in its own order.
        return [backend.reshape(backend.concat(parts[weight]), shape) for weight, shape in enumerate(self.shapes)]

    def delta(self, params: Mapping[str, Array], i: int) -> Array:
        """The update of one weight, without forming the others.

        Parameters
        ----------
        params : mapping of str to array
            As for :meth:`deltas`.
        i : int
            Which weight, ``0 <= i < len(shapes)``.

        Returns
        -------
        array, shape (rows, cols)
            Equal to ``deltas(params)[i]`` but for the order of summation.

        Raises
        ------
        ShapeError
            If there is no weight i, or the parameters do not fit.

        Notes
        -----
        For CP, Tucker, tensor trains and Kronecker products only the rows of the factors that the weight's
        elements need take part; of a linear F only the slice of the last transform is formed, in memory
        of the compressed vector, two to three times the slice, and a few pieces of 2**18 elements (time goes
        through all of F's draws). A shuffle forms the whole group before F.

        Examples
        --------
        >>> import tnadapt as tna
        >>> ad = SuperLoRA(tna.Config(groups=1, fold="hypercube"), [(2, 3), (4, 5)])
        >>> ad.delta(ad.init(), 1).shape
        (4, 5)
        """
        backend = self._checked(params)
        i = integer("weight", i, 0, len(self.shapes) - 1, ShapeError)
        return backend.reshape(self._assembled(backend, params, self.layout.of_weight(i)), self.shapes[i])

    def vector(self, params: Mapping[str, Array], start: int = 0, stop: int | None = None) -> Array:
        """A slice of the long vector: all updates one after another, each in C order.

        Parameters
        ----------
        params : mapping of str to array
            As for :meth:`deltas`.
        start, stop : int
            ``0 <= start < stop <= size``; all of it by default.

        Returns
        -------
        array, shape (stop - start,)

        Raises
        ------
        ShapeError
            If the slice is empty or leaves the vector, or the parameters do not fit.

        Notes
        -----
        As :meth:`delta`, nothing outside the slice is formed where the format allows it.

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
        return self._assembled(backend, params, self.layout.of_slice(start, stop))

    # -- How they come about -----------------------------------------------------------------

    def _assembled(self, backend: Backend, params: Mapping[str, Array], pieces: Sequence[Piece]) -> Array:
        return backend.concat(
            [
                self.groups[piece.group].update(backend, params, piece.group_start, piece.group_start + piece.length)
                for piece in pieces
            ]
        )

    def _checked(self, params: Mapping[str, Array]) -> Backend:
        """The backend of parameters that are exactly those of the plan."""
        if not isinstance(params, Mapping):
            raise ShapeError(f"params must be a mapping of names to arrays; got {type(params).__name__}")
        expected = self.param_shapes
        if params.keys() != expected.keys():
            missing = [name for name in expected if name not in params]
            unknown = [name for name in params if name not in expected]
            raise ShapeError(
                f"params must have exactly the names of param_shapes; missing: {_some(missing)}; "
                f"unknown: {_some(unknown)}"
            )
        backend = get_backend(*params.values())
        for name, shape in expected.items():
            backend.require_float(params[name], f"params[{name!r}]")
            if tuple(params[name].shape) != shape:
                raise ShapeError(f"params[{name!r}] has shape {tuple(params[name].shape)}; expected {shape}")
        return backend


def parameter_count(config: Config, shapes: Sequence[tuple[int, int]], layers: Sequence[Hashable] | None = None) -> int:
    """Trainable elements of a config on these weights: ``SuperLoRA(…).num_parameters``.

    Parameters
    ----------
    config, shapes, layers
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
    return SuperLoRA(config, shapes, layers).num_parameters


def _some(names: Sequence[str]) -> str:
    """A few of the names, for a message."""
    first: Iterator[str] = iter(names[:4])
    return (", ".join(map(repr, first)) or "none") + (f" and {len(names) - 4} more" if len(names) > 4 else "")
