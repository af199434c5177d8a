"""Targets of a checkpoint by kind: embeddings have their role by the usual names, and experts their matrices."""

from __future__ import annotations

import pytest

from tnadapt import Target, TargetError

from .internals import experts_of, find_stored

STORED = {
    "model.embed_tokens.weight": (40, 8), "model.wte.weight": (40, 8), "model.layers.0.fc.weight": (16, 8),
    "model.layers.0.wte.norm.weight": (8,), "model.layers.0.shared.weight": (4, 4, 3), "lm_head.weight": (40, 8),
}  # fmt: skip


def test_embeddings_are_a_word_and_a_role() -> None:
    found = [(target.module, target.role) for target in find_stored(STORED, "embeddings")]
    assert found == [("model.embed_tokens", "embedding"), ("model.wte", "embedding")]
    roles = [target.role for target in find_stored(STORED, ["embed_tokens", "fc", "shared"])]
    assert roles == ["embedding", "linear", "conv"]
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
    message = r"has shape \(40, 8\) in the checkpoint, and the target .* is stored as \(8, 40\): give targets"
    with pytest.raises(TargetError, match=rf"lm_head\.weight {message}"):
        find_stored(STORED, [Target("lm_head", (8, 40))])


# -- Experts: stacks and single tensors become the targets of the model in memory -----------------------------------


STACKS = {"mlp.experts.gate_up_proj": (2, 8, 12), "mlp.experts.down_proj": (2, 6, 8)}
SINGLE = {f"moe.experts.{index}.{name}.weight": (4, 8) for index in range(3) for name in ("w1", "w3")}


def test_the_axes_of_a_stack_follow_from_both_parameters() -> None:
    assert {one.target.transposed for one in experts_of(STACKS)} == {True}
    plain = {name: (shape[0], shape[2], shape[1]) for name, shape in STACKS.items()}
    assert {one.target.transposed for one in experts_of(plain)} == {False}
    assert experts_of(plain)[0].target.shape == experts_of(STACKS)[0].target.shape == (12, 8)


def test_without_a_gate_the_hidden_size_decides() -> None:
    stacks = {"experts.up_proj": (2, 8, 6), "experts.down_proj": (2, 6, 8)}
    square = {"experts.up_proj": (2, 6, 6), "experts.down_proj": (2, 6, 6), "attn.q_proj.weight": (6, 6)}
    assert experts_of(stacks, {"hidden_size": 8})[0].target.transposed
    assert not experts_of(stacks, {"hidden_size": 6})[0].target.transposed
    for shapes, config in ((stacks, None), (stacks, {"hidden_size": 5}), (square, {"hidden_size": 6})):
        with pytest.raises(TargetError, match=r"experts stacks .* do not tell inputs from outputs: build the"):
            find_stored(shapes, ["experts"], config)
    # It does not matter if it is not wanted.
    assert [target.name for target in find_stored(square, ["q_proj"])] == ["attn.q_proj.weight"]


def test_single_tensors_are_rows_of_one_matrix() -> None:
    found = find_stored(SINGLE, ["experts"])
    assert [(target.label, target.shape) for target in found] == [
        (f"moe.experts.gate_up_proj[{index}]", (8, 8)) for index in range(3)
    ]
    renamed = {name.replace("moe.", "layers.4.block_sparse_moe."): shape for name, shape in SINGLE.items()}
    (target, *_) = find_stored(renamed, r".*\.mlp\.experts")
    assert (target.module, target.layer) == ("layers.4.mlp.experts", "layers.4")
    assert find_stored(renamed, ".*experts.*")[0] == target  # and none of the single tensors in addition
    # Up alone is a stack of its own.
    sizes = {"up": (6, 4), "down": (4, 6)}
    shapes = {f"experts.{index}.{name}_proj.weight": size for index in (0, 1) for name, size in sizes.items()}
    assert [one.target.label for one in experts_of(shapes)] == [
        f"experts.{name}_proj[{index}]" for name in ("up", "down") for index in (0, 1)
    ]


def test_tensors_of_several_shapes_or_with_gaps_are_no_stack() -> None:
    gap = {name: shape for name, shape in SINGLE.items() if ".1." not in name}
    uneven = {**SINGLE, "moe.experts.2.w1.weight": (5, 8)}
    missing = {name: shape for name, shape in SINGLE.items() if name != "moe.experts.2.w3.weight"}
    for shapes in (gap, uneven, missing):
        assert experts_of(shapes) == []
        assert len(find_stored(shapes, r".*\.w1")) >= 2
