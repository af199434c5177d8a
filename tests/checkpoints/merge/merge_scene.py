"""Small checkpoints and adapters that differ in every file, their merges, and users' changes to the output."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

import tnadapt as tna
from tests.support import checkpoint_files as cp

TARGETS = [tna.Target(f"layer.{number}.q", (6, 4), "q") for number in range(4)]

Content = dict[str, bytes] | bytes | None


def content(path: Path) -> Content:
    """What is there: a file's bytes, those of a folder's files by name, or None. Anything else is named."""
    if path.is_symlink():
        return f"link to {os.readlink(path)}".encode()
    if path.is_dir():
        return {str(one.relative_to(path)): _of_one(one) for one in sorted(path.rglob("*")) if not one.is_dir()}
    return _of_one(path) if os.path.lexists(path) else None


def _of_one(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b"something that is no file"


class Scene(NamedTuple):
    """A place to merge in.

    Attributes
    ----------
    base, out : Path
    adapters : list of Path
    results : list of Content
        What merging each of the adapters gives; any two differ in every file of weights.
    """

    folder: Path
    base: Path
    out: Path
    adapters: list[Path]
    results: list[Content]

    def merge(self, number: int, overwrite: bool = False) -> tna.MergeReport:
        return tna.merge(self.base, self.adapters[number], self.out, overwrite=overwrite)

    def finish(self, number: int = 0, overwrite: bool = True) -> tna.MergeReport:
        """Merge, which must give the result and leave nothing beside it."""
        report = self.merge(number, overwrite)
        assert content(self.out) == self.results[number]
        assert not self.beside.exists()
        return report

    @property
    def beside(self) -> Path:
        return Path(f"{self.out}.tnadapt-partial")

    @property
    def elsewhere(self) -> Path:
        """Where users move an output to."""
        return self.folder / "moved"

    @property
    def refused(self) -> Path:
        """Where tests move what was refused."""
        return self.folder / "refused"

    def clear(self) -> None:
        """Remove everything but the inputs."""
        for path in (self.out, self.beside, self.elsewhere, self.refused):
            remove(path)

    def put(self, there: Content) -> None:
        """Put a result there, by hand."""
        remove(self.out)
        if isinstance(there, bytes):
            self.out.write_bytes(there)
        elif there is not None:
            for name, piece in there.items():
                (self.out / name).parent.mkdir(parents=True, exist_ok=True)
                (self.out / name).write_bytes(piece)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def scene(folder: Path, single: bool, adapters: int = 2) -> Scene:
    """A base in one file, or in a folder with shards, an index, and other files; and adapters for it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = cp.base(TARGETS)
    base = cp.write(folder / "base", tensors, 1 if single else 2)
    out = folder / ("out.safetensors" if single else "out")
    if single:
        base = base / "model.safetensors"
    else:
        (base / "code").mkdir(exist_ok=True)
        (base / "code" / "model.py").write_text("pass\n")
    paths = []
    for number in range(adapters):
        paths.append(folder / f"adapter{number}")
        # The targets are all in the second shard. What is added changes the index, too.
        kept = {"a.first": np.full((3, 2), float(number), np.float32), "head.bias": np.full(number + 1, 1.0)}
        tna.save(paths[-1], cp.adapter(tna.presets.lora(2), TARGETS, seed=number, kept=kept))
    found = Scene(folder, base, out, paths, [])
    for number in range(adapters):
        found.merge(number, overwrite=True)
        found.results.append(content(out))
    found.clear()
    return found


# -- What users do to OUT between a kill and the next run --------------------------------------------


def nothing(where: Scene) -> None:
    pass


def moved(where: Scene) -> None:
    if os.path.lexists(where.out):
        where.out.rename(where.elsewhere)


def removed(where: Scene) -> None:
    remove(where.out)


def plain_base(where: Scene) -> None:
    where.put(content(where.base))


def half_deleted(where: Scene) -> None:
    there = content(where.out)
    if isinstance(there, bytes):
        where.put(there[: len(there) // 2])
    elif there is not None:
        for name in sorted(there)[len(there) // 2 :]:
            (where.out / name).unlink()


def one_byte_flipped(where: Scene) -> None:
    there = content(where.out)
    if isinstance(there, bytes):
        where.put(there[:-1] + bytes([there[-1] ^ 1]))
    elif there is not None:
        name = max(name for name in there if name.endswith(".safetensors"))
        where.put({**there, name: there[name][:-1] + bytes([there[name][-1] ^ 1])})


def a_file_added(where: Scene) -> None:
    if where.out.is_dir():
        (where.out / "notes.txt").write_text("mine")


def other_result(where: Scene) -> None:
    where.put(where.results[-1])


def the_result_by_hand(where: Scene) -> None:
    where.put(where.results[0])


def precious(where: Scene) -> None:
    remove(where.out)
    where.out.mkdir()
    (where.out / "thesis.txt").write_text("the only copy")


def pipe(where: Scene) -> None:
    remove(where.out)
    os.mkfifo(where.out)


ACTIONS: list[Callable[[Scene], None]] = [
    nothing, moved, removed, plain_base, half_deleted, one_byte_flipped, a_file_added, other_result, the_result_by_hand,
    precious, pipe,
]  # fmt: skip
