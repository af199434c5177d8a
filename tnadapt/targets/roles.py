"""Names of projections in attention modules (q, k, v, o), and the words by which targets are chosen.

A name is read word by word. One word, or several in a row, says which of q, k and v a weight produces (``query``,
``kv``, ``query_key_value``). Every other word must merely say "projection" (``to``, ``proj``, ``lin``) or name the
stream that it reads (``add``, ``text``, ``global``). So ``to_q``, ``q_proj``, ``add_q_proj`` and ``Wq`` are queries,
while ``pool_q``, ``pos_query_proj`` and ``q_norm`` are not. The words are those of transformers, timm, diffusers and
torchvision.

Targets are chosen by roles, keywords, regular expressions or parts of paths, on models and in checkpoints alike.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

from tnadapt.errors import TargetError, safe_repr

from .fused_rows import Fused, LayoutError
from .target import Rows

# -- The name of one projection ----------------------------------------------------------------------------------------


_LETTERS = {
    "q": "q", "qs": "q", "query": "q", "queries": "q",
    "k": "k", "ks": "k", "key": "k", "keys": "k",
    "v": "v", "vs": "v", "value": "v", "values": "v",
    "qk": "qk", "kv": "kv", "qkv": "qkv", "qkvz": "qkv",
}  # fmt: skip

# Words that identify a projection, whatever its parent.
_PROJECTION = {"to", "w", "proj", "projection", "project", "lin", "linear"}

# Words that only say that this is a layer, or which part of an attention it belongs to. "b" is the second factor of a
# query or key-value projection in two steps (DeepSeek's latent attention).
_LAYER = {"layer", "head", "net", "fc", "dense", "weight", "in", "attn", "att", "attention", "self", "cross", "b"}

# Words for the input that the projection reads, where an attention has several.
_STREAM = {
    "add", "added", "global", "layout", "img", "image", "txt", "text", "vision", "cam", "t", "content", "mlp",
    "protein", "structure", "msa", "w2e", "e2w", "e2e",
}  # fmt: skip

# Next to one of these words, "value" is as likely the value of a state in reinforcement learning.
_HEAD = {"head", "net", "fc"}

# Names that do not spell out what they produce. The last counts in attention modules only.
_WHOLE = {"c_attn": "qkv", "att_proj": "qkv", "W_pack": "qkv", "in_proj_weight": "qkv"}
_WHOLE_IN_ATTENTION = {"in_proj": "qkv"}

OUTPUTS = frozenset(
    {
        "o", "o_proj", "o_b_proj", "o_lin", "o_linear", "o_net", "out_proj", "out_lin", "out_linear", "out_layer",
        "out_projection", "output_proj", "to_out", "to_add_out", "wo", "wo_b", "Wo", "W_o", "lin_o", "lin_out",
        "linear_o", "linear_out", "proj_o", "proj_out", "c_proj", "fc_o", "fc_out", "attention_out", "attn_out",
        "attn_out_proj", "attn_proj", "proj_attn", "img_attn_proj", "txt_attn_proj",
    }
)  # fmt: skip
# Outputs only if none of the above is present: otherwise these names belong to something else.
AMBIGUOUS_OUTPUTS = frozenset({"proj", "projection", "projection_layer", "dense", "out", "output", "post"})


class ProjectionName(NamedTuple):
    """The parsed name of a projection.

    Attributes
    ----------
    letters : str
        The letters among q, k and v that it produces, in the order of its words.
    family : str
        The name without these words, which q, k and v of one attention usually share.
    plain : bool
        Whether the name alone identifies a projection: ``to_q`` and ``query`` do, while ``q``, ``v_head`` and ``fc_q``
        may belong to a Q-function.
    """

    letters: str
    family: str
    plain: bool


@functools.lru_cache(maxsize=4096)
def parse_projection_name(name: str, attention: bool = False) -> ProjectionName | None:
    """Parse the name of a module or parameter; return None if it is not that of a projection to q, k or v.

    Parameters
    ----------
    name : str
        The last part of a dotted path.
    attention : bool
        Whether it lies in an attention module, where ``in_proj`` stands for q, k and v.

    Examples
    --------
    >>> parse_projection_name("add_q_proj"), parse_projection_name("Wqkv").letters, parse_projection_name("pool_q")
    (ProjectionName(letters='q', family='add_*_proj', plain=True), 'qkv', None)
    """
    whole = _WHOLE.get(name) or (_WHOLE_IN_ATTENTION.get(name) if attention else None)
    if whole is not None:
        return ProjectionName(whole, name, True)
    letters, family, long = "", [], False
    previous = False
    for word in _words(name):
        word_letters = _LETTERS.get(word)
        if word_letters is not None:
            if letters and not previous:
                return None
            letters += word_letters
            long = long or (len(word) > 2 and word not in ("qkv", "qkvz"))
            if not previous:
                family.append("*")
        elif word in _PROJECTION or word in _LAYER or word in _STREAM:
            family.append(word)
        else:
            return None
        previous = word_letters is not None
    if letters not in ("q", "k", "v", "qk", "kv", "qkv"):
        return None
    plain = not _PROJECTION.isdisjoint(family) or (long and _HEAD.isdisjoint(family))
    return ProjectionName(letters, "_".join(family), plain)


def projection_letters(name: str) -> str:
    """Return the letters q, k and v that occur among a name's words, whatever the other words.

    Examples
    --------
    >>> projection_letters("q_gate_proj"), parse_projection_name("q_gate_proj")
    ('q', None)
    """
    return "".join(_LETTERS.get(word, "") for word in _words(name))


def is_attention(*names: str) -> bool:
    """Return whether one of these names, of a class or the last part of a path, is that of an attention.

    Examples
    --------
    >>> is_attention("BertSelfAttention"), is_attention("WindowAttn"), is_attention("LatentPooling")
    (True, True, False)
    """
    return any(re.search(r"attention|attn|mhsa|mha\b|^mla$", name, re.IGNORECASE) for name in names)


def attention_group(names: Sequence[ProjectionName], named: bool, has_output: bool) -> list[int]:
    """Return the indices of those sibling names that together form an attention.

    Parameters
    ----------
    names : sequence of ProjectionName
        The parsed names of the weights in one module.
    named : bool
        Whether the module itself is named as an attention.
    has_output : bool
        Whether the module also has an output projection.

    Examples
    --------
    >>> q, v, value = map(parse_projection_name, ["q_proj", "v_proj", "value"])
    >>> attention_group([q, v], named=False, has_output=False)
    [0, 1]
    >>> attention_group([value], named=True, has_output=True)
    []
    """
    produced = _letters(names)
    if named and ({"q", "v"} <= produced or {"k", "v"} <= produced or ("q" in produced and has_output)):
        return list(range(len(names)))
    families: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        families.setdefault(name.family, []).append(place)
    kept = []
    for places in families.values():
        family = [names[place] for place in places]
        produced = _letters(family)
        if produced == {"q", "k", "v"} or (produced == {"q", "v"} and all(name.plain for name in family)):
            kept += places
    return kept


def _letters(names: Iterable[ProjectionName]) -> set[str]:
    return {letter for name in names for letter in name.letters}


def layer_of(path: str) -> str:
    """Return the path up to its last number, which identifies a layer for ``groups="layer"``.

    Examples
    --------
    >>> layer_of("encoder.layer.3.attention.self"), layer_of("middle.attention")
    ('encoder.layer.3', 'middle.attention')
    """
    parts = path.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[-1] + 1]) if numbers else path


def natural(path: str) -> list[tuple[bool, int, str]]:
    """Return the sort key for dotted paths in natural order: layer 2 before layer 10.

    Examples
    --------
    >>> sorted(["layers.10", "layers.2"], key=natural)
    ['layers.2', 'layers.10']
    """
    numbers = ((number(part), part) for part in path.split("."))
    return [(value is not None, value or 0, part) for value, part in numbers]


def number(part: str) -> int | None:
    """Return a part of a path as a number, or None for a word.

    More than 18 digits count as a word: no model has such numbers, and Python refuses to parse more than 4,300 digits.

    Examples
    --------
    >>> number("12"), number("attn"), number("9" * 5000)
    (12, None, None)
    """
    return int(part) if part.isdecimal() and len(part) <= 18 else None


def _words(name: str) -> list[str]:
    words = []
    for word in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", name):
        word = word.lower()
        if word not in _LETTERS and word[0] == "w" and word[1:] in _LETTERS:
            words += ["w", word[1:]]
        else:
            words.append(word)
    return words


# -- Sibling names that are the projections of one attention -----------------------------------------------------------

# A model in memory has modules and a checkpoint has tensor paths, so each finds the weights of a projection
# differently. The rules here are shared by both, so that an adapter finds the same weights in a model and in its
# checkpoint.


Weight = TypeVar("Weight", bound=Hashable)

# The name of a child or parameter, the parsed name, and the weights in it.
Called = tuple[str, ProjectionName, list[Weight]]

# In BERT, the attention's parent holds the output projection, output.dense. These names count only in a parent that is
# itself an attention: elsewhere they belong to the MLP.
PARENT_OUTPUTS = frozenset({"output", "out_proj", "dense"})

# Names of the projection inside a module that wraps it.
_PROJECTIONS = ("linear", "proj", "projection")


def main_projection(weights: Sequence[Weight], path: str, path_of: Callable[[Weight], str]) -> list[Weight]:
    """Return the weight at or below a path that is named as the projection; all weights if there is not exactly one.

    Parameters
    ----------
    weights : sequence
        Weights of any kind.
    path : str
    path_of : callable
        Returns the path of the module that holds a weight.

    Examples
    --------
    >>> main_projection(["q.down", "q.proj"], "q", str), main_projection(["q.down", "q.up"], "q", str)
    (['q.proj'], ['q.down', 'q.up'])
    """
    inner = [f"{path}.{name}" if path else name for name in _PROJECTIONS]
    called = [weight for weight in weights if path_of(weight) in inner]
    return called if len(called) == 1 else list(weights)


def settled_names(inputs: Sequence[Called[Weight]]) -> list[Called[Weight]]:
    """Resolve names whose letters depend on the sibling names.

    Examples
    --------
    >>> from tnadapt.targets.roles import parse_projection_name
    >>> beside = [(name, parse_projection_name(name), []) for name in ("q_attn", "c_attn")]
    >>> [(name, says.letters) for name, says, _ in settled_names(beside)]
    [('q_attn', 'q'), ('c_attn', 'kv')]
    """
    settled = list(inputs)
    if any(says.letters == "q" for _, says, _ in settled):
        # GPT-2: c_attn produces q, k and v, but in cross-attention only k and v, as q_attn produces the queries.
        settled = [
            (child, says._replace(letters="kv") if child == "c_attn" else says, ws) for child, says, ws in settled
        ]
    # The name in_proj does not say what it produces. Next to explicit projections it is the input of something else.
    separate = [entry for entry in settled if entry[1].family not in ("in_proj", "in_proj_weight")]
    return separate or settled


def distinct_rows(letters: Iterable[str], rows: Mapping[str, Rows | None]) -> Iterator[tuple[str, Rows | None]]:
    """Yield the letters of a weight to adapt, with their rows; for letters that share rows, only the first.

    Examples
    --------
    >>> list(distinct_rows("kv", {"k": None, "v": None}))  # one product is used as keys and values
    [('k', None)]
    """
    seen = set()
    for letter in letters:
        if letter in rows and rows[letter] not in seen:
            seen.add(rows[letter])
            yield letter, rows[letter]


# -- The attentions of a model, or of a checkpoint ---------------------------------------------------------------------

# A module is an attention if it holds projections to q and v next to each other (one weight or several, or only k and v
# if the query is learned). A single ``value`` or ``query`` elsewhere does not count, nor does deformable attention,
# which has only values.


class AttentionWeights(NamedTuple, Generic[Weight]):
    """The projections of one attention.

    Attributes
    ----------
    path : str
    inputs : list of (str, ProjectionName, Weight)
        Name in the module, what the name says about q, k and v, and the weight; in the module's order.
    outputs : list of Weight
    unclear : list of (str, str)
        Children that seem to produce q, k or v in an unknown way, and the letters they seem to produce.
    """

    path: str
    inputs: list[tuple[str, ProjectionName, Weight]]
    outputs: list[Weight]
    unclear: list[tuple[str, str]]


class ModuleTree(Generic[Weight]):
    """The modules of a model in memory, or of a checkpoint, by their paths; the attentions among them."""

    def paths(self) -> Iterable[str]:
        """Return the paths of all modules, in order."""
        raise NotImplementedError

    def is_attention(self, path: str) -> bool:
        """Return whether a module is known as an attention by its name or class."""
        raise NotImplementedError

    def children(self, path: str) -> Iterable[str]:
        """Return the names of a module's parameters and children."""
        raise NotImplementedError

    def projections(self, path: str, child: str) -> list[Weight]:
        """Return the weights of a parameter or child of a module; only one where it is clear which is the projection.

        They are hashable, and equal only where they are the same weight.
        """
        raise NotImplementedError

    def sizes(self, weight: Weight) -> tuple[int, int]:
        """Return the rows and columns of a weight."""
        raise NotImplementedError

    def fused_rows(self, path: str, child: str, weight: Weight, fused: Fused) -> dict[str, Rows | None]:
        """Return the rows that produce each letter; None where the whole weight does."""
        raise NotImplementedError

    @functools.cached_property
    def attentions(self) -> list[AttentionWeights[Weight]]:
        """Every attention, each weight in the first that has it."""
        seen: set[Weight] = set()
        attentions = []

        def is_new(weight: Weight) -> bool:
            known = weight in seen
            seen.add(weight)
            return not known

        for path in self.paths():
            children, named = list(self.children(path)), self.is_attention(path)
            parsed = [(child, parse_projection_name(child, named)) for child in children]
            called = [(child, name, self.projections(path, child)) for child, name in parsed if name is not None]
            called = settled_names([entry for entry in called if entry[2]])
            outputs = self._outputs(path, OUTPUTS) if called else []
            called = [called[place] for place in attention_group([entry[1] for entry in called], named, bool(outputs))]
            if not called:
                continue
            inputs = [
                (child, name, weights[0]) for child, name, weights in called if len(weights) == 1 and is_new(weights[0])
            ]
            unclear = [(child, name.letters) for child, name, weights in called if len(weights) > 1]
            unclear += self._half_understood(path, children, _letters(name for _, name, _ in called))
            if not inputs and not unclear:
                continue
            outputs = outputs or self._outputs(path, AMBIGUOUS_OUTPUTS)
            above = path.rpartition(".")[0]
            if not outputs and self.is_attention(above):
                outputs = self._outputs(above, PARENT_OUTPUTS)
            outputs = [weight for weight in outputs if is_new(weight)]
            attentions.append(AttentionWeights(path, inputs, outputs, unclear))
        return attentions

    def _outputs(self, path: str, names: frozenset[str]) -> list[Weight]:
        """Return the weights of the children with these names that hold exactly one weight."""
        weights = [self.projections(path, child) for child in self.children(path) if child in names]
        return [projections[0] for projections in weights if len(projections) == 1]

    def _half_understood(self, path: str, children: Iterable[str], produced: set[str]) -> Iterator[tuple[str, str]]:
        """Yield the children whose name has q or v among other words, with that letter if no other produces it."""
        for child in children:
            letters = projection_letters(child)
            missing = "".join(letter for letter in letters if letter in "qv" and letter not in produced)
            if missing and self.projections(path, child):
                yield child, missing

    def parts(self, attention: AttentionWeights[Weight], letters: str) -> Iterator[tuple[Weight, str, Rows | None]]:
        """Yield each weight that produces one of the letters, with the letter, and the rows if it has several.

        Raises
        ------
        LayoutError
            If a fused weight's layout is unknown, or it is unclear what produces a letter.
        """
        for child, makes in attention.unclear:
            if not set(makes).isdisjoint(letters):
                full_path = f"{attention.path}.{child}".lstrip(".")
                raise LayoutError(
                    f"{full_path} seems to produce {makes}, but with which weight or rows is unknown: name whole "
                    "weights in a list of paths, or give tnadapt.Target(path, shape, role, rows=tnadapt.Rows(…)) for it"
                )
        queries = [weight for _, name, weight in attention.inputs if name.letters == "q"]
        q_out = self.sizes(queries[0])[0] if queries else None
        o_in = self.sizes(attention.outputs[0])[1] if len(attention.outputs) == 1 else None
        for child, name, weight in attention.inputs:
            wanted = [letter for letter in "qkv" if letter in name.letters and letter in letters]
            rows: dict[str, Rows | None] = dict.fromkeys(name.letters)
            if wanted and len(name.letters) > 1:
                fused = Fused(name.letters, self.sizes(weight)[0], q_out, o_in)
                rows = self.fused_rows(attention.path, child, weight, fused)
            for letter, place in distinct_rows(wanted, rows):
                yield weight, letter, place
        if "o" in letters:
            for weight in attention.outputs:
                yield weight, "o", None


