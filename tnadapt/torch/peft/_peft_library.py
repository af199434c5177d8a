"""Everything that is imported from PEFT, public or not, and the error if PEFT is missing or too old."""

from __future__ import annotations

from tnadapt.errors import BackendError


class PeftMissingError(BackendError, ImportError):
    """PEFT is not installed, or too old."""


try:
    from peft import PeftConfig
    from peft.functional import delete_adapter, set_adapter, set_requires_grad
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    from peft.utils.integrations import init_empty_weights
    from peft.utils.other import AuxiliaryTrainingWrapper, set_additional_trainable_modules

    if not hasattr(BaseTuner, "_remap_adapter_state_dict_for_load"):
        raise ImportError("the installed PEFT lacks the hooks that an external method needs")
except ImportError as error:
    raise PeftMissingError(
        f'tnadapt.torch.peft needs PEFT 0.21 or newer: pip install "tnadapt[peft]" ({error})'
    ) from error

__all__ = [
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "AuxiliaryTrainingWrapper",
    "BaseTuner",
    "BaseTunerLayer",
    "PeftConfig",
    "PeftMissingError",
    "check_adapters_to_merge",
    "delete_adapter",
    "init_empty_weights",
    "set_adapter",
    "set_additional_trainable_modules",
    "set_requires_grad",
]
