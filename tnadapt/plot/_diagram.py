"""The layout of a group's diagram: its tensor network and the steps to the weights, with positions. Draws nothing.

Lengths are inches.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from tnadapt.algebra.formats import Formula, Permuted
from tnadapt.algebra.group import Group
from tnadapt.algebra.layout import Piece
from tnadapt.algebra.maps import projection_name, takes_ratio
from tnadapt.algebra.maps.projection import Projection
from tnadapt.algebra.network import Network
from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.argument_checks import integer
from tnadapt.checkpoints.info import consecutive
from tnadapt.errors import ConfigError, ShapeError

# -- The parts of a diagram, and estimates of text widths --------------------------------------------------------------

# Lengths are inches; y grows upward.


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


# -- One split ---------------------------------------------------------------------------------------------------------

# The origin is the left end of the row of factors.


# Of more than MODES modes only the first few and the last are drawn.
MODES, _FIRST_NODE = 10, 7
# Half the width of a dot, the smallest width of a column, the length of an open leg, and the height of the arrays that
# join the factors above their row.
_DOT, _PITCH, _LEG, _UP = 0.055, 0.64, 0.36, 0.98
# Height of the ellipsis where one bar spans the row: below the bar.
_BELOW_BAR = -0.36
_LEG_POINTS = 8.0


class SplitDrawing:
    """The drawing of one split: its arrays, and the columns of its modes.

    Parameters
    ----------
    plan : SuperLoRA
    group : Group
        A group of ``plan``.
    k : int
        Index of the split. It is that of the first term; all terms look alike.

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

    Raises
    ------
    ConfigError
        If the format's ``diagram`` is not a known style.
    """

    def __init__(self, plan: SuperLoRA, group: Group, k: int) -> None:
        prefix, split = group.network.prefixes[0][k], group.network.splits[k]
        style = split.diagram
        if style not in _STYLES:
            config = plan.part_of(group.pieces[0].weight)[0].config
            raise ConfigError(
                f"format {config.format!r} has diagram={style!r}; expected one of {', '.join(_STYLES)}: 'network' "
                "draws any format from its formula"
            )
        # The arrays of a split, in the order of its own modes.
        self.format = split.own if isinstance(split, Permuted) else split
        self.sizes, self.shapes = self.format.sizes, self.format.shapes
        full_names = {**group.names, **group.frozen_names}
        self.names = {name: full_names[prefix + name] for name in self.shapes}
        self.frozen = {full for name, full in group.frozen_names.items() if name not in group.multiplied}
        self.dot = next(iter(self.names.values())).rpartition(".")[0] + ".dot"
        self.shown, self.left_out = some(len(self.sizes), MODES, _FIRST_NODE)
        self.middles: dict[int, float] = {}
        self.x = self.y = self.gap = self.width = 0.0
        self.nodes, self.bonds, self.legs, self.labels = list[Node](), list[Bond](), list[Leg](), list[Label]()
        _STYLES[style](self)
        boxes = [label.box for label in self.labels]
        self.above = max(*(node.y + node.height / 2 for node in self.nodes), *(box[3] for box in boxes))
        self.below = -min(box[1] for box in boxes)

    def columns(self, least: Callable[[int], float], between: float = 0.0, lower: float = 0.0) -> None:
        """Place the drawn modes in columns as wide as their labels, ``between`` apart.

        ``least`` gives the minimum width of a mode's column; ``lower`` is the height of the ellipsis for omitted modes.
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
                self.labels += _ellipsis(self.gap, lower, words, "modes")
                x += gap
            column = max(_PITCH, wide(f"{self.sizes[mode]:,}", _LEG_POINTS) + 0.16, least(mode))
            self.middles[mode] = x + column / 2
            x += column
        self.width = x

    @property
    def middle(self) -> float:
        """Midpoint of the first and last mode."""
        return (self.middles[self.shown[0]] + self.middles[self.shown[-1]]) / 2

    def node(self, name: str, kind: str, x: float, y: float, width: float = 2 * RADIUS) -> None:
        letter = KINDS[kind][0]
        number = list(self.names).index(name) if kind == "array" else name
        index = str(number).removeprefix("factor").removeprefix("core")
        symbol = f"${letter}_{{{index}}}$" if index.isdigit() else f"${letter}$"
        full, size = self.names[name], math.prod(self.shapes[name])
        self.nodes.append(Node(full, kind, symbol, size, x, y, width, frozen=full in self.frozen))

    def leg(self, name: str, mode: int, size: int, top: float) -> None:
        x, bottom = self.middles[mode], -RADIUS - _LEG
        self.legs.append(Leg(self.names[name], mode, size, x, top, bottom))
        self.labels.append(Label(f"{size:,}", x, bottom - 0.1, _LEG_POINTS))

    def bar(self, name: str, kind: str, y: float) -> None:
        """Add one node that spans all modes."""
        length = self.middles[self.shown[-1]] - self.middles[self.shown[0]]
        self.node(name, kind, self.middle, y, length + 2 * RADIUS)

    def join(self, dot: str, names: Iterable[str], size: int, x: float, y: float, ends: Iterable[float]) -> None:
        """Add a dot, and its lines to the upper ends of nodes."""
        self.nodes.append(Node(dot, "dot", "", 0, x, y, 2 * _DOT, 2 * _DOT))
        lines = [((x, y), (end, RADIUS)) for end in ends]
        self.bonds += [Bond((dot, name), size, line) for name, line in zip(names, lines, strict=True)]


