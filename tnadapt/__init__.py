"""tnadapt: weight updates as small tensor networks, written once and run on NumPy, torch, JAX and CuPy.

The updates of all chosen weights are one long vector, cut into groups; each group is
``F(scale * kron_k(core_k x_1 A_k1 … x_M A_kM))``, unfolded and cut to length (SuperLoRA, arXiv 2403.11887).
Importing tnadapt imports no framework.
"""

from typing import TYPE_CHECKING

from .convert import convert
from .errors import BackendError, ConfigError, FileError, ShapeError, TargetError, TnadaptError
from .lazy_names import lazy_names

if TYPE_CHECKING:
    from .algebra import maps, presets, sources
    from .algebra.composite import CompositeConfig
    from .algebra.config import Config
    from .algebra.folding import from_hypercube, hypercube_shape, to_hypercube
    from .algebra.formats import register_format
    from .algebra.geometry import geometry
    from .algebra.layout import join_groups, split_groups
    from .algebra.maps import register_map
    from .algebra.maps.fastfood import fwht
    from .algebra.maps.projection import Projection, fastfood
    from .algebra.presets import register_preset
    from .algebra.products import cp_to_tensor, kron_matvec, kronecker, tt_to_tensor, tucker_to_tensor
    from .algebra.sources import register_source
    from .algebra.starting_points import register_start
    from .algebra.units import learning_rate
    from .algebra.update_plan import SuperLoRA as SuperLoRA
    from .algebra.update_plan import UpdatePlan, parameter_count
    from .backends import register_backend
    from .checkpoints.adapter_file import AdapterFile
    from .checkpoints.adapter_format import load, save
    from .checkpoints.info import info
    from .checkpoints.merge import MergeReport, merge
    from .checkpoints.population_changes import append, replace
    from .checkpoints.population_file import PopulationFile
    from .checkpoints.pretrained_model import Pretrained
    from .decomposition import decompose, search_rank
    from .decomposition.extraction import extract
    from .planning import plan
    from .report import ProgressBar
    from .targets.attention_layouts import register_layout
    from .targets.target import RowIndices, Rows, Target
    from .tensors import (
        cp,
        hadamard_decomposition,
        kronecker_decomposition,
        parafac2,
        tensor_ring,
        tensor_train,
        tt_cross,
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
    "PopulationFile",
    "Pretrained",
    "ProgressBar",
    "Projection",
    "RowIndices",
    "Rows",
    "ShapeError",
    "Target",
    "TargetError",
    "TnadaptError",
    "UpdatePlan",
    "append",
    "convert",
    "cp",
    "cp_to_tensor",
    "decompose",
    "extract",
    "fastfood",
    "from_hypercube",
    "fwht",
    "geometry",
    "hadamard_decomposition",
    "hypercube_shape",
    "info",
    "join_groups",
    "kron_matvec",
    "kronecker",
    "kronecker_decomposition",
    "learning_rate",
    "load",
    "maps",
    "merge",
    "parafac2",
    "parameter_count",
    "plan",
    "presets",
    "register_backend",
    "register_format",
    "register_layout",
    "register_map",
    "register_preset",
    "register_source",
    "register_start",
    "replace",
    "save",
    "search_rank",
    "sources",
    "split_groups",
    "tensor_ring",
    "tensor_train",
    "to_hypercube",
    "tt_cross",
    "tt_matrix",
    "tt_to_tensor",
    "tucker",
    "tucker_to_tensor",
    "verify",
]

# Modules that are imported when one of their names is first used: most programs need few of them, and most commands
# refuse a misspelled option before they import NumPy. (A function named like its module, such as convert, is not among
# them: importing the module would replace the function.)
_LAZY = {
    "AdapterFile": "checkpoints.adapter_file",
    "CompositeConfig": "algebra.composite",
    "Config": "algebra.config",
    "MergeReport": "checkpoints.merge",
    "PopulationFile": "checkpoints.population_file",
    "Pretrained": "checkpoints.pretrained_model",
    "ProgressBar": "report",
    "Projection": "algebra.maps.projection",
    "RowIndices": "targets.target",
    "Rows": "targets.target",
    "SuperLoRA": "algebra.update_plan",  # the former name of UpdatePlan
    "Target": "targets.target",
    "UpdatePlan": "algebra.update_plan",
    "append": "checkpoints.population_changes",
    "cp": "tensors._cp_decomposition",
    "cp_to_tensor": "algebra.products",
    "decompose": "decomposition",
    "extract": "decomposition.extraction",
    "fastfood": "algebra.maps.projection",
    "from_hypercube": "algebra.folding",
    "fwht": "algebra.maps.fastfood",
    "geometry": "algebra.geometry",
    "hadamard_decomposition": "tensors._kronecker",
    "hypercube_shape": "algebra.folding",
    "info": "checkpoints.info",
    "join_groups": "algebra.layout",
    "kron_matvec": "algebra.products",
    "kronecker": "algebra.products",
    "kronecker_decomposition": "tensors._kronecker",
    "learning_rate": "algebra.units",
    "load": "checkpoints.adapter_format",
    "merge": "checkpoints.merge",
    "parafac2": "tensors._parafac2",
    "parameter_count": "algebra.update_plan",
    "plan": "planning",
    "register_backend": "backends",
    "register_engine": "finetune.engines",  # not in __all__, as it needs torch
    "register_format": "algebra.formats",
    "register_layout": "targets.attention_layouts",
    "register_map": "algebra.maps",
    "register_preset": "algebra.presets",
    "register_source": "algebra.sources",
    "register_start": "algebra.starting_points",
    "replace": "checkpoints.population_changes",
    "save": "checkpoints.adapter_format",
    "search_rank": "decomposition",
    "split_groups": "algebra.layout",
    "tensor_ring": "tensors._train_decomposition",
    "tensor_train": "tensors._train_decomposition",
    "to_hypercube": "algebra.folding",
    "tt_cross": "tensors._cross",
    "tt_matrix": "tensors._train_decomposition",
    "tt_to_tensor": "algebra.products",
    "tucker": "tensors._tucker_decomposition",
    "tucker_to_tensor": "algebra.products",
    "verify": "testing.verification",
}

# Submodules that are imported when they are first used; the second need extras.
_MODULES = frozenset(
    {
        "algebra",
        "backends",
        "checkpoints",
        "decomposition",
        "report",
        "maps",
        "planning",
        "plugins",
        "presets",
        "sources",
        "targets",
        "tensors",
    }
)
_MODULES_WITH_EXTRAS = frozenset({"finetune", "plot", "serving", "testing", "torch"})

# Names that users of PyTorch and PEFT look for in this package.
_ELSEWHERE = {
    "attach": "tnadapt.torch.attach", "find_targets": "tnadapt.torch.find_targets",
    "from_pretrained": "tnadapt.torch.from_pretrained", "load_pretrained": "tnadapt.torch.load_pretrained",
    "get_peft_model": "tnadapt.torch.attach", "PeftModel": "tnadapt.torch.from_pretrained",
    "LoraConfig": "tnadapt.presets.lora",
}  # fmt: skip

__getattr__, __dir__ = lazy_names(__name__, _LAZY, _MODULES, _MODULES_WITH_EXTRAS, _ELSEWHERE)
