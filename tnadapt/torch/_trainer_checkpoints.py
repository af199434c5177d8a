"""Checkpoints of transformers' Trainer that hold adapters instead of the whole model, and the model cards it writes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tnadapt.checkpoints import adapter_format
from tnadapt.errors import FileError, TargetError

from ._adapter_saving import FILE_NAME, README, for_others, is_writer, marked, model_card, save_folder, swap, unmarked
from ._registry import attached
from ._state import AdapterState, encoded

# -- The adapter's card, with the Trainer's text about the training ----------------------------------------------------


# transformers and TRL give this tag to the cards that they write.
_TAG = "generated_from_trainer"
# TRL's example loads a whole model, which is not saved.
_NO_SECTION = ("Quick start",)
# "This model is a fine-tuned version of …", or "… was trained from scratch": the adapter's card says what it is.
_CLAIM = re.compile(r"^This model (is a fine-tuned version of|was trained from scratch)\b.*\n?", re.MULTILINE)


def complete_trainer_card(folder: Path, where: str) -> None:
    """Put the card of a folder's adapter before the text of its README.md, if a Trainer wrote that.

    A Trainer's card says how to load a whole model. The front matter is that of both.

    Parameters
    ----------
    folder : Path
        Nothing happens unless it has an adapter's file and a Trainer's card.
    where : str
        The name of the folder or repository, from which the card loads the adapter.
    """
    card, file = folder / README, folder / FILE_NAME
    if not card.is_file() or not file.is_file():
        return
    theirs = card.read_text(encoding="utf-8")
    if unmarked(theirs) is not None or _TAG not in _tags(_parts(theirs)[0]):
        return
    ours = unmarked(model_card(adapter_format.load_single(file), where, {}))
    assert ours is not None
    card.write_text(marked(_combined(ours, theirs)), encoding="utf-8", newline="\n")


def _combined(ours: str, theirs: str) -> str:
    from huggingface_hub.utils import yaml_dump

    (about, ours), (more, theirs) = _parts(ours), _parts(theirs)
    tags = list(dict.fromkeys([*_tags(about), *_tags(more)]))
    front = yaml_dump({**more, **about, "tags": tags}, sort_keys=False)
    return f"---\n{front}---\n{ours.rstrip()}\n\n{_training(theirs)}"


def _training(body: str) -> str:
    """Return a Trainer's text without its title, its claims about the model, and examples of loading it."""
    intro, *sections = re.split(r"^## ", body, flags=re.MULTILINE)
    intro = re.sub(r"<!--.*?-->", "", intro, flags=re.DOTALL)
    intro = _CLAIM.sub("", re.sub(r"^# .*\n?", "", intro, flags=re.MULTILINE)).strip()
    kept = [f"## {section.strip()}\n" for section in sections if not section.startswith(_NO_SECTION)]
    return "\n".join([f"## Training\n\n{intro}\n"] * bool(intro) + kept)


def _parts(card: str) -> tuple[dict[str, Any], str]:
    """Return a card's front matter and its text."""
    from huggingface_hub import ModelCard

    parsed = ModelCard(card, ignore_metadata_errors=True)
    return parsed.data.to_dict(), parsed.text


def _tags(front: dict[str, Any]) -> list[str]:
    tags = front.get("tags") or []
    return [tags] if isinstance(tags, str) else list(tags)


# -- The checkpoints ---------------------------------------------------------------------------------------------------


# The Trainer's file of its own arguments in a checkpoint.
_ARGUMENTS = "training_args.bin"
# Its methods that write and read the model of a checkpoint.
_METHODS = (
    "train", "_save", "_load_from_checkpoint", "_load_best_model", "_push_from_checkpoint", "create_model_card",
)  # fmt: skip


