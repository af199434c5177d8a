"""Decide whether the tests notice a mutant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .mutants import Module, Mutant
from .reach import Reach
from .running import Outcome, Tree

__all__ = ["Judge"]

#: Stages of tests that run together: their measured time, their number, and the Hypothesis profile.
_STAGES = ((4.0, 60, "brief"), (60.0, 600, "brief"), (20.0, 200, "ci"))
#: How much longer than measured a stage may take, if the machine is slower, and the time for collection.
_PATIENCE, _START = 5.0, 20.0
#: Time of each profile relative to the brief one.
_LONGER = {"brief": 1.0, "ci": 6.0}


class Judge:
    """Runs tests against mutants, one after another.

    Parameters
    ----------
    tree : Tree
    reach : Reach
    """

    def __init__(self, tree: Tree, reach: Reach) -> None:
        self.tree, self.reach = tree, reach
        self._sound: dict[str, bool] = {}

    def judged(self, module: Module, mutant: Mutant, first: Sequence[str]) -> dict[str, Any] | None:
        """Return a mutant's outcome: ``status``, ``by``, ``tests``, ``change``; None if there is nothing to run."""
        code = module.mutated(mutant)
        if code is None:
            return None
        tests = self.reach.of(module, mutant, first)
        found: dict[str, Any] = {"status": "survived", "by": "", "tests": len(tests), "change": module.change(code)}
        for stage, profile in self._stages(tests):
            limit = _START + _PATIENCE * _LONGER[profile] * sum(self.reach.seconds[test] for test in stage)
            while True:
                with self.tree.holding(module.path, code):
                    outcome = self.tree.run(stage, profile, limit)
                if outcome.status == "passed":
                    break
                if outcome.status == "timeout" and self.tree.run(stage, profile, limit).status == "timeout":
                    limit *= 2  # the machine has become slower
                    continue
                if self._blamed(outcome, stage, profile):
                    status = "timeout" if outcome.status == "timeout" else "killed"
                    return {**found, "status": status, "by": outcome.test}
                stage = [test for test in stage if test != outcome.test]
        return found

    def _blamed(self, outcome: Outcome, stage: Sequence[str], profile: str) -> bool:
        """Return whether the mutant caused the failure: the failing test passes without it."""
        if outcome.status == "timeout":
            return True
        if not outcome.test:  # the import failed
            files = " ".join(sorted({test.split("::")[0] for test in stage}))
            if files not in self._sound:
                self._sound[files] = self.tree.run(stage[:1], profile, 600.0).status == "passed"
            if not self._sound[files]:
                raise RuntimeError(f"{files} cannot be run without any mutation; see {self.tree.folder}/.mutation-log")
            return True
        key = f"{outcome.test} {profile}"
        if key not in self._sound:
            self._sound[key] = self.tree.run([outcome.test], profile, 600.0).status == "passed"
            if not self._sound[key]:
                print(f"{outcome.test} fails without any mutation ({profile} profile); it is left out", flush=True)
        return self._sound[key]

    def _stages(self, tests: Sequence[str]) -> list[tuple[list[str], str]]:
        found, done = [], set[str]()
        for seconds, most, profile in _STAGES:
            spent, stage = 0.0, []
            for test in tests:
                if (profile == "brief" and test in done) or len(stage) == most:
                    continue
                if stage and spent + self.reach.seconds[test] > seconds:
                    continue  # a faster one may still fit
                spent += self.reach.seconds[test]
                stage.append(test)
                done.add(test)
            if stage:
                found.append((stage, profile))
        return found
