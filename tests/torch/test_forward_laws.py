"""Whatever a layer is, and however it uses its updates: its output and both derivatives are those of the formula.

The formula is written out here in float64 and differentiated by autograd: ``y = x W'ᵀ + b``, and with dropout
``y = x Wᵀ + b + drop(x) (W' - W)ᵀ``. It shares no product with the layers; ΔW is compared with the textbook formula.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn
from torch.nn import functional

import tnadapt as tna
import tnadapt.torch as tt
from tests.support.array_presets import P
from tests.support.depth import LONG, in_depth
from tests.support.references import reference

from .internals import forms, forward_pass
from .small import stir

CONFIGS = {
    "lora": P.lora(2, alpha=3),
    "pissa": P.lora(2, start="pissa"),
    "lokr": P.lokr(2, alpha=3),
    "lokr low rank": P.lokr(1, leading="same"),
    "krona": P.krona(alpha=2),
    "three": tna.Config(rank=1, splits=3, format="cp"),
    "three dense": tna.Config(splits=3, format="dense"),
    "compacter": P.compacter(terms=2),
    "loha": P.loha(2),
    "tucker": tna.Config(rank=2, format="tucker"),
    "train": tna.Config(rank=2, format="tt"),
    "weighted": tna.Config(rank=2, format="cp-weighted", terms=2),
    "gralora": P.gralora(2, 2),
    "cut product": P.lokr(1, leading="same", split_size=5),
    "product that subtracts": P.lokr(1, alpha=3, start="random"),
    "miss": P.miss(4, alpha=3),
    "miss that is cut": P.miss(3),
    "miss of rows": P.miss(5, 3),
    "miss that subtracts": P.miss(4, alpha=3, start="random"),
    "cosines": tna.Config(projection="dct2", on="weight", alpha=3),
    "slices": P.superlora(2, alpha=3),
    "slices that subtract": P.superlora(2, start="random"),
    "slices of products": tna.Config(rank=1, splits=2, format="cp", groups=1),
    "slices of a train": P.lorta(2),
    "behind F": P.superlora(2, projection="linear", ratio=0.5),
    "behind F of each": P.superlora(2, groups="weight", projection="linear_v2", ratio=0.5),
    "tied behind F": P.superlora(
        2, groups=2, projection="linear", ratio=0.5, sources={"factor1": tna.sources.Tied("group0.split0.factor1")}
    ),
    "behind a nonlinear F": P.superlora(2, projection="nonlinear", ratio=0.5),
    "dora": P.dora(2),
    "dora of products": P.lokr(2, apply="magnitude"),
    "dora of slices": P.superlora(2, apply="magnitude"),
    "dora of columns": P.dora(2, magnitude_axis="cols"),
    "dora behind F": P.superlora(2, projection="linear", ratio=0.5, apply="magnitude"),
    "hira": P.hira(2),
    "hira of slices": P.superlora(2, apply="hadamard"),
    "hira behind F": P.superlora(2, projection="linear", ratio=0.5, apply="hadamard"),
}
#: Those whose updates have rows and columns apart.
FACTORED = (
    "lora", "pissa", "lokr", "lokr low rank", "krona", "three", "three dense", "compacter", "loha", "tucker", "train",
    "weighted", "gralora", "cut product", "product that subtracts", "miss", "miss that is cut", "miss of rows",
    "miss that subtracts", "cosines", "dora", "dora of products",
)  # fmt: skip
#: One of each kind of update, for what does not depend on its form.
FEW = ("lora", "lokr", "slices", "behind F", "dora", "hira")


# -- The formula ---------------------------------------------------------------------------------


def changed_rows(config: tna.Config, rows: Tensor, delta: Tensor, magnitude: Tensor | None) -> Tensor:
    """Return the rows of W' of a target."""
    if config.apply == "add":
        return rows + delta
    if config.apply == "hadamard":
        return rows * (1.0 + delta)
    assert magnitude is not None
    total, axis = rows + delta, 1 if config.magnitude_axis == "rows" else 0
    return magnitude.unsqueeze(axis) * total / total.square().sum(axis, keepdim=True).sqrt()


def matrix_of_layer(layer: nn.Module) -> Tensor:
    """Return a layer's weight as ``(out, in)``."""
    weight: Any = layer.weight
    return weight.T if type(layer).__name__ == "Conv1D" else weight.reshape(len(weight), -1)


