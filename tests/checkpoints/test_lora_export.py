"""One sentence on whether an adapter exports as LoRA: in summary, plan and info, and true of what convert writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tnadapt as tna
from tnadapt import AdapterFile, Config, ConfigError, Rows, SuperLoRA, Target
from tnadapt.checkpoints.lora_export import SERVED_RANKS, LoraExport, lora_export, served_rank

P = tna.presets
SHAPES = [(24, 20), (16, 20)] * 2


def adapter(config: Config, targets: list[Target] | None = None, activation: str | None = None) -> AdapterFile:
    targets = targets or [
        Target(f"layers.{i}.{'qv'[i % 2]}_proj", shape, "qv"[i % 2]) for i, shape in enumerate(SHAPES)
    ]
    plan = SuperLoRA(config, [target.shape for target in targets], roles=[target.role for target in targets])
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=shape).astype("f4") for name, shape in plan.param_shapes.items()}
    return AdapterFile(config, targets, arrays, activation=activation)


def said(file: AdapterFile) -> str:
    return str(lora_export(file.plan, file.targets, file.activation))


@pytest.mark.parametrize(
    ("config", "rank"),
    [
        (P.lora(1), 1),
        (P.lora(2), 2),
        (P.lotr(3, groups="role"), 3),
        (P.vera(rank=8), 8),
        (P.tinylora(13), 2),
    ],
)
def test_the_rank_is_that_of_what_convert_writes(config: Config, rank: int) -> None:
    file = adapter(config)
    export = lora_export(file.plan, file.targets)
    assert export.rank == rank
    served = {1: 1, 8: 8}.get(rank, 8)
    assert export.served == served
    padded = "" if served == rank else f" (padded to {served} for vLLM)"
    assert str(export) == f"exports exactly as LoRA of rank {rank}{padded}"
    if not file.complete:
        rng = np.random.default_rng(1)
        weights = [rng.normal(size=target.shape).astype("f4") for target in file.targets]
        file = file.with_base(weights)
    found = tna.convert(file, to="peft-lora")
    assert found.exact
    assert found.config is not None
    assert found.config["r"] == rank
    served_as = tna.convert(file, to="vllm")
    assert served_as.config is not None
    assert served_as.config["r"] == export.served


def test_rows_of_one_weight_are_updated_as_a_whole() -> None:
    targets = [
        Target("layers.0.qkv", (48, 40), role, rows=Rows(start, 16, 48)) for role, start in (("q", 0), ("v", 32))
    ]
    file = adapter(P.lora(2), targets)
    assert said(file) == "exports exactly as LoRA of rank 4 (padded to 8 for vLLM)"
    found = tna.convert(file, to="peft-lora").config
    assert found is not None
    assert found["r"] == 4


@pytest.mark.parametrize(
    ("config", "more", "sentence"),
    [
        (P.dense(), {}, "merge only: its updates may have matrix rank 20"),
        (P.dora(2), {}, "merge only: apply='magnitude' does more than add its updates"),
        (P.hira(2), {}, "merge only: apply='hadamard' does more than add its updates"),
        (P.lora(2), {"activation": "relu"}, "neither LoRA nor merged: an activation acts between its factors"),
        (
            P.lora(2),
            {"targets": [Target("attn", (48, 16), "q", "in_proj_weight", rows=Rows(0, 16, 48))]},
            "merge only: attn.in_proj_weight is not the weight of a layer",
        ),
    ],
)
def test_merge_only_says_why(config: Config, more: dict[str, Any], sentence: str) -> None:
    file = adapter(config, **more)
    assert said(file) == sentence
    with pytest.raises(ConfigError):
        tna.convert(file, to="vllm")


def test_vllm_serves_embeddings_of_one_name() -> None:
    file = adapter(P.lora(2), [Target("model.embed_tokens", (48, 40), "embedding")])
    assert said(file) == (
        "exports exactly as LoRA of rank 2 (of rank 8 for vLLM, if it has LoRA of this model's embedding)"
    )
    assert lora_export(file.plan, file.targets).served == 8
    assert tna.convert(file, to="peft-lora").exact
    found = tna.convert(file, to="vllm")
    assert (found.exact, found.config and found.config["r"]) == (True, 8)
    other = adapter(P.lora(2), [Target("wte", (48, 40), "embedding")])
    assert said(other) == (
        "exports exactly as LoRA of rank 2 (PEFT only: vLLM has no LoRA of the embedding wte, so merge it for vLLM)"
    )
    assert lora_export(other.plan, other.targets).served is None
    with pytest.raises(ConfigError, match="'wte' is an embedding, and vLLM has LoRA only of those named embed_tokens"):
        tna.convert(other, to="vllm")
    for to in ("diffusers", "kohya-lora"):
        with pytest.raises(ConfigError, match=r"'wte' is an embedding, and .* has no lora of such a layer"):
            tna.convert(other, to=to, part="text_encoder")


@pytest.mark.parametrize("stored", [(48, 4, 3, 3), (48, 40, 1, 1)])
def test_no_convolution_is_padded_for_vllm(stored: tuple[int, ...]) -> None:
    targets = [Target("mid_block.conv", stored, "conv"), Target("mid_block.attn.to_q", (48, 40), "q")]
    file = adapter(P.lora(2), targets)
    export = lora_export(file.plan, file.targets)
    assert str(export) == (
        "exports exactly as LoRA of rank 2 (PEFT, LyCORIS and diffusers only: vLLM and llama.cpp have no LoRA of "
        "convolutions, so merge it for them)"
    )
    assert export.to_dict()["served_rank"] is None
    for to in ("peft-lora", "lycoris", "diffusers", "kohya-lora"):
        assert tna.convert(file, to=to).exact
    with pytest.raises(
        ConfigError, match=r"'mid_block\.conv' is a convolution, and vLLM has no LoRA of convolutions: m"
    ):
        tna.convert(file, to="vllm")


def test_experts_are_lora_of_peft() -> None:
    file = adapter(P.lora(2), [Target("experts", (3, 48, 40), parameter="up_proj", index=1)])
    assert said(file) == (
        "exports exactly as LoRA of rank 2 (PEFT only: that of experts is not written for vLLM and others, so merge it "
        "for them)"
    )
    assert tna.convert(file, to="peft-lora").exact
    with pytest.raises(ConfigError, match=r"experts\.up_proj\[1\] cannot be converted to 'vllm-lora': it is one of"):
        tna.convert(file, to="vllm")
    other = adapter(P.lora(2), [Target("experts", (3, 48, 40), parameter="w", index=1)])
    assert said(other) == "merge only: experts.w is not the weight of a layer"


def test_vllm_takes_a_short_list_of_ranks() -> None:
    assert [served_rank(rank) for rank in SERVED_RANKS] == list(SERVED_RANKS)
    assert [served_rank(rank + 1) for rank in SERVED_RANKS] == [8, 16, 32, 64, 128, 256, 320, 512, None]
    assert str(LoraExport(600)) == "exports exactly as LoRA of rank 600 (vLLM takes ranks up to 512: merge it)"
    assert LoraExport(600).to_dict() == {"lora_rank": 600, "served_rank": None, "says": str(LoraExport(600))}


@pytest.mark.parametrize("config", [P.lora(3), P.superlora(2), P.dora(2)])
def test_info_plan_and_summary_say_the_same(config: Config, tmp_path: Path) -> None:
    file = adapter(config)
    tna.save(tmp_path / "adapter.safetensors", file)
    assert tna.info(tmp_path / "adapter.safetensors")["export"]["says"] == said(file)
    from tnadapt.planning._plan_table import Row

    row = Row.of(file.plan)
    assert str(row.export) == row.to_dict()["export"]["says"] == said(file)
    assert row.lora_rank == row.export.rank
    torch = pytest.importorskip("torch")
    model = torch.nn.ModuleDict(
        {target.module.replace(".", "_"): torch.nn.Linear(20, target.shape[0]) for target in file.targets}
    )
    from tnadapt.torch import attach

    attached = attach(model, config, targets=tuple(model))
    assert str(attached.summary().export) == said(file)
    assert str(attached.summary()).endswith(said(file))
