"""Regression tests: cases that once failed on models, in loops or in an unexpected order of calls, each by name."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tnadapt as tna
import tnadapt.torch as tt
from tnadapt import presets
from tnadapt.errors import TargetError

from .interrupts import interrupted, moments
from .loops import bits, same
from .small import batch, small, stir

P = tna.presets


def run(model: nn.Module, *given: Any) -> Tensor:
    with torch.no_grad():
        return model(*(given or (batch(),)))


@pytest.mark.parametrize("config", [P.lora(2), P.hira(2)], ids=["lora", "hira"])
@pytest.mark.parametrize("rows", [None, tna.Rows(2, 3, 8)])
def test_a_convolution_in_channels_last_is_merged(rows: tna.Rows | None, config: tna.Config) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3)).to(memory_format=torch.channels_last)
    adapter = tt.attach(model, config, [tna.Target("0", (8, 4, 3, 3), "conv", rows=rows)])
    stir(adapter, 0.3)
    x = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last)
    before, attached = bits(model), run(model, x)
    with adapter.disabled():
        base = run(model, x)
    adapter.merge()
    assert (run(model, x) - attached).abs().max() < 1e-5 < (attached - base).abs().max()
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    adapter.unmerge()
    assert same(bits(model), before)
    assert (adapter.bake()(x) - attached).abs().max() < 1e-5


def through(x: Tensor, layer: nn.Linear) -> Tensor:
    return x @ layer.weight.T


class Elsewhere(nn.Module):
    """Passes its children to a function, which reads their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return through(x, self.q_proj) + through(x, self.v_proj)


def test_a_read_that_is_not_seen_is_said_once() -> None:
    model, x = Elsewhere(), torch.randn(4, 8)
    adapter = tt.attach(model)
    message = "none of the modules that adapter 'default' updates was called in a forward pass"
    with pytest.warns(UserWarning, match=message):
        run(model, x)
    run(model, x)
    adapter.merge()
    run(model, x)


def test_an_adapter_on_a_part_and_one_on_the_whole(tmp_path: Path) -> None:
    model = small()
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    part = tt.attach(model.blocks[1], P.lora(2), name="part", keep_trainable="o_proj")
    whole = tt.attach(model, P.superlora(2), name="whole", keep_trainable="head")
    free = {name for name, p in model.named_parameters() if p.requires_grad and "tnadapt_" not in name}
    assert free == {"blocks.1.o_proj.weight", "blocks.1.o_proj.bias", "head.weight", "head.bias"}
    assert set(tt.adapters(model)) == {"part", "whole"}
    stir(whole)
    whole.merge()
    # The part's fingerprint would take another one's sum for the base.
    with pytest.raises(tna.TargetError, match="adapter 'whole' is merged into the base"):
        part.save(tmp_path / "a.safetensors")
    whole.unmerge()
    part.save(tmp_path / "a.safetensors")
    part.detach()
    assert not model.blocks[1].k_proj.weight.requires_grad  # the whole's still
    whole.detach()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable


@pytest.mark.law("name-clash")
def test_one_name_in_two_parts_or_in_a_part_and_the_whole() -> None:
    for part_first in (True, False):
        model = small()
        places = (model.blocks[1], model) if part_first else (model, model.blocks[1])
        tt.attach(places[0])
        with pytest.raises(tna.TargetError, match="this model already has an adapter 'default'"):
            tt.attach(places[1])
    # Two parts have nothing in common, but the whole cannot tell their adapters apart.
    model = small()
    both = tt.attach(model.blocks[0]), tt.attach(model.blocks[1])
    for call in (tt.adapters, lambda model: tt.mix(model, {"default": 0.0})):
        with pytest.raises(tna.TargetError, match="two adapters of this model have the name 'default', one attached"):
            call(model)
    assert [adapter.weight for adapter in both] == [1.0, 1.0]


def checkpointed(model: nn.Module) -> None:
    for block in model.blocks:
        block.forward = lambda x, plain=block.forward: checkpoint(plain, x, use_reentrant=False)


