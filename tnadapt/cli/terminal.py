"""Building blocks of command lines, for tnadapt and other programs: output, progress, and exits on errors.

A user's mistake leads to one line on stderr and exit code 2. No file or path can send control sequences to the
terminal.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup

from tnadapt.errors import TnadaptError, escaped, safe_repr
from tnadapt.report import TextTable

# -- Ctrl-C ------------------------------------------------------------------------------------------------------------


#: The exit code of shells for a program that SIGINT has ended.
INTERRUPTED = 130


@contextlib.contextmanager
def stoppable(kept: str) -> Iterator[None]:
    """Run the long part of a command, which Ctrl-C ends with exit code 130 and one line on stderr.

    Parameters
    ----------
    kept : str
        What is kept and how to go on, for the line: "stopped; …".

    Notes
    -----
    Python handles a signal when its main thread is next in Python code: one call of LAPACK or torch runs to its end.

    Examples
    --------
    >>> with stoppable("nothing was written"):
    ...     print("done")
    done
    """
    try:
        yield
    except BaseException as error:
        # An interrupted import may end with an error of its own.
        if not isinstance(error, KeyboardInterrupt) and not isinstance(error.__context__, KeyboardInterrupt):
            raise
        # Not through the buffer of stderr, which the interrupted code may be using.
        with contextlib.suppress(OSError):
            os.write(2, f"\n{escaped(f'stopped; {kept}')}\n".encode(sys.stderr.encoding or "utf-8", "replace"))
        raise typer.Exit(INTERRUPTED) from None


# -- Printing: everything is escaped, so that no file can control the terminal -----------------------------------------


# Maximum characters of a cell: a name in a file may have thousands, and all rows would become as wide.
_WIDEST = 200


def echo(line: str, err: bool = False) -> None:
    """Print one line."""
    typer.echo(escaped(line), err=err)


def echo_table(text: str) -> None:
    """Print the lines of a report, which must escape text from files itself."""
    for line in text.split("\n"):
        echo(line)


def echo_json(value: Any) -> None:
    """Print JSON in ASCII, with all other characters escaped."""
    typer.echo(json.dumps(value, indent=2))


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int]) -> None:
    """Print a table with the columns ``right`` aligned to the right, and rows that begin with ● in bold."""
    for line in TextTable([list(map(cell, row)) for row in rows], list(map(cell, titles)), right).lines():
        # Escape sequences are left out where stdout is no terminal.
        typer.echo(typer.style(line, bold=True) if line.startswith("●") else line)


def cell(text: str) -> str:
    """Return a text as shown in a table: escaped and truncated.

    Examples
    --------
    >>> cell("q\\nk"), len(cell(1000 * "q"))
    ('q\\\\nk', 202)
    """
    shown = escaped(text)
    return shown if len(shown) <= _WIDEST else shown[:_WIDEST] + " …"


# -- Errors and help ---------------------------------------------------------------------------------------------------


_WANTED = "Input should be "


def _instead_of_argument(context: Any) -> str:
    """Return the option that an argument too many was probably meant for, if that was not given."""
    if context is None:
        return ""
    values = context.params
    if not any(parameter.param_type_name == "argument" for parameter in context.command.params):
        return "; give the model by --model" if values.get("model", "") is None else ""
    return "; give the output by -o" if values.get("out", "") is None else ""


@contextlib.contextmanager
def _escaping() -> Iterator[None]:
    """Escape Typer's own errors, which quote the command line; say -o of an argument too many, and name bad values."""
    try:
        yield
    except Exception as error:
        if isinstance(message := getattr(error, "message", None), str):
            # The group sees the error again.
            if message.startswith("Got unexpected extra argument") and message.endswith(")"):
                message += _instead_of_argument(getattr(error, "ctx", None))
            validation = getattr(error.__cause__, "errors", None)  # of pydantic, by which Typer reads values
            if callable(validation) and message.startswith(_WANTED):
                wanted = message.removeprefix(_WANTED).partition(", ")[0].replace("a valid integer", "an integer")
                message = f"must be {wanted}; got {safe_repr(validation()[0]['input'])}"
            error.message = escaped(message)  # type: ignore[attr-defined]  # checked above
        raise


# What the help page calls the value of an option of each type; a flag has none.
_VALUES = {bool: "", int: "N", float: "X", str: "TEXT", Path: "PATH"}


class _Escaping:
    def get_params(self, ctx: Any) -> Any:
        """Return the parameters, with the names of their values on the help page."""
        parameters = super().get_params(ctx)  # type: ignore[misc]  # of the other base
        for parameter in parameters:
            if parameter.metavar is None and not parameter.type_descriptor.is_choice:
                annotation = parameter.type_descriptor.annotation
                type_ = (get_args(annotation) or (annotation,))[0]
                is_argument = isinstance(parameter, TyperArgument)
                # None leaves it to Typer, for the types of another program.
                parameter.metavar = parameter.name.upper() if is_argument else _VALUES.get(type_)
        return parameters

    def make_context(self, *arguments: Any, **settings: Any) -> Any:
        with _escaping():
            return super().make_context(*arguments, **settings)  # type: ignore[misc]  # of the other base

    def invoke(self, ctx: Any) -> Any:
        with _escaping():
            return super().invoke(ctx)  # type: ignore[misc]


