"""Starts that are computed from data: functions that return arrays for :meth:`tnadapt.torch.Adapter.start_from`.

The adapter's config needs ``start="given"`` and LoRA's form, as ``tnadapt.presets.lora(8, start="given")`` has it. Each
function leaves the model and the adapter as they were, and its result depends on nothing but the model and the batches:

- :func:`eva`: A from the principal components of each layer's inputs; B is zero.
- :func:`lora_ga`: A and B from the singular vectors of each weight's gradient.
"""

from ._eva import eva
from ._lora_ga import lora_ga

__all__ = ["eva", "lora_ga"]