@pytest.mark.law("activation-checkpointing")
@pytest.mark.parametrize("config", [None, P.lora(2)], ids=["default", "lora"])
@pytest.mark.parametrize("change", ["activate", "mix", "merge", "disable"])
def test_a_change_before_a_checkpointed_region_runs_again_is_noticed(change: str, config: tna.Config | None) -> None:
    model = small()
    a, b = (tt.attach(model, config, name=name) for name in "ab")
    for seed, adapter in enumerate((a, b)):
        stir(adapter, seed=seed)
    checkpointed(model)
    # The settings of earlier passes are forgotten once the arrays change.
    tt.mix(model, {"a": 0.5})
    model(batch()).sum().backward()
    stir(a)
    a.activate()
    model(batch()).sum().backward()
    y = model(batch().requires_grad_())
    with contextlib.ExitStack() as stack:
        if change == "disable":
            stack.enter_context(a.disabled())
        else:
            stack.callback(a.unmerge if change == "merge" else a.activate)
            {"activate": b.activate, "mix": lambda: tt.mix(model, {"a": 0.5}), "merge": a.merge}[change]()
        with pytest.raises(RuntimeError, match="adapter 'a' was activated, mixed, merged or disabled, or rows"):
            y.sum().backward()
    model(batch()).sum().backward()


@pytest.mark.law("merge-twice")
def test_a_merge_inside_of_disabled_is_refused() -> None:
    model = small()
    with torch.inference_mode():  # where it is attached does not matter
        adapter = tt.attach(model)
    model(batch()).sum().backward()
    assert any(p.grad.any() for p in adapter.parameters())
    stir(adapter)
    before = bits(model)
    with adapter.disabled(), pytest.raises(tna.TargetError, match="is disabled; merge it outside of disabled"):
        adapter.merge()
    assert same(bits(model), before)


def test_a_swap_takes_the_same_kept_parameters_or_nothing(tmp_path: Path) -> None:
    other = small()
    theirs = tt.attach(other, keep_trainable="blocks.1.o_proj")
    stir(theirs)
    with torch.no_grad():
        other.blocks[1].o_proj.weight += 1
    theirs.save(tmp_path / "other.safetensors")
    bare = tt.attach(small(), P.superlora(8))
    bare.save(tmp_path / "bare.safetensors")
    model = small()
    adapter = tt.attach(model, keep_trainable="head")
    before, arrays = bits(model), {name: array.clone() for name, array in adapter.arrays().items()}
    for name in ("other", "bare"):
        with pytest.raises(tna.FileError, match="its list of kept parameters differs from that of adapter 'default'"):
            adapter.swap(tmp_path / f"{name}.safetensors")
    assert same(bits(model), before)
    assert same(adapter.arrays(), arrays)


def test_a_mix_is_done_whole_or_not_at_all() -> None:
    model = small()
    a, b = (tt.attach(model, name=name) for name in "ab")
    for weights in (["a"], "ab", [("a", 1.0, 2.0)]):
        with pytest.raises(tna.ConfigError, match=r"mix\(\) needs weights by name, such as {'first': 0.5}; got"):
            tt.mix(model, weights)
    with pytest.raises(tna.TargetError, match="adapters are on a torch module; got 'model'"):
        tt.mix("model", {"a": 1.0})
    wrong: list[Any] = [float("nan"), float("inf"), 1e39, "x", None, [1.0]]
    for weight in wrong:
        with pytest.raises(tna.ConfigError, match="a mixing weight must be a finite number; got"):
            tt.mix(model, {"a": 0.5, "b": weight})
        assert (a.weight, b.weight) == (1.0, 1.0)
        with pytest.raises(tna.ConfigError, match="a mixing weight must be a finite number"):
            a.set_weight(weight)


