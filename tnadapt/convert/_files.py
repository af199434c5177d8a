"""Read and write other libraries' adapter files atomically; decode and encode the tensors of one module.

The same content gives the same bytes. A kill or a full disk leaves the old files, the new ones, or a folder that cannot
be loaded, but never a mixture.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tnadapt.checkpoints import atomic_files, container
from tnadapt.checkpoints.adapter_format import ENTRY
from tnadapt.checkpoints.container import Container
from tnadapt.errors import FileError, safe_repr

from ._updates import Float, ModuleUpdate, Pair, as_matrix

Arrays = Mapping[str, np.ndarray]
Shape = tuple[int, ...]

# -- The files, on disk or in memory -----------------------------------------------------------------------------------


# Metadata entry for the record of a conversion.
RECORD = "tnadapt.convert"

# Subfolder of a staging folder for the files that are being replaced.
_OLD = "old"


# -- Reading -------------------------------------------------------------------------------------


class StoredFiles:
    """The files of one adapter: on disk, or in memory as they will be written.

    Parameters
    ----------
    path : str
        Path of a file, or of the folder with the files.
    contents : mapping of str to bytes, optional
        Contents by file name, instead of files on disk; ``""`` is the name of an adapter's only file.
    """

    def __init__(self, path: str = "", contents: Mapping[str, bytes] | None = None) -> None:
        self._path, self._contents = path, contents

    @contextlib.contextmanager
    def open(self, name: str = "") -> Iterator[BinaryIO]:
        """Open a file for reading, by its name in the folder; without a name, the adapter's only file."""
        if self._contents is not None:
            yield io.BytesIO(self._contents[name])
            return
        path = self._place(name)
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise FileError("is not a regular file")  # opening a pipe would block until somebody writes to it
        with open(path, "rb") as file:
            yield file

    @contextlib.contextmanager
    def container(self, name: str = "") -> Iterator[Container]:
        """Open a safetensors file."""
        if self._contents is not None:
            content = self._contents[name]
            yield Container(io.BufferedReader(io.BytesIO(content)), len(content))
            return
        with container.opened(self._place(name)) as file:
            yield file

    def json(self, name: str) -> dict[str, Any]:
        """Read a JSON object strictly."""
        if self._contents is not None:
            return container.strict_json(self._contents[name].decode(), name)
        return container.json_file(self._place(name), container.MAX_CONFIG, name)

    def _place(self, name: str) -> str:
        return os.path.join(self._path, name) if name else self._path


def foreign_tensor_names(path: str) -> list[str] | None:
    """Return the names of the tensors in a safetensors file; None for a folder, and an adapter file of this library.

    Raises
    ------
    FileError
        If it is not a safetensors file.
    """
    if os.path.isdir(path):
        return None
    if path.endswith((".bin", ".pt", ".pth", ".ckpt")) and os.path.exists(path):
        raise pickle_error()
    with container.opened(path) as file:
        return None if ENTRY in file.metadata else list(file.entries)


def pickle_error() -> FileError:
    """Return the error for a pickle."""
    return FileError(
        "the weights are a pickle, which can run arbitrary code when opened, so it was not opened. Save the adapter "
        "again with a release of PEFT or LyCORIS that writes safetensors"
    )


# -- Writing -------------------------------------------------------------------------------------


def json_text(value: Any, indent: int | None = None) -> str:
    """Format JSON with sorted keys, so that equal values give equal texts."""
    separators = (",", ":") if indent is None else (",", ": ")
    return json.dumps(value, sort_keys=True, indent=indent, separators=separators, ensure_ascii=False, allow_nan=False)


def safetensors_content(tensors: Arrays, dtypes: Mapping[str, str], metadata: Mapping[str, str]) -> bytes:
    """Serialize tensors as a safetensors file.

    Parameters
    ----------
    tensors : mapping of str to ndarray
    dtypes : mapping of str to str
        Float32 arrays with bfloat16 values, to be stored as "bfloat16".
    metadata : mapping of str to str
        Written in the order of its keys, which safetensors' own writer does not guarantee.
    """
    tags = {name: container.TAG_OF[dtypes.get(name, array.dtype.name)] for name, array in tensors.items()}
    # Wide elements first, so that every tensor is aligned to the size of its elements.
    order = sorted(tensors, key=lambda name: (-container.raw_dtype(tags[name]).itemsize, name))
    stored = {name: container.to_stored(tensors[name], container.DTYPES[tags[name]]) for name in order}
    return container.serialized(stored, dict(sorted(metadata.items())))


