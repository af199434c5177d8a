"""The formats of LyCORIS and of kohya's scripts: LoRA, LoKr, LoHa and full differences in one safetensors file.

Every tensor of such a file is either read exactly or rejected by name. LyCORIS loads written files to the same update.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tnadapt.checkpoints.container import DTYPES, Container
from tnadapt.errors import ConfigError, FileError, safe_repr, summarize
from tnadapt.targets.roles import natural

from ._base_model import Base, missing_base, target_of
from ._diffusers_format import COMPONENTS, PREFIXES, chosen_part, other_path, stored_path, written_prefix
from ._file_format import EncodedAdapter, ExportChoice, FileFormat, ForeignAdapter
from ._files import (
    DIFF,
    LOHA,
    LOKR,
    RECORD,
    StoredFiles,
    are_both_low,
    decode,
    encode,
    factorization,
    foreign_tensor_names,
    is_low,
    json_text,
    kind_of,
    kronecker_sizes_of,
    safetensors_content,
)
from ._updates import Float, Module, ModuleUpdate, Pair, TargetUpdate, alpha_of, as_matrix, common_dtype, widen

__all__ = [
    "KohyaFormat",
    "LycorisFormat",
]


# -- The format of LyCORIS ---------------------------------------------------------------------------------------------


# Entry of a conversion's record with the modules' paths and shapes. A file that has it can be read without a base.
_MODULES = "modules"

_PREFIXES = re.compile(r"(lycoris|lora_unet|lora_te\d?|lora_transformer|lora_prior_unet)_")
_SUFFIXES = {"lora_down.weight": "lora_down", "lora_up.weight": "lora_up", "lora_mid.weight": "lora_mid"}
_SUFFIXES |= {name: name for name in (*LOKR, *LOHA, *DIFF)}
_REFUSED = {
    "dora_scale": "DoRA scales the sum of weight and update",
    "diff_b": "the change of a bias, which an adapter file does not hold",
    "w_norm": "the change of a normalization",
    "b_norm": "the change of a normalization",
    "scalar": "a scale that is trained",
}


class LycorisFormat(FileFormat):
    """Files saved by LyCORIS and kohya's scripts, which write the dots of a module's path as underscores."""

    library = "LyCORIS"
    kinds = ("lora", "lokr", "loha", "full")
    parts_read = (*PREFIXES, *COMPONENTS, "lycoris")

    def flat_name(self, path: str) -> str:
        """Return the name of a module in a file, with underscores for dots."""
        return f"lycoris_{path.replace('.', '_')}"

    def detect(self, path: str) -> str | None:
        """Return the path if the names of the file's tensors are those of LyCORIS or kohya."""
        names = None if os.path.isdir(path) else foreign_tensor_names(path)
        return path if any(map(_PREFIXES.match, names or ())) else None

    def read(self, files: StoredFiles, base: Base | None, part: str | None) -> ForeignAdapter:
        """Read the adapter of a file; ``part`` is one of its prefixes, such as "lora_unet"."""
        with files.container() as container:
            return _read(container, base, part)

    def check_module(self, module: Module, kind: str) -> None:
        """Raise ConfigError for weights stored as (in, out), and for kernels with more than three axes."""
        if module.transposed:
            raise ConfigError(
                f"{safe_repr(module.path)} is stored as (in, out), and LyCORIS supports no such layer; convert to "
                "'peft-lora'"
            )
        axes = len(module.stored) - 2
        if axes > 3:
            raise ConfigError(
                f"{safe_repr(module.path)} has a kernel of {axes} dimensions, and LyCORIS has {kind} only for up to 3"
            )

    def check_adapter(self, modules: Sequence[Module], kept: Mapping[str, np.ndarray]) -> None:
        """Raise ConfigError for paths that map to the same name, and for parameters trained alongside the adapter."""
        names = dict[str, str]()
        for module in modules:
            name = self.flat_name(module.path)
            if name in names:
                raise ConfigError(
                    f"LyCORIS writes dots as underscores, and {safe_repr(names[name])} and "
                    f"{safe_repr(module.path)} would have "
                    "one name: it cannot adapt both"
                )
            names[name] = module.path
        super().check_adapter(modules, kept)

    def fit_kronecker(self, updates: Sequence[ModuleUpdate], stored: Sequence[tuple[int, ...]]) -> ExportChoice | None:
        """Return LoKr updates whose sizes LyCORIS infers correctly from their parts."""
        fitted = [fit for form, shape in zip(updates, stored, strict=True) if (fit := _fit(form, shape)) is not None]
        if len(fitted) < len(updates):
            return None
        return ExportChoice(fitted, [form.rank for form in fitted], True, {})

    def encode(self, kind: str, modules: Sequence[Module], choice: ExportChoice, kept: Sequence[str]) -> EncodedAdapter:
        """Encode the tensors.

        LyCORIS 4.1 scales LoKr and LoHa twice when it merges them, and never scales LoKr with two full factors. Their
        scale is therefore multiplied into a factor, and alpha is set to the rank, so that the scale is 1 in all cases.
        """
        tensors, alphas = dict[str, Float](), dict[str, Float]()
        for module, update, rank in zip(modules, choice.updates, choice.ranks, strict=True):
            name = self.flat_name(module.path)
            alpha = alpha_of([update.scale], rank) if update.kind == "lora" else None
            if alpha is None or float(np.float32(alpha)) != alpha:
                update, alpha = update.absorb_scale(), float(rank)
            arrays = encode(update, module.stored, "lora_down.weight", "lora_up.weight")
            tensors |= {f"{name}.{key}": array for key, array in arrays.items()}
            if update.kind != "dense":
                # Stored in float32, as bfloat16 rounds integers from 257 on.
                alphas[f"{name}.alpha"] = np.asarray(alpha)
        listed = {self.flat_name(module.path): [module.path, list(module.stored)] for module in modules}
        return EncodedAdapter(tensors, alphas, record={_MODULES: listed})

    def write(
        self,
        tensors: Mapping[str, np.ndarray],
        dtypes: Mapping[str, str],
        record: Mapping[str, Any],
        config: Mapping[str, Any] | None,
    ) -> dict[str, bytes]:
        """Serialize the file."""
        return {"": safetensors_content(tensors, dtypes, {RECORD: json_text(record)})}


