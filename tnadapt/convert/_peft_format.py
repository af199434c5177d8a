"""The formats of PEFT and vLLM: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

LoRA, DoRA, HiRA, LoKr, LoHa and TrainableTokens are here; ``METHODS`` lists the classes of methods with a structure of
their own.

Every tensor and setting of such a folder is either read exactly or rejected by name. PEFT loads written folders to the
same update.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from tnadapt.checkpoints.adapter_file import AdapterFile
from tnadapt.checkpoints.container import DTYPES, Container
from tnadapt.checkpoints.lora_export import SERVED_EMBEDDING, SERVED_RANKS, served_rank
from tnadapt.checkpoints.pretrained_model import Pretrained
from tnadapt.errors import ConfigError, FileError, safe_repr, summarize
from tnadapt.targets.roles import natural
from tnadapt.targets.target import Target

from ._base_model import Base, target_of
from ._file_format import Application, EncodedAdapter, ExportChoice, FileFormat, ForeignAdapter, not_additive
from ._files import (
    LOHA,
    LOKR,
    RECORD,
    StoredFiles,
    are_both_low,
    decode,
    decompose_factor,
    encode,
    foreign_tensor_names,
    is_low,
    json_text,
    kind_of,
    kronecker_sizes_of,
    pickle_error,
    safetensors_content,
    spread_over_groups,
    without_groups,
)
from ._peft_content import (
    CONFIG_NAME,
    PREFIX,
    TRANSPOSED,
    OwnStructure,
    PeftContent,
    PeftMethod,
    check_transposed,
    is_conv1d,
    is_saved,
    other_tensors,
    recorded,
)
from ._peft_lora import (
    EMBEDDING,
    EXPERTS,
    TOKENS,
    as_embedding,
    decoded_embedding,
    decoded_experts,
    decoded_tokens,
    encoded_embedding,
    encoded_experts,
    is_embedding,
    is_expert,
    is_head,
    joined_ties,
    record_of,
    separate_rows,
    tied_paths,
    without_ties,
)
from ._peft_positions import FEW_VALUES
from ._peft_settings import LOW_RANK, PeftSettings, config_of, origin_settings, settings_of
from ._peft_shared_factors import SHARED_FACTORS
from ._updates import Float, Module, ModuleUpdate, Pair, TargetUpdate, alpha_of, as_matrix, common_dtype, uniform, widen

__all__ = ["METHODS", "PeftFormat", "VllmFormat"]


# -- TrainableTokens: rows of an embedding that were trained for single tokens, and nothing else -----------------------


_TENSOR = "trainable_tokens_delta"


class PeftTrainableTokens(PeftMethod):
    """New rows, which replace those of the base; written as LoRA."""

    title = "Trainable_Tokens"
    peft_type = "TRAINABLE_TOKENS"
    tensors = (_TENSOR,)
    fields = ("token_indices", "init_weights", "ensure_weight_tying")
    writable = False

    def read(self, content: PeftContent) -> OwnStructure:
        """Read the rows; an update is their difference from the base's."""
        content.require_modules()
        rows = {path: content.tensor(path, _TENSOR, 2) for path in content.modules}
        found = decoded_tokens(rows, content.config.get("token_indices"), content.base)
        return OwnStructure(
            [one.target for one in found], updates=[one.update for one in found],
            alone=separate_rows(found, content.base),
        )  # fmt: skip


# -- Methods with a structure of their own -----------------------------------------------------------------------------


METHODS: dict[str, PeftMethod] = {
    method.peft_type: method for method in (*SHARED_FACTORS, *FEW_VALUES, PeftTrainableTokens())
}


# -- The format of PEFT ------------------------------------------------------------------------------------------------


_WEIGHTS = "adapter_model.safetensors"
_A = "lora_A.weight"
_NO_GROUPS = "PEFT's DoRA of it takes the norms of other numbers than the weight's, and it has no HiRA"

