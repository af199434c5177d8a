"""One setting of a plan, with its measures on given weights."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

from tnadapt.algebra.config import Config
from tnadapt.algebra.network import Network
from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.argument_checks import checks_arguments
from tnadapt.checkpoints.lora_export import LoraExport, lora_export

from ._flops import step_cost
from ._freedom import degrees_of_freedom
from ._matrix_rank import Rank, largest_rank
from ._preset_call import PresetCall, preset_call
from ._setting_names import Name, known_as

__all__ = ["Row", "padding_waste"]


@dataclasses.dataclass(frozen=True)
class Row:
    """One setting of a plan.

    Attributes
    ----------
    config : Config
        Ready to use.
    name : Name
        Its common name.
    parameters : int
    bytes : int
        Bytes of its arrays in a file, in the plan's dtype.
    waste : float
        Fraction of the folded tensors' elements that are computed but not used, 0 to 1.
    freedom : int
        Dimension of the set of updates that it can represent: :func:`~tnadapt.planning.degrees_of_freedom`.
    cost : int
        Multiply-adds to compute all updates, what they make of the weights, and their gradients once:
        :func:`~tnadapt.planning.step_cost`.
    adapter : SuperLoRA
        The setting on the plan's weights.
    measured : float, optional
        What part of the gain of dense updates the method reached on held-out samples with about as many parameters, in
        published results that apply to these weights; None if there are none.
    measured_on : tuple of str
        The tasks of these results.
    estimated_on : tuple of str
        The tasks on which, with about as many parameters, only other methods were measured. If there are any,
        ``measured`` is an estimate: on them, the method is assumed to keep its distance to the others.

    Examples
    --------
    >>> import tnadapt as tna
    >>> row = Row.of(tna.SuperLoRA(tna.presets.lora(1), [(64, 64)] * 8))
    >>> print(row.name, row.parameters, row.bytes, row.freedom, row.rank)
    LoRA r = 1 1024 4096 1016 1
    """

    config: Config
    name: Name
    parameters: int
    bytes: int
    waste: float
    freedom: int
    cost: int
    adapter: SuperLoRA = dataclasses.field(compare=False, repr=False)
    measured: float | None = None
    measured_on: tuple[str, ...] = ()
    estimated_on: tuple[str, ...] = ()

    @classmethod
    @checks_arguments
    def of(cls, adapter: SuperLoRA, each: int = 4) -> Row:
        """Return the row of a :class:`~tnadapt.SuperLoRA` whose parameters have ``each`` bytes."""
        count = adapter.num_parameters
        return cls(
            adapter.config, known_as(adapter.config), count, count * each, padding_waste(adapter),
            degrees_of_freedom(adapter), step_cost(adapter), adapter,
        )  # fmt: skip

    @functools.cached_property
    def rank(self) -> Rank:
        """Largest matrix rank that an update can have, for the first of the weights whose smaller side is largest.

        Computed by :func:`~tnadapt.planning.largest_rank` on first access, and cached.
        """
        return largest_rank(self.adapter)

    @functools.cached_property
    def export(self) -> LoraExport:
        """Whether it exports exactly as LoRA, at which rank, and at which rank vLLM serves it; or why not."""
        return lora_export(self.adapter)

    @functools.cached_property
    def call(self) -> PresetCall | None:
        """How to write the config: :func:`~tnadapt.planning.preset_call`."""
        return preset_call(self.config)

    @property
    def lora_rank(self) -> int | None:
        """Rank of LoRA that holds every update exactly, or None: :attr:`tnadapt.SuperLoRA.lora_rank`."""
        return self.export.rank

    @property
    def fraction(self) -> float:
        """``freedom`` as a fraction of the number of elements of all updates."""
        return self.freedom / self.adapter.size

    def to_dict(self) -> dict[str, Any]:
        """Return the row as a dictionary for JSON, including the rank."""
        return {
            "family": self.name.family, "label": self.name.label, "parameters": self.parameters, "bytes": self.bytes,
            "call": None if self.call is None else str(self.call), "measured": self.measured,
            "measured_on": list(self.measured_on), "estimated_on": list(self.estimated_on),
            "rank": self.rank.value, "rank_exact": self.rank.exact, "export": self.export.to_dict(),
            "lora_rank": self.lora_rank, "freedom": self.freedom, "fraction": self.fraction, "waste": self.waste,
            "cost": self.cost, "config": self.config.to_dict(),
        }  # fmt: skip


@checks_arguments
def padding_waste(plan: SuperLoRA) -> float:
    """Return the fraction of the elements of all folded tensors that are computed but not used.

    Parameters
    ----------
    plan : SuperLoRA

    Returns
    -------
    float
        0 if all elements are used. For a Kronecker product, its sizes before cropping count.

    Examples
    --------
    >>> import tnadapt as tna
    >>> padding_waste(tna.SuperLoRA(tna.Config(groups=1, fold="hypercube", order=3), [(3, 3)]))  # 27 for 9
    0.6666666666666666
    """
    networks = [(group.network, count) for group, count in plan.alike]
    made = sum(count * _elements(network) for network, count in networks)
    return (made - sum(count * network.size for network, count in networks)) / made


def _elements(network: Network) -> int:
    if not network.kronecker:
        return math.prod(network.sizes)
    return math.prod(math.prod(split.sizes) for split in network.splits)
