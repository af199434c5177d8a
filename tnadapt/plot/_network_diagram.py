"""The plot of one group as a tensor diagram: its arrays, the indices that they share, and the steps to the weights."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from tnadapt.algebra.config import Config
from tnadapt.algebra.formats import Formula, Permuted
from tnadapt.algebra.group import Group
from tnadapt.algebra.layout import Piece
from tnadapt.algebra.maps import projection_name, takes_ratio
from tnadapt.algebra.maps.projection import Projection
from tnadapt.algebra.network import Network
from tnadapt.algebra.update_plan import UpdatePlan
from tnadapt.argument_checks import checks_arguments, integer
from tnadapt.checkpoints.info import consecutive
from tnadapt.errors import ShapeError

from .canvas import OTHERS, STYLES, between, checked_text, figure, ground, ink, pale, saved, text_width, tone

# -- One split: positions of its arrays and lines ----------------------------------------------------------------------

# Lengths are inches, y grows upward, and the origin is the left end of the row of arrays.


class _Look(NamedTuple):
    """How a kind of array is drawn: its letter, its text in the key, its color, and how round its corners are."""

    letter: str
    text: str
    color: str
    rounding: float


_LOOKS = {
    "factor": _Look("A", "factor", STYLES["LoKr"][0], 1.0),
    "core": _Look("C", "core", STYLES["LoRTA"][0], 0.5),
    "weights": _Look("w", "weights of the components", STYLES["SuperLoRA"][0], 0.7),
    "train": _Look("G", "core of the train", STYLES["LoNKr"][0], 0.3),
    "dense": _Look("D", "dense array", STYLES["SuperLoRA + F"][0], 0.0),
    "array": _Look("T", "array", OTHERS[5][0], 0.3),
}

# Half the width of a node, the smallest width of a column, the length of an open line, the height of the first line
# above the row and the distance of further ones, and the space below a split.
_RADIUS, _PITCH, _LEG, _FIRST_LEVEL, _LEVEL, _BELOW = 0.21, 0.64, 0.36, 0.45, 0.26, 0.85
# Of more than _MODES modes, only the first few and the last are drawn; likewise of more than _SPLITS splits.
_MODES, _FIRST_MODES, _SPLITS, _FIRST_SPLITS = 10, 7, 5, 3
_POINTS = 7.5


class _Node(NamedTuple):
    """An array: its name in the plan, its kind, its symbol, the positions of its left and right end, and its height."""

    name: str
    kind: str
    symbol: str
    left: float
    right: float
    y: float
    frozen: bool

    @property
    def x(self) -> float:
        return (self.left + self.right) / 2


_Point = tuple[float, float]


class _Line(NamedTuple):
    """An index: its size, its strokes, and where the size is written."""

    size: int
    strokes: list[list[_Point]]
    label: _Point


class _SplitDrawing:
    """One split of the first term: arrays with modes in a row, above their modes; arrays without modes above the row.

    An index of two neighbors is a straight line. Another one is a line above the row, with a dot if it joins more than
    two arrays, or is a mode as well.
    """

    def __init__(self, group: Group, k: int) -> None:
        prefix, split = group.network.prefixes[0][k], group.network.splits[k]
        tensor_format = split.own if isinstance(split, Permuted) else split
        names = {**group.names, **group.frozen_names}
        self.names = {name: names[prefix + name] for name in tensor_format.shapes}
        self.frozen = {full for name, full in group.frozen_names.items() if name not in group.multiplied}
        formula = Formula.parsed(tensor_format.formula, len(tensor_format.shapes), len(tensor_format.sizes))
        self.sizes, self.modes = formula.sizes(list(tensor_format.shapes.values())), formula.output
        self.arrays = dict(zip(tensor_format.shapes, formula.inputs, strict=True))
        self.holders = {i: [name for name, indices in self.arrays.items() if i in indices] for i in self.sizes}
        self.modeless = [name for name, indices in self.arrays.items() if not set(indices) & set(self.modes)]
        self.nodes, self.lines = dict[str, _Node](), list[_Line]()
        self.dots = dict[str, _Point]()  # of indices that are lines above the row
        self.omitted, self.gap, self.above = 0, 0.0, _RADIUS
        self._place_row()
        for index in self.sizes:
            self._join(index)
        for name in self.modeless:
            self._place_above(name)

    def _place_row(self) -> None:
        """Place the arrays with modes, with a column per mode that only this array has, or one column if none."""
        columns = []
        for name, indices in self.arrays.items():
            modes = [index for index in indices if index in self.modes]
            alone = [mode for mode in modes if len(self.holders[mode]) == 1]
            columns += [(name, mode) for mode in alone or modes[:1]]
        widest = max(text_width(f"{size:,}", _POINTS) for size in self.sizes.values())
        pitch = max(_PITCH, widest + 2 * _RADIUS + 0.14)
        shown, self.omitted = _some(columns, _MODES, _FIRST_MODES)
        places = [pitch * (number + 0.5) for number in range(len(shown))]
        if self.omitted:
            self.gap = places[-1]
            places[-1] += max(pitch, 0.9)
        self.width = places[-1] + pitch / 2
        for name in dict.fromkeys(name for name, _ in shown):
            self._add(name, [x for (array, _), x in zip(shown, places, strict=True) if array == name], 0.0)
        for (_, mode), x in zip(shown, places, strict=True):
            if len(self.holders[mode]) == 1:
                self.lines.append(
                    _Line(self.sizes[mode], [[(x, 0.0), (x, -_RADIUS - _LEG)]], (x, -_RADIUS - _LEG - 0.1))
                )

    def _add(self, name: str, places: Sequence[float], y: float) -> None:
        word = name.rstrip("0123456789")
        look = "train" if word == "core" != name else word if word in _LOOKS else "array"
        number = str(list(self.arrays).index(name)) if look == "array" else name.removeprefix(word)
        symbol = f"${_LOOKS[look].letter}_{{{number}}}$" if number else f"${_LOOKS[look].letter}$"
        full = self.names[name]
        self.nodes[name] = _Node(full, look, symbol, min(places), max(places), y, full in self.frozen)

    def _join(self, index: str) -> None:
        """Draw an index of arrays in the row, except between one of them and one above, drawn with the latter."""
        holders, size = self.holders[index], self.sizes[index]
        ends = sorted((self.nodes[name] for name in holders if name in self.nodes), key=lambda node: node.left)
        if len(holders) < 2 or not ends or (len(holders) == 2 and not set(holders).isdisjoint(self.modeless)):
            return
        if len(holders) == 2 and index not in self.modes:
            # An array that is not drawn is at the ellipsis.
            start, stop = ends[0].right, ends[1].left if len(ends) == 2 else self.gap
            start, stop = (start, stop) if start < stop else (ends[0].left, stop)
            drawn = any({start, stop} == {x for x, _ in line.strokes[0]} for line in self.lines)
            if not drawn and not any(min(start, stop) < node.x < max(start, stop) for node in self.nodes.values()):
                self.lines.append(_Line(size, [[(start, 0.0), (stop, 0.0)]], ((start + stop) / 2, 0.1)))
                return
        y = self.above + (_LEVEL if self.above > _RADIUS else _FIRST_LEVEL)
        x = (ends[0].x + ends[-1].x) / 2
        strokes = [[(end.x, 0.0), (end.x, y)] for end in ends] + [[(ends[0].x, y), (ends[-1].x, y)]]
        if len(holders) > 2 or index in self.modes:
            self.dots[index] = x, y
        if index in self.modes:
            strokes.append([(x, y), (x, y + _LEG)])
            y += _LEG
        self.lines.append(_Line(size, strokes, (x + 0.3, y) if index in self.dots else (x, y)))
        self.above = y + 0.08

    def _place_above(self, name: str) -> None:
        """Place an array without modes above the row, over those that it has indices with."""
        below = [(index, self.nodes[other]) for index in self.arrays[name] for other in self.holders[index]
                 if index not in self.dots and other in self.nodes]  # fmt: skip
        dots = [(index, self.dots[index]) for index in self.arrays[name] if index in self.dots]
        places = [node.x for _, node in below] + [x for _, (x, _) in dots]
        y = self.above + 0.55
        self._add(name, places or [self.width / 2], y)
        self.above = y + _RADIUS
        for index, node in below:
            self.lines.append(_Line(self.sizes[index], [[(node.x, node.y), (node.x, y)]], (node.x, (node.y + y) / 2)))
        for _, (x, height) in dots:
            self.lines.append(_Line(0, [[(x, height), (x, y)]], (x, y)))


def _some(items: Sequence[Any], most: int, first: int) -> tuple[list[Any], int]:
    """Return the items to draw, the first few and the last of many, and how many before the last are omitted."""
    if len(items) <= most:
        return list(items), 0
    return [*items[:first], items[-1]], len(items) - first - 1


# -- The picture -------------------------------------------------------------------------------------------------------


# The widest row of splits; wider ones are stacked. The narrowest diagram, the margin, the width of a sign
# between splits, and the heights of an arrow and of a line in a box.
_WIDEST, _NARROWEST, _MARGIN, _BETWEEN, _ARROW, _LINE = 10.5, 5.2, 0.3, 0.6, 0.36, 0.165


@checks_arguments
def network(
    config: Config,
    shapes: Sequence[tuple[int, int]],
    path: str | os.PathLike[str],
    *,
    layers: Sequence[Hashable] | None = None,
    roles: Sequence[Hashable] | None = None,
    group: Any = 0,
    title: str = "",
    note: str = "",
) -> None:
    """Draw the tensor network of one group, and the steps from its tensor to the weights, into a file.

    Parameters
    ----------
    config : Config
    shapes : sequence of (rows, cols)
        Shapes of the weights.
    path : path-like
        Its suffix determines the format: ``.png``, ``.pdf``, ``.svg``.
    layers : sequence of hashable, optional
        One key per weight, for ``groups="layer"``.
    roles : sequence of hashable, optional
        One key per weight, for ``groups="role"``.
    group : int
        Index of the group, ``0 <= group < G``.
    title, note : str
        Text above the plot, and small text below.

    Raises
    ------
    ConfigError
        If the config does not suit these weights.
    ShapeError
        If there is no such group, or a shape or fold does not fit.
    ImportError
        If matplotlib is not installed.

    Notes
    -----
    A node is an array, named as in ``param_shapes`` (:math:`A_0` is ``factor0``). A line between two nodes is an index
    that is summed over, with its size; an open line is a mode. A dot gives all its lines the same index, as in a CP
    factorization of rank r. A dashed outline marks an array of which nothing is trained. Only one of several terms is
    drawn. Of more than ten modes or five splits, only the first few and the last are drawn.

    Examples
    --------
    LoRA of the query and value weights of ViT-base::

        network(tna.presets.lora(rank=4), [(768, 768)] * 24, "lora.svg", title="LoRA")
    """
    checked_text(title=title, note=note)
    plan = UpdatePlan(config, shapes, layers, roles)
    index = integer("group", group, 0, plan.num_groups - 1, ShapeError)
    network_group = plan.groups[index]
    shown, omitted = _some(range(len(network_group.network.splits)), _SPLITS, _FIRST_SPLITS)
    parts = {k: _SplitDrawing(network_group, k) for k in shown}
    breadth = sum(part.width + _BETWEEN for part in parts.values())
    stacked = breadth > _WIDEST
    widest = max(part.width + 2 * _BETWEEN for part in parts.values()) if stacked else breadth
    width = max(_NARROWEST, widest + 2 * _MARGIN)
    drawn, axes = figure(width, 1.0)
    drawn.set_layout_engine("none")
    axes.set_position((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, width)
    style: dict[str, Any] = {"va": "top", "parse_math": False}
    head = textwrap.wrap(title, int((width - 2 * _MARGIN) / 0.092))
    axes.text(_MARGIN, 0.0, "\n".join(head), fontsize=11, color=ink(), **style)
    top = _draw_key(axes, [node for part in parts.values() for node in part.nodes.values()], -0.2 * len(head))
    sign = "⊗" if network_group.network.kronecker else "⊙"
    top = _draw_splits(axes, parts, width, top, sign, omitted, stacked)
    bottom = _draw_steps(axes, _steps(plan, network_group, index), width / 2, top)
    axes.text(width / 2, bottom - 0.2, _words(plan, network_group), ha="center", fontsize=8.5, color=ink(), **style)
    foot = textwrap.wrap(note, int((width - 2 * _MARGIN) / 0.059))
    axes.text(_MARGIN, bottom - 0.5, "\n".join(foot), fontsize=7, color=pale(), **style)
    # One unit is an inch.
    height = 0.7 - bottom + 0.13 * len(foot)
    axes.set_ylim(-height, 0)
    drawn.set_size_inches(width, height)
    saved(drawn, path, tight=True)


def _draw_key(axes: Any, nodes: Sequence[_Node], top: float) -> float:
    """Draw the key of the nodes below a height, and return the height of its lower end."""
    from matplotlib.patches import Patch

    kinds = {node.kind for node in nodes}
    entries = [
        Patch(facecolor=between(look.color, ground(), 0.35), edgecolor=ink(), label=look.text)
        for kind, look in _LOOKS.items()
        if kind in kinds
    ]
    if any(node.frozen for node in nodes):
        entries.append(Patch(facecolor=ground(), edgecolor=ink(), linestyle="--", label="frozen, not trained"))
    axes.legend(
        handles=entries, loc="upper left", bbox_to_anchor=(_MARGIN, top), bbox_transform=axes.transData, frameon=False,
        ncols=2, fontsize=_POINTS, borderpad=0.2, borderaxespad=0.2, labelcolor=ink(), handlelength=1.0,
    )  # fmt: skip
    return top - 0.2 * math.ceil(len(entries) / 2) - 0.2


def _draw_splits(
    axes: Any, parts: dict[int, _SplitDrawing], width: float, top: float, sign: str, omitted: int, stacked: bool
) -> float:
    """Draw the splits below a height with signs between them, in a row or stacked, and return their lower end."""
    breadth, highest = sum(part.width + _BETWEEN for part in parts.values()), max(p.above for p in parts.values())
    x, last = (width - breadth + _BETWEEN) / 2, max(parts)
    style = {"ha": "center", "color": ink()}
    for k, part in parts.items():
        x = (width - part.width) / 2 if stacked else x
        y = top - (part.above if stacked else highest) - (0.3 if len(parts) > 1 else 0.0)
        _draw(axes, part, x, y)
        if len(parts) > 1:
            axes.text(x + part.width / 2, y + part.above + 0.18, f"split{k}", fontsize=_POINTS, **style)
        if k:
            axes.text(x - _BETWEEN / 2, y, sign, va="center", fontsize=17, **style)
        if k == last and omitted:
            words = f"⋯ {omitted} more splits"
            axes.text(x - _BETWEEN / 2, y + part.above + 0.45, words, fontsize=_POINTS, **style)
        x += part.width + _BETWEEN
        if stacked or k == last:
            top = y - _BELOW
    return top


def _draw(axes: Any, part: _SplitDrawing, x: float, y: float) -> None:
    """Draw a split whose origin is at a place: its lines, and its nodes over them."""
    from matplotlib.patches import FancyBboxPatch

    behind = {"boxstyle": "square,pad=0.1", "facecolor": ground(), "edgecolor": "none"}
    for line in part.lines:
        for (left, low), (right, high) in line.strokes:
            axes.plot([x + left, x + right], [y + low, y + high], color=ink(), linewidth=1.2, zorder=2)
        if line.size:
            at = x + line.label[0], y + line.label[1]
            axes.text(
                *at, f"{line.size:,}", ha="center", va="center", fontsize=_POINTS, color=ink(), bbox=behind, zorder=3
            )
    for dot_x, dot_y in part.dots.values():
        axes.plot(x + dot_x, y + dot_y, marker="o", markersize=6, color=ink(), zorder=4)
    for node in part.nodes.values():
        look = _LOOKS[node.kind]
        corner = f"round,pad=0,rounding_size={look.rounding * _RADIUS}" if look.rounding else "square,pad=0"
        size = node.right - node.left + 2 * _RADIUS, 2 * _RADIUS
        axes.add_patch(
            FancyBboxPatch(
                (x + node.left - _RADIUS, y + node.y - _RADIUS), *size, boxstyle=corner, edgecolor=ink(), zorder=4,
                facecolor=between(look.color, ground(), 0.85 if node.frozen else 0.35),
                linestyle="--" if node.frozen else "-",
            )
        )  # fmt: skip
        at = x + node.x, y + node.y
        axes.text(*at, node.symbol, ha="center", va="center", fontsize=9.5, color=ink(), zorder=5)
    if part.omitted:
        words = f"⋯\n{part.omitted} more\nmodes"
        axes.text(x + part.gap, y - 0.28, words, ha="center", va="top", fontsize=_POINTS, color=ink())


def _draw_steps(axes: Any, steps: Iterable[_Step], middle: float, top: float) -> float:
    """Draw the steps below each other in boxes joined by arrows, and return the height of the lower end."""
    for step in steps:
        height = _LINE * len(step.lines) + 0.16
        arrow = {"arrowstyle": "-|>,head_length=0.35,head_width=0.18", "color": ink(), "linewidth": 0.9}
        axes.annotate("", (middle, top - _ARROW), (middle, top), arrowprops={**arrow, "shrinkA": 0, "shrinkB": 0})
        words = {"fontsize": _POINTS, "color": tone(1 / 3), "parse_math": False}
        axes.text(middle + 0.14, top - _ARROW / 2, step.note, va="center", **words)
        box = {"boxstyle": "round,pad=0.4", "facecolor": ground(), "edgecolor": ink() if step.fixed else pale()}
        axes.text(
            middle, top - _ARROW - height / 2, "\n".join(step.lines), ha="center", va="center", fontsize=8.5,
            color=ink(), parse_math=False, bbox={**box, "linestyle": "--" if step.fixed else "-"},
        )  # fmt: skip
        top -= _ARROW + height
    return top


# -- Words -------------------------------------------------------------------------------------------------------------


class _Step(NamedTuple):
    """A step from the network to the weights: the lines in its box, and the note at the arrow to it from above."""

    lines: tuple[str, ...]
    note: str = ""
    fixed: bool = False


def _words(plan: UpdatePlan, group: Group) -> str:
    parameters = group.num_parameters
    told = _counted(parameters, "trainable parameter")
    # Magnitudes belong to weights, not to a group.
    rest = sum(map(math.prod, plan.weight_param_shapes.values()))
    beside = f", and {_counted(rest, 'magnitude')} of weights" if rest else ""
    total = plan.num_parameters - rest
    if plan.config.before is not None:
        trained = f"computed from {_counted(total, 'trainable parameter')}"
        return f"{_counted(parameters, 'element')} in this group's arrays, {trained}{beside}"
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


def _counted(count: int, what: str) -> str:
    return f"{_number(count)} {what}{'s' * (count != 1)}"


def _times(sizes: Sequence[int]) -> str:
    """Format the sizes of a tensor; of many modes only the first few and the last.

    Examples
    --------
    >>> _times((3, 1000)), _times((2,) * 32)
    ('3 × 1,000', '2 × 2 × 2 × ⋯ × 2, of 32 modes')
    """
    if len(sizes) <= _MODES:
        return " × ".join(map(_number, sizes))
    return " × ".join(map(_number, sizes[:3])) + f" × ⋯ × {_number(sizes[-1])}, of {len(sizes)} modes"


def _steps(plan: UpdatePlan, group: Group, index: int) -> list[_Step]:
    """Return the steps from the network to the weights."""
    network, projection = group.network, group.projection
    tensor = "tensor" if len(network.sizes) > 1 else "vector of"
    steps = [_Step((f"{tensor} {_times(network.sizes)}",), _combined(network))]
    first = network.splits[0]
    if isinstance(first, Permuted):
        unordered = _Step((f"tensor {_times(first.own.sizes)}",), _combined(network))
        steps = [unordered, _Step((f"tensor {_times(network.sizes)}",), "reorder axes")]
    held = math.prod(network.sizes)
    cut = f"keep the first {network.size:,} of {_number(held)}" if held > network.size else ""
    note = f"unfold, {cut}".removesuffix(", ") if len(network.sizes) > 1 else cut
    if not projection.map.identity:
        lines = (
            f"F: {projection_name(projection.kind)}, fixed, not trained",
            f"{_ratio(plan.part_of(group.pieces[0].weight)[0], projection)}{projection.n_in:,} → {projection.n_out:,}",
        )
        steps.append(_Step(lines, note, fixed=True))
        note = "minus F at the start" if group.subtracts else ""
    elif group.subtracts:
        note = f"minus the start, {note}".removesuffix(", ")
    steps.append(_Step((f"group {index:,}: {_counted(group.size, 'element')}",), note))
    steps.append(_Step(tuple(_covered(plan, group.pieces)), "row by row"))
    return steps


def _ratio(plan: UpdatePlan, projection: Projection) -> str:
    # If F determines its input length, a ratio of 1 means nothing.
    said = takes_ratio(plan.config.projection) or projection.n_in == projection.n_out
    return f"ρ = {plan.config.ratio:.12g}:  " if said else ""


def _combined(network: Network) -> str:
    """Describe what happens to the product of the splits: sum, cropping and scaling."""
    changes = [f"sum of {network.terms:,} terms"] if network.terms > 1 else []
    if network.kronecker:
        product = tuple(math.prod(sizes) for sizes in zip(*(split.sizes for split in network.splits), strict=True))
        if product != network.sizes:
            changes.append(f"cut from {_times(product)}")
    if network.scale != 1.0:
        changes.append(f"times {network.scale:.6g}, the scale α / r")
    return ", ".join(changes)


def _covered(plan: UpdatePlan, pieces: Sequence[Piece]) -> Iterator[str]:
    """Describe, in two lines, the weights that have elements in a group."""
    weights = [piece.weight for piece in pieces]
    cut = [piece.weight for piece in pieces if piece.length < math.prod(plan.shapes[piece.weight])]
    if len(weights) == 1:
        yield f"{'part of weight' if cut else 'weight'} {weights[0]:,}"
    else:
        yield f"{len(weights):,} weights: {_runs(weights)}" + (f" ({_runs(cut)} in part)" if cut else "")
    shapes = list(dict.fromkeys(plan.shapes[weight] for weight in sorted(weights)))
    told = [f"{rows:,} × {cols:,}" for rows, cols in shapes[:3]]
    if len(shapes) > 3:
        told.append(_counted(len(shapes) - 3, "more shape"))
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
