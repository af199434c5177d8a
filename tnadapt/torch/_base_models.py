"""Describe the pretrained base model in an adapter's file, and build it again: models of transformers and timm.

None of this knows an adapter's handle: it takes a model, an :class:`~tnadapt.AdapterFile` or a path.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tnadapt.checkpoints.checkpoint import gguf_files, need_gguf
from tnadapt.checkpoints.pretrained_model import TASKS, Pretrained, PretrainedTask
from tnadapt.errors import ConfigError, FileError, TnadaptError, safe_repr
from tnadapt.report import quiet, silent

from ._state import is_array

# -- Each library that builds pretrained models is a class with four methods -------------------------------------------

# ``describe`` returns the description of a model, or None if it is not of this library. ``build`` returns the model,
# and the names of parameters for which its base has no values; for a base that only a file names (not ``trusted``), no
# pickle is read. ``processor`` returns the object that prepares the model's inputs, from a folder or (None) from the
# base. ``set_labels`` names the model's outputs.


def imported(library: str, does: str = "builds the base model") -> Any:
    """Import a library of the extra ``hub``, or raise an error that says what to install."""
    try:
        return importlib.import_module(library)
    except ImportError:
        raise TnadaptError(f"{library} is not installed, which {does}: pip install 'tnadapt[hub]'") from None


@contextlib.contextmanager
def refusing(what: str, way: str) -> Iterator[None]:
    """Turn any error of a hub or loader into a one-line TnadaptError with the way out."""
    try:
        yield
    except TnadaptError:
        raise
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise TnadaptError(f"{what}: {(lines or [type(error).__name__])[0][:300]}; {way}") from error


# -- timm: described from pretrained_cfg, built by timm.create_model ---------------------------------------------------


_WEIGHTS = "model.safetensors"
_GIVE_TIMM_BASE = "give base= (--base) with timm's name of a model, or a model"


class TimmModels:
    """The pretrained models of timm."""

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
        return Pretrained(_name(config), "", "", "timm", "image-classification", labels, dtype, settings)

    def build(
        self, about: Pretrained, *, device: Any, dtype: Any, quantization_config: Any, token: Any, trusted: bool
    ) -> tuple[nn.Module, frozenset[str]]:
        """Build the model; its head has no numbers in the base unless the number of classes is the usual one."""
        if not about.name:
            raise FileError(f"it does not name its base model: {_GIVE_TIMM_BASE}")
        if quantization_config is not None:
            raise TnadaptError("quantization_config is for models of transformers, and the base is a model of timm")
        timm, settings = imported("timm"), dict(about.settings)
        if about.labels:
            settings["num_classes"] = len(about.labels)
        if "img_size" in settings:
            settings["img_size"] = tuple(settings["img_size"])
        if not trusted:
            settings |= _without_pickles(about.name)
        with (
            refusing(f"cannot load its base model {safe_repr(about.name)} through timm", _GIVE_TIMM_BASE),
            quiet("timm", "huggingface_hub", level=logging.ERROR),
            torch.random.fork_rng(devices=[]),
        ):
            model = timm.create_model(about.name, pretrained=True, **settings)
        config = model.pretrained_cfg
        heads: Any = () if model.num_classes == config.get("num_classes") else config.get("classifier") or "head"
        heads = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
        if dtype is not None:
            model = model.to(dtype)
        return model, frozenset(name for name, _ in model.named_parameters() if heads and name.startswith(heads))

    def processor(self, about: Pretrained, folder: str | None, token: str | bool | None) -> Any:
        """Return timm's transform of images for evaluation."""
        timm = imported("timm")
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


def _without_pickles(name: str) -> dict[str, Any]:
    """Return settings that make timm read only safetensors, or raise FileError for a folder without them."""
    source, _, place = name.partition(":")
    if source == "local-dir" and not Path(place, _WEIGHTS).is_file():
        raise FileError(f"its base model {safe_repr(name)} is no folder here with {_WEIGHTS}: {_GIVE_TIMM_BASE}")
    return {"pretrained_cfg_overlay": {"hf_hub_filename": _WEIGHTS}} if source == "hf-hub" else {}


