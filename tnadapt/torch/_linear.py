"""A linear layer with updates as factors, which never forms ΔW; and the output features of a target's rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tnadapt.algebra.factoring import Factored, Matrix
from tnadapt.algebra.maps import Map
from tnadapt.backends import FixedArrays, load_backend
from tnadapt.targets.target import RowIndices, Rows, Target

from ._delta import in_dispatch_mode, in_functorch, plain_vjp, recomputed, reuses_buffers

__all__ = [
    "MOST_ELEMENTS",
    "LowRank",
    "add_features",
    "can_fuse",
    "factored_linear",
    "features_of",
    "fixed_indices",
    "index_tensor",
    "is_ordinary",
    "is_small",
    "low_rank_linear",
    "low_rank_updates",
    "mixed_low_rank_linear",
    "on_device",
    "overlap",
    "product",
    "unaliased",
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
    >>> places, is_updated = updated_places(Target("embed", (9, 2), rows=RowIndices([4, 7])), torch.tensor([7, 5, 4]))
    >>> places[is_updated].tolist(), is_updated.tolist()
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
    is_updated = (offset >= 0) & (offset < rows.length)
    places = torch.div(numbers, rows.stride, rounding_mode="floor") * rows.length + offset
    return torch.where(is_updated, places, 0), is_updated


def overlap(one: Target, other: Target) -> bool:
    """Return whether two targets of one parameter have rows in common."""
    if one.index != other.index:
        return False
    if one.rows is None or other.rows is None:
        return True
    return not set(one.rows.indices()).isdisjoint(other.rows.indices())


# -- Low-rank updates by torch's own operations: small layers, and passes without gradients ----------------------------

# :class:`FactoredLinear` saves memory traffic in backward, at the price of a backward pass in Python. For a small layer
# the Python costs more than it saves. Where the factors have another dtype than the layer, as next to a base in half
# precision, a product of its own for each update is all there is.


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
    elements = x.numel()
    return elements <= MOST_ELEMENTS and elements * out <= MOST_ELEMENTS * cols


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
    for product in several[1:]:
        total = total + product
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


def factored_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, changes: Sequence[tuple[Target, Factored]]
) -> Tensor:
    """Return ``x Wᵀ + b`` plus each update on the features of its rows; requires :func:`can_fuse`."""
    if not torch.is_grad_enabled() or is_small(x, weight):
        updates = low_rank_updates(changes)
        if updates is not None:
            return low_rank_linear(x, weight, bias, updates)
    layer = FactoredLinear(changes)
    tensors = [tensor for _, factored in changes for term in factored.terms for matrix in term for tensor in matrix]
    if torch.is_grad_enabled():
        return recomputed(layer, x, weight, bias, *tensors)
    return layer(x, weight, bias, *tensors)


def low_rank_updates(changes: Sequence[tuple[Target, Factored]]) -> list[LowRank] | None:
    """Return updates as low-rank matrices where each is one, of a whole weight, as LoRA's is; else None."""
    updates = []
    for target, factored in changes:
        terms = factored.terms
        if target.rows is not None or factored.sides is not None or len(terms) != 1 or len(terms[0]) != 1:
            return None
        left, right = terms[0][0]
        if right is None:
            return None
        updates.append(LowRank(left, right, factored.scale))
    return updates


def is_ordinary(x: Tensor) -> bool:
    """Return whether no trace, mode or autocast intercepts single operations on an input with rows in memory order."""
    # With other strides torch sums products in another order, so that rounding would differ.
    if x.is_nested or x.ndim == 0 or x.is_meta or not x.is_contiguous():
        return False
    # A constant where possible: the name of the device takes longer than the answer.
    if torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type) or torch.compiler.is_compiling():
        return False
    return not in_functorch() and not in_dispatch_mode()


def can_fuse(x: Tensor, weight: Tensor, changes: Sequence[tuple[Target, Factored]]) -> bool:
    """Return whether all tensors share dtype and device; of an input that :func:`is_ordinary`."""
    if any(isinstance(target.rows, RowIndices) for target, _ in changes):
        return False  # of these features there is no view to accumulate in
    tensors = [t for _, factored in changes for term in factored.terms for matrix in term for t in matrix]
    return all(t is None or (t.dtype, t.device) == (x.dtype, x.device) for t in [weight, *tensors])


