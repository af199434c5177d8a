"""PEFT's tuner: the wrapper around a model that maps PEFT's calls to tnadapt's adapters."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tnadapt.algebra.config import Config
from tnadapt.errors import ConfigError, FileError, TargetError, safe_repr

from .._adapter import Adapter
from .._argument_places import warn_undropped
from .._attach import attach_with
from .._registry import overlapping
from .._removal import let_go, let_go_merged, take_off
from .._state import PREFIX, AdapterState
from .._trainable import keep
from ._base_check import base_dtype, check_base, computed_from
from ._keys import check_adapter_name, in_file
from ._mixed_batches import mixed_batch
from ._peft_config import TnadaptConfig
from ._peft_library import (
    BaseTuner,
    PeftConfig,
    delete_adapter,
    init_empty_weights,
    set_adapter,
    set_additional_trainable_modules,
    set_requires_grad,
)
from ._random_start import start_randomly
from ._selection import select_targets
from ._tuner_layer import TnadaptLayer

__all__ = ["TnadaptModel"]


class TnadaptModel(BaseTuner):  # type: ignore[misc]  # PEFT's types are not looked at
    """The wrapper that PEFT puts around the model; maps PEFT's calls to those of :class:`tnadapt.torch.Adapter`.

    Attributes
    ----------
    model : Module
        The base model.
    tnadapt : TnadaptLayer
        The adapters.
    """

    prefix = PREFIX
    tuner_layer_cls = TnadaptLayer
    uses_shared_state = True
    tnadapt: TnadaptLayer
    targeted_module_names: list[str]

    def _pre_injection_hook(self, model: nn.Module, config: PeftConfig, adapter_name: str) -> None:
        self.tnadapt = TnadaptLayer()

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("tnadapt replaces no modules")

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Attach an adapter; the first one becomes active."""
        there, trainable = list[AdapterState](), dict[nn.Parameter, bool]()
        attaching = False
        try:
            there = overlapping(model)
            attaching = True
            config: Any = self.peft_config[adapter_name]
            layer = self.tnadapt
            if layer.handles:
                trainable = _trainable(self)
            check_adapter_name(adapter_name)
            _check_saved_modules(config, adapter_name)
            if layer.merged:
                warnings.warn("An adapter cannot be added while others are merged. Unmerging them first.", stacklevel=2)
                layer.unmerge()
            with init_empty_weights() if low_cpu_mem_usage else contextlib.nullcontext():
                handle = _attach(model, config, adapter_name)
                layer.add(handle)
            check_base(handle, config.base, config.computed_from)
            if config.trained is not None:
                _choose(handle, config.trained)
            if not config.init_weights:
                start_randomly(handle)
            active = self.active_adapters
            if active:
                self.set_adapter(active, inference_mode=config.inference_mode)
            else:
                layer.set_adapter([])
            set_additional_trainable_modules(
                model=model,
                peft_config=config,
                model_config=self.get_model_config(self),
                adapter_name=adapter_name,
                activate_adapter=adapter_name in active,
            )
            _restore(trainable)
            self.targeted_module_names = list(
                dict.fromkeys([*self.targeted_module_names, *(target.module for target in handle.targets)])
            )
        except BaseException:  # KeyboardInterrupt, too: PEFT does not roll back
            for other in overlapping(model):
                if attaching and other not in there:
                    take_off(other)
                    self.tnadapt.drop(adapter_name)
            _restore(trainable)
            # A second tuner on the same base shares this dictionary with the first.
            if adapter_name not in [other.name for other in there]:
                self.peft_config.pop(adapter_name, None)
            raise

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate these adapters; see PEFT."""
        set_adapter(self, adapter_name, inference_mode=inference_mode)
        self.active_adapter = adapter_name

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Set whether these adapters and their ``modules_to_save`` are trained."""
        set_requires_grad(self, adapter_names=adapter_names, requires_grad=requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from the model.

        Raises
        ------
        TargetError
            If there is none of that name, or it is merged.
        """
        if adapter_name not in self.tnadapt.handles:
            there = ", ".join(map(repr, self.tnadapt.handles)) or "none"
            raise TargetError(f"Adapter {adapter_name} does not exist; there are: {there}")
        if adapter_name in self.tnadapt.merged_adapters:
            raise TargetError(
                f"Cannot delete adapter(s) {[adapter_name]} while they are merged. Please unmerge them first. "
                "(unmerge_adapter() does so.)"
            )
        self.active_adapter = delete_adapter(self, adapter_name, prefix=self.prefix, layer_cls=TnadaptLayer) or []
        del self.peft_config[adapter_name]

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the weights, the active ones by default: all of them, or none if one fails."""
        self._check_merge_allowed()
        self.tnadapt.merge(adapter_names=adapter_names)

    def unmerge_adapter(self) -> None:
        """Restore the exact bits that the weights had before any merge."""
        self.tnadapt.unmerge()

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        with mixed_batch(self, self.tnadapt, names, args, kwargs):
            yield

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Raise a ConfigError: adapters are mixed without a new one, by :func:`tnadapt.torch.mix`."""
        raise ConfigError(
            "tnadapt's adapters are combined by their weights, without a new adapter, which could have another "
            "form: tnadapt.torch.mix(model, {'first': 0.5, 'second': 0.5})"
        )

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        self.tnadapt.enable_adapters(enabled)
        super()._enable_adapter_layers(enabled)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        handle = self.tnadapt.handle(adapter_name)
        dtype = torch.float32 if autocast_adapter_dtype else base_dtype(handle)
        for _, parameter in handle.named_parameters():
            if not autocast_adapter_dtype or parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.to(dtype)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        layer = self.tnadapt
        if layer.merged and not merge:
            layer.unmerge()
        wanted = self.active_adapters if adapter_names is None else adapter_names
        left = [name for name in wanted if name not in layer.merged_adapters]
        if merge and left:
            layer.merge(adapter_names=left)
        # PEFT removes its own wrappers of modules_to_save.
        super()._unload_and_optionally_merge(merge=merge, progressbar=progressbar, adapter_names=adapter_names)
        for name, handle in list(layer.handles.items()):
            if name in layer.merged_adapters:
                let_go_merged(handle._state)
            else:
                let_go(handle._state)
            layer.drop(name)
        layer.merged_adapters = []
        model: nn.Module = self.model
        return model

    # -- State dicts -------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: Any,
    ) -> dict[str, Tensor]:
        layer = _layer_of(model)
        handle = layer.handle(adapter_name)
        if config.base is None or (config.computed_from is None and handle.plan.base_shapes):
            base = layer.base_of(adapter_name)
            config.keep_base(base, computed_from(handle, base))
        config.keep_trained(handle.trained)
        own = {key: tensor for key, tensor in state_dict.items() if in_file(key, adapter_name) is not None}
        # PEFT's files have the arrays, as tnadapt's do.
        return _converted(own, handle._state, handle._state.plan.to_arrays)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return in_file(key, adapter_name) or super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        if adapter_name in _layer_of(model).merged_adapters:
            raise TargetError(f"adapter {adapter_name!r} is merged: call unmerge_adapter() before arrays are loaded")
        names, expected = dict[str, str](), dict[str, tuple[int, ...]]()
        for name, tensor in model.state_dict().items():
            key = in_file(name, adapter_name)
            if key is not None:
                names[key], expected[key] = name, tuple(tensor.shape)
        found = {key: tuple(tensor.shape) for key, tensor in state_dict.items() if ".tnadapt." in f".{key}"}
        if found != expected:
            wrong = sorted(set(found.items()) ^ set(expected.items()))[:4]
            raise FileError(
                f"these arrays do not fit adapter {adapter_name!r}, and none was loaded; they differ in: {wrong}"
            )
        renamed = {names.get(key, key): tensor for key, tensor in state_dict.items()}
        state = _layer_of(model).handle(adapter_name)._state
        own = {key: tensor for key, tensor in renamed.items() if in_file(key, adapter_name) is not None}
        return renamed | _converted(own, state, state.plan.from_arrays)


def _converted(
    own: Mapping[str, Tensor], state: AdapterState, convert: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Convert an adapter's tensors in a state dict between parameters and arrays, which their units are between."""
    arrays = {name: array for array, name in state.parameter_names.items()}
    found = {}
    for key, tensor in own.items():
        array = arrays[key.rpartition(".")[2]]
        found[key] = convert({array: tensor})[array]
    return found


def _layer_of(model: nn.Module) -> TnadaptLayer:
    return next(module for module in model.modules() if isinstance(module, TnadaptLayer))


def _trainable(model: nn.Module) -> dict[nn.Parameter, bool]:
    # A function, since Python 3.13 may not catch what interrupts a comprehension in the ``try`` block around it.
    return {parameter: parameter.requires_grad for parameter in model.parameters()}


def _restore(trainable: Mapping[nn.Parameter, bool]) -> None:
    for parameter, required in trainable.items():
        parameter.requires_grad_(required)


def _check_saved_modules(config: TnadaptConfig, name: str) -> None:
    """Raise a TargetError if PEFT could not store copies of saved modules under the adapter's name."""
    if config.modules_to_save and "." in name:
        raise TargetError(
            f"an adapter cannot be called {name!r} with modules_to_save={safe_repr(config.modules_to_save)}: "
            "PEFT keeps "
            "the trained copies under the adapter's name, in which torch allows no dot; give a name without dots"
        )


def _choose(handle: Adapter, trained: Sequence[str]) -> None:
    """Train only these arrays of a fresh adapter, with the zero in one of them."""
    there = handle.plan.param_shapes
    unknown = sorted(set(trained) - set(there))
    if unknown:
        raise ConfigError(
            f"trained={safe_repr(unknown)} of the config are not arrays of adapter {handle.name!r}, which has "
            f"{safe_repr(list(there))}: give some of these names, or None to train all"
        )
    meta = any(array.device.type == "meta" for _, array in handle.named_parameters())
    keep(handle._state, trained, None if meta else handle._state.plan.init(trained=trained))


def _attach(model: nn.Module, config: TnadaptConfig, name: str) -> Adapter:
    about = BaseTuner.get_model_config(model)
    model_type = about.get("model_type") if isinstance(about, Mapping) else None
    targets = select_targets(model, config, model_type)
    settings = Config.from_dict(config.settings)
    # Not attach(), which warns of a rank that its caller chose: here it may be a preset's, or that of a file.
    adapter = attach_with(
        model, settings, targets, name, strategy=config.strategy, activation=config.activation,
        detach_norm=config.detach_norm, dropout=config.dropout,
    )  # fmt: skip
    warn_undropped(adapter.targets, adapter.dropout)
    return adapter
