"""The command ``tnadapt merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import tnadapt

from ._byte_sizes import size
from ._common_options import AsJson
from ._interrupts import stoppable
from ._printing import echo, echo_json

__all__ = ["merge_command"]


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
        Path,
        typer.Option("--out", "-o", help="The output: a folder, or a file if BASE is a file.", show_default=False),
    ],
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace an existing checkpoint OUT, including all other files of a folder OUT."
        ),
    ] = False,
    check_base: Annotated[
        bool, typer.Option(help="Reject a base with other weights than the adapter was trained on.")
    ] = True,
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
        report = tnadapt.merge(base, adapter, out, overwrite=overwrite, check_base=check_base, progress=bar.counts)
    if as_json:
        echo_json(report.to_dict())
    else:
        _print(report, check_base)


def _print(report: tnadapt.MergeReport, check_base: bool) -> None:
    files = f"{report.files} file" + "s" * (report.files != 1)
    echo(f"{report.out}: {size(report.bytes)} in {files}")
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


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