def output_of(layer: Any, matrix: Tensor, x: Tensor) -> Tensor:
    """Return the output of a layer without its bias, for a weight ``(out, in)``."""
    if isinstance(layer, nn.Embedding):
        return functional.embedding(x, matrix, layer.padding_idx)
    if isinstance(layer, nn.Conv2d):
        weight = matrix.reshape(layer.weight.shape)
        return functional.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    return x @ matrix.T


class Attached(NamedTuple):
    """An adapter with the leaves that the formula is differentiated by."""

    adapter: tt.Adapter
    leaves: dict[str, Tensor]
    start: dict[str, Tensor]

    def deltas(self) -> list[Tensor]:
        """Return every ΔW, without the mixing weight: those of the textbook formula, with derivatives."""
        plan = self.adapter.plan.arrays_plan
        deltas = plan.deltas({name: self.leaves[name] for name in plan.param_shapes})
        # Arrays that are tied have the name of the first.
        groups = enumerate(group.names.items() for group in plan.groups)
        names = {f"group{number}.{own}": full for number, pairs in groups for own, full in pairs}
        arrays, start = (
            {own: given[full].detach().numpy() for own, full in names.items()} for given in (self.leaves, self.start)
        )
        expected = reference.deltas(plan.config, plan.shapes, arrays, start=start)
        for delta, formula in zip(deltas, expected, strict=True):
            torch.testing.assert_close(delta.detach(), torch.from_numpy(formula), rtol=1e-11, atol=1e-11)
        return deltas

    def change(self, deltas: Sequence[Tensor], place: str, weight: Tensor, mixing: float) -> Tensor | None:
        """Return W' - W of a layer; None if the adapter does not change it."""
        plan, total, acts = self.adapter.plan, weight, False
        for index, delta in enumerate(deltas):
            target = self.adapter.targets[index]
            if target.module != place:
                continue
            numbers = torch.tensor(range(len(weight)) if target.rows is None else target.rows.indices())
            names = plan.weight_param_names[index]
            rows = changed_rows(plan.config, weight[numbers], mixing * delta, self.leaves[names[0]] if names else None)
            total, acts = total.index_copy(0, numbers, rows), True
        return total - weight if acts else None


def by_formula(
    model: nn.Sequential, several: Sequence[Attached], x: Tensor, names: Sequence[str | None] | None = None
) -> Tensor:
    """Return the model's output; the adapters of rows by their names, if they are given."""
    deltas = {one.adapter.name: one.deltas() for one in several}
    for place, layer in model.named_children():
        if not isinstance(getattr(layer, "weight", None), Tensor):
            x = layer(x)
            continue
        weight = matrix_of_layer(layer)
        y = output_of(layer, weight, x)
        groups: list[tuple[Attached, Tensor, float]] = []
        for one in several:
            mixing = one.adapter.weight
            if names is None:
                rows = torch.arange(len(x))
            else:
                rows = torch.tensor([row for row, name in enumerate(names) if name == one.adapter.name])
                mixing = mixing or 1.0
            if len(rows) and mixing and one.adapter.enabled:
                groups.append((one, rows, mixing))
        if names is not None:
            # Each group draws its own zeros: in the order of their first rows.
            groups.sort(key=lambda group: int(group[1][0]))
        for one, rows, mixing in groups:
            change = one.change(deltas[one.adapter.name], place, weight, mixing)
            if change is None:
                continue
            own = x[rows]
            if model.training and not isinstance(layer, nn.Embedding) and one.adapter.dropout:
                own = functional.dropout(own, one.adapter.dropout, training=True)
            y = y.index_add(0, rows, output_of(layer, change, own))
        if getattr(layer, "bias", None) is not None:
            y = y + (layer.bias.view(-1, 1, 1) if isinstance(layer, nn.Conv2d) else layer.bias)
        x = y
    return x


# -- Models --------------------------------------------------------------------------------------


def fused() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 24))


def transposed() -> nn.Sequential:
    from transformers.pytorch_utils import Conv1D

    return nn.Sequential(Conv1D(12, 8), nn.Tanh(), Conv1D(8, 12))


def embedded() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(12, 8, padding_idx=3), nn.Tanh(), nn.Linear(8, 12))


