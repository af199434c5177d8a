"""What a training step of one linear layer costs by each strategy: operations, bytes and calls, in seconds.

A model, not a measurement: a few numbers say what a machine can do, and the three strategies differ in what they do
beyond the layer itself. See the documentation's page on strategies for the reasoning. ``benchmarks/strategies.py`` says
how near the best the choice is, and is where the numbers for the CPU come from; the GPU's are assumptions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from tnadapt.algebra.factoring import Factoring, Size
from tnadapt.algebra.network import Network
from tnadapt.algebra.superlora import SuperLoRA

__all__ = ["MACHINES", "TOKENS", "Machine", "StepWork", "choose", "costs"]

#: Rows of x that a layer is called with, where nobody says: ten images of 197 tokens, four texts of 512.
TOKENS = 2048

_ITEM = 4  # bytes: the adapter's arrays are float32, and where the model's are not, all strategies move less alike


class Machine(NamedTuple):
    """What a machine can do.

    Attributes
    ----------
    operations : float
        Floating-point operations a second in a large matrix product.
    narrow : float
        The same where one side of the product is narrow: what factors of low rank are multiplied at.
    bytes : float
        Bytes read or written a second.
    call : float
        Seconds for one operation on arrays, however small, its part in autograd included.
    """

    operations: float
    narrow: float
    bytes: float
    call: float


#: Of one core, or of several: that their numbers grow alike is assumed.
MACHINES: Mapping[str, Machine] = {
    "cpu": Machine(operations=1.7e11, narrow=1e11, bytes=1.25e10, call=2.0e-5),
    # Not measured: a card of 60 teraflops in TF32, 1.5 TB/s, and what a launch from Python takes.
    "cuda": Machine(operations=6e13, narrow=1e13, bytes=1.5e12, call=1.0e-5),
}


class StepWork(NamedTuple):
    """Operations in large and in narrow products, elements moved, and calls.

    Examples
    --------
    >>> StepWork(1e9, 0, 1e6, 3) + StepWork(0, 1e6, 0, 1)
    StepWork(large=1000000000.0, narrow=1000000.0, moved=1000000.0, calls=4)
    """

    large: float = 0.0
    narrow: float = 0.0
    moved: float = 0.0
    calls: float = 0.0

    def __add__(self, other: tuple[float, ...]) -> StepWork:  # type: ignore[override]  # no concatenation
        return StepWork(*(a + b for a, b in zip(self, other, strict=True)))

    def seconds(self, machine: Machine) -> float:
        """What it takes there."""
        return (
            self.large / machine.operations
            + self.narrow / machine.narrow
            + _ITEM * self.moved / machine.bytes
            + self.calls * machine.call
        )


def costs(plan: SuperLoRA, index: int, how: Factoring | None, tokens: int = TOKENS) -> dict[str, StepWork]:
    """What each strategy does in one training step beyond the layer's own two products.

    Parameters
    ----------
    plan : SuperLoRA
    index : int
        Which weight.
    how : Factoring or None
        How its update factors, if it does.
    tokens : int
        Rows of x.

    Returns
    -------
    dict of str to StepWork
        ``"factored"`` is in it where the update factors.

    Examples
    --------
    >>> import tnadapt as tna
    >>> from tnadapt.algebra.factoring import factoring
    >>> plan = tna.SuperLoRA(tna.presets.lora(4), [(768, 768)])
    >>> found = costs(plan, 0, factoring(plan, 0))
    >>> found["weight"].large == 2 * 2048 * 768 * 768  # one product for the gradient of W + ΔW
    True
    """
    rows, cols = plan.shapes[index]
    size, product = rows * cols, 2.0 * tokens * rows * cols
    # ΔW is formed in forward and again in backward; its gradient goes through the same products to either factor.
    formed = _formed(plan, index)
    pulled = StepWork(0.0, 2 * formed.narrow, 2.0 * size, 2 * formed.calls)
    update = formed + formed + pulled
    found = {
        # The sum twice, and the gradient of the sum.
        "weight": update + StepWork(product, 0.0, 5.0 * size, 14),
        # Three products of that size, which read ΔW twice; y and the gradient of x are added to.
        "additive": update + StepWork(3 * product, 0.0, 5.0 * size + 4.0 * tokens * (rows + cols), 20),
    }
    if how is not None:
        found["factored"] = _factored(how, tokens)
    return found


def choose(
    plan: SuperLoRA, index: int, how: Factoring | None, tokens: int = TOKENS, machine: Machine = MACHINES["cpu"]
) -> str:
    """The strategy of least cost, for a weight that can be added to.

    Examples
    --------
    >>> import tnadapt as tna
    >>> from tnadapt.algebra.factoring import factoring
    >>> plan = tna.SuperLoRA(tna.presets.krona(), [(768, 768)])
    >>> [choose(plan, 0, factoring(plan, 0), tokens) for tokens in (64, 8192)]
    ['factored', 'weight']
    """
    found = costs(plan, index, how, tokens)
    return min(found, key=lambda strategy: found[strategy].seconds(machine))


def _factored(how: Factoring, tokens: int) -> StepWork:
    """The products with the factors, forward and, twice that, backward."""
    total = StepWork(calls=8)
    for _ in range(how.terms):
        total += _of_last(how.sizes, tokens)
        inner = tokens * math.prod(size.cols for size in how.sizes)
        width = how.sizes[-1].width
        inner = inner if width is None else inner // how.sizes[-1].cols * width
        for size in how.sizes[:-1]:
            # This mode's columns become its rows; all else stays.
            after = inner // size.cols * size.rows
            operations = 2.0 * (inner * size.rows if size.width is None else (inner + after) * size.width)
            # Made in forward and again in backward, where there are two gradients; a small product for each row of x,
            # at half the speed of one long one.
            total += StepWork(0.0, 8 * operations, 8.0 * (inner + after), 24)
            inner = after
    return total


def _of_last(sizes: tuple[Size, ...], tokens: int) -> StepWork:
    """x by the right factor, and what that becomes by the left one, which adds to the output."""
    last, out = sizes[-1], tokens * math.prod(size.rows for size in sizes)
    given = tokens * math.prod(size.cols for size in sizes)
    # Digits of the rows are made by the other matrices before the last left factor is met.
    if last.width is None:
        return StepWork(0.0, 6.0 * out * last.cols, 4.0 * out + 4.0 * given, 8)
    return StepWork(0.0, 6.0 * (given + out) * last.width, 4.0 * out + 4.0 * given, 12)


def _formed(plan: SuperLoRA, index: int) -> StepWork:
    """One weight's update, made once, of what is in all of them alike: what F does is left out."""
    total = StepWork()
    for piece in plan.layout.of_weight(index):
        total += _of_network(plan.groups[piece.group].network, float(piece.length))
    return total


def _of_network(network: Network, size: float) -> StepWork:
    total = StepWork()
    for split in network.splits:
        # Of a Kronecker product each split makes its own small tensor.
        own = size if not network.kronecker else min(size, float(math.prod(split.sizes)))
        width = split.products
        total += StepWork(0.0, 2.0 * own * width, own if width else 0.0, 4 if width else 1)
    extra = len(network.splits) - 1
    total += StepWork(0.0, 0.0, 2.0 * size * bool(extra), 3 * extra)
    return StepWork(*(network.terms * value for value in total))
