"""Round trips with LyCORIS' own code: each library loads the other's files to the same updates."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import tnadapt as tna
from tnadapt import Config

from .conversions import (
    CONVS,
    EXPORTED,
    SHAPES,
    TOLERANCE,
    assert_same_updates,
    converted,
    error,
    fill,
    made,
    model,
    updates,
)

torch = pytest.importorskip("torch")
pytest.importorskip("lycoris")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lycoris import LycorisNetwork, create_lycoris, create_lycoris_from_weights


def theirs(
    path: Path, shapes: dict[str, tuple[int, ...]], algo: str, dim: int, alpha: float, **more: Any
) -> dict[str, Any]:
    """An adapter that LyCORIS makes, fills and saves; its updates."""
    LycorisNetwork.apply_preset({"target_module": ["Linear", "Conv1d", "Conv2d"], "target_name": []})
    if "rs_lora" in more:  # create_lycoris ignores it; kohya's entry point passes it on like this
        network = LycorisNetwork(
            model(shapes), 1.0, dim, dim, alpha, alpha, network_module=algo, warn_on_unmatched=False, **more
        )
        assert network.loras[0].scale == pytest.approx(alpha / dim**0.5)
    else:
        network = create_lycoris(model(shapes), 1.0, dim, alpha, algo=algo, **more)
    fill(network.parameters(), 1)
    network.apply_to()  # before that it has no modules to save
    found = weights(network, shapes)
    network.save_weights(str(path), torch.float32, {})
    return found


def weights(network: Any, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Path -> update, as the forward pass makes it."""
    names = {f"lycoris_{path.replace('.', '_')}": path for path in shapes}
    found = {}
    for module in network.loras:
        shape = shapes[names[module.lora_name]]
        if type(module).__name__ in ("LoConModule", "FullModule"):
            delta = module.get_diff_weight(shape=shape)[0]
        else:
            delta = module.get_weight(shape)  # get_diff_weight scales a second time
        found[names[module.lora_name]] = delta.detach()
    return found


