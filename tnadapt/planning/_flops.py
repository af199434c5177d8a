"""Cost of a training step: multiply-adds for all updates and gradients, counted by a backend of shapes without data."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tnadapt.algebra.applying import Applying
from tnadapt.algebra.maps.projection import Projection
from tnadapt.algebra.network import Network
from tnadapt.algebra.update_plan import UpdatePlan
from tnadapt.argument_checks import checks_arguments
from tnadapt.backends import OPTIONAL, Backend

# -- A backend of shapes without data, which counts multiplications ----------------------------------------------------


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
        shape = Shape([max(pair) for pair in zip(a, b, strict=True)], self.counter)
        if counted:
            self.counter.products += math.prod(shape.shape)
        return shape

    def __mul__(self, other: Any) -> Shape:
        return self._with(other, counted=True)

    def __add__(self, other: Any) -> Shape:
        return self._with(other, counted=False)

    __rmul__ = __truediv__ = __mul__
    __sub__ = __rsub__ = __add__

    def __getitem__(self, key: Any) -> Shape:
        keys = key if isinstance(key, tuple) else (key,)
        keys = keys[: keys.index(...)] if ... in keys else keys
        cut = [len(range(*key.indices(size))) for key, size in zip(keys, self.shape, strict=False)]
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


# -- The cost of a training step ---------------------------------------------------------------------------------------


@checks_arguments
def step_cost(plan: UpdatePlan) -> int:
    """Return the multiply-adds of one training step in the adapter alone, if every group is computed once.

    Parameters
    ----------
    plan : UpdatePlan

    Returns
    -------
    int

    Notes
    -----
    The products are counted as they are computed, including padding: forward, and twice that backward, where each
    product of two arrays has a gradient for both. A map declares its own cost (fastfood: ``L log2 L`` additions per
    transform, the first one of F's input only, and three products per element), and its adjoint costs the same. A start
    that is subtracted is computed as well, forward. So is W' where it is not a sum (:func:`applied_cost`). Not counted:
    the model itself, the scale, and recomputation that saves memory.

    Examples
    --------
    A product of rank r with N elements costs r N, three times:

    >>> import tnadapt as tna
    >>> step_cost(tna.UpdatePlan(tna.presets.lora(4), [(768, 768)])) == 3 * 4 * 768 * 768
    True

    HiRA multiplies it with the weight, which takes another product per element, three times:

    >>> step_cost(tna.UpdatePlan(tna.presets.hira(4), [(768, 768)])) == 3 * (4 + 1) * 768 * 768
    True
    """
    known: dict[tuple[int, int], int] = {}
    total = 0
    for group, count in plan.alike:
        key = id(group.network), group.size
        if key not in known:
            start = 1 if group.start.subtracts else 0
            known[key] = (3 + start) * forward_cost(group.network) + (2 + start) * of_map(group.projection)
        total += count * known[key]
    if plan.applying.additive:
        return total
    return total + sum(count * applied_cost(plan.applying, shape) for shape, count in Counter(plan.shapes).items())


def applied_cost(applying: Applying, shape: tuple[int, int]) -> int:
    """Return the multiply-adds of W' and its gradients for one weight, given ΔW, by running the operations on shapes.

    A division counts as a product, and so does each square of a norm; the sum of the squares is the add. What backward
    only computes again is not counted.

    Examples
    --------
    >>> from tnadapt.algebra.applying import Add, Hadamard, Magnitude
    >>> applied_cost(Add(), (768, 768)), applied_cost(Hadamard(), (768, 768)) / 768**2
    (0, 3.0)

    The squares and the product with q; backward, the products of the gradient with W + ΔW and with q, and that of
    W + ΔW with the gradient of its norm. A few more are for each row:

    >>> applied_cost(Magnitude(), (768, 768)) / 768**2
    5.005208333333333
    """
    if applying.additive:
        return 0
    backend = CountingBackend()
    weight, delta, gradient = (backend.array(shape) for _ in range(3))
    params = [backend.array(size) for size in applying.param_shapes(0, shape).values()]
    applying.rescaling(backend, weight + applying.change(backend, weight, delta), params)
    again = backend.products
    applying.merged(backend, weight, delta, params)
    applying.pulled(backend, weight, delta, params, gradient)
    return backend.products - 2 * again


def forward_cost(network: Network) -> int:
    """Return the multiply-adds of one group before F, by running its operations on shapes."""
    backend = CountingBackend()
    network.whole(backend, {name: backend.array(shape) for name, shape in network.shapes.items()})
    return backend.products


def of_map(projection: Projection) -> int:
    """Return the multiply-adds of one call of F: as declared, or by running its operations on shapes."""
    declared = projection.map.cost()
    if declared is not None:
        return declared
    backend = CountingBackend()
    projection.map.forward(backend, backend.array((projection.n_in,)))
    return backend.products
