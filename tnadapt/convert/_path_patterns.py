r"""Patterns of module paths that come from a file, such as the keys of PEFT's ``rank_pattern``.

PEFT takes them as regular expressions, and matching one that a stranger wrote may never end. Here they are compiled
without Python's ``re``: a path with or without unescaped dots is looked up in a table, and everything else becomes a
nondeterministic automaton, which reads each letter of a path once. What has no such automaton (lookarounds,
backreferences, flags) is refused.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tnadapt.errors import FileError, pluralize, safe_repr

__all__ = ["PathPatterns"]

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
_MAX_NODES = 20_000
_MAX_DEPTH = 16
#: Steps for all paths, which take about two seconds.
_MAX_STEPS = 2_000_000

# Where a pattern may start: at the first letter of the path, after a dot as well, or anywhere.
_WHOLE, _PART, _FREE = range(3)


class _Piece(NamedTuple):
    """One item of a pattern and how often it occurs: a letter, a class of letters, or a group of alternatives."""

    text: str = ""
    literal: bool = False
    group: Sequence[Sequence[_Piece]] | None = None
    low: int = 1
    high: int | None = 1


_START, _END, _DOT, _ANY = _Piece("^"), _Piece("$"), _Piece("."), _Piece(".", low=0, high=None)


class PathPatterns:
    r"""Values by patterns, each a regular expression for the end of a path that starts after a dot.

    Parameters
    ----------
    field : str
        What to call the patterns in messages.
    values : mapping of str to Any
        The value of each pattern.
    whole : bool
        Whether patterns are for whole paths, as in PEFT's ``target_modules``.

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

    def __init__(self, field: str, values: Mapping[str, Any], whole: bool = False) -> None:
        self._field, self._values, self._steps = field, list(values.values()), 0
        # Length, places of unescaped dots and start -> text with these dots -> place of the pattern.
        self._texts: dict[tuple[int, tuple[int, ...], int], dict[str, int]] = {}
        self._automaton = _Automaton()
        for place, key in enumerate(values):
            try:
                for where, pieces in _top_alternatives(key, _WHOLE if whole else _PART):
                    self._add(place, where, pieces)
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
        places = [*self._of_text(path), *self._of_automaton(path)]
        return self._values[min(places)] if places else default

    def _add(self, place: int, where: int, pieces: Sequence[_Piece]) -> None:
        """Add one alternative of a pattern."""
        if not all(piece == _DOT or (piece.literal and (piece.low, piece.high) == (1, 1)) for piece in pieces):
            self._automaton.add(place, where, pieces)
            return
        text = "".join(piece.text for piece in pieces)
        dots = tuple(index for index, piece in enumerate(pieces) if not piece.literal)
        self._texts.setdefault((len(text), dots, where), {}).setdefault(text, place)

    def _of_text(self, path: str) -> Iterator[int]:
        """Yield the places of the patterns without classes, groups and repetitions that match."""
        self._spend(len(self._texts) // 4)
        for (length, dots, where), places in self._texts.items():
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
            if text in places:
                yield places[text]

    def _of_automaton(self, path: str) -> Iterator[int]:
        """Yield the places of the other patterns that match."""
        automaton, active = self._automaton, set[int]()
        if not automaton.places:
            return
        for index, letter in enumerate((*path, "")):
            active.add(_FREE)
            if not index:
                active.add(_WHOLE)
            if not index or path[index - 1] == ".":
                active.add(_PART)
            active = automaton.closure(active)
            self._spend(len(active))
            if letter:
                active = automaton.after(active, letter)
        yield from (automaton.places[node] for node in active if node in automaton.places)

    def _spend(self, steps: int) -> None:
        self._steps += steps
        if self._steps > _MAX_STEPS:
            raise FileError(
                f"{self._field} has {pluralize(len(self._values), 'pattern')} that would take too long to match: write "
                "the modules' paths in full, which PEFT reads, too"
            )


class _UnsupportedError(Exception):
    """A pattern that is no regular expression, or not one of those that are supported."""


class _Automaton:
    """A nondeterministic automaton: a node is a number, and its edges read a letter, a class of letters or nothing.

    Patterns share the nodes of a common beginning: a node that an edge with a letter leads to has no other edge to it.
    """

    def __init__(self) -> None:
        self.places = dict[int, int]()
        self._letters = list[dict[str, int]]()
        self._classes = list[dict[str, int]]()
        self._empty = list[list[int]]()
        for _ in (_WHOLE, _PART, _FREE):
            self._new()

    def add(self, place: int, where: int, pieces: Sequence[_Piece]) -> None:
        """Add a pattern."""
        self.places.setdefault(self._group(where, [pieces]), place)

    def closure(self, nodes: set[int]) -> set[int]:
        """Return the nodes and those that edges without a letter lead to."""
        found, left = set(nodes), list(nodes)
        while left:
            new = [node for node in self._empty[left.pop()] if node not in found]
            found.update(new)
            left += new
        return found

    def after(self, nodes: set[int], letter: str) -> set[int]:
        """Return the nodes that a letter leads to."""
        found = {self._letters[node][letter] for node in nodes if letter in self._letters[node]}
        for node in nodes:
            found.update(to for text, to in self._classes[node].items() if _reads(text, letter))
        return found

    def _new(self) -> int:
        if len(self._empty) == _MAX_NODES:
            raise _UnsupportedError
        self._letters.append({})
        self._classes.append({})
        self._empty.append([])
        return len(self._empty) - 1

    def _group(self, start: int, alternatives: Sequence[Sequence[_Piece]]) -> int:
        """Add alternatives from a node, and return the node after them."""
        end = self._new()
        for pieces in alternatives:
            node = start
            for piece in pieces:
                node = self._repeated(node, piece)
            self._empty[node].append(end)
        return end

    def _repeated(self, node: int, piece: _Piece) -> int:
        for _ in range(piece.low):
            node = self._once(node, piece)
        if piece.high is None:
            loop = self._new()
            self._empty[node].append(loop)
            self._empty[self._once(loop, piece)].append(loop)
            return loop
        if piece.high == piece.low:
            return node
        end = self._new()
        for _ in range(piece.high - piece.low):
            self._empty[node].append(end)
            node = self._once(node, piece)
        self._empty[node].append(end)
        return end

    def _once(self, node: int, piece: _Piece) -> int:
        if piece.group is not None:
            return self._group(node, piece.group)
        edges = (self._letters if piece.literal else self._classes)[node]
        if piece.text not in edges:
            edges[piece.text] = self._new()
        return edges[piece.text]


def _top_alternatives(pattern: str, where: int) -> Iterator[tuple[int, Sequence[_Piece]]]:
    """Yield where each alternative of a pattern starts, and its pieces; raise _UnsupportedError."""
    for pieces in _parsed(pattern):
        start = where
        if pieces and pieces[0] == _START:
            start, pieces = _WHOLE, pieces[1:]
        elif pieces and pieces[0] == _ANY:
            start, pieces = _FREE, pieces[1:]
        yield start, pieces[:-1] if pieces and pieces[-1] == _END else pieces


def _parsed(pattern: str) -> list[list[_Piece]]:
    """Return the alternatives of a pattern; raise _UnsupportedError."""
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
        elif token[0].isalnum() or token[0] == "_":
            pieces += [_Piece(letter, True) for letter in token]
        elif token[0] not in "()^$*+?{":
            pieces.append(_letter(token))
        else:
            raise _UnsupportedError
    if outer:
        raise _UnsupportedError
    return alternatives


@functools.lru_cache(1 << 12)
def _reads(text: str, letter: str) -> bool:
    """Return whether a class has a letter."""
    return re.match(text, letter) is not None


def _letter(token: str) -> _Piece:
    if token == "." or token[0] == "[" or token[1:].isalpha():
        try:
            re.compile(token)
        except re.error:  # the ends of a range in the wrong order
            raise _UnsupportedError from None
        return _Piece(token)
    return _Piece(token[-1], literal=True)


def _bounds(token: str) -> tuple[int, int | None]:
    if token[0] != "{":
        return int(token[0] == "+"), 1 if token[0] == "?" else None
    low, comma, high = token.rstrip("?")[1:-1].partition(",")
    bounds = int(low), int(low) if not comma else int(high) if high else None
    if bounds[1] is not None and bounds[1] < bounds[0]:
        raise _UnsupportedError
    return bounds
