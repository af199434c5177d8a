"""ΔW and other functions of an adapter's arrays: one autograd node each, cached while the arrays are unchanged.

:class:`Recomputed` is the node, here and for W' (:mod:`tnadapt.torch._forms`): its backward recomputes what it
does not keep.

If slices are cheap (:class:`Slice`), each layer computes its own during training. If they are not, as after F, the
updates of a whole group are computed at once for all its layers, by a node that keeps only the small arrays.
Backward can therefore run through it several times (gradient accumulation without an optimizer step, reentrant
checkpointing), and a checkpointed region saves no tensor for it.

:class:`DeltaCache` gives layers these updates, and reuses them across layers and forward passes as long as a
:class:`Snapshot` shows that the arrays are unchanged. :class:`ThetaArrays` does the same for the arrays that θ makes,
and an :class:`ArrayCache` for the quotients m / ‖W + ΔW‖.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import sys
import time
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._guards import TracingContext
from torch.autograd import forward_ad
from torch.nn import functional
from torch.utils._python_dispatch import _get_current_dispatch_mode

from tnadapt.algebra.applying import Applying, Rescaling
from tnadapt.algebra.factoring import KroneckerRows
from tnadapt.algebra.group import Group, batches
from tnadapt.algebra.maps.projection import adjoints
from tnadapt.algebra.theta import ThetaPart
from tnadapt.algebra.update_plan import UpdatePlan
from tnadapt.backends import constant_result, load_backend

# -- Whether something intercepts torch's operations: a transform, a trace or a dispatch mode --------------------------


def in_functorch() -> bool:
    """Return whether a torch.func transform is active."""
    active: Callable[[], bool] | None = getattr(torch._C, "_are_functorch_transforms_active", None)
    return active is None or active()


def in_dispatch_mode() -> bool:
    """Return whether operations are intercepted: by a trace, by forward-mode AD or by a dispatch mode.

    Such a mode may keep results for later, as selective checkpointing does, so no result may be overwritten.
    """
    return (
        torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or forward_ad._current_level >= 0
        or _get_current_dispatch_mode() is not None
    )


#: The number of the running backward pass, or -1. Private to torch: a version without it only loses the check.
backward_number: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", lambda: -1)


def traced() -> bool:
    """Return whether single operations have to be seen, so that no autograd function of ours may stand for them."""
    return torch.compiler.is_compiling() or in_functorch() or in_dispatch_mode()


# -- A function of tensors as one autograd node, recomputed in backward instead of saved -------------------------------


class Function:
    """A function that computes its own gradients from its inputs.

    A subclass has ``__call__(*inputs)``, which returns the output, and ``vjp(inputs, wanted, gradient)``, which returns
    the gradients of the inputs with the wanted indices, given that of the output.

    Attributes
    ----------
    keeps : {"inputs", "arrays", "nothing"}
        What its node keeps for backward: the inputs, as every operation of torch does; arrays of an adapter, for a node
        that layers and passes share; nothing for a linear function.
    """

    keeps = "inputs"

    def __repr__(self) -> str:
        # Traces contain this text and are compared with each other, so it must not contain an address.
        return type(self).__name__


class Recomputed(torch.autograd.Function):
    """A :class:`Function` as one autograd node."""

    generate_vmap_rule = True

    @staticmethod
    def forward(function: Any, *inputs: Any) -> Tensor:
        return cast(Tensor, function(*inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.function, *tensors = inputs
        if ctx.function.keeps == "inputs":
            ctx.save_for_backward(*tensors)
        elif ctx.function.keeps == "arrays":
            # Not save_for_backward: tensors saved there are freed after the first backward pass, but layers and passes
            # share this node, so backward may run several times. Its check for in-place writes is repeated here.
            ctx.arrays, ctx.versions = tensors, [version(array) for array in tensors]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs: Sequence[Any] = ()
        if ctx.function.keeps == "inputs":
            inputs = ctx.saved_tensors
        elif ctx.function.keeps == "arrays":
            inputs = ctx.arrays
            if [version(array) for array in inputs] != ctx.versions:
                raise RuntimeError(
                    "an array of the adapter was changed in place between the forward pass and this backward pass, "
                    "which needs the original values: call optimizer.step() after the last backward() of a step"
                )
        wanted = [index for index, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        result: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        for index, part in zip(wanted, ctx.function.vjp(inputs, wanted, grads[0]), strict=True):
            result[1 + index] = part
        return tuple(result)


def recomputed(function: Function, *inputs: Any) -> Tensor:
    """Return a function's output, as one autograd node."""
    if in_functorch():
        return cast(Tensor, Recomputed.apply(function, *inputs))  # type: ignore[no-untyped-call]
    # Without torch's binding of the arguments to the signature of forward, which takes as long as a small product.
    node: Any = super(torch.autograd.Function, Recomputed)
    return cast(Tensor, node.apply(function, *inputs))


def is_final(gradient: Tensor) -> bool:
    """Return whether a backward pass is not itself differentiated (``create_graph=True``), batched or transformed."""
    batched = torch._C._functorch.is_legacy_batchedtensor(gradient)
    return not (torch.is_grad_enabled() or batched or in_functorch() or forward_ad._current_level >= 0)


def reuses_buffers(gradient: Tensor) -> bool:
    """Return whether a backward pass may write into what it has computed: nothing looks at intermediate results again.

    Not where it is differentiated, batched or intercepted.
    """
    return is_final(gradient) and not in_dispatch_mode()


def plain_vjp(
    function: Callable[..., Tensor], arrays: Sequence[Tensor], wanted: Sequence[int], gradient: Tensor
) -> Sequence[Tensor]:
    """Recompute a function of arrays and return the gradients of the wanted ones."""
    return _recomputed(function, arrays, wanted)[1](gradient)


#: From the gradient of an output to those of the arrays that are wanted.
Pull = Callable[[Tensor], Sequence[Tensor]]


