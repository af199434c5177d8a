"""The command ``tnadapt extract``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

import tnadapt
from tnadapt.errors import TnadaptError

from ._common_options import AsJson, ConfigFile, OwnSettings, TargetsOfHeaders, preset_option
from ._interrupts import stoppable
from ._printing import echo, echo_json, echo_table
from ._settings import chosen_config, targets_of

__all__ = ["extract_command"]


def extract_command(
    base: Annotated[
        Path, typer.Argument(help="The checkpoint before fine-tuning: a folder, a .safetensors file or an index.")
    ],
    tuned: Annotated[Path, typer.Argument(help="The same model after full fine-tuning.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The adapter file.")],
    preset: Annotated[str | None, preset_option("A named method", "superlora")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the config.", show_default="the preset's")] = None,
    settings: OwnSettings = None,
    config: ConfigFile = None,
    max_error: Annotated[
        float | None,
        typer.Option(
            help="Use the smallest rank within this relative error, e.g. 0.1.", show_default="none: the rank is given"
        ),
    ] = None,
    max_rank: Annotated[
        int | None, typer.Option(help="Largest rank to try with --max-error.", show_default="no limit")
    ] = None,
    targets: TargetsOfHeaders = None,
    keep_trainable: Annotated[
        list[str] | None,
        typer.Option(
            help="A tensor or module to keep as tuned, e.g. classifier; repeat for more.", show_default="none"
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option(help="Look for other tensors that differ, which reads both checkpoints completely.")
    ] = True,
    iterations: Annotated[int, typer.Option(min=1, help="Maximum iterations of alternating methods.")] = 100,
    tol: Annotated[
        float, typer.Option(help="Stop when an iteration reduces the relative error by no more than this.")
    ] = 1e-6,
    svd: Annotated[str, typer.Option(help="auto, full or randomized.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Seed of random projections and starts.")] = 0,
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
            found = tnadapt.extract(
                base, tuned, chosen, targets_of(targets), max_error=max_error, max_rank=max_rank,
                keep_trainable=keep_trainable or (), compare=compare, progress=bar.steps, max_iterations=iterations,
                tol=tol, svd=svd, seed=seed,
            )  # fmt: skip
        tnadapt.save(out, found.file)
    if not any(group.norm for group in found.report.groups):
        way = "--targets chooses among others that differ" if found.others else "are they the same model?"
        echo(f"warning: {base} and {tuned} have equal weights, so the adapter adds nothing; {way}", err=True)
    if as_json:
        echo_json(_summary(found, out))
    else:
        _print(found, out)


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
    report = found.report.to_dict()
    return {
        "file": str(out),
        "targets": [target.name for target in found.file.targets],
        "kept": sorted(found.file.kept),
        **report,
        "others": list(found.others),
    }


def _print(found: tnadapt.decomposition.extraction.Extraction, out: Path) -> None:
    file, report = found.file, found.report
    echo(f"{out}: {file.num_parameters:,} parameters for {len(file.targets)} weights, {len(file.kept)} kept")
    echo_table(str(report))
    worst = sorted(enumerate(report.groups), key=lambda item: -item[1].error)[:3]
    if len(report.groups) > 1:
        echo("worst: " + ", ".join(f"group {number} {group.error:.3g}" for number, group in worst))
    if found.others:
        more = f" and {len(found.others) - 6} more" if len(found.others) > 6 else ""
        echo(
            f"{len(found.others)} other tensors differ and are not in the adapter (--keep-trainable includes them): "
            f"{', '.join(found.others[:6])}{more}"
        )
