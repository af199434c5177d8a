"""Starting points x_0 of training: the usual one with a zero, or one that is brought, or computed from the base.

``Config(start=…)`` names one. Where it subtracts, ``ΔW = net(x) - net(x_0)`` and x begins at x_0, so that a fresh
adapter changes nothing whatever x_0 is. One class a start and a file; a new built-in one is one more file and one more
line in :data:`STARTS`; another package calls ``tnadapt.register_start``.
"""

from __future__ import annotations

from tnadapt.plugins import Registry

from ._brought_start import BroughtStart
from ._milora import MiLoRA
from ._olora import OLoRA
from ._pissa import PiSSA
from ._start import PREFIX, Start, StartPlace
from ._start_without_zero import RandomStart
from ._zero_start import ZeroStart

__all__ = ["PREFIX", "STARTS", "Start", "StartPlace", "register_start", "starting_point"]

STARTS: Registry[Start] = Registry(
    "start",
    Start,
    {
        "zero": ZeroStart,
        "given": BroughtStart,
        "random": RandomStart,
        "pissa": PiSSA,
        "milora": MiLoRA,
        "olora": OLoRA,
    },
)


def register_start(name: str, cls: type[Start]) -> None:
    """Make a start known by a name, for ``Config(start=name)``.

    Parameters
    ----------
    name : str
        Lower-case letters, digits, ``.``, ``_`` and ``-``. It is written into adapter files.
    cls : type
        A subclass of :class:`tnadapt.algebra.starting_points.Start`, called without arguments.

    Raises
    ------
    ConfigError
        If the name is not of that form, is built in, or registered by another module, or the class is not a Start.

    Examples
    --------
    LoRA that starts at the first rows and columns of the base weight:

    >>> import numpy as np, tnadapt as tna
    >>> from tnadapt.algebra.starting_points import Start
    >>> class Corner(Start):
    ...     needs_base = True
    ...     def arrays(self, place, base, stream):
    ...         (_, rank), _ = place.shapes.values()
    ...         return {"split0.factor0": base[:, :rank], "split0.factor1": base[:rank].T}
    >>> tna.register_start("corner", Corner)
    >>> plan = tna.SuperLoRA(tna.presets.lora(1, start="corner"), [(2, 3)])
    >>> plan = plan.with_base([np.arange(1.0, 7.0).reshape(2, 3)])
    >>> params = plan.init()
    >>> params["group0.split0.factor1"].tolist(), bool(plan.deltas(params)[0].any())
    ([[1.0], [2.0], [3.0]], False)
    """
    STARTS.register(name, cls)


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
