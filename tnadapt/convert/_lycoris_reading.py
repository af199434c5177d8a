"""A safetensors file of LyCORIS or kohya: LoRA, LoKr, LoHa and full differences, read exactly or refused by name."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping

from tnadapt.checkpoints.adapter_file import some
from tnadapt.checkpoints.container import DTYPES, Container
from tnadapt.errors import FileError, shown
from tnadapt.targets.roles import natural

from ._base_model import Base, missing_base, target_of
from ._joining import Found, joined
from ._numbers import widened, widest
from ._source import Source, sourced
from ._tensors import DIFF, LOHA, LOKR, kind_of, update_of
from ._updates import Float

__all__ = ["NAMES", "RECORD", "looks_like_lycoris", "read_lycoris"]

# The names that a converted file's record has, by which it needs no base.
RECORD, NAMES = "tnadapt.convert", "modules"

_PREFIXES = re.compile(r"(lycoris|lora_unet|lora_te\d?|lora_transformer|lora_prior_unet)_")
_SUFFIXES = {"lora_down.weight": "lora_down", "lora_up.weight": "lora_up", "lora_mid.weight": "lora_mid"}
_SUFFIXES |= {name: name for name in (*LOKR, *LOHA, *DIFF)}
_REFUSED = {
    "dora_scale": "DoRA scales the sum of weight and update",
    "diff_b": "the change of a bias, which an adapter file does not hold",
    "w_norm": "the change of a normalisation",
    "b_norm": "the change of a normalisation",
    "scalar": "a scale that is trained",
}


def looks_like_lycoris(container: Container) -> bool:
    """Whether the tensors' names are those of LyCORIS or kohya."""
    return any(_PREFIXES.match(name) for name in container.entries)


def read_lycoris(container: Container, base: Base | None, part: str | None) -> Source:
    """The adapter of an open file.

    Parameters
    ----------
    container : Container
    base : Base, optional
        Where the modules' true names are.
    part : str, optional
        Which of the prefixes to read, such as "lora_unet": a file may have several models' adapters.

    Raises
    ------
    FileError, TargetError
        If there is anything in it that an adapter file cannot hold, or a name cannot be read.
    """
    flat, dtypes = _modules(container, part)
    recorded = _recorded(container.metadata)
    found, kinds = [], set[str]()
    paths: dict[str, str] = {}
    for name in flat:
        path = _path(name, base, recorded)
        if path in paths:
            raise FileError(f"{shown(paths[path])} and {shown(name)} are both of {shown(path)}")
        paths[path] = name
    for path in sorted(paths, key=natural):
        tensors = flat[paths[path]]
        alpha = tensors.pop("alpha", None)
        update, shape = update_of(path, tensors, functools.partial(_scale, path, alpha))
        kinds.add({"dense": "full"}.get(kind := kind_of(path, tensors), kind))
        shape = recorded[paths[path]][1] if paths[path] in recorded else shape
        found.append(Found(target_of(path, shape, base), update))
    kind = f"lycoris-{kinds.pop()}" if len(kinds) == 1 else "lycoris"
    file, notes = joined(found, widest(dtypes), {}, {})
    return sourced(kind, file, found, notes)


def _modules(container: Container, part: str | None) -> tuple[dict[str, dict[str, Float]], set[str]]:
    """The tensors of each module, by its flat name and theirs; and the dtypes of those that make the updates."""
    entries, found = container.entries, dict[str, dict[str, Float]]()
    prefixes, unknown, dtypes = set[str](), list[str](), set[str]()
    for name in entries:
        prefix, (flat, _, suffix) = _PREFIXES.match(name), name.partition(".")
        if prefix is None or (suffix not in _SUFFIXES and suffix != "alpha" and suffix not in _REFUSED):
            unknown.append(name)
            continue
        prefixes.add(prefix[1])
        if part is not None and prefix[1] != part:
            continue
        array = widened(name, entries[name].dtype, container.array(name))
        if suffix in _REFUSED:
            if array.any() or suffix != "diff_b":
                raise FileError(f"{shown(name)} cannot be converted: {_REFUSED[suffix]}")
            continue
        dtypes |= {DTYPES[entries[name].dtype]} if suffix != "alpha" else set()
        found.setdefault(flat, {})[_SUFFIXES.get(suffix, suffix)] = array
    if unknown:
        raise FileError(f"has tensors that are no part of a LoRA, LoKr, LoHa or full difference: {some(unknown)}")
    _one_part(prefixes, part)
    return found, dtypes


def _one_part(prefixes: set[str], part: str | None) -> None:
    listed = ", ".join(sorted(prefixes))
    if part is not None and part not in prefixes:
        raise FileError(f"has no part {shown(part)}; its parts are {listed}")
    if part is None and len(prefixes) > 1:
        raise FileError(f"has the adapters of several models: {listed}; name one of them by part=")


def _scale(path: str, alpha: Float | None, rank: int | None) -> float:
    # LyCORIS' own rules: no alpha or 0 is the rank, and where both factors of LoKr are full there is no scale.
    if alpha is None or rank is None:
        return 1.0
    if alpha.size != 1:
        raise FileError(f"alpha of {shown(path)} must be one number; it has the shape {alpha.shape}")
    return float(alpha.reshape(())) / rank or 1.0


def _recorded(metadata: Mapping[str, str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Flat names -> path and shape, as a conversion wrote them down; nothing where they are not as it writes them."""
    try:
        listed = json.loads(metadata.get(RECORD, "{}")).get(NAMES, {})
        found = {str(name): (str(path), tuple(map(int, shape))) for name, (path, shape) in listed.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}
    return {name: own for name, own in found.items() if name.partition("_")[2] == own[0].replace(".", "_")}


def _path(name: str, base: Base | None, recorded: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    flat = _PREFIXES.sub("", name, count=1)
    if base is not None:
        return base.named(flat)
    if name in recorded:
        return recorded[name][0]
    if "_" in flat:
        raise missing_base(name)
    return flat
