"""θ: a map P before the network, by which the trained arrays of a plan are ``a_start + P θ``, and θ is trained.

P is a map with a short input and a long output, one of :mod:`tnadapt.algebra.maps`, such as ``one-hot`` (Uni-LoRA,
arXiv 2506.00799) or ``normal`` (NOLA, arXiv 2310.02556). Its draws are those of that map with the group index
``2**31`` plus the index of θ, which no map after a network has.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tnadapt.backends import Array, Backend
from tnadapt.errors import ConfigError

from .config import Config
from .maps import BroughtMap
from .maps.projection import THETA_STREAMS, Projection
from .norms import rounded_to

__all__ = ["Theta", "ThetaPart"]


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
        What θ is multiplied by; see :attr:`tnadapt.SuperLoRA.training_plan`.
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
        found = self.projection.adjoint(gradient)
        return found if self.unit == 1.0 else found * self.unit


class Theta:
    """The map before the network of a plan.

    Parameters
    ----------
    config : Config
        With a ``before``.
    array_shapes : mapping of str to tuple of int
        The plan's trained arrays, in order.

    Attributes
    ----------
    shapes : dict of str to tuple of int
        Names and shapes of the parameters.
    brought_shapes : dict of str to tuple of int
        Names and shapes of the arrays of P that the caller brings, such as ``"theta.index"``.

    Raises
    ------
    ConfigError
        If θ has more elements than what is made from it.

    Examples
    --------
    >>> config = Config(rank=2, before="one-hot", parameters=5)
    >>> Theta(config, {"group0.split0.factor0": (6, 2), "group0.split0.factor1": (4, 2)}).shapes
    {'theta': (5,)}
    """

    def __init__(self, config: Config, array_shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.offset = config.offset
        scoped: dict[str, dict[str, tuple[int, ...]]] = {}
        for full, shape in array_shapes.items():
            scoped.setdefault(_SCOPED[config.scope](full), {})[full] = shape
        self.parts = [
            ThetaPart(name, _projection(config, name, index, arrays), arrays)
            for index, (name, arrays) in enumerate(scoped.items())
        ]
        assert config.parameters is not None  # ensured by Config
        self.shapes: dict[str, tuple[int, ...]] = {part.name: (config.parameters,) for part in self.parts}
        self._takers = {f"{part.name}.{taker.brings}": taker for part in self.parts if (taker := _taker(part))}
        self.brought_shapes = {name: taker.brought_shape for name, taker in self._takers.items()}
        self._brought: dict[str, np.ndarray] = {}

    def in_units(self, units: Mapping[str, float]) -> Theta:
        """Return the same map for θ in these units, by its names."""
        found = copy.copy(self)
        found.parts = [part._replace(unit=units[part.name]) for part in self.parts]
        return found

    # -- Arrays that the caller brings -------------------------------------------------------

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
                    f"{name!r}, of shape {shape}, is an array that the caller brings: tnadapt.SuperLoRA(…, "
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
        found = {}
        for part in self.parts:
            theta = params[part.name]
            cast = dtype if dtype != backend.dtype_name(theta) else None
            for full, moved in self.moved(backend, part, theta).items():
                moved = _rounded(backend, moved, cast)
                found[full] = _rounded(backend, start(full, moved, cast) + moved, cast) if self.offset else moved
        return found

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
    """Round an array to a dtype that its library may lack, and keep its own."""
    if dtype is None:
        return array
    host = rounded_to(backend.to_numpy(array), dtype)
    return backend.asarray(host, backend.dtype_name(array), backend.device(array))


_SCOPED: dict[str, Callable[[str], str]] = {
    "plan": lambda full: "theta",
    "group": lambda full: full.partition(".")[0] + ".theta",
    "array": lambda full: full + ".theta",
}


def _taker(part: ThetaPart) -> BroughtMap | None:
    """Return P if it has an array that the caller brings; a chain has none."""
    found = part.projection.map
    return found if isinstance(found, BroughtMap) else None


def _projection(config: Config, name: str, index: int, arrays: Mapping[str, tuple[int, ...]]) -> Projection:
    assert config.before is not None  # ensured by Config, like the next
    assert config.parameters is not None
    size = sum(math.prod(shape) for shape in arrays.values())
    if config.parameters > size:
        raise ConfigError(
            f"parameters={config.parameters} is more than the {size} elements that {name!r} makes; use at most {size}, "
            "or before=None to train the arrays themselves"
        )
    return Projection(config.before, config.parameters, size, config.seed, THETA_STREAMS + index)