def _ellipsis(x: float, y: float, count: str, what: str) -> list[Label]:
    """Return the sign for what is omitted, and how much that is."""
    words = [Label(text, x, y - drop, role="word") for text, drop in ((count, 0.2), (what, 0.33))]
    return [Label("⋯", x, y, 14.0, role="sign"), *words]


def _dense(split: SplitDrawing) -> None:
    split.columns(lambda mode: 0.0, lower=_BELOW_BAR)
    split.bar("dense", "dense", 0.0)
    for mode in split.shown:
        split.leg("dense", mode, split.shapes["dense"][mode], -RADIUS)


def _train(split: SplitDrawing) -> None:
    ranks = [split.shapes[f"core{mode}"][2] for mode in range(len(split.sizes) - 1)]

    def least(mode: int) -> float:
        adjacent = ranks[max(0, mode - 1) : mode + 1]
        return 2 * RADIUS + 0.2 + max([wide(f"{rank:,}", BOND_POINTS) for rank in adjacent] or [0.0])

    split.columns(least)
    for mode in split.shown:
        split.node(f"core{mode}", "train", split.middles[mode], 0.0)
        split.leg(f"core{mode}", mode, split.shapes[f"core{mode}"][1], -RADIUS)
    for mode, rank in enumerate(ranks):
        if mode not in split.middles and mode + 1 not in split.middles:
            continue
        # A bond to an omitted core ends at the ellipsis.
        start = split.middles[mode] + RADIUS if mode in split.middles else split.gap + 0.14
        stop = split.middles[mode + 1] - RADIUS if mode + 1 in split.middles else split.gap - 0.14
        names = split.names[f"core{mode}"], split.names[f"core{mode + 1}"]
        split.bonds.append(Bond(names, rank, ((start, 0.0), (stop, 0.0))))
        split.labels.append(Label(f"{rank:,}", (start + stop) / 2, 0.11))


def _tucker(split: SplitDrawing) -> None:
    core = split.shapes["core"]
    # Without factors the core is a dense array, and is placed like one.
    height = _UP if len(split.shapes) > 1 else 0.0
    split.columns(lambda mode: 2 * (wide(f"{core[mode]:,}", BOND_POINTS) + 0.1), lower=0.0 if height else _BELOW_BAR)
    split.bar("core", "core", height)
    for mode in split.shown:
        x, factor = split.middles[mode], f"factor{mode}"
        if factor not in split.shapes:
            split.leg("core", mode, core[mode], height - RADIUS)
            continue
        size, rank = split.shapes[factor]
        split.node(factor, "factor", x, 0.0)
        split.leg(factor, mode, size, -RADIUS)
        ends = split.names["core"], split.names[factor]
        split.bonds.append(Bond(ends, rank, ((x, height - RADIUS), (x, RADIUS))))
        split.labels.append(Label(f"{rank:,}", x + 0.06, height / 2, align="left"))


