"""Reading and writing of PEFT's ``adapter_config.json``.

Reading keeps the settings that determine the update, ignores those without effect on it, and rejects all others.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from tnadapt.checkpoints.pretrained_model import TASKS, Pretrained
from tnadapt.errors import FileError, safe_repr

from ._path_patterns import PathPatterns

__all__ = [
    "LOW_RANK",
    "CommonSettings",
    "PeftSettings",
    "common_config",
    "common_settings",
    "config_of",
    "integer_of",
    "number_of",
    "origin_settings",
    "settings_of",
]


# -- Reading and writing of PEFT's adapter_config.json -----------------------------------------------------------------


#: The methods whose tensors are those of LoRA, LoKr and LoHa, by PEFT's name.
LOW_RANK = {"LORA": "lora", "LOKR": "lokr", "LOHA": "loha", "HIRA": "lora"}

# Settings of all methods that do not affect the update of the stored tensors, or are read for all of them.
_COMMON = frozenset(
    {
        "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
        "fan_in_fan_out", "modules_to_save", "bias",
    }
)  # fmt: skip
_HARMLESS = frozenset(
    {
        "lora_dropout", "rank_dropout",
        "module_dropout", "rank_dropout_scale", "init_weights", "eva_config", "ensure_weight_tying", "megatron_core",
        "qalora_group_size", "runtime_config", "velora_config", "use_effective_conv2d", "decompose_both",
        "decompose_factor", "loftq_config", "corda_config", "lora_ga_config", "hira_dropout",
    }
)  # fmt: skip
_READ = frozenset(
    {
        "r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "use_dora",
        "target_parameters", "trainable_token_indices",
    }
)  # fmt: skip
_REFUSED = {
    "layer_replication": "layers are used several times, each with a different update",
    "use_qalora": "QA-LoRA pools the inputs",
    "alora_invocation_tokens": "aLoRA acts from certain tokens on only",
    "arrow_config": "Arrow chooses among adapters for each token",
    "use_bdlora": "its factors are block-diagonal and stored in another shape",
    "kasa_config": "KaSA changes the weight itself, too",
    "monteclora_config": "MonteCLoRA draws its factors",
    "lora_bias": "it adds to the layer's bias, which is not in the file",
    "megatron_config": "its factors are parts of Megatron's parallel layers",
}
# These methods subtract their initial update from the base's weights, so the adapter belongs to a base that is not on
# disk.
_CHANGES_BASE = re.compile(r"pissa|olora|corda|loftq|lora_ga")


class PeftSettings(NamedTuple):
    """Settings of ``adapter_config.json`` that determine the update.

    Attributes
    ----------
    kind : {"lora", "lokr", "loha"}
    rank, alpha : int, float
        Values for modules that no pattern matches.
    ranks, alphas : PathPatterns
        PEFT's ``rank_pattern`` and ``alpha_pattern``.
    rslora, transposed : bool
    saved : tuple of str
        ``modules_to_save``.
    bias : str
    model : str
        Class name of the base model, or "".
    apply : str
        How the updates meet the weights: "magnitude" for DoRA, "hadamard" for HiRA.
    parameters : tuple of str
        ``target_parameters``: parameters that LoRA adapts directly.
    tokens : list, dict or None
        ``trainable_token_indices``.
    ties : bool
        ``ensure_weight_tying``: whether an embedding and a head have one update.
    model_type : str
        transformers' type of the base model, or "".
    """

    kind: str
    rank: int
    alpha: float
    ranks: PathPatterns
    alphas: PathPatterns
    rslora: bool
    transposed: bool
    saved: tuple[str, ...]
    bias: str
    model: str
    apply: str = "add"
    parameters: tuple[str, ...] = ()
    tokens: Any = None
    ties: bool = False
    model_type: str = ""

    def scale(self, path: str, rank: int | None) -> float:
        """Return the scale, ``alpha / r``, of a module with factors of this rank; None if they have no rank."""
        if self.apply == "hadamard":
            return 1.0  # HiRA has no alpha; PEFT makes all factors of rank r, whatever rank_pattern says
        given = integer_of(f"the rank of {path}", self.ranks.get(path, self.rank))
        if rank is not None and rank != given:
            raise FileError(f"{safe_repr(path)} has factors of rank {rank}, and adapter_config.json says {given}")
        alpha = number_of(f"alpha of {path}", self.alphas.get(path, self.alpha))
        return alpha / math.sqrt(given) if self.rslora else alpha / given


def settings_of(config: Mapping[str, Any]) -> PeftSettings:
    """Read the settings.

    Raises
    ------
    FileError
        If a field has the wrong type, is unknown, or means that the update is not
        only added to the weight. The message names the field.
    """
    kind = LOW_RANK[str(config["peft_type"]).upper()]
    _check_fields(config, _HARMLESS | _READ, _REFUSED)
    start = config.get("init_lora_weights")
    if isinstance(start, str) and _CHANGES_BASE.search(start):
        raise FileError(
            f"init_lora_weights={safe_repr(start)}: this adapter belongs to a base whose weights it has "
            "changed; save it "
            "with path_initial_model_for_weight_conversion, which makes it an ordinary one"
        )
    saved, bias, model = _kept_settings(config)
    return PeftSettings(
        kind,
        integer_of("r", config.get("r", 8)),
        number_of("alpha", config.get("lora_alpha" if kind == "lora" else "alpha", 8)),
        _patterns("rank_pattern", config),
        _patterns("alpha_pattern", config),
        bool(config.get("use_rslora")) and kind == "lora",
        bool(config.get("fan_in_fan_out")) and kind == "lora",
        saved,
        bias,
        model,
        _apply(config, kind),
        _parameters(config, kind),
        config.get("trainable_token_indices"),
        bool(config.get("ensure_weight_tying")),
        _model_type(config),
    )


def _check_fields(config: Mapping[str, Any], known: Collection[str], refused: Mapping[str, str]) -> None:
    """Raise FileError if a field is set that is neither known nor common to all methods."""
    for field, value in config.items():
        if field in _COMMON or field in known or not value:
            continue
        why = refused.get(field, "this field is not known here, and may change what the adapter does")
        raise FileError(
            f"{field}={safe_repr(value)} of adapter_config.json cannot be converted: {why}; merge the adapter "
            "with PEFT, "
            "and extract one from the merged weights"
        )


def _kept_settings(config: Mapping[str, Any]) -> tuple[tuple[str, ...], str, str]:
    """Return ``modules_to_save``, ``bias`` and the class name of the base model."""
    bias = config.get("bias", "none")
    if not isinstance(bias, str) or (bias not in ("none", "all") and not bias.endswith("_only")):
        raise FileError(f"bias must be 'none', 'all' or 'lora_only'; got {safe_repr(bias)}")
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise FileError(f"modules_to_save must be a list of names; got {safe_repr(saved)}")
    mapping = config.get("auto_mapping")
    model = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
    return tuple(saved), bias, model if isinstance(model, str) else ""


def _model_type(config: Mapping[str, Any]) -> str:
    """Return transformers' type of the base model, which PEFT stores as a part of the name of its Python module."""
    mapping = config.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, Mapping) else None
    parts = library.split(".") if isinstance(library, str) else []
    name = parts[2] if parts[:2] == ["transformers", "models"] and len(parts) > 2 else ""
    return "openai-gpt" if name == "openai" else name


