"""The layout of one split of a group as a diagram: positions of its nodes, bonds, legs and labels. Draws nothing.

Lengths are inches. The origin is the left end of the row of factors; y grows upward.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from tnadapt.algebra.formats import Format, Formula, Permuted
from tnadapt.algebra.group import Group
from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.errors import ConfigError

from ._diagram_parts import BOND_POINTS, KINDS, RADIUS, Bond, Label, Leg, Node, SplitDrawing, some, wide

__all__ = ["MODES", "laid_out"]

# Of more than MODES modes only the first few and the last are drawn.
MODES, _FIRST = 10, 7
# Half the width of a dot, the smallest width of a column, the length of an open leg, and the height of the arrays that
# join the factors above their row.
_DOT, _PITCH, _LEG, _UP = 0.055, 0.64, 0.36, 0.98
# Height of the ellipsis where one bar spans the row: below the bar.
_BELOW_BAR = -0.36
_LEG_POINTS = 8.0


def _drawn(split: Format) -> Format:
    """Return the format with the arrays of a split, in the order of its own modes."""
    return split.own if isinstance(split, Permuted) else split


class _Split:
    """One split while it is laid out: its arrays, by the names its format gives them, and the columns of its modes."""

    def __init__(self, group: Group, k: int) -> None:
        network = group.network
        prefix, split = network.prefixes[0][k], _drawn(network.splits[k])
        full_names = {**group.names, **group.frozen_names}
        self.names = {name: full_names[prefix + name] for name in split.shapes}
        self.frozen = {full for name, full in group.frozen_names.items() if name not in group.multiplied}
        self.shapes = split.shapes
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
        """Midpoint of the first and last mode."""
        return (self.middles[self.shown[0]] + self.middles[self.shown[-1]]) / 2

    def node(self, name: str, kind: str, x: float, y: float, width: float = 2 * RADIUS) -> None:
        letter = KINDS[kind][0]
        index = (
            str(list(self.names).index(name)) if kind == "array" else name.removeprefix("factor").removeprefix("core")
        )
        symbol = f"${letter}_{{{index}}}$" if index.isdigit() else f"${letter}$"
        full, size = self.names[name], math.prod(self.shapes[name])
        self.nodes.append(Node(full, kind, symbol, size, x, y, width, frozen=full in self.frozen))

    def leg(self, name: str, mode: int, size: int, top: float) -> None:
        x, bottom = self.middles[mode], -RADIUS - _LEG
        self.legs.append(Leg(self.names[name], mode, size, x, top, bottom))
        self.labels.append(Label(f"{size:,}", x, bottom - 0.1, _LEG_POINTS))

    def bar(self, name: str, kind: str, y: float) -> None:
        """Add one node that spans all modes."""
        ends = self.middles[self.shown[0]], self.middles[self.shown[-1]]
        self.node(name, kind, self.middle, y, ends[1] - ends[0] + 2 * RADIUS)


def laid_out(plan: SuperLoRA, group: Group, k: int) -> SplitDrawing:
    """Lay out one split of a group, with its origin at 0.

    Parameters
    ----------
    plan : SuperLoRA
    group : Group
        A group of ``plan``.
    k : int
        Index of the split.

    Returns
    -------
    SplitDrawing
        The split of the first term; all terms look alike.

    Raises
    ------
    ConfigError
        If the format's ``diagram`` is not a known style.
    """
    split = _Split(group, k)
    style = group.network.splits[k].diagram
    if style not in _STYLES:
        config = plan.part_of(group.pieces[0].weight)[0].config
        raise ConfigError(
            f"format {config.format!r} has diagram={style!r}; expected one of {', '.join(_STYLES)}: 'network' "
            "draws any format from its formula"
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
        split.leg("dense", mode, split.shapes["dense"][mode], -RADIUS)


def _train(split: _Split) -> None:
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


def _tucker(split: _Split) -> None:
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


def _network(split: _Split) -> None:
    """Lay out any network from its formula: arrays in a row, each above its modes, joined by bonds.

    Neighbors are joined by straight lines. Bonds that pass over other arrays run above them, each at a different
    height. An index on more than two arrays gets a dot above them, and so does a mode on more than one, or on one
    in another column.
    """
    formula = Formula.parsed(split.format.formula, len(split.shapes), len(split.sizes))
    size = formula.sizes(list(split.shapes.values()))
    names = list(split.shapes)
    mode_of = {index: mode for mode, index in enumerate(formula.output)}
    shared = {index for index in mode_of if sum(index in own for own in formula.inputs) > 1}
    # The first array with a mode takes that mode's column; arrays without a mode take further columns on the right.
    column: dict[str, float] = {}
    bonds = [index for index in size if index not in mode_of]
    labels = [wide(f"{size[index]:,}", BOND_POINTS) for index in bonds]
    pitch = max(_PITCH, 2 * RADIUS + 0.2 + max([0.0, *labels]))
    split.columns(lambda mode: pitch)
    for name, own in zip(names, formula.inputs, strict=True):
        for index in own:
            mode = None if index in shared else mode_of.get(index)
            if mode is not None and mode in split.middles and split.middles[mode] not in column.values():
                column[name] = split.middles[mode]
                break
        else:
            if any(index in mode_of for index in own):
                continue  # all its modes are omitted
            column[name] = split.width + pitch / 2
            split.width += pitch
    for name, x in column.items():
        split.node(name, "array", x, 0.0)
    drawn = set[int]()
    for name, own in zip(names, formula.inputs, strict=True):
        for index in own:
            mode = mode_of.get(index)
            if name not in column or mode is None or mode not in split.middles or mode in drawn or index in shared:
                continue
            if split.middles[mode] != column[name]:
                shared.add(index)
                continue
            drawn.add(mode)
            split.leg(name, mode, size[index], -RADIUS)
    level = 0
    crossing = sorted(split.middles[mode_of[index]] for index in shared if mode_of[index] in split.middles)
    for index in bonds:
        on = [name for name, own in zip(names, formula.inputs, strict=True) if index in own and name in column]
        level += _bond(split, [split.names[name] for name in on], sorted(column[name] for name in on), size[index],
                       sorted(column.values()), level, crossing)  # fmt: skip
    for index in sorted(shared, key=mode_of.__getitem__):
        if mode_of[index] in split.middles:
            on = [name for name, own in zip(names, formula.inputs, strict=True) if index in own and name in column]
            level += 1
            _shared_mode(split, on, [column[name] for name in on], mode_of[index], size[index], level)


def _shared_mode(split: _Split, names: list[str], ends: list[float], mode: int, size: int, level: int) -> None:
    """Draw a mode of several arrays: a dot above its column, with the mode's leg."""
    x, height, bottom = split.middles[mode], RADIUS + _FIRST_OVER + _OVER * level, -RADIUS - _LEG
    dot = f"{split.dot}.mode{mode}"
    split.nodes.append(Node(dot, "dot", "", 0, x, height, 2 * _DOT, 2 * _DOT))
    split.bonds += [
        Bond((dot, split.names[name]), size, ((x, height), (end, RADIUS)))
        for name, end in zip(names, ends, strict=True)
    ]
    split.legs.append(Leg(dot, mode, size, x, height - _DOT, bottom))
    split.labels.append(Label(f"{size:,}", x, bottom - 0.1, _LEG_POINTS))


