"""Check that no two targets update the same element of a stored parameter.

Patterns of rows have sizes that a file may choose freely, so they are compared by arithmetic, never enumerated. Lists
of rows are as long in the file as they are here.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tnadapt.errors import TargetError, safe_repr

from .target import RowIndices, Rows, Target

__all__ = ["check_distinct"]

# Different block lengths allowed for one stored parameter, as they are compared pairwise. Fused attention weights have
# one.
_MAX_STRIDES = 16


class _Part(NamedTuple):
    """A target's rows as a span within one period."""

    start: int
    stop: int
    number: int


def check_distinct(targets: Sequence[Target]) -> None:
    """Raise an error if two targets update the same row of one stored parameter.

    Parameters
    ----------
    targets : sequence of Target
        Targets on different rows of one parameter, such as q and v of a fused weight, are allowed.

    Raises
    ------
    TargetError
        If a target is repeated, two share a row, or two describe one parameter with different shapes or orders. The
        message names both targets and a shared row.

    Notes
    -----
    The time is O(n log n) in the number of targets and listed rows, whatever sizes and patterns they claim.

    Examples
    --------
    >>> q, v = (Target("attn.qkv", (6, 4), role, rows=Rows(start, 2, 6)) for role, start in (("q", 0), ("v", 4)))
    >>> check_distinct([q, v])
    >>> check_distinct([q, v, Target("attn.qkv", (6, 4), "k", rows=Rows(2, 3, 6))])
    Traceback (most recent call last):
        ...
    tnadapt.errors.TargetError: targets 1 and 2 overlap: both update row 4 of 'attn.qkv.weight' (1: role v, rows 4 to \
5 of 6; 2: role k, rows 2 to 4 of 6). Give each row of a weight to one target
    """
    by_name: dict[str, int | list[int]] = {}
    for number, target in enumerate(targets):
        before = by_name.setdefault(target.name, number)
        if isinstance(before, list):
            before.append(number)
        elif before != number:
            by_name[target.name] = [before, number]
    for numbers in by_name.values():
        if isinstance(numbers, list):
            _check_one(targets, numbers)


def _check_one(targets: Sequence[Target], numbers: Sequence[int]) -> None:
    """Check the targets of one parameter."""
    first = targets[numbers[0]]
    by_index: dict[int | None, list[int]] = {}
    for number in numbers:
        other = targets[number]
        if (other.stored, other.transposed, other.index is None) != (
            first.stored, first.transposed, first.index is None
        ):  # fmt: skip
            raise TargetError(
                f"targets {numbers[0]} and {number} describe {safe_repr(first.name)} differently: as {first.stored}"
                f"{_order(first)} and as {other.stored}{_order(other)}. One of them is wrong"
            )
        by_index.setdefault(other.index, []).append(number)
    for matrix in by_index.values():
        if len(matrix) > 1:
            _check_matrix(targets, matrix)


def _check_matrix(targets: Sequence[Target], numbers: Sequence[int]) -> None:
    """Check the targets of one matrix."""
    by_stride: dict[int, list[_Part]] = {}
    listed: list[int] = []
    for number in numbers:
        if isinstance(targets[number].rows, RowIndices):
            listed.append(number)
            continue
        rows = _rows(targets[number])
        by_stride.setdefault(rows.stride, []).append(_Part(rows.start, rows.start + rows.length, number))
    if len(by_stride) > _MAX_STRIDES:
        raise TargetError(
            f"the targets of {safe_repr(targets[numbers[0]].name)} divide its rows into blocks of {len(by_stride)} "
            f"different lengths; at most {_MAX_STRIDES} are supported"
        )
    for parts in by_stride.values():
        parts.sort()
        for one, two in itertools.pairwise(parts):
            if two.start < one.stop:
                raise _overlap(targets, one.number, two.number)
    for (stride, several), (longer, others) in itertools.combinations(by_stride.items(), 2):
        # Both patterns repeat over all rows, so every multiple of the strides' greatest common divisor occurs as an
        # offset between two blocks: two spans share a row if and only if they do so modulo that divisor.
        _check_folded(targets, several, others, math.gcd(stride, longer))
    _check_listed(targets, listed, by_stride)


