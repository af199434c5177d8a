"""Where the user's model is: a folder, a name on the hub, or a GGUF file; checked before transformers looks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from tnadapt.checkpoints.gguf_place import gguf_place, need_gguf
from tnadapt.errors import FileError, TnadaptError, safe_repr

__all__ = ["ModelPlace", "model_place", "require_model"]


class ModelPlace(NamedTuple):
    """What transformers is given: a folder or a name on the hub, and the GGUF file in it, if the model is in one."""

    folder: str
    file: str = ""

    @property
    def settings(self) -> dict[str, str]:
        """Return the keywords of ``from_pretrained``."""
        return {"gguf_file": self.file} if self.file else {}


def model_place(name: str, kind: str) -> ModelPlace:
    """Return where a model is.

    Parameters
    ----------
    name : str
        A folder, a GGUF file, a name on the hub, or ``owner/name/file.gguf`` there.
    kind : {"text", "image"}
        What the data have.

    Raises
    ------
    FileError
        If there is no model.
    TnadaptError
        If a GGUF file cannot be read, because the package is missing or the data have images.
    """
    place = require_model(name)
    if place.file:
        if kind == "image":
            raise TnadaptError(
                f"{safe_repr(name)} is a GGUF file, of which transformers makes language models, and the data have "
                "images"
            )
        need_gguf(name)
    return place


def require_model(name: str) -> ModelPlace:
    """Return where a model is, or raise an error if it is a path at which there is none.

    Raises
    ------
    FileError
    """
    place = ModelPlace(*gguf_place(name))
    path = Path(name)
    if not os.path.exists(name) and name.startswith((".", "/", "~")):
        raise FileError(f"no model at {name}: there is no such {'file' if path.suffix else 'folder'}")
    if place.file:
        return place
    if os.path.isdir(name) and not (path / "config.json").is_file():
        raise FileError(f"no model at {name}: the folder has no config.json and no .gguf file")
    if os.path.isfile(name):
        raise FileError(
            f"no model at {name}: expected a folder with a config.json, a .gguf file or a hub name, not another file"
        )
    return place
