"""Adapters on torch models: ``attach``, train, ``save``, ``load``, ``merge``.

Examples
--------
>>> import torch, tnadapt.torch
>>> model = torch.nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, batch_first=True)
>>> adapter = tnadapt.torch.attach(model)
>>> adapter.num_parameters, sum(p.requires_grad for p in model.parameters())
(368, 2)
"""

try:
    import torch as _torch  # noqa: F401  # the error that says what to install comes before any other import
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'tnadapt.torch needs PyTorch, which is not installed: pip install "tnadapt[torch]"', name=error.name
    ) from error

from tnadapt.targets.target import RowIndices, Rows, Target

from . import starts
from ._adapter import Adapter, adapters
from ._adapter_loading import from_pretrained, load, load_pretrained, load_processor
from ._attach import attach
from ._member_optimizer import MemberAdamW
from ._merging import RequantizationReport, RequantizedWeight
from ._model_extraction import extract
from ._population import Member, Population
from ._quantized import QuantizedLayer, register_quantized
from ._registry import mix, reference_model, set_cache_limit
from ._rows import rows
from ._target_selection import find_targets
from ._trainer_checkpoints import adapter_checkpoints
from ._weights import token_targets

__all__ = [
    "Adapter",
    "Member",
    "MemberAdamW",
    "Population",
    "QuantizedLayer",
    "RequantizationReport",
    "RequantizedWeight",
    "RowIndices",
    "Rows",
    "Target",
    "adapter_checkpoints",
    "adapters",
    "attach",
    "extract",
    "find_targets",
    "from_pretrained",
    "load",
    "load_pretrained",
    "load_processor",
    "mix",
    "reference_model",
    "register_quantized",
    "rows",
    "set_cache_limit",
    "starts",
    "token_targets",
]
