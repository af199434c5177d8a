"""``tnadapt.maps``, the short name of :mod:`tnadapt.algebra.maps`: the fixed maps F."""

import sys

from .algebra import maps

# For type checkers, and for threads that import this module while another one has just begun to.
from .algebra.maps import *  # noqa: F403

# One module with two names, not two modules.
sys.modules[__name__] = maps
