"""One module's tensors, as PEFT and LyCORIS name and shape them, as one update.

Both lay LoKr and LoHa out alike, and LoRA under two sets of names, which are made one before they come here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from tnadapt.errors import FileError, shown

from ._updates import Float, Pair, Update

__all__ = ["DIFF", "LOHA", "LOKR", "LORA", "kind_of", "update_of"]

LORA = ("lora_down", "lora_up", "lora_mid")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
DIFF = ("diff",)

Tensors = Mapping[str, Float]


def kind_of(path: str, tensors: Tensors) -> str:
    """Which method the tensors are of; an error where they are of two."""
    kinds = {"lora": LORA, "lokr": LOKR, "loha": LOHA, "dense": DIFF}
    found = [kind for kind, names in kinds.items() if not tensors.keys().isdisjoint(names)]
    if len(found) != 1:
        raise FileError(f"{shown(path)} has tensors of {' and '.join(found) or 'no method'}: {', '.join(tensors)}")
    return found[0]


def update_of(
    path: str, tensors: Tensors, scale: Callable[[int | None], float], peft: bool = False
) -> tuple[Update, tuple[int, ...]]:
    """The update of one module.

    Parameters
    ----------
    path : str
        For messages.
    tensors : mapping of str to ndarray
        By the names of ``LORA``, ``LOKR``, ``LOHA`` or ``DIFF``.
    scale : callable
        Of the rank, or of None where LoKr has two full factors.
    peft : bool
        Whether PEFT makes the update: of a Conv1d with a full W2 it multiplies other axes than LyCORIS.

    Returns
    -------
    Update, tuple of int
        And the weight's shape ``(out, in, …)`` as far as the tensors tell it: LoKr and LoHa write the
        sizes of a convolution after ``out`` as one product.

    Raises
    ------
    FileError
        If a tensor is missing or its shape does not go with the others'.
    """
    kind = kind_of(path, tensors)
    get = _Getter(path, tensors)
    if kind == "dense":
        diff = get("diff", 2)
        return Update("dense", _matrix(diff.shape), (diff.reshape(diff.shape[0], -1),)), diff.shape
    if kind == "lora":
        pair, shape = _lora(get)
        return Update("lora", pair.shape, (pair,), scale(pair.rank)), shape
    if kind == "loha":
        (one, shape), (two, other) = _half(get, "hada_w1", "hada_t1"), _half(get, "hada_w2", "hada_t2")
        if shape != other or one.rank != two.rank:
            raise get.misfit("its two halves are of different shapes or ranks")
        return Update("loha", one.shape, (one, two), scale(one.rank)), shape
    return _lokr(get, scale, peft)


class _Getter:
    """The tensors of one module, each asked for with the number of axes it must have."""

    def __init__(self, path: str, tensors: Tensors) -> None:
        self.path, self.tensors = path, tensors

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __call__(self, name: str, axes: int, most: int = 8) -> Float:
        if name not in self.tensors:
            raise FileError(f"{shown(self.path)} has {', '.join(self.tensors)}, and lacks {name}")
        array = self.tensors[name]
        if not axes <= array.ndim <= most or 0 in array.shape:
            raise self.misfit(f"{name} must have {axes} axes or more, none of them empty")
        return array

    def misfit(self, why: str) -> FileError:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in self.tensors.items())
        return FileError(f"the tensors of {shown(self.path)} do not fit together: {why}; they are {shapes}")


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


def _lora(get: _Getter) -> tuple[Pair, tuple[int, ...]]:
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
        raise get.misfit("the ranks of the two factors differ (of a grouped convolution, PEFT's differ, and no two "
                         "matrices make its update)")  # fmt: skip
    return Pair(up.reshape(out, rank), down.reshape(rank, -1).T), (out, channels, *kernel)


def _half(get: _Getter, name: str, core: str) -> tuple[Pair, tuple[int, ...]]:
    """A factor ``a @ b``, or in Tucker form ``core x_0 a x_1 b``, where both are stored as (rank, size)."""
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


def _lokr(get: _Getter, scale: Callable[[int | None], float], peft: bool) -> tuple[Update, tuple[int, ...]]:
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
        kernel, last = full.shape[2:], full.reshape(full.shape[0], -1)
        channels = full.shape[1]
    else:
        last, (_, channels, *rest) = _half(get, "lokr_w2", "lokr_t2")
        kernel = tuple(rest)
    (p, q), (k, _) = first.shape, last.shape
    shape = (p * k, q * channels, *kernel)
    ranks = {part.rank for part in (first, last) if isinstance(part, Pair)}
    if len(ranks) > 1:
        raise get.misfit("W1 and W2 have different ranks")
    factor = scale(ranks.pop() if ranks else None)
    if peft and len(kernel) == 1 and not isinstance(last, Pair) and (p, q) != (1, 1):
        # torch.kron of a matrix and a tensor of order 3 multiplies the last two axes of it, not the first two.
        w1 = first.b @ first.a.T if isinstance(first, Pair) else first
        turned = np.asarray(np.kron(w1[None], last.reshape(k, channels, *kernel)), np.float64)
        return Update("dense", _matrix(shape), (turned.reshape(_matrix(shape)),), factor), shape
    return Update("lokr", _matrix(shape), (first, last), factor), shape
