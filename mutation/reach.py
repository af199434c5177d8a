"""Which tests reach which lines: measured once per test file, and cached until it or the library changes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .mutants import Module, Mutant

__all__ = ["Reach"]

HERE = Path(__file__).parent
#: How many tests of a file run before another file's turn; the same for the module's own files.
_TURN, _OWN_TURN = 5, 20

_RUN = """
import sys, pytest
from pathlib import Path
from mutation.tracing import Tracing
root, out, started, file = sys.argv[1:]
options = ["-q", "-p", "no:cacheprovider", "-m", ""]
code = pytest.main([file, *options], plugins=[Tracing(Path(root), Path(out), Path(started))])
sys.exit(code)
"""


@dataclasses.dataclass
class Reach:
    """Tests by the lines that they run.

    Attributes
    ----------
    seconds : dict of str to float
        The time of each test, in the brief profile.
    tests : dict
        ``tests[module][line]`` is the set of tests that run it; it contains "" if the line runs on import.
    """

    seconds: dict[str, float]
    tests: dict[str, dict[int, set[str]]]

    @classmethod
    def measured(cls, root: Path, kept: Path, files: Iterable[str], processes: int = 1) -> Reach:
        """Measure these test files, each in a separate process, unless a cached measurement exists."""
        kept.mkdir(parents=True, exist_ok=True)
        library = _digest(sorted((root / "tnadapt").rglob("*.py")))
        seconds: dict[str, float] = {}
        tests: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))

        def of_file(file: str) -> dict[str, Any]:
            name = hashlib.sha256(f"{file} {library} {_digest([root / file])}".encode()).hexdigest()[:16]
            out = kept / f"{name}.json"
            if not out.exists():
                _measure(root, file, out)
            found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
            return found

        with ThreadPoolExecutor(processes) as pool:
            for found in pool.map(of_file, files):
                for test, of_test in found.items():
                    if test:
                        seconds[test] = of_test["seconds"]
                    for module, lines in of_test["lines"].items():
                        for line in lines:
                            tests[module][line].add(test)
        return cls(seconds, tests)

    def of(self, module: Module, mutant: Mutant, first: Iterable[str]) -> list[str]:
        """Return the tests that can notice a mutant, fastest first: from all files in turn, mostly the module's own.

        There may be thousands, of which not all are run: a few of each file reveal more than all of one.
        """
        reached, lines = self.tests.get(module.path, {}), module.reach(mutant.line)
        found = set().union(*(reached.get(line, ()) for line in (reached if lines is None else lines)))
        # A compiler such as torch.compile may run a line unseen by coverage. Then any test of the module may apply.
        found = found or set().union(*reached.values()) - {""}
        order = {file: place for place, file in enumerate(first)}
        # A line that runs on import may affect any test.
        imported = lines is None or "" in found
        own = {test for test in self.seconds if test.split("::")[0] in order} if imported else set()
        by_file: dict[str, list[str]] = defaultdict(list)
        for test in sorted((found | own) - {""}, key=lambda test: (self.seconds[test], test)):
            by_file[test.split("::")[0]].append(test)
        module_s = {module.path, f"test_{Path(module.path).stem.lstrip('_')}.py"}
        turns = [
            (
                place // _OWN_TURN if {file, Path(file).name} & module_s else 1 + place // _TURN,
                order.get(file, len(order)),
                place,
                test,
            )
            for file, tests in by_file.items()
            for place, test in enumerate(tests)
        ]
        return [test for *_, test in sorted(turns)]


def _measure(root: Path, file: str, out: Path) -> None:
    """Run the tests of a file, and write the lines that each of them reaches."""
    start, part = time.monotonic(), out.with_suffix(".part")
    with tempfile.TemporaryDirectory(prefix="mutation-trace-") as started:
        environment = {
            **os.environ,
            "HYPOTHESIS_PROFILE": "brief",
            "PYTHONPATH": os.pathsep.join(map(str, (root, HERE / "startup", HERE.parent))),
            "MUTATION_TRACE": started,
            "MUTATION_ROOT": str(root),
        }
        done = subprocess.run(
            [sys.executable, "-c", _RUN, str(root), str(part), started, file],
            cwd=root, env=environment, capture_output=True, text=True, check=False, errors="replace",
        )  # fmt: skip
    # 1: some fail while lines are traced, such as those on memory; they are left out. 5: nothing was collected, for
    # example because a library is not installed.
    if done.returncode not in (0, 1, 5) or not part.exists():
        raise SystemExit(f"{file} fails without any mutation:\n{done.stdout[-3000:]}{done.stderr[-2000:]}")
    part.rename(out)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    print("\n".join([f"measured which lines {file} reaches: {time.monotonic() - start:.0f} s", *failed]), flush=True)


def _digest(paths: Iterable[Path]) -> str:
    found = hashlib.sha256()
    for path in paths:
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()
