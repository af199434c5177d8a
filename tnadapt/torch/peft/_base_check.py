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

__all__ = ["base_dtype", "check_base", "computed_from", "describe_base"]


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


def computed_from(handle: Adapter, base: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the fingerprint of a described base if arrays of the adapter are computed from its weights."""
    return base["fingerprint"] if base is not None and handle.plan.base_shapes else None


def check_base(handle: Adapter, saved: dict[str, Any] | None, source: dict[str, Any] | None) -> None:
    """Raise a FileError unless the adapter was trained on these weights and with the same draws.

    Parameters
    ----------
    handle : Adapter
    saved : dict or None
        What :func:`describe_base` returned for the base that it was trained on; None if nothing of it is compared.
    source : dict or None
        What :func:`computed_from` returned. On another base, the arrays that the adapter does not store would differ.
    """
    computed = handle.plan.base_shapes
    if saved is None and (source is None or not computed):
        return
    here, kind = describe_base(handle), type(handle.model).__name__
    way = (
        "Give the base model that it was trained on; or, to use it here anyway, load its TnadaptConfig, set "
        "config.base = None, and pass it as config="
    )
    if saved is not None and saved.get("weights") != here["weights"]:
        raise FileError(
            f"the adapter was trained on weights of the shapes {safe_repr(saved.get('weights'))}, and "
            "target_modules find "
            f"{here['weights']} in this {kind}. {way}"
        )
    if saved is not None and saved.get("draws") != here["draws"]:
        raise FileError(
            f"the adapter was trained with fixed draws whose digest is {safe_repr(saved.get('draws'))}; on this "
            f"machine it is {here['draws']}. Its updates would differ: run tnadapt.verify to see why"
        )
    other = f"the adapter was trained on another base model than this {kind}: of its weights"
    if computed and (difference := _difference(source, here["fingerprint"])) is not None:
        raise FileError(
            f"{other}, {difference}. Arrays such as {next(iter(computed))!r} are computed from the base weights and "
            "not stored, and would be other ones here. Give the base model that it was trained on; or, on that model, "
            "save the adapter with tnadapt.torch.adapters(model)[name].save(path, store_bases=True), and load that "
            "file with tnadapt.torch.load(…, check_base=False)"
        )
    if saved is not None and (difference := _difference(saved.get("fingerprint"), here["fingerprint"])) is not None:
        raise FileError(f"{other}, {difference}. {way}")


def _difference(saved: Any, here: dict[str, Any] | None) -> str | None:
    """Describe how two fingerprints differ; None if they match, or one of them could not be taken."""
    if saved is None or here is None:
        return None
    try:
        return Fingerprint(**saved).difference(Fingerprint(**here))
    except (TypeError, TnadaptError) as error:
        raise FileError(f"the fingerprint of the base model in the adapter's config is invalid: {error}") from None


def base_dtype(handle: Adapter) -> torch.dtype:
    """Return the dtype of the adapted weights, promoted if they differ; float32 if all are quantized."""
    stored = [merging.stored(handle._state, index) for index in range(len(handle.targets))]
    dtypes = [weight.dtype for weight in stored if weight is not None]
    # torch counts float8 types as floating point, but cannot compute in them.
    wide = [dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1]
    return functools.reduce(torch.promote_types, wide) if wide else torch.float32