# -- The words by which targets and kept parameters are chosen ---------------------------------------------------------


#: Words that name targets, besides roles.
KEYWORDS = ("all-linear", "conv", "embeddings")
_ROLES = frozenset("qkvo")


def are_roles(word: str) -> bool:
    """Return whether a word consists of the letters of roles.

    Examples
    --------
    >>> are_roles("qv"), are_roles("query"), are_roles("")
    (True, False, False)
    """
    return bool(word) and _ROLES.issuperset(word)


def path_matcher(pattern: str, argument: str = "", ends: bool = False) -> Callable[[str], bool]:
    """Return a function that tells whether a regular expression matches a whole path, or also its last whole parts.

    Raises
    ------
    TargetError
        If it is not a regular expression; the message names the argument that has it.

    Examples
    --------
    >>> [path_matcher("mlp.*", ends=ends)("h.0.mlp.fc") for ends in (False, True)]
    [False, True]
    """
    try:
        compiled = re.compile(rf"(?:.*\.)?(?:{pattern})" if ends else pattern)
    except re.error as error:
        given = f"{argument}={safe_repr(pattern)}" if argument else safe_repr(pattern)
        raise TargetError(f"{given} is not a role, keyword or regular expression: {error}") from None
    return lambda path: compiled.fullmatch(path) is not None


def ends_in(path: str, entry: str) -> bool:
    """Return whether a path is the entry or ends in it, by whole parts.

    Examples
    --------
    >>> ends_in("h.0.mlp.fc", "mlp.fc"), ends_in("h.0.mlp.fc", "p.fc")
    (True, False)
    """
    return f".{path}".endswith(f".{entry}")


def is_within(path: str, entry: str) -> bool:
    """Return whether a path has the entry among its whole parts: what a kept module's name stands for.

    Examples
    --------
    >>> is_within("model.head.weight", "head"), is_within("header.weight", "head")
    (True, False)
    """
    return f".{entry}." in f".{path}."


def similar_paths(name: str, paths: Sequence[str]) -> list[str]:
    """Return up to four paths that resemble a name, or whose last part does.

    Examples
    --------
    >>> similar_paths("qurey", ["h.0.query", "h.1.query", "h.0.fc"])
    ['h.0.query']
    """
    last = {path.rpartition(".")[2]: path for path in reversed(paths)}
    close = (last.get(near, near) for near in difflib.get_close_matches(name, [*last, *paths], 4))
    return list(dict.fromkeys(close))