def _recomputed(
    function: Callable[..., Tensor], arrays: Sequence[Tensor], wanted: Sequence[int]
) -> tuple[Tensor, Pull]:
    """Recompute a function of arrays, and return its output and its :data:`Pull`."""
    inputs = list(arrays)

    def of(*moved: Tensor) -> Tensor:
        for index, array in zip(wanted, moved, strict=True):
            inputs[index] = array
        return function(*inputs)

    # torch.func rather than autograd.grad, because a backward pass may itself be batched or differentiated.
    return torch.func.vjp(of, *(arrays[index] for index in wanted))  # type: ignore[return-value]


class Whole(Function):
    """The vector of all updates of a plan as a function of its arrays, in order."""

    keeps = "arrays"

    def __init__(self, plan: UpdatePlan, names: Sequence[str], on_backward: Callable[[], None] | None = None) -> None:
        self.plan, self.names = plan, tuple(names)
        self.on_backward = on_backward

    def __call__(self, *arrays: Tensor) -> Tensor:
        return self.plan.vector(dict(zip(self.names, arrays, strict=True)))

    def vjp(self, arrays: Sequence[Tensor], wanted: Sequence[int], gradient: Tensor) -> Sequence[Tensor]:
        """Return the gradients of the wanted arrays, given that of the vector; call ``on_backward`` before."""
        if self.on_backward is not None:
            self.on_backward()
        groups = self.plan.groups
        if any(not group.projection.linear or group.projection.map.identity for group in groups):
            return plain_vjp(self, arrays, wanted, gradient)
        # The adjoint of a linear F needs no output of F, so only the network in front of it is recomputed.
        backend, gradients = load_backend("torch"), dict[str, Tensor]()
        named = dict(zip(self.names, arrays, strict=True))
        trained = {self.names[index] for index in wanted}
        groups = [group for group in groups if not trained.isdisjoint(group.names.values())]
        for numbers in batches(backend, gradient, [(group, 0, group.size) for group in groups]):
            batch = [groups[number] for number in numbers]
            for group, before in zip(batch, self._before(batch, gradient), strict=True):
                names = list(group.names.values())
                places = [place for place, full in enumerate(names) if full in trained]
                parts = plain_vjp(_network_of(group), [named[full] for full in names], places, before)
                for place, part in zip(places, parts, strict=True):
                    # Tied arrays occur in several groups, or more than once in one.
                    full = names[place]
                    gradients[full] = gradients[full] + part if full in gradients else part
        return [gradients[self.names[index]] for index in wanted]

    def _before(self, groups: Sequence[Group], gradient: Tensor) -> list[Tensor]:
        """Return the gradients with respect to the inputs of a linear F, for groups that share it."""
        backend = load_backend("torch")
        starts = [0, *itertools.accumulate(rows * cols for rows, cols in self.plan.shapes)]
        after = []
        for group in groups:
            spans = [(starts[piece.weight] + piece.weight_start, piece.length) for piece in group.pieces]
            after.append(backend.concat([gradient[start : start + length] for start, length in _joined(spans)]))
        gradients = cast("list[Tensor]", adjoints(backend, groups[0].projection, after))
        # Copies: the rounding of a matrix product depends on alignment, and pieces of an array may have any.
        return gradients if len(gradients) == 1 else [vector.clone() for vector in gradients]


def _network_of(group: Group) -> Callable[..., Tensor]:
    """Return the vector of a group's network as a function of the group's arrays, in order."""
    backend = load_backend("torch")

    def vector_of(*arrays: Tensor) -> Tensor:
        group_arrays = group.with_frozen(backend, dict(zip(group.names, arrays, strict=True)))
        return cast(Tensor, group.network.whole(backend, group_arrays))

    return vector_of


class Slice(Function):
    """The update of one weight as a function of the arrays of its groups, in order.

    Attributes
    ----------
    names : tuple of str
        Names of these arrays in the plan.
    shape : (int, int)
    size : int
        Number of elements of the update.
    """

    keeps = "arrays"

    def __init__(self, plan: UpdatePlan, index: int) -> None:
        self.shape = plan.shapes[index]
        self.size = math.prod(self.shape)
        self._pieces = plan.layout.of_weight(index)
        self._groups = {piece.group: plan.groups[piece.group] for piece in self._pieces}
        # Each array once: arrays may be tied.
        self.names = tuple(dict.fromkeys(full for group in self._groups.values() for full in group.names.values()))

    def __call__(self, *arrays: Tensor) -> Tensor:
        # Shapes were checked when the arrays were created; a check per layer would cost as much as the update itself.
        backend, params = load_backend("torch"), dict(zip(self.names, arrays, strict=True))
        parts = [
            self._groups[piece.group].update(backend, params, piece.group_start, piece.group_start + piece.length)
            for piece in self._pieces
        ]
        return cast(Tensor, backend.reshape(backend.concat(parts), self.shape))

    @functools.cached_property
    def _kronecker_rows(self) -> KroneckerRows | None:
        piece = self._pieces[0]
        network = self._groups[piece.group].network
        return KroneckerRows.of(network, piece.group_start, piece.group_start + piece.length)

    def product(self, *arrays: Tensor) -> Product | None:
        """Return the product of which the update is a run of elements; None if it is not one."""
        piece = self._pieces[0]
        group = self._groups[piece.group]
        # If the start is subtracted, it is the difference of two products.
        if len(self._pieces) > 1 or group.subtracts or arrays[0].dtype not in (torch.float32, torch.float64):
            return None
        backend = load_backend("torch")
        group_arrays = group.arrays(backend, dict(zip(self.names, arrays, strict=True)))
        rows = self._kronecker_rows
        if rows is not None:
            return OuterProducts(*rows(backend, group_arrays), rows.first, group.network.scale, rows.cols)
        start, stop = piece.group_start, piece.group_start + piece.length
        factors = group.network.slice_factors(backend, group_arrays, start, stop)
        return None if factors is None else Product(*factors)

    def vjp(self, arrays: Sequence[Tensor], wanted: Sequence[int], gradient: Tensor) -> Sequence[Tensor]:
        """Return the gradients of the wanted arrays, given that of the update."""
        return recompute(self, arrays, wanted, reuses_buffers(gradient))[1](gradient)

    @classmethod
    def of(cls, plan: UpdatePlan, index: int) -> Slice | None:
        """Return the slice of one weight, or None where computing it alone costs more than as part of the whole.

        That is so behind F, which mixes all elements of a group. It is also so where a group's gradients would be
        larger than the group: each slice has gradients as large as all arrays of its groups.
        """
        groups = [plan.groups[piece.group] for piece in plan.layout.of_weight(index)]
        if not all(group.projection.map.identity for group in groups):
            return None
        many = any(len(group.pieces) * group.num_parameters > group.size for group in groups if len(group.pieces) > 1)
        return None if many else cls(plan, index)


