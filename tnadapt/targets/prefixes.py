"""Match the weights of one model under two sets of names: by a common prefix, by renames, or by role and shape.

A model's backbone is saved without the prefix, such as ``bert.``, that it has within the model for a task.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from tnadapt.errors import TargetError, safe_repr

from .roles import natural, number
from .target import Target

# -- Names that differ by a common prefix, or by known renames ---------------------------------------------------------


class Prefix(NamedTuple):
    """The prefix by which names in two places differ.

    Attributes
    ----------
    taken : str
        Prefix to remove; empty for none.
    given : str
        Prefix to add; empty for none.
    """

    taken: str = ""
    given: str = ""

    def of(self, name: str) -> str | None:
        """Return the other name, or None if the name lacks the prefix to remove."""
        return self.given + name.removeprefix(self.taken) if name.startswith(self.taken) else None

    def target(self, target: Target) -> Target:
        """Return a target under its other name.

        Raises
        ------
        TargetError
            If the name lacks the prefix to remove.
        """
        name = self.of(target.name)
        if name is None:
            raise TargetError(f"{target.name} does not begin with {safe_repr(self.taken)}")
        # The other names of a tied weight are the model's.
        return dataclasses.replace(target, module=name.removesuffix(target.parameter).removesuffix("."), tied=())

    def __str__(self) -> str:
        if self.taken:
            return f"names without {safe_repr(self.taken)}"
        return f"names with {safe_repr(self.given)} before them" if self.given else ""


def found_prefix(targets: Sequence[Target], stored: Mapping[str, tuple[int, ...]]) -> Prefix | None:
    """Return the prefix under which all targets are stored, or None if there is none.

    Parameters
    ----------
    targets : sequence of Target
    stored : mapping of str to tuple of int
        Name and shape of every tensor.

    Returns
    -------
    Prefix or None

    Raises
    ------
    TargetError
        If several fit, for example if an encoder and a decoder have modules of the same names, and shapes do not tell
        them apart.

    Examples
    --------
    >>> found_prefix([Target("bert.layer.0.q", (4, 4))], {"layer.0.q.weight": (4, 4), "pooler.weight": (4, 4)})
    Prefix(taken='bert.', given='')
    """
    names = [target.name for target in targets]
    if all(name in stored for name in names):
        return Prefix()
    fitting = [prefix for prefix in _prefixes(stored, names[0]) if all(prefix.of(name) in stored for name in names)]
    if len(fitting) > 1:
        shaped = [prefix for prefix in fitting if all(stored[prefix.of(t.name) or ""] == t.stored for t in targets)]
        if len(shaped) != 1:
            several = ", ".join(safe_repr(prefix.of(names[0])) for prefix in fitting[:4])
            raise TargetError(
                f"{safe_repr(names[0])} may be any of {several}, and it is unclear which: give a checkpoint of the "
                "model that it belongs to"
            )
        fitting = shaped
    return fitting[0] if fitting else None


def stored_names(
    targets: Sequence[Target], stored: Mapping[str, tuple[int, ...]]
) -> tuple[Sequence[Target], Prefix | None]:
    """Return targets whose names are stored, under one prefix, with the prefix; of a tied weight any of its names.

    Raises
    ------
    TargetError
        As :func:`found_prefix`.

    Examples
    --------
    >>> tied = Target("embed", (9, 4), tied=("head.weight",))
    >>> targets, prefix = stored_names([tied], {"model.head.weight": (9, 4)})
    >>> targets[0].name, targets[0].tied, prefix
    ('head.weight', ('embed.weight',), Prefix(taken='', given='model.'))
    """
    most = max((len(target.tied) for target in targets), default=0)
    for turn in range(most + 1):
        named = [_turned(target, turn) for target in targets]
        prefix = found_prefix(named, stored)
        if prefix is not None:
            return named, prefix
    return targets, None


def renamed_targets(
    targets: Sequence[Target], stored: Mapping[str, tuple[int, ...]], names: Callable[[str], Sequence[str]]
) -> tuple[list[Target], Prefix] | None:
    """Return targets under other names that are known for them, and the common prefix by which these are stored.

    Parameters
    ----------
    targets : sequence of Target
    stored : mapping of str to tuple of int
        Name and shape of every tensor.
    names : callable
        Returns the names that a parameter may have.

    Returns
    -------
    tuple of (list of Target, Prefix) or None
        None unless exactly one choice of names fits, shapes included.

    Examples
    --------
    >>> target = Target("vit.layers.0.q_proj", (4, 4))
    >>> known = {"vit.layers.0.q_proj.weight": ["vit.layer.0.query.weight"]}
    >>> renamed, prefix = renamed_targets([target], {"layer.0.query.weight": (4, 4)}, known.__getitem__)
    >>> renamed[0].name, prefix
    ('vit.layer.0.query.weight', Prefix(taken='vit.', given=''))
    """
    options = [[_under(target, name) for name in names(target.name)] for target in targets]

    def fitting(prefixes: Iterable[Prefix]) -> list[tuple[list[Target], Prefix]]:
        whole = []
        for prefix in prefixes:
            chosen = [
                [target for target in known if stored.get(prefix.of(target.name) or "") == target.stored]
                for known in options
            ]
            if all(len(known) == 1 for known in chosen):
                whole.append(([known[0] for known in chosen], prefix))
        return whole

    choices = fitting([Prefix()])
    if not choices:
        choices = fitting(dict.fromkeys(prefix for known in options[0] for prefix in _prefixes(stored, known.name)))
    return choices[0] if len(choices) == 1 else None


def _under(target: Target, name: str) -> Target:
    """Return a target with another parameter name."""
    if name == target.name:
        return target
    module, _, parameter = name.rpartition(".")
    return dataclasses.replace(target, module=module, parameter=parameter, tied=())


def _turned(target: Target, turn: int) -> Target:
    """Return a tied target under another one of its names."""
    names = (target.name, *target.tied)
    if not 0 < turn < len(names):
        return target
    return dataclasses.replace(_under(target, names[turn]), tied=(*names[:turn], *names[turn + 1 :]))


def _prefixes(stored: Iterable[str], name: str) -> Iterator[Prefix]:
    """Yield every prefix that maps a name to a stored one."""
    known = set(stored)
    for other in sorted(known):
        if other.endswith(f".{name}"):
            yield Prefix(given=other.removesuffix(name))
    for position, letter in enumerate(name):
        if letter == "." and name[position + 1 :] in known:
            yield Prefix(taken=name[: position + 1])


def near_names(name: str, stored: Collection[str]) -> str:
    """Return the stored names most similar to a name, for a message; empty if none is close.

    Examples
    --------
    >>> near_names("layer.0.qery.weight", ["layer.0.query.weight", "bias"])
    "nearest: 'layer.0.query.weight'"
    """
    close = difflib.get_close_matches(name, stored, 3, 0.5)
    return f"nearest: {', '.join(map(safe_repr, close))}" if close else ""


# -- Pairs of weights by role, shape and position ----------------------------------------------------------------------

# Modules are renamed between releases. The order of a model's modules differs from that of the names in a checkpoint
# (an encoder comes before its decoder, but not in the alphabet), so the order alone cannot pair them.


# Names in formats that store the two halves of a rotary pair side by side; transformers reorders these rows of q and k.
_ROTARY = frozenset({"wq", "wk", "wqkv"})


def paired(wanted: Sequence[Target], candidates: Sequence[Target]) -> list[Target] | None:
    """Return, for each wanted target, the candidate that is the same weight.

    Targets are paired by role, shape and the numbers in the path: layer 3 is layer 3. If the numbers changed as well,
    targets whose paths differ only in numbers form a stack and are paired in order. Remaining ties, as between an
    encoder and a decoder, are broken by path components that only some of them have.

    Returns
    -------
    list of Target or None
        In the order of ``wanted``; None if they do not correspond one to one, or cannot be told apart.

    Examples
    --------
    >>> def queries(*paths):
    ...     return [Target(path, (4, 4), "q") for path in paths]
    >>> ours = queries("decoder.block.0.query", "encoder.block.0.query")
    >>> [target.module for target in paired(queries("encoder.layers.0.q", "decoder.layers.0.q"), ours)]
    ['encoder.block.0.query', 'decoder.block.0.query']
    >>> paired(queries("first.q", "second.q"), ours) is None
    True
    """
    if len(wanted) != len(candidates):
        return None
    for grouped in (_by_numbers, _by_stack):
        theirs, ours = grouped(wanted), grouped(candidates)
        partner: dict[Target, Target] = {}
        for key, stacks in theirs.items():
            for mine, other in _matched(stacks, ours.get(key, {})):
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
    """Key the stacks by path words that they do not all share, or return {} if two stacks have the same ones."""
    words = {path: frozenset(re.split(r"[._]", re.sub(r"\b\d+\b", "*", path))) for path in stacks}
    common = frozenset.intersection(*words.values()) if words else frozenset()
    by_words = {words[path] - common: stack for path, stack in stacks.items()}
    return by_words if len(by_words) == len(stacks) else {}


def _reordered(target: Target, other: Target) -> bool:
    names = {weight.module.rpartition(".")[2] in _ROTARY for weight in (target, other)}
    return target.role in ("q", "k") and len(names) == 2
