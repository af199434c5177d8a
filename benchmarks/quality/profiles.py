"""How much is trained: profiles for half an hour, for a day on two cores, and for a GPU."""

from __future__ import annotations

import dataclasses

from tnadapt.errors import TnadaptError, safe_repr

from .grid import BUDGETS

#: What people use, and the families with the fewest parameters.
FEW = (
    "lora", "lorta", "superlora", "superlora-projected", "fastfood", "lora_xs", "tinylora", "unilora", "fourierft",
    "vera", "peft-lora", "peft-vera", "peft-fourierft", "peft-unilora", "peft-tinylora",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Profile:
    """A part of the grid."""

    tasks: tuple[str, ...]
    about: str
    #: All if None.
    methods: tuple[str, ...] | None = None
    budgets: tuple[int, ...] = BUDGETS
    seeds: int = 3
    #: Number of seeds with which rates are tried.
    tuned_by: int = 1
    #: Of data and training: see :class:`~benchmarks.quality.tasks.QualityTask`.
    scale: str = "small"


PROFILES = {
    "quick": Profile(
        ("digits",), "half an hour on two cores: a choice of methods", FEW, (100, 1_000, 10_000)
    ),
    "day": Profile(
        ("digits", "reviews", "cifar10", "german", "hungarian"), "two days on two cores: a choice of methods", FEW
    ),
    "full": Profile(
        ("digits", "reviews", "cifar10", "german", "hungarian"),
        "for a GPU or a cluster: all tasks at full scale, all methods, five seeds, rates tuned by two",
        None, BUDGETS, 5, 2, "full",
    ),
}  # fmt: skip


def profile_of(name: str) -> Profile:
    """Return the profile of a name."""
    if name not in PROFILES:
        raise TnadaptError(f"no profile {safe_repr(name)}; expected one of {', '.join(PROFILES)}")
    return PROFILES[name]
