"""The registry of maps by name."""

from __future__ import annotations

from tnadapt.plugins import Registry

from ._centered_wavelet import CenteredWaveletMap
from ._circulant import CirculantMap
from ._dct import Dct2
from ._dft import Dft2
from ._gather import GatherMap, SignGatherMap
from ._given_matrix import GivenMatrix
from ._identity import Identity
from ._linear import Linear, LinearV2
from ._map import Map
from ._normal import Normal
from ._one_hot import OneHot, SignedOneHot
from ._scatter import ScatterMap
from ._shuffle import Shuffle
from ._tanhshrink import Nonlinear, NonlinearV2
from ._tied_elements import TiedMap
from ._tile import TileMap
from ._torch_scatter import TorchScatterMap
from ._wavelet import WaveletMap

__all__ = ["KINDS", "MAPS", "SQUARE"]

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
        "scatter": ScatterMap,
        "torch-scatter": TorchScatterMap,
        "gather": GatherMap,
        "sign-gather": SignGatherMap,
        "tile": TileMap,
        "circulant": CirculantMap,
        "dct2": Dct2,
        "dft2": Dft2,
        "wavelet": WaveletMap,
        "centered-wavelet": CenteredWaveletMap,
        "one-hot": OneHot,
        "signed-one-hot": SignedOneHot,
        "normal": Normal,
        "tied": TiedMap,
        "given": GivenMatrix,
    },
)

#: The paper's six maps, and those of them that preserve the length.
KINDS = ("identity", "shuffle", "linear", "linear_v2", "nonlinear", "nonlinear_v2")
SQUARE = tuple(name for name in KINDS if MAPS[name].square)