def computed(source: Slice | None, arrays: Sequence[Tensor], scale: float) -> Tensor:
    """Return an update that a slice computes from arrays, or that is the first of them, times a scale."""
    delta = arrays[0] if source is None else source(*arrays)
    return delta if scale == 1.0 else delta * scale


def recompute(
    source: Slice | None, arrays: Sequence[Tensor], wanted: Sequence[int], once: bool, scale: float = 1.0
) -> tuple[Tensor, Pull]:
    """Return :func:`computed` again, and its :data:`Pull`; with ``once`` this overwrites the update.

    That takes a third of the overhead of torch.func.vjp, and no memory beyond the update's.
    """
    if source is None:
        return arrays[0], lambda gradient: [gradient] if wanted else []
    if not wanted:
        return computed(source, arrays, scale), lambda gradient: []
    if not once:
        return _recomputed(lambda *inputs: computed(source, inputs, scale), arrays, wanted)
    inputs, leaves = leaves_of(arrays, wanted)
    with torch.enable_grad():
        product = source.product(*inputs)
        if product is None:
            value = computed(source, inputs, scale)
            return value.detach(), lambda gradient: torch.autograd.grad(value, leaves, gradient)
    return product_vjp_once(product, source.shape, scale, leaves)


def leaves_of(arrays: Sequence[Any], wanted: Sequence[int]) -> tuple[list[Any], list[Tensor]]:
    """Return arrays with detached leaves in the places of the wanted ones, where autograd.grad stops; and these."""
    inputs = list(arrays)
    for index in wanted:
        inputs[index] = arrays[index].detach().requires_grad_()
    return inputs, [inputs[index] for index in wanted]