def adapter_checkpoints(trainer: Any) -> None:
    """Make the checkpoints of a Trainer hold the adapters alone, instead of the whole model.

    A checkpoint then has ``adapter.safetensors`` and a model card, which :func:`tnadapt.torch.load` and
    :func:`tnadapt.torch.load_pretrained` read, next to the optimizer, the schedule and the random states as usual.
    ``train(resume_from_checkpoint=…)``, ``load_best_model_at_end`` and ``save_model`` work as before; checkpoints of
    whole models can still be resumed. With several adapters on the model, each has a folder of its name.
    ``push_to_hub`` uploads the adapter, with a card that says how to load it, followed by the Trainer's own text.

    Parameters
    ----------
    trainer : transformers.Trainer
        Or a subclass, such as TRL's. Its model has an adapter. The methods of this instance are replaced; call it
        before ``train()``.

    Raises
    ------
    TargetError
        If it is not such a trainer, its model has no adapter or is a PEFT model (which saves its adapters alone
        already), or the trainer shards the model by FSDP or DeepSpeed, which write checkpoints of their own, or it
        saves on each node.

    Notes
    -----
    Parameters that ``keep_trainable`` left free are in the file; nothing else of the model is. On resuming, the model
    has to be the one that was trained, with the same adapters attached: the file checks its config, targets and base.

    Examples
    --------
    >>> import os, tempfile, torch, transformers, tnadapt.torch
    >>> config = transformers.BertConfig(
    ...     vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    >>> bert = transformers.BertForSequenceClassification(config)
    >>> adapter = tnadapt.torch.attach(bert, keep_trainable="classifier")
    >>> data = [{"input_ids": torch.tensor([2, 3, 5]), "labels": 1}] * 4
    >>> folder = tempfile.TemporaryDirectory()
    >>> arguments = transformers.TrainingArguments(
    ...     folder.name, max_steps=2, save_steps=1, use_cpu=True, report_to=[], disable_tqdm=True,
    ...     dataloader_pin_memory=False)
    >>> trainer = transformers.Trainer(bert, arguments, train_dataset=data)
    >>> tnadapt.torch.adapter_checkpoints(trainer)
    >>> trainer.train().global_step
    {'train_runtime': ...}
    2
    >>> [name for name in os.listdir(folder.name + "/checkpoint-2") if name.endswith("safetensors")]
    ['adapter.safetensors']
    >>> folder.cleanup()
    """
    missing = [name for name in (*_METHODS, "model", "args") if not hasattr(trainer, name)]
    if missing:
        raise TargetError(
            f"adapter_checkpoints takes a transformers Trainer; {type(trainer).__name__} has no {missing[0]!r}: in a "
            "training loop of your own, call adapter.save(path)"
        )
    for sharded, library in (("is_fsdp_enabled", "FSDP"), ("is_deepspeed_enabled", "DeepSpeed")):
        if getattr(trainer, sharded, False):
            raise TargetError(
                f"this trainer shards the model by {library}, which writes checkpoints of its own: leave "
                "adapter_checkpoints out, and call adapter.save(path) in every process when it has trained"
            )
    if getattr(trainer.args, "save_on_each_node", False):
        raise TargetError("adapters are written by process 0 alone: leave save_on_each_node=True out of the arguments")
    checkpoints = _AdapterCheckpoints(trainer)
    if not checkpoints.adapters():
        raise TargetError(f"{type(trainer.model).__name__} has no adapter: call attach() before adapter_checkpoints()")
    managed = any(state.managed_by is not None for state in checkpoints.adapters().values())
    if managed or hasattr(trainer.model, "peft_config"):
        raise TargetError(
            "this trainer's model is a PEFT model, whose checkpoints hold PEFT's adapters alone, and one that was "
            "attached besides is frozen there: leave adapter_checkpoints out, and give a TnadaptConfig as peft_config "
            "in place of attach()"
        )
    for name in _METHODS:
        setattr(trainer, name, getattr(checkpoints, name))


