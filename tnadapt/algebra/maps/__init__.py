"""The fixed maps F that follow the network, each with its adjoint and slices.

Each map is one class. It defines its forward pass and the fixed arrays that it draws; all that the initialization, the
planner, the file formats and the solvers need is derived from these in ``_map``, or overridden (:class:`Map`). Settings
of a map are a frozen dataclass (:class:`MapSettings`), which users find in ``tnadapt.maps``. A new built-in map needs
one more class and one more line in :data:`MAPS`; another package calls ``tnadapt.register_map``.
:class:`tnadapt.testing.MapContract` tests both kinds. ``fastfood`` has the paper's maps and the Walsh–Hadamard
transform, ``_positions``, ``_matrices`` and ``_transforms`` the others; ``projection`` parses ``Config.projection``,
builds and composes maps, and has the user-facing class of a map.
"""

from __future__ import annotations

from ._map import BroughtMap, Map, MapSettings, Space, check_settings_class
from ._matrices import Circulant, Tile
from ._positions import Gather, Scatter, Shuffle, SignGather, TiedElements, TorchScatter
from ._transforms import CenteredWavelet, Dft2, Wavelet
from .fastfood import Linear, LinearV2, Nonlinear, tanhshrink
from .projection import (
    KINDS,
    MAPS,
    ON,
    SQUARE,
    Chain,
    PerWeight,
    Recipe,
    checked_projection,
    input_length,
    is_brought,
    is_linear,
    make_map,
    make_map_on_weights,
    projection_name,
    projection_to_json,
    require_ratio_fits,
    takes_ratio,
)

__all__ = [
    "KINDS",
    "MAPS",
    "ON",
    "SQUARE",
    "BroughtMap",
    "CenteredWavelet",
    "Chain",
    "Circulant",
    "Dft2",
    "Gather",
    "Linear",
    "LinearV2",
    "Map",
    "MapSettings",
    "Nonlinear",
    "PerWeight",
    "Recipe",
    "Scatter",
    "Shuffle",
    "SignGather",
    "Space",
    "TiedElements",
    "Tile",
    "TorchScatter",
    "Wavelet",
    "checked_projection",
    "input_length",
    "is_brought",
    "is_linear",
    "make_map",
    "make_map_on_weights",
    "projection_name",
    "projection_to_json",
    "register_map",
    "require_ratio_fits",
    "takes_ratio",
    "tanhshrink",
]


def register_map(name: str, cls: type[Map]) -> None:
    """Register a map F under a name, for ``Config(projection=name)`` and ``tnadapt.Projection(name, …)``.

    Parameters
    ----------
    name : str
        Lower-case letters, digits, ``.``, ``_`` and ``-``. It is written into adapter files.
    cls : type
        A subclass of :class:`tnadapt.algebra.maps.Map`. If it has settings, ``Config(projection=settings)`` takes an
        instance of its ``settings_class``.

    Raises
    ------
    ConfigError
        If the name has another form, is built in, or registered by another module; or if the class is not a subclass of
        Map, or its settings are not a frozen dataclass.

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
    MAPS.check(name, cls)
    if cls.settings_class is not None:
        check_settings_class(name, cls.settings_class)
    MAPS.register(name, cls)
