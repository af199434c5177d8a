"""The formats of LyCORIS and of kohya's scripts: LoRA, LoKr, LoHa and full differences in one safetensors file.

Every tensor of such a file is either read exactly or rejected by name. LyCORIS loads written files to the same update.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from tnadapt.checkpoints.container import Container
from tnadapt.errors import ConfigError, FileError, safe_repr
from tnadapt.targets.roles import natural

from . import _files
from ._base_model import Base, missing_base, target_of
from ._diffusers_format import COMPONENTS, PREFIXES, one_number, other_path, stored_modules, stored_path, written_prefix
from ._file_format import EncodedAdapter, ExportChoice, FileFormat, ForeignAdapter, Json
from ._files import DIFF, LOHA, LOKR, RECORD, Arrays, StoredFiles
from ._updates import Float, Module, ModuleUpdate, Pair, TargetUpdate, alpha_of

# -- The format of LyCORIS ---------------------------------------------------------------------------------------------


# Entry of a conversion's record with the modules' paths and shapes. A file that has it can be read without a base.
_MODULES = "modules"

_PARTS = r"lycoris|lora_unet|lora_te\d?|lora_transformer|lora_prior_unet"
_PREFIXES = re.compile(rf"({_PARTS})_")
_SUFFIXES = {"lora_down.weight": "lora_down", "lora_up.weight": "lora_up", "lora_mid.weight": "lora_mid"}
_SUFFIXES |= {name: name for name in (*LOKR, *LOHA, *DIFF, "alpha")}
_REFUSED = {
    "dora_scale": "DoRA scales the sum of weight and update",
    "diff_b": "the change of a bias, which an adapter file does not hold",
    "w_norm": "the change of a normalization",
    "b_norm": "the change of a normalization",
    "scalar": "a scale that is trained",
}
_ENDS = "|".join(map(re.escape, _SUFFIXES | _REFUSED))
_NAME = re.compile(rf"(?P<path>(?P<part>{_PARTS})_[^.]*)\.(?P<suffix>{_ENDS})")


class LycorisFormat(FileFormat):
    """Files saved by LyCORIS and kohya's scripts, which write the dots of a module's path as underscores."""

    library = "LyCORIS"
    kinds = ("lora", "lokr", "loha", "full")
    kernels = dict.fromkeys(kinds, 3)
    parts_read = (*PREFIXES, *COMPONENTS, "lycoris")

    def flat_name(self, path: str) -> str:
        """Return the name of a module in a file, with underscores for dots."""
        return f"lycoris_{path.replace('.', '_')}"

    def detect(self, path: str) -> str | None:
        """Return the path if the names of the file's tensors are those of LyCORIS or kohya."""
        return path if any(map(_PREFIXES.match, _files.foreign_tensor_names(path) or ())) else None

    def read(self, files: StoredFiles, base: Base | None, part: str | None) -> ForeignAdapter:
        """Read the adapter of a file; ``part`` is one of its prefixes, such as "lora_unet"."""
        with files.container() as container:
            return _read(container, base, part)

    def check_adapter(self, modules: Sequence[Module], kept: Mapping[str, np.ndarray]) -> None:
        """Raise ConfigError for paths that map to the same name, and for parameters trained alongside the adapter."""
        names = dict[str, str]()
        for module in modules:
            name = self.flat_name(module.path)
            if name in names:
                raise ConfigError(
                    f"LyCORIS writes dots as underscores, and {safe_repr(names[name])} and {safe_repr(module.path)} "
                    "would have one name: it cannot adapt both"
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
            arrays = _files.encode(update, module.stored, "lora_down.weight", "lora_up.weight")
            tensors |= {f"{name}.{key}": array for key, array in arrays.items()}
            if update.kind != "dense":
                # Stored in float32, because bfloat16 rounds integers from 257 on.
                alphas[f"{name}.alpha"] = np.asarray(alpha)
        listed = {self.flat_name(module.path): [module.path, list(module.stored)] for module in modules}
        return EncodedAdapter(tensors, alphas, record={_MODULES: listed})

    def write(self, tensors: Arrays, dtypes: Mapping[str, str], record: Json, config: Json | None) -> dict[str, bytes]:
        """Serialize the file."""
        return {"": _files.safetensors_content(tensors, dtypes, {RECORD: _files.json_text(record)})}


# -- LoKr's sizes --------------------------------------------------------------------------------


def _fit(update: ModuleUpdate, stored: Sequence[int]) -> ModuleUpdate | None:
    """Return the update in the form that LyCORIS loads, or None if it would infer wrong sizes."""
    size = _files.kronecker_sizes_of(update, stored)
    if size is None:
        return None
    p, q, k, n = size
    parts = _files.parts_to_store(update, size, _files.are_both_low(update, size))
    last_shape = parts[1].shape if isinstance(parts[1], Pair) else (k, n, *stored[2:])
    factor = _inferred_factor((p, q), last_shape, isinstance(parts[1], Pair))
    if _factorization(stored[0], factor) != (p, k) or _factorization(stored[1], factor) != (q, n):
        return None
    return update._replace(parts=parts)


def _factorization(size: int, factor: int = -1) -> tuple[int, int]:
    """Return the sizes of a side in W1 and W2, as LyCORIS computes them."""
    small, large = sorted(_files.factorization(size, factor))
    return small, large


def _inferred_factor(first: tuple[int, int], last: tuple[int, ...], low: bool) -> int:
    """Return the factor that LyCORIS infers from the tensors, counting the kernel of a low-rank W2 as channels."""
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
    what = "a LoRA, LoKr, LoHa or full difference"
    chosen, modules, dtype = stored_modules(container, _NAME, part, what, _SUFFIXES, _REFUSED)
    recorded = _recorded(container.metadata)
    paths: dict[str, str] = {}
    for name in modules:
        path = _path(name, base, recorded)
        if path in paths:
            raise FileError(f"{safe_repr(paths[path])} and {safe_repr(name)} are both of {safe_repr(path)}")
        paths[path] = name
    updates, kinds = [], set[str]()
    for path in sorted(paths, key=natural):
        name = paths[path]
        alpha = modules[name].pop("alpha", None)
        update, shape, rank = _files.decode(path, modules[name])
        # LyCORIS' own rules: no alpha, or 0, means the rank, and LoKr with two full factors is not scaled.
        if alpha is not None and rank is not None:
            update = update._replace(scale=one_number(path, alpha) / rank or 1.0)
        kinds.add("full" if update.kind == "dense" else update.kind)
        if name in recorded:
            says = recorded[name][1]
            if (update.kind == "dense" and says != shape) or update.shape != (*says[:1], math.prod(says[1:])):
                raise FileError(
                    f"the tensors of {safe_repr(path)} make an update of {shape}, and the file's own record says {says}"
                )
            shape = says
        updates.append(TargetUpdate(target_of(path, shape, base), update))
    return ForeignAdapter(kinds.pop() if len(kinds) == 1 else "", updates, dtype, part=chosen)


def _recorded(metadata: Mapping[str, str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the path and shape of each flat name from the record of a conversion; empty if there is none."""
    try:
        listed = _files.recorded(metadata, _MODULES, list)
        modules = {name: (str(path), tuple(map(int, shape))) for name, (path, shape) in listed.items()}
    except (ValueError, TypeError):
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