class _AdapterCheckpoints:
    """Replaces those methods of one Trainer, under their names."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        methods = [getattr(trainer, name) for name in _METHODS]
        # Called a second time, it still falls back to the trainer's own methods.
        originals = [getattr(getattr(method, "__self__", None), "otherwise", {}) for method in methods]
        self.otherwise: dict[str, Callable[..., Any]] = {
            name: before.get(name, method) for name, before, method in zip(_METHODS, originals, methods, strict=True)
        }

    def adapters(self) -> dict[str, AdapterState]:
        return attached(self.trainer.model)

    def files(self, folder: str | Path) -> dict[str, Path]:
        """Return the file of each adapter in a checkpoint."""
        names, root = list(self.adapters()), Path(folder)
        if len(names) == 1:
            return {names[0]: root / FILE_NAME}
        # A separator in the name would give several folders.
        folders = {name: encoded(name).replace("/", "%2F").replace("\\", "%5C") for name in names}
        return {name: root / folder / FILE_NAME for name, folder in folders.items()}

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, unless the loss would not depend on any adapter.

        Gradient checkpointing lets gradients through the inputs, so that such a run would not fail.
        """
        states = list(self.adapters().values())
        merged = next((state.name for state in states if state.merged is not None), None)
        if merged is not None:
            raise TargetError(f"adapter {merged!r} is merged, and would not be trained: call unmerge() before train()")
        if states and not any(state.weight and state.enabled for state in states):
            names = ", ".join(repr(state.name) for state in states)
            raise TargetError(f"no adapter is active, so none would be trained: call activate() of one of {names}")
        return self.otherwise["train"](*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the adapters, and next to them what the Trainer writes next to a model."""
        trainer, states = self.trainer, self.adapters()
        if not states:  # baked or detached since: the model is an ordinary one
            self.otherwise["_save"](output_dir, state_dict)
            return
        folder = Path(trainer.args.output_dir if output_dir is None else output_dir)
        if not trainer.args.should_save:
            return
        folder.mkdir(parents=True, exist_ok=True)
        about_of = for_others if self.uploads else lambda about: about
        for name, file in self.files(folder).items():
            about = about_of(states[name].handle.pretrained)
            save_folder(states[name], file.parent, about, (), None, False, False, self.where(file.parent))
        self.complete_card(folder)
        processing = trainer.processing_class
        processing = getattr(trainer.data_collator, "tokenizer", None) if processing is None else processing
        if processing is not None:
            processing.save_pretrained(folder)
        torch.save(trainer.args, folder / _ARGUMENTS)

    @property
    def uploads(self) -> bool:
        """Whether the files go to the hub."""
        return getattr(self.trainer, "hub_model_id", None) is not None

    def where(self, folder: Path) -> str:
        """Return the name from which a card loads the adapter: the repository, or else the folder."""
        is_root = folder.absolute() == Path(self.trainer.args.output_dir).absolute()
        return self.trainer.hub_model_id if self.uploads and is_root else folder.absolute().name

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload the output folder during training, with the adapters of a checkpoint in it."""
        root, target = Path(checkpoint_folder), Path(self.trainer.args.output_dir)
        if self.adapters() and is_writer():
            for file in filter(Path.is_file, self.files(root).values()):
                copy = target / file.relative_to(root)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, copy)
            self.complete_card(target)
        self.otherwise["_push_from_checkpoint"](checkpoint_folder)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the Trainer's card, and the adapter's before it if the folder has one."""
        self.otherwise["create_model_card"](*args, **kwargs)
        self.complete_card(Path(self.trainer.args.output_dir))

    def complete_card(self, folder: Path) -> None:
        if self.adapters() and is_writer():
            complete_trainer_card(folder, self.where(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Read the adapters of a checkpoint, or a whole model."""
        if not self._read(resume_from_checkpoint):
            self.otherwise["_load_from_checkpoint"](resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """Read the adapters of the best checkpoint, or its whole model."""
        if not self._read(self.trainer.state.best_model_checkpoint):
            self.otherwise["_load_best_model"]()

    def _read(self, folder: str) -> bool:
        """Load the adapters from a checkpoint, and return False if it has none."""
        files, states = self.files(folder), self.adapters()
        missing = [name for name, file in files.items() if not file.is_file()]
        if len(missing) == len(files) and next(Path(folder).glob(f"**/{FILE_NAME}"), None) is None:
            return False
        if missing:
            raise FileError(
                f"{folder}: it has no file of adapter {missing[0]!r}: attach the adapters that were trained, under the "
                "same names"
            )
        for name, file in files.items():
            swap(states[name], file)
        return True
