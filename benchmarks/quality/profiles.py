"""How much is trained: profiles for half an hour, for a day on two cores, and for a GPU."""

from __future__ import annotations

import dataclasses

from tnadapt.errors import TnadaptError, safe_repr

from .grid import BUDGETS

#: A choice of methods: what people use, and the families with the fewest parameters.
FEW = (
    "lora", "lonkr", "lorta", "superlora", "superlora-projected", "fastfood", "lora_xs", "tinylora", "unilora",
    "fourierft", "cara", "vera", "peft-lora", "peft-lokr", "peft-vera", "peft-fourierft", "peft-unilora",
    "peft-tinylora",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Profile:
    """A part of the grid."""

    tasks: tuple[str, ...]
    about: str
    #: All if None.
    methods: tuple[str, ...] | None = None
    budgets: tuple[int, ...] = BUDGETS
    seeds: int = 5
    #: Number of seeds with which rates are tried.
    tuned_by: int = 1
    #: Of data and training: see :class:`~benchmarks.quality.tasks.QualityTask`.
    scale: str = "small"


PROFILES = {
    "quick": Profile(
        ("digits",), "half an hour on two cores: a choice of methods, three seeds", FEW, (100, 1_000, 10_000), 3
    ),
    "day": Profile(
        ("digits", "reviews", "cifar10"), "about a day on two cores: a choice of methods, five seeds", FEW
    ),
    "full": Profile(
        ("digits", "reviews", "cifar10", "smollm2-sft", "smollm2-grpo", "diffusion"),
        "for a GPU or a cluster: all tasks at full scale, all methods, five seeds, rates tuned by two",
        None, BUDGETS, 5, 2, "full",
    ),
}  # fmt: skip


def profile_of(name: str) -> Profile:
    """Return the profile of a name."""
    if name not in PROFILES:
        raise TnadaptError(f"no profile {safe_repr(name)}; expected one of {', '.join(PROFILES)}")
    return PROFILES[name]
