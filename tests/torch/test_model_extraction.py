"""Extraction of an adapter from a fully fine-tuned model in memory."""

from __future__ import annotations

import copy
import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file
from torch import nn

import tnadapt as tna
import tnadapt.torch
from tests.support.depth import in_depth
from tnadapt import presets
from tnadapt.errors import ConfigError, ShapeError, TargetError
from tnadapt.testing.verification import examples

from .architectures import build, output
from .internals import STARTS


def _tuned(model: nn.Module, rank: int = 2, targets: Any = "qv", size: float = 0.3) -> nn.Module:
    """Return a copy whose targets differ by matrices of low rank."""
    tuned = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for target in tnadapt.torch.find_targets(tuned, targets):
            weight = tuned.get_submodule(target.module)._parameters[target.parameter]
            rows, cols = target.shape
            update = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, cols, generator=generator)
            target.block(weight).add_(target.like_block(size * update / cols).to(weight))
    return tuned


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "gpt_neox", "timm_vit", "torch_encoder", "paper_unet", "t5"])
def test_the_adapted_base_is_the_tuned_model(name: str) -> None:
    model, inputs = build(name)
    tuned = _tuned(model)
    adapter = tnadapt.torch.extract(model, tuned, presets.lora(2))
    assert adapter.report.error < 1e-5
    assert adapter.report.certified
    with torch.no_grad():
        torch.testing.assert_close(output(model, inputs), output(tuned, inputs), rtol=1e-4, atol=1e-4)
    output(model, inputs).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in adapter.parameters())
    # The smallest rank within an error of a state dict.
    model, _ = build(name)
    searched = tnadapt.torch.extract(model, tuned.state_dict(), presets.lora(), max_error=1e-3)
    assert searched.config.rank == 2


@pytest.mark.parametrize(
    "config",
    [
        presets.dense(), presets.superlora(4), presets.lokr(4), presets.fastfood(0.5),
        presets.superlora(4, projection="linear", ratio=0.5), presets.superlora(4, projection="nonlinear"),
        presets.lorta(3),
    ],
)  # fmt: skip
def test_the_report_is_of_the_updates_that_are_attached_and_those_from_disk(config: tna.Config, tmp_path: Path) -> None:
    model, _ = build("bert")
    tuned = _tuned(model, rank=8)
    for name, one in (("base", model), ("tuned", tuned)):
        save_file({key: value.contiguous() for key, value in one.state_dict().items()}, tmp_path / name)
    stored = tna.extract(tmp_path / "base", tmp_path / "tuned", config, max_iterations=20)
    adapter = tnadapt.torch.extract(model, tuned, config, max_iterations=20)
    assert [t.name for t in stored.file.targets] == [t.name for t in adapter.targets]
    total = wrong = 0.0
    for target, delta, from_disk in zip(adapter.targets, adapter.deltas(), stored.file.deltas(), strict=True):
        before, after = (m.get_submodule(target.module).weight.detach().double() for m in (model, tuned))
        total += float(((after - before) ** 2).sum())
        wrong += float(((after - before - delta.detach().double()) ** 2).sum())
        if config.projection == "identity":  # fits that are done after so few iterations
            torch.testing.assert_close(torch.from_numpy(from_disk), delta.detach(), rtol=1e-3, atol=1e-5)
    for report in (adapter.report, stored.report):
        assert report.error == pytest.approx((wrong / total) ** 0.5, rel=1e-3, abs=1e-6)
    # And the file belongs to the base that the fingerprint was taken of.
    tna.save(tmp_path / "adapter.safetensors", stored.file)
    adapter.detach()
    tnadapt.torch.load(model, tmp_path / "adapter.safetensors")


def test_a_head_is_kept_and_what_is_not_is_warned_of() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, batch_first=True)
            self.head = nn.Linear(16, 3)

    model = Classifier()
    tuned = _tuned(model)
    with torch.no_grad():
        tuned.head.weight.add_(1.0)
        tuned.encoder.self_attn.in_proj_weight[20].add_(1.0)  # a row of k
    with pytest.warns(UserWarning, match=r"differ in encoder\.self_attn\.in_proj_weight, head\.weight, which") as told:
        tnadapt.torch.extract(model, tuned, presets.lora(2)).detach()
    assert told[0].filename == __file__
    more = {**tuned.state_dict(), "pooler.weight": torch.zeros(2)}
    with pytest.warns(UserWarning, match=r"pooler\.weight"):
        tnadapt.torch.extract(model, more, presets.lora(2)).detach()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        adapter = tnadapt.torch.extract(model, tuned, presets.lora(2), keep_trainable="head")
    assert ["head.weight" not in str(one.message) for one in heard] == [True]
    assert torch.equal(model.head.weight, tuned.head.weight)
    assert adapter.kept == ("head.weight", "head.bias")
    adapter.merge()
    with pytest.raises(TargetError, match="is merged into the base"):
        tnadapt.torch.extract(model, tuned, name="other")


