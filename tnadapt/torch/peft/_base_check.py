"""The description of the base model in ``adapter_config.json``, and the check that an adapter fits a base."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.checkpoints.fingerprint import Fingerprint
from tnadapt.errors import FileError, TnadaptError, safe_repr

from .. import _merging as merging
from .._adapter import Adapter
from .._adapter_saving import base_fingerprint

__all__ = ["base_dtype", "check_base", "describe_base"]


def describe_base(handle: Adapter) -> dict[str, Any]:
    """Return the description of the base model and the draws for a file; reads every adapted weight."""
    base = base_fingerprint(handle._state)
    counts: dict[str, int] = {}
    for rows, cols in handle.plan.shapes:
        counts[f"{rows}x{cols}"] = counts.get(f"{rows}x{cols}", 0) + 1
    return {
        "weights": counts,
        "fingerprint": None if base is None else {**dataclasses.asdict(base), "sketch": list(base.sketch)},
        "draws": AdapterFile(handle.config, handle.targets, handle.plan.init(), given=handle.plan.given).draws,
    }


def check_base(handle: Adapter, saved: dict[str, Any]) -> None:
    """Raise a FileError unless the adapter was trained on these weights and with the same draws."""
    here = describe_base(handle)
    way = (
        "Give the base model that it was trained on; or, to use it here anyway, load its TnadaptConfig, set "
        "config.base = None, and pass it as config="
    )
    kind = type(handle.model).__name__
    if saved.get("weights") != here["weights"]:
        raise FileError(
            f"the adapter was trained on weights of the shapes {safe_repr(saved.get('weights'))}, and "
            "target_modules find "
            f"{here['weights']} in this {kind}. {way}"
        )
    if saved.get("draws") != here["draws"]:
        raise FileError(
            f"the adapter was trained with fixed draws whose digest is {safe_repr(saved.get('draws'))}; on this "
            f"machine it is {here['draws']}. Its updates would differ: run tnadapt.verify to see why"
        )
    if saved.get("fingerprint") is None or here["fingerprint"] is None:
        return
    try:
        difference = Fingerprint(**saved["fingerprint"]).difference(Fingerprint(**here["fingerprint"]))
    except (TypeError, TnadaptError) as error:
        raise FileError(f"the fingerprint of the base model in the adapter's config is invalid: {error}") from None
    if difference is not None:
        raise FileError(
            f"the adapter was trained on another base model than this {kind}: of its weights, {difference}. {way}"
        )


def base_dtype(handle: Adapter) -> torch.dtype:
    """Return the dtype of the adapted weights, promoted if they differ; float32 if all are quantized."""
    stored = [merging.stored(handle._state, index) for index in range(len(handle.targets))]
    dtypes = [weight.dtype for weight in stored if weight is not None]
    # torch counts float8 types as floating point, but cannot compute in them.
    wide = [dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1]
    return functools.reduce(torch.promote_types, wide) if wide else torch.float32