def replace_folder(path: str, files: Mapping[str, bytes], overwrite: bool = True) -> None:
    """Write files to a folder, which is created if it does not exist; the last file is moved into place last.

    A new folder appears together with all of its files. In an existing folder, the old files are replaced once all new
    ones have been written. The last of the old files is removed first: a reader during the exchange, or after a kill,
    finds it missing and so never combines new files with old ones. If the file system has locks, concurrent writers
    take turns.

    Raises
    ------
    FileError
        If the path is not a folder, or a subfolder has the name of a file; if one of the files exists and must not be
        overwritten; or if the disk fails half-way, and again while the old files are restored. In that case, the
        message says where they are.
    OSError
        If the files cannot be written. Nothing has changed then.
    """
    path = os.path.realpath(path)
    if os.path.exists(path) and not os.path.isdir(path):
        raise FileError("is a file; an adapter of PEFT is a folder")
    parent = os.path.dirname(path)
    for name in files:
        if os.path.isdir(os.path.join(path, name)):
            raise FileError(f"has a folder {name}, where a file has to be; move it away")
    if not os.path.isdir(path):
        with _stage(parent) as stage:
            for name, content in files.items():
                atomic_files.replace_file(os.path.join(stage, name), content)
            with contextlib.suppress(FileExistsError):
                atomic_files.rename_new(stage, path)
                atomic_files.sync_folder(parent)
                return
        # Another process has created the folder in the meantime.
    with _stage(path) as stage:
        for name, content in files.items():
            atomic_files.replace_file(os.path.join(stage, name), content)
        with _turn(path):
            if not overwrite and any(os.path.lexists(os.path.join(path, name)) for name in files):
                raise FileError("exists; give another path, or overwrite=True (--overwrite)")
            _exchange(stage, path, tuple(files))


def replace_folders(path: str, folders: Iterable[tuple[str, Mapping[str, bytes]]], overwrite: bool) -> None:
    """Write the folders of several adapters to a folder: none appears before all of them have been written.

    A new folder appears with all of them. In an existing one, they are moved into place one after another, each as by
    :func:`replace_folder`.

    Raises
    ------
    FileError
        If the path, or one in it, is a file; if an adapter exists and must not be overwritten; or if the files cannot
        be written.
    """
    path = os.path.realpath(path)
    parent, is_new = os.path.dirname(path), not os.path.lexists(path)
    with contextlib.ExitStack() as stack:
        with container.file_error_context(path):
            if not is_new and not os.path.isdir(path):
                raise FileError("is a file; several adapters are a folder of folders")
            stage = stack.enter_context(_stage(parent if is_new else path))
        names = list[tuple[str, Sequence[str]]]()
        for name, files in folders:
            with container.file_error_context(os.path.join(path, name)):
                replace_folder(os.path.join(stage, name), files, overwrite=False)
            names.append((name, list(files)))
        if is_new:
            with container.file_error_context(path):
                atomic_files.rename_new(stage, path)
                atomic_files.sync_folder(parent)
            return
        for name, written in names:
            with container.file_error_context(os.path.join(path, name)):
                contents = {file: Path(stage, name, file).read_bytes() for file in written}
                replace_folder(os.path.join(path, name), contents, overwrite)


@contextlib.contextmanager
def _turn(folder: str) -> Iterator[None]:
    """Wait for other writers of a folder, because files are moved one by one and those of two writers could mix."""
    if not atomic_files.HAS_LOCKS:
        yield
        return
    while True:
        handle = os.open(folder, os.O_RDONLY)
        try:
            atomic_files.lock(handle, wait=True)
            if atomic_files.names_handle(folder, handle):  # otherwise it was renamed or deleted during the wait
                yield
                return
        finally:
            atomic_files.unlock(handle)
            os.close(handle)


