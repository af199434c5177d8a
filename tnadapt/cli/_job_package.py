"""Import of ``tnadapt.finetune``, which needs extras."""

from __future__ import annotations

from types import ModuleType

from tnadapt.errors import TnadaptError

__all__ = ["job_package"]


def job_package() -> ModuleType:
    """Return tnadapt.finetune.

    Raises
    ------
    TnadaptError
        If a library that it needs is not installed.
    """
    try:
        from tnadapt import finetune
    except ImportError as error:
        raise TnadaptError(f"tnadapt finetune needs its extra: pip install 'tnadapt[demo]' ({error})") from None
    return finetune
