"""What PEFT puts around a model."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...adapter_file import AdapterFile
from ...config import Config
from ...errors import ConfigError, FileError, TargetError, TnadaptError, shown
from ...fingerprint import Fingerprint
from ..adapter import Adapter
from ..attach import attach
from ..registry import PREFIX
from ..storage import base_fingerprint
from ..targets import find_targets
from .api import (
    AuxiliaryTrainingWrapper,
    BaseTuner,
    PeftConfig,
    delete_adapter,
    init_empty_weights,
    set_adapter,
    set_additional_trainable_modules,
    set_requires_grad,
)
from .config import TnadaptConfig
from .layer import TnadaptLayer

__all__ = ["TnadaptModel"]


class TnadaptModel(BaseTuner):  # type: ignore[misc]  # PEFT's types are not looked at
    """What PEFT puts around the model: it turns PEFT's calls into those of :class:`tnadapt.torch.Adapter`.

    Attributes
    ----------
    model : Module
        The base model.
    tnadapt : TnadaptLayer
        Its adapters.
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
        """Attach an adapter. It is active if it is the first."""
        # The caller's own object serves other models, too: what is learnt of this one is kept in a copy.
        config: Any = copy.copy(self.peft_config[adapter_name])
        layer, others = self.tnadapt, list(self.tnadapt.handles)
        if layer.merged:
            warnings.warn("An adapter cannot be added while others are merged. Unmerging them first.", stacklevel=2)
            layer.unmerge()
        trainable = {parameter: parameter.requires_grad for parameter in model.parameters()} if others else {}
        with init_empty_weights() if low_cpu_mem_usage else contextlib.nullcontext():
            handle = _attach(model, config, adapter_name)
        try:
            if config.base is not None:
                _check_base(handle, config.base)
            layer.handles[adapter_name] = handle
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
        except Exception:
            layer.handles.pop(adapter_name, None)
            handle.detach()
            raise
        finally:
            for parameter, required in trainable.items():
                parameter.requires_grad_(required)
        config.settings = handle.config.to_dict()
        self.peft_config[adapter_name] = config
        self.targeted_module_names = list(
            dict.fromkeys([*self.targeted_module_names, *(target.module for target in handle.targets)])
        )

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Let these adapters act; see PEFT."""
        set_adapter(self, adapter_name, inference_mode=inference_mode)
        self.active_adapter = adapter_name

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Let these adapters, and their ``modules_to_save``, be trained or not."""
        set_requires_grad(self, adapter_names=adapter_names, requires_grad=requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off the model.

        Raises
        ------
        TargetError
            If there is none of that name, or it is merged.
        """
        self.tnadapt.handle(adapter_name)
        if adapter_name in self.tnadapt.merged_adapters:
            raise TargetError(f"adapter {adapter_name!r} is merged: call unmerge_adapter() before it is deleted")
        self.active_adapter = delete_adapter(self, adapter_name, prefix=self.prefix, layer_cls=TnadaptLayer) or []
        del self.peft_config[adapter_name]

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the weights, the active ones by default: all of them, or none if one cannot be."""
        self._check_merge_allowed()
        self.tnadapt.merge(adapter_names=adapter_names)

    def unmerge_adapter(self) -> None:
        """Give the weights the bits back that they had before any merge."""
        self.tnadapt.unmerge()

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ConfigError(
                "adapter_names=, an adapter for each sample of a batch, is not for tnadapt's adapters, which change a "
                "weight for all samples: run a batch for each adapter, after set_adapter"
            )
        yield

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        self.tnadapt.enable_adapters(enabled)
        super()._enable_adapter_layers(enabled)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        for _, parameter in self.tnadapt.handle(adapter_name).named_parameters():
            if autocast_adapter_dtype and parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()

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
        # PEFT takes its own wrappers of modules_to_save off.
        super()._unload_and_optionally_merge(merge=merge, progressbar=progressbar, adapter_names=adapter_names)
        for name, handle in layer.handles.items():
            if name in layer.merged_adapters:
                handle.bake()
            else:
                handle.detach()
        layer.handles, layer.merged_adapters = {}, []
        model: nn.Module = self.model
        return model

    # -- State dicts -------------------------------------------------------------------------
    # On the model: tnadapt_default_group0_split0_factor0. In a file: tnadapt.group0.split0.factor0.

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
        # Taken when it is needed, as it reads every weight; where another one is merged, the base's are not there.
        if config.base is None and set(layer.merged_adapters) <= {adapter_name}:
            config.base = _base(layer.handle(adapter_name))
        return {key: tensor for key, tensor in state_dict.items() if _in_file(key, adapter_name) is not None}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return _in_file(key, adapter_name) or super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        if adapter_name in _layer_of(model).merged_adapters:
            raise TargetError(f"adapter {adapter_name!r} is merged: call unmerge_adapter() before arrays are loaded")
        names, expected = dict[str, str](), dict[str, tuple[int, ...]]()
        for name, tensor in model.state_dict().items():
            key = _in_file(name, adapter_name)
            if key is not None:
                names[key], expected[key] = name, tuple(tensor.shape)
        found = {key: tuple(tensor.shape) for key, tensor in state_dict.items() if ".tnadapt.group" in f".{key}"}
        if found != expected:
            wrong = sorted(set(found.items()) ^ set(expected.items()))[:4]
            raise FileError(
                f"these arrays do not fit adapter {adapter_name!r}, and none was loaded; what differs: {wrong}"
            )
        return {names.get(key, key): tensor for key, tensor in state_dict.items()}


def _in_file(key: str, adapter_name: str) -> str | None:
    """What an adapter's array is called in a file, by its name in a state dict; None for anything else."""
    path, _, last = key.rpartition(".")
    array = re.fullmatch(rf"{PREFIX}{re.escape(adapter_name)}_(group\d+(?:_term\d+)?_split\d+_[a-z]+\d*)", last)
    return None if array is None else ".".join([*path.split("."), "tnadapt", array[1].replace("_", ".")]).lstrip(".")


def _layer_of(model: nn.Module) -> TnadaptLayer:
    return next(module for module in model.modules() if isinstance(module, TnadaptLayer))


def _attach(model: nn.Module, config: TnadaptConfig, name: str) -> Adapter:
    saved = [f".{module}." for module in config.modules_to_save or ()]
    saved += [f".{path}." for path, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    targets = [
        target
        for target in find_targets(model, config.target_modules)
        if not any(module in f".{target.module}." for module in saved)
    ]
    if not targets:
        raise TargetError(
            f"target_modules={shown(config.target_modules)} names nothing outside of "
            f"modules_to_save={shown(config.modules_to_save)}, which are trained whole"
        )
    settings = None if config.settings is None else Config.from_dict(config.settings)
    return attach(model, settings, targets, name, strategy=config.strategy, activation=config.activation)


# -- The base model ------------------------------------------------------------------------------


def _base(handle: Adapter) -> dict[str, Any]:
    """What a file says of the base model and the draws."""
    base = base_fingerprint(handle)
    counts: dict[str, int] = {}
    for rows, cols in handle.plan.shapes:
        counts[f"{rows}x{cols}"] = counts.get(f"{rows}x{cols}", 0) + 1
    return {
        "weights": counts,
        "fingerprint": None if base is None else {**dataclasses.asdict(base), "sketch": list(base.sketch)},
        "draws": AdapterFile(handle.config, handle.targets, handle.plan.init()).draws,
    }


def _check_base(handle: Adapter, saved: dict[str, Any]) -> None:
    """A FileError unless the adapter was trained on such weights, and with such draws, as are here."""
    here = _base(handle)
    way = (
        "Give the base model that it was trained on; or, to use it here all the same, load its TnadaptConfig, set "
        "config.base = None, and pass it as config="
    )
    kind = type(handle.model).__name__
    if saved.get("weights") != here["weights"]:
        raise FileError(
            f"the adapter was trained on weights of the shapes {shown(saved.get('weights'))}, and target_modules find "
            f"{here['weights']} in this {kind}. {way}"
        )
    if saved.get("draws") != here["draws"]:
        raise FileError(
            f"the adapter was trained with fixed draws of F whose digest is {shown(saved.get('draws'))}; on this "
            f"machine it is {here['draws']}. Its updates would be others: run tnadapt.verify to see why"
        )
    if saved.get("fingerprint") is None or here["fingerprint"] is None:
        return
    try:
        difference = Fingerprint(**saved["fingerprint"]).difference(Fingerprint(**here["fingerprint"]))
    except (TypeError, TnadaptError) as error:
        raise FileError(f"the fingerprint of the base model in the adapter's config is none: {error}") from None
    if difference is not None:
        raise FileError(
            f"the adapter was trained on another base model than this {kind}: of its weights, {difference}. {way}"
        )