def _exchange(stage: str, path: str, names: Sequence[str]) -> None:
    """Replace all files of a folder by those of the same names in a staging folder, or none of them."""
    old = os.path.join(stage, _OLD)
    os.mkdir(old)
    moved = list[tuple[str, str]]()

    def move(start: str, end: str) -> None:
        moved.append((start, end))  # before the rename: an interrupt may come right after it
        os.rename(start, end)
        atomic_files.sync_folder(path)  # so that the renames reach the disk in order

    try:
        for name in reversed(names):
            if os.path.lexists(os.path.join(path, name)):
                move(os.path.join(path, name), os.path.join(old, name))
        for name in names:
            move(os.path.join(stage, name), os.path.join(path, name))
    except BaseException as error:
        try:
            for start, end in reversed(moved):
                if os.path.lexists(end):
                    os.rename(end, start)
            os.rmdir(old)
        except OSError as again:
            raise FileError(
                f"could not be written ({error}), nor put back as it was ({again.strerror}); "
                f"what is missing of the old files is in {old}: move it back"
            ) from None
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _stage(folder: str) -> Iterator[str]:
    """Create a staging folder, which is removed at the end unless it was renamed or still holds old files."""
    stage = os.path.join(folder, f".tnadapt-{secrets.token_hex(8)}.tmp")
    os.mkdir(stage)
    try:
        yield stage
    finally:
        if not os.path.lexists(os.path.join(stage, _OLD)):
            shutil.rmtree(stage, ignore_errors=True)


def recorded(metadata: Mapping[str, str], entry: str, kind: type) -> dict[str, Any]:
    """Return an entry of the record of a conversion: a value of a type for each module; empty if there is none."""
    try:
        listed = json.loads(metadata.get(RECORD, "{}")).get(entry, {})
        return {path: value for path, value in listed.items() if isinstance(value, kind)}
    except (ValueError, RecursionError, AttributeError):
        return {}


# -- The tensors of one module, under the names and shapes of PEFT and LyCORIS -----------------------------------------

# Both libraries store LoKr and LoHa identically, and LoRA under different names, which their format modules translate.
# Both derive the sizes of LoKr's W1 and W2 from the weight's by the same rule, :func:`factorization`.


LORA = ("lora_down", "lora_up", "lora_mid")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
DIFF = ("diff",)

Tensors = Mapping[str, Float]

# Limits of the search for a decompose_factor: how far above the sides, and how many candidates.
_BEYOND, _MOST = 64, 1 << 16


def kind_of(path: str, tensors: Tensors) -> str:
    """Return the method that the tensors belong to; raise FileError unless there is exactly one."""
    kinds = {"lora": LORA, "lokr": LOKR, "loha": LOHA, "dense": DIFF}
    forms = [form for form, names in kinds.items() if not tensors.keys().isdisjoint(names)]
    if len(forms) != 1:
        raise FileError(f"{safe_repr(path)} has tensors of {' and '.join(forms) or 'no method'}: {', '.join(tensors)}")
    return forms[0]


# -- Decoding ------------------------------------------------------------------------------------