def _cp(split: SplitDrawing) -> None:
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
        split.leg(factor, mode, size, -RADIUS)
        end = (split.middles[mode] + math.copysign(RADIUS, x - split.middles[mode]), 0.0)
        end = end if two else (split.middles[mode], RADIUS)
        split.bonds.append(Bond((split.dot, split.names[factor]), shared, ((x, y), end)))
    split.nodes.insert(1, dot)
    if "weights" in split.shapes:
        top = y + 0.62
        split.node("weights", "weights", x, top)
        (number,) = split.shapes["weights"]
        split.bonds.append(Bond((split.names["weights"], split.dot), number, ((x, top - RADIUS), (x, y))))
    if two:
        split.labels.append(Label(label, x, -0.16))
    elif len(split.sizes) == 1 or "weights" in split.shapes:
        split.labels.append(Label(label, x + 0.12, y + 0.14, align="left"))
    else:
        split.labels.append(Label(label, x, y + 0.16))


# Bonds that pass over other nodes: the distance between their lines, and the height of the first.
_OVER, _FIRST_OVER = 0.2, 0.36


def _network(split: SplitDrawing) -> None:
    """Lay out any network from its formula: arrays in a row, each above its modes, joined by bonds.

    Neighbors are joined by straight lines. Bonds that pass over other arrays run above them, each at a different
    height. An index on more than two arrays gets a dot above them, and so does a mode on more than one, or on one
    in another column.
    """
    formula = Formula.parsed(split.format.formula, len(split.shapes), len(split.sizes))
    size = formula.sizes(list(split.shapes.values()))
    arrays = dict(zip(split.shapes, formula.inputs, strict=True))
    mode_of = {index: mode for mode, index in enumerate(formula.output)}
    shared = {index for index in mode_of if sum(index in indices for indices in arrays.values()) > 1}
    # The first array with a mode takes that mode's column; arrays without a mode take further columns on the right.
    column: dict[str, float] = {}
    bonds = [index for index in size if index not in mode_of]
    labels = [wide(f"{size[index]:,}", BOND_POINTS) for index in bonds]
    pitch = max(_PITCH, 2 * RADIUS + 0.2 + max([0.0, *labels]))
    split.columns(lambda mode: pitch)
    for name, indices in arrays.items():
        middles = [split.middles.get(mode_of[index]) for index in indices if index in mode_of and index not in shared]
        free = [middle for middle in middles if middle is not None and middle not in column.values()]
        if free:
            column[name] = free[0]
        elif mode_of.keys().isdisjoint(indices):  # otherwise all its modes are omitted
            column[name] = split.width + pitch / 2
            split.width += pitch
    for name, x in column.items():
        split.node(name, "array", x, 0.0)
    drawn = set[int]()
    for name, x in column.items():
        for index in arrays[name]:
            mode = mode_of.get(index)
            if mode not in split.middles or mode in drawn or index in shared:
                continue
            if split.middles[mode] != x:
                shared.add(index)
                continue
            drawn.add(mode)
            split.leg(name, mode, size[index], -RADIUS)
    level = 0
    crossing = sorted(split.middles[mode_of[index]] for index in shared if mode_of[index] in split.middles)
    for index in bonds:
        on = {split.names[name]: x for name, x in column.items() if index in arrays[name]}
        level += _bond(split, list(on), sorted(on.values()), size[index], sorted(column.values()), level, crossing)
    for index in sorted(shared, key=mode_of.__getitem__):
        mode = mode_of[index]
        if mode in split.middles:
            # A mode of several arrays: a dot above its column, with the mode's leg.
            level += 1
            on = {split.names[name]: x for name, x in column.items() if index in arrays[name]}
            x, height, bottom = split.middles[mode], RADIUS + _FIRST_OVER + _OVER * level, -RADIUS - _LEG
            dot = f"{split.dot}.mode{mode}"
            split.join(dot, on, size[index], x, height, on.values())
            split.legs.append(Leg(dot, mode, size[index], x, height - _DOT, bottom))
            split.labels.append(Label(f"{size[index]:,}", x, bottom - 0.1, _LEG_POINTS))


