"""``tnadapt.maps``, the short name of :mod:`tnadapt.algebra.maps`: the fixed maps F."""

import sys
from typing import TYPE_CHECKING

from .algebra import maps

if TYPE_CHECKING:
    from .algebra.maps import *  # noqa: F403

# One module with two names, not two modules.
sys.modules[__name__] = maps
