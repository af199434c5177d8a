"""Modules with given children, and short descriptions of the targets found in a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from tnadapt.torch import find_targets


class Module(nn.Module):
    """A module with these children."""

    def __init__(self, **children: nn.Module | None) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def linear(*names: str, out: int = 8) -> Module:
    return Module(**{name: nn.Linear(8, out) for name in names})


def roles(model: nn.Module, targets: Any = "qv") -> list[tuple[str, tuple[int, int]]]:
    return [(target.role, target.shape) for target in find_targets(model, targets)]


def names(model: nn.Module, targets: Any = "qv", **kwargs: Any) -> list[str]:
    return [target.name for target in find_targets(model, targets, **kwargs)]


def qv(q: tuple[int, int], v: tuple[int, int] | None = None) -> list[tuple[str, tuple[int, int]]]:
    return [("q", q), ("v", v or q)]


def vq(q: tuple[int, int], v: tuple[int, int] | None = None) -> list[tuple[str, tuple[int, int]]]:
    """Where v is defined before q, as in OpenAI's models and their kin."""
    return qv(q, v)[::-1]
