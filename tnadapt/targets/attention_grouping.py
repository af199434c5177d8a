"""How names that lie beside each other become the projections of one attention.

A model in memory shows modules, a checkpoint shows the paths of tensors; what counts as the weights of a projection is
asked of either in its own way. The rules here are the same for both, so that an adapter finds the same weights of a
model and of its checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from .roles import ProjectionName, projection_letters
from .target import Rows

__all__ = ["PARENT_OUTPUTS", "Called", "distinct_rows", "main_projection", "settled_names", "unclear_children"]

Weight = TypeVar("Weight")

# A child's or parameter's name, what the name says, and the weights in it.
Called = tuple[str, ProjectionName, list[Weight]]

# BERT's way: the attention's parent has the output projection, in output.dense. Called so in a parent that is itself an
# attention only: elsewhere these are the MLP's.
PARENT_OUTPUTS = frozenset({"output", "out_proj", "dense"})

# What the projection is called inside a module that is more than it.
_PROJECTIONS = ("linear", "proj", "projection")


def main_projection(found: Sequence[Weight], path: str, path_of: Callable[[Weight], str]) -> list[Weight]:
    """Of the weights at or below a path, the one that is called the projection; all if there is no such one.

    Parameters
    ----------
    found : sequence
        Weights of any kind.
    path : str
    path_of : callable
        The path of the module that holds a weight.

    Examples
    --------
    >>> main_projection(["q.down", "q.proj"], "q", str), main_projection(["q.down", "q.up"], "q", str)
    (['q.proj'], ['q.down', 'q.up'])
    """
    inner = [f"{path}.{name}" if path else name for name in _PROJECTIONS]
    called = [weight for weight in found if path_of(weight) in inner]
    return called if len(called) == 1 else list(found)


def settled_names(found: Sequence[Called[Weight]]) -> list[Called[Weight]]:
    """What each name makes, where the names beside it decide that.

    Examples
    --------
    >>> from tnadapt.targets.roles import parse_projection_name
    >>> beside = [(name, parse_projection_name(name), []) for name in ("q_attn", "c_attn")]
    >>> [(name, says.letters) for name, says, _ in settled_names(beside)]
    [('q_attn', 'q'), ('c_attn', 'kv')]
    """
    settled = list(found)
    if any(says.letters == "q" for _, says, _ in settled):
        # GPT-2's cross-attention: c_attn makes q, k and v, but only k and v where queries are made by q_attn.
        settled = [
            (child, says._replace(letters="kv") if child == "c_attn" else says, ws) for child, says, ws in settled
        ]
    # in_proj does not say what it makes. Beside projections that do, it is the way in of something else.
    separate = [entry for entry in settled if entry[1].family not in ("in_proj", "in_proj_weight")]
    return separate or settled


def unclear_children(
    inputs: Sequence[Called[Weight]], children: Iterable[str], holds_weights: Callable[[str], bool]
) -> list[tuple[str, str]]:
    """Children of an attention that seem to make some of q, k and v, and with which weight is not known.

    They hold several weights, or only half of their name is understood and a letter of it is made by nothing else.

    Parameters
    ----------
    inputs : sequence of (str, Name, list)
        What is understood.
    children : iterable of str
        All names in the attention.
    holds_weights : callable
        Whether a child of such a name is a projection at all.

    Returns
    -------
    list of (str, str)
        Names, and the letters that they seem to make.

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
    """The letters of a weight that are to be adapted, and their rows; of several that share their rows, the first.

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
