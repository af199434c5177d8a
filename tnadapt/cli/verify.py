"""``tnadapt verify``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .. import Config, TnadaptError, presets, verify
from .settings import setting

__all__ = ["verify_command"]


def verify_command(
    preset: Annotated[str | None, typer.Option(help="A named method, e.g. superlora.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="A Config field, or a preset's argument.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A JSON file of Config fields.")] = None,
    shape: Annotated[
        list[str] | None, typer.Option(metavar="ROWSxCOLS", help="Of a weight; repeat for more, 12x8*4 for four.")
    ] = None,
    backend: Annotated[list[str] | None, typer.Option(help="A library to check on; repeat for more.")] = None,
    seed: Annotated[int, typer.Option(help="Of the random parameters.", min=0)] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check the laws of the library, or of one config, on every array library that is installed.

    Exit code: 0 where all hold, 1 where one does not, 2 for a question that cannot be asked.
    """
    chosen = _config(preset, settings or [], config)
    shapes = [one for text in shape or [] for one in _shapes(text)] or None
    with Console(stderr=True).status("checking") as status:
        report = verify(
            chosen, shapes, backends=backend, seed=seed, progress=lambda line: status.update(f"checking {line}")
        )
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        _print(report)
    raise typer.Exit(0 if report.holds else 1)


def _config(preset: str | None, settings: list[str], path: Path | None) -> Config | None:
    changes = dict(setting(text) for text in settings)
    if preset is not None and path is not None:
        raise TnadaptError("--preset and --config both name a config; give one of them")
    if preset is not None:
        if preset not in presets.__all__:
            raise TnadaptError(f"no preset {preset!r}; expected one of {', '.join(presets.__all__)}")
        try:
            made = getattr(presets, preset)(**changes)
        except TypeError as error:
            raise TnadaptError(f"preset {preset!r}: {error}; give it by --set NAME=VALUE") from None
        return made  # type: ignore[no-any-return]
    if path is not None:
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise TnadaptError(f"cannot read a config from {path}: {error}") from None
        if not isinstance(read, dict):
            raise TnadaptError(f"{path} holds {type(read).__name__}; expected a JSON object of Config fields")
        return Config.from_dict({**read, **changes})
    return Config.from_dict(changes) if changes else None


def _shapes(text: str) -> list[tuple[int, int]]:
    size, _, times = text.partition("*")
    rows, _, cols = size.partition("x")
    try:
        repeat = int(times or 1)
        if repeat < 1:
            raise ValueError
        return [(int(rows), int(cols))] * repeat
    except ValueError:
        raise TnadaptError(f"--shape takes ROWSxCOLS, e.g. 768x768 or 768x768*24; got {text!r}") from None


def _print(report: Any) -> None:
    console = Console()
    if not console.is_terminal:
        typer.echo(str(report))
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("law", overflow="fold")
    table.add_column("backend", no_wrap=True)
    for title in ("cases", "largest error", "allowed"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for row in report.rows():
        table.add_row(*row, style=None if row[-1] == "holds" else "bold red")
    console.print(table)
    for name, why in report.absent.items():
        console.print(f"{name}: not checked: {why}")
    console.print("all laws hold" if report.holds else "NOT all laws hold")
