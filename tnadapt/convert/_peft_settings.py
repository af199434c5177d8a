"""PEFT's ``adapter_config.json``, read and written, and the patterns of module paths in it, matched safely.

Reading keeps the settings that determine the update, ignores those without effect on it, and rejects all others.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tnadapt.checkpoints.pretrained_model import TASKS, Pretrained
from tnadapt.errors import FileError, pluralize, safe_repr

# -- Patterns of module paths, such as the keys of rank_pattern --------------------------------------------------------

# PEFT takes them as regular expressions, and matching an untrusted one may never end. Here they are matched without
# Python's ``re``: a path with or without unescaped dots is looked up in a table, and everything else is matched by
# tracking all positions of a path that a pattern can have reached. Features that need more than these positions
# (lookarounds, backreferences, flags) are rejected.


_TOKEN = re.compile(
    r"""
      \w{2,64}+(?![*+?{])                                       # letters that occur once
    | \\[dDwWsS]                                                # a class of letters
    | \\[^a-zA-Z0-9]                                            # an escaped letter
    | \[\^?(?:[\w.]-[\w.]|[\w.]|\\[dDwWsS.\-])++-?\]            # a class that is listed
    | \((?:\?:)? | [)|^$]
    | (?:[*+?]|\{\d{1,3}(?:,\d{0,3})?\})\??                     # a repetition; a lazy one matches the same paths
    | [^\\\[(){|^$*+?]
    """,
    re.VERBOSE | re.DOTALL,
)
_MAX_DEPTH = 16
#: Maximum steps for all paths, which take about two seconds.
_MAX_STEPS = 2_000_000

# Where a pattern may start: at the first character of the path, also after a dot, or anywhere.
_WHOLE, _PART, _FREE = range(3)


class _Piece(NamedTuple):
    """One item of a pattern and how often it occurs: letters, a class of letters, or a group of alternatives."""

    text: str = ""
    literal: bool = False
    group: Sequence[Sequence[_Piece]] | None = None
    low: int = 1
    high: float = 1


_START, _END, _DOT, _ANY = _Piece("^"), _Piece("$"), _Piece("."), _Piece(".", low=0, high=math.inf)


class PathPatterns:
    r"""Values by patterns, each a regular expression for the end of a path that starts after a dot.

    Parameters
    ----------
    field : str
        What to call the patterns in messages.
    values : mapping of str to Any
        The value of each pattern.

    Raises
    ------
    FileError
        If a pattern has more than text, ``.``, classes such as ``\d`` and ``[0-9]``, groups with alternatives,
        repetitions, and ``^`` and ``$`` at its ends.

    Examples
    --------
    >>> ranks = PathPatterns("rank_pattern", {"q_proj": 2, r"^h\.\d+\.mlp": 3})
    >>> [ranks.get(path, 8) for path in ("a.q_proj", "h.12.mlp", "b.h.12.mlp")]
    [2, 3, 8]
    """

    def __init__(self, field: str, values: Mapping[str, Any]) -> None:
        self._field, self._values, self._steps = field, list(values.values()), 0
        # Length, positions of unescaped dots, and start -> text with these dots -> number of the pattern.
        self._texts: dict[tuple[int, tuple[int, ...], int], dict[str, int]] = {}
        # The other alternatives: number of the pattern, its start, the texts that a path must contain, and its pieces.
        self._others = list[tuple[int, int, Sequence[str], Sequence[_Piece]]]()
        for number, key in enumerate(values):
            try:
                for start, pieces in _top_alternatives(key):
                    self._add(number, start, pieces)
            except _UnsupportedError:
                raise FileError(
                    f"{field} has the pattern {safe_repr(key)}, and of regular expressions only text, '.', classes "
                    r"such as \d and [0-9], groups (a|b), repetitions, and ^ and $ at the ends are supported: write "
                    "the modules' paths in full, which PEFT reads, too"
                ) from None

    def get(self, path: str, default: Any) -> Any:
        """Return the value of the first pattern that matches a path, or the default.

        Raises
        ------
        FileError
            If the path has a line break, or all paths so far have taken too many steps.
        """
        if not self._values:
            return default
        if "\n" in path:
            raise FileError(f"{safe_repr(path)} has a line break, so that no pattern of {self._field} is for it")
        first = min(self._of_texts(path), default=len(self._values))
        after_dots = {0, *(place + 1 for place, letter in enumerate(path) if letter == ".")}
        starts = {_WHOLE: {0}, _PART: after_dots, _FREE: set(range(len(path) + 1))}
        self._spend(len(self._others) // 8)
        for number, start, texts, pieces in self._others:
            if number >= first or not all(text in path for text in texts):
                continue
            if len(path) in self._ends(path, starts[start], pieces):
                first = number
        return self._values[first] if first < len(self._values) else default

    def _add(self, number: int, start: int, pieces: Sequence[_Piece]) -> None:
        """Add one alternative of a pattern."""
        if not all(piece == _DOT or (piece.literal and (piece.low, piece.high) == (1, 1)) for piece in pieces):
            texts = [piece.text for piece in pieces if piece.literal and piece.low]
            self._others.append((number, start, texts, pieces))
            return
        text = "".join(piece.text for piece in pieces)
        ends = itertools.accumulate(len(piece.text) for piece in pieces)
        dots = tuple(end - 1 for end, piece in zip(ends, pieces, strict=True) if not piece.literal)
        self._texts.setdefault((len(text), dots, start), {}).setdefault(text, number)

    def _of_texts(self, path: str) -> Iterator[int]:
        """Yield the numbers of the matching patterns without classes, groups or repetitions."""
        self._spend(len(self._texts) // 4)
        for (length, dots, where), numbers in self._texts.items():
            start = len(path) - length
            if start < 0 or (start and (where == _WHOLE or (where == _PART and path[start - 1] != "."))):
                continue
            text = path[start:]
            if any(text[dot] != "." for dot in dots):
                self._spend(length // 8)
                letters = list(text)
                for dot in dots:
                    letters[dot] = "."
                text = "".join(letters)
            if text in numbers:
                yield numbers[text]

    def _ends(self, path: str, starts: set[int], pieces: Sequence[_Piece]) -> set[int]:
        """Return where the pieces of a pattern may end in a path if they begin at any of some positions."""
        for piece in pieces:
            for _ in range(piece.low):
                starts = self._ends_of_one(path, starts, piece)
            reached, new, times = set(starts), starts, piece.low
            while new and times < piece.high:
                new = self._ends_of_one(path, new, piece) - reached
                reached |= new
                times += 1
            starts = reached
        return starts

    def _ends_of_one(self, path: str, starts: set[int], piece: _Piece) -> set[int]:
        self._spend(len(starts))
        if not starts:
            return starts
        if piece.group is not None:
            return set[int]().union(*(self._ends(path, starts, pieces) for pieces in piece.group))
        if piece.literal:
            return {start + len(piece.text) for start in starts if path.startswith(piece.text, start)}
        return {start + 1 for start in starts if start < len(path) and _reads(piece.text, path[start])}

    def _spend(self, steps: int) -> None:
        self._steps += steps
        if self._steps > _MAX_STEPS:
            raise FileError(
                f"{self._field} has {pluralize(len(self._values), 'pattern')} that would take too long to match: write "
                "the modules' paths in full, which PEFT reads, too"
            )


class _UnsupportedError(Exception):
    """A pattern that is not a regular expression, or uses features that are not supported."""


def _top_alternatives(pattern: str) -> Iterator[tuple[int, Sequence[_Piece]]]:
    """Yield the start and the pieces of each alternative of a pattern, or raise _UnsupportedError."""
    for pieces in _parsed(pattern):
        start = _PART
        if pieces and pieces[0] == _START:
            start, pieces = _WHOLE, pieces[1:]
        elif pieces and pieces[0] == _ANY:
            start, pieces = _FREE, pieces[1:]
        yield start, pieces[:-1] if pieces and pieces[-1] == _END else pieces


def _parsed(pattern: str) -> list[list[_Piece]]:
    """Return the alternatives of a pattern, or raise _UnsupportedError."""
    alternatives, outer, place = [list[_Piece]()], list[list[list[_Piece]]](), 0
    while place < len(pattern):
        match = _TOKEN.match(pattern, place)
        if match is None:
            raise _UnsupportedError
        token, place, pieces = match[0], match.end(), alternatives[-1]
        if pieces and pieces[-1] == _END and token != "|":
            raise _UnsupportedError
        if token == "|":
            alternatives.append([])
        elif token[0] == "(" and len(outer) < _MAX_DEPTH:
            outer.append(alternatives)
            alternatives = [[]]
        elif token == ")" and outer:
            group, alternatives = alternatives, outer.pop()
            alternatives[-1].append(_Piece(group=group))
        elif (token == "^" and not outer and not pieces) or (token == "$" and not outer):
            pieces.append(_START if token == "^" else _END)
        elif token[0] in "*+?{" and pieces and pieces[-1] != _START and (pieces[-1].low, pieces[-1].high) == (1, 1):
            low, high = _bounds(token)
            pieces[-1] = pieces[-1]._replace(low=low, high=high)
        elif token[0] not in "()^$*+?{":
            pieces.append(_letters(token))
        else:
            raise _UnsupportedError
    if outer:
        raise _UnsupportedError
    return alternatives


@functools.lru_cache(1 << 12)
def _reads(text: str, letter: str) -> bool:
    """Return whether a class contains a character."""
    return re.match(text, letter) is not None


def _letters(token: str) -> _Piece:
    """Return the piece for plain characters, an escaped one, or a class."""
    if token == "." or token[0] == "[" or (token[0] == "\\" and token[1:].isalpha()):
        try:
            re.compile(token)
        except re.error:  # the ends of a range in the wrong order
            raise _UnsupportedError from None
        return _Piece(token)
    return _Piece(token.removeprefix("\\"), literal=True)


def _bounds(token: str) -> tuple[int, float]:
    if token[0] != "{":
        return int(token[0] == "+"), 1 if token[0] == "?" else math.inf
    low, comma, high = token.rstrip("?")[1:-1].partition(",")
    bounds = int(low), float(high or math.inf) if comma else int(low)
    if bounds[1] < bounds[0]:
        raise _UnsupportedError
    return bounds


# -- The settings ------------------------------------------------------------------------------------------------------


# Settings of any method that do not affect the update of the stored tensors, or are read for all methods.
_COMMON = frozenset(
    {
        "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
        "fan_in_fan_out", "modules_to_save", "bias",
    }
)  # fmt: skip
#: The same for LoRA, LoKr, LoHa and HiRA.
LOW_RANK = (
    "lora_dropout", "rank_dropout", "module_dropout", "rank_dropout_scale", "hira_dropout", "init_weights",
    "init_lora_weights", "eva_config", "ensure_weight_tying", "megatron_core", "qalora_group_size",
    "runtime_config", "velora_config", "use_effective_conv2d", "decompose_both", "decompose_factor",
    "loftq_config", "corda_config", "lora_ga_config", "r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern",
    "use_rslora", "use_dora", "target_parameters", "trainable_token_indices",
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


class CommonSettings(NamedTuple):
    """Settings that all methods have.

    Attributes
    ----------
    saved : sequence of str
        ``modules_to_save``.
    bias : str
    model : str
        Class name of the base model, or "".
    model_type : str
        transformers' type of the base model, or "".
    transposed : bool
        ``fan_in_fan_out``.
    ties : bool
        ``ensure_weight_tying``: whether an embedding and a head have one update, or one copy of their weight.
    """

    saved: Sequence[str]
    bias: str
    model: str
    model_type: str
    transposed: bool
    ties: bool


def common_settings(config: Mapping[str, Any], fields: Collection[str], may_transpose: bool) -> CommonSettings:
    """Read the settings that all methods have.

    Raises
    ------
    FileError
        If one of them has the wrong type; if another field is set that is not in ``fields``; or if the adapter belongs
        to weights that it has changed.
    """
    for field, value in config.items():
        if field in _COMMON or field in fields or not value:
            continue
        why = _REFUSED.get(field, "this field is not known here, and may change what the adapter does")
        raise FileError(
            f"{field}={safe_repr(value)} of adapter_config.json cannot be converted: {why}; merge the adapter with "
            "PEFT, and extract one from the merged weights"
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and _CHANGES_BASE.search(start):
        raise FileError(
            f"init_lora_weights={safe_repr(start)}: this adapter belongs to a base whose weights it has changed; save "
            "it with path_initial_model_for_weight_conversion, which makes it an ordinary one"
        )
    bias = config.get("bias", "none")
    if not isinstance(bias, str) or (bias not in ("none", "all") and not bias.endswith("_only")):
        raise FileError(f"bias must be 'none', 'all' or 'lora_only'; got {safe_repr(bias)}")
    mapping = config.get("auto_mapping")
    model, library = (
        mapping.get(key) if isinstance(mapping, Mapping) else None for key in ("base_model_class", "parent_library")
    )
    # The name of a Python module, of which transformers' type of the model is a part.
    parts = library.split(".") if isinstance(library, str) else []
    model_type = parts[2] if parts[:2] == ["transformers", "models"] and len(parts) > 2 else ""
    return CommonSettings(
        names_of("modules_to_save", config), bias, model if isinstance(model, str) else "",
        "openai-gpt" if model_type == "openai" else model_type, bool(config.get("fan_in_fan_out")) and may_transpose,
        bool(config.get("ensure_weight_tying")),
    )  # fmt: skip


class Scales:
    """The scales of LoRA, LoKr or LoHa, α / r with PEFT's ``rank_pattern`` and ``alpha_pattern``.

    Raises
    ------
    FileError
        If a field has the wrong type. The message names it.
    """

    def __init__(self, config: Mapping[str, Any], alpha: str = "lora_alpha") -> None:
        self._rank = integer_of("r", config.get("r", 8))
        self._alpha = number_of("alpha", config.get(alpha, 8))
        self._ranks, self._alphas = _patterns("rank_pattern", config), _patterns("alpha_pattern", config)
        self._rslora = bool(config.get("use_rslora")) and alpha == "lora_alpha"

    def of(self, path: str, rank: int | None) -> float:
        """Return the scale of a module with factors of this rank; None if they have no rank."""
        expected = integer_of(f"the rank of {path}", self._ranks.get(path, self._rank))
        if rank is not None and rank != expected:
            raise FileError(f"{safe_repr(path)} has factors of rank {rank}, and adapter_config.json says {expected}")
        alpha = number_of(f"alpha of {path}", self._alphas.get(path, self._alpha))
        return alpha / math.sqrt(expected) if self._rslora else alpha / expected


def names_of(field: str, config: Mapping[str, Any]) -> list[str]:
    """Return a setting that is a list of names; raise FileError for anything else."""
    names = config.get(field) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FileError(f"{field} must be a list of names; got {safe_repr(names)}")
    return names


def _patterns(field: str, config: Mapping[str, Any]) -> PathPatterns:
    patterns = config.get(field) or {}
    if not isinstance(patterns, dict):
        raise FileError(f"{field} must be an object; got {safe_repr(patterns)}")
    return PathPatterns(field, patterns)


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
    kind: str, transposed: bool, modules: Mapping[str, tuple[int, float]], parameters: Mapping[str, tuple[int, float]]
) -> dict[str, Any]:
    """Return ``adapter_config.json``, with full paths of all weights, and patterns for differing ranks and alphas.

    Parameters
    ----------
    kind : str
    transposed : bool
        Whether all weights are stored as ``(in, out)``.
    modules, parameters : mapping of str to (int, float)
        The rank and alpha of each module by its path, and of each parameter by its name, for ``target_parameters``.
    """
    ranks, alphas = (
        {name: _json_number(pair[place]) for name, pair in {**modules, **parameters}.items()} for place in (0, 1)
    )
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = {
        **common_config(kind, list(modules)),
        "r": rank,
        ("lora_alpha" if kind == "lora" else "alpha"): alpha,
        "rank_pattern": _pattern_of(ranks, rank),
        "alpha_pattern": _pattern_of(alphas, alpha),
    }
    if kind == "lora":
        config |= {"bias": "none", "fan_in_fan_out": transposed}
    return config | ({"target_parameters": sorted(parameters)} if parameters else {})


def _json_number(value: float) -> int | float:
    return int(value) if value == int(value) else value


def _pattern_of(values: Mapping[str, float], default: float) -> dict[str, float]:
    """Return the values that differ from the default, by plain paths if these are unambiguous, else by expressions."""
    # PEFT reads a path as a regular expression: it may match the end of another path, and its dots match any character.
    # If PEFT would use one weight's value for another weight, the expressions are anchored and escaped.
    plain = {path: value for path, value in values.items() if value != default}
    try:
        read = PathPatterns("the pattern", plain)
        clear = all(read.get(path, default) == value for path, value in values.items())
    except FileError:  # a path that is a different pattern, or an invalid one
        clear = False
    return plain if clear else {f"^{re.escape(path)}": value for path, value in plain.items()}


def _targeted(paths: Sequence[str]) -> list[str] | str:
    """Return the paths, or an expression if PEFT, which matches suffixes, would confuse one with another."""
    ends = {path[place + 1 :] for path in paths for place, letter in enumerate(path) if letter == "."}
    unclear = any("." not in path or path in ends for path in paths)
    return "|".join(map(re.escape, sorted(paths))) if unclear else sorted(paths)


# -- What the file says about the base model: its name on the hub, and the task ----------------------------------------

# ``AutoPeftModel`` loads the base by them, and programs show them. PEFT's classes for tasks with a head train it whole:
# they copy it even if the file has none. So such a task is named only if the head is in the file; otherwise the file
# names the transformers class that builds the model.


#: PEFT's name of a task, and the modules that its class trains whole, by their names at any place in the model.
_PEFT_TASKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "text-generation": ("CAUSAL_LM", ()),
    "text2text-generation": ("SEQ_2_SEQ_LM", ()),
    "feature-extraction": ("FEATURE_EXTRACTION", ()),
    "text-classification": ("SEQ_CLS", ("classifier", "score")),
    "token-classification": ("TOKEN_CLS", ("classifier", "score")),
    "question-answering": ("QUESTION_ANS", ("qa_outputs",)),
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
    settings = dict[str, Any]()
    if about.name and not about.local and not about.remote:
        settings["base_model_name_or_path"] = about.name
        if about.revision:
            settings["revision"] = about.revision
    task, heads = _PEFT_TASKS.get(about.task, ("", ()))
    if task and _has_heads(heads, saved or ()):
        settings["task_type"] = task
    elif about.task:
        settings["auto_mapping"] = {"base_model_class": TASKS[about.task].model, "parent_library": "transformers"}
    return settings


def _has_heads(heads: Sequence[str], saved: Collection[str]) -> bool:
    """Return whether the modules that PEFT trains whole for a task are in the file as a whole."""
    inside = any(f".{head}." in f".{path}" for path in saved for head in heads)
    return not heads or (not inside and any(path.rpartition(".")[2] in heads for path in saved))
