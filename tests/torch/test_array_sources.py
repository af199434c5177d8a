"""Models adapted by arrays from the base, given, tied or scaled, and by θ: training, files, merging, refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import tnadapt as tna
import tnadapt.torch as tt
from tests.support.array_presets import P
from tests.support.depth import in_depth
from tnadapt.sources import FromBase, Given, Scaled, Seeded, Tied

GIVEN = {"group0.split0.factor0": np.random.default_rng(0).normal(size=(16, 2))}
CONFIGS: dict[str, tna.Config] = {
    "vera": P.vera(3),
    "randlora": P.randlora(6, rows=16, cols=16),
    "share_lora": P.share_lora(2),
    "tied_lora": P.tied_lora(2),
    "lora_xs": P.lora_xs(2),
    "svft": P.svft(4),
    "craft": P.craft(3),
    "quanta": P.quanta((4, 2)),
    "tinylora": P.tinylora(3),
    "unilora": P.unilora(16, 2),
    "nola": P.nola(3, 2),
    "θ of each group, through F": P.superlora(
        2, groups=2, projection="linear", ratio=0.5, before="signed-one-hot", parameters=16, scope="group"
    ),
    "θ and a nonlinear F": P.superlora(2, projection="nonlinear", ratio=0.5, before="linear", parameters=9),
    "θ of tied arrays": P.share_lora(2, before="one-hot", parameters=7),
    "θ of diagonals": P.vera(3, before="normal", parameters=5),
    "θ by index": P.lora(2, before=tna.maps.TiedElements(normalized=True), parameters=11),
    "θ by matrix": P.lora(2, before="given", parameters=4, scope="group"),
    "given": P.lora(2, sources={"factor0": Given(shared=True)}),
    "hadamard": P.loha(2, sources={"split0.factor1": Seeded("signs")}),
    "kronecker": P.lokr(2, sources={"dense": Tied("group0.split0.dense")}),
}
configs = pytest.mark.parametrize("name", CONFIGS)


class Block(torch.nn.Module):
    """Attention of its own, with a linear layer for each role, so that factors can be used."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (torch.nn.Linear(16, 16) for _ in range(3))
        self.out = torch.nn.Linear(16, 16)

    def forward(self, x: Any) -> Any:
        scores = torch.softmax(self.query(x) @ self.key(x).transpose(-1, -2) / 4.0, -1)
        return x + torch.tanh(self.out(scores @ self.value(x)))


def model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return torch.nn.Sequential(Block(), Block())


def inputs() -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(4, 5, 16, generator=generator), torch.randn(16, generator=generator)


def attached(name: str, base: Any, **settings: Any) -> Any:
    # Four weights of 16 × 16.
    theta = tna.SuperLoRA(CONFIGS[name], [(16, 16)] * 4, [0, 0, 1, 1], "qvqv").theta
    brought = {} if theta is None else theta.stand_ins(np.random.default_rng(7))
    return tt.attach(base, CONFIGS[name], given=GIVEN if name == "given" else brought or None, **settings)


def trained(name: str, strategy: str = "auto", steps: int = 3) -> tuple[Any, Any]:
    """A model and its adapter after a few steps, each of two backward passes."""
    base = model()
    adapter = attached(name, base, strategy=strategy)
    x, weights = inputs()
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        for half in x.split(2):
            (base(half) * weights).sum().backward()
        optimizer.step()
    return base, adapter


def reference(adapter: Any) -> tuple[Any, dict[str, Any]]:
    """The loss with the updates added to the weights, and its gradients."""
    x, weights = inputs()
    plain = model()
    params = {key: p.detach().clone().requires_grad_() for key, p in adapter.named_parameters()}
    state = {key: p.detach() for key, p in plain.named_parameters()}
    for target, delta in zip(adapter.targets, adapter.plan.training_plan.deltas(params), strict=True):
        state[target.name] = state[target.name] + delta
    out = torch.func.functional_call(plain, state, (x,))
    (out * weights).sum().backward()
    return out, {key: p.grad for key, p in params.items()}


# -- Training -----------------------------------------------------------------------------------------


@pytest.mark.law("theta", "sources")
@pytest.mark.parametrize("strategy", ["auto", "weight", "additive"])
@configs
def test_it_changes_nothing_at_first_and_trains_what_it_says(name: str, strategy: str) -> None:
    base = model()
    x, _ = inputs()
    before = base(x)
    adapter = attached(name, base, strategy=strategy)
    assert torch.equal(base(x), before)
    assert {key: tuple(p.shape) for key, p in adapter.named_parameters()} == adapter.plan.param_shapes
    base, adapter = trained(name, strategy)
    assert not torch.allclose(base(x), before)
    assert adapter.num_parameters == sum(p.numel() for p in adapter.parameters())


