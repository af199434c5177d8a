"""RELIABILITY's laws 7 to 12 on real architectures, each built by its own library."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn

import tnadapt as tna
import tnadapt.torch as tt
from tests.support.depth import in_depth

from . import life
from .architectures import MODELS, Inputs, build, output
from .loops import bits, same
from .small import compiles_whole, stir

pytestmark = pytest.mark.slow

P = tna.presets
CONFIGS = {
    "default": None,
    "lora": P.lora(2),
    "projected": P.superlora(4, groups=2, projection="linear", ratio=0.5),
}
# A residual network has no attention: its convolutions are adapted.
TARGETS = {"torchvision_resnet": "conv"}
models = pytest.mark.parametrize("name", MODELS)


def frozen(name: str) -> tuple[nn.Module, Inputs]:
    """Return the base without trainable parameters; with some, torch uses kernels that differ in the last bit."""
    model, inputs = build(name)
    return model.requires_grad_(False), inputs


def attached(name: str, config: str = "default", **settings: object) -> tuple[nn.Module, Inputs, tt.Adapter]:
    model, inputs = build(name)
    return model, inputs, tt.attach(model, CONFIGS[config], TARGETS.get(name, "qv"), **settings)


def run(model: nn.Module, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return output(model, inputs)


@pytest.mark.law("fresh-is-zero", "first-gradients")
@models
@pytest.mark.parametrize("config", CONFIGS)
def test_a_fresh_adapter_changes_nothing_and_learns_at_once(name: str, config: str) -> None:
    base, inputs = frozen(name)
    want = run(base, inputs)
    model, _, adapter = attached(name, config)
    assert torch.equal(run(model, inputs), want)
    before = bits(model)
    found = output(model, inputs)
    free = [output(base, inputs)]
    for target in adapter.targets:  # where the sum is what requires a gradient, so must the base's weight
        base.get_parameter(target.name).requires_grad_()
    free.append(output(base, inputs))
    assert any(torch.equal(found, either) for either in free)
    found.square().sum().backward()
    # What starts from zero moves first; and nothing of the base ever does.
    started = {n for n, p in adapter.named_parameters() if not p.any()}
    assert {n for n, p in adapter.named_parameters() if p.grad is not None and p.grad.any()} == started
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert same(bits(model), before)
    assert not any(p.requires_grad for n, p in model.named_parameters() if "tnadapt_" not in n)


@pytest.mark.law("attached-is-update", "merge-is-attached", "detach", "fused-keys", "merge-exact-undo")
@models
def test_it_acts_as_if_merged_and_ten_merges_and_detaching_give_the_base_back(name: str) -> None:
    untouched, inputs = build(name)
    model, _, adapter = attached(name)
    paths = [(path, type(module)) for path, module in model.named_modules()]
    assert paths == [(path, type(module)) for path, module in untouched.named_modules()]
    base = run(model, inputs)
    stir(adapter, size=0.3)
    free, on = output(model, inputs).detach(), run(model, inputs)
    adapter.merge()
    merged = run(model, inputs)
    adapter.unmerge()
    for attached_output in (on, free):
        error = float((attached_output - merged).abs().max())
        assert error < 1e-5 * max(1.0, float(merged.abs().max()))
        assert error < 0.05 * float((merged - base).abs().max())  # BEiT's layers start with scales of 1e-5
    rows = {t.name: set[int]() for t in adapter.targets}
    for target in adapter.targets:
        every = range(target.stored[1] if target.transposed else target.stored[0])
        rows[target.name] |= set(every if target.rows is None else target.rows.indices())
    for _ in range(10):
        adapter.merge()
        now = bits(model)
        adapter.unmerge()
    for key, before in bits(untouched).items():
        if key not in rows:
            assert torch.equal(now[key], before), f"{key} is no target"
            continue
        target = next(t for t in adapter.targets if t.name == key)
        out = 1 if target.transposed else 0
        others = [row for row in range(before.shape[out]) if row not in rows[key]]
        index = torch.tensor(others, dtype=torch.int64)
        assert torch.equal(now[key].index_select(out, index), before.index_select(out, index))
    with adapter.disabled():
        assert torch.equal(run(model, inputs), run(frozen(name)[0], inputs))
    duplicate = copy.deepcopy(model)
    adapter.detach()
    assert same(bits(model), bits(untouched))
    assert torch.equal(run(model, inputs), run(untouched, inputs))
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in untouched.parameters()]
    assert not torch.equal(run(duplicate, inputs), run(frozen(name)[0], inputs))


@pytest.mark.law("merge-exact-undo", "half-precision-base")
@models
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    def half() -> tuple[nn.Module, Inputs]:
        model, inputs = build(name)
        narrowed = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
        return model.to(dtype), narrowed

    model, inputs = half()
    try:
        want = run(model, inputs)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"the model itself does not run in {dtype}: {error}")
    adapter = tt.attach(model, None, TARGETS.get(name, "qv"))
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    assert torch.equal(run(model, inputs), want)
    before = bits(model)
    stir(adapter, size=0.3)
    assert not torch.equal(run(model, inputs), want)
    adapter.merge()
    adapter.unmerge()
    assert same(bits(model), before)


class Called(nn.Module):
    """A model with its inputs, whatever it is called with."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model, self.inputs = model, inputs

    def forward(self, x: Tensor) -> Tensor:
        return output(self.model, self.inputs)


@pytest.mark.law("compile")
@compiles_whole
@pytest.mark.parametrize(
    "name",
    in_depth(["timm_vit", "timm_swinv2", "bert", "gpt2", "llama", "torchvision_vit"], ["timm_vit", "gpt2", "llama"]),
)
@life.asks_for_grad
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # of the compiler's own
def test_compiled_whole(name: str) -> None:
    model, inputs, adapter = attached(name)
    stir(adapter, size=0.3)
    life.check_compiled(Called(model, inputs), adapter, torch.zeros(0))


@pytest.mark.law("meta-device")
def test_the_default_fits_a_7b_model_on_the_meta_device() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, intermediate_size=11008
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    adapter = tt.attach(model)
    assert adapter.plan.size == 32 * (4096 * 4096 + 1024 * 4096)
    assert adapter.num_parameters == 8 * 2 * 25906  # 25906 = ceil(sqrt(32 * 20 * 2**20))
