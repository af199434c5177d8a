"""The table of an adapter: the slices of groups that each weight's update consists of."""

from __future__ import annotations

import math
from typing import NamedTuple

from tnadapt.checkpoints.lora_export import LoraExport, lora_export
from tnadapt.errors import escaped, pluralize
from tnadapt.report import html_table, text_table

from ._arrays import named_parameters
from ._quantized import quantized_type
from ._state import AdapterState, is_array
from ._trainable import num_parameters
from ._weights import join

__all__ = ["Summary", "SummaryRow"]

_HEAD = ("target", "role", "shape", "group[slice]", "strategy")


class SummaryRow(NamedTuple):
    """The row of one weight.

    Attributes
    ----------
    target : str
        The parameter's path in the model.
    role : str
        Its role in the model, such as ``"q"``.
    shape : tuple of int
        ``(rows, cols)`` of the update.
    slices : tuple of (group, start, stop)
        The ranges of elements of groups that the update consists of.
    strategy : str
        How the layer uses the update.
    rank : int
        A matrix rank that the update never exceeds: :meth:`tnadapt.SuperLoRA.largest_rank`.
    """

    target: str
    role: str
    shape: tuple[int, int]
    slices: tuple[tuple[int, int, int], ...]
    strategy: str
    rank: int


class Summary:
    """The result of :meth:`Adapter.summary`: ``rows`` and counts; prints as a table.

    Attributes
    ----------
    rows : list of SummaryRow
    parameters : int
        Trained elements of the adapter.
    frozen : int
        Elements of the arrays that :meth:`Adapter.set_trainable` froze.
    adapted : int
        Elements of the weights that the adapter updates.
    kept : int
        Elements of the model's own parameters that ``keep_trainable`` left free.
    base : int
        Elements of the base model.
    export : LoraExport
        Whether :func:`tnadapt.convert` exports the adapter exactly as LoRA, at which rank, and at which rank vLLM
        serves it; or why it can only be merged.
    """

    def __init__(self, adapter: AdapterState) -> None:
        plan = adapter.plan
        self.title = f"adapter {adapter.name!r} on {type(adapter.model).__name__}"
        self.rows = [
            SummaryRow(
                target.name,
                target.role,
                target.shape,
                tuple((p.group, p.group_start, p.group_start + p.length) for p in plan.layout.of_weight(index)),
                slot.strategy,
                plan.largest_rank(index),
            )
            for index, (target, slot) in enumerate(zip(adapter.targets, adapter.slots, strict=False))
        ]
        self.groups = plan.num_groups
        self.export: LoraExport = lora_export(plan, adapter.targets, adapter.activation)
        self.parameters = num_parameters(adapter)
        self.frozen = plan.num_parameters - self.parameters
        self.adapted = plan.size
        sizes = _sizes(adapter)
        self.kept = sum(sizes.get(name, 0) for name in adapter.kept)
        self.base = sum(sizes.values())

    @property
    def lora_rank(self) -> int | None:
        """The rank of LoRA that holds the update of every module exactly, or None: that of ``export``."""
        return self.export.rank

    def trainable_line(self) -> str:
        """Return the numbers of trainable and of all parameters, in the words of PEFT."""
        trained, every = self.parameters + self.kept, self.base + self.parameters + self.frozen
        return f"trainable params: {trained:,} || all params: {every:,} || trainable%: {100.0 * trained / every:.4f}"

    def __str__(self) -> str:
        return "\n".join([self.title, *text_table([_HEAD, *map(self._cells, self.rows)]), *self._notes()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_table(self.title, _HEAD, map(self._cells, self.rows), self._notes())

    def _notes(self) -> list[str]:
        share = 100.0 * self.parameters / self.base
        count = (
            f"{self.parameters:,} parameters in {self.groups} group{'s' * (self.groups != 1)} for {self.adapted:,} "
            f"elements of {pluralize(len(self.rows), 'weight')}; {share:.3g} % of the base's {self.base:,}"
        )
        if self.frozen:
            count += f"; {self.frozen:,} more frozen"
        if self.kept:
            count += f"; {self.kept:,} of the model kept trainable"
        return [count, str(self.export)]

    @staticmethod
    def _cells(row: SummaryRow) -> tuple[str, ...]:
        slices = " + ".join(f"{group}[{start}:{stop}]" for group, start, stop in row.slices)
        return escaped(row.target), row.role, "×".join(map(str, row.shape)), slices, row.strategy


def _sizes(adapter: AdapterState) -> dict[str, int]:
    """Return the elements of each of the base's parameters; of a quantized weight, those that it stands for."""
    model = adapter.model
    own = {id(parameter) for _, parameter in named_parameters(adapter)}
    sizes = {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if not is_array(name) and id(parameter) not in own
    }
    for path, module in model.named_modules():
        kind = quantized_type(module)
        if kind is not None:
            for name in kind.stored:
                sizes.pop(join(path, name), None)
            sizes[join(path, "weight")] = math.prod(kind.shape(module))
    return sizes
