"""Results as JSON lines: one per finished training, on disk before the next one begins."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping, Set
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from tnadapt.argument_checks import checks_arguments
from tnadapt.checkpoints.atomic_files import lock
from tnadapt.checkpoints.container import path_of
from tnadapt.errors import FileError, safe_repr

# -- Files of JSON lines that grow by whole lines, each on disk before the next step -----------------------------------


def append_line(file: IO[bytes], line: Mapping[str, Any]) -> None:
    """Append a line to an unbuffered file, and synchronize it; if that fails, the file is as it was.

    Raises
    ------
    OSError
        If it cannot be written, such as on a full disk.
    """
    end = file.seek(0, os.SEEK_END)
    rest = memoryview(json.dumps(line).encode() + b"\n")
    try:
        while rest:
            rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
    except OSError:
        with contextlib.suppress(OSError):
            file.truncate(end)
        raise


def undamaged_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines that are JSON objects; skip others, such as the last one of a process that was killed."""
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_bytes().split(b"\n")[:-1]:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict):
                yield record


# -- The results of a study --------------------------------------------------------------------------------------------


FORMAT = "tnadapt finetune 1"
_BEGINNING = f'{{"format": "{FORMAT}", '.encode()
# The required fields of a training's line.
_FIELDS = {
    "key", "config", "seed", "rate", "parameters", "kept", "diverged", "validation", "validation_loss", "test",
    "predictions", "seconds",
}  # fmt: skip


class Results(contextlib.AbstractContextManager["Results"]):
    """The results of one study, in a file that grows by whole lines.

    The first line has the study's settings and their digest. It is followed by lines with ``session``, one for each run
    (machine, versions), and lines with ``key``, one for each finished training. An incomplete last line, left by a
    killed process, is dropped.

    Parameters
    ----------
    path : Path
        Created if it does not exist.
    study : mapping
        Everything that a training's outcome depends on, except method, seed and rate. A file of another study is
        rejected.
    fresh : bool
        Start over, whatever study the file has.
    fields : set of str
        Required fields of a training's line, in addition to ``key``.

    Attributes
    ----------
    records : dict of str to dict
        The finished trainings by key.
    dropped : list of str
        Adapter files named in the lines that a fresh start discarded.
    digest : str
        The digest of the study's settings.

    Raises
    ------
    FileError
        If the file is not a results file, is damaged before its last line, belongs to another study, is in use by
        another process, or cannot be written.
    """

    def __init__(self, path: Path, study: Mapping[str, Any], fresh: bool = False, fields: Set[str] = _FIELDS) -> None:
        self.path, self.fields = path, fields
        self.records: dict[str, dict[str, Any]] = {}
        self.dropped: list[str] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: bytes that a full disk rejected must not be written again by the next line or by close.
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 (kept open, and locked, until close)
        except OSError as error:
            raise FileError(
                f"cannot write results to {path}: {error.strerror}; give another folder with --out"
            ) from None
        try:
            if not lock(self._file.fileno()):
                raise FileError(f"{path} is being written by another process; wait for it, or give another --out")
            self._read(json.loads(json.dumps(study)), fresh)
        except BaseException:
            self._file.close()
            raise

    def _read(self, study: dict[str, Any], fresh: bool) -> None:
        self.digest = digest = hashlib.sha256(json.dumps(study, sort_keys=True).encode()).hexdigest()
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if not content.startswith(_BEGINNING[: len(content)]):
            raise FileError(f"{self.path} is not a results file; move it away, or give another folder with --out")
        lines = content[:whole].splitlines()
        if fresh or not lines:
            # The stem must not be only dots: it names the folder of a training's logs, next to the adapters.
            name = r'"adapter": "(?!\.+safetensors")([\w.-]+\.safetensors)"'
            self.dropped = re.findall(name, content.decode("utf-8", "replace"))
            self._file.truncate(0)
            self._append({"format": FORMAT, "digest": digest, "study": study})
            return
        records = [self._line(number, line) for number, line in enumerate(lines, 1)]
        if records[0].get("digest") != digest:
            what = _difference(records[0].get("study"), study)
            raise FileError(
                f"{self.path} has the results of another study ({what}); "
                "give another folder with --out, or --fresh to start over"
            )
        self._file.truncate(whole)
        self.records = {line["key"]: line for line in records[1:] if "key" in line}

    def _line(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict) or ("key" in record and not record.keys() >= self.fields):
            raise FileError(
                f"{self.path}, line {number} is damaged; remove the line, or give another folder with --out"
            )
        return record

    def _append(self, line: Mapping[str, Any]) -> None:
        try:
            append_line(self._file, line)
        except OSError as error:
            raise FileError(f"cannot write results to {self.path}: {error.strerror}") from None

    def begin_session(self, **more: Any) -> None:
        """Record that a run started, and on which machine."""
        self._append({"session": {**_machine(), **more}})

    def add(self, record: dict[str, Any]) -> None:
        """Write a finished training; it is on disk when this returns."""
        self._append(record)
        self.records[record["key"]] = record

    def close(self) -> None:
        """Close the file and release its lock."""
        self._file.close()

    def __exit__(self, *error: object) -> None:
        self.close()


