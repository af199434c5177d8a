"""Arrays that an adapter file leaves to the base model, as LoRA-XS does, computed for a conversion."""

from __future__ import annotations

import os
from typing import Any

from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.checkpoints.base_weights import BaseWeights, located
from tnadapt.checkpoints.checkpoint import open_checkpoint
from tnadapt.errors import ConfigError, TargetError, summarize

from ._base_model import Base

__all__ = ["check_base", "with_base_arrays"]


def check_base(file: AdapterFile, known: Base, base: Any) -> None:
    """Raise TargetError unless a base has the modules of a file of this library, with the shapes of its targets.

    Parameters
    ----------
    file : AdapterFile
    known : Base
    base : object
        The argument of :func:`tnadapt.convert`. If it is a path, weights may have other names there.
    """
    try:
        known.check_targets(file.targets)
    except TargetError:
        found = located(file, open_checkpoint(base)) if isinstance(base, (str, os.PathLike)) else file.targets
        if found is file.targets:
            raise
        known.check_targets(found)


def with_base_arrays(file: AdapterFile, base: Any) -> AdapterFile:
    """Return a file with all of its arrays, those of the base weights computed from the model on disk.

    Parameters
    ----------
    file : AdapterFile
    base : optional
        The argument of :func:`tnadapt.convert`.

    Raises
    ------
    ConfigError
        If arrays are missing, and base is not the path of a model.
    TargetError
        If the model lacks a weight, or is not the one that the adapter was trained on.
    """
    if file.complete:
        return file
    if not isinstance(base, (str, os.PathLike)):
        missing = summarize([name for name in file.plan.base_shapes if name not in file.given])
        raise ConfigError(
            f"the adapter does not store the arrays that are computed from the base weights, {missing}: give base= "
            "(--base), a safetensors file, an index or a folder of the base model; or, in Python, convert "
            "file.with_base(weights)"
        )
    weights = BaseWeights(file, open_checkpoint(base))
    weights.check_fingerprint()
    return file.with_base(weights.of)
