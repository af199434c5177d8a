"""``tnadapt.info``: descriptions of files from the files alone, and whether an adapter exports as LoRA."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import tnadapt as tna
from tests.conftest import peak_of
from tests.support import checkpoint_files as cp
from tests.support.in_process import main, run_here
from tnadapt.targets.prefixes import paired

from .internals import find_stored

P, T = tna.presets, tna.Target


def test_an_adapter(tmp_path: Path) -> None:
    targets = [T(f"h.{n}.attn", (12, 4), role, rows=tna.Rows(start, 4, 12)) for n in (0, 1, 2, 5) for role, start in
               (("q", 0), ("v", 8))]  # fmt: skip
    targets.append(T("h.5.mlp.out", (4, 7), "linear", transposed=True))
    tensors = cp.base(targets, "bfloat16")
    config = P.superlora(2, groups=3, projection="nonlinear", ratio=0.5, seed=7)
    file = cp.adapter(config, targets, tensors, "bfloat16", kept={"head.weight": np.ones((2, 4), np.float32)})
    file = dataclasses.replace(file, model="Tiny")
    tna.save(tmp_path / "adapter.safetensors", file)
    for path in (tmp_path / "adapter.safetensors", tmp_path):
        found = tna.info(path)
        assert json.loads(json.dumps(found)) == found
        assert (found["kind"], found["version"], found["model"], found["dtype"]) == ("adapter", 1, "Tiny", "bfloat16")
        assert tna.Config.from_dict(found["config"]) == config
        assert found["parameters"] == file.num_parameters == file.plan.num_parameters
        assert found["updated"] == file.plan.size
        assert (found["groups"], found["arrays"]) == (3, len(file.arrays))
        assert found["bytes"] == (tmp_path / "adapter.safetensors").stat().st_size
        assert found["base"]["sha256"] == file.base.sha256
        assert (found["draws"], found["draws_here"]) == (file.draws, True)
        assert found["kept"] == [{"name": "head.weight", "shape": [2, 4], "dtype": "float32"}]
        assert "every" not in found
    assert [(one["count"], one["role"], one["name"]) for one in found["targets"]] == [
        (4, "q", "h.{0-2,5}.attn.weight"), (4, "v", "h.{0-2,5}.attn.weight"), (1, "linear", "h.5.mlp.out.weight"),
    ]  # fmt: skip
    assert found["targets"][0]["rows"] == [0, 4, 12, 1]
    assert found["targets"][2]["transposed"] is True
    assert [one["name"] for one in tna.info(tmp_path, every=True)["every"]] == [target.name for target in targets]


def test_given_arrays_are_counted(tmp_path: Path) -> None:
    config = tna.presets.lora(2, before="tied", parameters=3)
    given = {"theta.index": np.arange(40) % 3}
    file = tna.AdapterFile(config, [tna.Target("a", (12, 8))], {"theta": np.ones(3, np.float32)}, given=given)
    tna.save(tmp_path / "a.safetensors", file)
    assert tna.info(tmp_path / "a.safetensors")["given"] == {"arrays": 1, "elements": 40}


def test_other_draws_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tna.save(tmp_path / "a.safetensors", cp.adapter(P.fastfood(0.5), [T("a", (4, 4))]))
    monkeypatch.setattr("tnadapt.checkpoints.adapter_file.AdapterFile.draws_without", lambda *_: "0" * 64)
    assert tna.info(tmp_path / "a.safetensors")["draws_here"] is False


@pytest.mark.parametrize("shards", [1, 3])
def test_a_checkpoint(shards: int, tmp_path: Path) -> None:
    targets = [T(f"layers.{n}.self_attn.{role}_proj", (8, 8), role) for n in range(12) for role in "qkv"]
    tensors = cp.base(targets, "float16")
    folder = cp.write(tmp_path / "base", tensors, shards)
    (folder / "config.json").write_text('{"model_type": "llama", "architectures": ["Llama"]}')
    found = tna.info(folder)
    assert json.loads(json.dumps(found)) == found
    assert (found["kind"], found["model_type"], found["architectures"]) == ("checkpoint", "llama", ["Llama"])
    assert found["tensors"] == len(tensors)
    assert found["bytes"] == sum(array.nbytes for _, array in tensors.values())
    assert [one["bytes"] for one in found["files"]] == [
        path.stat().st_size for path in sorted(folder.glob("*.safetensors"))
    ]
    assert sum(one["tensors"] for one in found["files"]) == len(tensors)
    assert found["dtypes"]["F16"] == {"tensors": 36, "bytes": 36 * 128}
    assert [(one["count"], one["name"]) for one in found["targets"]] == [
        (12, "layers.{0-11}.self_attn.q_proj.weight"), (12, "layers.{0-11}.self_attn.v_proj.weight"),
    ]  # fmt: skip
    assert {one["name"] for one in tna.info(folder, every=True)["every"]} == tensors.keys()


def test_a_checkpoint_of_which_little_is_known(tmp_path: Path) -> None:
    folder = cp.write(tmp_path, {"x": ("F32", np.ones((2, 2), "<f4"))})
    (folder / "config.json").write_text('{"limit": Infinity}')
    found = tna.info(folder)
    assert "not finite" in found["no_config"]
    assert found["targets"] == []
    assert "no tensor of the checkpoint is a target" in found["no_targets"]


def test_an_adapter_of_others_in_several_files_is_told_as_a_whole(tmp_path: Path) -> None:
    several = {f"base_model.model.{name}.lora_A.weight": ("F32", np.ones((2, 2), "<f4")) for name in "abcde"}
    found = tna.info(cp.write(tmp_path, several, shards=2))
    assert found["kind"] == "other adapter"
    assert found["what"].startswith("an adapter of PEFT: 5 tensors such as 'base_model.model.a.lora_A.weight'")
    assert found["bytes"] == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    with pytest.raises(tna.FileError, match=r"tnadapt\.convert \(tnadapt convert\) converts it"):
        tna.load(tmp_path / "model-00001-of-00002.safetensors")


def test_what_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tna.save(path, cp.adapter(P.lora(1), [T("a", (4, 4))]))
    whole = path.read_bytes()
    for content, why in ((whole[:-1], "cut off"), (whole[:-1] + b"x", "SHA-256"), (b"\x80\x02", "pickle")):
        path.write_bytes(content)
        with pytest.raises(tna.FileError, match=rf"a\.safetensors: .*{why}"):
            tna.info(path)
    with pytest.raises(tna.FileError, match="No such file"):
        tna.info(tmp_path / "none")


def test_a_name_of_thousands_of_dots_takes_little_memory(tmp_path: Path) -> None:
    save_file({"a." * 3000 + "q_proj.weight": np.ones((2, 2), np.float32)}, tmp_path / "m.safetensors")
    found = []
    peak = peak_of(lambda: found.append(tna.info(tmp_path / "m.safetensors")))
    assert (found[0]["tensors"], found[0]["targets"]) == (1, [])
    assert peak < 1 << 21


def test_modules_nested_64_deep_are_found() -> None:
    shapes = [{f"{'a.' * depth}{name}_proj.weight": (4, 4) for name in "qkv"} for depth in (63, 64)]
    assert len(find_stored(shapes[0], "qv")) == 2
    with pytest.raises(tna.TargetError, match="no weights of layers at all"):
        find_stored(shapes[1], "qv")


def test_numbers_of_thousands_of_digits_in_names_are_words(tmp_path: Path) -> None:
    long = "9" * 5000
    paths = [f"layers.{part}.attn.q_proj" for part in ("1", "2", long)]
    save_file({f"{path}.weight": np.ones((4, 4), np.float32) for path in paths}, tmp_path / "base.safetensors")
    (found,) = tna.info(tmp_path / "base.safetensors", every=True)["every"][2:]
    assert found["name"] == f"{paths[2]}.weight"
    targets = [T(path, (4, 4), "q") for path in paths]
    file = cp.adapter(P.lora(1), targets)
    tna.save(tmp_path / "adapter.safetensors", file)
    (group,) = tna.info(tmp_path / "adapter.safetensors")["targets"]
    assert (group["count"], group["name"]) == (3, f"layers.{{1-2,{long}}}.attn.q_proj.weight")
    assert [target.module for target in find_stored({f"{path}.weight": (4, 4) for path in paths[::-1]}, paths)] == [
        paths[2], paths[0], paths[1],
    ]  # fmt: skip
    tna.convert(tmp_path / "adapter.safetensors", to="peft-lora")
    tna.merge(tmp_path / "base.safetensors", file, tmp_path / "merged.safetensors")


def test_weights_are_paired_by_numbers_of_thousands_of_digits() -> None:
    parts = ["9" * 5000, "8" * 5000]
    wanted = [T(f"h.{part}.q", (4, 4), "q") for part in parts]
    found = [T(f"layers.{part}.query", (4, 4), "q") for part in reversed(parts)]
    assert paired(wanted, found) == found[::-1]


@pytest.mark.parametrize(
    ("said", "architectures", "kind", "printed"),
    [
        ({"architectures": ["A", "B"], "model_type": "c"}, ["A", "B"], "c", "A, B, c"),
        ({"architectures": [1], "model_type": "c"}, None, "c", "c"),
        ({"architectures": 3, "model_type": "c"}, None, "c", "c"),
        ({"architectures": "abc", "model_type": "c"}, None, "c", "c"),
        ({"architectures": {"a": 1}, "model_type": "c"}, None, "c", "c"),
        ({"architectures": ["A"], "model_type": 5}, ["A"], None, "A"),
        ({"architectures": ["A"], "model_type": ["y"]}, ["A"], None, "A"),
    ],
)
def test_names_of_a_model_are_strings(said: Any, architectures: Any, kind: Any, printed: str, tmp_path: Path) -> None:
    pytest.importorskip("typer")
    save_file({"h.0.q_proj.weight": np.ones((4, 4), np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(said))
    found = tna.info(tmp_path)
    assert (found["architectures"], found["model_type"]) == (architectures, kind)
    assert run_here(main, "info", tmp_path).stdout.splitlines()[1].split(maxsplit=1) == ["model", printed]


def test_sizes_of_thousands_of_digits_in_a_config_are_none(tmp_path: Path) -> None:
    name = "layers.0.linear_attn.in_proj_qkvz.weight"
    save_file({name: np.ones((48, 4), np.float32)}, tmp_path / "model.safetensors")
    config = {"linear_num_key_heads": 2, "linear_key_head_dim": 3, "linear_value_head_dim": 2}
    (tmp_path / "config.json").write_text(json.dumps(config | {"linear_num_value_heads": int("9" * 4000)}))
    why = tna.info(tmp_path)["no_targets"]
    assert "in an unknown layout: config.json lacks num_v_heads. " in why


SHAPES = [(24, 20), (16, 20)] * 2


def adapter(
    config: tna.Config, targets: list[tna.Target] | None = None, activation: str | None = None
) -> tna.AdapterFile:
    targets = targets or [T(f"layers.{i}.{'qv'[i % 2]}_proj", shape, "qv"[i % 2]) for i, shape in enumerate(SHAPES)]
    plan = tna.UpdatePlan(config, [target.shape for target in targets], roles=[target.role for target in targets])
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=shape).astype("f4") for name, shape in plan.param_shapes.items()}
    return tna.AdapterFile(config, targets, arrays, activation=activation)


@pytest.fixture
def export_of(tmp_path: Path) -> Any:
    """What ``tnadapt.info`` says of the export of an adapter."""

    def ask(file: tna.AdapterFile) -> Any:
        tna.save(tmp_path / "adapter.safetensors", file)
        return tna.info(tmp_path / "adapter.safetensors")["export"]

    return ask


EXACTLY = "exports exactly as LoRA of rank"
QKV = [T("layers.0.qkv", (48, 40), role, rows=tna.Rows(start, 16, 48)) for role, start in (("q", 0), ("v", 32))]
IN_PROJ = T("attn", (48, 16), "q", "in_proj_weight", rows=tna.Rows(0, 16, 48))
EXPERT = T("experts", (3, 48, 40), parameter="w", index=1)
CONV = "PEFT, LyCORIS and diffusers only: vLLM and llama.cpp have no LoRA of convolutions, so merge it for them"

#: What info says of an adapter of these weights, and what becomes of its conversion to vLLM.
MERGE_ONLY: list[tuple[tna.AdapterFile, str]] = [
    (adapter(P.dense()), "merge only: its updates may have matrix rank 20"),
    (adapter(P.dora(2)), "merge only: apply='magnitude' does more than add its updates"),
    (adapter(P.hira(2)), "merge only: apply='hadamard' does more than add its updates"),
    (adapter(P.lora(2), [IN_PROJ]), "merge only: attn.in_proj_weight is not the weight of a layer"),
    (adapter(P.lora(2), [EXPERT]), "merge only: experts.w is not the weight of a layer"),
    (adapter(P.lora(2), activation="relu"), "neither LoRA nor merged: an activation acts between its factors"),
]
SERVED: list[tuple[tna.AdapterFile, int, int, str]] = [
    (adapter(P.lora(1)), 1, 1, ""),
    (adapter(P.lora(2)), 2, 8, " (padded to 8 for vLLM)"),
    (adapter(P.lotr(3, groups="role")), 3, 8, " (padded to 8 for vLLM)"),
    (adapter(P.vera(rank=8)), 8, 8, ""),
    (adapter(P.tinylora(13)), 2, 8, " (padded to 8 for vLLM)"),
    (adapter(P.lora(2), QKV), 4, 8, " (padded to 8 for vLLM)"),  # rows of one weight are updated as a whole
    (
        adapter(P.lora(2), [T("model.embed_tokens", (48, 40), "embedding")]), 2, 8,
        " (of rank 8 for vLLM, if it has LoRA of this model's embedding)",
    ),
]  # fmt: skip
NOT_SERVED: list[tuple[tna.Target, str, str]] = [
    *(
        (T("conv", stored, "conv"), CONV, "'conv' is a convolution, and vLLM has no lora of convolutions: m")
        for stored in ((48, 4, 3, 3), (48, 40, 1, 1))
    ),
    (
        T("experts", (3, 48, 40), parameter="up_proj", index=1),
        "PEFT only: that of experts is not written for vLLM and others, so merge it for them",
        r"experts\.up_proj\[1\] cannot be converted to 'vllm-lora': it is one of",
    ),
    (
        T("wte", (48, 40), "embedding"),
        "PEFT only: vLLM has no LoRA of the embedding wte, so merge it for vLLM",
        "'wte' is an embedding, and vLLM has LoRA only of those named embed_tokens",
    ),
]


@pytest.mark.parametrize(("file", "rank", "served", "note"), SERVED)
def test_the_rank_is_that_of_what_convert_writes(
    export_of: Any, file: tna.AdapterFile, rank: int, served: int, note: str
) -> None:
    assert export_of(file) == {"lora_rank": rank, "served_rank": served, "says": f"{EXACTLY} {rank}{note}"}
    if not file.complete:
        rng = np.random.default_rng(1)
        file = file.with_base([rng.normal(size=target.shape).astype("f4") for target in file.targets])
    for to, written_rank in (("peft-lora", rank), ("vllm", served)):
        written = tna.convert(file, to=to)
        assert (written.exact, written.config and written.config["r"]) == (True, written_rank)


@pytest.mark.parametrize(("file", "says"), MERGE_ONLY)
def test_merge_only_says_why(export_of: Any, file: tna.AdapterFile, says: str) -> None:
    assert export_of(file)["says"] == says
    with pytest.raises(tna.ConfigError):
        tna.convert(file, to="vllm")


@pytest.mark.parametrize(("target", "says", "refused"), NOT_SERVED)
def test_what_vllm_does_not_serve(export_of: Any, target: tna.Target, says: str, refused: str) -> None:
    file = adapter(P.lora(2), [target, T("mid_block.attn.to_q", (48, 40), "q")])
    assert export_of(file) == {"lora_rank": 2, "served_rank": None, "says": f"{EXACTLY} 2 ({says})"}
    for to in ("peft-lora", "lycoris", "diffusers", "kohya-lora") if target.role == "conv" else ("peft-lora",):
        assert tna.convert(file, to=to).exact
    with pytest.raises(tna.ConfigError, match=refused):
        tna.convert(file, to="vllm")
    if target.module == "wte":
        for to in ("diffusers", "kohya-lora"):
            with pytest.raises(tna.ConfigError, match=r"'wte' is an embedding, and .* has no lora of such a layer"):
                tna.convert(adapter(P.lora(2), [target]), to=to, part="text_encoder")


def test_vllm_takes_a_short_list_of_ranks(export_of: Any) -> None:
    ranks = [1, 8, 16, 32, 64, 128, 256, 320, 512]
    for rank, served in zip(ranks, [*ranks[1:], None], strict=True):
        for asked, expected in ((rank, rank), (rank + 1, served)):
            assert export_of(adapter(P.lora(asked), [T("a", (1300, 1300))]))["served_rank"] == expected
    says = f"{EXACTLY} 600 (vLLM takes ranks up to 512: merge it)"
    export = export_of(adapter(P.lora(600), [T("a", (1300, 1300))]))
    assert export == {"lora_rank": 600, "served_rank": None, "says": says}


@pytest.mark.parametrize("config", [P.lora(3), P.superlora(2), P.dora(2)])
def test_info_and_summary_say_the_same(export_of: Any, config: tna.Config) -> None:
    torch = pytest.importorskip("torch")
    file = adapter(config)
    modules = {target.module.replace(".", "_"): torch.nn.Linear(20, target.shape[0]) for target in file.targets}
    summary = tna.torch.attach(torch.nn.ModuleDict(modules), config, targets=tuple(modules)).summary()
    assert str(summary.export) == export_of(file)["says"]
    assert str(summary).endswith(export_of(file)["says"])
