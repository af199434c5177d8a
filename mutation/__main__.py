"""Mutate the library and check whether the tests notice: ``python -m mutation [MODULE ...] [--sample N]``."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import sys
import tempfile
import time
import tomllib
import traceback
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from . import report
from .judging import Judge
from .mutants import Module, Mutant, changed_lines
from .operators import left_out, operators
from .reach import Reach
from .running import Tree, preload

ROOT = Path(__file__).parents[1]
HERE = Path(__file__).parent
RESULTS = ROOT / "benchmarks" / "results"
CHOSEN, LEFT_OUT = RESULTS / "mutation.jsonl", RESULTS / "mutation_left_out.jsonl"


def main(arguments: Sequence[str] | None = None) -> None:
    """List, select, run and report mutants."""
    asked = _parser().parse_args(arguments)
    groups = {
        module: [file for file in files if file not in asked.without]
        for module, files in _groups(asked.modules).items()
    }
    kinds = left_out() if asked.left_out else operators()
    modules = {path: Module(ROOT, path, kinds) for path in groups}
    out: Path = asked.out or (LEFT_OUT if asked.left_out else CHOSEN)
    before = _read(out)
    codes = {path: hashlib.sha256(module.code.encode()).hexdigest()[:12] for path, module in modules.items()}
    eligible = [mutant for module in modules.values() for mutant in module.mutants]
    if asked.since:
        lines = {path: changed_lines(ROOT, path, asked.since) for path in modules}
        eligible = [mutant for mutant in eligible if mutant.line in lines[mutant.module]]
    chosen = _chosen(eligible, asked.seed, asked.sample)
    if not asked.report:
        mine = chosen[asked.shard[0] :: asked.shard[1]]
        reasoned = {key for key, entry in _known().items() if entry["kind"] != "gap"}
        kept = {key for key, record in before.items() if record["status"] != "survived" or not asked.again}
        kept |= before.keys() & reasoned
        todo = [mutant for mutant in mine if mutant.key not in kept]
        print(f"{len(chosen)} mutants, {len(mine)} of them in this shard, {len(todo)} left to run", flush=True)
        files = sorted({file for group in groups.values() for file in group})
        reach = Reach.measured(ROOT, asked.work, files, asked.processes)
        survived = {key for key, record in before.items() if "survived" in (record["status"], record.get("first"))}
        _run(todo, modules, groups, reach, out, asked.processes, codes, survived)
    if asked.left_out:
        wrong = report.failings([r for r in _read(out).values() if r["status"] != "void"], _known(), goal=False)
        print("\n".join([f"{len(_read(out))} mutants of the operators that are left out were run", *wrong]))
        sys.exit(1 if wrong else 0)
    records = _read(out)
    # A report is of all that was run, which the code may have moved on from.
    keys = records if asked.report else [mutant.key for mutant in chosen]
    judged = [records[key] for key in keys if records.get(key, {}).get("status", "void") != "void"]
    known = _known()
    void = {record["key"] for record in records.values() if record["status"] == "void"}
    counts = Counter(mutant.module for mutant in eligible if mutant.key not in void)
    there = {path: counts[path] for path in modules}
    run = {"lines changed since": asked.since} if asked.since else {}
    run |= {"seed": asked.seed, "cosmic-ray": version("cosmic-ray"), "Python": platform.python_version()}
    rest = [record for record in _read(LEFT_OUT).values() if record["status"] != "void"]
    more = report.Rest(rest, sum(len(Module(ROOT, path, left_out()).mutants) for path in groups)) if rest else None
    out.with_suffix(".md").write_text(report.page(judged, known, there, run, more), encoding="utf-8")
    wrong = report.failings(judged, known)
    print("\n".join([f"{len(judged)} mutants run; the table is in {out.with_suffix('.md')}", *wrong]))
    sys.exit(1 if wrong else 0)


def _known() -> dict[str, report.Record]:
    return report.reasons(HERE / "survivors.toml")


def _parser() -> argparse.ArgumentParser:
    given = argparse.ArgumentParser(prog="python -m mutation", description=__doc__)
    given.add_argument(
        "modules", nargs="*", help="files of tnadapt/, such as algebra/folding.py; default: all in modules.toml"
    )
    given.add_argument("--sample", type=int, metavar="N", help="run N mutants, drawn at random")
    given.add_argument("--since", metavar="COMMIT", help="mutate only the lines that have changed since this commit")
    given.add_argument("--seed", type=int, default=0, help="seed of the sample")
    given.add_argument("--shard", type=_shard, default=(0, 1), metavar="I/N", help="every Nth mutant, from the Ith on")
    given.add_argument("--processes", type=int, default=1, metavar="N")
    given.add_argument(
        "--without",
        nargs="*",
        default=[],
        metavar="FILE",
        help="test files to leave out: faster, but with more survivors",
    )
    given.add_argument(
        "--again", action="store_true", help="run earlier survivors again, except those that no test can notice"
    )
    given.add_argument("--report", action="store_true", help="run nothing; only write the table")
    given.add_argument("--left-out", action="store_true", help="the mutants of cosmic-ray's other operators instead")
    given.add_argument("--out", type=Path, help=f"the results, one line per mutant; {CHOSEN.name} or {LEFT_OUT.name}")
    given.add_argument("--work", type=Path, default=ROOT / "runs" / "mutation", help="folder that caches measurements")
    return given


def _shard(text: str) -> tuple[int, int]:
    index, _, of = text.partition("/")
    return int(index) - 1, int(of)


def _groups(asked: Sequence[str]) -> dict[str, list[str]]:
    """Return the test files of each requested module, those with the module's name first."""
    found: dict[str, list[str]] = {}
    for group in tomllib.loads((HERE / "modules.toml").read_text(encoding="utf-8"))["group"]:
        for pattern in group["modules"]:
            paths = sorted((ROOT / "tnadapt").glob(pattern))
            if not paths:
                raise SystemExit(f"modules.toml: no file matches {pattern}")
            for path in paths:
                name = path.relative_to(ROOT / "tnadapt").as_posix()
                if path.stat().st_size and (not asked or name in asked):
                    files = [file for file in _test_files(group["tests"]) if file not in group.get("without", ())]
                    own = [file for file in files if Path(file).name == f"test_{path.stem.lstrip('_')}.py"]
                    doctests = [f"tnadapt/{name}"] if ">>>" in path.read_text(encoding="utf-8") else []
                    found[f"tnadapt/{name}"] = list(dict.fromkeys([*doctests, *own, *files]))
    if unknown := set(asked) - {path.removeprefix("tnadapt/") for path in found}:
        raise SystemExit(f"modules.toml does not list {', '.join(sorted(unknown))}")
    return found


