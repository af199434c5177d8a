"""``tnadapt merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tnadapt.checkpoints.merge.merge_checkpoint import MergeReport, merge

from ._byte_sizes import size
from ._printing import echo, echo_json
from ._progress import bytes_bar

__all__ = ["merge_command"]


def merge_command(
    base: Annotated[
        Path,
        typer.Argument(
            metavar="BASE", help="A folder with a model, an index, or a .safetensors file.", show_default=False
        ),
    ],
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Its .safetensors file.", show_default=False)],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="What to make: a folder, or a file where BASE is a file.", show_default=False),
    ],
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace a checkpoint that is at OUT; all other files of a folder OUT go, too."
        ),
    ] = False,
    check_base: Annotated[
        bool, typer.Option(help="Refuse a base with other weights than the adapter was trained on.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Add an adapter to a model on disk, and write the sum as a model of its own, which needs no tnadapt.

    BASE is not changed. OUT has the same files, shards and dtypes; config.json, the tokenizer and the like are copied.
    One tensor at a time is in memory, and torch is not needed. The weights are, to the byte, those of adapter.merge()
    and save_pretrained() in memory.

    OUT appears, or is replaced, in one step, when the result is whole. Until then it is made in OUT.tnadapt-partial:
    stopped or killed, the same command continues with the files that were finished. Links that lead out of BASE are not
    followed. Of several commands that merge to one OUT, one works, and the others end with an error.

    Exit code: 0; 2 for what cannot be done, with nothing at OUT; 130 after Ctrl-C.
    """
    try:
        with bytes_bar("merging") as progress:
            report = merge(base, adapter, out, overwrite=overwrite, check_base=check_base, progress=progress)
    except KeyboardInterrupt:
        echo("", err=True)
        echo(f"stopped; {out} is as it was, or whole; the same command continues", err=True)
        raise typer.Exit(130) from None
    if as_json:
        echo_json(report.to_dict())
    else:
        _print(report, check_base)


def _print(report: MergeReport, check_base: bool) -> None:
    files = f"{report.files} file" + "s" * (report.files != 1)
    echo(f"{report.out}: {size(report.bytes)} in {files}")
    echo(f"  {report.targets} updates added to {report.changed} of {report.tensors} tensors")
    if report.names:
        echo(f"  {report.names}")
    if report.replaced:
        echo(f"  trained beside the adapter, and put in place: {_some(report.replaced)}")
    if report.added:
        echo(f"  trained beside the adapter, and added: {_some(report.added)}")
        echo("  config.json is the base's: give it what these need (num_labels, architectures)")
    if report.left_out:
        why = "weights without the update, hidden folders, links out of BASE, or no regular files"
        echo(f"  not copied ({why}): {_some(report.left_out)}")
    if not report.base_checked:
        why = "the adapter does not say on which" if check_base else "--no-check-base"
        echo(f"  not checked whether it was trained on this base ({why})")
    if report.resumed:
        echo(f"  {report.resumed} of {files} had been finished before")


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
