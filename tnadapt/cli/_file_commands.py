"""The commands that read and write files: ``tnadapt merge``, ``extract`` and ``info``."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import tnadapt
from tnadapt.errors import TnadaptError, pluralize
from tnadapt.report import TextTable

from ._options import (
    AsJson,
    ConfigFile,
    Member,
    OwnSettings,
    Targets,
    chosen_config,
    member_of,
    option,
    preset_option,
    targets_of,
)
from .terminal import cell, echo, echo_json, echo_table, stoppable

# -- Bytes for humans --------------------------------------------------------------------------------------------------


def _size(count: int) -> str:
    """Format a number of bytes for humans.

    Examples
    --------
    >>> _size(999), _size(4_300_000_000)
    ('999 bytes', '4.3 GB')
    """
    if count < 1000:
        return f"{count} bytes"
    number = float(count)
    for unit in ("kB", "MB", "GB"):
        number /= 1000
        if number < 999.5:
            return f"{number:.3g} {unit}"
    return f"{number:,.0f} GB"


# -- tnadapt merge -----------------------------------------------------------------------------------------------------


def merge_command(
    base: Annotated[
        Path,
        typer.Argument(
            metavar="BASE", help="A folder with a model, an index, or a .safetensors file.", show_default=False
        ),
    ],
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="The adapter's .safetensors file.", show_default=False)
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The output: a folder, or a file if BASE is a file.", show_default=False)
    ],
    member: Member = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace an existing checkpoint OUT, including all other files of a folder OUT."
        ),
    ] = False,
    check_base: Annotated[bool, option("Reject a base with other weights than the adapter was trained on.")] = True,
    as_json: AsJson = False,
) -> None:
    """Add an adapter to a model on disk, and write the sum as a standalone model, which does not need tnadapt.

    BASE is not changed. OUT has the same files, shards and dtypes; config.json, the tokenizer and the like are copied.
    One tensor at a time is in memory, and torch is not needed. The weights equal those of adapter.merge() and
    save_pretrained() in memory byte for byte.

    OUT is created or replaced in one step when the result is complete. Until then, it is built in OUT.tnadapt-partial;
    if stopped or killed, the same command resumes with the finished files. Links that lead out of BASE are not
    followed. If several commands merge to the same OUT, one proceeds, and the others exit with an error.

    Exit code: 0; 2 if the merge is not possible, with OUT unchanged; 130 after Ctrl-C.
    """
    with stoppable(f"{out} is unchanged or complete; the same command resumes"), tnadapt.ProgressBar("merging") as bar:
        report = tnadapt.merge(
            base, adapter, out, member=member_of(adapter, member), overwrite=overwrite, check_base=check_base,
            progress=bar.counts,
        )  # fmt: skip
    if as_json:
        echo_json(report.to_dict())
    else:
        _print_merge(report, check_base)


def _print_merge(report: tnadapt.MergeReport, check_base: bool) -> None:
    files = pluralize(report.files, "file")
    echo(f"{report.out}: {_size(report.bytes)} in {files}")
    echo(f"  {report.targets} updates added to {report.changed} of {report.tensors} tensors")
    if report.names:
        echo(f"  {report.names}")
    if report.replaced:
        echo(f"  trained alongside the adapter, and replaced: {_some(report.replaced)}")
    if report.added:
        echo(f"  trained alongside the adapter, and added: {_some(report.added)}")
        echo("  config.json is the base's: add the settings that these need (id2label, label2id, architectures)")
    if report.left_out:
        why = "weights without the update, hidden folders, links out of BASE, or not regular files"
        echo(f"  not copied ({why}): {_some(report.left_out)}")
    if not report.base_checked:
        why = "the adapter has no fingerprint" if check_base else "--no-check-base"
        echo(f"  not checked whether it was trained on this base ({why})")
    if report.resumed:
        echo(f"  {report.resumed} of {files} finished by an earlier run")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


# -- tnadapt extract ---------------------------------------------------------------------------------------------------


def extract_command(
    base: Annotated[
        Path, typer.Argument(help="The checkpoint before fine-tuning: a folder, a .safetensors file or an index.")
    ],
    tuned: Annotated[Path, typer.Argument(help="The same model after full fine-tuning.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The adapter file.")],
    preset: Annotated[str | None, preset_option("A named method", "superlora")] = None,
    rank: Annotated[int | None, option("Rank of the config.", "the preset's")] = None,
    settings: OwnSettings = None,
    config: ConfigFile = None,
    max_error: Annotated[
        float | None, option("Use the smallest rank within this relative error, e.g. 0.1.", "none: the rank is given")
    ] = None,
    max_rank: Annotated[int | None, option("Largest rank to try with --max-error.", "no limit")] = None,
    targets: Targets = None,
    keep_trainable: Annotated[
        list[str] | None, option("A tensor or module to keep as tuned, e.g. classifier; repeat for more.", "none")
    ] = None,
    compare: Annotated[
        bool, option("Look for other tensors that differ, which reads both checkpoints completely.")
    ] = True,
    iterations: Annotated[int, option("Maximum iterations of alternating methods.", min=1)] = 100,
    tol: Annotated[float, option("Stop when an iteration reduces the relative error by no more than this.")] = 1e-6,
    svd: Annotated[str, option("auto, full or randomized.")] = "auto",
    seed: Annotated[int, option("Seed of random projections and starts.", min=0)] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing adapter file.")] = False,
    as_json: AsJson = False,
) -> None:
    """Extract an adapter from a fully fine-tuned checkpoint: fit the changes of its queries and values.

    Checkpoints are read one tensor at a time. Prints the error of the adapter, and other differences that it does not
    contain. Exit code: 0, or 2 if the extraction is not possible.
    """
    if out.is_dir():
        raise TnadaptError(f"{out} is a folder; give the path of the adapter file")
    if out.exists() and not overwrite:
        raise TnadaptError(f"{out} exists; give another path, or --overwrite to replace it")
    if not out.absolute().parent.is_dir():
        raise TnadaptError(f"{out}: the folder {out.absolute().parent} does not exist; make it first")
    _check_place(out, base, tuned)
    if rank is not None and max_error is not None:
        raise TnadaptError("--rank fixes the rank, and --max-error searches for it; give one of them, or --max-rank")
    if max_rank is not None and max_error is None:
        raise TnadaptError("--max-rank is the largest rank that --max-error tries; give both, or --rank")
    changes = [*(settings or []), *([f"rank={rank}"] if rank is not None else [])]
    if preset is None and config is None:
        # The library's default config, with the given settings.
        preset = "superlora"
        changes += [] if any(text.startswith("rank=") for text in changes) else ["rank=8"]
    chosen = chosen_config(preset, changes, config)
    with stoppable(f"{out} is unchanged or complete; the same command starts over"):
        with tnadapt.ProgressBar("extracting") as bar:
            extraction = tnadapt.extract(
                base, tuned, chosen, targets_of(targets), max_error=max_error, max_rank=max_rank,
                keep_trainable=keep_trainable or (), compare=compare, progress=bar.steps, max_iterations=iterations,
                tol=tol, svd=svd, seed=seed,
            )  # fmt: skip
        tnadapt.save(out, extraction.file)
    if not any(group.norm for group in extraction.report.groups):
        way = "--targets chooses among others that differ" if extraction.others else "are they the same model?"
        echo(f"warning: {base} and {tuned} have equal weights, so the adapter adds nothing; {way}", err=True)
    if as_json:
        echo_json(_summary(extraction, out))
    else:
        _print_extraction(extraction, out)


def _check_place(out: Path, base: Path, tuned: Path) -> None:
    """Raise TnadaptError if the adapter would be written over, or among, the files of a model."""
    from tnadapt.checkpoints.checkpoint import open_checkpoint

    for checkpoint in (open_checkpoint(base), open_checkpoint(tuned)):
        files = [*checkpoint.files, *([checkpoint.index] if checkpoint.index else [])]
        if out.exists() and any(os.path.samefile(out, file) for file in files):
            raise TnadaptError(f"{out} is a file of the model {checkpoint.path}: give another path for the adapter")
        folder = os.path.isdir(checkpoint.path) and os.path.samefile(out.absolute().parent, checkpoint.folder)
        if folder and out.suffix == ".safetensors":
            raise TnadaptError(
                f"{out} would lie among the weights of {checkpoint.path} and be mistaken for them: give another folder"
            )


def _summary(found: tnadapt.decomposition.extraction.Extraction, out: Path) -> dict[str, Any]:
    names, kept = [target.name for target in found.file.targets], sorted(found.file.kept)
    report = found.report.to_dict()
    return {"file": str(out), "targets": names, "kept": kept, **report, "others": list(found.others)}


def _print_extraction(found: tnadapt.decomposition.extraction.Extraction, out: Path) -> None:
    file, report = found.file, found.report
    echo(f"{out}: {file.num_parameters:,} parameters for {len(file.targets)} weights, {len(file.kept)} kept")
    echo_table(str(report))
    worst = sorted(enumerate(report.groups), key=lambda item: -item[1].error)[:3]
    if len(report.groups) > 1:
        echo("worst: " + ", ".join(f"group {number} {group.error:.3g}" for number, group in worst))
    if found.others:
        echo(
            f"{len(found.others)} other tensors differ and are not in the adapter (--keep-trainable includes them): "
            f"{_some(found.others)}"
        )


# -- tnadapt info ------------------------------------------------------------------------------------------------------


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
    content = tnadapt.info(path, every)
    if as_json:
        echo_json(content)
        return
    if content["kind"] == "other adapter":
        echo(f"{content['path']}: {content['what']}, {_size(content['bytes'])}; tnadapt convert reads it")
        return
    for line in (_checkpoint if content["kind"] == "checkpoint" else _adapter)(content):
        echo(line)


def _adapter(found: dict[str, Any]) -> Iterable[str]:
    what = "adapter" if found["kind"] == "adapter" else "population of adapters"
    yield f"{found['path']}: a tnadapt {what}, format version {found['version']}, {_size(found['bytes'])}"
    yield from _aligned(list(_adapter_rows(found)))
    yield from _targets(found, "weights")


def _adapter_rows(found: dict[str, Any]) -> Iterable[tuple[str, str]]:
    if "members" in found:
        yield "members", _members(found["members"])
    frozen = f"; {found['frozen']:,} more frozen" if "frozen" in found else ""
    yield "parameters", f"{found['parameters']:,} {found['dtype']} in {_counted(found['arrays'], 'array')}{frozen}"
    if "given" in found:
        fixed = found["given"]
        yield "given", f"{fixed['elements']:,} float32 in {_counted(fixed['arrays'], 'array')}, not trained"
    weights = _counted(sum(target["count"] for target in found["targets"]), "weight")
    yield "updates", f"{found['updated']:,} elements of {weights} in {_counted(found['groups'], 'group')}"
    yield from _configs(found["config"])
    if found["activation"]:
        yield "activation", f"{found['activation']} (LoDA: it cannot be merged)"
    yield "serving", found["export"]["says"]
    yield "model", found["model"] or "unknown"
    yield from _pretrained(found.get("pretrained", {}))
    base = found["base"]
    yield "base", f"{base['dtype']}, SHA-256 of the weights {base['sha256'][:16]}…" if base else "unknown"
    if found["draws"]:
        here = "the same on this machine" if found["draws_here"] else "DIFFERENT on this machine: load rejects the file"
        yield "draws", f"{found['draws'][:16]}…, {here}"
    if found["kept"]:
        yield "also trained", _some([f"{tensor['name']} {_times(tensor['shape'])}" for tensor in found["kept"]])


def _members(members: dict[str, Any]) -> str:
    """Return the number of members and the first names; a member without one is named by its number."""
    count, first = members["count"], members["first"]
    if not members["name_bytes"]:
        return f"{count:,}, without names"
    names = [str(number) if name is None else name for number, name in enumerate(first)]
    return f"{count:,}: {', '.join(names)}" + (f" and {count - len(names):,} more" if count > len(names) else "")


def _pretrained(about: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """Return the table rows for what the file records about its base model."""
    if "name" in about:
        parts = [f"{part} {about[part]}" for part in ("file", "revision") if part in about]
        yield "pretrained", ", ".join([about["name"], *parts, about.get("library", "transformers")])
    if "task" in about:
        yield "task", about["task"]
    if labels := about.get("labels"):
        yield "labels", f"{len(labels)}: {_some(labels)}"
    if settings := {**about.get("settings", {}), **about.get("inputs", {})}:
        yield "settings", ", ".join(f"{name}={json.dumps(value)}" for name, value in settings.items())


def _configs(settings: dict[str, Any]) -> Iterable[tuple[str, str]]:
    if "parts" not in settings:
        yield "method", _method(settings)
        yield "config", _config(settings)
        return
    yield "configs", f"{len(settings['parts'])}, one after another"
    for part, weights in settings["parts"]:
        yield "", f"{_method(part)} for {_counted(weights, 'weight')}: {_config(part)}"


def _method(settings: dict[str, Any]) -> str:
    return str(tnadapt.planning.known_as(tnadapt.Config.from_dict(settings)))


def _config(settings: dict[str, Any]) -> str:
    """Return the settings that differ from the defaults, and the rank."""
    usual = tnadapt.Config().to_dict()
    told = {name: value for name, value in settings.items() if name == "rank" or value != usual.get(name)}
    return ", ".join(f"{name}={json.dumps(value).strip(chr(34))}" for name, value in told.items())


def _checkpoint(found: dict[str, Any]) -> Iterable[str]:
    files = found["files"]
    architecture = ", ".join([*(found["architectures"] or []), *([found["model_type"]] if found["model_type"] else [])])
    yield f"{found['path']}: a checkpoint of {_size(found['bytes'])} in {_counted(len(files), 'file')}"
    rows = [("model", found["no_config"] or architecture or "unknown, without a config.json")]
    rows.append(("tensors", f"{found['tensors']:,}"))
    for dtype, counts in found["dtypes"].items():
        rows.append((f"  {dtype}", f"{counts['tensors']:,}, {_size(counts['bytes'])}"))
    if len(files) > 1:
        rows.append(("files", ""))
        rows += [(f"  {file['name']}", f"{file['tensors']:,} tensors, {_size(file['bytes'])}") for file in files]
    yield from _aligned(rows)
    if found["no_targets"]:
        yield f"  no queries and values: {found['no_targets']}"
    yield from _targets(found, "queries and values")


def _targets(found: dict[str, Any], title: str) -> Iterable[str]:
    if found["targets"]:
        yield f"  {title}"
        yield from _table([[f"{target['count']} ×", target["role"], *_shown(target)] for target in found["targets"]])
    if "every" in found:
        yield "  all"
        yield from _table([[tensor.get("role", tensor.get("dtype")), *_shown(tensor)] for tensor in found["every"]])


def _shown(tensor: dict[str, Any]) -> list[str]:
    """Return the name of a weight, its shape, and which part of the stored tensor it is."""
    notes = []
    if "index" in tensor:
        notes.append(f"matrix {tensor['index']}")
    if isinstance(tensor.get("rows"), dict):
        numbers = tensor["rows"]["indices"]
        notes.append(f"rows {', '.join(map(str, numbers[:4]))}" + f" and {len(numbers) - 4} more" * (len(numbers) > 4))
    elif "rows" in tensor:
        start, length, stride, count = tensor["rows"]
        notes.append(f"rows {start} to {start + length - 1}" + (f" of each {stride}, {count} times" * (count > 1)))
    if tensor.get("transposed"):
        notes.append("stored transposed")
    if notes:
        notes.append(f"of {_times(tensor['stored'])}")
    if "tied" in tensor:
        notes.append(f"tied to {', '.join(tensor['tied'])}")
    if "groups" in tensor:
        notes.append(f"in {tensor['groups']} groups")
    return [tensor["name"], _times(tensor["shape"]), ", ".join(notes)]


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


def _times(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) or "a number"


def _aligned(rows: Sequence[tuple[str, str]]) -> Iterable[str]:
    return (f"  {line}" for line in TextTable([(cell(name), text) for name, text in rows]).lines())


def _table(rows: list[list[str]]) -> Iterable[str]:
    return (f"    {line}" for line in TextTable([list(map(cell, row)) for row in rows]).lines())
