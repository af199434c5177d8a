"""Planning: the settings that fit a budget for given weights, with the capacity and cost of each.

Everything but the rank is computed from integers, without arrays.
"""

from ._flops import step_cost
from ._freedom import degrees_of_freedom
from ._matrix_rank import Rank, largest_rank
from ._model_headers import model_targets
from ._plan_row import Row, padding_waste
from ._plan_search import plan
from ._plan_table import Plan
from ._preset_call import PresetCall, preset_call
from ._setting_names import Name, known_as

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
    "plan",
    "preset_call",
    "step_cost",
]
