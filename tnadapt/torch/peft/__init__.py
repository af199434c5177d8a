"""PEFT plug-in: tnadapt's adapters behind ``get_peft_model``, ``PeftModel.from_pretrained`` and ``merge_and_unload``.

**Unofficial.** PEFT has no public interface for external methods: :func:`register` writes into three dictionaries of
``peft.mapping`` under the key ``"TNADAPT"``, and the tuner class overrides hooks that PEFT considers internal. It is
tested with PEFT 0.21.0, 0.21.1 and 0.21.2, and rejects older versions, which lack those hooks.
Needs ``pip install "tnadapt[peft]"``.

The adapter is that of :func:`tnadapt.torch.attach`, and ``tnadapt.torch.adapters(peft_model)["default"]`` is its
handle, with ``summary()``, ``save()`` and so on. A fresh adapter therefore leaves every output bit for bit the same;
``unmerge_adapter()`` and ``unload()`` restore the base's bits (except for ``modules_to_save``, where PEFT's
``unload()`` leaves the trained copy in place); a merge is finite or refused; and ``adapter_config.json`` has a
fingerprint of the base model and a digest of the draws of F, so that another base is rejected.

The arrays are next to the base model, as ``base_model.tnadapt.tnadapt_arrays.{adapter}.{array}``. The base's state dict
therefore has no additional entries, and code that finds an adapter's parameters by its name works, such as TRL's
trainers, which copy a trained adapter for their reference. An adapter may have any printable name
without dots (``"my-adapter"``) except those of attributes of ``nn.ModuleDict`` (``"keys"``, ``"type"``); PEFT's other
methods have the same limits.

``adapter_names=`` in a forward pass and in ``generate`` gives each sample of a batch its adapter, also with DoRA.

Not supported: adapters of other types on the same model, ``bias=``, ``add_weighted_adapter`` (use
:func:`tnadapt.torch.mix`), ``inject_adapter_in_model`` and transformers' ``model.add_adapter``.

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
from ._peft_config import NAME, PeftMissingError, TnadaptConfig
from ._tuner import TnadaptLayer, TnadaptModel

__all__ = ["PeftMissingError", "TnadaptConfig", "TnadaptLayer", "TnadaptModel", "register"]


def register() -> None:
    """Register ``TnadaptConfig`` with PEFT; a second call does nothing.

    Call it before using :class:`TnadaptConfig`, and before ``PeftModel.from_pretrained`` loads such an adapter.

    Raises
    ------
    ConfigError
        If another package has taken the name ``"TNADAPT"`` in PEFT's tables.
    """
    from peft import mapping

    # PEFT's tables of methods, and this method's entries. Their keys are typed as an enum but may be strings.
    tables: list[tuple[dict[Any, Any], Any]] = [
        (mapping.PEFT_TYPE_TO_CONFIG_MAPPING, TnadaptConfig),
        (mapping.PEFT_TYPE_TO_TUNER_MAPPING, TnadaptModel),
        (mapping.PEFT_TYPE_TO_PREFIX_MAPPING, PREFIX),
    ]
    for table, value in tables:
        if table.get(NAME, value) != value:
            raise ConfigError(
                f"PEFT already has a method {NAME!r}, registered by another package: {safe_repr(table[NAME])}"
            )
    for table, value in tables:
        table[NAME] = value
