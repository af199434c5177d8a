"""The formats of PEFT and vLLM: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

``METHODS`` lists the classes that read PEFT's methods, which are imported on first use. Classes of methods with a
structure of their own also write it; LoRA, DoRA, HiRA, LoKr and LoHa of any adapter are written here.

Every tensor and setting of such a folder is either read exactly or rejected by name. PEFT loads written folders to the
same update.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar

import numpy as np

from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.checkpoints.lora_export import SERVED_EMBEDDING, SERVED_RANKS, served_rank
from tnadapt.errors import ConfigError, FileError, safe_repr, summarize
from tnadapt.plugins import Registry
from tnadapt.targets.target import Target

from . import _file_format, _files, _peft_lora
from ._base_model import Base
from ._file_format import EncodedAdapter, ExportChoice, FileFormat, ForeignAdapter, Json
from ._files import RECORD, Arrays, StoredFiles
from ._peft_content import CONFIG_NAME, PREFIX, TRANSPOSED, PeftMethod, is_saved
from ._peft_settings import config_of, origin_settings
from ._updates import Float, Module, ModuleUpdate, Pair, alpha_of, is_embedding, is_expert, uniform

# -- The methods: a new one is one more line here ----------------------------------------------------------------------

_WRITTEN = {
    "VERA": "_peft_shared_factors:PeftVera",
    "RANDLORA": "_peft_shared_factors:PeftRandLora",
    "FOURIERFT": "_peft_positions:PeftFourierFT",
    "WAVEFT": "_peft_positions:PeftWaveFT",
    "C3A": "_peft_positions:PeftC3a",
    "SHIRA": "_peft_positions:PeftShira",
    "MISS": "_peft_positions:PeftMiss",
    "UNILORA": "_peft_shared_factors:PeftUniLora",
    "TINYLORA": "_peft_shared_factors:PeftTinyLora",
}
_LOW_RANK = {name: f"_peft_lora:Peft{name.title()}" for name in ("LORA", "LOKR", "LOHA", "HIRA")}
_READ_ONLY = {"VBLORA": "_peft_shared_factors:PeftVbLora", "TRAINABLE_TOKENS": "_peft_lora:PeftTrainableTokens"}

METHODS: Registry[PeftMethod] = Registry(
    "method of PEFT",
    PeftMethod,
    {name: f"tnadapt.convert.{place}" for name, place in {**_LOW_RANK, **_WRITTEN, **_READ_ONLY}.items()},
)


# -- The format of PEFT ------------------------------------------------------------------------------------------------


_WEIGHTS = "adapter_model.safetensors"
_A = "lora_A.weight"

# PEFT's methods without the setting "bias".
_WITHOUT_BIASES = ("LOKR", "LOHA", "HIRA", "SHIRA")


class PeftFormat(FileFormat):
    """Folders saved by PEFT."""

    library = "PEFT"
    kinds: tuple[str, ...] = ("lora", "lokr", "loha")
    structures = tuple(map(str.lower, _WRITTEN))
    embeddings = transposed = ("lora",)
    applies: tuple[str, ...] = ("magnitude", "hadamard")
    kernels: Mapping[str, int] = {"lora": 3, "lokr": 2, "loha": 2}
    ties: ClassVar[bool] = True
    folder = (_WEIGHTS, CONFIG_NAME)
    no_kronecker = (
        "PEFT multiplies other axes where W2 of a one-dimensional convolution is full, as it is at this rank: "
        "give a lower rank, or to='lycoris-lokr' (--to lycoris-lokr)"
    )

    def detect(self, path: str) -> str | None:
        """Return the folder with ``adapter_config.json``: the path itself, or the folder of the weights at the path."""
        if os.path.isdir(path):
            if not os.path.exists(os.path.join(path, CONFIG_NAME)):
                return None
            _check_weights(path)
            return path
        names, folder = _files.foreign_tensor_names(path), os.path.dirname(path)
        if names is None:
            return None
        if os.path.basename(path) == _WEIGHTS and os.path.exists(os.path.join(folder, CONFIG_NAME)):
            return folder or "."
        if any(name.startswith(PREFIX) for name in names):
            raise FileError(
                f"has weights of a PEFT adapter, which cannot be read without {CONFIG_NAME}: give the folder that "
                f"has it and {_WEIGHTS}"
            )
        return None

    def read(self, files: StoredFiles, base: Base | None, part: str | None) -> ForeignAdapter:
        """Read the adapter of a folder; ``part`` does not apply."""
        config = files.json(CONFIG_NAME)
        peft_type = str(config.get("peft_type", "")).upper()
        if peft_type not in METHODS:
            got = safe_repr(config.get("peft_type"))
            raise FileError(f"peft_type is {got}; only {', '.join(METHODS)} can be converted")
        with files.container(_WEIGHTS) as container:
            return METHODS[peft_type]().load(container, config, base)

    def check_target(self, target: Target) -> None:
        """Allow heads tied to embeddings; raise ConfigError as usual for others."""
        super().check_target(_peft_lora.without_ties(target) if self.ties else target)

    def check_module(self, module: Module, kind: str) -> None:
        """Raise ConfigError unless PEFT has the method for the module."""
        if kind in self.structures:
            METHODS[kind.upper()]().check_module(module)
        else:
            super().check_module(module, kind)

    def check_adapter(self, modules: Sequence[Module], kept: Mapping[str, np.ndarray]) -> None:
        """Raise ConfigError for kept parameters of the model itself, or next to an adapted weight, but for biases."""
        for name in saved_whole(modules, kept):
            holder = name.rpartition(".")[0]
            inside = [m.path for m in modules if is_saved(f"{m.path}.weight", [holder])]
            if not holder or inside:
                what = f"the adapted weight of {safe_repr(inside[0])}" if inside else "the model itself"
                raise ConfigError(
                    f"PEFT saves whole modules, and cannot keep {safe_repr(name)} next to {what}: convert without it "
                    f"{_file_format.WITHOUT_KEPT}"
                )

    def fit_kronecker(self, updates: Sequence[ModuleUpdate], stored: Sequence[tuple[int, ...]]) -> ExportChoice | None:
        """Return LoKr updates with a common ``decompose_factor`` from which PEFT computes all of their sizes.

        ``decompose_both`` says whether W1 may consist of two factors. The rank decides which of W1 and W2 are full.
        """
        sizes = [_files.kronecker_sizes_of(update, shape) for update, shape in zip(updates, stored, strict=True)]
        known = [size for size in sizes if size is not None]
        factor = _files.decompose_factor(known, stored)
        if len(known) < len(sizes) or factor is None:
            return None
        both = all(_files.are_both_low(update, size) for update, size in zip(updates, known, strict=True))
        fitted, ranks = list[ModuleUpdate](), list[int]()
        for update, shape, size in zip(updates, stored, known, strict=True):
            fit = update._replace(parts=_files.parts_to_store(update, size, both))
            rank = fit.rank
            if not isinstance(fit.parts[1], Pair):
                if len(shape) == 3 and size[:2] != (1, 1):
                    return None  # for a Conv1d with a full W2, PEFT multiplies different axes
                rank = -(-max(size[2:]) // 2)  # the smallest rank for which PEFT uses a full W2
            fitted.append(fit)
            ranks.append(rank)
        return ExportChoice(fitted, ranks, True, {"decompose_factor": factor, "decompose_both": both})

    def encode(self, kind: str, modules: Sequence[Module], choice: ExportChoice, kept: Sequence[str]) -> EncodedAdapter:
        """Encode the tensors and ``adapter_config.json``."""
        plain = [module for module in modules if not is_expert(module)]
        tensors, transposed, sizes = dict[str, Float](), dict[str, bool](), dict[str, tuple[int, float]]()
        for module, update, rank in zip(modules, choice.updates, choice.ranks, strict=True):
            if is_expert(module):
                continue
            alpha = alpha_of([update.scale], rank)
            whole = update if alpha is not None else update.absorb_scale()
            factors = _files.encode(whole, module.stored, _A, "lora_B.weight")
            groups = module.targets[0][1].groups
            if groups > 1 and kind == "lora":
                factors[_A] = _files.spread_over_groups(factors[_A], groups)
                # PEFT divides alpha by the rank.
                rank, alpha = rank * groups, None if alpha is None else alpha * groups
            tensors |= {PREFIX + name: array for name, array in _peft_lora.encoded_embedding(module, factors).items()}
            paths = [module.path, *_peft_lora.tied_paths(module)]
            transposed |= dict.fromkeys(paths, module.transposed)
            sizes |= dict.fromkeys(paths, (rank, float(rank) if alpha is None else alpha))
        stacked, experts = _peft_lora.encoded_experts(modules, choice.updates)
        tensors |= {PREFIX + name: array for name, array in stacked.items()}
        config = config_of(kind, all(transposed.values()) and not experts, sizes, experts)
        config |= choice.settings | ({"ensure_weight_tying": True} if any(map(_peft_lora.tied_paths, plain)) else {})
        linear = [module.transposed for module in plain if not is_embedding(module) and len(module.stored) == 2]
        if kind == "lora" and linear:  # PEFT ignores it for embeddings and convolutions
            config["fan_in_fan_out"] = all(linear)
        if experts and config.get("fan_in_fan_out"):
            raise ConfigError(
                f"{safe_repr(plain[0].path)} is stored as (in, out), which PEFT takes for a setting of all weights and "
                "refuses for experts: convert an adapter of either"
            )
        record = {TRANSPOSED: transposed, _peft_lora.EXPERTS: _peft_lora.record_of(modules)}
        return EncodedAdapter(tensors, config=config, record=record)

    def encode_file(self, kind: str, modules: Sequence[Module], file: AdapterFile) -> EncodedAdapter:
        """Encode the tensors and settings of a method with a structure of its own."""
        return METHODS[kind.upper()]().encoded(modules, file)

    def applied(
        self, encoded: EncodedAdapter, modules: Sequence[Module], choice: ExportChoice, file: AdapterFile
    ) -> EncodedAdapter:
        """Encode DoRA, by rows, or HiRA; both next to LoRA's factors."""
        assert encoded.config is not None  # of encode
        apply = file.config.apply
        for module in modules:
            groups = module.targets[0][1].groups
            what = "an embedding" if is_embedding(module) else "one of the matrices of a parameter"
            if is_embedding(module) or is_expert(module):
                raise ConfigError(
                    f"{safe_repr(module.place)} is {what}, and apply={apply!r} of it is not written for "
                    f"{self.library}: {_file_format.MERGE}"
                )
            if groups > 1:
                raise ConfigError(
                    f"{safe_repr(module.path)} is a convolution in {groups} groups: {_peft_lora.NO_GROUPS}; "
                    f"{_file_format.MERGE}"
                )
        if apply == "magnitude":
            magnitudes = {f"{PREFIX}{m.path}.{_peft_lora.MAGNITUDES[0]}": _magnitude_of(m, file) for m in modules}
            return encoded._replace(tensors=encoded.tensors | magnitudes, config={**encoded.config, "use_dora": True})
        # HiRA has no alpha, and PEFT ignores its rank_pattern.
        updates = uniform(choice.updates)
        tensors = {
            f"{PREFIX}{module.path}.{name}": array
            for module, update in zip(modules, updates, strict=True)
            for name, array in _files.encode(update, module.stored, "hira_A", "hira_B").items()
        }
        left_out = ("lora_alpha", "alpha_pattern", "bias", "rank_pattern")
        config = {key: value for key, value in encoded.config.items() if key not in left_out}
        return encoded._replace(tensors=tensors, config={**config, "r": updates[0].rank, "peft_type": "HIRA"})

    def completed(
        self, encoded: EncodedAdapter, modules: Sequence[Module], file: AdapterFile, base: Base | None
    ) -> EncodedAdapter:
        """Name the base and its task; write biases by the setting ``bias``, and all else by ``modules_to_save``."""
        encoded = self._with_kept(encoded, modules, file, base)
        config = encoded.config or {}
        return encoded._replace(config=config | origin_settings(file.pretrained, config.get("modules_to_save")))

    def _with_kept(
        self, encoded: EncodedAdapter, modules: Sequence[Module], file: AdapterFile, base: Base | None
    ) -> EncodedAdapter:
        unclear = [m.path for m in modules if is_embedding(m) and not m.targets[0][1].tied and m.name not in file.ties]
        if unclear and base is not None and base.unknown_heads:
            raise ConfigError(
                f"base ties an embedding to its output head, and the adapter's file does not say whether an update of "
                f"{safe_repr(unclear[0])} is one of both: load it with keep_tied=True, or with untie=True, and save it "
                "again, so that the file says so"
            )
        if not file.kept:
            return encoded
        config = dict(encoded.config or {})
        whole = saved_whole(modules, file.kept)
        biases = [name for name in file.kept if name not in whole]
        adapted = {f"{path}.bias": path for module in modules for path in (module.path, *_peft_lora.tied_paths(module))}
        if biases and config["peft_type"] in _WITHOUT_BIASES:
            raise ConfigError(
                f"PEFT's {config['peft_type']} trains no biases, and the adapter keeps {summarize(biases)}: "
                f"{_file_format.TO_PEFT_LORA}, or without them {_file_format.WITHOUT_KEPT}"
            )
        names = {name: [name, *file.ties.get(name, ())] for name in file.kept}
        saved = sorted({key.rpartition(".")[0] for name in whole for key in names[name]})
        every = {key for keys in names.values() for key in keys}
        missing = [name for name in (base.tensors if base else ()) if is_saved(name, saved) and name not in every]
        if missing:
            raise ConfigError(
                f"PEFT saves whole modules, by the ends of their names: with {summarize(whole)} it needs "
                f"{summarize(missing)}, which the adapter does not keep. Train all of them by keep_trainable, or "
                f"convert without {_file_format.WITHOUT_KEPT}"
            )
        if biases:
            config["bias"] = "all" if config["peft_type"] != "LORA" or set(biases) - adapted.keys() else "lora_only"
        if config["peft_type"] == "LORA" and any(len(names[name]) > 1 for name in whole):
            config["ensure_weight_tying"] = True
        layers = {name: [f"{adapted[name]}.base_layer.bias"] for name in biases if name in adapted}
        stored = {name: [PREFIX + key for key in keys] for name, keys in (names | layers).items()}
        return encoded._replace(config={**config, "modules_to_save": saved or None}, kept_names=stored)

    def write(self, tensors: Arrays, dtypes: Mapping[str, str], record: Json, config: Json | None) -> dict[str, bytes]:
        """Serialize the weights and the settings."""
        # Some loaders require the entry "pt".
        content = _files.safetensors_content(tensors, dtypes, {RECORD: _files.json_text(record), "format": "pt"})
        return {_WEIGHTS: content, CONFIG_NAME: (_files.json_text(config, indent=2) + "\n").encode()}