class CommonSettings(NamedTuple):
    """Settings that all methods have.

    Attributes
    ----------
    title : str
        The method's name in messages.
    saved : tuple of str
        ``modules_to_save``.
    bias, model : str
    transposed : bool
        ``fan_in_fan_out``.
    may_transpose : bool
        Whether the method adapts weights that are stored as (in, out).
    model_type : str
        transformers' type of the base model, or "".
    """

    title: str
    saved: tuple[str, ...]
    bias: str
    model: str
    transposed: bool
    may_transpose: bool
    model_type: str


def common_settings(
    config: Mapping[str, Any], title: str, fields: Collection[str], refused: Mapping[str, str], may_transpose: bool
) -> CommonSettings:
    """Read the settings that all methods have; raise FileError if a field is set that is not in ``fields``."""
    _check_fields(config, fields, refused)
    saved, bias, model = _kept_settings(config)
    transposed = bool(config.get("fan_in_fan_out")) and may_transpose
    return CommonSettings(title, saved, bias, model, transposed, may_transpose, _model_type(config))


def _apply(config: Mapping[str, Any], kind: str) -> str:
    """Return how the updates meet the weights."""
    if str(config["peft_type"]).upper() == "HIRA":
        return "hadamard"
    if not config.get("use_dora"):
        return "add"
    if kind != "lora":
        raise FileError(f"use_dora={safe_repr(config['use_dora'])} belongs to LoRA; peft_type is {kind.upper()}")
    return "magnitude"