@pytest.mark.parametrize(
    ("kind", "other"),
    [
        (torch.float64, torch.float32), (torch.float32, torch.float64), (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    ],
)  # fmt: skip
def test_the_dtype_is_that_of_the_base(kind: Any, other: Any) -> None:
    model = nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, batch_first=True).to(kind)
    tuned = _tuned(model, size=8.0)
    # By default it is the config that attach takes.
    default = tnadapt.torch.extract(model, tuned)
    assert default.config == presets.superlora(rank=8) == tnadapt.torch.attach(tuned).config
    default.detach()
    tnadapt.torch.adapters(tuned)["default"].detach()
    adapter = tnadapt.torch.extract(model, tuned.to(other), presets.dense())
    assert adapter.report.error < 1e-6
    assert {p.dtype for p in adapter.parameters()} == {kind if kind is torch.float64 else torch.float32}


@pytest.mark.parametrize(
    ("count", "said"),
    [(1, "0.weight"), (4, "0.*3.weight"), (5, "0.*3.weight and 1 more"), (7, "0.*3.weight and 3 more")],
)
def test_how_many_other_weights_differ(count: int, said: str) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(8)))
    tuned = copy.deepcopy(model)
    for layer in tuned[:count]:
        layer.weight.detach().add_(1.0)
    with pytest.warns(UserWarning, match=rf"the two models differ in {said}, which the adapter does not hold"):
        tnadapt.torch.extract(model, tuned, presets.lora(1), ["7"])


class _Model(nn.Module):
    def __init__(self, size: int = 4, head: int = 3) -> None:
        super().__init__()
        self.q_proj, self.head = nn.Linear(size, 4), nn.Linear(4, head)


def _changed(**changes: Any) -> nn.Module:
    model = _Model()
    for name, weight in changes.items():
        getattr(model, name).weight = nn.Parameter(weight, requires_grad=False)
    return model


def _headless(*missing: str) -> dict[str, Any]:
    return {name: value for name, value in _Model().state_dict().items() if name not in missing}


_INTEGERS, _NAN = torch.ones(4, 4, dtype=torch.int8), torch.full((4, 4), float("nan"))
_KEPT = {"keep_trainable": "head"}


