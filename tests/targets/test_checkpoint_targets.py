"""Targets of a checkpoint by kind: embeddings have their role by the usual names."""

from __future__ import annotations

import pytest

from tnadapt import Target, TargetError
from tnadapt.targets.checkpoint_targets import find_stored

STORED = {
    "model.embed_tokens.weight": (40, 8), "model.wte.weight": (40, 8), "model.layers.0.fc.weight": (16, 8),
    "model.layers.0.wte.norm.weight": (8,), "model.layers.0.shared.weight": (4, 4, 3), "lm_head.weight": (40, 8),
}  # fmt: skip


def test_embeddings_are_a_word_and_a_role() -> None:
    found = find_stored(STORED, "embeddings")
    assert [(target.module, target.role) for target in found] == [
        ("model.embed_tokens", "embedding"), ("model.wte", "embedding"),
    ]  # fmt: skip
    assert [target.role for target in find_stored(STORED, ["embed_tokens", "fc", "shared"])] == [
        "embedding", "linear", "conv",
    ]  # fmt: skip
    with pytest.raises(TargetError, match="no tensor of the checkpoint is a target for 'embeddings'"):
        find_stored({"layers.0.fc.weight": (4, 4)}, "embeddings")


@pytest.mark.parametrize("word", ["all-linear", "conv"])
def test_kinds_of_layers_need_the_model(word: str) -> None:
    message = f"no tensor .* target for '{word}'; a checkpoint does not say which layer a tensor is of. Give roles"
    with pytest.raises(TargetError, match=message):
        find_stored(STORED, word)
    assert find_stored({"stem.conv.weight": (4, 3, 3, 3)}, ["conv"])[0].module == "stem.conv"


def test_given_targets_have_the_shapes_of_their_tensors() -> None:
    given = [Target("lm_head", (40, 8)), Target("renamed", (4, 4))]
    assert find_stored(STORED, given) == given
    message = (
        r"lm_head\.weight has shape \(40, 8\) in the checkpoint, and the target .* is stored as \(8, 40\): give targets"
    )
    with pytest.raises(TargetError, match=message):
        find_stored(STORED, [Target("lm_head", (8, 40))])
