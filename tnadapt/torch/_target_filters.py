"""The targets that ``layers`` leaves, and those that ``exclude`` removes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from tnadapt.errors import TargetError, TnadaptError, pluralize, safe_repr
from tnadapt.targets.overlaps import check_distinct
from tnadapt.targets.roles import number
from tnadapt.targets.target import Target

from ._target_search import WORDS, TargetSearch
from ._weights import plain

__all__ = ["in_layers", "without"]

_ROLES = frozenset("qkvo")


# -- Layers ------------------------------------------------------------------------------------------


def in_layers(search: TargetSearch, found: Sequence[Target], layers: Any) -> list[Target]:
    """Return the targets in these layers.

    Parameters
    ----------
    search : TargetSearch
        Of the model.
    found : sequence of Target
    layers : int or iterable of int
        Negative ones count from the end of each stack of layers.

    Returns
    -------
    list of Target

    Raises
    ------
    TargetError
        If ``layers`` is of another type, there is no such layer, or no target is in one.
    """
    wanted = _numbers(layers)
    places = [_place(target.module) for target in found]
    if all(place is None for place in places):
        raise TargetError(
            f"layers={safe_repr(layers)}: no number of a layer is in the paths of the targets, such as "
            f"{safe_repr(found[0].module)}; leave layers out, or give the targets as a list or a regular expression"
        )
    sizes = _sizes(path for path, _ in search.places)
    sizes = {stack: size for stack, size in sizes.items() if stack in {place[0] for place in places if place}}
    for index in wanted:
        if not any(-size <= index < size for size in sizes.values()):
            there = ", ".join(
                f"{safe_repr(stack) if stack else 'the model'} has 0 to {size - 1}" for stack, size in sizes.items()
            )
            raise TargetError(f"layers={safe_repr(layers)}: there is no layer {index}; {there}")
    chosen = [
        target
        for target, place in zip(found, places, strict=True)
        if place is not None and not wanted.isdisjoint((place[1], place[1] - sizes[place[0]]))
    ]
    if not chosen:
        there = _ranges({place[1] for place in places if place is not None})
        raise TargetError(f"layers={safe_repr(layers)} leaves no target: they are in the layers {there}")
    return chosen


def _numbers(layers: Any) -> set[int]:
    listed = [layers] if isinstance(layers, int) else layers
    try:
        wanted = list(listed)
    except TypeError:
        wanted = []
    if (
        isinstance(layers, str)
        or not wanted
        or any(isinstance(one, bool) or not isinstance(one, int) for one in wanted)
    ):
        raise TargetError(
            "layers must be the number of a layer, a range or a list of such numbers, of which negative ones count "
            f"from the end; got {safe_repr(layers)}"
        )
    return set(wanted)


def _place(path: str) -> tuple[str, int] | None:
    """Return the stack and the number of the layer that a module is in: the first number above it in its path.

    The first one: with experts or blocks of stages, later numbers are those of parts of a layer.
    """
    parts = plain(path).split(".")[:-1]
    for place, part in enumerate(parts):
        found = number(part)
        if found is not None:
            return ".".join(parts[:place]), found
    return None


def _sizes(paths: Iterable[str]) -> dict[str, int]:
    """Return the number of layers in each stack."""
    sizes: dict[str, int] = {}
    for path in paths:
        stack, _, last = plain(path).rpartition(".")
        index = number(last)
        if index is not None:
            sizes[stack] = max(sizes.get(stack, 0), index + 1)
    return sizes


def _ranges(numbers: Iterable[int]) -> str:
    runs: list[list[int]] = []
    for each in sorted(numbers):
        if runs and each == runs[-1][1] + 1:
            runs[-1][1] = each
        else:
            runs.append([each, each])
    return ", ".join(f"{first}" if first == last else f"{first} to {last}" for first, last in runs)


# -- Exclusion ---------------------------------------------------------------------------------------


def without(search: TargetSearch, found: Sequence[Target], exclude: Any) -> list[Target]:
    """Return the targets that are not excluded.

    Parameters
    ----------
    search : TargetSearch
        Of the model.
    found : sequence of Target
    exclude : str, list or callable
        As ``targets``; a path stands for everything at or below it.

    Returns
    -------
    list of Target

    Raises
    ------
    TargetError
        If it has another type, it excludes nothing or everything, an entry of a list is nowhere in the model, or it
        excludes rows of a weight that is a target as a whole.
    """
    below, weights = _excluded(search, exclude)
    rows: dict[tuple[str, str], list[Target]] = {}
    for target in weights:
        rows.setdefault((target.module, target.parameter), []).append(target)
    kept = [
        target
        for target in found
        if not any(part in below for part in _above(target.module))
        and not _covered(target, rows.get((target.module, target.parameter), []))
    ]
    if len(kept) == len(found):
        some = ", ".join(dict.fromkeys(target.name for target in found[:4]))
        if isinstance(exclude, str) and any(exclude in target.module.split(".") for target in found):
            raise TargetError(
                f"exclude={safe_repr(exclude)} is a regular expression for the whole path of a module, and excludes "
                f"none of the {pluralize(len(found), 'target')}, such as {some}; a list takes the last whole parts of "
                f"paths: exclude=[{exclude!r}]"
            )
        raise TargetError(
            f"exclude={safe_repr(exclude)} excludes none of the {pluralize(len(found), 'target')}, such as {some}; "
            "leave it out, or give the path of a module, roles or a regular expression for the whole path of a module"
        )
    if not kept:
        raise TargetError(f"exclude={safe_repr(exclude)} excludes all of the {pluralize(len(found), 'target')}")
    return kept


def _excluded(search: TargetSearch, exclude: Any) -> tuple[set[str], list[Target]]:
    """Return the paths of modules that are excluded with everything below, and the targets that are."""
    paths = [path for path, _ in search.places]
    if isinstance(exclude, str) and exclude and (exclude in WORDS or _ROLES.issuperset(exclude)):
        return set(), search.find(exclude)
    if isinstance(exclude, str):
        try:
            pattern = re.compile(exclude)
        except re.error as error:
            raise TargetError(
                f"exclude={safe_repr(exclude)} is not a role, keyword or regular expression: {error}"
            ) from None
        return {path for path in paths if any(pattern.fullmatch(one) for one in (path, plain(path)))}, []
    if callable(exclude):
        below: set[str] = set()
        return below, search.find(_apart(exclude, below))
    if not isinstance(exclude, (list, tuple, set, frozenset)):
        raise TargetError(
            "exclude must be roles such as 'qv', 'all-linear', 'conv', a regular expression, a list or a function, as "
            f"targets; got {safe_repr(exclude)}"
        )
    modules, targets = set[str](), list[Target]()
    for entry in exclude:
        ends = {path for path in paths if isinstance(entry, str) and entry and _ends(entry, path)}
        modules |= ends
        if not ends:
            targets += search.find([entry])  # a parameter, roles of an attention, a Target; or an error
    return modules, targets


def _apart(choose: Callable[[str, nn.Module], Any], below: set[str]) -> Callable[[str, nn.Module], Any]:
    """Return the function without its answers True, whose paths are put into ``below``."""

    def chosen(path: str, module: nn.Module) -> Any:
        found = choose(path, module)
        if found is not True:
            return found
        below.add(path)
        return None

    return chosen


def _ends(entry: str, path: str) -> bool:
    return any(one == entry or one.endswith(f".{entry}") for one in (path, plain(path)))


def _above(path: str) -> Iterator[str]:
    """Yield a path, and those of the modules that it is in."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


def _covered(target: Target, excluded: Sequence[Target]) -> bool:
    """Return whether a target is excluded; raise a TargetError if only some of its rows are."""
    for other in excluded:
        if other.rows is None or other.rows == target.rows:
            return True
        try:
            check_distinct([target, other])
        except TnadaptError:
            raise TargetError(
                f"exclude names the role {other.role!r} of {target.name}, of which other rows are a target as well: "
                "name the roles to adapt in targets, such as 'qv'"
            ) from None
    return False