def _pretrained_config(name: str) -> dict[str, Any]:
    """Return the ``pretrained_cfg`` of a model by name."""
    models = imported("timm").models
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


# -- transformers: described from the config, built by the classes of TASKS --------------------------------------------


# Where the hub's cache keeps a repository at a commit.
_CACHED = re.compile(r".*[/\\]models--(?P<name>[\w.-]+)[/\\]snapshots[/\\](?P<revision>[0-9a-f]{40})[/\\]?")
_GIVE_BASE = "give base= (--base) with a folder, a name or a model"


class TransformersModels:
    """The pretrained models of transformers."""

    def describe(self, model: nn.Module) -> Pretrained | None:
        """Return the base's name and revision, the task, the labels and the dtype."""
        modeling = sys.modules.get("transformers.modeling_utils")
        config = getattr(model, "config", None)
        if modeling is None or config is None or not isinstance(model, modeling.PreTrainedModel):
            return None
        name, revision, file = _origin(str(getattr(config, "_name_or_path", None) or ""), config)
        task = _task_of(model, config)
        settings = {}
        if task == "text-classification":
            values = {name: getattr(config, name, None) for name in ("problem_type", "pad_token_id")}
            # Some configs have -1 for no padding token.
            settings = {name: value for name, value in values.items() if value is not None and value != -1}
        labels = _labels(config) if task and TASKS[task].labelled else ()
        try:
            return Pretrained(name, revision, file, "transformers", task, labels, _dtype(model), settings)
        except ConfigError:
            # An unusual config must not keep an adapter from being saved: record the base alone, or nothing.
            with contextlib.suppress(ConfigError):
                return Pretrained(name, revision, "", "transformers")
            return None

    def build(
        self, about: Pretrained, *, device: Any, dtype: Any, quantization_config: Any, token: Any, trusted: bool
    ) -> tuple[nn.Module, frozenset[str]]:
        """Build the model with the head of its task and labels."""
        if not about.name:
            raise FileError(f"it does not name its base model: {_GIVE_BASE}")
        transformers, task = imported("transformers"), _task(about)
        settings: dict[str, Any] = dict(about.settings)
        if about.labels:
            settings |= {"id2label": about.id2label, "label2id": about.label2id, "ignore_mismatched_sizes": True}
        if about.file:
            need_gguf(about.file)
            settings["gguf_file"] = about.file
        elif not trusted:
            settings["use_safetensors"] = True
        if quantization_config is not None:
            settings["quantization_config"] = quantization_config
            if device is not None:
                settings["device_map"] = {"": device}
        with (
            refusing(f"cannot load its base model {_shown(about)} through transformers", _GIVE_BASE),
            silent(transformers, logging.ERROR),
            torch.random.fork_rng(devices=[]),
        ):
            if os.path.isabs(about.name) and not os.path.exists(about.name):  # not a name on a hub
                raise FileNotFoundError("there is no such folder here")
            model, loaded = getattr(transformers, task.model).from_pretrained(
                about.name, revision=about.revision or None, dtype=dtype or "auto",
                token=token, trust_remote_code=False, output_loading_info=True, **settings,
            )  # fmt: skip
        random = {*loaded["missing_keys"], *(key[0] for key in loaded["mismatched_keys"])}
        return model, frozenset(random & dict(model.named_parameters()).keys())

    def processor(self, about: Pretrained, folder: str | None, token: str | bool | None) -> Any:
        """Return the tokenizer, image processor, feature extractor or processor of the task."""
        transformers, task, settings = imported("transformers"), _task(about), dict[str, Any]()
        if folder is None:
            if not about.name:
                raise FileError("it has no tokenizer or processor of its own, and does not name its base model")
            folder, settings = about.name, {"revision": about.revision or None, "token": token}
            if about.file:
                need_gguf(about.file)
                settings["gguf_file"] = about.file
        with (
            refusing(f"cannot load the {task.processor} from {safe_repr(folder)}", "load it yourself"),
            silent(transformers, logging.ERROR),
        ):
            processor = getattr(transformers, task.processor).from_pretrained(
                folder, trust_remote_code=False, **settings
            )
        if task.processor == "AutoTokenizer" and not isinstance(processor, transformers.PreTrainedTokenizerBase):
            # Some classes, such as RAG's, hold tokenizers but are not tokenizers.
            raise FileError(
                f"the tokenizer in {safe_repr(folder)} is a {type(processor).__name__}, not one for texts: load "
                "it yourself"
            )
        # Without tokenizer files, transformers creates a tokenizer without a vocabulary, or with only a space.
        if task.processor == "AutoTokenizer" and len(processor.get_vocab()) <= len(set(processor.all_special_ids)) + 1:
            raise FileError(
                f"there is no tokenizer in {safe_repr(folder)}: save one with the adapter, or load it yourself"
            )
        return processor

    def set_labels(self, model: nn.Module, about: Pretrained) -> None:
        """Set ``id2label`` and ``label2id`` of the model's config."""
        if about.labels and hasattr(model, "config"):
            config: Any = model.config
            config.id2label, config.label2id = about.id2label, about.label2id


