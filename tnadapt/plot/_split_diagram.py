"""One split of a group as nodes, bonds and legs in their places: numbers and words, nothing drawn.

Lengths are inches. The origin is the left end of the row in which factors stand; y grows upward.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from tnadapt.algebra.formats import Formula
from tnadapt.algebra.group import Group
from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.errors import ConfigError

__all__ = ["KINDS", "MODES", "Bond", "Box", "Label", "Leg", "Node", "SplitDrawing", "laid_out", "some", "wide"]

# Of more modes than this the first few are drawn, and the last one.
MODES, _FIRST = 10, 7
# Half a node, half a dot, between two modes, an open leg, from the factors' row up to what joins them.
_RADIUS, _DOT, _PITCH, _LEG, _UP = 0.21, 0.055, 0.64, 0.36, 0.98
_BELOW_BAR = -0.36
_LEG_POINTS, BOND_POINTS = 8.0, 7.5

# Widths of letters that are not as wide as a digit, for type of size 1.
_EM = dict.fromkeys(" ,.:;()'ijlftrI|", 0.36) | dict.fromkeys("×=→⋯⊗⊙·mwMW–−", 0.88)

# Of each kind of node: its letter in the picture, and what the key says.
KINDS = {
    "factor": ("A", "factor"),
    "core": ("C", "core"),
    "weights": ("w", "weights of the components"),
    "train": ("G", "core of the train"),
    "dense": ("D", "dense array"),
    "array": ("T", "array"),
    "dot": ("", "one index on all its lines"),
}

Box = tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class Node:
    """A tensor: one array of the plan, or the dot that gives all its lines one index.

    Attributes
    ----------
    name : str
        Of the array among the plan's; a dot's ends in ``dot``.
    kind : str
        A key of ``KINDS``.
    symbol : str
        What is written in it.
    size : int
        Elements; 0 for a dot.
    x, y, width, height : float
        The middle, and from side to side.
    """

    name: str
    kind: str
    symbol: str
    size: int
    x: float
    y: float
    width: float = 2 * _RADIUS
    height: float = 2 * _RADIUS

    @property
    def trained(self) -> bool:
        """Whether it is an array."""
        return self.kind != "dot"


@dataclasses.dataclass(frozen=True)
class Bond:
    """An index that two nodes share, and that is summed over.

    Attributes
    ----------
    ends : (str, str)
        The nodes' names; one that is not drawn is a name, too.
    size : int
    line : tuple of (float, float)
        Its points, from one end to the other: two of a straight line.
    """

    ends: tuple[str, str]
    size: int
    line: tuple[tuple[float, float], ...]


@dataclasses.dataclass(frozen=True)
class Leg:
    """An index that is left open: a mode of the split."""

    node: str
    mode: int
    size: int
    x: float
    top: float
    bottom: float


@dataclasses.dataclass(frozen=True)
class Label:
    """Words in a picture: their middle, or left or right end, and the middle of their height.

    ``role`` is "size", "word" or "sign".
    """

    text: str
    x: float
    y: float
    points: float = BOND_POINTS
    align: str = "center"
    role: str = "size"

    @property
    def box(self) -> Box:
        """Left, bottom, right and top, nearly."""
        width, height = wide(self.text, self.points), self.points / 72
        left = self.x - {"left": 0.0, "center": 0.5, "right": 1.0}[self.align] * width
        return left, self.y - height / 2, left + width, self.y + height / 2


@dataclasses.dataclass(frozen=True)
class SplitDrawing:
    """One split.

    Attributes
    ----------
    x, y : float
        Where its origin is in the diagram.
    width, above, below : float
        How far it goes to the right, up and down.
    nodes, bonds, legs, labels
        In their places from the origin on.
    sizes : tuple of int
        Of its modes.
    left_out : int
        Modes that are not drawn.
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
    """Inches that words take, nearly.

    Examples
    --------
    >>> round(wide("3,763", 8), 2)
    0.32
    """
    return sum(_EM.get(letter, 0.636) for letter in text) * points / 72


def some(count: int, most: int, first: int) -> tuple[list[int], int]:
    """Which of so many are drawn, and how many are not: these are before the last one.

    Examples
    --------
    >>> some(3, 5, 3), some(32, 5, 3)
    (([0, 1, 2], 0), ([0, 1, 2, 31], 28))
    """
    if count <= most:
        return list(range(count)), 0
    return [*range(first), count - 1], count - first - 1