def decode(path: str, tensors: Tensors, kron_last_axes: bool = False) -> tuple[ModuleUpdate, Shape, int | None]:
    """Decode the update of one module, without its scale.

    Parameters
    ----------
    path : str
        Path of the module, for messages.
    tensors : mapping of str to ndarray
        Tensors by the names in ``LORA``, ``LOKR``, ``LOHA`` or ``DIFF``.
    kron_last_axes : bool
        Whether the Kronecker product of a Conv1d with a full W2 multiplies its last two axes, as in PEFT, and not its
        first two, as in LyCORIS.

    Returns
    -------
    ModuleUpdate, tuple of int, int or None
        The update; the weight's shape ``(out, in, …)`` as far as the tensors determine it: factors of LoKr and LoHa
        store the sizes of a convolution after ``out`` as one product; and the rank, or None if nothing has low rank.

    Raises
    ------
    FileError
        If a tensor is missing or its shape does not fit the others.
    """
    method = kind_of(path, tensors)
    get = _Getter(path, tensors)
    if method == "dense":
        diff = get("diff", 2)
        return ModuleUpdate("dense", _matrix(diff.shape), (diff.reshape(diff.shape[0], -1),)), diff.shape, None
    if method == "lora":
        pair, shape = _lora(get)
        return ModuleUpdate("lora", pair.shape, (pair,)), shape, pair.rank
    if method == "loha":
        (w1, shape), (w2, other) = _half(get, "hada_w1", "hada_t1"), _half(get, "hada_w2", "hada_t2")
        if shape != other or w1.rank != w2.rank:
            raise get.misfit("its two halves are of different shapes or ranks")
        return ModuleUpdate("loha", w1.shape, (w1, w2)), shape, w1.rank
    return _lokr(get, kron_last_axes)


class _Getter:
    """The tensors of one module, with the number of axes checked on access."""

    def __init__(self, path: str, tensors: Tensors) -> None:
        self.path, self.tensors = path, tensors

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __call__(self, name: str, axes: int, most: int = 8) -> Float:
        if name not in self.tensors:
            raise FileError(f"{safe_repr(self.path)} has {', '.join(self.tensors)}, and lacks {name}")
        array = self.tensors[name]
        if not axes <= array.ndim <= most or 0 in array.shape:
            raise self.misfit(f"{name} must have {axes} axes or more, none of them empty")
        return array

    def misfit(self, why: str) -> FileError:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in self.tensors.items())
        return FileError(f"the tensors of {safe_repr(self.path)} do not fit together: {why}; they are {shapes}")


def _matrix(shape: Shape) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


def _lora(get: _Getter) -> tuple[Pair, Shape]:
    up, down = get("lora_up", 2), get("lora_down", 2)
    if math.prod(up.shape[2:]) != 1:
        raise get.misfit("lora_up must be a matrix, or a kernel of size 1")
    (out, rank), (inner, channels, *kernel) = up.shape[:2], down.shape
    if "lora_mid" in get:
        mid = get("lora_mid", 2)
        if mid.shape[:2] != (up.shape[1], down.shape[0]) or math.prod(down.shape[2:]) != 1:
            raise get.misfit("lora_mid must be (rank, rank, kernel …), and lora_down a kernel of size 1")
        kernel = list(mid.shape[2:])
        down = np.einsum("mnk,ni->mik", mid.reshape(rank, inner, -1), down.reshape(inner, channels))
        inner = rank
    if rank != inner:
        raise get.misfit("the ranks of the two factors differ")
    return Pair(up.reshape(out, rank), down.reshape(rank, -1).T), (out, channels, *kernel)


def _half(get: _Getter, name: str, core: str) -> tuple[Pair, Shape]:
    """Return a factor ``a @ b``, or ``core x_0 a x_1 b`` in Tucker form, where both are stored as (rank, size)."""
    a, b = get(f"{name}_a", 2, 2), get(f"{name}_b", 2)
    if core not in get:
        if a.shape[1] != b.shape[0]:
            raise get.misfit(f"the ranks of {name}_a and {name}_b differ")
        return Pair(a, b.reshape(b.shape[0], -1).T), (a.shape[0], *b.shape[1:])
    t = get(core, 3)
    if b.ndim != 2 or t.shape[:2] != (a.shape[0], b.shape[0]):
        raise get.misfit(f"{core} must be (rank, rank, kernel …) with the ranks of {name}_a and {name}_b")
    wide = np.einsum("ijk,jr->irk", t.reshape(*t.shape[:2], -1), b)
    return Pair(a.T, wide.reshape(wide.shape[0], -1).T), (a.shape[1], b.shape[1], *t.shape[2:])


