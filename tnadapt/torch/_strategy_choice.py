"""Choice of the strategy of a weight: the cost model behind "auto", and the strategies that are refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from tnadapt.algebra.applying import AXES, Add, Applying
from tnadapt.algebra.config import Config
from tnadapt.algebra.factoring import Factoring, Size, factoring
from tnadapt.algebra.maps import Map
from tnadapt.algebra.update_plan import UpdatePlan
from tnadapt.errors import ConfigError, TargetError, safe_repr
from tnadapt.targets.target import RowIndices, Target

from ._forms import MOST_ELEMENTS
from ._forward_pass import is_lookup
from ._forward_patch import ForwardPatch
from ._quantized import QuantizedLayer, is_packed, quantized_type
from ._weights import numbers, tokens_of_one

# -- The cost model: operations, bytes and calls of a training step, in seconds ----------------------------------------

# This is a model, not a measurement: a few numbers describe a machine, and the three strategies are compared by their
# work beyond the layer itself. The documentation's page on strategies has the reasoning. ``benchmarks/strategies.py``
# measures how close the choice is to the best, and is the source of the numbers for the CPU; the GPU's are assumptions.


#: Default number of rows of x per call of a layer: about ten images of 197 tokens, or four texts of 512.
TOKENS = 2048

_SUM = Add()
#: Calls of an update that is two stored arrays, in a small layer and in any other, from ``benchmarks/strategies.py``.
_STORED_SMALL, _STORED = 4, 10
_ITEM = 4  # bytes of float32; with a smaller dtype all strategies move proportionally less


class Machine(NamedTuple):
    """The speed of a machine.

    Attributes
    ----------
    operations : float
        Floating-point operations per second in a large matrix product.
    narrow : float
        The same where one side of the product is narrow, as with low-rank factors.
    bytes : float
        Bytes read or written per second.
    call : float
        Seconds per operation on arrays, however small, including its part in autograd.
    """

    operations: float
    narrow: float
    bytes: float
    call: float


#: For one core or several: all numbers are assumed to scale alike.
MACHINES: Mapping[str, Machine] = {
    "cpu": Machine(operations=1.7e11, narrow=1e11, bytes=1.25e10, call=2.0e-5),
    # Not measured: a card with 60 teraflops in TF32 and 1.5 TB/s, and the time of a kernel launch from Python.
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
        """Return the time that the work takes on a machine."""
        return (
            self.large / machine.operations
            + self.narrow / machine.narrow
            + _ITEM * self.moved / machine.bytes
            + self.calls * machine.call
        )


def costs(
    plan: UpdatePlan, index: int, how: Factoring | None, tokens: int = TOKENS, applying: Applying = _SUM
) -> dict[str, StepWork]:
    """Return the work of each strategy in one training step, beyond the layer's own two products.

    Parameters
    ----------
    plan : UpdatePlan
    index : int
        Index of the weight.
    how : Factoring or None
        The factors of the update, if it has any.
    tokens : int
        Rows of x.
    applying : Applying
        How the update meets the weight.

    Returns
    -------
    dict of str to StepWork
        Includes ``"factored"`` if the update has factors that the layer can use.

    Examples
    --------
    >>> import tnadapt as tna
    >>> from tnadapt.algebra.factoring import factoring
    >>> plan = tna.UpdatePlan(tna.presets.lora(4), [(768, 768)])
    >>> work = costs(plan, 0, factoring(plan, 0))
    >>> work["weight"].large == 2 * 2048 * 768 * 768  # one product for the gradient of W + ΔW
    True
    """
    rows, cols = plan.shapes[index]
    size, product = rows * cols, 2.0 * tokens * rows * cols
    # ΔW is computed in forward and again in backward; backward has two products of the same size, one per factor.
    formed = _formed(plan, index)
    pulled = StepWork(0.0, 2 * formed.narrow, 2.0 * size, 2 * formed.calls)
    update = formed + formed + pulled
    step_work = {
        # The sum is computed twice, and there is the gradient of the sum.
        "weight": update + StepWork(product, 0.0, 5.0 * size, 14),
        # Three products of that size, which read ΔW twice; additions to y and to the gradient of x.
        "additive": update + StepWork(3 * product, 0.0, 5.0 * size + 4.0 * tokens * (rows + cols), 20),
    }
    if how is not None and applying.takes_factors:
        step_work["factored"] = _factored(how, tokens)
    if applying.additive:
        return step_work
    if not applying.scales_outputs:
        del step_work["additive"]
    norm = _norm(applying, (rows, cols))
    # W ∘ ΔW, where it is that which is added to W; where outputs are not scaled, ΔW is added but has no strategy.
    multiplied = 3.0 * size if applying.scales_outputs and not applying.takes_factors else 0.0
    quotient = StepWork()
    if applying.rescales:
        # Forward: ΔW, the sum and its norm. Backward: ΔW and the sum again, and their gradients. Then y and its
        # gradient, times q.
        again = StepWork(0.0, 0.0, 3.0 * size, 1)
        quotient = formed + formed + pulled + norm + again + again
        quotient += StepWork(0.0, 0.0, 2.0 * size + 8.0 * tokens * rows, 16)
    # W' is computed three times: in forward, and in backward for the gradient of x and for that of W', which is another
    # sum. Then its gradient goes to ΔW, and to W, whether or not W is trained.
    changed_weight = norm + StepWork(0.0, 0.0, multiplied + 2.0 * size * applying.rescales, 1 + applying.rescales)
    gradients = 9.0 * size if multiplied else 0.0
    gradients += 9.0 * size if applying.rescales else 0.0
    extra = {
        "weight": changed_weight + changed_weight + changed_weight + StepWork(0.0, 0.0, 3.0 * size + gradients, 10),
        # The product in forward, and that with the gradient in backward.
        "additive": quotient + StepWork(0.0, 0.0, 2.0 * multiplied, 4 * bool(multiplied)),
        "factored": quotient,
    }
    return {strategy: work + extra[strategy] for strategy, work in step_work.items()}


def _norm(applying: Applying, shape: tuple[int, int]) -> StepWork:
    """Return the work of the norms of rows or columns, in float64, whose elements count twice."""
    if not applying.rescales:
        return StepWork()
    levels = math.ceil(math.log2(shape[AXES[applying.axis]])) if shape[AXES[applying.axis]] > 1 else 0
    # To float64, 1 + 2; squares, 2 + 2; and half of them added to the others, 2 + 1, in all twice as much.
    return StepWork(0.0, 0.0, 13.0 * math.prod(shape), 4 * levels + 16)


def choose(
    plan: UpdatePlan,
    index: int,
    how: Factoring | None,
    tokens: int = TOKENS,
    machine: Machine = MACHINES["cpu"],
    applying: Applying = _SUM,
    dropout: bool = False,
    packed: float | None = None,
) -> str:
    """Return the cheapest strategy for a weight; of a quantized one, to which nothing can be added, with ``packed``.

    Parameters
    ----------
    plan, index, how, tokens, applying
        As for :func:`costs`.
    machine : Machine
    dropout : bool
        Whether there is dropout: then the weight strategy has a second product in training, as the additive one.
    packed : float, optional
        For a quantized weight: elements moved to dequantize one element of it.

    Notes
    -----
    "additive" is never cheaper for a sum. For another change it can be, by a little where x has few rows, but keeps a
    matrix of the weight's size for backward, as much as a second model: it is not chosen unless the weight is
    quantized, and then only if it is cheaper than "factored".

    Examples
    --------
    >>> import tnadapt as tna
    >>> from tnadapt.algebra.factoring import factoring
    >>> plan = tna.UpdatePlan(tna.presets.krona(), [(768, 768)])
    >>> [choose(plan, 0, factoring(plan, 0), tokens) for tokens in (64, 8192)]
    ['factored', 'weight']
    >>> [choose(plan, 0, factoring(plan, 0), tokens, packed=6.0) for tokens in (64, 8192)]
    ['factored', 'factored']
    """
    step_work = costs(plan, index, how, tokens, applying)
    additive = step_work.pop("additive", None)
    if packed is not None:
        extra = dequantized(applying, plan.shapes[index], packed)
        del step_work["weight"]
        step_work |= {} if additive is None else {"additive": additive}
        step_work = {strategy: work + extra[strategy] for strategy, work in step_work.items()}
    elif dropout and additive is not None and applying.additive:
        step_work["weight"] = additive
    return min(step_work, key=lambda strategy: step_work[strategy].seconds(machine))


def dequantized(applying: Applying, shape: tuple[int, int], packed: float) -> dict[str, StepWork]:
    """Return the work of dequantizing that the strategies for a quantized weight add to a step of the layer itself.

    A sum needs none: the layer's own product is as without an adapter. W ∘ ΔW is formed from the numbers of W, once: it
    is kept for backward. The norms of W + ΔW are computed in forward and again in backward.

    Examples
    --------
    >>> {strategy: work.moved for strategy, work in dequantized(Add(), (4, 8), 6.0).items()}
    {'additive': 0.0, 'factored': 0.0}
    """
    once = StepWork(0.0, 0.0, packed * math.prod(shape), 4)
    norms = once + once if applying.rescales else StepWork()
    multiplied = StepWork() if applying.takes_factors else once
    return {"additive": norms + multiplied, "factored": norms}


def _factored(how: Factoring, tokens: int) -> StepWork:
    """Return the work of the products with the factors, in forward, and twice as much in backward."""
    if how.stored is not None:
        # Two arrays as they are, and no Kronecker product: for a small layer four products without Python in backward.
        small = tokens * max(how.sizes[0].rows, how.sizes[0].cols) <= MOST_ELEMENTS
        return _of_last(how.sizes, tokens)._replace(calls=_STORED_SMALL if small else _STORED)
    total = StepWork(calls=8)
    for _ in range(how.terms):
        total += _of_last(how.sizes, tokens)
        inner = tokens * math.prod(size.cols for size in how.sizes)
        width = how.sizes[-1].width
        inner = inner if width is None else inner // how.sizes[-1].cols * width
        for size in how.sizes[:-1]:
            # This mode's columns are replaced by its rows; the other modes stay.
            after = inner // size.cols * size.rows
            operations = 2.0 * (inner * size.rows if size.width is None else (inner + after) * size.width)
            # Forward, its recomputation in backward and two gradients; one small product per row of x, which runs at
            # half the speed of one large product.
            total += StepWork(0.0, 8 * operations, 8.0 * (inner + after), 24)
            inner = after
    return total if how.sides is None else total + _of_sides(*how.sides, tokens)


def _of_sides(rows: Map, cols: Map, tokens: int) -> StepWork:
    """Return the work of the maps before and after the products: in forward, again in backward, and their adjoints."""
    mapped = [map_ for map_ in (rows, cols) if not map_.identity]
    moved = sum(2.0 * map_.n_in + 3.0 * map_.n_out for map_ in mapped)
    return StepWork(0.0, 6.0 * tokens * sum(map_.cost() or 0 for map_ in mapped), tokens * moved, 10 * len(mapped))


def _of_last(sizes: tuple[Size, ...], tokens: int) -> StepWork:
    """Return the work of the last mode: x times the right factor, times the left one, added to the output."""
    last, out = sizes[-1], tokens * math.prod(size.rows for size in sizes)
    inputs = tokens * math.prod(size.cols for size in sizes)
    # The other matrices are applied in between, so the last left factor already sees their rows.
    if last.width is None:
        return StepWork(0.0, 6.0 * out * last.cols, 4.0 * out + 4.0 * inputs, 8)
    return StepWork(0.0, 6.0 * (inputs + out) * last.width, 4.0 * out + 4.0 * inputs, 12)


def _formed(plan: UpdatePlan, index: int) -> StepWork:
    """Return the work of computing one weight's update once, except F, which all strategies share."""
    total = StepWork()
    for piece in plan.layout.of_weight(index):
        network, size = plan.groups[piece.group].network, float(piece.length)
        extra = len(network.splits) - 1
        work = StepWork(0.0, 0.0, 2.0 * size * bool(extra), 3 * extra)
        for split in network.splits:
            # In a Kronecker product each split computes a small tensor.
            elements = size if not network.kronecker else min(size, float(math.prod(split.sizes)))
            width = split.products
            work += StepWork(0.0, 2.0 * elements * width, elements if width else 0.0, 4 if width else 1)
        total += StepWork(*(network.terms * value for value in work))
    return total


