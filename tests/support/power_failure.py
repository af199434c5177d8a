"""The states of a disk that a power failure can leave after a recorded series of steps.

The model is that of a journaling file system: changes of names reach the disk in order, at the latest when a folder is
synchronized; the content of a file reaches the disk when that file is synchronized, and not before, even if its name
and its length are on disk.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from .file_layer import Call

__all__ = ["after_failures", "put"]


@dataclasses.dataclass
class File:
    content: bytes = b""
    size: int = 0
    time: int = 0


@dataclasses.dataclass
class Folder:
    entries: dict[str, File | Folder] = dataclasses.field(default_factory=dict)


#: By their path below the folder that is looked at: the bytes and the time of a file, or None for a folder.
Tree = dict[str, tuple[bytes, int] | None]


def _taken_up(path: Path) -> File | Folder:
    if path.is_dir():
        return Folder({one.name: _taken_up(one) for one in path.iterdir()})
    state = path.stat()
    return File(path.read_bytes(), state.st_size, state.st_mtime_ns)


class _Names:
    """The names at one moment."""

    def __init__(self, top: str, root: Folder) -> None:
        self.top, self.root = top, root

    def _at(self, path: str) -> tuple[Folder, str]:
        *folders, name = os.path.relpath(path, self.top).split(os.sep)
        found = self.root
        for folder in folders:
            inner = found.entries[folder]
            assert isinstance(inner, Folder)
            found = inner
        return found, name

    def node(self, path: str) -> File | Folder:
        folder, name = self._at(path)
        return folder.entries[name]

    def change(self, call: Call, new: File | None) -> bool:
        """Apply a step, if it changes names."""
        first, name = self._at(call.paths[0])
        if call.name == "create":
            assert new is not None
            first.entries[name] = new
        elif call.name == "mkdir":
            first.entries[name] = Folder()
        elif call.name in ("unlink", "rmdir"):
            del first.entries[name]
        elif call.name in ("rename", "replace", "rename_new", "link", "exchange"):
            second, other = self._at(call.paths[1])
            moved = first.entries[name] if call.name == "link" else first.entries.pop(name)
            if call.name == "exchange":
                first.entries[name] = second.entries[other]
            second.entries[other] = moved
        else:
            return False
        return True

    def tree(self) -> Tree:
        found: Tree = {}

        def walk(folder: Folder, before: str) -> None:
            for name, node in folder.entries.items():
                if isinstance(node, Folder):
                    found[before + name] = None
                    walk(node, f"{before}{name}/")
                else:
                    # The length may be right while the bytes are not.
                    found[before + name] = node.content + bytes(node.size - len(node.content)), node.time

        walk(self.root, "")
        return found


def after_failures(calls: Sequence[Call], top: Path, start: Path) -> Iterator[tuple[int, Tree]]:
    """Each state that a failure right after each step can leave, with the number of the steps that were done.

    Parameters
    ----------
    calls : sequence of Call
        With their paths below ``top``.
    top : Path
        The folder that is looked at.
    start : Path
        A copy of what was in it before the first step.
    """
    above = str(top)
    names: list[Call] = []  # changes of names, in order
    new: dict[int, File] = {}  # files that those create, by the number of the change
    live = _Names(above, _folder(start))
    forced = 0
    for number, call in enumerate(calls):
        if call.name == "fsync" and call.content is None:
            forced = len(names)
        elif call.name in ("fsync", "copy", "write"):
            node = live.node(call.paths[0])
            assert isinstance(node, File)
            assert call.state is not None
            node.size, node.time = call.state
            if call.content is not None:
                node.content = call.content
        else:
            if call.name == "create":
                new[len(names)] = File()
            changed = live.change(call, new.get(len(names)))
            assert changed, call
            names.append(call)
        for kept in range(forced, len(names) + 1):
            at = _Names(above, _folder(start))
            for index, change in enumerate(names[:kept]):
                at.change(change, new.get(index))
            yield number + 1, at.tree()


def _folder(path: Path) -> Folder:
    found = _taken_up(path)
    assert isinstance(found, Folder)
    return found


def put(tree: Tree, top: Path) -> None:
    """Make the files of a state."""
    for name, node in tree.items():
        if node is None:
            (top / name).mkdir(parents=True, exist_ok=True)
        else:
            (top / name).parent.mkdir(parents=True, exist_ok=True)
            (top / name).write_bytes(node[0])
            os.utime(top / name, ns=(node[1], node[1]))
