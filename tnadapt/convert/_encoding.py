"""Updates as tensors, named and shaped as PEFT and LyCORIS have them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ._choosing import Choice
from ._modules import Module, flat_name
from ._peft_settings import PREFIX, pattern_value
from ._updates import Float, Pair, Update, alpha_of, padded, scaled

__all__ = ["lycoris_tensors", "peft_tensors"]


def _lora(update: Update, stored: Sequence[int], names: tuple[str, str]) -> dict[str, Float]:
    (pair,) = update.parts
    assert isinstance(pair, Pair)
    kernel = tuple(stored[2:])
    down, up = pair.a.T, pair.b
    if kernel:
        down = down.reshape(pair.rank, stored[1], *kernel)
        up = up.reshape(*pair.b.shape, *(1 for _ in kernel))
    return {names[0]: down, names[1]: up}


def _loha(update: Update) -> dict[str, Float]:
    found = dict[str, Float]()
    for number, part in enumerate(update.parts, start=1):
        assert isinstance(part, Pair)
        part = padded(part, update.rank)
        found |= {f"hada_w{number}_a": part.b, f"hada_w{number}_b": part.a.T}
    return found


def _lokr(update: Update, stored: Sequence[int]) -> dict[str, Float]:
    found = dict[str, Float]()
    for number, part in enumerate(update.parts, start=1):
        if isinstance(part, Pair):
            found |= {f"lokr_w{number}_a": part.b, f"lokr_w{number}_b": part.a.T}
        else:
            kernel = tuple(stored[2:]) if number == 2 else ()
            found[f"lokr_w{number}"] = part.reshape(part.shape[0], -1, *kernel) if kernel else part
    return found


def _own(update: Update, stored: Sequence[int], names: tuple[str, str]) -> dict[str, Float]:
    if update.kind == "lora":
        return _lora(update, stored, names)
    if update.kind == "loha":
        return _loha(update)
    if update.kind == "lokr":
        return _lokr(update, stored)
    (diff,) = update.parts
    assert not isinstance(diff, Pair)
    return {"diff": diff.reshape(stored)}


# -- PEFT ----------------------------------------------------------------------------------------


def peft_tensors(
    modules: Sequence[Module], choice: Choice, kept: Sequence[str]
) -> tuple[dict[str, Float], dict[str, Any]]:
    """The tensors of PEFT's file, and its ``adapter_config.json``."""
    tensors, alphas = dict[str, Float](), []
    for module, update, rank in zip(modules, choice.updates, choice.ranks, strict=True):
        alpha = alpha_of([update.scale], rank)
        own = _own(update if alpha is not None else scaled(update), module.stored, ("lora_A.weight", "lora_B.weight"))
        tensors |= {f"{PREFIX}{module.path}.{name}": array for name, array in own.items()}
        alphas.append(float(rank) if alpha is None else alpha)
    return tensors, _config(modules, choice, alphas, kept)


def _config(modules: Sequence[Module], choice: Choice, alphas: Sequence[float], kept: Sequence[str]) -> dict[str, Any]:
    """``adapter_config.json``: every weight by its whole path, and patterns for those of another rank or alpha."""
    kind, ranks = choice.kind, choice.ranks
    rank, alpha = (Counter(values).most_common(1)[0][0] for values in (ranks, alphas))
    paths = [module.path for module in modules]
    config: dict[str, Any] = {
        "peft_type": kind.upper(),
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        ("lora_alpha" if kind == "lora" else "alpha"): _number(alpha),
        "target_modules": _targeted(paths),
        "rank_pattern": _pattern(paths, ranks, rank),
        "alpha_pattern": _pattern(paths, [_number(value) for value in alphas], _number(alpha)),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in kept}) or None,
    }
    if kind == "lora":
        config |= {"bias": "none", "fan_in_fan_out": all(module.transposed for module in modules)}
    return {**config, **choice.settings}


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value


def _pattern(paths: Sequence[str], values: Sequence[float], default: float) -> dict[str, float]:
    """The values that are not the default, by expressions: plain paths where these are clear.

    A path is an expression that may match the end of another path, and whose dots match other letters, too. Where PEFT
    would take one weight's value for another's, the expressions are anchored and escaped.
    """
    plain = {path: value for path, value in zip(paths, values, strict=True) if value != default}
    try:
        clear = all(pattern_value(plain, p, default) == value for p, value in zip(paths, values, strict=True))
    except re.error:
        clear = False
    return plain if clear else {f"^{re.escape(path)}": value for path, value in plain.items()}


def _targeted(paths: Sequence[str]) -> list[str] | str:
    """Paths, which PEFT takes for ends of paths; where one may be the end of another, an expression for whole ones."""
    unclear = any("." not in path for path in paths) or any(
        other.endswith(f".{path}") for path in paths for other in paths
    )
    return "|".join(map(re.escape, sorted(paths))) if unclear else sorted(paths)


# -- LyCORIS -------------------------------------------------------------------------------------


def lycoris_tensors(modules: Sequence[Module], choice: Choice) -> dict[str, Float]:
    """The tensors of LyCORIS' file.

    LoKr and LoHa are scaled twice where LyCORIS 4.1 merges them, and LoKr of two full factors never: their scale is
    in a factor, and alpha is the rank, which every way of reading it makes a scale of 1.
    """
    tensors = dict[str, Float]()
    for module, update, rank in zip(modules, choice.updates, choice.ranks, strict=True):
        name = flat_name(module.path)
        alpha = alpha_of([update.scale], rank) if update.kind == "lora" else None
        if alpha is None or float(np.float32(alpha)) != alpha:
            update, alpha = scaled(update), float(rank)
        own = _own(update, module.stored, ("lora_down.weight", "lora_up.weight"))
        if update.kind != "dense":
            own["alpha"] = np.asarray(alpha)
        tensors |= {f"{name}.{key}": array for key, array in own.items()}
    return tensors