def _bond(
    split: SplitDrawing, names: list[str], ends: list[float], size: int, columns: list[float], level: int,
    crossing: list[float],
) -> int:  # fmt: skip
    """Draw one summed index; return 1 if it runs above the nodes, else 0. ``crossing`` is where legs cross it."""
    text = f"{size:,}"
    if len(ends) < 2:
        return 0  # the other end is omitted, or only one array has the index
    between = [x for x in columns if ends[0] < x < ends[-1]]
    crossed = [x for x in crossing if ends[0] < x < ends[-1]]
    # A second bond between the same two arrays runs above the first.
    first = not any({*bond.ends} == {names[0], names[-1]} for bond in split.bonds)
    if len(ends) == 2 and not between and first:
        line = ((ends[0] + RADIUS, 0.0), (ends[1] - RADIUS, 0.0))
        split.bonds.append(Bond((names[0], names[1]), size, line))
        middle = (ends[0] + RADIUS + crossed[0]) / 2 if crossed else (ends[0] + ends[1]) / 2
        split.labels.append(Label(text, middle, 0.11))
        return 0
    height = RADIUS + _FIRST_OVER + _OVER * level
    if len(ends) == 2:
        points = ((ends[0], RADIUS), (ends[0], height), (ends[1], height), (ends[1], RADIUS))
        split.bonds.append(Bond((names[0], names[1]), size, points))
    else:
        split.join(f"{split.dot}{level}", names, size, sum(ends) / len(ends), height, ends)
    # The label is offset from a dot, so that the lines that meet there do not cross it.
    middle = (ends[0] + min([*crossed, *between])) / 2 if crossed else sum(ends) / len(ends)
    split.labels.append(Label(text, middle, height + (0.09 if len(ends) == 2 else 0.15)))
    return 1


_STYLES: dict[str, Callable[[SplitDrawing], None]] = {
    "dense": _dense,
    "chain": _train,
    "core": _tucker,
    "star": _cp,
    "network": _network,
}


# -- The group: its splits and the steps to the weights ----------------------------------------------------------------


# Of more than _SPLITS splits only the first few and the last are drawn.
_SPLITS, _FIRST = 5, 3
# The widest row of splits (more continue in another row), the narrowest diagram, the margin, the width of a sign
# between splits, and the padding of a split.
_WIDEST, _NARROWEST, _MARGIN, _BETWEEN, _INSIDE = 10.5, 5.2, 0.3, 0.5, 0.14
# Heights of a line in a box, an arrow and the name above a split; width of the ellipsis for omitted splits.
_LINE, _ARROW, _NAME, _GAP = 0.165, 0.36, 0.36, 0.6
_STEP_POINTS, _KEY_POINTS = 8.5, 7.5


@dataclasses.dataclass(frozen=True)
class FlowStep:
    """A step from the network to the weights: a box, and the arrow to it from above with a note."""

    lines: tuple[str, ...]
    note: str = ""
    fixed: bool = False
    y: float = 0.0

    @property
    def width(self) -> float:
        """Width of the box."""
        return max(wide(line, _STEP_POINTS) for line in self.lines) + 0.36

    @property
    def height(self) -> float:
        """Height of the box."""
        return _LINE * len(self.lines) + 0.16


@dataclasses.dataclass(frozen=True)
class KeyEntry:
    """An entry of the key: a kind of node, its text, and the left end of its sign."""

    kind: str
    text: str
    x: float
    y: float


