"""Run PEFT's own tests with tnadapt's plug-in, next to LoRA: ``python benchmarks/peft_suite.py``.

The tests are those of the source distribution of the installed PEFT version, which pip downloads to a temporary
folder. The results are in ``results/peft_suite.jsonl``, and the page ``results/peft_suite.md`` is generated from them
and from the reasons in ``peft_suite.toml`` (``--page`` only does this). A test that LoRA passes and the plug-in does
not is a difference: one without a reason, or a reason without a difference, is an error.

It takes a quarter of an hour and needs ``pip install "tnadapt[ci]"``. Leave OMP_NUM_THREADS alone: with one thread,
torch's convolutions round differently, and ``test_safe_merge`` of Conv2d fails, for which PEFT allows an error of 1e-3
to LoRA and of 1e-6 to the plug-in.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from machine import machine

from tnadapt.report import TextTable

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "peft_suite.jsonl"
PAGE = HERE / "results" / "peft_suite.md"
REASONS = HERE / "peft_suite.toml"
CONTROL = "LoRA"
FILES = tuple(f"test_{name}.py" for name in (
    "custom_models", "config", "token_classification_qa", "seq_classifier", "decoder_models",
    "feature_extraction_models", "encoder_decoder_models",
))  # fmt: skip

Rows = Sequence[Mapping[str, Any]]


# -- Running -------------------------------------------------------------------------------------


def run(folder: Path, files: Sequence[str]) -> list[dict[str, Any]]:
    """Run the tests and return their results."""
    tests = _sources(folder) / "tests"
    # In PEFT's repository the tests are a package; the source distribution lacks only this file.
    (tests / "__init__.py").touch()
    home = folder / "hub"
    results = folder / "results.jsonl"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]),
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "PEFT_SUITE_RESULTS": str(results),
    }
    make = f"from pathlib import Path; import peft_suite_models; peft_suite_models.make_models(Path({str(home)!r}))"
    subprocess.run([sys.executable, "-W", "ignore", "-c", make], check=True, env=environment)
    options = ["-p", "peft_suite_plugin", "-p", "no:cacheprovider", "-o", "addopts=", "-q", "--tb=no", "-W", "ignore"]
    command = [sys.executable, "-m", "pytest", *options, *(f"tests/{name}" for name in files)]
    done = subprocess.run(command, cwd=tests.parent, env=environment)
    # 1: some tests failed, which the page reports.
    if done.returncode not in (0, 1):
        raise SystemExit(f"pytest stopped with {done.returncode}")
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


def _sources(folder: Path) -> Path:
    version = importlib.metadata.version("peft")
    download = ["download", "--no-deps", "--no-binary", ":all:", f"peft=={version}", "-d", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", *download], check=True)
    with tarfile.open(folder / f"peft-{version}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / f"peft-{version}"


def packed(rows: Rows) -> list[dict[str, Any]]:
    """Return the results in fewer lines: one for all rows of a test with the same outcome."""
    lines: list[dict[str, Any]] = [dict(row) for row in rows if "test" not in row]
    alike: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        if "test" in row:
            alike.setdefault(tuple(row[name] for name in _ALIKE), []).append(row["row"])
    return lines + [{**dict(zip(_ALIKE, key, strict=True)), "rows": several} for key, several in alike.items()]


def unpacked(lines: Rows) -> list[dict[str, Any]]:
    """Return the results from the lines of :func:`packed`."""
    rows: list[dict[str, Any]] = []
    for line in lines:
        same = {name: value for name, value in line.items() if name != "rows"}
        rows += [{**same, "row": row} for row in line["rows"]] if "rows" in line else [same]
    return rows


_ALIKE = ("file", "test", "method", "outcome", "why")


# -- Comparing -----------------------------------------------------------------------------------


def differences(rows: Rows) -> list[Mapping[str, Any]]:
    """Return the plug-in's tests that do not pass while LoRA passes the same test."""
    passed = {_key(row) for row in rows if row["method"] == CONTROL and row["outcome"] == "passed"}
    return [row for row in rows if row["method"] != CONTROL and row["outcome"] != "passed" and _key(row) in passed]


def explained(found: Rows, reasons: Sequence[Mapping[str, str]]) -> tuple[list[list[Mapping[str, Any]]], list[str]]:
    """Return the differences for each reason, and errors in differences and reasons."""
    by_reason: list[list[Mapping[str, Any]]] = [[] for _ in reasons]
    wrong = []
    for row in found:
        fits = [
            index
            for index, reason in enumerate(reasons)
            if re.fullmatch(reason["test"], row["test"])
            and re.search(reason.get("row", ""), row["row"])
            and re.search(reason["why"], row["why"])
        ]
        if len(fits) == 1:
            by_reason[fits[0]].append(row)
        else:
            many = "no reason" if not fits else "several reasons"
            wrong.append(f"{many} for {row['file']} {row['test']} {row['method']} {row['row']}: {row['why'][:200]}")
    wrong += [f"no difference for the reason of {reasons[i]['test']}" for i, one in enumerate(by_reason) if not one]
    return by_reason, wrong


