"""A backend of shapes without data, which counts the multiplications."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tnadapt.backends import Backend
from tnadapt.backends.backend import OPTIONAL

__all__ = ["CountingBackend", "Shape"]


class Shape:
    """The shape of an array, without data.

    Parameters
    ----------
    shape : sequence of int
    counter : CountingBackend
        Counts every product of two elements.
    """

    def __init__(self, shape: Sequence[int], counter: CountingBackend) -> None:
        self.shape, self.counter = tuple(shape), counter

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def _with(self, other: Any, counted: bool) -> Shape:
        if not isinstance(other, Shape):
            return self  # a scalar: the scale, which is not counted
        ndim = max(len(self.shape), len(other.shape))
        a, b = ((1,) * (ndim - len(each.shape)) + each.shape for each in (self, other))
        made = Shape([max(pair) for pair in zip(a, b, strict=True)], self.counter)
        if counted:
            self.counter.products += math.prod(made.shape)
        return made

    def __mul__(self, other: Any) -> Shape:
        return self._with(other, counted=True)

    def __add__(self, other: Any) -> Shape:
        return self._with(other, counted=False)

    __rmul__ = __truediv__ = __mul__
    __sub__ = __rsub__ = __add__

    def __getitem__(self, key: Any) -> Shape:
        keys = key if isinstance(key, tuple) else (key,)
        keys = keys[: keys.index(...)] if ... in keys else keys
        cut = [len(range(*one.indices(size))) for one, size in zip(keys, self.shape, strict=False)]
        return Shape([*cut, *self.shape[len(cut) :]], self.counter)


class CountingBackend(Backend):
    """The operations of a tensor network and of applying its updates, on shapes.

    Attributes
    ----------
    products : int
        Number of products and quotients of two elements so far.

    Examples
    --------
    >>> backend = CountingBackend()
    >>> backend.matmul(backend.array((4, 2)), backend.array((2, 3))).shape, backend.products
    ((4, 3), 24)
    """

    name = "shapes"

    def __init__(self) -> None:
        super().__init__(None)
        self.products = 0

    def array(self, shape: Sequence[int]) -> Shape:
        """Return an array with that shape."""
        return Shape(shape, self)

    def lacks(self, x: Shape) -> frozenset[str]:
        return frozenset(OPTIONAL)

    def dtype_name(self, x: Shape) -> str:
        return "float32"

    def is_concrete(self, x: Shape) -> bool:
        return False

    def detached(self, x: Shape) -> Shape:
        return x

    def astype(self, x: Shape, dtype: str) -> Shape:
        return x

    def sqrt(self, x: Shape) -> Shape:
        return x

    def where(self, condition: Any, a: Shape, b: Shape) -> Shape:
        return a

    def reshape(self, x: Shape, shape: Sequence[int]) -> Shape:
        known = math.prod(size for size in shape if size != -1)
        return Shape([math.prod(x.shape) // known if size == -1 else size for size in shape], self)

    def permute_dims(self, x: Shape, axes: Sequence[int]) -> Shape:
        return Shape([x.shape[axis] for axis in axes], self)

    def matrix_transpose(self, x: Shape) -> Shape:
        return Shape([*x.shape[:-2], x.shape[-1], x.shape[-2]], self)

    def concat(self, arrays: Sequence[Shape], axis: int = 0) -> Shape:
        shape = list(arrays[0].shape)
        shape[axis] = sum(array.shape[axis] for array in arrays)
        return Shape(shape, self)

    def matmul(self, a: Shape, b: Shape) -> Shape:
        self.products += math.prod(a.shape) * b.shape[-1]
        return Shape([*a.shape[:-1], b.shape[-1]], self)

    def sum(self, x: Shape, axis: int) -> Shape:
        return Shape([size for i, size in enumerate(x.shape) if i != axis % len(x.shape)], self)
