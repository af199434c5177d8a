"""Models of transformers: described from their config, built by the classes of ``TASKS``."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tnadapt.checkpoints.gguf_place import gguf_files, hidden_bar, need_gguf
from tnadapt.checkpoints.pretrained_model import TASKS, Pretrained, PretrainedTask
from tnadapt.errors import ConfigError, FileError, safe_repr

from .._state import is_array
from .model_library import BuildOptions, ModelLibrary, missing, quiet_loggers, refusing

__all__ = ["TransformersModels"]

# Where the hub's cache keeps a repository at a commit.
_CACHED = re.compile(r".*[/\\]models--(?P<name>[\w.-]+)[/\\]snapshots[/\\](?P<revision>[0-9a-f]{40})[/\\]?")
_WAY = "give base= (--base) with a folder, a name or a model"


class TransformersModels(ModelLibrary):
    """The pretrained models of transformers."""

    name = "transformers"

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
            found = {name: getattr(config, name, None) for name in ("problem_type", "pad_token_id")}
            # Some configs have -1 for no padding token.
            settings = {name: value for name, value in found.items() if value is not None and value != -1}
        labels = _labels(config) if task and TASKS[task].labelled else ()
        try:
            return Pretrained(name, revision, file, self.name, task, labels, _dtype(model), settings)
        except ConfigError:
            # An unusual config must not keep an adapter from being saved: record the base alone, or nothing.
            with contextlib.suppress(ConfigError):
                return Pretrained(name, revision, "", self.name)
            return None

    def build(self, about: Pretrained, options: BuildOptions) -> tuple[nn.Module, frozenset[str]]:
        """Build the model with the head of its task and labels."""
        if not about.name:
            raise FileError(f"it does not name its base model: {_WAY}")
        transformers, task = _imported(), _task(about)
        settings: dict[str, Any] = dict(about.settings)
        if about.labels:
            settings |= {"id2label": about.id2label, "label2id": about.label2id, "ignore_mismatched_sizes": True}
        if about.file:
            need_gguf(about.file)
            settings["gguf_file"] = about.file
        elif not options.trusted:
            settings["use_safetensors"] = True
        if options.quantization_config is not None:
            settings["quantization_config"] = options.quantization_config
            if options.device is not None:
                settings["device_map"] = {"": options.device}
        with (
            refusing(f"cannot load its base model {_shown(about)} through transformers", _WAY),
            _silent(transformers),
            hidden_bar(about.file),
            torch.random.fork_rng(devices=[]),
        ):
            if os.path.isabs(about.name) and not os.path.exists(about.name):  # not a name on a hub
                raise FileNotFoundError("there is no such folder here")
            model, loaded = getattr(transformers, task.model).from_pretrained(
                about.name, revision=about.revision or None, dtype=options.dtype_for(about) or "auto",
                token=options.token, trust_remote_code=False, output_loading_info=True, **settings,
            )  # fmt: skip
        random = {*loaded["missing_keys"], *(key[0] for key in loaded["mismatched_keys"])}
        return model, frozenset(random & dict(model.named_parameters()).keys())

    def processor(self, about: Pretrained, folder: str | None, token: str | bool | None) -> Any:
        """Return the tokenizer, image processor, feature extractor or processor of the task."""
        transformers, task, settings = _imported(), _task(about), dict[str, Any]()
        if folder is None:
            if not about.name:
                raise FileError("it has no tokenizer or processor of its own, and does not name its base model")
            folder, settings = about.name, {"revision": about.revision or None, "token": token}
            if about.file:
                need_gguf(about.file)
                settings["gguf_file"] = about.file
        with (
            refusing(f"cannot load the {task.processor} from {safe_repr(folder)}", "load it yourself"),
            _silent(transformers),
        ):
            found = getattr(transformers, task.processor).from_pretrained(folder, trust_remote_code=False, **settings)
        if task.processor == "AutoTokenizer" and not isinstance(found, transformers.PreTrainedTokenizerBase):
            # Some classes, such as RAG's, hold tokenizers and are none.
            raise FileError(
                f"the tokenizer in {safe_repr(folder)} is a {type(found).__name__}, not one for texts: load it yourself"
            )
        # Where there are no files of a tokenizer, transformers makes one without words, or with a space alone.
        if task.processor == "AutoTokenizer" and len(found.get_vocab()) <= len(set(found.all_special_ids)) + 1:
            raise FileError(
                f"there is no tokenizer in {safe_repr(folder)}: save one with the adapter, or load it yourself"
            )
        return found

    def set_labels(self, model: nn.Module, about: Pretrained) -> None:
        """Set ``id2label`` and ``label2id`` of the model's config."""
        if about.labels and hasattr(model, "config"):
            config: Any = model.config
            config.id2label, config.label2id = about.id2label, about.label2id


def _imported() -> Any:
    try:
        import transformers
    except ImportError:
        raise missing("transformers") from None
    return transformers


def _task(about: Pretrained) -> PretrainedTask:
    if not about.task:
        raise FileError(f"it does not say for which task its model is: {_WAY.replace('a folder, a name or ', '')}")
    return TASKS[about.task]


def _task_of(model: nn.Module, config: Any) -> str:
    """Return the first task whose class builds models of this class; "" if none does."""
    transformers = sys.modules["transformers"]
    for name, task in TASKS.items():
        built = getattr(getattr(transformers, task.model, None), "_model_mapping", {}).get(type(config), ())
        # Sharding derives a class from the model's.
        if any(one in type(model).__mro__ for one in (built if isinstance(built, tuple) else (built,))):
            return name
    return ""


def _origin(name: str, config: Any) -> tuple[str, str, str]:
    """Return the name, revision and GGUF file of a model by the name it was loaded by."""
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
    kinds = (one.dtype for name, one in model.named_parameters() if one.is_floating_point() and not is_array(name))
    found = str(next(kinds, "")).removeprefix("torch.")
    return found if found in ("float64", "float32", "float16", "bfloat16") else ""


def _shown(about: Pretrained) -> str:
    return safe_repr(about.name) + (f" at revision {about.revision}" if about.revision else "")


@contextlib.contextmanager
def _silent(transformers: Any) -> Iterator[None]:
    """Silence transformers' messages and progress bars inside ``with``."""
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        with quiet_loggers("transformers", "huggingface_hub"):
            yield
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