def _lokr(get: _Getter, kron_last_axes: bool) -> tuple[ModuleUpdate, Shape, int | None]:
    for name in ("lokr_w1", "lokr_w2"):
        if name in get and (f"{name}_a" in get or f"{name}_b" in get):
            raise get.misfit(f"{name} is there full and in two factors")
    first: Pair | Float
    last: Pair | Float
    first = get("lokr_w1", 2, 2) if "lokr_w1" in get else _half(get, "lokr_w1", "")[0]
    if "lokr_w2" in get:
        if "lokr_t2" in get:
            raise get.misfit("lokr_t2 belongs to two factors of W2, which is full")
        full = get("lokr_w2", 2)
        last, (_, channels, *kernel) = full.reshape(full.shape[0], -1), full.shape
    else:
        last, (_, channels, *kernel) = _half(get, "lokr_w2", "lokr_t2")
    (p, q), (k, _) = first.shape, last.shape
    shape = (p * k, q * channels, *kernel)
    ranks = {part.rank for part in (first, last) if isinstance(part, Pair)}
    if len(ranks) > 1:
        raise get.misfit("W1 and W2 have different ranks")
    rank = ranks.pop() if ranks else None
    if kron_last_axes and len(kernel) == 1 and not isinstance(last, Pair) and (p, q) != (1, 1):
        # torch.kron of a matrix and a tensor of order 3 multiplies the tensor's last two axes.
        turned = np.asarray(np.kron(as_matrix(first)[None], last.reshape(k, channels, *kernel)), np.float64)
        return ModuleUpdate("dense", _matrix(shape), (turned.reshape(_matrix(shape)),)), shape, rank
    if not isinstance(last, Pair):
        first = as_matrix(first)
    return ModuleUpdate("lokr", _matrix(shape), (first, last)), shape, rank


# -- Encoding ------------------------------------------------------------------------------------


def encode(update: ModuleUpdate, stored: Sequence[int], down: str, up: str) -> dict[str, Float]:
    """Encode one module's update, without its scale.

    Parameters
    ----------
    update : ModuleUpdate
    stored : sequence of int
        Shape of the weight.
    down, up : str
        Names of LoRA's two factors.
    """
    kernel = tuple(stored[2:])
    if update.kind == "dense":
        return {"diff": as_matrix(update.parts[0]).reshape(stored)}
    if update.kind == "lora":
        b, a = update.pair
        if kernel:
            return {down: a.T.reshape(-1, stored[1], *kernel), up: b.reshape(*b.shape, *(1 for _ in kernel))}
        return {down: a.T, up: b}
    name, tensors = {"loha": "hada_w", "lokr": "lokr_w"}[update.kind], dict[str, Float]()
    for number, part in enumerate(update.parts, start=1):
        if isinstance(part, Pair):
            part = part.padded(update.rank)
            tensors |= {f"{name}{number}_a": part.b, f"{name}{number}_b": part.a.T}
        else:
            tensors[f"{name}{number}"] = part.reshape(part.shape[0], -1, *kernel) if number == 2 and kernel else part
    return tensors


# -- PEFT's LoRA of convolutions in groups --------------------------------------------------------


def spread_over_groups(down: Float, groups: int) -> Float:
    """Return the kernel ``(groups rank, channels, …)`` that PEFT has as A of a convolution in groups.

    PEFT's A reads all channels, and its B is in groups: the outputs of a group see their own part of A's. A is
    therefore repeated for every group, in the channels of the group.

    Parameters
    ----------
    down : ndarray
        A of the weight's update, of shape ``(rank, channels / groups, …)``.
    groups : int
    """
    rank, channels, *kernel = down.shape
    wide = np.zeros((groups, rank, groups, channels, *kernel))
    wide[np.arange(groups), :, np.arange(groups)] = down
    return wide.reshape(groups * rank, groups * channels, *kernel)


