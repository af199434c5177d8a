"""Arrays that are another array of the plan."""

from __future__ import annotations

import dataclasses
import re

from tnadapt.errors import ConfigError, safe_repr

from ._source import Source

__all__ = ["Tied"]

_NAME = re.compile(r"(?:group(0|[1-9]\d*)\.)?((?:term(?:0|[1-9]\d*)\.)?split(?:0|[1-9]\d*)\.[A-Za-z_]\w*)")


@dataclasses.dataclass(frozen=True)
class Tied(Source):
    """The array is another array of the plan, of the same shape.

    Parameters
    ----------
    to : str
        Name of the other array: ``"split0.factor0"`` of the same group, or ``"group0.split0.factor0"`` of another one.
        An array that is tied to itself, as that of group 0 in the second case, is trained.

    Raises
    ------
    ConfigError
        If it is not such a name.

    Notes
    -----
    It is what the other array is: trained, frozen, or scaled. A trained array is counted and stored once, and its
    gradient is the sum over all its uses.

    Examples
    --------
    LoRA with one A for all layers (ShareLoRA):

    >>> import tnadapt as tna
    >>> shared = {"factor1": tna.sources.Tied("group0.split0.factor1")}
    >>> plan = tna.SuperLoRA(tna.presets.lora(2, sources=shared), [(6, 4), (5, 4)])
    >>> list(plan.param_shapes)
    ['group0.split0.factor0', 'group0.split0.factor1', 'group1.split0.factor0']
    """

    to: str

    def __post_init__(self) -> None:
        if not isinstance(self.to, str) or not _NAME.fullmatch(self.to):
            raise ConfigError(
                "Tied needs the full name of an array, such as 'split0.factor0' for the same group or "
                f"'group0.split0.factor0'; got {safe_repr(self.to)}"
            )

    def target(self, group: int) -> tuple[int, str]:
        """Return the group and the network's name of the other array, for an array of this group."""
        found = _NAME.fullmatch(self.to)
        assert found is not None  # checked above
        return group if found[1] is None else int(found[1]), found[2]
