"""``tnadapt.sources``, the short name of :mod:`tnadapt.algebra.sources`: which arrays are trained."""

import sys

from .algebra import sources

# For type checkers, and for threads that import this module while another one has just begun to.
from .algebra.sources import *  # noqa: F403

# One module with two names, not two modules.
sys.modules[__name__] = sources
