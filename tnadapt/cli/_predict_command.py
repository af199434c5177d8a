"""The command ``tnadapt predict``."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tnadapt.checkpoints.atomic_files import replace_file
from tnadapt.errors import FileError, TnadaptError, spreadsheet_text

from ._options import Member, job_package, member_of, option
from .terminal import echo, stoppable

#: Suffixes of files of predictions.
FORMATS = (".csv", ".jsonl")


def predict_command(
    adapter: Annotated[Path, typer.Argument(help="A file of tnadapt finetune, such as best.safetensors.")],
    data: Annotated[str, option("As for tnadapt finetune, with labels or without; also one image.")],
    out: Annotated[Path | None, option("A .csv or .jsonl; by default lines of JSON are printed.")] = None,
    member: Member = None,
    base: Annotated[
        str | None,
        option("Folder, .gguf file or hub name of the base, if it is not where it was.", "the one that the file names"),
    ] = None,
    tokenizer: Annotated[str | None, option("Folder or hub name, instead of the base's own.", "the base's")] = None,
    batch_size: Annotated[int, option("Samples at once.", min=1)] = 32,
    max_new_tokens: Annotated[
        int | None,
        option("Length limit of completions.", "64, or half of the model's positions if these are fewer", min=1),
    ] = None,
    text_column: Annotated[str | None, option("Column of texts, words or prompts.", "found by its name")] = None,
    label_column: Annotated[str | None, option("Column of labels, tags or completions.", "found by its name")] = None,
    separator: Annotated[str | None, option("Between several labels of a text.", "as in training")] = None,
    limit: Annotated[int | None, option("Only the first samples.", "all", min=1)] = None,
    device: Annotated[str | None, option("cpu, cuda, …", "cuda if there is one, else cpu")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing OUT.")] = False,
) -> None:
    """Predict with an adapter that tnadapt finetune saved, on the base that its file names.

    If the data have labels, the task's metrics are printed, too. If the data have a test part, only that is predicted.
    Exit code: 0, or 2 if it is not possible.
    """
    if out is not None:
        _check_out(out, {"--data": data, "the adapter": str(adapter)}, overwrite)
    if not adapter.is_file():
        what = "it is a folder" if adapter.is_dir() else "there is no such file"
        raise FileError(f"no adapter at {adapter}: {what}; give a file such as best.safetensors")
    from tnadapt.checkpoints.adapter_format import load_single

    job = job_package()
    # Checks that do not need torch come before its import.
    chosen = member_of(adapter, member)
    load_single(adapter, check_draws=False, member=chosen)
    job.require_data(data, one_image=True)
    with stoppable("nothing was written; the same command starts over"):
        predictions = job.predict(
            adapter, data, member=chosen, base=base, tokenizer=tokenizer, text_column=text_column,
            label_column=label_column, separator=separator, limit=limit, batch=batch_size, new_tokens=max_new_tokens,
            device=job.usable_device(device), progress=lambda what: echo(what, err=True),
        )  # fmt: skip
    of_part = f" of the {predictions.part} part" if predictions.part else ""
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in predictions.metrics.items())
    if out is None:
        for row in predictions.rows:
            echo(_json(row))
    else:
        replace_file(str(out), _written(predictions.rows, out.suffix.lower()).encode())
        echo(f"{len(predictions.rows):,} predictions{of_part}: {out}")
    if metrics:
        echo(f"{predictions.task}{of_part}: {metrics}", err=out is None)


def _check_out(out: Path, inputs: Mapping[str, str], overwrite: bool) -> None:
    """Raise an error if the predictions cannot be written there, before anything is computed."""
    if out.suffix.lower() not in FORMATS:
        raise TnadaptError(f"--out must end in {' or '.join(FORMATS)}; got {out}")
    if out.is_dir() or not out.parent.is_dir():
        what = "is a folder" if out.is_dir() else "is in a folder that does not exist"
        raise FileError(f"--out {out} {what}; give the name of a file in a folder that exists")
    for what, path in inputs.items():
        if out.exists() and os.path.exists(path) and out.samefile(path):
            raise FileError(f"--out {out} is {what}, which predictions would replace; give another file")
    if out.exists() and not overwrite:
        raise FileError(f"{out} exists; give another --out, or --overwrite to replace it")


def _written(rows: Sequence[Mapping[str, Any]], suffix: str) -> str:
    if suffix == ".jsonl":
        return "".join(_json(row) + "\n" for row in rows)
    text = io.StringIO()
    # A line break that is not part of lineterminator would be written without quotes and begin another row.
    writer = csv.writer(text, lineterminator="\r\n")
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer.writerow(map(spreadsheet_text, names))
    writer.writerows([_cell(row.get(name, "")) for name in names] for row in rows)
    return text.getvalue()


def _cell(value: Any) -> Any:
    """Return a value as a cell of a table, with lists and dictionaries as JSON, and without spreadsheet formulas."""
    if isinstance(value, str):
        return spreadsheet_text(value)
    return _json(value) if isinstance(value, (list, dict)) else value


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
