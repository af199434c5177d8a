"""The mutation tests' own machinery: what is mutated, what is left out, which tests are tried, and what fails a run."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("cosmic_ray", reason="cosmic-ray is not installed (the extra mutation)")

from cosmic_ray.mutating import mutate_code

from mutation import report
from mutation.__main__ import ROOT, _groups
from mutation.mutants import Module, changed_lines
from mutation.operators import DropKeyword, DropStatement, NegateIn, ReturnNone
from mutation.reach import Reach

CODE = '''"""A module."""

from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from x import y
Shape = tuple[int, int] | None


def first(a: int | None, b: "list[int]" = [1]) -> int | None:
    size: int | str = a + 2
    pairs = list(zip([size], b, strict=True))
    if size in b:
        return cast("int | None", pairs)
    b[0] = (
        size
        + 3
    )
    return None
'''


def module_of(folder: Path, code: str) -> Module:
    (folder / "m.py").write_text(code, encoding="utf-8")
    return Module(folder, "m.py")


def changes(module: Module) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for mutant in module.mutants:
        code = module.mutated(mutant)
        assert code is not None
        found.setdefault(mutant.operator, []).append(
            module.change(code).splitlines()[-1].strip("+- ")
        )  # without the marks of a diff
    return found


@pytest.mark.parametrize("operator", [DropKeyword, DropStatement, NegateIn, ReturnNone])
def test_our_operators_do_what_their_examples_say(operator: Any) -> None:
    for example in operator.examples():
        found = mutate_code(example.pre_mutation_code, operator(), example.occurrence)
        assert found.replace(" ", "").split() == example.post_mutation_code.replace(" ", "").split()


def test_what_runs_is_mutated_and_annotations_are_not(tmp_path: Path) -> None:
    found = changes(module_of(tmp_path, CODE))
    assert found["Binary_Add_Sub"] == ["size: int | str = a - 2", "3"]
    assert found["NegateIn"] == ["if size not in b:"]
    assert found["ReturnNone"] == ["return None"]
    assert "DropKeyword" not in found  # zip's strict=True only asserts
    assert not any("BitOr" in operator for operator in found)
    assert found["DropStatement"] == ["pass"]
    assert len(found["NumberReplacer"]) == 2 * 4  # the default, 2, 0 and 3


def test_a_key_outlives_changes_elsewhere_in_the_file(tmp_path: Path) -> None:
    before = module_of(tmp_path, CODE).mutants
    moved = CODE.replace("def first", 'def other():\n    return "x"\n\n\ndef first')
    after = module_of(tmp_path, moved).mutants
    assert {mutant.key for mutant in before} <= {mutant.key for mutant in after}
    assert max(Counter(mutant.key for mutant in after).values()) == 1


def test_changed_lines_are_those_of_later_commits(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=Tester", "-c", "user.email=tester@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "old.py").write_text("a = 1\nb = 2\nc = 3\nd = 4\n")
    git("add", ".")
    git("commit", "-m", "first")
    git("tag", "first")
    assert changed_lines(tmp_path, "old.py", "first") == set()
    git("mv", "old.py", "new.py")
    (tmp_path / "new.py").write_text("a = 1\nb = 0\nc = 3\nd = 4\ne = 5\n")
    git("commit", "-am", "second")
    assert changed_lines(tmp_path, "new.py", "first") == {2, 5}


def test_lines_that_run_on_import_in_tests_and_in_their_processes_are_reached(tmp_path: Path) -> None:
    for folder in ("tnadapt", "tests"):
        (tmp_path / folder).mkdir()
    (tmp_path / "tnadapt" / "__init__.py").touch()
    functions = "".join(f"def {name}():\n    return 1\n\n" for name in ("f", "g", "h", "at_import"))
    (tmp_path / "tnadapt" / "m.py").write_text(functions + "at_import()\n")
    (tmp_path / "tests" / "test_m.py").write_text(
        "import os, subprocess, sys, pytest\n"
        "from tnadapt import m\n"
        "@pytest.mark.parametrize('name', ['f', 'g'])\n"
        "def test_process(name):\n"
        "    end = {'f': 'sys.exit()', 'g': 'os._exit(0)'}[name]\n"
        "    code = f'import os, sys; from tnadapt import m; m.{name}(); {end}'\n"
        "    subprocess.run([sys.executable, '-c', code], check=True)\n"
        "def test_here():\n"
        "    assert m.h() == 1\n"
    )
    (tmp_path / "mutation").symlink_to(ROOT / "mutation")
    reach = Reach.measured(tmp_path, tmp_path / "kept", ["tests/test_m.py"])
    file = "tests/test_m.py::test"
    assert set(reach.seconds) == {f"{file}_process[f]", f"{file}_process[g]", f"{file}_here"}
    lines = reach.tests["tnadapt/m.py"]
    assert lines[2] == {f"{file}_process[f]"}
    assert lines[5] == {f"{file}_process[g]"}
    assert lines[8] == {f"{file}_here"}
    assert "" in lines[11]
    assert f"{file}_here" not in lines[11]


def record(key: str, status: str) -> dict[str, Any]:
    where = {"module": "tnadapt/m.py", "function": "f", "line": 1, "operator": "Is_IsNot"}
    return {"key": key, "status": status, "change": "-a\n+b", **where}


def test_a_run_fails_on_survivors_without_a_reason_and_below_the_goal(tmp_path: Path) -> None:
    killed = [record(f"k{i}", "killed") for i in range(19)]
    equivalent = {"key": "e", "kind": "equivalent", "reason": "nobody can tell"}
    gap = {"key": "g", "kind": "gap", "reason": "hard to test"}
    records = [*killed, record("e", "survived"), record("g", "survived")]
    known = {"e": equivalent, "g": gap}
    assert report.failings(records, known) == []
    (said,) = report.failings(records, {"g": gap, "e": {**equivalent, "kind": "gap"}})
    assert said == "19 of 21 mutants were noticed: 90.5%, and 95% is the goal"
    (said,) = report.failings(records, {"g": gap})[:1]
    assert "e survived, and survivors.toml gives no reason: tnadapt/m.py, line 1" in said
    (said,) = report.failings(killed, {"k3": {**gap, "key": "k3"}})
    assert said == "k3 has a reason in survivors.toml and was noticed: take the reason out"
    page = report.page(records, known, {"tnadapt/m.py": 100}, {"seed": 0})
    assert "Of 100 mutants, 21 were drawn at random and run. 1 of them are equivalent" in page
    assert "the tests notice 19: **95.0%**. 0 of these had survived at first" in page
    assert "nobody can tell" in page
    late = [{**record, "first": "survived"} if record["key"] == "k7" else record for record in records]
    # Of 300 mutants by operators that the run leaves out, 99 % of those drawn are noticed.
    rest = report.Rest([*[record("l", "killed")] * 99, record("s", "survived")], 300)
    page = report.page(late, known, {"tnadapt/m.py": 100}, {"seed": 0}, rest)
    assert "1 of these had survived at first, and tests were added for them. Without these tests it was 90.0%" in page
    assert "make 300 more mutants. Of 100 that were drawn at random and are not equivalent, the tests notice 99" in page
    assert report.failings(rest.records, {"s": {"kind": "gap"}}, goal=False) == []


@pytest.mark.parametrize("entry", ['kind = "rare"\nreason = "x"', 'kind = "gap"\nreason = " "'])
def test_a_reason_has_a_kind_and_words(tmp_path: Path, entry: str) -> None:
    path = tmp_path / "survivors.toml"
    path.write_text(f'[[survivor]]\nkey = "a"\n{entry}\n', encoding="utf-8")
    with pytest.raises(SystemExit, match="a needs a reason, and one of the kinds equivalent, cost, gap"):
        report.reasons(path)


def test_the_committed_reasons_and_results_fit_each_other() -> None:
    known = report.reasons(ROOT / "mutation" / "survivors.toml")
    results = ROOT / "benchmarks" / "results" / "mutation.jsonl"
    records = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    assert report.failings([record for record in records if record["status"] != "void"], known) == []


def test_every_listed_module_and_test_file_is_there() -> None:
    groups = _groups([])
    assert all((ROOT / file).is_file() for files in groups.values() for file in files)
    assert groups["tnadapt/algebra/folding.py"][:2] == ["tnadapt/algebra/folding.py", "tests/algebra/test_folding.py"]
    with pytest.raises(SystemExit, match=r"modules\.toml does not list nothing\.py"):
        _groups(["nothing.py"])