def _parameters(config: Mapping[str, Any], kind: str) -> tuple[str, ...]:
    found = config.get("target_parameters") or []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise FileError(f"target_parameters must be a list of names; got {safe_repr(found)}")
    if found and (kind != "lora" or _apply(config, kind) != "add"):
        raise FileError(f"target_parameters={safe_repr(found)} belongs to LoRA; peft_type is {config['peft_type']}")
    return tuple(found)


def _patterns(field: str, config: Mapping[str, Any]) -> PathPatterns:
    found = config.get(field) or {}
    if not isinstance(found, dict):
        raise FileError(f"{field} must be an object; got {safe_repr(found)}")
    return PathPatterns(field, found)


def integer_of(name: str, value: Any) -> int:
    """Return a positive integer; raise FileError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 40:
        raise FileError(f"{name} must be an integer of at least 1; got {safe_repr(value)}")
    return value


def number_of(name: str, value: Any) -> float:
    """Return a finite number; raise FileError for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e300:
        raise FileError(f"{name} must be a finite number; got {safe_repr(value)}")
    return float(value)


# -- Writing -------------------------------------------------------------------------------------


def common_config(kind: str, paths: Sequence[str]) -> dict[str, Any]:
    """Return the fields of ``adapter_config.json`` that all methods have, with full paths of all weights."""
    return {
        "peft_type": kind.upper(),
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "target_modules": _targeted(paths),
        "modules_to_save": None,
    }


def config_of(
    kind: str,
    transposed: Mapping[str, bool],
    ranks: Sequence[int],
    alphas: Sequence[float],
    parameters: Sequence[str] = (),
) -> dict[str, Any]:
    """Return ``adapter_config.json``, with full paths of all weights, and patterns for differing ranks and alphas.

    Parameters
    ----------
    kind : str
    transposed : mapping of str to bool
        Maps paths of modules to whether their weights are stored as ``(in, out)``.
    ranks, alphas : sequence
        Ranks and alphas of the modules.
    parameters : sequence of str
        Those of the paths that are names of parameters, for ``target_parameters``.
    """
    rank, alpha = (Counter(values).most_common(1)[0][0] for values in (ranks, alphas))
    paths = list(transposed)
    config = {
        **common_config(kind, [path for path in paths if path not in parameters]),
        "r": rank,
        ("lora_alpha" if kind == "lora" else "alpha"): _json_number(alpha),
        "rank_pattern": _pattern_of(paths, ranks, rank),
        "alpha_pattern": _pattern_of(paths, [_json_number(value) for value in alphas], _json_number(alpha)),
    }
    if kind == "lora":
        config |= {"bias": "none", "fan_in_fan_out": all(transposed.values())}
    return config | ({"target_parameters": sorted(parameters)} if parameters else {})


def _json_number(value: float) -> int | float:
    return int(value) if value == int(value) else value


