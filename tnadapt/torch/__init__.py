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
from ._adapter_loading import from_pretrained, load
from ._attach import attach
from ._idle_caches import set_cache_limit
from ._model_extraction import extract
from ._pretrained_loading import load_pretrained, load_processor
from ._quantized import QuantizedLayer, register_quantized
from ._reference_model import reference_model
from ._registry import mix
from ._requantizing import RequantizationReport, RequantizedWeight
from ._rows import rows
from ._target_selection import find_targets
from ._token_rows import token_targets
from ._trainer_checkpoints import adapter_checkpoints

__all__ = [
    "Adapter",
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
