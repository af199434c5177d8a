"""What a budget buys: settings on given weights, what each can do, and what it costs. Integers, but for the rank."""

from .cost import step_cost
from .freedom import degrees_of_freedom
from .headers import model_targets
from .names import Name, known_as
from .planned import Plan
from .rank import Rank, largest_rank
from .row import Row, padding_waste
from .search import plan

__all__ = [
    "Name",
    "Plan",
    "Rank",
    "Row",
    "degrees_of_freedom",
    "known_as",
    "largest_rank",
    "model_targets",
    "padding_waste",
    "plan",
    "step_cost",
]
