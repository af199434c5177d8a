"""The command ``tnadapt convert``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tnadapt.convert import FORMS, convert
from tnadapt.errors import TnadaptError

from ._printing import echo, echo_json, echo_table

__all__ = ["convert_command"]


def convert_command(
    source: Annotated[
        Path, typer.Argument(help="A tnadapt file, a PEFT folder, or a file of LyCORIS, kohya or diffusers.")
    ],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="A file, or a folder for PEFT; without it, nothing is written.")
    ] = None,
    to: Annotated[str, typer.Option(metavar="FORM", help=f"One of {', '.join(FORMS)}.")] = "tnadapt",
    rank: Annotated[int | None, typer.Option(help="Largest rank allowed.", min=1)] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Largest relative error allowed; without it, only rounding is.")
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            help="The base model (safetensors): to find the paths of LyCORIS' names, and to check shapes; for "
            "gguf-lora with its config.json, or a GGUF file."
        ),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(
            help="The adapter to read from a kohya or diffusers file with several, or the component to write, e.g. "
            "lora_te2 or text_encoder_2."
        ),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="dtype of the result: float32, float16, bfloat16 or float64.")
    ] = None,
    without_kept: Annotated[
        bool, typer.Option("--without-kept", help="Omit parameters trained alongside the adapter, e.g. a head.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing OUT.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Convert an adapter between tnadapt, PEFT, LyCORIS, kohya, diffusers, llama.cpp and others.

    Conversions are exact, or have a measured error.

    Exit code: 0, or 2 if the conversion is not possible; nothing is written then.
    """
    try:
        with Console(stderr=True).status("converting"):
            found = convert(
                source, out, to=to, rank=rank, max_error=max_error, base=base, part=part, dtype=dtype,
                without_kept=without_kept, overwrite=overwrite,
            )  # fmt: skip
    except TnadaptError as error:
        raise TnadaptError(_as_options(str(error))) from None
    if as_json:
        echo_json({**found.to_dict(), "out": None if out is None else str(out)})
        return
    echo_table(str(found))
    echo("nothing written: give -o OUT" if out is None else f"written to {out}")


def _as_options(text: str) -> str:
    """Return a message of the library with its arguments rewritten as command-line options."""
    text = text.replace("without_kept=True (--without-kept)", "--without-kept")
    text = re.sub(r"overwrite=True \(--\w+\)", "--overwrite", text)
    text = re.sub(r"to='([\w.-]+)'", r"--to \1", text)
    text = text.replace("a max_error of", "--max-error").replace("max_error=", "--max-error=")
    return re.sub(r"(?<![\w-])(rank|base|part)=", r"--\1=", text).replace("= ", " ").replace("=,", ",")
