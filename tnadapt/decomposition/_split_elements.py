"""Some elements of the tensor of one format, and their derivative by each of its arrays.

An element of the tensor is an einsum of the rows of the arrays that its indices select, so any set of elements is one
einsum over gathered rows, whatever the format. The tensor is linear in each array: the derivative of an element by an
array is the einsum of the other arrays' rows, and it is zero outside of the array's own rows.
"""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence

import numpy as np

from tnadapt.algebra.formats import Format

__all__ = ["SplitElements"]

# Stands for the elements among the indices of an einsum; no format has it in its formula.
_ELEMENT = "*"


class SplitElements:
    """Elements of the tensor of a format, at given places.

    Parameters
    ----------
    split : Format
        With a formula.
    places : sequence of ndarray of int, shape (n,)
        For each mode, the index of each element.

    Attributes
    ----------
    count : int
        n.
    """

    def __init__(self, split: Format, places: Sequence[np.ndarray]) -> None:
        self.shapes, self.count = split.shapes, len(places[0])
        inputs, _, output = split.formula.partition("->")
        self._indices = dict(zip(split.shapes, inputs.split(","), strict=True))
        modes = {index: mode for mode, index in enumerate(output)}
        # The axes of an array that are modes come first: they select its row.
        self._legs = {n: [a for a, i in enumerate(own) if i in modes] for n, own in self._indices.items()}
        self._bonds = {n: [a for a, i in enumerate(own) if i not in modes] for n, own in self._indices.items()}
        self._places = {n: [places[modes[self._indices[n][a]]] for a in legs] for n, legs in self._legs.items()}
        self._gathered = {
            name: (_ELEMENT if self._legs[name] else "") + "".join(own[axis] for axis in self._bonds[name])
            for name, own in self._indices.items()
        }
        self._whole = _Chain(list(self._gathered.values()), _ELEMENT)
        self._others = {name: self._other_arrays(name) for name in self.shapes}

    def _other_arrays(self, name: str) -> tuple[_Chain, list[int]]:
        """Return the einsum of the other arrays' rows, and which bonds of this array it leaves at length 1."""
        others = [own for other, own in self._gathered.items() if other != name]
        bonds = [self._indices[name][axis] for axis in self._bonds[name]]
        reached = [index for index in bonds if any(index in own for own in others)]
        output = (_ELEMENT if any(_ELEMENT in own for own in others) else "") + "".join(reached)
        # A bond that no other array has is summed over this array alone.
        return _Chain(others, output), [place for place, index in enumerate(bonds) if index not in reached]

    def rows(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return for each array the row of each element; an array without a mode as it is."""
        found = {}
        for name, places in self._places.items():
            turned = arrays[name].transpose(*self._legs[name], *self._bonds[name])
            found[name] = turned[tuple(places)] if places else turned
        return found

    def values(self, rows: Mapping[str, np.ndarray]) -> np.ndarray:
        """Compute the elements whose rows are given."""
        return self._whole([rows[name] for name in self.shapes])

    def derivative(self, rows: Mapping[str, np.ndarray], name: str, count: int) -> np.ndarray:
        """Compute the derivative of ``count`` elements by the row of an array that each selects, shape (count, width).

        The columns are the array's bonds in order.
        """
        chain, lone = self._others[name]
        bonds = [self.shapes[name][axis] for axis in self._bonds[name]]
        made = chain([rows[other] for other in self.shapes if other != name])
        if not chain.output.startswith(_ELEMENT):
            made = made[None]
        for place in lone:
            made = np.expand_dims(made, place + 1)
        return np.ascontiguousarray(np.broadcast_to(made, (count, *bonds))).reshape(count, -1)

    def width(self, name: str) -> int:
        """Return the number of elements of an array that an element of the tensor depends on."""
        return math.prod(self.shapes[name][axis] for axis in self._bonds[name])

    def selected(self, name: str) -> np.ndarray:
        """Return the number of each element's row among all rows of an array, shape (n,)."""
        sizes = [self.shapes[name][axis] for axis in self._legs[name]]
        if not sizes:
            return np.zeros(self.count, np.intp)
        return np.ravel_multi_index(tuple(self._places[name]), sizes)

    def positions(self, name: str) -> np.ndarray:
        """Return where in the flat array each of its rows lies, shape (rows, width)."""
        shape = self.shapes[name]
        flat = np.arange(math.prod(shape)).reshape(shape).transpose(*self._legs[name], *self._bonds[name])
        return flat.reshape(-1, self.width(name))


class _Chain:
    """An einsum of arrays from left to right, pair by pair, without a limit on the number of all indices."""

    def __init__(self, inputs: Sequence[str], output: str) -> None:
        self.output, self.steps = output, list[str]()
        now = inputs[0] if inputs else ""
        for place in range(1, len(inputs)):
            later = set(output).union(*inputs[place + 1 :])
            kept = "".join(index for index in dict.fromkeys(now + inputs[place]) if index in later)
            self.steps.append(_ascii([now, inputs[place]], kept))
            now = kept
        self.last = _ascii([now], output)

    def __call__(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        if not arrays:
            return np.ones(())
        now = arrays[0]
        for step, right in zip(self.steps, arrays[1:], strict=True):
            now = np.einsum(step, now, right)
        found: np.ndarray = np.einsum(self.last, now)
        return found


def _ascii(inputs: Sequence[str], output: str) -> str:
    """Return an einsum string with the indices named by ASCII letters."""
    named = dict(zip(dict.fromkeys("".join(inputs)), string.ascii_letters, strict=False))
    return ",".join("".join(named[i] for i in own) for own in inputs) + "->" + "".join(named[i] for i in output)