@pytest.mark.law("theta", "sources")
@pytest.mark.parametrize("strategy", ["auto", "weight", "additive"])
@configs
def test_gradients_are_those_of_the_updates(name: str, strategy: str) -> None:
    base, adapter = trained(name, strategy)
    x, weights = inputs()
    expected, gradients = reference(adapter)
    base.zero_grad()
    for half in x.split(2):  # accumulated over passes
        (base(half) * weights).sum().backward()
    assert torch.allclose(base(x), expected, atol=1e-5)
    for key, parameter in adapter.named_parameters():
        scale = gradients[key].abs().max()
        assert torch.allclose(parameter.grad, gradients[key], rtol=1e-4, atol=1e-5 * float(scale)), key


def test_a_layer_can_use_the_factors_that_theta_makes() -> None:
    adapter = attached("unilora", model(), strategy="factored")
    assert set(adapter.strategy) == {"factored"}
    base, adapter = trained("unilora", "factored")
    assert torch.allclose(base(inputs()[0]), reference(adapter)[0], atol=1e-5)


def test_arrays_are_made_from_theta_once_for_all_layers_and_passes() -> None:
    base = model()
    adapter = attached("unilora", base)
    calls = []
    projection = adapter.plan.theta.parts[0].projection
    forward = projection.map.forward
    projection.map.forward = lambda backend, x: calls.append(1) or forward(backend, x)
    x, weights = inputs()
    for half in x.split(1):
        (base(half) * weights).sum().backward()
    assert len(calls) == 1
    with torch.no_grad():
        base(x), base(x)
        assert len(calls) == 2
        next(adapter.parameters()).data.add_(0.1)  # no version counter tells of this
        after = base(x)
    assert len(calls) == 3
    assert torch.allclose(after, reference(adapter)[0], atol=1e-5)


@pytest.mark.parametrize("name", ["tinylora", "unilora", "tied_lora", "θ and a nonlinear F"])
@pytest.mark.parametrize("reentrant", [False])
def test_activation_checkpointing(name: str, reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    base, adapter = trained(name)
    x, weights = inputs()

    def gradients(run: Any) -> list[Any]:
        base.zero_grad()
        (run(x) * weights).sum().backward()
        return [p.grad.clone() for p in adapter.parameters()]

    plain = gradients(base)
    again = gradients(lambda x: checkpoint(base, x, use_reentrant=reentrant))
    for ours, theirs in zip(again, plain, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    in_depth(["tinylora", "unilora", "tied_lora", "lora_xs", "θ by index", "θ by matrix"], ["tinylora", "tied_lora"]),
)
def test_compiled(name: str) -> None:
    torch.compiler.reset()
    base, adapter = trained(name)
    x, weights = inputs()
    expected, gradients = reference(adapter)
    compiled = torch.compile(base, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), expected, atol=1e-5)
    base.zero_grad()
    (compiled(x) * weights).sum().backward()
    for key, parameter in adapter.named_parameters():
        assert torch.allclose(parameter.grad, gradients[key], rtol=1e-3, atol=1e-5 * float(gradients[key].abs().max()))


def test_choosing_what_is_trained() -> None:
    adapter = attached("tied_lora", model())
    adapter.set_trainable(arrays="size")
    assert adapter.num_parameters == 4 * 16
    assert all(key.endswith(".size") == p.requires_grad for key, p in adapter.named_parameters())
    adapter.set_trainable(arrays="factor1")
    assert adapter.num_parameters == 32 + 4 * 2
    one = attached("nola", model())
    one.set_trainable(groups=0)
    assert one.num_parameters == 6
    whole = attached("tinylora", model())
    whole.set_trainable()
    assert whole.num_parameters == 3
    with pytest.raises(tna.ConfigError, match=r"no arrays 'factor0' in groups None; .* arrays theta"):
        whole.set_trainable(arrays="factor0")


# -- Files and merging --------------------------------------------------------------------------------


