"""What a test registers for quantized layers is forgotten after it."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _only_built_in_layers() -> Iterator[None]:
    yield
    if "tnadapt.torch._quantized" in sys.modules:
        sys.modules["tnadapt.torch._quantized"].QUANTIZED.forget()
