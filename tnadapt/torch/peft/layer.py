"""What PEFT sees of the adapters on a model: one "tuner layer"."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import nn

from ...errors import TargetError, TnadaptError
from ..adapter import Adapter
from .api import BaseTunerLayer, check_adapters_to_merge

__all__ = ["TnadaptLayer"]


class TnadaptLayer(nn.Module, BaseTunerLayer):  # type: ignore[misc]  # PEFT's types are not looked at
    """The adapters of a model, as the one "tuner layer" that PEFT sees.

    PEFT's own methods have such a layer for each weight, with a share of the parameters. Here a group's
    parameters belong to many weights and lie on the model itself, so that this one has none and is a switchboard.
    """

    adapter_layer_names = ("arrays",)

    def __init__(self) -> None:
        super().__init__()
        self.handles: dict[str, Adapter] = {}
        self.merged_adapters: list[str] = []
        self._active_adapter: list[str] = []
        self._disable_adapters = False
        # The mixing weights of those that do not act at the moment.
        self._weights: dict[str, float] = {}

    def extra_repr(self) -> str:
        """What there is, for ``print(peft_model)``."""
        return ", ".join(map(repr, self.handles.values()))

    @property
    def arrays(self) -> nn.ModuleDict:
        """The parameters by adapter: a view for PEFT's reports, registered nowhere."""
        found = {name: [p for _, p in handle.named_parameters()] for name, handle in self.handles.items()}
        return nn.ModuleDict({name: nn.ParameterList(parameters) for name, parameters in found.items()})

    def get_base_layer(self) -> nn.Module:
        """There is none: ``weight`` and ``bias``, which PEFT reads from it, are no attributes either."""
        raise AttributeError("a TnadaptLayer stands for many weights and has no base layer")

    def handle(self, name: str) -> Adapter:
        """The handle of an adapter.

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
        """Let these adapters act, and be trained unless ``inference_mode``; the others do neither."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in names:
            self.handle(name)
        self.set_requires_grad(list(self.handles), False)
        self.set_requires_grad(names, not inference_mode)
        self._active_adapter = names
        self._switch()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let these adapters be trained or not."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            for _, parameter in self.handle(name).named_parameters():
                parameter.requires_grad_(requires_grad)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all of them on or off; off unmerges, as PEFT's own layers do."""
        if not enabled and self.merged:
            self.unmerge()
        self._disable_adapters = not enabled
        self._switch()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge these adapters, the active ones by default: all, or none if one cannot be.

        ``safe_merge`` is always on: nothing that is not finite is ever added.
        """
        done: list[str] = []
        names = list(check_adapters_to_merge(self, adapter_names))
        handles = [self.handle(name) for name in names]
        try:
            for name, handle in zip(names, handles, strict=True):
                self._act(name, True)
                handle.merge()
                done.append(name)
        except TnadaptError:
            for name in reversed(done):
                self.handles[name].unmerge()
            self._switch()
            raise
        self.merged_adapters = [*self.merged_adapters, *names]
        self._switch()

    def unmerge(self) -> None:
        """Give the weights the bits back that they had before any merge."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            # In reverse: each one gives back what it found.
            self.handles[self.merged_adapters[-1]].unmerge()
            self.merged_adapters = self.merged_adapters[:-1]
        self._switch()

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off the model; another one becomes active if it was."""
        self.handle(adapter_name).detach()
        del self.handles[adapter_name]
        super().delete_adapter(adapter_name)

    def _switch(self) -> None:
        """Give every adapter its mixing weight, or zero where it does not act."""
        # Beside merged ones no other acts: so do PEFT's own layers.
        active = [] if self._disable_adapters else self._active_adapter
        for name in self.handles:
            self._act(name, name in (self.merged_adapters or active))

    def _act(self, name: str, acts: bool) -> None:
        handle = self.handles[name]
        if acts and handle.weight == 0.0:
            handle.set_weight(self._weights.pop(name, 1.0))
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
