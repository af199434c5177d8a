"""Headers designed to consume memory, and a program that measures one of them in a process of its own.

``python -m tests.checkpoints.hostile_headers PATH USE`` prints the message, the peak of Python's allocations and the
peak growth of the process's memory as JSON.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tnadapt as tna
from tests.support import forge
from tnadapt.checkpoints.checkpoint import open_checkpoint


def filled(head: str, parts: Iterator[str], tail: str, size: int) -> str:
    """A text of about so many bytes."""
    found, length = [head], len(head.encode()) + len(tail.encode())
    for part in parts:
        length += len(part.encode())
        if length > size:
            break
        found.append(part)
    return "".join(found) + tail


def repeated(part: str) -> Iterator[str]:
    """A part again and again, in pieces that are made fast."""
    many = part * 100
    return itertools.repeat(many)


def many_lists(size: int, head: str = "[", tail: str = "[0]]") -> str:
    """An array of lists, as a part of something else."""
    return filled(head, repeated("[0],"), tail, size)


def many_targets(size: int) -> str:
    """An array of targets that are right."""
    return filled("[", (f'["{name}",[1,1],"q"],' for name in numbers()), '["~",[1,1],"q"]]', size)


def in_entry(recipe: str, escape: bool = True) -> str:
    """A header whose entry ``tnadapt`` is that text."""
    text = json.dumps(recipe, ensure_ascii=False) if escape else f'"{recipe}"'
    return f'{{"__metadata__":{{"tnadapt":{text}}}}}'


def scalars(names: Iterator[str]) -> Iterator[str]:
    for number, name in enumerate(names):
        yield f'"{name}":{{"dtype":"U8","shape":[],"data_offsets":[{number},{number + 1}]}},'


def numbers() -> Iterator[str]:
    return (f"{number:x}" for number in itertools.count())


LAST = '"~":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
EMPTY = '"dtype":"U8","shape":[0],"data_offsets":[0,0]'
RECIPE = '{"version":1,"config":%s,"sha256":"' + "0" * 64 + '","targets":%s}'

#: What makes the text of a header of so many bytes.
HEADERS: dict[str, Callable[[int], str]] = {
    "deep lists": lambda size: '{"a":' + "[" * (size // 2) + "]" * (size // 2) + "}",
    "deep objects": lambda size: '{"a":' + '{"a":' * (size // 6) + "1" + "}" * (size // 6) + "}",
    "lists": lambda size: filled('{"a":[', repeated("[],"), "[]]}", size),
    "lists in a shape": lambda size: filled('{"a":{"shape":[', repeated("[],"), "[]]}}", size),
    "tiny keys": lambda size: filled("{", (f'"{name}":1,' for name in numbers()), '"~":1}', size),
    "tiny keys of an entry": lambda size: filled(
        '{"a":{', (f'"{name}":1,' for name in numbers()), '"dtype":1}}', size
    ),
    "tiny keys of metadata": lambda size: filled(
        '{"__metadata__":{', (f'"{name}":"",' for name in numbers()), '"~":""}}', size
    ),
    "one key": lambda size: filled("{", repeated(f'"a":{{{EMPTY}}},'), LAST, size),
    "one key in an entry": lambda size: filled('{"a":{', repeated('"dtype":1,'), '"dtype":1}}', size),
    "numbers": lambda size: filled('{"a":{"dtype":"U8","shape":[', repeated("1,"), '1],"data_offsets":[0,1]}}', size),
    "floats": lambda size: filled('{"a":[', repeated("0.5,"), "1]}", size),
    "digits": lambda size: filled('{"a":', repeated("9"), "}", size),
    "a long name": lambda size: filled('{"', repeated("name"), f'":{{{EMPTY}}}}}', size),
    "a long name of escapes": lambda size: filled('{"', repeated("\\u00e9"), f'":{{{EMPTY}}}}}', size),
    "a long dtype": lambda size: filled(
        '{"a":{"dtype":"', repeated("F32"), '","shape":[],"data_offsets":[0,0]}}', size
    ),
    "a long string": lambda size: filled('{"__metadata__":{"a":"', repeated("x"), '😀"}}', size),
    "a long string of escapes": lambda size: filled(
        '{"__metadata__":{"a":"', repeated("\\n"), '\\ud83d\\ude00"}}', size
    ),
    "a long string of pairs": lambda size: filled('{"__metadata__":{"a":"', repeated("\\ud83d\\ude00"), '"}}', size),
    "many scalars": lambda size: filled("{", scalars(numbers()), LAST, size),
    "many scalars of one name": lambda size: filled("{", scalars(itertools.repeat("a")), LAST, size),
    "many entries in another order": lambda size: filled(
        "{", (f'"{name}":{{"data_offsets":[0,0],"dtype":"U8","shape":[0]}},' for name in numbers()), LAST, size
    ),
    "many shapes": lambda size: filled(
        "{",
        (f'"{name}":{{"dtype":"U8","shape":[{"1," * 62}0],"data_offsets":[0,0]}},' for name in numbers()),
        LAST,
        size,
    ),
    "no end": lambda size: filled("{", scalars(numbers()), '"~', size),
    "spaces": lambda size: "{" + " " * size + '"a":1}',
    "recipe of a string": lambda size: in_entry("x" * size + "😀"),
    "recipe of lists": lambda size: in_entry(filled('{"targets":[', repeated("[],"), "[]]}", size)),
    "recipe of deep lists": lambda size: in_entry('{"targets":' + "[" * (size // 2) + "]" * (size // 2) + "}"),
    "recipe of numbers": lambda size: in_entry(filled('{"version":[', repeated("1,"), "1]}", size)),
    "recipe of keys": lambda size: in_entry(
        filled("{", (f'"{name}":1,' for name in numbers()), '"~":1}', size * 3 // 4)
    ),
    "recipe of groups": lambda size: in_entry(
        RECIPE % (filled('{"groups":[', repeated("[0],"), "[0]]}", size), '[["a",[1,1],"q"]]')
    ),
    "recipe of groups and what are no targets": lambda size: in_entry(
        RECIPE % (many_lists(size // 2 - 1000, '{"groups":[', "[0]]}"), many_lists(size // 2))
    ),
    "recipe of groups and targets": lambda size: in_entry(
        RECIPE % (many_lists(size * 7 // 20, '{"groups":[', "[0]]}"), many_targets(size * 9 // 20))
    ),
    "recipe of a base and what are no targets": lambda size: in_entry(
        RECIPE % ('{},"base":' + many_lists(size // 2 - 1000, '{"x":[', "[0]]}"), many_lists(size // 2))
    ),
    "recipe of trained and a target": lambda size: in_entry(
        RECIPE % ('{},"trained":' + filled("[", repeated('"",'), '""]', size * 3 // 5), '[["a",[1,1],"q"]]')
    ),
    "recipe of labels": lambda size: in_entry(
        filled(
            (RECIPE % ("{}", '[["a",[1,1],"q"]]'))[:-1] + ',"pretrained":{},"labels":[', repeated('"a",'), '"a"]}', size
        )
    ),
    "recipe of unknown keys": lambda size: in_entry(
        RECIPE % ("{}" + "".join(f',"{n}":{many_lists(60_000)}' for n in range(min(size // 60_000, 60))), "[]")
    ),
    "recipe of targets": lambda size: in_entry(
        RECIPE
        % ("{}", filled("[", (f'["{name}",[1,1],"q"],' for name in numbers()), '["~",[1,1],"q"]]', size * 3 // 4))
    ),
    "recipe of a target": lambda size: in_entry(
        RECIPE % ("{}", filled('[["a",[1,1],"q",{"layer":"', repeated("x"), '😀"}]]', size))
    ),
    "recipe of a model": lambda size: in_entry(
        filled('{"version":1,"model":"', repeated("\\u00e9"), '"}', size * 6 // 7)
    ),
    "recipe of escapes": lambda size: in_entry(filled("", repeated("\\u007b"), "", size), escape=False),
}  # fmt: skip


def write(path: Path, kind: str, size: int) -> int:
    """The file of a kind; returns the length of its header."""
    text = HEADERS[kind](size).encode()
    tensors = text.count(b'"shape":[],') if kind != "many scalars of one name" else 1
    path.write_bytes(forge.container(text, bytes(tensors)))
    return len(text)


def resident() -> int:
    """The most memory that this process has had, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


USES: dict[str, Callable[[str], Any]] = {
    "load": tna.load,
    "info": tna.info,
    "open": open_checkpoint,
    "convert": lambda path: tna.convert(path, base=["a"]),
}


def main(path: str, use: str, traced: bool) -> None:
    with contextlib.suppress(tna.TnadaptError):
        USES[use](__file__)  # for what is imported on the way
    before, begun = resident(), time.process_time()
    if traced:
        tracemalloc.start()
    said = "read"
    try:
        USES[use](path)
    except tna.FileError as error:
        said = str(error)
    peak = tracemalloc.get_traced_memory()[1] if traced else 0
    more = resident() - before
    print(json.dumps({"said": said, "peak": peak, "more": more, "seconds": time.process_time() - begun}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3] == "traced")
