"""PEFT plug-in: tnadapt's adapters behind ``get_peft_model``, ``PeftModel.from_pretrained`` and ``merge_and_unload``.

**Unofficial.** PEFT has no public way to add a method from outside: :func:`register` writes into three dictionaries of
``peft.mapping`` under the key ``"TNADAPT"``, and the tuner class overrides hooks that PEFT calls internal. It is tested
with PEFT 0.21.0, 0.21.1 and 0.21.2, and refuses an older one, which lacks those hooks.
Needs ``pip install "tnadapt[peft]"``.

The adapter itself is that of :func:`tnadapt.torch.attach`, and ``tnadapt.torch.adapters(peft_model)["default"]`` is its
handle, with ``summary()``, ``save()`` and all else. So a fresh adapter leaves every output as it was, to the bit;
``unmerge_adapter()`` and ``unload()`` give the base's bits back (but for ``modules_to_save``, of which PEFT's
``unload()`` leaves the trained copy in place); a merge is finite or refused; and ``adapter_config.json`` has a
fingerprint of the base model and a digest of what F draws, so that another base is refused.

The arrays lie beside the base model, as ``base_model.tnadapt.tnadapt_arrays.{adapter}.{array}``: the base's state dict
has no others than before, and code that looks for an adapter by its name in the names of parameters finds it. TRL's
trainers do so when they copy a trained adapter to be their reference. An adapter may have any printable name
(``"my-adapter"``, ``"v1.0"``) but those of attributes of ``nn.ModuleDict`` (``"keys"``, ``"type"``), which PEFT's other
methods do not take either, and, beside ``modules_to_save``, those with a dot.

What is not supported: adapters of other types beside it, several adapters in one batch (``adapter_names=`` in a forward
pass), ``bias=``, ``add_weighted_adapter`` (:func:`tnadapt.torch.mix` weights adapters), ``inject_adapter_in_model`` and
transformers' own ``model.add_adapter``.

Examples
--------
>>> import torch, tnadapt.torch.peft
>>> from peft import get_peft_model
>>> tnadapt.torch.peft.register()
>>> model = torch.nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, batch_first=True)
>>> model = get_peft_model(model, TnadaptConfig(preset="superlora", settings={"rank": 2}, target_modules="qv"))
>>> model.print_trainable_parameters()
trainable params: 92 || all params: 2,316 || trainable%: 3.9724
"""

from __future__ import annotations

from typing import Any

from tnadapt.errors import ConfigError, safe_repr

from .._state import PREFIX
from ._peft_config import NAME, TnadaptConfig
from ._peft_library import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
    PeftMissingError,
)
from ._tuner import TnadaptModel
from ._tuner_layer import TnadaptLayer

__all__ = ["PeftMissingError", "TnadaptConfig", "TnadaptLayer", "TnadaptModel", "register"]


def register() -> None:
    """Make PEFT know ``TnadaptConfig``; a second call does nothing.

    Call it before :class:`TnadaptConfig` is used and before ``PeftModel.from_pretrained`` meets such an adapter.

    Raises
    ------
    ConfigError
        If another package has taken the name ``"TNADAPT"`` in PEFT's tables.
    """
    for table, value in _tables():
        if table.get(NAME, value) != value:
            raise ConfigError(f"PEFT knows a method {NAME!r} already, which is not tnadapt's: {safe_repr(table[NAME])}")
    for table, value in _tables():
        table[NAME] = value


def _tables() -> list[tuple[dict[Any, Any], Any]]:
    """PEFT's tables of methods, whose keys it types as an enumeration and takes as strings; and what stands there."""
    return [
        (PEFT_TYPE_TO_CONFIG_MAPPING, TnadaptConfig),
        (PEFT_TYPE_TO_TUNER_MAPPING, TnadaptModel),
        (PEFT_TYPE_TO_PREFIX_MAPPING, PREFIX),
    ]
