"""One adapter, or none, for each row of a batch: every row is that of the row alone with its adapter activated."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import nn
from torch.utils.checkpoint import checkpoint

import tnadapt as tna
import tnadapt.torch as tt
from tests.support.array_presets import P

from .internals import batch_rows
from .small import WIDTH, batch, compiles_whole, small, stir
from .test_requantizing import Packed
from .test_requantizing import model as packed
from .test_threads import beside

NAMES: list[str | None] = ["a", None, "b", "a"]
#: Pairs of adapters, with the settings of ``attach``.
PAIRS: dict[str, list[tuple[tna.Config, dict[str, Any]]]] = {
    "lora": [(P.lora(2), {}), (P.lora(2, alpha=6), {})],
    "ranks": [(P.lora(2), {}), (P.lora(3), {})],
    "lora and superlora": [(P.lora(2), {}), (P.superlora(3), {})],
    "superlora": [(P.superlora(2), {}), (P.superlora(2, groups="weight"), {})],
    "lokr": [(P.lokr(2), {}), (P.lokr(2), {})],
    "weight": [(P.lora(2), {"strategy": "weight"}), (P.lora(2), {"strategy": "weight"})],
    "behind F": [(P.superlora(2, projection="linear", ratio=0.5), {}), (P.lora(1), {})],
    "theta": [(P.unilora(9, 2), {}), (P.unilora(9, 2), {})],
    "dora": [(P.dora(2), {}), (P.dora(2), {})],
    "dora, weight": [(P.dora(2), {"strategy": "weight"}), (P.lora(2), {})],
    "columns": [(P.dora(2, magnitude_axis="cols"), {}), (P.hira(2), {})],
    "activation": [(P.lora(2), {"activation": "relu"}), (P.lora(2, alpha=3), {"activation": "gelu"})],
    "from the base": [(P.lora(2, start="pissa"), {}), (P.lora_xs(2), {})],
}
pairs = pytest.mark.parametrize("pair", PAIRS)


def adapted(model: Any, pair: str, targets: Any = "qv", **more: Any) -> Any:
    for seed, (name, (config, extra)) in enumerate(zip("ab", PAIRS[pair], strict=True)):
        stir(tt.attach(model, config, targets, name, **{**extra, **more}), 0.3, seed)
    return model


def two_layers(pair: str = "lora") -> Any:
    return adapted(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 4)), pair, "all-linear")


def activate(model: Any, name: str | None) -> None:
    tt.mix(model, {} if name is None else {name: 1.0})


def alone(model: Any, names: Sequence[str | None], x: Any, call: Callable[..., Any] | None = None) -> Any:
    """Each row of the batch by itself, with its adapter activated; the reference."""
    before = {name: adapter.weight for name, adapter in tt.adapters(model).items()}
    outputs = []
    number = len(x) // len(names)
    for row, name in enumerate(names):
        activate(model, name)
        outputs.append((call or model)(x[row * number : (row + 1) * number]))
    tt.mix(model, before)
    return torch.cat(outputs)


def by_rows(model: Any, names: Sequence[str | None], x: Any) -> Any:
    with tt.rows(model, names):
        return model(x)


@pairs
@pytest.mark.parametrize("grad", [False, True])
def test_rows_are_those_of_each_adapter_alone(pair: str, grad: bool) -> None:
    """In a model with fused and separate projections, convolutions, and modules that read their child's weight."""
    if "activation" in dict(PAIRS[pair][0][1]):
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 4)).double()
        model = adapted(model, pair, "all-linear", dtype=torch.float64)
    else:
        model = adapted(small().double(), pair, dtype=torch.float64)
    x = batch(size=4).double()
    activate(model, "a")
    with torch.set_grad_enabled(grad):
        outputs = [alone(model, NAMES, x), by_rows(model, NAMES, x)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-8, atol=1e-10)
    # Afterwards nothing of it is left.
    torch.testing.assert_close(model(x[2:3]), alone(model, ["a"], x[2:3]), rtol=0, atol=0)
    assert not torch.allclose(outputs[0][0], outputs[0][2])
    if grad:
        parameters = [parameter for adapter in tt.adapters(model).values() for parameter in adapter.parameters()]
        expected, found = (torch.autograd.grad(output.square().sum(), parameters) for output in outputs)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("pair", "names", "tokens", "ways"),
    [
        # Factors of equal shapes are stacked; what few tokens get is added to a product that all rows share.
        ("lora", NAMES, 5, ["shared"]),
        ("ranks", NAMES, 5, ["shared", "looped"]),
        ("lora", ["a", None], 5, ["shared", "looped"]),
        ("weight", NAMES, 1, ["shared", "looped"]),
        # Many form the sum once for each adapter, where a second product costs more than W + ΔW.
        ("weight", NAMES, 3000, ["divided"]),
    ],
)
def test_the_ways_of_few_and_many_tokens(
    pair: str, names: list[str | None], tokens: int, ways: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    for way in ("shared", "looped", "divided"):
        whole = getattr(batch_rows, way)
        monkeypatch.setattr(batch_rows, way, lambda *args, way=way, whole=whole: (called.append(way), whole(*args))[1])
    model, x = adapted(nn.Sequential(nn.Linear(32, 32)), pair, "all-linear"), torch.randn(4, tokens, 32)
    torch.testing.assert_close(by_rows(model, names, x), alone(model, names, x), rtol=1e-4, atol=1e-5)
    assert called == ways
    # A name for several rows, in one dimension less; and GPT-2's layers, which store their weights transposed.
    x = x.repeat_interleave(2, 0)[:, 0]
    layer = pytest.importorskip("transformers.pytorch_utils").Conv1D(8, 32)
    for other in (model, adapted(nn.Sequential(layer), "lora", "all-linear")):
        torch.testing.assert_close(by_rows(other, names, x), alone(other, names, x), rtol=1e-4, atol=1e-5)


def test_a_layer_that_only_one_adapter_updates_and_some_of_its_rows() -> None:
    model = small()
    stir(tt.attach(model, P.lora(2), "q", "a"), 0.3)
    stir(tt.attach(model, P.superlora(2), ["head"], "b"), 0.3)
    x = batch(size=4)
    torch.testing.assert_close(by_rows(model, NAMES, x), alone(model, NAMES, x), rtol=1e-4, atol=1e-5)
    assert torch.equal(by_rows(model, [None] * 4, x), alone(model, [None], x))
    model = nn.Sequential(nn.Linear(WIDTH, 12))
    for name, strategy in (("a", "factored"), ("b", "additive")):
        some = [tna.Target("0", (12, WIDTH), rows=tna.RowIndices((1, 5, 11)))]
        stir(tt.attach(model, P.lora(2), some, name, strategy=strategy), 0.3)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(by_rows(model, NAMES, x), alone(model, NAMES, x))


@pytest.mark.parametrize("config", [P.lora(2), P.superlora(2), P.dora(2)], ids=["lora", "superlora", "dora"])
def test_quantized_layers(config: tna.Config) -> None:
    tt.register_quantized("packed", Packed)
    model = packed()
    for seed, name in enumerate("ab"):
        stir(tt.attach(model, config, "all-linear", name), 0.3, seed)
    x = torch.randn(4, 3, 8)
    torch.testing.assert_close(by_rows(model, NAMES, x), alone(model, NAMES, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_and_autocast(dtype: Any) -> None:
    model, x = two_layers("lora and superlora").to(dtype), batch(size=4).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        by_row, expected = by_rows(model, NAMES, x), alone(model, NAMES, x)
    assert by_row.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(by_row, expected, rtol=0.05, atol=0.05)


def test_a_model_that_masks_attention() -> None:
    """nn.MultiheadAttention with masks: rows cannot be told from its arguments, so each adapter has a whole pass."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    model = adapted(nn.ModuleDict({"attn": attention}), "superlora")
    x, hidden = torch.randn(4, 4, 8), torch.ones(4, 4).triu(1).bool()
    padding = torch.zeros(4, 4, dtype=torch.bool)
    padding[1, 3] = True

    def call(x: Any, rows: slice = slice(None)) -> Any:
        return attention(x, x, x, key_padding_mask=padding[rows], attn_mask=hidden)

    with tt.rows(model, NAMES):
        found, weights = call(x)
    for row, name in enumerate(NAMES):
        activate(model, name)
        expected, own = call(x[row : row + 1], slice(row, row + 1))
        torch.testing.assert_close(found[row : row + 1], expected)
        torch.testing.assert_close(weights[row : row + 1], own)


def test_nested_in_a_part_and_in_a_copy() -> None:
    """Nested, the inner one counts."""
    model, x = two_layers(), batch(size=2)
    expected, inner = alone(model, ["a", "b"], x), alone(model, ["b", None], x)
    with (
        pytest.raises(tna.TargetError, match="no adapter 'a' on this model; there are: none"),
        tt.rows(model[1], ["a"]),
    ):
        pass
    with tt.rows(nn.Sequential(model), ["a", "b"]):
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(by_rows(model, ["b", "__base__"], x), inner)
        torch.testing.assert_close(model(x), expected)
        duplicates = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        outputs = [duplicate(x) for duplicate in duplicates]
    for duplicate, both in zip(duplicates, outputs, strict=True):
        torch.testing.assert_close(by_rows(duplicate, ["a", "b"], x), expected)
        assert torch.equal(duplicate(x), both)  # a copy made with rows has none


def test_threads_with_different_rows() -> None:
    """Rows hold for the thread that enters them, also where another thread has none."""
    model = adapted(small(), "lora and superlora")
    x = batch(size=4)
    other: list[str | None] = ["b", "b", None, "a"]
    with torch.no_grad():
        expected = [model(x), alone(model, NAMES, x), alone(model, other, x)]

    @torch.no_grad()
    def check(names: list[str | None] | None, right: Any) -> None:
        torch.testing.assert_close(model(x) if names is None else by_rows(model, names, x), right, rtol=1e-4, atol=1e-5)

    def several() -> None:
        for _ in range(10):
            check(NAMES, expected[1])

    beside(several, [lambda: check(None, expected[0]), lambda: check(other, expected[2])])


# -- Training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    model, x = two_layers(), batch(size=4).requires_grad_()
    gradients = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=reentrant)):
        model.zero_grad()
        with tt.rows(model, NAMES):
            run(x).square().sum().backward()
        gradients.append([p.grad.clone() for name in "ab" for p in tt.adapters(model)[name].parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_backward_outside_recomputes_nothing_else() -> None:
    class Checkpointed(nn.Sequential):
        def forward(self, x: Any) -> Any:
            return checkpoint(self[0], x, use_reentrant=False)

    model = adapted(Checkpointed(nn.Linear(WIDTH, 4)), "lora", "all-linear")
    output = by_rows(model, NAMES, batch(size=4).requires_grad_())
    with pytest.raises(RuntimeError, match=r"or rows\(\) left, between a forward pass with activation checkpointing"):
        output.sum().backward()


# -- Compiled programs ---------------------------------------------------------------------------


@pytest.mark.slow
@compiles_whole
def test_a_compiled_model_runs_adapted_layers_outside_of_its_program() -> None:
    """Correct, with any rows, and without recompiling for other rows or other active adapters."""
    torch._dynamo.reset()
    model, x = two_layers("lora and superlora"), batch(size=4)
    activate(model, "a")
    program = torch.compile(model, backend="aot_eager")
    counts = []
    with torch.no_grad():
        before = program(x)
        for names in (NAMES, ["b", "b", None, None], ["a"] * 4):
            expected = alone(model, names, x)
            torch.testing.assert_close(by_rows(program, names, x), expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(program(x), before)
            counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        activate(model, "b")
        torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)
        assert counts[0] == counts[-1] == torch._dynamo.utils.counters["stats"]["unique_graphs"]
        # A compiled function may give the rows: a warning of Dynamo would be an error.
        divided = torch.compile(lambda x: by_rows(model, NAMES, x), backend="aot_eager")
        torch.testing.assert_close(divided(x), alone(model, NAMES, x), rtol=1e-4, atol=1e-5)
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)
    with tt.rows(model, NAMES), pytest.raises(torch._dynamo.exc.Unsupported, match=r"tnadapt\.torch\.rows\(\) divides"):
        whole(x)


# -- Errors --------------------------------------------------------------------------------------


LIST = r"rows\(\) needs a list with an adapter's name"
SHAPES: list[tuple[tuple[int, ...], str]] = [
    ((5, 3, WIDTH), r"has 4 names, and 0 got an input of shape \(5, 3, 16\): its first dimension must be 4, or"),
    ((8, 4, WIDTH), r"\(8, 4, 16\), whose first or second dimension could be the batch: .* for each of its 8 rows"),
    ((WIDTH,), r"rows\(\) needs layers whose input has rows, and 0 got an input of shape \(16,\)"),
]


@pytest.mark.parametrize(
    ("names", "shape", "error", "text"),
    [
        ("a", (), tna.ConfigError, rf"{LIST}, or None, for each row of the batch; got 'a'"),
        ([], (), tna.ConfigError, LIST),
        (["a", 3], (), tna.ConfigError, r"an entry of rows\(\) is an adapter's name or None; got 3"),
        (["a", "c"], (), tna.TargetError, "no adapter 'c' on this model; there are: 'a', 'b', and None for the base"),
        *((names, shape, tna.TargetError, text) for names in (NAMES, ["a"] * 4) for shape, text in SHAPES),
    ],
)
def test_no_names_and_rows_that_do_not_fit(
    names: Any, shape: tuple[int, ...], error: type[Exception], text: str
) -> None:
    model = two_layers()
    with pytest.raises(error, match=text):
        by_rows(model, names, torch.randn(shape))
    # One name is for all rows, whatever their number.
    assert by_rows(model, ["a"], torch.randn(8, 4, WIDTH)).shape == (8, 4, 4)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_layer_has_its_path_on_the_model_in_errors(order: tuple[int, int]) -> None:
    inner = nn.Sequential(nn.Linear(WIDTH, 4))
    model = nn.Sequential(inner)
    for index in order:
        tt.attach((inner, model)[index], "lora", "all-linear", "ab"[index], rank=1)
    with pytest.raises(tna.TargetError, match=r"rows\(\) has 2 names, and 0\.0 got an input"):
        by_rows(model, ["b", None], torch.randn(3, WIDTH))


def test_merged_and_disabled_adapters() -> None:
    model, x = two_layers(), batch(size=2)
    a, b = tt.adapters(model).values()
    merged = r"adapter 'b' is merged into the base, and so into every row: unmerge\(\) it before rows\(\)"
    b.merge()
    with pytest.raises(tna.TargetError, match=merged):
        by_rows(model, ["a", None], x)
    b.unmerge()
    with tt.rows(model, ["a", None]):
        b.merge()
        with pytest.raises(tna.TargetError, match=merged):
            model(x)
    b.unmerge()
    with a.disabled(), pytest.raises(tna.TargetError, match=r"adapter 'a' is disabled, and rows\(\) names it"):
        by_rows(model, ["a", None], x)
    with a.disabled():
        torch.testing.assert_close(by_rows(model, ["b", None], x), alone(model, ["b", None], x))
    text = r"PEFT's add_weighted_adapter is tnadapt\.torch\.mix\(model, \{'first': 0\.5, 'second': 0\.5\}\), which"
    with pytest.raises(AttributeError, match=text):
        a.add_weighted_adapter(["a", "b"], [0.5, 0.5], "c")
    with pytest.raises(AttributeError, match=r"^'Adapter' object has no attribute 'other'$"):
        _ = a.other
    assert copy.deepcopy(a).name == "a"


def test_modules_that_keep_state_or_return_something_else() -> None:
    class Reader(nn.Module):
        """Reads its child's weight itself."""

        def __init__(self, made: Any = None) -> None:
            super().__init__()
            self.inner, self.made = nn.Linear(WIDTH, 4), made

        def forward(self, x: Any, cache: Any = None) -> Any:
            y = nn.functional.linear(x, self.inner.weight)
            return y if self.made is None else self.made(y)

    x = batch(size=2)
    model = adapted(Reader(), "lora", ["inner"])
    torch.testing.assert_close(by_rows(model, ["a", "b"], x), alone(model, ["a", "b"], x))
    text = r"Reader, around inner\.weight got a object, which may keep state"
    with pytest.raises(tna.TargetError, match=text), tt.rows(model, ["a", "b"]):
        model(x, object())
    population = tt.attach(Reader(), "lora", ["inner"], rank=2, population=2)
    with (
        pytest.raises(tna.TargetError, match=rf"{text} between calls, and members\(\) would"),
        population.members([0, 1]),
    ):
        population.model(x, object())
    model = adapted(Reader(lambda y: {"y": y}), "lora", ["inner"])
    with pytest.raises(tna.TargetError, match=r"cannot divide the output of Reader, around inner\.weight, a dict"):
        by_rows(model, ["a", "b"], x)
    model = adapted(Reader(lambda y: y.sum(0)), "lora", ["inner"])
    with pytest.raises(tna.TargetError, match=r"of 1 rows it made a tensor of shape \(5, 4\)"):
        by_rows(model, ["a", "b"], x)


SECOND = "has batch_first=False"


@pytest.mark.parametrize(
    ("make", "targets", "text"),
    [
        (nn.MultiheadAttention, "qv", rf"0 {SECOND}: .*0\.in_proj_weight sees, is not that of the"),
        *((nn.TransformerEncoderLayer, target, SECOND) for target in (r".*linear1.*", r".*self_attn.*")),
        (None, "all-linear", r"experts\.0\.weight belongs to experts, which see selected tokens"),
        ("T5", "embeddings", r"relative_attention_bias\.weight is not an embedding of tokens or posi"),
    ],
)
def test_models_whose_rows_cannot_be_told_apart(make: Any, targets: str, text: str) -> None:
    if make == "T5":
        transformers = pytest.importorskip("transformers")
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
        model = transformers.T5EncoderModel(transformers.T5Config(**sizes)).eval()
    elif make is None:
        model = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(4, 4)])})
    else:
        model = nn.Sequential(make(8, 2))
    adapted(model, "lora", targets, keep_tied=True)
    with pytest.raises(tna.TargetError, match=text), tt.rows(model, ["a", "b"]):
        pass
