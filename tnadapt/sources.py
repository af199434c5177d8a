"""``tnadapt.sources``, the short name of :mod:`tnadapt.algebra.sources`: which arrays are trained."""

import sys
from typing import TYPE_CHECKING

from .algebra import sources

if TYPE_CHECKING:
    from .algebra.sources import *  # noqa: F403

# One module with two names, not two modules.
sys.modules[__name__] = sources