def _test_files(patterns: Sequence[str]) -> list[str]:
    """Return the test files that match the patterns, in their order."""
    files: dict[str, None] = {}
    for pattern in patterns:
        paths = sorted(ROOT.glob(pattern))
        if not paths:
            raise SystemExit(f"modules.toml: no file matches {pattern}")
        files |= dict.fromkeys(path.relative_to(ROOT).as_posix() for path in paths)
    return list(files)


def _chosen(mutants: Sequence[Mutant], seed: int, sample: int | None) -> list[Mutant]:
    """Return the mutants in a random order that does not depend on which others exist."""

    def place(mutant: Mutant) -> str:
        return hashlib.sha256(f"{seed} {mutant.key}".encode()).hexdigest()

    return sorted(mutants, key=place)[:sample]


def _read(out: Path) -> dict[str, dict[str, Any]]:
    """Return the last result of each mutant."""
    if not out.exists():
        return {}
    return {record["key"]: record for record in map(json.loads, out.read_text(encoding="utf-8").splitlines())}


def _run(
    todo: Sequence[Mutant],
    modules: dict[str, Module],
    groups: dict[str, list[str]],
    reach: Reach,
    out: Path,
    processes: int,
    codes: dict[str, str],
    survived: set[str],
) -> None:
    """Run every mutant, on several processes, and append one line per mutant to the file."""
    if not todo:
        return
    preload()
    workers = []
    for index in range(processes):
        worker = os.fork()
        if not worker:
            status = 1
            try:
                _work(todo[index::processes], modules, groups, reach, out, codes, survived)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)
        workers.append(worker)
    if any(os.waitpid(worker, 0)[1] for worker in workers):
        raise SystemExit("a process of this run failed; finished results are kept, and the same command resumes")


def _work(
    todo: Sequence[Mutant],
    modules: dict[str, Module],
    groups: dict[str, list[str]],
    reach: Reach,
    out: Path,
    codes: dict[str, str],
    survived: set[str],
) -> None:
    """Run the mutants of one process."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        judge = Judge(Tree(ROOT, Path(folder)), reach)
        for mutant in todo:
            start = time.monotonic()
            found = judge.judged(modules[mutant.module], mutant, groups[mutant.module]) or {"status": "void"}
            known = dataclasses.asdict(mutant)
            del known["occurrence"]
            seconds = round(time.monotonic() - start, 1)
            known |= {"first": "survived"} if mutant.key in survived else {}
            record = {**known, "code": codes[mutant.module], "seconds": seconds, **found}
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            if found["status"] == "survived":
                print(f"survived: {mutant.key} {mutant.module}:{mutant.line}\n{found['change']}", flush=True)


if __name__ == "__main__":
    main()
