"""How a layer uses an update: by its factors, or by W', which is recomputed in backward instead of saved.

The first half never forms ΔW: low-rank matrices by torch's own operations, and :class:`FactoredLinear`.

In the second half :func:`updated` forms W', by ordinary operations. :class:`UpdatedWeight` does so as one autograd
node, together with the operation that multiplies by W': a linear layer, a convolution, or none, for a stack of experts.
With ordinary operations, a layer would save W' until backward: the memory of a second model. ΔW is cheap to compute
from its arrays, so only these are saved.

The node also reuses memory: W + ΔW is computed in the buffer of ΔW, and its gradient in the buffer of the sum. A buffer
that is written to is never saved, and none is reused while other code may still read it
(:func:`~tnadapt.torch._delta.reuses_buffers`).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from tnadapt.algebra.applying import Applying
from tnadapt.algebra.factoring import Factored, Matrix
from tnadapt.algebra.maps import Map
from tnadapt.backends import FixedArrays, load_backend
from tnadapt.targets.target import RowIndices, Rows, Target

from . import _delta
from ._delta import Function, Pull, Slice, in_functorch, recomputed, reuses_buffers, traced, wide_pair

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
    return _part(target, features).reshape(features.shape[0], target.rows.count * target.rows.length)


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
        # The operations and order of the general path: a product of both factors would round differently.
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
# Between two maps, ``A (Σ …) Bᵀ`` as in MiSS, ``Bᵀ x`` takes the place of x in the products, and A maps the result.


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
    out = math.prod([matrix.left.shape[0] for matrix in factored.terms[0]])
    return functools.reduce(torch.add, several).reshape(*x.shape[:-1], out)


def _inner(rows: Tensor, term: Sequence[Matrix]) -> Tensor:
    """Return the rows of x times the right factor of the last matrix, along the fastest-varying mode of the columns."""
    last = term[-1]
    cols = last.left.shape[1] if last.right is None else last.right.shape[0]
    parts = rows.reshape(-1, cols)
    return parts if last.right is None else parts @ last.right


def _middle(inner: Tensor, count: int, term: Sequence[Matrix]) -> Tensor:
    """Apply the other matrices of the term, each along its mode, starting with the first."""
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
    layer, tensors = FactoredLinear(changes), _tensors(changes)
    if torch.is_grad_enabled():
        return recomputed(layer, x, weight, bias, *tensors)
    return layer(x, weight, bias, *tensors)


def _tensors(changes: Sequence[tuple[Target, Factored]]) -> list[Tensor | None]:
    return [tensor for _, factored in changes for term in factored.terms for matrix in term for tensor in matrix]


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
    # With other strides torch sums products in another order, which rounds differently.
    if x.is_nested or x.ndim == 0 or x.is_meta or not x.is_contiguous():
        return False
    # A constant where possible: looking up the device's name takes longer than the test itself.
    if torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type) or torch.compiler.is_compiling():
        return False
    return not in_functorch() and not _delta.in_dispatch_mode()


def can_fuse(x: Tensor, weight: Tensor, changes: Sequence[tuple[Target, Factored]]) -> bool:
    """Return whether all tensors share dtype and device; of an input that :func:`is_ordinary`."""
    if any(isinstance(target.rows, RowIndices) for target, _ in changes):
        return False  # these features have no view to accumulate in
    tensors = [weight, *_tensors(changes)]
    return all(tensor is None or (tensor.dtype, tensor.device) == (x.dtype, x.device) for tensor in tensors)


class FactoredLinear(Function):
    """The layer with its updates as a function of x, W, b and all factors.

    Parameters
    ----------
    changes : sequence of (Target, Factored)
        Of which the factors are not kept.
    """

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
                return _delta.plain_vjp(self.plain, inputs, wanted, gradient)
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
    """Return the map of the products with the matrices (side 0), or the one whose adjoint maps x (side 1), if any."""
    return None if factored.sides is None or factored.sides[side].identity else factored.sides[side]


def _narrowed(rows: Tensor, factored: Factored) -> Tensor:
    """Return the rows that the matrices multiply, given the rows of x."""
    input_map = _mapped(factored, 1)
    return rows if input_map is None else cast(Tensor, input_map.adjoint(load_backend("torch"), rows))


def _term_vjp(
    scale: float, term: Sequence[Matrix], rows: Tensor, part: Tensor, moved: Tensor | None, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of a term's tensors, in order, and add the gradient of x to ``moved`` in place."""
    *others, last = term
    inner = _inner(rows, term)
    features = part.reshape(-1, last.left.shape[0])
    of_z = _times(features @ last.left, scale)
    z, of_inner, of_others = inner, of_z, list[Tensor | None]()
    if others:
        tensors = [inner, *(tensor for matrix in others for tensor in matrix)]
        wanted = [0, *(place for place, need in enumerate(needed[:-2], 1) if need)]
        (inner, *tensors), leaves = _delta.leaves_of(tensors, wanted)
        before = [Matrix(left, right) for left, right in zip(tensors[::2], tensors[1::2], strict=True)]
        with torch.enable_grad():
            z = _middle(inner, len(rows), [*before, last])
        of_inner, *gradients = torch.autograd.grad(z, leaves, of_z)
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
    """Compute ``part += scale * z leftᵀ`` in place, where several rows of z may form one row of ``part``."""
    if part.is_contiguous() or (part.ndim == 2 and len(z) == len(part)):
        part.view(len(z), left.shape[0]).addmm_(z, left.T, alpha=scale)
    else:
        part.add_((z @ left.T).view(part.shape), alpha=scale)