# -- LoKr's sizes --------------------------------------------------------------------------------


def _fit(update: ModuleUpdate, stored: Sequence[int]) -> ModuleUpdate | None:
    """Return the update in the form that LyCORIS loads, or None if it would infer wrong sizes."""
    size = kronecker_sizes_of(update, stored)
    if size is None:
        return None
    p, q, k, n = size
    first, last = update.parts
    low = isinstance(last, Pair) and is_low(last, size[2:], last.rank)
    parts: tuple[Pair | Float, ...] = (as_matrix(first), last if low else as_matrix(last))
    if are_both_low(update, size):
        parts = tuple(part.padded(update.rank) for part in update.parts if isinstance(part, Pair))
    last_shape = parts[1].shape if isinstance(parts[1], Pair) else (k, n, *stored[2:])
    factor = _inferred_factor((p, q), last_shape, isinstance(parts[1], Pair))
    if _factorization(stored[0], factor) != (p, k) or _factorization(stored[1], factor) != (q, n):
        return None
    return update._replace(parts=parts)


def _factorization(size: int, factor: int = -1) -> tuple[int, int]:
    """Return the sizes of a side in W1 and W2, as LyCORIS computes them."""
    small, large = sorted(factorization(size, factor))
    return small, large


def _inferred_factor(first: tuple[int, int], last: tuple[int, ...], low: bool) -> int:
    """Return the factor that LyCORIS infers from the tensors, where it counts a low-rank W2's kernel as channels."""
    rows, cols = first[0] * last[0], first[1] * last[1]
    if first == (_factorization(rows)[0], _factorization(cols)[0]):
        return -1
    first_factor, last_factor = max(first), max(last[:2] if low else last)
    for factor in (first_factor, last_factor):
        if rows % factor == cols % factor == 0 and factor in (first[0], last[0]) and factor in (first[1], last[1]):
            return factor
    return min(first_factor, last_factor)


# -- Reading -------------------------------------------------------------------------------------


