"""Verification and test tools: the laws, Hypothesis strategies, and contract suites to inherit.

>>> from hypothesis import given
>>> from tnadapt.testing import plans
>>> @given(plans())
... def test_counts(plan):
...     assert plan.num_parameters == sum(array.size for array in plan.init().values())
>>> test_counts()

A new backend inherits :class:`BackendContract`, a new format :class:`FormatContract`, a new map :class:`MapContract`, a
new source :class:`SourceContract`; the documentation's pages on backends and on extending tnadapt have examples. These
names need ``pip install "tnadapt[testing]"``. ``tnadapt.verify`` (``verification``) runs the laws with NumPy alone:
``_reference`` is the independent reference implementation in float64.
"""

from typing import TYPE_CHECKING

from tnadapt.lazy_names import lazy_names

if TYPE_CHECKING:
    from ._contracts import BackendContract, FormatContract, MapContract, SourceContract
    from .strategies import base_weights, configs, parameters, plans, shapes

__all__ = [
    "BackendContract",
    "FormatContract",
    "MapContract",
    "SourceContract",
    "base_weights",
    "configs",
    "parameters",
    "plans",
    "shapes",
]

# Imported on first use: Hypothesis and pytest are an extra, and ``tnadapt.verify`` does not need them.
_LAZY = {name: "_contracts" if name.endswith("Contract") else "strategies" for name in __all__}


__getattr__, __dir__ = lazy_names(__name__, _LAZY)
