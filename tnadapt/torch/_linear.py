"""A linear layer with updates, as autograd functions: low-rank factors, W + ΔW, or rows added to its output.

:class:`FactoredLinear` is the strategy "factored", without ever forming ΔW, and :class:`MergedWeightLinear` the
strategy "weight", which recomputes W + ΔW in backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tnadapt.algebra.factoring import Factored, Matrix
from tnadapt.algebra.maps import Map
from tnadapt.backends import FixedArrays, load_backend
from tnadapt.targets.target import RowIndices, Rows, Target

from ._delta import Slice, in_dispatch_mode, in_functorch, outer_vjp_once

__all__ = [
    "BLOCK",
    "MOST_ELEMENTS",
    "DeltaSource",
    "LowRank",
    "MergedWeightLinear",
    "add_features",
    "can_fuse",
    "can_sum_in_blocks",
    "factored_linear",
    "fixed_indices",
    "index_tensor",
    "is_small",
    "linear",
    "low_rank_linear",
    "low_rank_updates",
    "mixed_low_rank_linear",
    "on_device",
    "overlap",
    "product",
    "sum_in_blocks",
    "summed",
    "updated_places",
]


# -- A target's rows as output features: selected from a layer's output, or added to it --------------------------------


def index_tensor(target: Target, device: torch.device) -> Tensor:
    """Return the indices of a target's rows as a tensor. Do not write to it."""
    assert target.rows is not None
    return fixed_indices(tuple(target.rows.indices()), device)