def unaliased(y: Tensor) -> Tensor:
    """Return the same numbers as no view: autograd forbids writes in place to a view made in a custom function."""
    return cast(Tensor, torch.ops.aten._unsafe_view.default(y, y.shape)) if y._is_view() else y


# -- An update's fixed properties, and its tensors at one moment -------------------------------------------------------


class Update(NamedTuple):
    """What W' is in a target's rows, without the arrays that it is computed from.

    Attributes
    ----------
    target : Target
    applying : Applying
    source : Slice or None
        Computes ΔW from the first arrays; None where the first array is ΔW itself.
    num_arrays, num_params : int
        Number of the arrays of ΔW, and of the weight's own parameters, which follow.
    scale : float
        Factor of a ΔW that is computed here.
    detach : bool
        Whether a norm counts as a constant for the gradient.
    """

    target: Target
    applying: Applying
    source: Slice | None
    num_arrays: int
    num_params: int
    scale: float = 1.0
    detach: bool = False

    def change(self, arrays: Sequence[Tensor]) -> Change:
        """Return the update at this moment."""
        count = self.num_arrays
        return Change(self, _delta.computed(self.source, arrays[:count], self.scale), arrays[count:])

    def again(self, arrays: Sequence[Tensor], wanted: Sequence[int], once: bool) -> tuple[Change, Pull]:
        """Return it again, and the function from the gradient of ΔW to those of its arrays that are wanted."""
        delta, pull = _delta.recompute(self.source, arrays[: self.num_arrays], wanted, once, self.scale)
        return Change(self, delta, arrays[self.num_arrays :]), pull