# Maps suffixes of names in the file to the names under which the tensors are decoded.
_SUFFIXES = {"lora_A.weight": "lora_down", "lora_B.weight": "lora_up"} | {name: name for name in (*LOKR, *LOHA)}
# Those of HiRA are not in "LORA" adapters, nor the others in "HIRA" ones.
_HIRA = {"hira_A": "lora_down", "hira_B": "lora_up"}
_NAMES = {"magnitude": "DoRA", "hadamard": "HiRA"}
_MAGNITUDES = ("lora_magnitude_vector", "lora_magnitude_vector.weight")
_REFUSED = {
    "lora_A.bias": "a bias",
    "lora_B.bias": "it adds to the layer's bias, which is not in the file",
    "trainable_tokens_delta": "rows of an embedding, of a method of their own",
}


# PEFT's methods without the setting "bias".
_WITHOUT_BIASES = ("LOKR", "LOHA", "HIRA", "SHIRA")


class PeftFormat(FileFormat):
    """Folders saved by PEFT."""

    library = "PEFT"
    kinds: tuple[str, ...] = ("lora", "lokr", "loha")
    structures = tuple(name.lower() for name, method in METHODS.items() if method.writable)
    embeddings = ("lora",)
    ties: ClassVar[bool] = True
    folder = (_WEIGHTS, CONFIG_NAME)
    no_attention = "its LoRA layer of nn.MultiheadAttention adds the update of the output projection twice"
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
        names, folder = foreign_tensor_names(path), os.path.dirname(path)
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
        kind = str(config.get("peft_type", "")).upper()
        if kind in METHODS:
            with files.container(_WEIGHTS) as container:
                return METHODS[kind].load(container, config, base)
        if kind not in LOW_RANK:
            known = ", ".join((*LOW_RANK, *METHODS))
            raise FileError(f"peft_type is {safe_repr(config.get('peft_type'))}; only {known} can be converted")
        settings = settings_of(config)
        with files.container(_WEIGHTS) as container:
            return _read(container, settings, base)

    def check_target(self, target: Target) -> None:
        """Allow the matrices of experts, and heads tied to embeddings; raise ConfigError as usual for others."""
        if target.index is None:
            super().check_target(without_ties(target) if self.ties else target)

    def check_module(self, module: Module, kind: str) -> None:
        """Raise ConfigError for kernels with too many axes and, except for LoRA, for weights stored as (in, out)."""
        if kind in self.structures:
            METHODS[kind.upper()].check_module(module)
            return
        if module.transposed and kind != "lora":
            raise ConfigError(
                f"{safe_repr(module.path)} is stored as (in, out), and PEFT has no {kind} for such a layer; convert to "
                "'peft-lora'"
            )
        axes, most = len(module.stored) - 2, 3 if kind == "lora" else 2
        if axes > most:
            raise ConfigError(
                f"{safe_repr(module.path)} has a kernel of {axes} dimensions, and PEFT has {kind} only for up to {most}"
            )

    def check_adapter(self, modules: Sequence[Module], kept: Mapping[str, np.ndarray]) -> None:
        """Raise ConfigError for kept parameters of the model itself, or next to an adapted weight, but for biases."""
        for name in saved_whole(modules, kept):
            holder = name.rpartition(".")[0]
            inside = [m.path for m in modules if is_saved(f"{m.path}.weight", [holder])]
            if not holder or inside:
                what = f"the adapted weight of {safe_repr(inside[0])}" if inside else "the model itself"
                raise ConfigError(
                    f"PEFT saves whole modules, and cannot keep {safe_repr(name)} next to {what}: convert without it "
                    "by without_kept=True (--without-kept)"
                )

    def fit_kronecker(self, updates: Sequence[ModuleUpdate], stored: Sequence[tuple[int, ...]]) -> ExportChoice | None:
        """Return LoKr updates with a common ``decompose_factor`` from which PEFT computes all of their sizes.

        ``decompose_both`` says whether W1 may consist of two factors. The rank decides which of W1 and W2 are full.
        """
        sizes = [kronecker_sizes_of(update, shape) for update, shape in zip(updates, stored, strict=True)]
        known = [size for size in sizes if size is not None]
        factor = decompose_factor(known, stored)
        if len(known) < len(sizes) or factor is None:
            return None
        both = all(are_both_low(update, size) for update, size in zip(updates, known, strict=True))
        fitted, ranks = list[ModuleUpdate](), list[int]()
        for update, shape, size in zip(updates, stored, known, strict=True):
            first, last = update.parts
            parts: tuple[Pair | Float, ...]
            if both:
                rank = update.rank
                parts = tuple(part.padded(rank) for part in update.parts if isinstance(part, Pair))
            elif isinstance(last, Pair) and is_low(last, size[2:], last.rank):
                rank, parts = last.rank, (as_matrix(first), last)
            elif len(shape) == 3 and size[:2] != (1, 1):
                return None  # for a Conv1d with a full W2, PEFT multiplies different axes
            else:
                rank = -(-max(size[2:]) // 2)  # the smallest rank for which PEFT uses a full W2
                parts = as_matrix(first), as_matrix(last)
            fitted.append(update._replace(parts=parts))
            ranks.append(rank)
        return ExportChoice(fitted, ranks, True, {"decompose_factor": factor, "decompose_both": both})

    def encode(self, kind: str, modules: Sequence[Module], choice: ExportChoice, kept: Sequence[str]) -> EncodedAdapter:
        """Encode the tensors and ``adapter_config.json``."""
        places = [place for place, module in enumerate(modules) if not is_expert(module)]
        plain = [modules[place] for place in places]
        tensors, ranks, alphas, transposed = dict[str, Float](), list[int](), list[float](), dict[str, bool]()
        for place in places:
            module, update, rank = modules[place], choice.updates[place], choice.ranks[place]
            alpha = alpha_of([update.scale], rank)
            whole = update if alpha is not None else update.absorb_scale()
            own = encode(whole, module.stored, _A, "lora_B.weight")
            if (groups := _groups_of(module)) > 1 and kind == "lora":
                own[_A] = spread_over_groups(own[_A], groups)
                # PEFT divides alpha by the rank.
                rank, alpha = rank * groups, None if alpha is None else alpha * groups
            tensors |= {PREFIX + name: array for name, array in encoded_embedding(module, own).items()}
            paths = [module.path, *tied_paths(module)]
            transposed |= dict.fromkeys(paths, module.transposed)
            alphas += [float(rank) if alpha is None else alpha] * len(paths)
            ranks += [rank] * len(paths)
        experts = encoded_experts(modules, choice.updates)
        tensors |= {PREFIX + name: array for name, array in experts.tensors.items()}
        ranks += experts.ranks.values()
        names = transposed | dict.fromkeys(experts.ranks, False)
        config = config_of(kind, names, ranks, [*alphas, *experts.alphas.values()], list(experts.ranks))
        config |= choice.settings | ({"ensure_weight_tying": True} if any(map(tied_paths, plain)) else {})
        linear = [module.transposed for module in plain if not is_embedding(module) and len(module.stored) == 2]
        if kind == "lora" and linear:  # PEFT does not ask it of embeddings and convolutions
            config["fan_in_fan_out"] = all(linear)
        if experts.ranks and config.get("fan_in_fan_out"):
            raise ConfigError(
                f"{safe_repr(plain[0].path)} is stored as (in, out), which PEFT takes for a setting of all weights and "
                "refuses for experts: convert an adapter of either"
            )
        record = {TRANSPOSED: transposed, EXPERTS: record_of(modules)}
        notes = _unknown_groups(plain) if kind == "lora" else ()
        return EncodedAdapter(tensors, config=config, record=record, notes=notes)

    def encode_file(self, kind: str, modules: Sequence[Module], file: AdapterFile) -> EncodedAdapter:
        """Encode the tensors and settings of a method with a structure of its own."""
        return METHODS[kind.upper()].encoded(modules, file)

    def check_applied(self, kind: str, apply: str, magnitude_axis: str) -> None:
        """Allow HiRA, and DoRA by rows."""
        if kind != "lora" or not (apply == "hadamard" or (apply == "magnitude" and magnitude_axis == "rows")):
            raise not_additive(apply, f"{self.name}-{kind}")

    def applied(
        self,
        encoded: EncodedAdapter,
        kind: str,
        modules: Sequence[Module],
        choice: ExportChoice,
        application: Application,
    ) -> EncodedAdapter:
        """Encode DoRA, by rows, or HiRA; both next to LoRA's factors."""
        assert encoded.config is not None  # of encode
        grouped = next((module for module in modules if _groups_of(module) > 1), None)
        if grouped is not None:
            raise ConfigError(
                f"{safe_repr(grouped.path)} is a convolution in {_groups_of(grouped)} groups: {_NO_GROUPS}; merge the "
                "adapter into the base with tnadapt.merge (tnadapt merge)"
            )
        other = next((module for module in modules if is_embedding(module) or is_expert(module)), None)
        if other is not None:
            what = "one of the matrices of a parameter" if is_expert(other) else "an embedding"
            raise ConfigError(
                f"{safe_repr(other.place)} is {what}, and apply={application.apply!r} of it is not written for "
                f"{self.library}: merge the adapter into the base with tnadapt.merge (tnadapt merge)"
            )
        if kind == "lora" and application.apply == "magnitude" and application.magnitude_axis == "rows":
            found = {
                f"{PREFIX}{m.path}.{_MAGNITUDES[0]}": application.magnitudes[m.path].reshape(
                    (1, -1, *[1] * (len(m.stored) - 2)) if len(m.stored) > 2 else (-1,)
                )
                for m in modules
            }
            return encoded._replace(tensors=encoded.tensors | found, config={**encoded.config, "use_dora": True})
        if kind == "lora" and application.apply == "hadamard":
            tensors, most = dict[str, Float](), max(choice.ranks)
            for module, update, rank in zip(modules, choice.updates, choice.ranks, strict=True):
                # HiRA has no alpha: a scale that encode() left to it goes into B. PEFT ignores its rank_pattern: zeros
                # make all factors of one rank.
                scale = 1.0 if alpha_of([update.scale], rank) is None else update.scale
                name = PREFIX + module.path
                a, b = (encoded.tensors[f"{name}.lora_{which}.weight"] for which in "AB")
                tensors[f"{name}.hira_A"] = _wider(a, 0, most)
                tensors[f"{name}.hira_B"] = _wider(b * scale, 1, most)
            left_out = ("lora_alpha", "alpha_pattern", "bias", "rank_pattern")
            config = {key: value for key, value in encoded.config.items() if key not in left_out}
            return encoded._replace(tensors=tensors, config={**config, "r": most, "peft_type": "HIRA"})
        return super().applied(encoded, kind, modules, choice, application)

    def of_base(self, encoded: EncodedAdapter, about: Pretrained | None) -> EncodedAdapter:
        """Name the base and its task for ``AutoPeftModel``."""
        config = encoded.config or {}
        return encoded._replace(config={**config, **origin_settings(about, config.get("modules_to_save"))})

    def with_kept(
        self, encoded: EncodedAdapter, modules: Sequence[Module], file: AdapterFile, base: Base | None
    ) -> EncodedAdapter:
        """Write biases by the setting ``bias``, and all else by ``modules_to_save``."""
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
        adapted = {f"{path}.bias": path for module in modules for path in (module.path, *tied_paths(module))}
        if biases and config["peft_type"] in _WITHOUT_BIASES:
            raise ConfigError(
                f"PEFT's {config['peft_type']} trains no biases, and the adapter keeps {summarize(biases)}: convert "
                "to 'peft-lora' (--to peft-lora), or without them by without_kept=True (--without-kept)"
            )
        names = {name: [name, *file.ties.get(name, ())] for name in file.kept}
        saved = sorted({one.rpartition(".")[0] for name in whole for one in names[name]})
        every = {one for own in names.values() for one in own}
        missing = [name for name in (base.tensors if base else ()) if is_saved(name, saved) and name not in every]
        if missing:
            raise ConfigError(
                f"PEFT saves whole modules, by the ends of their names: with {summarize(whole)} it needs "
                f"{summarize(missing)}, which the adapter does not keep. Train all of them by keep_trainable, or "
                "convert without by without_kept=True (--without-kept)"
            )
        if biases:
            config["bias"] = "all" if config["peft_type"] != "LORA" or set(biases) - adapted.keys() else "lora_only"
        if config["peft_type"] == "LORA" and any(len(names[name]) > 1 for name in whole):
            config["ensure_weight_tying"] = True
        layers = {name: [f"{adapted[name]}.base_layer.bias"] for name in biases if name in adapted}
        stored = {name: [PREFIX + one for one in own] for name, own in (names | layers).items()}
        return encoded._replace(config={**config, "modules_to_save": saved or None}, kept_names=stored)

    def kept_name(self, name: str) -> str:
        """Return the name of a tensor of ``modules_to_save``."""
        return PREFIX + name

    def write(
        self,
        tensors: Mapping[str, np.ndarray],
        dtypes: Mapping[str, str],
        record: Mapping[str, Any],
        config: Mapping[str, Any] | None,
    ) -> dict[str, bytes]:
        """Serialize the weights and the settings."""
        # Some loaders require the entry "pt".
        content = safetensors_content(tensors, dtypes, {RECORD: json_text(record), "format": "pt"})
        return {_WEIGHTS: content, CONFIG_NAME: (json_text(config, indent=2) + "\n").encode()}


def saved_whole(modules: Sequence[Module], kept: Collection[str]) -> list[str]:
    """Return the kept parameters other than biases of adapted layers, and of layers of which nothing else is kept."""
    adapted = {path for module in modules for path in (module.path, *tied_paths(module))}
    holders = Counter(name.rpartition(".")[0] for name in kept)

    def is_bias(name: str) -> bool:
        holder, _, last = name.rpartition(".")
        return last == "bias" and (holder in adapted or holders[holder] == 1)

    return [name for name in kept if not is_bias(name)]


def _groups_of(module: Module) -> int:
    """Return in how many groups the channels of a convolution are."""
    return module.targets[0][1].groups


def _unknown_groups(modules: Sequence[Module]) -> tuple[str, ...]:
    """Return a remark if the channels of a convolution may be in groups, of which nothing says how many."""
    paths = [one.path for one in modules if len(one.stored) > 2 and _groups_of(one) == 1 and one.stored[0] > 1]
    if not paths:
        return ()
    return (
        f"{summarize(paths)} written as convolutions without groups, as the adapter records none: if the model has "
        "groups there, PEFT refuses the folder. Then load the adapter onto the model by tnadapt.torch.load, save it "
        "again, which records them, and convert that file",
    )


def _wider(factor: Float, axis: int, rank: int) -> Float:
    """Pad a factor with zeros to a rank."""
    widths = [(0, rank - size if place == axis else 0) for place, size in enumerate(factor.shape)]
    return np.pad(factor, widths)


def _check_weights(folder: str) -> None:
    if os.path.exists(os.path.join(folder, _WEIGHTS)):
        return
    if os.path.exists(os.path.join(folder, "adapter_model.bin")):
        raise pickle_error()
    raise FileError(f"has {CONFIG_NAME} and no {_WEIGHTS} next to it")


# -- Reading the weights -------------------------------------------------------------------------


def _read(container: Container, settings: PeftSettings, base: Base | None) -> ForeignAdapter:
    """Read the adapter of an open file of weights."""
    modules: dict[str, dict[str, Float]] = {}
    dtypes, unread, linear = set[str](), list[str](), set[str]()
    magnitudes, hira = dict[str, Float](), settings.apply == "hadamard"
    embeddings, tokens = dict[str, list[str]](), dict[str, Float]()
    for name, entry in container.entries.items():
        path, suffix = _split_name(name)
        if suffix in (*EMBEDDING, TOKENS) and settings.apply != "add":
            raise FileError(
                f"{safe_repr(path)} is an embedding next to layers with {_NAMES[settings.apply]}, which an embedding "
                "cannot have here: merge the adapter with PEFT, and extract one from the merged weights"
            )
        if suffix in EMBEDDING and settings.kind == "lora":
            array = widen(name, entry.dtype, container.array(name))
            modules.setdefault(path, {})[EMBEDDING[suffix]] = decoded_embedding(suffix, array)
            embeddings.setdefault(path, []).append(suffix)
            dtypes.add(DTYPES[entry.dtype])
        elif suffix in (_HIRA if hira else _SUFFIXES):
            own_name = (_HIRA if hira else _SUFFIXES)[suffix]
            linear.add(path)
            modules.setdefault(path, {})[own_name] = widen(name, entry.dtype, container.array(name))
            dtypes.add(DTYPES[entry.dtype])
        elif suffix == TOKENS:
            tokens[path] = widen(name, entry.dtype, container.array(name))
            dtypes.add(DTYPES[entry.dtype])
        elif suffix in _MAGNITUDES:
            if settings.apply != "magnitude":
                raise FileError(f"{safe_repr(name)} is a magnitude of DoRA, and use_dora of {CONFIG_NAME} is not true")
            magnitudes[path] = widen(name, entry.dtype, container.array(name)).reshape(-1)
            dtypes.add(DTYPES[entry.dtype])
        elif suffix in _REFUSED:
            raise FileError(f"{safe_repr(name)} cannot be converted: {_REFUSED[suffix]}")
        else:
            unread.append(name)
    both = sorted(linear.intersection(embeddings) | tokens.keys() & modules.keys())
    if both:
        raise FileError(f"{safe_repr(both[0])} has tensors of an embedding next to those of another layer")
    others = other_tensors(container, unread, modules, settings, settings.kind, base)
    if not modules and not tokens:
        raise FileError("has no adapted weight")
    found, rest = decoded_experts(modules, settings, recorded(container.metadata, EXPERTS, list), base)
    wrapped = next((path for path in rest if ".base_layer." in f".{path}."), None)
    if wrapped is not None:
        raise FileError(
            f"{safe_repr(wrapped)} cannot be converted: it is PEFT's LoRA on nn.MultiheadAttention, which adds "
            "its update "
            "of the output projection twice, and of q, k and v to a parameter that is no module's weight"
        )
    transposed, conv1ds = recorded(container.metadata, TRANSPOSED, bool), set[str]()
    for path in sorted(rest, key=natural):
        kind = kind_of(path, rest[path])
        if kind != settings.kind:
            raise FileError(f"{safe_repr(path)} has tensors of {kind}, and {CONFIG_NAME} says {settings.kind}")
        scale: Callable[[int | None], float] = functools.partial(settings.scale, path)
        tensors, groups = without_groups(path, rest[path])
        if groups > 1:
            if settings.apply != "add":
                raise FileError(f"{safe_repr(path)} is a convolution in {groups} groups: {_NO_GROUPS}")
            scale = functools.partial(_constant, scale(len(rest[path]["lora_down"])))
        update, shape = decode(path, tensors, scale, kron_last_axes=True)
        conv1d = settings.kind == "lora" and path not in embeddings and is_conv1d(path, settings.model_type, base)
        conv1ds |= {path} if conv1d else set()
        says = transposed.get(path, settings.transposed or conv1d) and path not in embeddings
        target = target_of(path, shape, base, says and len(shape) == 2, settings.kind == "lora")
        target = dataclasses.replace(target, groups=groups)
        found.append(as_embedding(TargetUpdate(target, update), embeddings))
    if base is not None and settings.kind == "lora":
        known = {*transposed, *embeddings, *conv1ds}
        check_transposed([one.target for one in found if one.target.module not in known], settings.transposed)
    if settings.ties:
        found = joined_ties(found)
    rows = decoded_tokens(tokens, settings.tokens, base)
    ties = others.ties | dict.fromkeys([*_alone(found, others.bases), *separate_rows(rows, base)], ())
    found += rows
    notes = others.notes
    if any(not one.target.tied for one in rows) and base is not None and base.unknown_heads:
        notes += (
            "base ties an embedding to its output head, which PEFT's rows of tokens change as well: load the result "
            "with keep_tied=True, and save it again for PEFT, so that the file says so",
        )
    if settings.apply == "magnitude" and magnitudes.keys() != modules.keys():
        wrong = summarize(magnitudes.keys() ^ modules.keys())
        raise FileError(f"use_dora of {CONFIG_NAME} is true, and these lack a magnitude or factors: {wrong}")
    application = Application(settings.apply, magnitudes=magnitudes)
    kind = settings.kind if settings.apply == "add" else _NAMES[settings.apply].lower()
    return ForeignAdapter(
        kind, found, common_dtype(dtypes), others.kept, others.dtypes, settings.model, notes=notes,
        application=application, ties=ties,
    )  # fmt: skip


def _alone(found: Sequence[TargetUpdate], bases: Collection[str]) -> list[str]:
    """Return the names of embeddings and heads that PEFT adapts alone, also where the model ties them."""
    targets = [one.target for one in found if not one.target.tied]
    return [
        target.name
        for target in targets
        if target.role == "embedding" or target.module in bases or is_head(target.module)
    ]


def _constant(scale: float, _: int | None) -> float:
    """Return a scale that was computed for the rank of PEFT's factors, whatever the rank of ours."""
    return scale


def _split_name(name: str) -> tuple[str, str]:
    """Split a name into the module's path and the suffix of an adapter's tensor, "" if it has none."""
    path = name.removeprefix(PREFIX)
    for suffix in (TOKENS, *_SUFFIXES, *EMBEDDING, *_HIRA, *_MAGNITUDES, *_REFUSED):
        if path != name and path.endswith(f".{suffix}"):
            return path.removesuffix(f".{suffix}"), suffix
    return path, ""


# -- The format that vLLM serves: LoRA with one rank that vLLM takes, and a scale of 1 ---------------------------------


# The only whole modules that vLLM loads next to LoRA, of classification models.
_HEADS = ("classifier", "score")


class VllmFormat(PeftFormat):
    """PEFT folders that vLLM serves; :class:`PeftFormat` reads them.

    vLLM sets aside ``max_lora_rank`` columns for each adapter, one of a short list. Releases before ``rank_pattern``
    took one α / r for all modules, so that here all factors have one rank, and α equals it.
    """

    library = "vLLM"
    kinds = ("lora",)
    structures = ()
    ties = False

    def detect(self, path: str) -> None:
        """Leave folders to the format of PEFT."""

    def check_module(self, module: Module, kind: str) -> None:
        """Raise ConfigError for convolutions, and for embeddings that vLLM does not look up in an adapter.

        Weights stored as (in, out) are the same for LoRA's factors.
        """
        if len(module.stored) != 2:
            raise ConfigError(
                f"{safe_repr(module.path)} is a convolution, and vLLM has no LoRA of convolutions: merge the adapter "
                "into the base with tnadapt.merge (tnadapt merge)"
            )
        if is_embedding(module) and module.path.rpartition(".")[2] != SERVED_EMBEDDING:
            raise ConfigError(
                f"{safe_repr(module.path)} is an embedding, and vLLM has LoRA only of those named {SERVED_EMBEDDING}: "
                "merge the adapter into the base with tnadapt.merge (tnadapt merge)"
            )

    def check_applied(self, kind: str, apply: str, magnitude_axis: str) -> None:
        """Refuse DoRA and HiRA, which vLLM does not serve."""
        raise not_additive(apply, f"{self.name}-{kind}")

    def check_adapter(self, modules: Sequence[Module], kept: Mapping[str, np.ndarray]) -> None:
        """Raise ConfigError for kept parameters other than those of a classification head."""
        super().check_adapter(modules, kept)
        whole = saved_whole(modules, kept)
        other = [name for name in kept if name not in whole or name.rpartition(".")[0] not in _HEADS]
        if other:
            raise ConfigError(
                f"besides LoRA, vLLM loads only trained modules named {' or '.join(_HEADS)}, and this adapter has "
                f"{summarize(other)}: convert without them by without_kept=True (--without-kept)"
            )

    def encode(self, kind: str, modules: Sequence[Module], choice: ExportChoice, kept: Sequence[str]) -> EncodedAdapter:
        """Encode the tensors and ``adapter_config.json``, padded to the next rank that vLLM takes."""
        most = max(choice.ranks)
        rank = served_rank(most)
        if rank is None:
            raise ConfigError(
                f"the LoRA of this adapter has rank {most}, and vLLM takes ranks up to {SERVED_RANKS[-1]}: give rank= "
                "(--rank) and max_error= (--max-error) for an approximation of lower rank, or merge the adapter into "
                "the base with tnadapt.merge (tnadapt merge)"
            )
        padded = choice._replace(updates=uniform(choice.updates, rank), ranks=[rank] * len(modules))
        return super().encode(kind, modules, padded, kept)
