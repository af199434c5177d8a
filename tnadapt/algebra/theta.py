"""θ: a map P before the network, so that the arrays of a plan are ``a_start + P θ`` and only θ is trained.

P is a map with a short input and a long output, one of :mod:`tnadapt.algebra.maps`, such as ``one-hot`` (Uni-LoRA,
arXiv 2506.00799) or ``normal`` (NOLA, arXiv 2310.02556). Its draws use the group index ``2**31`` plus the index of θ,
which no map after a network uses.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tnadapt.backends import Array, Backend
from tnadapt.backends.stored_floats import rounded_to
from tnadapt.errors import ConfigError

from .config import Config
from .maps import BroughtMap
from .maps.projection import THETA_STREAMS, Projection


class ThetaPart(NamedTuple):
    """One θ, its map, and the arrays made from it.

    Attributes
    ----------
    name : str
        Name of θ: ``"theta"``, ``"group0.theta"``, or ``"group0.split0.factor0.theta"``.
    projection : Projection
        P.
    arrays : dict of str to tuple of int
        Names and shapes of the arrays, in the order of the vector.
    unit : float
        What θ is multiplied by; see :attr:`tnadapt.UpdatePlan.training_plan`.
    """

    name: str
    projection: Projection
    arrays: dict[str, tuple[int, ...]]
    unit: float = 1.0

    def forward(self, theta: Array) -> Array:
        """Compute ``P θ`` as one vector."""
        return self.projection(theta if self.unit == 1.0 else theta * self.unit)

    def adjoint(self, gradient: Array) -> Array:
        """Compute ``Pᵀ g``, the gradient of θ from that of the vector."""
        product = self.projection.adjoint(gradient)
        return product if self.unit == 1.0 else product * self.unit


class Theta:
    """The map before the network of a plan.

    Parameters
    ----------
    config : Config
        With a ``before``.
    elements : int
        Number of elements of the plan's trained arrays.
    array_shapes : callable
        Returns their names and shapes, in order; called when they are needed.

    Attributes
    ----------
    shapes : dict of str to tuple of int
        Names and shapes of the parameters.

    Raises
    ------
    ConfigError
        If θ has more elements than what is made from it.

    Examples
    --------
    >>> config = Config(rank=2, before="one-hot", parameters=5)
    >>> Theta(config, 20, lambda: {"group0.split0.factor0": (6, 2), "group0.split0.factor1": (4, 2)}).shapes
    {'theta': (5,)}
    """

    def __init__(
        self, config: Config, elements: int, array_shapes: Callable[[], Mapping[str, tuple[int, ...]]]
    ) -> None:
        assert config.parameters is not None  # ensured by Config
        self.config, self.offset, self._array_shapes = config, config.offset, array_shapes
        sizes = {"theta": elements} if config.scope == "plan" else self._sizes
        for name, size in sizes.items():
            if config.parameters > size:
                raise ConfigError(
                    f"parameters={config.parameters} is more than the {size} elements that {name!r} makes; use at most "
                    f"{size}, or before=None to train the arrays themselves"
                )
        self.shapes: dict[str, tuple[int, ...]] = dict.fromkeys(sizes, (config.parameters,))
        self._brought: dict[str, np.ndarray] = {}

    @functools.cached_property
    def _scoped(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Names and shapes of the arrays that each θ makes."""
        scoped: dict[str, dict[str, tuple[int, ...]]] = {}
        for full, shape in self._array_shapes().items():
            scoped.setdefault(_SCOPED[self.config.scope](full), {})[full] = shape
        return scoped

    @property
    def _sizes(self) -> dict[str, int]:
        return {name: sum(map(math.prod, arrays.values())) for name, arrays in self._scoped.items()}

    @functools.cached_property
    def parts(self) -> list[ThetaPart]:
        """Each θ, its map, and the arrays made from it."""
        before, parameters, seed = self.config.before, self.config.parameters, self.config.seed
        assert before is not None  # ensured by Config, like the next
        assert parameters is not None
        return [
            ThetaPart(name, Projection(before, parameters, size, seed, THETA_STREAMS + index), self._scoped[name])
            for index, (name, size) in enumerate(self._sizes.items())
        ]

    @functools.cached_property
    def _takers(self) -> dict[str, BroughtMap]:
        """Maps with an array that the caller gives, which a chain does not have."""
        return {
            f"{part.name}.{part.projection.map.brings}": part.projection.map
            for part in self.parts
            if isinstance(part.projection.map, BroughtMap)
        }

    @functools.cached_property
    def brought_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the arrays of P that the caller brings, such as ``"theta.index"``."""
        return {name: taker.brought_shape for name, taker in self._takers.items()}

    def in_units(self, units: Mapping[str, float]) -> Theta:
        """Return the same map for θ in these units, by its names."""
        scaled = copy.copy(self)
        scaled.parts = [part._replace(unit=units[part.name]) for part in self.parts]
        return scaled

    # -- Arrays that the caller gives --------------------------------------------------------

    @property
    def brought(self) -> dict[str, np.ndarray]:
        """The arrays in ``brought_shapes`` that there are, in float32."""
        return dict(self._brought)

    def bring(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Set arrays in ``brought_shapes``; raise a ConfigError that names the one that does not fit."""
        for name, array in arrays.items():
            self._takers[name].bring(array, f"given[{name!r}]")
            self._brought[name] = array

    def require_brought(self) -> None:
        """Raise a ConfigError if an array is missing."""
        for name, shape in self.brought_shapes.items():
            if name not in self._brought:
                raise ConfigError(
                    f"{name!r}, of shape {shape}, is an array that the caller brings: tnadapt.UpdatePlan(…, "
                    f"given={{{name!r}: array}}), or tnadapt.torch.attach(…, given=…)"
                )

    def stand_ins(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Return random arrays that fit, for those that are missing."""
        return {name: taker.stand_in(rng) for name, taker in self._takers.items() if name not in self._brought}

    # -- Arrays made from θ ------------------------------------------------------------------

    def arrays(
        self,
        backend: Backend,
        params: Mapping[str, Array],
        start: Callable[[str, Array, str | None], Array],
        dtype: str | None = None,
    ) -> dict[str, Array]:
        """Compute the arrays.

        Parameters
        ----------
        backend : Backend
        params : mapping of str to array
            Named and shaped as ``shapes``.
        start : callable
            Returns a_start of an array by its name, in the library and dtype of the second argument, rounded to the
            third.
        dtype : str, optional
            The dtype in which θ was trained, if it has been cast since.

        Returns
        -------
        dict of str to array
            Differentiable; equal to a_start to the bit if θ is 0.
        """
        self.require_brought()
        arrays = {}
        for part in self.parts:
            theta = params[part.name]
            cast = dtype if dtype != backend.dtype_name(theta) else None
            for full, moved in self.moved(backend, part, theta).items():
                moved = _rounded(backend, moved, cast)
                arrays[full] = _rounded(backend, start(full, moved, cast) + moved, cast) if self.offset else moved
        return arrays

    @staticmethod
    def moved(backend: Backend, part: ThetaPart, theta: Array) -> dict[str, Array]:
        """Compute ``P θ``, cut into the arrays."""
        sizes = [math.prod(shape) for shape in part.arrays.values()]
        pieces = backend.split(part.forward(theta), sizes)
        return {
            full: backend.reshape(piece, shape)
            for (full, shape), piece in zip(part.arrays.items(), pieces, strict=True)
        }

    def pulled(self, backend: Backend, part: ThetaPart, gradients: Sequence[Array]) -> Array:
        """Compute ``Pᵀ g``, for the gradients of the arrays in order: the gradient of θ."""
        return part.adjoint(backend.concat([backend.flatten(gradient) for gradient in gradients]))


def _rounded(backend: Backend, array: Array, dtype: str | None) -> Array:
    """Round an array to a dtype that its library may lack, without changing the array's own dtype."""
    if dtype is None:
        return array
    host = rounded_to(backend.to_numpy(array), dtype)
    return backend.asarray(host, backend.dtype_name(array), backend.device(array))


_SCOPED: dict[str, Callable[[str], str]] = {
    "plan": lambda full: "theta",
    "group": lambda full: full.partition(".")[0] + ".theta",
    "array": lambda full: full + ".theta",
}
