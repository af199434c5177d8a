"""Targets of a checkpoint: by kind, stacks of experts, and those of an adapter whose modules have other names."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tnadapt as tna
from tests.support import checkpoint_files as cp
from tnadapt import Rows, Target, TargetError
from tnadapt.targets.prefixes import Prefix, found_prefix, near_names, paired

from .internals import experts_of, find_stored, open_checkpoint, resolve

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


NEW = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
OLD = {"q": "query", "k": "key", "v": "value", "o": "output.dense"}


def queries(*modules: str) -> list[Target]:
    return [Target(module, (6, 6), "q") for module in modules]


def renamed(target: Target) -> Target:
    path = target.module.removesuffix(NEW[target.role])
    return dataclasses.replace(target, module=f"old.{path.replace('layers', 'block')}{OLD[target.role]}")


towers = st.lists(st.sampled_from(["encoder", "decoder", "vision", "text"]), min_size=1, max_size=3, unique=True)


@pytest.mark.law("renamed-modules")
@given(towers, st.integers(1, 12), st.sets(st.sampled_from("qkvo"), min_size=1), st.randoms())
def test_every_weight_is_paired_with_itself_whatever_the_order(
    names: list[str], layers: int, roles: set[str], luck: random.Random
) -> None:
    wanted = [
        Target(f"{tower}.layers.{layer}.attn.{NEW[role]}", (6, 6), role)
        for tower in names for layer in range(layers) for role in sorted(roles)
    ]  # fmt: skip
    luck.shuffle(wanted)
    found = [renamed(target) for target in wanted]
    expected = list(found)
    luck.shuffle(found)
    assert paired(wanted, found) == expected


@given(st.integers(1, 12), st.integers(1, 3), st.booleans(), st.randoms())
def test_layers_may_be_counted_in_another_way(layers: int, step: int, deeper: bool, luck: random.Random) -> None:
    wanted = queries(*(f"layers.{layer}.attn.q_proj" for layer in range(layers)))
    found = queries(*(f"block.{step * n + 1}{'.layer.0' if deeper else ''}.attention.query" for n in range(layers)))
    expected = list(found)
    luck.shuffle(found)
    assert paired(wanted, found) == expected


def test_layers_of_several_kinds_are_told_apart_by_their_numbers() -> None:
    wanted = queries("blocks.0.qkv", "blocks.1.q_proj", "blocks.2.attn.to_q")
    found = queries("layers.2.self.query", "layers.0.attn.wqkv_q", "layers.1.query")
    assert paired(wanted, found) == [found[1], found[2], found[0]]


def test_towers_without_a_common_word_are_told_apart_by_shapes_or_not_at_all() -> None:
    wide = Target("vision.layers.0.q", (8, 8), "q")
    wanted = [*queries("text.layers.0.q"), wide]
    found = [dataclasses.replace(wide, module="visual.block.0.query"), *queries("language.block.0.query")]
    assert paired(wanted, found) == [found[1], found[0]]
    narrow = queries("visual.block.0.query", "language.block.0.query")
    assert paired(queries("text.layers.0.q", "vision.layers.0.q"), narrow) is None


def test_self_and_cross_attention() -> None:
    """In a model the first comes first, in the alphabet the second."""
    wanted = queries("decoder.layers.0.self_attn.q_proj", "decoder.layers.0.encoder_attn.q_proj")
    found = queries("dec.layers.0.encoder_attn.q_proj", "dec.layers.0.self_attn.q_proj")
    assert paired(wanted, found) == found[::-1]


def test_what_does_not_correspond_is_not_paired() -> None:
    one, two = queries("layers.0.q"), queries("h.0.q", "h.1.q")
    assert paired(one, two) is None
    assert paired(two, one) is None
    assert paired(one, [Target("h.0.q", (6, 6), "v")]) is None
    assert paired(one, [Target("h.0.q", (6, 7), "q")]) is None
    assert paired([*one, *one], two) is None
    assert paired([], []) == []


def test_rows_of_one_weight_are_paired_by_role() -> None:
    fused = [Target("h.0.attn.qkv", (24, 8), role, rows=Rows(start, 8, 24)) for role, start in (("v", 16), ("q", 0))]
    apart = [Target(f"layers.0.attn.{role}_proj", (8, 8), role) for role in "qv"]
    assert paired(apart, fused) == fused[::-1]


@pytest.mark.law("renamed-modules")
@pytest.mark.parametrize("name", ["wq", "wk"])
def test_a_format_that_orders_rotary_rows_in_another_way_is_not_paired(name: str) -> None:
    role = name[1]
    ours, theirs = (Target(f"layers.0.attention.{one}", (8, 8), role) for one in (f"{role}_proj", name))
    assert paired([ours], [theirs]) is None
    assert paired([theirs], [ours]) is None
    assert paired([theirs], [dataclasses.replace(theirs, module=f"model.layers.0.attn.{name}")]) is not None
    values = [Target(f"layers.0.attention.{one}", (8, 8), "v") for one in ("v_proj", "wv")]
    assert paired(values[:1], values[1:]) == values[1:]


@pytest.mark.law("renamed-modules")
def test_an_adapter_of_an_encoder_and_a_decoder_is_placed_where_it_was_trained(tmp_path: Path) -> None:
    """It was not: the modules are in the model's order, the tensors in that of the alphabet, and all of one shape."""

    def stored(folder: str, *towers: str) -> Path:
        names = [f"{one}.block.{n}.attention.{name}.weight" for one in towers for n in (0, 1) for name in OLD.values()]
        return cp.write(tmp_path / folder, {name: ("F32", np.ones((6, 6), "<f4")) for name in names})

    trained = queries(*(f"{one}.layers.{n}.self_attn.q_proj" for one in ("encoder", "decoder") for n in (0, 1)))
    file = cp.adapter(tna.presets.lora(1), trained)
    found = resolve(open_checkpoint(stored("same", "encoder", "decoder")), file)
    assert [target.module for target in found.targets] == [
        f"{one}.block.{n}.attention.query" for one in ("encoder", "decoder") for n in (0, 1)
    ]
    # Where nothing says which is which, nothing is placed.
    with pytest.raises(tna.FileError, match="weights of the same roles and shapes cannot be told apart"):
        resolve(open_checkpoint(stored("other", "first", "second")), file)