class Diagram:
    """The complete diagram of one group with positions; y is 0 at the top and negative below.

    Parameters
    ----------
    plan : SuperLoRA
    index : int
        The number of a group.

    Attributes
    ----------
    parts : list of SplitDrawing
        The splits of one term.
    signs : list of Label
        Signs and text between and next to the splits.
    frames : list of (float, float, float, float)
        Left, bottom, right and top of each split, if there are several.
    brackets : tuple of (float, float, float, float) or None
        Left, bottom, right and top of the part that is summed over terms.
    brace : (float, float, float)
        Left, right and height of the line below the network, from which the arrows start.
    steps : list of FlowStep
        The steps from the tensor to the weights.
    key : tuple of KeyEntry
    words : str
        The number of trained parameters as text.
    parameters : int
        Parameters of the group.
    splits_left_out : int
        Number of splits that are not drawn.
    width, height : float
    """

    def __init__(self, plan: SuperLoRA, index: int) -> None:
        group = plan.groups[index]
        network = group.network
        shown, self.splits_left_out = some(len(network.splits), _SPLITS, _FIRST)
        self._splits = {k: SplitDrawing(plan, group, k) for k in shown}
        self.parts = list(self._splits.values())
        self.parameters, self.words = group.num_parameters, _words(plan, group)
        self.steps = _steps(plan, group, index)
        self.signs, self.frames = list[Label](), list[Box]()
        self.brackets: Box | None = None
        self._sign = "⊗" if network.kronecker else "⊙"
        self._several = len(network.splits) > 1
        rows = self._rows()
        # Every row after the first begins with the sign that joins it to the row above; all rows reserve space for it.
        self._lead = _BETWEEN if len(rows) > 1 else 0.0
        block = self._lead + max(map(self._width, rows))
        terms = "" if network.terms == 1 else f"{network.terms:,} terms"
        inner = block + (0.2 if terms else 0.0)
        outer = inner + (2 * (wide(terms, BOND_POINTS) + 0.2) if terms else 0.0)
        self.width = max(
            _NARROWEST,
            outer + 2 * _MARGIN,
            *(step.width + 2 * _MARGIN for step in self.steps),
            *(2 * (wide(step.note, BOND_POINTS) + 0.2 + _MARGIN) for step in self.steps),
            wide(self.words, _STEP_POINTS) + 2 * _MARGIN,
        )
        self.key, top = _key(self.parts, self.width)
        middle, top = self.width / 2, top - 0.26
        bottom = top
        for number, row in enumerate(rows):
            bottom = self._place(row, middle - block / 2, bottom - (0.1 if number else 0.0))
        if terms:
            left, right = middle - inner / 2, middle + inner / 2
            self.brackets = left, bottom - 0.04, right, top + 0.04
            x, y = left - 0.1 - wide(terms, BOND_POINTS) / 2, (top + bottom) / 2
            self.signs += [Label("Σ", x, y + 0.1, 22.0, role="sign"), Label(terms, x, y - 0.18, role="word")]
            bottom -= 0.04
        half, y = max(inner / 2, 0.4), bottom - 0.15
        self.brace = middle - half, middle + half, y
        for number, step in enumerate(self.steps):
            self.steps[number] = dataclasses.replace(step, y=y - _ARROW - step.height / 2)
            y -= _ARROW + step.height
        self.height = -y

    def _rows(self) -> list[list[int | None]]:
        """Return the splits in rows, where None stands for the omitted ones."""
        shown: list[int | None] = [*self._splits]
        if self.splits_left_out:
            shown.insert(len(shown) - 1, None)
        if self._width(shown) <= _WIDEST:
            return [shown]
        rows: list[list[int | None]] = []
        for k in shown:
            row = rows[-1] if rows else [None]
            if None in (k, row[-1]) or self._width([*row, k]) > _WIDEST - _BETWEEN:
                rows.append([])
            rows[-1].append(k)
        return rows

    def _outer_width(self, k: int | None) -> float:
        return self._splits[k].width + 2 * _INSIDE if k is not None else _GAP

    def _width(self, row: Sequence[int | None]) -> float:
        return sum(map(self._outer_width, row)) + _BETWEEN * (len(row) - 1)

    def _place(self, row: Sequence[int | None], x: float, top: float) -> float:
        """Place a row of splits below a height; return the height of its lower end."""
        parts = [self._splits[k] for k in row if k is not None]
        y = top - max([part.above for part in parts] or [0.16]) - (_NAME if self._several and parts else 0.0)
        bottom = y - max([part.below for part in parts] or [0.16]) - (0.12 if self._several and parts else 0.0)
        x += self._lead
        for place, k in enumerate(row):
            if place:
                x += _BETWEEN
            if k != 0:
                self.signs.append(Label(self._sign, x - _BETWEEN / 2, y, 17.0, role="sign"))
            if k is not None:
                part = self._splits[k]
                part.x, part.y = x + _INSIDE, y
                if self._several:
                    self.frames.append((x, bottom, x + self._outer_width(k), top))
                    self.signs.append(Label(f"split{k}", x + self._outer_width(k) / 2, top - 0.18, role="word"))
            elif parts:
                self.signs += _ellipsis(x + _GAP / 2, y, f"{self.splits_left_out} more", "splits")
            else:
                self.signs.append(Label("⋯", x + 0.15, y, 14.0, role="sign"))
                text = f"{self.splits_left_out} more splits"
                self.signs.append(Label(text, x + 0.4, y, align="left", role="word"))
            x += self._outer_width(k)
        return bottom


