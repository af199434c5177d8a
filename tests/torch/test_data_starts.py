"""Starts from data: EVA and LoRA-GA against NumPy's formulas, and against PEFT's own."""

from __future__ import annotations

import copy
import random
import warnings
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import tnadapt as tna
import tnadapt.torch as tt
from tnadapt.torch import starts

from .life import bits

P = tna.presets
LEFT, RIGHT = "group0.split0.factor0", "group0.split0.factor1"
GIVEN = P.lora(4, alpha=8, start="given")


def model(dtype: Any = None) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = torch.nn.Sequential(torch.nn.Linear(12, 16), torch.nn.Tanh(), torch.nn.Dropout(), torch.nn.Linear(16, 8))
    return made.to(dtype or torch.float32)


def batches(count: int = 6, dtype: Any = None) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    scales = 1.5 ** -torch.arange(12.0)
    return [(torch.randn(9, 12, generator=generator) * scales + 1.0).to(dtype or torch.float32) for _ in range(count)]


def loss(whole: Any, batch: Any) -> Any:
    return (whole(batch) - 1.0).square().mean()


def attached(config: tna.Config = GIVEN, base: Any = None, targets: Any = "all-linear") -> tuple[Any, tt.Adapter]:
    base = model() if base is None else base
    return base, tt.attach(base, config, targets)


def signed(array: np.ndarray) -> np.ndarray:
    """Return columns with the largest entry positive."""
    return array * np.sign(array[np.abs(array).argmax(0), range(array.shape[1])])


def inputs(base: Any, layer: int) -> np.ndarray:
    with torch.no_grad():
        return np.concatenate([base.double().eval()[:layer](x.double()).numpy() for x in batches()])


def gradient(base: Any, layer: int) -> np.ndarray:
    base = base.double().eval()
    base.zero_grad()
    sum(loss(base, x.double()) for x in batches()).backward()
    return np.asarray(base[layer].weight.grad.numpy() / 6)


def state(base: Any, adapter: tt.Adapter) -> tuple[Any, ...]:
    """Return what a start must leave alone: the model, and every random state."""
    modules, parameters = list(base.modules()), list(base.parameters())
    return (
        bits(base), [(module.training, len(module._forward_pre_hooks)) for module in modules],
        [(p.requires_grad, p.grad is None) for p in parameters], adapter.enabled, torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(), random.getstate(),  # type: ignore[index]
    )  # fmt: skip


# -- EVA ---------------------------------------------------------------------------------------------------


@pytest.mark.law("update-formula", "no-global-random-state")
def test_eva_is_the_formula() -> None:
    base, adapter = attached(base=model(torch.float64))
    told: list[tuple[int, int | None]] = []
    data, before = batches(dtype=torch.float64), state(base, adapter)
    found = starts.eva(adapter, data, keep=16, progress=lambda *step: told.append(step))
    assert state(base, adapter) == before
    assert told == [(done, 6) for done in range(1, 7)]
    for group, layer in enumerate((0, 3)):
        x = inputs(model(), layer)
        right = np.linalg.svd(x - x.mean(0))[2][:4].T
        assert np.allclose(found[f"group{group}.split0.factor1"], signed(right), atol=1e-6)
        assert not found[f"group{group}.split0.factor0"].any()
    plain = base.eval()(data[0])
    adapter.start_from(found)
    assert torch.equal(base(data[0]), plain)
    base(data[0]).square().sum().backward()
    assert all(p.grad.any() for name, p in adapter.named_parameters() if name.endswith("factor0"))


def test_eva_keeps_few_components_between_chunks_of_any_size() -> None:
    _, adapter = attached()
    exact, few, whole = (
        starts.eva(adapter, data, keep=keep)
        for data, keep in ((batches(), 16), (batches(), None), ([torch.cat(batches())], 16))
    )
    for name, array in exact.items():
        assert torch.allclose(array, few[name], atol=1e-2)
        assert torch.allclose(array, whole[name], atol=1e-6)
    again = starts.eva(adapter, iter(batches()))
    assert all(torch.equal(again[name], array) for name, array in few.items())


@pytest.mark.parametrize("what", ["eva", "lora_ga"])
def test_batches_may_be_a_data_set(what: str) -> None:
    class Indexed(torch.utils.data.Dataset):  # type: ignore[misc]
        """Batches by their index alone."""

        def __getitem__(self, index: int) -> Any:
            return batches()[index]

        def __len__(self) -> int:
            return len(batches())

    _, adapter = attached()
    found, expected = run(what, adapter, batches=Indexed()), run(what, adapter)
    assert all(torch.equal(found[name], array) for name, array in expected.items())
    for wrong in ("words", {"x": 1}, 3, torch.tensor(1.0)):
        with pytest.raises(tna.ConfigError, match=r"^batches must be an iterable; got "):
            run(what, adapter, batches=wrong)


