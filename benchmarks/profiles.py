"""Store profiles: a file of JSON lines, the machine first, and a table that the documentation includes."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from machine import machine

from tnadapt.errors import spreadsheet_text

__all__ = ["store"]

RESULTS = Path(__file__).parent / "results"


def store(name: str, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """Write ``results/NAME.jsonl`` and ``results/NAME.csv``, the latter with these keys under these headings."""
    lines = [{**machine(), "part": name}, *rows]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (RESULTS / f"{name}.jsonl").write_text(text, encoding="utf-8")
    with (RESULTS / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(columns.values())
        cells = ([row.get(key, "") for key in columns] for row in rows)
        table.writerows([spreadsheet_text(one) if isinstance(one, str) else one for one in row] for row in cells)
