"""A linear layer with factored updates: ΔW is never formed.

``y = x Wᵀ + b + s Σ z_t Lᵀ``, where L is the left factor of the last matrix of a term (the matrix itself if it is not
factored). z is x times the right factor of the last matrix, multiplied by the other matrices of the Kronecker product,
each along its mode. With one matrix per term, which is LoRA, z = x R. The sum is accumulated in place in y: no second
array of that size is written.

Between two maps, ``A (Σ …) Bᵀ`` as in MiSS, the products are with ``Bᵀ x`` in the place of x, and A maps the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional

from tnadapt.algebra.factoring import Factored, Matrix
from tnadapt.algebra.maps import Map
from tnadapt.backends import load_backend
from tnadapt.targets.target import RowIndices, Rows, Target

from ._interception import in_dispatch_mode, in_functorch
from ._low_rank_linear import LowRank, is_small, low_rank_linear

__all__ = ["Branch", "FactoredLinear", "can_fuse", "factored_linear", "low_rank_updates", "on_device", "product"]


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
