"""Planning: the settings that fit a budget for given weights, with the capacity and cost of each.

Everything but the rank is computed from integers, without arrays.
"""

from ._flops import step_cost
from ._matrix_rank import Rank, degrees_of_freedom, largest_rank
from ._plan_search import model_targets, plan
from ._plan_table import Plan, Row, padding_waste, parameters_of
from ._setting_names import Name, PresetCall, known_as, preset_call

__all__ = [
    "Name",
    "Plan",
    "PresetCall",
    "Rank",
    "Row",
    "degrees_of_freedom",
    "known_as",
    "largest_rank",
    "model_targets",
    "padding_waste",
    "parameters_of",
    "plan",
    "preset_call",
    "step_cost",
]
