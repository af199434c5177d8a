"""tnadapt: weight updates as small tensor networks, written once and run on NumPy, torch, JAX and CuPy.

The updates of all chosen weights are one long vector, cut into groups; each group is
``F(scale * kron_k(core_k x_1 A_k1 … x_M A_kM))``, unfolded and cut to length (SuperLoRA, arXiv 2403.11887).
Importing this imports no framework.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from .algebra import maps, presets, sources
from .algebra.composite import CompositeConfig
from .algebra.config import Config
from .algebra.folding import from_hypercube, hypercube_shape, to_hypercube
from .algebra.formats import register_format
from .algebra.geometry import geometry
from .algebra.maps import register_map
from .algebra.maps.projection import Projection
from .algebra.maps.walsh_hadamard import fwht
from .algebra.products import cp_to_tensor, kron_matvec, kronecker, tt_to_tensor, tucker_to_tensor
from .algebra.sources import register_source
from .algebra.starting_points import register_start
from .algebra.superlora import SuperLoRA, parameter_count
from .backends import register_backend
from .convert import convert
from .errors import BackendError, ConfigError, FileError, ShapeError, TargetError, TnadaptError
from .lazy_names import lazy_name
from .targets.attention_layouts import register_layout
from .targets.target import RowIndices, Rows, Target

if TYPE_CHECKING:
    from .checkpoints.adapter_file import AdapterFile
    from .checkpoints.adapter_format import load, save
    from .checkpoints.info import info
    from .checkpoints.merge import MergeReport, merge
    from .checkpoints.pretrained_model import Pretrained
    from .decomposition import decompose, search_rank
    from .decomposition.extraction import extract
    from .planning import plan
    from .progress_bar import ProgressBar
    from .tensors import (
        cp,
        hadamard_decomposition,
        kronecker_decomposition,
        tensor_ring,
        tensor_train,
        tt_matrix,
        tucker,
    )
    from .testing.verification import verify

__version__ = "0.1.0"

__all__ = [
    "AdapterFile",
    "BackendError",
    "CompositeConfig",
    "Config",
    "ConfigError",
    "FileError",
    "MergeReport",
    "Pretrained",
    "ProgressBar",
    "Projection",
    "RowIndices",
    "Rows",
    "ShapeError",
    "SuperLoRA",
    "Target",
    "TargetError",
    "TnadaptError",
    "convert",
    "cp",
    "cp_to_tensor",
    "decompose",
    "extract",
    "from_hypercube",
    "fwht",
    "geometry",
    "hadamard_decomposition",
    "hypercube_shape",
    "info",
    "kron_matvec",
    "kronecker",
    "kronecker_decomposition",
    "load",
    "maps",
    "merge",
    "parameter_count",
    "plan",
    "presets",
    "register_backend",
    "register_format",
    "register_layout",
    "register_map",
    "register_source",
    "register_start",
    "save",
    "search_rank",
    "sources",
    "tensor_ring",
    "tensor_train",
    "to_hypercube",
    "tt_matrix",
    "tt_to_tensor",
    "tucker",
    "tucker_to_tensor",
    "verify",
]

# Modules that are imported when one of their names is first used: most programs need few of them. (A function named
# like its module, such as convert, is not among them: importing the module would replace the function.)
_LAZY = {
    "AdapterFile": "checkpoints.adapter_file",
    "MergeReport": "checkpoints.merge",
    "Pretrained": "checkpoints.pretrained_model",
    "ProgressBar": "progress_bar",
    "cp": "tensors",
    "decompose": "decomposition",
    "extract": "decomposition.extraction",
    "hadamard_decomposition": "tensors",
    "info": "checkpoints.info",
    "kronecker_decomposition": "tensors",
    "load": "checkpoints.adapter_format",
    "merge": "checkpoints.merge",
    "plan": "planning",
    "save": "checkpoints.adapter_format",
    "search_rank": "decomposition",
    "tensor_ring": "tensors",
    "tensor_train": "tensors",
    "tt_matrix": "tensors",
    "tucker": "tensors",
    "verify": "testing.verification",
}

# Public subpackages that are imported when they are first used: tnadapt.torch needs no import of its own.
_PACKAGES = frozenset({"finetune", "planning", "plot", "serving", "tensors", "torch"})


# Users write `from tnadapt.presets import lora`, too; the modules are in tnadapt.algebra.
for _module in (maps, presets, sources):
    sys.modules[f"{__name__}.{_module.__name__.rpartition('.')[2]}"] = _module


# What users of PyTorch and of PEFT look for in this package.
_ELSEWHERE = {
    "attach": "tnadapt.torch.attach", "find_targets": "tnadapt.torch.find_targets",
    "from_pretrained": "tnadapt.torch.from_pretrained", "load_pretrained": "tnadapt.torch.load_pretrained",
    "get_peft_model": "tnadapt.torch.attach", "PeftModel": "tnadapt.torch.from_pretrained",
    "LoraConfig": "tnadapt.presets.lora",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f".{name}", __name__)
    if name in _ELSEWHERE:
        raise AttributeError(f"module 'tnadapt' has no attribute {name!r}: use {_ELSEWHERE[name]}", name=name)
    found = globals()[name] = lazy_name(__name__, _LAZY, name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