def fixed_indices(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Return integers as a tensor. Do not write to it."""
    if device.type == "cpu" or torch.compiler.is_compiling():
        return torch.tensor(numbers, device=device)
    # A copy from the CPU would wait for the device in each pass, and is forbidden while a CUDA graph is captured.
    return cast(Tensor, load_backend("torch").fixed(_indices, numbers, device))


class _Indices(FixedArrays):
    """Integers on devices; keys are tuples of them."""

    def make(self, key: Any) -> np.ndarray:
        return np.asarray(key, dtype=np.int64)


_indices = _Indices()


def features_of(target: Target, features: Tensor) -> Tensor:
    """Select from ``(n, out)`` features those of the target's rows, in order."""
    if target.rows is None:
        return features
    if isinstance(target.rows, RowIndices):
        return features.index_select(1, index_tensor(target, features.device))
    rows, count = target.rows, features.shape[0]
    blocks = features.view(count, rows.count, rows.stride)[:, :, rows.start : rows.start + rows.length]
    return blocks.reshape(count, rows.count * rows.length)


def add_features(y: Tensor, target: Target, change: Tensor) -> Tensor:
    """Return an output with a change added to the features of the target's rows."""
    change = change.to(y.dtype)
    if target.rows is None:
        return y + change
    if isinstance(target.rows, RowIndices):
        return y.index_add(-1, index_tensor(target, y.device), change)
    rows = target.rows
    blocks = y.reshape(*y.shape[:-1], rows.count, rows.stride)
    stop = rows.start + rows.length
    middle = blocks[..., rows.start : stop] + change.reshape(*y.shape[:-1], rows.count, rows.length)
    return torch.cat([blocks[..., : rows.start], middle, blocks[..., stop:]], -1).reshape(y.shape)


def updated_places(target: Target, numbers: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the place of each row among the target's, and whether it is one of them (None if all are).

    Places of rows that are not among the target's are valid ones, of no meaning.

    Examples
    --------
    >>> places, there = updated_places(Target("embed", (9, 2), rows=RowIndices([4, 7])), torch.tensor([7, 5, 4]))
    >>> places[there].tolist(), there.tolist()
    ([1, 0], [True, False, True])
    """
    if target.rows is None:
        return numbers, None
    if isinstance(target.rows, RowIndices):
        known = index_tensor(target, numbers.device)
        places = torch.searchsorted(known, numbers).clamp_(max=len(known) - 1)
        return places, known[places] == numbers
    rows = target.rows
    offset = numbers % rows.stride - rows.start
    there = (offset >= 0) & (offset < rows.length)
    places = torch.div(numbers, rows.stride, rounding_mode="floor") * rows.length + offset
    return torch.where(there, places, 0), there


def overlap(one: Target, other: Target) -> bool:
    """Return whether two targets of one parameter have rows in common."""
    if one.index != other.index:
        return False
    if one.rows is None or other.rows is None:
        return True
    return not set(one.rows.indices()).isdisjoint(other.rows.indices())


# -- Low-rank updates by torch's own operations: small layers, and passes without gradients ----------------------------

# :class:`FactoredLinear` saves memory traffic in backward, at the price of a backward
# pass in Python. For a small layer the Python costs more than it saves. Where the factors have another dtype than the
# layer, as next to a base in half precision, a product of its own for each update is all there is.


#: Up to this many elements of the input and of the output, these operations take less time in forward and backward.
#: In backward they write the gradient of the input twice and add, where the other function accumulates in place.
MOST_ELEMENTS = 1 << 16


class LowRank(NamedTuple):
    """An update ``mixing * scale * left @ right.T``.

    Attributes
    ----------
    left : Tensor, shape (rows, width)
    right : Tensor, shape (cols, width)
    scale : float
    mixing : float
        The adapter's mixing weight, where it is not a part of the scale.
    """

    left: Tensor
    right: Tensor
    scale: float
    mixing: float = 1.0


def is_small(x: Tensor, weight: Tensor) -> bool:
    """Return whether a layer is so small that :func:`low_rank_linear` is the faster way with gradients, too."""
    out, cols = weight.shape
    given = x.numel()
    return given <= MOST_ELEMENTS and given * out <= MOST_ELEMENTS * cols


def low_rank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, changes: Sequence[LowRank]) -> Tensor:
    """Return ``x Wᵀ + b`` plus each update on all features; requires contiguous x, and one dtype and device."""
    rows = x if x.ndim == 2 else x.view(-1, x.shape[-1])
    y = functional.linear(rows, weight, bias)
    for left, right, scale, mixing in changes:
        y.addmm_(rows @ right, left.T, alpha=scale * mixing)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], y.shape[-1])


def mixed_low_rank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, changes: Sequence[LowRank]) -> Tensor:
    """Return ``x Wᵀ + b`` plus each update, computed in the dtype of its factors and rounded to that of x."""
    y = functional.linear(x, weight, bias)
    for left, right, scale, mixing in changes:
        # The operations of the general way, in its order: a product of both factors would round differently.
        change = functional.linear(functional.linear(x.to(left.dtype), right.T), left)
        change = change if scale == 1.0 else change * scale
        change = change if mixing == 1.0 else change * mixing
        y = y + change.to(y.dtype)
    return y


# -- Factored updates: ΔW is never formed ------------------------------------------------------------------------------

# ``y = x Wᵀ + b + s Σ z_t Lᵀ``, where L is the left factor of the last matrix of a term (the matrix itself if it is not
# factored). z is x times the right factor of the last matrix, multiplied by the other matrices of the Kronecker
# product, each along its mode. With one matrix per term, which is LoRA, z = x R. The sum is accumulated in place in y:
# no second array of that size is written.
#
# Between two maps, ``A (Σ …) Bᵀ`` as in MiSS, the products are with ``Bᵀ x`` in the place of x, and A maps the result.


def product(x: Tensor, factored: Factored, activation: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Return ``x ΔWᵀ`` by ordinary operations, with an optional nonlinearity between the two factors."""
    if factored.sides is not None and not x.is_nested:
        backend, (rows_of, cols_of) = load_backend("torch"), factored.sides
        inner = product(cols_of.adjoint(backend, x), factored._replace(sides=None))
        return cast(Tensor, rows_of.forward(backend, inner))
    if len(factored.terms[0]) == 1 and factored.terms[0][0].right is not None:
        ((last,),) = factored.terms
        inner = functional.linear(x, cast(Tensor, last.right).T)
        total = functional.linear(inner if activation is None else activation(inner), last.left)
    elif x.is_nested:
        # Rows of a nested tensor cannot be reshaped into modes.
        total = functional.linear(x, cast(Tensor, factored._replace(scale=1.0).dense(load_backend("torch"))))
    else:
        total = _kronecker(x, factored)
    return total if factored.scale == 1.0 else total * factored.scale


def _kronecker(x: Tensor, factored: Factored) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    several = [
        functional.linear(_middle(_inner(rows, term), rows.shape[0], term), term[-1].left) for term in factored.terms
    ]
    total = several[0]
    for one in several[1:]:
        total = total + one
    out = math.prod([matrix.left.shape[0] for matrix in factored.terms[0]])
    return total.reshape(*x.shape[:-1], out)


def _inner(rows: Tensor, term: Sequence[Matrix]) -> Tensor:
    """Return the rows of x times the right factor of the last matrix, along the fastest-varying mode of the columns."""
    last = term[-1]
    cols = last.left.shape[1] if last.right is None else last.right.shape[0]
    parts = rows.reshape(-1, cols)
    return parts if last.right is None else parts @ last.right


def _middle(inner: Tensor, count: int, term: Sequence[Matrix]) -> Tensor:
    """Apply the other matrices of the term, each along its mode, the first mode first."""
    # All sizes are explicit: with zero rows, reshape could not infer a -1.
    sizes = [matrix.left.shape[1] if matrix.right is None else matrix.right.shape[0] for matrix in term[:-1]]
    sizes.append(term[-1].left.shape[1])
    for place, matrix in enumerate(term[:-1]):
        # Axes: rows of x with the modes already done, this mode, and the remaining modes, which stay unchanged.
        stacked = inner.reshape(count, sizes[place], math.prod(sizes[place + 1 :]))
        if matrix.right is not None:
            stacked = torch.matmul(matrix.right.mT, stacked)
        inner = torch.matmul(matrix.left, stacked)
        count *= matrix.left.shape[0]
    return inner.reshape(count, sizes[-1])


def on_device(factored: Factored, device: torch.device) -> Factored:
    """Return the factors on a device."""
    terms = [
        [Matrix(m.left.to(device), None if m.right is None else m.right.to(device)) for m in term]
        for term in factored.terms
    ]
    return factored._replace(terms=terms)


class Branch(NamedTuple):
    """The structure of one update without its factors: target rows, scale, and which matrices of each term are whole.

    An autograd function takes tensors only as positional arguments, so the factors are passed flat, next to this.
    """

    target: Target
    scale: float
    terms: tuple[tuple[bool, ...], ...]
    sides: tuple[Map, Map] | None = None

    @property
    def output_map(self) -> Map | None:
        """The map of the products with the matrices; None for the identity."""
        return None if self.sides is None or self.sides[0].identity else self.sides[0]

    @property
    def input_map(self) -> Map | None:
        """The map whose adjoint is applied to x; None for the identity."""
        return None if self.sides is None or self.sides[1].identity else self.sides[1]

    def narrowed(self, rows: Tensor) -> Tensor:
        """Return what the matrices are multiplied by, given the rows of x."""
        map_ = self.input_map
        return rows if map_ is None else cast(Tensor, map_.adjoint(load_backend("torch"), rows))

    def gathered(self, tensors: Sequence[Tensor]) -> list[list[Matrix]]:
        """Rebuild the factors from a flat sequence of tensors."""
        found, rest = [], iter(tensors)
        for term in self.terms:
            found.append([Matrix(next(rest), None if is_whole else next(rest)) for is_whole in term])
        return found

    @property
    def number(self) -> int:
        """Number of tensors of the update."""
        return sum(1 if is_whole else 2 for term in self.terms for is_whole in term)


def factored_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, changes: Sequence[tuple[Target, Factored]]
) -> Tensor:
    """Return ``x Wᵀ + b`` plus each update on the features of its rows; requires :func:`can_fuse`."""
    if not torch.is_grad_enabled() or is_small(x, weight):
        updates = low_rank_updates(changes)
        if updates is not None:
            return low_rank_linear(x, weight, bias, updates)
    branches, tensors = [], list[Tensor]()
    for target, factored in changes:
        shape = tuple(tuple(matrix.right is None for matrix in term) for term in factored.terms)
        branches.append(Branch(target, factored.scale, shape, factored.sides))
        tensors += [tensor for term in factored.terms for matrix in term for tensor in matrix if tensor is not None]
    if torch.is_grad_enabled():
        return cast(Tensor, FactoredLinear.apply(x, weight, bias, tuple(branches), *tensors)[0])  # type: ignore[no-untyped-call]
    return _forward(x, weight, bias, branches, tensors)[0]


def low_rank_updates(changes: Sequence[tuple[Target, Factored]]) -> list[LowRank] | None:
    """Return updates as low-rank matrices where each is one, of a whole weight, as LoRA's is; else None."""
    found = []
    for target, factored in changes:
        terms = factored.terms
        if target.rows is not None or factored.sides is not None or len(terms) != 1 or len(terms[0]) != 1:
            return None
        left, right = terms[0][0]
        if right is None:
            return None
        found.append(LowRank(left, right, factored.scale))
    return found


def can_fuse(x: Tensor, weight: Tensor, changes: Sequence[tuple[Target, Factored]]) -> bool:
    """Return whether all tensors share dtype and device, and no trace or mode intercepts single operations."""
    if torch.compiler.is_compiling() or in_functorch() or in_dispatch_mode():
        return False
    if any(isinstance(target.rows, RowIndices) for target, _ in changes):
        return False  # of these features there is no view to accumulate in
    if x.is_nested or x.ndim == 0 or x.device.type == "meta" or torch.is_autocast_enabled(x.device.type):
        return False
    if not x.is_contiguous():
        return False  # with other strides torch sums products in another order, so rounding would differ
    tensors = [t for _, factored in changes for term in factored.terms for matrix in term for t in matrix]
    return all(t is None or (t.dtype, t.device) == (x.dtype, x.device) for t in [weight, *tensors])


class FactoredLinear(torch.autograd.Function):
    """The layer with its updates.

    The products of x with the right factors, which backward needs, are additional outputs: that keeps the function
    differentiable twice.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, branches: Sequence[Branch], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        y, kept = _forward(x, weight, bias, branches, tensors)
        ctx.branches, ctx.number, ctx.device = branches, len(tensors), x.device.type
        ctx.save_for_backward(x, weight, *tensors, *kept)
        ctx.set_materialize_grads(False)
        return y, *kept

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # The forward pass had a single dtype (see can_fuse), so backward must not be autocast either.
        with torch.autocast(ctx.device, enabled=False):
            return FactoredLinear._gradients(ctx, grads)

    @staticmethod
    def _gradients(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        x, weight, *rest = ctx.saved_tensors
        tensors, kept = rest[: ctx.number], iter(rest[ctx.number :])
        need_x, need_weight, need_bias, _, *needed = ctx.needs_input_grad
        rows = x.reshape(-1, x.shape[-1])
        found: list[Tensor | None] = [None] * (4 + len(tensors))
        moved: Tensor | None = None
        features: Tensor | None = None
        if grads[0] is not None:
            features = grads[0].reshape(-1, grads[0].shape[-1])
            moved = features @ weight if need_x else None
            found[1] = features.T @ rows if need_weight else None
            found[2] = features.sum(0) if need_bias else None
        elif need_x:
            moved = torch.zeros_like(rows)
        extra, at = iter(grads[1:]), 4
        for branch, own in _shared_out(ctx.branches, tensors):
            part = None if features is None else _part(branch.target, features)
            output_map, input_map = branch.output_map, branch.input_map
            if part is not None and output_map is not None:
                part = output_map.adjoint(load_backend("torch"), part.reshape(len(rows), -1))
            narrow, own_moved = branch.narrowed(rows), moved
            if moved is not None and input_map is not None:
                own_moved = torch.zeros_like(narrow)
            for term in branch.gathered(own):
                inner, given = (next(kept), next(extra)) if _is_kept(term) else (None, None)
                wanted = needed[at - 4 : at - 4 + sum(1 + (matrix.right is not None) for matrix in term)]
                several = _term_vjp(branch.scale, term, narrow, part, inner, given, own_moved, wanted)
                for tensor, wants in zip(several, wanted, strict=True):
                    found[at] = tensor if wants else None
                    at += 1
            if moved is not None and input_map is not None:
                moved.add_(input_map.forward(load_backend("torch"), own_moved))
        found[0] = None if moved is None else moved.view(x.shape)
        return tuple(found)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, branches: Sequence[Branch], tensors: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Return the output, and the product of x with the right factor for each term that has one."""
    rows = x.reshape(-1, x.shape[-1])
    y, kept = functional.linear(rows, weight, bias), []
    for branch, own in _shared_out(branches, tensors):
        part, narrow = _part(branch.target, y), branch.narrowed(rows)
        output_map = branch.output_map
        total = part if output_map is None else rows.new_zeros((len(rows), output_map.n_in))
        for term in branch.gathered(own):
            inner = _inner(narrow, term)
            if _is_kept(term):
                kept.append(inner)
            _accumulate(total, _middle(inner, rows.shape[0], term), term[-1].left, branch.scale)
        if output_map is not None:
            part.add_(output_map.forward(load_backend("torch"), total).view(part.shape))
    y = y.view(*x.shape[:-1], y.shape[-1])
    # The same numbers as a tensor that is no view: autograd forbids in-place writes to views from a custom function.
    return torch.ops.aten._unsafe_view.default(y, y.shape) if y._is_view() else y, kept


def _term_vjp(
    scale: float,
    term: Sequence[Matrix],
    rows: Tensor,
    part: Tensor | None,
    inner: Tensor | None,
    given: Tensor | None,
    moved: Tensor | None,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Return the gradients of a term's tensors, in order; the gradient of x is added to ``moved`` in place.

    Those that are not needed may be None.
    """
    found: list[Tensor | None] = []
    last, others = term[-1], term[:-1]
    pulled = given
    of_left: Tensor | None = None
    of_others: tuple[Tensor | None, ...] = ()
    if part is not None:
        if inner is None:
            inner = _inner(rows, term)
        flat = [tensor for matrix in others for tensor in matrix if tensor is not None]

        def through(inner: Tensor, *tensors: Tensor) -> Tensor:
            rest = iter(tensors)
            before = [Matrix(next(rest), None if matrix.right is None else next(rest)) for matrix in others]
            return _middle(inner, rows.shape[0], [*before, last])

        if others and not any(needed[: len(flat)]):  # the start that is subtracted
            z, pull = cast(Any, torch.func.vjp(lambda inner: through(inner, *flat), inner))
        else:
            z, pull = cast(Any, torch.func.vjp(through, inner, *flat)) if others else (inner, None)
        features = part.reshape(-1, last.left.shape[0])
        of_z = features @ last.left
        of_left = (z.T @ features).T if needed[len(flat)] else None
        if scale != 1.0:
            of_z, of_left = of_z * scale, None if of_left is None else of_left * scale
        of_inner = of_z
        of_others = (None,) * len(flat)
        if pull is not None:
            of_inner, *rest_of = pull(of_z)
            of_others = tuple(rest_of) or of_others
        pulled = of_inner if pulled is None else pulled + of_inner
    found += of_others if part is not None else [None] * sum(1 + (m.right is not None) for m in others)
    found.append(of_left)
    cols = last.left.shape[1] if last.right is None else last.right.shape[0]
    if last.right is not None:
        found.append(None if pulled is None or not needed[-1] else (pulled.T @ rows.reshape(-1, cols)).T)
    if moved is not None and pulled is not None:
        if last.right is None:
            moved.view(-1, cols).add_(pulled)
        else:
            moved.view(-1, cols).addmm_(pulled, last.right.T)
    return found


def _is_kept(term: Sequence[Matrix]) -> bool:
    """Return whether the product of x with the right factor is saved: if there is one, the product is narrow."""
    return term[-1].right is not None


def _shared_out(branches: Sequence[Branch], tensors: Sequence[Tensor]) -> list[tuple[Branch, Sequence[Tensor]]]:
    found, start = [], 0
    for branch in branches:
        found.append((branch, tensors[start : start + branch.number]))
        start += branch.number
    return found


def _part(target: Target, features: Tensor) -> Tensor:
    """Return a view of the target's features in ``(n, out)``: ``(n, rows)`` or ``(n, blocks, rows per block)``."""
    if target.rows is None:
        return features
    rows = target.rows
    assert isinstance(rows, Rows)  # ensured by can_fuse
    blocks = features.view(features.shape[0], rows.count, rows.stride)[:, :, rows.start : rows.start + rows.length]
    return blocks[:, 0] if rows.count == 1 else blocks


def _accumulate(part: Tensor, z: Tensor, left: Tensor, scale: float) -> None:
    """Compute ``part += scale * z leftᵀ`` in place; several rows of z may form one row of ``part``."""
    if part.is_contiguous() or (part.ndim == 2 and len(z) == len(part)):
        part.view(len(z), left.shape[0]).addmm_(z, left.T, alpha=scale)
    else:
        part.add_((z @ left.T).view(part.shape), alpha=scale)


# -- The sum of a weight in half precision and ΔW in float32, in blocks, rounded once ----------------------------------


#: Elements that are summed at a time: the float32 sums of a block stay in the cache.
BLOCK = 1 << 17


def can_sum_in_blocks(stored: Tensor, target: Target, delta: Tensor) -> bool:
    """Return whether :func:`sum_in_blocks` computes the sum: no gradient passes through it, and nothing watches it."""
    if stored.dtype not in (torch.bfloat16, torch.float16) or delta.dtype != torch.float32:
        return False
    if target.rows is not None or target.transposed or stored.device.type != "cpu" or delta.device.type != "cpu":
        return False
    if torch.is_grad_enabled() and (stored.requires_grad or delta.requires_grad):
        return False
    if torch.compiler.is_compiling() or in_functorch() or in_dispatch_mode():
        return False
    return stored.is_contiguous() and delta.is_contiguous() and stored.numel() == delta.numel() > BLOCK


def sum_in_blocks(stored: Tensor, delta: Tensor) -> Tensor:
    """Return ``(stored.float() + delta).to(stored.dtype)``; requires :func:`can_sum_in_blocks`.

    The plain expression writes two arrays of four bytes an element, whose memory is new from the system at each call.
    """
    total = torch.empty_like(stored)
    with torch.no_grad():
        parts = zip(*(torch.split(tensor.reshape(-1), BLOCK) for tensor in (total, stored, delta)), strict=True)
        for out, weight, change in parts:
            out.copy_(weight.float().add_(change))
    return total


# -- A linear layer on W + ΔW, recomputed in backward instead of saved -------------------------------------------------

# Written with ordinary operations, ``F.linear(x, W + ΔW)`` would save the sum of every layer until backward: the memory
# of a second model. ΔW is cheap to compute from its arrays, so only these are saved. The custom function also reuses
# memory: the sum is computed in the buffer of ΔW, and the gradient of ΔW in the buffer of the sum.
#
# Invariants of the buffers: ``_summed_in_place`` overwrites ΔW only where ΔW was computed for this call and shares no
# storage with a parameter. In backward the order is fixed: ΔW, then W + ΔW in its buffer, then the gradient with
# respect to x, and only then the gradient of ΔW, which overwrites the sum. A buffer that is written to is never saved,
# and none is reused where someone may still look at it (``once`` in ``backward``).


class DeltaSource(NamedTuple):
    """The source of the update of a target's rows.

    Attributes
    ----------
    target : Target
        The rows that are updated.
    made : Slice or None
        Computes the update, ``(rows, cols)``, from ``number`` arrays; None where the single array given is the update
        itself.
    number : int
    weight : float
        Factor of an update that is computed here.
    """

    target: Target
    made: Slice | None = None
    number: int = 1
    weight: float = 1.0


def summed(stored: Tensor, changes: Sequence[tuple[Target, Tensor]]) -> Tensor:
    """Return the stored weight plus the updates of its rows, summed in the wider dtype and rounded once."""
    if len(changes) == 1 and can_sum_in_blocks(stored, *changes[0]):
        return sum_in_blocks(stored, changes[0][1])
    kind = stored.dtype
    for _, delta in changes:
        kind = torch.promote_types(kind, delta.dtype)
    total, own = stored.to(kind), kind != stored.dtype
    for target, delta in changes:
        delta = delta.to(stored.device)
        if target.rows is None:
            total, own = total + (delta.T if target.transposed else delta.reshape(stored.shape)), True
            continue
        if isinstance(target.rows, RowIndices):
            axis = 1 if target.transposed else 0
            change = (delta.T if target.transposed else delta.reshape(-1, *stored.shape[1:])).to(kind)
            total, own = total.index_add(axis, index_tensor(target, stored.device), change), True
            continue
        # Only the target's rows are written, so the other rows keep their exact bits. In a channels_last weight the
        # block would be a copy instead of a view, hence the contiguous clone.
        if in_functorch():
            # Under vmap the update may have a batch dimension that the weight lacks. What new_ones returns has it, and
            # so has a selection by it, which is a copy.
            total, own = torch.where(delta.new_ones((), dtype=torch.bool), total, total), True
        elif not own or not total.is_contiguous():
            total, own = total.clone(memory_format=torch.contiguous_format), True
        target.block(total).add_(target.like_block(delta))
    return total.to(stored.dtype)


def _summed_in_place(stored: Tensor, changes: Sequence[tuple[Target, Tensor]], arrays: Sequence[Tensor]) -> Tensor:
    """Return the same sum, computed in the buffer of the update where possible; the update is then overwritten."""
    target, delta = changes[0]
    alike = (delta.dtype, delta.device, delta.shape) == (stored.dtype, stored.device, stored.shape)
    if len(changes) > 1 or not alike or target.rows is not None or target.transposed or not delta.is_contiguous():
        return summed(stored, changes)
    memory = delta.untyped_storage()._cdata
    if any(array.untyped_storage()._cdata == memory for array in arrays):
        return summed(stored, changes)  # a dense update is a view of its parameters
    return delta.add_(stored)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x Wᵀ + b`` for a custom function to return: no view.

    For batched x the output of ``functional.linear`` is one, and autograd forbids writes in place to a view created
    inside a custom function, as by an inplace ReLU after the layer.
    """
    y = functional.linear(x, weight, bias)
    return cast(Tensor, torch.ops.aten._unsafe_view.default(y, y.shape)) if y._is_view() else y


class MergedWeightLinear(torch.autograd.Function):
    """``x (W + ΔW)ᵀ + b``; backward recomputes the sum, and ΔW if it is computed here, instead of saving them.

    Do not use it where :func:`in_functorch` or :func:`in_dispatch_mode` returns True.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sources: Sequence[DeltaSource], *arrays: Tensor
    ) -> Tensor:
        ctx.sources = sources
        ctx.save_for_backward(x, weight, *arrays)
        changes = []
        for source, own in _with_arrays(sources, arrays):
            delta = own[0] if source.made is None else source.made(*own)
            changes.append((source.target, delta if source.weight == 1.0 else delta * source.weight))
        return linear(x, _summed_in_place(weight, changes, arrays), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *arrays = ctx.saved_tensors
        need_x, need_weight, need_bias, _, *needed = ctx.needs_input_grad
        # Under autocast the output and its gradient have the lower precision, and so have these products.
        rows = grads[0].reshape(-1, grads[0].shape[-1])
        inputs = x.reshape(-1, x.shape[-1]).to(rows.dtype)
        # Buffers are reused only if no one needs the intermediate results again: not where this backward pass is
        # itself differentiated (create_graph=True) or batched (vmap).
        batched = torch._C._functorch.is_legacy_batchedtensor(grads[0])
        once = not torch.is_grad_enabled() and not in_functorch() and not batched
        changes: list[tuple[Target, Tensor]] = []
        pulls: list[Callable[[Tensor], Sequence[Tensor | None]] | None] = []
        start = 0
        for source, own in _with_arrays(ctx.sources, arrays):
            delta, pull = _recompute_vjp(source, own, needed[start : start + source.number], once)
            changes.append((source.target, delta))
            pulls.append(pull)
            start += source.number
        kinds = [delta.dtype for _, delta in changes]
        found: list[Tensor | None] = [None] * 4
        scratch: Tensor | None = None
        if need_x:
            total = _summed_in_place(weight, changes, arrays) if once else summed(weight, changes)
            found[0] = (rows @ total.to(rows.dtype)).to(x.dtype).view(x.shape)
            scratch = total if once and total.dtype == rows.dtype else None
        del changes
        whole = rows.T @ inputs if need_weight else None
        found[1] = None if whole is None else whole.to(weight.dtype)
        for source, pull, kind in zip(ctx.sources, pulls, kinds, strict=True):
            if pull is None:
                found += [None] * source.number
            elif whole is not None:
                found += pull(source.target.select(whole).to(kind))
            elif scratch is not None and scratch.shape == source.target.shape and scratch.is_contiguous():
                # The sum is no longer needed: its buffer is warm in the cache, and reusing it saves an allocation.
                found += pull(torch.mm(rows.T, inputs, out=scratch).to(kind))
                scratch = None
            else:
                found += pull((features_of(source.target, rows).T @ inputs).to(kind))
        if need_bias:
            found[2] = rows.sum(0)
        return tuple(found)


def _with_arrays(
    sources: Sequence[DeltaSource], arrays: Sequence[Tensor]
) -> list[tuple[DeltaSource, Sequence[Tensor]]]:
    """Pair each source with its arrays."""
    found, start = [], 0
    for source in sources:
        found.append((source, arrays[start : start + source.number]))
        start += source.number
    return found


def _recompute_vjp(
    source: DeltaSource, arrays: Sequence[Tensor], needed: Sequence[bool], once: bool
) -> tuple[Tensor, Callable[[Tensor], Sequence[Tensor | None]] | None]:
    """Recompute the update; also return the function from its gradient to those of the arrays (None if none needed)."""
    if source.made is None:
        return arrays[0], (lambda moved: [moved]) if needed[0] else None
    made, weight = source.made, source.weight
    wanted = [index for index, need in enumerate(needed) if need]

    def of(*moved: Tensor) -> Tensor:
        given = list(arrays)
        for index, array in zip(wanted, moved, strict=True):
            given[index] = array
        delta = made(*given)
        return delta if weight == 1.0 else delta * weight

    if not wanted:
        return of(), None
    if once:
        delta, pulled = _recompute_vjp_once(made, weight, arrays, wanted)
    else:
        delta, pulled = cast(Any, torch.func.vjp(of, *(arrays[index] for index in wanted)))

    def pull(moved: Tensor) -> list[Tensor | None]:
        result: list[Tensor | None] = [None] * len(arrays)
        for index, part in zip(wanted, pulled(moved), strict=True):
            result[index] = part
        return result

    return delta, pull


def _recompute_vjp_once(
    made: Slice, weight: float, arrays: Sequence[Tensor], wanted: Sequence[int]
) -> tuple[Tensor, Callable[[Tensor], Sequence[Tensor]]]:
    """Do what torch.func.vjp does, for a single use: a third of its overhead, and no memory beyond the update's."""
    # A separate graph from detached leaves to the update: autograd.grad stops at these leaves.
    given = list(arrays)
    for index in wanted:
        given[index] = arrays[index].detach().requires_grad_()
    leaves = [given[index] for index in wanted]
    with torch.enable_grad():
        outer = made.outer(*given)
        if outer is not None:
            return outer_vjp_once(outer, made.shape, weight, leaves)
        factors = made.factors(*given)
        if factors is None:
            value = made(*given)
            value = value if weight == 1.0 else value * weight
            return value.detach(), lambda moved: torch.autograd.grad(value, leaves, moved)
    # The update is a contiguous run of elements of left @ right (a slice of a group's matrix, which may begin in the
    # middle of a row). The product is differentiated by hand below, in the buffer that holds it.
    left, right, first = factors
    scratch = torch.mm(left.detach(), right.detach())
    if weight != 1.0:
        scratch.mul_(weight)
    flat = scratch.view(-1)
    stop = first + made.size
    delta = flat[first:stop].view(made.shape)

    def pull(moved: Tensor) -> Sequence[Tensor]:
        # The gradient replaces the update inside the buffer of the whole product.
        if moved.data_ptr() != delta.data_ptr():
            delta.copy_(moved)
        # The rest of the product is not part of the update: its gradient is zero.
        flat[:first].zero_()
        flat[stop:].zero_()
        if weight != 1.0:
            scratch.mul_(weight)
        outputs, gradients = [], []
        if left.requires_grad:
            outputs.append(left)
            # In this form the long sides of both operands are contiguous: it takes a quarter of the time.
            gradients.append((right.detach().contiguous() @ scratch.T).T)
        if right.requires_grad:
            outputs.append(right)
            gradients.append(left.detach().T @ scratch)
        return torch.autograd.grad(outputs, leaves, gradients)

    return delta, pull
