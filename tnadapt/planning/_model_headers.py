"""Shapes of a model's weights from its headers alone: a folder, a safetensors file or index, or a name on the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from tnadapt.argument_checks import checks_arguments
from tnadapt.checkpoints.checkpoint import open_checkpoint
from tnadapt.checkpoints.container import path_of
from tnadapt.checkpoints.strict_json import MAX_CONFIG, json_file
from tnadapt.errors import FileError, TnadaptError
from tnadapt.targets.checkpoint_targets import find_stored
from tnadapt.targets.target import Target

__all__ = ["Headers", "model_targets", "read_headers"]

_HUB = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


class Headers(NamedTuple):
    """The headers of a model.

    Attributes
    ----------
    shapes : dict of str to tuple of int
        Shape of every stored tensor.
    config : mapping or None
        The model's ``config.json``.
    """

    shapes: dict[str, tuple[int, ...]]
    config: Mapping[str, Any] | None


@checks_arguments
def model_targets(model: str | os.PathLike[str], targets: Any = "qv") -> list[Target]:
    """Return the weights of a stored model to be adapted, without reading a tensor.

    Parameters
    ----------
    model : str or PathLike
        A folder, a ``.safetensors`` file or index, or a hub name such as ``"google/vit-base-patch16-224"``, whose
        headers are requested by HTTP.
    targets : str or list of str
        Roles such as ``"qv"``, a regular expression, or paths of modules: see
        :func:`tnadapt.targets.checkpoint_targets.find_stored`.

    Returns
    -------
    list of Target
        ``[target.shape for target in …]`` are the shapes that :func:`tnadapt.plan` takes, ``target.layer`` the layers.

    Raises
    ------
    FileError
        If there is no such model, neither on disk nor on the hub, or it is damaged.
    TargetError
        If no weight matches.

    Examples
    --------
    >>> import numpy as np
    >>> from safetensors.numpy import save_file
    >>> save_file({f"h.{i}.attn.{x}_proj.weight": np.zeros((8, 8)) for i in range(2) for x in "qkv"}, "m.safetensors")
    >>> [(target.name, target.shape) for target in model_targets("m.safetensors")][:2]
    [('h.0.attn.q_proj.weight', (8, 8)), ('h.0.attn.v_proj.weight', (8, 8))]
    """
    found = read_headers(model)
    return find_stored(found.shapes, targets, found.config)


def read_headers(model: str | os.PathLike[str]) -> Headers:
    """Read the shapes of a model's tensors, and its config.

    Parameters
    ----------
    model : str or PathLike
        As for :func:`model_targets`. A path that exists is not looked up on the hub.

    Raises
    ------
    FileError
        If there is no such model, or it is damaged.
    """
    name = path_of(model)
    if name.startswith("timm:"):
        plain = name.removeprefix("timm:")
        raise FileError(
            f"{name}: plans read the headers of files; give the model's repository on the hub, "
            f"timm/{plain} with its tag such as .augreg_in1k, or plan in Python for the shapes of "
            f"tnadapt.torch.find_targets(timm.create_model({plain!r}))"
        )
    if os.path.lexists(name) or not _HUB.fullmatch(name) or name.endswith((".safetensors", ".json")):
        stored = open_checkpoint(model)
        return Headers({tensor: entry.shape for tensor, entry in stored.entries.items()}, stored.config)
    return _from_hub(name)


def _from_hub(name: str) -> Headers:
    try:
        import huggingface_hub
    except ImportError as error:
        raise FileError(
            f"{name}: no such file or folder here; to look on the hub, pip install 'tnadapt[hub]' ({error})"
        ) from None
    try:
        metadata = huggingface_hub.get_safetensors_metadata(name)
        config = _hub_config(huggingface_hub, name)
    except TnadaptError:
        raise
    except Exception as error:  # the hub's client raises its own errors, those of its HTTP library, and system errors
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileError(f"{name}: no such file or folder here, and loading it from the hub failed: {said}") from error
    shapes = {
        tensor: tuple(int(size) for size in entry.shape)
        for file in metadata.files_metadata.values()
        for tensor, entry in file.tensors.items()
    }
    return Headers(shapes, config)


def _hub_config(hub: Any, name: str) -> Mapping[str, Any] | None:
    if not hub.file_exists(name, "config.json"):
        return None
    return json_file(hub.hf_hub_download(name, "config.json"), MAX_CONFIG, f"{name}: config.json")
