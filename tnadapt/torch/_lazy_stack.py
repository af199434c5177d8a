"""A parameter that stacks the matrices of experts, with updates that products apply without forming the sum.

A module of experts multiplies by its parameters itself, each module in its own way: expert by expert
(``linear(x, self.up_proj[i])``), sorted tokens by all experts (``grouped_mm``), or token by token (``bmm`` with
``self.up_proj[ids]``). :class:`LazyStack` stands in the place of such a parameter while the module's forward runs, and
sees each function of torch that it is given to (``__torch_function__``). Selecting matrices and transposing gives
another lazy stack. A product is the product with W, to which the updates of the experts in it are added
(:class:`~tnadapt.torch._routed_changes.RoutedChanges`). For every other function it is the changed weight, computed
then: a module that does something unknown gets the result of the strategy "weight", and its cost.

It holds no numbers. Code that avoids ``__torch_function__``, as a kernel that takes the address of its argument,
fails and does not read W by mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_map

from ._interception import in_dispatch_mode, in_functorch
from ._routed_changes import RoutedChanges

__all__ = ["LazyStack", "can_be_lazy"]

#: A tensor of matrix numbers, one number, or None for all matrices.
Picked = Tensor | int | None


def can_be_lazy(stored: Tensor) -> bool:
    """Return whether products may depend on the numbers of tokens of each expert, which are read from the device.

    Not in a trace, which must hold for all inputs, nor in a captured graph, nor without numbers.
    """
    if torch.compiler.is_compiling() or in_functorch() or in_dispatch_mode() or stored.is_meta:
        return False
    return not (stored.is_cuda and torch.cuda.is_current_stream_capturing())


class LazyStack(Tensor):
    """The changed matrices of experts, all or some of them, as an operand of products.

    Parameters
    ----------
    changes : RoutedChanges
    base : Tensor, optional
        The matrices without the changes, as they are presented here.
    picked : int or Tensor of int, optional
        Which of them.
    flipped : bool
        Whether they are presented as the transposes of what is stored.
    """

    changes: RoutedChanges
    base: Tensor
    picked: Picked
    flipped: bool

    @staticmethod
    def __new__(
        cls, changes: RoutedChanges, base: Tensor | None = None, picked: Picked = None, flipped: bool = False
    ) -> LazyStack:
        """Return a tensor without storage."""
        base = changes.base if base is None else base
        made: Any = Tensor._make_wrapper_subclass(
            cls, base.shape, strides=base.stride(), dtype=base.dtype, device=base.device
        )
        made.changes, made.base, made.picked, made.flipped = changes, base, picked, flipped
        return cast(LazyStack, made)

    @property
    def takes_rows(self) -> bool:
        """Whether a row of x is multiplied from the left, ``x @ matrix``: the matrices are presented as (in, out)."""
        return self.changes.transposed != self.flipped

    def formed(self) -> Tensor:
        """Return the changed matrices as an ordinary tensor."""
        total = self.changes.total()
        total = total if self.picked is None else total[self.picked]
        return total.mT if self.flipped else total

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Apply a function of torch: as a product where it is one, else to the changed weight."""
        kwargs = {name: value for name, value in (kwargs or {}).items() if value is not None}
        if func in _ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        rule = _RULES.get(func) or _RULES.get(str(func))
        known = rule is not None and kwargs.keys() <= _KEYWORDS.get(rule, set())
        found = rule(func, *args, **kwargs) if rule is not None and known else None
        return func(*_formed(args), **_formed(kwargs)) if found is None else found

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Raise: nothing below torch's functions may take it for the weight."""
        raise RuntimeError(
            f"{func} reached the matrices of experts past torch's functions, so that their updates cannot be applied: "
            "attach the adapter with strategy='weight'"
        )


def _formed(values: Any) -> Any:
    return tree_map(lambda value: value.formed() if isinstance(value, LazyStack) else value, values)


# -- Selecting and transposing -----------------------------------------------------------------------------------


def _item(func: Any, stack: Any, index: Any) -> Tensor | None:
    """Return one matrix, or those of a list of numbers."""
    if not isinstance(stack, LazyStack) or stack.picked is not None:
        return None
    changes, whole = stack.changes, isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32)
    if whole and index.ndim == 1:
        return LazyStack(changes, stack.base[index], index, stack.flipped)
    if not (whole and index.ndim == 0) and type(index) is not int:
        return None
    number = int(index)
    base = stack.base[number]
    number %= changes.stored.shape[0]
    return LazyStack(changes, base, number, stack.flipped) if number in changes.by_index else base


