"""Folders for vLLM: one rank of its list, a scale of 1, and nothing that it does not serve."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import tnadapt as tna
from tnadapt import ConfigError

from .conversions import CONVS, SHAPES, assert_same_updates, converted, made

SQUARE = {f"layers.{layer}.q_proj": (80, 80) for layer in range(2)}


@pytest.mark.parametrize(("rank", "served"), [(1, 1), (2, 8), (8, 8), (9, 16), (33, 64)])
def test_the_rank_is_padded_to_one_that_vllm_takes(rank: int, served: int, tmp_path: Path) -> None:
    file = made(tna.presets.lora(rank, alpha=3), SQUARE)
    found = tna.convert(file, tmp_path / "out", to="vllm", rank=None if rank < 33 else 33)
    assert found.config is not None
    assert (found.config["r"], found.config["lora_alpha"]) == (served, served)
    assert (found.config["rank_pattern"], found.config["alpha_pattern"]) == ({}, {})
    assert {min(array.shape) for array in found.tensors.values()} == {served}
    assert found.exact
    assert tna.convert(tmp_path / "out").origin == "peft-lora"
    assert_same_updates(converted(tmp_path / "out"), file)


def test_ranks_that_differ_become_one() -> None:
    shapes = {"layers.0.q_proj": (24, 40), "layers.0.v_proj": (3, 40)}
    found = tna.convert(made(tna.presets.lotr(5, groups="weight"), shapes), to="vllm-lora", rank=5)
    assert found.config is not None
    assert found.config["r"] == 8
    assert found.config["rank_pattern"] == {}


def test_what_vllm_does_not_serve_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"apply='magnitude' of this adapter does more than add ΔW .*vllm-lora"):
        tna.convert(made(tna.presets.dora(rank=2)), to="vllm")
    with pytest.raises(ConfigError, match=r"'stem.conv' is a convolution, and vLLM has no LoRA of convolutions: merge"):
        tna.convert(made(tna.presets.lora(2), CONVS), to="vllm")
    wide = {"layers.0.q_proj": (1200, 1200)}
    with pytest.raises(ConfigError, match="the LoRA of this adapter has rank 513, and vLLM takes ranks up to 512"):
        tna.convert(made(tna.presets.lora(513), wide), to="vllm")
    plain = made(tna.presets.lora(2), SHAPES)
    kept = {"lm_head.weight": np.ones((3, 4), "f4")}
    other = dataclasses.replace(plain, kept=kept)
    message = "besides LoRA, vLLM loads only trained modules named classifier or score, and"
    with pytest.raises(ConfigError, match=message):
        tna.convert(other, to="vllm")
    assert tna.convert(other, to="vllm", without_kept=True).exact
    head = dataclasses.replace(plain, kept={"score.weight": np.ones((3, 4), "f4")})
    found = tna.convert(head, to="vllm")
    assert found.config is not None
    assert found.config["modules_to_save"] == ["score"]
    bias = dataclasses.replace(plain, kept={"score.bias": np.ones(3, "f4")})
    with pytest.raises(tna.ConfigError, match=r"this adapter has 'score\.bias'"):
        tna.convert(bias, to="vllm")
