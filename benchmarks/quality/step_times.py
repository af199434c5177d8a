"""How long a training step takes with each method, from ``python benchmarks/steps.py``, for the tables of methods."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from tnadapt.errors import FileError

__all__ = ["RESULTS", "step_ratio", "step_ratios"]

#: Rows that ``python benchmarks/steps.py --problem minilm --rounds 12 --results THIS CASE CASE CASE`` appends: a call
#: for each two or three cases, as other load on the machine affects short rounds less.
RESULTS = Path(__file__).parents[1] / "results" / "method_steps.jsonl"
#: The cases of ``steps.py`` that stand for methods whose names are not cases.
CASES: Mapping[str, str] = {
    "superlora-projected": "superlora F 0.01",
    "peft-lora": "peft lora r=4",
    "peft-unilora": "peft unilora",
    "peft-fourierft": "peft fourierft",
}


def step_ratios(path: Path = RESULTS) -> dict[str, float]:
    """Return the time of a training step of MiniLM by case, divided by that of PEFT's LoRA of rank 4.

    Raises
    ------
    FileError
        If the file cannot be read or is damaged.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {row["case"]: float(row["ratio"]) for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileError(f"{path} has no times of steps: {error}") from None


def step_ratio(ratios: Mapping[str, float], method: str) -> str:
    """Return a cell of a table: the ratio of a method, or a dash if it was not measured.

    Examples
    --------
    >>> step_ratio({"superlora F 0.01": 1.234}, "superlora-projected"), step_ratio({}, "boft")
    ('1.23', '–')
    """
    found = ratios.get(CASES.get(method, method))
    return "–" if found is None else f"{found:.2f}"