def _read(container: Container, base: Base | None, part: str | None) -> ForeignAdapter:
    chosen, flat, dtypes = _modules(container, part)
    recorded = _recorded(container.metadata)
    updates, kinds = [], set[str]()
    paths: dict[str, str] = {}
    for name in flat:
        path = _path(name, base, recorded)
        if path in paths:
            raise FileError(f"{safe_repr(paths[path])} and {safe_repr(name)} are both of {safe_repr(path)}")
        paths[path] = name
    for path in sorted(paths, key=natural):
        tensors = flat[paths[path]]
        alpha = tensors.pop("alpha", None)
        update, shape = decode(path, tensors, functools.partial(_scale, path, alpha))
        kinds.add({"dense": "full"}.get(method := kind_of(path, tensors), method))
        if paths[path] in recorded:
            says = recorded[paths[path]][1]
            if (update.kind == "dense" and says != shape) or update.shape != (*says[:1], math.prod(says[1:])):
                raise FileError(
                    f"the tensors of {safe_repr(path)} make an update of {shape}, and the file's own record says {says}"
                )
            shape = says
        updates.append(TargetUpdate(target_of(path, shape, base), update))
    return ForeignAdapter(kinds.pop() if len(kinds) == 1 else "", updates, common_dtype(dtypes), part=chosen)


def _modules(container: Container, part: str | None) -> tuple[str, dict[str, dict[str, Float]], set[str]]:
    """Return the part that is read, its tensors by the modules' flat names and their own, and the factors' dtypes."""
    entries, modules, dtypes = container.entries, dict[str, dict[str, Float]](), set[str]()
    prefixes = {name: _PREFIXES.match(name) for name in entries}
    known = (*_SUFFIXES, *_REFUSED, "alpha")
    if unknown := [name for name in entries if prefixes[name] is None or name.partition(".")[2] not in known]:
        raise FileError(
            f"has tensors that do not belong to a LoRA, LoKr, LoHa or full difference: {summarize(unknown)}"
        )
    chosen = chosen_part(list(dict.fromkeys(match[1] for match in prefixes.values() if match)), part)
    for name, match in prefixes.items():
        if match is None or match[1] != chosen:
            continue
        flat, _, suffix = name.partition(".")
        array = widen(name, entries[name].dtype, container.array(name))
        if suffix in _REFUSED:
            if array.any() or suffix != "diff_b":
                raise FileError(f"{safe_repr(name)} cannot be converted: {_REFUSED[suffix]}")
            continue
        dtypes |= {DTYPES[entries[name].dtype]} if suffix != "alpha" else set()
        modules.setdefault(flat, {})[_SUFFIXES.get(suffix, suffix)] = array
    return chosen, modules, dtypes


def _scale(path: str, alpha: Float | None, rank: int | None) -> float:
    # LyCORIS' own rules: no alpha, or 0, means the rank, and LoKr with two full factors is not scaled.
    if alpha is None or rank is None:
        return 1.0
    if alpha.size != 1:
        raise FileError(f"alpha of {safe_repr(path)} must be one number; it has the shape {alpha.shape}")
    return float(alpha.reshape(())) / rank or 1.0


def _recorded(metadata: Mapping[str, str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the path and shape of each flat name from the record of a conversion; empty if there is none."""
    try:
        listed = json.loads(metadata.get(RECORD, "{}")).get(_MODULES, {})
        modules = {str(name): (str(path), tuple(map(int, shape))) for name, (path, shape) in listed.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {}
    return {name: module for name, module in modules.items() if _names(_PREFIXES.sub("", name, count=1), module[0])}


def _names(flat: str, path: str) -> bool:
    return flat in (path.replace(".", "_"), other_path(path).replace(".", "_"))


def _path(name: str, base: Base | None, recorded: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    flat = _PREFIXES.sub("", name, count=1)
    if base is not None:
        return base.named(flat, other_path(flat.replace("text_model_", "text_model.", 1)).replace(".", "_"))
    if name in recorded:
        return recorded[name][0]
    if "_" in flat:
        raise missing_base(name)
    return flat


# -- The format of kohya's scripts: LyCORIS's tensors under the names of their component -------------------------------


class KohyaFormat(LycorisFormat):
    """Files that kohya's scripts, diffusers and ComfyUI load; :class:`LycorisFormat` reads them."""

    library = "kohya"
    parts_written = (*PREFIXES, *COMPONENTS)
    _prefix = "lora_unet"

    def detect(self, path: str) -> None:
        """Leave files to the format of LyCORIS, which has the same tensors."""

    def choose_part(self, modules: Sequence[Module], part: str | None, source: str) -> None:
        """Choose the prefix, such as "lora_te2"."""
        self._prefix = written_prefix(self.name, part, source, [module.path for module in modules])

    def flat_name(self, path: str) -> str:
        """Return the name of a module in a file: the component's prefix, and underscores for dots."""
        return f"{self._prefix}_{stored_path(self._prefix, path).replace('.', '_')}"