def _check_listed(targets: Sequence[Target], listed: Sequence[int], by_stride: Mapping[int, list[_Part]]) -> None:
    """Check the targets whose rows are a list against each other, and against the sorted parts of the others."""
    owner: dict[int, int] = {}
    starts = {stride: [part.start for part in parts] for stride, parts in by_stride.items()}
    for number in listed:
        for row in targets[number].rows.indices():  # type: ignore[union-attr]  # a list of rows
            other = owner.setdefault(row, number)
            if other != number:
                raise _overlap(targets, other, number, row)
            for stride, parts in by_stride.items():
                place = bisect.bisect_right(starts[stride], row % stride) - 1
                if place >= 0 and row % stride < parts[place].stop:
                    raise _overlap(targets, parts[place].number, number, row)


def _check_folded(targets: Sequence[Target], ones: Sequence[_Part], twos: Sequence[_Part], period: int) -> None:
    folded = sorted(piece for part in ones for piece in _folded(part, period))
    starts = [piece.start for piece in folded]
    # For each place, the piece up to there that ends last.
    furthest = list(itertools.accumulate(folded, _further))
    for part in twos:
        for piece in _folded(part, period):
            place = bisect.bisect_left(starts, piece.stop) - 1
            if place >= 0 and furthest[place].stop > piece.start:
                raise _overlap(targets, furthest[place].number, part.number)


def _further(one: _Part, two: _Part) -> _Part:
    return one if one.stop >= two.stop else two


def _folded(part: _Part, period: int) -> list[_Part]:
    """Reduce a span modulo a period: to one piece, or two if it wraps around."""
    length, start = part.stop - part.start, part.start % period
    if length >= period:
        return [_Part(0, period, part.number)]
    if start + length <= period:
        return [_Part(start, start + length, part.number)]
    return [_Part(start, period, part.number), _Part(0, start + length - period, part.number)]


def _rows(target: Target) -> Rows:
    assert not isinstance(target.rows, RowIndices)  # these are compared row by row
    return Rows(0, target.out, target.out) if target.rows is None else target.rows


def _overlap(targets: Sequence[Target], one: int, two: int, row: int | None = None) -> TargetError:
    one, two = sorted((one, two))
    first, second = targets[one], targets[two]
    row = _shared(_rows(first), _rows(second)) if row is None else row
    name = safe_repr(first.name) if first.index is None else f"matrix {first.index} of {safe_repr(first.name)}"
    return TargetError(
        f"targets {one} and {two} overlap: both update row {row} of {name} ({one}: {_words(first)}; "
        f"{two}: {_words(second)}). Give each row of a weight to one target"
    )


def _shared(one: Rows, two: Rows) -> int:
    """Return a row that two overlapping patterns share, by the Chinese remainder theorem."""
    period = math.gcd(one.stride, two.stride)
    ahead = (two.start - one.start) % period
    # Modulo the period, either the second span begins within the first, or the other way round.
    within, beyond = (ahead, 0) if ahead < one.length else (0, -ahead % period)
    offset = two.start + beyond - one.start - within
    steps, turns = one.stride // period, two.stride // period
    block = offset // period * pow(steps, -1, turns) % turns if turns > 1 else 0
    return one.start + within + block * one.stride


def _words(target: Target) -> str:
    if isinstance(target.rows, RowIndices):
        numbers = target.rows.numbers
        more = f" and {len(numbers) - 4} more" if len(numbers) > 4 else ""
        return f"role {target.role}, rows {', '.join(map(str, numbers[:4]))}{more}"
    rows = _rows(target)
    if target.rows is None:
        return f"role {target.role}, all {rows.length} rows"
    return (
        f"role {target.role}, rows {rows.start} to {rows.start + rows.length - 1} of "
        + (f"each of {rows.count} blocks of " if rows.count > 1 else "")
        + f"{rows.stride}"
    )


def _order(target: Target) -> str:
    return " (in, out)" if target.transposed else ""
