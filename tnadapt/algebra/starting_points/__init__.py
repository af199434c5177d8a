"""Starting points x_0 of training: the usual one with a zero, or one that is brought, or computed from the base.

``Config(start=…)`` names one. Where it subtracts, ``ΔW = net(x) - net(x_0)`` and x begins at x_0, so that a fresh
adapter changes nothing whatever x_0 is. One class a start and a file; a new one is one more file and one more line in
:data:`STARTS`.
"""

from __future__ import annotations

from tnadapt.plugins import Registry

from ._brought_start import BroughtStart
from ._milora import MiLoRA
from ._olora import OLoRA
from ._pissa import PiSSA
from ._start import PREFIX, Start, StartPlace
from ._zero_start import ZeroStart

__all__ = ["PREFIX", "STARTS", "Start", "StartPlace", "starting_point"]

STARTS: Registry[Start] = Registry(
    "start",
    Start,
    {
        "zero": ZeroStart,
        "given": BroughtStart,
        "pissa": PiSSA,
        "milora": MiLoRA,
        "olora": OLoRA,
    },
)


def starting_point(name: object) -> Start:
    """Return the start of that name.

    Raises
    ------
    ConfigError
        If there is none; the message lists those there are.

    Examples
    --------
    >>> starting_point("pissa").needs_base, starting_point("zero").subtracts
    (True, False)
    """
    return STARTS.find(name)()
