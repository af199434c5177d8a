"""Commands that are imported when they are used: each needs modules that the others do not."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, MutableMapping
from typing import Any

import typer

from .terminal import EscapingGroup, help_text

__all__ = ["COMMANDS", "LazyGroup"]

#: The commands, in the order of the help page. The function ``NAME_command`` is in the module ``_NAME_command``.
COMMANDS = ("finetune", "predict", "presets", "plan", "extract", "convert", "merge", "info", "verify")


class _Commands(MutableMapping[str, Any]):
    """The commands by name, each imported when it is first looked up."""

    def __init__(self) -> None:
        self._loaded: dict[str, Any] = dict.fromkeys(COMMANDS)

    def __getitem__(self, name: str) -> Any:
        if self._loaded[name] is None:
            self._loaded[name] = _command(name)
        return self._loaded[name]

    def __setitem__(self, name: str, command: Any) -> None:
        self._loaded[name] = command

    def __delitem__(self, name: str) -> None:
        del self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaded)

    def __len__(self) -> int:
        return len(self._loaded)


def _command(name: str) -> Any:
    function = getattr(importlib.import_module(f"._{name}_command", __package__), f"{name}_command")
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(name, help=help_text(function))(function)
    return typer.main.get_command(app)


class LazyGroup(EscapingGroup):
    """The group of all commands. Listing their names imports none of them."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.commands = _Commands()

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)