class _Split:
    """The arrays of one split by the names that its format gives them, and the columns of its modes."""

    def __init__(self, plan: SuperLoRA, group: Group, k: int) -> None:
        network = group.network
        prefix, split = network.prefixes[0][k], network.splits[k]
        self.names = {name: group.names[prefix + name] for name in split.shapes}
        self.shapes = {name: plan.param_shapes[full] for name, full in self.names.items()}
        self.dot = next(iter(self.names.values())).rpartition(".")[0] + ".dot"
        self.sizes = split.sizes
        self.format = split
        self.shown, self.left_out = some(len(split.sizes), MODES, _FIRST)
        self.middles: dict[int, float] = {}
        self.gap, self.width = 0.0, 0.0
        self.nodes: list[Node] = []
        self.bonds: list[Bond] = []
        self.legs: list[Leg] = []
        self.labels: list[Label] = []

    def columns(self, least: Callable[[int], float], between: float = 0.0, lower: float = 0.0) -> None:
        """Where each mode that is drawn stands: in a column that is as wide as its labels, ``between`` apart.

        ``lower`` is where the dots are that stand for other modes.
        """
        x = 0.0
        for place, mode in enumerate(self.shown):
            if place:
                x += between
            if self.left_out and mode == self.shown[-1]:
                words = f"{self.left_out} more"
                gap = wide(max(words, "modes", key=len), BOND_POINTS) + 0.2
                gap = max(gap, least(self.shown[-2] + 1), least(mode - 1))
                self.gap = x + gap / 2
                self.labels += [
                    Label("⋯", self.gap, lower, 14.0, role="sign"),
                    Label(words, self.gap, lower - 0.2, role="word"),
                    Label("modes", self.gap, lower - 0.33, role="word"),
                ]
                x += gap
            column = max(_PITCH, wide(f"{self.sizes[mode]:,}", _LEG_POINTS) + 0.16, least(mode))
            self.middles[mode] = x + column / 2
            x += column
        self.width = x

    @property
    def middle(self) -> float:
        """Between the first and the last mode."""
        return (self.middles[self.shown[0]] + self.middles[self.shown[-1]]) / 2

    def node(self, name: str, kind: str, x: float, y: float, width: float = 2 * _RADIUS) -> None:
        letter = KINDS[kind][0]
        index = (
            str(list(self.names).index(name)) if kind == "array" else name.removeprefix("factor").removeprefix("core")
        )
        symbol = f"${letter}_{{{index}}}$" if index.isdigit() else f"${letter}$"
        self.nodes.append(Node(self.names[name], kind, symbol, math.prod(self.shapes[name]), x, y, width))

    def leg(self, name: str, mode: int, size: int, top: float) -> None:
        x, bottom = self.middles[mode], -_RADIUS - _LEG
        self.legs.append(Leg(self.names[name], mode, size, x, top, bottom))
        self.labels.append(Label(f"{size:,}", x, bottom - 0.1, _LEG_POINTS))

    def bar(self, name: str, kind: str, y: float) -> None:
        """A node over all modes."""
        ends = self.middles[self.shown[0]], self.middles[self.shown[-1]]
        self.node(name, kind, self.middle, y, ends[1] - ends[0] + 2 * _RADIUS)


def laid_out(plan: SuperLoRA, group: Group, k: int) -> SplitDrawing:
    """One split of a group, with its origin at 0.

    Parameters
    ----------
    plan : SuperLoRA
    group : Group
        One of the plan's.
    k : int
        Which split.

    Returns
    -------
    Part
        Of the first term.
    """
    split = _Split(plan, group, k)
    style = group.network.splits[k].diagram
    if style not in _STYLES:
        raise ConfigError(
            f"format {plan.config.format!r} has diagram={style!r}; expected one of {', '.join(_STYLES)}: 'network' "
            "draws any by its formula"
        )
    _STYLES[style](split)
    boxes = [label.box for label in split.labels]
    above = max(*(node.y + node.height / 2 for node in split.nodes), *(box[3] for box in boxes))
    return SplitDrawing(
        x=0.0, y=0.0, width=split.width, above=above, below=-min(box[1] for box in boxes), nodes=tuple(split.nodes),
        bonds=tuple(split.bonds), legs=tuple(split.legs), labels=tuple(split.labels), sizes=split.sizes,
        left_out=split.left_out,
    )  # fmt: skip


