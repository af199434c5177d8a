"""RELIABILITY's laws 14 and 17 to 19 of adapters on models: round trips through files, and rejected files."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file
from torch import nn

import tnadapt as tna
import tnadapt.torch as tt
from tests.support.array_presets import P

from .loops import same
from .small import WIDTH, batch, small, stir


def trained(config: tna.Config | None = None, **settings: object) -> tuple[nn.Module, tt.Adapter]:
    model = small()
    adapter = tt.attach(model, config, **settings)
    stir(adapter)
    return model, adapter


def run(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(batch())


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "config",
    [
        P.lora(2), P.lokr(2), P.superlora(3, groups=2, projection="linear_v2", ratio=0.3), P.dora(2),
        P.lora(2, sources={"factor1": tna.sources.Seeded("signs")}),  # frozen numbers that all dtypes have
    ],
    ids=["lora", "lokr", "superlora", "dora", "signs"],
)  # fmt: skip
def test_arrays_in_half_precision_are_float32_once_loaded(
    config: tna.Config, dtype: torch.dtype, tmp_path: Path
) -> None:
    """As in PEFT, which stores adapters in half precision and trains them in float32."""
    path = tmp_path / "a.safetensors"
    _, adapter = trained(config, dtype=dtype)
    adapter.save(path)
    stored = tna.load(path)
    fresh = small()
    loaded = tt.load(fresh, path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    for name, array in loaded.arrays().items():
        assert np.array_equal(array.detach().numpy(), stored.arrays[name].astype("f4"))
    if config.apply == "add":
        wide = {name: array.astype("f8") for name, array in stored.arrays.items()}
        for delta, expected in zip(loaded.deltas(), stored.plan.deltas(wide, stored.dtype), strict=True):
            np.testing.assert_allclose(delta.detach(), expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    # The numbers are the same from then on; saved, they are float32.
    loaded.save(tmp_path / "b.safetensors")
    again = tna.load(tmp_path / "b.safetensors")
    assert again.dtype == "float32"
    assert all(np.array_equal(again.arrays[name], array.astype("f4")) for name, array in stored.arrays.items())
    loaded.detach()
    loaded = tt.load(fresh, path, dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype}


@pytest.mark.parametrize("dtype", ["half", torch.int8, 32])
def test_dtypes_that_no_adapter_has(dtype: Any, tmp_path: Path) -> None:
    says = r"dtype must be one of torch\.float32, torch\.float64, torch\.bfloat16, torch\.float16; got "
    trained()[1].save(tmp_path / "a.safetensors")
    for call in (lambda: tt.load(small(), tmp_path / "a.safetensors", dtype=dtype), lambda: trained(dtype=dtype)):
        with pytest.raises(tna.BackendError, match=says):
            call()


@pytest.mark.law("file-round-trip")
@pytest.mark.parametrize(
    ("config", "settings"),
    [
        *((None, {"dtype": dtype}) for dtype in (torch.bfloat16, torch.float16, torch.float64)),
        # In half precision, updates that depend on it stay in it: normal numbers, relative to a start, a start.
        (P.vera(2), {"dtype": torch.bfloat16}),
        (P.superlora(3, groups=2, projection="nonlinear", ratio=0.3), {"dtype": torch.bfloat16}),
        (P.lora(2, start="random"), {"dtype": torch.bfloat16}),
        (P.lora(2), {"targets": ["blocks.1.q_proj"], "activation": "tanh"}),
    ],
)
def test_what_an_adapter_is_comes_back(config: tna.Config | None, settings: dict[str, Any], tmp_path: Path) -> None:
    model, adapter = trained(config, **settings)
    adapter.save(tmp_path / "a.safetensors")
    dtype = settings.get("dtype", torch.float32)
    for asked in (dtype, str(dtype).removeprefix("torch."), None if config else dtype):
        fresh = small()
        loaded = tt.load(fresh, tmp_path / "a.safetensors", dtype=asked)
        assert {p.dtype for p in loaded.parameters()} == {dtype}
        assert loaded.activation == adapter.activation
        assert torch.equal(run(fresh), run(model))
        loaded.save(tmp_path / "again.safetensors")
        assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_what_was_kept_trainable_is_saved(tmp_path: Path) -> None:
    def made(classes: int = 3) -> nn.Module:
        """A model whose head has running statistics."""
        model = small()
        torch.manual_seed(0)
        model.head = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, classes))
        return model.eval()

    model = made()
    adapter = tt.attach(model, keep_trainable="head")
    model.train()(batch(size=8))
    model.eval()
    with torch.no_grad():
        model.head[1].weight.add_(1.0)
    adapter.save(tmp_path / "a.safetensors")
    fresh = made()
    loaded = tt.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(run(fresh), run(model))
    assert fresh.head[1].weight.requires_grad
    assert set(loaded.kept) == {f"head.{name}" for name in model.head.state_dict()}
    other = made()
    other.top, other.head = other.head, nn.Identity()
    for model, why in (
        (made(5), r"it keeps 'head\.1\.bias' of shape \(3,\), and this model's is \(5,\)"),
        (other, r"it keeps 'head\.0\.num_batches_tracked', which this Small does not have: build the model with"),
    ):
        before = state(model)
        with pytest.raises(tna.FileError, match=why):
            tt.load(model, tmp_path / "a.safetensors", check_base=False)
        assert same(state(model), before)
        assert not tt.adapters(model)


def test_a_load_that_fails_late_gives_the_kept_parameters_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapter = trained(None, keep_trainable="head")
    with torch.no_grad():
        model.head.weight.add_(1.0)
    adapter.save(tmp_path / "a.safetensors")
    fresh = small()
    before = state(fresh)

    def interrupt(*_: object) -> None:
        assert not torch.equal(fresh.head.weight, before["head.weight"])  # it was written to by now
        raise KeyboardInterrupt

    monkeypatch.setattr(tt._adapter_loading, "keep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tt.load(fresh, tmp_path / "a.safetensors")
    assert same(state(fresh), before)
    assert tt.adapters(fresh) == {}


# -- 17: other bases -------------------------------------------------------------------------------------------


@pytest.mark.law("wrong-base", "base-dtype")
def test_another_base_of_the_same_shapes_is_refused_and_the_same_in_another_precision_is_not(tmp_path: Path) -> None:
    model, adapter = trained()
    adapter.save(tmp_path / "a.safetensors")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        half, other = small().to(dtype), small(seed=7).to(dtype)
        tt.load(half, tmp_path / "a.safetensors")
        with torch.no_grad():
            assert (half(batch().to(dtype)).float() - run(model)).abs().max() < 0.05
        before = state(other)
        text = "it was trained on another base model" if dtype is torch.float32 else "their sketches differ"
        with pytest.raises(tna.FileError, match=rf"a\.safetensors: .*{text}.*check_base=False"):
            tt.load(other, tmp_path / "a.safetensors")
        assert same(state(other), before)
        assert all(p.requires_grad for p in other.parameters())
        tt.load(other, tmp_path / "a.safetensors", check_base=False)


@pytest.mark.law("renamed-modules")
def test_renamed_modules_are_matched_by_role_and_shape(tmp_path: Path) -> None:
    """The same model after a release that renamed modules."""
    model, adapter = trained(P.superlora(3, groups="layer"))
    adapter.save(tmp_path / "a.safetensors")
    renamed = nn.Sequential(OrderedDict((f"layer{number}", block) for number, block in enumerate(small().blocks)))
    tt.load(renamed, tmp_path / "a.safetensors")
    assert torch.equal(run(renamed), run(nn.Sequential(*model.blocks)))


@pytest.mark.law("wrong-base")
def test_a_model_with_other_weights_is_refused_whole(tmp_path: Path) -> None:
    _, adapter = trained()
    adapter.save(tmp_path / "a.safetensors")
    shorter = small()
    shorter.blocks = shorter.blocks[:4]
    before = state(shorter)
    with pytest.raises(
        tna.FileError, match=r"does not have its weights .no module of Small matches 'blocks.4.self_attn'"
    ):
        tt.load(shorter, tmp_path / "a.safetensors")
    assert same(state(shorter), before)
    assert all("forward" not in module.__dict__ for module in shorter.modules())
    # A role that no model tells by names is not looked for.
    tt.attach(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), targets=["0"]).save(tmp_path / "b.safetensors")
    with pytest.raises(tna.FileError, match="this ModuleDict does not have its weights: no module of"):
        tt.load(nn.ModuleDict({"first": nn.Linear(4, 4)}), tmp_path / "b.safetensors")


# -- 18, 19 and the rest -------------------------------------------------------------------------------------------


@pytest.mark.law("pickle-refused")
def test_a_pickle_and_other_peoples_files_are_refused(tmp_path: Path) -> None:
    model, adapter = trained()
    torch.save(model.state_dict(), tmp_path / "a.pt")
    save_file({"x": torch.zeros(2)}, tmp_path / "p.safetensors", metadata={"format": "pt"})
    for name, why in (("a.pt", "pickle"), ("none.safetensors", r"none\.safetensors"), ("p.safetensors", "tnadapt")):
        for read in (lambda path: tt.load(small(), path), adapter.swap):
            with pytest.raises(tna.FileError, match=why):
                read(tmp_path / name)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").touch()
    with pytest.raises(tna.FileError, match="base: is the folder of a model and not an adapter; give the path"):
        tt.load(small(), tmp_path / "base")
    with pytest.raises(tna.FileError, match=r"or save it first with tnadapt\.save\(path, file\)"):
        tt.load(small(), adapter.to_file())
    for members in ("u3", 3):
        with pytest.raises(tna.ConfigError, match=f"; got {members!r}; for one, member={members!r}$"):
            tt.load(small(), tmp_path, members=members)
    with pytest.raises(
        TypeError, match=r"^load\(\) got an unexpected keyword argument 'member': did you mean 'members'"
    ):
        tna.load(tmp_path, member=1)


def test_folders(tmp_path: Path) -> None:
    model, adapter = trained()
    adapter.save_pretrained(tmp_path / "new" / "folder")
    fresh = small()
    tt.from_pretrained(fresh, tmp_path / "new" / "folder", "mine")
    assert list(tt.adapters(fresh)) == ["mine"]
    assert torch.equal(run(fresh), run(model))
    (tmp_path / "file").write_text("")
    with pytest.raises(tna.FileError, match="cannot create this folder"):
        adapter.save_pretrained(tmp_path / "file" / "sub")
    with pytest.raises(tna.FileError):
        adapter.save(tmp_path / "no" / "such" / "folder.safetensors")


def test_a_later_save_has_the_base_as_it_is_then(tmp_path: Path) -> None:
    model, adapter = trained()
    adapter.save(tmp_path / "a.safetensors")
    adapter.merge()
    adapter.save(tmp_path / "b.safetensors")  # of what it was trained on, not of what it is merged into
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert tna.info(tmp_path / "a.safetensors")["model"] == "Small"
    adapter.unmerge()
    # Also after a write that no version counter shows.
    first = adapter.targets[0]
    getattr(model.get_submodule(first.module), first.parameter).data.add_(0.5)
    adapter.save(tmp_path / "c.safetensors")
    with pytest.raises(tna.FileError, match="another base model"):
        tt.load(small(), tmp_path / "c.safetensors")
    tt.load(model, tmp_path / "c.safetensors", name="again")


def test_swapping_takes_what_fits(tmp_path: Path) -> None:
    model, adapter = trained()
    on = run(model)
    adapter.save(tmp_path / "a.safetensors")
    stir(adapter, seed=5)
    adapter.swap(tmp_path / "a.safetensors")
    assert torch.equal(run(model), on)
    _, other = trained(P.superlora(3))
    other.save(tmp_path / "b.safetensors")
    with pytest.raises(tna.FileError) as caught:
        adapter.swap(tmp_path / "b.safetensors")
    assert str(caught.value) == (
        f"{tmp_path / 'b.safetensors'}: its config differs from that of adapter 'default' (rank: 3 in the file, 8 "
        "here): attach the adapter as it was for this file, or load the file under another name"
    )
    assert torch.equal(run(model), on)
    for targets, text in (("q", "5 weights in the file, 10 here; not in"), ("qkv", "15 weights in the file, 10 here;")):
        tt.attach(small(), targets=targets).save(tmp_path / "d.safetensors")
        with pytest.raises(
            tna.FileError, match=rf"its list of targets differs from that of adapter 'default' \({text}"
        ):
            adapter.swap(tmp_path / "d.safetensors")
    foreign = tt.attach(small(seed=7))
    foreign.save(tmp_path / "c.safetensors")
    with pytest.raises(tna.FileError, match="another base model"):
        adapter.swap(tmp_path / "c.safetensors")


def test_what_cannot_be_saved_or_loaded_now(tmp_path: Path) -> None:
    model, adapter = trained(name="a")
    other = tt.attach(model, name="b")
    adapter.save(tmp_path / "a.safetensors")
    stir(other)
    other.merge()
    with pytest.raises(tna.TargetError, match="'b' is merged into the base"):
        adapter.save(tmp_path / "b.safetensors")
    with pytest.raises(tna.FileError, match="'b' is merged into the base"):
        tt.load(model, tmp_path / "a.safetensors", "c")
    assert not (tmp_path / "b.safetensors").exists()
    other.unmerge()
    with pytest.raises(tna.TargetError, match="already has an adapter 'a'"):
        tt.load(model, tmp_path / "a.safetensors", "a")
    adapter.detach()
    with pytest.raises(tna.TargetError, match="no longer attached"):
        adapter.save(tmp_path / "b.safetensors")
    with torch.device("meta"):
        meta = tt.attach(small())
    with pytest.raises(tna.TargetError, match="meta device"):
        meta.save(tmp_path / "b.safetensors")