def _pattern_of(paths: Sequence[str], values: Sequence[float], default: float) -> dict[str, float]:
    """Return the values that differ from the default, by expressions: plain paths if these are unambiguous.

    PEFT reads a path as a regular expression: it may match the end of another path, and its dots match any character.
    If PEFT would use one weight's value for another weight, the expressions are anchored and escaped.
    """
    plain = {path: value for path, value in zip(paths, values, strict=True) if value != default}
    try:
        read = PathPatterns("the pattern", plain)
        clear = all(read.get(path, default) == value for path, value in zip(paths, values, strict=True))
    except FileError:  # a path that is another pattern, or none
        clear = False
    return plain if clear else {f"^{re.escape(path)}": value for path, value in plain.items()}


def _targeted(paths: Sequence[str]) -> list[str] | str:
    """Return the paths, which PEFT matches as suffixes; if one is a suffix of another, return an expression instead."""
    ends = {path[place + 1 :] for path in paths for place, letter in enumerate(path) if letter == "."}
    unclear = any("." not in path or path in ends for path in paths)
    return "|".join(map(re.escape, sorted(paths))) if unclear else sorted(paths)


# -- What PEFT's adapter_config.json says about the base model: its name on the hub, and the task ----------------------

# ``AutoPeftModel`` loads the base by them, and programs show them. PEFT's classes for tasks that have a head train it
# whole: they take a copy of it, even where the file has none. So such a task is named only if the head is in the file;
# else the class of transformers that builds the model is.


class _PeftTask(NamedTuple):
    """PEFT's name of a task, and the modules that its class trains whole, by their names at any place in the model."""

    name: str
    heads: tuple[str, ...] = ()


_PEFT_TASKS = {
    "text-generation": _PeftTask("CAUSAL_LM"),
    "text2text-generation": _PeftTask("SEQ_2_SEQ_LM"),
    "feature-extraction": _PeftTask("FEATURE_EXTRACTION"),
    "text-classification": _PeftTask("SEQ_CLS", ("classifier", "score")),
    "token-classification": _PeftTask("TOKEN_CLS", ("classifier", "score")),
    "question-answering": _PeftTask("QUESTION_ANS", ("qa_outputs",)),
}


def origin_settings(about: Pretrained | None, saved: Collection[str] | None) -> dict[str, Any]:
    """Return the settings that are known.

    Parameters
    ----------
    about : Pretrained, optional
        What the adapter's file records of its base. The path of a local folder is not written: it is nobody else's.
    saved : collection of str, optional
        ``modules_to_save``: the modules that are in the file as a whole.

    Examples
    --------
    >>> origin_settings(Pretrained("HuggingFaceTB/SmolLM2-135M", task="text-generation"), None)
    {'base_model_name_or_path': 'HuggingFaceTB/SmolLM2-135M', 'task_type': 'CAUSAL_LM'}
    >>> bert = Pretrained("/home/me/bert", task="text-classification")
    >>> origin_settings(bert, ["classifier"])
    {'task_type': 'SEQ_CLS'}
    >>> origin_settings(bert, None)["auto_mapping"]["base_model_class"]
    'AutoModelForSequenceClassification'
    """
    if about is None or about.library != "transformers":
        return {}
    found = dict[str, Any]()
    if about.name and not about.local and not about.remote:
        found["base_model_name_or_path"] = about.name
        if about.revision:
            found["revision"] = about.revision
    task = _PEFT_TASKS.get(about.task)
    if task is not None and _has_head(task, saved or ()):
        found["task_type"] = task.name
    elif about.task:
        found["auto_mapping"] = {"base_model_class": TASKS[about.task].model, "parent_library": "transformers"}
    return found


def _has_head(task: _PeftTask, saved: Collection[str]) -> bool:
    """Return whether the modules that PEFT trains whole for a task are in the file, and as a whole."""
    inside = any(f".{head}." in f".{path}" for path in saved for head in task.heads)
    return not task.heads or (not inside and any(path.rpartition(".")[2] in task.heads for path in saved))