class Masked(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = torch.nn.Linear(12, 12), torch.nn.Linear(12, 8)

    def forward(self, x: Any, mask: Any) -> Any:
        return self.v_proj(x + self.q_proj(input=x).tanh())


def test_eva_leaves_masked_positions_out() -> None:
    base = Masked()
    _, adapter = attached(base=base, targets="qv")
    mask = torch.arange(27).reshape(3, 9) % 4 != 0
    x = torch.cat(batches(3)).reshape(3, 9, 12)
    padded = torch.where(mask[..., None], x, 1e4)
    found = starts.eva(adapter, [{"x": padded, "mask": mask}], mask=lambda batch: batch["mask"], keep=12)
    chosen = x[mask].double().numpy()
    right = np.linalg.svd(chosen - chosen.mean(0))[2][:4].T
    assert np.allclose(found[RIGHT], signed(right), atol=1e-5)
    with pytest.raises(
        tna.ShapeError, match=r"mask must return booleans of the leading shape .* \(3, 9\); it returned"
    ):
        starts.eva(adapter, [(padded, mask)], mask=lambda batch: mask.float())
    again = starts.eva(adapter, [(padded, mask)], mask=lambda _: mask, keep=12, forward=lambda m, b: m(*b))
    assert torch.equal(again[RIGHT], found[RIGHT])


def test_rows_of_a_fused_weight_share_their_input() -> None:
    from .small import Fused

    base = Fused()
    _, adapter = attached(P.lora(3, start="given"), base, "qv")
    found = starts.eva(adapter, [torch.randn(2, 7, 16)])
    assert torch.equal(found["group0.split0.factor1"], found["group1.split0.factor1"])
    adapter.start_from(found)


@pytest.mark.law("peft-agrees")
def test_eva_is_pefts() -> None:
    peft = pytest.importorskip("peft")
    from peft.utils.incremental_pca import IncrementalPCA

    # With one component per feature, its incremental analysis is exact, too.
    exact = IncrementalPCA(n_components=12, lowrank=False)
    data = [torch.cat(batches())[start : start + 18] for start in (0, 18, 36)]
    for x in data:
        exact.partial_fit(x)
    _, adapter = attached()
    found = starts.eva(adapter, data, keep=16)
    assert np.allclose(exact.components_[:4].T, found[RIGHT], atol=1e-4)

    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["0", "3"], init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=1.0, tau=0.99),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(model().eval(), config, low_cpu_mem_usage=True)
        whole = [torch.cat(batches())]
        peft.initialize_lora_eva_weights(
            theirs, whole, forward_fn=lambda its, batch: its(batch), prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=None, show_progress_bar=False,
        )  # fmt: skip
    found = starts.eva(adapter, whole)
    for group, layer in enumerate((0, 3)):
        its = theirs.base_model.model[layer]
        a = its.lora_A["default"].weight.detach().numpy().T
        assert np.allclose(signed(a), found[f"group{group}.split0.factor1"], atol=2e-2)
        assert not its.lora_B["default"].weight.any()


# -- LoRA-GA -----------------------------------------------------------------------------------------------


@pytest.mark.law("update-formula", "no-global-random-state")
@pytest.mark.parametrize("scale", ["stable", "peft"])
def test_lora_ga_is_the_formula(scale: str) -> None:
    base, adapter = attached(base=model(torch.float64))
    told: list[tuple[int, int | None]] = []
    data, before = batches(dtype=torch.float64), state(base, adapter)
    settings = {"scale": scale, "gamma": 9}
    found = starts.lora_ga(adapter, data, loss, **settings, progress=lambda *step: told.append(step))
    assert state(base, adapter) == before
    assert told == [(done, 6) for done in range(1, 7)]
    of_a, of_b = slice(0, 4), slice(4, 8)
    for group, layer in enumerate((0, 3)):
        left, values, right = np.linalg.svd(gradient(model(), layer), full_matrices=False)
        stable = left.shape[0] ** 0.25 / 3
        factor_a = {"stable": stable, "peft": 1.0}[scale]
        factor_b = {"stable": stable, "peft": stable * values[of_b]}[scale]
        assert np.allclose(found[f"group{group}.split0.factor0"], signed(left[:, of_b]) * factor_b, atol=1e-6)
        a = found[f"group{group}.split0.factor1"].numpy()
        assert np.allclose(signed(a), signed(right[of_a].T) * factor_a, atol=1e-6)
    plain = base.eval()(data[0])
    adapter.start_from(found)
    assert torch.equal(base(data[0]), plain)
    again = starts.lora_ga(base, iter(data), loss, **settings)
    assert all(torch.equal(again[name], array) for name, array in found.items())