def _dense(split: _Split) -> None:
    split.columns(lambda mode: 0.0, lower=_BELOW_BAR)
    split.bar("dense", "dense", 0.0)
    for mode in split.shown:
        split.leg("dense", mode, split.shapes["dense"][mode], -_RADIUS)


def _train(split: _Split) -> None:
    ranks = [split.shapes[f"core{mode}"][2] for mode in range(len(split.sizes) - 1)]

    def least(mode: int) -> float:
        beside = ranks[max(0, mode - 1) : mode + 1]
        return 2 * _RADIUS + 0.2 + max([wide(f"{rank:,}", BOND_POINTS) for rank in beside] or [0.0])

    split.columns(least)
    for mode in split.shown:
        split.node(f"core{mode}", "train", split.middles[mode], 0.0)
        split.leg(f"core{mode}", mode, split.shapes[f"core{mode}"][1], -_RADIUS)
    for mode, rank in enumerate(ranks):
        if mode not in split.middles and mode + 1 not in split.middles:
            continue
        # A bond to what is left out ends at the dots that stand for it.
        start = split.middles[mode] + _RADIUS if mode in split.middles else split.gap + 0.14
        stop = split.middles[mode + 1] - _RADIUS if mode + 1 in split.middles else split.gap - 0.14
        names = split.names[f"core{mode}"], split.names[f"core{mode + 1}"]
        split.bonds.append(Bond(names, rank, ((start, 0.0), (stop, 0.0))))
        split.labels.append(Label(f"{rank:,}", (start + stop) / 2, 0.11))


def _tucker(split: _Split) -> None:
    core = split.shapes["core"]
    # Without any factor the core is a dense array, and stands where one would.
    height = _UP if len(split.shapes) > 1 else 0.0
    split.columns(lambda mode: 2 * (wide(f"{core[mode]:,}", BOND_POINTS) + 0.1), lower=0.0 if height else _BELOW_BAR)
    split.bar("core", "core", height)
    for mode in split.shown:
        x, factor = split.middles[mode], f"factor{mode}"
        if factor not in split.shapes:
            split.leg("core", mode, core[mode], height - _RADIUS)
            continue
        size, rank = split.shapes[factor]
        split.node(factor, "factor", x, 0.0)
        split.leg(factor, mode, size, -_RADIUS)
        ends = split.names["core"], split.names[factor]
        split.bonds.append(Bond(ends, rank, ((x, height - _RADIUS), (x, _RADIUS))))
        split.labels.append(Label(f"{rank:,}", x + 0.06, height / 2, align="left"))


def _cp(split: _Split) -> None:
    rank = split.shapes["factor0"][1]
    label = f"r = {rank:,}"
    two = len(split.sizes) == 2
    needed = wide(label, BOND_POINTS)
    if two:
        split.columns(lambda mode: 0.0, max(0.3, needed - 0.1))
    else:
        split.columns(lambda mode: 2 * (needed + 0.14) / len(split.shown))
    x, y = split.middle, 0.0 if two else _UP
    dot = Node(split.dot, "dot", "", 0, x, y, 2 * _DOT, 2 * _DOT)
    for mode in split.shown:
        factor = f"factor{mode}"
        size, shared = split.shapes[factor]
        split.node(factor, "factor", split.middles[mode], 0.0)
        split.leg(factor, mode, size, -_RADIUS)
        end = (split.middles[mode] + math.copysign(_RADIUS, x - split.middles[mode]), 0.0)
        end = end if two else (split.middles[mode], _RADIUS)
        split.bonds.append(Bond((split.dot, split.names[factor]), shared, ((x, y), end)))
    split.nodes.insert(1, dot)
    if "weights" in split.shapes:
        top = y + 0.62
        split.node("weights", "weights", x, top)
        (number,) = split.shapes["weights"]
        split.bonds.append(Bond((split.names["weights"], split.dot), number, ((x, top - _RADIUS), (x, y))))
    if two:
        split.labels.append(Label(label, x, -0.16))
    elif len(split.sizes) == 1 or "weights" in split.shapes:
        split.labels.append(Label(label, x + 0.12, y + 0.14, align="left"))
    else:
        split.labels.append(Label(label, x, y + 0.16))


