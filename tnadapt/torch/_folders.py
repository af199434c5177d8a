"""Folders of an adapter: its file, its card, and the files of its tokenizer or processor; uploads of them."""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tnadapt.checkpoints import adapter_format
from tnadapt.checkpoints.container import path_of
from tnadapt.checkpoints.pretrained_model import Pretrained, is_local
from tnadapt.errors import ConfigError, FileError

from ._adapter_saving import is_writer, to_file
from ._bundle.hub import FILE_NAME, upload
from ._bundle.model_card import model_card, write_card
from ._state import AdapterState, need_attached

__all__ = ["for_others", "push", "save"]


def save(
    adapter: AdapterState,
    folder: str | os.PathLike[str],
    about: Pretrained | None,
    processors: Sequence[Any],
    metrics: Mapping[str, float] | None,
    store_bases: bool,
    overwrite_card: bool,
    where: str | None = None,
) -> None:
    """Write a folder; see :meth:`Adapter.save_pretrained`. The card loads the adapter from ``where``."""
    need_attached(adapter)
    numbers = {name: float(value) for name, value in (metrics or {}).items()}
    for one in processors:
        if one is not None and not callable(getattr(one, "save_pretrained", None)):
            raise ConfigError(
                f"tokenizer and processor must have save_pretrained, as those of transformers; got {type(one).__name__}"
            )
    file = dataclasses.replace(to_file(adapter, store_bases), pretrained=about)
    if not is_writer():
        return
    path = Path(path_of(folder))
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{os.fspath(folder)}: cannot create this folder: {error}") from None
    for one in processors:
        if one is not None:
            one.save_pretrained(path)
    write_card(path, model_card(file, where or path.absolute().name, numbers), overwrite_card)
    # Last: a folder with this file is complete.
    adapter_format.save(path / FILE_NAME, file)


def push(
    adapter: AdapterState,
    name: str,
    about: Pretrained | None,
    processors: Sequence[Any],
    metrics: Mapping[str, float] | None,
    store_bases: bool,
    overwrite_card: bool,
    options: Mapping[str, Any],
) -> str:
    """Upload a folder; see :meth:`Adapter.push_to_hub`."""
    with tempfile.TemporaryDirectory() as folder:
        save(adapter, folder, for_others(about), processors, metrics, store_bases, True, name)
        return upload(Path(folder), name, overwrite_card=overwrite_card, **options)


def for_others(about: Pretrained | None) -> Pretrained | None:
    """Return what an uploaded file says about its base: no local paths, which nobody else has."""
    if about is None:
        return None
    # The paths may tell a user's name, too.
    vocabulary = about.inputs.get("tokenizer")
    if isinstance(vocabulary, str) and is_local(vocabulary):
        # Without any name, predictions would silently use the base's own tokenizer.
        about = dataclasses.replace(about, inputs={**about.inputs, "tokenizer": "./tokenizer"})
    return dataclasses.replace(about, name="", revision="", file="") if about.local else about
