"""Whether an adapter exports exactly as LoRA, at which rank, and at which rank vLLM serves it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from tnadapt.algebra.group import lora_rank, pair_widths
from tnadapt.algebra.update_plan import UpdatePlan
from tnadapt.errors import escaped
from tnadapt.targets.checkpoint_experts import PARAMETERS
from tnadapt.targets.target import Target

#: Values that vLLM accepts as ``--max-lora-rank``.
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

#: The name of the only embedding to which vLLM can apply LoRA, in models where it can.
SERVED_EMBEDDING = "embed_tokens"


class LoraExport(NamedTuple):
    """What programs that serve LoRA can make of an adapter.

    Attributes
    ----------
    rank : int or None
        The rank of LoRA that holds the update of every module exactly, whatever the parameters are; None if there is
        none that is smaller than the updates or the adapter's own.
    reason : str
        Why not, for a rank of None.
    mergeable : bool
        Whether the adapter can be merged into the weights instead.
    embedding : bool
        Whether a weight is that of an embedding, whose LoRA vLLM has for some models.
    limits : str
        Who has no LoRA of some of the weights, and who has; "" if all have.

    Examples
    --------
    >>> print(LoraExport(8))
    exports exactly as LoRA of rank 8
    >>> print(LoraExport(5))
    exports exactly as LoRA of rank 5 (padded to 8 for vLLM)
    >>> print(LoraExport(None, "its updates may have matrix rank 768"))
    merge only: its updates may have matrix rank 768
    """

    rank: int | None
    reason: str = ""
    mergeable: bool = True
    embedding: bool = False
    limits: str = ""

    @property
    def served(self) -> int | None:
        """The rank at which vLLM serves it, or None: ``served_rank(rank)``."""
        return None if self.rank is None or self.limits else served_rank(self.rank)

    def __str__(self) -> str:
        if self.rank is None:
            return f"merge only: {self.reason}" if self.mergeable else f"neither LoRA nor merged: {self.reason}"
        if self.limits:
            note = f" ({self.limits})"
        elif self.served is None:
            note = f" (vLLM takes ranks up to {SERVED_RANKS[-1]}: merge it)"
        elif self.embedding:
            note = f" (of rank {self.served} for vLLM, if it has LoRA of this model's embedding)"
        else:
            note = "" if self.served == self.rank else f" (padded to {self.served} for vLLM)"
        return f"exports exactly as LoRA of rank {self.rank}{note}"

    def to_dict(self) -> dict[str, object]:
        """Return the fields, and the sentence, as a dictionary for JSON."""
        return {"lora_rank": self.rank, "served_rank": self.served, "says": str(self)}


def served_rank(rank: int) -> int | None:
    """Return the smallest rank of ``SERVED_RANKS`` that holds a rank, or None if it is too large.

    Examples
    --------
    >>> served_rank(1), served_rank(2), served_rank(300), served_rank(513)
    (1, 8, 320, None)
    """
    return next((served for served in SERVED_RANKS if served >= rank), None)


def lora_export(plan: UpdatePlan, targets: Sequence[Target] | None = None, activation: str | None = None) -> LoraExport:
    """Return whether an adapter exports exactly as LoRA, and at which rank.

    Parameters
    ----------
    plan : UpdatePlan
    targets : sequence of Target, optional
        The weights. Updates of some rows of a fused weight become one update of the whole weight, whose rank is the sum
        of theirs. By default, every update is that of a whole weight of a layer.
    activation : str, optional
        LoDA's nonlinearity.

    Returns
    -------
    LoraExport

    Examples
    --------
    >>> import tnadapt as tna
    >>> vit = [(768, 768)] * 24
    >>> for config in (tna.presets.lora_xs(2), tna.presets.lotr(4), tna.presets.superlora(1)):
    ...     print(lora_export(tna.UpdatePlan(config, vit)))
    exports exactly as LoRA of rank 2 (padded to 8 for vLLM)
    exports exactly as LoRA of rank 4 (padded to 8 for vLLM)
    merge only: its updates may have matrix rank 768
    """
    if activation is not None:
        return LoraExport(None, "an activation acts between its factors", mergeable=False)
    if not plan.applying.additive:
        return LoraExport(None, f"apply={plan.config.apply!r} does more than add its updates")
    tied = next((target for target in targets or () if target.tied), None)
    # PEFT supports LoRA of an embedding that is tied to weights of modules.
    if tied is not None and not (tied.role == "embedding" and all(name.endswith(".weight") for name in tied.tied)):
        return LoraExport(None, f"{escaped(tied.name)} is tied to {escaped(', '.join(tied.tied))}")
    weights = targets or ()
    other = next((target for target in weights if not _is_layer(target)), None)
    if other is not None:
        return LoraExport(None, f"{escaped(other.name)} is not the weight of a layer")
    if targets is None and (full := plan.full_rank_bound()) is not None:
        return LoraExport(None, f"its updates may have matrix rank {full}")
    ranks, widths = plan.largest_ranks, list(pair_widths(plan.layout, plan.groups))
    shapes: Sequence[tuple[int, int]] = plan.shapes
    if targets is not None:
        total, wide = Counter[str](), dict[str, int | None]()
        for target, rank, width in zip(targets, ranks, widths, strict=True):
            place = _place(target)
            total[place] += rank
            before = wide.get(place, 0)
            wide[place] = None if width is None or before is None else before + width
        whole = {_place(target): dataclasses.replace(target, rows=None).shape for target in targets}
        shapes, ranks, widths = [whole[module] for module in total], list(total.values()), list(wide.values())
    export_rank = lora_rank(shapes, ranks, widths)
    if export_rank is not None:
        return LoraExport(
            export_rank, embedding=any(target.role == "embedding" for target in weights), limits=_limits(weights)
        )
    most = max(min(rank, *shape) for rank, shape in zip(ranks, shapes, strict=True))
    return LoraExport(None, f"its updates may have matrix rank {most}")


def _limits(targets: Sequence[Target]) -> str:
    """Describe which libraries can and cannot apply LoRA to these weights, if not all can."""
    if any(map(_is_expert, targets)):
        return "PEFT only: that of experts is not written for vLLM and others, so merge it for them"
    tied = next((target for target in targets if target.tied), None)
    if tied is not None:
        names = escaped(", ".join(tied.tied))
        return f"{escaped(tied.name)} is tied to {names}, and only PEFT has one LoRA of both, so merge it for others"
    if any(len(target.stored) != 2 for target in targets):
        return "PEFT, LyCORIS and diffusers only: vLLM and llama.cpp have no LoRA of convolutions, so merge it for them"
    embeddings = [target.module for target in targets if target.role == "embedding"]
    if other := [path for path in embeddings if path.rpartition(".")[2] != SERVED_EMBEDDING]:
        return f"PEFT only: vLLM has no LoRA of the embedding {escaped(other[0])}, so merge it for vLLM"
    return ""


def _is_expert(target: Target) -> bool:
    return target.index is not None and target.parameter in PARAMETERS


def _is_layer(target: Target) -> bool:
    """Return whether PEFT can apply LoRA to a parameter: the weight of a layer, or the matrices of experts."""
    return _is_expert(target) or (target.parameter == "weight" and target.index is None)


def _place(target: Target) -> str:
    return target.module if target.index is None else f"{target.name}[{target.index}]"