def test_a_fused_weight_that_is_not_understood_is_named_when_an_adapter_is_placed(tmp_path: Path) -> None:
    file = cp.adapter(tna.presets.lora(1), queries("layers.0.attn.q_proj"))
    base = cp.write(tmp_path, {"h.0.attention.query_key_value.weight": ("F32", np.ones((18, 6), "<f4"))})
    with pytest.raises(tna.FileError, match=r"cannot be identified: .*'query_key_value' in different ways.*config"):
        resolve(open_checkpoint(base), file)


# -- Names of one model in two places that differ by a prefix -------------------------------------------------------


NAMES = st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map(".".join), min_size=1, unique=True)


@given(NAMES, st.lists(st.sampled_from("xyz"), min_size=1, max_size=2).map(".".join), st.booleans())
def test_one_prefix_more_or_less_is_found(modules: list[str], prefix: str, more: bool) -> None:
    targets = [Target(module if more else f"{prefix}.{module}", (2, 3)) for module in modules]
    stored = {f"{prefix}.{module}.weight" if more else f"{module}.weight": (2, 3) for module in modules}
    found = found_prefix(targets, stored)
    assert found == (Prefix(given=f"{prefix}.") if more else Prefix(taken=f"{prefix}."))
    assert {found.target(target).name for target in targets} == set(stored)
    assert found_prefix(targets, {target.name: (2, 3) for target in targets}) == Prefix()


def test_of_several_the_shapes_tell() -> None:
    targets = [Target("layer.0.q", (2, 2))]
    stored = {"encoder.layer.0.q.weight": (2, 2), "decoder.layer.0.q.weight": (3, 3)}
    assert found_prefix(targets, stored) == Prefix(given="encoder.")
    with pytest.raises(tna.TargetError, match="may be any of 'decoder"):
        found_prefix(targets, {**stored, "decoder.layer.0.q.weight": (2, 2)})
    two = [*targets, Target("layer.1.q", (2, 2))]
    both = {f"{part}.layer.{n}.q.weight": (2, 2) for part in ("encoder", "decoder") for n in range(2)}
    either = r"'decoder\.layer\.0\.q\.weight', 'encoder\.layer\.0\.q\.weight'"
    why = rf"^'layer\.0\.q\.weight' may be any of {either}, and it is unclear which"
    with pytest.raises(tna.TargetError, match=why):
        found_prefix(two, both)
    assert found_prefix(two, {**both, "decoder.layer.1.q.weight": (3, 3)}) == Prefix(given="encoder.")


def test_names_that_no_prefix_explains() -> None:
    targets = [Target("layer.0.q", (2, 2)), Target("layer.0.v", (2, 2))]
    stored = {"model.layer.0.q.weight": (2, 2), "other.layer.0.v.weight": (2, 2)}
    assert found_prefix(targets, stored) is None
    assert "model.layer.0.q.weight" in near_names("layer.0.q.weight", stored)
    assert near_names("layer.0.q.weight", ["zzz"]) == ""
    with pytest.raises(tna.TargetError, match=r"does not begin with 'bert\.'"):
        Prefix(taken="bert.").target(targets[0])