# -- The choice --------------------------------------------------------------------------------------------------------


def strategy_of(
    wanted: str,
    plan: UpdatePlan,
    index: int,
    tokens: int,
    target: Target,
    owner: nn.Module,
    host: nn.Module,
    activation: str | None,
    dropout: bool = False,
) -> tuple[str, Factoring | None]:
    """Return the strategy for a weight, and the factors of its update where the strategy uses them."""
    config, applying, plan = plan.config, plan.applying, plan.arrays_plan
    layer_type, quantized = quantized_type(owner), is_quantized(owner, target)
    embeds = isinstance(owner, nn.Embedding) or (layer_type is not None and layer_type.looks_up(owner))
    looks_up = host is owner and target.parameter == "weight" and _looks_up(owner)
    if embeds and quantized and (layer_type is None or not looks_up):
        raise TargetError(
            f"{target.name} belongs to a quantized embedding, {type(owner).__name__}, whose forward tnadapt does not "
            "know as a lookup: leave it out of the targets, or register its type with tnadapt.torch.register_quantized"
        )
    if quantized and looks_up and not applying.additive:
        raise ConfigError(
            f"apply={config.apply!r} of {target.label} does more than add rows of ΔW, and the embedding is quantized: "
            "use apply='add', or leave it out of the targets"
        )
    if quantized and wanted == "weight":
        raise ConfigError(f"strategy='weight' cannot add to {target.name}, which is quantized: use 'additive'")
    if looks_up and activation is None:
        return _of_lookup(wanted, plan, index, target, config, applying)
    # Adding to the output must be equivalent to changing the weight, which is certain only for linear forwards.
    linear = type(owner).forward is nn.Linear.forward or type(owner).__name__ == "Conv1D"
    linear = linear or (quantized and not embeds and not isinstance(owner, nn.modules.conv._ConvNd))
    is_product = host is owner and linear and len(target.stored) == 2 and target.parameter == "weight"
    if target.index is not None and not quantized and activation is None:
        # Whatever the module does with the matrices of its experts, the update of one acts on products with it.
        is_product, tokens = True, tokens_of_one(owner, tokens, target.stored[0])
    how = factoring(plan, index) if is_product and applying.takes_factors else None
    if activation is not None and not applying.additive:
        raise ConfigError(
            f"activation={activation!r} acts on the input of one of two factors, so that there is no ΔW, and "
            f"apply={config.apply!r} needs one: leave activation out, or use apply='add'"
        )
    if quantized and not applying.additive and numbers(owner, target.parameter) is None:
        raise ConfigError(
            f"apply={config.apply!r} needs the values of {target.name}, which is quantized, and they cannot be read: "
            "register its layer type with tnadapt.torch.register_quantized"
        )
    if quantized and not applying.additive and not applying.scales_outputs:
        raise ConfigError(
            f"magnitude_axis={config.magnitude_axis!r} changes the weight itself, and {target.name} is quantized: use "
            "magnitude_axis='rows', which scales the output"
        )
    if activation is not None:
        if plan.point.subtracts:
            raise ConfigError(
                f"activation={activation!r} depends on the input, so that the update of a start cannot be subtracted: "
                f"use start='zero' instead of {config.start!r}"
            )
        if how is None or not how.is_plain or wanted not in ("auto", "factored"):
            raise ConfigError(
                f"activation={activation!r} acts between the two factors of one low-rank matrix per weight, in the "
                f"factored strategy; {target.name} with {safe_repr(config)} has none: use tnadapt.presets.lora(rank)"
            )
        split = how.network.splits[0]
        left = how.network.prefixes[0][0] + split.zero
        if activation == "relu" and not all(f"{zero}.".startswith(f"{left}.") for zero in how.group.start.zeros):
            raise ConfigError(
                f"activation='relu' has the derivative zero at zero, and config.sources freezes {split.zero!r}, the "
                "array that has to start at zero behind it: nothing would learn. Use another activation, or train it"
            )
        return "factored", how
    if wanted == "factored" and how is None:
        raise ConfigError(
            "strategy='factored' needs a linear layer, and an update whose rows and columns are separate, as those of "
            f"tnadapt.presets.lora(rank) or lokr(rank) are; {target.name} has {safe_repr(config)}: use strategy='auto'"
        )
    if wanted == "additive" and not applying.scales_outputs:
        raise ConfigError(
            f"strategy='additive' adds to the output, and magnitude_axis={config.magnitude_axis!r} scales the input of "
            f"{target.name}: use 'weight'"
        )
    if wanted == "additive" and not is_product:
        raise ConfigError(
            f"strategy='additive' needs a linear layer; {target.name} is read by {type(host).__name__} itself: "
            "use 'weight'"
        )
    if wanted != "auto":
        return wanted, how if wanted == "factored" else None
    if is_product and not quantized and isinstance(target.rows, RowIndices) and applying.additive:
        return "additive", None  # a product with a few rows is cheaper than copying the weight of a whole vocabulary
    if is_product:
        weight = owner._parameters.get(target.parameter)
        machine = MACHINES.get("cpu" if weight is None else weight.device.type, MACHINES["cpu"])
        packed = (layer_type or QuantizedLayer).moved if quantized else None
        chosen = choose(plan, index, how, tokens, machine, applying, dropout, packed)
        return chosen, how if chosen == "factored" else None
    if quantized:
        raise TargetError(
            f"{target.name} is quantized and read by {type(host).__name__} itself: leave it out of the targets"
        )
    return "weight", None