def saved_whole(modules: Sequence[Module], kept: Collection[str]) -> list[str]:
    """Return the kept parameters other than biases of adapted layers, and of layers of which nothing else is kept."""
    adapted = {path for module in modules for path in (module.path, *_peft_lora.tied_paths(module))}
    holders = Counter(name.rpartition(".")[0] for name in kept)

    def is_bias(name: str) -> bool:
        holder, _, last = name.rpartition(".")
        return last == "bias" and (holder in adapted or holders[holder] == 1)

    return [name for name in kept if not is_bias(name)]


def _magnitude_of(module: Module, file: AdapterFile) -> Float:
    """Return the magnitudes of the rows of a module's weight in PEFT's shape."""
    ((number, target), *others) = module.targets
    if others or target.rows is not None:
        raise ConfigError(
            f"{safe_repr(module.path)} has magnitudes of some of its rows only, and other libraries have one for each "
            f"row of a weight: {_file_format.MERGE}"
        )
    (name,) = file.plan.weight_param_names[number]
    magnitude: Float = file.arrays[name].astype(np.float64)
    kernel = len(module.stored) - 2
    return magnitude.reshape(1, -1, *[1] * kernel) if kernel else magnitude.reshape(-1)


def _check_weights(folder: str) -> None:
    if os.path.exists(os.path.join(folder, _WEIGHTS)):
        return
    if os.path.exists(os.path.join(folder, "adapter_model.bin")):
        raise _files.pickle_error()
    raise FileError(f"has {CONFIG_NAME} and no {_WEIGHTS} next to it")


