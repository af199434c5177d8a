"""One sentence on whether an adapter exports as LoRA: in summary, plan and info, and true of what convert writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tnadapt as tna
from tnadapt import AdapterFile, Config, ConfigError, Rows, SuperLoRA, Target

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


@pytest.fixture
def export_of(tmp_path: Path) -> Any:
    """What ``tnadapt.info`` says of the export of an adapter."""

    def ask(file: AdapterFile) -> dict[str, Any]:
        tna.save(tmp_path / "adapter.safetensors", file)
        export: dict[str, Any] = tna.info(tmp_path / "adapter.safetensors")["export"]
        return export

    return ask


EXACTLY = "exports exactly as LoRA of rank"
QKV = [Target("layers.0.qkv", (48, 40), role, rows=Rows(start, 16, 48)) for role, start in (("q", 0), ("v", 32))]


@pytest.mark.parametrize(
    ("config", "targets", "rank", "served"),
    [
        (P.lora(1), None, 1, 1),
        (P.lora(2), None, 2, 8),
        (P.lotr(3, groups="role"), None, 3, 8),
        (P.vera(rank=8), None, 8, 8),
        (P.tinylora(13), None, 2, 8),
        (P.lora(2), QKV, 4, 8),  # rows of one weight are updated as a whole
    ],
)
def test_the_rank_is_that_of_what_convert_writes(
    export_of: Any, config: Config, targets: list[Target] | None, rank: int, served: int
) -> None:
    file = adapter(config, targets)
    padded = "" if served == rank else f" (padded to {served} for vLLM)"
    says = f"{EXACTLY} {rank}{padded}"
    assert export_of(file) == {"lora_rank": rank, "served_rank": served, "says": says}
    if not file.complete:
        rng = np.random.default_rng(1)
        file = file.with_base([rng.normal(size=target.shape).astype("f4") for target in file.targets])
    for to, written_rank in (("peft-lora", rank), ("vllm", served)):
        written = tna.convert(file, to=to)
        assert written.exact
        assert written.config is not None
        assert written.config["r"] == written_rank


IN_PROJ = Target("attn", (48, 16), "q", "in_proj_weight", rows=Rows(0, 16, 48))
EXPERT = Target("experts", (3, 48, 40), parameter="w", index=1)


@pytest.mark.parametrize(
    ("file", "says"),
    [
        (adapter(P.dense()), "merge only: its updates may have matrix rank 20"),
        (adapter(P.dora(2)), "merge only: apply='magnitude' does more than add its updates"),
        (adapter(P.hira(2)), "merge only: apply='hadamard' does more than add its updates"),
        (adapter(P.lora(2), [IN_PROJ]), "merge only: attn.in_proj_weight is not the weight of a layer"),
        (adapter(P.lora(2), [EXPERT]), "merge only: experts.w is not the weight of a layer"),
        (
            adapter(P.lora(2), activation="relu"),
            "neither LoRA nor merged: an activation acts between its factors",
        ),
    ],
)
def test_merge_only_says_why(export_of: Any, file: AdapterFile, says: str) -> None:
    assert export_of(file)["says"] == says
    with pytest.raises(ConfigError):
        tna.convert(file, to="vllm")


CONV = "PEFT, LyCORIS and diffusers only: vLLM and llama.cpp have no LoRA of convolutions, so merge it for them"


@pytest.mark.parametrize(
    ("target", "says", "refused"),
    [
        *(
            (Target("conv", stored, "conv"), CONV, "'conv' is a convolution, and vLLM has no LoRA of convolutions: m")
            for stored in ((48, 4, 3, 3), (48, 40, 1, 1))
        ),
        (
            Target("experts", (3, 48, 40), parameter="up_proj", index=1),
            "PEFT only: that of experts is not written for vLLM and others, so merge it for them",
            r"experts\.up_proj\[1\] cannot be converted to 'vllm-lora': it is one of",
        ),
        (
            Target("wte", (48, 40), "embedding"),
            "PEFT only: vLLM has no LoRA of the embedding wte, so merge it for vLLM",
            "'wte' is an embedding, and vLLM has LoRA only of those named embed_tokens",
        ),
    ],
)
def test_what_vllm_does_not_serve(export_of: Any, target: Target, says: str, refused: str) -> None:
    file = adapter(P.lora(2), [target, Target("mid_block.attn.to_q", (48, 40), "q")])
    assert export_of(file) == {"lora_rank": 2, "served_rank": None, "says": f"{EXACTLY} 2 ({says})"}
    for to in ("peft-lora", "lycoris", "diffusers", "kohya-lora") if target.role == "conv" else ("peft-lora",):
        assert tna.convert(file, to=to).exact
    with pytest.raises(ConfigError, match=refused):
        tna.convert(file, to="vllm")


def test_vllm_serves_embeddings_of_one_name(export_of: Any) -> None:
    file = adapter(P.lora(2), [Target("model.embed_tokens", (48, 40), "embedding")])
    says = f"{EXACTLY} 2 (of rank 8 for vLLM, if it has LoRA of this model's embedding)"
    assert export_of(file) == {"lora_rank": 2, "served_rank": 8, "says": says}
    assert tna.convert(file, to="peft-lora").exact
    found = tna.convert(file, to="vllm")
    assert (found.exact, found.config and found.config["r"]) == (True, 8)
    for to in ("diffusers", "kohya-lora"):
        with pytest.raises(ConfigError, match=r"'wte' is an embedding, and .* has no lora of such a layer"):
            tna.convert(adapter(P.lora(2), [Target("wte", (48, 40), "embedding")]), to=to, part="text_encoder")


def test_vllm_takes_a_short_list_of_ranks(export_of: Any) -> None:
    ranks = [1, 8, 16, 32, 64, 128, 256, 320, 512]
    for rank, served in zip(ranks, [*ranks[1:], None], strict=True):
        for asked, expected in ((rank, rank), (rank + 1, served)):
            assert export_of(adapter(P.lora(asked), [Target("a", (1300, 1300))]))["served_rank"] == expected
    says = f"{EXACTLY} 600 (vLLM takes ranks up to 512: merge it)"
    export = export_of(adapter(P.lora(600), [Target("a", (1300, 1300))]))
    assert export == {"lora_rank": 600, "served_rank": None, "says": says}


@pytest.mark.parametrize("config", [P.lora(3), P.superlora(2), P.dora(2)])
def test_info_and_summary_say_the_same(export_of: Any, config: Config) -> None:
    torch = pytest.importorskip("torch")
    file = adapter(config)
    modules = {target.module.replace(".", "_"): torch.nn.Linear(20, target.shape[0]) for target in file.targets}
    summary = tna.torch.attach(torch.nn.ModuleDict(modules), config, targets=tuple(modules)).summary()
    assert str(summary.export) == export_of(file)["says"]
    assert str(summary).endswith(export_of(file)["says"])