T = tna.Target
LAYERS: dict[str, tuple[Any, list[tna.Target]]] = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8, bias=False)),
        [T("0", (12, 8)), T("2", (8, 12))],
    ),
    "fused": (fused, [T("0", (24, 8), rows=tna.Rows(0, 8, 24)), T("0", (24, 8), rows=tna.Rows(12, 12, 24))]),
    "blocks": (fused, [T("0", (24, 8), rows=tna.Rows(2, 4, 12, 2)), T("0", (24, 8), rows=tna.Rows(8, 4, 12, 2))]),
    "indices": (fused, [T("0", (24, 8), rows=tna.RowIndices([0, 3, 4, 11, 12, 17, 20, 23]))]),
    "transposed": (transposed, [T("0", (8, 12), transposed=True), T("2", (12, 8), transposed=True)]),
    "transposed rows": (transposed, [T("0", (8, 12), transposed=True, rows=tna.Rows(4, 8, 12))]),
    "conv": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 8, (2, 3), padding=1), nn.Tanh(), nn.Conv2d(8, 4, 1, bias=False, padding="same")
        ),
        [T("0", (8, 2, 2, 3)), T("2", (4, 8, 1, 1))],
    ),
    "grouped conv": (lambda: nn.Sequential(nn.Conv2d(4, 6, 2, groups=2, stride=2)), [T("0", (6, 2, 2, 2))]),
    "embedding": (embedded, [T("0", (12, 8), role="embedding"), T("2", (12, 8))]),
    "embedding blocks": (
        embedded,
        [T("0", (12, 8), role="embedding", rows=tna.Rows(1, 2, 4, 3)), T("2", (12, 8))],
    ),
    "tokens": (
        embedded,
        [T("0", (12, 8), role="embedding", rows=tna.RowIndices([1, 3, 4, 5, 7, 8, 10, 11])), T("2", (12, 8))],
    ),
}
EMBEDDINGS = ("embedding", "embedding blocks", "tokens")
#: Inputs of few tokens and of many, in this order.
SHAPES: dict[str, list[tuple[int, ...]]] = {
    "conv": [(2, 2, 4, 5), (6, 2, 4, 5)],
    "grouped conv": [(2, 4, 4, 6), (5, 4, 2, 4)],
}


class Case(NamedTuple):
    """A layer, an update, a strategy, and how adapters are mixed."""

    layer: str
    config: str
    strategy: str
    mix: str

    def __str__(self) -> str:
        return ", ".join(self)


#: The mixing weight of the adapter, and that of a second one, if there is one. Two that do not add up are not active
#: at once.
MIXES: dict[str, tuple[float, float | None]] = {
    "whole": (1.0, None), "part": (-0.6, None), "two": (0.7, -1.5), "second alone": (0.0, 1.0),
    "two alone": (0.7, -1.5),
}  # fmt: skip


def strategies_of(layer: str, config: str) -> list[str]:
    """Return the strategies that a layer has with an update; the automatic choice is one of them."""
    looks_up = layer in EMBEDDINGS  # the linear layer behind it has all of them
    if "conv" in layer or (looks_up and CONFIGS[config].apply != "add"):
        return ["weight"]
    several = ["weight"]
    if config in FACTORED and not (looks_up and CONFIGS[config].projection != "identity"):
        several.append("factored")
    if config != "dora of columns":
        several.append("additive")
    return several


def cases(layers: Sequence[str], configs: Sequence[str], mixes: Sequence[str]) -> list[Case]:
    return [
        Case(layer, config, strategy, mix)
        for layer, config, mix in itertools.product(layers, configs, mixes)
        if mix != "two" or CONFIGS[config].apply == "add"
        for strategy in strategies_of(layer, config)
    ]


#: Every update on a layer of its own, every layer with one update of each kind, every mix.
SOME = [
    *cases(["linear"], list(CONFIGS), ["part"]),
    *cases([layer for layer in LAYERS if layer != "linear"], ["lora", "dora"], ["part"]),
    *cases(["fused", "conv", "embedding"], ["slices"], ["part"]),
    *cases(["linear"], ["lora", "slices", "dora"], ["whole", "two", "second alone"]),
    *cases(["fused"], ["lora", "lokr", "behind F", "hira"], ["two"]),
    *cases(["embedding"], ["lokr", "compacter"], ["part"]),
]
ALL = cases(list(LAYERS), list(CONFIGS), [mix for mix in MIXES if mix != "two alone"])


