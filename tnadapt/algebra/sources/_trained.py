"""Arrays that are trained: the parameters of an adapter."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from ._source import Source

__all__ = ["Trained"]


@dataclasses.dataclass(frozen=True)
class Trained(Source):
    """The array is a parameter: it starts as :mod:`tnadapt.algebra.init` says, and is trained. The default.

    Examples
    --------
    >>> import tnadapt as tna
    >>> tna.Config(sources={"factor1": tna.sources.Trained()}).sources["factor1"]
    Trained()
    """

    trained: ClassVar[bool] = True
