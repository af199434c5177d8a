"""Models of timm: described from their ``pretrained_cfg``, built by ``timm.create_model``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tnadapt.checkpoints.pretrained_model import Pretrained
from tnadapt.errors import FileError, TnadaptError, safe_repr

from .model_library import BuildOptions, ModelLibrary, missing, quiet_loggers, refusing

__all__ = ["TimmModels"]

_WEIGHTS = "model.safetensors"
_WAY = "give base= (--base) with timm's name of a model, or a model"


class TimmModels(ModelLibrary):
    """The pretrained models of timm."""

    name = "timm"

    def describe(self, model: nn.Module) -> Pretrained | None:
        """Return timm's name, the number or names of classes, and the size of images if it is not the usual one."""
        config = getattr(model, "pretrained_cfg", None)
        if "timm" not in sys.modules or not isinstance(config, dict) or not config.get("architecture"):
            return None
        classes, settings = getattr(model, "num_classes", 0), dict[str, Any]()
        labels = config.get("label_names") or ()
        labels = tuple(labels) if len(labels) == classes else ()
        if not labels:
            settings["num_classes"] = classes
        channels, *usual = config.get("input_size") or (3, 0, 0)
        size = getattr(getattr(model, "patch_embed", None), "img_size", None)
        if size is not None and list(size) != usual:
            settings["img_size"] = list(size)
        if (taken := getattr(model, "in_chans", channels)) != channels:
            settings["in_chans"] = taken
        dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
        return Pretrained(_name(config), "", "", self.name, "image-classification", labels, dtype, settings)

    def build(self, about: Pretrained, options: BuildOptions) -> tuple[nn.Module, frozenset[str]]:
        """Build the model; its head has no numbers in the base unless the number of classes is the usual one."""
        if not about.name:
            raise FileError(f"it does not name its base model: {_WAY}")
        if options.quantization_config is not None:
            raise TnadaptError("quantization_config is for models of transformers, and the base is a model of timm")
        timm, settings = _imported(), dict(about.settings)
        if about.labels:
            settings["num_classes"] = len(about.labels)
        if "img_size" in settings:
            settings["img_size"] = tuple(settings["img_size"])
        if not options.trusted:
            settings |= _without_pickles(about.name)
        with (
            refusing(f"cannot load its base model {safe_repr(about.name)} through timm", _WAY),
            quiet_loggers("timm", "huggingface_hub"),
            torch.random.fork_rng(devices=[]),
        ):
            model = timm.create_model(about.name, pretrained=True, **settings)
        config = model.pretrained_cfg
        heads: Any = () if model.num_classes == config.get("num_classes") else config.get("classifier") or "head"
        heads = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
        if (dtype := options.dtype_for(about)) is not None:
            model = model.to(dtype)
        return model, frozenset(name for name, _ in model.named_parameters() if heads and name.startswith(heads))

    def processor(self, about: Pretrained, folder: str | None, token: str | bool | None) -> Any:
        """Return timm's transform of images for evaluation."""
        timm = _imported()
        with refusing(f"cannot tell the images of {safe_repr(about.name)}", "use timm.data.create_transform"):
            config = _pretrained_config(about.name)
            if "img_size" in about.settings:
                sides = about.settings["img_size"]
                config |= {"input_size": (config["input_size"][0], *sides), "fixed_input_size": False}
            return timm.data.create_transform(**timm.data.resolve_data_config({}, pretrained_cfg=config))

    def set_labels(self, model: nn.Module, about: Pretrained) -> None:
        """Set ``label_names`` of the model's ``pretrained_cfg``, where timm keeps them."""
        config = getattr(model, "pretrained_cfg", None)
        if about.labels and isinstance(config, dict):
            config["label_names"] = list(about.labels)


def _imported() -> Any:
    try:
        import timm
    except ImportError:
        raise missing("timm") from None
    return timm


def _without_pickles(name: str) -> dict[str, Any]:
    """Return settings with which timm reads safetensors alone from a repository or folder; refuse a folder without."""
    source, _, place = name.partition(":")
    if source == "local-dir" and not Path(place, _WEIGHTS).is_file():
        raise FileError(f"its base model {safe_repr(name)} is no folder here with {_WEIGHTS}: {_WAY}")
    return {"pretrained_cfg_overlay": {"hf_hub_filename": _WEIGHTS}} if source == "hf-hub" else {}


def _pretrained_config(name: str) -> dict[str, Any]:
    """Return the ``pretrained_cfg`` of a model by name."""
    models = _imported().models
    if ":" not in name:
        return dict(models.get_pretrained_cfg(name, allow_unregistered=False).to_dict())
    return dict(models.create_model(name, pretrained=False).pretrained_cfg)  # a folder or repository has it


def _name(config: dict[str, Any]) -> str:
    """Return the name by which ``timm.create_model`` builds the model."""
    if config.get("source") == "local-dir":
        return f"local-dir:{Path(config['file']).absolute()}"
    if config.get("source") == "hf-hub":
        return f"hf-hub:{config['hf_hub_id']}"
    return ".".join(filter(None, (config["architecture"], config.get("tag"))))
