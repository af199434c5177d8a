"""W' of a layer or of a stack of experts, formed from W and its updates, and recomputed in backward instead of saved.

:func:`updated` forms it, by ordinary operations. :class:`UpdatedWeight` is the same as one autograd node, together with
the operation that multiplies by W': a linear layer, a convolution, or none, for a stack of experts. Written with
ordinary operations, a layer would save W' until backward: the memory of a second model. ΔW is cheap to compute from its
arrays, so only these are saved.

The node also reuses memory: W + ΔW is computed in the buffer of ΔW, and its gradient in the buffer of the sum. A buffer
that is written to is never saved, and none is reused where someone may still look at it
(:func:`~tnadapt.torch._delta.reuses_buffers`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from tnadapt.algebra.applying import Applying
from tnadapt.backends import load_backend
from tnadapt.targets.target import RowIndices, Target

from ._delta import Pull, Slice, in_functorch, recompute, reuses_buffers, traced, wide_pair
from ._linear import features_of, fixed_indices, index_tensor, unaliased

__all__ = ["BLOCK", "ITSELF", "LINEAR", "Change", "Convolution", "Update", "UpdatedWeight", "summed", "updated"]


# -- What is known of an update, and its tensors at one moment ---------------------------------------------------------


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
        delta = arrays[0] if self.source is None else self.source(*arrays[: self.num_arrays])
        return Change(self, delta if self.scale == 1.0 else delta * self.scale, arrays[self.num_arrays :])

    def again(self, arrays: Sequence[Tensor], wanted: Sequence[int], once: bool) -> tuple[Change, Pull]:
        """Return it again, and the function from the gradient of ΔW to those of its arrays that are wanted."""
        params = arrays[self.num_arrays :]
        if self.source is None:
            return Change(self, arrays[0], params), lambda gradient: [gradient] if wanted else []
        delta, pull = recompute(self.source, arrays[: self.num_arrays], wanted, once, self.scale)
        return Change(self, delta, params), pull


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
    def matrix(self) -> int | None:
        """Which matrix of a stack it changes."""
        return self.update.target.index

    @property
    def additive(self) -> bool:
        """Whether ΔW is added, so that updates of the same rows add up."""
        return self.update.applying.additive

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
    for change in itertools.chain(changes, (None,)):
        if several and (change is None or change.matrix != several[0].matrix):
            index = several[0].matrix
            if index is None:
                return _updated_matrix(stored, several, less)
            of_matrix = [each._replace(update=_of_matrix(each.update)) for each in several]
            matrices[index] = _updated_matrix(stored[index], of_matrix, less)
            several = []
            if not at_once:
                total = stored.detach().clone(memory_format=torch.contiguous_format) if total is stored else total
                total[index] = matrices.pop(index)
        if change is not None:
            several.append(change)
    if not at_once:
        return total
    return stored.index_copy(0, fixed_indices(tuple(matrices), stored.device), torch.stack(list(matrices.values())))


def _of_matrix(update: Update) -> Update:
    return update._replace(target=update.target.of_matrix())


def _updated_matrix(stored: Tensor, changes: Sequence[Change], less: bool) -> Tensor:
    added = [(change.update.target, change.addend()) for change in changes if change.additive]
    others = [change for change in changes if not change.additive]
    # A weight of zeros that has no memory of its own.
    total = stored.new_zeros(()).expand(stored.shape) if less else stored
    total = summed(total, added) if added else total
    for change in others:  # each acts on its rows alone
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
    """Return whether a sum is one of a half-precision weight that no gradient passes through and nothing watches."""
    if stored.dtype not in (torch.bfloat16, torch.float16) or delta.dtype != torch.float32:
        return False
    if target.rows is not None or target.transposed or stored.device.type != "cpu" or delta.device.type != "cpu":
        return False
    if traced() or (torch.is_grad_enabled() and (stored.requires_grad or delta.requires_grad)):
        return False
    return stored.is_contiguous() and delta.is_contiguous() and stored.numel() == delta.numel() > BLOCK


def _sum_in_blocks(stored: Tensor, delta: Tensor) -> Tensor:
    """Return ``(stored.float() + delta).to(stored.dtype)``, block by block.

    The plain expression writes two arrays of four bytes an element, whose memory is new from the system at each call.
    """
    total = torch.empty_like(stored)
    with torch.no_grad():
        parts = zip(*(torch.split(tensor.reshape(-1), BLOCK) for tensor in (total, stored, delta)), strict=True)
        for out, weight, change in parts:
            out.copy_(weight.float().add_(change))
    return total


# -- What multiplies by W', with its derivatives -----------------------------------------------------------------------


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

    def weight_gradient(self, gradient: Tensor, x: Any, weight: Tensor) -> Tensor:
        return self.rows_gradient(gradient, x, None, None)

    def rows_gradient(self, gradient: Tensor, x: Tensor, target: Target | None, buffer: Tensor | None) -> Tensor:
        """Return the gradient of a target's rows of W', in a buffer if there is one."""
        rows = gradient.reshape(-1, gradient.shape[-1])
        inputs = x.reshape(-1, x.shape[-1]).to(rows.dtype)
        if buffer is not None:
            return torch.mm(rows.T, inputs, out=buffer)
        return (rows if target is None else features_of(target, rows)).T @ inputs

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


# -- W' and what multiplies by it, as one autograd node ----------------------------------------------------------------


class UpdatedWeight:
    """``operation(x, W', b)`` as a :class:`~tnadapt.torch._delta.Function` of x, W, b and all arrays of the updates.

    Parameters
    ----------
    operation : Operation
    updates : sequence of Update
        Those of a stack in the order of their indices.
    less : bool
        Whether the operation gets W' - W.
    """

    keeps = "inputs"

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
                of_delta, buffer = LINEAR.rows_gradient(gradient, x, None, buffer), None
            else:
                of_delta = LINEAR.rows_gradient(gradient, x, update.target, None)
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
        """Yield each update with the places of its arrays."""
        start = 0
        for update in self.updates:
            stop = start + update.num_arrays + update.num_params
            yield update, start, stop
            start = stop

    def _again(
        self, arrays: Sequence[Tensor], wanted: Sequence[int], once: bool
    ) -> Iterator[tuple[int, list[int], Change, Pull]]:
        """Compute each update again, one after the other, with the places of its arrays that have gradients."""
        for update, start, stop in self._spans():
            places = [place for place in range(start, start + update.num_arrays) if 3 + place in wanted]
            yield start, places, *update.again(arrays[start:stop], [place - start for place in places], once)

    def _total(self, weight: Tensor, changes: Iterable[Change], arrays: Sequence[Tensor]) -> Tensor:
        """Return W', in the buffer of the update where possible, which is then overwritten."""
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
