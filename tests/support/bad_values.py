"""Values that hardly any parameter takes, each made anew for every call."""

from __future__ import annotations

import datetime
import decimal
import fractions
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["BAD_VALUES"]


class _HostileRepr:
    """A value that cannot be printed."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def _nested(depth: int) -> list[Any]:
    """Lists in lists, deeper than Python's limit on recursion."""
    inner: list[Any] = []
    for _ in range(depth):
        inner = [inner]
    return inner


def _cycle() -> list[Any]:
    """A list that contains itself."""
    endless: list[Any] = []
    endless.append(endless)
    return endless


def _generator() -> Any:
    yield from "ab"


BAD_VALUES: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "True": lambda: True,
    "False": lambda: False,
    "0": lambda: 0,
    "-1": lambda: -1,
    "7": lambda: 7,
    "2**63": lambda: 2**63,
    "10**30": lambda: 10**30,
    "-10**30": lambda: -(10**30),
    "10**5000": lambda: 10**5000,
    "0.5": lambda: 0.5,
    "-0.5": lambda: -0.5,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "1e308": lambda: 1e308,
    "1j": lambda: 1j,
    "Decimal nan": lambda: decimal.Decimal("NaN"),
    "Fraction": lambda: fractions.Fraction(1, 3),
    "np.int64(-3)": lambda: np.int64(-3),
    "np.float32 nan": lambda: np.float32("nan"),
    "np.bool_": lambda: np.bool_(True),
    "empty str": lambda: "",
    "word": lambda: "nonsense",
    "long str": lambda: "x" * 100_000,
    "surrogate": lambda: "a\ud800b",
    "nul": lambda: "a\0b",
    "controls": lambda: "a\x1b[31m\n\u202eb",
    "digits": lambda: "12",
    "bytes": lambda: b"abc",
    "empty tuple": lambda: (),
    "empty list": lambda: [],
    "empty dict": lambda: {},
    "list of None": lambda: [None],
    "list of list": lambda: [[]],
    "words": lambda: ["a", "b"],
    "ragged": lambda: [[1.0], [1.0, 2.0]],
    "huge sizes": lambda: [10**9, 10**9],
    "negative sizes": lambda: [-2, 3],
    "floats": lambda: [0.5, float("nan")],
    "set": lambda: {1, "a"},
    "dict": lambda: {"a": 1},
    "dict of None": lambda: {None: None},
    "dict of arrays": lambda: {"a": np.ones((2, 2))},
    "deep": lambda: _nested(10_000),
    "cycle": _cycle,
    "generator": _generator,
    "object": object,
    "hostile repr": _HostileRepr,
    "class": lambda: object,
    "no arguments": lambda: lambda: None,
    "module": lambda: np,
    "path": lambda: Path("missing/file"),
    "date": lambda: datetime.date(2000, 1, 1),
    "matrix": lambda: np.ones((2, 3)),
    "scalar array": lambda: np.array(1.0),
    "empty array": lambda: np.zeros((0, 3)),
    "nan array": lambda: np.full((4, 6), np.nan),
    "inf array": lambda: np.full((4, 6), np.inf),
    "complex array": lambda: np.ones((4, 6), np.complex128),
    "integer array": lambda: np.arange(3),
    "object array": lambda: np.array([None, "a"], object),
    "text array": lambda: np.array(["a", "b"]),
    "date array": lambda: np.array(["2000-01-01"], "datetime64[D]"),
    "record array": lambda: np.zeros(2, [("a", "f4")]),
    "many axes": lambda: np.ones((1,) * 40),
}