class FactoredLinear:
    """The layer with its updates as a :class:`~tnadapt.torch._delta.Function` of x, W, b and all factors.

    Parameters
    ----------
    changes : sequence of (Target, Factored)
        Of which the factors are not kept.
    """

    keeps = "inputs"

    def __init__(self, changes: Sequence[tuple[Target, Factored]]) -> None:
        self._forms = [
            (target, factored._replace(terms=[]), [len(term) for term in factored.terms])
            for target, factored in changes
        ]

    def _changes(self, tensors: Sequence[Any]) -> Iterator[tuple[Target, Factored]]:
        rest = iter(tensors)
        for target, form, sizes in self._forms:
            terms = [[Matrix(next(rest), next(rest)) for _ in range(size)] for size in sizes]
            yield target, form._replace(terms=terms)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, *tensors: Any) -> Tensor:
        """Return the output; each update is accumulated in place."""
        rows = x.reshape(-1, x.shape[-1])
        y = functional.linear(rows, weight, bias)
        for target, factored in self._changes(tensors):
            part, output_map = _part(target, y), _mapped(factored, 0)
            total = part if output_map is None else rows.new_zeros((len(rows), output_map.n_in))
            narrow = _narrowed(rows, factored)
            for term in factored.terms:
                z = _middle(_inner(narrow, term), len(rows), term)
                _accumulate(total, z, term[-1].left, factored.scale)
            if output_map is not None:
                part.add_(output_map.forward(load_backend("torch"), total).view(part.shape))
        return unaliased(y.view(*x.shape[:-1], y.shape[-1]))

    def plain(self, x: Tensor, weight: Tensor, bias: Tensor | None, *tensors: Any) -> Tensor:
        """Return the same by ordinary operations."""
        y = functional.linear(x, weight, bias)
        for target, factored in self._changes(tensors):
            y = add_features(y, target, product(x, factored))
        return y

    def vjp(self, inputs: Sequence[Any], wanted: Sequence[int], gradient: Tensor) -> Sequence[Tensor | None]:
        """Return the gradients of the wanted inputs, given that of the output; that of x is accumulated in place."""
        # The forward pass had a single dtype (see can_fuse), so backward must not be autocast either.
        with torch.autocast(gradient.device.type, enabled=False):
            if not reuses_buffers(gradient):
                return plain_vjp(self.plain, inputs, wanted, gradient)
            x, weight, _, *tensors = inputs
            rows, features = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
            x_gradient = features @ weight if 0 in wanted else None
            gradients = {
                0: None if x_gradient is None else x_gradient.view(x.shape),
                1: features.T @ rows if 1 in wanted else None,
                2: features.sum(0) if 2 in wanted else None,
            }
            for target, factored in self._changes(tensors):
                part, narrow, narrow_gradient = _part(target, features), _narrowed(rows, factored), x_gradient
                output_map, input_map = _mapped(factored, 0), _mapped(factored, 1)
                if output_map is not None:
                    part = output_map.adjoint(load_backend("torch"), part.reshape(len(rows), -1))
                if x_gradient is not None and input_map is not None:
                    narrow_gradient = torch.zeros_like(narrow)
                for term in factored.terms:
                    at, stop = len(gradients), len(gradients) + 2 * len(term)
                    needed = [index in wanted for index in range(at, stop)]
                    gradients.update(
                        enumerate(_term_vjp(factored.scale, term, narrow, part, narrow_gradient, needed), at)
                    )
                if x_gradient is not None and input_map is not None:
                    x_gradient.add_(input_map.forward(load_backend("torch"), narrow_gradient))
            return [gradients[index] for index in wanted]


def _mapped(factored: Factored, side: int) -> Map | None:
    """Return the map of the products with the matrices (0), or the one whose adjoint is applied to x (1), if any."""
    return None if factored.sides is None or factored.sides[side].identity else factored.sides[side]


def _narrowed(rows: Tensor, factored: Factored) -> Tensor:
    """Return what the matrices are multiplied by, given the rows of x."""
    input_map = _mapped(factored, 1)
    return rows if input_map is None else cast(Tensor, input_map.adjoint(load_backend("torch"), rows))


def _term_vjp(
    scale: float, term: Sequence[Matrix], rows: Tensor, part: Tensor, moved: Tensor | None, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of a term's tensors, in order; the gradient of x is added to ``moved`` in place."""
    *others, last = term
    inner = _inner(rows, term)
    features = part.reshape(-1, last.left.shape[0])
    of_z = _times(features @ last.left, scale)
    z, of_inner, of_others = inner, of_z, list[Tensor | None]()
    if others:
        inner = inner.detach().requires_grad_()
        flat = [
            None if tensor is None else tensor.detach().requires_grad_(need)
            for tensor, need in zip([tensor for matrix in others for tensor in matrix], needed, strict=False)
        ]
        with torch.enable_grad():
            before = [Matrix(cast(Tensor, left), right) for left, right in zip(flat[::2], flat[1::2], strict=True)]
            z = _middle(inner, len(rows), [*before, last])
        leaves = [tensor for tensor in flat if tensor is not None and tensor.requires_grad]
        of_inner, *gradients = torch.autograd.grad(z, [inner, *leaves], of_z)
        of_others = [gradients.pop(0) if need else None for need in needed[:-2]]
        z = z.detach()
    of_left = _times((z.T @ features).T, scale) if needed[-2] else None
    cols = last.left.shape[1] if last.right is None else last.right.shape[0]
    of_right = (of_inner.T @ rows.reshape(-1, cols)).T if last.right is not None and needed[-1] else None
    if moved is not None:
        if last.right is None:
            moved.view(-1, cols).add_(of_inner)
        else:
            moved.view(-1, cols).addmm_(of_inner, last.right.T)
    return [*of_others, of_left, of_right]


def _times(tensor: Tensor, scale: float) -> Tensor:
    return tensor if scale == 1.0 else tensor * scale


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


def unaliased(y: Tensor) -> Tensor:
    """Return the same numbers as no view: autograd forbids writes in place to a view made in a custom function."""
    return cast(Tensor, torch.ops.aten._unsafe_view.default(y, y.shape)) if y._is_view() else y