def attached(case: Case, dropout: float = 0.0, second: str = "slices") -> tuple[nn.Sequential, list[Attached]]:
    """Return a model with its adapters, moved from their starts; the second one of another form."""
    build, targets = LAYERS[case.layer]
    torch.manual_seed(0)
    model: nn.Sequential = build().double()
    several = []
    for number, weight in enumerate(MIXES[case.mix]):
        if weight is None:
            continue
        config, strategy = (CONFIGS[case.config], case.strategy) if number == 0 else (CONFIGS[second], "auto")
        adapter = tt.attach(
            model,
            config,
            targets,
            f"adapter{number}",
            strategy=strategy,
            dtype=torch.float64,
            dropout=dropout / (1 + number),
        )
        start = {name: array.detach().clone() for name, array in adapter.arrays().items()}
        stir(adapter, 0.4, seed=number)
        adapter.set_weight(weight)
        leaves = {name: array.detach().clone().requires_grad_() for name, array in adapter.arrays().items()}
        several.append(Attached(adapter, leaves, start))
    return model, several


def inputs(case: Case) -> list[Tensor]:
    """Return inputs of few tokens and of many."""
    generator = torch.Generator().manual_seed(1)
    if case.layer in EMBEDDINGS:
        return [torch.tensor([[3, 1, 4]]), torch.randint(12, (4, 7), generator=generator)]
    shapes = SHAPES.get(case.layer, [(3, 8), (2, 5, 8)])
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@contextlib.contextmanager
def large_layers(is_large: bool) -> Iterator[None]:
    """Let every layer count as a large one, which has its own ways with and without gradients."""
    with pytest.MonkeyPatch.context() as patch:
        if is_large:
            patch.setattr(forms, "MOST_ELEMENTS", -1)
            patch.setattr(forward_pass, "LEAST_ELEMENTS", 0)
        yield


def assert_close(found: Tensor, expected: Tensor, what: str) -> None:
    assert found.shape == expected.shape, what
    found, expected = found.detach(), expected.detach()
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    error = float((found - expected).abs().max()) if expected.numel() else 0.0
    assert error <= 1e-10 * scale, f"{what} is off by {error / scale:.1e}"


def curved(y: Tensor) -> Tensor:
    """Return a loss with derivatives of every order."""
    return torch.sin(3.0 * y).sum() + y.pow(3).sum()


def flat(y: Tensor) -> Tensor:
    """Return a loss that is linear in the output: its gradients depend on the factors and the input alone."""
    return (y * torch.linspace(-1.0, 1.0, y.numel(), dtype=torch.float64).reshape(y.shape)).sum()


