"""Where the weights of a model in GGUF are: the file, and the folder or repository that transformers is given."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tnadapt.errors import FileError, TnadaptError, safe_repr

__all__ = ["gguf_files", "gguf_place", "hidden_bar", "need_gguf"]


def gguf_place(name: str) -> tuple[str, str]:
    """Return the folder or repository that a name of a model stands for, and its GGUF file; "" for other models.

    Parameters
    ----------
    name : str
        A GGUF file; a folder, which is a model in GGUF if it has no ``config.json`` and one such file; or a file in a
        repository on the hub, ``owner/name/file.gguf``.

    Returns
    -------
    folder, file : str

    Raises
    ------
    FileError
        If a folder without ``config.json`` has several GGUF files.

    Examples
    --------
    >>> gguf_place("owner/name/model.gguf"), gguf_place("owner/name")
    (('owner/name', 'model.gguf'), ('owner/name', ''))
    """
    path = Path(name)
    # These functions of os.path return False for a path that cannot be one, such as one that is too long.
    if os.path.isdir(name):
        files = gguf_files(path)
        if len(files) > 1:
            raise FileError(
                f"{safe_repr(name)} has {len(files)} GGUF files and no config.json: name one of them, such as "
                f"{str(path / files[0])!r}"
            )
        return name, files[0] if files else ""
    if not name.lower().endswith(".gguf"):
        return name, ""
    if os.path.isfile(name):
        return str(path.parent), path.name
    parts = name.split("/")
    remote = len(parts) > 2 and all(parts) and not name.startswith((".", "~"))
    return ("/".join(parts[:2]), "/".join(parts[2:])) if remote else (name, "")


def gguf_files(folder: Path) -> list[str]:
    """Return the names of the GGUF files in a folder without ``config.json``; none if it has one."""
    if (folder / "config.json").exists():
        return []
    return sorted(path.name for path in folder.iterdir() if path.suffix.lower() == ".gguf")


def need_gguf(file: str) -> None:
    """Raise a TnadaptError if the package that reads a GGUF file is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise TnadaptError(
            f"{safe_repr(file)} is a GGUF file, which needs the package gguf: pip install 'tnadapt[gguf]'"
        )


@contextlib.contextmanager
def hidden_bar(file: str) -> Iterator[None]:
    """Hide the progress bar with which transformers reads a GGUF file; do nothing if the name is empty."""
    module: Any = None
    if file:
        with contextlib.suppress(ImportError):
            module = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    bar = getattr(module, "tqdm", None)
    if bar is None:
        yield
        return
    module.tqdm = lambda found, *args, **kwargs: found
    try:
        yield
    finally:
        module.tqdm = bar
