"""Experts in checkpoints: stacks and single tensors become the targets of the model in memory."""

from __future__ import annotations

import pytest

import tnadapt as tna
from tnadapt.targets.checkpoint_experts import experts_of
from tnadapt.targets.checkpoint_targets import find_stored

STACKS = {"mlp.experts.gate_up_proj": (2, 8, 12), "mlp.experts.down_proj": (2, 6, 8)}
SINGLE = {f"moe.experts.{index}.{name}.weight": (4, 8) for index in range(3) for name in ("w1", "w3")}


def test_the_axes_of_a_stack_follow_from_both_parameters() -> None:
    assert {one.target.transposed for one in experts_of(STACKS)} == {True}
    plain = {name: (shape[0], shape[2], shape[1]) for name, shape in STACKS.items()}
    assert {one.target.transposed for one in experts_of(plain)} == {False}
    assert experts_of(plain)[0].target.shape == experts_of(STACKS)[0].target.shape == (12, 8)


def test_without_a_gate_the_hidden_size_decides() -> None:
    stacks = {"experts.up_proj": (2, 8, 6), "experts.down_proj": (2, 6, 8)}
    assert experts_of(stacks, {"hidden_size": 8})[0].target.transposed
    assert not experts_of(stacks, {"hidden_size": 6})[0].target.transposed
    for config in (None, {"hidden_size": 5}):
        with pytest.raises(tna.TargetError, match=r"experts stacks .* do not tell inputs from outputs: build the"):
            experts_of(stacks, config)
    square = {"experts.up_proj": (2, 6, 6), "experts.down_proj": (2, 6, 6)}
    with pytest.raises(tna.TargetError, match="do not tell inputs from outputs"):
        experts_of(square, {"hidden_size": 6})


def test_an_unclear_stack_does_not_matter_if_it_is_not_wanted() -> None:
    stacks = {"experts.up_proj": (2, 6, 6), "attn.q_proj.weight": (6, 6)}
    assert [target.name for target in find_stored(stacks, ["q_proj"])] == ["attn.q_proj.weight"]
    with pytest.raises(tna.TargetError, match="do not tell inputs from outputs"):
        find_stored(stacks, ["experts"])


def test_single_tensors_are_rows_of_one_matrix() -> None:
    found = find_stored(SINGLE, ["experts"])
    assert [(target.label, target.shape) for target in found] == [
        (f"moe.experts.gate_up_proj[{index}]", (8, 8)) for index in range(3)
    ]
    renamed = {name.replace("moe.", "layers.4.block_sparse_moe."): shape for name, shape in SINGLE.items()}
    (target, *_) = find_stored(renamed, r".*\.mlp\.experts")
    assert (target.module, target.layer) == ("layers.4.mlp.experts", "layers.4")
    assert find_stored(renamed, ".*experts.*")[0] == target  # and none of the single tensors in addition


def test_tensors_of_several_shapes_or_with_gaps_are_no_stack() -> None:
    gap = {name: shape for name, shape in SINGLE.items() if ".1." not in name}
    uneven = {**SINGLE, "moe.experts.2.w1.weight": (5, 8)}
    missing = {name: shape for name, shape in SINGLE.items() if name != "moe.experts.2.w3.weight"}
    for shapes in (gap, uneven, missing):
        assert experts_of(shapes) == []
        assert len(find_stored(shapes, r".*\.w1")) >= 2


def test_up_alone_is_a_stack_of_its_own() -> None:
    shapes = {f"experts.{index}.{name}_proj.weight": size for index in (0, 1) for name, size in _UNGATED.items()}
    assert [one.target.label for one in experts_of(shapes)] == [
        f"experts.{name}_proj[{index}]" for name in ("up", "down") for index in (0, 1)
    ]


_UNGATED = {"up": (6, 4), "down": (4, 6)}