@pytest.mark.parametrize(
    ("base", "tuned", "settings", "error", "message"),
    [
        ("model", _Model(), {}, TargetError, "extract needs a torch module as base; got str"),
        (_Model().to("meta"), _Model(), {}, TargetError, "q_proj.weight is on the meta device and has no values"),
        (
            _changed(q_proj=_INTEGERS), _Model(), {},
            TargetError, "q_proj.weight is quantized in the base, so its change cannot be",
        ),
        (
            _Model(), _Model(5), {},
            TargetError, r"is \(4, 5\), torch.float32 in the tuned model and \(4, 4\) in the base",
        ),
        (
            _Model(), _changed(q_proj=_INTEGERS), {},
            TargetError, r"is \(4, 4\), torch.int8 in the tuned model and \(4, 4\) in the base",
        ),
        (_Model(), nn.Linear(4, 4), {}, TargetError, "the tuned model has no"),
        (_Model(), "a path", {}, TargetError, "must be a torch module or a state dict"),
        (_Model(), _changed(q_proj=_NAN), {}, ShapeError, "NaN"),
        (
            _Model(), _Model(head=5), _KEPT, ShapeError,
            r"names head\.weight; it is \(5, 4\) in the tuned model, \(3, 4\) in the base.*build the base with the",
        ),
        (_Model(), _headless("head.bias"), _KEPT, ShapeError, "names head.bias; it is missing in the tuned model"),
        (_Model(), _headless("head.bias", "head.weight"), _KEPT, ShapeError, r"missing in the tuned model, \(3"),
        (_Model(), _Model(), {"cfg": presets.lora(), "max_error": 1e-3, "max_rank": 1}, ConfigError,
         "no rank up to 1 "),
        # Before anything is fitted.
        (_Model(), _Model(), {"keep_trainable": "nothing", "progress": pytest.fail}, TargetError, "nothing"),
        (_Model(), _Model(), {"name": "not\na name", "progress": pytest.fail}, TargetError, "name"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_leaves_the_base_as_it_was(
    base: Any, tuned: Any, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    before = {} if base == "model" else {name: value.clone() for name, value in base.state_dict().items()}
    with pytest.raises(error, match=message):
        tnadapt.torch.extract(base, tuned, **{"cfg": presets.lora(1), "targets": ["q_proj"], **settings})
    if base != "model":
        assert not tnadapt.torch.adapters(base)
        torch.testing.assert_close(base.state_dict(), before, rtol=0, atol=0)


class _Attentions(nn.Module):
    """Four weights, in another order than that of the alphabet."""

    def __init__(self) -> None:
        super().__init__()
        names = ("query", "key")
        self.layers = nn.ModuleList(nn.ModuleDict({name: nn.Linear(8, 12) for name in names}) for _ in range(2))


def _of_base() -> dict[str, tna.Config]:
    """Return the configs whose frozen arrays or starts are computed from the base weights."""
    every = {name: config for name, (config, shapes) in examples().items() if shapes == [(12, 8)] * 4}
    every |= {name: presets.lora(3, start=name) for name in STARTS if not STARTS[name].brought}
    plans = {name: tna.UpdatePlan(config, [(12, 8)] * 4, [*"aabb"], [*"qkqk"]) for name, config in every.items()}
    return {name: every[name] for name, plan in plans.items() if plan.needs_base and plan.applying.additive}


def _tuned_by(
    config: tna.Config, size: float, seed: int, dtype: Any = torch.float32
) -> tuple[nn.Module, tnadapt.torch.Adapter, dict[str, Any]]:
    """Return a base, an adapter with random arrays on a copy of it, and the state dict after merging the adapter."""
    torch.manual_seed(seed)
    base = _Attentions().to(dtype)
    tuned = copy.deepcopy(base)
    adapter = tnadapt.torch.attach(tuned, config, ["query", "key"], dtype=dtype)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    adapter.merge()
    state = {key: value.clone() for key, value in tuned.state_dict().items() if key in base.state_dict()}
    return base, adapter, state


@pytest.mark.parametrize("name", _of_base())
def test_an_update_of_the_same_method_is_recovered(name: str, tmp_path: Path) -> None:
    config = _of_base()[name]
    base, adapter, state = _tuned_by(config, 0.1, 3)
    made, targets = [delta.detach() for delta in adapter.deltas()], adapter.targets
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    save_file(state, tmp_path / "tuned.safetensors")
    names = [target.module for target in targets]
    for spelling in (["key", "query"], [*names[::-1], names[0]], r".*\.(key|query)", (*names[2:], *names[:2])):
        found = tnadapt.torch.extract(copy.deepcopy(base), state, config, spelling)
        stored = tna.extract(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", config, spelling)
        # A file has the layers only of configs that need them.
        keys = [[(one.name, one.role, one.rows) for one in every] for every in (targets, found.targets)]
        assert keys[0] == keys[1] == [(one.name, one.role, one.rows) for one in stored.file.targets]
        assert max(found.report.error, stored.report.error) < 1e-5
        tna.save(tmp_path / "stored.safetensors", stored.file)
        again = tnadapt.torch.load(copy.deepcopy(base), tmp_path / "stored.safetensors")
        for ours, theirs in zip([*again.deltas(), *found.deltas()], [*made, *made], strict=True):
            torch.testing.assert_close(ours.detach(), theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))

    # Far from the start, too, but for CRAFT, whose matrices follow from no unfolding.
    far = () if name == "craft" else (0.3, 1.0)
    for size, seed in itertools.product(far, in_depth(range(100), range(4))):
        base, _, state = _tuned_by(config, size, seed)
        assert tnadapt.torch.extract(base, state, config, ["query", "key"]).report.error < 1e-5, (size, seed)
    # In numbers that float32 lacks.
    base, adapter, state = _tuned_by(config, 0.1, 3, torch.float64)
    double = tnadapt.torch.extract(base, state, config, ["query", "key"])
    for ours, theirs in zip(double.deltas(), adapter.deltas(), strict=True):
        tolerance = 1e-9 * float(theirs.detach().abs().max())
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=tolerance)
