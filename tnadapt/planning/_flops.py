"""The cost of a training step: multiply-adds for all updates and the gradients of their parameters."""

from __future__ import annotations

from collections import Counter

from tnadapt.algebra.applying import Applying
from tnadapt.algebra.maps.projection import Projection
from tnadapt.algebra.network import Network
from tnadapt.algebra.superlora import SuperLoRA
from tnadapt.argument_checks import checks_arguments

from ._shape_backend import CountingBackend

__all__ = ["applied_cost", "step_cost"]


@checks_arguments
def step_cost(plan: SuperLoRA) -> int:
    """Return the multiply-adds of one training step in the adapter alone, if every group is computed once.

    Parameters
    ----------
    plan : SuperLoRA

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
    >>> step_cost(tna.SuperLoRA(tna.presets.lora(4), [(768, 768)])) == 3 * 4 * 768 * 768
    True

    HiRA multiplies it with the weight, which takes another product per element, three times:

    >>> step_cost(tna.SuperLoRA(tna.presets.hira(4), [(768, 768)])) == 3 * (4 + 1) * 768 * 768
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
    own = [backend.array(size) for size in applying.param_shapes(0, shape).values()]
    applying.rescaling(backend, weight + applying.change(backend, weight, delta), own)
    again = backend.products
    applying.merged(backend, weight, delta, own)
    applying.pulled(backend, weight, delta, own, gradient)
    return backend.products - 2 * again


def forward_cost(network: Network) -> int:
    """Return the multiply-adds of one group before F, by running its operations on shapes."""
    backend = CountingBackend()
    network.whole(backend, {name: backend.array(shape) for name, shape in network.shapes.items()})
    return backend.products


def of_map(projection: Projection) -> int:
    """Return the multiply-adds of one call of F: as declared, or by running its operations on shapes."""
    own = projection.map.cost()
    if own is not None:
        return own
    backend = CountingBackend()
    projection.map.forward(backend, backend.array((projection.n_in,)))
    return backend.products
