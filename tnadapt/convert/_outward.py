"""An adapter file in another library's form: chosen, written, read back and measured."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tnadapt.checkpoints.adapter_file import AdapterFile, some
from tnadapt.checkpoints.container import Container
from tnadapt.errors import ConfigError, FileError, shown

from ._choosing import Wish, choose
from ._conversion import Conversion
from ._encoding import lycoris_tensors, peft_tensors
from ._lycoris_reading import NAMES, RECORD, read_lycoris
from ._measuring import errors_of, is_rounding, low_rank_norms, norms_of
from ._modules import Module, flat_name, modules_of
from ._numbers import check_range, narrowed, rounded
from ._peft_reading import TURNED, adapter_of
from ._peft_settings import PREFIX, settings_of
from ._source import Source
from ._taking_apart import Wide
from ._updates import Float
from ._writing import content_of, json_text

__all__ = ["to_foreign"]


def to_foreign(found: Source, wish: Wish, to: str, dtype: str | None) -> Conversion:
    """The adapter in another library's form.

    Raises
    ------
    ConfigError
        If that form cannot hold it.
    """
    file = found.file
    if file.activation is not None:
        file.deltas()  # says why it has none
    modules, wide = modules_of(file, wish.library, wish.kind), Wide(file, found.updates)
    _check_kept(file, wish.library, modules)
    choice = choose(modules, wide, wish)
    config = None
    if wish.library == "PEFT":
        wanted, config = peft_tensors(modules, choice, list(file.kept))
    else:
        wanted = lycoris_tensors(modules, choice)
    tensors, kinds = _stored(wanted, dtype or file.dtype, dtype is not None)
    count = sum(array.size for name, array in tensors.items() if not name.endswith(".alpha"))
    for name, array in file.kept.items():
        tensors[PREFIX + name] = array
        kinds |= {PREFIX + name: "bfloat16"} if f"kept.{name}" in file.dtypes else {}
    record: dict[str, Any] = {"from": found.kind, "to": to, "config": file.config.to_dict()}
    if config is None:
        record[NAMES] = {flat_name(module.path): [module.path, list(module.stored)] for module in modules}
    else:
        record[TURNED] = {module.path: module.transposed for module in modules}
    error, errors = _measured(modules, wide, _content(tensors, kinds, record, config), config)
    written = next(kinds.get(n, array.dtype.name) for n, array in tensors.items() if not n.endswith(".alpha"))
    exact = all(is_rounding(one, written, choice.exact) for one in (error, *errors.values()))
    record |= {"exact": exact, "error": float(f"{error:.2e}")}
    content = _content(tensors, kinds, record, config)
    sizes = found.parameters, count
    return Conversion(to, found.kind, exact, error, errors, sizes, (), None, tensors, kinds, config, content)


def _stored(wanted: Mapping[str, Float], dtype: str, rounding: bool) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors in a dtype; alpha, which bfloat16 would round from 257 on, in float32."""
    alphas = {name: array.astype(np.float32) for name, array in wanted.items() if name.endswith(".alpha")}
    factors = {name: array for name, array in wanted.items() if name not in alphas}
    made, kinds = rounded(factors, dtype) if rounding else narrowed(factors, dtype)
    check_range(made, dtype)
    return made | alphas, kinds


def _check_kept(file: AdapterFile, library: str, modules: Sequence[Module]) -> None:
    if not file.kept:
        return
    if library == "LyCORIS":
        raise ConfigError(
            f"LyCORIS has no place for the parameters that were trained beside the adapter: {some(file.kept)}. Convert "
            "without them by without_kept=True (--without-kept), and put them into the model by yourself"
        )
    for name in file.kept:
        holder = name.rpartition(".")[0]
        inside = [m.path for m in modules if re.match(rf"(^|.*\.){re.escape(holder)}($|\..*)", m.path)]
        if not holder or inside:
            what = f"the adapted weight of {shown(inside[0])}" if inside else "the model itself"
            raise ConfigError(
                f"PEFT saves whole modules, and cannot keep {shown(name)} beside {what}: convert without it by "
                "without_kept=True (--without-kept)"
            )


def _content(
    tensors: Mapping[str, np.ndarray], dtypes: Mapping[str, str], record: Mapping[str, Any], config: Any
) -> bytes:
    metadata = {RECORD: json_text(record)} | ({} if config is None else {"format": "pt"})
    return content_of(tensors, dtypes, metadata)


def _measured(
    modules: Sequence[Module], wide: Wide, content: bytes, config: Mapping[str, Any] | None
) -> tuple[float, dict[str, float]]:
    """The error of what is written, read back from its bytes."""
    container = Container(io.BufferedReader(io.BytesIO(content)), len(content))
    if config is None:
        back = read_lycoris(container, None, None).file
    else:
        back = adapter_of(container, settings_of(config), None).file
    again, places = Wide(back), {target.module: number for number, target in enumerate(back.targets)}
    if places.keys() != {module.path for module in modules}:
        raise FileError("what was written does not read back: please report this")
    norms = {}
    for module in modules:
        number = places[module.path]
        found = low_rank_norms(module.form(wide), again.form(number))
        norms[module.name] = found or norms_of(module.delta(wide), again.delta(number))
    return errors_of(norms)
