"""The command line. Needs ``pip install "tnadapt[cli]"``; everything it does is a library call."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tnadapt import __version__
from tnadapt.errors import escaped

from ._convert_command import convert_command
from ._extract_command import extract_command
from ._finetune_command import finetune_command
from ._info_command import info_command
from ._merge_command import merge_command
from ._plan_command import plan_command
from ._printing import echo
from ._reproduce_command import reproduce_command
from ._verify_command import verify_command

__all__ = ["app"]


@contextlib.contextmanager
def _escaping() -> Iterator[None]:
    """Typer's own errors quote words of the command line, which a shell may have taken from a folder."""
    try:
        yield
    except Exception as error:
        if isinstance(message := getattr(error, "message", None), str):
            error.message = escaped(message)  # type: ignore[attr-defined]  # there it is
        raise


class _Group(TyperGroup):
    def make_context(self, *arguments: Any, **settings: Any) -> Any:
        with _escaping():
            return super().make_context(*arguments, **settings)

    def invoke(self, ctx: Any) -> Any:
        with _escaping():
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Group,
    name="tnadapt",
    help="Weight updates as small tensor networks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        echo(f"tnadapt {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Weight updates as small tensor networks: SuperLoRA and its relatives."""


def _help(command: Callable[..., None]) -> str:
    """A docstring's paragraphs, each in one line: the terminal says how wide they are."""
    # There is none under python -OO.
    return "\n\n".join(" ".join(text.split()) for text in (inspect.getdoc(command) or "").split("\n\n"))


app.command("finetune", help=_help(finetune_command))(finetune_command)
app.command("plan", help=_help(plan_command))(plan_command)
app.command("extract", help=_help(extract_command))(extract_command)
app.command("convert", help=_help(convert_command))(convert_command)
app.command("merge", help=_help(merge_command))(merge_command)
app.command("info", help=_help(info_command))(info_command)
app.command("reproduce", help=_help(reproduce_command))(reproduce_command)
app.command("verify", help=_help(verify_command))(verify_command)