@configs
def test_files_merging_and_copies(name: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base, adapter = trained(name)
    x, _ = inputs()
    expected = base(x)
    path = tmp_path / "adapter.safetensors"
    adapter.save(path)
    file = tna.load(path)
    assert file.arrays.keys() == adapter.plan.param_shapes.keys()
    assert file.given.keys() == adapter.plan.given_shapes.keys()
    other = model()
    loaded = tt.load(other, path)
    assert torch.equal(other(x), expected)
    assert loaded.num_parameters == adapter.num_parameters
    for twin in (copy.deepcopy(base), _pickled(base, tmp_path)):
        assert torch.equal(twin(x), expected)
    save_file(model().state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "out").mkdir()
    tna.merge(tmp_path / "model.safetensors", path, tmp_path / "out" / "model.safetensors")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    adapter.merge()
    state = base.state_dict()
    assert all(torch.equal(merged[key], state[key]) for key in merged)
    assert torch.allclose(base(x), expected, atol=1e-5)
    adapter.unmerge()
    assert torch.equal(base(x), expected)


def _pickled(base: Any, folder: Path) -> Any:
    torch.save(base, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


def test_thirteen_numbers_are_a_file_of_few_bytes(tmp_path: Path) -> None:
    base = model()
    adapter = tt.attach(base, P.tinylora(13))
    adapter.save(tmp_path / "adapter.safetensors")
    assert (tmp_path / "adapter.safetensors").stat().st_size < 2000


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("name", ["lora_xs", "unilora", "vera", "share_lora"])
def test_other_dtypes_train_merge_and_load(name: str, dtype: str, tmp_path: Path) -> None:
    base = model().to(getattr(torch, dtype))
    adapter = attached(name, base, dtype=getattr(torch, dtype))
    x, weights = (one.to(getattr(torch, dtype)) for one in inputs())
    with torch.no_grad():
        for array, parameter in adapter.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1 / adapter.plan.units[array])
    expected = base(x)
    adapter.save(tmp_path / "adapter.safetensors")
    other = model().to(getattr(torch, dtype))
    tt.load(other, tmp_path / "adapter.safetensors", dtype=dtype)
    assert torch.equal(other(x), expected)
    (base(x) * weights).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in adapter.parameters())
    adapter.merge()
    assert torch.allclose(base(x), expected, atol=0.1 if dtype != "float64" else 1e-10)


def test_a_base_that_differs_is_refused(tmp_path: Path) -> None:
    _, adapter = trained("lora_xs")
    path = tmp_path / "adapter.safetensors"
    adapter.save(path)
    assert not tna.load(path).complete
    with pytest.raises(tna.FileError, match="trained on another base model"):
        tt.load(model(1), path)
    with pytest.raises(tna.FileError, match=r"computed from the base weights.*store_bases=True"):
        tt.load(model(1), path, check_base=False)
    with pytest.raises(tna.ConfigError, match=r"computed from the base weights"):
        tna.load(path).deltas()
    adapter.save(path, store_bases=True)
    stored = tna.load(path)
    assert stored.complete
    for ours, theirs in zip(stored.deltas(), adapter.deltas(), strict=True):
        assert np.allclose(ours, theirs.detach().numpy(), atol=1e-7)
    other = model(1)
    tt.load(other, path, check_base=False)


