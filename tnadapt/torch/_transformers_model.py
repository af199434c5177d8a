"""What a transformers model has to know about its adapters: when it is saved, and when its Trainer asks.

transformers knows PEFT's adapters alone. Two of its methods would go wrong with others: ``save_pretrained``, which
writes a model that loads without its adapter; and the Trainer, which refuses to train a quantized model unless an
adapter is on it. (A model from a GGUF file counts as quantized, although its weights are dequantized.) Those that
switch and list adapters are in :mod:`tnadapt.torch._adapter_methods`.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

from ._adapter_methods import AdapterMethod
from ._registry import attached
from ._state import ADAPTERS_ATTR, is_array

__all__ = ["TransformersModel"]

_SAVE = "save_pretrained"
# The attribute by which transformers tells that a model has adapters.
_HAS_ADAPTERS = "_hf_peft_config_loaded"


class TransformersModel:
    """Replaces ``save_pretrained`` of one model while adapters are attached, and marks a quantized one as adapted.

    It is an object rather than a closure, so that ``copy.deepcopy`` and ``pickle`` connect a copied model to the copy.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        #: Whether the mark is this package's.
        self.marked = bool(getattr(model, "is_quantized", False)) and getattr(model, _HAS_ADAPTERS, None) is False

    @staticmethod
    def install(model: nn.Module) -> None:
        """Prepare a model with an adapter, if it is one of transformers'."""
        if not callable(getattr(type(model), _SAVE, None)) or _SAVE in model.__dict__:
            return
        own = model.__dict__[_SAVE] = TransformersModel(model)
        AdapterMethod.install(model)
        if own.marked:
            model.__dict__[_HAS_ADAPTERS] = True

    @staticmethod
    def remove(model: nn.Module) -> None:
        """Undo :meth:`install` once the last adapter is gone."""
        own = model.__dict__.get(_SAVE)
        if not isinstance(own, TransformersModel) or model.__dict__.get(ADAPTERS_ATTR):
            return
        AdapterMethod.remove(model)
        if own.marked:
            model.__dict__.pop(_HAS_ADAPTERS, None)
        del model.__dict__[_SAVE]

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Save the model as its class does, with a warning if the result would load without its adapters.

        With merged adapters the weights are the result: their arrays are left out.
        """
        states = attached(self.model).values()
        unmerged = [state.name for state in states if state.merged is None]
        if unmerged:
            listed = ", ".join(map(repr, unmerged))
            warnings.warn(
                f"save_pretrained writes the whole {type(self.model).__name__}, with the arrays of adapter {listed} "
                "beside the unchanged base: from_pretrained will load the base without its effect. To save the adapter "
                f"alone, call tnadapt.torch.adapters(model)[{unmerged[0]!r}].save_pretrained(folder). To save the "
                "changed model, call merge() of the adapter first. For a Trainer's checkpoints, call "
                "tnadapt.torch.adapter_checkpoints(trainer) before train()",
                stacklevel=2,
            )
        elif states and kwargs.get("state_dict") is None and not args:
            found = self.model.state_dict()
            kwargs["state_dict"] = {name: value for name, value in found.items() if not is_array(name)}
        cls: Any = type(self.model)
        with self._unmarked():
            return cls.save_pretrained(self.model, save_directory, *args, **kwargs)

    @contextlib.contextmanager
    def _unmarked(self) -> Iterator[None]:
        # A marked model would be saved in PEFT's format.
        if not self.marked:
            yield
            return
        self.model.__dict__.pop(_HAS_ADAPTERS, None)
        try:
            yield
        finally:
            self.model.__dict__[_HAS_ADAPTERS] = True