def check_loaded(path: Path, expected: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """LyCORIS' loader: its update of every weight, and its outputs."""
    network, _ = create_lycoris_from_weights(1.0, str(path), model(shapes))
    assert_same_updates(weights(network, shapes), expected)
    applied, base = model(shapes), model(shapes)
    network, _ = create_lycoris_from_weights(1.0, str(path), applied)
    network.eval()
    network.apply_to()
    generator = torch.Generator().manual_seed(3)
    for name, delta in expected.items():
        size = shapes[name]
        x = torch.randn((5, size[1], *(5 for _ in size[2:])), generator=generator)
        plain = base.get_submodule(name).double()
        with torch.no_grad():
            plain.weight += torch.as_tensor(np.asarray(delta, np.float64))
            assert error(applied.get_submodule(name)(x), plain(x.double())) <= TOLERANCE, name


OURS: dict[str, tuple[Config, str]] = {
    **EXPORTED,
    "dense": (tna.presets.dense(), "full"),
    "superlora": (tna.presets.superlora(2, projection="nonlinear", ratio=0.5), "full"),
}


@pytest.mark.parametrize(
    ("name", "shapes"),
    [(name, SHAPES) for name in OURS] + [(name, CONVS) for name in ("lora", "lora to lokr", "lora to loha", "dense")],
)
def test_what_we_write_gives_our_updates(name: str, shapes: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    config, method = OURS[name]
    file = made(config, shapes)
    expected = updates(file)
    if config.projection == "nonlinear":
        expected = {t.module: d for t, d in zip(file.targets, file.deltas(), strict=True)}
    found = tna.convert(file, tmp_path / "theirs.safetensors", to=f"lycoris-{method}")
    assert found.exact
    assert found.error <= TOLERANCE
    check_loaded(tmp_path / "theirs.safetensors", expected, shapes)
    again = converted(tmp_path / "theirs.safetensors")  # by the names in its record
    assert_same_updates(again, expected)
    assert {target.module: target.stored for target in again.targets} == shapes


PLAIN: dict[str, Any] = {
    "shape": (8, 6), "kernel": (3, 3), "rank": 3, "alpha": 3.0, "kind": "lora", "both": False, "factor": -1,
    "tucker": False, "unbalanced": False, "rank_stabilized": False,
}  # fmt: skip
SIDES = st.tuples(st.integers(1, 6), st.integers(1, 6)).map(lambda pair: pair[0] * pair[1])


@pytest.mark.law("foreign-files")
@given(
    shape=st.tuples(SIDES, SIDES), kernel=st.sampled_from([(), (), (1, 1), (3, 2), (2,)]), rank=st.integers(1, 6),
    alpha=st.sampled_from([0.0, 0.5, 1.0, 3.0]), kind=st.sampled_from(["lora", "lokr", "loha", "full"]),
    both=st.booleans(), factor=st.sampled_from([-1, 1, 2, 3, 4]), tucker=st.booleans(), unbalanced=st.booleans(),
    rank_stabilized=st.booleans(),
)  # fmt: skip
@example(**{**PLAIN, "tucker": True})
@example(**{**PLAIN, "tucker": True, "kind": "loha", "rank": 2})
@example(**{**PLAIN, "tucker": True, "kind": "lokr", "rank": 1})
@example(**{**PLAIN, "shape": (12, 18), "kernel": (), "rank_stabilized": True})
@example(**{**PLAIN, "kind": "lokr", "factor": 2, "unbalanced": True, "rank": 64})  # of full matrices
def test_any_adapter_of_lycoris_is_read_and_loaded_or_refused(
    shape: tuple[int, int], kernel: tuple[int, ...], rank: int, alpha: float, kind: str, both: bool, factor: int,
    tucker: bool, unbalanced: bool, rank_stabilized: bool, tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    tmp_path = tmp_path_factory.mktemp("lycoris")
    shapes = {"block.0.w": (*shape, *kernel)}
    more: dict[str, Any] = {"rs_lora": True, "use_tucker": tucker}
    if kind == "full":
        more = {}
    elif kind != "lora" or not rank_stabilized:
        more = {
            "use_tucker": tucker, "decompose_both": both, "factor": factor, "unbalanced_factorization": unbalanced,
        }  # fmt: skip
    expected = theirs(tmp_path / "theirs.safetensors", shapes, kind, rank, alpha, **more)
    found = tna.convert(tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors", base=shapes)
    assert found.exact
    assert error(updates(tna.load(tmp_path / "ours.safetensors"))["block.0.w"], expected["block.0.w"]) <= TOLERANCE
    again = tmp_path / "again.safetensors"
    try:
        assert tna.convert(tmp_path / "theirs.safetensors", again, to=f"lycoris-{kind}", base=shapes).exact
    except tna.ConfigError:
        assert kind == "lokr"  # of sizes that its loader does not arrive at
        return
    check_loaded(again, expected, shapes)


P = tna.presets


@pytest.mark.parametrize(
    ("preset", "algo", "settings"),
    [
        (P.lora(2, alpha=1), "lora", {}),
        (P.loha(2, alpha=1), "loha", {}),
        (P.lokr(1, alpha=3), "lokr", {"dim": 1, "alpha": 3}),
        (P.lokr(2, alpha=1, split_size=2), "lokr", {"factor": 2}),
        (P.lokr(2, alpha=1, split_size=(3, 2)), "lokr", {"factor": 8}),  # beyond the roots
        (P.lokr(1, alpha=3, leading="same"), "lokr", {"dim": 1, "alpha": 3, "decompose_both": True}),
        (P.krona(), "lokr", {"full_matrix": True}),
        (P.krona(split_size=2), "lokr", {"dim": 100_000, "factor": 2}),
        (P.krona(split_size=(6, 4)), "lokr", {"full_matrix": True, "unbalanced_factorization": True}),
        (P.dense(), "full", {}),
    ],
)
def test_the_settings_of_lycoris_in_the_reference_are_these_presets(
    preset: Config, algo: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """Its arrays have the shapes of the preset's, and give the same updates in the preset's network."""
    shapes = {"to_q": (24, 16)}
    theirs(tmp_path / "theirs.safetensors", shapes, algo, **{"dim": 2, "alpha": 1, **settings})
    found = tna.convert(tmp_path / "theirs.safetensors", base=shapes)
    assert found.exact
    plan = tna.UpdatePlan(preset.replace(rate="sgd"), list(shapes.values()))
    np.testing.assert_array_equal(plan.deltas(found.file.arrays), found.file.deltas())


def test_a_file_of_dylora_is_lora(tmp_path: Path) -> None:
    network = create_lycoris(model({"to_q": (24, 16)}), 1.0, 2, 1, algo="dylora", block_size=1)
    network.apply_to()
    fill(network.parameters(), 1)
    network.save_weights(str(tmp_path / "theirs.safetensors"), torch.float32, {})
    found = tna.convert(tmp_path / "theirs.safetensors", base={"to_q": (24, 16)})
    assert found.exact
    assert found.file.config == P.lora(2, alpha=1, rate="sgd")
    of_model = tna.convert(tmp_path / "theirs.safetensors", base=model({"to_q": (24, 16)}))
    assert of_model.file.targets == found.file.targets
