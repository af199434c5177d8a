"""The command ``tnadapt convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tnadapt.convert import FORMS, convert
from tnadapt.report import ProgressBar

from ._options import AsJson, Member, member_of, option
from .terminal import echo, echo_json, echo_table, stoppable


def convert_command(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            show_default=False,
            help="The adapter: a tnadapt file or folder, also of a population, a PEFT folder, a safetensors file of "
            "LyCORIS, kohya or diffusers, or a GGUF adapter that tnadapt wrote.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            help="Where to write the result: a folder for PEFT and vLLM, otherwise a file. Without it, "
            "only the error is measured.",
        ),
    ] = None,
    to: Annotated[str, option(f"Form of the result: {', '.join(FORMS)}.", metavar="FORM")] = "tnadapt",
    member: Member = None,
    rank: Annotated[int | None, option("Largest rank of the result.", "as high as needed", min=1)] = None,
    max_error: Annotated[
        float | None, option("Largest relative error allowed, from 0 to 1. Without it, only rounding errors are.")
    ] = None,
    base: Annotated[
        Path | None,
        option(
            "The base model: a safetensors file, an index or a folder. LyCORIS and kohya files need it, as their "
            "names lack the dots of module paths, and so do adapters with arrays computed from the base weights. For "
            "gguf-lora, a folder with config.json, or the GGUF file of the model.",
            "none",
        ),
    ] = None,
    part: Annotated[
        str | None,
        option(
            "Part of a diffusion pipeline, such as unet, text_encoder_2 or lora_te2: the one to read from a kohya "
            "or diffusers file with several, and the one to write.",
            "the only one",
        ),
    ] = None,
    dtype: Annotated[
        str | None, option("dtype of the result: float32, float16, bfloat16 or float64.", "the source's")
    ] = None,
    without_kept: Annotated[
        bool,
        typer.Option(
            "--without-kept", help="Leave out parameters trained with the adapter, such as a classifier head."
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing OUT.")] = False,
    as_json: AsJson = False,
) -> None:
    """Convert an adapter between tnadapt, PEFT, LyCORIS, kohya, diffusers, llama.cpp and vLLM.

    The error of the result is measured. By default, only rounding errors are allowed.

    Exit code: 0, or 2 if the conversion is not possible. Nothing is written then.
    """
    kept = "nothing was written" if out is None else f"{out} is unchanged or complete; the same command starts over"
    with stoppable(kept), ProgressBar("converting") as bar:
        conversion = convert(
            source, out, to=to, member=member_of(source, member), rank=rank, max_error=max_error, base=base, part=part,
            dtype=dtype, without_kept=without_kept, overwrite=overwrite, progress=bar.counts,
        )  # fmt: skip
    if as_json:
        echo_json({**conversion.to_dict(), "out": None if out is None else str(out)})
        return
    echo_table(str(conversion))
    echo("nothing was written: give -o OUT to write it" if out is None else f"written to {out}")
