"""The environment in which asv measures: the Python that runs it, with what is installed there."""

from __future__ import annotations

import sys
from typing import Any

from asv.environment import ExistingEnvironment

__all__ = ["Present"]


class Present(ExistingEnvironment):
    """asv's own environment of this kind puts the path of the Python into its result files and their names."""

    tool_name = "present"
    name = "present"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._python = f"{sys.version_info.major}.{sys.version_info.minor}"