class Change(NamedTuple):
    """An update with its ΔW, and the weight's own parameters.

    Attributes
    ----------
    update : Update
    delta : Tensor, shape (rows, cols)
    params : sequence of Tensor
    mask : Tensor, shape (1, cols), optional
        What W' - W is multiplied by: dropout of columns.
    quotient : Tensor, shape (rows,), optional
        That of a magnitude and a norm, if it is known.
    inactive : Tensor of bool, optional
        Whether the rows stay those of W, in a compiled program.
    """

    update: Update
    delta: Tensor
    params: Sequence[Tensor] = ()
    mask: Tensor | None = None
    quotient: Tensor | None = None
    inactive: Tensor | None = None

    @property
    def additive(self) -> bool:
        """Whether ΔW is added, so that updates of the same rows add up."""
        return self.update.applying.additive

    def of_matrix(self) -> Change:
        """Return the same for the matrix of the stack that it changes."""
        return self._replace(update=self.update._replace(target=self.update.target.of_matrix()))

    def addend(self) -> Tensor:
        """Return what is added to W, of an additive one."""
        return self.delta if self.mask is None else self.delta * self.mask

    def rows(self, base: Tensor) -> Tensor:
        """Return the rows of W' for those of W, in the wider dtype of both."""
        applying, backend = self.update.applying, load_backend("torch")
        base, delta = wide_pair(base, self.delta)
        if self.quotient is None:
            params = [param.to(base.device) for param in self.params]
            rows = cast(Tensor, applying.merged(backend, base, delta, params, detach=self.update.detach))
        else:
            rows = cast(Tensor, base + applying.change(backend, base, delta))
            rows = rows * self.quotient.view(-1, 1).to(rows.dtype)
        if self.inactive is not None:
            rows = torch.where(self.inactive, base, rows)
        return rows if self.mask is None else base + (rows - base) * self.mask

    def pulled(self, base: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return the gradients of the rows of W, of ΔW and of the own parameters, given that of the rows of W'."""
        base, delta = wide_pair(base, self.delta)
        params = [param.to(base.device) for param in self.params]
        return self.update.applying.pulled(
            load_backend("torch"), base, delta, params, gradient.to(base.dtype), self.update.detach
        )


# -- W' by ordinary operations -----------------------------------------------------------------------------------------


def updated(stored: Tensor, changes: Iterable[Change], less: bool = False) -> Tensor:
    """Return W' in the dtype of W, rounded once; with ``less`` W' - W.

    Changes of a stack of matrices come in the order of their indices. Without gradients one matrix after the other is
    written into a copy, so that a generator of changes needs memory for one.
    """
    at_once = torch.is_grad_enabled() or traced()
    total = stored
    matrices: dict[int, Tensor] = {}  # which torch.compile traces, unlike dict[int, Tensor]()
    several: list[Change] = []
    for change in itertools.chain(changes, (None,)):  # torch.compile does not trace itertools.groupby
        if several and (change is None or change.update.target.index != several[0].update.target.index):
            index = several[0].update.target.index
            if index is None:
                return _updated_matrix(stored, several, less)
            matrices[index] = _updated_matrix(stored[index], [each.of_matrix() for each in several], less)
            several = []
            if not at_once:
                total = stored.detach().clone(memory_format=torch.contiguous_format) if total is stored else total
                total[index] = matrices.pop(index)
        if change is not None:
            several.append(change)
    if not at_once:
        return total
    places = fixed_indices(tuple(matrices), stored.device)
    return stored.index_copy(0, places, torch.stack(list(matrices.values())))


def _updated_matrix(stored: Tensor, changes: Sequence[Change], less: bool) -> Tensor:
    added = [(change.update.target, change.addend()) for change in changes if change.additive]
    others = [change for change in changes if not change.additive]
    # A weight of zeros that has no memory of its own.
    total = stored.new_zeros(()).expand(stored.shape) if less else stored
    total = summed(total, added) if added else total
    for change in others:  # each acts only on its rows
        target = change.update.target
        base = target.select(stored)
        rows = change.rows(base)
        total = replaced(total, [(target, rows - base if less else rows)])
    return total


def replaced(stored: Tensor, rows: Sequence[tuple[Target, Tensor]]) -> Tensor:
    """Return the stored weight with the rows of targets replaced by matrices ``(rows, cols)``, rounded to its dtype."""
    total = stored
    for target, matrix in rows:
        matrix = matrix.to(stored.dtype)
        if target.is_whole:
            return matrix.T if target.transposed else matrix.reshape(stored.shape)
        if total is stored:
            total = stored.clone(memory_format=torch.contiguous_format)
        target.write(total, matrix)
    return total


def summed(stored: Tensor, changes: Sequence[tuple[Target, Tensor]]) -> Tensor:
    """Return the stored weight plus the updates of its rows, summed in the wider dtype and rounded once."""
    if len(changes) == 1 and _can_sum_in_blocks(stored, *changes[0]):
        return _sum_in_blocks(stored, changes[0][1])
    dtype = stored.dtype
    for _, delta in changes:
        dtype = torch.promote_types(dtype, delta.dtype)
    total, is_copy = stored.to(dtype), dtype != stored.dtype
    for target, delta in changes:
        delta = delta.to(stored.device)
        if target.rows is None:
            total, is_copy = total + (delta.T if target.transposed else delta.reshape(stored.shape)), True
            continue
        if isinstance(target.rows, RowIndices):
            axis = 1 if target.transposed else 0
            change = (delta.T if target.transposed else delta.reshape(-1, *stored.shape[1:])).to(dtype)
            total, is_copy = total.index_add(axis, index_tensor(target, stored.device), change), True
            continue
        # Only the target's rows are written, so the other rows keep their exact bits. In a channels_last weight the
        # block would be a copy instead of a view, hence the contiguous clone.
        if in_functorch():
            # Under vmap the update may have a batch dimension that the weight lacks. What new_ones returns has it, and
            # so has a selection by it, which is a copy.
            total, is_copy = torch.where(delta.new_ones((), dtype=torch.bool), total, total), True
        elif not is_copy or not total.is_contiguous():
            total, is_copy = total.clone(memory_format=torch.contiguous_format), True
        target.block(total).add_(target.like_block(delta))
    return total.to(stored.dtype)


#: Elements that are summed at a time: the float32 sums of a block stay in the cache.
BLOCK = 1 << 17


def _can_sum_in_blocks(stored: Tensor, target: Target, delta: Tensor) -> bool:
    """Return whether a sum is one of a contiguous half-precision weight on the CPU, without gradients or tracing."""
    if stored.dtype not in (torch.bfloat16, torch.float16) or delta.dtype != torch.float32:
        return False
    if target.rows is not None or target.transposed or stored.device.type != "cpu" or delta.device.type != "cpu":
        return False
    if traced() or (torch.is_grad_enabled() and (stored.requires_grad or delta.requires_grad)):
        return False
    return stored.is_contiguous() and delta.is_contiguous() and stored.numel() == delta.numel() > BLOCK


def _sum_in_blocks(stored: Tensor, delta: Tensor) -> Tensor:
    """Return ``(stored.float() + delta).to(stored.dtype)``, computed block by block."""
    # The plain expression would allocate two float32 arrays, in memory that the system maps anew in each call.
    total = torch.empty_like(stored)
    with torch.no_grad():
        parts = zip(*(torch.split(tensor.reshape(-1), BLOCK) for tensor in (total, stored, delta)), strict=True)
        for out, weight, change in parts:
            out.copy_(weight.float().add_(change))
    return total


# -- Operations with W', with their derivatives ------------------------------------------------------------------------


class Operation:
    """An operation on an input and W'; this one is none: the result is W' itself.

    Attributes
    ----------
    by_rows : bool
        Whether the gradient of some rows of W' is that of a linear layer with these rows.
    """

    by_rows = False

    def __call__(self, x: Any, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the output."""
        return weight

    def input_gradient(self, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient of x, given that of the output."""
        raise NotImplementedError

    def weight_gradient(self, gradient: Tensor, x: Any, weight: Tensor) -> Tensor:
        """Return the gradient of W'; of ``weight`` only the shape is used."""
        return gradient

    def bias_gradient(self, gradient: Tensor) -> Tensor:
        """Return the gradient of the bias."""
        raise NotImplementedError


class LinearProduct(Operation):
    """``x W'ᵀ + b``."""

    by_rows = True

    def __call__(self, x: Any, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(x, weight, bias)

    # Under autocast the output and its gradient have the lower precision, and so have these products.

    def input_gradient(self, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        rows = gradient.reshape(-1, gradient.shape[-1])
        return (rows @ weight.to(rows.dtype)).to(x.dtype).view(x.shape)

    def weight_gradient(
        self, gradient: Tensor, x: Any, weight: Tensor, target: Target | None = None, buffer: Tensor | None = None
    ) -> Tensor:
        """Return the gradient of W', or of a target's rows of it; in a buffer if there is one."""
        rows = gradient.reshape(-1, gradient.shape[-1])
        inputs = x.reshape(-1, x.shape[-1]).to(rows.dtype)
        rows = rows if target is None else features_of(target, rows)
        return rows.T @ inputs if buffer is None else torch.mm(rows.T, inputs, out=buffer)

    def bias_gradient(self, gradient: Tensor) -> Tensor:
        return gradient.reshape(-1, gradient.shape[-1]).sum(0)


class Convolution(Operation):
    """A convolution with the settings of a module of torch."""

    def __init__(self, host: nn.modules.conv._ConvNd) -> None:
        self.host = host

    @staticmethod
    def of(host: nn.modules.conv._ConvNd, x: Tensor) -> Convolution | None:
        """Return the operation of a module; None where it does more, such as to pad its input."""
        plain = host.padding_mode == "zeros" and not isinstance(host.padding, str)
        return Convolution(host) if plain and x.ndim == len(host.stride) + 2 else None

    def __call__(self, x: Any, weight: Tensor, bias: Tensor | None) -> Tensor:
        return cast(Tensor, cast(Any, self.host)._conv_forward(x, weight, bias))

    def input_gradient(self, gradient: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return self._backward(gradient, x, weight, 0).to(x.dtype)

    def weight_gradient(self, gradient: Tensor, x: Any, weight: Tensor) -> Tensor:
        return self._backward(gradient, x, weight, 1)

    def bias_gradient(self, gradient: Tensor) -> Tensor:
        return gradient.transpose(0, 1).flatten(1).sum(1)

    def _backward(self, gradient: Tensor, x: Tensor, weight: Tensor, wanted: int) -> Tensor:
        host, none = self.host, [0] * len(self.host.stride)
        gradients = torch.ops.aten.convolution_backward(
            gradient, x.to(gradient.dtype), weight.to(gradient.dtype), None, host.stride, host.padding, host.dilation,
            False, none, host.groups, [wanted == 0, wanted == 1, False],
        )  # fmt: skip
        return cast(Tensor, gradients[wanted])


ITSELF, LINEAR = Operation(), LinearProduct()


# -- W' and the operation with it, as one autograd node ----------------------------------------------------------------


class UpdatedWeight(Function):
    """``operation(x, W', b)`` as a function of x, W, b and all arrays of the updates.

    Parameters
    ----------
    operation : Operation
    updates : sequence of Update
        Those of a stack in the order of their indices.
    less : bool
        Whether the operation gets W' - W.
    """

    def __init__(self, operation: Operation, updates: Sequence[Update], less: bool = False) -> None:
        self.operation, self.updates, self.less = operation, tuple(updates), less

    def __call__(self, x: Tensor | None, weight: Tensor, bias: Tensor | None, *arrays: Tensor) -> Tensor:
        """Return the output."""
        changes = (update.change(arrays[start:stop]) for update, start, stop in self._spans())
        return unaliased(self.operation(x, self._total(weight, changes, arrays), bias))

    def vjp(self, inputs: Sequence[Any], wanted: Sequence[int], gradient: Tensor) -> list[Tensor | None]:
        """Return the gradients of the wanted inputs, given that of the output."""
        x, weight, _, *arrays = inputs
        operation, once, gradients = self.operation, reuses_buffers(gradient), dict[int, Tensor]()
        terms: Iterable[tuple[int, list[int], Change, Pull]] = self._again(arrays, wanted, once)
        buffer: Tensor | None = None
        if 0 in wanted:
            terms = list(terms)
            changes = [change for _, _, change, _ in terms]
            total = self._total(weight, changes, arrays) if once else updated(weight, changes, self.less)
            gradients[0] = operation.input_gradient(gradient, x, total)
            # The sum is no longer needed: its buffer is warm in the cache, and reusing it saves an allocation.
            reused = operation.by_rows and once and total.dtype == gradient.dtype and total.is_contiguous()
            buffer = total if reused else None
            del total, changes
        whole: Tensor | None = None
        if 1 in wanted or not operation.by_rows:
            whole = operation.weight_gradient(gradient, x, weight)
        of_rows: list[tuple[Target, Tensor]] = []
        for start, places, change, pull in terms:
            update = change.update
            if change.additive and not places and 1 not in wanted:
                continue
            if whole is not None:
                of_delta = update.target.select(whole)
            elif buffer is not None and buffer.shape == update.target.shape:
                of_delta, buffer = LINEAR.weight_gradient(gradient, x, weight, buffer=buffer), None
            else:
                of_delta = LINEAR.weight_gradient(gradient, x, weight, update.target)
            if not change.additive:
                of_changed = of_delta
                of_base, of_delta, of_params = change.pulled(update.target.select(weight), of_changed)
                of_rows.append((update.target, of_base - of_changed if self.less else of_base))
                for place, part in enumerate(of_params, start + update.num_arrays):
                    gradients[3 + place] = part.to(arrays[place].device, arrays[place].dtype)
            of_arrays = pull(of_delta.to(arrays[start].device, arrays[start].dtype))
            gradients.update(zip((3 + place for place in places), of_arrays, strict=True))
        if whole is not None and 1 in wanted:
            gradients[1] = replaced(torch.zeros_like(weight) if self.less else whole.to(weight.dtype), of_rows)
        if 2 in wanted:
            gradients[2] = operation.bias_gradient(gradient)
        return [gradients[index] for index in wanted]

    def _spans(self) -> Iterator[tuple[Update, int, int]]:
        """Yield each update with the range of its arrays."""
        start = 0
        for update in self.updates:
            stop = start + update.num_arrays + update.num_params
            yield update, start, stop
            start = stop

    def _again(
        self, arrays: Sequence[Tensor], wanted: Sequence[int], once: bool
    ) -> Iterator[tuple[int, list[int], Change, Pull]]:
        """Recompute each update in turn, with the positions of its arrays that have gradients."""
        for update, start, stop in self._spans():
            places = [place for place in range(start, start + update.num_arrays) if 3 + place in wanted]
            yield start, places, *update.again(arrays[start:stop], [place - start for place in places], once)

    def _total(self, weight: Tensor, changes: Iterable[Change], arrays: Sequence[Tensor]) -> Tensor:
        """Return W', written to the buffer of the update if possible."""
        if len(self.updates) > 1:
            return updated(weight, changes, self.less)
        (change,) = changes
        delta, target = change.delta, change.update.target
        alike = (delta.dtype, delta.device, delta.shape) == (weight.dtype, weight.device, weight.shape)
        if not alike or not change.additive or target.rows is not None or target.transposed:
            return updated(weight, [change], self.less)
        memory = delta.untyped_storage()._cdata
        if not delta.is_contiguous() or any(array.untyped_storage()._cdata == memory for array in arrays):
            return updated(weight, [change], self.less)  # a dense update is a view of its parameters
        return delta if self.less else delta.add_(weight)
