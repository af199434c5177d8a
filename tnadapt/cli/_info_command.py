"""The command ``tnadapt info``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import tnadapt
from tnadapt.report import text_table

from ._byte_sizes import size
from ._common_options import AsJson
from ._printing import cell, echo, echo_json

__all__ = ["info_command"]


def info_command(
    path: Annotated[
        Path,
        typer.Argument(metavar="PATH", help="An adapter, or a checkpoint: a file or a folder.", show_default=False),
    ],
    every: Annotated[bool, typer.Option("--all", help="List each weight, or each tensor.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the content of an adapter file or a checkpoint: config, weights, counts, fingerprint.

    Neither the base model nor torch is needed. Exit code: 0, or 2 if the path cannot be read.
    """
    found = tnadapt.info(path, every)
    if as_json:
        echo_json(found)
        return
    show = {"adapter": _adapter, "checkpoint": _checkpoint, "other adapter": _other}[found["kind"]]
    for line in show(found):
        echo(line)


def _adapter(found: dict[str, Any]) -> Iterable[str]:
    yield f"{found['path']}: a tnadapt adapter, format version {found['version']}, {size(found['bytes'])}"
    rows = [
        ("parameters", f"{found['parameters']:,} {found['dtype']} in {_counted(found['arrays'], 'array')}"
                       f"{_frozen(found)}"),
        ("updates", f"{found['updated']:,} elements of {_counted(_count(found), 'weight')} in "
                    f"{_counted(found['groups'], 'group')}"),
        *_configs(found["config"]),
    ]  # fmt: skip
    if "given" in found:
        given = found["given"]
        rows.insert(1, ("given", f"{given['elements']:,} float32 in {_counted(given['arrays'], 'array')}, not trained"))
    if found["activation"]:
        rows.append(("activation", f"{found['activation']} (LoDA: it cannot be merged)"))
    rows.append(("serving", found["export"]["says"]))
    rows.append(("model", found["model"] or "unknown"))
    rows += _pretrained(found.get("pretrained", {}))
    base = found["base"]
    rows.append(("base", f"{base['dtype']}, SHA-256 of the weights {base['sha256'][:16]}…" if base else "unknown"))
    if found["draws"]:
        here = "the same on this machine" if found["draws_here"] else "DIFFERENT on this machine: load rejects the file"
        rows.append(("draws", f"{found['draws'][:16]}…, {here}"))
    if found["kept"]:
        kept = [f"{one['name']} {_times(one['shape'])}" for one in found["kept"]]
        rows.append(("also trained", ", ".join(kept[:6]) + (f" and {len(kept) - 6} more" if len(kept) > 6 else "")))
    yield from _aligned(rows)
    yield from _targets(found, "weights")


def _pretrained(about: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """Return the rows of what the file records of its base model."""
    if "name" in about:
        parts = [f"{part} {about[part]}" for part in ("file", "revision") if part in about]
        yield "pretrained", ", ".join([about["name"], *parts, about.get("library", "transformers")])
    if "task" in about:
        yield "task", about["task"]
    if labels := about.get("labels"):
        more = f" and {len(labels) - 6} more" if len(labels) > 6 else ""
        yield "labels", f"{len(labels)}: {', '.join(labels[:6])}{more}"
    if settings := {**about.get("settings", {}), **about.get("inputs", {})}:
        yield "settings", ", ".join(f"{name}={json.dumps(value)}" for name, value in settings.items())


def _frozen(found: dict[str, Any]) -> str:
    return f"; {found['frozen']:,} more frozen" if "frozen" in found else ""


def _configs(settings: dict[str, Any]) -> list[tuple[str, str]]:
    if "parts" not in settings:
        return [("config", _config(settings))]
    parts = settings["parts"]
    told = [("", f"{_config(own)} for {_counted(weights, 'weight')}") for own, weights in parts]
    return [("configs", f"{len(parts)}, one after another"), *told]


def _config(settings: dict[str, Any]) -> str:
    """Return the settings that differ from the defaults, and the rank."""
    usual = tnadapt.Config().to_dict()
    told = {name: value for name, value in settings.items() if name == "rank" or value != usual.get(name)}
    return ", ".join(f"{name}={json.dumps(value).strip(chr(34))}" for name, value in told.items())


def _checkpoint(found: dict[str, Any]) -> Iterable[str]:
    files = found["files"]
    kind = ", ".join([*(found["architectures"] or []), *([found["model_type"]] if found["model_type"] else [])])
    yield f"{found['path']}: a checkpoint of {size(found['bytes'])} in {_counted(len(files), 'file')}"
    rows = [("model", found["no_config"] or kind or "unknown, without a config.json")]
    rows.append(("tensors", f"{found['tensors']:,}"))
    for dtype, counts in found["dtypes"].items():
        rows.append((f"  {dtype}", f"{counts['tensors']:,}, {size(counts['bytes'])}"))
    if len(files) > 1:
        rows.append(("files", ""))
        rows += [(f"  {one['name']}", f"{one['tensors']:,} tensors, {size(one['bytes'])}") for one in files]
    yield from _aligned(rows)
    if found["no_targets"]:
        yield f"  no queries and values: {found['no_targets']}"
    yield from _targets(found, "queries and values")


def _other(found: dict[str, Any]) -> Iterable[str]:
    yield f"{found['path']}: {found['what']}, {size(found['bytes'])}; tnadapt convert reads it"


def _targets(found: dict[str, Any], title: str) -> Iterable[str]:
    if found["targets"]:
        yield f"  {title}"
        yield from _table([
            [f"{one['count']} ×", one["role"], one["name"], _times(one["shape"]), _view(one)]
            for one in found["targets"]
        ])  # fmt: skip
    if "every" in found:
        yield "  all"
        yield from _table([
            [one.get("role", one.get("dtype")), one["name"], _times(one["shape"]), _view(one)]
            for one in found["every"]
        ])  # fmt: skip


def _view(one: dict[str, Any]) -> str:
    notes = []
    if "index" in one:
        notes.append(f"matrix {one['index']}")
    if isinstance(one.get("rows"), dict):
        numbers = one["rows"]["indices"]
        notes.append(f"rows {', '.join(map(str, numbers[:4]))}" + f" and {len(numbers) - 4} more" * (len(numbers) > 4))
    elif "rows" in one:
        start, length, stride, count = one["rows"]
        notes.append(f"rows {start} to {start + length - 1}" + (f" of each {stride}, {count} times" * (count > 1)))
    if one.get("transposed"):
        notes.append("stored transposed")
    if notes:
        notes.append(f"of {_times(one['stored'])}")
    if "tied" in one:
        notes.append(f"tied to {', '.join(one['tied'])}")
    if "groups" in one:
        notes.append(f"in {one['groups']} groups")
    return ", ".join(notes)


def _count(found: dict[str, Any]) -> int:
    return sum(one["count"] for one in found["targets"])


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _times(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "a number"


def _aligned(rows: Sequence[tuple[str, str]]) -> Iterable[str]:
    return (f"  {line}" for line in text_table([(cell(name), text) for name, text in rows]))


def _table(rows: list[list[str]]) -> Iterable[str]:
    return (f"    {line}" for line in text_table([list(map(cell, row)) for row in rows]))