def diagram(plan: SuperLoRA, group: int = 0) -> Diagram:
    """Lay out the nodes, bonds and legs of one group, and the steps from its tensor to the weights.

    Parameters
    ----------
    plan : SuperLoRA
    group : int
        ``0 <= group < plan.num_groups``.

    Returns
    -------
    Diagram

    Raises
    ------
    ShapeError
        If there is no such group.

    Examples
    --------
    LoRA has two factors, which share one index of size 4 through a dot:

    >>> import tnadapt as tna
    >>> drawing = diagram(tna.SuperLoRA(tna.presets.lora(rank=4), [(768, 512)]))
    >>> [(node.name, node.size) for part in drawing.parts for node in part.nodes]
    [('group0.split0.factor0', 3072), ('group0.split0.dot', 0), ('group0.split0.factor1', 2048)]
    >>> [leg.size for part in drawing.parts for leg in part.legs]
    [768, 512]
    >>> drawing.words
    '5,120 trainable parameters, all in this group'
    """
    return Diagram(plan, integer("group", group, 0, plan.num_groups - 1, ShapeError))


# -- Words ---------------------------------------------------------------------------------------


def _key(parts: Sequence[SplitDrawing], width: float) -> tuple[tuple[KeyEntry, ...], float]:
    """Lay out the key in lines of a width; return its entries and the height of their lower end."""
    drawn = [node for part in parts for node in part.nodes]
    kinds = {node.kind for node in drawn} | {"frozen" for node in drawn if node.frozen}
    x, y, entries = _MARGIN, -0.1, []
    for kind, (_, text) in KINDS.items():
        if kind not in kinds:
            continue
        needed = 0.27 + wide(text, _KEY_POINTS) + 0.2
        if x > _MARGIN and x + needed > width:
            x, y = _MARGIN, y - 0.2
        entries.append(KeyEntry(kind, text, x, y))
        x += needed
    return tuple(entries), y - 0.1


def _words(plan: SuperLoRA, group: Group) -> str:
    parameters = group.num_parameters
    told = f"{_number(parameters)} trainable {_plural(parameters, 'parameter')}"
    # Magnitudes belong to weights, not to a group.
    rest = sum(map(math.prod, plan.weight_param_shapes.values()))
    beside = f", and {_number(rest)} {_plural(rest, 'magnitude')} of weights" if rest else ""
    total = plan.num_parameters - rest
    if plan.config.before is not None:
        trained = f"computed from {_number(total)} trainable {_plural(total, 'parameter')}"
        return f"{_number(parameters)} {_plural(parameters, 'element')} in this group's arrays, {trained}{beside}"
    if plan.num_groups == 1:
        return f"{told}, all in this group{beside}"
    shared = ", some shared" if sum(each.num_parameters for each in plan.groups) != total else ""
    return f"{told} in this group{shared}, {_number(total)} in all {plan.num_groups:,} groups{beside}"


def _number(count: int) -> str:
    """Format a count; approximately, if it is too long to read.

    Examples
    --------
    >>> _number(147456), _number(2**1000)
    ('147,456', 'about 10^301')
    """
    return f"{count:,}" if count < 10**15 else f"about 10^{round(math.log10(count))}"


def _plural(count: int, word: str) -> str:
    return word if count == 1 else word + "s"


