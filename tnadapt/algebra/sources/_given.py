"""Frozen arrays that the caller brings."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from tnadapt.errors import ConfigError, safe_repr

from ._source import Source

__all__ = ["Given"]


@dataclasses.dataclass(frozen=True)
class Given(Source):
    """A frozen array that the caller brings. It is stored in files, in float32.

    The arrays are given to the plan, ``SuperLoRA(config, shapes, given={"group0.split0.factor1": array})``, or to
    :func:`tnadapt.torch.attach`.

    Parameters
    ----------
    shared : bool
        Whether all groups have the same array: only that of the first group is then given and stored. If their sizes
        differ, it has the largest size along each axis, and the groups use its leading elements.

    Examples
    --------
    >>> import numpy as np, tnadapt as tna
    >>> config = tna.presets.lora(2).replace(sources={"factor1": tna.sources.Given(shared=True)})
    >>> given = {"group0.split0.factor1": np.eye(4, 2)}
    >>> plan = tna.SuperLoRA(config, [(3, 4), (3, 4)], given=given)
    >>> plan.num_parameters
    12
    """

    shared: bool = False

    brought: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.shared, bool):
            raise ConfigError(f"shared must be True or False; got {safe_repr(self.shared)}")

    @property
    def independent_of_group(self) -> bool:
        """Whether all groups have the same array."""
        return self.shared
