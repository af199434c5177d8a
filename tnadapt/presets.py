"""``tnadapt.presets``, the short name of :mod:`tnadapt.algebra.presets`: the named methods."""

import sys

from .algebra import presets

# For type checkers, and for threads that import this module while another one has just begun to.
from .algebra.presets import *  # noqa: F403

# One module with two names, not two modules.
sys.modules[__name__] = presets
