"""The private parts of ``tnadapt.algebra`` that its tests reach inside for, in one place: each name is a debt."""

from tnadapt.algebra.init import _sums_of_squares as sums_of_squares
from tnadapt.algebra.maps._matrices import Repeat
from tnadapt.algebra.maps._transforms import DAUBECHIES
from tnadapt.algebra.named_config import config_of, named_config
from tnadapt.algebra.singular_vectors import dominant_basis
from tnadapt.algebra.starting_points import STARTS, Start
from tnadapt.algebra.torch_streams import DEFAULT_SEED, TorchStream, permutation_head

__all__ = [
    "DAUBECHIES",
    "DEFAULT_SEED",
    "STARTS",
    "Repeat",
    "Start",
    "TorchStream",
    "config_of",
    "dominant_basis",
    "named_config",
    "permutation_head",
    "sums_of_squares",
]
