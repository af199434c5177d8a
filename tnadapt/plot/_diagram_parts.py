"""The parts of a tensor diagram: nodes, bonds, legs and labels with their positions, and estimates of text widths.

Lengths are inches; y grows upward.
"""

from __future__ import annotations

import dataclasses

__all__ = ["BOND_POINTS", "KINDS", "RADIUS", "Bond", "Box", "Label", "Leg", "Node", "SplitDrawing", "some", "wide"]

# Half the width of a node, and the font size of labels on bonds.
RADIUS, BOND_POINTS = 0.21, 7.5

# Widths, at font size 1, of letters that are narrower or wider than a digit.
_EM = dict.fromkeys(" ,.:;()'ijlftrI|", 0.36) | dict.fromkeys("×=→⋯⊗⊙·mwMW–−", 0.88)

# Each kind of node: its letter in the picture and its text in the key. "frozen" is in the key alone, for nodes of any
# kind.
KINDS = {
    "factor": ("A", "factor"),
    "core": ("C", "core"),
    "weights": ("w", "weights of the components"),
    "train": ("G", "core of the train"),
    "dense": ("D", "dense array"),
    "array": ("T", "array"),
    "dot": ("", "one index on all its lines"),
    "frozen": ("", "frozen, not trained"),
}

#: Left, bottom, right and top.
Box = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class Node:
    """A tensor: one array of the plan, or the dot that gives all its lines one index.

    Attributes
    ----------
    name : str
        The array's name in the plan; a dot's name ends in ``dot``.
    kind : str
        A key of ``KINDS``.
    symbol : str
        The text inside the node.
    size : int
        Number of elements; 0 for a dot.
    x, y, width, height : float
        Center, full width and full height.
    frozen : bool
        Whether nothing of the array is trained.
    """

    name: str
    kind: str
    symbol: str
    size: int
    x: float
    y: float
    width: float = 2 * RADIUS
    height: float = 2 * RADIUS
    frozen: bool = False

    @property
    def is_array(self) -> bool:
        """Whether the node is an array rather than a dot."""
        return self.kind != "dot"


@dataclasses.dataclass(frozen=True)
class Bond:
    """An index that two nodes share and that is summed over.

    Attributes
    ----------
    ends : (str, str)
        Names of the two nodes, including a node that is not drawn.
    size : int
    line : tuple of (float, float)
        Its points from one end to the other; two for a straight line.
    """

    ends: tuple[str, str]
    size: int
    line: tuple[tuple[float, float], ...]


@dataclasses.dataclass(frozen=True)
class Leg:
    """An open index: a mode of the split."""

    node: str
    mode: int
    size: int
    x: float
    top: float
    bottom: float


@dataclasses.dataclass(frozen=True)
class Label:
    """Text in a picture.

    ``x`` is its middle, left or right end, depending on ``align``; ``y`` is the middle of its height. ``role`` is
    "size", "word" or "sign".
    """

    text: str
    x: float
    y: float
    points: float = BOND_POINTS
    align: str = "center"
    role: str = "size"

    @property
    def box(self) -> Box:
        """Approximate left, bottom, right and top."""
        width, height = wide(self.text, self.points), self.points / 72
        left = self.x - {"left": 0.0, "center": 0.5, "right": 1.0}[self.align] * width
        return left, self.y - height / 2, left + width, self.y + height / 2


@dataclasses.dataclass(frozen=True)
class SplitDrawing:
    """The drawing of one split.

    Attributes
    ----------
    x, y : float
        Position of its origin in the diagram.
    width, above, below : float
        Extent to the right of, above and below the origin.
    nodes, bonds, legs, labels
        Positions are relative to the origin.
    sizes : tuple of int
        Sizes of all its modes.
    left_out : int
        Number of modes that are not drawn.
    """

    x: float
    y: float
    width: float
    above: float
    below: float
    nodes: tuple[Node, ...]
    bonds: tuple[Bond, ...]
    legs: tuple[Leg, ...]
    labels: tuple[Label, ...]
    sizes: tuple[int, ...]
    left_out: int


def wide(text: str, points: float) -> float:
    """Return the approximate width of a text in inches.

    Examples
    --------
    >>> round(wide("3,763", 8), 2)
    0.32
    """
    return sum(_EM.get(letter, 0.636) for letter in text) * points / 72


def some(count: int, most: int, first: int) -> tuple[list[int], int]:
    """Return the indices of ``count`` items that are drawn, and how many are omitted before the last one.

    Up to ``most`` items are all drawn; of more, the ``first`` few and the last one.

    Examples
    --------
    >>> some(3, 5, 3), some(32, 5, 3)
    (([0, 1, 2], 0), ([0, 1, 2, 31], 28))
    """
    if count <= most:
        return list(range(count)), 0
    return [*range(first), count - 1], count - first - 1