@pytest.mark.parametrize(
    "given",
    [{"groups": [0, 7]}, {"arrays": ["factor0", "factorX"]}, {"groups": True}, {"groups": 1.0}, {"arrays": 3},
     {"groups": [[0]]}],
)  # fmt: skip
def test_a_group_or_array_that_is_not_there(given: dict[str, Any]) -> None:
    adapter = tt.attach(small(), P.superlora(2, groups=2))
    before = [p.requires_grad for _, p in adapter.named_parameters()]
    with pytest.raises(tna.ConfigError, match="it has groups 0 to 1 and arrays factor0, factor1"):
        adapter.set_trainable(**given)
    assert [p.requires_grad for _, p in adapter.named_parameters()] == before


def test_a_replica_and_a_model_that_accelerate_has_offloaded_are_refused() -> None:
    model = small()
    tt.attach(model)
    replica = model._replicate_for_data_parallel()
    with pytest.raises(tna.TargetError, match="use DistributedDataParallel, with one process per device"):
        replica(batch())
    run(model)
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(*small().blocks[:2])
    before = run(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(tna.TargetError, match=r"is offloaded by accelerate.*attach to a model that is fully in memory"):
        tt.attach(model)
    assert torch.equal(run(model), before)


@pytest.mark.filterwarnings("ignore")
def test_a_trace_computes_the_update_from_the_arrays() -> None:
    model = small()
    adapter = tt.attach(model)
    stir(adapter)
    run(model)
    with torch.no_grad():
        traced = torch.jit.trace(model, batch())
        before = traced(batch())
        assert torch.allclose(before, run(model), atol=1e-6)
        for name, parameter in traced.named_parameters():
            if "tnadapt_" in name:
                parameter.mul_(3)
        assert (traced(batch()) - before).abs().max() > 1e-3


def parametrized(seed: int) -> nn.Module:
    model = small(seed)
    nn.utils.parametrizations.weight_norm(model.blocks[1].q_proj)
    return model


def of_two_dtypes(seed: int) -> nn.Module:
    model = small(seed)
    model.blocks[1].to(torch.bfloat16)
    return model


@pytest.mark.parametrize("make", [parametrized, of_two_dtypes])
def test_a_base_with_a_parametrized_weight_or_two_dtypes(make: Any, tmp_path: Path) -> None:
    model, path = make(0), tmp_path / "a.safetensors"
    adapter = tt.attach(model)
    stir(adapter)
    adapter.save(path)
    base = tna.load(path).base
    assert base is not None
    assert base.dtype == "float32"
    loaded = tt.load(make(0), path).model
    with pytest.raises(tna.FileError, match="trained on another base model"):
        tt.load(make(1), path)
    if make is of_two_dtypes:
        tt.load(small().to(torch.bfloat16), path)
        return
    attached = run(model)
    assert torch.equal(run(loaded), attached)
    with pytest.raises(tna.TargetError, match=r"q_proj.weight is parametrized.*remove_parametrizations\(\) first"):
        adapter.merge()
    # Another one, after attaching.
    nn.utils.parametrizations.weight_norm(model.blocks[0].qkv)
    assert torch.allclose(run(model), attached, atol=1e-5)


@pytest.mark.parametrize("reference_first", [True, False])
def test_a_reference_pass_before_a_checkpointed_region_runs_again_is_no_change(reference_first: bool) -> None:
    """As in preference training: outputs of the base and of the adapted model, and one backward pass."""

    def gradients(is_checkpointed: bool) -> list[Tensor]:
        model = small()
        adapter = tt.attach(model)
        stir(adapter)
        if is_checkpointed:
            checkpointed(model)

        def reference() -> Tensor:
            with adapter.disabled():
                return model(batch()).detach()

        for _ in range(2):
            base = reference() if reference_first else None
            y = model(batch())
            (y - (reference() if base is None else base)).square().sum().backward()
        return [p.grad for p in adapter.parameters()]

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_what_happens_to_an_adapter_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, logger="tnadapt")
    model = nn.Sequential(nn.Linear(8, 8))
    path = tmp_path / "a\x1b.safetensors"
    adapter = tt.attach(model, "lora", "all-linear", rank=2, name="one")
    adapter.save(path)
    adapter.swap(path)
    adapter.merge()
    adapter.unmerge()
    adapter.detach()
    tt.load(model, path, name="two").bake()
    words = ["attached", "saved", "swapped", "merged", "unmerged", "detached", "attached", "loaded", "baked"]
    messages = [record.getMessage() for record in caplog.records]
    assert [message.partition(" ")[0] for message in messages] == words
    assert all("<tnadapt adapter " in message and "32 parameters" in message for message in messages)
    assert f"to {tmp_path}/a\\x1b.safetensors" in messages[1]
    assert {record.levelname for record in caplog.records} == {"INFO"}
    assert {record.name.partition(".")[0] for record in caplog.records} == {"tnadapt"}
    assert capsys.readouterr() == ("", "")
    # Nothing is logged of what fails.
    caplog.clear()
    with pytest.raises(tna.TnadaptError):
        tt.attach(model, "lora", "nothing like it", rank=2)
    assert not caplog.records