def without_groups(path: str, tensors: Tensors) -> tuple[Tensors, int]:
    """Return PEFT's LoRA of a module as factors of the weight's update, and in how many groups its channels are.

    Raises
    ------
    FileError
        If a group reads channels of another one, as it does once PEFT has trained: no update of the weight does.
    """
    down, up = tensors.get("lora_down"), tensors.get("lora_up")
    if down is None or up is None or min(down.ndim, up.ndim) < 3 or up.shape[1] in (0, len(down)):
        return tensors, 1
    groups = len(down) // up.shape[1]
    if len(down) % up.shape[1] or down.shape[1] % groups or len(up) % groups:
        return tensors, 1  # refused as factors of different ranks
    first = down[: up.shape[1], : down.shape[1] // groups]
    if not np.array_equal(down, spread_over_groups(first, groups)):
        raise FileError(
            f"{safe_repr(path)} is a convolution in {groups} groups, and in PEFT's LoRA each reads the channels "
            "of all groups, which no update of its weight does: leave it out of target_modules, or train LoKr or LoHa, "
            "whose updates are those of the weight"
        )
    return {**tensors, "lora_down": first}, groups


# -- The sizes of LoKr's factors -----------------------------------------------------------------


def factorization(size: int, factor: int = -1) -> tuple[int, int]:
    """Return the sizes of a side in W1 and W2: the given factor if it divides the side, otherwise two close ones.

    This is the rule of PEFT; that of LyCORIS puts the smaller size first. Files do not store the sizes: the libraries
    compute them, so they can only load Kronecker factors with sizes that follow from the rule.

    Examples
    --------
    >>> factorization(128), factorization(128, 4), factorization(12, 6), factorization(127)
    ((8, 16), (4, 32), (6, 2), (1, 127))
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = size if factor < 0 else factor
    small, large = 1, size
    best = small + large
    while small < large:
        following = next(d for d in range(small + 1, size + 1) if size % d == 0)
        if following + size // following > best or following > limit:
            break
        small, large = following, size // following
    return min(small, large), max(small, large)


def kronecker_sizes_of(update: ModuleUpdate, stored: Sequence[int]) -> tuple[int, int, int, int] | None:
    """Return ``(p, q, k, n)`` with W1 (p, q), W2 (k, n, …) and ``stored = (p k, q n, …)``; None if there are none."""
    (p, q), (k, _) = update.parts[0].shape, update.parts[1].shape
    return (p, q, k, stored[1] // q) if stored[1] % q == 0 and p * k == stored[0] else None


def _is_low(part: Pair | Float, sides: Sequence[int], rank: int) -> bool:
    """Return whether a rank is below half of the larger side, in which case both libraries store two factors."""
    return isinstance(part, Pair) and 2 * rank < max(sides)


def are_both_low(update: ModuleUpdate, size: tuple[int, int, int, int]) -> bool:
    """Return whether W1 and W2 are both stored as two factors, and so both have the larger of the two ranks."""
    sides = size[:2], size[2:]
    return all(_is_low(part, pair, update.rank) for part, pair in zip(update.parts, sides, strict=True))


def parts_to_store(update: ModuleUpdate, size: tuple[int, int, int, int], both: bool) -> tuple[Pair | Float, ...]:
    """Return W1 and W2 as both libraries store them; ``both`` says whether each is two factors of the same rank."""
    if both:
        return tuple(part.padded(update.rank) for part in update.parts if isinstance(part, Pair))
    first, last = update.parts
    low = isinstance(last, Pair) and _is_low(last, size[2:], last.rank)
    return as_matrix(first), last if low else as_matrix(last)


def decompose_factor(sizes: Sequence[tuple[int, int, int, int]], stored: Sequence[Sequence[int]]) -> int | None:
    """Return a ``decompose_factor`` that gives every weight the right sizes, or None."""
    wanted = dict.fromkeys((size, tuple(shape[:2])) for size, shape in zip(sizes, stored, strict=False))
    sides = [side for size, _ in wanted for side in size[:2]]
    # PEFT takes a factor that does not divide a side as an upper limit. A factor slightly above the sides may therefore
    # work for all weights where the sides themselves divide some of the others.
    factors: list[int] = [-1, *sides, *range(1, max(sides, default=0) + _BEYOND)]
    for factor in dict.fromkeys(factors[:_MOST]):
        if all(
            factorization(rows, factor) == (p, k) and factorization(cols, factor) == (q, n)
            for (p, q, k, n), (rows, cols) in wanted
        ):
            return factor
    return None