def _bond(
    split: _Split,
    names: list[str],
    ends: list[float],
    size: int,
    columns: list[float],
    level: int,
    crossing: list[float],
) -> int:
    """Draw one summed index; return 1 if it runs above the nodes, else 0. ``crossing`` is where legs cross it."""
    text = f"{size:,}"
    if len(ends) < 2:
        return 0  # the other end is omitted, or only one array has the index
    between = [x for x in columns if ends[0] < x < ends[-1]]
    crossed = [x for x in crossing if ends[0] < x < ends[-1]]
    straight = any(
        {*bond.ends} == {names[0], names[-1]} for bond in split.bonds
    )  # a second bond between the same two arrays runs above the first
    if len(ends) == 2 and not between and not straight:
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
        x = sum(ends) / len(ends)
        dot = f"{split.dot}{level}"
        split.nodes.append(Node(dot, "dot", "", 0, x, height, 2 * _DOT, 2 * _DOT))
        split.bonds += [
            Bond((dot, name), size, ((x, height), (end, RADIUS))) for name, end in zip(names, ends, strict=True)
        ]
    # The label is offset from a dot, so that the lines that meet there do not cross it.
    middle = (ends[0] + min([*crossed, *between])) / 2 if crossed else sum(ends) / len(ends)
    split.labels.append(Label(text, middle, height + (0.09 if len(ends) == 2 else 0.15)))
    return 1


_STYLES: dict[str, Callable[[_Split], None]] = {
    "dense": _dense,
    "chain": _train,
    "core": _tucker,
    "star": _cp,
    "network": _network,
}
