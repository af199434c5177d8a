"""The public names with their signatures, as text."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import textwrap
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, ForwardRef

import tnadapt

__all__ = ["FILE", "current", "moved", "write"]

ROOT = Path(__file__).parents[2]
FILE = Path(__file__).with_name("names.txt")
REFERENCE = ROOT / "docs" / "api" / "index.rst"
#: Public modules that the API reference has no section for.
OTHERS = ("tnadapt.finetune", "tnadapt.torch.peft")
OPERATORS = ("__call__", "__contains__", "__enter__", "__getitem__", "__iter__", "__len__", "__matmul__")

Lines = dict[str, list[str]]


def current(without: Collection[str] = ()) -> Lines:
    """Return the lines of each public module that can be imported here, but for these modules."""
    sections = {}
    for module_name, listed in sorted(_listed().items()):
        if module_name in without:
            continue
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            continue
        names = sorted({*getattr(module, "__all__", ()), *listed})
        sections[module_name] = [line for name in names for line in _lines(module_name, name)]
    return sections


def write(sections: Lines) -> None:
    """Write the lines of each module under its name."""
    blocks = ["\n".join([f"# {module}", "", *lines, ""]) for module, lines in sections.items()]
    FILE.write_text("\n".join(blocks), encoding="utf-8", newline="\n")


def moved(sections: Lines) -> list[str]:
    """Return a diff of the file and these lines, without modules whose library is not installed here."""
    parts = re.split(r"^# (.*)\n", FILE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    recorded = {module: text.strip().splitlines() for module, text in zip(parts[::2], parts[1::2], strict=True)}
    diff: list[str] = []
    for module in sorted({*recorded, *sections}):
        path = ROOT.joinpath(*module.split("."))
        exists = path.is_dir() or path.with_suffix(".py").is_file()
        if module in sections or not exists:
            before, after = recorded.get(module, []), sections.get(module, [])
            diff += difflib.unified_diff(before, after, module, module, n=1, lineterm="")
    return diff


def _listed() -> Lines:
    """Return the names in each section of the API reference."""
    parts = re.split(r"^\.\. currentmodule:: (.*)\n", REFERENCE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    sections = zip(parts[::2], parts[1::2], strict=True)
    names = {module: re.findall(r"^   ([A-Za-z][\w.]*)$", text, flags=re.MULTILINE) for module, text in sections}
    return {**{module: [] for module in OTHERS}, **names}


def _lines(module: str, name: str) -> Iterator[str]:
    """Yield the lines of one name; a class has one for each member that a class of tnadapt defines."""
    owner, _, attribute = f"{module}.{name}".rpartition(".")
    value = getattr(importlib.import_module(owner), attribute)
    if module != "tnadapt" and any(value is getattr(tnadapt, other) for other in tnadapt.__all__):
        yield f"{name} = tnadapt.{attribute}"
    elif inspect.isfunction(value):
        yield from _with_signature(name, value)
    elif not inspect.isclass(value):
        yield f"{name}: {type(value).__name__}"
    else:
        own = [cls for cls in value.__mro__ if cls.__module__.partition(".")[0] == "tnadapt"]
        members = {member: function for cls in reversed(own) for member, function in vars(cls).items()}
        # A dataclass may have both.
        made_by = next((members[method] for method in ("__init__", "__new__") if method in members), None)
        yield from (
            _with_signature(name, made_by, "class ", _foreign_fields(value, own)) if made_by else [f"class {name}"]
        )
        for member in sorted(members):
            if not member.startswith("_") or member in OPERATORS:
                yield from _of_member(f"{name}.{member}", members[member])


def _foreign_fields(cls: type, own: list[type]) -> set[str]:
    """Return the fields that a class has from another library, and what its constructor is called on."""
    fields = {base: inspect.get_annotations(base).keys() for base in cls.__mro__}
    foreign = {field for base in fields.keys() - own for field in fields[base]}
    return foreign.difference(*(fields[base] for base in own)) | {"self", "_cls"}


def _of_member(name: str, member: Any) -> list[str]:
    for attribute in ("fget", "func"):  # of a property, and of a cached one
        if function := getattr(member, attribute, None):
            return [f"{name}: {_bare(inspect.signature(function).return_annotation)}"]
    function = getattr(member, "__func__", member)
    prefix = f"{type(member).__name__} " if function is not member else ""
    return _with_signature(name, function, prefix) if inspect.isfunction(function) else [name]


def _with_signature(name: str, function: Any, prefix: str = "", without: Collection[str] = ()) -> list[str]:
    signature = inspect.signature(function)
    parameters = [
        each.replace(annotation=_bare(each.annotation))
        for each in signature.parameters.values()
        if each.name not in without
    ]
    signature = signature.replace(parameters=parameters, return_annotation=_bare(signature.return_annotation))
    text = f"{prefix}{name}{_readable(str(signature))}"
    return textwrap.wrap(text, 120, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)


def _readable(text: str) -> str:
    """Return a text without the modules of classes and the addresses of functions."""
    text = re.sub(r"ForwardRef\('(.*?)'[^)]*\)", r"\1", text)
    return re.sub(r"\b(?:tnadapt|hypothesis)\.(?:\w+\.)*| at 0x[0-9a-f]+", "", text)


class _Bare(str):
    """A string that signatures show without quotation marks."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _bare(annotation: Any) -> Any:
    if annotation is inspect.Signature.empty:
        return annotation
    text = annotation.__forward_arg__ if isinstance(annotation, ForwardRef) else annotation
    return _Bare(text if isinstance(text, str) else inspect.formatannotation(text))
