"""Rules that group sibling names into the projections of one attention.

A model in memory has modules and a checkpoint has tensor paths, so each finds the weights of a projection differently.
The rules here are shared by both, so that an adapter finds the same weights in a model and in its checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from .roles import ProjectionName, projection_letters
from .target import Rows

__all__ = ["PARENT_OUTPUTS", "Called", "distinct_rows", "main_projection", "settled_names", "unclear_children"]

Weight = TypeVar("Weight")

# The name of a child or parameter, the parsed name, and the weights in it.
Called = tuple[str, ProjectionName, list[Weight]]

# In BERT, the attention's parent holds the output projection, output.dense. These names count only in a parent that is
# itself an attention: elsewhere they belong to the MLP.
PARENT_OUTPUTS = frozenset({"output", "out_proj", "dense"})

# Names of the projection inside a module that wraps it.
_PROJECTIONS = ("linear", "proj", "projection")


def main_projection(found: Sequence[Weight], path: str, path_of: Callable[[Weight], str]) -> list[Weight]:
    """Return the weight at or below a path that is named as the projection; all weights if there is not exactly one.

    Parameters
    ----------
    found : sequence
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
    called = [weight for weight in found if path_of(weight) in inner]
    return called if len(called) == 1 else list(found)


def settled_names(found: Sequence[Called[Weight]]) -> list[Called[Weight]]:
    """Resolve names whose letters depend on the sibling names.

    Examples
    --------
    >>> from tnadapt.targets.roles import parse_projection_name
    >>> beside = [(name, parse_projection_name(name), []) for name in ("q_attn", "c_attn")]
    >>> [(name, says.letters) for name, says, _ in settled_names(beside)]
    [('q_attn', 'q'), ('c_attn', 'kv')]
    """
    settled = list(found)
    if any(says.letters == "q" for _, says, _ in settled):
        # GPT-2: c_attn produces q, k and v, but in cross-attention only k and v, as q_attn produces the queries.
        settled = [
            (child, says._replace(letters="kv") if child == "c_attn" else says, ws) for child, says, ws in settled
        ]
    # The name in_proj does not say what it produces. Next to explicit projections it is the input of something else.
    separate = [entry for entry in settled if entry[1].family not in ("in_proj", "in_proj_weight")]
    return separate or settled


def unclear_children(
    inputs: Sequence[Called[Weight]], children: Iterable[str], holds_weights: Callable[[str], bool]
) -> list[tuple[str, str]]:
    """Return the children of an attention that seem to produce q, k or v with a weight that cannot be determined.

    They hold several weights, or only part of their name is understood and nothing else produces its letter.

    Parameters
    ----------
    inputs : sequence of (str, ProjectionName, list)
        The projections whose names are understood.
    children : iterable of str
        All names in the attention.
    holds_weights : callable
        Returns whether a child of a given name is a projection at all.

    Returns
    -------
    list of (str, str)
        Names and the letters that they seem to produce.

    Examples
    --------
    >>> from tnadapt.targets.roles import parse_projection_name
    >>> inputs = [(name, parse_projection_name(name), [name]) for name in ("q_proj", "k_proj")]
    >>> unclear_children(inputs, ["q_proj", "k_proj", "v_gate_proj", "q_gate_proj"], lambda name: True)
    [('v_gate_proj', 'v')]
    """
    unclear = [(child, says.letters) for child, says, weights in inputs if len(weights) > 1]
    made = {letter for _, says, _ in inputs for letter in says.letters}
    for child in children:
        missing = "".join(letter for letter in projection_letters(child) if letter in "qv" and letter not in made)
        if missing and holds_weights(child):
            unclear.append((child, missing))
    return unclear


def distinct_rows(letters: Iterable[str], rows: Mapping[str, Rows | None]) -> Iterator[tuple[str, Rows | None]]:
    """Yield the letters of a weight to adapt, with their rows; for letters that share rows, only the first.

    Examples
    --------
    >>> list(distinct_rows("kv", {"k": None, "v": None}))  # one product is used as keys and values
    [('k', None)]
    """
    given = set()
    for letter in letters:
        if letter in rows and rows[letter] not in given:
            given.add(rows[letter])
            yield letter, rows[letter]
