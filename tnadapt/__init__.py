"""tnadapt: weight updates as small tensor networks, written once and run on NumPy, torch, JAX and CuPy.

The updates of all chosen weights are one long vector, cut into groups; each group is
``F(scale * kron_k(core_k x_1 A_k1 … x_M A_kM))``, unfolded and cut to length (SuperLoRA, arXiv 2403.11887).
Importing this imports no framework.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import presets
from .backends import register_backend
from .config import Config
from .convert import convert
from .errors import BackendError, ConfigError, FileError, ShapeError, TargetError, TnadaptError
from .folding import from_hypercube, hypercube_shape, to_hypercube
from .geometry import geometry
from .hadamard import fwht
from .products import cp_to_tensor, kron_matvec, kronecker, tt_to_tensor, tucker_to_tensor
from .projection import Projection
from .superlora import SuperLoRA, parameter_count
from .target import Rows, Target
from .verify import verify

if TYPE_CHECKING:
    from .decomposition import decompose, search_rank
    from .describing import info
    from .extraction import extract
    from .files import AdapterFile, load, save
    from .merge_files import MergeReport, merge
    from .planner import plan

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

# Rooms that are imported when one of their names is first asked for: most programs need few of them. (A function that
# is called as its room, such as convert, is not among them: whoever imported the room would find it in its place.)
_LATER = {
    "AdapterFile": "files",
    "MergeReport": "merge_files",
    "decompose": "decomposition",
    "extract": "extraction",
    "info": "describing",
    "load": "files",
    "merge": "merge_files",
    "plan": "planner",
    "save": "files",
    "search_rank": "decomposition",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f".{_LATER[name]}", __name__), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