def _times(sizes: Sequence[int]) -> str:
    """Format the sizes of a tensor; of many modes only the first few and the last.

    Examples
    --------
    >>> _times((3, 1000)), _times((2,) * 32)
    ('3 × 1,000', '2 × 2 × 2 × ⋯ × 2, of 32 modes')
    """
    if len(sizes) <= MODES:
        return " × ".join(map(_number, sizes))
    return " × ".join(map(_number, sizes[:3])) + f" × ⋯ × {_number(sizes[-1])}, of {len(sizes)} modes"


def _steps(plan: SuperLoRA, group: Group, index: int) -> list[FlowStep]:
    """Return the steps from the network to the weights."""
    network, projection = group.network, group.projection
    tensor = "tensor" if len(network.sizes) > 1 else "vector of"
    steps = [FlowStep((f"{tensor} {_times(network.sizes)}",), _combined(network))]
    first = network.splits[0]
    if isinstance(first, Permuted):
        unordered = FlowStep((f"tensor {_times(first.own.sizes)}",), _combined(network))
        steps = [unordered, FlowStep((f"tensor {_times(network.sizes)}",), "reorder axes")]
    held = math.prod(network.sizes)
    cut = f"keep the first {network.size:,} of {_number(held)}" if held > network.size else ""
    note = f"unfold, {cut}".removesuffix(", ") if len(network.sizes) > 1 else cut
    if not projection.map.identity:
        lines = (
            f"F: {projection_name(projection.kind)}, fixed, not trained",
            f"{_ratio(plan.part_of(group.pieces[0].weight)[0], projection)}{projection.n_in:,} → {projection.n_out:,}",
        )
        steps.append(FlowStep(lines, note, fixed=True))
        note = "minus F at the start" if group.subtracts else ""
    elif group.subtracts:
        note = f"minus the start, {note}".removesuffix(", ")
    steps.append(FlowStep((f"group {index:,}: {group.size:,} {_plural(group.size, 'element')}",), note))
    steps.append(FlowStep(tuple(_covered(plan, group.pieces)), "row by row"))
    return steps


def _ratio(plan: SuperLoRA, projection: Projection) -> str:
    # A ratio of 1 says nothing about an F that determines the length before it.
    said = takes_ratio(plan.config.projection) or projection.n_in == projection.n_out
    return f"ρ = {plan.config.ratio:.12g}:  " if said else ""


def _combined(network: Network) -> str:
    """Describe what is done to the result of the drawn network: cropping and scaling."""
    changes = []
    if network.kronecker:
        product = tuple(math.prod(sizes) for sizes in zip(*(split.sizes for split in network.splits), strict=True))
        if product != network.sizes:
            changes.append(f"cut from {_times(product)}")
    if network.scale != 1.0:
        changes.append(f"times {network.scale:.6g}, the scale α / r")
    return ", ".join(changes)


def _covered(plan: SuperLoRA, pieces: Sequence[Piece]) -> Iterator[str]:
    """Describe the weights that a group has elements of, in two lines."""
    weights = [piece.weight for piece in pieces]
    cut = [piece.weight for piece in pieces if piece.length < math.prod(plan.shapes[piece.weight])]
    if len(weights) == 1:
        yield f"{'part of weight' if cut else 'weight'} {weights[0]:,}"
    else:
        yield f"{len(weights):,} weights: {_runs(weights)}" + (f" ({_runs(cut)} in part)" if cut else "")
    shapes = list(dict.fromkeys(plan.shapes[weight] for weight in sorted(weights)))
    told = [f"{rows:,} × {cols:,}" for rows, cols in shapes[:3]]
    if len(shapes) > 3:
        told.append(f"{len(shapes) - 3:,} more {_plural(len(shapes) - 3, 'shape')}")
    yield " and ".join([", ".join(told[:-1]), told[-1]] if len(told) > 1 else told)


def _runs(numbers: Iterable[int]) -> str:
    """Format numbers in order, consecutive ones as a range.

    Examples
    --------
    >>> _runs([5, 0, 1, 2]), _runs(range(0, 40, 2))
    ('0–2, 5', '0, 2, 4, 6, 8 and others')
    """
    runs = consecutive(numbers)
    told = [f"{a:,}" if a == b else f"{a:,}–{b:,}" if b > a + 1 else f"{a:,}, {b:,}" for a, b in runs[:5]]
    return ", ".join(told) + (" and others" if len(runs) > 5 else "")