def read_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the complete lines of a results file; an incomplete last line, left by a killed process, is dropped.

    Raises
    ------
    OSError
        If it cannot be read.
    ValueError
        If a line is not a JSON object.
    """
    content = Path(path).read_bytes()
    records = []
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), 1):
        record = json.loads(line)
        if not isinstance(record, dict):
            raise ValueError(f"line {number} is not a JSON object")
        records.append(record)
    return records


def _difference(there: Any, here: Mapping[str, Any]) -> str:
    """Describe how the settings of two studies differ."""
    there = there if isinstance(there, dict) else {}
    names = sorted({*there, *here})
    changed = [(name, there.get(name), here.get(name)) for name in names if there.get(name) != here.get(name)]
    differences = ["{} was {}, now {}".format(name, *_shortened(was, now)) for name, was, now in changed]
    return "; ".join(differences) or "its digest does not fit its settings"


def _shortened(was: Any, now: Any) -> tuple[str, str]:
    """Return two different values as shortened text that still shows the difference."""
    whole = [json.dumps(value, ensure_ascii=False) for value in (was, now)]
    if max(map(len, whole)) > 40 and isinstance(was, list) and isinstance(now, list):
        if len(was) != len(now):
            return f"a list of {len(was)}", f"a list of {len(now)}"
        return _shortened(*next((old, new) for old, new in zip(was, now, strict=True) if old != new))
    texts = [text if len(text) <= 40 else text[:24] + "…" for text in whole]
    return texts[0], texts[1]


def _machine() -> dict[str, Any]:
    """Return the machine and versions that results may depend on, without names of hosts or users."""
    versions = {"python": platform.python_version()}
    for name in ("tnadapt", "numpy", "torch", "scikit-learn", "transformers", "accelerate", "timm", "datasets"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "versions": versions,
    }


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


# -- The folder of a study ---------------------------------------------------------------------------------------------


@checks_arguments
def check_out(out: Path) -> None:
    """Raise an error if the output of a study cannot be written to a folder.

    Parameters
    ----------
    out : Path
        It need not exist.

    Raises
    ------
    FileError

    Examples
    --------
    >>> check_out(Path("runs/digits"))
    """
    out = Path(path_of(out))
    for name, folder in (("", True), ("adapters", True), ("pareto.png", False), ("best.safetensors", False)):
        path = out / name
        try:
            wrong = path.exists() and path.is_dir() != folder
        except OSError as error:  # a name that is too long
            raise FileError(f"cannot use {safe_repr(str(path))}: {error.strerror}") from None
        if wrong:
            kinds = ("a file", "a folder") if folder else ("a folder", "a file")
            raise FileError(f"{path} is {kinds[0]} and should be {kinds[1]}; give another folder with --out")
