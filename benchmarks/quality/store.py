"""Results on disk: one file per task and shard, JSON lines by key, read together and merged."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tnadapt.checkpoints.atomic_files import replace_file
from tnadapt.errors import FileError
from tnadapt.finetune.results import Results, read_lines

from ..machine import installed

#: Required fields of a training's line.
FIELDS = {
    "key", "method", "title", "library", "label", "budget", "parameters", "config", "seed", "rate", "diverged", "kept",
    "validation", "validation_loss", "test", "seconds",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TaskResults:
    """The results of a task."""

    #: Everything that outcomes depend on, except method, seed and rate.
    study: dict[str, Any]
    #: Finished trainings by key.
    records: dict[str, dict[str, Any]]
    #: Machine and versions of each run.
    sessions: list[dict[str, Any]]


def versions() -> dict[str, Any]:
    """Return the versions of peers, which a session records besides those that tnadapt records."""
    return {"peers": installed("peft")}


def origin(device: str) -> dict[str, Any]:
    """Return what a training's line says of the machine that it ran on."""
    precision = torch.get_float32_matmul_precision()  # "medium" computes products in bfloat16 where that is faster
    return {"device": torch.device(device).type, "versions": installed("peft", "torch"), "precision": precision}


def stem(task: str, scale: str) -> str:
    """Return the first part of the name of a task's files; that of the usual scale is the task's name."""
    return task if scale == "small" else f"{task}-{scale}"


def path_of(folder: Path, task: str, scale: str, shard: tuple[int, int] = (1, 1)) -> Path:
    """Return the file of a shard.

    Examples
    --------
    >>> path_of(Path("."), "digits", "small").name, path_of(Path("."), "digits", "full", (2, 4)).name
    ('digits.jsonl', 'digits-full.2-of-4.jsonl')
    """
    number, of = shard
    return folder / (stem(task, scale) + ("" if of == 1 else f".{number}-of-{of}") + ".jsonl")


def files_of(folder: Path, task: str, scale: str) -> list[Path]:
    """Return the files of all shards of a task, the merged one first."""
    whole = path_of(folder, task, scale)
    shards = sorted(folder.glob(f"{stem(task, scale)}.*-of-*.jsonl"))
    return [path for path in (whole, *shards) if path.is_file()]


def open_results(folder: Path, task: str, scale: str, shard: tuple[int, int], study: Mapping[str, Any]) -> Results:
    """Open the file of a shard to write into."""
    return Results(path_of(folder, task, scale, shard), study, fields=FIELDS)


def read(folder: Path, task: str, scale: str) -> TaskResults | None:
    """Read the results of all shards of a task; None if there are none.

    A training that failed with an error in one file and was finished in another counts as finished.
    """
    study: dict[str, Any] | None = None
    records: dict[str, dict[str, Any]] = {}
    sessions: list[dict[str, Any]] = []
    for path in files_of(folder, task, scale):
        try:
            lines = read_lines(path)
        except (OSError, ValueError) as error:
            raise FileError(f"cannot read {path}: {error}; remove the line, or the file") from None
        if not lines:
            continue
        own = lines[0].get("study")
        if study is not None and own != study:
            raise FileError(
                f"{path} has the results of another study than the files beside it; move it to another folder"
            )
        study = own
        for line in lines:
            # A retry may have written to a file that is read before that of the failure.
            if "key" in line and ("failed" not in line or "failed" in records.get(line["key"], line)):
                records[line["key"]] = line
        sessions += [line["session"] for line in lines if "session" in line]
    return None if study is None else TaskResults(study, records, sessions)


def merge(folder: Path, task: str, scale: str) -> Path | None:
    """Write the results of all shards of a task into one file, and remove those of the shards."""
    found = read(folder, task, scale)
    if found is None:
        return None
    whole = path_of(folder, task, scale)
    shards = [path for path in files_of(folder, task, scale) if path != whole]
    with contextlib.ExitStack() as held:
        # The whole file last: it is created if it is not there, which must not happen if a shard is in use.
        for path in (*shards, whole):
            held.enter_context(Results(path, found.study, fields=FIELDS))
        found = read(folder, task, scale)  # again, now that no process adds anything
        assert found is not None
        if os.name == "nt":  # which has no locks, and neither replaces nor removes a file that is open
            held.close()
        lines = [read_lines(whole)[0], *({"session": one} for one in found.sessions), *found.records.values()]
        replace_file(os.fspath(whole), "".join(json.dumps(line) + "\n" for line in lines).encode())
        for path in shards:
            path.unlink()
    return whole
