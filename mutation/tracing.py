"""A pytest plugin that records how long each test took, and which lines of the library it ran."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import coverage
import pytest

__all__ = ["Tracing"]


class Tracing:
    """Records while the tests run; writes one JSON file at the end.

    Parameters
    ----------
    root : Path
        The repository.
    out : Path
        ``{test: {"seconds": ..., "lines": {module: [line, ...]}}}`` for every test that passed, and under the name ""
        for code that runs outside tests, when modules are imported.
    started : Path
        The folder in which processes started by tests record what they ran (``startup/sitecustomize.py``).
    """

    def __init__(self, root: Path, out: Path, started: Path) -> None:
        self.root, self.out, self.started = root, out, started
        self.coverage = coverage.Coverage(data_file=None, source=[str(root / "tnadapt")], config_file=False)
        self.seconds: dict[str, float] = defaultdict(float)
        self.failed: set[str] = set()
        self.coverage.start()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self.coverage.switch_context(item.nodeid)
        yield
        self.coverage.switch_context("")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if not report.passed:  # skipped tests cannot notice anything either
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        self.coverage.stop()
        data = self.coverage.get_data()
        lines: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
        for file in data.measured_files():
            module = Path(file).relative_to(self.root).as_posix()
            for line, tests in data.contexts_by_lineno(file).items():
                for test in tests:
                    lines[test][module].add(line)
        for written in sorted(self.started.glob("*.json")):
            process = json.loads(written.read_text(encoding="utf-8"))
            for module, reached in process["lines"].items():
                lines[process["test"]][module].update(reached)
        found = {
            test: {
                "seconds": round(seconds, 3),
                "lines": {module: sorted(reached) for module, reached in lines.get(test, {}).items()},
            }
            for test, seconds in [*self.seconds.items(), ("", 0.0)]
            if test not in self.failed
        }
        self.out.write_text(json.dumps(found), encoding="utf-8")