# -- References that share the base's tensors -------------------------------------------------------

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 6), nn.Linear(6, 3)).eval()


def move(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)


@pytest.mark.parametrize("with_adapters", [False, True])
def test_a_reference_stays_as_it_is(with_adapters: bool) -> None:
    model = perceptron()
    adapter = tt.attach(model, presets.superlora(2), ["0", "3"], keep_trainable="4")
    stir(adapter, 0.5)
    reference = tt.reference_model(model, with_adapters=with_adapters)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    # Only what is trained is copied, and nothing changes in the model that is trained.
    other = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert name not in other or (other[name] is parameter) == (name not in trainable)
    assert trainable == {"4.weight", "4.bias", *(n for n, _ in model.named_parameters() if n.startswith("tnadapt_"))}
    assert not any(parameter.requires_grad for parameter in reference.parameters())
    if not with_adapters:
        assert tt.adapters(reference) == {}
        assert list(reference.state_dict()) == list(perceptron().state_dict())
    with contextlib.nullcontext() if with_adapters else adapter.disabled():
        expected = run(model, X)
    move(model)
    assert torch.equal(reference(X), expected)
    assert not torch.equal(model(X), expected)
    # Each has its own mode and buffers.
    before = reference[1].running_mean.clone()
    model.train()(X)
    assert not any(module.training for module in reference.modules())
    assert torch.equal(reference[1].running_mean, before)


def test_a_reference_is_of_an_adapter_that_is_not_merged_and_leaves_no_trace_when_detached() -> None:
    def refused(call: Any, message: str) -> None:
        with pytest.raises(TargetError, match=f"^{re.escape(message)}$"):
            call()

    model, below = perceptron(), str(Path(tt.__file__).parent)
    make = functools.partial(tt.reference_model, model, with_adapters=True)
    refused(
        make,
        "Sequential has no adapter, so that all of its parameters may be trained: for a reference, copy.deepcopy() it",
    )
    adapter = tt.attach(model, targets="all-linear", keep_trainable="1")
    flags = [parameter.requires_grad for parameter in model.parameters()]
    for stop in moments(make, below):
        interrupted(make, stop, below)
        assert [parameter.requires_grad for parameter in model.parameters()] == flags, stop
    move(model)
    adapter.merge()
    refused(make, "adapter 'default' is merged into the weights that the reference shares: unmerge() it")
    adapter.unmerge()
    (other,) = tt.adapters(make()).values()
    expected = model(X)
    for call in (other.merge, other.bake):
        refused(
            call,
            "adapter 'default' is on a reference model, whose weights are those of the model in training: a merge "
            "would change both; leave it attached",
        )
    other.detach()
    assert torch.equal(model(X), expected)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_arguments_in_each_others_place_are_recognized() -> None:
    wrong: Any = "a.safetensors"
    with pytest.raises(TargetError, match=r"^model must be a nn\.Module; got 'a\.safetensors'; model and path may be"):
        tt.load(wrong, nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(TargetError, match=r"^cfg must be a Config or .*; got Linear; model and cfg may be swapped$"):
        tt.attach("lora", nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(TargetError, match=r"^model must be a nn\.Module; got 'a\.safetensors'$"):
        tt.load(wrong, wrong)