def _transposed(func: Any, stack: Any, *dims: Any, **named: Any) -> Tensor | None:
    """Return the stack with its last two axes exchanged."""
    dims = (*dims, *named.values())
    if not isinstance(stack, LazyStack) or {dim % stack.ndim for dim in dims} != {stack.ndim - 2, stack.ndim - 1}:
        return None
    return LazyStack(stack.changes, stack.base.mT, stack.picked, not stack.flipped)


def _as_mt(func: Any, stack: Any) -> Tensor | None:
    return _transposed(func, stack, -2, -1)


def _as_t(func: Any, stack: Any) -> Tensor | None:
    return _transposed(func, stack, -2, -1) if stack.ndim == 2 else None


# -- Products ----------------------------------------------------------------------------------------------------


def _linear(func: Any, input: Any, weight: Any, bias: Tensor | None = None) -> Tensor | None:
    """Return ``x W'ᵀ + b`` for one matrix."""
    if isinstance(input, LazyStack) or isinstance(bias, LazyStack) or not isinstance(weight.picked, int):
        return None
    if weight.takes_rows:
        return None
    y: Tensor = weight.changes.of_one(functional.linear(input, weight.base), input, weight.picked)
    return y if bias is None else y + bias


def _matmul(func: Any, input: Any, other: Any) -> Tensor | None:
    """Return ``x W'`` for one matrix."""
    if isinstance(input, LazyStack) or not isinstance(other.picked, int) or not other.takes_rows or input.ndim == 0:
        return None
    return cast(Tensor, other.changes.of_one(func(input, other.base), input, other.picked))


def _bmm(func: Any, one: Any, other: Any) -> Tensor | None:
    """Return a product for each of several matrices: all of them, or those of a list of numbers."""
    if isinstance(one, LazyStack):
        if isinstance(other, LazyStack) or one.takes_rows:
            return None
        y = torch.bmm(one.base, other)
        return one.changes.of_batch(y.mT, other.mT, cast(Any, one.picked)).mT
    if not other.takes_rows:
        return None
    return cast(Tensor, other.changes.of_batch(torch.bmm(one, other.base), one, other.picked))


def _grouped(func: Any, one: Any, other: Any, offs: Any = None) -> Tensor | None:
    """Return a product for rows that are sorted by matrix; ``offs`` are the ends of their segments."""
    lazy = isinstance(other, LazyStack) and not isinstance(one, LazyStack)
    if not lazy or offs is None or one.ndim != 2 or other.picked is not None or not other.takes_rows:
        return None
    y = func(one, other.base, offs=offs)
    ends = offs.tolist()
    counts = [stop - start for start, stop in zip([0, *ends], ends, strict=False)]
    return cast(Tensor, other.changes.of_segments(y, one, counts))


def _existing(*several: tuple[Any, str]) -> list[Any]:
    """Return the functions of these names that this version of torch has."""
    return [getattr(owner, name) for owner, name in several if hasattr(owner, name)]


_RULES: dict[Any, Callable[..., Tensor | None]] = {
    Tensor.__getitem__: _item,
    Tensor.transpose: _transposed,
    torch.transpose: _transposed,
    Tensor.mT.__get__: _as_mt,  # type: ignore[attr-defined]
    Tensor.T.__get__: _as_t,  # type: ignore[attr-defined]
    Tensor.t: _as_t,
    torch.t: _as_t,
    functional.linear: _linear,
    **dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__), _matmul),
    **dict.fromkeys((torch.bmm, Tensor.bmm), _bmm),
    **dict.fromkeys(_existing((functional, "grouped_mm"), (torch, "_grouped_mm")), _grouped),
    # Of transformers, where torch has no such product.
    "transformers.grouped_mm_fallback": _grouped,
}

#: Their keywords; a call with others, such as ``out``, is no product here.
_KEYWORDS: dict[Any, set[str]] = {
    _linear: {"input", "weight", "bias"},
    _grouped: {"offs"},
    _transposed: {"dim0", "dim1"},
}

#: Functions that depend on a tensor's shape, dtype and place, and not on its numbers.
_ABOUT: set[Any] = {
    *(getattr(Tensor, name) for name in ("size", "dim", "stride", "numel", "__len__", "is_floating_point")),
    *(getattr(Tensor, name) for name in ("element_size", "get_device", "is_contiguous", "is_complex")),
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_meta", "is_sparse")
    ),
    torch.is_floating_point,
    torch.numel,
}