class EscapingCommand(_Escaping, TyperCommand):
    """A command whose usage errors are escaped: ``app.command(cls=EscapingCommand)``."""


class EscapingGroup(_Escaping, TyperGroup):
    """A group of commands whose usage errors are escaped: ``typer.Typer(cls=EscapingGroup)``."""


def help_text(command: Callable[..., None]) -> str:
    """Return a docstring with each paragraph on one line, to be wrapped to the width of the terminal."""
    # There are no docstrings under python -OO.
    return "\n\n".join(" ".join(text.split()) for text in (inspect.getdoc(command) or "").split("\n\n"))


@contextlib.contextmanager
def exit_on_error(program: str) -> Iterator[None]:
    """Exit with a one-line message and code 2 if the block raises an error that a user can cause.

    Parameters
    ----------
    program : str
        Prefix of the message.

    Raises
    ------
    SystemExit
        Replaces :class:`~tnadapt.TnadaptError`, ``OSError`` and ``MemoryError``.

    Examples
    --------
    >>> from tnadapt import TnadaptError
    >>> with exit_on_error("program"):
    ...     raise TnadaptError("no such file")
    Traceback (most recent call last):
    SystemExit: 2
    """
    try:
        yield
    except (TnadaptError, OSError) as error:  # a full disk, a name that is too long
        line = str(error)
    except MemoryError as error:
        line = f"there is not enough memory ({str(error) or 'no further details'})"
    else:
        return
    print(escaped(f"{program}: {line}"), file=sys.stderr)
    raise SystemExit(2)


# -- Commands that are imported when they are used ---------------------------------------------------------------------


class Entry(NamedTuple):
    """Where a command is, and what ends its help page.

    Attributes
    ----------
    module : str
        The module of its function, ``NAME_command``.
    page : str
        The page of the documentation.
    example : str
        Its arguments in an example.
    """

    module: str
    page: str
    example: str


#: The commands, in the order of the help page.
COMMANDS = {
    "finetune": Entry("_finetune_command", "finetune", "--model ./my-bert --data reviews.csv --budget 1000"),
    "predict": Entry("_predict_command", "finetune", "runs/my-bert-reviews/best.safetensors --data new.csv"),
    "presets": Entry("_method_commands", "presets", "./my-model"),
    "plan": Entry("_method_commands", "planning", "./my-model --budget 1000"),
    "extract": Entry("_file_commands", "decomposition", "./base ./tuned -o adapter.safetensors --max-error 0.1"),
    "convert": Entry("_convert_command", "convert", "adapter.safetensors -o served --to vllm"),
    "merge": Entry("_file_commands", "merging", "./base adapter.safetensors -o merged"),
    "info": Entry("_file_commands", "files", "adapter.safetensors"),
    "verify": Entry("_method_commands", "verification", "--preset lora --set rank=8"),
}
_DOCUMENTATION = "https://tnadapt.readthedocs.io/en/latest"


class _Commands(collections.UserDict[str, Any]):
    """The commands by name, each imported when it is first looked up."""

    def __getitem__(self, name: str) -> Any:
        if self.data[name] is None:
            self.data[name] = _command(name)
        return self.data[name]


def _command(name: str) -> Any:
    module, page, example = COMMANDS[name]
    function = getattr(importlib.import_module(f".{module}", __package__), f"{name}_command")
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    epilog = f"Example: tnadapt {name} {example}\n\n{_DOCUMENTATION}/{page}.html"
    app.command(name, cls=EscapingCommand, help=help_text(function), epilog=epilog)(function)
    return typer.main.get_command(app)


class LazyGroup(EscapingGroup):
    """The group of all commands. Listing their names imports none of them."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.commands = _Commands(dict.fromkeys(COMMANDS))

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)


# -- Where parallel trainings run --------------------------------------------------------------------------------------


ENGINE_HELP = "Where parallel trainings run: local, ray (a Ray cluster) or slurm."
ENGINE_OPTION_HELP = "A setting of the engine, such as partition=gpu or gpus=1; repeat for more."


def pair_of(text: str, expected: str) -> tuple[str, str]:
    """Return the two sides of ``KEY=VALUE``."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise TnadaptError(f"{expected}; got {safe_repr(text)}")
    return name, value


def engine_options(given: Sequence[str]) -> dict[str, str]:
    """Parse the options ``--engine-option``.

    Raises
    ------
    TnadaptError
        If one is not KEY=VALUE, or a key is given twice.

    Examples
    --------
    >>> engine_options(["partition=gpu", "setup=export A=1"])
    {'partition': 'gpu', 'setup': 'export A=1'}
    """
    options: dict[str, str] = {}
    for name, value in (pair_of(text, "--engine-option takes KEY=VALUE") for text in given):
        if name in options:
            raise TnadaptError(f"--engine-option {name} is given twice")
        options[name] = value
    return options
