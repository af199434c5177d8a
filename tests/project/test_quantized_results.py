"""The tables and numbers of the page on quantized bases are those of the results."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests.conftest import BENCHMARKS

if not (BENCHMARKS / "quantized.py").is_file():
    pytest.skip("the benchmarks are not in this copy of the project", allow_module_level=True)

PAGE = Path(__file__).parents[2] / "docs" / "quantized.rst"


@pytest.fixture
def script(benchmark_scripts: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_scripts("quantized")


@pytest.fixture
def kinds(script: ModuleType) -> dict[str, dict[str, object]]:
    return json.loads(script.RESULTS.read_text(encoding="utf-8"))["kinds"]  # type: ignore[no-any-return]


def test_the_tables_are_made_of_the_results(script: ModuleType) -> None:
    results = json.loads(script.RESULTS.read_text(encoding="utf-8"))
    assert script.TABLES.read_text(encoding="utf-8") == script.tables(results)
    assert "torch" not in sys.modules or results["versions"]["torch"]


def test_every_kind_was_tried_and_only_calibrated_ones_refuse_a_merge(
    kinds: dict[str, dict[str, dict[str, str]]],
) -> None:
    pytest.importorskip("torch")
    from tests.torch.quantized_models import EMBEDDINGS, KINDS

    assert {name for name in kinds if not name.startswith(("GPTQ", "AWQ"))} == {*KINDS, *EMBEDDINGS}
    for name, row in kinds.items():
        refused = {step for step, found in row["steps"].items() if found != "yes"}
        assert refused == ({"merge"} if name.startswith(("GPTQ", "AWQ")) else set()), name


def test_the_numbers_in_the_text_are_measured(kinds: dict[str, dict[str, dict[str, dict[str, float]]]]) -> None:
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    nf4 = kinds["bitsandbytes nf4"]["merges"]
    small, large = nf4["0.01"], nf4["0.1"]
    kept, most, off = (round(100 * number) for number in (small["kept"], large["kept"], large["update_error"]))
    assert f"of an update of 1 % of the weight, nf4 keeps {kept} %, and of 10 % it keeps {most} %" in text
    assert f"with an error of {off} %" in text
    for name, row in kinds.items():
        if "8" in name and "merges" in row:
            assert row["merges"]["0.1"]["kept"] > 0.95, name
        if "int8" in name and "merges" in row:
            assert row["merges"]["0.03"]["kept"] > 0.95, name


def test_the_wrong_sizes_of_bitsandbytes_are_measured(kinds: dict[str, dict[str, float]]) -> None:
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    wrong, right = (round(100 * kinds["bitsandbytes nf4"][shape]) for shape in ("64 by 96", "96 by 64"))
    assert f"an nf4 layer of 64 by 96 is off by {wrong} % instead of {right} %" in text
