"""For ``tnadapt finetune --budget``: the largest setting of each method within a budget of parameters."""

from __future__ import annotations

from tnadapt.argument_checks import checks_arguments
from tnadapt.errors import TnadaptError
from tnadapt.planning.families import FEWEST, usual
from tnadapt.planning.ladders import Family, Search
from tnadapt.planning.preset_families import PRESET_FAMILIES, AdaptedWeights

from .grid import Method, Shapes, method_of

__all__ = ["check_budget", "within"]

#: Presets that join the usual families: those with the fewest parameters, and the one that did best with few on a task
#: of docs/which.md.
_FEW = (*FEWEST, "fourierft")


@checks_arguments
def check_budget(budget: int) -> None:
    """Raise a TnadaptError unless a budget is a number of parameters."""
    if budget < 1:
        raise TnadaptError(f"a budget must be at least 1 parameter; got {budget}")


def within(budget: int, shapes: Shapes) -> list[Method]:
    """Return, for each method, the setting with the most parameters within a budget.

    Parameters
    ----------
    budget : int
    shapes : sequence of (rows, cols)
        Shapes of the model's targets.

    Returns
    -------
    list of Method
        Without methods whose smallest setting exceeds the budget.

    Raises
    ------
    TnadaptError
        If the smallest setting of every method exceeds the budget.

    Examples
    --------
    >>> from tnadapt import parameter_count
    >>> shapes = [(768, 768)] * 24
    >>> for method in within(10_000, shapes):
    ...     print(method.name, parameter_count(method.config, shapes))
    LoNKr K = 2, f = 24, r = 30 9996
    LoRTA M = 3, r = 11 9317
    LoRTA M = 5, r = 6 8586
    SuperLoRA r = 1 7526
    SuperLoRA + F r = 42, ρ = 0.001 9996
    fastfood ρ = 0.0007064 10000
    LoRA-XS r = 20 9600
    TinyLoRA p = 4096, r = 16 4096
    Uni-LoRA p = 10000, r = 4 10000
    FourierFT n = 416 9984
    """
    check_budget(budget)
    search, families = Search(shapes), _families(shapes)
    allowed = min(budget, sum(rows * cols for rows, cols in shapes))
    found = [largest for family in families if (largest := search.largest(family, allowed))]
    if not found:
        least = min(least.parameters for family in families if (least := search.least(family)))
        raise TnadaptError(
            f"a budget of {budget} is less than any setting needs on these {len(shapes)} weights; the least is {least}"
        )
    return [method_of(one.config) for one in found]


def _families(shapes: Shapes) -> list[Family]:
    weights = AdaptedWeights(shapes)
    return [*usual(shapes), *(PRESET_FAMILIES[name].family(weights) for name in _FEW)]