def _joined(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Merge adjacent runs of ``(start, length)``."""
    runs: list[tuple[int, int]] = []
    for start, length in spans:
        if runs and sum(runs[-1]) == start:
            runs[-1] = (runs[-1][0], runs[-1][1] + length)
        else:
            runs.append((start, length))
    return runs


def version(array: Tensor) -> int:
    """Return torch's in-place version counter; -1 for inference tensors, which have none."""
    return -1 if array.is_inference() else array._version


def vector(plan: UpdatePlan, arrays: Mapping[str, Tensor], on_backward: Callable[[], None] | None = None) -> Tensor:
    """Return the vector of all updates, differentiable; in a compiled program by operations that can be fused."""
    if torch.compiler.is_compiling():
        return plan.vector(arrays)
    return recomputed(Whole(plan, tuple(arrays), on_backward), *arrays.values())


def pieces(plan: UpdatePlan, vec: Tensor) -> list[Tensor]:
    """Return the update of every weight, ``(rows, cols)``, as views of the vector of all updates, in order."""
    sizes = [rows * cols for rows, cols in plan.shapes]
    # One split rather than many slices: its backward writes the whole gradient once.
    return [part.view(shape) for part, shape in zip(torch.split(vec, sizes), plan.shapes, strict=True)]


# -- An update that is a run of elements of a product: its gradients by hand, in the buffer that holds the product -----


class Product:
    """``left @ right`` in a buffer, in which its gradient takes its place.

    Parameters
    ----------
    left, right : Tensor
    first : int
        Position in the product of the first element of the update.
    scale : float
    """

    def __init__(self, left: Tensor, right: Tensor, first: int, scale: float = 1.0) -> None:
        self.left, self.right, self.first, self.scale = left, right, first, scale

    def fill(self, left: Tensor, right: Tensor) -> None:
        """Compute the product, without the scale."""
        self.buffer = torch.mm(left, right)

    def of_right(self, left: Tensor) -> Tensor:
        """Return the gradient of right, where the buffer holds that of the product."""
        return left.T @ self.buffer

    def of_left(self, right: Tensor) -> Tensor:
        """Return the gradient of left, where the buffer holds that of the product, and may be overwritten."""
        # In this form the long sides of both operands are contiguous: it takes a quarter of the time.
        return (right.contiguous() @ self.buffer.T).T


class OuterProducts(Product):
    """Outer products of the rows of ``left`` and ``right``, each cut to ``cols``; gradients are two sums."""

    def __init__(self, left: Tensor, right: Tensor, first: int, scale: float, cols: int) -> None:
        super().__init__(left, right, first, scale)
        wide = right.shape[1]
        self.buffer = torch.empty((len(left), cols), dtype=left.dtype, device=left.device)
        # The elements of left whose products are complete, and the one whose product is cut.
        self.whole = cols // wide
        self.main = self.buffer[:, : self.whole * wide].view(len(left), self.whole, wide)
        self.rest = self.buffer[:, self.whole * wide :]

    def fill(self, left: Tensor, right: Tensor) -> None:
        torch.mul(left[:, : self.whole].unsqueeze(2), right.unsqueeze(1), out=self.main)
        if self.rest.shape[1]:
            torch.mul(left[:, self.whole : self.whole + 1], right[:, : self.rest.shape[1]], out=self.rest)

    def of_right(self, left: Tensor) -> Tensor:
        gradient = torch.bmm(left[:, : self.whole].unsqueeze(1), self.main).squeeze(1)
        if self.rest.shape[1]:
            gradient[:, : self.rest.shape[1]].addcmul_(left[:, self.whole : self.whole + 1], self.rest)
        return gradient

    def of_left(self, right: Tensor) -> Tensor:
        gradient = torch.zeros_like(self.left)
        torch.sum(self.main.mul_(right.unsqueeze(1)), 2, out=gradient[:, : self.whole])
        if self.rest.shape[1]:
            torch.sum(self.rest.mul_(right[:, : self.rest.shape[1]]), 1, out=gradient[:, self.whole])
        return gradient


def product_vjp_once(
    product: Product, shape: tuple[int, int], weight: float, leaves: Sequence[Tensor]
) -> tuple[Tensor, Pull]:
    """Return an update times a weight, and a function from its gradient to those of the leaves, for a single use.

    The product was computed from the leaves, with gradients.
    """
    left, right = product.left.detach(), product.right.detach()
    product.fill(left, right)
    buffer, flat = product.buffer, product.buffer.view(-1)
    first, stop = product.first, product.first + math.prod(shape)
    update = flat[first:stop].view(shape)

    def scale() -> None:
        for factor in (product.scale, weight):
            if factor != 1.0:
                buffer.mul_(factor)

    def pull(gradient: Tensor) -> Sequence[Tensor]:
        # The gradient may be in the buffer already; for the elements around the update it is zero.
        if gradient.data_ptr() != update.data_ptr():
            update.copy_(gradient)
        flat[:first].zero_()
        flat[stop:].zero_()
        scale()
        outputs, gradients = [], []
        if product.right.requires_grad:
            outputs.append(product.right)
            gradients.append(product.of_right(left))
        if product.left.requires_grad:
            outputs.append(product.left)
            gradients.append(product.of_left(right))
        return torch.autograd.grad(outputs, leaves, gradients)

    scale()
    return update, pull


# -- Several assignments that take effect together or not at all -------------------------------------------------------


Thing = TypeVar("Thing")
Value = TypeVar("Value")


def all_or_none(
    assign: Callable[[Thing, Value], object], new: Sequence[tuple[Thing, Value]], old: Sequence[tuple[Thing, Value]]
) -> None:
    """Assign each new value; if that fails or is interrupted, restore the old ones.

    Parameters
    ----------
    assign : function
        Called with each object and its value.
    new, old : sequence of (thing, value)

    Examples
    --------
    >>> numbers = {"a": 1, "b": 2}
    >>> def assign(key, value):
    ...     numbers[key] = int(value)
    >>> all_or_none(assign, [("a", "3"), ("b", "four")], list(numbers.items()))
    Traceback (most recent call last):
    ValueError: invalid literal for int() with base 10: 'four'
    >>> numbers
    {'a': 1, 'b': 2}
    """
    try:
        for thing, value in new:
            assign(thing, value)
    except BaseException:  # KeyboardInterrupt, too
        for thing, value in old:
            assign(thing, value)
        raise


# -- Arrays of models that are distributed over processes (FSDP2, DDP) -------------------------------------------------


def is_sharded(tensor: Tensor) -> bool:
    """Return whether each process holds only a part of the tensor (a DTensor)."""
    return hasattr(tensor, "full_tensor")


def gather_full(tensor: Tensor) -> Tensor:
    """Return the whole tensor; every process must call."""
    return cast(Tensor, tensor.full_tensor()) if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def distribute(tensor: Tensor, like: Tensor) -> Tensor:
    """Distribute a full tensor, equal on all processes, in the same way as ``like``."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements)  # type: ignore[attr-defined]


def copy_all(pairs: Sequence[tuple[Tensor, Any]]) -> None:
    """Copy whole arrays, equal on all processes, into tensors: all of them, or none on failure or interruption."""
    # Convert everything before the first write, so that bad input changes nothing.
    sources = [torch.as_tensor(array, dtype=tensor.dtype, device=tensor.device).detach() for tensor, array in pairs]
    with torch.no_grad():
        new = [(tensor, distribute(source, tensor)) for (tensor, _), source in zip(pairs, sources, strict=True)]
        old = [(tensor, tensor.detach().clone()) for tensor, _ in pairs]
        all_or_none(lambda tensor, value: tensor.copy_(value), new, old)


def reshard(*models: nn.Module) -> None:
    """Make the shards the modules' parameters again, before they are written to.

    FSDP2 keeps its outermost module gathered after a forward pass, and drops what is written into gathered parameters
    at the next pass. That module manages all parameters below it, so it may be one that contains the given modules.
    """
    inside = {module: None for model in models for module in model.modules()}
    # A module has no reference to its parents, but torch keeps a private list of sharded modules. If the list is not
    # imported, nothing is sharded; with a version of torch that has no such list, only the given modules are resharded.
    known: Any = getattr(sys.modules.get("torch.distributed._composable_state"), "_module_state_mapping", ())
    around = [
        module for module in list(known) if module not in inside and not inside.keys().isdisjoint(module.modules())
    ]
    for module in [*inside, *around]:
        again = getattr(module, "reshard", None)
        if callable(again) and hasattr(module, "unshard"):
            again()


# -- The state of an array when something was computed from it ---------------------------------------------------------


_UNSHARDED = (Tensor, torch.nn.Parameter)


def on_host(array: Tensor) -> bool:
    """Return whether the contents of an array can be read without waiting for a device."""
    return array.device.type == "cpu"


class Snapshot(NamedTuple):
    """An array at one moment.

    On the CPU this is a copy, which is compared by content: ``param.data.copy_()``, ``param.numpy()[...] = ...`` and
    writes through DLPack change no version counter. Elsewhere a comparison would make the CPU wait for the device, and
    is forbidden while a CUDA graph is captured. There, it is the memory and its version counter, which every operation
    of torch in place changes; the writes above are not seen.

    Attributes
    ----------
    array : Tensor
        A copy, or the same memory. It keeps the memory alive, so that no other array can be allocated at its address.
    version : int, optional
        The version counter; None for a copy.

    Examples
    --------
    >>> array = torch.ones(3)
    >>> before = Snapshot.of(array)
    >>> array.data[1] = 2.0
    >>> before.is_of(array)
    False
    """

    array: Tensor
    version: int | None = None

    @classmethod
    def of(cls, array: Tensor) -> Snapshot:
        """Take a snapshot of an array; not of an inference tensor on a device, which has no version counter."""
        with torch.no_grad():
            if on_host(array):
                return cls(array.detach().clone())
            # The version first: a write after this line makes the snapshot stale.
            written = _versions(array)
            return cls(array.detach(), written)

    def is_of(self, array: Tensor) -> bool:
        """Return whether an array is still what it was."""
        saved = self.array
        if self.version is None and type(array) in _UNSHARDED and type(saved) in _UNSHARDED:
            # The same comparisons, but faster: a layer may have a dozen arrays.
            return array.is_cpu and array.dtype == saved.dtype and torch.equal(array, saved)
        if array.device != saved.device or array.dtype != saved.dtype or array.shape != saved.shape:
            return False
        if is_sharded(array) != is_sharded(saved):
            return False  # sharded meanwhile: sharded and ordinary tensors cannot be compared
        if self.version is None:
            return torch.equal(array, saved)
        return _versions(array) == self.version and memory(array) == memory(saved)


def _local(array: Tensor) -> Tensor:
    """Return the part of an array in the memory of this process."""
    return array._local_tensor if is_sharded(array) else array  # type: ignore[attr-defined]


def _versions(array: Tensor) -> int:
    # Each process can write to its shard or to the whole array.
    return version(array) + version(_local(array))


def memory(array: Tensor) -> tuple[Any, ...]:
    """Return what tells whether two tensors are the same memory, while both are alive."""
    local = _local(array)
    # The identity of the storage, since the address is zero where there is no memory.
    return local.untyped_storage()._cdata, local.storage_offset(), local.stride()


# -- Cache of functions of an adapter's arrays -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class CacheEntry:
    """Tensors, and the arrays they were computed from.

    Attributes
    ----------
    copies : dict of str to Snapshot
        The arrays as they were.
    tensors : dict of int or str to Tensor
        The tensors: updates by index of the weight, say.
    settings : hashable
        What else they depend on.
    leaves : dict of str to (Tensor, bool, int), optional
        Where the tensors have a graph, the arrays themselves, to which gradients go; whether they required gradients,
        and their version counters.
    rounded : dict of (int, dtype) to Tensor
        Updates in other dtypes, added as they are asked for; only where there is no graph.
    """

    copies: dict[str, Snapshot]
    tensors: Mapping[Any, Tensor]
    settings: Hashable = ()
    leaves: dict[str, tuple[Tensor, bool, int]] | None = None
    rounded: dict[tuple[int, torch.dtype], Tensor] = dataclasses.field(default_factory=dict)

    def update(self, index: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return the update of one weight, in a dtype if one is given."""
        update = self.tensors[index]
        if dtype is None or dtype == update.dtype:
            return update
        if self.leaves is not None:
            return update.to(dtype)
        rounded = self.rounded.get((index, dtype))
        if rounded is None:
            rounded = self.rounded[index, dtype] = update.to(dtype)
        return rounded

    def is_of(self, names: Sequence[str], given: Sequence[Tensor]) -> bool:
        """Return whether the arrays of these names that it was computed from equal the given ones."""
        if self.leaves is not None:
            for name, array in zip(names, given, strict=True):
                leaf, required, _ = self.leaves[name]
                if leaf is not array or array.requires_grad != required:
                    return False
            # One graph covers all arrays, and its backward pass refuses if any of them was written to since.
            for leaf, _, written in self.leaves.values():
                if version(leaf) != written:
                    return False
        copies = self.copies
        for name, array in zip(names, given, strict=True):  # noqa: SIM110, a generator takes as long as a comparison
            if not copies[name].is_of(array):
                return False
        return True


class ArrayCache:
    """Tensors computed from the arrays of an adapter, checked against the current arrays at every use.

    Notes
    -----
    The cache does not depend on a "forward pass is running" flag: an interrupted pass never reports its end (torch runs
    no hook on KeyboardInterrupt), and other threads may be in other passes. Instead the invariant is per entry: an
    entry is immutable, holds snapshots of the arrays it was computed from, and is used only after a comparison with
    these.

    Entries with gradients hold the graph as well: they are valid only for the same parameter objects with unchanged
    ``requires_grad`` and version counters, because the graph leads to these objects and its backward pass refuses
    arrays that were written to.
    """

    def __init__(self) -> None:
        #: By whether gradients are enabled, inference mode, and the key.
        self._entries: dict[tuple[bool, bool, Hashable], CacheEntry] = {}
        #: The latest snapshot of each array, which entries share.
        self._snapshots: dict[tuple[str, bool], Snapshot] = {}
        #: The current compiler trace or forward pass, and what it has computed for all its layers, where that is not
        #: cached.
        self._traced: tuple[Hashable, dict[Any, Any]] | None = None

    def entry(
        self,
        key: Hashable,
        names: Sequence[str],
        arrays: Sequence[Tensor],
        compute: Callable[[Sequence[Tensor]], Mapping[Any, Tensor]],
        settings: Hashable = (),
        sources: Callable[[], tuple[Sequence[str], Sequence[Tensor]]] | None = None,
    ) -> CacheEntry:
        """Return the entry for these arrays, computed if there is none.

        Parameters
        ----------
        key : hashable
        names, arrays : sequence
            What an entry is compared with.
        compute : function
            Of the arrays, or copies of them.
        settings : hashable
            What else an entry must have been computed for.
        sources : callable, optional
            Returns the names and arrays to compute it from, if they are more than those compared.
        """
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        # No lock is needed: entries are immutable, and reading or replacing one is a single dictionary operation. Two
        # threads that both find none compute it twice, with equal results. An update with a graph cannot replace one
        # without (outputs would require gradients, and the graph would stay alive), nor can an inference tensor replace
        # an ordinary one.
        known = self._entries.get((*modes, key))
        if known is not None and known.settings == settings and known.is_of(names, arrays):
            return known
        # Drop the stale entry before computing the new one, to keep peak memory down.
        known = None
        self._entries.pop((*modes, key), None)
        all_names, all_arrays = (names, arrays) if sources is None else sources()
        # Versions before copies: a write in between makes the copies newer, which invalidates the entry.
        leaves = {
            name: (array, array.requires_grad, version(array))
            for name, array in zip(all_names, all_arrays, strict=True)
        }
        copies = self._snapshots_of(all_names, all_arrays)
        if not modes[0]:
            # Computed from the copies, so that the entry is consistent whatever is written to the arrays meanwhile.
            # (Where these are no copies, their version tells of a write, and the entry is not used again.)
            tensors = compute([copy.array for copy in copies.values()])
            new = self._entries[*modes, key] = CacheEntry(copies, tensors, settings)
            return new
        new = CacheEntry(copies, compute(all_arrays), settings, leaves)
        # A graph belongs to the arrays themselves, which another thread may have changed since they were copied. Such
        # an entry is returned to this caller but not cached.
        if new.is_of(names, arrays):
            self._entries[*modes, key] = new
        return new

    def _snapshots_of(self, names: Sequence[str], arrays: Sequence[Tensor]) -> dict[str, Snapshot]:
        """Return snapshots of arrays, reusing existing ones that are equal."""
        # Entries of several weights, with and without gradients, refer to the same arrays and would otherwise hold one
        # copy each. A copy is never written to; an array that has changed gets a new one.
        snapshots = {}
        for name, array in zip(names, arrays, strict=True):
            key = name, torch.is_inference_mode_enabled()
            snapshot = self._snapshots.get(key)
            if snapshot is None or not snapshot.is_of(array):
                snapshot = self._snapshots[key] = Snapshot.of(array)
            snapshots[name] = snapshot
        return snapshots

    def _of_trace(self, key: Hashable) -> dict[Any, Any]:
        """Return the values computed so far in the trace or pass with this key, where key 0 never has any."""
        # Between two programs of one pass, and after an interrupted pass, _traced may hold tensors of another trace.
        # They must not be reused: a program cannot check whether the arrays have changed since.
        if self._traced is None or self._traced[0] != key or not key:
            self._traced = key, {}
        return self._traced[1]

    def end(self) -> None:
        """Record that a pass has returned or failed; not called if it was interrupted."""
        self._traced = None

    def forget(self) -> None:
        """Empty the cache."""
        # New dictionaries instead of clear(): other threads may be reading the old ones.
        self._entries, self._snapshots = {}, {}

    def held(self) -> int:
        """Return the bytes that it keeps: the memory behind tensors, counted once where several are views of it."""
        tensors = [snapshot.array for snapshot in self._snapshots.values() if snapshot.version is None]
        for entry in self._entries.values():
            tensors += [*entry.tensors.values(), *entry.rounded.values()]
        storages = (tensor.untyped_storage() for tensor in tensors)
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


# -- The cache of updates ----------------------------------------------------------------------------------------------


#: Gives the current arrays of an adapter by name.
Lookup = Callable[[Sequence[str]], list[Tensor]]


_numbers = itertools.count()
_caches: weakref.WeakValueDictionary[int, DeltaCache] = weakref.WeakValueDictionary()


class Passing:
    """A forward pass of the whole model: its number, or 0 outside of one, and whether it began with gradients."""

    def __init__(self) -> None:
        self.number, self.with_gradients = 0, False


class DeltaCache(ArrayCache):
    """The updates of one plan, cached and checked against the current arrays at every use.

    Parameters
    ----------
    plan : UpdatePlan

    Notes
    -----
    An entry covers only the arrays of the requested weight, so its cost does not grow with the number of weights.

    On the CPU the comparison is by content, and costs microseconds. On a GPU that would wait for the device. There it
    is by memory and version counter (:class:`Snapshot`), which do not see all writes.
    Updates that a layer can compute alone are therefore not cached there but computed in each call, as in training.
    Steps of fused optimizers change no version counter: entries end when gradients are computed, and none is used while
    arrays have gradients.

    Keys are the weight, or -1, -2 … for all of a part.
    """

    def __init__(self, plan: UpdatePlan) -> None:
        super().__init__()
        self.plan = plan
        #: Number by which an operator of a compiled program, which takes only tensors and numbers, finds this cache.
        self.number = next(_numbers)
        _caches[self.number] = self
        # Filled completely here: a list that grows later would trigger recompilation of compiled programs.
        self._slices = [Slice(plan, index) for index in range(len(plan.shapes))]
        self._alone = [Slice.of(plan, index) is not None for index in range(len(plan.shapes))]
        #: Whether the arrays of a weight are as large as its update, like dense ones: comparing them costs more.
        self._large = [
            alone and sum(math.prod(plan.param_shapes[name]) for name in delta_slice.names) >= delta_slice.size
            for delta_slice, alone in zip(self._slices, self._alone, strict=True)
        ]
        #: For each weight, the part of the plan whose updates are computed together with its own.
        self._part: list[CachedPart] = []
        for place, (part, first) in enumerate(plan.config_plans):
            cached_part = CachedPart(part, list(part.array_shapes), first, -1 - place)
            self._part += [cached_part] * len(part.shapes)
        #: The forward pass of the whole model; of the members of a population, the same.
        self.passing = Passing()

    def twin(self) -> DeltaCache:
        """Return an empty cache of the same plan, for other arrays."""
        twin = DeltaCache.__new__(DeltaCache)
        twin.__dict__.update(self.__dict__, _entries={}, _snapshots={}, _traced=None, number=next(_numbers))
        _caches[twin.number] = twin
        return twin

    def names(self, index: int) -> Sequence[str]:
        """Return the names of all arrays that are read for the update of one weight."""
        return self._slices[index].names if self._alone[index] else self._part[index].names

    def slice(self, index: int) -> Slice | None:
        """Return the slice that computes one weight's update alone; None where computing all costs less."""
        return self._slices[index] if self._alone[index] else None

    def begin(self) -> None:
        """Record that a forward pass of the whole model starts."""
        self.passing.with_gradients = torch.is_grad_enabled()
        if not torch.compiler.is_compiling():
            self.passing.number = time.perf_counter_ns()
        if self.passing.with_gradients:
            # In training the arrays have changed since: cached updates would only take memory. A compiled program does
            # this, too, each time it runs: nothing else tells of the step of a fused optimizer that follows.
            self.forget()

    def end(self) -> None:
        super().end()
        self.passing.number, self.passing.with_gradients = 0, False

    def get(self, lookup: Lookup, index: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return the update of one weight for the current arrays; where it is cached, in ``dtype`` if one is given."""
        delta_slice, alone = self._slices[index], self._alone[index]
        if torch.compiler.is_compiling():
            # By ordinary operations, for the compiler to fuse. A compiled program must not contain a cached tensor as a
            # constant, nor guard on the contents of arrays: the computation is part of the program, and that of a part
            # is so once for all layers of one trace.
            return delta_slice(*lookup(delta_slice.names)) if alone else self._once(trace_number(), lookup, index)
        # Look up once: everything below refers to these tensors, even if another thread replaces them meanwhile.
        inputs = lookup(delta_slice.names)
        # With gradients, an update that is computed alone gets a separate graph in each call.
        if self._large[index] or (alone and torch.is_grad_enabled()) or not can_cache(inputs, alone):
            if not alone and reuses_in_pass(inputs):
                modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
                number = self.passing.number
                return self._once((number, *modes) if number else 0, lookup, index)
            return recomputed(delta_slice, *inputs)
        if alone:
            entry = self.entry(index, delta_slice.names, inputs, lambda arrays: {index: delta_slice(*arrays)})
            return entry.update(index, dtype)
        part = self._part[index]

        def updates(arrays: Sequence[Tensor]) -> dict[int, Tensor]:
            # Gradients that reach the updates drop the cached ones: backward through F can then use their memory.
            return dict(enumerate(part.updates(arrays, self.forget), part.first))

        entry = self.entry(
            part.key, delta_slice.names, inputs, updates, sources=lambda: (part.names, lookup(part.names))
        )
        return entry.update(index, dtype)

    def _once(self, key: Hashable, lookup: Lookup, index: int) -> Tensor:
        """Compute a part's updates once for all layers of the trace or pass with this key, or per call for key 0."""
        part, updates = self._part[index], self._of_trace(key)
        if part.key not in updates:
            updates[part.key] = part.updates(lookup(part.names))
        return cast(Tensor, updates[part.key][index - part.first])

    def __reduce__(self) -> tuple[Any, ...]:
        return DeltaCache, (self.plan,)


@dataclasses.dataclass(frozen=True, eq=False)
class CachedPart:
    """A part of a plan whose updates are computed at once: all of it, or those of one of its configs.

    Attributes
    ----------
    plan : UpdatePlan
        Of this part alone.
    names : list of str
        Of its arrays.
    first : int
        The number of its first weight in the whole plan.
    key : int
    """

    plan: UpdatePlan
    names: list[str]
    first: int
    key: int

    def updates(self, arrays: Sequence[Tensor], on_backward: Callable[[], None] | None = None) -> list[Tensor]:
        """Compute the updates of its weights, differentiable; ``on_backward`` is called when gradients are."""
        return pieces(self.plan, vector(self.plan, dict(zip(self.names, arrays, strict=True)), on_backward))


def can_cache(arrays: Sequence[Tensor], alone: bool) -> bool:
    """Return whether an update of these arrays may be cached."""
    if not on_host(arrays[0]):
        if alone or arrays[0].device.type == "meta" or any(array.is_inference() for array in arrays):
            return False
        # Fused optimizers write to arrays that have gradients without changing their versions.
        # An array of a member is a view of the parameter.
        owners = [array if array._base is None else array._base for array in arrays]
        stepped = any(owner.is_leaf and owner.grad is not None for owner in owners)
        if is_captured() or (not torch.is_grad_enabled() and stepped):
            return False
    # A trace or a captured graph must contain the computation of the update, tensors wrapped by torch.func are valid
    # only inside the transform, and a dispatch mode must see the same operations each time.
    return not traced()


def reuses_in_pass(arrays: Sequence[Tensor]) -> bool:
    """Return whether an update that is not cached is still the same for all layers of a pass.

    So it is in a CUDA graph, which like a compiled program contains the computation, so that a replay uses the current
    arrays; and where an optimizer may take a step before the next pass.
    """
    return not (traced() or on_host(arrays[0]) or arrays[0].device.type == "meta")


def is_captured() -> bool:
    """Return whether operations are recorded in a CUDA graph at this moment."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


@constant_result
def trace_number() -> int:
    """Return a number that identifies the current compiler trace; 0 outside a trace."""
    context: Any = TracingContext.try_get()
    return 0 if context is None else context.__dict__.setdefault("tnadapt_number", time.perf_counter_ns())


# -- The arrays that θ makes -------------------------------------------------------------------------------------------

# ``a_start + P θ`` is one autograd node for each θ. P is linear, so that the node saves nothing for backward: gradients
# of any number of backward passes go through it, each by one call of Pᵀ.


class _Moved(Function):
    """``P θ`` as a function of θ."""

    keeps = "nothing"

    def __init__(self, part: ThetaPart, on_backward: Callable[[], None] | None) -> None:
        self.part, self.on_backward = part, on_backward

    def __call__(self, theta: Tensor) -> Tensor:
        return cast(Tensor, self.part.forward(theta))

    def vjp(self, inputs: Sequence[Tensor], wanted: Sequence[int], gradient: Tensor) -> Sequence[Tensor]:
        if self.on_backward is not None:
            self.on_backward()
        return [self.part.adjoint(gradient)]


class ThetaArrays(ArrayCache):
    """The arrays of a plan with a map before the network, cached and checked against θ at every use.

    Parameters
    ----------
    plan : UpdatePlan
        With ``plan.theta``.
    """

    def __init__(self, plan: UpdatePlan) -> None:
        assert plan.theta is not None
        super().__init__()
        self.plan, self.theta = plan, plan.theta

    def get(self, thetas: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """Return the arrays by their names in the plan, for the current θ in the order of ``theta.shapes``."""
        if torch.compiler.is_compiling():
            arrays = self._of_trace(trace_number())
            if not arrays:
                arrays.update(self.computed(thetas))
            return arrays
        if not can_cache(thetas, False):
            return self.computed(thetas)
        return self.entry((), list(self.theta.shapes), thetas, self.computed).tensors

    def computed(self, thetas: Sequence[Tensor]) -> dict[str, Tensor]:
        """Compute the arrays; leading axes of θ, which all have, are leading axes of them."""
        backend = load_backend("torch")
        arrays: dict[str, Tensor] = {}  # which torch.compile traces, unlike dict[str, Tensor]()
        for part, theta in zip(self.theta.parts, thetas, strict=True):
            sizes = [torch.Size(shape).numel() for shape in part.arrays.values()]
            if torch.compiler.is_compiling():
                vec = part.forward(theta)
            else:
                # Steps of fused optimizers, which follow a backward pass, do not change version counters.
                vec = recomputed(_Moved(part, None if on_host(theta) else self.forget), theta)
            for (full, shape), piece in zip(part.arrays.items(), torch.split(vec, sizes, -1), strict=True):
                change = piece.reshape(*theta.shape[:-1], *shape)
                arrays[full] = self.plan.array_start(backend, full, theta) + change if self.theta.offset else change
        return arrays

    def __reduce__(self) -> tuple[Any, ...]:
        return ThetaArrays, (self.plan,)


# -- The quotient m / ‖W + ΔW‖ of a layer whose output is scaled -------------------------------------------------------

# The quotient is one autograd node (:class:`Recomputed`) that keeps the small arrays alone: backward forms W + ΔW once
# more instead of saving it. With a detached norm only m has a gradient through it, and ordinary operations give that.


def wide_pair(weight: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight and its update on the weight's device, in the wider dtype of both."""
    dtype = torch.promote_types(weight.dtype, delta.dtype)
    return weight.to(dtype), delta.to(weight.device, dtype)


class Quotient(Function):
    """The quotient of one weight as a function of the arrays of its update, and of the weight's own parameters.

    Parameters
    ----------
    applying : Applying
        One that rescales.
    weight : callable
        Returns the base weight, ``(rows, cols)``.
    source : Slice or None
        Computes the update from all arrays but the last; None if the first array is the update itself.
    scale : float
        Factor of an update that is computed here.
    detach : bool
        Whether the norm counts as a constant for the gradient.
    """

    keeps = "arrays"

    def __init__(
        self, applying: Applying, weight: Callable[[], Tensor], source: Slice | None, scale: float, detach: bool
    ) -> None:
        self.applying, self.weight, self.source = applying, weight, source
        self.scale, self.detach = scale, detach
        #: Vectors that the forward pass has computed.
        self._rescaling: Rescaling

    def __call__(self, *arrays: Tensor) -> Tensor:
        """Return it, ``(rows,)``."""
        *of_delta, magnitude = arrays
        if self.detach:
            of_delta = [array.detach() for array in of_delta]
        total = self._total(computed(self.source, of_delta, self.scale))
        self._rescaling = self._rescaled(total.detach() if self.detach else total, magnitude)
        return cast(Tensor, self._rescaling.quotient.view(-1))

    def _total(self, delta: Tensor) -> Tensor:
        weight, delta = wide_pair(self.weight(), delta)
        return cast(Tensor, weight + self.applying.change(load_backend("torch"), weight, delta))

    def _rescaled(self, total: Tensor, magnitude: Tensor) -> Rescaling:
        rescaling = self.applying.rescaling(load_backend("torch"), total, [magnitude.to(total.device)])
        assert rescaling is not None  # it rescales
        return rescaling

    def vjp(self, arrays: Sequence[Tensor], wanted: Sequence[int], gradient: Tensor) -> Sequence[Tensor | None]:
        """Return the gradients of the wanted arrays, given that of the quotient."""
        *of_delta, magnitude = arrays
        once, rest = reuses_buffers(gradient), [index for index in wanted if index != len(of_delta)]
        delta, pull = recompute(self.source, of_delta, rest, once, self.scale)
        total = self._total(delta)
        # The forward pass's results are constants: for a derivative of this backward pass they are recomputed.
        rescaling = self._rescaling if once else self._rescaled(total, magnitude)
        through, (of_magnitude,) = self.applying.rescaling_pulled(
            load_backend("torch"), total, rescaling, gradient.view(-1, 1)
        )
        # C is ΔW where outputs are scaled.
        gradients = list(pull(through.to(of_delta[0].device, of_delta[0].dtype))) if rest else []
        if len(rest) == len(wanted):
            return gradients
        return [*gradients, of_magnitude.to(magnitude.device, magnitude.dtype)]


# -- The product of an input with a cached update, as one operator for compiled programs -------------------------------

# A compiled program cannot hold a cached tensor, and computing ΔW in it takes longer than the layer. The operator gets
# the arrays, so the compiler knows what it reads, and finds ΔW in the cache, which compares these arrays with those
# that it was computed from. It returns a new tensor, which the compiler may overwrite; ΔW itself it never sees.


def wide_product(x: Tensor, update: Tensor) -> Tensor:
    """Return ``x ΔWᵀ`` in the wider dtype of both."""
    dtype = torch.promote_types(x.dtype, update.dtype)
    return functional.linear(x.to(dtype), update.to(dtype))


@torch.library.custom_op("tnadapt::update_product", mutates_args=())
def update_product(x: Tensor, arrays: Sequence[Tensor], cache: int, index: int, rows: int) -> Tensor:
    """Return ``x ΔWᵀ`` in the dtype of x, given the arrays of a weight, the number of its cache, and its rows."""
    delta_cache = _caches[cache]
    named = dict(zip(delta_cache.names(index), arrays, strict=True))
    update = delta_cache.get(lambda names: [named[name] for name in names], index, x.dtype)
    return wide_product(x, update.to(x.device).reshape(rows, x.shape[-1])).to(x.dtype)


@update_product.register_fake
def _(x: Tensor, arrays: Sequence[Tensor], cache: int, index: int, rows: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))
