"""The layout of a group's diagram: its tensor network and the steps to the weights, with positions. Draws nothing.

Lengths are inches.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from tnadapt.algebra.formats import Permuted
from tnadapt.algebra.group import Group
from tnadapt.algebra.layout import Piece
from tnadapt.algebra.maps import projection_name, takes_ratio
from tnadapt.algebra.maps.projection import Projection
from tnadapt.algebra.network import Network
from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.errors import ShapeError, integer

from ._diagram_parts import BOND_POINTS, KINDS, Box, Label, SplitDrawing, some, wide
from ._split_diagram import MODES, laid_out

__all__ = ["Diagram", "FlowStep", "KeyEntry", "diagram"]

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


@dataclasses.dataclass(frozen=True)
class Diagram:
    """The complete diagram of one group with positions; y is 0 at the top and negative below.

    Attributes
    ----------
    parts : tuple of SplitDrawing
        The splits of one term.
    signs : tuple of Label
        Signs and text between and next to the splits.
    frames : tuple of (float, float, float, float)
        Left, bottom, right and top of each split, if there are several.
    brackets : tuple of (float, float, float, float) or None
        Left, bottom, right and top of the part that is summed over terms.
    brace : (float, float, float)
        Left, right and height of the line below the network, from which the arrows start.
    steps : tuple of FlowStep
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

    parts: tuple[SplitDrawing, ...]
    signs: tuple[Label, ...]
    frames: tuple[Box, ...]
    brackets: Box | None
    brace: tuple[float, float, float]
    steps: tuple[FlowStep, ...]
    key: tuple[KeyEntry, ...]
    words: str
    parameters: int
    splits_left_out: int
    width: float
    height: float


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
    >>> found = diagram(tna.SuperLoRA(tna.presets.lora(rank=4), [(768, 512)]))
    >>> [(node.name, node.size) for part in found.parts for node in part.nodes]
    [('group0.split0.factor0', 3072), ('group0.split0.dot', 0), ('group0.split0.factor1', 2048)]
    >>> [leg.size for part in found.parts for leg in part.legs]
    [768, 512]
    >>> found.words
    '5,120 trainable parameters, all in this group'
    """
    group = integer("group", group, 0, plan.num_groups - 1, ShapeError)
    own = plan.groups[group]
    shown, hidden = some(len(own.network.splits), _SPLITS, _FIRST)
    splits = _Splits(own.network, {k: laid_out(plan, own, k) for k in shown}, hidden)
    steps = _steps(plan, own, group)
    words = _words(plan, own)
    width = max(
        _NARROWEST,
        splits.outer + 2 * _MARGIN,
        *(step.width + 2 * _MARGIN for step in steps),
        *(2 * (wide(step.note, BOND_POINTS) + 0.2 + _MARGIN) for step in steps),
        wide(words, _STEP_POINTS) + 2 * _MARGIN,
    )
    drawn = [node for part in splits.parts.values() for node in part.nodes]
    kinds = {node.kind for node in drawn} | ({"frozen"} if any(node.frozen for node in drawn) else set())
    key, top = _key([kind for kind in KINDS if kind in kinds], width)
    bottom = splits.place(width / 2, top - 0.26)
    half = max(splits.inner / 2, 0.4)
    placed, low = [], bottom - 0.15
    y = low
    for step in steps:
        placed.append(dataclasses.replace(step, y=y - _ARROW - step.height / 2))
        y -= _ARROW + step.height
    return Diagram(
        parts=tuple(splits.placed), signs=tuple(splits.signs), frames=tuple(splits.frames), brackets=splits.brackets,
        brace=(width / 2 - half, width / 2 + half, low), steps=tuple(placed), key=key, words=words,
        parameters=own.num_parameters, splits_left_out=hidden, width=width, height=-y,
    )  # fmt: skip


# -- The splits of a term ------------------------------------------------------------------------


class _Splits:
    """The splits of one term in rows, with the signs between and around them."""

    def __init__(self, network: Network, parts: Mapping[int, SplitDrawing], hidden: int) -> None:
        self.parts, self.hidden = parts, hidden
        self.sign = "⊗" if network.kronecker else "⊙"
        self.several = len(network.splits) > 1
        self.terms = "" if network.terms == 1 else f"{network.terms:,} terms"
        shown: list[int | None] = [*parts]
        if hidden:
            shown.insert(len(shown) - 1, None)  # stands for the omitted splits
        self.rows = [shown]
        if self._width(shown) > _WIDEST:
            self.rows = []
            for k in shown:
                row = self.rows[-1] if self.rows else [None]
                if None in (k, row[-1]) or self._width([*row, k]) > _WIDEST - _BETWEEN:
                    self.rows.append([])
                self.rows[-1].append(k)
        # Every row after the first begins with the sign that joins it to the row above; all rows reserve space for it.
        self.lead = _BETWEEN if len(self.rows) > 1 else 0.0
        self.block = self.lead + max(self._width(row) for row in self.rows)
        self.inner = self.block + (0.2 if self.terms else 0.0)
        self.outer = self.inner + (2 * (wide(self.terms, BOND_POINTS) + 0.2) if self.terms else 0.0)
        self.placed: list[SplitDrawing] = []
        self.signs: list[Label] = []
        self.frames: list[Box] = []
        self.brackets: Box | None = None

    def _outer_width(self, k: int | None) -> float:
        return self.parts[k].width + 2 * _INSIDE if k is not None else _GAP

    def _width(self, row: Sequence[int | None]) -> float:
        return sum(map(self._outer_width, row)) + _BETWEEN * (len(row) - 1)

    def place(self, middle: float, top: float) -> float:
        """Place all splits below a height; return the height of their lower end."""
        bottom = top
        for number, row in enumerate(self.rows):
            bottom = self._row(row, middle - self.block / 2, bottom - (0.1 if number else 0.0))
        if self.terms:
            left, right = middle - self.inner / 2, middle + self.inner / 2
            self.brackets = left, bottom - 0.04, right, top + 0.04
            x, y = left - 0.1 - wide(self.terms, BOND_POINTS) / 2, (top + bottom) / 2
            self.signs += [Label("Σ", x, y + 0.1, 22.0, role="sign"), Label(self.terms, x, y - 0.18, role="word")]
        return bottom - (0.04 if self.terms else 0.0)

    def _row(self, row: Sequence[int | None], x: float, top: float) -> float:
        parts = [self.parts[k] for k in row if k is not None]
        y = top - max([part.above for part in parts] or [0.16]) - (_NAME if self.several and parts else 0.0)
        bottom = y - max([part.below for part in parts] or [0.16]) - (0.12 if self.several and parts else 0.0)
        x += self.lead
        for place, k in enumerate(row):
            if place:
                x += _BETWEEN
            if k != 0:
                self.signs.append(Label(self.sign, x - _BETWEEN / 2, y, 17.0, role="sign"))
            if k is None:
                self._left_out(x, y, bool(parts))
            else:
                self.placed.append(dataclasses.replace(self.parts[k], x=x + _INSIDE, y=y))
                if self.several:
                    self.frames.append((x, bottom, x + self._outer_width(k), top))
                    self.signs.append(Label(f"split{k}", x + self._outer_width(k) / 2, top - 0.18, role="word"))
            x += self._outer_width(k)
        return bottom

    def _left_out(self, x: float, y: float, beside: bool) -> None:
        """Add the note on omitted splits, next to other splits or in a separate row."""
        count = f"{self.hidden} more"
        if not beside:
            self.signs.append(Label("⋯", x + 0.15, y, 14.0, role="sign"))
            self.signs.append(Label(f"{count} splits", x + 0.4, y, align="left", role="word"))
            return
        middle = x + _GAP / 2
        self.signs += [
            Label("⋯", middle, y, 14.0, role="sign"),
            Label(count, middle, y - 0.2, role="word"),
            Label("splits", middle, y - 0.33, role="word"),
        ]


# -- Words ---------------------------------------------------------------------------------------


def _key(kinds: Sequence[str], width: float) -> tuple[tuple[KeyEntry, ...], float]:
    """Lay out the key in lines of a width; return its entries and the height of their lower end."""
    x, y, found = _MARGIN, -0.1, []
    for kind in kinds:
        text = KINDS[kind][1]
        needed = 0.27 + wide(text, _KEY_POINTS) + 0.2
        if x > _MARGIN and x + needed > width:
            x, y = _MARGIN, y - 0.2
        found.append(KeyEntry(kind, text, x, y))
        x += needed
    return tuple(found), y - 0.1


def _words(plan: SuperLoRA, group: Group) -> str:
    own = group.num_parameters
    told = f"{_number(own)} trainable {_plural(own, 'parameter')}"
    # Magnitudes belong to weights, not to a group.
    rest = sum(map(math.prod, plan.weight_param_shapes.values()))
    beside = f", and {_number(rest)} {_plural(rest, 'magnitude')} of weights" if rest else ""
    total = plan.num_parameters - rest
    if plan.config.before is not None:
        trained = f"computed from {_number(total)} trainable {_plural(total, 'parameter')}"
        return f"{_number(own)} {_plural(own, 'element')} in this group's arrays, {trained}{beside}"
    if plan.num_groups == 1:
        return f"{told}, all in this group{beside}"
    shared = ", some shared" if sum(one.num_parameters for one in plan.groups) != total else ""
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
        made = FlowStep((f"tensor {_times(first.own.sizes)}",), _combined(network))
        steps = [made, FlowStep((f"tensor {_times(network.sizes)}",), "reorder axes")]
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
    found = []
    if network.kronecker:
        made = tuple(math.prod(sizes) for sizes in zip(*(split.sizes for split in network.splits), strict=True))
        if made != network.sizes:
            found.append(f"cut from {_times(made)}")
    if network.scale != 1.0:
        found.append(f"times {network.scale:.6g}, the scale α / r")
    return ", ".join(found)


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
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    told = [f"{a:,}" if a == b else f"{a:,}–{b:,}" if b > a + 1 else f"{a:,}, {b:,}" for a, b in runs[:5]]
    return ", ".join(told) + (" and others" if len(runs) > 5 else "")