def test_merging_needs_the_base_it_was_trained_on(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    _, adapter = trained("lora_xs")
    path = tmp_path / "adapter.safetensors"
    adapter.save(path)
    save_file(model(1).state_dict(), tmp_path / "model.safetensors")
    for check in (True, False):
        with pytest.raises(
            tna.FileError, match=r"another base model|has to be the base that the adapter was trained on"
        ):
            tna.merge(tmp_path / "model.safetensors", path, tmp_path / "out.safetensors", check_base=check)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_merged_base_is_not_the_base(tmp_path: Path) -> None:
    base, adapter = trained("lora_xs")
    path = tmp_path / "adapter.safetensors"
    adapter.save(path)
    adapter.merge()
    with pytest.raises(
        tna.TargetError, match=r"adapter 'default' is merged into the base: unmerge it before adapter 'b'"
    ):
        tt.attach(base, CONFIGS["lora_xs"], name="b")
    baked = adapter.bake()
    with pytest.raises(tna.FileError, match="trained on another base model"):
        tt.load(baked, path)


def test_given_arrays_are_stored_and_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(tna.ConfigError, match=r"given names 'group0.split0.factor1'"):
        tt.attach(model(), CONFIGS["given"], given={"group0.split0.factor1": np.ones((16, 2))})
    base, adapter = trained("given")
    path = tmp_path / "adapter.safetensors"
    adapter.save(path)
    file = tna.load(path)
    np.testing.assert_array_equal(file.given["group0.split0.factor0"], np.float32(GIVEN["group0.split0.factor0"]))
    with pytest.raises(tna.ShapeError, match=r"missing: 'group0.split0.factor0'"):
        tna.AdapterFile(file.config, file.targets, file.arrays)
    other = tt.attach(model(), CONFIGS["given"], given={"group0.split0.factor0": np.ones((16, 2))})
    with pytest.raises(tna.FileError, match=r"frozen array 'group0.split0.factor0' differs"):
        other.swap(path)
    del base


# -- Other bases --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora_xs", "tinylora", "svft"])
def test_from_the_meta_device(name: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        base = torch.nn.Sequential(Block(), Block())
        adapter = tt.attach(base, CONFIGS[name])
    assert adapter.plan.given == {}
    base.to_empty(device="cpu")
    with pytest.raises(tna.ConfigError, match=r"call adapter.reset\(\) once it has its weights"):
        base(inputs()[0])
    with pytest.raises(tna.TargetError, match=r"call reset\(\) once the model has its weights"):
        adapter.save(tmp_path / "adapter.safetensors")
    base.load_state_dict(model().state_dict(), strict=False)
    adapter.reset()
    plain = model()
    assert torch.equal(base(inputs()[0]), plain(inputs()[0]))
    whole = tt.attach(plain, CONFIGS[name])
    for ours, theirs in zip(adapter.plan.given.values(), whole.plan.given.values(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_quantized_base_gives_its_dequantized_weights_and_is_stored(tmp_path: Path) -> None:
    from tests.torch.test_requantizing import Packed, PackedLinear

    tt.register_quantized("packed", Packed)
    torch.manual_seed(0)
    base = torch.nn.Sequential(PackedLinear(12, 8), torch.nn.Tanh(), PackedLinear(4, 12))
    adapter = tt.attach(base, P.lora_xs(2), targets="all-linear")
    left = np.linalg.svd(base[0].numbers().numpy())[0][:, :2]
    basis = adapter.plan.given["group0.split0.factor0"]
    np.testing.assert_allclose(basis @ basis.T, left @ left.T, atol=1e-3)
    adapter.save(tmp_path / "adapter.safetensors")
    assert tna.load(tmp_path / "adapter.safetensors").config == adapter.config
    tt.load(copy.deepcopy(base), tmp_path / "adapter.safetensors", name="again")


def test_progress_of_the_bases() -> None:
    seen: list[tuple[int, int]] = []
    tt.attach(model(), CONFIGS["lora_xs"], progress=lambda done, of: seen.append((done, of)))
    assert seen == [(done, 8) for done in range(1, 9)]


def test_extraction_holds_the_bases(tmp_path: Path) -> None:
    base, adapter = trained("lora_xs")
    tuned = copy.deepcopy(base)
    tt.adapters(tuned)["default"].bake()
    adapter.detach()
    found = tt.extract(base, tuned, CONFIGS["lora_xs"])
    assert found.report.error < 1e-3
    from safetensors.torch import save_file

    save_file(model().state_dict(), tmp_path / "base.safetensors")
    save_file(tuned.state_dict(), tmp_path / "tuned.safetensors")
    again = tna.extract(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", CONFIGS["lora_xs"])
    assert again.report.error < 1e-3
    assert not again.file.complete


def test_combining_offset_and_load(tmp_path: Path) -> None:
    config = P.unilora(9, 2, offset=False)
    with pytest.raises(tna.ConfigError, match=r"offset=False starts split0.factor0 and split0.factor1 at zero"):
        tt.attach(model(), config)
    targets = list(tt.find_targets(model(), "qv"))
    theta = np.random.default_rng(0).normal(size=9).astype(np.float32)
    tna.save(tmp_path / "adapter.safetensors", tna.AdapterFile(config, targets, {"theta": theta}))
    base = model()
    adapter = tt.load(base, tmp_path / "adapter.safetensors")
    assert torch.allclose(base(inputs()[0]), reference(adapter)[0], atol=1e-5)


def test_two_groups_scaled_from_one_base() -> None:
    config = P.lora(2, sources={"factor0": Scaled(FromBase("rows")), "factor1": Scaled(FromBase("cols"), rank=True)})
    adapter = tt.attach(model(), config)
    assert adapter.num_parameters == 4 * (16 + 16 + 2)
    assert tna.verify(config, [(12, 8)] * 3, backends=["numpy", "torch"]).holds