def derivatives(loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradients of a loss, and those of a function of them."""
    first = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
    generator = torch.Generator().manual_seed(5)
    ways = [torch.randn(one.shape, generator=generator, dtype=torch.float64) for one in first]
    scalar = sum(((one * way).sum() for one, way in zip(first, ways, strict=True)), torch.zeros(()))
    second = torch.autograd.grad(scalar, leaves, materialize_grads=True)
    return [*(one.detach() for one in first), *second]


def check(
    model: nn.Sequential,
    several: Sequence[Attached],
    x: Tensor,
    names: Sequence[str | None] | None = None,
    losses: Sequence[Callable[[Tensor], Tensor]] = (curved,),
) -> None:
    """Compare a pass with and without gradients, and both derivatives, with the formula of the same zeros."""
    parameters = [parameter for one in several for parameter in one.adapter.parameters()]
    leaves = [leaf for one in several for leaf in one.leaves.values()]
    given: list[Tensor] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    given = [one for one in given if not any(one is parameter for parameter in parameters)]
    if x.is_floating_point():
        x = x.detach().clone().requires_grad_()
        given.append(x)

    def formula() -> Tensor:
        torch.manual_seed(11)
        # Each name stands for the same number of consecutive rows.
        rows = None if names is None else [name for name in names for _ in range(len(x) // len(names))]
        return by_formula(model, several, x, rows)

    def run() -> Tensor:
        torch.manual_seed(11)
        with contextlib.nullcontext() if names is None else tt.rows(model, names):
            return model(x)

    expected = formula()
    if not expected.requires_grad:  # indices, of the base alone
        assert_close(run(), expected, "the output")
        return
    found = run()
    assert_close(found, expected, "the output")
    wanted = torch.autograd.grad(curved(expected), [*given, *leaves], materialize_grads=True)
    once = torch.autograd.grad(curved(found), [*given, *parameters], materialize_grads=True)
    for number, (one, two) in enumerate(zip(once, wanted, strict=True)):
        assert_close(one, two, f"gradient {number}")
    for loss in losses:
        wanted = derivatives(loss(formula()), [*given, *leaves])
        for number, (one, two) in enumerate(zip(derivatives(loss(run()), [*given, *parameters]), wanted, strict=True)):
            assert_close(one, two, f"derivative {number} of a {loss.__name__} loss")
    for context in (torch.no_grad, torch.inference_mode, torch.no_grad):
        with context():
            assert_close(run(), expected.detach(), f"the output in {context.__name__}")


def passes(case: Case) -> list[tuple[Tensor, bool]]:
    """Return inputs, and whether layers count as large: the general way comes last."""
    few, many = inputs(case)
    found = [(few, False), (few, True), (many, True)]
    if case.strategy == "factored" and "transposed" not in case.layer:
        # Of other strides, which Conv1D does not take: products by ordinary operations.
        found.insert(0, (many.transpose(0, -2).contiguous().transpose(0, -2), False))
    return found


# -- The laws ------------------------------------------------------------------------------------


#: What is dropped: on the whole weight, on rows, for products, and by two adapters.
DROPPED = [
    *cases(
        in_depth(LAYERS, ["linear", "blocks", "conv", "grouped conv", "transposed", "transposed rows"]),
        in_depth(CONFIGS, FEW),
        ["part"],
    ),
    *cases(["linear"], [] if LONG else ["pissa", "dora of columns"], ["part"]),
    *cases(in_depth(LAYERS, ["linear", "embedding"]), in_depth(CONFIGS, ["lora", "slices"]), ["two"]),
]


@pytest.mark.law("attached-is-update")
@pytest.mark.parametrize(
    ("case", "dropout"),
    [*((case, 0.0) for case in (ALL if LONG else SOME)), *((case, 0.4) for case in DROPPED)],
    ids=str,
)
def test_outputs_and_derivatives_are_the_formula_s(case: Case, dropout: float) -> None:
    model, several = attached(case, dropout)
    losses = (curved, flat) if LONG or (case.strategy == "factored" and not dropout) else (curved,)
    *others, (x, is_large) = passes(case)[-2 if dropout else 0 :]
    for other, counts_as_large in others:
        with large_layers(counts_as_large):
            check(model, several, other)
    with large_layers(is_large):
        check(model, several, x, losses=losses)
        model.requires_grad_()  # also the gradients of a base that is trained
        check(model, several, x)
    if dropout:
        check(model.eval(), several, x)


A, B = "adapter0", "adapter1"
#: Rows of one adapter, of none, of two in several orders, in groups of equal size and not, and a row given twice.
ROWS: list[list[str | None]] = [[A, None, B, A], [B, A, A, B], [A, A], [None, B], [None, None]]


@pytest.mark.law("attached-is-update")
@pytest.mark.parametrize(
    ("case", "second"),
    [
        *itertools.product(
            cases(in_depth(LAYERS, ["linear", "blocks"]), in_depth(CONFIGS, FEW), ["two alone"]),
            in_depth(["lora", "slices"], ["lora"]),
        ),
        *itertools.product(cases(in_depth(LAYERS, ["linear"]), ["lora", "dora"], ["two alone"]), ["dora"]),
        *itertools.product(cases(["conv", "embedding", "tokens"], ["lora", "hira"], ["two alone"]), ["lora"]),
    ],
    ids=str,
)
def test_each_row_is_that_of_its_adapter_alone(case: Case, second: str) -> None:
    """Whatever the weights and the zeros, and also where a name stands for several rows."""
    for dropout, several_names in ((0.0, ROWS), (0.4, ROWS if LONG else ROWS[:1])):
        model, several = attached(case, dropout, second)
        # A convolution's channels could be as many as the names.
        for names, repeated in zip(several_names, itertools.cycle((1, 1 if "conv" in case.layer else 2)), strict=False):
            if names is ROWS[1]:  # two of one weight
                several[1].adapter.set_weight(several[0].adapter.weight)
            if names is ROWS[2]:  # one that is inactive without rows
                several[0].adapter.set_weight(0.0)
            shape = (len(names) * repeated, *inputs(case)[1].shape[1:])
            x = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
            if case.layer in EMBEDDINGS:
                x = torch.arange(math.prod(shape)).reshape(shape) % 12
            check(model, several, x, names)


def take_a_step(adapter: tt.Adapter, model: nn.Sequential, x: Tensor) -> None:
    optimizer = torch.optim.Adam([parameter for name, parameter in model.named_parameters() if "tnadapt_" in name], 0.1)
    model(x).square().sum().backward()
    optimizer.step()


def load_a_state_dict(adapter: tt.Adapter, model: nn.Sequential, x: Tensor, assign: bool = False) -> None:
    model.load_state_dict({name: 0.9 * tensor for name, tensor in model.state_dict().items()}, assign=assign)


def change_memory(adapter: tt.Adapter, model: nn.Sequential, x: Tensor) -> None:
    for array in adapter.parameters():
        array.data = 0.8 * array.data


#: Changes of an adapter or its base; those of arrays are without gradients.
CHANGES: dict[str, Callable[[tt.Adapter, nn.Sequential, Tensor], Any]] = {
    "nothing": lambda adapter, model, x: None,
    "a step": take_a_step,
    "a state dict": load_a_state_dict,
    "an assigned state dict": functools.partial(load_a_state_dict, assign=True),
    "one element": lambda adapter, model, x: list(adapter.parameters())[-1].detach().view(-1)[-1].add_(0.25),
    "memory": change_memory,
    "the mixing weight": lambda adapter, model, x: adapter.set_weight(-2.0),
    "the base": lambda adapter, model, x: model.get_parameter("0.weight").detach().mul_(1.5),
    "another step": take_a_step,
}


@pytest.mark.law("attached-is-update", "array-changes")
@pytest.mark.parametrize(
    "case",
    [
        *cases(["linear"], in_depth(CONFIGS, [*FEW, "pissa", "slices of products", "dora behind F"]), ["part"]),
        *cases(in_depth(LAYERS, ["blocks", "conv", "embedding"]), in_depth(CONFIGS, ["lora", "dora"]), ["part"]),
        *cases(["linear"], ["lora", "behind F"], ["two"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_large", [False, True], ids=["small", "large"])
def test_no_pass_uses_what_has_changed_since(case: Case, is_large: bool) -> None:
    model, several = attached(case)
    few, many = inputs(case)
    with large_layers(is_large):
        for name, change in CHANGES.items():
            change(several[0].adapter, model, many)
            now = [
                one._replace(leaves={name: array.detach().clone() for name, array in one.adapter.arrays().items()})
                for one in several
            ]
            for x in (few, many) if LONG else (few,):
                expected = by_formula(model, now, x)
                for number, context in enumerate((torch.no_grad, torch.no_grad, torch.enable_grad, torch.no_grad)):
                    with context():
                        assert_close(model(x), expected, f"pass {number} after {name}")
        with several[0].adapter.disabled():
            expected = by_formula(model, now, many)
            for context in (torch.no_grad, torch.enable_grad):
                with context():
                    assert_close(model(many), expected, "a pass with the adapter disabled")


@pytest.mark.law("attached-is-update")
@pytest.mark.parametrize("case", cases(["linear", "fused", "embedding"], FEW, ["part"]), ids=str)
def test_a_base_in_less_precision_is_the_formula_rounded(case: Case) -> None:
    model, several = attached(case)
    exact = [(x, by_formula(model, several, x).detach()) for x in inputs(case)]
    for layer in model:
        layer.float()
    for (x, expected), is_large in itertools.product(exact, (False, True)):
        with large_layers(is_large):
            for context in (torch.no_grad, torch.enable_grad):
                with context():
                    found = model(x.float() if x.is_floating_point() else x)
                assert found.dtype == torch.float32
                error = float((found.double() - expected).detach().abs().max())
                assert error <= 1e-5 * max(1.0, float(expected.abs().max()))
