"""Only chosen arrays are trained: groups, factors, learning rates, a nonlinearity between the factors."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import copy
import pickle

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tnadapt as tna
import tnadapt.torch
from tnadapt import presets
from tnadapt.errors import ConfigError, TargetError
from tnadapt.torch import Adapter, attach, load

from .distributed_jobs import Block
from .loops import batch, loss_of, make, move


def test_groups_one_after_another() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(True), Block(False))
    adapter = attach(model, presets.superlora(2, groups=2))
    move(adapter)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1, weight_decay=0.0)
    for group in (0, 1):
        # Also what is frozen between a backward pass and a step stays.
        for chosen in ([group], group):
            loss_of(model, batch()).backward()
            adapter.set_trainable(groups=chosen)
            before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
            loss_of(model, batch()).backward()
            optimizer.step()
            optimizer.zero_grad()
            for name, p in adapter.named_parameters():
                assert torch.equal(p, before[name]) != name.startswith(f"group{group}."), name
    adapter.set_trainable()
    # A choice that fails leaves the gradients.
    loss_of(model, batch()).backward()
    gradients = {name: p.grad for name, p in adapter.named_parameters()}
    assert all(gradient is not None and gradient.any() for gradient in gradients.values())
    last: Any = list(adapter.named_parameters())[-1][1]

    def fail(required: bool) -> None:
        del last.requires_grad_  # what undoes the choice is not to fail
        raise MemoryError

    last.requires_grad_ = fail
    with pytest.raises(MemoryError):
        adapter.set_trainable(groups=1)
    assert all(p.requires_grad and p.grad is gradients[name] for name, p in adapter.named_parameters())


@pytest.mark.parametrize("config", ["default", "lora"])
def test_lora_plus(config: str) -> None:
    _, adapter = make(config)
    slow, fast = adapter.parameter_groups(lr=0.1, ratio=4.0)
    assert (slow["lr"], fast["lr"]) == (0.1, 0.4)
    rates = {id(p): group["lr"] for group in (slow, fast) for p in group["params"]}
    for name, p in adapter.named_parameters():
        assert rates.pop(id(p)) == (0.4 if name.endswith("factor0") else 0.1), name
    assert not rates


# -- The zero of the start is an array that is trained ------------------------------------------------

PRESETS = {
    "lora": presets.lora(2), "lokr": presets.lokr(2), "krona": presets.krona(), "loha": presets.loha(2),
    "lotr": presets.lotr(2, weights=2, rows=16, cols=16), "lorta": presets.lorta(2), "fastfood": presets.fastfood(0.1),
    "fact_tk": presets.fact_tk(2, weights=2, rows=16, cols=16), "superlora": presets.superlora(2, groups=2),
    "lotr, train": presets.lotr(2, weights=2, rows=16, cols=16, train=True),
    "cara": presets.cara(2, weights=2, rows=16, cols=16, heads=2), "compacter": presets.compacter(2, terms=2),
    "linear": presets.superlora(2, projection="linear", ratio=0.5),
    "nonlinear": presets.superlora(2, projection="nonlinear", ratio=0.5),
}  # fmt: skip


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_proj(x).tanh() * self.v_proj(x)


def attention(config: Any, **settings: Any) -> tuple[nn.Module, Adapter, torch.Tensor]:
    torch.manual_seed(0)
    model = Attention()
    x = torch.randn(3, 16)
    return model, attach(model, config, **settings), x


def assert_learns(model: nn.Module, adapter: Adapter, x: torch.Tensor) -> None:
    model(x).square().sum().backward()
    assert adapter.num_parameters
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())


def subsets(adapter: Adapter) -> list[dict[str, Any]]:
    words = sorted({name.rpartition(".")[2] for name in adapter.plan.param_shapes})
    some = [list(c) for count in range(1, len(words) + 1) for c in itertools.combinations(words, count)]
    groups: list[Any] = [None, *(range(adapter.plan.num_groups) if adapter.plan.num_groups > 1 else [])]
    return [{"groups": group, "arrays": chosen} for group in groups for chosen in some]


@pytest.mark.law("frozen-arrays")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in PRESETS),
        *itertools.product(["lorta", "nonlinear"], [torch.float64, torch.bfloat16, torch.float16]),
    ],
)
def test_whatever_is_chosen_learns_and_changes_nothing_at_first(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, adapter, x = attention(PRESETS[name], dtype=dtype)
    with adapter.disabled():
        base = model(x)
    started = adapter.arrays()
    for given in subsets(adapter):
        adapter.set_trainable(**given)
        assert torch.equal(model(x), base), given
        assert not any(delta.any() for delta in adapter.deltas())
        trained = dict(adapter.named_parameters())
        trained = {key: p for key, p in trained.items() if p.requires_grad}
        model(x).square().sum().backward()
        for number in range(adapter.plan.num_groups):
            own = [p for key, p in trained.items() if key.startswith(f"group{number}.")]
            assert not own or any(p.grad is not None and p.grad.any() for p in own), given
        model.zero_grad()
        # Counts and the file follow what is trained.
        count = sum(p.numel() for p in adapter.parameters())
        assert adapter.num_parameters == adapter.summary().parameters == count
        assert adapter.summary().frozen == adapter.plan.num_parameters - count
        assert (f"{adapter.summary().frozen:,} more frozen" in str(adapter.summary())) == (len(trained) < len(started))
        adapter.save(tmp_path / "a.safetensors")
        file = tna.load(tmp_path / "a.safetensors")
        assert file.num_parameters == count
        assert file.trained == adapter.trained
        with safe_open(tmp_path / "a.safetensors", "np") as stored:
            assert set(stored.keys()) == trained.keys()
        # Moved, it comes back with the same bits.
        before = {key: array.clone() for key, array in adapter.arrays().items()}
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(torch.randn_like(p) * 0.1)
        adapter.save(tmp_path / "a.safetensors")
        other = Attention()
        other.load_state_dict({key: p for key, p in model.state_dict().items() if "tnadapt" not in key})
        # What is computed from frozen numbers stays in their precision, without being asked for.
        again = tnadapt.torch.load(other, tmp_path / "a.safetensors", dtype=None if adapter.trained else dtype)
        assert again.trained == adapter.trained
        assert [p.requires_grad for _, p in again.named_parameters()] == [
            p.requires_grad for _, p in adapter.named_parameters()
        ]
        assert all(torch.equal(array, adapter.arrays()[key]) for key, array in again.arrays().items())
        again.save(tmp_path / "b.safetensors")
        assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
        deltas = tna.load(tmp_path / "a.safetensors").deltas()
        assert any(delta.any() for delta in deltas)
        if dtype is torch.float32:
            for mine, read in zip(adapter.deltas(), deltas, strict=True):
                assert torch.allclose(mine, torch.from_numpy(read), rtol=1e-5, atol=1e-6)
        adapter.load_arrays(before)
    adapter.set_trainable()
    assert adapter.trained is None
    # A choice is taken back whole.
    assert all(torch.equal(array, started[key]) for key, array in adapter.arrays().items())


def test_a_loaded_adapter_goes_on_as_it_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    model, adapter, x = attention(presets.lorta(2))
    adapter.set_trainable(arrays="core")
    adapter.save(path)
    adapter.detach()
    again = tnadapt.torch.load(model, path)
    # Still at its start: the zero moves with the choice.
    again.set_trainable(arrays="factor2")
    assert_learns(model, again, x)
    again.reset()
    assert not any(p.any() for p in again.parameters())
    assert again.arrays()["group0.split0.core"].any()
    again.detach()
    # Frozen arrays that have moved are stored, and what has been trained keeps every number.
    adapter = attach(model, presets.lora(2))
    move(adapter)
    output = model(x)
    adapter.set_trainable(arrays="factor1")
    assert torch.equal(model(x), output)
    adapter.save(path)
    with safe_open(path, "np") as stored:
        assert set(stored.keys()) == adapter.plan.param_shapes.keys()
    adapter.detach()
    names = tuple(f"group{number}.split0.factor1" for number in (0, 1))
    assert tnadapt.torch.load(model, path).trained == names
    assert torch.equal(model(x), output)


def test_merging_and_converting_a_file_with_frozen_arrays(tmp_path: Path) -> None:
    model, adapter, _ = attention(presets.lora(2))
    adapter.set_trainable(arrays="factor1")
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn_like(p))
    adapter.save(tmp_path / "a.safetensors")
    base = {key: p.clone() for key, p in model.state_dict().items() if "tnadapt" not in key}
    save_file(base, tmp_path / "base.safetensors")
    tna.merge(tmp_path / "base.safetensors", tmp_path / "a.safetensors", tmp_path / "merged.safetensors")
    adapter.merge()
    merged = load_file(tmp_path / "merged.safetensors")
    assert all(torch.equal(merged[key], p) for key, p in model.state_dict().items() if "tnadapt" not in key)
    found = tna.info(tmp_path / "a.safetensors")
    assert (found["parameters"], found["frozen"], found["draws_here"]) == (64, 64, True)
    made = tna.convert(tmp_path / "a.safetensors", to="peft-lora")
    assert made.exact
    half = tna.convert(tmp_path / "a.safetensors", dtype="bfloat16")
    assert half.file is not None
    tna.save(tmp_path / "half.safetensors", half.file)
    assert tna.load(tmp_path / "half.safetensors").trained == adapter.trained


@pytest.mark.law("frozen-arrays")
def test_what_could_never_learn_is_refused() -> None:
    _, adapter, _ = attention(presets.lora(2))
    arrays = adapter.arrays()
    # As a data-driven start brings them: no start of ours, and zero where it is to be trained; and where the zero of
    # the start is trained as it was, and all else has become zero.
    for word, other in (("factor1", "factor0"), ("factor0", "factor1")):
        brought = {name: array + 1.0 if name.endswith(word) else 0 * array for name, array in arrays.items()}
        adapter.set_trainable()
        adapter.load_arrays(brought)
        with pytest.raises(
            ConfigError, match=rf"arrays of zeros next to {word} that would be frozen.*nothing would learn"
        ):
            adapter.set_trainable(arrays=word)
        assert adapter.trained is None
        assert all(p.requires_grad for _, p in adapter.named_parameters())
        assert all(torch.equal(array, brought[name]) for name, array in adapter.arrays().items())
        adapter.set_trainable(arrays=other)
    adapter.set_trainable()
    adapter.reset()
    adapter.set_trainable(arrays="factor1")
    adapter.set_trainable()
    adapter.merge()
    with pytest.raises(TargetError, match="call unmerge"):
        adapter.set_trainable(arrays="factor1")
    assert adapter.trained is None


@pytest.mark.parametrize(("count", "said"), [(1, "0"), (4, "0, 1, 2, 3"), (5, "0, 1, 2, 3 and 1 more")])
def test_the_groups_that_could_not_learn_are_named(count: int, said: str) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    adapter = attach(model, presets.lora(2), "all-linear")
    # Moved in all groups, and zero in these beside what is to be trained.
    zero = [f"group{number}.split0.factor0" for number in range(count)]
    adapter.load_arrays({name: array * 0 if name in zero else array + 1 for name, array in adapter.arrays().items()})
    with pytest.warns(UserWarning, match=rf"gradient of the trained arrays is zero in groups {said}\. Train") as told:
        adapter.set_trainable(arrays="factor1")
    assert told[0].filename == __file__
    # Learning rates follow the zero.
    adapter.reset()
    (fast,) = adapter.parameter_groups(lr=0.1, ratio=4.0)
    assert fast["lr"] == 0.1
    assert len(fast["params"]) == 6


def test_a_relu_passes_nothing_back_to_a_factor_of_zeros() -> None:
    _, adapter, _ = attention(presets.lora(2), activation="relu")
    with pytest.raises(ConfigError, match="derivative at zero is zero: factor1 alone could never be trained"):
        adapter.set_trainable(arrays="factor1")
    adapter.set_trainable(arrays="factor0")
    for activation in ("gelu", "tanh", "silu"):
        model, adapter, x = attention(presets.lora(2), activation=activation)
        adapter.set_trainable(arrays="factor1")
        assert_learns(model, adapter, x)
    with pytest.raises(ConfigError, match="cannot be merged"):
        adapter.merge()


def test_a_choice_on_the_meta_device_is_filled_in_by_reset() -> None:
    with torch.device("meta"):
        model = Attention()
    adapter = attach(model, presets.lorta(2))
    adapter.set_trainable(arrays="core")
    model.to_empty(device="cpu")
    for p in model.parameters():
        p.data.uniform_(-1, 1)
    adapter.reset()
    assert not any(delta.any() for delta in adapter.deltas())
    assert_learns(model, adapter, torch.randn(2, 16))


# -- Parameters in training units: files, arrays and other adapters have the arrays themselves ------


IN_UNITS = {
    "lora": presets.lora(4),
    "alpha": presets.lora(4, alpha=6.0),
    "superlora": presets.superlora(4, projection="linear", ratio=0.1),
    "nonlinear": presets.superlora(4, projection="nonlinear"),
    "lokr": presets.lokr(2),
    "dense": presets.dense(),
    "vera": presets.vera(4),
    "tied": presets.tied_lora(2),
    "theta": presets.unilora(20),
    "tinylora": presets.tinylora(5),
    "magnitude": presets.dora(2),
    "factor": presets.hira(2),
    "pissa": presets.lora(2, start="pissa"),
    "given": presets.lora(2, start="given"),
}


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 12), nn.GELU(), nn.Linear(12, 12), nn.GELU(), nn.Linear(12, 12))


def loss_in_units(model: nn.Sequential) -> Tensor:
    x = torch.linspace(-1.0, 1.0, 60, dtype=model[0].weight.dtype).view(5, 12)
    return model(x).square().sum()


def trained(model: nn.Sequential, groups: object, steps: int = 4) -> nn.Sequential:
    optimizer = torch.optim.Adam(groups, 1e-2, eps=1e-30)  # type: ignore[arg-type]
    for _ in range(steps):
        optimizer.zero_grad()
        loss_in_units(model).backward()
        optimizer.step()
    return model


@pytest.mark.law("training-units")
@pytest.mark.parametrize("name", IN_UNITS)
def test_adam_in_units_is_adam_with_a_rate_for_each_array(name: str) -> None:
    model, other = base().double(), base().double()
    adapter = attach(model, IN_UNITS[name], "all-linear", dtype=torch.float64)
    alike = attach(other, IN_UNITS[name].replace(rate="sgd"), "all-linear", dtype=torch.float64)
    assert max(adapter.plan.units.values()) > 1.0
    assert set(alike.plan.units.values()) == {1.0}
    trained(model, adapter.parameters())
    trained(other, alike.adam_groups(1e-2))
    for array, own in alike.arrays().items():
        torch.testing.assert_close(adapter.arrays()[array], own, rtol=1e-7, atol=1e-10)


@pytest.mark.law("training-units", "copies")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", IN_UNITS)
def test_files_have_the_arrays_and_copies_the_units(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = base()
    adapter = attach(model, IN_UNITS[name], "all-linear", dtype=dtype)
    fresh = {array: parameter.detach().clone() for array, parameter in adapter.named_parameters()}
    trained(model, adapter.parameters())
    output = loss_in_units(model)
    adapter.save(tmp_path / "a.safetensors")
    file = tna.load(tmp_path / "a.safetensors")
    assert file.config.rate == "adam"
    arrays = {array: own.detach().clone() for array, own in adapter.arrays().items()}
    for array, own in file.arrays.items():
        assert torch.equal(torch.from_numpy(own), arrays[array].float())
    # What the file's plan computes is what the adapter does.
    for one, delta in zip(adapter.deltas(), adapter.plan.deltas(arrays), strict=True):
        assert torch.equal(one, delta)
    again = base()
    loaded = load(again, tmp_path / "a.safetensors", dtype=dtype)
    for (_, one), (_, other) in zip(adapter.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(one, other)
    copies = (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model)))
    adapter.reset()
    for array, parameter in adapter.named_parameters():
        assert torch.equal(parameter, fresh[array])
    adapter.load_arrays(arrays)
    assert torch.equal(loss_in_units(model), output)
    adapter.reset()
    adapter.swap(tmp_path / "a.safetensors")
    # The same also after another step, from the same gradients.
    for _ in range(2):
        for one in copies:
            assert torch.equal(loss_in_units(one), loss_in_units(model))
        for one in (model, *copies):
            trained(one, [parameter for parameter in one.parameters() if parameter.requires_grad], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_learning_rate_is_that_of_the_adapted_weights(dtype: torch.dtype) -> None:
    """Of rows of a fused weight, of a weight that several modules share, and of a parametrized one."""
    torch.manual_seed(0)
    fused, other = nn.MultiheadAttention(8, 2), nn.Linear(8, 4)
    shared = nn.Linear(8, 4)
    shared.weight = other.weight
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    model = nn.ModuleDict({"fused": fused, "first": other, "second": shared, "normed": normed}).to(dtype)
    with torch.no_grad():
        fused.in_proj_weight[:8] *= 30.0  # only q and v are adapted
        fused.in_proj_weight[8:16] = torch.nan
        other.weight *= 7.0
    targets = ["fused:qv", "first", "normed"]
    adapter = attach(model, presets.lora(1), targets, keep_tied=True, dtype=torch.float32)
    rows = fused.in_proj_weight.detach()
    weights = [rows[:8], rows[16:], other.weight, normed.weight]
    assert adapter.learning_rate() == tna.learning_rate(weights) == tna.learning_rate([w.double() for w in weights])
    assert adapter.learning_rate() > 2 * tna.learning_rate(weights[1:])


def test_arrays_that_are_trained_themselves_have_rates_of_their_own() -> None:
    adapter = attach(base(), presets.lora(2, rate="sgd"), "all-linear")
    message = r"trains the arrays themselves \(rate='sgd'\), .* give the optimizer adapter\.adam_groups\(\), or attach"
    with pytest.raises(ConfigError, match=message):
        adapter.learning_rate()
    (group,), (same,) = (
        adapter.adam_groups(),
        adapter.adam_groups(attach(base(), presets.lora(2), "all-linear").learning_rate()),
    )
    assert group["lr"] == same["lr"] != 1e-2
    adapter.merge()
    with pytest.raises(TargetError, match=r"is merged, and adam_groups\(\) needs it unmerged"):
        adapter.adam_groups()


def test_there_is_no_learning_rate_of_a_merged_adapter_or_of_a_model_without_values() -> None:
    adapter = attach(base(), presets.lora(1), "all-linear")
    adapter.merge()
    with pytest.raises(
        TargetError, match=r"is merged, and learning_rate\(\) needs it unmerged: call unmerge\(\) first"
    ):
        adapter.learning_rate()
    with torch.device("meta"):
        empty = base()
    with pytest.raises(
        tna.ConfigError, match=r"^weights\[0\] has no values: it is on the meta device, traced or sparse; call"
    ):
        attach(empty, presets.lora(1), "all-linear").learning_rate()


def test_other_arrays_and_files_of_the_other_rate(tmp_path: Path) -> None:
    adapter = attach(base(), presets.lora(1, start="given"), "all-linear")
    start = torch.full((12, 1), 0.25)
    adapter.start_from({"group0.split0.factor0": start})
    assert torch.equal(adapter.arrays()["group0.split0.factor0"], start)
    assert not any(delta.any() for delta in adapter.deltas())
    (group,) = adapter.adam_groups(2e-3)
    assert (group["lr"], len(group["params"])) == (2e-3, len(list(adapter.parameters())))
    model = base()
    adapter = attach(model, presets.lora(2, rate="sgd"), "all-linear")
    trained(model, adapter.adam_groups(1e-2))
    adapter.save(tmp_path / "a.safetensors")
    assert tna.load(tmp_path / "a.safetensors").config.rate == "sgd"
    other = base()
    attach(other, presets.lora(2), "all-linear").swap(tmp_path / "a.safetensors")
    assert torch.equal(loss_in_units(other), loss_in_units(model))
