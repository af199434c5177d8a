"""Match two sets of names of one model that differ by at most one common prefix, or by known renames.

A model's backbone is saved without the prefix, such as ``bert.``, that it has within the model for a task.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from tnadapt.errors import TargetError, safe_repr

from .target import Target

__all__ = ["Prefix", "found_prefix", "near_names", "renamed_targets", "stored_names"]


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
        # The other names of a tied weight are those of the model.
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
        shaped = [one for one in fitting if all(stored[one.of(t.name) or ""] == t.stored for t in targets)]
        if len(shaped) != 1:
            several = ", ".join(safe_repr(one.of(names[0])) for one in fitting[:4])
            raise TargetError(
                f"{safe_repr(names[0])} may be any of {several}, and it is unclear which: give a checkpoint of "
                "the model "
                "that it belongs to"
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
    >>> found, prefix = stored_names([tied], {"model.head.weight": (9, 4)})
    >>> found[0].name, found[0].tied, prefix
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
    >>> found, prefix = renamed_targets([target], {"layer.0.query.weight": (4, 4)}, known.__getitem__)
    >>> found[0].name, prefix
    ('vit.layer.0.query.weight', Prefix(taken='vit.', given=''))
    """
    options = [[_under(target, name) for name in names(target.name)] for target in targets]

    def fitting(prefixes: Iterable[Prefix]) -> list[tuple[list[Target], Prefix]]:
        whole = []
        for prefix in prefixes:
            chosen = [
                [one for one in known if stored.get(prefix.of(one.name) or "") == one.stored] for known in options
            ]
            if all(len(known) == 1 for known in chosen):
                whole.append(([known[0] for known in chosen], prefix))
        return whole

    found = fitting([Prefix()])
    if not found:
        found = fitting(dict.fromkeys(prefix for known in options[0] for prefix in _prefixes(stored, known.name)))
    return found[0] if len(found) == 1 else None


def _under(target: Target, name: str) -> Target:
    """Return a target whose parameter has another name."""
    if name == target.name:
        return target
    module, _, parameter = name.rpartition(".")
    return dataclasses.replace(target, module=module, parameter=parameter, tied=())


def _turned(target: Target, turn: int) -> Target:
    """Return a target under another of its names."""
    names = [target.name, *target.tied]
    if turn == 0 or turn >= len(names):
        return target
    other = target.tied_targets()[turn - 1]
    return dataclasses.replace(other, tied=tuple(name for name in names if name != names[turn]))


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
