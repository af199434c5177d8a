"""What TRL's trainers send to vLLM for a model with an adapter; TRL's own generators of names run here without vLLM."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("trl")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that experimental trainers may change
    from trl.experimental.async_grpo import async_grpo_trainer
    from trl.experimental.online_dpo.online_dpo_trainer import OnlineDPOTrainer
from trl.generation.vllm_generation import VLLMGeneration

import tnadapt as tna
import tnadapt.torch as tt
import tnadapt.torch.peft as plugin
from tests.support.depth import in_depth
from tnadapt import presets
from tnadapt.testing.verification import formula

from .loops import bits, same
from .tiny_language_model import config_of, llama, through_peft

# They are about TRL's own dependencies, and about options that it sets itself.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

#: A preset of each format, source, map and way of changing a weight.
ONE_OF_EACH = ("lora", "superlora", "dora", "hira", "tinylora", "vera", "fourierft", "lokr")


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    plugin.register()


class _Sender:
    """The part of TRL's generation and trainers that reads a model's parameters; ``sent`` is what they pass on."""

    def __init__(self, model: Any) -> None:
        self.model, self.mode, self.vllm_mode = model, "server", "server"
        self.is_fsdp_enabled = False
        self.sent: dict[str, Any] = {}
        self._weight_metadata = None
        self._dist = SimpleNamespace(is_fsdp=False, gather_params=lambda _: contextlib.nullcontext())
        self.accelerator = SimpleNamespace(is_main_process=True, state=SimpleNamespace(deepspeed_plugin=None))
        self.vllm_client = SimpleNamespace(
            update_named_params=self._update, reset_prefix_cache=lambda: None,
            update_named_param=lambda name, parameter: self._update(None, [(name, parameter)]),
            weight_update=contextlib.nullcontext,
        )  # fmt: skip
        self._fix_param_name_to_vllm = MethodType(VLLMGeneration._fix_param_name_to_vllm, self)
        self._iter_named_params = MethodType(VLLMGeneration._iter_named_params, self)

    def _update(self, metadata: Any, parameters: Any) -> None:
        self.sent |= {name: parameter.detach().clone() for name, parameter in parameters}


def by_generation(model: Any) -> dict[str, Any]:
    """Return what the weight sync of GRPO, RLOO, GOLD, SDPO and distillation sends."""
    sender = _Sender(model)
    VLLMGeneration.sync_weights(sender)
    return sender.sent


def by_async_grpo(model: Any) -> dict[str, Any]:
    """Return what AsyncGRPOTrainer sends."""
    merges = hasattr(model, "merge_adapter")
    if merges:
        model.merge_adapter()
    try:
        return {name: p.detach().clone() for name, p in async_grpo_trainer._iter_vllm_named_params(model)}
    finally:
        if merges:
            model.unmerge_adapter()


def by_online_dpo(model: Any) -> dict[str, Any]:
    """Return what OnlineDPOTrainer sends."""
    sender = _Sender(model)
    sender._move_model_to_vllm_inner = MethodType(OnlineDPOTrainer._move_model_to_vllm_inner, sender)
    OnlineDPOTrainer._move_model_to_vllm(sender)
    return sender.sent


SYNCS = [by_generation, by_async_grpo, by_online_dpo]


def expected(model: Any) -> dict[str, Any]:
    """Return W' of every adapted weight, computed in float64 and rounded as a merge rounds."""
    adapter = tt.adapters(model)["default"]
    plan = adapter._state.plan
    arrays = {name: array.detach().double().numpy() for name, array in adapter.named_parameters()}
    weights = {}
    for index, (target, delta) in enumerate(zip(adapter.targets, plan.deltas(arrays), strict=True)):
        weight = adapter.model.get_parameter(target.name).detach()
        own = plan.weight_param_names[index]
        changed = formula(plan.config, weight.double().numpy(), delta, arrays[own[0]] if own else None)
        weights[target.name] = torch.from_numpy(np.asarray(changed)).float().to(weight.dtype)
    return weights


@pytest.mark.law("merge-exact-undo")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("preset", in_depth(presets.__all__, ONE_OF_EACH))
def test_merged_weights_are_sent_under_the_base_s_names(preset: str, dtype: Any) -> None:
    base = llama().to(dtype)
    model = through_peft(preset, dtype, 0.1)
    kept, arrays = (
        bits(model.get_base_model()),
        {n: p.clone() for n, p in tt.adapters(model)["default"].arrays().items()},
    )
    changed = expected(model)
    for sync in SYNCS:
        sent = sync(model)
        assert list(sent) == [name for name, _ in base.named_parameters()]
        for name, parameter in base.named_parameters():
            if name not in changed:
                assert torch.equal(sent[name], parameter)
                continue
            step = torch.finfo(dtype).eps * changed[name].abs().float()
            # One step of the dtype, where the last bit of a sum decides how it is rounded.
            error = (sent[name].float() - changed[name].float()).abs()
            moved = (changed[name].float() - parameter.float()).abs()
            assert bool((error <= step + 1e-6 * moved.max()).all())
            assert float(moved.max()) > 20 * float(error.max())
        assert same(bits(model.get_base_model()), kept)
        after = tt.adapters(model)["default"].arrays()
        assert all(torch.equal(after[name], array) for name, array in arrays.items())
        assert not tt.adapters(model)["default"].merged


