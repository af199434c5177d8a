"""The adapters on a model as PEFT sees them: a single "tuner layer"."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tnadapt.errors import BackendError, TargetError, TnadaptError

from .._adapter import Adapter
from .._arrays import register_in
from .._removal import let_go
from .._state import AdapterState
from ._base_check import describe_base
from ._peft_library import BaseTunerLayer, check_adapters_to_merge
from ._registered_arrays import AdapterArrays

__all__ = ["TnadaptLayer"]


class TnadaptLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]  # PEFT's types are not looked at
    """The adapters of a model as the single "tuner layer" that PEFT sees.

    PEFT's own methods have one such layer per weight, with its share of the parameters. Here the parameters of a group
    belong to many weights, so there is one layer for all of them. It is next to the base model, which it does not
    change, and holds the arrays as ``tnadapt_arrays.{adapter}.{array}``.
    """

    adapter_layer_names = ("tnadapt_arrays",)

    def __init__(self) -> None:
        super().__init__()
        self.tnadapt_arrays = AdapterArrays()
        self.handles: dict[str, Adapter] = {}
        self.merged_adapters: list[str] = []
        self._active_adapter: list[str] = []
        self._disable_adapters = False
        # Mixing weights of the adapters that are inactive at the moment, to restore later.
        self._weights: dict[str, float] = {}
        self._bases: dict[str, dict[str, Any]] = {}

    def extra_repr(self) -> str:
        """Return the adapters' descriptions for ``print(peft_model)``."""
        return ", ".join(map(repr, self.handles.values()))

    @property
    def in_features(self) -> tuple[int, ...]:
        """The input sizes of the adapted weights, one adapter after another."""
        return tuple(target.shape[1] for handle in self.handles.values() for target in handle.targets)

    @property
    def out_features(self) -> tuple[int, ...]:
        """The output sizes of the adapted weights, in the order of :attr:`in_features`."""
        return tuple(target.shape[0] for handle in self.handles.values() for target in handle.targets)

    def add(self, handle: Adapter) -> None:
        """Add an adapter that was just attached, and register its arrays here."""
        arrays = nn.ParameterDict()
        register_in(
            handle._state,
            arrays,
            f"they belong to a PEFT model; call its delete_adapter({handle.name!r}), unload() or merge_and_unload()",
        )
        self.tnadapt_arrays[handle.name] = arrays
        self.handles[handle.name] = handle

    def remove(self, name: str) -> None:
        """Remove an adapter from the model."""
        handle = self.handles[name]
        # While other adapters remain, requires_grad is decided by them and by PEFT (modules_to_save). Detaching would
        # reset it to its state before the first adapter, so it is saved and restored.
        required = [(p, p.requires_grad) for p in handle.model.parameters()] if len(self.handles) > 1 else []
        try:
            let_go(handle._state)
        finally:
            for parameter, was in required:
                parameter.requires_grad_(was)
        self.drop(name)

    def drop(self, name: str) -> None:
        """Forget an adapter that was removed from the model, also one that was only partly added."""
        self.handles.pop(name, None)
        if name in self.tnadapt_arrays:
            del self.tnadapt_arrays[name]
        self._weights.pop(name, None)
        self._bases.pop(name, None)

    def base_of(self, name: str) -> dict[str, Any] | None:
        """Return the description of the base model for a file; None while another adapter is merged into the base."""
        # Computed when first needed, because it reads every weight.
        if name not in self._bases and set(self.merged_adapters) <= {name}:
            self._bases[name] = describe_base(self.handle(name))
        return self._bases.get(name)

    def get_base_layer(self) -> nn.Module:
        """Raise an AttributeError: there is no single base layer, hence no ``weight`` and ``bias`` for PEFT to read."""
        raise AttributeError("a TnadaptLayer stands for many weights and has no base layer")

    def inactive_weights(self) -> dict[AdapterState, float]:
        """Return the mixing weights that inactive adapters have when they are active."""
        return {self.handles[name]._state: weight for name, weight in self._weights.items()}

    def handle(self, name: str) -> Adapter:
        """Return the handle of an adapter.

        Raises
        ------
        TargetError
            If there is none of that name.
        """
        if name not in self.handles:
            there = ", ".join(map(repr, self.handles)) or "none"
            raise TargetError(f"no tnadapt adapter {name!r} on this model; there are: {there}")
        return self.handles[name]

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate these adapters, and train them unless ``inference_mode``; deactivate and freeze the others."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in names:
            self.handle(name)
        self.set_requires_grad(list(self.handles), False)
        self.set_requires_grad(names, not inference_mode)
        self._active_adapter = names
        self._switch()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Set whether these adapters are trained; arrays that ``set_trainable`` froze stay frozen."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            handle = self.handle(name)
            for array, parameter in handle.named_parameters():
                frozen = handle.trained is not None and array not in handle.trained
                parameter.requires_grad_(requires_grad and not frozen)

    def enable_adapters(self, enabled: bool) -> None:
        """Enable or disable all adapters; disabling unmerges, as in PEFT's own layers."""
        if not enabled and self.merged:
            self.unmerge()
        self._disable_adapters = not enabled
        self._switch()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge these adapters, the active ones by default: all, or none if one fails.

        ``safe_merge`` is always on: nothing that is not finite is ever added.
        """
        names = list(check_adapters_to_merge(self, adapter_names))
        handles = [self.handle(name) for name in names]
        before, new = self.merged_adapters, [handle for handle in handles if not handle.merged]
        try:
            for name, handle in zip(names, handles, strict=True):
                self._act(name, True)
                handle.merge()
            self.merged_adapters = [*before, *names]
            self._switch()
        except BaseException as error:  # also OutOfMemoryError and KeyboardInterrupt
            for other in reversed(new):
                if other.merged:
                    other.unmerge()
            self.merged_adapters = before
            self._switch()
            if not isinstance(error, TnadaptError):
                raise
            if all(bool(torch.isfinite(array).all()) for _, array in handle.named_parameters()):
                raise
            # Code that uses PEFT looks for this sentence.
            raise BackendError(
                f"NaNs detected in the merged weights. The adapter {name} seems to be broken: {error}"
            ) from error

    def unmerge(self) -> None:
        """Restore the exact bits that the weights had before any merge."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            # In reverse order, because each restores the rows that it found. An adapter that is listed but no longer
            # merged comes from an unmerge() that was interrupted.
            handle = self.handles[self.merged_adapters[-1]]
            if handle.merged:
                handle.unmerge()
            self.merged_adapters = self.merged_adapters[:-1]
        self._switch()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from the model; if it was active, another one becomes active."""
        self.handle(adapter_name)
        self.remove(adapter_name)
        super().delete_adapter(adapter_name)

    def _switch(self) -> None:
        """Set every adapter to its mixing weight, or to zero if it is inactive."""
        # While some are merged, no other adapter acts, as in PEFT's own layers.
        active = [] if self._disable_adapters else self._active_adapter
        for name in self.handles:
            self._act(name, name in (self.merged_adapters or active))

    def _act(self, name: str, acts: bool) -> None:
        handle = self.handles[name]
        if acts and handle.weight == 0.0:
            handle.set_weight(self._weights.get(name, 1.0))
            self._weights.pop(name, None)
        elif not acts and handle.weight != 0.0:
            self._weights[name] = handle.weight
            handle.set_weight(0.0)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        handle = self.handles[adapter_name]
        first = handle.targets[0]
        weight = handle.model.get_submodule(first.module)._parameters.get(first.parameter)
        for _, parameter in handle.named_parameters():
            where = device if weight is None or device is not None else weight.device
            if where is not None and parameter.device.type != "meta":
                parameter.data = parameter.data.to(where)
