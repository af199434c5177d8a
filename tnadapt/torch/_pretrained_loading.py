"""Models that are ready to predict, from an adapter's file alone: the base is built as the file says."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tnadapt.argument_checks import checks_arguments
from tnadapt.checkpoints import adapter_format
from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.checkpoints.gguf_place import gguf_place
from tnadapt.checkpoints.pretrained_model import Pretrained
from tnadapt.errors import ConfigError, FileError, safe_repr, summarize

from ._adapter_loading import attach_file
from ._adapter_saving import FileErrorContext
from ._bundle.hub import FILE_NAME, PROCESSOR_FILES, adapter_path, is_repository, processor_folder
from ._bundle.libraries import LIBRARIES
from ._bundle.model_library import BuildOptions

__all__ = ["load_pretrained", "load_processor"]


@checks_arguments
def load_pretrained(
    where: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | nn.Module | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    quantization_config: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
    name: str = "default",
    check_base: bool = True,
    merge: bool = False,
    untie: bool = False,
    detach_norm: bool = False,
) -> nn.Module:
    """Build the base model that an adapter's file records, attach the adapter, and return the model in eval mode.

    Parameters
    ----------
    where : path-like or str
        A folder that :meth:`Adapter.save_pretrained` wrote, a file that :meth:`Adapter.save` wrote, or the name of a
        repository on the hub.
    base : path-like, str or Module, optional
        The base to use instead of the recorded one: a folder, a GGUF file, a name on the hub, or a model, which is
        changed in place.
    device : str or torch.device, optional
        Where to put the model; the CPU if None.
    dtype : torch.dtype, optional
        The dtype of the base; that of the model when the adapter was saved if None.
    quantization_config : object, optional
        Loads the base quantized, as in ``from_pretrained`` of transformers.
    revision, token
        Of the adapter's repository on the hub. The revision of the base is in the file.
    name, check_base, untie, detach_norm
        As in :func:`load`.
    merge : bool
        Whether to merge ΔW into the weights (:meth:`Adapter.merge`), so that the model runs as fast as its base.

    Returns
    -------
    Module
        A model of transformers, whose ``config.id2label`` has the labels, or of timm, whose
        ``pretrained_cfg["label_names"]`` has. ``adapters(model)`` has the adapter's handle, whose ``pretrained`` has
        all that the file records; :func:`load_processor` returns the tokenizer or processor.

    Raises
    ------
    FileError
        If the file is damaged or does not say what its base is, the base is not the one that it was trained on, or some
        parameters are neither in the base nor in the file.
    TnadaptError
        If the base cannot be loaded, or a library is missing: the extra ``hub`` has them.

    Notes
    -----
    A file may come from someone else. It can name a base, of which only safetensors and GGUF files are read; no code
    from a repository is run. With ``base`` you decide what is loaded.

    Examples
    --------
    >>> import tempfile, torch, transformers, tnadapt.torch
    >>> config = transformers.BertConfig(
    ...     vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    >>> folder = tempfile.TemporaryDirectory()
    >>> transformers.BertModel(config).save_pretrained(folder.name + "/base")
    >>> model = transformers.BertForSequenceClassification.from_pretrained(
    ...     folder.name + "/base", id2label={0: "bad", 1: "good"})
    >>> adapter = tnadapt.torch.attach(model, "superlora", keep_trainable="classifier", rank=2)
    >>> adapter.save(folder.name + "/mine.safetensors")
    >>> loaded = tnadapt.torch.load_pretrained(folder.name + "/mine.safetensors")
    >>> type(loaded).__name__, loaded.config.id2label
    ('BertForSequenceClassification', {0: 'bad', 1: 'good'})
    >>> folder.cleanup()
    """
    if device is not None:
        _check_usable(device)
    path = adapter_path(where, revision, token)
    file = adapter_format.load(path)
    with FileErrorContext(path):
        about = _about(file, base)
        if isinstance(base, nn.Module):
            model = base
        else:
            options = BuildOptions(device, dtype, quantization_config, token, trusted=base is not None)
            model, random = LIBRARIES[about.library].build(about, options)
            _check_known(file, about, type(model).__name__, random)
    if device is not None and quantization_config is None:
        model = model.to(device)
    adapter = attach_file(model, file, path, name, check_base, untie=untie, detach_norm=detach_norm)
    try:
        LIBRARIES[about.library].set_labels(model, about)
        if merge:
            adapter.merge()
    except BaseException:  # a model of the caller's keeps no part of it
        adapter.detach()
        raise
    return model.eval()


@checks_arguments
def load_processor(
    where: str | os.PathLike[str], *, revision: str | None = None, token: str | bool | None = None
) -> Any:
    """Return what prepares a model's inputs: the tokenizer or processor saved with an adapter, or else its base's.

    Parameters
    ----------
    where, revision, token
        As in :func:`load_pretrained`.

    Returns
    -------
    object
        The tokenizer, image processor, feature extractor or processor of transformers, by the task; timm's transform
        of images for evaluation for a model of timm.

    Raises
    ------
    FileError
        If the file is damaged, or does not say for which task its model is.
    TnadaptError
        If it cannot be loaded, or a library is missing.

    Examples
    --------
    >>> import tempfile, transformers, tnadapt.torch
    >>> words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "bad", "good"]
    >>> config = transformers.BertConfig(
    ...     vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    >>> adapter = tnadapt.torch.attach(transformers.BertForSequenceClassification(config), "superlora", rank=2)
    >>> tokenizer = transformers.BertTokenizerFast({word: number for number, word in enumerate(words)})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     adapter.save_pretrained(folder, tokenizer=tokenizer)
    ...     load_processor(folder)("good bad")["input_ids"]
    [2, 6, 5, 3]
    """
    path = adapter_path(where, revision, token)
    about = adapter_format.load(path, check_draws=False).pretrained
    with FileErrorContext(path):
        if about is None:
            raise FileError("it does not say what its base model is: load its tokenizer or processor yourself")
        own = _own_folder(where, path, revision, token)
        if own is None:
            _refuse_remote(about)
        return LIBRARIES[about.library].processor(about, own, token)


def _refuse_remote(about: Pretrained) -> None:
    """Raise a FileError if a file's base is an address or network share."""
    if about.remote:
        raise FileError(
            f"it names as its base {safe_repr(about.name)}, an address or network share, which is not opened because a "
            "file says so: give base= (--base) with it, or load the tokenizer or processor yourself"
        )


def _check_usable(device: str | torch.device) -> None:
    """Raise a ConfigError unless tensors can be created on a device."""
    try:
        torch.zeros(0, device=device)
    except Exception as error:  # an AssertionError if torch was built without CUDA
        reason = (str(error).splitlines() or [""])[0][:200]
        raise ConfigError(
            f"device must be one that torch can use here, such as 'cpu'; got {safe_repr(device)}: {reason}"
        ) from error


def _about(file: AdapterFile, base: str | os.PathLike[str] | nn.Module | None) -> Pretrained:
    """Return what to build: what the file says, with the caller's base."""
    if isinstance(base, nn.Module):
        return file.pretrained or Pretrained()
    if file.pretrained is None:
        raise FileError(
            f"it does not say what its base model is, only its class {safe_repr(file.model)}: give base= (--base) with "
            "the model"
        )
    if base is None:
        _refuse_remote(file.pretrained)
        return file.pretrained
    about, name = file.pretrained, os.fspath(base)
    same = name == about.name
    if same or (about.file and os.path.isfile(os.path.join(name, about.file))):
        return dataclasses.replace(about, name=name, revision=about.revision if same else "")
    folder, gguf = gguf_place(name)
    return dataclasses.replace(about, name=folder, revision="", file=gguf)


def _check_known(file: AdapterFile, about: Pretrained, built: str, random: frozenset[str]) -> None:
    """Raise FileError if a parameter is neither in the base nor in the file."""
    unknown = random - file.kept.keys()
    if unknown and file.model and built != file.model:
        raise FileError(
            f"its base model {safe_repr(about.name)} is a {built}, and the adapter was trained on a "
            f"{safe_repr(file.model)}: give base= (--base) with the model it was trained on"
        )
    if unknown:
        raise FileError(
            f"its base model {safe_repr(about.name)} has no values for {summarize(unknown)}, and neither does the "
            "file, so that the model's outputs would be random: attach with keep_trainable for these parameters, "
            "train and save again; or give base= (--base) with a model that has them"
        )


def _own_folder(
    where: str | os.PathLike[str], path: Path, revision: str | None, token: str | bool | None
) -> str | None:
    """Return the folder with the files of the adapter's own tokenizer or processor; None if there are none."""
    if is_repository(where):
        folder = processor_folder(str(where), revision, token)
    elif path.name == FILE_NAME:
        folder = path.parent
    else:
        return None
    return str(folder) if any((folder / name).is_file() for name in PROCESSOR_FILES) else None
