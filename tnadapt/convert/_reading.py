"""Whose adapter a path leads to, and the adapter."""

from __future__ import annotations

import os
from typing import Any

from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.checkpoints.adapter_format import ENTRY, load
from tnadapt.checkpoints.container import about, opened, path_of
from tnadapt.errors import FileError

from ._base_model import Base, as_base
from ._lycoris_reading import looks_like_lycoris, read_lycoris
from ._peft_reading import CONFIG, WEIGHTS, read_peft
from ._peft_settings import PREFIX
from ._source import Source

__all__ = ["read"]

# What tnadapt.torch's save_pretrained calls the file in its folder.
_OWN = "adapter.safetensors"


def read(source: Any, base: Any = None, part: str | None = None) -> Source:
    """The adapter at a path, whoever wrote it.

    Parameters
    ----------
    source : str, PathLike or AdapterFile
        A tnadapt file; a folder of PEFT, or the weights in it; a file of LyCORIS or kohya.
    base : optional
        As :func:`tnadapt.convert._base_model.as_base` takes it.
    part : str, optional
        The prefix to read, where a file of kohya has several.

    Raises
    ------
    FileError
        That begins with the path: there is no such file, it is damaged, or holds what cannot be converted.
    """
    known = None
    if base is not None:
        with about("base"):
            known = as_base(base)
    if isinstance(source, AdapterFile):
        return _own(source, known)
    path = path_of(source)
    with about(path):
        if os.path.isdir(path):
            if os.path.exists(os.path.join(path, CONFIG)):
                _check_weights(path)
                return read_peft(path, known)
            path = _in_folder(path)
        elif path.endswith((".bin", ".pt", ".pth", ".ckpt")) and os.path.exists(path):
            raise _pickle()
        with opened(path) as container:
            if ENTRY not in container.metadata:
                if looks_like_lycoris(container):
                    return read_lycoris(container, known, part)
                beside = os.path.join(os.path.dirname(path), CONFIG)
                if os.path.basename(path) == WEIGHTS and os.path.exists(beside):
                    return read_peft(os.path.dirname(path) or ".", known)
                if any(name.startswith(PREFIX) for name in container.entries):
                    raise FileError(
                        f"has weights of a PEFT adapter, which are no use without {CONFIG}: give the folder that "
                        f"has it and {WEIGHTS}"
                    )
    file = load(path)
    with about(path):
        return _own(file, known)


def _own(file: AdapterFile, base: Base | None) -> Source:
    if base is not None:
        base.check_targets(file.targets)
    return Source("tnadapt", file, file.num_parameters)


def _in_folder(folder: str) -> str:
    path = os.path.join(folder, _OWN)
    if not os.path.exists(path):
        raise FileError(f"is a folder with neither {CONFIG} nor {_OWN} in it; give the path of an adapter")
    return path


def _check_weights(folder: str) -> None:
    if os.path.exists(os.path.join(folder, WEIGHTS)):
        return
    if os.path.exists(os.path.join(folder, "adapter_model.bin")):
        raise _pickle()
    raise FileError(f"has {CONFIG} and no {WEIGHTS} beside it")


def _pickle() -> FileError:
    return FileError(
        "the weights are a pickle, which can run any program when it is opened: it was not. Save the adapter again "
        "with a release of PEFT or LyCORIS that writes safetensors"
    )