def _task(about: Pretrained) -> PretrainedTask:
    if not about.task:
        raise FileError(
            f"it does not say for which task its model is: {_GIVE_BASE.replace('a folder, a name or ', '')}"
        )
    return TASKS[about.task]


def _task_of(model: nn.Module, config: Any) -> str:
    """Return the first task whose class builds models of this class, or "" if none does."""
    transformers = sys.modules["transformers"]
    for name, task in TASKS.items():
        built = getattr(getattr(transformers, task.model, None), "_model_mapping", {}).get(type(config), ())
        # Sharding derives a class from the model's.
        if any(cls in type(model).__mro__ for cls in (built if isinstance(built, tuple) else (built,))):
            return name
    return ""


def _origin(name: str, config: Any) -> tuple[str, str, str]:
    """Return the name, revision and GGUF file of a model from the name under which it was loaded."""
    if (cached := _CACHED.fullmatch(name)) is not None:
        return cached["name"].replace("--", "/"), cached["revision"], _gguf(config)
    if name and Path(name).is_dir():
        folder = Path(name).absolute()
        files = gguf_files(folder)
        return str(folder), "", _gguf(config) or (files[0] if len(files) == 1 else "")
    return name, getattr(config, "_commit_hash", None) or "", _gguf(config)


def _gguf(config: Any) -> str:
    """Return the GGUF file that a model was loaded from, which transformers (as of 5.24) keeps in its config."""
    return str(getattr(getattr(config, "quantization_config", None), "gguf_file", None) or "")


def _labels(config: Any) -> list[str]:
    known = getattr(config, "id2label", None) or {}
    return [str(known[number]) for number in range(len(known))] if known.keys() == set(range(len(known))) else []


def _dtype(model: nn.Module) -> str:
    """Return the dtype of the base's first weights that have one."""
    dtypes = (
        parameter.dtype
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and not is_array(name)
    )
    dtype = str(next(dtypes, "")).removeprefix("torch.")
    return dtype if dtype in ("float64", "float32", "float16", "bfloat16") else ""


def _shown(about: Pretrained) -> str:
    return safe_repr(about.name) + (f" at revision {about.revision}" if about.revision else "")


# -- The libraries by name ---------------------------------------------------------------------------------------------


LIBRARIES: Mapping[str, TransformersModels | TimmModels] = {
    "transformers": TransformersModels(),
    "timm": TimmModels(),
}


def describe(model: nn.Module) -> Pretrained | None:
    """Return what a model says about its base, task and labels; None if it is of no known library."""
    descriptions = (library.describe(model) for library in LIBRARIES.values())
    return next((about for about in descriptions if about is not None), None)