def _of_lookup(
    wanted: str, plan: UpdatePlan, index: int, target: Target, config: Config, applying: Applying
) -> tuple[str, Factoring | None]:
    """Return the strategy for an embedding, whose updates can be looked up like its weight."""
    if not applying.additive:
        if wanted in ("auto", "weight"):
            return "weight", None
        raise ConfigError(
            f"strategy={wanted!r} looks up rows of ΔW, and apply={config.apply!r} of {target.label} does more than add "
            "them: use 'weight', or 'auto'"
        )
    # The rows of a few tokens are as cheap to compute as their factors.
    few = isinstance(target.rows, RowIndices)
    how = factoring(plan, index) if wanted == "factored" or (wanted == "auto" and not few) else None
    if how is not None and how.sides is not None:
        how = None  # a map of rows would mix the rows that are looked up
    if wanted == "factored" and how is None:
        raise ConfigError(
            "strategy='factored' looks up rows of a factor, and needs an update whose rows and columns are separate, "
            f"as those of tnadapt.presets.lora(rank) are; {target.label} has {safe_repr(config)}: use strategy='auto'"
        )
    if wanted == "auto":
        return ("additive" if how is None else "factored"), how
    return wanted, how


def _looks_up(host: nn.Module) -> bool:
    patch = ForwardPatch.of(host)
    before = host.__dict__.get("forward") if patch is None else patch.before
    return before is None and is_lookup(host)


def is_quantized(owner: nn.Module, target: Target) -> bool:
    """Return whether a weight has no numbers to read in place."""
    weight = owner._parameters.get(target.parameter)
    if weight is None or not weight.is_floating_point() or is_packed(weight):
        return True
    return quantized_type(owner) is not None
