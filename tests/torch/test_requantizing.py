"""Quantized layers of a type that another package registers: found, adapted, saved, loaded, and merged into."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import tnadapt as tna
import tnadapt.torch as tt

from .interrupts import interrupted, moments
from .small import stir

# -- Quantized layers of a type registered by another package: found, adapted, saved, loaded, never written to ---------


class PackedLinear(torch.nn.Module):
    """A layer of 4-bit codes, two per byte, and a scale; no attribute is named weight or in_features."""

    def __init__(self, rows: int, cols: int) -> None:
        super().__init__()
        self.size = rows, cols
        self.register_buffer("codes", torch.randint(0, 256, (rows, cols // 2), dtype=torch.uint8))
        self.register_buffer("scale", torch.tensor(0.05))

    def numbers(self) -> Any:
        pairs = torch.stack([self.codes & 15, self.codes >> 4], -1)
        return (pairs.reshape(self.size).float() - 7.5) * self.scale

    def forward(self, x: Any) -> Any:
        return x @ self.numbers().T


class Packed(tt.QuantizedLayer):
    def matches(self, module: Any) -> bool:
        return isinstance(module, PackedLinear)

    def shape(self, module: Any) -> tuple[int, int]:
        return module.size  # type: ignore[no-any-return]

    def dequantize(self, module: Any) -> Any:
        return module.numbers()


def model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return torch.nn.Sequential(PackedLinear(12, 8), torch.nn.Tanh(), PackedLinear(4, 12))


def test_what_is_missing_is_named() -> None:
    with pytest.raises(tna.TargetError, match="all-linear"):
        tt.attach(model(), tna.presets.lora(2), targets="all-linear")  # registered by nobody
    for name, methods, message in (
        ("Silent", {}, r"Silent does not define matches\(module\)"),
        (
            "Shapeless",
            {"matches": Packed.matches},
            r"PackedLinear has no in_features.*define Shapeless\.shape\(module\)",
        ),
    ):
        tt.register_quantized("lacking", type(name, (tt.QuantizedLayer,), methods))
        with pytest.raises(tna.TargetError, match=message):
            tt.attach(model(), tna.presets.lora(2), targets="all-linear")
    with pytest.raises(tna.ConfigError, match=r"inherits from tnadapt\.torch\.QuantizedLayer; got"):
        tt.register_quantized("dict", dict)
    for name in ("bitsandbytes-4bit", "bitsandbytes-int8-embedding", "torchao", "hqq", "gptq"):
        with pytest.raises(tna.ConfigError, match=f"quantized layer '{name}' is built in and cannot be replaced"):
            tt.register_quantized(name, Grid)


@pytest.mark.parametrize(
    "config", [tna.presets.lora(2), tna.presets.superlora(2), tna.presets.lokr(2)], ids=["lora", "superlora", "lokr"]
)
def test_attach_train_save_load(config: tna.Config, tmp_path: Path) -> None:
    tt.register_quantized("packed", Packed)
    base, x = model(), torch.randn(5, 8)
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    expected = base(x)
    adapter = tt.attach(base, config, targets="all-linear")
    assert [target.shape for target in adapter.targets] == [(12, 8), (4, 12)]
    assert torch.equal(base(x), expected)
    for _ in range(2):
        base(x).square().mean().backward()
        torch.optim.SGD(adapter.parameters(), 0.5).step()
    # What the layers compute is x (W + ΔW)ᵀ of the numbers that their codes stand for.
    first, second = adapter.deltas()
    assert first.any()
    summed = torch.tanh(x @ (base[0].numbers() + first).T) @ (base[2].numbers() + second).T
    torch.testing.assert_close(base(x), summed, rtol=1e-4, atol=1e-5)
    adapter.save(tmp_path / "a.safetensors")
    again = model()
    tt.load(again, tmp_path / "a.safetensors")
    assert torch.equal(again(x), base(x))
    assert all(torch.equal(tensor, state[name]) for name, tensor in base.state_dict().items() if name in state)
    with pytest.raises(tna.FileError, match="base"):
        tt.load(model(seed=1), tmp_path / "a.safetensors")


def test_the_learning_rate_is_that_of_the_numbers_that_codes_stand_for() -> None:
    tt.register_quantized("packed", Packed)
    base = model()
    adapter = tt.attach(base, tna.presets.lora(2), targets="all-linear")
    assert adapter.learning_rate() == tna.learning_rate([base[0].numbers(), base[2].numbers()])
    tt.register_quantized("packed", type("Closed", (Packed,), {"dequantize": lambda self, module: None}))
    message = (
        r"^the learning rate depends on the base weights, and the values of 0\.weight cannot be read: register its "
        r"layer type with tnadapt\.torch\.register_quantized, or choose one yourself$"
    )
    with pytest.raises(tna.TargetError, match=message):
        adapter.learning_rate()


def test_an_embedding_of_another_package_is_looked_up() -> None:
    class PackedEmbedding(PackedLinear):
        def forward(self, ids: Any) -> Any:
            return self.numbers()[ids]

    class PackedTable(Packed):
        def matches(self, module: Any) -> bool:
            return isinstance(module, PackedEmbedding)

        def looks_up(self, module: Any) -> bool:
            return True

    tt.register_quantized("packed-table", PackedTable)  # asked first, because it is registered first
    tt.register_quantized("packed", Packed)
    made = torch.nn.Sequential(PackedEmbedding(12, 8), PackedLinear(4, 8))
    assert [target.module for target in tt.find_targets(made, "embeddings")] == ["0"]
    assert [target.module for target in tt.find_targets(made, "all-linear")] == ["1"]
    adapter = tt.attach(made[:1], tna.presets.lora(2), "embeddings")
    stir(adapter, 1.0)
    ids = torch.tensor([[0, 11, 3]])
    torch.testing.assert_close(made[0](ids), (made[0].numbers() + adapter.deltas()[0])[ids])
    with pytest.raises(tna.TargetError, match="PackedTable does not define requantize"):
        adapter.merge()


# -- Merging into quantized weights: what is kept, reported, refused and put back, with a layer of a test's own --------


P = tna.presets


class GridLinear(torch.nn.Module):
    """Int8 codes in steps of one number a row, and a bias."""

    def __init__(self, rows: int, cols: int) -> None:
        super().__init__()
        self.in_features, self.out_features = cols, rows
        self.register_buffer("codes", torch.randint(-100, 101, (rows, cols), dtype=torch.int8))
        self.register_buffer("step", torch.full((rows, 1), 0.01))
        self.bias = torch.nn.Parameter(torch.randn(rows))

    def numbers(self) -> Any:
        return self.codes.float() * self.step

    def forward(self, x: Any) -> Any:
        return x @ self.numbers().T + self.bias


class Grid(tt.QuantizedLayer):
    stored = ("codes", "step")

    def matches(self, module: Any) -> bool:
        return isinstance(module, GridLinear)

    def dequantize(self, module: Any) -> Any:
        return None if module.codes.device.type == "meta" else module.numbers()

    def requantize(self, module: Any, weight: Any) -> Mapping[str, Any]:
        step = weight.abs().amax(1, keepdim=True) / 100.0
        return {"codes": (weight / step).round().to(torch.int8), "step": step}


@pytest.fixture(autouse=True)
def _grid() -> None:
    tt.register_quantized("grid", Grid)


def grid_model() -> Any:
    """Return a model of a quantized layer and one of numbers."""
    torch.manual_seed(0)
    return torch.nn.Sequential(GridLinear(12, 8), torch.nn.Tanh(), torch.nn.Linear(12, 6))


def adapted(config: Any = None, targets: Any = "all-linear", size: float = 0.3) -> tuple[Any, Any]:
    made = grid_model()
    adapter = tt.attach(made, P.lora(2) if config is None else config, targets)
    stir(adapter, size, 1)
    return made, adapter


def bits(made: Any) -> list[Any]:
    return [tensor.detach().clone() for tensor in (made[0].codes, made[0].step, made[0].bias, made[2].weight)]


def same(one: list[Any], other: list[Any]) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True))


def batch() -> Any:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    "config", [P.lora(2), P.superlora(2), P.hira(2), P.dora(2)], ids=["lora", "all", "hira", "dora"]
)
@pytest.mark.parametrize("is_trained", [False, True])
def test_unmerged_every_byte_is_back(config: tna.Config, is_trained: bool) -> None:
    made, adapter = adapted(config)
    made[0].step.requires_grad_(is_trained)
    before, first = bits(made), made(batch()).detach()
    copies = [copy.deepcopy(made), pickle.loads(pickle.dumps(made))]
    for _ in range(3):
        adapter.merge()
        merged = bits(made)
        assert not same(merged, before)
        with adapter.disabled():
            assert same(bits(made), before)
        assert same(bits(made), merged)
        made[0].codes[0, 0] += 1
        with pytest.raises(tna.TargetError, match=r"0\.weight was changed after adapter 'default' was merged"):
            adapter.unmerge()
        made[0].codes[0, 0] -= 1
        adapter.unmerge()
        assert same(bits(made), before)
    assert torch.equal(made(batch()).detach(), first)
    assert adapter.summary().base == 12 * 8 + 12 + 6 * 12 + 6  # what the codes stand for
    adapter.merge()
    for number, other in enumerate((*copies, copy.deepcopy(made), pickle.loads(pickle.dumps(made)))):
        again = tt.adapters(other)["default"]
        assert again.merged == (number >= len(copies))
        if again.merged:
            again.unmerge()
        assert same(bits(other), before)
        assert torch.equal(other(batch()).detach(), first)
        again.merge()
        again.unmerge()
        assert same(bits(made), merged)
    adapter.bake()
    assert same(bits(made), merged)


def test_the_report_measures_what_is_stored() -> None:
    made, adapter = adapted()
    old, update = made[0].numbers().clone().double(), adapter.deltas()[0].detach().double()
    expected = Grid().requantize(made[0], (old + update).float())
    adapter.merge()
    # The sum is quantized by the layer's own rule.
    assert torch.equal(made[0].codes, expected["codes"])
    torch.testing.assert_close(made[0].step, expected["step"], rtol=1e-6, atol=0.0)
    report = adapter.merge_report
    assert report is not None
    (row,) = report  # the layer of numbers is not quantized
    off = torch.linalg.norm(made[0].numbers().double() - old - update)
    assert row[:2] == ("0.weight", "GridLinear")
    assert row.error == pytest.approx(float(off / torch.linalg.norm(old + update)), rel=1e-5)
    assert row.update_error == pytest.approx(float(off / torch.linalg.norm(update)), rel=1e-5)
    change = made[0].numbers().double() - old
    assert row.kept == pytest.approx(float((change * update).sum() / update.square().sum()), rel=1e-5)
    assert (report.update_error, report.kept) == (row.update_error, row.kept)
    assert str(report).splitlines()[0].split() == ["weight", "layer", "error", "update's", "kept"]
    assert str(report).splitlines()[1].split()[:2] == ["0.weight", "GridLinear"]
    adapter.unmerge()
    assert adapter.merge_report is None
    _, adapter = adapted(targets=["2.weight"])
    adapter.merge()
    report = adapter.merge_report
    assert report is not None
    assert (len(report), report.update_error, report.kept) == (0, 0.0, 1.0)
    assert str(report) == "no quantized weight was merged into"
    # An update of zero leaves the codes alone.
    made, adapter = adapted(size=0.0)
    before = bits(made)
    assert not torch.equal(Grid().requantize(made[0], made[0].numbers())["codes"], made[0].codes)
    adapter.merge(max_error=0.0)
    assert adapter.merge_report is not None
    assert adapter.merge_report[0][2:] == (0.0, 0.0, 1.0)
    assert same(bits(made), before)
    # Another adapter sees the base that was merged into.
    other = tt.attach(made, P.dense(), ["0.weight"], name="other")
    stir(other, 0.2)
    other.merge()
    with pytest.raises(tna.TargetError, match=r"0\.weight was changed after adapter 'default' was merged"):
        adapter.unmerge()
    other.unmerge()
    adapter.unmerge()
    assert same(bits(made), before)


class Codes(torch.nn.Linear):
    """Nobody knows how its codes are to be read."""

    def __init__(self) -> None:
        super().__init__(8, 12)
        self.weight = torch.nn.Parameter(torch.zeros(12, 8, dtype=torch.int8), False)


def out_of_memory(self: Any, module: Any, weight: Any) -> Mapping[str, Any]:
    raise RuntimeError("out of memory")


@pytest.mark.parametrize(
    ("requantize", "error", "text"),
    [
        (out_of_memory, RuntimeError, "out of memory"),
        # It forgets a part.
        (
            lambda self, module, weight: {"codes": module.codes},
            tna.TargetError, r"Failing\.requantize\(\) returned codes, and its stored is codes, step",
        ),
        # Its codes stand for no number.
        (
            lambda self, module, weight: {"codes": module.codes, "step": module.step / 0.0},
            tna.BackendError, r"0\.weight plus its update cannot be quantized as GridLinear: the result is not f",
        ),
        (None, tna.BackendError, r"the update of 0\.weight is not finite"),
    ],
)  # fmt: skip
def test_a_merge_that_fails_changes_nothing(requantize: Any, error: Any, text: str) -> None:
    made, adapter = adapted()
    before, arrays = bits(made), {name: array.clone() for name, array in adapter.arrays().items()}
    if requantize is None:
        with torch.no_grad():
            next(iter(adapter.parameters()))[0, 0] = float("nan")
    else:
        tt.register_quantized("grid", type("Failing", (Grid,), {"requantize": requantize}))
    with pytest.raises(error, match=text):
        adapter.merge()
    assert same(bits(made), before)
    assert not adapter.merged
    tt.register_quantized("grid", Grid)
    adapter.load_arrays(arrays)
    adapter.merge()
    adapter.unmerge()
    assert same(bits(made), before)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: torch.nn.Sequential(Codes()),
            r"0\.weight is quantized, and Codes is no type that tnadapt can merge int",
        ),
        (
            lambda: torch.nn.Sequential(GridLinear(12, 8)).to("meta"),
            r"0\.weight of GridLinear cannot be merged into: it is on the meta device",
        ),
        (
            model,
            r"0\.weight is quantized: PackedLinear cannot be merged into, because Packed does not define requantize",
        ),
    ],
)  # fmt: skip
def test_layers_that_cannot_be_merged_into(make: Any, text: str) -> None:
    tt.register_quantized("packed", Packed)
    adapter = tt.attach(make(), P.lora(2), "all-linear")
    with pytest.raises(tna.TargetError, match=text):
        adapter.merge()


def test_too_large_an_error_is_refused() -> None:
    made, adapter = adapted(size=0.02)
    before = bits(made)
    for merge in (adapter.merge, adapter.bake):
        with pytest.raises(
            tna.TargetError, match=r"0\.weight plus its update again is off by .* max_error=0\.001; no w"
        ):
            merge(max_error=0.001)
        assert same(bits(made), before)
        assert not adapter.merged
        assert adapter.merge_report is None
    adapter.merge(max_error=1e6)
    assert adapter.merged
    with pytest.raises(tna.ConfigError, match=r"max_error must be a number from 0 up, or None; got -1"):
        adapter.merge(max_error=-1)
    with pytest.raises(tna.ConfigError, match=r"max_error must be a number or None; got 'low'"):
        adapter.merge(max_error="low")  # type: ignore[arg-type]


def test_rows_of_one_layer_are_merged_together() -> None:
    rows = [tna.Rows(0, 4, 12), tna.Rows(8, 4, 12)]
    targets = [tna.Target("0", (12, 8), role, rows=own) for role, own in zip("qv", rows, strict=True)]
    made, adapter = adapted(P.lora(2), targets)
    before, old = bits(made), made[0].numbers().clone()
    updates = [update.detach() for update in adapter.deltas()]
    adapter.merge()
    report = adapter.merge_report
    assert report is not None
    assert len(report) == 1
    wanted = old.clone()
    wanted[:4] += updates[0]
    wanted[8:] += updates[1]
    torch.testing.assert_close(made[0].numbers(), wanted, rtol=0.0, atol=float(made[0].step.max()) * 0.51)
    assert torch.equal(made[0].codes[4:8], Grid().requantize(made[0], old)["codes"][4:8])
    adapter.unmerge()
    assert same(bits(made), before)


@pytest.mark.slow
def test_an_interruption_leaves_the_base_or_the_sum() -> None:
    made, adapter = adapted()
    before = bits(made)
    for stop in moments(lambda: (adapter.merge(), adapter.unmerge())):
        interrupted(lambda: (adapter.merge(), adapter.unmerge()), stop)
        if adapter.merged:
            adapter.unmerge()
        assert same(bits(made), before), stop
    adapter.merge()
    merged = bits(made)
    adapter.unmerge()
    for stop in itertools.islice(moments(adapter.bake), 0, None, 5):
        made, adapter = adapted()
        interrupted(adapter.bake, stop)
        if "tnadapt" not in "".join(name for name, _ in made.named_parameters()):
            assert same(bits(made), merged), stop
        elif not adapter.merged:
            assert same(bits(made), before), stop


def test_a_registered_type_is_asked_before_the_built_in_ones() -> None:
    class Words(GridLinear):
        """It has the tensors of GPTQ, and is none."""

        def __init__(self) -> None:
            super().__init__(12, 8)
            self.bits = 8
            for name in ("qweight", "qzeros", "scales", "g_idx"):
                self.register_buffer(name, torch.zeros(1, 1))

    adapter = tt.attach(torch.nn.Sequential(Words()), P.lora(2), "all-linear")
    adapter.merge()
    assert adapter.merge_report is not None
    assert adapter.merge_report[0].kind == "Words"
