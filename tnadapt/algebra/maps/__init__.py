"""The fixed maps F that follow the network, each with its adjoint and slices.

Each map is one class in one file. It defines its forward pass and the fixed arrays that it draws; all that the
initialization, the planner, the file formats and the solvers need is derived from these, or overridden (:class:`Map`).
A new built-in map needs one more file and one more line in :data:`MAPS`; another package calls
``tnadapt.register_map``. :class:`tnadapt.testing.MapContract` tests both kinds. ``walsh_hadamard`` is the
transform, and ``projection`` is the user-facing class of a map.
"""

from __future__ import annotations

from tnadapt.plugins import Registry

from ._identity import Identity
from ._linear import Linear, LinearV2
from ._map import Map
from ._normal import Normal
from ._one_hot import OneHot, SignedOneHot
from ._shuffle import Shuffle
from ._tanhshrink import Nonlinear, NonlinearV2, tanhshrink

__all__ = [
    "KINDS",
    "MAPS",
    "SQUARE",
    "Linear",
    "LinearV2",
    "Map",
    "Nonlinear",
    "Shuffle",
    "make_map",
    "register_map",
    "tanhshrink",
]

MAPS: Registry[Map] = Registry(
    "projection",
    Map,
    {
        "identity": Identity,
        "shuffle": Shuffle,
        "linear": Linear,
        "linear_v2": LinearV2,
        "nonlinear": Nonlinear,
        "nonlinear_v2": NonlinearV2,
        "one-hot": OneHot,
        "signed-one-hot": SignedOneHot,
        "normal": Normal,
    },
)

#: The paper's six maps, and those of them that preserve the length.
KINDS = MAPS.built_in[:6]
SQUARE = tuple(name for name in KINDS if MAPS[name].square)


def make_map(kind: str, n_in: int, n_out: int, seed: int = 0, group: int = 0) -> Map:
    """Return the map with that name for these lengths.

    Raises
    ------
    ConfigError
        If there is no map with that name.

    Examples
    --------
    >>> make_map("shuffle", 4, 4, seed=1)
    Shuffle(n_in=4, n_out=4, seed=1, group=0)
    """
    found = MAPS.find(kind)(n_in, n_out, seed, group)
    found.kind = kind
    return found


def register_map(name: str, cls: type[Map]) -> None:
    """Register a map F under a name, for ``Config(projection=name)`` and ``tnadapt.Projection(name, …)``.

    Parameters
    ----------
    name : str
        Lower-case letters, digits, ``.``, ``_`` and ``-``. It is written into adapter files.
    cls : type
        A subclass of :class:`tnadapt.algebra.maps.Map`.

    Raises
    ------
    ConfigError
        If the name has another form or is built in, or the class is not a subclass of Map.

    See Also
    --------
    tnadapt.testing.MapContract : The tests that such a class must pass.

    Examples
    --------
    >>> import numpy as np, tnadapt as tna
    >>> from tnadapt.algebra.maps import Map
    >>> class Reverse(Map):
    ...     square = isometry = True
    ...     def forward(self, backend, x):
    ...         return backend.take(x, self.on(backend, "order", x))
    ...     def make(self, name):
    ...         return np.arange(self.n_out)[::-1].copy()
    >>> tna.register_map("reverse", Reverse)
    >>> f = tna.Projection("reverse", 3, 3)
    >>> f(np.array([1.0, 2.0, 3.0])), f.adjoint(np.array([0.0, 0.0, 1.0]))
    (array([3., 2., 1.]), array([1., 0., 0.]))
    """
    MAPS.register(name, cls)
