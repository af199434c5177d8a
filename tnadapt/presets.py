"""``tnadapt.presets``, the short name of :mod:`tnadapt.algebra.presets`: the named methods."""

import sys
from typing import TYPE_CHECKING

from .algebra import presets

if TYPE_CHECKING:
    from .algebra.presets import *  # noqa: F403

# One module with two names, not two modules.
sys.modules[__name__] = presets