# -- The format that vLLM serves: LoRA with one rank that vLLM takes, and a scale of 1 ---------------------------------


# The only modules, those of classification models, that vLLM loads whole next to LoRA.
_HEADS = ("classifier", "score")


class VllmFormat(PeftFormat):
    """PEFT folders that vLLM serves; :class:`PeftFormat` reads them.

    vLLM sets aside ``max_lora_rank`` columns for each adapter, one of a short list. Releases before ``rank_pattern``
    took one α / r for all modules, so that here all factors have one rank, and α equals it.
    """

    library = "vLLM"
    kinds = ("lora",)
    structures = applies = ()
    kernels: Mapping[str, int] = {}
    ties = False

    def detect(self, path: str) -> None:
        """Leave folders to the format of PEFT."""

    def check_module(self, module: Module, kind: str) -> None:
        """Raise ConfigError for convolutions, and for embeddings that vLLM does not look up in an adapter."""
        super().check_module(module, kind)
        if is_embedding(module) and module.path.rpartition(".")[2] != SERVED_EMBEDDING:
            raise ConfigError(
                f"{safe_repr(module.path)} is an embedding, and vLLM has LoRA only of those named {SERVED_EMBEDDING}: "
                f"{_file_format.MERGE}"
            )

    def check_adapter(self, modules: Sequence[Module], kept: Mapping[str, np.ndarray]) -> None:
        """Raise ConfigError for kept parameters other than those of a classification head."""
        super().check_adapter(modules, kept)
        whole = saved_whole(modules, kept)
        other = [name for name in kept if name not in whole or name.rpartition(".")[0] not in _HEADS]
        if other:
            raise ConfigError(
                f"besides LoRA, vLLM loads only trained modules named {' or '.join(_HEADS)}, and this adapter has "
                f"{summarize(other)}: convert without them {_file_format.WITHOUT_KEPT}"
            )

    def encode(self, kind: str, modules: Sequence[Module], choice: ExportChoice, kept: Sequence[str]) -> EncodedAdapter:
        """Encode the tensors and ``adapter_config.json``, padded to the next rank that vLLM takes."""
        most = max(choice.ranks)
        rank = served_rank(most)
        if rank is None:
            raise ConfigError(
                f"the LoRA of this adapter has rank {most}, and vLLM takes ranks up to {SERVED_RANKS[-1]}: give rank= "
                f"(--rank) and max_error= (--max-error) for an approximation of lower rank, or {_file_format.MERGE}"
            )
        padded = choice._replace(updates=uniform(choice.updates, rank), ranks=[rank] * len(modules))
        return super().encode(kind, modules, padded, kept)
