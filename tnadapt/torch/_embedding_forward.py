"""The forward of an embedding with updates: rows of ΔW are looked up next to the rows of W.

The sum of two rows is a row of the sum, so this gives what the strategy "weight" gives, without computing W + ΔW for
the whole vocabulary: the rows are added in the wider dtype and rounded once.

- *factored*: rows of the left factor are looked up and multiplied by the right one; ΔW is never formed.
- *additive*: ΔW is formed, as for a list of tokens' rows, and its rows are looked up.

Only where the module's forward is known to be a lookup, times a scale perhaps (:func:`is_lookup`). A quantized
embedding's own forward is run, and the rows of updates are added to its output.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tnadapt.algebra.factoring import Matrix

from ._forward_pass import delta, factors, scaled
from ._quantized import quantized_type
from ._row_features import updated_places
from ._state import AdapterSlot

__all__ = ["beside", "embedded", "is_lookup"]

# What a subclass may do with the rows, as in Gemma and BART.
_SCALES = ("super().forward({0}) * self.embed_scale", "super().forward({0}) * self.embed_scale.to(self.weight.dtype)")


def is_lookup(module: nn.Module) -> bool:
    """Return whether a module's forward is that of nn.Embedding, times ``embed_scale`` perhaps, or a quantized one's.

    Examples
    --------
    >>> is_lookup(nn.Embedding(5, 2)), is_lookup(nn.EmbeddingBag(5, 2))
    (True, False)
    """
    kind = quantized_type(module)
    if kind is not None and kind.looks_up(module):
        return True
    # Gradients of a factor cannot be divided by the frequencies of tokens.
    if not isinstance(module, nn.Embedding) or module.scale_grad_by_freq:
        return False
    cls: Any = type(module)
    return cls.forward is nn.Embedding.forward or _scales(cls.forward)


@functools.lru_cache(maxsize=256)
def _scales(forward: Any) -> bool:
    """Return whether a forward's source is one of :data:`_SCALES`."""
    try:
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(forward))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return False
    if not isinstance(node, ast.FunctionDef) or len(node.args.args) != 2 or node.decorator_list:
        return False
    body = [line for line in node.body if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))]
    if len(body) != 1 or not isinstance(body[0], ast.Return) or body[0].value is None:
        return False
    return ast.unparse(body[0].value) in [text.format(node.args.args[1].arg) for text in _SCALES]


def embedded(module: nn.Embedding, weight: Tensor, ids: Tensor, slots: Sequence[AdapterSlot]) -> Tensor:
    """Return the output of an embedding, its weight and the updates of slots looked up separately."""
    kind, total = weight.dtype, functional.embedding(ids, weight, module.padding_idx)
    for slot in slots:
        total = _plus_rows(total, slot, ids.to(weight.device), module.padding_idx)
    return _times_scale(module, total.to(kind))


def beside(module: nn.Module, y: Tensor, ids: Tensor, slots: Sequence[AdapterSlot]) -> Tensor:
    """Return a quantized embedding's output ``y`` plus the updates of slots, looked up."""
    total, padding = torch.zeros_like(y), getattr(module, "padding_idx", None)
    for slot in slots:
        total = _plus_rows(total, slot, ids.to(y.device), padding)
    return (y + _times_scale(module, total)).to(y.dtype)


def _times_scale(module: Any, rows: Tensor) -> Tensor:
    """Return rows as the forward of a module returns them, which :func:`is_lookup` knows."""
    scale = getattr(module, "embed_scale", None)
    if scale is None or type(module).forward is nn.Embedding.forward:
        return rows
    found: Tensor = rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)
    return found


def _plus_rows(total: Tensor, slot: AdapterSlot, ids: Tensor, padding: int | None) -> Tensor:
    places, there = updated_places(slot.target, ids)
    rows = scaled(slot.adapter, _factored_rows(slot, places)) if slot.strategy == "factored" else _formed(slot, places)
    rows = rows.to(total.device)
    if padding is not None:
        # As in nn.Embedding, the padding's row has no gradient.
        rows = torch.where((ids == padding).unsqueeze(-1), rows.detach(), rows)
    total = total.to(torch.promote_types(total.dtype, rows.dtype))
    return total + rows if there is None else torch.where(there.unsqueeze(-1), total + rows, total)


def _formed(slot: AdapterSlot, places: Tensor) -> Tensor:
    update = delta(slot)
    return functional.embedding(places.to(update.device), update)


def _factored_rows(slot: AdapterSlot, places: Tensor) -> Tensor:
    """Return rows of an update from its factors."""
    found = factors(slot)
    total: Tensor | None = None
    for term in found.terms:
        one = _rows_of_term(term, places.to(term[0].left.device))
        total = one if total is None else total + one
    assert total is not None
    return total if found.scale == 1.0 else total * found.scale


def _rows_of_term(term: Sequence[Matrix], places: Tensor) -> Tensor:
    """Return rows of a Kronecker product: products of the rows of its matrices, which are digits of the place."""
    found: Tensor | None = None
    for matrix in reversed(term):
        rows = functional.embedding(places % matrix.left.shape[0], matrix.left)
        places = torch.div(places, matrix.left.shape[0], rounding_mode="floor")
        rows = rows if matrix.right is None else rows @ matrix.right.T
        found = rows if found is None else (rows.unsqueeze(-1) * found.unsqueeze(-2)).flatten(-2)
    assert found is not None
    return found