@pytest.mark.law("peft-agrees")
def test_lora_ga_is_pefts() -> None:
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.loraga import preprocess_loraga

    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["0", "3"], init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(direction="ArB2r", scale="stable", stable_gamma=16),
    )  # fmt: skip
    base = model()
    base[2].p = 0.0  # PEFT computes gradients in training mode

    def step() -> None:
        for x in batches():
            loss(base, x).backward()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        preprocess_loraga(base, config, step)
        theirs = peft.get_peft_model(base, config)
    own, adapter = attached()
    found = starts.lora_ga(adapter, batches(), loss, scale="peft")
    for group, layer in enumerate((0, 3)):
        there = theirs.base_model.model[layer]
        a, b = (getattr(there, f"lora_{x}")["default"].weight.detach().numpy() for x in "AB")
        assert np.allclose(signed(found[f"group{group}.split0.factor0"].numpy()), signed(b), rtol=1e-3, atol=1e-5)
        assert np.allclose(signed(found[f"group{group}.split0.factor1"].numpy()), signed(a.T), atol=1e-3)
    adapter.start_from(found)
    x = batches()[0]
    assert torch.allclose(theirs.eval()(x), own.eval()(x), atol=1e-5)


# -- What is refused ---------------------------------------------------------------------------------------


CONFIG, SHAPE, TARGET = tna.ConfigError, tna.ShapeError, tna.TargetError


def run(what: str, of: Any, **settings: Any) -> Any:
    start = starts.eva if what == "eva" else starts.lora_ga
    return start(of, **{"batches": batches(), **({} if what == "eva" else {"loss": loss}), **settings})


def of_two_adapters() -> Any:
    base, _ = attached()
    tt.attach(base, GIVEN, "all-linear", name="second")
    return base


@pytest.mark.parametrize(
    ("of", "error", "message"),
    [
        (P.lora(4), CONFIG, r"{} computes arrays for adapter.start_from\(\), which needs a co"),
        (P.unilora(9, 2, start="given"), CONFIG, r"{} computes arrays for adapter.start_from\(\), which needs a co"),
        (P.lokr(2, start="given"), CONFIG, "{} computes LoRA's two factors of each weight, and 0.weight has"),
        (P.superlora(2, start="given"), CONFIG, "{} computes LoRA's two factors of each weight, and 0.weight has"),
        (
            lambda: tt.attach(torch.nn.TransformerEncoderLayer(16, 2, batch_first=True), GIVEN), CONFIG,
            "{} needs linear layers, .*self_attn.in_proj_weight is read by Tra",
        ),
        (model, TARGET, "this Sequential has 0 adapters: attach one first"),
        (lambda: "adapter", TARGET, "expected an adapter, or a model with one; got str"),
        (of_two_adapters, TARGET, "this Sequential has 2 adapters; give one of them instead of the model"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("what", ["eva", "lora_ga"])
def test_adapters_that_do_not_fit(what: str, of: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message.format(what)):
        run(what, attached(of)[1] if isinstance(of, tna.Config) else of())


@pytest.mark.parametrize(
    ("what", "settings", "error", "message"),
    [
        ("eva", {"keep": 3}, CONFIG, "keep=3 components are fewer than the rank, 4: keep at least as many"),
        ("eva", {"batches": []}, SHAPE, "layer of 0.weight was called with 0 rows, and 4 components need more tha"),
        (
            "eva", {"batches": [torch.ones(9, 12)]}, SHAPE,
            "the inputs of 0.weight vary in fewer than 4 directions: give more batches",
        ),
        ("eva", {"batches": [torch.full((9, 12), torch.nan)]}, SHAPE, "an input of a layer holds NaN or infinity"),
        ("lora_ga", {"scale": "svd"}, CONFIG, "scale must be one of .*; got 'svd'"),
        ("lora_ga", {"gamma": 0}, CONFIG, "gamma must be a positive number; got 0"),
        ("lora_ga", {"batches": []}, SHAPE, "lora_ga needs at least one batch; there was none"),
        ("lora_ga", {"loss": lambda m, x: m(x)}, SHAPE, "loss must return one finite number as a tensor; got"),
        (
            "lora_ga", {"loss": lambda m, x: m[0](x).sum()}, SHAPE,
            "the loss does not depend on every weight of adapter 'default'",
        ),
        (
            "lora_ga", {"batches": [torch.ones(1, 12)]}, SHAPE,
            "the gradient of 0.weight has fewer than 8 singular values above rounding",
        ),
        ("lora_ga, rank 5", {}, CONFIG, r"lora_ga takes 2 \* rank singular vectors .* use a rank of 4 or less"),
    ],
)  # fmt: skip
def test_settings_and_data_that_are_refused(
    what: str, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    base, adapter = attached(P.lora(5, start="given") if "rank 5" in what else GIVEN)
    with pytest.raises(error, match=message):
        run(what, adapter, **settings)
    assert not any(module._forward_pre_hooks for module in base)
    assert not any(p.requires_grad for p in copy.deepcopy(base)[0].parameters())
