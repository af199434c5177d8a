"""Pair the weights of one model under two sets of names, by role, shape and position.

Modules are renamed between releases. The order of a model's modules differs from that of the names in a checkpoint
(an encoder comes before its decoder, but not in the alphabet), so the order alone cannot pair them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .roles import natural, number
from .target import Target

__all__ = ["paired"]

# Names in formats that store the two halves of a rotary pair side by side; transformers reorders these rows of q and k.
_ROTARY = frozenset({"wq", "wk", "wqkv"})


def paired(wanted: Sequence[Target], found: Sequence[Target]) -> list[Target] | None:
    """Return, for each wanted target, the found target that is the same weight.

    Targets are paired by role, shape and the numbers in the path: layer 3 is layer 3. If the numbers changed as well,
    targets whose paths differ only in numbers form a stack and are paired in order. Remaining ties, as between an
    encoder and a decoder, are broken by path components that only some of them have.

    Parameters
    ----------
    wanted, found : sequence of Target

    Returns
    -------
    list of Target or None
        In the order of ``wanted``; None if they do not correspond one to one, or cannot be told apart.

    Examples
    --------
    >>> def queries(*paths):
    ...     return [Target(path, (4, 4), "q") for path in paths]
    >>> found = queries("decoder.block.0.query", "encoder.block.0.query")
    >>> [target.module for target in paired(queries("encoder.layers.0.q", "decoder.layers.0.q"), found)]
    ['encoder.block.0.query', 'decoder.block.0.query']
    >>> paired(queries("first.q", "second.q"), found) is None
    True
    """
    if len(wanted) != len(found):
        return None
    for grouped in (_by_numbers, _by_stack):
        theirs, ours = grouped(wanted), grouped(found)
        partner: dict[Target, Target] = {}
        for kind, stacks in theirs.items():
            for mine, other in _matched(stacks, ours.get(kind, {})):
                partner.update(zip(mine, other, strict=True))
        if len(partner) == len(wanted):
            same = not any(_reordered(target, other) for target, other in partner.items())
            return [partner[target] for target in wanted] if same else None
    return None


# Maps what two stacks must have in common to the stacks: each path, without its numbers, and its targets in order.
_Groups = dict[tuple[object, ...], dict[str, list[Target]]]


def _by_numbers(targets: Sequence[Target]) -> _Groups:
    groups: _Groups = {}
    for target in targets:
        digits = re.findall(r"\d+", target.name)
        numbers = [part if (value := number(part)) is None else value for part in digits]
        group = groups.setdefault((target.role, target.shape, *numbers), {})
        group.setdefault(target.name, []).append(target)
    return groups


def _by_stack(targets: Sequence[Target]) -> _Groups:
    stacks: dict[tuple[str, str], list[Target]] = {}
    for target in targets:
        path = ".".join("*" if part.isdecimal() else part for part in target.name.split("."))
        stacks.setdefault((target.role, path), []).append(target)
    groups: _Groups = {}
    for (role, path), stack in stacks.items():
        stack.sort(key=lambda target: natural(target.name))
        groups.setdefault((role, *(target.shape for target in stack)), {})[path] = stack
    return groups


def _matched(theirs: dict[str, list[Target]], ours: dict[str, list[Target]]) -> list[tuple[list[Target], list[Target]]]:
    if len(theirs) == len(ours) == 1 and [*map(len, theirs.values())] == [*map(len, ours.values())]:
        return list(zip(theirs.values(), ours.values(), strict=True))
    told, by_words = _told_apart(theirs), _told_apart(ours)
    return [
        (stack, by_words[words])
        for words, stack in told.items()
        if words in by_words and len(stack) == len(by_words[words])
    ]


def _told_apart(stacks: dict[str, list[Target]]) -> dict[frozenset[str], list[Target]]:
    """Key the stacks by the path words that not all of them have; empty if two stacks have the same ones."""
    words = {path: frozenset(re.split(r"[._]", re.sub(r"\b\d+\b", "*", path))) for path in stacks}
    common = frozenset.intersection(*words.values()) if words else frozenset()
    found = {words[path] - common: stack for path, stack in stacks.items()}
    return found if len(found) == len(stacks) else {}


def _reordered(target: Target, other: Target) -> bool:
    names = {one.module.rpartition(".")[2] in _ROTARY for one in (target, other)}
    return target.role in ("q", "k") and len(names) == 2