def test_a_trained_head_is_sent_in_place_of_the_base_s_and_the_adapter_alone_is_refused() -> None:
    model = through_peft("lora", size=0.1, modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(1.0)
    names = [name for name, _ in llama().named_parameters()]
    for sync in SYNCS:
        sent = sync(model)
        assert list(sent) == names
        assert torch.equal(sent["lm_head.weight"], llama().lm_head.weight + 1.0)
    # TRL's own sync of adapters takes PEFT's LoRA alone: it falls back to merged weights.
    with pytest.raises(ValueError, match="Sync merged weights instead"):
        async_grpo_trainer.validate_lora_for_vllm_sync(model)


def by_hand(model: Any) -> dict[str, Any]:
    """Return what a loop of one's own sends for an attached adapter."""
    adapter = tt.adapters(model)["default"]
    adapter.merge()
    sent = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapter.unmerge()
    return sent


@pytest.mark.law("merge-exact-undo")
@pytest.mark.parametrize("sync", [by_generation, by_hand])
@given(preset=st.sampled_from(presets.__all__), seed=st.integers(0, 2**32 - 1), size=st.sampled_from([1e-3, 0.03, 1.0]))
def test_cycles_between_the_steps_of_training_leave_the_base_as_it_was(
    sync: Any, preset: str, seed: int, size: float
) -> None:
    if sync is by_generation:
        model = through_peft(preset, torch.bfloat16)
        base = model.get_base_model()
    else:
        model = base = llama().to(torch.bfloat16)
        tt.attach(model, config_of(preset))
    adapter = tt.adapters(model)["default"]
    kept, random, states = bits(base), torch.Generator().manual_seed(seed), set()
    for _ in range(20):
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter += (size * torch.randn(parameter.shape, generator=random)).to(parameter.dtype)
        sent = sync(model)
        states.add(tuple(sent[target.name].view(torch.int16).numpy().tobytes() for target in adapter.targets))
        assert same(bits(base), kept)
    if size > 0.01:
        assert len(states) == 20  # each time, other weights were sent


# -- attach() without PEFT -----------------------------------------------------------------------

REFUSED = (
    r"TRL would send vLLM the base weights without adapter 'default', and its arrays, which vLLM does not have: "
    r"detach\(\) it and train through tnadapt.torch.peft"
)


@pytest.mark.parametrize("place", ["model", "copy", "in a module around it", "on a part of it"])
@pytest.mark.parametrize("sync", SYNCS)
def test_an_attached_adapter_is_refused_before_anything_is_sent(
    sync: Any, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []
    monkeypatch.setattr(_Sender, "_update", lambda self, metadata, parameters: sent.extend(parameters))
    model = llama()
    tt.attach(model.model if place == "on a part of it" else model)
    if place == "copy":
        model = copy.deepcopy(model)
    with pytest.raises(tna.TargetError, match=REFUSED):
        sync(model if place in ("model", "copy") else _Around(model))
    assert not sent


class _Around(torch.nn.Module):  # type: ignore[misc]
    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module


@pytest.fixture
def _alone() -> Iterator[None]:
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("name", ["_iter_fsdp1_params", "_sync_fsdp1_params_to_vllm"])
def test_fsdp1_is_refused_before_anything_is_sent(name: str) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    def wrapped(adapted: bool) -> Any:
        model = llama()
        if adapted:
            tt.attach(model)
        policy = ModuleWrapPolicy({type(model.model.layers[0])})
        cpu = torch.device("cpu")
        found = FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=cpu)
        found(torch.tensor([[1, 2]]))  # as in training: before the first call, nothing can be read
        return found

    def sent_by(model: Any) -> list[str]:
        sender = _Sender(model)
        sender.vllm_client.update_named_param = lambda name, parameter: sent.append(name)
        method = getattr(VLLMGeneration if name == "_iter_fsdp1_params" else OnlineDPOTrainer, name)
        setattr(sender, name, MethodType(method, sender))
        sent.extend(name for name, _ in getattr(sender, name)(model) or ())
        return sent

    sent = list[str]()
    with pytest.raises(tna.TargetError, match=REFUSED):
        sent_by(wrapped(adapted=True))
    assert not sent
    assert set(sent_by(wrapped(adapted=False))) == {name for name, _ in llama().named_parameters()}


def test_all_others_get_the_parameters() -> None:
    model = llama()
    adapter = tt.attach(model)
    names = [name for name, _ in llama().named_parameters()]
    assert [name for name, _ in model.named_parameters()] == [*adapter._state.parameter_names.values(), *names]
    assert len(list(model.parameters())) == len(names) + len(list(adapter.parameters()))
    own = [f"model.{name}" for name in adapter._state.parameter_names.values()]
    assert [name for name, _ in model.named_parameters("model", recurse=False)] == own
    adapter.merge()
    merged = by_generation(model)
    assert all(torch.equal(merged[name], model.get_parameter(name)) for name in names)
    adapter.unmerge()
    adapter.detach()
    assert not {"named_children", "named_modules"} & model.__dict__.keys()
    assert list(by_generation(model)) == names
