"""tnadapt: weight updates as small tensor networks, written once and run on NumPy, torch, JAX and CuPy.

The updates of all chosen weights are one long vector, cut into groups; each group is
``F(scale * kron_k(core_k x_1 A_k1 … x_M A_kM))``, unfolded and cut to length (SuperLoRA, arXiv 2403.11887).
Importing this imports no framework.
"""

from . import presets
from .backends import register_backend
from .config import Config
from .convert import convert
from .decomposition import decompose, search_rank
from .describing import info
from .errors import BackendError, ConfigError, FileError, ShapeError, TargetError, TnadaptError
from .extraction import extract
from .files import AdapterFile, load, save
from .folding import from_hypercube, hypercube_shape, to_hypercube
from .geometry import geometry
from .hadamard import fwht
from .merge_files import MergeReport, merge
from .planner import plan
from .products import cp_to_tensor, kron_matvec, kronecker, tt_to_tensor, tucker_to_tensor
from .projection import Projection
from .superlora import SuperLoRA, parameter_count
from .target import Rows, Target
from .verify import verify

__version__ = "0.1.0"

__all__ = [
    "AdapterFile",
    "BackendError",
    "Config",
    "ConfigError",
    "FileError",
    "MergeReport",
    "Projection",
    "Rows",
    "ShapeError",
    "SuperLoRA",
    "Target",
    "TargetError",
    "TnadaptError",
    "convert",
    "cp_to_tensor",
    "decompose",
    "extract",
    "from_hypercube",
    "fwht",
    "geometry",
    "hypercube_shape",
    "info",
    "kron_matvec",
    "kronecker",
    "load",
    "merge",
    "parameter_count",
    "plan",
    "presets",
    "register_backend",
    "save",
    "search_rank",
    "to_hypercube",
    "tt_to_tensor",
    "tucker_to_tensor",
    "verify",
]