def _key(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["file"], row["test"], row["row"]


# -- The page ------------------------------------------------------------------------------------


def page(found: Rows, reasons: Sequence[Mapping[str, str]]) -> str:
    """Return the results as Markdown."""
    return "\n".join(_page(found, reasons)) + "\n"


def _page(found: Rows, reasons: Sequence[Mapping[str, str]]) -> Iterator[str]:
    rows = [row for row in found if "test" in row]
    about = next(row["machine"] for row in found if "machine" in row)
    left_out = next(row["left_out"] for row in found if "left_out" in row)
    by_reason, wrong = explained(differences(rows), reasons)
    yield f"# PEFT's own tests with the plug-in (PEFT {about['peft']}, {about['date']})"
    yield ""
    yield "Generated by `python benchmarks/peft_suite.py`. Every parametrization of PEFT's tests over configs that"
    yield "includes plain LoRA is run for LoRA, and for the plug-in with the same target modules and several presets."
    yield "Language models are tiny ones with the same architectures as those on the hub."
    yield ""
    lines = [
        _line(name, [row for row in rows if (row["method"] == CONTROL) == own])
        for name, own in (("LoRA", True), ("tnadapt", False))
    ]
    lines += [
        _line(f"– {preset}", [row for row in rows if row["method"] == preset])
        for preset in dict.fromkeys(row["method"] for row in rows if row["method"] != CONTROL)
    ]
    yield TextTable(lines, ("", "passed", "failed", "skipped"), range(1, 4)).markdown()
    yield ""
    yield "## What LoRA passes and the plug-in does not"
    yield ""
    differing = []
    for reason, several in zip(reasons, by_reason, strict=True):
        outcomes = Counter(row["outcome"] for row in several)
        names = ", ".join(f"`{name}`" for name in dict.fromkeys(row["test"] for row in several))
        counts = ", ".join(f"{number} {outcome}" for outcome, number in outcomes.items())
        differing.append((names, counts, " ".join(reason["reason"].split())))
    yield TextTable(differing, ("tests", "how many", "why"), [1]).markdown()
    yield from ("", "**Without a reason:**", "", *(f"- {line}" for line in wrong)) if wrong else ()
    failed = [row for row in rows if row["method"] == CONTROL and row["outcome"] == "failed"]
    names = ", ".join(f"`{row['test']}` ({row['row']})" for row in failed)
    yield from ("", f"LoRA itself fails here, without the hub: {names}.") if failed else ()
    yield ""
    yield "Left out, because they require features that only LoRA has: parametrizations with"
    yield ", ".join(f"`{name}` ({number})" for name, number in sorted(left_out.items())) + "; and tests that are not"
    yield "parametrized over configs, among them those of mixed batches (`adapter_names=`)."
    for file in dict.fromkeys(row["file"] for row in rows):
        yield from ("", f"## {file}", "")
        here = [row for row in rows if row["file"] == file]
        tests = []
        for test in dict.fromkeys(row["test"] for row in here):
            both = [[r for r in here if r["test"] == test and (r["method"] == CONTROL) == own] for own in (True, False)]
            tests.append((f"`{test}`", *map(_counts, both)))
        yield TextTable(tests, ("test", "LoRA", "tnadapt")).markdown()


def _line(name: str, rows: Rows) -> tuple[str, ...]:
    counts = Counter(row["outcome"] for row in rows)
    return (name, *(str(counts[outcome]) for outcome in ("passed", "failed", "skipped")))


def _counts(rows: Rows) -> str:
    counts = Counter(row["outcome"] for row in rows)
    return ", ".join(f"{counts[name]} {name}" for name in ("passed", "failed", "skipped") if counts[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="only generate the page from existing results")
    parser.add_argument("--files", nargs="*", default=FILES, help="a selection of PEFT's test files")
    options = parser.parse_args()
    if not options.page:
        with tempfile.TemporaryDirectory() as folder:
            found = [{"machine": machine()}, *run(Path(folder), options.files)]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in packed(found)]
        RESULTS.write_text("".join(lines), encoding="utf-8")
    found = unpacked([json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()])
    reasons = tomllib.loads(REASONS.read_text(encoding="utf-8"))["difference"]
    PAGE.write_text(page(found, reasons), encoding="utf-8")
    _, wrong = explained(differences([row for row in found if "test" in row]), reasons)
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