# How far apart the lines of bonds that pass over other nodes are, and where the first one is.
_OVER, _FIRST_OVER = 0.2, 0.36


def _network(split: _Split) -> None:
    """Any network, by its formula: the arrays in a row, each over its modes, and bonds as lines between them.

    Neighbors are joined by straight lines; a bond that has to pass over other arrays goes above them, each at a height
    of its own. An index on more than two arrays has a dot above them.
    """
    formula = Formula.parsed(split.format.formula, len(split.shapes), len(split.sizes))
    size = formula.sizes(list(split.shapes.values()))
    names = list(split.shapes)
    mode_of = {index: mode for mode, index in enumerate(formula.output)}
    # The first array with a mode stands in the mode's column; an array with no mode of its own in a column at the end.
    column: dict[str, float] = {}
    bonds = [index for index in size if index not in mode_of]
    labels = [wide(f"{size[index]:,}", BOND_POINTS) for index in bonds]
    split.columns(lambda mode: 2 * _RADIUS + 0.2 + max([0.0, *labels]))
    for name, own in zip(names, formula.inputs, strict=True):
        for index in own:
            mode = mode_of.get(index)
            if mode is not None and mode in split.middles and split.middles[mode] not in column.values():
                column[name] = split.middles[mode]
                break
        else:
            if any(index in mode_of for index in own):
                continue  # its modes are among those left out
            column[name] = split.width + _PITCH / 2
            split.width += _PITCH
    for name, x in column.items():
        split.node(name, "array", x, 0.0)
    drawn = set[int]()
    for name, own in zip(names, formula.inputs, strict=True):
        for index in own:
            mode = mode_of.get(index)
            if name not in column or mode is None or mode not in split.middles or mode in drawn:
                continue
            drawn.add(mode)
            split.leg(name, mode, size[index], -_RADIUS)
    level = 0
    for index in bonds:
        on = [name for name, own in zip(names, formula.inputs, strict=True) if index in own and name in column]
        level += _bond(split, [split.names[name] for name in on], sorted(column[name] for name in on), size[index],
                       sorted(column.values()), level)  # fmt: skip


def _bond(split: _Split, names: list[str], ends: list[float], size: int, columns: list[float], level: int) -> int:
    """One index that is summed over; 1 if it goes above the nodes, else 0."""
    text = f"{size:,}"
    if len(ends) < 2:
        return 0  # the other end is left out, or the index is on this array alone
    between = [x for x in columns if ends[0] < x < ends[-1]]
    straight = any(
        {*bond.ends} == {names[0], names[-1]} for bond in split.bonds
    )  # a second bond of the same two arrays goes above the first
    if len(ends) == 2 and not between and not straight:
        line = ((ends[0] + _RADIUS, 0.0), (ends[1] - _RADIUS, 0.0))
        split.bonds.append(Bond((names[0], names[1]), size, line))
        split.labels.append(Label(text, (ends[0] + ends[1]) / 2, 0.11))
        return 0
    height = _RADIUS + _FIRST_OVER + _OVER * level
    if len(ends) == 2:
        points = ((ends[0], _RADIUS), (ends[0], height), (ends[1], height), (ends[1], _RADIUS))
        split.bonds.append(Bond((names[0], names[1]), size, points))
    else:
        x = sum(ends) / len(ends)
        dot = f"{split.dot}{level}"
        split.nodes.append(Node(dot, "dot", "", 0, x, height, 2 * _DOT, 2 * _DOT))
        split.bonds += [
            Bond((dot, name), size, ((x, height), (end, _RADIUS))) for name, end in zip(names, ends, strict=True)
        ]
    # Beside a dot, so that the lines that meet there do not cross it.
    split.labels.append(Label(text, sum(ends) / len(ends), height + (0.09 if len(ends) == 2 else 0.15)))
    return 1


_STYLES: dict[str, Callable[[_Split], None]] = {
    "dense": _dense,
    "chain": _train,
    "core": _tucker,
    "star": _cp,
    "network": _network,
}
