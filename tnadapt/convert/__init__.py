"""Adapters of PEFT and LyCORIS in and out: exactly where algebra permits, else with the error that it makes.

On the way in, ``reading`` finds out whose a file is, ``peft_reading`` and ``lycoris_reading`` take its tensors,
``tensors`` makes one :class:`~tnadapt.convert._updates.Update` of each module's, and ``joining`` one adapter file of
all of them. On the way out, ``modules`` and ``taking_apart`` find what each module's update is made of, ``choosing``
and ``low_rank`` what it becomes, ``encoding`` its tensors, and ``outward`` reads back what is written, to measure it.
"""

from typing import TYPE_CHECKING, Any

from ._api import FORMS, convert

if TYPE_CHECKING:
    from ._conversion import Conversion

__all__ = ["FORMS", "Conversion", "convert"]


def __getattr__(name: str) -> Any:
    if name != "Conversion":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ._conversion import Conversion

    return Conversion
